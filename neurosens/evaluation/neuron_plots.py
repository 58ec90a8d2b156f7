"""Plots of what single neurons do, as matplotlib figures without global state."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from neurosens import neurons
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport
from neurosens.evaluation.plots import COLORS, style
from neurosens.neurons import filtering

# Images of each kind beside a neuron.
PER_NEURON = 6
# Width of a figure of one panel, in inches.
_WIDTH = 6.0
_LONGEST_LABEL = 44
_LONGEST_CLASS = 12
# How many neurons' numbers fit below an axis, and how many bars, bands and columns can be told
# apart.
_NUMBERED = 40
_BARS = 64
_GROUPS = 100
_COLUMNS = 512


# ---------------------------------------------------------------------------------- sensitivity


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
    curves = {label: _Curve.of(_distances(report)) for label, report in reports.items()}
    unreachable = [
        label
        for label, curve in curves.items()
        if np.isinf(curve.median).any() or np.isinf(curve.band).any()
    ]
    numbers = {report.layer.neurons for report in reports.values()}
    figure = Figure(figsize=(_WIDTH, 4.2), layout='constrained')
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
            marker='o' if count <= _NUMBERED else '',
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
    figure.suptitle(_sensitivity_title(reports), fontsize=11)
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
    distances = {label: _distances(report) for label, report in reports.items()}
    shown = np.concatenate([_loggable(distance) for distance in distances.values()])
    figure = Figure(figsize=(_WIDTH, 4.0), layout='constrained')
    axes = figure.subplots()
    # Single extreme values would squeeze all others into a few bins.
    low, high = np.quantile(shown, (0.001, 0.999)) if shown.size else (0.1, 10.0)
    if not low < high:
        low, high = low / 2, high * 2
    edges = np.geomspace(low, high, 46).tolist()
    for color, (label, distance) in zip(COLORS, distances.items()):
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
        median = _quantile(distance.reshape(-1, 1), 0.5)[0]
        if low <= median <= high:
            axes.axvline(median, color=color, linestyle='--', linewidth=1)
    if not any(np.isfinite(distance).any() for distance in distances.values()):
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
    figure.suptitle(_sensitivity_title(reports), fontsize=11)
    return figure


def _distances(report: LayerReport) -> Float[np.ndarray, 'images neurons']:
    if not _has_distance(report):
        raise ValueError(
            f'The report of {report.layer.name} lacks Delta or statistics; measure sensitivity.'
        )
    return report.scaled_distance().astype(np.float64)


def _has_distance(report: LayerReport) -> bool:
    return report.delta is not None and report.statistics is not None


def _quantile(values: Float[np.ndarray, 'images neurons'], q: float) -> np.ndarray:
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


def _loggable(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values) & (values > 0)]


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
        distance = distance[:, _order(distance)]
        count = distance.shape[1]
        # Bands of single neurons would be a thicket where there are many of them.
        edges = np.linspace(0, count, min(count, _GROUPS) + 1).round().astype(int)
        groups = [distance[:, a:b].reshape(-1, 1) for a, b in itertools.pairwise(edges)]
        band = [[_quantile(group, q)[0] for group in groups] for q in (0.1, 0.9)]
        return cls(_quantile(distance, 0.5), np.array(band).reshape(2, len(groups)), edges)


def _order(distance: Float[np.ndarray, 'images neurons']) -> Int[np.ndarray, ' neurons']:
    """Neurons by their medians, those of infinite ones by how often they flip something."""
    return np.lexsort((-np.isfinite(distance).sum(0), _quantile(distance, 0.5)))


def _limits(curves: Sequence[_Curve]) -> tuple[float, float]:
    """Limits of a logarithmic axis that shows all medians and most of the bands."""
    medians = np.concatenate([_loggable(curve.median) for curve in curves])
    both = np.concatenate([medians, *(_loggable(curve.band) for curve in curves)])
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
    distance = _distances(report)
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
        median = _quantile(distance, 0.5)
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


def _sensitivity_title(reports: Mapping[str, LayerReport]) -> str:
    names = ' and '.join(dict.fromkeys(report.layer.name for report in reports.values()))
    methods = ' and '.join(
        dict.fromkeys(report.method.replace('_', ' ') for report in reports.values())
    )
    return f'{names}: smallest change Δ of a neuron that flips the prediction\n(Δ: {methods})'


# ------------------------------------------------------------------------------------- measures


def measure_scatter(report: LayerReport) -> Figure:
    """Each measure of `LayerReport.importance` against each other one, as ranks.

    Ranks show what Spearman's correlation sees; the measures themselves lie on scales that have
    nothing in common, and some are often zero.

    Args:
      report: of a layer, with at least 2 measures.

    Returns:
      The lower triangle of a scatter matrix with Spearman's rho above each panel; ranks in per
      cent, 100 for the neuron that matters most.

    Raises:
      ValueError: there are fewer than 2 measures.
    """
    measures = report.importance()
    if len(measures) < 2:
        raise ValueError(
            f'The report of {report.layer.name} has {len(measures)} measures; a scatter matrix '
            'needs 2.'
        )
    names = list(measures)
    ranks = {name: 100 * _scaled_ranks(values) for name, values in measures.items()}
    size = len(names) - 1
    side = 3.4 if size == 1 else 2.2 if size == 2 else 1.6
    figure = Figure(figsize=(side * size + 0.8, side * size + 1.1), layout='constrained')
    grid: Any = figure.subplots(size, size, squeeze=False, sharex=True, sharey=True)
    groups = _groups(report)
    point = float(np.clip(400 / report.layer.neurons, 4, 22))
    for row, column in np.ndindex(size, size):
        axes = grid[row, column]
        if column > row:
            axes.remove()
            continue
        first, second = names[column], names[row + 1]
        for _, color, members in groups:
            axes.scatter(
                ranks[first][members],
                ranks[second][members],
                s=point,
                color=color,
                alpha=0.7,
                linewidths=0,
            )
        rho = neurons.correlation.spearman(measures[first], measures[second])
        text = 'not defined' if np.isnan(rho) else f'= {rho:+.2f}'
        axes.set_title(f'ρ {text}', fontsize=9, pad=3)
        axes.set_xlim(-6, 106)
        axes.set_ylim(-6, 106)
        axes.set_xticks([0, 50, 100])
        axes.set_yticks([0, 50, 100])
        axes.tick_params(labelsize=8)
        axes.set_box_aspect(1)
        style(axes)
        axes.grid(axis='x', color='0.9')
        if row == size - 1:
            axes.set_xlabel(_words(first), fontsize=9)
        if column == 0:
            axes.set_ylabel(_words(second), fontsize=9)
    if len(groups) > 1:
        figure.legend(
            handles=_handles(groups),
            loc='outside lower center',
            ncols=2,
            frameon=False,
            fontsize=9,
        )
    gap = '\n' if size == 1 else ', '
    figure.suptitle(
        f'{report.layer.name}: {report.layer.neurons} neurons{gap}rank (%), 100 matters most',
        fontsize=11,
    )
    return figure


def measure_heatmap(report: LayerReport) -> Figure:
    """Which neurons matter by which measure: ranks of all neurons by every measure.

    Args:
      report: of a layer, with at least 1 measure.

    Returns:
      A picture with a row for each measure of `LayerReport.importance` and a column for each
      neuron, the most important one by the first measure to the left; white where undefined. Of
      more than 512 neurons neighbours share a column, which has their mean.

    Raises:
      ValueError: there is no measure.
    """
    measures = report.importance()
    if not measures:
        raise ValueError(f'The report of {report.layer.name} has no measure of importance.')
    ranks = np.stack([_scaled_ranks(values) for values in measures.values()])
    # A measure that is defined nowhere orders nothing. NaN sorts last.
    leading = int(np.argmax((~np.isnan(ranks)).any(1)))
    order = np.argsort(-ranks[leading], kind='stable')
    count = report.layer.neurons
    width = float(np.clip(3.2 + 0.22 * count, 6.0, 11.0))
    figure = Figure(figsize=(width, 1.5 + 0.36 * len(measures)), layout='constrained')
    axes = figure.subplots()
    picture = axes.imshow(
        _pooled(ranks[:, order], _COLUMNS),
        cmap='viridis',
        vmin=0,
        vmax=1,
        aspect='auto',
        # Smoothing would mix the measures too.
        interpolation='nearest',
        extent=(-0.5, count - 0.5, len(measures) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(measures)), [_words(name) for name in measures])
    first = _words(list(measures)[leading])
    if count <= _NUMBERED:
        axes.set_xticks(range(count), order, fontsize=8)
        axes.set_xlabel(f'number of the neuron, in the order of {first}')
    else:
        axes.set_xlabel(f'place of the neuron in the order of {first}')
    axes.tick_params(length=0, axis='y')
    bar = figure.colorbar(picture, ax=axes, pad=0.02, aspect=12, ticks=[0, 0.5, 1])
    bar.set_label('scaled rank')
    bar.ax.set_yticklabels(['0 least', '0.5', '1 most'], fontsize=8)
    figure.suptitle(f'{report.layer.name}: importance of {count} neurons', fontsize=11)
    return figure


def _scaled_ranks(values: Float[np.ndarray, ' neurons']) -> Float[np.ndarray, ' neurons']:
    """Ranks from 0 for the smallest to 1 for the largest, means of them for ties, NaN for NaN."""
    defined = ~np.isnan(values)
    ranks = np.full(values.shape, np.nan)
    ranks[defined] = (scipy.stats.rankdata(values[defined]) - 1) / max(1, defined.sum() - 1)
    return ranks


def _pooled(values: Float[np.ndarray, 'rows columns'], columns: int) -> np.ndarray:
    """Means of neighbouring columns, so that no more than so many remain."""
    size = -(-values.shape[1] // columns)
    padding = -values.shape[1] % size
    padded = np.pad(values, ((0, 0), (0, padding)), constant_values=np.nan)
    groups = padded.reshape(len(values), -1, size)
    defined = ~np.isnan(groups)
    number = defined.sum(-1)
    total = np.where(defined, groups, 0).sum(-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _words(name: str) -> str:
    return name.replace('_', ' ')


def _groups(report: LayerReport) -> list[tuple[str, str, np.ndarray]]:
    """Name, colour and members of the groups in which neurons are drawn, fragile ones on top."""
    if report.fragility is None:
        return [('neurons', COLORS[0], np.full(report.layer.neurons, True))]
    fragile = np.asarray(report.fragility.fragile)
    return [
        (f'robust ({int((~fragile).sum())})', COLORS[0], ~fragile),
        (f'fragile ({int(fragile.sum())})', COLORS[1], fragile),
    ]


def _handles(groups: Sequence[tuple[str, str, np.ndarray]]) -> list[Patch]:
    return [Patch(color=color, label=name) for name, color, _ in groups]


# --------------------------------------------------------------------------------------- images


def median_distance(report: LayerReport) -> Float[np.ndarray, ' neurons']:
    """Median of |Delta| / std over the images in which it is defined.

    Args:
      report: of a layer, with Delta and statistics.

    Returns:
      Medians `[N]`; infinite for a constant neuron and where most images cannot be flipped, NaN
      where Delta is never defined.
    """
    return _quantile(_distances(report), 0.5)


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
    if not _has_distance(report):
        return []
    distance = _distances(report)
    finite = np.isfinite(distance).sum(0)
    return [int(neuron) for neuron in _order(distance) if finite[neuron]][:top]


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
        for chosen in (_activating, _fragile):
            wanted.update(chosen(report, neuron, per_neuron).tolist())
    return sorted(wanted)


def _activating(report: LayerReport, neuron: int, count: int) -> Int[np.ndarray, ' images']:
    assert report.peak is not None
    peak = report.peak[:, neuron]
    order = np.argsort(-peak, kind='stable')
    return order[np.isfinite(peak[order])][:count]


def _fragile(report: LayerReport, neuron: int, count: int) -> Int[np.ndarray, ' images']:
    assert report.delta is not None
    size = np.abs(report.delta[:, neuron])
    order = np.argsort(size, kind='stable')
    return order[np.isfinite(size[order])][:count]


def top_neurons(
    report: NeuronReport,
    layer: LayerReport,
    images: Mapping[int, UInt8[np.ndarray, 'height width channels']],
    top: int,
    per_neuron: int = PER_NEURON,
) -> Figure:
    """The most sensitive neurons with the images that excite them and those that they flip first.

    Args:
      report: the whole report.
      layer: one of its layers, with statistics and Delta.
      images: images by position, at least those of `images_wanted`.
      top: how many neurons.
      per_neuron: images of each kind.

    Returns:
      A figure with one row for each neuron; below each image its label and, if that is another, the
      class that it was taken for.

    Raises:
      ValueError: an image is missing, or no neuron flips anything.
    """
    chosen = most_sensitive(layer, top)
    if not chosen or layer.peak is None:
        raise ValueError(
            f'The report of {layer.layer.name} has no neuron that flips a prediction, or lacks '
            'statistics.'
        )
    missing = set(images_wanted(layer, top, per_neuron)) - set(images)
    if missing:
        raise ValueError(
            f'Images are missing at the positions {sorted(missing)}; give all of images_wanted.'
        )
    assert layer.peak is not None and layer.delta is not None and layer.flips_to is not None
    median = median_distance(layer)
    names = [_class_text(name) for name in report.info.class_names]
    # What is short goes on one line; the others have a line for each class.
    gap = ' ' if max(map(len, names)) <= 3 else '\n'
    canvas = _PictureGrid(len(chosen), per_neuron, lines=2 if gap == ' ' else 4)
    for row, neuron in enumerate(chosen):
        canvas.name(row, f'neuron {neuron}\n|Δ| / std\n{median[neuron]:.3g}')
        for column, image in enumerate(_activating(layer, neuron, per_neuron)):
            before, right = _classes(report, image, names, gap)
            text = f'{before}\n{layer.peak[image, neuron]:.3g}'
            canvas.picture(row, 0, column, images[int(image)], text, right)
        for column, image in enumerate(_fragile(layer, neuron, per_neuron)):
            before, right = _classes(report, image, names, gap)
            after = names[layer.flips_to[image, neuron]]
            text = f'{before}{gap}→ {after}\n{layer.delta[image, neuron]:+.3g}'
            canvas.picture(row, 1, column, images[int(image)], text, right)
    return canvas.finished(
        f'{layer.layer.name}: the most sensitive neurons, by the median of |Δ| / std\n'
        'below each image: its label (orange: taken for another class)',
        ('most activating images: activation', 'most fragile images: class after the flip, and Δ'),
    )


class _PictureGrid:
    """Two blocks of pictures with text below each, in inches.

    The general layout engines take seconds for so many axes, and do not keep two blocks level.
    """

    _SIDE, _PITCH, _LINE = 0.82, 0.94, 0.125
    _LEFT, _GAP, _TOP = 0.95, 0.3, 0.85

    def __init__(self, rows: int, columns: int, lines: int):
        self._block = columns * self._PITCH + self._GAP
        self._row = self._SIDE + lines * self._LINE + 0.12
        self._width = self._LEFT + 2 * self._block
        self._height = self._TOP + rows * self._row
        self._figure = Figure(figsize=(self._width, self._height))

    def _text(self, x: float, y: float, text: str, **options: Any) -> None:
        self._figure.text(x / self._width, y / self._height, text, **options)

    def _y(self, row: int) -> float:
        return self._height - self._TOP - row * self._row

    def name(self, row: int, text: str) -> None:
        middle = self._y(row) - self._SIDE / 2
        self._text(self._LEFT - 0.12, middle, text, ha='right', va='center', fontsize=9)

    def picture(
        self, row: int, block: int, column: int, image: np.ndarray, text: str, right: bool
    ) -> None:
        x, y = self._LEFT + block * self._block + column * self._PITCH, self._y(row) - self._SIDE
        where = (x / self._width, y / self._height)
        axes = self._figure.add_axes((*where, self._SIDE / self._width, self._SIDE / self._height))
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
        axes.set_axis_off()
        self._text(
            x + self._SIDE / 2,
            y - 0.04,
            text,
            ha='center',
            va='top',
            fontsize=7,
            color='0.15' if right else COLORS[1],
            parse_math=False,
        )

    def finished(self, title: str, headings: tuple[str, str]) -> Figure:
        for block, heading in enumerate(headings):
            x = self._LEFT + block * self._block
            self._text(x, self._height - self._TOP + 0.1, heading, fontsize=10)
        self._text(self._LEFT, self._height - 0.02, title, va='top', fontsize=11)
        return self._figure


def _class_text(name: str) -> str:
    name = name.replace('_', ' ')
    return name if len(name) <= _LONGEST_CLASS else f'{name[: _LONGEST_CLASS - 1]}…'


def _classes(report: NeuronReport, image: int, names: Sequence[str], gap: str) -> tuple[str, bool]:
    """An image's label, with its predicted class where that is another, and whether it is not."""
    label, predicted = int(report.labels[image]), int(report.predictions[image])
    if label == predicted:
        return names[label], True
    return f'{names[label]}{gap}as {names[predicted]}', False


