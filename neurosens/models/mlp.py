"""Multilayer perceptrons."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from neurosens.models import common

INITIALIZATIONS = ('he', 'xavier')


class MLP(common.Classifier):
    """A multilayer perceptron on flattened images.

    Layers: `normalize`, then `dense<k>` and `act<k>` for each hidden layer, `head`.

    Attributes:
        hidden: width of each hidden layer; at least one.
        initialization: `'he'`, hidden kernels He normal over the fan-in, the head's LeCun normal,
            no biases; or `'xavier'`, all kernels Xavier uniform and biases uniform within one over
            the root of the fan-in (Hoffman et al. 2019).
    """

    hidden: tuple[int, ...] = (200, 200)
    initialization: str = 'he'

    def __post_init__(self) -> None:
        common.check_sizes('hidden', self.hidden)
        common.check_choice('initialization', self.initialization, INITIALIZATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels'], train: bool = False
    ) -> Float[Array, 'batch classes']:
        """Returns the logits.

        Args:
            x: images in [0, 1] of shape [batch, height, width, channels]; flattened in the order
                height, width, channels.
            train: has no effect.

        Returns:
            Float32 logits of shape [batch, num_classes].
        """
        del train
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        x = common.flatten(x)
        for k, features in enumerate(self.hidden, start=1):
            initial = self._initializers(x.shape[-1])
            x = common.dense(features, name=f'dense{k}', dtype=self.dtype, **initial)(x)
            x = common.Activation(self.activation, name=f'act{k}')(x)
        return common.head(self.num_classes, **self._initializers(x.shape[-1]))(x)

    def _initializers(self, inputs: int) -> dict[str, nn.initializers.Initializer]:
        return _xavier(inputs) if self.initialization == 'xavier' else {}


def _xavier(inputs: int) -> dict[str, nn.initializers.Initializer]:
    """Initialisers of a dense layer of so many inputs."""
    bound = 1 / math.sqrt(inputs)

    def bias(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {'kernel_init': nn.initializers.xavier_uniform(), 'bias_init': bias}
