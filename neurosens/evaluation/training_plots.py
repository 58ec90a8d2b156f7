"""Plots of how a training went, from the lines of its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neurosens.evaluation.plots import COLORS, PANEL, style

_PANEL_HEIGHT = 2.6
_ACCURACIES = {
    'accuracy': 'training',
    'clean_accuracy': 'training, clean',
    'attacked_accuracy': 'training, attacked',
    'validation_accuracy': 'validation',
    'monitor/clean_accuracy': 'watched images',
    'monitor/pgd_accuracy': 'watched images under PGD',
}
_WATCHED = {
    'monitor/sensitivity': '|Delta| / std of the easiest neurons',
    'monitor/dead_share': 'share of dead neurons',
    'monitor/jacobian_norm': 'norm of the Jacobian',
    'monitor/boundary_distance': 'first-order l2 distance',
    'images_per_second': 'images/s',
}
_SENSITIVITY = 'monitor/activation_sensitivity'


def training_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and terms, accuracy, penalties, gradient shares, neurons and speed, as far as logged.

    Args:
      lines: of `metrics.jsonl`, in order.

    Returns:
      One panel per kind of curve, all over the same steps.

    Raises:
      ValueError: no line holds a loss.
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    if 'loss' not in names:
        raise ValueError('The log of the training holds no loss; train for at least one line.')
    penalties = [name for name in names if name.endswith('/penalty')]
    shares = [name for name in names if name.endswith('/gradient_share')]
    of_norms = {
        name: f'training, attacked in {name.partition("/")[2]}'
        for name in names
        if name.startswith('attacked_accuracy/') and name not in (*penalties, *shares)
    }
    panels: list[tuple[str, dict[str, str], str]] = [
        ('loss', {'loss': 'training', 'validation_loss': 'validation'}, 'log'),
        ('accuracy (%)', {**_ACCURACIES, **of_norms}, 'percent'),
    ]
    terms = [name for name in names if name.startswith('objective/') and name not in shares]
    if terms:
        curves = {name: name.partition('/')[2].replace('_', ' ') for name in terms}
        panels.append(('terms of the objective', curves, 'log'))
    if penalties:
        panels.append(('penalty', {name: _term(name) for name in penalties}, 'log'))
    if shares:
        panels.append(('share of gradient (%)', {name: _term(name) for name in shares}, 'percent'))
    panels += [(label, {name: ''}, 'linear') for name, label in _WATCHED.items() if name in names]
    if _SENSITIVITY in names:
        of_layers = [name for name in names if name.startswith(f'{_SENSITIVITY}/')]
        curves = {name: name.removeprefix(f'{_SENSITIVITY}/') for name in of_layers}
        panels.append(('activation sensitivity', {_SENSITIVITY: 'mean', **curves}, 'log'))
    height = _PANEL_HEIGHT * len(panels)
    figure = Figure(figsize=(PANEL, height), layout='constrained')
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, (label, curves, scale) in zip(grid[:, 0], panels):
        _draw(axes, lines, {name: text for name, text in curves.items() if name in names}, scale)
        axes.set_ylabel(label)
        style(axes)
    grid[-1, 0].set_xlabel('step')
    return figure


def _term(name: str) -> str:
    return name.rpartition('/')[0].replace('_', ' ')


def _draw(
    axes: Axes, lines: Sequence[Mapping[str, Any]], curves: Mapping[str, str], scale: str
) -> None:
    factor = 100 if scale == 'percent' else 1
    for place, (name, text) in enumerate(curves.items()):
        points = [(line['step'], factor * line[name]) for line in lines if name in line]
        steps, values = zip(*points)
        stroke = ('-', '--', ':')[place // len(COLORS) % 3]
        # A curve of one or two points would not show.
        marker = 'o' if len(points) < 20 else None
        color = COLORS[place % len(COLORS)]
        axes.plot(steps, values, stroke, marker=marker, markersize=3, color=color, label=text)
    if scale == 'percent':
        axes.set_ylim(0, 102)
    elif scale == 'log' and all(
        line[name] > 0 for name in curves for line in lines if name in line
    ):
        axes.set_yscale('log')
    else:
        axes.set_ylim(bottom=0)
    if any(curves.values()):
        axes.legend(frameon=False, fontsize=8)
