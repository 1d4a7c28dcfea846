"""The training recipe of supernet and retrained network, and the loop that both scripts run.

SGD with momentum, decay on weights with more than one dimension, a learning rate that falls linearly to 0, label smoothing.
Everything random at a step (images, augmentation, path, dropout) is a pure function of seed and step, so a run that goes
on from a checkpoint ends as one that was never interrupted, to the bit.
Source: paper section 4; official `src/Supernet/train.py`, `utils.py`.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import shutil
import signal
import time

import numpy as np
import torch
from torch import nn

import distributed
from dataloader import resolve_backend
from images.dataset import training_plan
from training import checkpoint
from training.evaluation import autocast, correct_counts
from training.journal import Journal
from utils import Interrupted, UserError, duration, hold_lock, log, output_folder, start_logging

try:
    import resource
except ImportError:  # not on Windows
    resource = None

LOG_EVERY = 50  # steps
PLAN_AFTER = 5  # steps, of which the first is not timed
DROPOUT = 0x44726F70  # keeps these draws apart from others of the same seed


def parameter_groups(model, weight_decay):
    """SGD parameter groups: weights with more than one dimension decay, the others (BN) don't (official)."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}]
    return groups + [{"params": others, "weight_decay": 0.0}] * bool(others)


def dropout_seed(seed, step, rank=0):
    """Of a step on a process, in 32 bits, for torch takes no more of them on the CPU."""
    return int(np.random.SeedSequence([seed, DROPOUT, step, rank]).generate_state(1)[0])


