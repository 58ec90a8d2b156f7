"""Plots of the smallest changes of neurons that flip predictions, for one or several models."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from neurosens.evaluation.neuron_distances import distances, order, quantile
from neurosens.evaluation.neuron_report import LayerReport
from neurosens.evaluation.plots import COLORS, PANEL, loggable, style

_LONGEST_LABEL = 44
# How many neurons get markers, and how many bands can be told apart.
_MARKED = 40
_GROUPS = 100


def sensitivity_curve(reports: Mapping[str, LayerReport]) -> Figure:
    """Neurons from the most to the least sensitive, by their median |Delta| / std over images.

    What is infinite, since no change flips the image or since the neuron is constant, stands in a
    strip of its own above the axis: triangles for medians, bars for bands. Neurons without a single
    defined Delta are left out and counted in the legend. Bands are cut where they go 100 times
    beyond all medians, and are those of neighbours together in a layer of more than 100 neurons.

    Args:
      reports: for the label of each model its report of a layer, with Delta and statistics.

    Returns:
      A figure with a line for each model, in a band from the 10 % to the 90 % quantile over images.

    Raises:
      ValueError: there is no report, or one lacks Delta or statistics.
    """
    curves = {label: _Curve.of(distances(report)) for label, report in reports.items()}
    unreachable = [
        label
        for label, curve in curves.items()
        if np.isinf(curve.median).any() or np.isinf(curve.band).any()
    ]
    numbers = {report.layer.neurons for report in reports.values()}
    figure = Figure(figsize=(PANEL, 4.2), layout='constrained')
    axes, strip = _with_strip(figure, len(unreachable))
    low, high = _limits(list(curves.values()))
    for color, (label, curve) in zip(COLORS, curves.items()):
        count = curve.median.size
        # Neurons are 1 apart, or share an axis of 100 %.
        width, start = (1.0, 0.5) if len(numbers) == 1 else (100 / max(count, 1), 0.0)
        place = start + (np.arange(count) + 0.5) * width
        finite = np.isfinite(curve.median)
        axes.plot(
            place[finite],
            np.clip(curve.median[finite], low, high),
            color=color,
            marker='o' if count <= _MARKED else '',
            markersize=3.5,
            label=_with_exceptions(label, reports[label]),
        )
        edges = start + curve.edges * width
        lower, upper = np.clip(curve.band, low, high)
        axes.fill_between(
            (edges[:-1] + edges[1:]) / 2, lower, upper, color=color, alpha=0.15, linewidth=0
        )
        if strip is not None and label in unreachable:
            row = unreachable.index(label)
            strip.plot(
                place[~finite],
                np.full((~finite).sum(), -row),
                color=color,
                marker='^',
                markersize=4,
                markeredgewidth=0,
                linestyle='',
            )
            spans = [
                (edges[first], edges[last] - edges[first])
                for first, last in _runs(np.isinf(curve.band[1]))
            ]
            strip.broken_barh(spans, (-row - 0.4, 0.8), color=color, alpha=0.15, linewidth=0)
    axes.set_yscale('log')
    axes.set_ylim(low, high)
    axes.set_ylabel('|Δ| / std of the neuron\n(median and 10–90 % of images)')
    if len(numbers) > 1:
        axes.set_xlim(0, 100)
        axes.set_xlabel('share of the neurons, most sensitive first (%)')
    else:
        count = numbers.pop()
        margin = max(0.5, 0.01 * count)
        axes.set_xlim(1 - margin, count + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel('neurons, most sensitive first')
    style(axes)
    figure.legend(loc='outside lower left', frameon=False, fontsize=9)
    figure.suptitle(_title(reports), fontsize=11)
    return figure


def sensitivity_histogram(reports: Mapping[str, LayerReport]) -> Figure:
    """How far neurons are from flipping a prediction: |Delta| / std of all images and neurons.

    Args:
      reports: for the label of each model its report of a layer, with Delta and statistics.

    Returns:
      A figure with overlaid histograms in common bins, dashed lines at the medians where they are
      finite; the legend has the share of pairs without a finite value. The outermost bins hold
      what lies beyond them.

    Raises:
      ValueError: there is no report, or one lacks Delta or statistics.
    """
    found = {label: distances(report) for label, report in reports.items()}
    shown = np.concatenate([loggable(distance) for distance in found.values()])
    figure = Figure(figsize=(PANEL, 4.0), layout='constrained')
    axes = figure.subplots()
    # Single extreme values would squeeze all others into a few bins.
    low, high = np.quantile(shown, (0.001, 0.999)) if shown.size else (0.1, 10.0)
    if not low < high:
        low, high = low / 2, high * 2
    edges = np.geomspace(low, high, 46).tolist()
    for color, (label, distance) in zip(COLORS, found.items()):
        values = distance[np.isfinite(distance)]
        # Of all pairs, so that the area is the share that can be flipped.
        weights = np.full(values.size, 100 / max(distance.size, 1))
        axes.hist(
            np.clip(values, edges[0], edges[-1]),
            edges,
            weights=weights,
            histtype='stepfilled',
            facecolor=(color, 0.3),
            edgecolor=color,
            linewidth=1.2,
            label=_with_exceptions(label, reports[label], pairs=True),
        )
        median = quantile(distance.reshape(-1, 1), 0.5)[0]
        if low <= median <= high:
            axes.axvline(median, color=color, linestyle='--', linewidth=1)
    if not any(np.isfinite(distance).any() for distance in found.values()):
        axes.set_ylim(0, 1)
        axes.text(
            0.5,
            0.5,
            'nothing finite to show',
            transform=axes.transAxes,
            ha='center',
            va='center',
            color='0.4',
        )
    axes.set_xscale('log')
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel('|Δ| / std of the neuron (dashed: median)')
    axes.set_ylabel('pairs of image and neuron (%)')
    style(axes)
    figure.legend(loc='outside lower left', frameon=False, fontsize=9)
    figure.suptitle(_title(reports), fontsize=11)
    return figure


class _Curve(NamedTuple):
    """Distances of N neurons in the order of their medians, those without a defined one left out.

    Attributes:
      median: median over images of each neuron, rising `[N]`.
      band: 10 % and 90 % quantile of each group of neighbours `[2, G]`.
      edges: where the groups begin and end `[G + 1]`.
    """

    median: Float[np.ndarray, ' neurons']
    band: Float[np.ndarray, '2 groups']
    edges: Int[np.ndarray, ' edges']

    @classmethod
    def of(cls, distance: Float[np.ndarray, 'images neurons']) -> _Curve:
        distance = distance[:, ~np.isnan(distance).all(0)]
        distance = distance[:, order(distance)]
        count = distance.shape[1]
        # Bands of single neurons would be a thicket where there are many of them.
        edges = np.linspace(0, count, min(count, _GROUPS) + 1).round().astype(int)
        groups = [distance[:, a:b].reshape(-1, 1) for a, b in itertools.pairwise(edges)]
        band = [[quantile(group, q)[0] for group in groups] for q in (0.1, 0.9)]
        return cls(quantile(distance, 0.5), np.array(band).reshape(2, len(groups)), edges)


def _limits(curves: Sequence[_Curve]) -> tuple[float, float]:
    """Limits of a logarithmic axis that shows all medians and most of the bands."""
    medians = np.concatenate([loggable(curve.median) for curve in curves])
    both = np.concatenate([medians, *(loggable(curve.band) for curve in curves)])
    if not both.size:
        return 0.1, 10.0
    # A single outlying quantile must not flatten all curves.
    anchor = medians if medians.size else both
    low = max(both.min(), anchor.min() / 100)
    high = min(both.max(), anchor.max() * 100)
    return low / 1.2, high * 1.2


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each run of true values."""
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(int(start), int(stop)) for start, stop in ends.reshape(-1, 2)]


