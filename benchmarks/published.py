"""Published networks and their weights, in PyTorch and in Linen, for comparisons on real images.

The files are those of the projects named below, in one folder, each under the name given here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.torch_models import CIFARResNet20, LeNet5Wide, ResNet2B
from neurosens import data, models
from neurosens.forward import LinenForward

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}


class Published(NamedTuple):
    """A network with the same weights on both sides.

    Attributes:
        network: in PyTorch, in evaluation mode, its parameters frozen; images `[B, C, H, W]`.
        forward: in Flax; images `[B, H, W, C]` in [0, 1], as in PyTorch.
        variables: float32 NumPy arrays.
        data_set: name of the data set it was trained on.
    """

    network: torch.nn.Module
    forward: LinenForward
    variables: dict[str, Any]
    data_set: str


def load(name: str, weights: str) -> Published:
    """Loads a network on both sides.

    Args:
        name: one of `NAMES`.
        weights: folder of the files.

    Returns:
        The network.
    """
    return _LOADERS[name](pathlib.Path(weights))


def images(
    data_set: str, data_dir: str, count: int, *, original_order: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Reads test images.

    Args:
        data_set: `'mnist'` or `'cifar10'`.
        data_dir: directory of TFDS.
        count: how many.
        original_order: the first ones of the original file, in place of the first records; only
            CIFAR-10's records tell.

    Returns:
        Float32 images in [0, 1] `[count, H, W, C]` and int32 labels.
    """
    source = data.open(data_set, 'test', data_dir, 0)
    total = data.info(data_set).test_size if original_order else count
    batch = next(iter(source.eval_batches(batch_size=total)))
    rows = np.arange(count)
    if original_order:
        # Imported here: only this needs the raw records.
        import tensorflow_datasets as tfds

        records = tfds.data_source(data_set, split='test', data_dir=data_dir)
        rows = np.argsort([record['id'] for record in records])[:count]
    return np.float32(batch.image[rows]) / 255, np.int32(batch.label[rows])


def torch_images(x: np.ndarray) -> torch.Tensor:
    """Returns images `[B, H, W, C]` as a tensor `[B, C, H, W]` whose memory is channels last."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).contiguous(
        memory_format=torch.channels_last
    )


def _finish(
    network: torch.nn.Module, module: nn.Module, variables: dict[str, Any], data_set: str
) -> Published:
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Published(network, LinenForward(module, {'train': False}), variables, data_set)


def _state(path: pathlib.Path) -> Mapping[str, torch.Tensor]:
    return torch.load(path, weights_only=True, map_location='cpu')


def _kernel(weight: torch.Tensor) -> np.ndarray:
    """A convolution's or linear layer's weight in Flax's order."""
    value = weight.numpy()
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)


def _after_flatten(weight: torch.Tensor, channels: int, side: int) -> np.ndarray:
    """The kernel of a layer whose input PyTorch flattens channels first, and Flax last."""
    value = weight.numpy().reshape(-1, channels, side, side)
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0).reshape(channels * side**2, -1))


def _lenet5(file: str) -> Callable[[pathlib.Path], Published]:
    """LeNet-5 of advertorch."""

    def load(weights: pathlib.Path) -> Published:
        state = _state(weights / file)
        network = LeNet5Wide()
        network.load_state_dict(state)
        names = {'conv1': 'conv1', 'conv2': 'conv2', 'linear1': 'dense3', 'linear2': 'head'}
        params = {
            ours: {
                'kernel': _kernel(state[f'{theirs}.weight']),
                'bias': state[f'{theirs}.bias'].numpy(),
            }
            for theirs, ours in names.items()
        }
        params['dense3']['kernel'] = _after_flatten(state['linear1.weight'], 64, 7)
        module = models.create('lenet5_wide', num_classes=10)
        return _finish(network, module, {'params': params}, 'mnist')

    return load


