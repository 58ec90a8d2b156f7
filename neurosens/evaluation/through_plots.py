"""Plots of attacks through single neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from neurosens.evaluation.neuron_report import LayerReport
from neurosens.evaluation.plots import COLORS, style


def through_neurons(report: LayerReport) -> Figure:
    """How often attacks through the easiest neurons change a prediction, beside PGD.

    Args:
      report: of a layer that was attacked.

    Returns:
      To the left, the share of images whose prediction any of the n easiest neurons changes,
      against n, and a line for PGD; to the right the share that the neuron of each rank changes,
      and in how many it reached its Delta.

    Raises:
      ValueError: the layer was not attacked.
    """
    through = report.through
    if through is None:
        raise ValueError(f"{report.layer.name} was not attacked; measure 'attack'.")
    ranks = np.arange(1, through.success.shape[1] + 1)
    figure = Figure(figsize=(8.4, 3.6), layout='constrained')
    left, right = axes = figure.subplots(1, 2)
    broken = np.logical_or.accumulate(through.success, axis=1).mean(0)
    left.plot(ranks, broken, 'o-', color=COLORS[0], markersize=4, label='any of the easiest')
    left.axhline(through.pgd.mean(), color=COLORS[1], label='PGD on the model')
    left.set_title('Predictions changed')
    left.set_xlabel('easiest neurons tried')
    right.bar(ranks, through.success.mean(0), color=COLORS[0], label='prediction changed')
    right.plot(ranks, through.reached.mean(0), 'D', color=COLORS[2], label='Delta reached')
    right.set_title('By rank of the neuron')
    right.set_xlabel('rank, the easiest first')
    one: Any
    for one in axes:
        one.set_ylim(0, 1.04)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.yaxis.set_major_formatter(PercentFormatter(1))
        one.legend(loc='best')
        style(one)
    left.set_ylabel('images')
    images = len(through.pgd)
    figure.suptitle(
        f'{report.layer.name}: attacks through single neurons, {images:,} images\n{through.attack}'
    )
    return figure
