"""Plain stacks of convolutions and linear layers, built from nothing but their weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from neurosens.interop.errors import WeightsError
from neurosens.models import common

_POOLS = ('max', 'avg', 'none', 'mean')
# How far behind its layer a normalisation is numbered where it stands before or after the
# activation, which has a number, too.
_PLACES = {'before': 1, 'after': 2}


class Convolution(NamedTuple):
    """One convolution of a stack and what follows it.

    Attributes:
      features: number of output channels.
      kernel: height and width of the kernel.
      stride: step in both directions.
      padding: zeros on each side.
      pool: after the activation, 'max' or 'avg' over 2 x 2 positions, 'mean' over all, or 'none'.
      bias: whether each channel has a bias.
      norm: whether it has batch normalisation.
    """

    features: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    pool: str
    bias: bool
    norm: bool


class Hidden(NamedTuple):
    """One linear layer of a stack.

    Attributes:
      features: number of outputs.
      bias: whether each output has a bias.
      norm: whether it has batch normalisation.
    """

    features: int
    bias: bool
    norm: bool


class Sequential(common.Classifier):
    """A stack of convolutions and linear layers with nonlinearities between them.

    Layers, as of `neurosens.models.CNN`: `normalize`, then `conv<k>`, `norm<k>` (with batch
    normalisation) and `act<k>` for each convolution, the same with `dense<k>` for each hidden
    linear layer, numbered on, and `head`.

    Attributes:
      convolutions: the convolutions.
      hidden: the linear layers before the head.
      head_bias: whether each logit has a bias.
      norm: whether batch normalisation stands 'before' or 'after' the activation.
    """

    convolutions: tuple[Convolution, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    head_bias: bool = True
    norm: str = 'before'

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
          ValueError: the images are too small for the strides and pools.
        """

        def activated(x: Array, k: int, norm: bool) -> Array:
            steps: list[nn.Module] = [common.Activation(self.activation, name=f'act{k}')]
            if norm:
                normalization = common.batch_norm(name=f'norm{k}', train=train, dtype=self.dtype)
                steps.insert(self.norm == 'after', normalization)
            for step in steps:
                x = step(x)
            return x

        x = common.Normalize(self.mean, self.std, name='normalize')(x)
        for k, layer in enumerate(self.convolutions, start=1):
            x = nn.Conv(
                layer.features,
                layer.kernel,
                strides=(layer.stride,) * 2,
                padding=((layer.padding,) * 2,) * 2,
                use_bias=layer.bias,
                kernel_init=common.HE_NORMAL_FAN_IN,
                dtype=self.dtype,
                param_dtype=jnp.float32,
                name=f'conv{k}',
            )(x)
            x = activated(x, k, layer.norm)
            if layer.pool == 'mean':
                x = common.global_average_pool(x)[:, None, None]
            else:
                x = common.halve(x, layer.pool)
        x = common.flatten(x)
        for k, dense in enumerate(self.hidden, start=len(self.convolutions) + 1):
            x = nn.Dense(
                dense.features,
                use_bias=dense.bias,
                kernel_init=common.HE_NORMAL_FAN_IN,
                dtype=self.dtype,
                param_dtype=jnp.float32,
                name=f'dense{k}',
            )(x)
            x = activated(x, k, dense.norm)
        # Without a dtype it computes in the wider one of its float32 parameters and the features.
        head = nn.Dense(
            self.num_classes, use_bias=self.head_bias, param_dtype=jnp.float32, name='head'
        )
        return head(x)


# --------------------------------------------------------------------------------- inference


class _Found(NamedTuple):
    """A layer of the state dict, and the name of its normalisation, if it has one."""

    name: str
    weight: np.ndarray
    bias: bool
    norm: str


