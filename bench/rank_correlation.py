"""How well a number of each candidate predicts their order by accuracy: Kendall's tau, with bootstrap intervals.

If accuracies are measured several times (seeds), the taus with each measurement are averaged. The agreement of one
seed with another, which bounds how well the order can be known, is then on the same scale.
"""

import math

import numpy as np

LEVEL = 0.95  # of the intervals


def kendall(a, b):
    """Kendall's tau-b of two lists; 0 if all values of one are equal."""
    return float(_taus(a, b, np.ones((1, len(a))))[0])


def agreement(predictor, truths):
    """The mean tau of a list with each of the lists `truths`."""
    return float(np.mean([kendall(predictor, truth) for truth in truths]))


def resamples(n, times=10_000, seed=0):
    """How often each of n candidates occurs in each bootstrap resample: (times, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), times)


def bootstrap(predictor, truths, counts):
    """The agreement in each resample of `counts`: (times,). Pass the same counts to compare predictors in pairs."""
    return np.mean([_taus(predictor, truth, counts) for truth in truths], axis=0)


def interval(values):
    """The 95% interval (low, high) of bootstrapped values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def candidates_needed(n, difference, low, high):
    """Estimates how many candidates a difference needs to be significant, if n give the interval (low, high).

    The width of an interval falls with the square root of the number of candidates.
    """
    return math.ceil(n * ((high - low) / 2 / difference) ** 2) if difference else math.inf


def _taus(a, b, counts):
    """Kendall's tau-b of two lists that hold candidate i counts[k, i] times, for each k: (times,)."""
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(a, float), np.asarray(b, float)))
    both, only_a, only_b = (((counts @ m) * counts).sum(axis=1) for m in (a * b, a * a, b * b))
    return both / np.sqrt(np.maximum(only_a * only_b, 1))
