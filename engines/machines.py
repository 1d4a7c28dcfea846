"""The machines of a search with NNI's remote service: entries in the experiment file, and an SSH connection to each.

Trials report to the web server of NNI's manager, which listens on 127.0.0.1 only: each connection forwards its port
from the machine's own 127.0.0.1. A search notices that a machine has stopped when its connection ends.
"""

import contextlib
import ipaddress
import os
import pathlib
import select
import shlex
import subprocess
import time

from utils import POLL_S, UserError

READY_S = 60
# Until a silent machine counts as stopped: ssh asks it three times, every five seconds, and this leaves some margin.
NOTICE_S = 20


class MachinesLost(Exception):
    """The connection to `machines`, a list of entries, failed or was lost."""

    def __init__(self, machines, reason):
        super().__init__(reason)
        self.machines = machines


def check_machines(path, machines):
    """Checks the entries of machineList. Returns them with absolute paths of key files.

    Raises UserError, naming the file, the machine and the entry, if one is not valid.
    """
    if not isinstance(machines, list) or not machines:
        raise UserError(f"{path}: machineList is {machines!r}, not a list of machines")
    folder = pathlib.Path(path).parent
    return [_check_machine(f"{path}: machine {n}", folder, machine) for n, machine in enumerate(machines, 1)]


def _check_machine(name, folder, machine):
    known = ("host", "port", "user", "sshKeyFile", "pythonPath")
    if not isinstance(machine, dict):
        raise UserError(f"{name} is {machine!r}, not a mapping of {', '.join(known)}")
    machine = {"port": 22, **machine}
    if unknown := [str(key) for key in machine if key not in known]:
        raise UserError(f"{name} has the unknown entry {unknown[0]!r}; known entries: {', '.join(known)}")
    for key in known:
        value = machine.get(key)
        if key == "port":
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
                raise UserError(f"{name}: port is {value!r}, not a number from 1 to 65535")
        elif not isinstance(value, str) or not value:
            raise UserError(f"{name}: {key} is {value!r}, not a string")
        # NNI puts these into shell commands.
        elif key != "sshKeyFile" and (shlex.quote(value) != value or value.startswith("-")):
            raise UserError(f"{name}: {key} is {value!r}, which has characters that a shell interprets")
    python = machine["pythonPath"]
    if not python.startswith("/"):
        raise UserError(f"{name}: pythonPath is {python!r}, not the absolute path of a folder with python in it")
    key_file = folder / pathlib.Path(machine["sshKeyFile"]).expanduser()
    return machine | {"sshKeyFile": str(key_file.absolute())}


def check_keys(path, machines):
    """Raises UserError if the key file of a checked entry cannot be read."""
    for number, machine in enumerate(machines, 1):
        key_file = pathlib.Path(machine["sshKeyFile"])
        if not key_file.is_file() or not os.access(key_file, os.R_OK):
            text = f"sshKeyFile {key_file} is not a file that can be read; make one with ssh-keygen"
            raise UserError(f"{path}: machine {number}: {text}")


class Connections:
    """SSH connections to machines that forward `port` from there to this one; a context manager, which ends them.

    `folder` keeps the host keys: a machine whose key has changed is refused. Raises MachinesLost if a machine cannot be
    reached.
    """

    def __init__(self, machines, port, folder):
        self.machines = machines
        self.port = port
        self.folder = folder
        self.links = []

    def __enter__(self):
        try:
            self.links = [self._start(number, machine) for number, machine in enumerate(self.machines, 1)]
            self._check([machine for machine, link in zip(self.machines, self.links) if not _answers(link)])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        self._end()

    def lost(self):
        """The machines whose connection has ended."""
        return [machine for machine, link in zip(self.machines, self.links) if link.poll() is not None]

    def check(self, wait_s=0):
        """Raises MachinesLost if connections have ended or end within `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        self._check(self.lost())
        while self.links and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._check(self.lost())

    def _start(self, number, machine):
        host = machine["host"]
        tunnel = [] if is_this_machine(host) else ["-R", f"127.0.0.1:{self.port}:127.0.0.1:{self.port}"]
        options = {
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "ConnectTimeout": NOTICE_S,
            "ServerAliveInterval": 5,
            "ServerAliveCountMax": 3,
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": "known_hosts",
            "ExitOnForwardFailure": "yes",
        }
        words = ["ssh", "-F", "none", "-T", "-i", machine["sshKeyFile"]]
        words += ["-p", str(machine["port"]), "-l", machine["user"]]
        words += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        words += [*tunnel, "--", host, "cat"]  # cat ends with this process, since its input ends then
        with open(self._log(number), "w") as log:
            how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "start_new_session": True}
            try:
                return subprocess.Popen(words, cwd=self.folder, **how)
            except FileNotFoundError:
                raise UserError("ssh is not installed; install the OpenSSH client") from None

    def _check(self, lost):
        if lost:
            number = self.machines.index(lost[0]) + 1
            output = self._log(number).read_text(errors="replace").strip().splitlines()
            names = ", ".join(f"{machine['host']}:{machine['port']}" for machine in lost)
            raise MachinesLost(lost, f"no SSH connection to {names}" + (f" ({output[-1][:200]})" if output else ""))

    def _log(self, number):
        return self.folder / f"ssh_{number}.log"

    def _end(self):
        for link in self.links:
            link.terminate()
        for link in self.links:
            link.wait()
            for stream in (link.stdin, link.stdout):
                with contextlib.suppress(OSError):
                    stream.close()


def is_this_machine(host):
    """Whether the name or address belongs to the loopback interface."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _answers(link):
    """Whether the `cat` at the other end sends back what it receives; then the port is forwarded too."""
    try:
        link.stdin.write(b"\n")
        link.stdin.flush()
    except OSError:
        return False
    return bool(select.select([link.stdout], [], [], READY_S)[0] and link.stdout.read(1))
