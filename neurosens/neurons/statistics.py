"""Statistics of what neurons do over a data set, in one pass.

Count, mean, standard deviation, extremes, share of zeros and quantiles of every neuron. Batches
are summarized on the devices, where only small arrays leave them, and merged on the host:

    parts = (statistics(forward, variables, batch, layer='act1') for batch in batches)
    total = functools.reduce(merge, parts)
    total.mean, total.std(), total.quantile((0.25, 0.5, 0.75))

The result does not depend on how the data is split into batches, over devices and hosts, or on the
order of merging: counts, extremes and histograms are equal, moments agree to rounding in float64.

Moments. The devices sum deviations from the middle of a batch's range and their squares in pairs of
floating-point numbers (double the precision of the activations); merging follows Chan, Golub &
LeVeque, "Algorithms for Computing the Sample Variance" (1983).

Histograms. The bins of a neuron are `[j * 2**e, (j + 1) * 2**e)` for integers j, with the finest
exponent e at which its range meets no more than `bins` of them. So the grid follows from the
extremes alone, every bin of a fine grid lies inside one of a coarser grid, and merging loses
nothing that a single pass would have kept. At least half of the bins span the range, unless this
would take bins finer than the spacing of float32 numbers at the largest magnitude, or than
2**-126.

NaN and infinite activations are counted in `nonfinite`. They turn mean, standard deviation and
quantiles of their neuron into NaN; extremes, zeros and histogram describe its finite values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from neurosens import _validate, parallel
from neurosens.forward import Forward, Variables
from neurosens.neurons import units
from neurosens.neurons.exact_sums import centred_sums
from neurosens.neurons.histogram_grid import bin_index, exponent_above, grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """What a batch contributes to `Statistics`, as arrays on the devices.

    The second moment is that of values divided by `2**scale`, which neither overflows nor
    underflows.

    Attributes:
      count: values per neuron that are not masked, int32.
      nonfinite: of them NaN or infinite, int32 `[N]`.
      zeros: of them equal to zero, int32 `[N]`; subnormal numbers count as zero.
      minimum: least finite value `[N]`; infinity where there is none.
      maximum: largest finite value `[N]`; minus infinity where there is none.
      scale: exponent of a power of two above every magnitude, int32 `[N]`.
      shift: point from which deviations are taken, divided by `2**scale`, `[N]`.
      deviations: sum of the deviations, as a rounded sum and its remainder `[2, N]`.
      squares: sum of their squares, likewise `[2, N]`.
      histogram: finite values per bin, int32 `[N, bins]`.
    """

    count: Int[Array, '']
    nonfinite: Int[Array, ' neurons']
    zeros: Int[Array, ' neurons']
    minimum: Float[Array, ' neurons']
    maximum: Float[Array, ' neurons']
    scale: Int[Array, ' neurons']
    shift: Float[Array, ' neurons']
    deviations: Float[Array, '2 neurons']
    squares: Float[Array, '2 neurons']
    histogram: Int[Array, 'neurons bins']


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of the values of N neurons, in the unit of the activations.

    Attributes:
      count: values seen per neuron: examples, times positions if a neuron is a channel.
      nonfinite: of them NaN or infinite, int64 `[N]`.
      zeros: of them equal to zero, int64 `[N]`; subnormal numbers count as zero.
      mean: mean, float64 `[N]`; 0 where nothing was seen, NaN where `nonfinite` is not 0.
      m2: sum of squared deviations from the mean, float64 `[N]`; NaN like the mean.
      minimum: least finite value, float64 `[N]`; infinity where there is none.
      maximum: largest finite value, float64 `[N]`; minus infinity where there is none.
      histogram: finite values in each bin, int64 `[N, bins]`; `edges` says where the bins lie.
    """

    count: int
    nonfinite: Int[np.ndarray, ' neurons']
    zeros: Int[np.ndarray, ' neurons']
    mean: Float[np.ndarray, ' neurons']
    m2: Float[np.ndarray, ' neurons']
    minimum: Float[np.ndarray, ' neurons']
    maximum: Float[np.ndarray, ' neurons']
    histogram: Int[np.ndarray, 'neurons bins']

    def std(self, ddof: int = 1) -> Float[np.ndarray, ' neurons']:
        """Standard deviation.

        Args:
          ddof: subtracted from the count in the divisor; 1 estimates the deviation of the
            population the data were drawn from, 0 gives that of the data themselves.

        Returns:
          float64 `[N]`; 0 where `count <= ddof`, NaN where `nonfinite` is not 0.
        """
        if self.count <= ddof:
            return np.where(self.nonfinite > 0, np.nan, 0.0)
        return np.sqrt(self.m2 / (self.count - ddof))

    def zero_share(self) -> Float[np.ndarray, ' neurons']:
        """Share of values equal to zero, float64 `[N]` in [0, 1]; NaN where nothing was seen."""
        if self.count == 0:
            return np.full(self.zeros.shape, np.nan)
        return self.zeros / self.count

    def edges(self) -> Float[np.ndarray, 'neurons edges']:
        """Edges of the histogram's bins, float64 `[N, bins + 1]`; the left one belongs to a bin.

        Raises:
          ValueError: there is no histogram.
        """
        bins = self._bins()
        exponent, first = grid(self.minimum, self.maximum, bins, np)
        return np.ldexp(first[:, None] + np.arange(bins + 1.0), exponent[:, None])

    def quantile(self, q: float | Sequence[float]) -> Float[np.ndarray, '... neurons']:
        """Quantiles, estimated from the histogram.

        The two values of neighbouring rank around each quantile are located inside their bins, as
        if values were spread evenly over a bin, and interpolated linearly. So the error is less
        than the width of the neuron's bins, measured from `numpy.quantile` of all values.

        Args:
          q: one probability or several, in [0, 1]; 0 gives the minimum and 1 the maximum.

        Returns:
          float64 `[N]` for one probability, `[Q, N]` for several; NaN where nothing was seen or
          `nonfinite` is not 0.

        Raises:
          ValueError: there is no histogram, or a probability lies outside [0, 1].
        """
        bins = self._bins()
        probabilities = np.asarray(q, np.float64)
        for probability in probabilities.ravel().tolist():
            _validate.check_range('q', probability, low=0, high=1)
        if self.count == 0:
            return np.full((*probabilities.shape, *self.mean.shape), np.nan)
        known = self.nonfinite == 0
        minimum, maximum = np.where(known, self.minimum, 0), np.where(known, self.maximum, 0)
        exponent, first = grid(minimum, maximum, bins, np)
        cumulative = self.histogram.cumsum(1)

        def ranked(rank: int) -> np.ndarray:
            """The value of a rank, counted from 0."""
            if rank == 0:
                return minimum
            if rank == self.count - 1:
                return maximum
            index = np.minimum((cumulative <= rank).sum(1), bins - 1)[:, None]
            inside = np.take_along_axis(self.histogram, index, 1)[:, 0]
            before = np.take_along_axis(cumulative, index, 1)[:, 0] - inside
            fraction = (rank - before + 0.5) / np.maximum(inside, 1)
            value = np.ldexp(first + index[:, 0] + fraction, exponent)
            return np.clip(value, minimum, maximum)

        def estimate(probability: float) -> np.ndarray:
            position = probability * (self.count - 1)
            rank = math.floor(position)
            below, above = ranked(rank), ranked(min(rank + 1, self.count - 1))
            return below + (position - rank) * (above - below)

        estimates = [
            np.where(known, estimate(probability), np.nan)
            for probability in probabilities.ravel().tolist()
        ]
        return np.reshape(estimates, (*probabilities.shape, *self.mean.shape))

    def _bins(self) -> int:
        bins = self.histogram.shape[1]
        if bins == 0:
            raise ValueError(
                'These statistics have no histogram; collect them with bins=256 or another number '
                'of bins above 1.'
            )
        return bins


