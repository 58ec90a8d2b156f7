"""Sums in twice the working precision, and scaling that does not round."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def centred_sums(
    values: Float[Array, 'batch positions neurons'],
    valid: Bool[Array, 'batch positions neurons'],
    minimum: Float[Array, ' neurons'],
    maximum: Float[Array, ' neurons'],
    scale: Int[Array, ' neurons'],
) -> tuple[Array, Array, Array]:
    """Sums deviations and their squares in twice the working precision.

    Error-free transformations make every term a pair of numbers. The products whose rounding would
    matter are exact, so compilers that contract `a * b + c` do no harm.

    Args:
      values: finite values, 0 where not valid `[B, P, N]`.
      valid: which of them count `[B, P, N]`.
      minimum: least valid value `[N]`; above the maximum where there is none.
      maximum: largest valid value `[N]`.
      scale: exponent of a power of two above every magnitude, int32 `[N]`.

    Returns:
      All divided by `2**scale`: the middle of the range, from which deviations are taken, `[N]`;
      the sum of the deviations and that of their squares, as rounded sums and remainders `[2, N]`.
    """
    # The middle of the range is exactly the same on any number of devices.
    some = minimum <= maximum
    middle = (times_power(minimum, -scale) + times_power(maximum, -scale)) * 0.5
    shift = jnp.where(some, middle, 0)
    deviation, rest = _two_sum(times_power(values, -scale), -shift)
    deviation, rest = jnp.where(valid, deviation, 0), jnp.where(valid, rest, 0)
    high = _leading_half(deviation)
    low = deviation - high
    square, square_rest = _two_sum(high * high, 2 * high * low)
    square_rest += low * low + 2 * deviation * rest
    zero = jnp.zeros((), values.dtype)
    sums = lax.reduce(
        (deviation, rest, square, square_rest), (zero,) * 4, _add_two_pairs, dimensions=(0, 1)
    )
    return shift, jnp.stack(sums[:2]), jnp.stack(sums[2:])


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its exact error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _add_pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    total, error = _two_sum(a[0], b[0])
    error += a[1] + b[1]
    # Renormalized, or the remainders of a long sum would themselves be summed with rounding.
    normal = total + error
    return normal, error - (normal - total)


def _add_two_pairs(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return (*_add_pairs(a[:2], b[:2]), *_add_pairs(a[2:], b[2:]))  # type: ignore[arg-type]


def _leading_half(x: Array) -> Array:
    """The leading half of the significand: its square, and its product with the rest, are exact."""
    kind = jnp.finfo(x.dtype)
    integer = jnp.dtype(f'int{kind.bits}')
    bits = lax.bitcast_convert_type(x, integer)
    kept = jnp.array(-(1 << (kind.nmant // 2 + 1)), integer)
    return lax.bitcast_convert_type(bits & kept, x.dtype)


def times_power(x: Array, exponent: Array) -> Array:
    """`x * 2**exponent`; exact unless it leaves the range of normal numbers."""
    kind = jnp.finfo(x.dtype)
    integer = jnp.dtype(f'int{kind.bits}')

    def power(exponent: Array) -> Array:
        # Built from bits, as exponential functions round.
        return lax.bitcast_convert_type(
            (exponent.astype(integer) + (kind.maxexp - 1)) << kind.nmant, x.dtype
        )

    # Each half is a normal number even where the whole power is none.
    half = exponent >> 1
    return x * power(half) * power(exponent - half)
