"""How far neurons are from flipping predictions, and which neurons and images say most of it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from neurosens.evaluation.neuron_report import LayerReport

# Images of each kind beside a neuron.
PER_NEURON = 6


def defined(report: LayerReport) -> bool:
    """Whether the report of a layer has Delta and statistics."""
    return report.delta is not None and report.statistics is not None


def distances(report: LayerReport) -> Float[np.ndarray, 'images neurons']:
    """|Delta| / std in double precision.

    Args:
      report: of a layer, with Delta and statistics.

    Returns:
      Distances `[B, N]`; infinite where nothing flips the image, NaN where Delta is not defined.

    Raises:
      ValueError: Delta or statistics were not measured.
    """
    if not defined(report):
        raise ValueError(
            f'The report of {report.layer.name} lacks Delta or statistics; measure sensitivity.'
        )
    return report.scaled_distance().astype(np.float64)


def quantile(values: Float[np.ndarray, 'images neurons'], q: float) -> np.ndarray:
    """Quantile over images of what is not NaN, `[N]`; NaN where nothing is left.

    Interpolates only between neighbours of equal weight, since between a finite and an infinite
    value nothing else has a meaning; q = 1/2 gives `numpy.median`.
    """
    ordered = np.sort(values, axis=0)  # NaN sorts last.
    count = (~np.isnan(values)).sum(0)
    position = q * count
    upper = np.minimum(np.floor(position), count - 1)
    lower = np.where(position == np.floor(position), upper - 1, upper)

    def ranked(rank: np.ndarray) -> np.ndarray:
        index = np.maximum(rank, 0).astype(int)[None]
        return np.take_along_axis(ordered, index, axis=0)[0]

    return np.where(count > 0, (ranked(lower) + ranked(upper)) / 2, np.nan)


def order(distance: Float[np.ndarray, 'images neurons']) -> Int[np.ndarray, ' neurons']:
    """Neurons by their medians, those of infinite ones by how often they flip something."""
    return np.lexsort((-np.isfinite(distance).sum(0), quantile(distance, 0.5)))


def median_distance(report: LayerReport) -> Float[np.ndarray, ' neurons']:
    """Median of |Delta| / std over the images in which it is defined.

    Args:
      report: of a layer, with Delta and statistics.

    Returns:
      Medians `[N]`; infinite for a constant neuron and where most images cannot be flipped, NaN
      where Delta is never defined.
    """
    return quantile(distances(report), 0.5)


def most_sensitive(report: LayerReport, top: int) -> list[int]:
    """The neurons that flip predictions most easily.

    Args:
      report: of a layer.
      top: how many at most.

    Returns:
      Neurons by their median |Delta| / std over images, smallest first; where that is infinite,
      by the share of images in which they flip nothing. Neurons that never flip anything are left
      out; none without Delta and statistics.
    """
    if not defined(report):
        return []
    distance = distances(report)
    finite = np.isfinite(distance).sum(0)
    return [int(neuron) for neuron in order(distance) if finite[neuron]][:top]


def images_wanted(report: LayerReport, top: int, per_neuron: int = PER_NEURON) -> list[int]:
    """The positions of the images that `top_neurons` shows.

    Args:
      report: of a layer.
      top: how many neurons.
      per_neuron: images of each kind beside a neuron.

    Returns:
      Positions in the data set in ascending order; none without statistics and Delta.
    """
    wanted: set[int] = set()
    if report.peak is None:
        return []
    for neuron in most_sensitive(report, top):
        for chosen in (activating, fragile):
            wanted.update(chosen(report, neuron, per_neuron).tolist())
    return sorted(wanted)


def activating(report: LayerReport, neuron: int, count: int) -> Int[np.ndarray, ' images']:
    """Positions of the `count` images in which a neuron is largest, the largest first."""
    assert report.peak is not None
    peak = report.peak[:, neuron]
    order = np.argsort(-peak, kind='stable')
    return order[np.isfinite(peak[order])][:count]


def fragile(report: LayerReport, neuron: int, count: int) -> Int[np.ndarray, ' images']:
    """Positions of the `count` images that the smallest changes of a neuron flip, in that order."""
    assert report.delta is not None
    size = np.abs(report.delta[:, neuron])
    order = np.argsort(size, kind='stable')
    return order[np.isfinite(size[order])][:count]