def begin_momentum(optimizer):
    """Momentum 0 for parameters that have a gradient for the first time: fused SGD wants a buffer from all of a group or none.

    The first step comes out as torch's own, which takes the gradient for the buffer.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and group["momentum"] and not optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def learning_rate(step, iterations, base, warmup=0):
    """Of iteration step = 1 ... iterations: base * (1 - step / iterations), so the last one has 0 (the official schedule
    steps before the optimizer). During `warmup` steps (not official) it rises linearly to that line."""
    return base * (1 - step / iterations) * min(1.0, step / warmup if warmup else 1.0)


@dataclasses.dataclass
class TrainingRun:
    """A training run: what `train` needs beside model and images. `stored` goes into every checkpoint. Process 0 alone writes."""

    args: object
    folder: pathlib.Path
    device: torch.device
    kind: str
    stored: dict

    @property
    def settings(self):
        settings = {k: v for k, v in vars(self.args).items() if k not in checkpoint.HARMLESS} | {
            "loader": resolve_backend(self.args.loader)
        }
        return settings | ({"processes": distributed.world_size()} if distributed.world_size() > 1 else {})

    def start(self):
        """Makes the folder this run's own and starts its log; with --resume none, what it holds gets another name.

        Raises UserError where another run is going on in it.
        """
        distributed.on_rank0(self._start)

    def _start(self):
        output_folder(self.folder.parent)
        self.lock = hold_lock(
            self.folder.with_suffix(".lock"), wait_s=10
        )  # the workers of a killed run end within moments
        aside = None
        if self.args.resume == "none" and checkpoint.newest(self.folder):
            names = (self.folder.with_suffix(f".{n}") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            self.folder.rename(aside)
        start_logging(self.folder, self.args, self.device)
        if aside:
            log.info("the run before is in %s", aside)

    def resume(self, model, optimizer, scaler):
        """Loads the newest whole checkpoint, if there is one; returns (step, metrics, rows of the log) that it had reached."""
        content = distributed.on_rank0(self._newest)
        if content is None:
            return 0, {"seconds": 0.0}, torch.empty(0, 3, dtype=torch.double)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        return content["step"], content["metrics"], content["rows"]

    def _newest(self):
        """What the newest whole checkpoint holds, None where there is none. Raises UserError where it is of another run."""
        for left in self.folder.glob(".checkpoint-*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        damaged = {}
        for path in reversed(checkpoint.checkpoints(self.folder)):
            try:
                content = checkpoint.load_file(path)
            except UserError as error:
                log.warning("warning: %s; looking for an older one", error)
                damaged[path] = error
                continue
            stored = checkpoint.parse(content, path, self.kind)
            if stored.content is None:
                raise UserError(f"{path}: not a checkpoint of this program; use another --out, or --resume none")
            if lacks := {"settings", "step", "optimizer", "scaler", "metrics", "rows"} - content.keys():
                raise UserError(f"{path}: has no {min(lacks)} to go on from; use another --out, or --resume none")
            checkpoint.check_settings(stored, self.settings, self.folder)
            odd = [k for k in ("split", "classes", "architecture") if content.get(k) != self.stored.get(k)]
            if odd:
                raise UserError(f"{path}: was trained with another {odd[0]}; use that, another --out, or --resume none")
            for later in damaged:  # no longer the newest, nor one of --keep
                later.rename(later.with_name(f"{later.name}.damaged"))
            return content
        if damaged:
            raise UserError(
                f"{next(iter(damaged.values()))}; no older one is whole: use another --out, or --resume none"
            )
        return None

    def save(self, step, model, optimizer, scaler, metrics, rows):
        """Writes a checkpoint and returns its path; the oldest go."""
        path = self.folder / f"checkpoint-{step:07d}.pth"
        if distributed.rank() == 0:
            checkpoint.save(
                path, kind=self.kind, step=step, model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                metrics=metrics, rows=rows, settings=self.settings, **self.stored,
            )  # fmt: skip
            checkpoint.prune(self.folder, self.args.keep)
        return path


def train(run, model, loader, validate, candidate=None):
    """Trains `model` for args.iterations steps; returns the metrics at the end, with the seconds that training took.

    `candidate(step)` is the one that a supernet trains at a step. `validate(step)` returns {"val/...": percent} and is called
    every args.val_every steps and at the end. Images a second, loss and training top-1 go to the log, to log.jsonl and to
    TensorBoard. A signal (Ctrl-C, SIGTERM) saves after the step it arrives in and ends the process. Several processes each
    train on their share of every batch.
    """
    args, iterations = run.args, run.args.iterations
    share = distributed.per_rank_batch_size(args.batch_size)
    model.to(run.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        parameter_groups(model, args.weight_decay), lr=args.lr, momentum=args.momentum, fused=True
    )
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    done, metrics, rows = run.resume(model, optimizer, scaler)
    distributed.broadcast_from_rank0(model.state_dict().values())
    if done >= iterations:
        log.info("%s: finished, nothing to do (another --out or --resume none starts anew)", run.folder)
        return metrics
    epochs = iterations * args.batch_size / len(loader.images)
    log.info("%d iterations of %d images, %.1f epochs; %s", iterations, args.batch_size, epochs,
             f"going on from step {done}" if done else "from the start")  # fmt: skip
    plan = training_plan(
        len(loader.images), share, args.seed, done, iterations, distributed.rank(), distributed.world_size()
    )
    meter = _Meter(args, candidate, scaler, done, metrics["seconds"], rows)
    due = metrics.pop("validation_due", False)
    with Journal(run, done, model.space, due) as journal, _Interruption() as interruption:

        def validated(step):
            """Adds what `validate` measures to the step's metrics, and writes them. Returns the signal that ended it before that, or 0."""
            try:
                with meter.paused(), interruption.at_once(step < iterations):
                    metrics.update(validate(step))
            except Interrupted as error:
                return error.args[0]
            finally:
                model.train()
            left = iterations // args.val_every - step // args.val_every
            log.info("validation took %s; %d more to come", duration(meter.pauses[-1]), left)
            journal.write(step, metrics, candidate)
            return 0

        if due and (stop := validated(done)):
            raise SystemExit(128 + stop)
        for step, (images, labels) in enumerate(loader.batches(plan), done + 1):
            rate = learning_rate(step, iterations, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(dropout_seed(args.seed, step, distributed.rank()))
            with autocast(run.device, args.amp):
                logits = model(images, candidate(step)) if candidate else model(images)
            loss = criterion(logits, labels)
            optimizer.zero_grad(set_to_none=True)  # what was not sampled has no gradient: no decay, no momentum
            scaler.scale(loss).backward()
            distributed.average_gradients(model.parameters())
            begin_momentum(optimizer)
            scaler.step(optimizer)
            scaler.update()
            meter.add(loss, logits, labels)
            journal.progress.update()

            stop = distributed.all_reduce_max(interruption.signal)
            validates = step == iterations or step % args.val_every == 0
            if step == done + PLAN_AFTER:
                _tell_plan(run, model, step, meter.step_seconds)
            if validates or step % LOG_EVERY == 0:
                metrics = meter.summary(step, rate)
                log.info("step %d/%d  loss %.4f  top-1 %.2f%%  lr %.4f  %.0f images/s", step, iterations, metrics["train/loss"],
                         metrics["train/acc1"], rate, metrics["train/images_per_second"])  # fmt: skip
                if not validates:
                    journal.write(step, metrics, candidate)
                else:
                    if not (stop and step < iterations):
                        stop = validated(step)
                    if stop:
                        metrics["validation_due"] = True  # when the run goes on
            if step == iterations or stop or step % args.save_every == 0:
                metrics["seconds"] = meter.seconds
                saved = run.save(step, model, optimizer, scaler, metrics, meter.fetch())
            if stop and step < iterations:
                log.info("interrupted: saved %s; the same command goes on from there", saved)
                raise SystemExit(128 + stop)
    return metrics


def _tell_plan(run, model, step, step_seconds):
    """Logs what the run will take, going by its first steps."""
    if distributed.rank():
        return
    steps, args = run.args.iterations - step, run.args
    size = 2 * sum(t.nbytes for t in model.state_dict().values())  # with momentum
    disk, free = size * (args.keep + 1), shutil.disk_usage(run.folder).free
    log.info("plan: %s for %d more steps of %.3g s, beside %d validations; %d checkpoints of %.0f MB; peak memory so far %.1f GB",
             duration(steps * step_seconds), steps, step_seconds, -(-steps // args.val_every), args.keep, size / 1e6,
             _peak_memory(run.device) / 1e9)  # fmt: skip
    if disk > free:
        log.warning(
            "warning: %s has %.1f GB left, the checkpoints need %.1f GB; lower --keep",
            run.folder,
            free / 1e9,
            disk / 1e9,
        )


def _peak_memory(device):
    """In bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else math.nan


class _Meter:
    """Loss and top-1 over the steps since the last line of the log, and the time. Fetched from the device only when asked for."""

    def __init__(self, args, candidate, scaler, step, seconds, rows):
        self.args, self.candidate, self.scaler, self.step = args, candidate, scaler, step
        self.rows, self.window = (
            rows,
            [],
        )  # (n, 3): loss, images right in top-1 and top-5, of all processes; not yet fetched
        self.before, self.started, self.pauses = seconds, time.perf_counter(), []
        self.logged = step, self.seconds
        self.first = None

    @property
    def seconds(self):
        return round(self.before + time.perf_counter() - self.started - sum(self.pauses), 3)

    @property
    def step_seconds(self):
        """Of a step since the first one."""
        self.fetch()
        step, seconds = self.first
        return (self.seconds - seconds) / max(1, self.step - step)

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.pauses.append(time.perf_counter() - start)

    def add(self, loss, logits, labels):
        self.window.append(torch.cat((loss.detach()[None], correct_counts(logits.detach(), labels))))
        self.step += 1
        if self.first is None:
            self.fetch()
            self.first = self.step, self.seconds

    def fetch(self):
        """The rows so far. Raises UserError where a loss was not finite, unless --amp fp16 can still scale lower."""
        if self.window:
            rows = distributed.all_reduce_sum(torch.stack(self.window).double().cpu())
            rows[:, 0] /= distributed.world_size()
            finite = rows[:, 0].isfinite()
            if not finite.all() and self.scaler.get_scale() <= 1:
                bad = self.step - len(rows) + 1 + int(finite.logical_not().nonzero()[0])
                rate = learning_rate(bad, self.args.iterations, self.args.lr, self.args.warmup)
                where = f", path {list(self.candidate(bad))}" if self.candidate else ""
                raise UserError(
                    f"the loss of step {bad} is not finite (learning rate {rate:.4g}{where}); lower --lr, with another --out"
                )
            self.rows, self.window = torch.cat((self.rows, rows[finite])), []
        return self.rows

    def summary(self, step, rate):
        """The means over the rows, which end here."""
        rows, self.rows = self.fetch(), self.rows[:0]
        loss, top1, _ = rows.mean(dim=0).tolist()
        (logged, before), self.logged = self.logged, (step, self.seconds)
        return {
            "train/loss": loss, "train/acc1": top1 * 100 / self.args.batch_size, "train/lr": rate,
            "train/images_per_second": (step - logged) * self.args.batch_size / max(1e-3, self.seconds - before),
            "seconds": self.seconds,
        }  # fmt: skip


class _Interruption:
    """While it is entered, SIGINT and SIGTERM are noted in `signal` instead of ending the process; so is the end of torchrun."""

    raises = False

    @contextlib.contextmanager
    def at_once(self, raises):
        """Within the block they are raised too, as Interrupted, if `raises`."""
        self.raises = raises
        try:
            yield
        finally:
            self.raises = False

    def __enter__(self):
        self.noted, self.parent = 0, os.getppid()
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    @property
    def signal(self):
        orphaned = (
            distributed.world_size() > 1 and os.getppid() != self.parent
        )  # torchrun was killed: nobody would start the others again
        return self.noted or (signal.SIGTERM if orphaned else 0)

    def _note(self, number, _):
        self.noted = number
        if self.raises:
            raise Interrupted(number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
