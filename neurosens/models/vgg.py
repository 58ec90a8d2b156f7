"""VGG networks."""

import flax.linen as nn
from jaxtyping import Array, Float

from neurosens.models import common

STAGE_FEATURES = (64, 128, 256, 512, 512)


class VGG(common.Classifier):
    """VGG, Simonyan & Zisserman 2014 (https://arxiv.org/abs/1409.1556), with batch normalisation.

    Layers: `normalize`, then `conv<i>_<j>`, `norm<i>_<j>` (with batch normalisation) and
    `act<i>_<j>` for convolution j of stage i, with a 2 x 2 max-pool after each stage; with the
    'imagenet' classifier `dense6`, `act6`, `dense7`, `act7`; `head`. Convolutions have biases;
    their kernels are He normal over the fan-out, those of dense layers over the fan-in.

    Attributes:
        stage_sizes: number of convolutions of each stage; at most five stages.
        classifier: 'cifar' (the mean over positions, of which 32 x 32 images leave one, goes to
            the head) or 'imagenet' (adaptive 7 x 7 average pool, flattened in the order height,
            width, channels, and two dense layers of 4096).
        dropout: rate of the dropout after each dense layer of the 'imagenet' classifier
            (`dropout6`, `dropout7`); training then needs the random stream 'dropout'.
        norm: 'batch' for batch normalisation after each convolution, or 'none', as in the paper.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
    classifier: str = 'cifar'
    dropout: float = 0.0
    norm: str = 'batch'

    def __post_init__(self) -> None:
        common.check_stages(self.stage_sizes, len(STAGE_FEATURES))
        common.check_choice('classifier', self.classifier, ('cifar', 'imagenet'))
        common.check_choice('norm', self.norm, ('batch', 'none'))
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f'dropout is {self.dropout!r}, but it must be at least 0 and less than 1.'
            )
        if self.dropout and self.classifier == 'cifar':
            raise ValueError(
                f"dropout is {self.dropout!r}, but the classifier 'cifar' has no dense layers to "
                "drop: use 0 or the classifier 'imagenet'."
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
            ValueError: the images are too small for the pools.
        """
        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        for i, (size, features) in enumerate(zip(self.stage_sizes, STAGE_FEATURES), start=1):
            for j in range(1, size + 1):
                x = common.conv(features, 3, use_bias=True, name=f'conv{i}_{j}', dtype=self.dtype)(
                    x
                )
                if self.norm == 'batch':
                    x = common.batch_norm(name=f'norm{i}_{j}', train=train, dtype=self.dtype)(x)
                x = common.Activation(self.activation, name=f'act{i}_{j}')(x)
            x = common.max_pool(x, 2, 2)
        if self.classifier == 'cifar':
            return common.head(self.num_classes)(common.global_average_pool(x))
        x = common.flatten(common.adaptive_average_pool(x, 7))
        for k in (6, 7):
            x = common.dense(4096, name=f'dense{k}', dtype=self.dtype)(x)
            x = common.Activation(self.activation, name=f'act{k}')(x)
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train, name=f'dropout{k}')(x)
        return common.head(self.num_classes)(x)
