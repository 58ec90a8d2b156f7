"""Maps over neurons in chunks, so that memory has a bound that the caller sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from neurosens import _validate

# Directions or neurons per example and step of a loop: larger chunks leave the cache, smaller ones
# pay for the loop.
DEFAULT = 16


def check_chunk(chunk: int | None) -> None:
    """Raises a ValueError unless `chunk` is None or at least 1."""
    if chunk is not None:
        _validate.check_whole('chunk', chunk)


def fits(count: int, chunk: int) -> bool:
    """Whether so many items are one chunk, which needs no loop."""
    return count <= chunk


def map_chunks(function: Callable[[Int[Array, '']], Any], count: int, chunk: int) -> Any:
    """Applies a function to 0, 1, ..., count - 1, several at once.

    Chunks are made as even as they can be. The last one may run past the end, so the function must
    accept indices a little above; what it returns for them is dropped.

    Args:
      function: from an index to a pytree of arrays.
      count: number of indices, at least 1.
      chunk: how many to vectorise over; the chunks follow one another in a compiled loop.

    Returns:
      The pytree of results stacked along a new first axis `[count, ...]`.
    """
    if fits(count, chunk):
        return jax.vmap(function)(jnp.arange(count))
    steps = -(-count // chunk)
    size = -(-count // steps)
    indices = jnp.arange(steps * size).reshape(steps, size)
    results = jax.lax.map(jax.vmap(function), indices)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], results)
