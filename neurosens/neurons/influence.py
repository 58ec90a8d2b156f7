"""Neuron influence: how much each neuron contributes to a class.

After Chen et al. 2021, "Fight Perturbations with Perturbations" (https://arxiv.org/abs/2112.13060)
and its first released program: I_i(x) = h_i(x) * d F_c / d h_i, signed, with F_c the output for
class c. Scores on logits, channels, any layer and the partition rules are ours.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neurosens import _validate
from neurosens.forward import Forward, Variables
from neurosens.neurons import tail, units

SCORES = ('logit', 'probability')
FRONT, MIDDLE, TAIL = 1, 0, -1


def influence_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''] | None = None,
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    score: str = 'logit',
) -> Float[Array, ' neurons']:
    """Influence of every neuron of a layer on one example.

    The function that `influence` maps over a batch; it has its arguments and errors, with `x` one
    input and `y` one class, and returns `[N]`.
    """
    units.check_unit(unit)
    if score not in SCORES:
        raise ValueError(_validate.unknown('score', score, SCORES))
    activation, logits, _ = tail.cut(forward, variables, x, layer)

    def outputs(h: Array) -> Array:
        values = logits(h)
        return jax.nn.softmax(values) if score == 'probability' else values

    values, pull = jax.vjp(outputs, activation)
    chosen = values.argmax() if y is None else y
    (gradient,) = pull(jax.nn.one_hot(chosen, len(values), dtype=values.dtype))
    wide = values.dtype
    return units.pool(activation.astype(wide) * gradient.astype(wide), unit)


@functools.partial(jax.jit, static_argnames=('layer', 'unit', 'score'))
def influence(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'] | None = None,
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    score: str = 'logit',
) -> Float[Array, 'batch neurons']:
    """Activation times gradient of every neuron of a layer, jit-compiled (Chen et al. 2021).

    Args:
      forward: the model.
      variables: its variables.
      x: inputs `[B, ...]`.
      y: the class whose score is explained, int `[B]`; the predicted one by default.
      layer: name of the layer; the paper uses the last convolutional block.
      unit: `'channel'` (sum over positions) or `'unit'` (as in the released program).
      score: `'logit'`, or `'probability'` for the softmax, which saturates to influences of 0 where
        the model is certain.

    Returns:
      Signed influence `[B, N]`, in units of the score.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: a choice is unknown.
    """
    example = functools.partial(
        influence_example, forward, variables, layer=layer, unit=unit, score=score
    )
    if y is None:
        return jax.vmap(example)(jnp.asarray(x))
    return jax.vmap(example)(jnp.asarray(x), jnp.asarray(y))


class Partition(NamedTuple):
    """Front and tail neurons of one example, or of a data set.

    Attributes:
      front: indices of the neurons of largest influence, largest first, int32 `[front]`.
      tail: indices of the neurons of smallest signed influence, smallest first, int32 `[tail]`.
    """

    front: Int[Array, ' front']
    tail: Int[Array, ' tail']


def partition(influence: Float[Array, ' neurons'], *, front: int, tail: int) -> Partition:
    """Divides neurons into front, middle and tail by influence.

    Of equal influences the lowest index comes first, at both ends. Map it over a batch with
    `jax.vmap`.

    Args:
      influence: signed influence `[N]`.
      front: number of front neurons.
      tail: number of tail neurons; the released program takes 1 and 5.

    Returns:
      Indices of the front and of the tail; everything else is the middle.

    Raises:
      ValueError: front and tail do not fit into N neurons together.
    """
    neurons = influence.shape[-1]
    if front < 0 or tail < 0 or front + tail > neurons:
        raise ValueError(
            f'front {front} and tail {tail} do not fit into {neurons} neurons; they must not be '
            f'negative and together at most {neurons}.'
        )
    # A stable sort gives the lowest index first in both directions.
    falling = jnp.argsort(-influence, stable=True)[:front].astype(jnp.int32)
    # A neuron of the front stays there where all influences are equal.
    in_front = jnp.zeros(neurons, bool).at[falling].set(True)
    rising = jnp.lexsort((influence, in_front))[:tail].astype(jnp.int32)
    return Partition(falling, rising)


def labels(part: Partition, neurons: int) -> Int[Array, ' neurons']:
    """A partition as one label per neuron: 1 front, 0 middle, -1 tail, int32 `[N]`."""
    label = jnp.full(neurons, MIDDLE, jnp.int32)
    return label.at[part.front].set(FRONT).at[part.tail].set(TAIL)


def class_influence(
    influence: Float[np.ndarray, 'examples neurons'],
    y: Int[np.ndarray, ' examples'],
    num_classes: int,
) -> Float[np.ndarray, 'classes neurons']:
    """Mean influence of each neuron on the examples of each class, on the host.

    Args:
      influence: signed influence of N neurons on M examples `[M, N]`.
      y: class of each example, int `[M]`.
      num_classes: number of classes K.

    Returns:
      float64 `[K, N]`; NaN for a class without examples. The mean over its rows, weighted by the
      size of the classes, is the influence over the data set.
    """
    influence = np.asarray(influence, np.float64)
    result = np.full((num_classes, influence.shape[1]), np.nan)
    for label in np.unique(y):
        result[label] = influence[y == label].mean(0)
    return result
