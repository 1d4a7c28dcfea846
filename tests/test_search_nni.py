"""search.py's NNI experiment with trials that need no torch (slow), and what search.py checks before it starts."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
import types

import nni_node
import psutil
import pytest
import requests
import websockets.proxy
import websockets.uri
import yaml
from made_search import SPACE, read_results, result, settings

import search
from engines import nni_engine
from engines.heartbeats import heartbeat_file
from engines.search_files import state_path
from engines.search_record import prepare_search
from evolution_tuner import EvolutionWithFlops
from space.evolution import Evolution
from space.limits import Limits, make_bounds
from space.search_space import SearchSpace
from utils import HERE, UserError, read_json, write_json

SETTINGS = settings(generations=2)

# A trial as tester.py is one, but for the evaluation. The first to start dies before it has asked for anything.
TRIAL = """
import pathlib, sys, time

sys.path.insert(0, {!r})
from engines import trial

folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
try:
    (folder / "first trial").touch(exist_ok=False)
    sys.exit("I was the first trial")
except FileExistsError:
    pass


def evaluate(candidate):
    with open(folder / "evaluated", "a") as file:
        file.write(f"{{candidate}}\\n")
    time.sleep(seconds)
    accuracies = {{"acc1": sum(c * (i + 1) for i, c in enumerate(candidate)) / 10, "acc5": 99.0}}
    return {{"architecture": candidate, "flops": 0, "n_images": 10, "seconds": seconds, **accuracies}}


candidates = trial.receive_candidates()
trial.report(map(evaluate, candidates))
"""

HOST = """
import json, pathlib, sys
from engines import nni_engine
from engines.search_record import prepare_search
from utils import Interrupted, interrupt, run_script, signals

def main(arguments):
    out, settings, command, port, resume = json.loads(arguments)
    out = pathlib.Path(out)
    prepare_search(out, settings, resume)
    experiment = nni_engine.read_experiment(nni_engine.HERE / "config_search.yml")
    try:
        with signals(interrupt):
            nni_engine.search_with_nni(out, command, experiment, 2, port=port)
    except Interrupted as error:
        sys.exit(128 + error.args[0])

run_script(main, lambda: sys.argv[1])
"""


@contextlib.contextmanager
def hosted(out, seconds=0.0, resume=False):
    """A process that runs search_with_nni in `out`, and the port of the web UI; all of it ends with the block."""
    (out / "trial.py").write_text(TRIAL.format(str(HERE)))
    (out / "nni_auto_gen_search_space.json").write_text(json.dumps(SPACE.nni_search_space()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(out / "trial.py"), str(out), str(seconds)]
    arguments = json.dumps([str(out), SETTINGS, command, port, resume])
    with open(out / "log", "a") as log:
        process = subprocess.Popen([sys.executable, "-c", HOST, arguments], cwd=HERE, stdout=log, stderr=log)
    try:
        yield process, port
    finally:
        for child in [*family(process), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def family(process):
    """The processes that descend from a running one."""
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def wait_for(condition, what):
    deadline = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return value


def evaluated(out):
    """What trials began to evaluate, in order, and what is on disk."""
    path = out / "evaluated"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def listening(processes):
    """Addresses at which any of the processes waits for connections."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found |= {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def own_addresses():
    """This machine's IPv4 addresses that are not loopback ones."""
    found = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET}
    return {address for address in found if not address.startswith("127.")}


def answers(host, port):
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def expected():
    evolution = Evolution.from_settings(SPACE, SETTINGS)
    while population := evolution.ask():
        evolution.tell({c: (sum(g * (i + 1) for i, g in enumerate(c)) / 10, 99.0) for c in population})
    return evolution


