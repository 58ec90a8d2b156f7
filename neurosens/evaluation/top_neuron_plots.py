"""A picture of the most sensitive neurons: images that activate them, images they endanger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from neurosens.evaluation.neuron_distances import (
    PER_NEURON,
    activating,
    fragile,
    images_wanted,
    median_distance,
    most_sensitive,
)
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport
from neurosens.evaluation.plots import COLORS

_LONGEST_CLASS = 12


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
        for column, image in enumerate(activating(layer, neuron, per_neuron)):
            before, right = _classes(report, image, names, gap)
            text = f'{before}\n{layer.peak[image, neuron]:.3g}'
            canvas.picture(row, 0, column, images[int(image)], text, right)
        for column, image in enumerate(fragile(layer, neuron, per_neuron)):
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