def _with_strip(figure: Figure, rows: int) -> tuple[Axes, Axes | None]:
    """Axes, and above them a strip for infinite values with so many rows if there are any."""
    if rows == 0:
        return figure.subplots(), None
    strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=[0.05 * rows, 1])
    figure.get_layout_engine().set(hspace=0, h_pad=0.02)  # type: ignore[union-attr, call-arg]
    strip.set_ylim(0.5 - rows, 0.5)
    strip.set_yticks([(1 - rows) / 2], ['∞'])
    strip.tick_params(axis='y', length=0)
    strip.tick_params(axis='x', bottom=False, labelbottom=False)
    strip.spines[['top', 'right', 'bottom']].set_visible(False)
    strip.set_facecolor('0.95')
    return axes, strip


def _with_exceptions(label: str, report: LayerReport, pairs: bool = False) -> str:
    """A model's name and what of it cannot be drawn on a logarithmic axis."""
    distance = distances(report)
    assert report.delta is not None and report.statistics is not None
    if pairs:
        dead = np.isinf(distance) & np.isfinite(report.delta)
        shares = [
            (np.isinf(report.delta).mean(), 'unreachable'),
            (dead.mean(), 'of constant neurons'),
            (np.isnan(distance).mean(), 'undefined'),
        ]
        notes = [f'{share:.1%} {words}' for share, words in shares[:1]]
        notes += [f'{share:.1%} {words}' for share, words in shares[1:] if share]
    else:
        median = quantile(distance, 0.5)
        constant = int((report.statistics.std() == 0).sum())
        undefined = int(np.isnan(median).sum())
        notes = [f'median ∞ for {int(np.isinf(median).sum())} of {median.size} neurons']
        notes[0] += f' ({constant} constant)' if constant else ''
        notes += [f'{undefined} undefined'] if undefined else []
    return textwrap.fill(f'{_legend_text(label)}: {", ".join(notes)}', 84)


def _legend_text(label: str) -> str:
    if len(label) > _LONGEST_LABEL:
        # The end of a path says more than its beginning.
        label = f'…{label[1 - _LONGEST_LABEL :]}'
    # Matplotlib takes dollars for formulas and hides labels that begin with an underscore.
    label = label.replace('$', r'\$')
    return f' {label}' if label.startswith('_') else label


def _title(reports: Mapping[str, LayerReport]) -> str:
    names = ' and '.join(dict.fromkeys(report.layer.name for report in reports.values()))
    methods = ' and '.join(
        dict.fromkeys(report.method.replace('_', ' ') for report in reports.values())
    )
    return f'{names}: smallest change Δ of a neuron that flips the prediction\n(Δ: {methods})'
