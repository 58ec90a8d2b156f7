"""Where the bins of a histogram lie, from the extremes of its values alone.

Functions take `numpy` or `jax.numpy` as their last argument: the grid that a device fills must be
the one that the host derives.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from neurosens.neurons.exact_sums import times_power

# Bin indices stay below 2**24 in magnitude, so that they are exact in float32.
_INDEX_BITS = 24
_MIN_EXPONENT = -126


def exponent_above(minimum: Any, maximum: Any, xp: ModuleType) -> Any:
    """An exponent `[N]` with `|value| < 2**exponent` for all values of a range, bounded below."""
    largest = xp.maximum(xp.abs(minimum), xp.abs(maximum))
    largest = xp.where(minimum <= maximum, largest, xp.zeros_like(largest))
    lowest = _MIN_EXPONENT + _INDEX_BITS
    exponent = xp.where(largest > 0, xp.frexp(largest)[1], lowest)
    return xp.maximum(exponent, lowest).astype(xp.int32)


def grid(minimum: Any, maximum: Any, bins: int, xp: ModuleType) -> tuple[Any, Any]:
    """The grid of each neuron: exponent of the bin width and index of the first bin.

    Args:
      minimum: least values `[N]`; larger than the largest where there are no values.
      maximum: largest values `[N]`.
      bins: bins of the histogram, at least 2.
      xp: `numpy` or `jax.numpy`.

    Returns:
      `(exponent [N], first [N])`: bin j holds `[(first + j) * 2**exponent, ... + 2**exponent)`.
    """
    some = minimum <= maximum
    low, high = xp.where(some, minimum, 0), xp.where(some, maximum, 0)
    # At the coarsest of these widths, all values lie in the two bins beside 0. Ever wider bins
    # never need more of them, so the number of widths that are too fine is the index of the finest
    # that is not.
    finest = exponent_above(minimum, maximum, xp) - _INDEX_BITS
    widths = finest + xp.arange(_INDEX_BITS, dtype=xp.int32)[:, None]
    span = bin_index(high, widths, xp) - bin_index(low, widths, xp)
    exponent = (finest + (span >= bins).sum(0)).astype(xp.int32)
    return exponent, bin_index(low, exponent, xp)


def bin_index(x: Any, exponent: Any, xp: ModuleType) -> Any:
    """`floor(x / 2**exponent)`, exactly, as integers of the shape of both together."""
    scaled = np.ldexp(x, -exponent) if xp is np else times_power(x, -exponent)
    floor = xp.floor(scaled)
    # A small negative number can underflow to zero, but lies below it.
    floor = xp.where(x < 0, xp.minimum(floor, -1), floor)
    return floor.astype(xp.int64 if xp is np else xp.int32)
