"""Wide residual networks."""

import flax.linen as nn
from jaxtyping import Array, Float

from neurosens.models import common
from neurosens.models.resnet import PreActBlock


class WideResNet(common.Classifier):
    """Wide ResNets, Zagoruyko & Komodakis 2016 (https://arxiv.org/abs/1605.07146), for CIFAR.

    Three stages of 16, 32 and 64 times `width` channels, without dropout inside blocks. Layers:
    `normalize`, `conv1`, `stage<i>_block<j>` (`PreActBlock`), `final_norm`, `final_act`, `head`.

    Attributes:
        depth: number of weight layers, 6n + 4 for n blocks per stage.
        width: widening factor.
        padding: of the convolutions of stride 2, 'symmetric' as in PyTorch, or 'same', behind only,
            as in networks of DeepMind (Gowal et al. 2020, https://arxiv.org/abs/2010.03593).
        remat: whether gradients recompute the activations inside blocks instead of storing them.
    """

    depth: int = 28
    width: int = 10
    padding: str = 'symmetric'
    remat: bool = False

    def __post_init__(self) -> None:
        common.check_depth(self.depth, 4)
        common.check_integer('width', self.width, 1)
        common.check_choice('padding', self.padding, ('symmetric', 'same'))
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels'], train: bool = False
    ) -> Float[Array, 'batch classes']:
        """Returns the logits.

        Args:
            x: images in [0, 1] of shape [batch, height, width, channels].
            train: whether batch normalisation uses and records the statistics of this batch.

        Returns:
            Float32 logits of shape [batch, num_classes].
        """
        block = common.rematerialized(PreActBlock, self.remat)
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        x = common.conv(16, 3, name='conv1', dtype=self.dtype)(x)
        sizes = ((self.depth - 4) // 6,) * 3
        widths = (16 * self.width, 32 * self.width, 64 * self.width)
        for name, features, stride in common.stage_blocks(sizes, widths):
            own = block(features, stride, self.activation, self.dtype, self.padding, name=name)
            x = own(x, train)
        x = common.batch_norm(name='final_norm', train=train, dtype=self.dtype)(x)
        x = common.Activation(self.activation, name='final_act')(x)
        return common.head(self.num_classes)(common.global_average_pool(x))
