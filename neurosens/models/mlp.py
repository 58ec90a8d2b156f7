"""Multilayer perceptrons."""

import flax.linen as nn
from jaxtyping import Array, Float

from neurosens.models import common


class MLP(common.Classifier):
    """A multilayer perceptron on flattened images.

    Layers: `normalize`, then `dense<k>` and `act<k>` for each hidden layer, `head`. Hidden
    kernels are He normal over the fan-in.

    Attributes:
        hidden: width of each hidden layer; at least one.
    """

    hidden: tuple[int, ...] = (200, 200)

    def __post_init__(self) -> None:
        common.check_sizes('hidden', self.hidden)
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
            x = common.dense(features, name=f'dense{k}', dtype=self.dtype)(x)
            x = common.Activation(self.activation, name=f'act{k}')(x)
        return common.head(self.num_classes)(x)
