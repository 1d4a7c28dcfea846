"""Batches made by worker processes, in the order of a plan, with one clear line for each way in which that can fail."""

import functools
import math
import multiprocessing

import numpy as np
import torch

import utils
from utils import UserError

AHEAD = 2  # batches that each worker makes ahead
GUARD = 'put what the program does below  if __name__ == "__main__":  since its worker processes import it'


class Batches:
    """A dataset for worker processes: a batch of a plan -> (what `_make` makes of it, the batch, error or None)."""

    def __getitems__(self, samples):
        samples = np.asarray(samples)
        try:
            made = self._make(samples)
            if worker := torch.utils.data.get_worker_info():
                _share(made, len(samples), AHEAD * worker.num_workers)
            return made, samples, None
        except UserError as error:  # DataLoader would raise a worker's error as the text of a traceback
            return None, samples, str(error)


def made_by_workers(dataset, plan, workers, pin_memory=False):
    """Yields (what a Batches makes of a batch, the batch) by worker processes, in the order of the plan."""
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):  # it imports the program that has started it
        raise UserError(f"a worker process of images can't start another: {GUARD}")
    if workers and process.daemon:
        utils.log.warning("a daemonic process can't have worker processes: images are loaded in it")
        workers = 0
    if workers:
        utils.check_shared_memory(workers)
    told, tell = multiprocessing.Pipe(duplex=False)
    batches = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=plan,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=functools.partial(utils.leave_signals_to_parent, told),
    )
    try:
        for made, samples, error in batches:
            if error:
                raise UserError(error)
            yield made, samples
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Caught " in str(error):  # an error of the data set keeps its text
            raise
        what = f"one of {workers} loader processes ended: {str(error).splitlines()[0]}"
        if multiprocessing.get_start_method() != "fork" and not UserError.of_commands:
            raise UserError(f"{what}; {GUARD}, or give workers=0") from None
        memory = " ".join(["too little memory?", utils.shared_memory()]).strip()
        raise UserError(f"{what} ({memory}); resume with the same command and fewer --workers") from None
    finally:  # a worker may be in the midst of a batch: DataLoader would wait for each for five seconds, twice
        tell.send_bytes(b"end")


def _as_it_is(batch):
    return batch


def _share(made, n, ahead):
    """Moves the tensors of a batch of `n` images into shared memory, of which `ahead` batches may take a part.

    A queue would do so in a thread, print its error and lose the batch. Raises UserError if there is no room.
    """
    tensors = [value for value in (made.values() if isinstance(made, dict) else [made]) if torch.is_tensor(value)]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        mib = sum(tensor.nbytes for tensor in tensors) / 2**20
        why = str(error).splitlines()[0].rsplit(": ", 1)[-1]
        raise UserError(
            f"no shared memory for a batch of {n} images ({why}): it takes {mib:.2f} MiB, up to {ahead} wait there, "
            f"and {utils.shared_memory()}; give fewer --workers (0 needs none), smaller batches, or more memory, "
            f"as docker run --shm-size {math.ceil(2 * mib * ahead / 1024)}g"
        ) from None
