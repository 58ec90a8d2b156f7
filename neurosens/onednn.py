"""Convolutions by oneDNN on a CPU, up to five times as fast as those that XLA chooses.

The x86 builds of jaxlib contain oneDNN, and their runtime executes the custom call
`__onednn$convolution`; only their compiler never emits it. `use_onednn` lets JAX emit it for the
convolutions of every program that it compiles for a CPU from then on, and for their gradients with
respect to images. The form of the call is internal to jaxlib, and a call of another form may end
the process. Therefore it is used only with versions that it was tested with, and only after small
convolutions have given what XLA gives.
"""

from __future__ import annotations

import functools
import itertools
import json
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
_TARGET = '__onednn$convolution'
_DIMENSION_NUMBERS = ('NHWC', 'HWIO', 'NHWC')

Padding = tuple[tuple[int, int], tuple[int, int]]
Strides = tuple[int, int]


def use_onednn() -> bool:
    """Convolves with oneDNN wherever JAX compiles for a CPU from now on, if it can.

    It changes how this process lowers `lax.conv_general_dilated`, for all of its code: call it
    once, before anything is compiled. Results are the same to rounding. Some convolutions stay as
    they are: of other types than float32, in other than two spatial dimensions, of single pixels,
    grouped or dilated, those of the gradients of kernels, and where `shard_map` leaves some mesh
    axes automatic. `jax.export` cannot serialise what is lowered so, and JAX's
    compilation cache cannot keep it: XLA fails at that, of which JAX warns as of a `MemoryError`.

    Returns:
      Whether it does: not on other processors than x86-64, with versions of jaxlib that this was
      not tested with, or where small convolutions differ from XLA's.
    """
    if _DEVICES_NEEDED is None or not _available():
        return False
    by_onednn = mlir.lower_fun(_convolution, multiple_results=False)

    def lower(ctx: Any, *arrays: Any, **params: Any) -> Any:
        manual: Any = getattr(ctx.module_context.axis_context, 'manual_axes', frozenset())
        # The partitioning of `custom_partitioning` knows all axes manual or none.
        mixed = manual and manual != set(ctx.module_context.axis_context.mesh.axis_names)
        possible = not mixed and _supports(*ctx.avals_in, **params)
        return (by_onednn if possible else _XLA_RULE)(ctx, *arrays, **params)

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
    return _agrees_with_xla((1, 1), ((1, 1), (0, 1))) and _agrees_with_xla((2, 1), ((0, 2), (1, 0)))


def _agrees_with_xla(strides: Strides, padding: Padding) -> bool:
    draw = np.random.default_rng(0).normal
    images, kernel = np.float32(draw(size=(2, 7, 6, 3))), np.float32(draw(size=(3, 2, 3, 5)))
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        try:
            ours = jax.jit(functools.partial(_call, strides=strides, padding=padding))
            found = np.asarray(ours(images, kernel))
        except jax.errors.JaxRuntimeError:
            return False
        expected = np.asarray(_by_xla(images, kernel, strides, padding))
    return found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-4)


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
    padding = tuple((int(low), int(high)) for low, high in params['padding'])
    rows, columns = params['window_strides']
    found = _split_over_devices((int(rows), int(columns)), padding)(images, kernel)
    return found.transpose(np.argsort(result_order))


def _supports(
    images: Any,
    kernel: Any,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    batch_group_count: int,
    preferred_element_type: Any,
    **rest: Any,
) -> bool:
    """Whether oneDNN can take a convolution, and is the faster one where it was measured."""
    del rest
    if images.ndim != 4 or not images.size or not kernel.size:
        return False
    types = {images.dtype, kernel.dtype, jnp.dtype(preferred_element_type or jnp.float32)}
    plain = {*lhs_dilation, *rhs_dilation, feature_group_count, batch_group_count} == {1}
    # The gradient of a kernel takes channels as its batch, and oneDNN has no fast routine for it.
    batch_first = dimension_numbers.lhs_spec[0] == dimension_numbers.out_spec[0] == 0
    single = max(kernel.shape[axis] for axis in dimension_numbers.rhs_spec[2:]) == 1
    return (
        types == {jnp.dtype(jnp.float32)}
        and plain
        and batch_first
        and not single
        and min(itertools.chain(*padding)) >= 0
    )


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

    def named(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return call(images, kernel)

    # JAX leaves the parameters of partitioned calls out of the keys of its compilation cache; the
    # name of a function is in them.
    named.__name__ = '_'.join(['onednn', *map(str, (*strides, *padding[0], *padding[1]))])
    return jax.jit(named)


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
    order = np.array((3, 2, 1, 0))
    rows_first = ir.DenseIntElementsAttr.get(order, type=ir.IndexType.get())  # type: ignore[call-overload]
    return stablehlo.CustomCallOp(
        [mlir.aval_to_ir_type(ctx.module_context, ctx.avals_out[0])],
        [images, kernel],
        call_target_name=ir.StringAttr.get(_TARGET),
        backend_config=ir.StringAttr.get(_config(strides, padding)),
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 2),
        operand_layouts=ir.ArrayAttr.get([rows_first] * 2),
        result_layouts=ir.ArrayAttr.get([rows_first]),
    ).results


mlir.register_lowering(_call_p, _lower, platform='cpu')
