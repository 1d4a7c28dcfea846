"""The progress of a running search: a bar on a terminal or lines in the log, and curves for TensorBoard."""

import math
import sys
import time

import numpy as np
from tqdm import tqdm

from engines.generations import Generation, first_generation_warning, reliability_text, score_text
from engines.search_files import (
    by_score,
    children_wanted,
    cost_of,
    is_exhausted,
    n_generations,
    own_costs_of,
    read_generations,
    read_state,
    space_of,
    state_path,
)
from space.limits import bounding, bounds_of, shown
from utils import Pace, UserError, log

UNITS = {"flops": " FLOPs", "params": " parameters", "latency": ""}
LINE_S = 30  # between lines in the log within a generation


class Progress:
    """Follows the files of a running search; `read` shows what is new in them.

    On a terminal, a bar shows the candidates done, the best so far, the generation and the time to go; elsewhere, lines
    in the log do so, after the first candidates and then every half minute. Each generation adds a line to the log and
    a step to OUT/checkpoints/search/tensorboard.
    """

    def __init__(self, out):
        self.out = out
        self.generations = []  # Generations; closed ones are read once
        self.n_closed = None
        self.evaluated = None
        self.bar = None
        self.board = None
        self.limited = None  # the costs whose limits exclude candidates
        self.pace = Pace()
        self.changed = time.monotonic()  # the time of the last result
        self.reported = -math.inf

    def read(self):
        """Shows what is new, and returns the state of the search. Raises UserError if the tuner gave up."""
        state = self.state = read_state(self.out)
        if state["error"]:
            raise UserError(f"the search cannot continue: {state['error']}")
        if (state["evaluated"], state["generation"]) != (self.evaluated, self.n_closed):
            closed = [generation for generation in self.generations if generation.closed]
            opened = enumerate(read_generations(self.out, skip=len(closed)), len(closed) + 1)
            self.generations = closed + [Generation(n, results, n <= state["generation"]) for n, results in opened]
            self._show(state)
        elif sys.stderr.isatty():
            self.bar.refresh()  # the elapsed time
        if state["done"]:
            self.bar.close()
            if is_exhausted(state):
                text = "the space is exhausted: no further candidate within the limits is new; the search ends with %d"
                log.warning(text, state["evaluated"])
        return state

    def _show(self, state):
        settings = state["settings"]
        total = n_generations(state)
        candidates = total * settings["population"]
        closed = state["generation"]
        head = f"generation {min(closed + 1, total)} of {total}, {self._best(settings)}"
        to_go = self.pace.to_go(state["evaluated"], candidates)
        if self.bar is None:
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self.bar = tqdm(
                desc=head, total=candidates, initial=state["evaluated"], leave=False, disable=not sys.stderr.isatty(),
                dynamic_ncols=True, bar_format=form,
            )  # fmt: skip
        self.bar.set_description(head, refresh=False)
        self.bar.set_postfix_str(to_go, refresh=False)
        self.bar.update(state["evaluated"] - self.bar.n)
        first = self.evaluated is None
        if state["evaluated"] != self.evaluated:
            self.evaluated = state["evaluated"]
            self.changed = time.monotonic()
        words = [f"of {total}: {self.evaluated} candidates so far, {self._best(settings)}", *filter(None, [to_go])]
        if closed != self.n_closed:
            if not first:
                log.info("generation %d %s", closed, "; ".join(words + self._children(state)))
            if self.n_closed == 0:
                self._judge_first(settings)
            self._draw()
            self.n_closed = closed
            self.reported = -math.inf if first else time.monotonic()
        elif self.changed >= self.reported + LINE_S and self.bar.disable and not self._is_complete(settings):
            log.info("generation %d %s", closed + 1, "; ".join(words))
            self.reported = time.monotonic()

    def _best(self, settings):
        """The best so far, with the costs that limits exclude candidates for."""
        best = max((g.best for g in self.generations if g.best), key=by_score, default=None)
        if not best:
            return "none yet"
        if self.limited is None:
            self.limited = bounding(space_of(settings), bounds_of(settings))
        own = own_costs_of(settings)
        costs = [shown(name, cost_of(name, best, own), own) + UNITS.get(name, f" {name}") for name in self.limited]
        return f"best {score_text(best)}" + (f" at {', '.join(costs)}" if costs else "")

    def _is_complete(self, settings):
        """Whether the open generation has all of its results, and will have a line of its own."""
        return self.evaluated % settings["population"] == 0

    @staticmethod
    def _children(state):
        """A text where fewer children than wanted were new in the last closed generation, or nothing."""
        wanted = children_wanted(state["settings"])
        new = dict(enumerate(state["children"], 2)).get(state["generation"], wanted)
        return [f"{new} of {wanted} children were new, random candidates stand for the others"] if new < wanted else []

    def _judge_first(self, settings):
        """Logs how far the candidates of the first generation can be told apart."""
        results = self.generations[0].results
        if text := first_generation_warning(results, settings["space"]["n_classes"]):
            log.warning("warning: %s", text)
        elif text := reliability_text(results):
            log.info(text)

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
                "loss_best_so_far": best.get("loss"),
                "loss_best": g.best.get("loss"),
                "loss_mean": g.mean_loss,
                "mflops_best_so_far": best["flops"] / 1e6,
                "mflops_mean": sum(flops) / len(flops),
                "failed": len(g.results) - len(flops),
            }
            for tag, value in scalars.items():
                if value is not None:
                    self.board.add_scalar(f"search/{tag}", value, g.number)
            self.board.add_histogram("search/acc1", np.array([r["acc1"] for r in g.succeeded]), g.number)
            self.board.add_histogram("search/mflops", np.array(flops), g.number)
        if closed:
            self.board.flush()