def infer(
    arrays: Mapping[str, np.ndarray],
    *,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    dtype: DTypeLike = jnp.float32,
    strides: int | Sequence[int] | None = None,
    padding: int | Sequence[int] | None = None,
    pool: str | Sequence[str] | None = None,
    activation: str = 'relu',
    norm: str = 'before',
) -> Sequential:
    """The stack whose weights a state dict holds.

    Shapes tell the layers, their widths, kernels, biases and normalisations. They do not tell
    strides, padding and pools, which therefore have to be given where there are convolutions.

    Args:
      arrays: a bare state dict in the order of the layers, as of `clean`.
      mean: mean of each channel of the images.
      std: standard deviation of each channel.
      dtype: floating-point type of the computation.
      strides: of the convolutions, one for all or one for each.
      padding: zeros on each side of their inputs, one for all or one for each.
      pool: what follows their activations, one for all or one for each: 'max' or 'avg' over 2 x 2
        positions, 'mean' over all positions, or 'none'.
      activation: the nonlinearity, a name of `neurosens.models.Activation`.
      norm: whether batch normalisations stand 'before' or 'after' the activation of their layer.

    Returns:
      The module.

    Raises:
      WeightsError: the layers are no plain stack, or an option is missing.
      ValueError: an option has a wrong value.
    """
    common.check_choice('norm', norm, tuple(_PLACES))
    layers = list(_layers(arrays))
    for layer in layers:
        _check_norm(layer, norm)
    for before, after in itertools.pairwise(layers):
        if before.weight.ndim == 2 and after.weight.ndim == 4:
            raise WeightsError(
                f'The convolution {after.name!r} stands behind the linear layer {before.name!r}; '
                'this is no plain stack, so name the model it is of.'
            )
    convolutions = [layer for layer in layers if layer.weight.ndim == 4]
    dense = [layer for layer in layers if layer.weight.ndim == 2]
    depth = len(convolutions)
    for before, after in itertools.pairwise(convolutions):
        _check_follows(before, after)
    if not dense:
        raise WeightsError(
            'The file has no linear layer, whose outputs would be the logits; name the model it is '
            'of, or give a module.'
        )
    for before, after in itertools.pairwise(dense):
        _check_follows(before, after)
    if depth and dense[0].weight.shape[1] % len(convolutions[-1].weight):
        raise WeightsError(
            f'{dense[0].name!r} takes {dense[0].weight.shape[1]} inputs, which is no multiple of '
            f'the {len(convolutions[-1].weight)} channels of {convolutions[-1].name!r}; this is no '
            'plain stack, so name the model it is of.'
        )
    if dense[-1].norm:
        raise WeightsError(
            f'A normalisation follows the last layer {dense[-1].name!r}; this is no plain stack, '
            'so name the model it is of.'
        )
    every = _options(convolutions, strides=strides, padding=padding, pool=pool)
    return Sequential(
        num_classes=len(dense[-1].weight),
        mean=mean,
        std=std,
        dtype=jnp.dtype(dtype),
        activation=activation,
        convolutions=tuple(
            Convolution(
                features=len(layer.weight),
                kernel=layer.weight.shape[2:],
                bias=layer.bias,
                norm=bool(layer.norm),
                **options,
            )
            for layer, options in zip(convolutions, every)
        ),
        hidden=tuple(
            Hidden(len(layer.weight), layer.bias, bool(layer.norm)) for layer in dense[:-1]
        ),
        head_bias=dense[-1].bias,
        norm=norm,
    )


def _layers(arrays: Mapping[str, np.ndarray]) -> Iterator[_Found]:
    """The layers in the file's order, each with the normalisation behind it."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition('.')
        groups.setdefault(layer, {})[leaf] = array
    pending: _Found | None = None
    for name, leaves in groups.items():
        weight = leaves.get('weight')
        if weight is not None and weight.ndim == 1 and 'running_mean' in leaves:
            if pending is None or pending.norm or len(weight) != len(pending.weight):
                raise WeightsError(
                    f'The normalisation {name!r} stands behind no layer of its width; this is no '
                    'plain stack, so name the model it is of.'
                )
            pending = pending._replace(norm=name)
            continue
        if weight is None or weight.ndim not in (2, 4) or not leaves.keys() <= {'weight', 'bias'}:
            shapes = ', '.join(f'{leaf} {array.shape}' for leaf, array in leaves.items())
            raise WeightsError(
                f'{name!r} ({shapes}) is no convolution over positions, linear layer or batch '
                'normalisation; name the model it is of, or give a module.'
            )
        if pending is not None:
            yield pending
        pending = _Found(name, weight, 'bias' in leaves, '')
    if pending is not None:
        yield pending


def _check_norm(layer: _Found, norm: str) -> None:
    """Refuses a normalisation that stands elsewhere, where numbers of one stack tell it."""
    (stack, _, first), (other, _, second) = layer.name.rpartition('.'), layer.norm.rpartition('.')
    if stack != other or not (first.isdecimal() and second.isdecimal()):
        return
    behind = int(second) - int(first)
    if behind == _PLACES[norm]:
        return
    places = [place for place, distance in _PLACES.items() if distance == behind]
    remedy = f'norm={places[0]!r} if all stand so, or ' if places else ''
    raise WeightsError(
        f'The normalisation {layer.norm!r} is {behind} behind {layer.name!r} by its number, but '
        f'{norm} the activation it would be {_PLACES[norm]}; give {remedy}a module.'
    )


def _check_follows(before: _Found, after: _Found) -> None:
    if after.weight.shape[1] != len(before.weight):
        raise WeightsError(
            f'{after.name!r} takes {after.weight.shape[1]} inputs, but {before.name!r} before it '
            f'has {len(before.weight)} outputs; this is no plain stack, so name the model it is of.'
        )


def _options(
    convolutions: Sequence[_Found], **given: int | str | Sequence[Any] | None
) -> list[dict[str, Any]]:
    """Strides, padding and pools of each convolution."""
    depth = len(convolutions)
    missing = [name for name, value in given.items() if value is None]
    if depth and missing:
        names = ', '.join(repr(layer.name) for layer in convolutions)
        raise WeightsError(
            f'The shapes of the convolutions {names} do not tell {" and ".join(missing)}; give '
            f'{", ".join(f"{name}=..." for name in missing)}, one value for all or one for each '
            f'(pool: {", ".join(_POOLS)}).'
        )
    values = {}
    for name, value in given.items():
        if isinstance(value, Iterable) and not isinstance(value, str):
            each = tuple(value)
        else:
            each = (value,) * depth
        if len(each) != depth:
            raise WeightsError(
                f'{name} is {value!r}, but there are {depth} convolutions; give one value for all '
                'or one for each.'
            )
        values['stride' if name == 'strides' else name] = each
    for stride, zeros, pool in zip(values['stride'], values['padding'], values['pool']):
        common.check_integer('strides', stride, 1)
        common.check_integer('padding', zeros, 0)
        common.check_choice('pool', pool, _POOLS)
    return [dict(zip(values, each)) for each in zip(*values.values())]
