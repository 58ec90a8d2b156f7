"""Input gradients of convolutions that stay fast inside loops on a CPU.

XLA:CPU runs the gradient of a convolution with respect to its input 10 to 15 times slower inside
`scan`, `fori_loop` or `while_loop` than outside: the kernel enters that gradient flipped and with
its channel axes swapped, and inside a loop body the compiler keeps this as an unusual layout that
its fast convolution routine does not accept (github.com/jax-ml/jax/issues/12868). Materialising the
flipped, swapped kernel behind an optimization barrier makes the gradient a plain convolution.

That routine is also slow where few channels come out, as in the gradient of an image: there a
matrix product gives what every output sends to the places of its window, and shifted sums collect
it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex
import numpy as np
from jax import lax
from jax.extend.core import primitives

from neurosens import pooling

F = TypeVar('F', bound=Callable[..., Any])

# Up to so many channels of the input and places of the window, a matrix product and shifted sums
# are faster than a transposed convolution: of 3 x 3, 1.7 to 2.7 times for 3 and for 1 channel, a
# third as fast for 16; of 5 x 5 and more, about half as fast for 3.
_FEW_CHANNELS, _FEW_PLACES = 4, 9


def with_fast_input_gradients(function: F) -> F:
    """Rewrites a function so that its reverse mode is fast on a CPU, also inside loops.

    Convolutions and max pooling get other gradients (`neurosens.pooling`).

    Values and reverse-mode gradients are the same to rounding, and so are reverse-mode gradients of
    these. Forward mode is not supported; leave functions that are differentiated in it as they are.
    On other platforms the function is returned as it is.

    Where parameters are differentiated too, rewrite a function of the whole batch and not one that
    is mapped over examples: kernel gradients of single examples become grouped convolutions, which
    XLA:CPU partitions wrongly when the batch is split over devices (so does `vmap(grad(loss))` over
    examples without this function).

    Args:
      function: a traceable function of array pytrees, such as the loss of one image.

    Returns:
      A function of the same signature.
    """
    return _rewritten(function, _convolution)


def with_fast_pooling(function: F) -> F:
    """Rewrites a function so that derivatives of its max pooling are fast on a CPU, in either mode.

    Args:
      function: as of `with_fast_input_gradients`; on other platforms it is returned as it is.

    Returns:
      A function of the same signature.
    """
    return _rewritten(function, None)


def _rewritten(function: F, convolution: Callable[..., Any] | None) -> F:
    if jax.default_backend() != 'cpu':
        return function

    @functools.wraps(function)
    def rewritten(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = _evaluate(convolution, closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten  # type: ignore[return-value]


def _evaluate(
    convolution: Callable[..., Any] | None, jaxpr: jex.Jaxpr, consts: Sequence[Any], *args: Any
) -> list[Any]:
    """Evaluates a jaxpr equation by equation, with max pooling replaced, and convolutions."""
    values: dict[jex.Var, Any] = {}
    values.update(zip(jaxpr.constvars, consts))
    values.update(zip(jaxpr.invars, args))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        primitive, params = equation.primitive, equation.params
        convolved = primitive is primitives.conv_general_dilated_p
        if convolution and convolved and params['batch_group_count'] == 1:
            outputs = [convolution(**params)(*inputs)]
        elif primitive is primitives.reduce_window_max_p and pooling.supports(*inputs, **params):
            outputs = [pooling.max_pool(**params)(*inputs)]
        elif primitive is primitives.jit_p:
            inner = params['jaxpr']
            outputs = _evaluate(convolution, inner.jaxpr, inner.consts, *inputs)
        elif primitive is primitives.remat_p:
            outputs = jax.checkpoint(
                functools.partial(_evaluate, convolution, params['jaxpr'], ()),
                prevent_cse=params['prevent_cse'],
                policy=params['policy'],
            )(*inputs)
        else:
            outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
            if not primitive.multiple_results:
                outputs = [outputs]
        values.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _convolution(**params: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`conv_general_dilated` with fixed parameters and the fast input gradient."""
    plain = functools.partial(primitives.conv_general_dilated_p.bind, **params)

    @jax.custom_vjp
    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return plain(images, kernel)

    def forward(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
        return plain(images, kernel), (images, kernel)

    def backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        images, kernel = residuals
        # Dead code unless the kernel is differentiated too.
        (kernel_gradient,) = jax.vjp(functools.partial(plain, images), kernel)[1](cotangent)
        return _input_gradient(plain, images, kernel, cotangent, **params), kernel_gradient

    convolve.defvjp(forward, backward)
    return convolve


def _input_gradient(
    plain: Callable[[jax.Array, jax.Array], jax.Array],
    images: jax.Array,
    kernel: jax.Array,
    cotangent: jax.Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    window_strides: tuple[int, ...],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    feature_group_count: int,
    **rest: Any,
) -> jax.Array:
    """The transposed convolution, with its kernel laid out like that of a forward one."""
    images_spec, kernel_spec, output_spec = dimension_numbers
    out_axis, in_axis, *window_axes = kernel_spec
    common = feature_group_count == 1 and {*lhs_dilation, *rhs_dilation} == {1}
    common &= min(itertools.chain(*padding), default=0) >= 0
    places = math.prod(kernel.shape[axis] for axis in window_axes)
    if common and images.shape[images_spec[1]] <= _FEW_CHANNELS and places <= _FEW_PLACES:
        collected = functools.partial(
            _collected,
            images.shape,
            dimension_numbers=dimension_numbers,
            window_strides=window_strides,
            padding=padding,
            precision=rest['precision'],
        )
        return _with_derivatives_of(plain, collected)(kernel, cotangent)
    flipped = lax.rev(kernel, window_axes)
    if feature_group_count > 1:
        flipped = _split_axis(flipped, out_axis, feature_group_count, in_axis)
    else:
        flipped = flipped.swapaxes(out_axis, in_axis)
    flipped = lax.optimization_barrier(flipped)

    def dilate(size: int, factor: int) -> int:
        return 0 if size == 0 else 1 + factor * (size - 1)

    sizes = zip(
        np.take(images.shape, images_spec[2:]),
        np.take(kernel.shape, window_axes),
        np.take(cotangent.shape, output_spec[2:]),
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
    )
    transposed_padding = []
    for image, window, output, stride, (low, _), spread, hole in sizes:
        before = dilate(window, hole) - low - 1
        total = dilate(image, spread) + dilate(window, hole) - 1
        transposed_padding.append((before, total - dilate(output, stride) - before))
    return lax.conv_general_dilated(
        cotangent,
        flipped,
        window_strides=lhs_dilation,
        padding=transposed_padding,
        lhs_dilation=window_strides,
        rhs_dilation=rhs_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(output_spec, kernel_spec, images_spec),
        feature_group_count=feature_group_count,
        precision=rest['precision'],
        preferred_element_type=images.dtype,
    )


def _with_derivatives_of(
    plain: Callable[[jax.Array, jax.Array], jax.Array],
    input_gradient: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """An input gradient, of a kernel and a cotangent, whose own gradients are convolutions.

    It is linear in both: the gradient with respect to the cotangent is the convolution of what
    comes in place of images, and that with respect to the kernel is the convolution's.
    """

    @jax.custom_vjp
    def gradient(kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
        return input_gradient(kernel, cotangent)

    def forward(kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, tuple]:
        return input_gradient(kernel, cotangent), (kernel, cotangent)

    def backward(residuals: tuple, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel, cotangent = residuals
        value, pull = jax.vjp(functools.partial(plain, images), kernel)
        return pull(cotangent)[0], value

    gradient.defvjp(forward, backward)
    return gradient


def _collected(
    shape: tuple[int, ...],
    kernel: jax.Array,
    cotangent: jax.Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    window_strides: tuple[int, ...],
    padding: Sequence[tuple[int, int]],
    precision: Any,
) -> jax.Array:
    """The input gradient as a matrix product over channels, and sums over places of windows."""
    images_spec, kernel_spec, output_spec = dimension_numbers
    # Batch, positions, channels; and window, input channels, output channels.
    cotangent = cotangent.transpose(output_spec[0], *output_spec[2:], output_spec[1])
    kernel = kernel.transpose(*kernel_spec[2:], kernel_spec[1], kernel_spec[0])
    *window, channels, _ = kernel.shape
    sent = lax.dot_general(
        cotangent,
        kernel,
        (((cotangent.ndim - 1,), (kernel.ndim - 1,)), ((), ())),
        precision=precision,
        preferred_element_type=cotangent.dtype,
    )
    batch, *positions = cotangent.shape[:-1]
    sizes = [shape[axis] for axis in images_spec[2:]]
    # The input with its padding, and further where the last window starts a stride later.
    covered = [
        max(low + size, stride * (count - 1) + width)
        for size, width, count, stride, (low, _) in zip(
            sizes, window, positions, window_strides, padding
        )
    ]
    places = tuple(range(1 + len(positions), 1 + 2 * len(positions)))
    total = jax.numpy.zeros((batch, *covered, channels), cotangent.dtype)
    for offset in itertools.product(*map(range, window)):
        part = sent
        for axis, place in zip(reversed(places), reversed(offset)):
            part = lax.index_in_dim(part, place, axis, keepdims=False)
        spread = [
            (place, end - place - stride * (count - 1) - 1, stride - 1)
            for place, end, count, stride in zip(offset, covered, positions, window_strides)
        ]
        zero = jax.numpy.zeros((), cotangent.dtype)
        total += lax.pad(part, zero, [(0, 0, 0), *spread, (0, 0, 0)])
    for axis, (size, (low, _)) in enumerate(zip(sizes, padding), start=1):
        total = lax.slice_in_dim(total, low, low + size, axis=axis)
    back = np.argsort([images_spec[0], *images_spec[2:], images_spec[1]])
    return total.transpose(*back)


def _split_axis(kernel: jax.Array, out_axis: int, groups: int, in_axis: int) -> jax.Array:
    """Swaps the channel axes of a grouped kernel: (groups x out, in) becomes (groups x in, out)."""
    kernel = jax.numpy.moveaxis(kernel, (out_axis, in_axis), (0, 1))
    out, inside, *window = kernel.shape
    kernel = kernel.reshape(groups, out // groups, inside, *window).swapaxes(1, 2)
    kernel = kernel.reshape(groups * inside, out // groups, *window)
    return jax.numpy.moveaxis(kernel, (0, 1), (out_axis, in_axis))
