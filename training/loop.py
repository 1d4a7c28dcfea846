"""The loop of both training scripts: steps, metrics, validation, checkpoints, interruption.

Everything random at a step (images, augmentation, path, dropout) is a pure function of seed and step, so a resumed run
ends with the same bits as an uninterrupted one. The step itself is in step.py.
"""

import contextlib
import math
import os
import shutil
import signal
import time

import torch

from images.dataset import training_plan
from training import distributed
from training.checkpoint import newest
from training.compiled import CompiledStep
from training.evaluation import correct_counts
from training.run import Journal, TrainingRun
from training.step import Step
from utils import (
    INTERRUPTED,
    WARNINGS,
    Interrupted,
    UserError,
    duration,
    log,
    out_of_memory,
    show_log,
    signals,
    watch_parent,
)

try:
    import resource
except ImportError:  # not on Windows
    resource = None

LOG_EVERY = 50  # steps
# The plan of a run is logged after some steps. The first of them are not timed: on a GPU, the first use of an operation
# is slow.
PLAN_AFTER = {"cpu": (1, 5), "cuda": (LOG_EVERY // 2, LOG_EVERY)}  # device: untimed steps, steps
SAME_SIGNAL_S = 0.2  # signals within this time count as one: `timeout` sends its own to the process and to its group


def train(model, loader, training, sampler=None, validate=None, run=None, **how):
    """Trains `model` with the settings `training` (a Training). Returns the last metrics, among them `seconds`.

    Args:
        model: a network.Trainable, such as the supernet or a retrained network
        loader: has `images`, of some length, and `batches(plan)`, such as a Loader that augments
        sampler: of a supernet's paths: `sampler.candidate(step)`, or a function of the step, from 1, is the candidate
            that it trains. The same on all ranks. A sampler may have `after_step(step, candidate, loss)`, called after
            each step with the mean loss of all ranks, and then `state_dict()` and `load_state_dict(state)`
        validate: `validate(step)` returns {"val/...": percent}; called every training.val_every steps and at the end
        run: a TrainingRun, which keeps checkpoints and logs, and resumes; without it nothing is kept on disk
        how: device, seed, rule, make_optimizer, learning_rate of training.step.Step

    With a run, SIGINT, SIGTERM, SIGUSR1 and SIGHUP end the process after the current step is saved, or the last step
    while it waits for a batch; a validation that they interrupt is repeated when the run is resumed. Each rank trains
    on its share of every batch. Raises UserError if a loss is not finite.
    """
    show_log()
    if not hasattr(loader, "batches"):
        raise UserError(
            f"the loader is a {type(loader).__name__}, whose order can't be resumed; make one by from_dataset(dataset) "
            "or from_tensors(images, labels) of dataloader.py"
        )
    if getattr(sampler, "__name__", "") == "candidate":  # a method of a sampler that may have a state
        sampler = getattr(sampler, "__self__", sampler)
    if run and run.folder and hasattr(sampler, "after_step") and not hasattr(sampler, "state_dict"):
        raise UserError("the sampler has after_step, but no state_dict: a resumed run would forget what it has learnt")
    batch_size = distributed.per_rank_batch_size(training.batch_size, training.micro_batch)
    step = (CompiledStep if training.compile else Step)(model.train(), training, **how)
    with contextlib.ExitStack() as closing:
        run = run or TrainingRun()
        if run.folder and not run.started:  # by a command
            closing.callback(run.close)
            run.start_from_python(step, sampler)
        state = _State(run, step, sampler, validate)
        distributed.broadcast_from_rank0(model.state_dict().values())
        if state.done >= training.iterations and not state.validation_due:
            log.info("%s: finished, nothing to do (another --out or --resume none starts anew)", state.run.folder)
            return state.metrics
        epochs = training.iterations * training.batch_size / len(loader.images)
        where = f"resuming at step {state.done}" if state.done else "from the start"
        log.info("%d iterations of %d images, %.1f epochs; %s", training.iterations, training.batch_size, epochs, where)
        ranks = distributed.rank(), distributed.world_size()
        plan = training_plan(len(loader.images), batch_size, step.seed, state.done, training.iterations, *ranks)
        state.begin(closing)
        state.finish_validation()
        for number, (images, labels) in enumerate(state.waits_for(loader.batches(plan)), state.done + 1):
            with state.saved_on_error():
                candidate = state.candidate_at(number)
                loss, logits = step.train_one_step(number, images, labels, candidate)
            state.after(number, candidate, loss, logits, labels)
    return state.metrics


class _State:
    """A training run between its steps: metrics, validation, checkpoints, interruption."""

    def __init__(self, run, step, sampler, validate):
        self.run = run
        self.step = step
        self.sampler = sampler
        self.validate = validate
        self.done, self.metrics, rows, self.validation_due = run.resume(step, sampler)
        self.meter = _Meter(step, self.done, self.metrics["seconds"], rows)
        self.interruption = _Interruption(run.again)

    def begin(self, closing):
        """Opens the logs and handles signals, until the ExitStack `closing` is closed."""
        kept = self.done - 1 if self.validation_due else self.done
        self.journal = Journal(self.run, self.done, self.step, kept, closing)
        if self.run.folder:
            closing.enter_context(signals(self.interruption.note))

    def finish_validation(self):
        """Does the validation that was still due when the run stopped."""
        if self.validation_due:
            if stop := self.validated(self.done):
                self.interruption.end(newest(self.run.folder), stop)
            self.save(self.done)

    def waits_for(self, batches):
        """Yields the batches, and measures the time spent waiting for them and computing on them.

        If a signal or an error ends the wait for one, saves the last step; several ranks end together, after a step.
        """
        meter = self.meter
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                with contextlib.nullcontext() if distributed.world_size() > 1 else self.interruption.raised():
                    batch = next(batches, None)
            except Interrupted as error:
                saved = self.save(meter.number) if meter.number > self.done else newest(self.run.folder)
                self.interruption.end(saved, *error.args)
            except Exception:
                self.keep(meter.number)
                raise
            if batch is None:
                return
            ready, ready_cpu_s = time.perf_counter(), time.process_time()
            meter.waited += ready - start
            yield batch
            meter.computed_s += time.perf_counter() - ready
            meter.cpu_s += time.process_time() - ready_cpu_s

    def candidate_at(self, step):
        """The candidate that the sampler has for a step; None without a sampler."""
        return None if self.sampler is None else getattr(self.sampler, "candidate", self.sampler)(step)

    @contextlib.contextmanager
    def saved_on_error(self):
        """If a step fails before it changes weights, saves the one before; running out of memory becomes one line."""
        try:
            yield
        except Exception as error:
            if self.step.undo():
                self.keep(self.meter.number)
            if out_of_memory(error):
                raise UserError(self.memory_advice()) from None
            raise

    def memory_advice(self):
        """What to do where a step runs out of memory."""
        training = self.step.training
        whole = training.batch_size // distributed.world_size()
        n = training.micro_batch or whole
        smaller = next((m for m in range(n // 2, 1, -1) if whole % m == 0), None)
        advice = f"give --micro-batch {smaller}" if smaller else "give a smaller --batch-size, with another --out"
        used = f"{n} images at a time used {_peak_memory(self.step.device) / 1e9:.1f} GB"
        return f"out of memory in step {self.meter.number + 1}: {used}; {advice}"

    def after(self, step, candidate, loss, logits, labels):
        """Counts a step; logs, validates and saves if due; ends the process if a signal has come."""
        training = self.step.training
        self.meter.add(candidate, loss, logits, labels)
        if hasattr(self.sampler, "after_step"):
            self.sampler.after_step(step, candidate, distributed.mean(loss))
        self.journal.progress.update()
        if step == self.done + PLAN_AFTER[self.step.device.type][1]:
            self.log_plan()
        stop = distributed.all_reduce_max(self.interruption.signal)
        closes = step == training.iterations or step % training.val_every == 0
        validation_due = bool(closes and self.validate)
        if closes or step % LOG_EVERY == 0:
            self.metrics = self.meter.summary()
            self.journal.log(step, self.metrics)
            if not validation_due:
                self.journal.write(step, self.metrics, self.meter.take_paths())
        if validation_due:
            if step == training.iterations:
                self.save(step, validation_due)  # a kill during the last validation loses no step
            stop = stop or self.validated(step)
            validation_due = bool(stop)
        if step == training.iterations or stop or step % training.save_every == 0:
            saved = self.save(step, validation_due)
        if stop:
            self.interruption.end(saved, stop)

    def validated(self, step):
        """Validates, and writes all metrics. Returns the number of the signal that interrupted it, or 0."""
        training = self.step.training
        meter = self.meter
        try:
            with meter.paused(), self.interruption.raised():
                self.metrics.update(self.validate(step))
        except Interrupted as error:
            self.interruption.lost = f"; the validation, {duration(meter.pauses[-1])} so far, is done again"
            return error.args[0]
        except Exception:
            self.keep(step, validation_due=True)
            raise
        finally:
            self.step.model.train()
        left = training.iterations // training.val_every - step // training.val_every
        log.info("validation took %s; %d more to come", duration(meter.pauses[-1]), left)
        self.journal.write(step, self.metrics, meter.take_paths())
        return 0

    def save(self, step, validation_due=False):
        """Saves a checkpoint and returns its path."""
        self.metrics["seconds"] = self.meter.seconds
        return self.run.save(step, self.step, self.sampler, self.metrics, self.meter.fetch(), validation_due)

    def keep(self, step, validation_due=False):
        """Saves a finished step before an error ends the run; not if other ranks may be in another collective."""
        if self.run.folder and step > self.done and distributed.world_size() == 1:
            try:
                log.info("saved %s; %s resumes from there", self.save(step, validation_due), self.run.again)
            except Exception as failure:  # must not hide the first error
                log.warning("warning: nothing is saved: %s", failure)

    def log_plan(self):
        """Logs what the run will take in time, disk and memory, estimated from its first steps."""
        step, meter, folder = self.step, self.meter, self.run.folder
        step_seconds = meter.step_seconds  # on all ranks, because it sums over them
        if distributed.rank():
            return
        training = step.training
        steps = training.iterations - meter.number
        size = 2 * sum(t.nbytes for t in step.model.state_dict().values())  # with momentum
        kept = f" {training.keep} checkpoints of {size / 1e6:.0f} MB;" if folder else ""
        validations = f", plus {-(-steps // training.val_every)} validations" if self.validate else ""
        log.info(
            "plan: %s for %d more steps of %.3g s%s;%s peak memory so far %.1f GB",
            duration(steps * step_seconds), steps, step_seconds, validations, kept, _peak_memory(step.device) / 1e9,
        )  # fmt: skip
        if folder and (disk := size * (training.keep + 1)) > (free := shutil.disk_usage(folder).free):
            text = "warning: %s has %.1f GB left, the checkpoints need %.1f GB; lower --keep"
            log.warning(text, folder, free / 1e9, disk / 1e9)
        if step.device.type == "cpu" and torch.get_num_threads() > 1 and meter.cpu_s < meter.computed_s:
            advice = "--threads 1" if UserError.of_commands else "torch.set_num_threads(1)"
            text = "warning: %d threads compute less than one would; other programs run: try %s"
            log.warning(text, torch.get_num_threads(), advice)


def _peak_memory(device):
    """Peak memory in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else math.nan


class _Meter:
    """Loss and top-1 since the last line of the log, and the time without validations.

    Values stay on the device until a line is due, so that a step needs no synchronisation.
    """

    def __init__(self, step, number, seconds, rows):
        self.step = step
        self.number = number
        self.paths = {}  # step -> candidate, of the steps since the last line
        self.rows = rows  # (n, 3): loss, images correct in top-1 and in top-5, over all ranks
        self.window = []  # the same of this rank, still on the device
        self.before = seconds
        self.started = time.perf_counter()
        self.pauses = []
        self.waited = 0.0  # seconds spent waiting for batches since the last line
        self.logged = number, self.seconds
        self.untimed = number + PLAN_AFTER[step.device.type][0]
        self.first = None  # (step, seconds) after the untimed steps
        self.computed_s = self.cpu_s = 0.0  # computing so far, and CPU seconds of all threads

    @property
    def seconds(self):
        return round(self.before + time.perf_counter() - self.started - sum(self.pauses), 3)

    @property
    def step_seconds(self):
        """Mean seconds of the timed steps."""
        self.fetch()
        step, seconds = self.first
        return (self.seconds - seconds) / max(1, self.number - step)

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.pauses.append(time.perf_counter() - start)

    def add(self, candidate, loss, logits, labels):
        if labels.dim() > 1:  # probabilities: right is the most probable class
            labels = labels.argmax(dim=1)
        self.window.append(torch.cat((loss.detach()[None], correct_counts(logits.detach(), labels))))
        self.number += 1
        self.paths[self.number] = candidate
        if self.number == self.untimed:
            self.fetch()
            self.first = self.number, self.seconds

    def fetch(self):
        """The rows so far. Raises UserError if a loss is not finite, unless --amp fp16 can still lower its scale."""
        if self.window:
            rows = distributed.all_reduce_sum(torch.stack(self.window).double().cpu())
            rows[:, 0] /= distributed.world_size()
            finite = rows[:, 0].isfinite()
            if not finite.all() and self.step.scaler.get_scale() <= 1:
                bad = self.number - len(rows) + 1 + int(finite.logical_not().nonzero()[0])
                path = f", path {list(self.paths[bad])}" if self.paths.get(bad) else ""
                where = f"learning rate {self.step.learning_rate(bad):.4g}{path}"
                raise UserError(f"the loss of step {bad} is not finite ({where}); lower --lr, with another --out")
            self.rows = torch.cat((self.rows, rows[finite]))
            self.window = []
        return self.rows

    def take_paths(self):
        """The candidates of the steps since the last call."""
        taken = list(self.paths.values())
        self.paths = {}
        return [candidate for candidate in taken if candidate]

    def summary(self):
        """The means over the rows since the last call, as metrics."""
        rows = self.fetch()
        self.rows = self.rows[:0]
        batch_size = self.step.training.batch_size
        loss, top1, _ = rows.mean(dim=0).tolist()
        logged, before = self.logged
        self.logged = self.number, self.seconds
        seconds = max(1e-3, self.seconds - before)
        waited = self.waited
        self.waited = 0.0
        return {
            "train/loss": loss, "train/acc1": top1 * 100 / batch_size, "train/lr": self.step.learning_rate(self.number),
            "train/images_per_second": (self.number - logged) * batch_size / seconds,
            "train/wait_percent": min(100.0, 100 * waited / seconds),
            "seconds": self.seconds,
        }  # fmt: skip


class _Interruption:
    """Records SIGINT, SIGTERM and WARNINGS, handled by `note`, in `signal`; the end of torchrun counts as SIGTERM.

    A second SIGINT or SIGTERM ends the process at once, except with several ranks, to which torchrun forwards its own
    signals.
    """

    def __init__(self, again):
        self.again = again  # the command that resumes the run
        self.noted = 0
        self.noted_at = math.inf
        self.raises = False
        self.parent_ended = watch_parent()
        self.lost = ""  # what the resumed run repeats, for the log

    @contextlib.contextmanager
    def raised(self):
        """Within the block, a signal also raises Interrupted."""
        self.raises = True
        try:
            if self.noted:
                raise Interrupted(self.noted)
            yield
        finally:
            self.raises = False

    @property
    def signal(self):
        orphaned = distributed.world_size() > 1 and self.parent_ended()  # nothing would restart the other ranks
        return self.noted or (signal.SIGTERM if orphaned else 0)

    def note(self, number, _):
        if number not in WARNINGS:
            again = time.monotonic() - self.noted_at > SAME_SIGNAL_S
            if again and distributed.world_size() == 1:
                os._exit(128 + number)
            self.noted_at = min(self.noted_at, time.monotonic())
        self.noted = number
        if self.raises:
            raise Interrupted(number)

    def end(self, saved, number):
        """Ends the process; `saved` is the checkpoint from which the run is resumed."""
        if saved:
            log.info("interrupted: saved %s; %s resumes from there%s", saved, self.again, self.lost)
        else:
            log.info(INTERRUPTED)
        if number == signal.SIGINT and not UserError.of_commands:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
