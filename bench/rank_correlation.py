"""How well numbers of candidates predict the candidates' order by accuracy: Kendall's tau, with bootstrap intervals.

Several measurements of the accuracies (seeds) count each for itself: the tau with every one, averaged. So the agreement of one
seed with another, which is how well the order can be known at all, stands on the same scale.
"""

import math

import numpy as np

LEVEL = 0.95  # of the intervals


def kendall(a, b):
    """Kendall's tau-b of two lists; 0 where one of them is all ties, for that says nothing."""
    return float(_taus(a, b, np.ones((1, len(a))))[0])


def agreement(predictor, truths):
    """The tau of a list with each of the lists `truths`, averaged."""
    return float(np.mean([kendall(predictor, truth) for truth in truths]))


def resamples(n, times=10_000, seed=0):
    """How often each of n candidates is in each of `times` bootstrap resamples: (times, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), times)


def bootstrap(predictor, truths, counts):
    """The agreement in each of the resamples of `counts`, (times,); the same counts make two predictors comparable in pairs."""
    return np.mean([_taus(predictor, truth, counts) for truth in truths], axis=0)


def interval(values):
    """(low, high), the middle 95% of bootstrapped values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def candidates_needed(n, difference, low, high):
    """About how many candidates would tell a difference from 0, were it what n candidates gave; widths fall with their root."""
    return math.ceil(n * ((high - low) / 2 / difference) ** 2) if difference else math.inf


def _taus(a, b, counts):
    """Kendall's tau-b of two lists in which candidate i comes counts[k, i] times, for every k: a candidate is tied with itself."""
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(a, float), np.asarray(b, float)))
    both, only_a, only_b = (((counts @ m) * counts).sum(axis=1) for m in (a * b, a * a, b * b))
    return both / np.sqrt(np.maximum(only_a * only_b, 1))
