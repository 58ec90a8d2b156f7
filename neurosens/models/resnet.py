"""Residual networks: CIFAR ResNets, ResNet-18 and ResNet-50, and pre-activation ResNets."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from neurosens.models import common

STAGE_FEATURES = (64, 128, 256, 512)


def padded_shortcut(x: Array, features: int, stride: int) -> Array:
    """The parameter-free "option A" shortcut: subsample positions, pad channels with zeros.

    The zero channels are split equally before and after the existing ones, as in the PyTorch port
    https://github.com/akamaster/pytorch_resnet_cifar10; the paper does not say where they go.

    Args:
        x: features of shape [batch, height, width, channels].
        features: number of channels of the result, at least those of `x`.
        stride: step of the subsampling, which starts at the first position.

    Returns:
        Features of shape [batch, ceil(height / stride), ceil(width / stride), features].
    """
    missing = features - x.shape[-1]
    before = missing // 2
    subsampled = x[:, ::stride, ::stride]
    return jnp.pad(subsampled, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2015, https://arxiv.org/abs/1512.03385).

    Layers: `conv1`, `norm1`, `act1`, `conv2`, `norm2`, where the projection changes the shape
    also `shortcut_conv`, `shortcut_norm`, and after the addition `act2`.

    Attributes:
        features: number of output channels.
        stride: stride of the first convolution and of the shortcut.
        activation: name of the nonlinearity.
        dtype: type of the computation.
        shortcut: 'projection' (1 x 1 convolution and batch normalisation) or 'pad'
            (`padded_shortcut`), where the block changes the shape.
    """

    features: int
    stride: int
    activation: str
    dtype: DTypeLike
    shortcut: str = 'projection'

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns features of shape [batch, height', width', features]."""
        y = common.conv(self.features, 3, stride=self.stride, name='conv1', dtype=self.dtype)(x)
        y = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(y)
        y = common.Activation(self.activation, name='act1')(y)
        y = common.conv(self.features, 3, name='conv2', dtype=self.dtype)(y)
        y = common.batch_norm(name='norm2', train=train, dtype=self.dtype)(y)
        if y.shape != x.shape:
            if self.shortcut == 'pad':
                x = padded_shortcut(x, self.features, self.stride)
            else:
                x = _projection(x, self.features, self.stride, train, self.dtype)
        return common.Activation(self.activation, name='act2')(x + y)


class BottleneckBlock(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut (https://arxiv.org/abs/1512.03385).

    The stride sits in the 3 x 3 convolution ("version 1.5"), not in the first 1 x 1 convolution
    of the paper.

    Layers: `conv1`, `norm1`, `act1`, `conv2`, `norm2`, `act2`, `conv3`, `norm3`, where the
    projection changes the shape also `shortcut_conv`, `shortcut_norm`, and after the addition
    `act3`.

    Attributes:
        features: number of channels inside the block; four times as many leave it.
        stride: stride of the 3 x 3 convolution and of the shortcut.
        activation: name of the nonlinearity.
        dtype: type of the computation.
    """

    features: int
    stride: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns features of shape [batch, height', width', 4 * features]."""
        y = common.conv(self.features, 1, name='conv1', dtype=self.dtype)(x)
        y = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(y)
        y = common.Activation(self.activation, name='act1')(y)
        y = common.conv(self.features, 3, stride=self.stride, name='conv2', dtype=self.dtype)(y)
        y = common.batch_norm(name='norm2', train=train, dtype=self.dtype)(y)
        y = common.Activation(self.activation, name='act2')(y)
        y = common.conv(4 * self.features, 1, name='conv3', dtype=self.dtype)(y)
        y = common.batch_norm(name='norm3', train=train, dtype=self.dtype)(y)
        if y.shape != x.shape:
            x = _projection(x, 4 * self.features, self.stride, train, self.dtype)
        return common.Activation(self.activation, name='act3')(x + y)


def _projection(x: Array, features: int, stride: int, train: bool, dtype: DTypeLike) -> Array:
    x = common.conv(features, 1, stride=stride, name='shortcut_conv', dtype=dtype)(x)
    return common.batch_norm(name='shortcut_norm', train=train, dtype=dtype)(x)


class PreActBlock(nn.Module):
    """A pre-activation block of two 3 x 3 convolutions (https://arxiv.org/abs/1603.05027).

    Where the shape changes, the shortcut is a 1 x 1 convolution of the activated input, without
    normalisation; elsewhere it is the raw input.

    Layers: `norm1`, `act1`, `conv1`, `norm2`, `act2`, `conv2`, where the shape changes also
    `shortcut_conv`.

    Attributes:
        features: number of output channels.
        stride: stride of the first convolution and of the shortcut.
        activation: name of the nonlinearity.
        dtype: type of the computation.
        padding: of a first convolution of stride 2, 'symmetric' or 'same' (of even sizes only
            behind).
    """

    features: int
    stride: int
    activation: str
    dtype: DTypeLike
    padding: str = 'symmetric'

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns features of shape [batch, height', width', features]."""
        y = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(x)
        y = common.Activation(self.activation, name='act1')(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = common.conv(
                self.features, 1, stride=self.stride, name='shortcut_conv', dtype=self.dtype
            )(y)
        behind = self.padding == 'same' and self.stride == 2
        y = common.conv(
            self.features,
            3,
            stride=self.stride,
            padding='SAME' if behind else None,
            name='conv1',
            dtype=self.dtype,
        )(y)
        y = common.batch_norm(name='norm2', train=train, dtype=self.dtype)(y)
        y = common.Activation(self.activation, name='act2')(y)
        y = common.conv(self.features, 3, name='conv2', dtype=self.dtype)(y)
        return x + y


class CIFARResNet(common.Classifier):
    """The CIFAR ResNets of He et al. 2015 (https://arxiv.org/abs/1512.03385), section 4.2.

    Three stages of 16, 32 and 64 channels with parameter-free shortcuts ("option A", see
    `padded_shortcut`), then the mean over positions. Layers: `normalize`, `conv1`, `norm1`,
    `act1`, `stage<i>_block<j>` (`BasicBlock`), `head`.

    Attributes:
        depth: number of weight layers, 6n + 2 for n blocks per stage.
        remat: whether gradients recompute the activations inside blocks instead of storing them.
    """

    depth: int = 20
    remat: bool = False

    def __post_init__(self) -> None:
        common.check_depth(self.depth, 2)
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
        block = common.rematerialized(BasicBlock, self.remat)
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        x = common.conv(16, 3, name='conv1', dtype=self.dtype)(x)
        x = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(x)
        x = common.Activation(self.activation, name='act1')(x)
        sizes = ((self.depth - 2) // 6,) * 3
        for name, features, stride in common.stage_blocks(sizes, (16, 32, 64)):
            x = block(features, stride, self.activation, self.dtype, shortcut='pad', name=name)(
                x, train
            )
        return common.head(self.num_classes)(common.global_average_pool(x))


class ResNet(common.Classifier):
    """ResNets with projection shortcuts, He et al. 2015 (https://arxiv.org/abs/1512.03385).

    Layers: `normalize`, `conv1`, `norm1`, `act1`, `stage<i>_block<j>` (`BasicBlock` or
    `BottleneckBlock`), `head`. Bottleneck blocks are of "version 1.5" with either stem.

    Attributes:
        stage_sizes: number of blocks of each stage; at most four stages.
        block: 'basic' or 'bottleneck'.
        stem: 'cifar' (3 x 3 convolution of stride 1) or 'imagenet' (7 x 7 convolution of stride 2
            and 3 x 3 max-pool of stride 2).
        remat: whether gradients recompute the activations inside blocks instead of storing them.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    block: str = 'basic'
    stem: str = 'cifar'
    remat: bool = False

    def __post_init__(self) -> None:
        common.check_stages(self.stage_sizes, len(STAGE_FEATURES))
        common.check_choice('block', self.block, ('basic', 'bottleneck'))
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
        """
        kind = BasicBlock if self.block == 'basic' else BottleneckBlock
        block = common.rematerialized(kind, self.remat)
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        kernel_size, stride = (3, 1) if self.stem == 'cifar' else (7, 2)
        x = common.conv(64, kernel_size, stride=stride, name='conv1', dtype=self.dtype)(x)
        x = common.batch_norm(name='norm1', train=train, dtype=self.dtype)(x)
        x = common.Activation(self.activation, name='act1')(x)
        if self.stem == 'imagenet':
            x = common.max_pool(x, 3, 2, padding=1)
        for name, features, stride in common.stage_blocks(self.stage_sizes, STAGE_FEATURES):
            x = block(features, stride, self.activation, self.dtype, name=name)(x, train)
        return common.head(self.num_classes)(common.global_average_pool(x))


class PreActResNet(common.Classifier):
    """Pre-activation ResNets, He et al. 2016 (https://arxiv.org/abs/1603.05027), for CIFAR.

    The version of the robust-training literature (Rice et al. 2020,
    https://arxiv.org/abs/2002.11569): after the last block come a normalisation and an
    activation, so the pooled features are post-activation. Layers: `normalize`, `conv1`,
    `stage<i>_block<j>` (`PreActBlock`), `final_norm`, `final_act`, `head`.

    Attributes:
        stage_sizes: number of blocks of each stage; at most four stages.
        remat: whether gradients recompute the activations inside blocks instead of storing them.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    remat: bool = False

    def __post_init__(self) -> None:
        common.check_stages(self.stage_sizes, len(STAGE_FEATURES))
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
        x = common.conv(64, 3, name='conv1', dtype=self.dtype)(x)
        for name, features, stride in common.stage_blocks(self.stage_sizes, STAGE_FEATURES):
            x = block(features, stride, self.activation, self.dtype, name=name)(x, train)
        x = common.batch_norm(name='final_norm', train=train, dtype=self.dtype)(x)
        x = common.Activation(self.activation, name='final_act')(x)
        return common.head(self.num_classes)(common.global_average_pool(x))
