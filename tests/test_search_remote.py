"""A search on other machines: what is refused in its file, the connections, and (slow) a machine that is stopped.

The machines are SSH servers of this one, at two addresses of the loopback interface, with a key made for the test.
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT, run

import search
from engines import machines, nni_engine
from engines.machines import Connections, MachinesLost, check_machines
from engines.search_files import read_generations, state_path
from engines.search_record import prepare_search
from utils import UserError, read_json, write_json

SMALL = ("--demo", "--heldout-per-class", 4, "--bn-batches", 2, "--bn-batch-size", 32, "--threads", 1)
SEARCH = ("--population", 6, "--select", 2, "--mutation", 2, "--crossover", 2, "--generations", 3, "--concurrency", 2)
MACHINE = {"host": "192.0.2.1", "user": "me", "sshKeyFile": "key", "pythonPath": "/opt/bin"}
HOSTS = ("127.0.0.1", "127.0.0.2")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH')}:/usr/sbin")


# --- the file ------------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(tmp_path):
    """Writes config_search_remote.yml with this trainingService."""
    (tmp_path / "key").write_text("a key")

    def write(service):
        path = tmp_path / "remote.yml"
        content = yaml.safe_load((ROOT / "config_search_remote.yml").read_text())
        path.write_text(yaml.safe_dump(content | {"trainingService": service}))
        return path

    return write


def test_the_committed_file_differs_in_its_machines_alone(tmp_path):
    plain, remote = (
        yaml.safe_load((ROOT / name).read_text()) for name in ("config_search.yml", "config_search_remote.yml")
    )
    service = remote["trainingService"]
    assert service["platform"] == "remote" and len(service["machineList"]) == 2
    assert remote.pop("trialConcurrency") == 2 and "trialConcurrency" not in plain
    assert remote | {"trainingService": plain["trainingService"]} == plain
    (tmp_path / "key").write_text("a key")
    check_machines(tmp_path / "remote.yml", [machine | {"sshKeyFile": "key"} for machine in service["machineList"]])


def test_machines_get_their_port_and_the_whole_path_of_the_key(tmp_path, experiment):
    path = experiment({"platform": "remote", "machineList": [MACHINE, MACHINE | {"port": 2222}]})
    found = nni_engine.read_experiment(path)["trainingService"]["machineList"]
    assert found == [MACHINE | {"port": port, "sshKeyFile": str(tmp_path / "key")} for port in (22, 2222)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"password": "x"}, "machine 1 has the unknown entry 'password'"),
        ({"user": None}, "machine 1: user is None, not a string"),
        ({"sshKeyFile": ""}, "machine 1: sshKeyFile is '', not a string"),
        ({"port": 0}, "machine 1: port is 0, not a number"),
        ({"port": "22"}, "machine 1: port is '22', not a number"),
        ({"host": "-oProxyCommand=x"}, "machine 1: host is .* a shell"),
        ({"pythonPath": "/opt/$(x)"}, "machine 1: pythonPath is .* a shell"),
        ({"pythonPath": "bin"}, "machine 1: pythonPath is 'bin', not the absolute path"),
    ],
)
def test_a_wrong_entry_of_a_machine_is_named(experiment, changes, message):
    with pytest.raises(UserError, match=rf"remote\.yml: {message}"):
        nni_engine.read_experiment(experiment({"platform": "remote", "machineList": [MACHINE | changes]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "trainingService is .* not just platform: local, or platform: remote"),
        ({"machineList": [MACHINE], "trialGpuNumber": 1}, "trainingService is .* not just platform: local, or"),
        ({"machineList": []}, r"machineList is \[\], not a list of machines"),
        ({"machineList": MACHINE}, "machineList is .*, not a list of machines"),
        ({"machineList": [MACHINE, "host"]}, "machine 2 is 'host', not a mapping"),
    ],
)
def test_what_is_no_list_of_machines_is_named(experiment, changes, message):
    with pytest.raises(UserError, match=rf"remote\.yml: {message}"):
        nni_engine.read_experiment(experiment({"platform": "remote", **changes}))


def test_a_wrong_file_ends_the_command_with_a_line(tmp_path, experiment):
    path = experiment({"platform": "remote", "machineList": [MACHINE, MACHINE | {"sshKeyFile": "none"}]})
    settings = tmp_path / "settings.yml"
    settings.write_text("search: {experiment: remote.yml}")
    for words in (("--experiment", path), ("--config", settings)):
        _, stderr = run("search.py", *words, "--out", tmp_path, code=2)
        assert stderr.startswith("search.py: error: ") and stderr.count("\n") == 1
        assert f"remote.yml: machine 2: sshKeyFile {tmp_path / 'none'} is not a file" in stderr


def test_the_file_sets_the_defaults(tmp_path, experiment):
    path = experiment({"platform": "remote", "machineList": [MACHINE]})
    assert search.parse_args(["--experiment", str(path)]).concurrency == 2
    assert search.parse_args(["--experiment", str(path), "--concurrency", "5"]).concurrency == 5
    assert search.parse_args([]).concurrency == 1
    content = yaml.safe_load(path.read_text())
    content["trainingService"]["machineList"].append(MACHINE | {"host": "192.0.2.2"})
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if k != "trialConcurrency"}))
    assert search.parse_args(["--experiment", str(path)]).concurrency == 2


def test_trials_elsewhere_run_the_code_that_is_brought_there(tmp_path, experiment):
    out = tmp_path / "a $(folder)"
    found = nni_engine.read_experiment(experiment({"platform": "remote", "machineList": [MACHINE]}))
    words = nni_engine.trial_command(found, out, {"data_dir": "data"})
    assert words == ["python", "tester.py", "--mode", "test", "--config", str(out / "checkpoints/search/trial.yml")]


# --- the connections -----------------------------------------------------------------------------------------


def fake_ssh(folder, monkeypatch, script):
    """A program of the name ssh that runs this shell script."""
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def entries(*hosts):
    return [MACHINE | {"port": 22, "host": host} for host in hosts]


def test_a_connection_carries_the_port_and_ends_with_its_context(tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, 'echo "$@" >>words; exec cat')
    with Connections(entries("192.0.2.1", "127.0.0.2"), 8080, tmp_path) as connections:
        connections.check()
        assert connections.lost() == []
        links = connections.links
    assert all(link.poll() is not None for link in links)
    far, own = sorted((tmp_path / "words").read_text().splitlines(), key=len, reverse=True)
    assert "-R 127.0.0.1:8080:127.0.0.1:8080" in far and far.endswith(" -- 192.0.2.1 cat")
    assert "-R" not in own.split()


def test_an_ended_connection_names_its_machine(tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, "exec cat")
    with Connections(entries("192.0.2.1", "192.0.2.2"), 8080, tmp_path) as connections:
        connections.links[1].kill()
        with pytest.raises(MachinesLost, match=r"no SSH connection to 192\.0\.2\.2:22") as caught:
            connections.check(10)
    assert caught.value.machines == entries("192.0.2.2")


def test_what_ssh_says_of_a_machine_that_does_not_answer_is_told(tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, "echo 'Permission denied (publickey).' >&2; exit 255")
    with (
        pytest.raises(MachinesLost, match=r"192\.0\.2\.1:22 \(Permission denied"),
        Connections(entries("192.0.2.1"), 8080, tmp_path),
    ):
        pass


def test_the_search_continues_with_the_machines_that_are_left(tmp_path, monkeypatch):
    found = nni_engine.read_experiment(ROOT / "config_search.yml") | {
        "trainingService": {"platform": "remote", "machineList": entries("192.0.2.1", "192.0.2.2", "192.0.2.3")}
    }
    tried = []

    def host(config, out):
        asked = config["trainingService"]["machineList"]
        state = read_json(state_path(out))
        tried.append(([machine["host"] for machine in asked], config["trialConcurrency"], state["error"]))
        assert state["warnings"] == ["odd"]
        assert [start["own"] for start in state["starts"]] == ["own.py"]  # without any result, too
        write_json(state_path(out), state | {"error": "the machine is gone"})
        raise MachinesLost(asked[:1], "no SSH connection")

    prepare_search(tmp_path, {"seed": 0}, resume=False, warnings=["odd"], start={"command": "a", "own": "own.py"})
    monkeypatch.setattr(nni_engine, "FORGET_S", 0)
    monkeypatch.setattr(nni_engine, "host_experiment", host)
    with pytest.raises(UserError, match="no machine is left; resume the search with --resume"):
        nni_engine.search_with_nni(tmp_path, ["trial"], found, concurrency=6)
    hosts = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    assert tried == [(hosts, 6, None), (hosts[1:], 4, None), (hosts[2:], 2, None)]


def test_addresses_of_the_loopback_interface_are_known():
    assert all(map(machines.is_this_machine, ("localhost", "127.0.0.2", "::1")))
    assert not any(map(machines.is_this_machine, ("192.0.2.1", "node1", "localhost.example.com")))


# --- for real ------------------------------------------------------------------------------------------------


class Server:
    """An SSH server on the loopback interface that knows one key; what runs through it has a HOME of its own."""

    def __init__(self, folder, host):
        self.folder, self.host = folder, host
        self.home = folder / f"home_{host}"
        self.home.mkdir()
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        make_key(folder / f"host_key_{host}")
        variables = {"HOME": self.home, "OMP_NUM_THREADS": 1, "PIP_NO_INDEX": 1, "TMPDIR": self.home}
        options = {
            "Port": self.port, "ListenAddress": host, "HostKey": folder / f"host_key_{host}",
            "AuthorizedKeysFile": folder / "key.pub",
            "AllowUsers": getpass.getuser(), "PidFile": "none", "StrictModes": "no", "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no", "PermitRootLogin": "prohibit-password",
            "Subsystem": "sftp internal-sftp",
            "SetEnv": " ".join(f"{name}={value}" for name, value in variables.items()),
        }  # fmt: skip
        config = folder / f"sshd_{host}"
        config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        with open(folder / f"sshd_{host}.log", "w") as log:
            self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log)

    def entry(self):
        python = pathlib.Path(sys.executable)
        return {
            "host": self.host,
            "port": self.port,
            "user": getpass.getuser(),
            "sshKeyFile": "key",
            "pythonPath": str(python.parent),
        }

    def running(self):
        """What runs on this machine, without its server: what it started, even if its parent has ended."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home):
                    found.append(process)
        return found

    def trials(self):
        found = []
        for process in self.running():
            with contextlib.suppress(psutil.Error):
                if "tester.py" in process.cmdline():
                    found.append(process)
        return found

    def stop(self, number=signal.SIGKILL):
        """Signals the server and all that runs: killed ones end their connections, stopped ones say nothing more."""
        if self.process.poll() is None:
            server = psutil.Process(self.process.pid)
            for process in [server, *server.children(recursive=True), *self.running()]:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            if number == signal.SIGKILL:
                self.process.wait()