def check_outcome(out):
    """The artefacts are those of the plain evolution, and every candidate was evaluated once."""
    evolution = expected()
    for generation, population in enumerate(evolution.history):
        ranked = evolution.ranked(population)
        lines = (out / f"acc/{generation:03}.jsonl").read_text().splitlines()
        assert [tuple(json.loads(line)["architecture"]) for line in lines] == ranked
        assert [SPACE.load_architecture(out / f"checkpoints/{generation:03}_{i:03}.json") for i in range(4)] == ranked
        said = read_json(out / f"id2cand/{generation:03}.json")
        assert sorted(tuple(c) for trial in said.values() for c in trial) == sorted(ranked)
    assert SPACE.load_architecture(out / "checkpoints/best.json") == evolution.best[0]
    state = read_json(state_path(out))
    assert (state["done"], state["generation"], state["evaluated"]) == (True, 2, 8)


PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "socks_proxy")


@pytest.fixture
def proxied(monkeypatch):
    """Every variable of a proxy is set, to one that does not answer."""
    for name in PROXIES:
        monkeypatch.setenv(name, f"{'socks5' if 'all' in name.lower() else 'http'}://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


@pytest.mark.slow
def test_search_runs_on_the_loopback_interface_and_ends_by_itself(tmp_path, proxied):
    """Whatever proxies there are for other machines."""
    with hosted(tmp_path) as (process, port):
        wait_for(lambda: evaluated(tmp_path), "no trial began")
        running = family(process)
        assert {(address.ip, address.port) for address in listening(running)} == {("127.0.0.1", port)}
        assert answers("127.0.0.1", port)
        assert not any(answers(address, port) for address in own_addresses())
        assert process.wait(180) == 0, (tmp_path / "log").read_text()
        assert not [p for p in running if p.is_running()]
    assert "Web portal" not in (tmp_path / "log").read_text()  # NNI keeps quiet
    check_outcome(tmp_path)
    assert len(evaluated(tmp_path)) == 9  # with the largest
    (experiment,) = (tmp_path / "checkpoints/search/nni").glob("????????")
    assert (
        len(list(experiment.glob("environments/*/trials/*"))) == 7
    )  # two a generation, two for those of the one that died, and one for the largest


@pytest.mark.slow
def test_interrupted_search_leaves_nothing_running_and_resumes(tmp_path):
    (tmp_path / "first trial").touch()
    with hosted(tmp_path, seconds=2.0) as (process, _):
        wait_for(lambda: len(evaluated(tmp_path)) >= 3 and read_results(tmp_path), "no result came")
        running = family(process)
        assert len(running) >= 4  # manager, tuner, two trials
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "log").read_text()
        assert not [p for p in running if p.is_running()]
    before = [tuple(r["architecture"]) for r in read_results(tmp_path)]
    assert 1 <= len(before) < 8
    (tmp_path / "evaluated").unlink()
    with hosted(tmp_path, resume=True) as (process, _):
        assert process.wait(180) == 0, (tmp_path / "log").read_text()
    check_outcome(tmp_path)
    largest = tuple(read_json(state_path(tmp_path))["largest"]["architecture"])
    assert sorted(before + evaluated(tmp_path)) == sorted([largest, *(c for p in expected().history for c in p)])


@pytest.mark.slow
def test_killed_search_takes_nni_with_it(tmp_path):
    (tmp_path / "first trial").touch()
    with hosted(tmp_path, seconds=30.0) as (process, _):
        wait_for(lambda: evaluated(tmp_path), "no trial began")
        running = family(process)
        process.kill()
        process.wait()
        left = psutil.wait_procs(running, timeout=20)[1]
        for survivor in left:
            survivor.kill()
        assert not left


class FakeExperiment:
    def __init__(self, **jobs):
        self.jobs = jobs

    def list_trial_jobs(self):
        return [types.SimpleNamespace(trialJobId=name, status=status) for name, status in self.jobs.items()]