# ----------------------------------------------------------------------------------- devices


@functools.partial(jax.jit, static_argnames=('unit', 'bins'))
def summarize(
    activations: Shaped[Array, 'batch ... channels'],
    mask: Bool[Array, ' batch'] | None = None,
    *,
    unit: str = 'channel',
    bins: int = 256,
) -> Summary:
    """Summarizes the activations of one batch on the devices that hold them.

    Args:
      activations: a batch of activations `[B, ..., C]`, possibly split over devices along the
        batch. Integers and types narrower than float32 are converted to it first.
      mask: rows that count, bool `[B]`; what the others hold (padding) does not matter, even NaN.
      unit: what a neuron is, `'channel'` or `'unit'`.
      bins: bins of each neuron's histogram, at least 2; 0 for none. Histograms take `4 * N * bins`
        bytes.

    Returns:
      The summary, for `from_summary`.

    Raises:
      ValueError: the unit is unknown, the mask has another shape, `bins` is 1 or negative, or there
        are 2**31 bins of all neurons or values of one neuron, or more.
    """
    shape = jnp.shape(activations)
    neurons = units.count(shape[1:], unit)
    _check_bins(neurons, bins)
    if mask is not None and jnp.shape(mask) != shape[:1]:
        raise ValueError(
            f'The mask has shape {jnp.shape(mask)}; it must have one entry per row, shape '
            f'{shape[:1]}.'
        )
    # The batch keeps an axis of its own, so that it stays split over the devices.
    values = jnp.reshape(activations, (shape[0], math.prod(shape[1:]) // neurons, neurons))
    if math.prod(values.shape[:2]) >= 2**31:
        raise ValueError(
            f'A batch of shape {shape} has {math.prod(values.shape[:2])} values per neuron; split '
            'it into batches with fewer than 2**31.'
        )
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if mask is None:
        mask = jnp.ones(shape[0], bool)
    counted = mask.astype(bool)[:, None, None]
    finite = jnp.isfinite(values)
    valid = counted & finite
    # Devices differ in whether they read subnormal numbers as zero; here all do.
    tiny = jnp.finfo(values.dtype).tiny
    values = jnp.where(valid & (jnp.abs(values) >= tiny), values, 0)

    minimum, maximum, zeros, nonfinite = _extremes_and_counts(values, valid, counted & ~finite)
    scale = exponent_above(minimum, maximum, jnp)
    shift, deviations, squares = centred_sums(values, valid, minimum, maximum, scale)
    return Summary(
        count=counted.sum(dtype=jnp.int32) * values.shape[1],
        nonfinite=nonfinite,
        zeros=zeros,
        minimum=minimum,
        maximum=maximum,
        scale=scale,
        shift=shift,
        deviations=deviations,
        squares=squares,
        histogram=_histogram(values, valid, minimum, maximum, bins),
    )


@functools.partial(jax.jit, static_argnames=('layer', 'unit', 'bins'))
def activation_summary(
    forward: Forward,
    variables: Variables,
    x: Shaped[Array, 'batch ...'],
    mask: Bool[Array, ' batch'] | None = None,
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    bins: int = 256,
) -> Summary:
    """Summarizes a layer's activations on one batch, without waiting for the result.

    A loop that fetches the last batch's summary after it has started the next one keeps the devices
    busy.

    Args:
      forward: the model.
      variables: its variables.
      x: a batch of inputs `[B, ...]`, possibly split over devices.
      mask: rows that count, bool `[B]`; all by default.
      layer: the layer whose activations are summarized.
      unit: what a neuron is, `'channel'` or `'unit'`.
      bins: bins of each neuron's histogram, at least 2; 0 for none.

    Returns:
      The summary, for `from_summary`.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: as `summarize` does.
    """
    tapped = forward(variables, x, taps=(layer,))[1]
    return summarize(tapped[layer], mask, unit=unit, bins=bins)


def _check_bins(neurons: int, bins: int) -> None:
    if bins < 0 or bins == 1:
        # A single bin cannot hold negative and positive values: an edge lies at 0.
        raise ValueError(f'bins is {bins}; it must be at least 2, or 0 for no histogram.')
    if neurons * bins >= 2**31:
        raise ValueError(
            f'{neurons} neurons with {bins} bins each are more than a histogram can hold; use '
            f"fewer than {-(-(2**31) // neurons)} bins, or unit='channel'."
        )


def _extremes_and_counts(
    values: Float[Array, 'batch positions neurons'],
    valid: Bool[Array, 'batch positions neurons'],
    nonfinite: Bool[Array, 'batch positions neurons'],
) -> tuple[Array, Array, Array, Array]:
    """Minimum and maximum of valid values, and how many are zero or not finite, each `[N]`."""

    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        # One reduction reads the activations once, four would read them four times.
        return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]), a[2] + b[2], a[3] + b[3]

    infinity, zero = jnp.array(jnp.inf, values.dtype), jnp.zeros((), jnp.int32)
    operands = (
        jnp.where(valid, values, infinity),
        jnp.where(valid, values, -infinity),
        (valid & (values == 0)).astype(jnp.int32),
        nonfinite.astype(jnp.int32),
    )
    return lax.reduce(operands, (infinity, -infinity, zero, zero), combine, dimensions=(0, 1))


