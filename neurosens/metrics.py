"""Statistics of classification results, on the host."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Interval(NamedTuple):
    """A share of successes with its confidence interval, all in [0, 1]."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> Interval:
    """The Wilson score interval of a binomial proportion (Wilson 1927).

    Args:
      successes: number of successes, 0 <= successes <= trials.
      trials: number of trials, at least 1.
      z: normal quantile; the default gives 95 % two-sided coverage.

    Returns:
      The observed proportion and its interval.

    Raises:
      ValueError: `trials` is 0 or `successes` is outside its range.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f'{successes} successes in {trials} trials is no proportion; give 0 <= successes <= '
            'trials and at least one trial.'
        )
    p = successes / trials
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    # At 0 or all successes the bound is exact; rounding must not carry it past the proportion.
    return Interval(p, min(max(0.0, center - spread), p), max(min(1.0, center + spread), p))


def per_class_accuracy(
    correct: Bool[np.ndarray, ' examples'], labels: Int[np.ndarray, ' examples'], num_classes: int
) -> Float[np.ndarray, ' classes']:
    """Accuracy of each class; NaN for a class without examples."""
    totals = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[correct], minlength=num_classes)
    return np.where(totals > 0, hits / np.maximum(totals, 1), np.nan)
