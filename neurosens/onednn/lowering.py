"""How JAX lowers convolutions, and sums over channels, for a CPU."""

from __future__ import annotations

import functools
import itertools
import math
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import primitives
from jax.interpreters import mlir

from neurosens.models import channel_sums as sums
from neurosens.onednn import calls, convolution, kernel_gradient, one_pass
from neurosens.onednn.calls import Padding, Pair

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
# More positions of a kernel than this (11 x 11) would make long programs.
_MOST_POSITIONS = 121
# Input times output channels; XLA is faster than products of fewer.
_LEAST_CHANNELS = 32


def use_onednn() -> bool:
    """Convolves with oneDNN wherever JAX compiles for a CPU from now on, if it can.

    It changes how this process lowers `lax.conv_general_dilated`, for all of its code, and the sums
    of `neurosens.models.BatchNorm` while it trains, which then read images once: call it once,
    before anything is compiled. Results are the same to rounding.

    Some convolutions stay as they are: of other types than float32, in other than two spatial
    dimensions, of single pixels, grouped, of dilated kernels, and the gradients of kernels larger
    than 11 x 11 or of fewer than 32 pairs of channels. So do sums of other types, and of what is no
    batch of images, and all of these where `shard_map` leaves some mesh axes automatic.

    XLA cannot serialise what is lowered so, and may crash where it tries: JAX's persistent
    compilation cache is turned off, and `jax.export` must not be used.

    Returns:
      Whether it does: not on other processors than x86-64, with versions of jaxlib that this was
      not tested with, or where small convolutions differ from XLA's.
    """
    if _DEVICES_NEEDED is None:
        return False
    # Before the probe, which is such a program.
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _use_cache(False)
    if not _available():
        _use_cache(cached)
        return False
    by_convolution = mlir.lower_fun(_convolution, multiple_results=False)
    by_gradient = mlir.lower_fun(_kernel_gradient, multiple_results=False)

    def lower(ctx: Any, *arrays: Any, **params: Any) -> Any:
        rule = _XLA_RULE
        if not _is_mixed(ctx) and _is_plain(*ctx.avals_in, *ctx.avals_out, **params):
            if _is_convolution(*ctx.avals_in, **params):
                rule = by_convolution
            elif _is_kernel_gradient(*ctx.avals_in, **params):
                rule = by_gradient
        return rule(ctx, *arrays, **params)

    rules = {
        primitives.conv_general_dilated_p: lower,
        sums.squares_p: _sums_rule(one_pass.square_sums, sums.squares_by_formula),
        sums.products_p: _sums_rule(one_pass.product_sums, sums.products_by_formula),
    }
    for primitive, rule in rules.items():
        # Lowering for batches that are split over devices needs to know these.
        _DEVICES_NEEDED.add(primitive)
        mlir.register_lowering(primitive, rule, platform='cpu')
    return True


def _sums_rule(in_one_pass: Any, formula: Any) -> Any:
    """How sums are lowered: in one pass where they are of images in float32."""
    by_pass, by_formula = (
        mlir.lower_fun(function, multiple_results=True) for function in (in_one_pass, formula)
    )

    def lower(ctx: Any, *arrays: Any) -> Any:
        values = ctx.avals_in[0]
        plain = values.ndim == 4 and values.size and values.dtype == jnp.float32
        return (by_pass if plain and not _is_mixed(ctx) else by_formula)(ctx, *arrays)

    return lower


def _is_mixed(ctx: Any) -> bool:
    """Whether `shard_map` leaves some axes automatic.

    The partitioning of `custom_partitioning` knows all axes manual or none.
    """
    axes = ctx.module_context.axis_context
    manual: Any = getattr(axes, 'manual_axes', frozenset())
    return bool(manual) and manual != set(axes.mesh.axis_names)


def _use_cache(used: bool) -> None:
    """Whether what is compiled from now on goes through JAX's persistent cache, if there is one."""
    jax.config.update('jax_enable_compilation_cache', used)
    # JAX decides once, when it first compiles.
    compilation_cache.reset_cache()


@functools.cache
def _available() -> bool:
    if platform.machine() not in ('x86_64', 'AMD64'):
        return False
    if '.'.join(jaxlib.__version__.split('.')[:3]) not in _TESTED_JAXLIB:
        return False
    # Windows that leave no pixels over, as those of gradients never do.
    return _agrees_with_xla((1, 1), ((1, 1), (0, 1))) and _agrees_with_xla((2, 2), ((0, 2), (1, 1)))


def _agrees_with_xla(strides: Pair, padding: Padding) -> bool:
    draw = np.random.default_rng(0).normal
    images, kernel = np.float32(draw(size=(24, 7, 6, 3))), np.float32(draw(size=(3, 2, 3, 5)))
    by_xla = functools.partial(calls.convolve_by_xla, strides=strides, padding=padding)
    windows = kernel_gradient.Windows((1, 1), strides, padding)
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        expected = by_xla(images, kernel)
        cotangents = np.float32(draw(size=expected.shape))
        (slope,) = jax.vjp(functools.partial(by_xla, images), kernel)[1](cotangents)
        ours = jax.jit(functools.partial(calls.convolve, strides=strides, padding=padding))
        gradients = [kernel_gradient.products]
        if kernel_gradient.has_avx512():
            gradients.append(kernel_gradient.convolutions)
        slopes = [jax.jit(functools.partial(one, windows=windows)) for one in gradients]
        try:
            found = jax.device_get(
                (ours(images, kernel), *(one(images, cotangents) for one in slopes))
            )
        except jax.errors.JaxRuntimeError:
            return False
    return all(
        one.shape == other.shape and np.allclose(one, other, rtol=1e-4, atol=1e-4)
        for one, other in zip(found, (expected, *(slope for _ in slopes)), strict=True)
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
    found = convolution.convolve(
        images, kernel, strides=strides, dilation=dilation, padding=padding
    )
    return found.transpose(np.argsort(result_order))


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
    gradient = kernel_gradient.kernel_gradient
    if dilation == (1, 1):
        found = gradient(images, cotangents, kernel_gradient.Windows(steps, spacing, padding))
    else:
        # Zeros between pixels: seen from the pixels, these are the cotangents of a strided
        # convolution, whose images are the others, with the kernel's positions in reverse.
        top_left, bottom_right = (
            tuple(count - 1 - ends[side] for count, ends in zip(positions, padding, strict=True))
            for side in range(2)
        )
        edges = (top_left[0], bottom_right[0]), (top_left[1], bottom_right[1])
        found = gradient(cotangents, images, kernel_gradient.Windows(steps, dilation, edges))
        found = found[::-1, ::-1].swapaxes(2, 3)
    return found.transpose(np.argsort(result_order))


def _positions(images: Any, kernel: Any, **params: Any) -> Pair:
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
    """Whether a plain convolution is the gradient of a kernel that XLA is slower for."""
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