def test_a_trial_that_hangs_is_noticed_by_its_silence(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(nni_engine.time, "monotonic", lambda: clock[0])
    experiment, listener = FakeExperiment(a="RUNNING", b="RUNNING", w="WAITING"), nni_engine._Listener(tmp_path, 300)
    file = heartbeat_file(tmp_path, "a")
    file.parent.mkdir(parents=True)
    ended = {}
    for clock[0] in range(1000, 2000):
        if clock[0] == 1100:
            experiment.jobs["late"] = "RUNNING"
        if clock[0] < 1600:
            file.touch()
            os.utime(file, (clock[0], clock[0]))  # b gives none at all
        for job in listener.silent(experiment):
            ended[job] = clock[0]
            del experiment.jobs[job]
    assert ended.keys() == {"a", "b", "late"}
    assert 1300 < ended["b"] <= 1310 and 1400 < ended["late"] <= 1410 and 1899 <= ended["a"] <= 1910


# --- before NNI starts ---------------------------------------------------------------------------------------


def experiment(tmp_path, **changes):
    """A changed config_search.yml; a change to None takes an entry out."""
    content = yaml.safe_load((HERE / "config_search.yml").read_text()) | changes
    path = tmp_path / "experiment.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def test_committed_experiment_has_the_official_numbers():
    args = search.parse_args([])
    numbers = {name: getattr(args, name) for name in search.EVOLUTION}
    official = {
        "population": 50,
        "select": 10,
        "mutation": 25,
        "crossover": 25,
        "mutation_prob": 0.1,
        "generations": 20,
        "seed": 0,
    }
    assert numbers == official
    assert args.concurrency == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trialGpuNumber": 1}, "unknown entry 'trialGpuNumber'"),
        ({"trialCommand": None}, "trialCommand is None, not of type str"),
        ({"trialConcurrency": "two"}, "trialConcurrency is 'two', not of type int"),
        ({"tuner": {"name": "TPE"}}, "tuner has entries other than"),
        ({"trainingService": {"platform": "kubeflow"}}, "not just platform: local"),
        ({"trainingService": {"platform": "local", "trialGpuNumber": 1}}, "not just platform: local"),
    ],
)
def test_damaged_experiment_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"experiment\.yml: .*{message}"):
        nni_engine.read_experiment(experiment(tmp_path, **changes))


def test_experiment_sets_defaults_under_config_and_command_line(tmp_path):
    tuner = {"codeDirectory": ".", "className": "evolution_tuner.EvolutionWithFlops"}
    (tmp_path / "config_search.yml").write_text(
        experiment(
            tmp_path, tuner=tuner | {"classArgs": {"population": 30, "mutation": 9, "crossover": 8}}, trialConcurrency=3
        ).read_text()
    )
    (tmp_path / "mine.yml").write_text("search: {mutation: 7, crossover: 6}")
    words = ["--experiment", str(tmp_path / "config_search.yml")]
    args = search.parse_args([*words, "--config", str(tmp_path / "mine.yml"), "--crossover", "5"])
    assert (args.population, args.mutation, args.crossover, args.concurrency) == (30, 7, 5, 3)
    (tmp_path / "config_search.yml").write_text(
        experiment(tmp_path, tuner=tuner | {"classArgs": {"populaton": 30}}).read_text()
    )
    with pytest.raises(UserError, match=r"config_search\.yml: search\.py has no setting .populaton"):
        search.parse_args(words)


LISTEN = "s = require('net').createServer().listen(0, () => { console.log(s.address().address); s.close(); })"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts search.py's NNI with these flags, without NNI: where its manager would listen, and its environment."""
    from nni import experiment as nni_experiment

    found = {}

    class Experiment:
        id = "none"

        def __init__(self, config):
            assert config.nni_manager_ip == "127.0.0.1"

        def start(self, port, run_mode):
            node = pathlib.Path(nni_node.__file__).with_name("node")
            address = subprocess.run(
                [node, "-e", LISTEN], check=True, capture_output=True, text=True, timeout=60
            ).stdout
            found.update(os.environ, address=address.strip())
            raise RuntimeError("enough")

        def stop(self):
            found["no_proxy at the end"] = os.environ["no_proxy"]

    def start(*words):
        args = search.parse_args(["--out", str(tmp_path), "--concurrency", "1", *words])
        prepare_search(tmp_path, SETTINGS, resume=False)
        experiment = nni_engine.read_experiment(args.experiment)
        checked = search.Search(experiment, "net.pth", SPACE, None, "", [], SETTINGS, None)
        with pytest.raises(UserError, match=r"NNI did not start \(enough\)"):
            search.run_engine(checked, args, tmp_path)
        return found

    monkeypatch.setattr(nni_experiment, "Experiment", Experiment)
    (tmp_path / "nni_auto_gen_search_space.json").write_text("{}")
    return start


