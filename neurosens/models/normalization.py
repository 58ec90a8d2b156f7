"""Batch normalisation that reads less memory than Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


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
        dtype: type of the result, that of x and the variables where None; statistics are in it, but
            at least float32.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, '... channels']) -> Float[Array, '... channels']:
        """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias of each channel.

        Args:
            x: values of shape [..., channels], of a floating-point type.

        Returns:
            Normalised values of the same shape. The running averages, in the collection
            'batch_stats', move where `use_running_average` is False: make it mutable then.
        """
        channels = (x.shape[-1],)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, channels, jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, channels, jnp.float32)
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            axes = tuple(range(x.ndim - 1))
            values = x.astype(jnp.promote_types(self.dtype or x.dtype, jnp.float32))
            mean = values.mean(axes)
            # Rounding can take the difference below 0.
            var = jnp.maximum((values * values).mean(axes) - mean * mean, 0)
            if not self.is_initializing():
                kept = self.momentum
                running_mean.value = kept * running_mean.value + (1 - kept) * mean
                running_var.value = kept * running_var.value + (1 - kept) * var
        scale = self.param('scale', nn.initializers.ones, channels, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, channels, jnp.float32)
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        y = x * factor + (bias - mean * factor)
        return y.astype(self.dtype or jnp.result_type(x, scale))
