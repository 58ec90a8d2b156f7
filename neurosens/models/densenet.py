"""Densely connected networks."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from neurosens.models import common


class DenseBlock(nn.Module):
    """One bottleneck layer of a DenseNet, appending `growth_rate` channels to its input.

    Layers: `norm1`, `act1`, `conv1` (1 x 1), `norm2`, `act2`, `conv2` (3 x 3).

    Attributes:
        growth_rate: number of new channels; four times as many inside.
        activation: name of the nonlinearity.
        dtype: type of the computation.
        newest_first: whether the new channels come before those of the input.
    """

    growth_rate: int
    activation: str
    dtype: DTypeLike
    newest_first: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns features of shape [batch, height, width, channels + growth_rate]."""
        y = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(x)
        y = common.Activation(self.activation, name='act1')(y)
        y = common.conv(4 * self.growth_rate, 1, name='conv1', dtype=self.dtype)(y)
        y = common.batch_norm(name='norm2', train=train, dtype=self.dtype)(y)
        y = common.Activation(self.activation, name='act2')(y)
        y = common.conv(self.growth_rate, 3, name='conv2', dtype=self.dtype)(y)
        return jnp.concatenate([y, x] if self.newest_first else [x, y], axis=-1)


class Transition(nn.Module):
    """Halves channels by a 1 x 1 convolution and positions by a 2 x 2 average pool.

    Layers: `norm1`, `act1`, `conv1`.

    Attributes:
        activation: name of the nonlinearity.
        dtype: type of the computation.
    """

    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns features of shape [batch, height // 2, width // 2, channels // 2]."""
        y = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(x)
        y = common.Activation(self.activation, name='act1')(y)
        y = common.conv(x.shape[-1] // 2, 1, name='conv1', dtype=self.dtype)(y)
        return common.average_pool(y, 2, 2)


class DenseNet(common.Classifier):
    """DenseNet-BC, Huang et al. 2016 (https://arxiv.org/abs/1608.06993), compression 0.5.

    Layers:
    `normalize`, `conv1` (with the 'imagenet' stem also `norm1`, `act1`), `stage<i>_block<j>`
    (`DenseBlock`), `transition<i>` after every stage but the last (`Transition`), `final_norm`,
    `final_act`, `head`.

    Attributes:
        stage_sizes: number of blocks of each stage.
        growth_rate: channels that each block appends; the stem has twice as many.
        stem: 'cifar' (3 x 3 convolution) or 'imagenet' (7 x 7 convolution of stride 2,
            normalisation, activation and 3 x 3 max-pool of stride 2).
        newest_first: whether each block puts its new channels before the existing ones, as networks
            for CIFAR of the robustness library do, and not after them. A network is the same in
            either order, its weights are not.
        remat: whether gradients recompute the activations inside blocks instead of storing them.
    """

    stage_sizes: tuple[int, ...] = (6, 12, 24, 16)
    growth_rate: int = 32
    stem: str = 'cifar'
    newest_first: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        common.check_sizes('stage_sizes', self.stage_sizes)
        common.check_integer('growth_rate', self.growth_rate, 1)
        common.check_choice('stem', self.stem, ('cifar', 'imagenet'))
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

        Raises:
            ValueError: the images are too small for the pools.
        """
        block = common.rematerialized(DenseBlock, self.remat)
        features = 2 * self.growth_rate
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        if self.stem == 'cifar':
            x = common.conv(features, 3, name='conv1', dtype=self.dtype)(x)
        else:
            x = common.conv(features, 7, stride=2, name='conv1', dtype=self.dtype)(x)
            x = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(x)
            x = common.Activation(self.activation, name='act1')(x)
            x = common.max_pool(x, 3, 2, padding=1)
        for i, size in enumerate(self.stage_sizes, start=1):
            for j in range(1, size + 1):
                x = block(
                    self.growth_rate,
                    self.activation,
                    self.dtype,
                    self.newest_first,
                    name=f'stage{i}_block{j}',
                )(x, train)
            if i < len(self.stage_sizes):
                x = Transition(self.activation, self.dtype, name=f'transition{i}')(x, train)
        x = common.batch_norm(name='final_norm', train=train, dtype=self.dtype)(x)
        x = common.Activation(self.activation, name='final_act')(x)
        return common.head(self.num_classes)(common.global_average_pool(x))
