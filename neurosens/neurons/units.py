"""What counts as one neuron of a layer: a channel, or a single unit.

Activations have their channels last. With `unit='channel'` a neuron is a channel: moving it moves
every position alike, and its derivative is the sum over positions. With `unit='unit'` every entry
of the activation is a neuron of its own, in row-major order. In a dense layer the two are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from neurosens import _validate

UNITS = ('channel', 'unit')


def check_unit(unit: str) -> None:
    """Raises a ValueError unless `unit` is `'channel'` or `'unit'`."""
    if unit not in UNITS:
        raise ValueError(_validate.unknown('unit', unit, UNITS))


def count(shape: Sequence[int], unit: str = 'channel') -> int:
    """Number of neurons N of a layer.

    Args:
      shape: shape of the layer's activation for one example, `(..., C)`, without the batch.
      unit: `'channel'` or `'unit'`.

    Returns:
      C for channels, the number of entries for units; 1 for an activation without axes.

    Raises:
      ValueError: the unit is unknown.
    """
    check_unit(unit)
    return math.prod(shape[-1:] if unit == 'channel' else shape)


def are_channels(shape: Sequence[int], unit: str = 'channel') -> bool:
    """Whether the neurons of a layer, of this shape for one example, are its channels."""
    return len(shape) == 1 or (len(shape) > 1 and unit == 'channel')


def pool(values: Float[Array, '... channels'], unit: str = 'channel') -> Float[Array, ' neurons']:
    """Sums values over the positions that belong to each neuron.

    Args:
      values: one value per entry of the activation of one example, such as a gradient.
      unit: `'channel'` or `'unit'`.

    Returns:
      One value per neuron `[N]`.
    """
    if unit == 'unit' or values.ndim <= 1:
        return values.ravel()
    return values.sum(tuple(range(values.ndim - 1)))


def spread(
    values: Float[Array, ' neurons'], shape: Sequence[int], unit: str = 'channel'
) -> Float[Array, '... channels']:
    """Gives every entry of an activation the value of its neuron: the transpose of `pool`.

    Args:
      values: one value per neuron `[N]`.
      shape: shape of the activation of one example.
      unit: `'channel'` or `'unit'`.

    Returns:
      An array of that shape.
    """
    if unit == 'unit' or len(shape) <= 1:
        return values.reshape(tuple(shape))
    return jnp.broadcast_to(values, tuple(shape))


def across(
    values: Shaped[Array, ' neurons'], shape: Sequence[int], unit: str = 'channel'
) -> Shaped[Array, '...']:
    """One value per neuron in a shape that broadcasts over the activation of a batch.

    Args:
      values: one value per neuron `[N]`.
      shape: shape of the activation, the batch first.
      unit: `'channel'` or `'unit'`.

    Returns:
      The values, of the shape of one example where units are apart.

    Raises:
      ValueError: the layer has not N neurons.
    """
    neurons = count(shape[1:], unit)
    if values.shape != (neurons,):
        raise ValueError(
            f'Values of shape {values.shape} are given for the {unit}s of an activation of shape '
            f'{tuple(shape[1:])}; it has {neurons} of them, and needs one value for each.'
        )
    return values if are_channels(shape[1:], unit) else values.reshape(tuple(shape[1:]))


def direction(
    neuron: Int[Array, ''],
    shape: Sequence[int],
    unit: str = 'channel',
    dtype: DTypeLike = 'float32',
) -> Float[Array, '... channels']:
    """The change of an activation that moves one neuron by 1.

    Args:
      neuron: index of the neuron; one that does not exist gives zeros.
      shape: shape of the activation of one example.
      unit: `'channel'` or `'unit'`.
      dtype: type of the result.

    Returns:
      Ones at the neuron's entries and zeros elsewhere.
    """
    indicator = (jnp.arange(count(shape, unit)) == neuron).astype(dtype)
    return spread(indicator, shape, unit)


def rows(
    activations: Float[Array, 'batch ... channels'], unit: str = 'channel'
) -> Float[Array, 'samples neurons']:
    """The values that each neuron takes on a batch, one column per neuron.

    Args:
      activations: a batch of activations `[B, ..., C]`.
      unit: `'channel'` or `'unit'`.

    Returns:
      `[B * positions, C]` for channels, `[B, N]` for units.
    """
    if unit == 'channel':
        return activations.reshape(-1, activations.shape[-1] if activations.ndim > 1 else 1)
    return activations.reshape(activations.shape[0], -1)