@pytest.mark.parametrize(("words", "address"), [((), "127.0.0.1"), (("--host", "0.0.0.0"), "0.0.0.0")])
def test_nnis_manager_listens_on_this_machine_alone_unless_asked(started, words, address):
    assert started(*words)["address"] == address


@pytest.mark.parametrize("before", [{}, {"no_proxy": "a.b"}, {"NO_PROXY": "a.b"}, {"no_proxy": "a.b", "NO_PROXY": "c"}])
def test_addresses_of_this_machine_go_through_no_proxy(started, proxied, monkeypatch, before):
    """In NNI's clients: requests, of the command and of trials, and websockets, of the tuner."""
    for name, value in before.items():
        monkeypatch.setenv(name, value)

    def proxies(host):
        used = requests.utils.select_proxy(f"http://{host}:8080", requests.utils.get_environ_proxies(f"http://{host}"))
        return used, websockets.proxy.get_proxy(websockets.uri.parse_uri(f"ws://{host}:8080"))

    assert None not in proxies("localhost")
    environment = started()
    assert {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")} == {
        name: before.get(name) for name in ("no_proxy", "NO_PROXY")
    }
    assert environment["no_proxy at the end"] == environment["no_proxy"]
    for names in (("no_proxy", "NO_PROXY"), ("no_proxy",), ("NO_PROXY",)):  # a client may know one of them
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in names:
            monkeypatch.setenv(name, environment[name])
        for host in ("localhost", "127.0.0.1", "[::1]"):
            assert proxies(host) == (None, None), (host, names)
        assert None not in proxies("other.example") and (None in proxies("a.b")) == ("a.b" in environment[names[0]])


@pytest.mark.parametrize("failed", ["list_trial_jobs", "kill_trial_job"])
@pytest.mark.parametrize("error", [requests.ReadTimeout("slow"), requests.HTTPError("500"), OSError(28, "full")])
def test_an_answer_of_nni_that_fails_is_asked_for_again(tmp_path, monkeypatch, failed, error):
    """An error of a file still ends the search."""
    from nni import experiment as nni_experiment

    asked = []

    class Experiment:
        id = "none"

        def __init__(self, config):
            self.manager = None

        def start(self, port, run_mode):
            self.manager = subprocess.Popen(["sleep", "60"])

        def list_trial_jobs(self):
            return self.answer("list_trial_jobs") or [types.SimpleNamespace(trialJobId="a", status="RUNNING")]

        def kill_trial_job(self, job):
            self.answer("kill_trial_job")
            write_json(state_path(tmp_path), read_json(state_path(tmp_path)) | {"done": True})

        def answer(self, name):
            asked.append(name)
            if name == failed and asked.count(name) == 1:
                raise error

        def stop(self):
            self.manager.kill()
            self.manager.wait()

    monkeypatch.setattr(nni_experiment, "Experiment", Experiment)
    monkeypatch.setattr(nni_engine, "POLL_S", 0.01)
    (tmp_path / "nni_auto_gen_search_space.json").write_text("{}")
    prepare_search(tmp_path, SETTINGS, resume=False)
    experiment = nni_engine.read_experiment(HERE / "config_search.yml")
    with pytest.raises(OSError, match="full") if error.errno else contextlib.nullcontext():
        nni_engine.search_with_nni(tmp_path, ["trial"], experiment, trial_timeout=0.01)
    assert (asked.count(failed) == 1) == bool(error.errno)