def make_key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


@pytest.fixture
def servers(tmp_path):
    if SSHD is None or not shutil.which("ssh"):
        pytest.skip("needs ssh and sshd (Debian: openssh-server)")
    if os.getuid() == 0:
        with contextlib.suppress(FileExistsError):
            os.mkdir("/run/sshd", 0o755)  # where sshd, as root, locks itself in before a login
    make_key(tmp_path / "key")
    started = []
    try:
        for host in HOSTS:
            started.append(Server(tmp_path, host))
        yield started
    finally:
        for server in started:
            server.stop()


def wait_for(condition, what, process, log):
    deadline = time.monotonic() + 300
    while not (value := condition()):
        assert process.poll() is None and time.monotonic() < deadline, f"{what}\n{log.read_text()}"
        time.sleep(0.1)
    return value


def outcome(out):
    """Every generation: architectures with their accuracies, by rank."""
    return [
        [(r["architecture"], r["acc1"], r["acc5"], r["n_images"]) for r in results] for results in read_generations(out)
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with a supernet and a finished search of it on this machine."""
    out = tmp_path_factory.mktemp("local")
    run(
        "supernet.py",
        *SMALL,
        "--batch-size",
        16,
        "--val-every",
        20,
        "--save-every",
        20,
        "--iterations",
        20,
        "--val-paths",
        1,
        "--out",
        out,
    )
    run("tester.py", "--mode", "gen", "--demo", "--out", out)
    run("search.py", *SMALL, *SEARCH, "--engine", "local", "--device", "cpu", "--out", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_stopped_half_way_changes_nothing(tmp_path, servers, undisturbed, how):
    far = tmp_path / "remote"
    shutil.copytree(undisturbed / "checkpoints/supernet", far / "checkpoints/supernet")
    shutil.copy(undisturbed / "nni_auto_gen_search_space.json", far)
    content = yaml.safe_load((ROOT / "config_search_remote.yml").read_text())
    content["trainingService"]["machineList"] = [server.entry() for server in servers]
    (tmp_path / "remote.yml").write_text(yaml.safe_dump(content))
    words = [
        "--experiment",
        tmp_path / "remote.yml",
        *SMALL,
        *SEARCH,
        "--device",
        "cpu",
        "--out",
        far,
        "--cache",
        os.environ["TEST_CACHE"],
    ]
    log, start = tmp_path / "search.log", time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, ROOT / "search.py", *map(str, words)], stdout=file, stderr=file)
    children = []
    try:
        state = far / "checkpoints/search/state.json"
        wait_for(lambda: state.exists() and read_json(state)["generation"] == 1, "no generation was done", process, log)
        (trial,) = wait_for(servers[1].trials, "no trial on the second machine", process, log)
        code = pathlib.Path(trial.cwd())
        brought = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        modules = {
            str(path.relative_to(ROOT))
            for room in (".", "settings", "space", "images", "training", "engines", "devices")
            for path in ROOT.glob(f"{room}/*.py")
        }
        assert brought == modules | {"engines/preload.js"}
        print(f"stopped after {time.monotonic() - start:.0f} s")
        children = psutil.Process(process.pid).children(recursive=True)
        listening = {c.laddr.ip for p in children for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        servers[1].stop(how)
        assert process.wait(400) == 0, log.read_text()
        print(f"ended after {time.monotonic() - start:.0f} s")
    finally:
        for child in [*(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else children)]:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.kill()
        process.wait()
    text = log.read_text()
    assert (
        f"no SSH connection to 127.0.0.2:{servers[1].port}" in text and "continuing with the other machines, 1" in text
    )
    assert outcome(far) == outcome(undisturbed) and [len(generation) for generation in outcome(far)] == [6, 6, 6]
    assert read_json(far / "checkpoints/best.json") == read_json(undisturbed / "checkpoints/best.json")
    assert not [child for child in children if child.is_running()]
    servers[1].stop()
    deadline = time.monotonic() + 30
    while left := [p for server in servers for p in server.running()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
