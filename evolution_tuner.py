"""The evolution as NNI's tuner, for config_search.yml; the evolution itself is space/evolution.py.

EvolutionWithFlops  the tuner, which hands the candidates of an evolution to trials
KeepResults         the assessor, which passes the trials' intermediate results to the tuner
"""

import collections
import functools
import os
import threading

from engines import trial
from engines.heartbeats import heartbeat_file, note_heartbeat
from engines.search_record import SearchRecord
from space.splitting import chunks
from utils import UserError, log

try:
    from nni.assessor import Assessor, AssessResult
    from nni.tuner import Tuner
except ImportError:  # NNI is not installed, and a search without it needs neither
    Tuner = Assessor = object

GRACE_S = 3  # for results that arrive after NNI reports the end of a trial


def _stops_search_on_error(method):
    """Decorates a tuner's method to hold its lock; an exception ends the search and is written to its state file."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self.lock:
            if self.record.state["error"]:
                return
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                log.exception("the search cannot continue")
                try:
                    self.record.stop(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
                except OSError:  # a full disk; the search sees that this process ends
                    log.exception("the reason can't be written")
                    os._exit(1)

    return run


class EvolutionWithFlops(Tuner):
    """NNI's tuner: sends the candidates of a SearchRecord to trials in chunks, and records what the trials report.

    `out`, an absolute path, has the search. A generation is split into as many chunks as trials run at a time, or into
    chunks of `candidates_per_trial`; the candidates of a chunk share first blocks.

    Its form follows from how NNI 3.0 behaves:
    - NNI may hand parameters to another trial than it tells the tuner, so only architectures that trials report count.
    - Parameters of a trial that died before it asked for them go to the next trial. "until" in the parameters is the
      number of trials up to the last one sent with them: a trial with that sequence number or a higher one asks again.
    - NNI requests parameters once for each free slot, and never again: the ids of requests are queued until there are
      candidates, which st_callback then sends.
    - NNI calls trial_end on another thread, before or after the trial's results, and may name another trial: the calls
      are only counted, and results have GRACE_S seconds to arrive.
    - NNI ignores an exception in a tuner, and the search would hang: it is written to the state file, which search.py
      reads.
    Candidates that no trial reported are sent again, each in a trial of its own, and then count as failed; those of a
    trial that says what was wrong, such as a missing file, never do.
    """

    # NNI creates a tuner and an assessor in one process and tells neither about the other: KeepResults finds it here.
    current = None

    def __init__(self, out, concurrency=1, candidates_per_trial=None):
        self.record = SearchRecord(out)
        self.concurrency = concurrency
        self.candidates_per_trial = candidates_per_trial
        self.lock = threading.RLock()
        self.callback = None  # sends parameters to a trial
        self.ids = collections.deque()  # NNI's requests for parameters that wait
        self.chunks = collections.deque()  # lists of candidates to send
        self.times_sent = collections.Counter()  # how often each candidate was sent
        self.sent_again = set()  # candidates of trials that could not evaluate, for a reason that is not theirs
        self.sent, self.ended = 0, 0  # trials
        self.fruitless = 0  # trials in a row that ended without a result
        EvolutionWithFlops.current = self
        self._plan()

    # --- what NNI calls ---

    def update_search_space(self, search_space):
        """Does nothing: the space is an argument of the tuner."""

    def generate_multiple_parameters(self, parameter_id_list, **kwargs):
        self._queue(parameter_id_list, kwargs["st_callback"])
        return []

    def receive_trial_result(self, parameter_id, parameters, value, **kwargs):
        if "error" in value:  # as trial.errors_reported has sent it
            self._send_again(value["candidates"], value["error"])
        else:
            self.keep(value["trial"], value["results"])  # as trial.report has sent them

    @_stops_search_on_error
    def trial_end(self, parameter_id, success, **kwargs):
        self.ended += 1
        self.fruitless += 1
        if self.fruitless > self.concurrency + 8:
            raise UserError(f"{self.fruitless} trials in a row ended without a result")
        if self.ended == self.sent and self.record.waiting():
            timer = threading.Timer(GRACE_S, self._retry, [self.sent])
            timer.daemon = True
            timer.start()

    # --- what it does ---

    @_stops_search_on_error
    def keep(self, trial_id, results):
        """Records what a trial reports, new or not; plans the next generation once this one is complete."""
        self.fruitless = 0
        for result in results:
            self.record.add(result, trial_id)
        self._plan_and_send()

    def hear(self, trial_id, results):
        """Notes a heartbeat of a trial, and keeps its results so far."""
        note_heartbeat(heartbeat_file(self.record.out, trial_id))
        if results:
            self.keep(trial_id, results)

    @_stops_search_on_error
    def _send_again(self, candidates, error):
        """Sends what a trial could not evaluate, for a reason that is not theirs, once more: another machine may have
        the file that is missing. The second time, that ends the search, which can be resumed.
        """
        waiting = self.record.waiting()
        left = [c for c in map(tuple, candidates) if c in waiting]
        if self.sent_again.intersection(left):
            raise UserError(error)
        self.sent_again.update(left)
        self.times_sent.subtract(left)
        self.chunks.append(left)
        self._send()

    @_stops_search_on_error
    def _queue(self, ids, callback):
        self.callback = callback
        self.ids.extend(ids)
        self._send()

    @_stops_search_on_error
    def _retry(self, sent):
        """Sends or fails the candidates that no trial reported, unless more than `sent` trials were sent or will be."""
        missing = self.record.waiting()
        if self.sent > sent or any(c in missing for chunk in self.chunks for c in chunk):
            return
        any_succeeded = any(result["acc1"] is not None for result in self.record.results.values())
        for candidate in missing:
            if self.times_sent[candidate] > 1 and any_succeeded:  # else the candidates are not the cause
                self.record.fail(candidate, "two trials ended without a result")
            else:
                self.chunks.append([candidate])  # on its own: if it crashes its trial, no other is lost
        self._plan_and_send()

    def _plan_and_send(self):
        if not self.record.waiting():
            self._plan()
        self._send()

    @_stops_search_on_error
    def _plan(self):
        """Splits the next generation into chunks."""
        pending = self.record.pending()
        self.chunks.extend(chunks(self.record.space, pending, self.concurrency, self.candidates_per_trial))

    def _send(self):
        """Answers queued requests with planned chunks."""
        while self.ids and self.chunks:
            waiting = self.record.waiting()
            if chunk := [c for c in self.chunks.popleft() if c in waiting]:
                self.times_sent.update(chunk)
                self.sent += 1
                self.callback(self.ids.popleft(), trial.parameters(chunk, self.sent + len(self.chunks)))


class KeepResults(Assessor):
    """NNI's assessor: passes intermediate messages, which only assessors receive, to the tuner; ends no trial early."""

    def assess_trial(self, trial_job_id, trial_history):
        EvolutionWithFlops.current.hear(trial_job_id, trial.read_intermediate(trial_history))
        return AssessResult.Good
