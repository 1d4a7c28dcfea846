"""The folder of a training run: its lock, checkpoints and logs."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import reprlib
import sys

import torch
from tqdm.auto import tqdm

from settings.command_line import write_settings
from settings.fields import flag
from settings.subjects import deciding
from space import own, weight_files
from training import checkpoint, distributed
from training.step import linear, name_of, sgd, single_path
from utils import UserError, atomic_write, code_version, end_logging, hold_lock, log, output_folder, start_logging

STATE = {"settings", "step", "optimizer", "scaler", "metrics", "rows"}  # entries of a checkpoint that training needs


def contents_of(space, config, classes, split=None, **more):
    """The `contents` of a run: its SearchSpace, its DataConfig, the names of the classes, the split of the images.

    The space gets the hash of its own operations, which one made by hand has not.
    `config` is None for data of Python that has no DataConfig. Raises UserError if the classes are not names.
    """
    classes = list(classes)
    if not all(isinstance(name, str) for name in classes):
        raise UserError(f"classes {reprlib.repr(classes)} are not names: write them as texts")
    data = config and config.to_dict()
    return {"space": own.with_hash(space).to_dict(), "data": data, "split": split, "classes": classes, **more}


PLAIN = (bool, int, float, str, bytes, tuple, type(None))


def described(thing):
    """A sampler, a rule or another function in words, by which runs are compared when they are resumed.

    An object is known by its repr, if its class has one of its own, and by its source; a function by its source and the
    plain values that it is given beforehand.
    """
    if isinstance(thing, functools.partial):
        given = ", ".join(map(_plain, [*thing.args, *sorted(thing.keywords.items())]))
        return f"{described(thing.func)} of {given}"
    if getattr(thing, "__name__", "") not in ("", "candidate") and hasattr(thing, "__self__"):
        return f"{described(thing.__self__)}.{thing.__name__}"
    thing = getattr(thing, "__self__", thing)
    named = hasattr(thing, "__qualname__")
    name = thing.__qualname__ if named else type(thing).__qualname__
    if not named and type(thing).__repr__ is not object.__repr__:
        name = _plain(thing)
    cells = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    values = [v for v in (*(getattr(thing, "__defaults__", None) or ()), *cells) if isinstance(v, PLAIN)]
    name += f" with {', '.join(map(repr, values))}" if values else ""
    code = own.source_hash(thing)
    return f"{name} ({code})" if code else name


def _plain(value):
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class TrainingRun:
    """What a training run keeps in `folder`; without a folder nothing is kept. Only rank 0 writes.

    Args:
        kind: "supernet" or "scratch"
        contents: of every checkpoint; see `contents_of`
        settings: name -> value of those that affect the result: a resumed run must have the same ones. `train` adds
            its own, with the rule, the sampler, and an optimizer or schedule that is not the official one
        log: a function of a step and its metrics (name -> number), called for each line of the log
    """

    def __init__(self, folder=None, kind="", contents=None, settings=None, log=None):
        self.folder = None if folder is None else pathlib.Path(folder)
        self.kind = kind
        self.contents = contents or {}
        processes = {"processes": distributed.world_size()} if distributed.world_size() > 1 else {}
        self.settings = (settings or {}) | processes
        self.given = None  # settings, without those that `train` adds
        self.log = log
        self.started = False
        self.again = "the same command"  # resumes the run
        self.read_back = False  # whether a sampler's state was found readable
        # Of a run that has been started, on rank 0: the open lock file, and what it resumes from.
        self.lock = self.content = None

    def start_from_python(self, step, sampler):
        """Starts a run that no command has started, with the settings of a Step and a sampler."""
        rule = step.rule
        settings = dataclasses.asdict(step.training) | {"seed": step.seed, "rule": name_of(rule)}
        code = "" if rule is single_path else own.hashes.get(("rule", name_of(rule))) or described(rule)
        others = {"optimizer": step.make_optimizer, "schedule": step.schedule, "paths": sampler}
        others = {name: described(value) for name, value in others.items() if value not in (None, sgd, linear)}
        if missing := {"space", "data", "split", "classes"} - self.contents.keys():
            how = "make it by contents_of(space, config, classes)"
            raise UserError(f"TrainingRun: contents has no {min(missing)}; {how}")
        self.given = dict(self.settings) if self.given is None else self.given
        self.settings = deciding(settings) | ({"rule_code": code} if code else {}) | others | self.given
        self.start(step.device, step.seed, step.training.resume == "none", config=settings | others)

    def _beside(self, end):
        return self.folder.with_name(f"{self.folder.name}.{end}")

    def close(self):
        """Releases the lock of the folder, and ends its log."""
        end_logging()
        if self.lock:
            self.lock.close()
        self.lock = None
        self.started = False

    def start(self, device, seed, anew=False, warnings=(), config=None):
        """Locks the folder, starts its log, and logs the `warnings`; with `anew`, an earlier run in it is renamed.

        `config` (name -> value) are the settings for config.yml. Raises UserError if another run holds the lock, or if
        settings, contents or code differ between ranks.
        """
        self.started = True
        if anew:
            self.again = "the same command without --resume none"
            anew = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # torchrun restarts to resume
        flags = {flag(name): value for name, value in self.settings.items()}
        contents = {name: value for name, value in self.contents.items() if name != "counts"}  # long, and in `images`
        distributed.check_same({**flags, **contents, "code of version": code_version()})
        distributed.on_rank0(lambda: self._start(device, seed, anew, warnings, config or {}))

    def _start(self, device, seed, anew, warnings, config):
        output_folder(self.folder.parent)
        self.lock = hold_lock(self._beside("lock"), wait_s=10)  # workers of a killed run end within moments
        aside = None
        if anew and checkpoint.newest(self.folder):
            names = map(self._beside, itertools.count(1))
            aside = next(name for name in names if not name.exists())
            self.folder.rename(aside)
        start_logging(self.folder, device, seed, own.commits())
        self.content = self._newest()
        config = {name: value for name, value in config.items() if name != "resume"}  # which may be none
        write_settings(self.folder / "config.yml", self.kind, config)
        if aside:
            log.info("the previous run was moved to %s", aside)
        if text := distributed.unused_gpus(device):
            log.info(text)
        for text in warnings:
            log.warning("warning: %s", text)

    def resume(self, step, sampler=None):
        """Loads the newest whole checkpoint, if there is one, into a Step and a sampler.

        Returns its (step, metrics, rows of the log, whether the validation of this step is still due).
        """
        content = distributed.on_rank0(lambda: self.content) if self.folder else None
        self.content = None
        if content is None:
            return 0, {"seconds": 0.0}, torch.empty(0, 3, dtype=torch.double), False
        step.model.load_state_dict(content["model"])
        step.optimizer.load_state_dict(content["optimizer"])
        step.scaler.load_state_dict(content["scaler"])
        if ("sampler" in content) != hasattr(sampler, "state_dict"):
            has = "has" if "sampler" in content else "has no"
            raise UserError(f"{self.folder}: {has} state of a sampler; use the same sampler, or another folder")
        if "sampler" in content:
            sampler.load_state_dict(content["sampler"])
        metrics = dict(content["metrics"])
        validation_due = metrics.pop("validation_due", False)
        return content["step"], metrics, content["rows"], validation_due

    def _newest(self):
        """The content of the newest whole checkpoint, or None. Raises UserError if it is of another run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".checkpoint-*.tmp"):  # its writer was killed
            left.unlink()
        damaged = {}
        for path in reversed(checkpoint.checkpoints(self.folder)):
            try:
                content = weight_files.load_file(path)
            except UserError as error:
                log.warning("warning: %s; looking for an older one", error)
                damaged[path] = error
                continue
            self._check(path, content)
            for later in damaged:  # so that it is neither the newest nor counted by --keep
                later.rename(later.with_name(f"{later.name}.damaged"))
            return content
        if damaged:
            first = next(iter(damaged.values()))
            raise UserError(f"{first}; no older one is whole: use another --out, or --resume none")
        return None

    def _check(self, path, content):
        """Raises UserError if a checkpoint is not one that this run can resume from."""
        found = weight_files.parse(content, path, self.kind)
        advice = "another --out, or --resume none"
        if found.content is None:
            raise UserError(f"{path}: not a checkpoint of this program; use {advice}")
        if missing := STATE - content.keys():
            raise UserError(f"{path}: has no {min(missing)} to resume from; use {advice}")
        checkpoint.check_settings(found, self.contents | {"settings": self.settings}, self.folder)
        known = content | {"space": found.space.to_dict()}
        for name in ("space", "classes", "split", "architecture"):
            if known.get(name) != self.contents.get(name):
                other = "other classes" if name == "classes" else f"another {name}"
                changes = checkpoint.changes_of(name, known, self.contents)
                raise UserError(f"{path}: was trained with {other}{changes}; use the same, {advice}")
        checkpoint.check_images(found, self.contents.get("images"))

    def save(self, number, step, sampler, metrics, rows, validation_due=False):
        """Writes a checkpoint of step `number`, removes the oldest, and returns its path; None without a folder."""
        if self.folder is None:
            return None
        path = self.folder / f"checkpoint-{number:07d}.pth"
        if distributed.rank() == 0:
            if validation_due:
                metrics = {**metrics, "validation_due": True}
            parts = {"model": step.model, "optimizer": step.optimizer, "scaler": step.scaler}
            if hasattr(sampler, "state_dict"):
                parts["sampler"] = sampler
            state = {name: part.state_dict() for name, part in parts.items()}
            values = {"kind": self.kind, "step": number, "metrics": metrics, "rows": rows, "settings": self.settings}
            checkpoint.save(path, **values, **state, **self.contents)
            if "sampler" in parts and not self.read_back:
                weight_files.load_file(path)  # raises now, not when it is resumed, if the state can't be read
                self.read_back = True
            for old in checkpoint.checkpoints(self.folder)[: -step.training.keep]:
                old.unlink(missing_ok=True)
        return path


