"""Gradients with respect to kernels, as convolutions or as products of matrices.

A kernel's gradient is the sum over all pixels of the outer products of a window of the images and
the cotangent of its pixel: the windows, written out as one matrix, times the cotangents. Or it is
the convolution of all images by the cotangents, with images for input channels and one pixel for
each channel: no window is written out, only the images once with these axes the other way round.
"""

from __future__ import annotations

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from neurosens.onednn import calls, partitioning
from neurosens.onednn.calls import Padding, Pair

# Windows that stay in a core's cache until they are multiplied.
_CACHE_BYTES = 3 * 2**19
# Of convolutions: images at once, which fill a vector of AVX-512, and what these and their
# cotangents hold. Larger ones are cut into bands of rows.
_CHANNELS = 16
_BAND_BYTES = 2**24


class Windows(NamedTuple):
    """Which pixels of an image meet those of its cotangent.

    Attributes:
      steps: between positions of the kernel, the dilation of the convolution.
      spacing: of cotangents among pixels, the stride of the convolution.
      padding: of the images, at least 0 where pixels are not to be left out.
    """

    steps: Pair
    spacing: Pair
    padding: Padding

    def positions(self, images: jax.Array, cotangents: jax.Array) -> tuple[range, range]:
        """First rows and columns, in the padded images, of what each position meets."""
        rows, columns = (
            range(
                0,
                images.shape[1 + axis]
                + sum(self.padding[axis])
                - (cotangents.shape[1 + axis] - 1) * self.spacing[axis],
                self.steps[axis],
            )
            for axis in range(2)
        )
        return rows, columns


