"""Published weights give the published accuracies, and PyTorch's logits, gradients and Deltas.

All networks on all images: `python -m benchmarks.published --weights DIR --data_dir DIR`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import data, interop, neurons, regularizers
from neurosens.forward import LinenForward

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')

import torch_networks as networks  # noqa: E402
from test_conversion import Residual  # noqa: E402

pytestmark = pytest.mark.parity

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
CIFAR10 = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2471, 0.2435, 0.2616)}
CNN_A = {
    'mean': (125.3 / 255, 123.0 / 255, 113.9 / 255),
    'std': (63.0 / 255, 62.1 / 255, 66.7 / 255),
}


def cnn_a():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 4, 2, 1),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2048, 100), torch.nn.ReLU(),
        torch.nn.Linear(100, 10),
    )  # fmt: skip


def mlp():
    layers = [torch.nn.Flatten(), torch.nn.Linear(784, 100)]
    for _ in range(4):
        layers += [torch.nn.ReLU(), torch.nn.Linear(100, 100)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(100, 10))


def resnet20():
    return networks.ResNet(networks.Basic, (3, 3, 3), 10, (16, 32, 64), shortcut='pad')


class NormalizedResidual(Residual):
    def __call__(self, x):
        return super().__call__((x - jnp.float32(CIFAR10['mean'])) / jnp.float32(CIFAR10['std']))


# File -> network of PyTorch, how it is loaded, its normalisation, data set, images, accuracy in %.
PUBLISHED = {
    'mnist_lenet5_standard.pt': (
        networks.LeNet5Wide, {'model': 'lenet5_wide'}, None, 'mnist', 10_000, 98.89,
    ),
    'mnist_lenet5_pgd_linf03.pt': (
        networks.LeNet5Wide, {'model': 'sequential', 'strides': 1, 'padding': 1, 'pool': 'max'},
        None, 'mnist', 10_000, 98.64,
    ),
    'mnist_mlp5x100_standard.pth': (
        mlp, {'model': 'mlp', 'hidden': (100,) * 5}, None, 'mnist', 10_000, 96.29,
    ),
    'cifar10_cnn_a_pgd_linf2.pth': (
        cnn_a, {'model': 'sequential', 'strides': 2, 'padding': 1, 'pool': 'none', **CNN_A},
        CNN_A, 'cifar10', 10_000, 65.65,
    ),
    'cifar10_resnet2b_pgd_linf2.pth': (
        networks.ResNet2B, {'model': NormalizedResidual()}, CIFAR10, 'cifar10', 10_000, 69.25,
    ),
    # They take a minute.
    'cifar10_resnet20_standard.th': (
        resnet20, {'model': 'cifar_resnet20', **IMAGENET}, IMAGENET, 'cifar10', 10_000, 91.73,
    ),
}  # fmt: skip


@functools.cache
def load(root, file):
    """`(network, module, variables)`; the network is filled by the order of the layers."""
    make, options, numbers, *_ = PUBLISHED[file]
    state = interop.read_state_dict(root / 'weights' / file)
    network = make()
    names = [name for name in network.state_dict() if not name.endswith('num_batches_tracked')]
    values = (torch.from_numpy(value) for name, value in state.items() if 'num_batches' not in name)
    network.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    if numbers:
        network = networks.Normalized(network, **numbers)
    module, variables = interop.load_torch(root / 'weights' / file, **options)
    return network.eval().requires_grad_(False), module, variables


@functools.cache
def read_images(root, data_set, count):
    source = data.open(data_set, 'test', str(root / 'tfds'), 0)
    batch = next(iter(source.eval_batches(batch_size=count)))
    return np.float32(batch.image) / 255, np.asarray(batch.label)


@pytest.mark.parametrize('file', PUBLISHED)
def test_predictions_are_those_of_pytorch_and_as_accurate_as_published(
    file, data_root, logits_of, assert_same
):
    network, module, variables = load(data_root, file)
    *_, data_set, count, accuracy = PUBLISHED[file]
    x, y = read_images(data_root, data_set, count)
    run = jax.jit(module.apply)
    parts = (slice(start, start + 1000) for start in range(0, count, 1000))
    ours = np.concatenate([run(variables, x[part]) for part in parts])
    theirs = logits_of(network, x[:1000])
    assert_same(ours[:1000], theirs)
    assert np.mean(ours[:1000].argmax(1) == theirs.argmax(1)) >= 0.999
    assert 100 * np.mean(ours.argmax(1) == y) == pytest.approx(accuracy, abs=0.005)


@pytest.mark.parametrize('file', PUBLISHED)
def test_the_way_back_is_exact(file, data_root):
    _, module, variables = load(data_root, file)
    state = interop.read_state_dict(data_root / 'weights' / file)
    back = interop.to_torch(module, variables, like=state)
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


class Precision(NamedTuple):
    """How many images both sides compute with, in which type, and how closely they agree."""

    dtype: type
    images: int
    gradients: float
    penalty: float
    delta: float


DOUBLE = Precision(np.float64, 3, gradients=1e-9, penalty=1e-9, delta=1e-9)
SINGLE = Precision(np.float32, 8, gradients=3e-5, penalty=1e-5, delta=1e-4)


@pytest.fixture(
    params=[(file, precision) for precision in (DOUBLE, SINGLE) for file in PUBLISHED],
    ids=lambda case: f'{case[0]}-{case[1].dtype.__name__}',
)
def both_sides(request, data_root):
    """`(network, forward, variables, images, labels, precision)`."""
    file, precision = request.param
    network, module, variables = load(data_root, file)
    x, y = read_images(data_root, PUBLISHED[file][3], 1_000)
    dtype = jnp.dtype(precision.dtype)
    # Without a type of its own a module computes in that of its variables.
    forward = LinenForward(module.clone(dtype=dtype) if hasattr(module, 'dtype') else module)
    x = x[: precision.images]
    if PUBLISHED[file][3] == 'mnist':
        # In strokes of one brightness rounding alone says which of equal values max pooling takes,
        # and so where its gradient goes; and rounding differs between processors.
        noise = np.random.default_rng(0).random(x.shape)
        x = 0.1 + 0.8 * x + 0.1 * (noise - 0.5)
    with jax.enable_x64(precision is DOUBLE):
        yield (
            network.to(getattr(torch, dtype.name)),
            forward,
            jax.tree.map(precision.dtype, variables),
            x.astype(dtype),
            y[: precision.images],
            precision,
        )
    network.float()


def torch_gradients(network, x, values):
    """d values / d images, in our order; `values` is a function of logits."""
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    (gradient,) = torch.autograd.grad(values(network(images)), images)
    return gradient.numpy().transpose(0, 2, 3, 1)


def test_input_gradients(both_sides):
    network, forward, variables, x, y, precision = both_sides
    # The gradient of a loss that is almost 0 is a difference of numbers that are not.
    y = (y + 1) % 10

    def loss(x):
        log_probabilities = jax.nn.log_softmax(forward(variables, x)[0])
        return -log_probabilities[jnp.arange(len(y)), y].sum()

    theirs = torch_gradients(
        network,
        x,
        lambda z: torch.nn.functional.cross_entropy(z, torch.tensor(y).long(), reduction='sum'),
    )
    ours = np.asarray(jax.jit(jax.grad(loss))(x))
    assert ours.dtype == precision.dtype
    atol = precision.gradients * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_the_jacobian_penalty(both_sides):
    network, forward, variables, x, y, precision = both_sides
    penalty, _ = jax.jit(regularizers.jacobian(projections=-1))(
        forward, variables, x, y, jax.random.key(0)
    )
    rows = [torch_gradients(network, x, lambda z, c=c: z[:, c].sum()) for c in range(10)]
    expected = np.sum(np.square(np.float64(rows))) / len(x) / 2
    assert float(penalty) == pytest.approx(expected, rel=precision.penalty)


def test_sensitivity(both_sides):
    network, forward, variables, x, _, precision = both_sides
    caught = []
    head = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    logits = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    hook.remove()
    features, weights = caught[0].numpy(), head.weight.numpy()
    delta, flips_to = neurons.sensitivity(forward, variables, x, layer='head:in')
    for n, z in enumerate(logits):
        own = z.argmax()
        others = np.delete(np.arange(10), own)
        moves = (z[own] - z[others])[:, None] / (weights[others] - weights[own])
        # Behind a ReLU a neuron cannot fall below 0.
        moves[moves < -features[n]] = np.inf
        best = np.abs(moves).argmin(0)
        expected = moves[best, np.arange(len(best))]
        np.testing.assert_allclose(delta[n], expected, rtol=precision.delta)
        reached = np.isfinite(expected)
        if precision is DOUBLE:
            # Two classes may be equally near in float32.
            np.testing.assert_array_equal(flips_to[n][reached], others[best][reached])