# ------------------------------------------------------------------------------------- the rest


def targeting(report: LayerReport, attack: str = 'the attack') -> Figure:
    """Which neurons an attack moves most, beside what the model loses without each of them.

    Args:
      report: of a layer, with targeting, or nodal dropout on clean and attacked images, or both.
      attack: the attack in words.

    Returns:
      For each score a histogram of the neuron moved most, with the correlations of score and
      histogram with d_k above it, and a scatter plot of d_k on clean and on attacked images.

    Raises:
      ValueError: there is neither.
    """
    scatter = report.clean is not None and report.attacked is not None
    if not report.targeting and not scatter:
        raise ValueError(
            f'The report of {report.layer.name} has neither targeting nor nodal dropout.'
        )
    rows = len(report.targeting)
    if rows and scatter:
        figure = Figure(figsize=(10.5, 2.6 * max(rows, 1.6)), layout='constrained')
        parts: Any = figure.subfigures(1, 2, width_ratios=[1.7, 1], wspace=0.03)
        bars, points = parts
    else:
        figure = Figure(figsize=(6.6, 2.6 * rows + 0.4) if rows else (4.4, 4.8))
        figure.set_layout_engine('constrained')
        bars = points = figure.subfigures()
    if rows:
        grid = bars.subplots(rows, 1, squeeze=False)[:, 0]
        for axes, (score, found) in zip(grid, report.targeting.items()):
            _target_bars(axes, report, score, found)
        bars.suptitle(f'neuron that {attack} moves most', fontsize=10)
    if scatter:
        _responses(points.subplots(), report)
        rule = '' if report.fragility is None else f'\nfragile: {report.fragility.rule}'
        points.suptitle(f'accuracy lost without each neuron, d_k (grey: equal){rule}', fontsize=10)
    if len(_groups(report)) > 1:
        points.legend(
            handles=_handles(_groups(report)),
            loc='outside lower center',
            ncols=2,
            frameon=False,
            fontsize=9,
        )
    figure.suptitle(f'{report.layer.name}: {report.layer.neurons} neurons', fontsize=11)
    return figure


