"""Convolutions by oneDNN on a CPU, up to six times as fast as those that XLA chooses.

The x86 builds of jaxlib contain oneDNN, and their runtime executes the custom calls
`__onednn$convolution` and `__onednn$matmul`; only their compiler does not emit them. `use_onednn`
lets JAX emit the first for the convolutions of every program that it compiles for a CPU from then
on, and for their gradients with respect to images. oneDNN has no fast convolution for gradients
with respect to kernels: these become one product of matrices for each position of the kernel. The
form of the calls is internal to jaxlib, and a call of another form may end the process. Therefore
they are used only with versions that they were tested with, and only after small convolutions have
given what XLA gives.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import primitives
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

_DEVICES_NEEDED: set[Any] | None
_XLA_RULE: Any
try:
    # Not public: without them nothing here is used.
    from jax._src import dispatch

    _DEVICES_NEEDED = dispatch.prim_requires_devices_during_lowering
    _XLA_RULE = mlir._platform_specific_lowerings['cpu'][primitives.conv_general_dilated_p].rule
except (ImportError, AttributeError, KeyError):
    _DEVICES_NEEDED = _XLA_RULE = None

_TESTED_JAXLIB = ('0.10.2', '0.12.0')
_CONVOLUTION = '__onednn$convolution'
_PRODUCT = '__onednn$matmul'
_DIMENSION_NUMBERS = ('NHWC', 'HWIO', 'NHWC')
# More positions of a kernel than this (11 x 11) would make long programs.
_MOST_POSITIONS = 121
# Input times output channels; XLA is faster than products of fewer.
_LEAST_CHANNELS = 32
# Images and cotangents that stay in a core's cache while all positions pass over them.
_CACHE_BYTES = 2**19

Padding = tuple[tuple[int, int], tuple[int, int]]
Strides = tuple[int, int]


def use_onednn() -> bool:
    """Convolves with oneDNN wherever JAX compiles for a CPU from now on, if it can.

    It changes how this process lowers `lax.conv_general_dilated`, for all of its code: call it
    once, before anything is compiled. Results are the same to rounding. Some convolutions stay as
    they are: of other types than float32, in other than two spatial dimensions, of single pixels,
    grouped, of dilated kernels, the gradients of kernels larger than 11 x 11 or of fewer than 32
    pairs of channels, and where `shard_map` leaves some mesh axes automatic. `jax.export` cannot
    serialise what is lowered so, and JAX's compilation cache cannot keep it: XLA fails at that, of
    which JAX warns as of a `MemoryError`.

    Returns:
      Whether it does: not on other processors than x86-64, with versions of jaxlib that this was
      not tested with, or where small convolutions differ from XLA's.
    """
    if _DEVICES_NEEDED is None or not _available():
        return False
    convolution = mlir.lower_fun(_convolution, multiple_results=False)
    kernel_gradient = mlir.lower_fun(_kernel_gradient, multiple_results=False)

    def lower(ctx: Any, *arrays: Any, **params: Any) -> Any:
        manual: Any = getattr(ctx.module_context.axis_context, 'manual_axes', frozenset())
        # The partitioning of `custom_partitioning` knows all axes manual or none.
        mixed = manual and manual != set(ctx.module_context.axis_context.mesh.axis_names)
        rule = _XLA_RULE
        if not mixed and _is_plain(*ctx.avals_in, *ctx.avals_out, **params):
            if _is_convolution(*ctx.avals_in, **params):
                rule = convolution
            elif _is_kernel_gradient(*ctx.avals_in, **params):
                rule = kernel_gradient
        return rule(ctx, *arrays, **params)

    # Lowering for batches that are split over devices needs to know these.
    _DEVICES_NEEDED.add(primitives.conv_general_dilated_p)
    mlir.register_lowering(primitives.conv_general_dilated_p, lower, platform='cpu')
    return True


@functools.cache
def _available() -> bool:
    if platform.machine() not in ('x86_64', 'AMD64'):
        return False
    if '.'.join(jaxlib.__version__.split('.')[:3]) not in _TESTED_JAXLIB:
        return False
    # Windows that leave no pixels over, as those of gradients never do.
    return _agrees_with_xla((1, 1), ((1, 1), (0, 1))) and _agrees_with_xla((2, 1), ((0, 2), (1, 0)))


def _agrees_with_xla(strides: Strides, padding: Padding) -> bool:
    draw = np.random.default_rng(0).normal
    images, kernel = np.float32(draw(size=(2, 7, 6, 3))), np.float32(draw(size=(3, 2, 3, 5)))
    by_xla = functools.partial(_by_xla, strides=strides, padding=padding)
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        expected = by_xla(images, kernel)
        cotangents = np.float32(draw(size=expected.shape))
        (slope,) = jax.vjp(functools.partial(by_xla, images), kernel)[1](cotangents)
        ours = jax.jit(functools.partial(_call, strides=strides, padding=padding))
        products = functools.partial(_products, steps=(1, 1), spacing=strides, padding=padding)
        try:
            found = ours(images, kernel), jax.jit(products)(images, cotangents)
            found = jax.device_get(found)
        except jax.errors.JaxRuntimeError:
            return False
    return all(
        one.shape == other.shape and np.allclose(one, other, rtol=1e-4, atol=1e-4)
        for one, other in zip(found, (expected, slope), strict=True)
    )


def _by_xla(images: Any, kernel: Any, strides: Strides, padding: Padding) -> jax.Array:
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=_DIMENSION_NUMBERS
    )


def _convolution(images: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """`conv_general_dilated` with its parameters, by oneDNN."""
    numbers = params['dimension_numbers']
    # Channels last, and the input channels of the kernel before its output channels.
    images_order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    kernel_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    result_order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    images, kernel = images.transpose(images_order), kernel.transpose(kernel_order)
    strides, dilation, padding = _integers(params, 'window_strides', 'lhs_dilation', 'padding')
    if dilation == (1, 1):
        found = _split_over_devices(strides, padding)(images, kernel)
    else:
        found = _by_phases(images, kernel, dilation, padding)
    return found.transpose(np.argsort(result_order))


def _by_phases(
    images: jax.Array, kernel: jax.Array, dilation: Strides, padding: Padding
) -> jax.Array:
    """Convolves images that have zeros between their pixels, as gradients of strided ones do.

    A pixel of the result meets pixels of the images only at every so many places of the kernel.
    These are the same for all that are `dilation` apart, which are one convolution without zeros.

    Args:
      images: without the zeros `[N, H, W, C]`.
      kernel: `[I, J, C, D]`.
      dilation: distance of two pixels among the zeros.
      padding: of the images with the zeros, at least 0.

    Returns:
      `[N, Y, X, D]`.
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
        return _split_over_devices((1, 1), added)(seen, taps)

    lines = [
        jnp.stack([part(row, column) for column in range(dilation[1])], 3)
        for row in range(dilation[0])
    ]
    found = jnp.stack(lines, 2)
    whole = (len(images), counts[0] * dilation[0], counts[1] * dilation[1], kernel.shape[-1])
    return found.reshape(whole)[:, : sizes[0], : sizes[1]]


