"""Sums over everything but channels in one pass through the memory.

Two reductions that XLA emits for a CPU read their common operand twice. A loop that adds up pieces
of both reads each once, and leaves sums of one piece, which stay in a core's cache until its end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from neurosens.models import channel_sums as sums
from neurosens.onednn import partitioning

# Numbers of a piece, of which the cache next to a core holds four: of both operands and both sums.
_PIECE = 2**11


def product_sums(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sums.products_by_formula` of images `[N, H, W, C]`, which may be split over devices."""
    return _apart(_products(a, b))


def square_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sums.squares_by_formula`, likewise."""
    return _apart(_squares(x, x))


def _apart(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The axes of images, of size 1 but for channels, in place of `[1, 1, C, 2]`."""
    return both[None, ..., 0], both[None, ..., 1]


def on_one_device(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums of `a` and of `a * b`, `[1, 1, C, 2]`."""
    channels = a.shape[-1]
    positions = a.size // channels
    together = min(max(_PIECE // channels, 1), positions)
    pieces, rest = divmod(positions, together)
    left, right = (array.reshape(-1, channels) for array in (a, b))

    def piece(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        one, other = (
            lax.dynamic_slice_in_dim(array, number * together, together).reshape(-1)
            for array in (left, right)
        )
        return one, one * other

    def add(number: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(total + one for total, one in zip(totals, piece(number), strict=True))

    zeros = lax.full_like(left, 0, shape=(together * channels,))
    totals = lax.fori_loop(0, pieces, add, (zeros, zeros))
    both = jnp.stack([total.reshape(together, channels).sum(0) for total in totals], -1)
    if rest:
        left_over = sums.products_by_formula(left[-rest:], right[-rest:])
        both += jnp.stack([total[0] for total in left_over], -1)
    return both[None, None]


def _squares_on_one_device(x: jax.Array, same: jax.Array) -> jax.Array:
    # Of one array, which is then read once.
    del same
    return on_one_device(x, x)


_products = partitioning.summed_over_images('channel_product_sums', on_one_device)
_squares = partitioning.summed_over_images('channel_square_sums', _squares_on_one_device)
