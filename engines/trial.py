"""What a trial (a process that evaluates candidates) needs besides the evaluation: messages, and its own GPU.

A trial with NNI, step by step:

    search.py::run_engine                       passes the command of a trial, `nni_engine.trial_command`, to NNI
    EvolutionWithFlops._send                    sends a list of candidates: `parameters`
    tester.py::run_trial                        `receive_candidates`, evaluates them, `report`
    KeepResults.assess_trial                    receives each result as it comes: `intermediate`
    EvolutionWithFlops.receive_trial_result     receives all of them again: `final`; or why there are none: `blameless`
    SearchRecord.add                            writes those that are new
"""

import contextlib
import os
import pathlib
import tempfile

from utils import UserError, heartbeats_to, private_folder, try_lock, wait_for_lock

# --- messages ------------------------------------------------------------------------------------------------
# NNI hands `parameters` to a trial. The trial reports each result in an `intermediate` message, and all of them in a
# `final` one; between results, intermediate messages without one are heartbeats. A result is a dict with the
# architecture that was evaluated: NNI may swap the parameters of concurrent trials, so only what a trial reports
# counts. "default" is the number that NNI's web UI shows. A trial that can't evaluate, because of a file or of whatever
# else no candidate is to blame for, says why in its `final` message instead.

ALIVE_S = 5  # between heartbeats


def parameters(candidates, until):
    """The parameters of a trial: the candidates to evaluate, for trials with a sequence number below `until`."""
    return {"candidates": [list(candidate) for candidate in candidates], "until": until}


def intermediate(result=None):
    """The message with a result, or a heartbeat."""
    return {"default": result["acc1"], "result": result} if result else {"default": 0.0}


def final(trial_id, results):
    """The message with all results of a trial."""
    return {"default": max(result["acc1"] for result in results), "trial": trial_id, "results": results}


def blameless(candidates, error):
    """The final message of a trial that could not evaluate its candidates, for a reason that is not theirs: a line."""
    return {"default": 0.0, "candidates": candidates, "error": error}


def read_intermediate(messages):
    """The results in `intermediate` messages."""
    return [message["result"] for message in messages if "result" in message]


@contextlib.contextmanager
def heartbeats():
    """In a trial: within the block, its heartbeats are sent to NNI."""
    import nni

    with heartbeats_to(lambda: nni.report_intermediate_result(intermediate()), ALIVE_S):
        yield


def receive_candidates():
    """In a trial: the candidates to evaluate, from NNI."""
    import nni

    received = nni.get_next_parameter()
    while received["until"] <= nni.get_sequence_id():  # for an earlier trial, which died before it asked
        received = nni.get_next_parameter()
    return received["candidates"]


def report(results):
    """In a trial: reports each of the results, an iterable, as it comes, and all of them at the end."""
    import nni

    reported = []
    for result in results:
        reported.append(result)
        nni.report_intermediate_result(intermediate(result))
    nni.report_final_result(final(nni.get_trial_id(), reported))


@contextlib.contextmanager
def errors_reported(candidates):
    """In a trial: within the block, errors that no candidate is to blame for are reported to NNI before they end it."""
    import nni

    try:
        yield
    except (UserError, OSError) as error:
        nni.report_final_result(blameless(candidates, reason_of(error)))
        raise


def reason_of(error):
    """A line about a UserError or an OSError."""
    return str(error) if isinstance(error, UserError) else f"{error.filename or 'a file'}: {error.strerror or error}"


# --- a GPU for each process ----------------------------------------------------------------------------------
# Each device has a lock, which all searches of a user on a machine share. A lock has the device's name in
# CUDA_VISIBLE_DEVICES: searches that share a machine must all use numbers, or all use UUIDs.

held = []  # open lock files; the system closes them when the process ends for any reason, which frees the device


def take_gpu(device):
    """Reserves a free GPU for this process and hides the others from it; waits while all are taken.

    Does nothing for `device` "cpu", or without a GPU. Must be called before CUDA is initialised.
    """
    if names := gpu_names() if device != "cpu" else []:
        (os.environ["CUDA_VISIBLE_DEVICES"],), files = take_devices(names, 1, lock_folder())
        held.extend(files)


def gpu_names():
    """The GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES: numbers or UUIDs."""
    from training.distributed import gpu_count

    n = gpu_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(n)] if visible is None else [name.strip() for name in visible.split(",")][:n]


def take_devices(names, n, folder):
    """Locks the first free devices, `n` at most; waits while all are taken. Returns their names, and the open files,
    which lock them until they are closed."""
    paths = {folder / f"{name.replace('/', '_')}.lock": name for name in names}
    path, file = wait_for_lock(paths, f"all {len(names)} GPUs are taken by other processes; waiting for one")
    taken = {path: file}
    for path in paths:
        if path not in taken and len(taken) < n and (file := try_lock(path)):
            taken[path] = file
    return [paths[path] for path in taken], list(taken.values())


def lock_folder():
    """This user's folder of locks, on a local disk. Raises UserError if another user could write to it."""
    return private_folder(pathlib.Path(tempfile.gettempdir()) / f"spos-{os.getuid()}")
