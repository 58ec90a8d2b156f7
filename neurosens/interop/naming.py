"""What PyTorch projects call the layers of the networks of the zoo.

A naming is a function from the layers of one model, by their path, to PyTorch's names of them. A
network of the zoo may have several; where weights are read, the one that most names agree with is
taken.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import numpy as np

from neurosens import models
from neurosens.interop import layers
from neurosens.interop.errors import WeightsError

Naming: TypeAlias = Callable[[nn.Module, str], str]


@dataclasses.dataclass(frozen=True)
class _Residual:
    """The names in which residual networks differ."""

    block: str = 'layer{stage}.{block}'
    norm: str = 'bn'
    shortcut_conv: str = 'shortcut.0'
    shortcut_norm: str = 'shortcut.1'
    final_norm: str = 'bn'
    head: str = 'linear'

    def __call__(self, module: nn.Module, layer: str) -> str:
        del module
        if layer in ('head', 'final_norm'):
            return getattr(self, layer)
        *block, name = layer.split('/')
        if name in ('shortcut_conv', 'shortcut_norm'):
            name = getattr(self, name)
        name = name.replace('norm', self.norm)
        return f'{_block(self.block, block[0])}.{name}' if block else name


def _block(pattern: str, name: str) -> str:
    """PyTorch's name of `stage<i>_block<j>`; it counts blocks from zero."""
    stage, block = map(int, re.findall(r'\d+', name))
    return pattern.format(stage=stage, block=block - 1, layer=block)


def _vgg(module: nn.Module, layer: str) -> str:
    """Those of torchvision; networks for CIFAR have one linear layer behind its convolutions."""
    assert isinstance(module, models.VGG)
    if layer == 'head':
        return 'classifier.6' if module.classifier == 'imagenet' else 'classifier'
    kind, position = re.fullmatch(r'([a-z]+)(.*)', layer).groups()  # type: ignore[union-attr]
    if kind == 'dense':
        return {'6': 'classifier.0', '7': 'classifier.3'}[position]
    stage, number = map(int, position.split('_'))
    per_convolution = 3 if module.norm == 'batch' else 2
    before = sum(module.stage_sizes[: stage - 1]) * per_convolution + (stage - 1)
    return f'features.{before + (number - 1) * per_convolution + (kind == "norm")}'


def _densenet(module: nn.Module, layer: str) -> str:
    """Those of torchvision, or with the newest channels first of the robustness library's CIFAR."""
    assert isinstance(module, models.DenseNet)
    if module.newest_first:
        return _densenet_newest_first(layer)
    if layer == 'head':
        return 'classifier'
    if layer == 'final_norm':
        return f'features.norm{len(module.stage_sizes) + 1}'
    *block, name = layer.split('/')
    if not block:
        return f'features.{name.replace("1", "0")}'
    if block[0].startswith('transition'):
        return f'features.{block[0]}.{name.removesuffix("1")}'
    return f'{_block("features.denseblock{stage}.denselayer{layer}", block[0])}.{name}'


def _densenet_newest_first(layer: str) -> str:
    if layer in ('head', 'final_norm'):
        return {'head': 'linear', 'final_norm': 'bn'}[layer]
    *block, name = layer.split('/')
    if block and block[0].startswith('transition'):
        name = {'norm1': 'bn', 'conv1': 'conv'}[name]
        return f'{block[0].replace("transition", "trans")}.{name}'
    name = name.replace('norm', 'bn')
    return f'{_block("dense{stage}.{block}", block[0])}.{name}' if block else name


def _deepmind(module: nn.Module, layer: str) -> str:
    """Those of DeepMind's wide ResNets in RobustBench."""
    del module
    if layer in ('conv1', 'final_norm', 'head'):
        return {'conv1': 'init_conv', 'final_norm': 'batchnorm', 'head': 'logits'}[layer]
    block, name = layer.split('/')
    stage, number = map(int, re.findall(r'\d+', block))
    if name == 'shortcut_conv':
        name = 'shortcut'
    else:
        kind, place = name[:-1], int(name[-1])
        name = f'{kind.replace("norm", "batchnorm")}_{place - 1}'
    return f'layer.{stage - 1}.block.{number - 1}.{name}'


def _lenet5(module: nn.Module, layer: str) -> str:
    """Those of PyTorch's tutorial."""
    del module
    return {'dense3': 'fc1', 'dense4': 'fc2', 'head': 'fc3'}.get(layer, layer)


def own(module: nn.Module | None, layer: str) -> str:
    """Our own names with dots."""
    del module
    return layer.replace('/', '.')


_CIFAR = _Residual()
_TORCHVISION = _Residual(shortcut_conv='downsample.0', shortcut_norm='downsample.1', head='fc')
_WIDE = _Residual(
    block='block{stage}.layer.{block}', shortcut_conv='convShortcut', final_norm='bn1', head='fc'
)