def _target_bars(
    axes: Axes, report: LayerReport, score: str, found: neurons.TargetingReport
) -> None:
    count = report.layer.neurons
    images = max(1, int(found.histogram.sum()))
    share = 100 * found.histogram / images
    chosen = np.arange(count)
    if count > _BARS:
        # More bars than pixels would blur into each other: the most targeted ones have names.
        chosen = np.argsort(-share, kind='stable')[:_BARS]
        chosen = chosen[share[chosen] > 0]
    place = np.arange(chosen.size)
    for _, color, members in _groups(report):
        mine = members[chosen]
        axes.bar(place[mine], share[chosen][mine], width=0.8, color=color)
    axes.set_xlim(-0.7, chosen.size - 0.3)
    if chosen.size > _NUMBERED or count > 100:
        axes.set_xticks(place, chosen, rotation=90, fontsize=6)
    else:
        axes.set_xticks(place, chosen, fontsize=8 if chosen.size <= 24 else 6.5)
    if report.fragility is not None:
        # The colour of a neuron that is never moved most shows in its number.
        for text, fragile in zip(axes.get_xticklabels(), report.fragility.fragile[chosen]):
            text.set_color(COLORS[1] if fragile else COLORS[0])
    rest = max(0.0, 100 - float(share[chosen].sum()))
    axes.set_xlabel(
        f'number of the neuron; the other {count - chosen.size}: {rest:.1f} % of the images'
        if count > _BARS
        else 'number of the neuron',
        fontsize=9,
    )
    axes.set_ylabel('images (%)', fontsize=9)
    lines = [
        f'by {score}; correlation with d_k: mean score {_correlation(found.score_correlation)}, '
        f'histogram {_correlation(found.histogram_correlation)}'
    ]
    if found.score_partial is not None and found.histogram_partial is not None:
        lines.append(
            f'given the norm of the filter: mean score {_correlation(found.score_partial)}, '
            f'histogram {_correlation(found.histogram_partial)}'
        )
    axes.set_title('\n'.join(lines), fontsize=8, loc='left')
    style(axes)


