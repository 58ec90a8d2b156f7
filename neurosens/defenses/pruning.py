"""Pruning: neurons of a layer set to 0, chosen by any measure.

After Suri & Evans 2020, "One Neuron to Fool Them All" (https://arxiv.org/abs/2003.09372), who zero
the columns of the last layer that belong to the most sensitive, the least sensitive or random
neurons. A mask on the last layer's input does the same; other layers and measures are ours.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from neurosens import _validate
from neurosens.forward import Forward
from neurosens.neurons import units
from neurosens.neurons.ablation import without_neurons

ORDERS = ('most', 'least', 'random')


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which neurons go; hashable.

    Attributes:
      layer: name of the layer.
      unit: `'channel'` or `'unit'`.
      count: how many neurons are removed.
      order: `'most'` (the largest scores first), `'least'` or `'random'`.
      seed: of random choices; a larger count removes the same neurons and more.
    """

    layer: str = 'head:in'
    unit: str = 'channel'
    count: int = 1
    order: str = 'most'
    seed: int = 0

    def __post_init__(self) -> None:
        units.check_unit(self.unit)
        _validate.check_layer(self.layer)
        _validate.check_whole('count', self.count, low=0)
        if self.order not in ORDERS:
            raise ValueError(_validate.unknown('order', self.order, ORDERS))


DEFAULT = Settings()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=('removed',), meta_fields=('settings',)
)
@dataclasses.dataclass(frozen=True)
class Parameters:
    """What calibration found.

    Attributes:
      removed: which neurons are removed, bool `[N]`.
      settings: of the calibration.
    """

    removed: Bool[Array, ' neurons']
    settings: Settings


def calibrate(scores: Float[ArrayLike, ' neurons'], *, settings: Settings = DEFAULT) -> Parameters:
    """Chooses the neurons to remove.

    Args:
      scores: a score for each neuron `[N]`, larger where the measure calls it more sensitive,
        fragile or influential; of a sensitivity Delta, for which small is sensitive, pass the
        negative. NaN goes last in both orders, infinity like any other number.
      settings: how many, and in which order.

    Returns:
      The choice; of equal scores the lowest index goes first.

    Raises:
      ValueError: there are fewer neurons than should go, or no score is a number where they count.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or settings.count > len(values):
        raise ValueError(
            f'count is {settings.count}, but scores of shape {values.shape} are given; remove at '
            'most one neuron for each score.'
        )
    if settings.order == 'random':
        order = np.random.default_rng(settings.seed).permutation(len(values))
    elif settings.count and np.isnan(values).all():
        raise ValueError(
            f'None of the {len(values)} scores is a number; measure neurons on images whose logits '
            'are finite.'
        )
    else:
        sign = -1 if settings.order == 'most' else 1
        order = np.argsort(sign * values, kind='stable')
    removed = np.zeros(len(values), bool)
    removed[order[: settings.count]] = True
    return Parameters(jnp.asarray(removed), settings)


def apply(parameters: Parameters, forward: Forward) -> Forward:
    """The model without the neurons.

    Args:
      parameters: of `calibrate`.
      forward: the model.

    Returns:
      A forward with the same variables and layers, in which the neurons are 0; a call raises a
      ValueError where the layer has another number of neurons.
    """
    settings = parameters.settings
    return without_neurons(forward, settings.layer, parameters.removed, settings.unit)


def skeleton(settings: Settings) -> Parameters:
    """Parameters without arrays, of the same structure as those of a calibration."""
    return Parameters(jnp.zeros(0, bool), settings)
