"""Pieces shared by the models: input normalisation, activations, layers, pooling and checks."""

import functools
import numbers
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from neurosens.models.normalization import BatchNorm


@jax.custom_jvp
def relu(x: Float[Array, '...']) -> Float[Array, '...']:
    """max(x, 0), computed once.

    On a CPU XLA computes `jax.nn.relu` again wherever its result is used, from everything that it
    was made of: behind the sum of a residual block, from the sums of all blocks before it in the
    stage. A choice between two arrays it keeps; the derivative asks for the sign of what is kept.

    Args:
        x: values of any shape; NaN stays NaN.

    Returns:
        Values of the same shape and type; its derivative is 0 at 0.
    """
    return jnp.where(x <= 0, 0, x)


@relu.defjvp
def _relu_derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = types.MappingProxyType(
    {
        'relu': relu,
        # The exact Gaussian error function, not the tanh approximation.
        'gelu': functools.partial(nn.gelu, approximate=False),
        'silu': nn.silu,
        'tanh': nn.tanh,
        'softplus': nn.softplus,
        'leaky_relu': nn.leaky_relu,
        'elu': nn.elu,
        'identity': lambda x: x,
    }
)

LECUN_NORMAL = nn.initializers.lecun_normal()
HE_NORMAL_FAN_IN = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
HE_NORMAL_FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')

Block = TypeVar('Block', bound=type[nn.Module])


def check_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f'{option} is {value!r}, but it must be one of {", ".join(choices)}.')