def kernel_gradient(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """Differentiates a convolution with respect to its kernel.

    Args:
      images: `[N, H, W, C]`.
      cotangents: of the convolution's result `[N, Y, X, D]`.
      windows: the convolution's parameters.

    Returns:
      Gradients `[I, J, C, D]`.
    """
    return _over_devices(windows)(images, cotangents)


@functools.cache
def _over_devices(windows: Windows) -> partitioning.Local:
    numbers = (*windows.steps, *windows.spacing, *windows.padding[0], *windows.padding[1])
    name = '_'.join(['onednn_kernel_gradient', *map(str, numbers)])
    return partitioning.summed_over_images(name, functools.partial(on_one_device, windows=windows))


def on_one_device(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """`kernel_gradient`, in the way that is the faster on this processor where it was measured."""
    rows, columns = windows.positions(images, cotangents)
    # Columns and channels are one axis of the convolution, whose stride is that of both.
    if has_avx512() and windows.steps[1] == 1 and len(rows) * len(columns) > 1:
        return convolutions(images, cotangents, windows)
    return products(images, cotangents, windows)


@functools.cache
def has_avx512() -> bool:
    """Whether the processor has the instructions of oneDNN's convolutions of any kernel size.

    Where that is not known, on other systems than Linux, it has not.
    """
    try:
        text = pathlib.Path('/proc/cpuinfo').read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith('flags')), '').split()
    return {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl'} <= set(flags)


def convolutions(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """`kernel_gradient` on one device, of some images and rows at once."""
    rows, columns = windows.positions(images, cotangents)
    count, height = len(images), cotangents.shape[1]
    parts = -(-count // _CHANNELS)
    together = -(-count // parts)
    size = (images.nbytes + cotangents.nbytes) // count * together
    band = -(-height // min(-(-size // _BAND_BYTES), height))
    bands = -(-height // band)
    edges, seen = windows.padding, images.shape[1]
    if bands > 1:
        # Not by the call itself, which would do it between two bands.
        seen = (band - 1) * windows.spacing[0] + rows[-1] + 1
        low = edges[0][0]
        high = (bands - 1) * band * windows.spacing[0] + seen - images.shape[1] - low
        images, edges = _pad_rows(images, low, high), ((0, 0), edges[1])
        cotangents = _pad_rows(cotangents, 0, bands * band - height)
    # Images of zeros add nothing.
    images, cotangents = (
        jnp.pad(array, ((0, parts * together - count), (0, 0), (0, 0), (0, 0)))
        for array in (images, cotangents)
    )

    def one(number: jax.Array | int) -> jax.Array:
        part, place = number // bands, number % bands
        start = part * together, place * band * windows.spacing[0], 0, 0
        of_images = lax.dynamic_slice(images, start, (together, seen, *images.shape[2:]))
        start = part * together, place * band, 0, 0
        others = lax.dynamic_slice(cotangents, start, (together, band, *cotangents.shape[2:]))
        return _convolve(of_images, others, windows._replace(padding=edges))

    shape = (len(rows), len(columns), images.shape[-1], cotangents.shape[-1])
    if parts * bands == 1:
        return _convolve(images, cotangents, windows).reshape(shape)
    zeros = jnp.zeros((1, shape[0], shape[1] * shape[2], shape[3]), images.dtype)
    found = lax.fori_loop(0, parts * bands, lambda number, total: total + one(number), zeros)
    return found.reshape(shape)


def _pad_rows(images: jax.Array, low: int, high: int) -> jax.Array:
    """With rows of zeros before and behind, or without some where negative."""
    edges = ((0, 0, 0), (low, high, 0), (0, 0, 0), (0, 0, 0))
    return lax.pad(images, jnp.zeros((), images.dtype), edges)


def _convolve(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """The gradient `[1, I, J C, D]`, in which two columns are C apart."""
    # Rows and columns that no window meets.
    cut = [(0, 0, 0), *((min(low, 0), min(high, 0), 0) for low, high in windows.padding), (0, 0, 0)]
    images = lax.pad(images, jnp.zeros((), images.dtype), cut)
    count, height, width, channels = images.shape
    rows, columns = ((max(low, 0), max(high, 0)) for low, high in windows.padding)
    return calls.convolve(
        images.reshape(count, -1).T.reshape(1, height, width * channels, count),
        cotangents,
        strides=(windows.steps[0], 1),
        padding=(rows, (columns[0] * channels, columns[1] * channels)),
        steps=(windows.spacing[0], windows.spacing[1] * channels),
        order='IHWO',
    )


def products(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """`kernel_gradient` on one device, of as many images at once as the cache holds."""
    rows, columns = windows.positions(images, cotangents)
    size = len(rows) * len(columns) * _position_bytes(images, cotangents)
    size += (images.nbytes + cotangents.nbytes) // len(images)
    parts = -(-len(images) // max(_CACHE_BYTES // size, 1))
    if parts == 1:
        return _multiply(images, cotangents, windows)
    count = -(-len(images) // parts)
    # Images of zeros add nothing.
    images, cotangents = (
        jnp.pad(array, ((0, parts * count - len(array)), (0, 0), (0, 0), (0, 0)))
        for array in (images, cotangents)
    )

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        one, other = (
            lax.dynamic_slice_in_dim(array, number * count, count) for array in (images, cotangents)
        )
        return total + _multiply(one, other, windows)

    shape = (len(rows), len(columns), images.shape[-1], cotangents.shape[-1])
    return lax.fori_loop(0, parts, add, jnp.zeros(shape, images.dtype))


def _multiply(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """`products` of images taken at once, in groups of positions that the cache holds."""
    rows, columns = windows.positions(images, cotangents)
    edges = ((0, 0, 0), *((*ends, 0) for ends in windows.padding), (0, 0, 0))
    # Kept apart from the windows: fused, padding would be done again for each position.
    padded = lax.optimization_barrier(lax.pad(images, jnp.zeros((), images.dtype), edges))
    flat = cotangents.reshape(-1, cotangents.shape[-1])
    spans = [(cotangents.shape[1 + axis] - 1) * windows.spacing[axis] + 1 for axis in range(2)]

    def met(row: int, column: int) -> jax.Array:
        ends = (len(images), row + spans[0], column + spans[1], images.shape[-1])
        return lax.slice(padded, (0, row, column, 0), ends, (1, *windows.spacing, 1))

    positions = [(row, column) for row in rows for column in columns]
    size = len(images) * _position_bytes(images, cotangents)
    groups = -(-len(positions) // max(_CACHE_BYTES // size, 1))
    count = -(-len(positions) // groups)
    found = []
    for start in range(0, len(positions), count):
        matrix = jnp.concatenate([met(*one) for one in positions[start : start + count]], -1)
        found.append(_product(matrix.reshape(len(flat), -1), flat))
    shape = (len(rows), len(columns), images.shape[-1], cotangents.shape[-1])
    return jnp.concatenate(found).reshape(shape)


def _product(windows: jax.Array, cotangents: jax.Array) -> jax.Array:
    """The transpose of `windows` times `cotangents`.

    oneDNN copies the matrix that it is to transpose: of the two the narrower one.
    """
    if cotangents.shape[1] < windows.shape[1]:
        return calls.transposed_product(cotangents, windows).T
    return calls.transposed_product(windows, cotangents)


def _position_bytes(images: jax.Array, cotangents: jax.Array) -> int:
    """What all pixels of one image hold that meet one position of the kernel."""
    _, height, width, _ = cotangents.shape
    return height * width * images.shape[-1] * images.dtype.itemsize