class Journal:
    """Writes log.jsonl and TensorBoard's files of a run, and shows a progress bar on a terminal or in a notebook.

    On rank 0 only, until the ExitStack `closing` is closed. Removes the lines that a killed run wrote after step
    `kept`. Without a folder there is only the bar.
    """

    def __init__(self, run, done, step, kept, closing):
        self.report = run.log
        self.total = step.training.iterations
        self.space = step.space
        shows = distributed.rank() == 0
        self.writes = shows and run.folder is not None
        hidden = (False if "ipykernel" in sys.modules else None) if shows else True  # None: unless on a terminal
        shown = {"unit": "step", "dynamic_ncols": True, "disable": hidden}
        self.progress = closing.enter_context(tqdm(total=self.total, initial=done, **shown))
        if self.writes:
            self.board = curves(run.folder / "tensorboard", kept + 1)
            closing.callback(self.board.close)
            path = run.folder / "log.jsonl"
            _cut(path, kept)
            self.file = closing.enter_context(open(path, "a"))  # noqa: SIM115

    def log(self, step, metrics):
        """Logs the metrics of a step as one line."""
        text = "step %d/%d  loss %.4f  top-1 %.2f%%  lr %.4f  %.0f images/s, waited for %.0f%% of the time"
        names = ("loss", "acc1", "lr", "images_per_second", "wait_percent")
        log.info(text, step, self.total, *(metrics[f"train/{name}"] for name in names))

    def write(self, step, metrics, paths):
        """Writes the metrics of a step and, to TensorBoard, the FLOPs of the `paths` since the last one."""
        if self.report and distributed.rank() == 0:
            self.report(step, dict(metrics))
        if not self.writes:
            return
        for tag, value in metrics.items():
            self.board.add_scalar(tag, value, step)
        if paths:
            mflops = [self.space.flops(candidate) / 1e6 for candidate in paths]
            self.board.add_histogram("paths/MFLOPs", torch.tensor(mflops), step)
        self.progress.set_postfix(loss=f"{metrics['train/loss']:.3f}", top1=f"{metrics['train/acc1']:.1f}%")
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()


def curves(folder, purge_step):
    """TensorBoard's SummaryWriter in a folder; one that writes nothing if the folder's name is not UTF-8."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(folder, purge_step=purge_step)
    except UnicodeEncodeError:
        log.warning("warning: %s: no curves, since TensorBoard needs names that are UTF-8", folder)
        return _NoCurves()


class _NoCurves:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _cut(path, step):
    """Removes lines of later steps, and an incomplete last one."""
    if path.exists():
        lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True) if _step(line) <= step]
        with atomic_write(path) as file:
            file.writelines(lines)


def _step(line):
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
