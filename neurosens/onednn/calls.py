"""The custom calls of jaxlib's runtime that oneDNN answers, as functions of arrays."""

from __future__ import annotations

import functools
import json
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex
import numpy as np
from jax import lax
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = tuple[Pair, Pair]
Numbers: TypeAlias = tuple[int, ...]
Edges: TypeAlias = tuple[Pair, ...]

_convolution_p = jex.Primitive('onednn_convolution')
_product_p = jex.Primitive('onednn_product')


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    *,
    strides: Numbers,
    padding: Edges,
    steps: Numbers = (1, 1),
    order: str = 'HWIO',
) -> jax.Array:
    """Convolves, in one call.

    Args:
      images: `[N, H, W, C]`, or `[N, D, H, W, C]` with an axis more along which the kernel slides.
      kernel: `[I, J, C, O]`, or in another order.
      strides: along rows and columns, before them along that axis if there is one, like all that
        follows.
      padding: of the images, at least 0.
      steps: between positions of the kernel, its dilation.
      order: of the kernel's axes by JAX's letters, of which the last is the contiguous one.

    Returns:
      `[N, Y, X, O]`, or `[N, Z, Y, X, O]`.
    """
    options = {'strides': strides, 'padding': padding, 'steps': steps, 'order': order}
    return _convolution_p.bind(images, kernel, **options)


def convolve_by_xla(
    images: Any,
    kernel: Any,
    *,
    strides: Numbers,
    padding: Edges,
    steps: Numbers = (1, 1),
    order: str = 'HWIO',
) -> jax.Array:
    """What `convolve` computes, by XLA."""
    axes = f'N{_spatial(order)}C'
    numbers = (axes, order, axes)
    return lax.conv_general_dilated(
        images, kernel, strides, padding, rhs_dilation=steps, dimension_numbers=numbers
    )


def transposed_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiplies the transpose of `left` `[R, A]` with `right` `[R, B]`, to `[A, B]`."""
    return _product_p.bind(left, right)


@_convolution_p.def_abstract_eval
def _convolved(images: Any, kernel: Any, **options: Any) -> Any:
    found = jax.eval_shape(
        functools.partial(convolve_by_xla, **options),
        *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (images, kernel)),
    )
    return images.update(shape=found.shape, dtype=found.dtype)


@_product_p.def_abstract_eval
def _multiplied(left: Any, right: Any) -> Any:
    return left.update(shape=(left.shape[1], right.shape[1]), dtype=left.dtype)


def _spatial(order: str) -> str:
    """Letters of the axes that a kernel slides along."""
    return 'DHW' if 'D' in order else 'HW'


def convolution_config(
    strides: Numbers, padding: Edges, steps: Numbers, order: str
) -> dict[str, Any]:
    """What a convolution is to do, as XLA's message has it; numbers are strings there."""
    axes = _spatial(order)
    images = {
        'batch_dim': '0',
        'spatial_dims': [str(axis) for axis in range(1, len(axes) + 1)],
        'feature_dim': str(len(axes) + 1),
    }
    kernel = {
        'spatial_dims': [str(order.index(axis)) for axis in axes],
        'input_feature_dim': str(order.index('I')),
        'output_feature_dim': str(order.index('O')),
    }
    window = {
        'strides': [str(stride) for stride in strides],
        'pad_left': [str(low) for low, _ in padding],
        'pad_right': [str(high) for _, high in padding],
        'window_dilations': [str(step) for step in steps],
    }
    return {
        'dims': str(len(order)),
        'input': {'data': images},
        'kernel': {'filter': kernel},
        'output': {'data': images},
        'window': window,
        'feature_groups': '1',
    }


def _lower_convolution(ctx: Any, images: Any, kernel: Any, **options: Any) -> Any:
    config = {'onednn_conv_config': convolution_config(**options)}
    return _custom_call(ctx, '__onednn$convolution', config, images, kernel)


def _lower_product(ctx: Any, left: Any, right: Any) -> Any:
    config = {'onednn_matmul_config': {'transpose_a': True, 'transpose_b': False}}
    return _custom_call(ctx, '__onednn$matmul', config, left, right)


def _custom_call(ctx: Any, target: str, config: dict[str, Any], *arrays: Any) -> Any:
    """A call on arrays of one rank, whose last axis is contiguous, as is that of the result."""
    order = np.arange(ctx.avals_out[0].ndim)[::-1].copy()
    rows_first = ir.DenseIntElementsAttr.get(order, type=ir.IndexType.get())  # type: ignore[call-overload]
    text = json.dumps({'outer_dimension_partitions': [], **config})
    return stablehlo.CustomCallOp(
        [mlir.aval_to_ir_type(ctx.module_context, ctx.avals_out[0])],
        list(arrays),
        call_target_name=ir.StringAttr.get(target),
        backend_config=ir.StringAttr.get(text),
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 2),
        operand_layouts=ir.ArrayAttr.get([rows_first] * len(arrays)),
        result_layouts=ir.ArrayAttr.get([rows_first]),
    ).results


mlir.register_lowering(_convolution_p, _lower_convolution, platform='cpu')
mlir.register_lowering(_product_p, _lower_product, platform='cpu')
