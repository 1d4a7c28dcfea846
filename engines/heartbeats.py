"""Heartbeats of a search's workers: each changes the time of an empty file, OUT/checkpoints/search/heartbeats/WORKER.

A worker of the local engine writes its own file, which is named by its process. Those of NNI's trials, which may run on
other machines, are written by NNI's tuner when it receives a heartbeat.
"""

import contextlib
import shutil

from engines.search_files import state_path


def heartbeat_file(out, name):
    """The file of a worker of the search in `out`."""
    return state_path(out).with_name("heartbeats") / str(name)


def note_heartbeat(file):
    """Changes the time of a worker's file."""
    with contextlib.suppress(OSError):  # on a full disk, more important files raise the error
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def read_heartbeats(out):
    """{name of a worker that has something to do: the time of its last heartbeat, in ns}."""
    found = {}
    for file in heartbeat_file(out, "").glob("*"):
        with contextlib.suppress(OSError):  # it has just become idle
            found[file.name] = file.stat().st_mtime_ns
    return found


def forget_heartbeats(out):
    """Removes the files of all workers, which have ended."""
    shutil.rmtree(heartbeat_file(out, ""), ignore_errors=True)
