"""The progress of a running search: a bar on a terminal or lines in the log, and curves for TensorBoard."""

import sys
import time

import numpy as np
from tqdm import tqdm

from engines.search_record import (
    Generation,
    by_score,
    first_generation_warning,
    n_generations,
    read_generations,
    state_path,
)
from space.limits import shown
from utils import UserError, duration, log, read_json

LINE_S = 30  # between lines in the log within a generation


class Progress:
    """Follows the files of a running search; `read` shows what is new in them.

    On a terminal, a bar shows the candidates done, the best so far and the generation; elsewhere, a line in the log
    does so every half minute. Each generation adds a line to the log and a step to OUT/checkpoints/search/tensorboard.
    """

    def __init__(self, out):
        self.out = out
        self.generations = []  # Generations; closed ones are read once
        self.n_closed = None
        self.evaluated = None
        self.bar = None
        self.board = None
        self.first = None  # (time, candidates evaluated) at the first `read`
        self.changed = self.reported = time.monotonic()

    @property
    def idle_s(self):
        """Seconds since the last result."""
        return time.monotonic() - self.changed

    def read(self):
        """Shows what is new, and returns the state of the search. Raises UserError if the tuner gave up."""
        state = self.state = read_json(state_path(self.out))
        if state["error"]:
            raise UserError(f"the search cannot continue: {state['error']}")
        if (state["evaluated"], state["generation"]) != (self.evaluated, self.n_closed):
            self._read_generations(state["generation"])
            self._show(state)
        elif sys.stderr.isatty():
            self.bar.refresh()  # the elapsed time
        if state["done"]:
            self.bar.close()
        return state

    def _read_generations(self, n_closed):
        closed = [generation for generation in self.generations if generation.closed]
        opened = enumerate(read_generations(self.out, skip=len(closed)), len(closed) + 1)
        self.generations = closed + [Generation(number, results, number <= n_closed) for number, results in opened]

    def _show(self, state):
        total = n_generations(state)
        population = state["settings"]["population"]
        best = max((g.best for g in self.generations if g.best), key=by_score, default=None)
        so_far = f"best {best['acc1']:.2f}% at {shown('flops', best['flops'])}" if best else "none yet"
        current = min(state["generation"] + 1, total)
        head = f"generation {current} of {total}, {so_far}"
        if self.bar is None:
            self.bar = tqdm(
                desc=head, total=total * population, initial=state["evaluated"], unit="candidate",
                leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0,
            )  # fmt: skip
        self.bar.set_description(head, refresh=False)
        self.bar.update(state["evaluated"] - self.bar.n)
        if state["evaluated"] != self.evaluated:
            self.evaluated = state["evaluated"]
            self.changed = time.monotonic()
            self.first = self.first or (self.changed, self.evaluated)
        done = f"of {total}: {self.evaluated} candidates so far, {so_far}"
        if state["generation"] != self.n_closed:
            if self.n_closed is not None:
                seconds = (self.changed - self.first[0]) / max(1, self.evaluated - self.first[1])
                to_go = duration((total * population - self.evaluated) * seconds)
                log.info("generation %d %s; %s to go", state["generation"], done, to_go)
            if self.n_closed == 0:
                n_classes = state["settings"]["space"]["n_classes"]
                if text := first_generation_warning(self.generations[0].results, n_classes):
                    log.warning("warning: %s", text)
            self._draw()
            self.n_closed = state["generation"]
            self.reported = time.monotonic()
        elif self.changed > self.reported + LINE_S and self.bar.disable:
            log.info("generation %d %s", state["generation"] + 1, done)
            self.reported = time.monotonic()

    def _draw(self):
        """Adds newly closed generations to TensorBoard's curves; the first call adds all, replacing what is there."""
        closed = [g for g in self.generations if g.closed and g.succeeded]
        if closed and self.board is None:
            from training.run import curves

            self.board = curves(state_path(self.out).with_name("tensorboard"), 0)
        for g in closed:
            if g.number <= (self.n_closed or 0):
                continue
            best = max((e.best for e in closed if e.number <= g.number), key=by_score)
            flops = [r["flops"] / 1e6 for r in g.succeeded]
            scalars = {
                "acc1_best_so_far": best["acc1"],
                "acc1_best": g.best["acc1"],
                "acc1_mean": g.mean,
                "acc1_sd": g.sd,
                "mflops_best_so_far": best["flops"] / 1e6,
                "mflops_mean": sum(flops) / len(flops),
                "failed": len(g.results) - len(flops),
            }
            for tag, value in scalars.items():
                self.board.add_scalar(f"search/{tag}", value, g.number)
            self.board.add_histogram("search/acc1", np.array([r["acc1"] for r in g.succeeded]), g.number)
            self.board.add_histogram("search/mflops", np.array(flops), g.number)
        if closed:
            self.board.flush()
