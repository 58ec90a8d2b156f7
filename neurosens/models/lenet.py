"""LeNet-5."""

import flax.linen as nn
from jaxtyping import Array, Float

from neurosens.models import common


class LeNet5(common.Classifier):
    """LeNet-5 in its common modern form.

    After LeCun et al. 1998, "Gradient-based learning applied to document recognition", with ReLU
    instead of the scaled tanh, plain 2 x 2 pools, all channels of the first map connected to the
    second, and a dense layer instead of the radial basis functions. The first convolution pads by
    2, so 28 x 28 images give the 5 x 5 x 16 features of the paper's 32 x 32.

    Layers: `normalize`, `conv1`, `act1`, `conv2`, `act2`, `dense3`, `act3`, `dense4`, `act4`,
    `head`. Kernels are He normal over the fan-in.

    Attributes:
        pool: 'max' or 'avg'.
    """

    pool: str = 'max'

    def __post_init__(self) -> None:
        common.check_choice('pool', self.pool, ('max', 'avg'))
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels'], train: bool = False
    ) -> Float[Array, 'batch classes']:
        """Returns the logits.

        Args:
            x: images in [0, 1] of shape [batch, height, width, channels].
            train: has no effect.

        Returns:
            Float32 logits of shape [batch, num_classes].

        Raises:
            ValueError: the images are too small.
        """
        del train
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        for k, (features, padding) in enumerate(((6, 2), (16, 0)), start=1):
            x = common.conv(
                features,
                5,
                padding=padding,
                use_bias=True,
                kernel_init=common.HE_NORMAL_FAN_IN,
                name=f'conv{k}',
                dtype=self.dtype,
            )(x)
            x = common.Activation(self.activation, name=f'act{k}')(x)
            x = common.halve(x, self.pool)
        x = common.flatten(x)
        for k, width in enumerate((120, 84), start=3):
            x = common.dense(width, name=f'dense{k}', dtype=self.dtype)(x)
            x = common.Activation(self.activation, name=f'act{k}')(x)
        return common.head(self.num_classes)(x)