def _kernel_gradient(images: jax.Array, cotangents: jax.Array, **params: Any) -> jax.Array:
    """`conv_general_dilated` with its parameters, where it sums over images, by oneDNN."""
    numbers = params['dimension_numbers']
    images_order = (numbers.lhs_spec[1], *numbers.lhs_spec[2:], numbers.lhs_spec[0])
    cotangents_order = (numbers.rhs_spec[1], *numbers.rhs_spec[2:], numbers.rhs_spec[0])
    result_order = (*numbers.out_spec[2:], *numbers.out_spec[:2])
    positions = _positions(images, cotangents, **params)
    images, cotangents = images.transpose(images_order), cotangents.transpose(cotangents_order)
    names = ('window_strides', 'rhs_dilation', 'lhs_dilation', 'padding')
    steps, spacing, dilation, padding = _integers(params, *names)
    if dilation == (1, 1):
        found = _summed_over_devices(steps, spacing, padding)(images, cotangents)
    else:
        # Zeros between pixels: seen from the pixels, these are the cotangents of a strided
        # convolution, whose images are the others, with the kernel's positions in reverse.
        edges = tuple(
            (count - 1 - low, count - 1 - high)
            for count, (low, high) in zip(positions, padding, strict=True)
        )
        found = _summed_over_devices(steps, dilation, edges)(cotangents, images)
        found = found[::-1, ::-1].swapaxes(2, 3)
    return found.transpose(np.argsort(result_order))


