"""The search on this machine alone: the same evolution and files as with NNI, one worker process a GPU, or some on the CPU."""

import argparse
import concurrent.futures
import functools
import multiprocessing

from engines.progress import Progress
from engines.search_record import SearchRecord
from evolution_tuner import EVOLUTION, Evolution
from space.splitting import chunks
from utils import UserError, leave_signals_to_parent, log

SPAWN = multiprocessing.get_context("spawn")  # a CUDA context doesn't survive a fork


def search_locally(space, settings, out, trial, concurrency=1, candidates_per_trial=None):
    """Runs the search that `prepare_search` made `out` ready for, to its end.

    `trial` holds the flags of a trial. Candidates whose evaluation fails, or whose worker dies, are evaluated again; those
    that fail alone too have failed. Raises UserError where nothing can be evaluated.
    """
    evolution = Evolution(
        space.choices_per_block, space.flops, settings["flops_limit"], **{k: settings[k] for k in EVOLUTION}
    )
    record, progress = SearchRecord(out, space, evolution), Progress(out)
    with Workers(trial, concurrency) as workers:
        while waiting := record.pending():
            progress.read()
            lists = chunks(space, waiting, workers.n, candidates_per_trial)
            names = {tuple(c): f"{evolution.generation:03}_{i:03}" for i, part in enumerate(lists) for c in part}
            # At first lists; what fails with them comes one by one; and, since a dying worker takes others' work along, alone.
            for together in (True, True, False):
                for part, results, error in workers.evaluate(lists, together):
                    for result in results:
                        record.add(result, names[tuple(result["architecture"])])
                    if error and not together:
                        _give_up(record, part, error)
                    elif error:
                        log.warning("%d candidates will be evaluated again: %s", len(part), error)
                    progress.read()
                lists = [[c] for c in waiting if c not in record.results]
        progress.read()


def _give_up(record, candidates, error):
    if not any(result["acc1"] is not None for result in record.results.values()):
        raise UserError(f"no candidate can be evaluated; the last one: {error}")
    for candidate in candidates:
        record.fail(candidate, error)


class Workers:
    """Processes that evaluate lists of candidates: one a GPU, or `concurrency` of them on the CPU."""

    def __init__(self, trial, concurrency):
        import torch

        gpus = torch.cuda.device_count() if trial["device"] != "cpu" else 0
        self.trial, self.n, self.pool = trial, gpus or concurrency, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def evaluate(self, lists, together=True):
        """Yields (list, results, error) as they are done, in parallel or one after the other; error is a line of text, or None."""
        for part in [lists] if together else [[one] for one in lists]:
            futures = {self._submit(candidates): candidates for candidates in part}
            for future in concurrent.futures.as_completed(futures):
                try:
                    yield futures[future], future.result(), None
                except UserError:
                    raise
                except concurrent.futures.process.BrokenProcessPool:
                    self._end()
                    yield futures[future], [], "a worker process died"
                except Exception as error:
                    yield futures[future], [], f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _submit(self, candidates):
        try:
            return self._workers().submit(_evaluate, candidates)
        except concurrent.futures.process.BrokenProcessPool:  # a worker has died while there was nothing to do
            self._end()
            return self._workers().submit(_evaluate, candidates)

    def _workers(self):
        if self.pool is None:
            self.pool = concurrent.futures.ProcessPoolExecutor(self.n, SPAWN, _start, (self.trial,))
        return self.pool

    def _end(self):
        """Ends the workers at once; those of the next `evaluate` are new ones."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            self.pool = None


# --- in a worker ---------------------------------------------------------------------------------------------


def _start(trial):
    global flags
    leave_signals_to_parent()
    flags = argparse.Namespace(**trial, split="search")


def _evaluate(candidates):
    from training.evaluation import evaluate

    supernet, calibration, validation = _opened()
    return evaluate(supernet, candidates, calibration, validation, flags.bn, amp=flags.eval_amp)


@functools.cache
def _opened():
    """Supernet and images of this worker, on its own GPU. Opened with the first list, whose future carries a UserError."""
    from engines.gpu_lock import take_gpu
    from training.evaluation import open_evaluation

    take_gpu(flags.device)
    return open_evaluation(flags)
