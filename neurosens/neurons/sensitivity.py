"""Neuron sensitivity: the smallest change of one neuron that changes the prediction.

After Suri & Evans 2020, "One Neuron to Fool Them All" (https://arxiv.org/abs/2003.09372), who
define it for the input h of the last linear layer, z = W h + b, with predicted class y:

    delta_c(i, x) = (z_y - z_c) / (W[c, i] - W[y, i])        for each class c other than y,

the change of neuron i that makes the logits of c and y equal. Delta(i, x) is the delta_c of
smallest absolute value among those that leave the neuron in the range it can take (at least 0
behind a ReLU). The first-order and the exact measure for any other layer are ours.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neurosens import _validate
from neurosens.forward import Forward, Variables
from neurosens.neurons import chunks, tail, units
from neurosens.neurons.logit_gradients import (
    DEFAULT_CHUNK,
    check_direction,
    is_reverse,
    logit_gradients_of_cut,
    pull_of_cut,
    push_of_cut,
)
from neurosens.neurons.nearest_flip import (
    UNREACHABLE,
    Sensitivity,
    nearest_flip,
    nearest_flip_in_pieces,
)

METHODS = ('auto', 'closed_form', 'first_order', 'exact')

# The exact search tries changes of 2^-3 ... 2^7 times the first-order one, then the limit.
_FINEST_RUNG, _RUNGS = -3, 12
_BISECTIONS = 26
# Where no limit is given, a neuron may move by this many times the layer's largest activation.
_LIMIT_FACTOR = 100.0
# First guess where the gradient is 0, as a share of the limit.
_BLIND_GUESS = 2.0**-12

Range: TypeAlias = tuple[float, float]


def _nearest_at_cut(
    cut: tail.Cut,
    logits: Array,
    below: Array,
    above: Array,
    *,
    unit: str,
    direction: str,
    chunk: int | None,
) -> Sensitivity:
    """Delta from the derivatives at a cut, of which at most `chunk` per neuron are held at once."""
    size = chunk or DEFAULT_CHUNK
    classes, neurons = len(logits), len(below)
    if is_reverse(direction, classes, neurons):
        if chunks.fits(classes, size):
            gradients = logit_gradients_of_cut(cut, unit=unit, direction='reverse', chunk=chunk)
            return nearest_flip(gradients, logits, below, above)
        pull = pull_of_cut(cut, unit=unit, looped=True)
        own = jax.nn.one_hot(logits.argmax(), classes, dtype=logits.dtype)

        def slopes_of(numbers: Array) -> Array:
            cotangents = jax.nn.one_hot(numbers, classes, dtype=logits.dtype) - own
            return jax.vmap(pull)(cotangents)

        size = -(-classes // -(-classes // size))
        return nearest_flip_in_pieces(slopes_of, logits, neurons, below, above, size=size)

    push = push_of_cut(cut, unit=unit)

    def one_neuron(index: Array) -> Sensitivity:
        room = (room.at[index].get(mode='clip')[None] for room in (below, above))
        found = nearest_flip(push(index)[:, None], logits, *room)
        return Sensitivity(found.delta[0], found.flips_to[0])

    return chunks.map_chunks(one_neuron, neurons, size)


def closed_form(
    features: Float[Array, ' neurons'],
    weights: Float[Array, 'classes neurons'],
    logits: Float[Array, ' classes'],
    activation_range: Range = (0.0, float('inf')),
) -> Sensitivity:
    """Delta of one example from the features and weights of the last linear layer.

    Map it over a batch with `jax.vmap(closed_form, (0, None, 0))`.

    Args:
      features: the activations h that enter the last layer `[N]`.
      weights: its weights W `[K, N]`, one row per class (the transpose of a Flax kernel).
      logits: z = W h + b `[K]`.
      activation_range: smallest and largest value that a neuron can take.

    Returns:
      Delta and the class it flips to, `[N]` each (Suri & Evans 2020, section 3).
    """
    low, high = activation_range
    # No bound costs no work.
    below = features - low if math.isfinite(low) else math.inf
    above = high - features if math.isfinite(high) else math.inf
    return nearest_flip(weights, logits, below, above)


# --------------------------------------------------------------------------------- any layer


def sensitivity_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    *,
    layer: str = 'head:in',
    method: str = 'auto',
    unit: str = 'channel',
    direction: str = 'auto',
    chunk: int | None = None,
    activation_range: Range | None = None,
    limit: float | Float[Array, ''] | None = None,
) -> Sensitivity:
    """Delta of every neuron of a layer for one example.

    The function that `sensitivity` maps over a batch; it has its arguments and errors, with `x` one
    input, and returns arrays `[N]`.
    """
    _check(method, unit, direction, chunk, activation_range, limit)
    facts = tail.layer_facts(forward, variables, x, layer)
    if activation_range is None:
        activation_range = (0.0 if facts.nonnegative else -float('inf'), float('inf'))
    if method == 'auto':
        method = 'closed_form' if facts.affine_tail else 'first_order'
    if method == 'closed_form':
        check_closed_form(facts, layer)
    cut = tail.cut(forward, variables, x, layer)
    below, above = _room(cut.activation, unit, activation_range)
    logits = cut.logits(cut.activation)
    if method == 'closed_form':
        # The weights of an affine tail are those at any input; at a fixed one they are computed
        # once and not for every example of a batch.
        anywhere = tail.cut(forward, variables, jnp.zeros(x.shape, x.dtype), layer)
        weights = logit_gradients_of_cut(anywhere, unit=unit, direction=direction, chunk=chunk)
        return nearest_flip(weights, logits, below, above)
    nearest = _nearest_at_cut(
        cut, logits, below, above, unit=unit, direction=direction, chunk=chunk
    )
    if method != 'exact':
        return nearest
    return _exact(cut, logits, nearest, below, above, unit=unit, chunk=chunk, limit=limit)


def check_closed_form(facts: tail.LayerFacts, layer: str) -> None:
    """Raises a ValueError unless Delta of a layer has a closed form.

    Args:
      facts: of the layer.
      layer: its name.
    """
    if not facts.affine_tail:
        raise ValueError(
            f'The logits are not an affine function of layer {layer!r} with fixed weights, so its '
            "sensitivity has no closed form; use method='first_order' or 'exact'."
        )


def _room(activation: Array, unit: str, activation_range: Range) -> tuple[Array, Array]:
    """How far each neuron can fall and rise, at all of its positions alike."""
    values = activation.astype(jnp.promote_types(activation.dtype, jnp.float32))
    if unit == 'unit' or values.ndim <= 1:
        lowest = highest = values.ravel()
    else:
        positions = tuple(range(values.ndim - 1))
        lowest, highest = values.min(positions), values.max(positions)
    low, high = activation_range
    return jnp.maximum(lowest - low, 0), jnp.maximum(high - highest, 0)


def _exact(
    cut: tail.Cut,
    logits: Array,
    nearest: Sensitivity,
    below: Array,
    above: Array,
    *,
    unit: str,
    chunk: int | None,
    limit: float | Array | None,
) -> Sensitivity:
    """The first flip of the real network: a ladder of changes, then bisection."""
    shape, dtype = cut.activation.shape, cut.activation.dtype
    predicted = logits.argmax()
    apart = units.are_channels(shape, unit)
    channel_logits = cut.channel_logits() if apart else None
    if limit is None:
        limit = _LIMIT_FACTOR * jnp.maximum(jnp.abs(cut.activation).max(), 1e-6)
    limit = jnp.asarray(limit, nearest.delta.dtype)

    def moved_logits(index: Array, move: Array) -> Array:
        if channel_logits is not None:
            channel = cut.activation.at[..., index].get(mode='clip')
            return channel_logits(index, (channel + move).astype(dtype))
        direction = units.direction(index, shape, unit, move.dtype)
        return cut.logits((cut.activation + move * direction).astype(dtype))

    def one_neuron(index: Array) -> tuple[Array, Array]:
        room = jnp.array([above.at[index].get(mode='clip'), below.at[index].get(mode='clip')])
        signs = jnp.array([1.0, -1.0], nearest.delta.dtype)

        def classes(change: Array) -> Array:
            """Predictions after a rise and a fall by up to `change` `[2]`."""
            return jax.vmap(moved_logits, (None, 0))(
                index, signs * jnp.minimum(change, room)
            ).argmax(-1)

        guess = jnp.abs(nearest.delta.at[index].get(mode='clip'))
        guess = jnp.where(jnp.isfinite(guess), guess, _BLIND_GUESS * limit)
        guess = jnp.clip(guess, 2.0**-20 * limit, limit)

        def climb(rung: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            inside, outside, found = state
            change = jnp.where(
                rung < _RUNGS - 1,
                jnp.minimum(guess * 2.0 ** (rung + _FINEST_RUNG).astype(guess.dtype), limit),
                limit,
            )
            flips = (classes(change) != predicted).any()
            inside = jnp.where(found | flips, inside, change)
            outside = jnp.where(found | ~flips, outside, change)
            return inside, outside, found | flips

        inside, outside, found = jax.lax.fori_loop(
            0, _RUNGS, climb, (jnp.zeros_like(limit), limit, jnp.zeros((), bool))
        )

        def halve(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            inside, outside = state
            middle = (inside + outside) / 2
            flips = (classes(middle) != predicted).any()
            return jnp.where(flips, inside, middle), jnp.where(flips, middle, outside)

        inside, outside = jax.lax.fori_loop(0, _BISECTIONS, halve, (inside, outside))
        after = classes(outside)
        flipped = after != predicted
        upwards = flipped[0]
        change = jnp.where(upwards, outside, -outside)
        found = found & flipped.any()
        return (
            jnp.where(found, change, jnp.inf),
            jnp.where(found, jnp.where(upwards, after[0], after[1]), UNREACHABLE).astype(jnp.int32),
        )

    neurons = units.count(shape, unit)
    delta, flips_to = chunks.map_chunks(one_neuron, neurons, chunk or chunks.DEFAULT)
    # Tied logits need no change, which no search finds.
    tied = nearest.delta == 0
    delta = jnp.where(tied, 0.0, delta)
    flips_to = jnp.where(tied, nearest.flips_to, flips_to)
    undefined = jnp.isnan(logits).any()
    return Sensitivity(
        jnp.where(undefined, jnp.nan, delta), jnp.where(undefined, UNREACHABLE, flips_to)
    )


@functools.partial(
    jax.jit,
    static_argnames=('layer', 'method', 'unit', 'direction', 'chunk', 'activation_range'),
)
def _sensitivity_batch(
    forward: Forward, variables: Variables, x: Array, limit: Array | None, **options: Any
) -> Sensitivity:
    def example(x: Array) -> Sensitivity:
        return sensitivity_example(forward, variables, x, limit=limit, **options)

    return jax.vmap(example)(x)


def sensitivity(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    *,
    layer: str = 'head:in',
    method: str = 'auto',
    unit: str = 'channel',
    direction: str = 'auto',
    chunk: int | None = None,
    activation_range: Range | None = None,
    limit: float | Float[Array, ''] | None = None,
) -> Sensitivity:
    """The smallest change of each neuron of a layer that changes the prediction, jit-compiled.

    Args:
      forward: the model.
      variables: its variables.
      x: inputs `[B, ...]`.
      layer: name of the layer, as in `neurosens.layers`; the input of the last layer by default.
      method: how it is computed.
        `'closed_form'`: from the weights, where the logits are an affine function of the layer.
        `'first_order'`: `-m_c / (d m_c / d a_i)` with margins m_c = z_y - z_c, for any layer.
        `'exact'`: the smallest change found that flips the real network. Changes of 1/8 to 128
        times the first-order one, each twice the last, and then the limit are tried upwards and
        downwards; the first that flips is refined by bisection to 2^-26 of its interval. A flip
        that is undone again between two tries is missed.
        `'auto'`: the closed form where there is one, else first order.
      unit: `'channel'` (the same change at every position) or `'unit'`.
      direction: direction of differentiation, see `logit_gradients`.
      chunk: neurons at once for each example, 16 by default (derivatives of logits: 5); bounds
        memory, never changes results beyond rounding.
      activation_range: smallest and largest value that a neuron can take, static; changes that
        would leave it are not valid. By default at least 0 where the program shows that the layer
        cannot be negative (as behind a ReLU), else unbounded. A channel must stay inside at every
        position.
      limit: largest change that `'exact'` tries, in units of the activation; by default 100 times
        the largest activation of the layer for each example.

    Returns:
      Delta and the class it flips to, `[B, N]` each; types below float32 are computed in float32
      from the logits on. The real network, which `'exact'` tries, takes activations of its own type
      only: in bfloat16 a change is resolved to 1/256 of the activation, in float16 to 1/2048.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: a choice is unknown or out of range, or there is no closed form.
    """
    _check(method, unit, direction, chunk, activation_range, limit)
    return _sensitivity_batch(
        forward,
        variables,
        jnp.asarray(x),
        limit,
        layer=layer,
        method=method,
        unit=unit,
        direction=direction,
        chunk=chunk,
        activation_range=activation_range,
    )


def _check(
    method: str,
    unit: str,
    direction: str,
    chunk: int | None,
    activation_range: Range | None,
    limit: float | Array | None,
) -> None:
    if method not in METHODS:
        raise ValueError(_validate.unknown('method', method, METHODS))
    units.check_unit(unit)
    check_direction(direction)
    chunks.check_chunk(chunk)
    if activation_range is not None and not activation_range[0] < activation_range[1]:
        raise ValueError(
            f'activation_range is {activation_range}; the first value must be below the second.'
        )
    if isinstance(limit, (int, float)):
        _validate.check_range('limit', limit, low=0, low_open=True)