def _resnet20(weights: pathlib.Path) -> Published:
    """ResNet-20 of akamaster/pytorch_resnet_cifar10."""
    state = _state(weights / 'cifar10_resnet20_standard.th')['state_dict']
    renamed = {}
    for name, value in state.items():
        parts = name.removeprefix('module.').replace('bn', 'norm').split('.')
        if parts[0].startswith('layer'):
            stage, block = parts[0].removeprefix('layer'), int(parts[1]) + 1
            parts = ['blocks', f'stage{stage}_block{block}', *parts[2:]]
        elif parts[0] == 'linear':
            parts[0] = 'head'
        renamed['.'.join(parts)] = value
    network = CIFARResNet20(10, **_IMAGENET)
    network.load_state_dict(renamed)
    variables: dict[str, Any] = {'params': {}, 'batch_stats': {}}
    statistics = {'running_mean': 'mean', 'running_var': 'var'}
    for name, value in renamed.items():
        *path, kind = name.removeprefix('blocks.').split('.')
        if kind == 'num_batches_tracked':
            continue
        collection = 'batch_stats' if kind in statistics else 'params'
        if kind == 'weight':
            ours, array = ('kernel', _kernel(value)) if value.ndim > 1 else ('scale', value.numpy())
        else:
            ours, array = statistics.get(kind, kind), value.numpy()
        leaf = variables[collection]
        for part in path:
            leaf = leaf.setdefault(part, {})
        leaf[ours] = array
    module = models.create('cifar_resnet20', num_classes=10, **_IMAGENET)
    return _finish(network, module, variables, 'cifar10')


class _LinenResNet2B(nn.Module):
    """Two residual blocks without batch norm, and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = (x - jnp.asarray(_MEAN)) / jnp.asarray(_STD)

        def conv(name: str, features: int, size: int = 3, stride: int = 1) -> nn.Conv:
            return nn.Conv(features, (size, size), stride, padding=size // 2, name=name)

        x = nn.relu(conv('conv1', 8, stride=2)(x))
        for i, stride in (1, 2), (2, 1):
            y = nn.relu(conv(f'block{i}_conv1', 16, stride=stride)(x))
            y = conv(f'block{i}_conv2', 16)(y)
            shortcut = conv(f'block{i}_shortcut', 16, size=1, stride=stride)(x) if i == 1 else x
            x = nn.relu(y + shortcut)
        x = nn.relu(nn.Dense(100, name='dense')(x.reshape(len(x), -1)))
        return nn.Dense(10, name='head')(x)


def _resnet2b(weights: pathlib.Path) -> Published:
    """ResNet-2B of alpha-beta-CROWN, adversarially trained."""
    state = _state(weights / 'cifar10_resnet2b_pgd_linf2.pth')
    state = state.get('state_dict', state)
    network = ResNet2B(_MEAN, _STD)
    # Both list their layers in the order in which they are used.
    names = [name for name in network.state_dict() if name.endswith(('weight', 'bias'))]
    renamed = dict(zip(names, state.values(), strict=True))
    network.load_state_dict(renamed)
    params: dict[str, Any] = {}
    for name, value in renamed.items():
        layer, kind = name.rsplit('.', 1)
        array = _kernel(value) if kind == 'weight' else value.numpy()
        params.setdefault(layer, {})['kernel' if kind == 'weight' else kind] = array
    params['dense']['kernel'] = _after_flatten(renamed['dense.weight'], 16, 8)
    return _finish(network, _LinenResNet2B(), {'params': params}, 'cifar10')


_LOADERS: dict[str, Callable[[pathlib.Path], Published]] = {
    'lenet5': _lenet5('mnist_lenet5_standard.pt'),
    'lenet5_robust': _lenet5('mnist_lenet5_pgd_linf03.pt'),
    'resnet20': _resnet20,
    'resnet2b': _resnet2b,
}
NAMES = tuple(_LOADERS)
