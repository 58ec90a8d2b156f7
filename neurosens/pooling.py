"""Derivatives of max pooling without what XLA does for them, which is slow on a CPU.

The derivative is that of the first entry of each window that equals its maximum, as there. Where
windows do not overlap, the forward pass notes which place of each window that is; elsewhere it is
found by comparing each place of the windows with the maxima, one strided slice at a time. Either is
elementwise work that XLA vectorises, and so is its transpose, the gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives


def supports(
    images: jax.Array,
    *,
    window_dilation: tuple[int, ...],
    base_dilation: tuple[int, ...],
    **rest: Any,
) -> bool:
    """Whether `max_pool` can stand for a `reduce_window_max`: of floats, without dilation."""
    del rest
    floating = jnp.issubdtype(images.dtype, jnp.floating)
    return floating and set(window_dilation) <= {1} and set(base_dilation) <= {1}


def max_pool(**params: Any) -> Callable[[jax.Array], jax.Array]:
    """`reduce_window_max` with fixed parameters and fast derivatives, in either mode."""
    plain = functools.partial(primitives.reduce_window_max_p.bind, **params)
    apart = params['window_dimensions'] == params['window_strides'] and not any(
        itertools.chain(*params['padding'])
    )

    @jax.custom_jvp
    def pool(images: jax.Array) -> jax.Array:
        if apart:
            return _largest_and_place(images, params['window_dimensions'])[0]
        return plain(images)

    @pool.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        (images,), (tangent,) = primals, tangents
        # Itself, so that its derivatives of higher order are these too.
        largest = pool(images)
        if apart:
            _, place = _largest_and_place(images, params['window_dimensions'])
            return largest, _of_places(place, tangent, params['window_dimensions'])
        return largest, _of_first(images, largest, tangent, **params)

    return pool


def _largest_and_place(images: jax.Array, windows: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Maxima of windows side by side, and the number of the first place that holds each."""
    counts = [size // window for size, window in zip(images.shape, windows)]
    largest = place = None
    for number, offset in enumerate(itertools.product(*map(range, windows))):
        ends = [
            start + window * (count - 1) + 1
            for start, window, count in zip(offset, windows, counts)
        ]
        values = lax.slice(images, offset, ends, windows)
        if largest is None or place is None:
            largest, place = values, jnp.zeros(values.shape, jnp.int32)
        else:
            place = jnp.where(values > largest, number, place)
            # Not a number where any value is not, like the plain maximum.
            largest = jnp.maximum(largest, values)
    assert largest is not None and place is not None
    return largest, place


def _of_places(place: jax.Array, values: jax.Array, windows: tuple[int, ...]) -> jax.Array:
    """Of windows side by side, the value at the place of each."""
    # The entries beyond the last whole window belong to none.
    whole = lax.slice(values, [0] * values.ndim, [n * w for n, w in zip(place.shape, windows)])
    apart = [part for count in place.shape for part in (count, 1)]
    inside = [part for window in windows for part in (1, window)]
    both = [part for pair in zip(place.shape, windows) for part in pair]
    numbers = jnp.arange(math.prod(windows), dtype=place.dtype).reshape(inside)
    chosen = jnp.where(place.reshape(apart) == numbers, whole.reshape(both), 0)
    return chosen.sum(tuple(range(1, 2 * place.ndim, 2)))


def _of_first(
    images: jax.Array,
    largest: jax.Array,
    values: jax.Array,
    *,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    **rest: Any,
) -> jax.Array:
    """The value where each window first has its maximum."""
    del rest
    padded = jnp.pad(images, padding, constant_values=-jnp.inf)
    values = jnp.pad(values, padding)
    taken = jnp.zeros(largest.shape, bool)
    total = jnp.zeros(largest.shape, values.dtype)
    for offset in itertools.product(*map(range, window_dimensions)):
        ends = [
            start + stride * (count - 1) + 1
            for start, stride, count in zip(offset, window_strides, largest.shape)
        ]
        first = (lax.slice(padded, offset, ends, window_strides) == largest) & ~taken
        taken |= first
        total += jnp.where(first, lax.slice(values, offset, ends, window_strides), 0)
    return total
