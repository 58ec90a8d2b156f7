"""Batch normalisation that reads less memory than Flax's."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from neurosens.models.channel_sums import scale_shift, square_sums


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse_deviation(
    variance: Float[Array, ' channels'], epsilon: float
) -> Float[Array, ' channels']:
    """1 / sqrt(variance + epsilon), of variances that rounding may have taken below 0.

    The derivative is that without the limit, also where it holds: variances that should be 0 are
    told apart by nothing but rounding. It is written as a product, which XLA fuses with what it is
    used for; that of `lax.rsqrt` is a quotient, which takes a loop of its own.

    Args:
        variance: of each channel, of shape [channels].
        epsilon: added to the variance.

    Returns:
        Inverse deviations of shape [channels].
    """
    return jax.lax.rsqrt(jnp.maximum(variance, 0) + epsilon)


@inverse_deviation.defjvp
def _inverse_deviation_derivative(
    epsilon: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    inverse = inverse_deviation(primals[0], epsilon)
    return inverse, -0.5 * inverse * inverse * inverse * tangents[0]


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as one factor and one shift per channel.

    Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167), algorithms 1 and 2, with the biased
    variance in the running average too.

    `flax.linen.BatchNorm` with the same variables, and to rounding the same results. That keeps
    x - mean for its derivative and sums three arrays there, this keeps x and sums two, which on a
    CPU is read from memory and decides the time.

    Attributes:
        use_running_average: normalise by the running averages, and leave them as they are.
        momentum: share of the old running averages in the new ones.
        epsilon: added to the variance.
        dtype: type of the result, that of x and the variables where None; everything is computed
            in it, but at least in float32.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, '... channels'], use_running_average: bool | None = None
    ) -> Float[Array, '... channels']:
        """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias of each channel.

        Args:
            x: values of shape [..., channels], of a floating-point type.
            use_running_average: in place of the attribute, where not None.

        Returns:
            Normalised values of the same shape. The running averages, in the collection
            'batch_stats', move where `use_running_average` is False: make it mutable then.
        """
        channels = (x.shape[-1],)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, channels, jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, channels, jnp.float32)
        values = x.astype(jnp.promote_types(self.dtype or x.dtype, jnp.float32))
        scale = self.param('scale', nn.initializers.ones, channels, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, channels, jnp.float32)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average:
            # Operations known to all who look into the programs of networks.
            factor = jax.lax.rsqrt(running_var.value + self.epsilon) * scale
            y = values * factor + (bias - running_mean.value * factor)
        else:
            total, squares = square_sums(values)
            count = math.prod(x.shape[:-1])
            mean = total / count
            var = squares / count - mean * mean
            if not self.is_initializing():
                kept = self.momentum
                running_mean.value = kept * running_mean.value + (1 - kept) * mean
                running_var.value = kept * running_var.value + (1 - kept) * jnp.maximum(var, 0)
            factor = inverse_deviation(var, self.epsilon) * scale
            y = scale_shift(values, factor, bias - mean * factor)
        return y.astype(self.dtype or jnp.result_type(x, scale))
