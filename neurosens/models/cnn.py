"""Small configurable convolutional networks."""

import flax.linen as nn
from jaxtyping import Array, Float

from neurosens.models import common


class CNN(common.Classifier):
    """A plain convolutional network: convolutions, dense layers and the head.

    Layers: `normalize`, then `conv<k>`, `norm<k>` (with batch normalisation) and `act<k>` for
    each convolution, followed by the pool; the numbering continues with `dense<k>` and `act<k>`
    for each dense layer, then `head`. Kernels are He normal over the fan-in; convolutions have a
    bias unless batch normalisation follows.

    With features (32, 64) and hidden (200,) on 28 x 28 images this is the network that the
    adversarial-training literature calls LeNet-5 (Ding et al. 2019,
    https://arxiv.org/abs/1902.07623); with features (16, 32), kernel size 4, strides 2, padding
    1, no pool and hidden (100,) on 32 x 32 images it is CNN-A of the verification literature
    (Dathathri et al. 2020, https://arxiv.org/abs/2010.11645).

    Attributes:
        features: channels of each convolution; at least one.
        kernel_size: height and width of all kernels.
        strides: stride of all convolutions, or a tuple with one stride per convolution.
        padding: zeros on each side of each convolution's input, by default kernel_size // 2.
        pool: 'max', 'avg' or 'none': the 2 x 2 pool after each activation of a convolution.
        hidden: width of each dense layer before the head; may be empty.
        norm: 'batch' for batch normalisation after each convolution, or 'none'.
        dropout: rate of the dropout after each dense layer (`dropout<k>`); training then needs the
            random stream 'dropout'.
    """

    features: tuple[int, ...] = (32, 64)
    kernel_size: int = 3
    strides: int | tuple[int, ...] = 1
    padding: int | None = None
    pool: str = 'max'
    hidden: tuple[int, ...] = (128,)
    norm: str = 'none'
    dropout: float = 0.0

    def __post_init__(self) -> None:
        common.check_sizes('features', self.features)
        common.check_integer('kernel_size', self.kernel_size, 1)
        if not isinstance(self.strides, tuple):
            common.check_integer('strides', self.strides, 1)
        else:
            common.check_sizes('strides', self.strides)
            if len(self.strides) != len(self.features):
                raise ValueError(
                    f'strides {self.strides} has {len(self.strides)} values for '
                    f'{len(self.features)} convolutions: give one integer or one per convolution.'
                )
        if self.padding is not None:
            common.check_integer('padding', self.padding, 0)
        common.check_choice('pool', self.pool, ('max', 'avg', 'none'))
        common.check_sizes('hidden', self.hidden, may_be_empty=True)
        common.check_choice('norm', self.norm, ('none', 'batch'))
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f'dropout is {self.dropout!r}, but it must be at least 0 and less than 1.'
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels'], train: bool = False
    ) -> Float[Array, 'batch classes']:
        """Returns the logits.

        Args:
            x: images in [0, 1] of shape [batch, height, width, channels].
            train: whether batch normalisation uses and records the statistics of this batch, and
                whether dropout is active.

        Returns:
            Float32 logits of shape [batch, num_classes].

        Raises:
            ValueError: the images are too small for the strides and pools.
        """
        depth = len(self.features)
        strides = self.strides if isinstance(self.strides, tuple) else (self.strides,) * depth
        batch_norm = self.norm == 'batch'
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        for k, (features, stride) in enumerate(zip(self.features, strides, strict=True), start=1):
            x = common.conv(
                features,
                self.kernel_size,
                stride=stride,
                padding=self.kernel_size // 2 if self.padding is None else self.padding,
                use_bias=not batch_norm,
                kernel_init=common.HE_NORMAL_FAN_IN,
                name=f'conv{k}',
                dtype=self.dtype,
            )(x)
            if batch_norm:
                x = common.batch_norm(name=f'norm{k}', train=train, dtype=self.dtype)(x)
            x = common.Activation(self.activation, name=f'act{k}')(x)
            x = common.halve(x, self.pool)
        x = common.flatten(x)
        for k, width in enumerate(self.hidden, start=depth + 1):
            x = common.dense(width, name=f'dense{k}', dtype=self.dtype)(x)
            x = common.Activation(self.activation, name=f'act{k}')(x)
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train, name=f'dropout{k}')(x)
        return common.head(self.num_classes)(x)
