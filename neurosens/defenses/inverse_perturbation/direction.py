"""Directions that strengthen front neurons and weaken tail neurons, image by image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neurosens.defenses.inverse_perturbation.settings import DEFAULT, Settings
from neurosens.forward import Forward, Variables
from neurosens.neurons import tail, units
from neurosens.neurons.influence import Partition, influence_example, labels
from neurosens.neurons.influence import partition as front_and_tail

# Of the released program: keeps a direction finite where the gradient vanishes.
_SMALLEST = 1e-5


class Direction(NamedTuple):
    """The direction of one image.

    Attributes:
      direction: of root mean square 1, or 0 where the gradient is 0, in the shape of the image.
      influence: by layer, signed influence of its neurons on the class `[N]`.
      activation: by layer, activation of its neurons, summed over positions of channels `[N]`.
      logits: of the image `[K]`.
    """

    direction: Float[Array, '...']
    influence: dict[str, Float[Array, ' neurons']]
    activation: dict[str, Float[Array, ' neurons']]
    logits: Float[Array, ' classes']


def normalize(gradient: Float[Array, '...']) -> Float[Array, '...']:
    """A gradient divided by its root mean square plus 1e-5; 0 stays 0.

    As in the released program, over one example.
    """
    return gradient / (jnp.sqrt(jnp.mean(gradient**2)) + _SMALLEST)


def partition(influence: Float[Array, ' neurons'], settings: Settings) -> Partition:
    """Front and tail of a layer's neurons, of equal influences the lowest index first.

    Args:
      influence: signed influence `[N]`.
      settings: numbers of front and tail neurons, and the mode of the tail.

    Returns:
      Indices of both.

    Raises:
      ValueError: they do not fit into N neurons together.
    """
    if settings.tail_mode == 'lowest':
        return front_and_tail(influence, front=settings.front, tail=settings.tail)
    start = settings.front + settings.offset
    if start + settings.tail > len(influence):
        raise ValueError(
            f'front {settings.front}, offset {settings.offset} and tail {settings.tail} do not fit '
            f'into {len(influence)} neurons; make them smaller.'
        )
    falling = jnp.argsort(-influence, stable=True).astype(jnp.int32)
    return Partition(falling[: settings.front], falling[start : start + settings.tail])


def direction_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''] | None = None,
    *,
    settings: Settings = DEFAULT,
) -> Direction:
    """The direction that strengthens one image's front neurons and weakens its tail neurons.

    d = g / (rms(g) + 1e-5) with g the gradient of J = sum over the front - sum over the tail of the
    activations, front and tail held fixed (section 2 of the released program).

    Args:
      forward: the model.
      variables: its variables.
      x: one image.
      y: the class whose influence divides the neurons; the predicted one by default.
      settings: layers, and how neurons are divided.

    Returns:
      The direction, and what it was made of.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: front and tail do not fit into a layer.
    """
    influences, signs = {}, {}
    for layer in settings.layers:
        influences[layer] = influence_example(
            forward, variables, x, y, layer=layer, unit=settings.unit, score=settings.score
        )
        part = partition(influences[layer], settings)
        signs[layer] = labels(part, len(influences[layer])).astype(jnp.float32)

    def tapped(x: Array) -> tuple[dict[str, Array], Array]:
        logits, values = forward(variables, x[None], taps=settings.layers)
        for layer in settings.layers:
            tail.check_neurons(layer, values[layer])
        return {layer: values[layer][0] for layer in settings.layers}, logits[0]

    values, pull, logits = jax.vjp(tapped, x, has_aux=True)
    (gradient,) = pull(
        {
            layer: units.spread(signs[layer].astype(h.dtype), h.shape, settings.unit)
            for layer, h in values.items()
        }
    )
    pooled = {layer: units.pool(h, settings.unit) for layer, h in values.items()}
    return Direction(normalize(gradient.astype(jnp.float32)), influences, pooled, logits)


@functools.partial(jax.jit, static_argnames='settings')
def directions(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'] | None = None,
    *,
    settings: Settings = DEFAULT,
) -> Direction:
    """`direction_example` of every image of a batch, jit-compiled; arrays have a leading `[B]`."""
    example = functools.partial(direction_example, forward, variables, settings=settings)
    if y is None:
        return jax.vmap(example)(jnp.asarray(x))
    return jax.vmap(example)(jnp.asarray(x), jnp.asarray(y))
