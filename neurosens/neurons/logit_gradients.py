"""Derivatives of every logit with respect to every neuron of a layer, in the cheaper direction."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neurosens import _validate
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, Variables
from neurosens.neurons import chunks, tail, units

DIRECTIONS = ('auto', 'reverse', 'forward')

# Directions at once for each example: with more, the backward pass of a deep network slows down
# (56 layers, 10 classes at once: by a third), with fewer shallow ones gain nothing.
DEFAULT_CHUNK = 5


def check_direction(direction: str) -> None:
    """Raises a ValueError unless `direction` is known."""
    if direction not in DIRECTIONS:
        raise ValueError(_validate.unknown('direction', direction, DIRECTIONS))


def logit_gradients_of_cut(
    cut: tail.Cut,
    *,
    unit: str = 'channel',
    direction: str = 'auto',
    chunk: int | None = None,
) -> Float[Array, 'classes neurons']:
    """Derivatives of the logits of one example with respect to the neurons at a cut.

    Args:
      cut: the network cut at the layer.
      unit: `'channel'` or `'unit'`, see `neurosens.neurons.units`.
      direction: `'reverse'` pulls one cotangent per class back to the layer (K passes), `'forward'`
        pushes one tangent per neuron to the logits (N passes), `'auto'` takes the fewer. The
        results are the same to rounding.
      chunk: directions at once, 5 by default.

    Returns:
      `d logit_c / d neuron_i`, `[K, N]`, in the type of the logits.

    Raises:
      ValueError: a choice is unknown or `chunk` is below 1.
    """
    check_direction(direction)
    chunks.check_chunk(chunk)
    size = chunk or DEFAULT_CHUNK
    neurons = units.count(cut.activation.shape, unit)
    logits = jax.eval_shape(cut.logits, cut.activation)
    classes = logits.shape[0]
    if is_reverse(direction, classes, neurons):
        pull = pull_of_cut(cut, unit=unit, looped=not chunks.fits(classes, size))

        def by_class(index: Array) -> Array:
            return pull(jax.nn.one_hot(index, classes, dtype=logits.dtype))

        return chunks.map_chunks(by_class, classes, size)
    return chunks.map_chunks(push_of_cut(cut, unit=unit), neurons, size).T


def is_reverse(direction: str, classes: int, neurons: int) -> bool:
    """Whether to differentiate in reverse: if asked to, or by default where it is cheaper."""
    return direction == 'reverse' or (direction == 'auto' and classes <= neurons)


def pull_of_cut(
    cut: tail.Cut, *, unit: str, looped: bool
) -> Callable[[Float[Array, ' classes']], Float[Array, ' neurons']]:
    """The function from a cotangent of the logits to the derivatives at the neurons of a cut.

    Args:
      cut: the network cut at the layer.
      unit: `'channel'` or `'unit'`.
      looped: whether the function runs in a loop.

    Returns:
      The function, in the type of the logits.
    """
    logits = with_fast_input_gradients(cut.logits) if looped else cut.logits
    values, pull = jax.vjp(logits, cut.activation)
    return lambda cotangent: units.pool(pull(cotangent)[0].astype(values.dtype), unit)


def push_of_cut(
    cut: tail.Cut, *, unit: str
) -> Callable[[Int[Array, '']], Float[Array, ' classes']]:
    """The function from a neuron's index to the derivatives of the logits with respect to it.

    Args:
      cut: the network cut at the layer.
      unit: `'channel'` or `'unit'`.

    Returns:
      The function.
    """
    activation = cut.activation
    _, push = jax.linearize(cut.logits, activation)
    return lambda index: push(units.direction(index, activation.shape, unit, activation.dtype))


def logit_gradients_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    direction: str = 'auto',
    chunk: int | None = None,
) -> Float[Array, 'classes neurons']:
    """Derivatives of the logits with respect to a layer's neurons, for one example.

    The function that `logit_gradients` maps over a batch; it has its arguments and errors, with `x`
    one input, and returns `[K, N]`.
    """
    cut = tail.cut(forward, variables, x, layer)
    return logit_gradients_of_cut(cut, unit=unit, direction=direction, chunk=chunk)


@functools.partial(jax.jit, static_argnames=('layer', 'unit', 'direction', 'chunk'))
def logit_gradients(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    direction: str = 'auto',
    chunk: int | None = None,
) -> Float[Array, 'batch classes neurons']:
    """Derivatives of every logit with respect to every neuron of a layer, jit-compiled.

    Costs one pass through the network in front of the layer and min(K, N) passes through the rest.

    Args:
      forward: the model.
      variables: its variables.
      x: inputs `[B, ...]`.
      layer: name of the layer, as in `neurosens.layers`.
      unit: `'channel'` (the derivative along the same change at every position) or `'unit'`.
      direction: `'auto'`, `'reverse'` (K vector-Jacobian products) or `'forward'` (N
        Jacobian-vector products).
      chunk: directions at once for each example, 5 by default; bounds memory, never changes
        results beyond rounding.

    Returns:
      `[B, K, N]`, in float32 (or float64).

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: a choice is unknown or `chunk` is below 1.
    """
    example = functools.partial(
        logit_gradients_example,
        forward,
        variables,
        layer=layer,
        unit=unit,
        direction=direction,
        chunk=chunk,
    )
    return jax.vmap(example)(jnp.asarray(x))
