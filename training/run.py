"""The folder of a training run: its lock, checkpoints and logs."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib

import torch
from tqdm import tqdm

from settings.command_line import write_settings
from settings.fields import flag
from space import weight_files
from training import checkpoint, distributed
from utils import UserError, atomic_write, code_version, hold_lock, log, output_folder, start_logging

STATE = {"settings", "step", "optimizer", "scaler", "metrics", "rows"}  # entries of a checkpoint that training needs


def contents_of(space, config, classes, split=None, **more):
    """The `contents` of a run: its SearchSpace, its DataConfig, the names of the classes, the split of the images."""
    return {"space": space.to_dict(), "data": config.to_dict(), "split": split, "classes": list(classes), **more}


@dataclasses.dataclass
class TrainingRun:
    """What a training run keeps in `folder`; without a folder nothing is kept. Only rank 0 writes.

    `kind` ("supernet" or "scratch") and `contents` (see `contents_of`) go into every checkpoint. `settings` (name ->
    value) are those that affect the result: a resumed run must have the same ones. `keep` is the number of checkpoints
    that are kept.
    """

    folder: pathlib.Path | None = None
    kind: str = ""
    contents: dict = dataclasses.field(default_factory=dict)
    settings: dict = dataclasses.field(default_factory=dict)
    keep: int = 3

    def __post_init__(self):
        if self.folder is not None:
            self.folder = pathlib.Path(self.folder)
        if distributed.world_size() > 1:
            self.settings = self.settings | {"processes": distributed.world_size()}

    def start(self, device, seed, anew=False, warnings=(), images=None, config=None):
        """Locks the folder, starts its log, and logs the `warnings`; with `anew`, an earlier run in it is renamed.

        `config` (name -> value) are the settings for config.yml; `images` is a hash of the images. Raises UserError if
        another run holds the lock, or if settings, images or code differ between ranks.
        """
        distributed.check_same(self._identity(images))
        distributed.on_rank0(lambda: self._start(device, seed, anew, warnings, config or {}))

    def _identity(self, images):
        """What must be the same on all ranks, by its name in error messages."""
        if distributed.world_size() == 1:
            return {}
        flags = {flag(name): value for name, value in self.settings.items()}
        return {**flags, **self.contents, "images": images, "code of version": code_version()}

    def _start(self, device, seed, anew, warnings, config):
        output_folder(self.folder.parent)
        self.lock = hold_lock(self.folder.with_suffix(".lock"), wait_s=10)  # workers of a killed run end within moments
        aside = None
        if anew and checkpoint.newest(self.folder):
            names = (self.folder.with_suffix(f".{n}") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            self.folder.rename(aside)
        start_logging(self.folder, device, seed)
        write_settings(self.folder / "config.yml", self.kind, config)
        if aside:
            log.info("the previous run was moved to %s", aside)
        if text := distributed.unused_gpus(device):
            log.info(text)
        for text in warnings:
            log.warning("warning: %s", text)

    def resume(self, recipe):
        """Loads the newest whole checkpoint, if there is one.

        Returns its (step, metrics, rows of the log, whether the validation of this step is still due).
        """
        content = distributed.on_rank0(self._newest) if self.folder else None
        if content is None:
            return 0, {"seconds": 0.0}, torch.empty(0, 3, dtype=torch.double), False
        recipe.model.load_state_dict(content["model"])
        recipe.optimizer.load_state_dict(content["optimizer"])
        recipe.scaler.load_state_dict(content["scaler"])
        metrics = dict(content["metrics"])
        validation_due = metrics.pop("validation_due", False)
        return content["step"], metrics, content["rows"], validation_due

    def _newest(self):
        """The content of the newest whole checkpoint, or None. Raises UserError if it is of another run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".checkpoint-*.tmp"):  # of a process that was killed while writing
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
        for name in ("space", "split", "classes", "architecture"):
            if content.get(name) != self.contents.get(name):
                raise UserError(f"{path}: was trained with another {name}; use that, {advice}")

    def save(self, step, recipe, metrics, rows, validation_due=False):
        """Writes a checkpoint, removes the oldest, and returns its path; without a folder returns None."""
        if self.folder is None:
            return None
        path = self.folder / f"checkpoint-{step:07d}.pth"
        if distributed.rank() == 0:
            if validation_due:
                metrics = {**metrics, "validation_due": True}
            parts = {"model": recipe.model, "optimizer": recipe.optimizer, "scaler": recipe.scaler}
            state = {name: part.state_dict() for name, part in parts.items()}
            values = {"kind": self.kind, "step": step, "metrics": metrics, "rows": rows, "settings": self.settings}
            checkpoint.save(path, **values, **state, **self.contents)
            checkpoint.prune(self.folder, self.keep)
        return path


class Journal:
    """Writes log.jsonl and TensorBoard's files in `folder`, and shows a progress bar on a terminal; on rank 0 only.

    Removes the lines that a killed run wrote after step `kept`. Without a folder, only the bar is shown.
    """

    def __init__(self, folder, done, total, space, kept):
        self.folder = folder
        self.done = done
        self.total = total
        self.space = space
        self.kept = kept

    def __enter__(self):
        shows = distributed.rank() == 0
        self.writes = shows and self.folder is not None
        self.closing = contextlib.ExitStack()
        shown = {"unit": "step", "dynamic_ncols": True, "disable": None if shows else True}
        self.progress = self.closing.enter_context(tqdm(total=self.total, initial=self.done, **shown))
        if self.writes:
            self.board = curves(self.folder / "tensorboard", self.kept + 1)
            self.closing.callback(self.board.close)
            path = self.folder / "log.jsonl"
            self.step = _cut(path, self.kept)
            self.file = self.closing.enter_context(open(path, "a"))
        return self

    def __exit__(self, *_):
        self.closing.close()

    def log(self, step, metrics):
        """Logs the metrics of a step as one line."""
        text = "step %d/%d  loss %.4f  top-1 %.2f%%  lr %.4f  %.0f images/s, waited for %.0f%% of the time"
        names = ("loss", "acc1", "lr", "images_per_second", "wait_percent")
        log.info(text, step, self.total, *(metrics[f"train/{name}"] for name in names))

    def write(self, step, metrics, candidate_at):
        """Writes the metrics of a step and, to TensorBoard, the FLOPs of the paths since the last one."""
        if not self.writes:
            return
        for tag, value in metrics.items():
            self.board.add_scalar(tag, value, step)
        if candidate_at:
            mflops = [self.space.flops(candidate_at(s)) / 1e6 for s in range(self.step + 1, step + 1)]
            self.board.add_histogram("paths/MFLOPs", torch.tensor(mflops), step)
        self.progress.set_postfix(loss=f"{metrics['train/loss']:.3f}", top1=f"{metrics['train/acc1']:.1f}%")
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        self.step = step


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
    """Removes lines of later steps, and an incomplete last one. Returns the step of the last line left, or 0."""
    lines = []
    if path.exists():
        lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True) if _step(line) <= step]
        with atomic_write(path) as file:
            file.writelines(lines)
    return _step(lines[-1]) if lines else 0


def _step(line):
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
