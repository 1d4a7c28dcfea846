"""A GPU for each process: a lock a device, which all searches of a user on a machine agree on.

CUDA_VISIBLE_DEVICES names the devices: searches that share a machine have to name them alike, by number or by UUID.
"""

import os
import pathlib
import stat
import tempfile
import time

from utils import UserError, log, try_lock

POLL_S = 1.0

held = []  # open lock files: closed when the process ends, however it ends, which frees its device


def take_gpu(device):
    """Takes a free GPU for the rest of this process, which then sees no other; waits while all are taken.

    For `device` "cpu", or where there is no GPU, does nothing. Comes before anything that initialises CUDA.
    """
    if names := gpu_names() if device != "cpu" else []:
        os.environ["CUDA_VISIBLE_DEVICES"] = take_device(names, lock_folder())


def gpu_names():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES calls them: numbers or UUIDs."""
    import torch

    n = torch.cuda.device_count()  # asks the driver's library, and CUDA itself only where that isn't there
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(n)] if visible is None else [name.strip() for name in visible.split(",")][:n]


def take_device(names, folder):
    """Locks the first free one of the devices for the rest of this process and returns its name; waits while all are taken."""
    waiting = False
    while True:
        for name in names:
            if file := try_lock(folder / f"{name.replace('/', '_')}.lock"):
                held.append(file)
                return name
        if not waiting:
            log.warning("all of %d GPUs are taken by other processes; waiting for one", len(names))
        waiting = True
        time.sleep(POLL_S)


def lock_folder():
    """This user's folder of locks, on this machine's own disk. Raises UserError where another user could write to it."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"spos-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{folder}: not a folder that you alone can write to; remove it")
    return folder