def test_searches_that_start_at_once_take_different_ports():
    """Though none listens yet; a port is free again after its search, and taken while anything listens there."""

    def assert_taken(port):
        with pytest.raises(UserError, match=f"--port {port}: is taken"), nni_engine.reserved_port("127.0.0.1", port):
            pass

    with nni_engine.reserved_port("127.0.0.1") as first, nni_engine.reserved_port("127.0.0.1") as second:
        assert first != second
        assert_taken(first)
    with nni_engine.reserved_port("127.0.0.1", first) as again:
        assert again == first
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert_taken(server.getsockname()[1])


def test_missing_nni_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(UserError, match=r"pip install -r requirements\.txt"):
        nni_engine.host_experiment({}, tmp_path)


def test_limit_is_official_at_imagenets_size_and_its_share_elsewhere():
    def limits(space, *words):
        args = search.parse_args(words)
        return make_bounds(space, args.limit or (), args.flops_limit)

    assert limits(SearchSpace()) == {"flops": (None, 330_000_000)}
    assert limits(SPACE) == {"flops": (None, SPACE.quantile("flops", 0.59))}
    assert limits(SPACE, "--flops-limit", "25M") == {"flops": (None, 25_000_000)}


def test_generated_search_space_is_needed(tmp_path):
    path = tmp_path / "nni_auto_gen_search_space.json"
    with pytest.raises(UserError, match=r"is missing: run python tester\.py --mode gen"):
        search.check_space_file(path, SPACE, "python tester.py --mode gen")
    path.write_text(json.dumps(SearchSpace(operations=("shufflenet_3x3",)).nni_search_space()))
    with pytest.raises(UserError, match=r"is another search space .*: run python tester\.py --mode gen"):
        search.check_space_file(path, SPACE, "python tester.py --mode gen")
    path.write_text(json.dumps(SPACE.nni_search_space()))
    search.check_space_file(path, SPACE, "python tester.py --mode gen")


def test_costs_of_a_table_reach_the_tuner_and_the_files(tmp_path, monkeypatch):
    (tmp_path / "nni_auto_gen_search_space.json").write_text("{}")
    costs = [[[n * (10 * block + n) for n in range(1, 5)] for block in range(20)], 1000]
    settings = SETTINGS | {"costs": costs, "flops_limit": 3000}
    caught = {}
    monkeypatch.setattr(nni_engine, "host_experiment", lambda config, out: caught.update(config))
    prepare_search(tmp_path, settings, resume=False)
    nni_engine.search_with_nni(tmp_path, ["trial"], nni_engine.read_experiment(HERE / "config_search.yml"))
    tuner = EvolutionWithFlops(**json.loads(json.dumps(caught["tuner"]["classArgs"])))
    while waiting := tuner.record.waiting():
        tuner.keep("id", [result(c, acc1=float(c[0])) for c in waiting])
    assert tuner.record.state["done"] and len(read_results(tmp_path)) == 8
    for found in read_results(tmp_path):
        flops = 1000 + sum(row[choice] for row, choice in zip(costs[0], found["architecture"]))
        assert found["flops"] == flops <= 3000
    tuner.record.lock.close()
    with pytest.raises(UserError, match="other settings: --flops-table other FLOPs than then; leave"):
        prepare_search(tmp_path, SETTINGS | {"flops_limit": 3000}, resume=True)


def test_nnis_manager_gets_time_to_start():
    """The pinned NNI has the retries that host_experiment raises, as this argument."""
    import inspect

    from nni.experiment import launcher

    assert list(inspect.signature(launcher._check_rest_server).parameters) == ["port", "retry", "url_prefix"]


