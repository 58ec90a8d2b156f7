"""Creation of models by name."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from neurosens import _validate
from neurosens.models.cnn import CNN
from neurosens.models.common import Classifier
from neurosens.models.densenet import DenseNet
from neurosens.models.lenet import LeNet5
from neurosens.models.mlp import MLP
from neurosens.models.resnet import CIFARResNet, PreActResNet, ResNet
from neurosens.models.vgg import VGG
from neurosens.models.wide_resnet import WideResNet

_COMMON_FIELDS = ('num_classes', 'mean', 'std', 'dtype', 'parent', 'name')


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A model class and the fields that the name fixes; its other fields are options."""

    model: type[Classifier]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_LENET5_WIDE = types.MappingProxyType(
    {
        'features': (32, 64),
        'kernel_size': 3,
        'strides': 1,
        'padding': 1,
        'pool': 'max',
        'hidden': (200,),
        'norm': 'none',
        'dropout': 0.0,
    }
)

_ENTRIES: Mapping[str, _Entry] = types.MappingProxyType(
    {
        'mlp': _Entry(MLP),
        'cnn': _Entry(CNN),
        'lenet5': _Entry(LeNet5),
        'lenet5_wide': _Entry(CNN, _LENET5_WIDE),
        'cifar_resnet20': _Entry(CIFARResNet, {'depth': 20}),
        'cifar_resnet32': _Entry(CIFARResNet, {'depth': 32}),
        'cifar_resnet44': _Entry(CIFARResNet, {'depth': 44}),
        'cifar_resnet56': _Entry(CIFARResNet, {'depth': 56}),
        'cifar_resnet110': _Entry(CIFARResNet, {'depth': 110}),
        'resnet18': _Entry(ResNet, {'block': 'basic', 'stage_sizes': (2, 2, 2, 2)}),
        'resnet50': _Entry(ResNet, {'block': 'bottleneck', 'stage_sizes': (3, 4, 6, 3)}),
        'preact_resnet18': _Entry(PreActResNet, {'stage_sizes': (2, 2, 2, 2)}),
        'wide_resnet': _Entry(WideResNet),
        'wide_resnet28_10': _Entry(WideResNet, {'depth': 28, 'width': 10}),
        'wide_resnet34_10': _Entry(WideResNet, {'depth': 34, 'width': 10}),
        'vgg11': _Entry(VGG, {'stage_sizes': (1, 1, 2, 2, 2)}),
        'vgg16': _Entry(VGG, {'stage_sizes': (2, 2, 3, 3, 3)}),
        'vgg19': _Entry(VGG, {'stage_sizes': (2, 2, 4, 4, 4)}),
        'densenet121': _Entry(DenseNet, {'stage_sizes': (6, 12, 24, 16)}),
        'densenet169': _Entry(DenseNet, {'stage_sizes': (6, 12, 32, 32)}),
    }
)


def names() -> tuple[str, ...]:
    """Returns the names of all models."""
    return tuple(_ENTRIES)


def options(name: str) -> dict[str, Any]:
    """Returns the options of one model with their defaults.

    Args:
        name: one of `names()`.

    Returns:
        The options that `create` takes for this model beyond `num_classes`, `mean`, `std` and
        `dtype`.

    Raises:
        ValueError: the name is unknown.
    """
    entry = _entry(name)
    return {
        field.name: field.default
        for field in dataclasses.fields(entry.model)
        if field.name not in _COMMON_FIELDS and field.name not in entry.fixed
    }


def create(
    name: str,
    *,
    num_classes: int,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> Classifier:
    """Creates a model by name.

    Equal arguments give equal models with equal hashes, so a model can be a static argument of
    a compiled function.

    Args:
        name: one of `names()`.
        num_classes: number of logits, at least 2.
        mean: mean of each channel of the images; a single value applies to all channels.
        std: standard deviation of each channel, as many values as `mean`.
        dtype: floating-point type of the computation; parameters and logits are float32.
        **options: options of this model, see `options`; lists become tuples.

    Returns:
        A module mapping images in [0, 1] of shape [batch, height, width, channels] to float32
        logits of shape [batch, num_classes].

    Raises:
        ValueError: the name or an option is unknown, or a value is invalid.
    """
    entry = _entry(name)
    valid = _options(name)
    for option in options:
        if option not in valid:
            raise ValueError(_validate.unknown(f'{name} option', option, valid))
    return entry.model(
        num_classes=num_classes,
        mean=floats('mean', mean),
        std=floats('std', std),
        dtype=jnp.dtype(dtype),
        **entry.fixed,
        **{option: _hashable(value) for option, value in options.items()},
    )


# `create` has a parameter called options, which hides the function.
_options = options


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(_validate.unknown('model', name, _ENTRIES))
    return _ENTRIES[name]


def floats(argument: str, values: Any) -> tuple[float, ...]:
    """Numbers of a mean or standard deviation, one for all channels or one for each.

    Args:
      argument: its name, for the message.
      values: an iterable of numbers.

    Returns:
      The numbers as floats.

    Raises:
      ValueError: they are no such numbers.
    """
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(
            f'{argument} is {values!r}, but it must be a tuple of numbers, one for all channels '
            'or one per channel.'
        ) from None


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value
