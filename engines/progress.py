"""How a running search is going: a progress bar on a terminal, lines in the log, and curves for TensorBoard."""

import sys
import time

import numpy as np
from tqdm import tqdm

from engines.search_record import Generation, by_accuracy, read_generations, state_path
from utils import UserError, duration, log, read_json


class Progress:
    """The state file of a running search, followed by `read`.

    On a terminal a bar shows the candidates done, the best so far and the generation; elsewhere there is a line every half
    minute. Every generation that ends is a line in the log, and a step in OUT/checkpoints/search/tensorboard.
    """

    def __init__(self, out):
        self.out = out
        self.generation, self.evaluated, self.bar, self.board = None, None, None, None
        self.begun = None  # when, and with how many evaluated
        self.changed = self.reported = time.monotonic()

    @property
    def idle_s(self):
        """Seconds since the last result."""
        return time.monotonic() - self.changed

    def read(self):
        """The state. Raises UserError where the tuner gave up."""
        state = self.state = read_json(state_path(self.out))
        if state["error"]:
            raise UserError(f"the search can't go on: {state['error']}")
        if state["evaluated"] != self.evaluated or state["generation"] != self.generation:
            self._show(state)
        elif sys.stderr.isatty():
            self.bar.refresh()  # the time that has passed
        if state["done"]:
            self.bar.close()
        return state

    def _show(self, state):
        """What is new since the last time."""
        generations = [
            Generation(number, results, number <= state["generation"])
            for number, results in enumerate(read_generations(self.out), 1)
        ]
        best = max((g.best for g in generations if g.best), key=by_accuracy, default=None)
        total, so_far = (
            state["settings"]["generations"],
            f"best {best['acc1']:.2f}% at {best['flops'] / 1e6:.1f}M" if best else "none yet",
        )
        where = f"generation {min(state['generation'] + 1, total)} of {total}, {so_far}"
        if self.bar is None:
            self.bar = tqdm(
                desc=where, total=total * state["settings"]["population"], initial=state["evaluated"], unit="candidate", leave=False,
                disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0,
            )  # fmt: skip
        self.bar.set_description(where, refresh=False)
        self.bar.update(state["evaluated"] - self.bar.n)
        if state["evaluated"] != self.evaluated:
            self.evaluated, self.changed = state["evaluated"], time.monotonic()
            self.begun = self.begun or (self.changed, self.evaluated)
        if state["generation"] != self.generation:
            if self.generation is not None:
                to_go = total * state["settings"]["population"] - self.evaluated
                seconds = (self.changed - self.begun[0]) / max(1, self.evaluated - self.begun[1])
                log.info("generation %d of %d: %d candidates so far, %s; %s to go", state["generation"], total, self.evaluated, so_far,
                         duration(to_go * seconds))  # fmt: skip
            self._draw(generations)
            self.generation, self.reported = state["generation"], time.monotonic()
        elif self.changed > self.reported + 30 and self.bar.disable:
            log.info(
                "generation %d of %d: %d candidates so far, %s", state["generation"] + 1, total, self.evaluated, so_far
            )
            self.reported = time.monotonic()

    def _draw(self, generations):
        """Adds the generations that have ended to TensorBoard's curves; the first time all of them, in place of what is there."""
        closed = [g for g in generations if g.closed and g.succeeded]
        if closed and self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(state_path(self.out).with_name("tensorboard"), purge_step=0)
        for g in closed:
            if g.number > (self.generation or 0):
                best = max((e.best for e in closed if e.number <= g.number), key=by_accuracy)
                flops = [r["flops"] / 1e6 for r in g.succeeded]
                for tag, value in (
                    ("acc1_best_so_far", best["acc1"]), ("acc1_best", g.best["acc1"]), ("acc1_mean", g.mean), ("acc1_sd", g.sd),
                    ("mflops_best_so_far", best["flops"] / 1e6), ("mflops_mean", sum(flops) / len(flops)), ("failed", len(g.results) - len(flops)),
                ):  # fmt: skip
                    self.board.add_scalar(f"search/{tag}", value, g.number)
                self.board.add_histogram("search/acc1", np.array([r["acc1"] for r in g.succeeded]), g.number)
                self.board.add_histogram("search/mflops", np.array(flops), g.number)
        if closed:
            self.board.flush()
