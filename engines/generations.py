"""What the results of a search say: its generations, and how far the candidates of the first one can be told apart."""

import math
import statistics

from engines.search_files import by_score

# What helps where the first generation's candidates can't be told apart, in this order (docs/experiments.md).
HELPS = (
    "a space whose candidates differ more (docs/spaces.md)", "--crop-padding for small images", "--rank-by loss",
    "more held-out images", "longer training of the supernet",
)  # fmt: skip


class Generation:
    """The results of a generation, numbered from 1; not `closed` while some are missing."""

    def __init__(self, number, results, closed):
        self.number = number
        self.results = results
        self.closed = closed
        self.succeeded = [r for r in results if r["acc1"] is not None]
        self.best = max(self.succeeded, key=by_score, default=None)

    @property
    def mean(self):
        return statistics.fmean(r["acc1"] for r in self.succeeded)

    @property
    def sd(self):
        """Standard deviation of top-1 over the candidates, 0 for a single one."""
        return statistics.stdev(r["acc1"] for r in self.succeeded) if len(self.succeeded) > 1 else 0.0

    @property
    def mean_loss(self):
        """Of the candidates that have one, None where none has."""
        losses = [r["loss"] for r in self.succeeded if r.get("loss") is not None]
        return statistics.fmean(losses) if losses else None


def standard_error(result):
    """(standard error of the top-1 of a result in points, how it was found): by groups of images, or else binomial."""
    if "acc1_error" in result:
        return result["acc1_error"], "standard error by groups of images"
    return (result["acc1"] * (100 - result["acc1"]) / result["n_images"]) ** 0.5, "standard error"


def score_text(result):
    """The accuracy of a result and its loss, the one first by which it is ranked."""
    top1 = f"{result['acc1']:.2f}%"
    if "score" in result:
        return f"loss {result['loss']:.3f} (top-1 {top1})"
    return top1 if result.get("loss") is None else f"{top1} (loss {result['loss']:.3f})"


def beside_best(result, best):
    """How far the top-1 of a result is from that of the best, and whether they can be told apart."""
    points = result["acc1"] - best["acc1"]
    error = math.hypot(*(standard_error(r)[0] for r in (result, best)))
    side = "above" if points >= 0 else "below"
    apart = "" if abs(points) > 2 * error else ": they can't be told apart"
    return f"{abs(points):.2f} points {side} the best, standard error {error:.2f}{apart}"


def reliability(results):
    """(reliability of the results' scores, the ends of its 95% interval), or None where the halves are not known.

    The correlation r of the scores on two halves of the images, stepped up to all images: 2 r / (1 + r) (Spearman and
    Brown, 1910), with the interval of r by Fisher's z. What is below 0 counts as 0.
    """
    halves = [
        r["halves"]["loss" if "score" in r else "acc1"] for r in results if r["acc1"] is not None and "halves" in r
    ]
    halves = [pair for pair in halves if None not in pair]
    if len(halves) < 4:
        return None
    first, second = zip(*halves)
    varied = len(set(first)) > 1 and len(set(second)) > 1
    r = statistics.correlation(first, second) if varied else 0.0
    z = math.atanh(max(-0.999999, min(r, 0.999999)))
    error = 1.96 / math.sqrt(len(halves) - 3)
    return tuple(2 * r / (1 + r) for r in (max(0.0, math.tanh(z + e)) for e in (0, -error, error)))


def reliability_text(results):
    """A line with the reliability of the first generation's results, or None."""
    if not (found := reliability(results)):
        return None
    value, low, high = found
    what = "loss" if any("score" in r for r in results) else "top-1"
    return f"reliability of {what} in the first generation: {value:.2f}, 95% interval {low:.2f} to {high:.2f}"


def first_generation_warning(results, n_classes):
    """A line that says that the first generation's candidates can't be told apart, or None.

    Compares them with chance, their spread with the standard error of one top-1 in the mean, and their reliability with
    one half.
    """
    generation = Generation(1, results, closed=True)
    if len(generation.succeeded) < 2:
        return None
    mean, sd = generation.mean, generation.sd
    n = generation.best["n_images"]
    chance = 100 / n_classes
    at_chance = mean <= chance + 3 * (chance * (100 - chance) / n) ** 0.5
    noise = (mean * (100 - mean) / n) ** 0.5
    by_groups = [r["acc1_error"] ** 2 for r in generation.succeeded if "acc1_error" in r]
    if by_groups:
        noise = statistics.fmean(by_groups) ** 0.5
    value, *_ = reliability(results) or (1.0,)
    if not at_chance and sd > noise and value >= 0.5:
        return None
    found = f"the first generation has {mean:.2f}% in the mean, standard deviation {sd:.2f}, and"
    if at_chance:
        return f"{found} chance is {chance:.2f}%: train the supernet longer"
    by_loss = "score" in generation.best
    helps = ", ".join(text for text in HELPS if not (by_loss and text == "--rank-by loss"))
    found += f" {n} images{' in groups' * bool(by_groups)} measure each to {noise:.2f} points"
    if value < 0.5:
        found += f"; {reliability_text(results)}"
    return f"{found}: what helps, in this order: {helps}"
