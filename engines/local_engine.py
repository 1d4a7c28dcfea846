"""The search without NNI: the same evolution and files, with worker processes, each with its own GPU or on the CPU."""

import concurrent.futures.process
import functools
import itertools
import json
import multiprocessing
import os

from engines.heartbeats import forget_heartbeats, heartbeat_file, note_heartbeat, read_heartbeats
from engines.progress import Progress
from engines.search_files import listed_images
from engines.search_record import SearchRecord
from engines.trial import gpu_names, lock_folder, reason_of, take_devices
from settings.subjects import Evaluation
from space.splitting import chunks, cut
from utils import (
    POLL_S,
    Silence,
    UserError,
    check_shared_memory,
    heartbeat,
    heartbeats_to,
    leave_signals_to_parent,
    log,
)

HEARTBEAT_S = 0.2  # between those of a worker
SMALL = 8  # candidates of a generation that may all fail
SPAWN = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork


def search_locally(out, settings, concurrency=1, candidates_per_trial=None, trial_timeout=300):
    """Runs the search that `prepare_search` has set up in `out`, to its end.

    `settings` are those of a trial (name -> value). Candidates whose evaluation fails, whose worker dies, or whose
    worker gives no heartbeat for `trial_timeout` seconds, are evaluated again; those that fail again, on their own,
    count as failed. Raises UserError if no candidate can be evaluated.
    """
    record = SearchRecord(out)
    progress = Progress(out)
    with Workers(settings, concurrency, trial_timeout) as workers:
        while waiting := record.pending():
            progress.read()
            # The lists of NNI's trials, each cut as a trial cuts its own.
            trials = chunks(record.space, waiting, workers.n, candidates_per_trial)
            lists = [few for candidates in trials for few in cut(record.space, candidates)]
            generation = record.evolution.generation
            names = {tuple(c): f"{generation:03}_{i:03}" for i, candidates in enumerate(lists) for c in candidates}
            # First in lists; then those that failed, each on its own; then one at a time, because a worker that dies
            # takes the others' work with it.
            for together in (True, True, False):
                for candidates, results, error in workers.evaluate(lists, together):
                    for result in results:
                        record.add(result, names[tuple(result["architecture"])])
                    if error and not together:
                        _give_up(record, candidates, error)
                    elif error:
                        log.warning("%d candidates will be evaluated again: %s", len(candidates), error)
                    progress.read()
                lists = [[c] for c in record.waiting()]
        progress.read()


def _give_up(record, candidates, error):
    """Records that candidates have failed; raises UserError if it is not they that are to blame: where all fail, of the
    search or of a generation that is not small."""
    population = record.evolution.population
    known = [
        record.results[c] for c in (population if len(population) >= SMALL else record.results) if c in record.results
    ]
    if not any(result["acc1"] is not None for result in known):
        raise UserError(f"no candidate can be evaluated; the last one: {error}")
    for candidate in candidates:
        record.fail(candidate, error)


class Workers:
    """Processes that evaluate lists of candidates: `concurrency` of them, at most one per GPU."""

    def __init__(self, settings, concurrency, trial_timeout=300):
        self.trial_timeout = trial_timeout
        self.out = settings["out"]
        self.gpus = gpu_names() if settings["device"] != "cpu" else []
        self.settings = json.dumps(settings)
        self.n = min(concurrency, len(self.gpus) or concurrency)
        self.pool = None
        self.taken, self.locks = [], []  # names of GPUs, and the open files that reserve them until the search ends

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()
        for file in self.locks:
            file.close()

    def evaluate(self, lists, together=True):
        """Yields (list, results, error) as lists finish, in parallel or one by one; error is a line, or None."""
        if lists and not together:
            self._end()  # an error may have left a CUDA context in which all fails
        for group in [lists] if together else [[one] for one in lists]:
            futures = {self._submit(candidates): candidates for candidates in group}
            for future, hung in self._finished(futures):
                if hung:
                    yield futures[future], [], f"a worker gave no heartbeat for {self.trial_timeout} s"
                    continue
                try:
                    yield futures[future], future.result(), None
                except (UserError, OSError) as error:  # no candidate is to blame
                    raise UserError(reason_of(error)) from None
                except concurrent.futures.process.BrokenProcessPool:
                    self._end()
                    yield futures[future], [], "a worker process died"
                except Exception as error:
                    if not together:
                        self._end()
                    yield futures[future], [], f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _finished(self, futures):
        """Yields (future, False) as they finish; if a worker hangs, ends all workers and yields (future, True)."""
        left = set(futures)
        silence = Silence()
        while left:
            done, left = concurrent.futures.wait(left, POLL_S, concurrent.futures.FIRST_COMPLETED)
            yield from ((future, False) for future in done)
            heartbeats = read_heartbeats(self.out)
            heartbeats["all of them"] = len(left), *heartbeats.values()  # where none is heard, as while they start
            if left and max(itertools.starmap(silence.seconds, heartbeats.items())) > self.trial_timeout:
                self._end()
                yield from ((future, True) for future in left)
                return

    def _submit(self, candidates):
        try:
            return self._workers().submit(_work, _evaluate, self.out, self.settings, candidates)
        except concurrent.futures.process.BrokenProcessPool:  # a worker died while it was idle
            self._end()
            return self._workers().submit(_work, _evaluate, self.out, self.settings, candidates)

    def _workers(self):
        if self.pool is None:
            check_shared_memory(self.n)
            forget_heartbeats(self.out)  # a search that was killed has left some
            if self.gpus and not self.locks:  # not in the workers: those of two searches could wait for each other's
                self.taken, self.locks = take_devices(self.gpus, self.n, lock_folder())
            names = SPAWN.SimpleQueue()
            for name in self.taken:
                names.put(name)
            begin = _begin, (names if self.taken else None,)
            self.pool = concurrent.futures.ProcessPoolExecutor(len(self.taken) or self.n, SPAWN, *begin)
        return self.pool

    def _end(self):
        """Ends the workers at once; the next `evaluate` starts new ones."""
        if self.pool is not None:
            workers = multiprocessing.active_children()
            for process in workers:
                process.kill()
            for process in workers:
                process.join()
            self.pool.shutdown(cancel_futures=True)  # waits for the pool's thread, which Python's exit may collide with
            forget_heartbeats(self.out)
            self.pool = None


# --- in a worker ---------------------------------------------------------------------------------------------


def _begin(gpus):
    """Begins a worker, on a GPU of its own from the queue `gpus`, or on the CPU (None)."""
    leave_signals_to_parent()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def _work(evaluation, out, settings, candidates):
    """Returns `evaluation(settings, candidates)`; its heartbeats reach the search in `out`."""
    file = heartbeat_file(out, os.getpid())
    with heartbeats_to(lambda: note_heartbeat(file), HEARTBEAT_S):
        try:
            heartbeat()
            return evaluation(settings, candidates)
        finally:
            file.unlink(missing_ok=True)


def _evaluate(settings, candidates):
    from training.evaluation import evaluate

    evaluation, supernet, calibration, validation = _opened(settings)
    return evaluate(supernet, candidates, calibration, validation, evaluation.bn, amp=evaluation.eval_amp)


@functools.cache
def _opened(settings):
    """(Evaluation, supernet, calibration batches, validation batches) of this worker.

    `settings` are those of a trial as JSON. Opened for the first list instead of when the worker starts, so that a
    UserError reaches the search.
    """
    from training.evaluation import open_evaluation

    values = json.loads(settings)
    return Evaluation.of(values), *open_evaluation(values, listed_images(values["out"]))