def _positions(images: Any, kernel: Any, **params: Any) -> tuple[int, int]:
    """Rows and columns of the result of a convolution."""
    numbers = params['dimension_numbers']
    found = []
    for axis in range(2):
        size = (images.shape[numbers.lhs_spec[2 + axis]] - 1) * params['lhs_dilation'][axis] + 1
        window = (kernel.shape[numbers.rhs_spec[2 + axis]] - 1) * params['rhs_dilation'][axis] + 1
        moves = size + sum(params['padding'][axis]) - window
        found.append(int(moves // params['window_strides'][axis] + 1))
    return found[0], found[1]


def _integers(params: dict[str, Any], *names: str) -> Any:
    """Pairs of numbers, or of pairs, as hashable integers."""
    return (
        tuple(
            tuple(map(int, entry)) if isinstance(entry, Sequence) else int(entry)
            for entry in params[name]
        )
        for name in names
    )


def _is_plain(
    images: Any,
    kernel: Any,
    result: Any,
    *,
    feature_group_count: int,
    batch_group_count: int,
    lhs_dilation: Sequence[int],
    window_strides: Sequence[int],
    rhs_dilation: Sequence[int],
    preferred_element_type: Any,
    **rest: Any,
) -> bool:
    """Whether neither of the calls below has to know more of a convolution than they do."""
    del rest
    types = {images.dtype, kernel.dtype, jnp.dtype(preferred_element_type or jnp.float32)}
    return (
        images.ndim == 4
        and bool(images.size and kernel.size and result.size)
        and types == {jnp.dtype(jnp.float32)}
        and feature_group_count == batch_group_count == 1
        and ({*lhs_dilation} == {1} or {*window_strides, *rhs_dilation} == {1})
    )


def _is_convolution(
    images: Any,
    kernel: Any,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    **rest: Any,
) -> bool:
    """Whether oneDNN can take a plain convolution, and is the faster one where it was measured."""
    del images, rest
    single = max(kernel.shape[axis] for axis in dimension_numbers.rhs_spec[2:]) == 1
    return (
        _is_batch_first(dimension_numbers)
        and {*rhs_dilation} == {1}
        and not (single and {*lhs_dilation} == {1})
        and min(itertools.chain(*padding)) >= 0
    )


def _is_kernel_gradient(images: Any, kernel: Any, **params: Any) -> bool:
    """Whether a plain convolution is the gradient of a kernel that products are faster for."""
    numbers = params['dimension_numbers']
    channels = images.shape[numbers.lhs_spec[0]] * kernel.shape[numbers.rhs_spec[0]]
    return (
        not _is_batch_first(numbers)
        and math.prod(_positions(images, kernel, **params)) <= _MOST_POSITIONS
        and channels >= _LEAST_CHANNELS
    )


def _is_batch_first(numbers: lax.ConvDimensionNumbers) -> bool:
    # The gradient of a kernel takes channels as its batch.
    return numbers.lhs_spec[0] == numbers.out_spec[0] == 0


@functools.cache
def _split_over_devices(strides: Strides, padding: Padding) -> Any:
    """The call as a jitted function whose partitioning keeps batches split."""
    local = functools.partial(_call, strides=strides, padding=padding)

    @custom_partitioning
    def call(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return local(images, kernel)

    def shardings(mesh: Mesh, shapes: Any) -> tuple[NamedSharding, tuple[NamedSharding, ...]]:
        spec = shapes[0].sharding.spec
        split = NamedSharding(mesh, PartitionSpec(spec[0] if spec else None, None, None, None))
        return split, (split, NamedSharding(mesh, PartitionSpec()))

    def partition(mesh: Mesh, shapes: Any, result: Any) -> tuple[Any, ...]:
        del result
        return mesh, local, *shardings(mesh, shapes)

    call.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, shapes, result: shardings(mesh, shapes)[0],
        sharding_rule='n h w c, i j c d -> n y x d',
        need_replication_factors=('h', 'w', 'c', 'i', 'j', 'd', 'y', 'x'),
    )
    return _named('convolution', call, (*strides, *padding[0], *padding[1]))


@functools.cache
def _summed_over_devices(steps: Strides, spacing: Strides, padding: Padding) -> Any:
    """The gradient of a kernel as a jitted function that adds up what split batches give."""
    local = functools.partial(_products, steps=steps, spacing=spacing, padding=padding)

    @custom_partitioning
    def call(images: jax.Array, cotangents: jax.Array) -> jax.Array:
        return local(images, cotangents)

    def partition(mesh: Mesh, shapes: Any, result: Any) -> tuple[Any, ...]:
        del result
        spec = shapes[0].sharding.spec
        axes = spec[0] if spec else None
        split = NamedSharding(mesh, PartitionSpec(axes, None, None, None))

        def summed(images: jax.Array, cotangents: jax.Array) -> jax.Array:
            own = local(images, cotangents)
            return own if axes is None else lax.psum(own, axes)

        return mesh, summed, NamedSharding(mesh, PartitionSpec()), (split, split)

    call.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, shapes, result: NamedSharding(
            mesh, PartitionSpec()
        ),
        sharding_rule='n h w c, n y x d -> i j c d',
        reduction_factors=('n',),
        need_replication_factors=('h', 'w', 'c', 'y', 'x', 'd', 'i', 'j'),
    )
    return _named('kernel_gradient', call, (*steps, *spacing, *padding[0], *padding[1]))


def _named(name: str, call: Any, numbers: tuple[int, ...]) -> Any:
    """A call with two arguments, jitted under a name that has its parameters.

    JAX leaves the parameters of partitioned calls out of the keys of its compilation cache; the
    name of a function is in them.
    """

    def named(images: jax.Array, other: jax.Array) -> jax.Array:
        return call(images, other)

    named.__name__ = '_'.join(['onednn', name, *map(str, numbers)])
    return jax.jit(named)


def _products(
    images: jax.Array,
    cotangents: jax.Array,
    *,
    steps: Strides,
    spacing: Strides,
    padding: Padding,
) -> jax.Array:
    """The gradient of a kernel, one product for each of its positions.

    Args:
      images: `[N, H, W, C]`.
      cotangents: of the convolution's result `[N, Y, X, D]`.
      steps: between positions of the kernel, the dilation of the convolution.
      spacing: of cotangents among pixels, the stride of the convolution.
      padding: of the images.

    Returns:
      Gradients `[I, J, C, D]`.
    """
    sums = functools.partial(_sums, steps=steps, spacing=spacing, padding=padding)
    count = _images_at_once(len(images), (images.nbytes + cotangents.nbytes) // len(images))
    if count == len(images):
        return sums(images, cotangents)

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        parts = (
            lax.dynamic_slice_in_dim(array, number * count, count) for array in (images, cotangents)
        )
        return total + sums(*parts)

    shape = jax.eval_shape(sums, images, cotangents)
    return lax.fori_loop(0, len(images) // count, add, jnp.zeros(shape.shape, shape.dtype))


def _images_at_once(images: int, size: int) -> int:
    """Images whose bytes stay in the cache; all of them where no such number divides them."""
    most = max(_CACHE_BYTES // size, 1)
    largest = max(count for count in range(1, min(most, images) + 1) if images % count == 0)
    return largest if 2 * largest > most else images


def _sums(
    images: jax.Array,
    cotangents: jax.Array,
    *,
    steps: Strides,
    spacing: Strides,
    padding: Padding,
) -> jax.Array:
    """`_products` of images that are taken at once."""
    edges = ((0, 0, 0), (*padding[0], 0), (*padding[1], 0), (0, 0, 0))
    # Kept apart from the products: fused, padding would be done again for each of them.
    padded = lax.optimization_barrier(lax.pad(images, jnp.zeros((), images.dtype), edges))
    windows = [(cotangents.shape[1 + axis] - 1) * spacing[axis] + 1 for axis in range(2)]
    rows, columns = (
        range(0, padded.shape[1 + axis] - windows[axis] + 1, steps[axis]) for axis in range(2)
    )
    flat = cotangents.reshape(-1, cotangents.shape[-1])

    def product(row: int, column: int) -> jax.Array:
        ends = (len(images), row + windows[0], column + windows[1], images.shape[-1])
        part = lax.slice(padded, (0, row, column, 0), ends, (1, *spacing, 1))
        return _product_p.bind(part.reshape(-1, images.shape[-1]), flat)

    return jnp.stack([jnp.stack([product(row, column) for column in columns]) for row in rows])


_product_p = jex.Primitive('onednn_product')


@_product_p.def_abstract_eval
def _product_shape(left: Any, right: Any) -> Any:
    return left.update(shape=(left.shape[1], right.shape[1]), dtype=left.dtype)


def _lower_product(ctx: Any, left: Any, right: Any) -> Any:
    transposed = {'transpose_a': True, 'transpose_b': False}
    config = {'outer_dimension_partitions': [], 'onednn_matmul_config': transposed}
    return _custom_call(ctx, _PRODUCT, json.dumps(config), left, right)


mlir.register_lowering(_product_p, _lower_product, platform='cpu')

_call_p = jex.Primitive('onednn_convolution')


def _call(images: jax.Array, kernel: jax.Array, *, strides: Strides, padding: Padding) -> jax.Array:
    return _call_p.bind(images, kernel, strides=strides, padding=padding)


@_call_p.def_abstract_eval
def _shape(images: Any, kernel: Any, *, strides: Strides, padding: Padding) -> Any:
    found = jax.eval_shape(
        functools.partial(_by_xla, strides=strides, padding=padding),
        *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (images, kernel)),
    )
    return images.update(shape=found.shape, dtype=found.dtype)


def _config(strides: Strides, padding: Padding) -> str:
    """What the call is to do, as the JSON of XLA's message; numbers are strings there."""
    images = {'batch_dim': '0', 'spatial_dims': ['1', '2'], 'feature_dim': '3'}
    kernel = {'spatial_dims': ['0', '1'], 'input_feature_dim': '2', 'output_feature_dim': '3'}
    (top, bottom), (left, right) = padding
    window = {
        'strides': [str(stride) for stride in strides],
        'pad_left': [str(top), str(left)],
        'pad_right': [str(bottom), str(right)],
        'window_dilations': ['1', '1'],
    }
    config = {
        'dims': '4',
        'input': {'data': images},
        'kernel': {'filter': kernel},
        'output': {'data': images},
        'window': window,
        'feature_groups': '1',
    }
    return json.dumps({'outer_dimension_partitions': [], 'onednn_conv_config': config})


def _lower(ctx: Any, images: Any, kernel: Any, *, strides: Strides, padding: Padding) -> Any:
    return _custom_call(ctx, _CONVOLUTION, _config(strides, padding), images, kernel)


def _custom_call(ctx: Any, target: str, config: str, *arrays: Any) -> Any:
    """A call on arrays of one rank, whose last axis is contiguous, as is that of the result."""
    order = np.arange(ctx.avals_out[0].ndim)[::-1].copy()
    rows_first = ir.DenseIntElementsAttr.get(order, type=ir.IndexType.get())  # type: ignore[call-overload]
    return stablehlo.CustomCallOp(
        [mlir.aval_to_ir_type(ctx.module_context, ctx.avals_out[0])],
        list(arrays),
        call_target_name=ir.StringAttr.get(target),
        backend_config=ir.StringAttr.get(config),
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 2),
        operand_layouts=ir.ArrayAttr.get([rows_first] * len(arrays)),
        result_layouts=ir.ArrayAttr.get([rows_first]),
    ).results


mlir.register_lowering(_call_p, _lower, platform='cpu')