def _histogram(
    values: Float[Array, 'batch positions neurons'],
    valid: Bool[Array, 'batch positions neurons'],
    minimum: Float[Array, ' neurons'],
    maximum: Float[Array, ' neurons'],
    bins: int,
) -> Int[Array, 'neurons bins']:
    neurons = values.shape[-1]
    if bins == 0:
        return jnp.zeros((neurons, 0), jnp.int32)
    exponent, first = grid(minimum, maximum, bins, jnp)
    index = bin_index(values, exponent, jnp) - first + jnp.arange(neurons) * bins
    outside = neurons * bins
    # Sorting, one-hot products and comparing with every bin do more work for each value; on several
    # devices, each scatters what it holds.
    counts = jnp.zeros(neurons * bins, jnp.int32)
    counts = counts.at[jnp.where(valid, index, outside)].add(1, mode='drop')
    return counts.reshape(neurons, bins)


# -------------------------------------------------------------------------------------- host


def from_summary(summary: Summary) -> Statistics:
    """Fetches the summary of a batch from the devices.

    Args:
      summary: what `summarize` or `activation_summary` returned. If its arrays are spread over
        several processes, every process must call this and gets the same result; the summary of
        arrays that only this process holds gives the statistics of those.

    Returns:
      The statistics of that batch.
    """
    shared = not all(
        leaf.is_fully_addressable
        for leaf in jax.tree.leaves(summary)
        if isinstance(leaf, jax.Array)
    )
    fetched: Summary = parallel.gather(summary) if shared else jax.device_get(summary)
    count = int(fetched.count)
    nonfinite = np.asarray(fetched.nonfinite, np.int64)
    deviations = np.asarray(fetched.deviations, np.float64).sum(0)
    squares = np.asarray(fetched.squares, np.float64).sum(0)
    offset = deviations / max(count, 1)
    mean = np.ldexp(np.asarray(fetched.shift, np.float64) + offset, fetched.scale)
    m2 = np.ldexp(np.maximum(squares - deviations * offset, 0), 2 * fetched.scale)
    return Statistics(
        count=count,
        nonfinite=nonfinite,
        zeros=np.asarray(fetched.zeros, np.int64),
        mean=np.where(nonfinite > 0, np.nan, mean),
        m2=np.where(nonfinite > 0, np.nan, m2),
        minimum=np.asarray(fetched.minimum, np.float64),
        maximum=np.asarray(fetched.maximum, np.float64),
        histogram=np.asarray(fetched.histogram, np.int64),
    )


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of two parts of the data together (Chan, Golub & LeVeque 1983).

    Merging is associative and commutative: exactly for counts, extremes and histograms, up to
    rounding in float64 for moments. Statistics of no values leave the others as they are.

    Args:
      a: statistics of some values of N neurons.
      b: statistics of other values of the same neurons, with as many bins.

    Returns:
      The statistics of all of these values.

    Raises:
      ValueError: the numbers of neurons or bins differ.
    """
    if a.histogram.shape != b.histogram.shape:
        raise ValueError(
            f'Statistics of {a.histogram.shape[0]} neurons with {a.histogram.shape[1]} bins and of '
            f'{b.histogram.shape[0]} neurons with {b.histogram.shape[1]} bins do not merge; '
            'collect both from the same layer, with the same unit and bins.'
        )
    count = a.count + b.count
    share = b.count / max(count, 1)
    difference = b.mean - a.mean
    minimum = np.minimum(a.minimum, b.minimum)
    maximum = np.maximum(a.maximum, b.maximum)
    histogram = a.histogram + b.histogram
    if histogram.shape[1]:
        exponent, first = grid(minimum, maximum, histogram.shape[1], np)
        for part in (a, b):
            _move(histogram, part, exponent, first)
    return Statistics(
        count=count,
        nonfinite=a.nonfinite + b.nonfinite,
        zeros=a.zeros + b.zeros,
        mean=a.mean + difference * share,
        m2=a.m2 + b.m2 + difference**2 * (a.count * share),
        minimum=minimum,
        maximum=maximum,
        histogram=histogram,
    )


def _move(
    histogram: Int[np.ndarray, 'neurons bins'],
    part: Statistics,
    exponent: Int[np.ndarray, ' neurons'],
    first: Int[np.ndarray, ' neurons'],
) -> None:
    """Moves the counts of a part, within a sum that contains them, to the bins of another grid.

    Neurons that keep their grid cost nothing here.

    Args:
      histogram: the sum, changed in place.
      part: the part of the data, on its own grid.
      exponent: exponents of the grid of a range that contains the part's.
      first: first bins of that grid.
    """
    fine, start = grid(part.minimum, part.maximum, part.histogram.shape[1], np)
    # A right shift rounds down, as bins of negative numbers need; beyond 62 it only keeps the sign.
    coarser = np.minimum(exponent - fine, 62)
    moved = np.flatnonzero((coarser > 0) | (start != first))
    counts = part.histogram[moved]
    histogram[moved] -= counts
    row, index = np.nonzero(counts)
    neuron = moved[row]
    target = ((start[neuron] + index) >> coarser[neuron]) - first[neuron]
    np.add.at(histogram, (neuron, target), counts[row, index])


def statistics(
    forward: Forward,
    variables: Variables,
    x: Shaped[Array, 'batch ...'],
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    mask: Bool[Array, ' batch'] | None = None,
    bins: int = 256,
) -> Statistics:
    """Statistics of a layer's activations on one batch; `merge` joins those of several.

    Args:
      forward: the model.
      variables: its variables.
      x: a batch of inputs `[B, ...]`, possibly split over devices.
      layer: the layer whose activations are described.
      unit: what a neuron is, `'channel'` or `'unit'`.
      mask: rows that count, bool `[B]`; all by default.
      bins: bins of each neuron's histogram, at least 2; 0 for none.

    Returns:
      The statistics of the N neurons on this batch.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: as `summarize` does.
    """
    return from_summary(
        activation_summary(forward, variables, x, mask, layer=layer, unit=unit, bins=bins)
    )
