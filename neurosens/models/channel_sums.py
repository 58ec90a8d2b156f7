"""Two sums over everything but channels at once, and the linear map that they transpose.

To JAX the sums of a and of a * b are two reductions, each of which reads a from memory. As one
primitive, a backend can take them in one pass (`neurosens.onednn` does); so can the gradient of
`scale_shift`, whose transpose they are. Elsewhere all are what their formulas say. Squares have a
primitive of their own, whose one array is read once, and whose derivative is one product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

Pair = tuple[Array, Array]


def square_sums(
    x: Float[Array, '... channels'],
) -> tuple[Float[Array, ' channels'], Float[Array, ' channels']]:
    """Sums values and their squares over all axes but the last.

    Args:
        x: values of shape [..., channels], of a floating-point type.

    Returns:
        The sum of `x` and that of `x * x`, each of shape [channels].
    """
    of_x, of_squares = squares_p.bind(x) if _are_alike(x) else squares_by_formula(x)
    return of_x.reshape(-1), of_squares.reshape(-1)


def scale_shift(
    x: Float[Array, '... channels'],
    factor: Float[Array, ' channels'],
    shift: Float[Array, ' channels'],
) -> Float[Array, '... channels']:
    """Scales and shifts channels: `x * factor + shift`.

    Args:
        x: values of shape [..., channels], of a floating-point type.
        factor: of each channel, of the same type.
        shift: of each channel, of the same type.

    Returns:
        Values of the shape of `x`.
    """
    if _are_alike(x, factor, shift):
        return scale_shift_p.bind(x, factor, shift)
    return _scale_shift(x, factor, shift)


def squares_by_formula(x: Array) -> Pair:
    """`square_sums` as two reductions, whose results have the axes of `x`, of size 1."""
    return products_by_formula(x, x)


def products_by_formula(a: Array, b: Array) -> Pair:
    """Sums of `a` and of `a * b`, likewise."""
    axes = tuple(range(a.ndim - 1))
    return a.sum(axes, keepdims=True), (a * b).sum(axes, keepdims=True)


def _product_sums(a: Array, b: Array) -> Pair:
    return products_p.bind(a, b) if _are_alike(a, b) else products_by_formula(a, b)


def _scale_shift(x: Array, factor: Array, shift: Array) -> Array:
    return x * factor + shift


def _are_alike(*arrays: Array) -> bool:
    """Whether the primitives know the types of their results, which are those of `arrays`.

    Of mixed dtypes, of arrays that `shard_map` splits and others, and of explicit shardings they
    do not.
    """
    kinds = [jax.typeof(array) for array in arrays]
    if any(axis is not None for kind in kinds for axis in kind.sharding.spec):
        return False
    shape = {'shape': kinds[0].shape, 'sharding': kinds[0].sharding, 'weak_type': False}
    return len({kind.update(**shape) for kind in kinds}) == 1


# ------------------------------------------------------------------------------------- primitives

squares_p = Primitive('channel_square_sums')
products_p = Primitive('channel_product_sums')
scale_shift_p = Primitive('channel_scale_shift')
squares_p.multiple_results = products_p.multiple_results = True


def _define(primitive: Any, formula: Callable[..., Any], derivative: Callable[..., Any]) -> None:
    """Registers a primitive's values, types, lowering for all platforms, and transformations.

    Args:
        primitive: what is registered; of several results or of one.
        formula: the same function of other operations.
        derivative: its rule of forward mode.
    """

    def typed(x: Any, *others: Any) -> Any:
        del others
        if primitive.multiple_results:
            return [x.update(shape=(*[1] * (x.ndim - 1), x.shape[-1]), weak_type=False)] * 2
        return x.update(weak_type=False)

    def batched(arrays: Sequence[Array], axes: Sequence[int | None]) -> tuple[Any, Any]:
        results = jax.vmap(formula, tuple(axes))(*arrays)
        return results, (0,) * len(results) if primitive.multiple_results else 0

    primitive.def_impl(jax.jit(formula))
    primitive.def_abstract_eval(typed)
    lowering = mlir.lower_fun(formula, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering)
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = derivative


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def _squares_derivative(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    of_x, of_squares = _product_sums(dx, x)
    return squares_p.bind(x), [of_x, 2 * of_squares]


def _products_derivative(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Any, Any]:
    (a, b), (da, db) = primals, tangents
    along: list[Array] = []
    if not _is_zero(da):
        along = list(_product_sums(da, b))
    if not _is_zero(db):
        other = products_by_formula(a, db)[1]
        along = [along[0], along[1] + other] if along else [jnp.zeros_like(other), other]
    return products_p.bind(a, b), along


def _products_transpose(cotangents: Sequence[Any], a: Any, b: Array) -> tuple[Array, None]:
    # Linear in the first argument alone: derivatives along the other are another formula.
    shift, factor = (ad.instantiate_zeros(cotangent).reshape(-1) for cotangent in cotangents)
    return scale_shift(b, factor, shift), None


def _scale_shift_derivative(
    primals: Sequence[Array], tangents: Sequence[Any]
) -> tuple[Array, Array]:
    (x, factor, shift), (dx, *others) = primals, tangents
    parts = [] if _is_zero(dx) else [dx * factor]
    if not all(map(_is_zero, others)):
        parts.append(scale_shift(x, *map(ad.instantiate_zeros, others)))
    return scale_shift_p.bind(x, factor, shift), functools.reduce(jnp.add, parts)


def _scale_shift_transpose(
    cotangent: Any, x: Array, factor: Any, shift: Any
) -> tuple[None, Any, Any]:
    sums = _product_sums(ad.instantiate_zeros(cotangent), x)
    of_shift, of_factor = (total.reshape(-1) for total in sums)
    wanted = [ad.is_undefined_primal(argument) for argument in (factor, shift)]
    return None, of_factor if wanted[0] else None, of_shift if wanted[1] else None


_define(squares_p, squares_by_formula, _squares_derivative)
_define(products_p, products_by_formula, _products_derivative)
_define(scale_shift_p, _scale_shift, _scale_shift_derivative)
ad.primitive_transposes[products_p] = _products_transpose
ad.primitive_transposes[scale_shift_p] = _scale_shift_transpose
