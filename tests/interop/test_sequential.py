"""Plain stacks are built from their weights; what weights do not tell has to be said."""

import numpy as np
import pytest

from neurosens import interop, layers
from neurosens.forward import LinenForward

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')

import torch_networks as networks  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = pytest.mark.parity

CNN_A = {'strides': 2, 'padding': 1, 'pool': 'none'}

STACKS = {
    'CNN-A': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5),
        ),
        (8, 8, 3),
        CNN_A,
    ),
    'of everything': (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 5), 1, 0, bias=False), nn.BatchNorm2d(3), nn.Tanh(),
            nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, 2, 2), nn.Tanh(), nn.Flatten(),
            nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 7, bias=False), nn.Tanh(),
            nn.Linear(7, 3, bias=False),
        ),
        (10, 14, 2),
        {'strides': (1, 2), 'padding': (0, 2), 'pool': ('avg', 'none'), 'activation': 'tanh'},
    ),
    'with normalisations behind activations': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 4),
        ),
        (8, 8, 3),
        {'strides': 2, 'padding': 1, 'pool': 'max', 'norm': 'after'},
    ),
    'with the mean over positions': (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        ),
        (12, 12, 1),
        {'strides': 1, 'padding': (1, 0), 'pool': ('max', 'mean')},
    ),
    'without convolutions': (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 9), nn.ReLU(), nn.Linear(9, 4)),
        (6, 6, 3),
        {},
    ),
    'linear': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(49, 4)), (7, 7, 1), {}),
}  # fmt: skip


@pytest.mark.parametrize('name', STACKS)
def test_a_stack_is_built_from_its_weights(name, images, logits_of, assert_same):
    make, image, options = STACKS[name]
    network = networks.randomize(make())
    shape = image if image[0] != image[1] else None
    state = {f'net.{entry}': value for entry, value in network.state_dict().items()}
    module, variables = interop.from_torch(state, 'sequential', image_shape=shape, **options)
    x = images(3, *image)
    assert_same(logits_of(module, x, variables), logits_of(network, x))
    back = interop.to_torch(module, variables, like=state, image_shape=shape)
    for entry, value in state.items():
        np.testing.assert_array_equal(back[entry], value.numpy())
    # It is a model like all others.
    names = list(layers(LinenForward(module), variables, x))
    assert names[0] == 'normalize' and names[-1] == 'head'
    assert hash(module) == hash(module.clone())


def state(make=STACKS['CNN-A'][0]):
    return networks.randomize(make()).state_dict()


def residual():
    return networks.ResNet(networks.Basic, (1, 1), 3)


MISTAKES = [
    (state, {}, "The shapes of the convolutions '0', '2' do not tell strides and padding and pool"),
    (state, {'strides': 2, 'padding': 1}, "do not tell pool; give pool=..., one value"),
    (state, {**CNN_A, 'strides': (2,)}, r'strides is \(2,\), but there are 2 convolutions'),
    (state, {**CNN_A, 'strides': 0}, 'strides is 0, but it must be an integer of at least 1'),
    (state, {**CNN_A, 'strides': 2.0}, r'strides is 2\.0, but it must be an integer of at least 1'),
    (state, {**CNN_A, 'padding': None}, r'do not tell padding; give padding=\.\.\.'),
    (state, {**CNN_A, 'pool': 'min'}, "pool is 'min', but it must be one of max, avg, none, mean"),
    (state, {**CNN_A, 'stride': 2}, "Unknown sequential option 'stride'"),
    (state, {**CNN_A, 'num_classes': 10}, 'num_classes is 10, but the last layer'),
    (state, {**CNN_A, 'image_shape': (28, 28, 3)}, r"'5.weight' has shape \(8, 24\) in place of"),
    (lambda: state(residual), CNN_A, "'layer2.0.shortcut.0' takes 64 inputs, but"),
    (
        lambda: state(networks.SmallCNN),
        CNN_A,
        "The normalisation 'norm_a' stands behind no layer of its width",
    ),
    (
        lambda: state(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(3, 4, 3))),
        CNN_A,
        "'1' takes 3 inputs, but '0' before it has 4 outputs",
    ),
    (
        lambda: state(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(10, 3))),
        CNN_A,
        "'1' takes 10 inputs, which is no multiple of the 4 channels of '0'",
    ),
    (lambda: state(lambda: nn.Sequential(nn.Conv2d(2, 4, 3))), CNN_A, 'has no linear layer'),
    (
        lambda: state(lambda: nn.Sequential(nn.Linear(10, 3))),
        {},
        'takes 10 inputs, which are no square image of 1 or 3 channels; give image_shape=',
    ),
    (
        lambda: state(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))),
        {},
        'A normalisation follows the last layer',
    ),
    (
        lambda: state(
            lambda: nn.Sequential(nn.Linear(64, 16), nn.Conv2d(1, 4, 3), nn.Linear(16, 3))
        ),
        {'strides': 1, 'padding': 1, 'pool': 'none', 'image_shape': (4, 4, 1)},
        "^The convolution '1' stands behind the linear layer '0'; this is no plain stack, so name",
    ),
    (
        lambda: {'0.weight': np.ones((2, 3, 3)), '1.weight': np.ones((2, 2))},
        {},
        r"'0' \(weight \(2, 3, 3\)\) is no convolution over positions",
    ),
]  # fmt: skip


@pytest.mark.parametrize(('make', 'options', 'sentence'), MISTAKES)
def test_a_mistake_is_one_sentence(make, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        interop.from_torch(make(), 'sequential', **options)
    assert '\n' not in str(caught.value) and str(caught.value).endswith('.')
