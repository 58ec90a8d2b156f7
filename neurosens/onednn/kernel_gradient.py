"""Gradients with respect to kernels, as convolutions or as products of matrices.

A kernel's gradient is the sum over all pixels of the outer products of a window of the images and
the cotangent of its pixel: the windows, written out as one matrix, times the cotangents. Or it is
the convolution of all images by the cotangents, with images for input channels and for positions of
an axis of their own, and one pixel for each channel: no window is written out, only the images once
with these axes the other way round.
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
# Of convolutions: images that are input channels to oneDNN, images at once, and what those hold
# with their cotangents. Larger ones are taken in bands of rows.
_CHANNELS, IMAGES = 16, 32
_BAND_BYTES = 2**25


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
    if has_avx512() and _convolves(images, cotangents, windows):
        return convolutions(images, cotangents, windows)
    return products(images, cotangents, windows)


def _convolves(images: jax.Array, cotangents: jax.Array, windows: Windows) -> bool:
    """Whether `convolutions` can do it, and there is more than one position."""
    rows, columns = windows.positions(images, cotangents)
    for axis in range(2):
        low, high = windows.padding[axis]
        size = images.shape[1 + axis] + min(low, 0) + min(high, 0)
        count, spacing = cotangents.shape[1 + axis], windows.spacing[axis]
        # Of a result that is made from padding alone oneDNN may know nothing.
        if size <= 0 or max(low, high) > (count - 1) * spacing or (count > 1 and spacing > size):
            return False
    # Columns and channels are one axis of the convolution, whose stride is that of both.
    return windows.steps[1] == 1 and len(rows) * len(columns) > 1


@functools.cache
def has_avx512() -> bool:
    """Whether the processor has the instructions that oneDNN's convolutions here are fast with.

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
    whole, rest = divmod(len(images), IMAGES)

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        one, other = (
            lax.dynamic_slice_in_dim(array, number * IMAGES, IMAGES)
            for array in (images, cotangents)
        )
        return total + _in_bands(one, other, windows)

    shape = (len(rows), len(columns), images.shape[-1], cotangents.shape[-1])
    if whole + bool(rest) == 1:
        return _in_bands(images, cotangents, windows)
    found = lax.fori_loop(0, whole, add, _zeros(images, shape))
    return found + _in_bands(images[-rest:], cotangents[-rest:], windows) if rest else found


def _in_bands(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """`convolutions` of a few images."""
    rows, columns = windows.positions(images, cotangents)
    height, spacing = cotangents.shape[1], windows.spacing[0]
    band = -(-height // min(-(-(images.nbytes + cotangents.nbytes) // _BAND_BYTES), height))
    bands = -(-height // band)
    if bands == 1:
        return _convolve(images, cotangents, windows)
    # Padding of rows is not left to a call, which would do it between two bands.
    seen = (band - 1) * spacing + rows[-1] + 1
    low = windows.padding[0][0]
    high = (bands - 1) * band * spacing + seen - images.shape[1] - low
    images = _pad_rows(images, low, high)
    cotangents = _pad_rows(cotangents, 0, bands * band - height)
    inside = windows._replace(padding=((0, 0), windows.padding[1]))

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        start = number * band
        of_images = lax.dynamic_slice_in_dim(images, start * spacing, seen, 1)
        others = lax.dynamic_slice_in_dim(cotangents, start, band, 1)
        return total + _convolve(of_images, others, inside)

    shape = (len(rows), len(columns), images.shape[-1], cotangents.shape[-1])
    return lax.fori_loop(0, bands, add, _zeros(images, shape))


def _zeros(like: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros that vary over the axes of a mesh as `like` does, for a loop to add to."""
    return lax.full_like(like, 0, shape=shape)


def _pad_rows(images: jax.Array, low: int, high: int) -> jax.Array:
    """With rows of zeros before and behind, or without some where negative."""
    edges = ((0, 0, 0), (low, high, 0), (0, 0, 0), (0, 0, 0))
    return lax.pad(images, jnp.zeros((), images.dtype), edges)


def _convolve(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """The gradient `[I, J, C, D]`, in one call.

    Blocks of images are an axis that is summed over like rows and columns, the images of a block
    are input channels.
    """
    # Rows and columns that no window meets.
    cut = [(0, 0, 0), *((min(low, 0), min(high, 0), 0) for low, high in windows.padding), (0, 0, 0)]
    images = lax.pad(images, jnp.zeros((), images.dtype), cut)
    count, height, width, channels = images.shape
    rows, columns = ((max(low, 0), max(high, 0)) for low, high in windows.padding)
    blocks = -(-count // _CHANNELS)
    several = -(-count // blocks)
    images, cotangents = (_fill(array, blocks * several) for array in (images, cotangents))
    turned = images.reshape(blocks, several, height * width * channels).swapaxes(1, 2)
    # Of two columns of the result pixels are `channels` apart.
    found = calls.convolve(
        turned.reshape(1, blocks, height, width * channels, several),
        cotangents.reshape(blocks, several, *cotangents.shape[1:]),
        strides=(1, windows.steps[0], 1),
        padding=((0, 0), rows, (columns[0] * channels, columns[1] * channels)),
        steps=(1, windows.spacing[0], windows.spacing[1] * channels),
        order='DIHWO',
    )
    return found.reshape(found.shape[2], -1, channels, found.shape[-1])


def products(images: jax.Array, cotangents: jax.Array, windows: Windows) -> jax.Array:
    """`kernel_gradient` on one device, of as many images at once as the cache holds."""
    rows, columns = windows.positions(images, cotangents)
    size = len(rows) * len(columns) * _position_bytes(images, cotangents)
    size += (images.nbytes + cotangents.nbytes) // len(images)
    parts = -(-len(images) // max(_CACHE_BYTES // size, 1))
    if parts == 1:
        return _multiply(images, cotangents, windows)
    count = -(-len(images) // parts)
    images, cotangents = (_fill(array, parts * count) for array in (images, cotangents))

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        one, other = (
            lax.dynamic_slice_in_dim(array, number * count, count) for array in (images, cotangents)
        )
        return total + _multiply(one, other, windows)

    shape = (len(rows), len(columns), images.shape[-1], cotangents.shape[-1])
    return lax.fori_loop(0, parts, add, _zeros(images, shape))


def _fill(images: jax.Array, count: int) -> jax.Array:
    """So many images: those of zeros behind the others add nothing to a gradient."""
    return jnp.pad(images, ((0, count - len(images)), (0, 0), (0, 0), (0, 0)))


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
