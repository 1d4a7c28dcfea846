"""The search without NNI: the same evolution and files, with worker processes, each on a GPU of its own or a CPU."""

import argparse
import concurrent.futures.process
import functools
import itertools
import json
import multiprocessing
import time

from engines.progress import Progress
from engines.search_record import SearchRecord, listed_images
from engines.trial import gpu_names, take_gpu
from evolution_tuner import Evolution
from space.splitting import at_once, chunks, cut
from utils import UserError, check_shared_memory, heard_by, leave_signals_to_parent, log, sign_of_life

POLL_S = 1.0  # between looks at the workers' signs of life
SPAWN = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork


def search_locally(space, settings, out, trial, concurrency=1, candidates_per_trial=None, trial_timeout=300):
    """Runs the search for which `prepare_search` made `out` ready, to its end.

    `trial` has the flags of a trial. Candidates whose evaluation fails, or whose worker dies or is ended because it
    gave no sign of life for `trial_timeout` seconds, are evaluated again; those that fail again on their own have
    failed. Raises UserError where no candidate can be evaluated.
    """
    record, progress = SearchRecord(out, space, Evolution.from_settings(space, settings)), Progress(out)
    with Workers(trial, concurrency, trial_timeout) as workers:
        while waiting := record.pending():
            progress.read()
            lists = _lists(space, waiting, workers.n, settings["population"], candidates_per_trial)
            generation = record.evolution.generation
            names = {tuple(c): f"{generation:03}_{i:03}" for i, candidates in enumerate(lists) for c in candidates}
            # First in lists; then those that failed, each on its own; then one at a time, since the death of a worker
            # loses the others' work too.
            for together in (True, True, False):
                for candidates, results, error in workers.evaluate(lists, together):
                    for result in results:
                        record.add(result, names[tuple(result["architecture"])])
                    if error and not together:
                        _give_up(record, candidates, error)
                    elif error:
                        log.warning("%d candidates will be evaluated again: %s", len(candidates), error)
                    progress.read()
                lists = [[c] for c in waiting if c not in record.results]
        progress.read()


def _lists(space, candidates, n, population, size):
    """The lists that `n` workers evaluate in turn: those of NNI's trials, each cut as a trial cuts its own."""
    parts = enumerate(chunks(space, candidates, n, size))
    cuts = [cut(space, part, at_once(population, n, number)) for number, part in parts]
    return [part for turn in itertools.zip_longest(*cuts) for part in turn if part]


def _give_up(record, candidates, error):
    if not any(result["acc1"] is not None for result in record.results.values()):
        raise UserError(f"no candidate can be evaluated; the last one: {error}")
    for candidate in candidates:
        record.fail(candidate, error)


class Workers:
    """Processes that evaluate lists of candidates: `concurrency` of them, at most one a GPU."""

    def __init__(self, trial, concurrency, trial_timeout=300):
        self.trial_timeout = trial_timeout
        n_gpus = len(gpu_names()) if trial["device"] != "cpu" else 0
        self.trial, self.n, self.pool = json.dumps(trial), min(concurrency, n_gpus or concurrency), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def evaluate(self, lists, together=True):
        """Yields (list, results, error) as lists finish, in parallel or one by one; error is one line, or None."""
        for group in [lists] if together else [[one] for one in lists]:
            futures = {self._submit(candidates): candidates for candidates in group}
            for future, hung in self._finished(futures):
                if hung:
                    yield futures[future], [], f"a worker gave no sign of life for {self.trial_timeout} s"
                    continue
                try:
                    yield futures[future], future.result(), None
                except UserError:
                    raise
                except concurrent.futures.process.BrokenProcessPool:
                    self._end()
                    yield futures[future], [], "a worker process died"
                except Exception as error:
                    yield futures[future], [], f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _finished(self, futures):
        """Yields (future, False) as they finish; where a worker hangs, ends all workers and yields (future, True)."""
        left, changed = set(futures), time.monotonic()
        while left:
            done, left = concurrent.futures.wait(left, POLL_S, concurrent.futures.FIRST_COMPLETED)
            changed = time.monotonic() if done else changed
            yield from ((future, False) for future in done)
            if left and time.monotonic() - min(filter(None, self.signs), default=changed) > self.trial_timeout:
                self._end()
                yield from ((future, True) for future in left)
                return

    def _submit(self, candidates):
        try:
            return self._workers().submit(_work, _evaluate, self.trial, candidates)
        except concurrent.futures.process.BrokenProcessPool:  # a worker died while it was idle
            self._end()
            return self._workers().submit(_work, _evaluate, self.trial, candidates)

    def _workers(self):
        if self.pool is None:
            check_shared_memory(self.n)
            # A worker's last sign of life, 0 while it has nothing to do; and how many workers have started.
            self.signs, started = SPAWN.Array("d", self.n, lock=False), SPAWN.Value("i")
            arguments = self.n, SPAWN, _start, (self.signs, started)
            self.pool = concurrent.futures.ProcessPoolExecutor(*arguments)
        return self.pool

    def _end(self):
        """Ends the workers at once; the next `evaluate` starts new ones."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            self.pool = None


# --- in a worker ---------------------------------------------------------------------------------------------

_sign = None  # of this worker, writes the time of a sign of life


def _start(signs, started):
    global _sign
    leave_signals_to_parent()
    with started.get_lock():
        number = started.value
        started.value += 1
    _sign = functools.partial(signs.__setitem__, number)


def _work(evaluation, trial, candidates):
    """`evaluation(trial, candidates)`, whose signs of life the search hears."""
    with heard_by(lambda: _sign(time.monotonic())):
        try:
            sign_of_life()
            return evaluation(trial, candidates)
        finally:
            _sign(0.0)


def _evaluate(trial, candidates):
    from training.evaluation import evaluate

    flags, supernet, calibration, validation = _opened(trial)
    return evaluate(supernet, candidates, calibration, validation, flags.bn, amp=flags.eval_amp)


@functools.cache
def _opened(trial):
    """Flags, supernet and images of this worker, on a device of its own; `trial` has the flags as JSON.

    Opened for the first list instead of when the worker starts, so that a UserError reaches the search.
    """
    from training.evaluation import open_evaluation

    flags = argparse.Namespace(**json.loads(trial), split="search")
    take_gpu(flags.device)
    return flags, *open_evaluation(flags, listed_images(flags.out))
