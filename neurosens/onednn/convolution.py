"""Convolutions of images, also of those with zeros between their pixels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from neurosens.onednn import calls, partitioning
from neurosens.onednn.calls import Padding, Pair


def convolve(
    images: jax.Array, kernel: jax.Array, *, strides: Pair, dilation: Pair, padding: Padding
) -> jax.Array:
    """Convolves by oneDNN.

    Args:
      images: `[N, H, W, C]`.
      kernel: `[I, J, C, D]`.
      strides: of rows and columns.
      dilation: distance of two pixels of the images when there are zeros between them; 1 in both
        directions if `strides` is not.
      padding: of the images, with the zeros, at least 0.

    Returns:
      `[N, Y, X, D]`.
    """
    if dilation == (1, 1):
        return _over_devices(strides, padding)(images, kernel)
    return _by_phases(images, kernel, dilation, padding)


def _by_phases(images: jax.Array, kernel: jax.Array, dilation: Pair, padding: Padding) -> jax.Array:
    """Convolves images that have zeros between their pixels, as gradients of strided ones do.

    A pixel of the result meets pixels of the images only at every so many places of the kernel.
    These are the same for all that are `dilation` apart, which are one convolution without zeros.
    """
    sizes = [
        (images.shape[1 + axis] - 1) * dilation[axis] + 2 + sum(padding[axis]) - kernel.shape[axis]
        for axis in range(2)
    ]
    counts = [-(-size // apart) for size, apart in zip(sizes, dilation, strict=True)]

    def phase(axis: int, number: int) -> tuple[int, int, int]:
        """The first place of the kernel that is met, and the padding without zeros."""
        apart, low = dilation[axis], padding[axis][0]
        first = (low - number) % apart
        before = (low - number - first) // apart
        places = len(range(first, kernel.shape[axis], apart))
        return first, before, counts[axis] + places - 1 - images.shape[1 + axis] - before

    def part(row: int, column: int) -> jax.Array:
        (top, *rows), (left, *columns) = phase(0, row), phase(1, column)
        taps = kernel[top :: dilation[0], left :: dilation[1]]
        if not taps.size:
            return jnp.zeros((len(images), *counts, kernel.shape[-1]), images.dtype)
        edges = (rows[0], rows[1]), (columns[0], columns[1])
        cut = [(0, 0, 0), *((min(low, 0), min(high, 0), 0) for low, high in edges), (0, 0, 0)]
        seen = lax.pad(images, jnp.zeros((), images.dtype), cut)
        added = (max(rows[0], 0), max(rows[1], 0)), (max(columns[0], 0), max(columns[1], 0))
        return _over_devices((1, 1), added)(seen, taps)

    lines = [
        jnp.stack([part(row, column) for column in range(dilation[1])], 3)
        for row in range(dilation[0])
    ]
    found = jnp.stack(lines, 2)
    whole = (len(images), counts[0] * dilation[0], counts[1] * dilation[1], kernel.shape[-1])
    return found.reshape(whole)[:, : sizes[0], : sizes[1]]


@functools.cache
def _over_devices(strides: Pair, padding: Padding) -> partitioning.Local:
    name = '_'.join(['onednn_convolution', *map(str, (*strides, *padding[0], *padding[1]))])
    local = functools.partial(calls.convolve, strides=strides, padding=padding)
    return partitioning.split_over_images(name, local)
