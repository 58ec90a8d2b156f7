"""Published networks and their weights, in PyTorch and in Linen, for comparisons on real images.

The files are those of the projects named below, in one folder, each under the name given here.

    python -m benchmarks.published --weights DIR --data_dir DIR

compares accuracies and logits of both sides on all test images.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import harness
from benchmarks.torch_models import CNNA, CIFARResNet20, LeNet5Wide, MLP5x100, ResNet2B
from neurosens import data, interop
from neurosens.forward import LinenForward

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
_CNN_A = {
    'mean': (125.3 / 255, 123.0 / 255, 113.9 / 255),
    'std': (63.0 / 255, 62.1 / 255, 66.7 / 255),
}
_BATCH = 250


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
    arrays = jax.tree.map(np.asarray, variables)
    return Published(network, LinenForward(module, {'train': False}), arrays, data_set)


def _fill(network: torch.nn.Module, state: interop.StateDict) -> torch.nn.Module:
    """Gives a network the weights of a file; both list their layers in the order of their use."""
    names = [name for name in network.state_dict() if not name.endswith('num_batches_tracked')]
    values = [
        torch.from_numpy(value)
        for name, value in state.items()
        if not name.endswith('num_batches_tracked')
    ]
    network.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    return network


def _lenet5(file: str) -> Callable[[pathlib.Path], Published]:
    """LeNet-5 of advertorch."""

    def load(weights: pathlib.Path) -> Published:
        state = interop.read_state_dict(weights / file)
        converted = interop.from_torch(state, 'lenet5_wide')
        return _finish(_fill(LeNet5Wide(), state), *converted, 'mnist')

    return load


def _mlp5x100(weights: pathlib.Path) -> Published:
    """The network 5 x 100 of ERAN."""
    state = interop.read_state_dict(weights / 'mnist_mlp5x100_standard.pth')
    converted = interop.from_torch(state, 'sequential')
    return _finish(_fill(MLP5x100(), state), *converted, 'mnist')


def _cnn_a(weights: pathlib.Path) -> Published:
    """CNN-A of alpha-beta-CROWN, adversarially trained."""
    state = interop.read_state_dict(weights / 'cifar10_cnn_a_pgd_linf2.pth')
    options = {'strides': 2, 'padding': 1, 'pool': 'none', **_CNN_A}
    converted = interop.from_torch(state, 'sequential', **options)
    return _finish(_fill(CNNA(**_CNN_A), state), *converted, 'cifar10')


def _resnet20(weights: pathlib.Path) -> Published:
    """ResNet-20 of akamaster/pytorch_resnet_cifar10."""
    state = interop.read_state_dict(weights / 'cifar10_resnet20_standard.th')
    converted = interop.from_torch(state, 'cifar_resnet20', **_IMAGENET)
    return _finish(_fill(CIFARResNet20(10, **_IMAGENET), state), *converted, 'cifar10')


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
    state = interop.read_state_dict(weights / 'cifar10_resnet2b_pgd_linf2.pth')
    converted = interop.from_torch(state, _LinenResNet2B())
    return _finish(_fill(ResNet2B(_MEAN, _STD), state), *converted, 'cifar10')


_LOADERS: dict[str, Callable[[pathlib.Path], Published]] = {
    'lenet5': _lenet5('mnist_lenet5_standard.pt'),
    'lenet5_robust': _lenet5('mnist_lenet5_pgd_linf03.pt'),
    'resnet20': _resnet20,
    'resnet2b': _resnet2b,
    'cnn_a': _cnn_a,
    'mlp5x100': _mlp5x100,
}
NAMES = tuple(_LOADERS)
_ORIGINS = {
    'lenet5': 'LeNet-5 for MNIST (advertorch)',
    'lenet5_robust': 'LeNet-5, adversarially trained (advertorch)',
    'resnet20': 'CIFAR ResNet-20 (akamaster/pytorch_resnet_cifar10)',
    'resnet2b': "ResNet-2B (alpha-beta-CROWN), a module of the user's",
    'cnn_a': "CNN-A (alpha-beta-CROWN), `'sequential'`",
    'mlp5x100': "MLP 5 x 100 for MNIST (ERAN), `'sequential'`",
}


def accuracies(weights: str, data_dir: str, count: int) -> str:
    """Compares both sides of every network on test images.

    Args:
        weights: folder of the files.
        data_dir: directory of TFDS.
        count: how many images.

    Returns:
        A Markdown table: accuracies, share of equal predictions, and the largest difference of
        logits as a share of the largest logit.
    """
    rows = []
    for name in NAMES:
        pair = load(name, weights)
        x, y = images(pair.data_set, data_dir, count)
        run = jax.jit(pair.forward)
        parts = [slice(start, start + _BATCH) for start in range(0, count, _BATCH)]
        ours = np.concatenate([run(pair.variables, x[part])[0] for part in parts])
        theirs = np.concatenate([pair.network(torch_images(x[part])).numpy() for part in parts])
        predictions = ours.argmax(1), theirs.argmax(1)
        shares = [np.mean(predicted == y) for predicted in predictions]
        shares.append(np.mean(predictions[0] == predictions[1]))
        difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
        shown = (f'{100 * share:.2f} %' for share in shares)
        rows.append((_ORIGINS[name], *shown, f'{difference:.1e}'))
    header = (
        'Network (file of)',
        'accuracy here',
        'in PyTorch',
        'same predictions',
        'largest difference of logits',
    )
    return harness.markdown_table(header, rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', required=True, help='folder of the files')
    parser.add_argument('--data_dir', required=True, help='directory of TFDS')
    parser.add_argument('--images', type=int, default=10_000, help='how many test images')
    harness.add_arguments(parser, devices=('cpu',))
    return parser.parse_args(arguments)


def main() -> None:
    """Prints the accuracies."""
    arguments = parse_arguments()
    harness.use_device('cpu')
    harness.start_jax(_BATCH)
    table = accuracies(arguments.weights, arguments.data_dir, arguments.images)
    harness.report(arguments, f'On {arguments.images:,} test images.', table)


if __name__ == '__main__':
    main()
