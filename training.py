"""The training recipe of supernet and retrained network, and the loop that both scripts run.

SGD with momentum, decay on weights with more than one dimension, a learning rate that falls linearly to 0, label smoothing.
Everything random at a step (images, augmentation, path, dropout) is a pure function of seed and step, so a run that goes
on from a checkpoint ends as one that was never interrupted.
Source: paper section 4; official `src/Supernet/train.py`, `utils.py`.
"""
import dataclasses
import json
import pathlib
import signal
import time

import torch
from torch import nn

import checkpoint
from dataset import training_plan
from evaluation import correct_counts
from utils import UserError, log

LOG_EVERY = 50  # steps
DROPOUT = 1_000_003  # separates the dropout stream of neighbouring seeds


def parameter_groups(model, weight_decay):
    """SGD parameter groups: weights with more than one dimension decay, the others (BN) don't (official)."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}]
    return groups + [{"params": others, "weight_decay": 0.0}] * bool(others)


def learning_rate(step, iterations, base, warmup=0):
    """Of iteration step = 1 ... iterations: base * (1 - step / iterations), so the last one has 0 (the official schedule
    steps before the optimizer). During `warmup` steps (not official) it rises linearly to that line."""
    return base * (1 - step / iterations) * min(1.0, step / warmup if warmup else 1.0)


@dataclasses.dataclass
class Run:
    """A training run: what `train` needs beside model and images. `stored` goes into every checkpoint."""

    args: object
    folder: pathlib.Path
    device: torch.device
    kind: str
    stored: dict
    path: object = None  # step -> the candidate that it trains, where that changes

    @property
    def settings(self):
        return {k: v for k, v in vars(self.args).items() if k not in checkpoint.HARMLESS}

    def resume(self, model, optimizer):
        """Loads the newest checkpoint if the run is to go on from one; returns (step, metrics) that it had reached."""
        path = checkpoint.newest(self.folder)
        if path is None or self.args.resume == "none":
            checkpoint.prune(self.folder, 0)
            return 0, {"seconds": 0.0}
        stored = checkpoint.load(path, self.kind)
        if stored.content is None:
            raise UserError(f"{path}: not a checkpoint of this program; use another --out, or --resume none")
        checkpoint.check_settings(stored, self.settings, self.folder)
        odd = [k for k in ("split", "classes", "architecture") if stored.content.get(k) != self.stored.get(k)]
        if odd:
            raise UserError(f"{path}: was trained with another {odd[0]}; use that, another --out, or --resume none")
        model.load_state_dict(stored.weights)
        optimizer.load_state_dict(stored.content["optimizer"])
        return stored.content["step"], stored.content["metrics"]

    def save(self, model, optimizer, step, metrics):
        path = self.folder / f"checkpoint-{step:07d}.pth"
        checkpoint.save(
            path, kind=self.kind, step=step, model=model.state_dict(), optimizer=optimizer.state_dict(),
            metrics=metrics, settings=self.settings, **self.stored,
        )  # fmt: skip
        checkpoint.prune(self.folder, self.args.keep)
        return path


def train(run, model, loader, forward, validate):
    """Trains `model` for args.iterations steps; returns the metrics at the end, with the seconds that training took.

    `forward(images, step)` gives the logits; `validate(step)` returns {"val/...": percent} and is called every
    args.val_every steps and at the end. Images a second, loss and training top-1 go to the log, to log.jsonl and to
    TensorBoard. A signal (Ctrl-C, SIGTERM) saves after the step it arrives in and ends the process.
    """
    from torch.utils.tensorboard import SummaryWriter

    args, iterations = run.args, run.args.iterations
    model.to(run.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), lr=args.lr, momentum=args.momentum)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    done, metrics = run.resume(model, optimizer)
    if done >= iterations:
        log.info("%s: finished, nothing to do (another --out or --resume none starts anew)", run.folder)
        return metrics
    epochs = iterations * args.batch_size / len(loader.images)
    log.info("%d iterations of %d images, %.1f epochs; %s", iterations, args.batch_size, epochs,
             f"going on from step {done}" if done else "from the start")  # fmt: skip
    plan = training_plan(len(loader.images), args.batch_size, args.seed, done, iterations)
    seconds, last, window = metrics["seconds"], time.perf_counter(), []
    with (
        SummaryWriter(run.folder / "tensorboard", purge_step=done + 1) as board,
        open(run.folder / "log.jsonl", "a") as journal,
        _Interruption() as interruption,
    ):
        for step, (images, labels) in enumerate(loader.batches(plan), done + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, iterations, args.lr, args.warmup)
            torch.manual_seed(args.seed * DROPOUT + step)
            logits = forward(images, step)
            loss = criterion(logits, labels)
            optimizer.zero_grad(set_to_none=True)  # what was not sampled has no gradient: no decay, no momentum
            loss.backward()
            optimizer.step()
            window.append(torch.cat((loss.detach()[None], correct_counts(logits.detach(), labels))))

            save = step == iterations or step % args.save_every == 0 or interruption.signal
            check = step == iterations or step % args.val_every == 0
            if save or check or step % LOG_EVERY == 0:
                now = time.perf_counter()
                metrics = _summary(window, step, run, group["lr"], now - last)
                seconds, last, window = seconds + now - last, now, []
                metrics["seconds"] = round(seconds, 3)
                log.info("step %d/%d  loss %.4f  top-1 %.2f%%  lr %.4f  %.0f images/s", step, iterations, metrics["train/loss"],
                         metrics["train/acc1"], metrics["train/lr"], metrics["train/images_per_second"])  # fmt: skip
                if check:
                    metrics.update(validate(step))
                    model.train()
                    last = time.perf_counter()
                for tag, value in metrics.items():
                    board.add_scalar(tag, value, step)
                journal.write(json.dumps({"step": step, **metrics}) + "\n")
                journal.flush()
            if save:
                path = run.save(model, optimizer, step, metrics)
            if interruption.signal and step < iterations:
                log.info("interrupted: saved %s; the same command goes on from there", path)
                raise SystemExit(128 + interruption.signal)
    return metrics


def _summary(window, step, run, lr, seconds):
    """The means over a window of steps. Raises UserError where a loss was not finite."""
    args, values = run.args, torch.stack(window).double().cpu()
    finite = values[:, 0].isfinite()
    if not finite.all():
        bad = step - len(window) + 1 + int(finite.logical_not().nonzero()[0])
        path = f"path {list(run.path(bad))}, " if run.path else ""
        lr = learning_rate(bad, args.iterations, args.lr, args.warmup)
        raise UserError(f"the loss of step {bad} is not finite ({path}learning rate {lr:.4g}); lower --lr, in another --out")
    loss, top1, _ = values.mean(dim=0).tolist()
    return {
        "train/loss": loss, "train/acc1": top1 * 100 / args.batch_size, "train/lr": lr,
        "train/images_per_second": len(window) * args.batch_size / seconds,
    }  # fmt: skip


class _Interruption:
    """While it is entered, SIGINT and SIGTERM are noted in `signal` instead of ending the process."""

    signal = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, _):
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