def test_settings_of_trials_go_through_a_file(tmp_path):
    out = tmp_path / "a 'quoted' $(folder)"
    args = search.parse_args(
        [
            "--data-dir",
            "some data",
            "--bn-batches",
            "7",
            "--no-mirror",
            "--crop-scale",
            "0.5",
            "1",
            "--concurrency",
            "2",
        ]
    )
    trial = search.trial_settings(args, out, "net.pth")
    command = nni_engine.trial_command(nni_engine.read_experiment(HERE / "config_search.yml"), out, trial)
    assert command == [
        sys.executable,
        str(HERE / "tester.py"),
        "--mode",
        "test",
        "--config",
        str(out / "checkpoints/search/trial.yml"),
    ]
    settings = yaml.safe_load((out / "checkpoints/search/trial.yml").read_text())["tester"]
    assert settings["data-dir"] == os.path.abspath("some data")
    assert settings["checkpoint"] == os.path.abspath("net.pth")
    assert settings["out"] == str(out)
    assert settings["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert (settings["bn-batches"], settings["mirror"], settings["crop-scale"]) == (7, False, [0.5, 1.0])
    assert not {"population", "port", "config", "demo", "input-size"} & settings.keys()


@pytest.mark.parametrize(
    ("words", "expected", "chooses"),
    [
        (["--data-dir", "tree"], ["--data-dir", "tree"], True),
        (["--demo"], ["--demo"], False),
        (["--demo", "--data-dir", "tree", "--out", "o"], ["--demo", "--data-dir", "tree", "--out", "o"], False),
        (
            ["--loader", "torchvision", "--workers", "0", "--seed", "3", "--population", "9"],
            ["--loader", "torchvision", "--workers", "0", "--seed", "3"],
            True,
        ),
        (["--config", "a.yml"], ["--config", "a.yml"], True),
        (["--config", "b.yml"], ["--config", "b.yml"], False),
        (["--config", "c.yml", "--limit", "latency=8ms"], ["--config", "c.yml"], True),
    ],
)
def test_the_command_that_retrains_the_winner(tmp_path, monkeypatch, words, expected, chooses):
    """The record beside the architecture has space and data settings; without settings of training, a line says so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yml").write_text("common: {data-dir: images, crop-scale: [0.5, 1]}")
    (tmp_path / "b.yml").write_text("scratch: {iterations: 5}")
    (tmp_path / "c.yml").write_text("search: {latency-table: phone.json}")  # refused without a limit on latency
    args = search.parse_args(words)
    text, *more = search.retrain_command(args).splitlines()
    command = shlex.split(text)
    best = os.path.join(args.out, "checkpoints", "best.json")
    assert command[:4] == ["python", "scratch.py", "--architecture", best]
    assert sorted(command[4:]) == sorted(expected)
    assert ["choose --iterations, --batch-size and --lr" in line for line in more] == [True] * chooses


def test_report_has_the_ten_best_and_the_next_command(tmp_path, capsys):
    results = [
        {"architecture": [i % 4] * 20, "flops": 23_000_000 + i, "acc1": float(i), "acc5": 99.0}
        for i in range(14, -1, -1)
    ]
    args = search.parse_args(["--out", "my runs", "--data-dir", "tree"])
    limits = Limits(SPACE, {"flops": (None, 10**9)}, banned=[(1,) * 20])
    found = types.SimpleNamespace(succeeded=results, n_failed=1, winner=results[0], space=SPACE, out=tmp_path,
                                  largest_text="the largest", own_heads={}, measured_text=lambda result: "8.000",
                                  objectives=[], front_files=[],
                                  is_beyond=lambda result: limits.excess(result["architecture"]))  # fmt: skip
    search.report(found, args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "15 candidates evaluated, 1 failed"
    assert [line.split()[:2] for line in lines[2:12]] == [[str(rank + 1), f"{14 - rank}.00"] for rank in range(10)]
    beyond = [line.endswith("1 1 1  beyond the limit") for line in lines[2:12]]
    assert beyond == [(14 - rank) % 4 == 1 for rank in range(10)] and not any("beyond" in line for line in lines[12:])
    retrain = "scratch.py --architecture 'my runs/checkpoints/best.json' --data-dir tree --out 'my runs'"
    assert lines[lines.index("retrain the best:") + 1] == f"  python {retrain}"
    channels = "--space channels --architecture 'my runs/checkpoints/best.json' --out 'my runs/channels'"
    assert f"  python supernet.py {channels}" in lines
    found.winner = results[12]
    search.report(found, args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[12].split()[:2] == ["13", "2.00"] and lines[13] == "the best that holds, measured: rank 13"
    assert lines[14] == "the largest"