def check_integer(option: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if not _is_integer(value) or value < least:
        raise ValueError(f'{option} is {value!r}, but it must be an integer of at least {least}.')


def check_sizes(option: str, sizes: Any, *, may_be_empty: bool = False) -> None:
    """Raises ValueError unless `sizes` is a tuple of positive integers."""
    valid = isinstance(sizes, tuple) and all(_is_integer(size) and size > 0 for size in sizes)
    if not valid or not (sizes or may_be_empty):
        kind = 'a tuple' if may_be_empty else 'a non-empty tuple'
        raise ValueError(f'{option} is {sizes!r}, but it must be {kind} of positive integers.')


def check_stages(sizes: Any, limit: int) -> None:
    """Raises ValueError unless `sizes` gives positive integers for at most `limit` stages."""
    check_sizes('stage_sizes', sizes)
    if len(sizes) > limit:
        raise ValueError(
            f'stage_sizes is {sizes}, but this network has at most {limit} stages: give at most '
            f'{limit} values.'
        )


def check_depth(depth: Any, offset: int) -> None:
    """Raises ValueError unless `depth` is 6n + `offset` for a positive integer n."""
    if not _is_integer(depth) or depth <= offset or (depth - offset) % 6:
        raise ValueError(
            f'depth is {depth!r}, but it must be 6n + {offset} for a positive integer n, such as '
            f'{6 + offset} or {12 + offset}.'
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raises ValueError unless `mean` and `std` pair up and every `std` is positive."""
    if not mean or len(mean) != len(std):
        raise ValueError(
            f'mean {mean} has {len(mean)} values and std {std} has {len(std)}, but both need one '
            'value for all channels or one value per channel.'
        )
    # Written so that NaN fails too.
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f'std is {std}, but every value must be greater than 0.')


class Normalize(nn.Module):
    """Subtracts the mean of each channel and divides by its standard deviation.

    Attributes:
        mean: one value per channel, or a single value for all channels.
        std: as many positive values as `mean`.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_normalization(self.mean, self.std)
        super().__post_init__()

    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch height width channels']:
        """Returns (x - mean) / std.

        Args:
            x: images of shape [batch, height, width, channels].

        Returns:
            Normalised images of the same shape, in float32 or the wider type of `x`.

        Raises:
            ValueError: `x` is not a floating-point array of four dimensions, or its channels do
                not match the length of `mean`.
        """
        if x.ndim != 4:
            raise ValueError(
                f'Images have shape {x.shape}, but a model needs the four dimensions '
                '[batch, height, width, channels].'
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f'Images have type {x.dtype}, but a model needs floating-point values in [0, 1]: '
                'divide 8-bit images by 255.'
            )
        if len(self.mean) not in (1, x.shape[-1]):
            raise ValueError(
                f'mean and std have length {len(self.mean)}, but the number of image channels is '
                f'{x.shape[-1]}: give one value for all channels or one value per channel.'
            )
        return (x - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


class Activation(nn.Module):
    """An elementwise nonlinearity as a module, so that its outputs can be addressed by path.

    Attributes:
        function: one of relu, gelu (exact), silu, tanh, softplus, leaky_relu (slope 0.01), elu
            and identity.
    """

    function: str = 'relu'

    def __post_init__(self) -> None:
        check_choice('activation', self.function, tuple(ACTIVATIONS))
        super().__post_init__()

    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        """Returns the function of each element of `x`, in the shape and type of `x`."""
        return ACTIVATIONS[self.function](x)


class Classifier(nn.Module):
    """The fields that every model has, and their checks.

    Parameters and batch statistics are always float32; `dtype` is the type of the computation up
    to the features. The head computes in float32 or wider, so that logits and their margins carry
    no rounding of their own.

    Attributes:
        num_classes: number of logits, at least 2.
        mean: mean of each channel of the images, subtracted inside the model; a single value
            applies to all channels.
        std: standard deviation of each channel, as many values as `mean`.
        dtype: floating-point type of the computation.
        activation: name of the nonlinearity, see `Activation`.
    """

    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    activation: str = 'relu'

    def __post_init__(self) -> None:
        check_integer('num_classes', self.num_classes, 2)
        check_normalization(self.mean, self.std)
        check_choice('activation', self.activation, tuple(ACTIVATIONS))
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f'dtype is {jnp.dtype(self.dtype).name}, but it must be a floating-point type '
                'such as float32 or bfloat16.'
            )
        super().__post_init__()


def conv(
    features: int,
    kernel_size: int,
    *,
    name: str,
    dtype: DTypeLike,
    stride: int = 1,
    padding: int | str | None = None,
    use_bias: bool = False,
    kernel_init: nn.initializers.Initializer = HE_NORMAL_FAN_OUT,
) -> nn.Conv:
    """Builds a square convolution with explicit zero padding.

    By default it is the same on all sides, as PyTorch pads; 'SAME' would pad strided convolutions
    on one side only and shift their outputs.

    Args:
        features: number of output channels.
        kernel_size: height and width of the kernel.
        name: name of the layer.
        dtype: type of the computation.
        stride: step in both directions.
        padding: zeros on each side, by default (kernel_size - 1) // 2, or 'SAME'.
        use_bias: whether each output channel has a bias.
        kernel_init: initialiser of the kernel, by default He normal over the fan-out.

    Returns:
        The layer, mapping [batch, height, width, channels] to
        [batch, height', width', features].
    """
    if padding is None:
        padding = (kernel_size - 1) // 2
    ends = padding if isinstance(padding, str) else ((padding, padding),) * 2
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=ends,
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=dtype,
        param_dtype=jnp.float32,
        name=name,
    )


def batch_norm(*, name: str, train: bool, dtype: DTypeLike) -> BatchNorm:
    """Builds a batch normalisation whose running averages move by a tenth per update.

    The running variance averages the biased variances of the batches.

    Args:
        name: name of the layer.
        train: whether to normalise by the batch and update the running averages.
        dtype: type of the result; the statistics are float32.

    Returns:
        The layer, which keeps the shape of its input.
    """
    return BatchNorm(use_running_average=not train, name=name, dtype=dtype)


def dense(
    features: int,
    *,
    name: str,
    dtype: DTypeLike,
    kernel_init: nn.initializers.Initializer = HE_NORMAL_FAN_IN,
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> nn.Dense:
    """Builds a hidden dense layer, by default with He normal kernel (fan-in) and zero bias.

    Args:
        features: number of outputs.
        name: name of the layer.
        dtype: type of the computation.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias.

    Returns:
        The layer, mapping [batch, inputs] to [batch, features].
    """
    return nn.Dense(
        features,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=jnp.float32,
        name=name,
    )


def head(
    num_classes: int,
    *,
    kernel_init: nn.initializers.Initializer = LECUN_NORMAL,
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> nn.Dense:
    """Builds the classifier `head`, which computes in float32 or wider.

    Args:
        num_classes: number of logits.
        kernel_init: initialiser of the kernel, by default LeCun normal.
        bias_init: initialiser of the bias, by default zero.

    Returns:
        The layer, mapping features of shape [batch, features] to logits [batch, num_classes].
    """
    # Without a dtype it computes in the wider one of its float32 parameters and the features.
    return nn.Dense(
        num_classes,
        kernel_init=kernel_init,
        bias_init=bias_init,
        param_dtype=jnp.float32,
        name='head',
    )


def stage_blocks(sizes: Sequence[int], features: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Yields the name, channels and stride of each residual block.

    The first block of each stage but the first halves the positions.

    Args:
        sizes: number of blocks of each stage.
        features: channels of each stage; those beyond the last stage are unused.
    """
    for i, (size, channels) in enumerate(zip(sizes, features), start=1):
        for j in range(1, size + 1):
            yield f'stage{i}_block{j}', channels, 2 if i > 1 and j == 1 else 1


def rematerialized(block: Block, remat: bool) -> Block:
    """Wraps a block class so that gradients recompute its activations instead of storing them.

    Args:
        block: a module class whose call takes the input and the positional flag `train`.
        remat: whether to wrap at all.

    Returns:
        The class, with the same parameter paths and the same outputs.
    """
    # The first two positions are the module itself and its input.
    return nn.remat(block, static_argnums=(2,)) if remat else block


def max_pool(x: Array, window: int, stride: int, padding: int = 0) -> Array:
    """Returns the maxima over square windows; padding never wins.

    Args:
        x: features of shape [batch, height, width, channels].
        window: height and width of the windows.
        stride: step in both directions.
        padding: positions added on each side.

    Returns:
        Features of shape [batch, height', width', channels].
    """
    sides = (padding, padding)
    return nn.max_pool(x, (window, window), strides=(stride, stride), padding=(sides, sides))


def average_pool(x: Array, window: int, stride: int) -> Array:
    """Returns the means over square windows without padding.

    Args:
        x: features of shape [batch, height, width, channels].
        window: height and width of the windows.
        stride: step in both directions.

    Returns:
        Features of shape [batch, height', width', channels].
    """
    return nn.avg_pool(x, (window, window), strides=(stride, stride), padding='VALID')


def halve(x: Array, pool: str) -> Array:
    """Returns 2 x 2 'max' or 'avg' pooled features, or `x` itself for 'none'."""
    if pool == 'max':
        return max_pool(x, 2, 2)
    return average_pool(x, 2, 2) if pool == 'avg' else x


def global_average_pool(
    x: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch channels']:
    """Returns the mean of each channel over all positions.

    Raises:
        ValueError: no position is left, because the image was too small for the network.
    """
    _check_positions(x)
    return jnp.mean(x, axis=(1, 2))


def flatten(x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch features']:
    """Returns the features of each example in row-major order: height, width, channels.

    Raises:
        ValueError: no position is left, because the image was too small for the network.
    """
    _check_positions(x)
    return x.reshape(x.shape[0], -1)


def _check_positions(x: Array) -> None:
    if 0 in x.shape[1:3]:
        raise ValueError(
            f'The last feature map has size {x.shape[1]} x {x.shape[2]}: the images are too small '
            'for this network, so use larger images or fewer strides and pools.'
        )


def adaptive_average_pool(
    x: Float[Array, 'batch height width channels'], size: int
) -> Float[Array, 'batch size size channels']:
    """Returns means over a grid of `size` x `size` windows that cover the whole map.

    Window i covers the positions from floor(i * n / size) up to ceil((i + 1) * n / size) of n,
    so neighbouring windows overlap where `size` does not divide n, and repeat where n is smaller.

    Args:
        x: features of shape [batch, height, width, channels].
        size: height and width of the result.

    Returns:
        Features of shape [batch, size, size, channels].

    Raises:
        ValueError: no position is left, because the image was too small for the network.
    """
    _check_positions(x)
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (_window_means(length, size) for length in x.shape[1:3])
    # One axis after the other, the longer one first, which takes the fewest products. A single sum
    # would multiply both matrices first where the map is one position, and nothing would tell then
    # which axis of the result is which, as `interop` has to know.
    if x.shape[1] >= x.shape[2]:
        pooled = jnp.einsum('ih,bhwc->bwci', rows, x, precision='highest')
        pooled = jnp.einsum('jw,bwci->bijc', columns, pooled, precision='highest')
    else:
        pooled = jnp.einsum('jw,bhwc->bhcj', columns, x, precision='highest')
        pooled = jnp.einsum('ih,bhcj->bijc', rows, pooled, precision='highest')
    return pooled.astype(x.dtype)


def _window_means(length: int, size: int) -> np.ndarray:
    """The [size, length] matrix whose rows average the windows of `adaptive_average_pool`."""
    index = np.arange(size)[:, None]
    position = np.arange(length)[None, :]
    inside = (position >= index * length // size) & (position < -(-(index + 1) * length // size))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
