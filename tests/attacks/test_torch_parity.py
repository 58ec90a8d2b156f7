"""The same iterates as PyTorch libraries, step for step, on a published network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import data, models
from neurosens.attacks import Threat, fgsm, mi_fgsm, pgd
from neurosens.forward import LinenForward

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')
torchattacks = pytest.importorskip('torchattacks', reason='parity needs requirements-bench.txt')
foolbox = pytest.importorskip('foolbox', reason='parity needs requirements-bench.txt')

COUNT = 8


class LeNet(torch.nn.Module):
    """The network of the published weights."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = torch.nn.Linear(3136, 200)
        self.linear2 = torch.nn.Linear(200, 10)

    def forward(self, x):
        for convolution in (self.conv1, self.conv2):
            x = torch.nn.functional.max_pool2d(convolution(x).relu(), 2)
        return self.linear2(self.linear1(x.flatten(1)).relu())


@pytest.fixture(scope='module')
def pair(data_root):
    """The network on both sides in double precision, with the first images it classifies."""
    path = data_root / 'weights' / 'mnist_lenet5_standard.pt'
    state = torch.load(path, weights_only=True, map_location='cpu')
    network = LeNet()
    network.load_state_dict(state)
    network.double().eval()
    weights = {name: value.double().numpy() for name, value in state.items()}
    # PyTorch flattens channels first.
    hidden = weights['linear1.weight'].reshape(200, 64, 7, 7).transpose(2, 3, 1, 0)
    params = {
        name: {
            'kernel': weights[f'{name}.weight'].transpose(2, 3, 1, 0),
            'bias': weights[f'{name}.bias'],
        }
        for name in ('conv1', 'conv2')
    }
    params['dense3'] = {'kernel': hidden.reshape(3136, 200), 'bias': weights['linear1.bias']}
    params['head'] = {'kernel': weights['linear2.weight'].T, 'bias': weights['linear2.bias']}
    source = data.open('mnist', 'test', str(data_root / 'tfds'), 0)
    batch = next(
        iter(
            source.eval_batches(batch_size=2 * COUNT, process_index=0, process_count=1, limit=None)
        )
    )
    images = np.float64(batch.image) / 255
    with torch.no_grad():
        predicted = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).argmax(1).numpy()
    rows = np.flatnonzero(predicted == batch.label)[:COUNT]
    module = models.create('lenet5_wide', num_classes=10, dtype=jnp.float64)
    forward = LinenForward(module, {'train': False})
    return network, forward, {'params': params}, images[rows], np.asarray(batch.label)[rows]


def ours(pair, attack, threat, **options):
    _, forward, variables, x, y = pair
    with jax.enable_x64(True):
        result = attack(
            forward, variables, x, y, jax.random.key(0), threat=threat, keep='last', **options
        )
        return np.asarray(result.x_adv)


def theirs(pair, attack):
    network, _, _, x, y = pair
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    adversarial = attack(network)(images, torch.from_numpy(y.astype(np.int64)))
    assert adversarial.dtype == torch.float64
    return adversarial.detach().numpy().transpose(0, 2, 3, 1)


def assert_same(one, other, clean):
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert np.abs(other - clean).max() > 0.05


@pytest.mark.parametrize('steps', [1, 10])
def test_linf_pgd_is_that_of_torchattacks(pair, steps):
    mine = ours(pair, pgd, Threat('linf', 0.2), steps=steps, step_size=0.06, start='clean')
    expected = theirs(
        pair,
        lambda network: torchattacks.PGD(network, 0.2, 0.06, steps, random_start=False),
    )
    assert_same(mine, expected, pair[3])


def test_l2_pgd_is_that_of_torchattacks(pair):
    mine = ours(pair, pgd, Threat('l2', 2.0), steps=10, step_size=0.4, start='clean')
    expected = theirs(
        pair,
        lambda network: torchattacks.PGDL2(
            network, 2.0, 0.4, 10, random_start=False, eps_for_division=1e-30
        ),
    )
    assert_same(mine, expected, pair[3])


def test_fgsm_is_that_of_torchattacks(pair):
    mine = ours(pair, fgsm, Threat('linf', 0.1))
    assert_same(mine, theirs(pair, lambda network: torchattacks.FGSM(network, 0.1)), pair[3])


def test_momentum_is_that_of_torchattacks(pair):
    mine = ours(pair, mi_fgsm, Threat('linf', 0.2), steps=10, step_size=0.03, momentum=0.9)
    expected = theirs(pair, lambda network: torchattacks.MIFGSM(network, 0.2, 0.03, 10, 0.9))
    assert_same(mine, expected, pair[3])


@pytest.mark.parametrize(('norm', 'eps', 'size'), [('linf', 0.2, 0.05), ('l2', 2.0, 0.4)])
def test_pgd_is_that_of_foolbox(pair, norm, eps, size):
    network, _, _, x, y = pair
    mine = ours(pair, pgd, Threat(norm, eps), steps=10, step_size=size, start='clean')
    kind = {'linf': foolbox.attacks.LinfPGD, 'l2': foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=size, steps=10, random_start=False)
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(y.astype(np.int64))
    _, clipped, _ = attack(model, images, labels, epsilons=eps)
    assert clipped.dtype == torch.float64
    assert_same(mine, clipped.detach().numpy().transpose(0, 2, 3, 1), x)
