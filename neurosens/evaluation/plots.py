"""Plots of an evaluation, as matplotlib figures without global state."""

from __future__ import annotations

import pathlib

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neurosens import metrics
from neurosens.evaluation.robustness import AttackOutcome, RobustnessReport

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
# Points of a curve through all radii.
_RADII = 200
# Width of a figure of one panel, in inches.
PANEL = 6.0
_DPI = 150


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure as PNG."""
    # Finding what is drawn takes a drawing of its own; a layout engine keeps everything inside.
    box = 'tight' if figure.get_layout_engine() is None else None
    figure.savefig(path, format='png', dpi=_DPI, bbox_inches=box)


def style(axes: Axes) -> None:
    """Takes away the frame where it says nothing, and adds faint horizontal lines."""
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='0.9')
    axes.set_axisbelow(True)


def loggable(values: np.ndarray) -> np.ndarray:
    """What of the values a logarithmic axis can show, `[n]`: finite and above 0."""
    return values[np.isfinite(values) & (values > 0)]


_RADIUS = {
    'linf': r'$\ell_\infty$ radius eps, pixels in [0, 1]',
    'l2': r'$\ell_2$ radius eps, pixels in [0, 1]',
    'l1': r'$\ell_1$ radius eps, pixels in [0, 1]',
    'l0': r'$\ell_0$ radius eps, pixels that may change',
    'spatial': 'largest rotation, degrees',
}


def accuracy_against_eps(report: RobustnessReport) -> Figure:
    """Accuracy of each attack against its radius, with 95 % Wilson bands; radius 0 is clean.

    Attacks that look for the smallest perturbation have a curve through all radii, from one run.
    """
    figure = Figure(figsize=(5.5, 3.8), layout='constrained')
    axes = figure.subplots()
    names = list(dict.fromkeys(outcome.attack for outcome in report.outcomes))
    distances = report.distances()
    for place, attack in enumerate(names):
        # Beyond the colours there are, other strokes.
        color = COLORS[place % len(COLORS)]
        stroke = ('-', '--', ':', '-.')[place // len(COLORS) % 4]
        if attack in distances:
            largest = max(o.eps for o in report.outcomes if o.attack == attack)
            marker, radii = '', np.linspace(0, largest, _RADII).tolist()
            right = report.predictions.correct
            points = [(radius, right & (distances[attack] > radius)) for radius in radii]
        else:
            marker, points = 'o', [(0.0, report.predictions.correct)]
            points += [(o.eps, ~o.attacked.success) for o in report.outcomes if o.attack == attack]
            points.sort(key=lambda point: point[0])
        eps = [point[0] for point in points]
        intervals = [metrics.wilson_interval(int(f.sum()), len(f)) for _, f in points]
        values, lows, highs = np.array(intervals).T * 100
        label = attack.upper().replace('_', ' ')
        axes.plot(eps, values, stroke, marker=marker, markersize=4, color=color, label=label)
        axes.fill_between(eps, lows, highs, color=color, alpha=0.15, linewidth=0)
    chance = 100 / report.info.num_classes
    axes.axhline(chance, color='0.5', linestyle=':', linewidth=1, label='chance')
    axes.set_xlabel(_RADIUS[report.outcomes[0].norm])
    axes.set_ylabel('accuracy (%)')
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=None if len(names) <= len(COLORS) else 7)
    axes.set_title(f'{report.info.name} {report.split}, {len(report.predictions.labels):,} images')
    style(axes)
    return figure


def class_accuracy(report: RobustnessReport) -> Figure:
    """Clean accuracy of each class with 95 % Wilson intervals."""
    predictions = report.predictions
    present = [
        label for label in range(report.info.num_classes) if (predictions.labels == label).any()
    ]
    intervals = []
    for label in present:
        hits = predictions.correct[predictions.labels == label]
        intervals.append(metrics.wilson_interval(int(hits.sum()), len(hits)))
    values, lows, highs = np.array(intervals).T * 100
    width = min(14.0, max(5.5, 0.45 * len(present)))
    figure = Figure(figsize=(width, 3.6), layout='constrained')
    axes = figure.subplots()
    place = np.arange(len(present))
    axes.bar(place, values, color=COLORS[0], width=0.7)
    axes.errorbar(
        place, values, [values - lows, highs - values], fmt='none', ecolor='0.2', elinewidth=1
    )
    axes.axhline(predictions.accuracy * 100, color=COLORS[1], linewidth=1)
    axes.set_title(f'clean accuracy by class; all classes {predictions.accuracy:.2%}')
    axes.set_ylabel('accuracy (%)')
    axes.set_ylim(max(0.0, 10 * np.floor((lows.min() - 5) / 10)), 101)
    if len(present) <= 40:
        names = [report.info.class_names[label] for label in present]
        longest = max(map(len, names))
        axes.set_xticks(place, names)
        if longest > 3:
            axes.tick_params(axis='x', rotation=45)
    else:
        axes.set_xlabel('class')
    style(axes)
    return figure


def example_grid(report: RobustnessReport, outcome: AttackOutcome) -> Figure:
    """First images of the data set: clean, perturbation, attacked, each with its prediction.

    The perturbation is shown around grey, stretched so that eps (linf) or its largest change (l2)
    reaches black and white.
    """
    attacked, names = outcome.attacked, report.info.class_names
    count = len(attacked.x)
    figure = Figure(figsize=(1.25 * count + 0.9, 4.6), layout='constrained')
    grid = figure.subplots(3, count, squeeze=False)
    clean = attacked.x / np.float32(255)
    change = attacked.x_adv - clean
    scale = outcome.eps if outcome.norm == 'linf' else np.abs(change).max()
    scale = scale or 1.0
    for column in range(count):
        label = int(report.predictions.labels[column])
        before = int(report.predictions.predictions[column])
        after = int(attacked.predictions[column])
        pictures = (clean[column], 0.5 + change[column] / (2 * scale), attacked.x_adv[column])
        for row, picture in enumerate(pictures):
            axes = grid[row, column]
            axes.imshow(
                np.clip(picture, 0, 1).squeeze(), cmap='gray', vmin=0, vmax=1, interpolation='none'
            )
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color('0.7')
        for row, prediction in ((0, before), (2, after)):
            color = COLORS[2] if prediction == label else COLORS[1]
            seen = names[prediction] if prediction >= 0 else 'no number'
            grid[row, column].set_xlabel(seen, color=color, fontsize=9)
        grid[1, column].set_xlabel(f'max {np.abs(change[column]).max():.3f}', fontsize=7)
    for row, title in enumerate(('clean', 'perturbation', 'attacked')):
        grid[row, 0].set_ylabel(title)
    figure.suptitle(
        f'{outcome.attack.upper()}, {outcome.norm} eps {outcome.eps:g}; below each image the '
        'predicted class (green: right)',
        fontsize=9,
    )
    return figure
