"""What a training run writes down as it goes: log.jsonl, TensorBoard, a progress bar."""

import contextlib
import json
import math

import torch
from tqdm import tqdm

import distributed
from utils import atomic_write


class Journal:
    """log.jsonl, TensorBoard and, on a terminal, a progress bar; written by process 0.

    What a killed run wrote after the step that it goes on from is taken back, and that step's line too where it is still due.
    """

    def __init__(self, run, done, space, due):
        self.run, self.done, self.space, self.kept = run, done, space, done - due

    def __enter__(self):
        self.writes = distributed.rank() == 0
        self.ending = contextlib.ExitStack()
        self.progress = self.ending.enter_context(tqdm(
            total=self.run.args.iterations, initial=self.done, unit="step", dynamic_ncols=True, disable=None if self.writes else True
        ))  # fmt: skip
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self.board = self.ending.enter_context(
                SummaryWriter(self.run.folder / "tensorboard", purge_step=self.kept + 1)
            )
            path = self.run.folder / "log.jsonl"
            self.step = _cut(path, self.kept)
            self.file = self.ending.enter_context(open(path, "a"))
        return self

    def __exit__(self, *_):
        self.ending.close()

    def write(self, step, metrics, candidate):
        """Writes the metrics of a step, and to TensorBoard the FLOPs of the paths since the last one."""
        if not self.writes:
            return
        for tag, value in metrics.items():
            self.board.add_scalar(tag, value, step)
        if candidate:
            mflops = [self.space.flops(candidate(s)) / 1e6 for s in range(self.step + 1, step + 1)]
            self.board.add_histogram("paths/MFLOPs", torch.tensor(mflops), step)
        self.progress.set_postfix(loss=f"{metrics['train/loss']:.3f}", top1=f"{metrics['train/acc1']:.1f}%")
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        self.step = step


def _cut(path, step):
    """Removes the lines of later steps from a log.jsonl, and a last one that is not whole. Returns the step of the last that stays, or 0."""
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