_NAMINGS: Mapping[type[nn.Module], tuple[Naming, ...]] = {
    models.CIFARResNet: (_CIFAR, _TORCHVISION),
    models.ResNet: (_TORCHVISION, _CIFAR),
    models.PreActResNet: (_CIFAR, _TORCHVISION),
    models.WideResNet: (_WIDE,),
    models.VGG: (_vgg,),
    models.DenseNet: (_densenet,),
    models.LeNet5: (_lenet5,),
}

# The first block of some wide ResNets stands in their files twice, and is used once.
_UNUSED: Mapping[type[nn.Module], str] = {models.WideResNet: 'sub_block1.'}


def namings(module: nn.Module) -> tuple[Naming, ...]:
    """Every naming of a module, the usual one first and our own names last."""
    found = _NAMINGS.get(type(module), ())
    if isinstance(module, models.ResNet) and module.stem == 'cifar':
        # Torchvision has those for ImageNet only.
        found = found[::-1]
    if isinstance(module, models.WideResNet) and module.padding == 'same':
        # No other names: of all shapes alike, the others' weights would be of other padding.
        found = (_deepmind,)
    return (*found, own)


def check_stem(module: nn.Module, names: Iterable[str], source: str) -> None:
    """Raises where a residual network may pool behind its first convolution, and ours does not.

    Some networks for CIFAR are torchvision's with a smaller first convolution, and keep the max
    pool behind it, which has no weights that could tell.

    Args:
      module: the module that the weights are for, whose user has not said which stem it has.
      names: those of the arrays, which fit it.
      source: what the weights were read from.

    Raises:
      WeightsError: the names are torchvision's and the first convolution is that for CIFAR.
    """
    if not isinstance(module, models.ResNet) or module.stem != 'cifar':
        return
    shortcut = f'.{_TORCHVISION.shortcut_conv}.weight'
    if any(name.endswith(shortcut) for name in names):
        raise WeightsError(
            f'{source} names its layers as torchvision does but has a first convolution of 3 x 3, '
            'and weights do not tell whether a max pool follows it; give the model option '
            "stem='cifar' if none does, or else a module of your own that pools there."
        )


def implied_options(model: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a network of the zoo needs for a file, as names and shapes in it tell."""
    if model.startswith('densenet') and any(name.startswith('dense1.') for name in arrays):
        return {'newest_first': True}
    if model.startswith('wide_resnet') and 'init_conv.weight' in arrays:
        # All of RobustBench compute with it.
        return {'padding': 'same', 'activation': 'silu'}
    found = {}
    first = {'resnet': 'conv1.weight', 'densenet': 'features.conv0.weight'}
    stem = arrays.get(first.get(model.rstrip('0123456789'), ''))
    if stem is not None and stem.shape[2:] == (7, 7):
        found['stem'] = 'imagenet'
    if model.startswith('vgg') and any(name.startswith('features.') for name in arrays):
        if 'classifier.6.weight' in arrays:
            found['classifier'] = 'imagenet'
        if not any(name.endswith('.running_mean') for name in arrays):
            found['norm'] = 'none'
    return found


def is_chain(module: nn.Module) -> bool:
    """Whether PyTorch has no usual names for a module, so that its layers go by their order."""
    return type(module) not in _NAMINGS or isinstance(module, models.LeNet5)


def check_order(
    arrays: Mapping[str, np.ndarray],
    source: str,
    remedy: str,
    *,
    but: Collection[str] = (),
    stacked: bool = False,
) -> None:
    """Raises where layers could be exchanged and their names do not tell which comes first.

    Numbers in names do, such as those of `features.0` and `features.3`. Layers of one kind and
    shape under names that differ in more could go either way, and so could a normalisation whose
    name is like that of no layer that it could follow.

    Args:
      arrays: a bare state dict, sorted by name.
      source: what it was read from.
      remedy: what to do, the end of a sentence.
      but: layers whose place is known.
      stacked: whether a normalisation follows the layer that stands before it.

    Raises:
      WeightsError: there are two such layers.
    """
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    weights = layers.weights(arrays)
    for layer, array in weights.items():
        if layer in but:
            continue
        other = first.setdefault((layers.kind_of_weight(array), array.shape), layer)
        if _without_numbers(other) != _without_numbers(layer):
            raise WeightsError(
                f'{source} does not tell which of {other!r} and {layer!r} comes first: both have '
                f'weights of shape {array.shape}, and safetensors keeps no order; {remedy}'
            )
    kinds = {name: layers.kind_of_weight(array) for name, array in weights.items()}
    others = [name for name, kind in kinds.items() if kind != layers.NORMALIZATION]
    for layer in weights if stacked else ():
        if _without_numbers(layer) not in map(_without_numbers, others):
            raise WeightsError(
                f'{source} does not tell which layer {layer!r} follows, as safetensors keeps no '
                f'order; {remedy}'
            )


def _without_numbers(name: str) -> str:
    return re.sub(r'\d+', '', name)


def without_unused(module: nn.Module, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the entries that this network's PyTorch code never uses."""
    unused = _UNUSED.get(type(module))
    return {name: a for name, a in arrays.items() if not (unused and name.startswith(unused))}