def _correlation(found: neurons.correlation.Correlation) -> str:
    if np.isnan(found.value):
        return 'not defined'
    return f'ρ = {found.value:+.2f} (p = {found.p_value:.2g})'


def _responses(axes: Axes, report: LayerReport) -> None:
    assert report.clean is not None and report.attacked is not None
    # Percentage points, as the text of the axes says.
    x, y = 100 * report.clean.accuracy, 100 * report.attacked.accuracy
    span = [*_loggable(np.abs(x)), *_loggable(np.abs(y)), 1e-3]
    low = min(0.0, float(np.nanmin([*x, *y, 0.0]))) - 0.06 * max(span)
    high = max(0.0, float(np.nanmax([*x, *y, 0.0]))) + 0.06 * max(span)
    axes.plot([low, high], [low, high], color='0.75', linewidth=1, zorder=1)
    point = float(np.clip(600 / report.layer.neurons, 8, 36))
    for _, color, members in _groups(report):
        axes.scatter(x[members], y[members], s=point, color=color, alpha=0.7, linewidths=0)
    if report.fragility is not None:
        axes.axvline(100 * report.fragility.threshold, color=COLORS[1], linestyle='--', linewidth=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_box_aspect(1)
    axes.locator_params(nbins=6)
    axes.set_xlabel('on clean images (percentage points)', fontsize=9)
    axes.set_ylabel('on attacked images (percentage points)', fontsize=9)
    style(axes)
    axes.grid(axis='x', color='0.9')


def filtering_curves(report: LayerReport, attack: str = 'the attack') -> Figure:
    """What becomes of accuracy while the layer's weights are removed by their values.

    Args:
      report: of a layer, with filtering.
      attack: the attack in words.

    Returns:
      A panel for each kind of filter: accuracy on clean and on attacked images and the share of
      weights present against the threshold, with the scores and what they call the layer above;
      dotted lines are the accuracies with nothing removed.

    Raises:
      ValueError: there is no curve.
    """
    if not report.curves:
        raise ValueError(f'The report of {report.layer.name} has no filtering curves.')
    panels = len(report.curves)
    figure = Figure(figsize=(3.6 * panels + 0.5, 4.1), layout='constrained')
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axes, (kind, curve) in zip(grid, report.curves.items()):
        axes.plot(curve.alphas, 100 * curve.present, color='0.35', linestyle='--', label='present')
        for color, marker, values, baseline, name in (
            (COLORS[0], 'o', curve.clean, curve.baseline_clean, 'clean'),
            (COLORS[1], 's', curve.adversarial, curve.baseline_adversarial, 'attacked'),
        ):
            axes.axhline(100 * baseline, color=color, linestyle=':', linewidth=1)
            axes.plot(
                curve.alphas,
                100 * values,
                color=color,
                marker=marker,
                markersize=3,
                label=name,
            )
        axes.set_ylim(-2, 102)
        axes.locator_params(axis='x', nbins=6)
        axes.tick_params(labelsize=8)
        axes.set_xlabel('threshold α (weight)', fontsize=9)
        axes.set_title(f'{kind}: {_REMOVES[kind]}\n{_verdicts(curve)}', fontsize=8.5, loc='left')
        style(axes)
    grid[0].set_ylabel('share of images or weights (%)', fontsize=9)
    handles, _ = grid[0].get_legend_handles_labels()
    labels = ['weights present', 'accuracy, clean', f'accuracy, {attack}']
    figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f'{report.layer.name}: weights of {report.layer.kernel_layer} removed; '
        'dotted: with nothing removed',
        fontsize=11,
    )
    return figure


_REMOVES = {
    'minmax': 'removes weights ≤ α',
    'maxmin': 'removes weights ≥ α',
    'pulse': 'removes weights near α',
}


def verdict(score: float) -> str:
    """A filtering score and what it says, in words.

    Args:
      score: one of `neurosens.neurons.filtering.Scores`.

    Returns:
      The score to three places and its class, or 'not defined'.
    """
    return 'not defined' if np.isnan(score) else f'{score:+.3f} {filtering.classify(score)}'


def _verdicts(curve: filtering.Curve) -> str:
    return '\n'.join(
        f'{name}: {verdict(score)}' for name, score in filtering.scores(curve)._asdict().items()
    )
