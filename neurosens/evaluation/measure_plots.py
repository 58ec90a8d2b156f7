"""Plots of measures of the neurons of one layer: against each other, under attack, by filtering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from neurosens import neurons
from neurosens.evaluation.neuron_report import LayerReport
from neurosens.evaluation.plots import COLORS, loggable, style
from neurosens.neurons import filtering

# How many neurons' numbers fit below an axis, and how many bars and columns can be told apart.
_NUMBERED = 40
_BARS = 64
_COLUMNS = 512


def measure_scatter(report: LayerReport) -> Figure:
    """Each measure of `LayerReport.importance` against each other one, as ranks.

    Ranks show what Spearman's correlation sees; the measures themselves lie on scales that have
    nothing in common, and some are often zero.

    Args:
      report: of a layer, with at least 2 measures.

    Returns:
      The lower triangle of a scatter matrix with Spearman's rho above each panel; ranks in per
      cent, 100 for the neuron that matters most. Constant neurons are left out, as in
      `LayerReport.agreement`, unless all are.

    Raises:
      ValueError: there are fewer than 2 measures.
    """
    measures = report.importance()
    if len(measures) < 2:
        raise ValueError(
            f'The report of {report.layer.name} has {len(measures)} measures; a scatter matrix '
            'needs 2.'
        )
    shown = np.full(report.layer.neurons, True)
    if report.varying is not None and report.varying.any():
        shown = report.varying
    measures = {name: values[shown] for name, values in measures.items()}
    names = list(measures)
    ranks = {name: 100 * _scaled_ranks(values) for name, values in measures.items()}
    size = len(names) - 1
    side = 3.4 if size == 1 else 2.2 if size == 2 else 1.6
    figure = Figure(figsize=(side * size + 0.8, side * size + 1.1), layout='constrained')
    grid: Any = figure.subplots(size, size, squeeze=False, sharex=True, sharey=True)
    groups = [
        (name, color, members[shown]) for name, color, members in _groups(report, shown, rule=True)
    ]
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
    kept, of = int(shown.sum()), report.layer.neurons
    parts = [f'{report.layer.name}: {of} neurons', 'rank (%), 100 matters most']
    if kept < of:
        parts[:1] = [f'{report.layer.name}: {kept} of {of} neurons', 'others are constant']
    # A small matrix has no room for one line.
    figure.suptitle(('\n' if size <= 3 else ', ').join(parts), fontsize=11)
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
    # Imported where it is used: it takes as long to import as JAX.
    import scipy.stats

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


def _groups(
    report: LayerReport, shown: np.ndarray | None = None, *, rule: bool = False
) -> list[tuple[str, str, np.ndarray]]:
    """Name, colour and members of the groups in which neurons are drawn, fragile ones on top.

    Only neurons that are shown, by default all, belong to a group; with `rule` the name says which
    are called fragile.
    """
    if shown is None:
        shown = np.full(report.layer.neurons, True)
    if report.fragility is None:
        return [('neurons', COLORS[0], shown)]
    fragile = np.asarray(report.fragility.fragile) & shown
    robust = shown & ~fragile
    meaning = f': {report.fragility.rule}' if rule else ''
    return [
        (f'robust ({int(robust.sum())})', COLORS[0], robust),
        (f'fragile ({int(fragile.sum())}){meaning}', COLORS[1], fragile),
    ]


def _handles(groups: Sequence[tuple[str, str, np.ndarray]]) -> list[Patch]:
    return [Patch(color=color, label=name) for name, color, _ in groups]


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
    span = [*loggable(np.abs(x)), *loggable(np.abs(y)), 1e-3]
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


def filtering_curves(
    curves: Mapping[str, filtering.Curve], title: str, attack: str = 'the attack'
) -> Figure:
    """What becomes of accuracy while weights are removed by their values.

    Args:
      curves: a sweep by each kind of filter.
      title: what is filtered, in words.
      attack: the attack in words.

    Returns:
      A panel for each kind of filter: accuracy on clean and on attacked images and the share of
      weights present against the threshold, with the scores and what they call the layer above;
      dotted lines are the accuracies with nothing removed.

    Raises:
      ValueError: there is no curve.
    """
    if not curves:
        raise ValueError(f'There are no filtering curves of {title}; measure filtering.')
    panels = len(curves)
    figure = Figure(figsize=(3.6 * panels + 0.5, 4.1), layout='constrained')
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axes, (kind, curve) in zip(grid, curves.items()):
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
    figure.suptitle(f'{title} removed; dotted: with nothing removed', fontsize=11)
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
