"""Penalties, losses and their gradients are those of PyTorch's double backpropagation."""

import jax
import numpy as np
import pytest

from neurosens.regularizers import (
    activation_sensitivity,
    input_gradient,
    jacobian,
    jacobian_root,
    neuron_contribution,
)
from neurosens.training import adversarial

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')

pytestmark = pytest.mark.parity

KEY = jax.random.key(0)


@pytest.fixture(scope='module')
def pair(data_root):
    """The published LeNet-5 on both sides, in double precision, with six images."""
    # Imported here: it needs torch.
    import published_lenet

    return published_lenet.load(data_root, 6)


def torch_images(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()


def torch_jacobian(network, x):
    """d logits / d x `[B, C, D]`, differentiable."""
    images = torch_images(x)
    logits = network(images)
    rows = [
        torch.autograd.grad(logits[:, c].sum(), images, create_graph=True)[0].flatten(1)
        for c in range(logits.shape[1])
    ]
    return torch.stack(rows, 1)


def torch_value_and_gradients(network, value):
    """The value, and its gradients for kernels in our order."""
    names, parameters = zip(*network.named_parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    gradients = {
        name: np.zeros(parameter.shape) if gradient is None else gradient.numpy()
        for name, parameter, gradient in zip(names, parameters, found)
    }
    hidden = gradients['linear1.weight'].reshape(200, 64, 7, 7).transpose(2, 3, 1, 0)
    return value.item(), {
        'conv1': gradients['conv1.weight'].transpose(2, 3, 1, 0),
        'conv2': gradients['conv2.weight'].transpose(2, 3, 1, 0),
        'dense3': hidden.reshape(3136, 200),
        'head': gradients['linear2.weight'].T,
    }


def assert_same(ours, theirs):
    value, params = ours
    expected, gradients = theirs
    assert float(value) == pytest.approx(expected, rel=1e-9)
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(params[name]['kernel'], gradient, atol=1e-9 * max(scale, 1e-9))


def ours(pair, regularizer):
    """The penalty and its gradients."""
    _, forward, variables, x, y = pair

    def penalty(params):
        return regularizer(forward, {'params': params}, x, y, KEY)[0]

    with jax.enable_x64(True):
        return jax.device_get(jax.jit(jax.value_and_grad(penalty))(variables['params']))


def test_the_exact_jacobian_penalty(pair):
    network, *_, x, _ = pair
    theirs = (torch_jacobian(network, x) ** 2).sum() / len(x) / 2
    assert_same(ours(pair, jacobian(projections=-1)), torch_value_and_gradients(network, theirs))


def test_the_root_over_the_batch(pair):
    network, *_, x, _ = pair
    theirs = (torch_jacobian(network, x) ** 2).sum().sqrt()
    assert_same(ours(pair, jacobian_root()), torch_value_and_gradients(network, theirs))


def test_the_input_gradient_penalty(pair):
    network, *_, x, y = pair
    images = torch_images(x)
    loss = torch.nn.functional.cross_entropy(
        network(images), torch.from_numpy(np.int64(y)), reduction='sum'
    )
    (slope,) = torch.autograd.grad(loss, images, create_graph=True)
    theirs = (slope**2).sum() / len(x)
    assert_same(ours(pair, input_gradient()), torch_value_and_gradients(network, theirs))


def test_neuron_contribution(pair):
    """T1 and T2 of Suri & Evans as plain loops over pairs of classes and images."""
    network, *_, x, y = pair
    top, d1, d2 = 5, 10.0, 100.0
    features = []
    hook = network.linear2.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    network(torch_images(x))
    hook.remove()
    weights, h = network.linear2.weight, features[0]
    pairs = [
        (weights[a] - weights[b]).abs().topk(top).values.mean() for a in range(10) for b in range(a)
    ]
    first = torch.stack(pairs).max()
    second = torch.stack(
        [
            (h[i] * (weights[int(y[i])] - weights[c])).abs().topk(top).values.mean() / h[i].sum()
            for i in range(len(x))
            for c in range(10)
        ]
    ).mean()
    found = ours(
        pair, neuron_contribution(top=top, weight_difference_weight=d1, contribution_weight=d2)
    )
    assert_same(found, torch_value_and_gradients(network, d1 * first + d2 * second))


@pytest.mark.parametrize('name', ['activation sensitivity', 'Jacobian, one projection', 'both'])
def test_the_peers_that_are_timed_draw_around_the_same_penalties(pair, name):
    from benchmarks import torch_regularizers

    network, forward, variables, x, y = pair
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    found = torch_regularizers.run(network, images, train=False)
    torch.manual_seed(0)
    draw, ours = {
        'activation sensitivity': (
            torch_regularizers.sensitivity, activation_sensitivity(estimator='exact')
        ),
        'Jacobian, one projection': (torch_regularizers.jacobian, jacobian(projections=-1)),
        'both': (lambda found: torch_regularizers.sensitivity(found, 0.5), None),
    }[name]  # fmt: skip
    draws = np.array([draw(found).item() for _ in range(400)])

    def value(regularizer):
        with jax.enable_x64(True):
            return float(regularizer(forward, variables, x, y, KEY)[0])

    if ours is None:
        halves = value(activation_sensitivity(estimator='exact')), value(jacobian(projections=-1))
        expected = sum(halves)
    else:
        expected = value(ours)
    error = draws.std(ddof=1) / np.sqrt(len(draws))
    assert error < 0.05 * expected
    assert draws.mean() == pytest.approx(expected, abs=4 * error)


def test_the_peer_of_neuron_contribution_that_is_timed_computes_the_same(pair):
    from benchmarks import torch_regularizers

    network, *_, x, y = pair
    with torch_regularizers._Hidden(network) as hidden:
        network(torch_images(x))
    theirs = torch_regularizers.contribution(
        network, hidden.features[0], torch.from_numpy(np.int64(y))
    )
    assert_same(ours(pair, neuron_contribution()), torch_value_and_gradients(network, theirs))


@pytest.mark.parametrize('beta', [1.0, 6.0])
@pytest.mark.parametrize('name', ['trades', 'mart'])
def test_losses_of_attacked_images(pair, name, beta):
    """Of the same attacked images, as the released programs write them."""
    network, forward, variables, x, y = pair
    signs = np.random.default_rng(0).choice([-0.2, 0.2], x.shape)
    x_adv = np.clip(x + signs, 0, 1)
    labels = torch.from_numpy(np.int64(y))
    clean, attacked = network(torch_images(x)), network(torch_images(x_adv))
    functional = torch.nn.functional
    if name == 'trades':
        divergence = functional.kl_div(
            attacked.log_softmax(1), clean.softmax(1), reduction='batchmean'
        )
        theirs = functional.cross_entropy(clean, labels) + beta * divergence
    else:
        shares = attacked.softmax(1)
        order = shares.argsort(1)[:, -2:]
        other = torch.where(order[:, -1] == labels, order[:, -2], order[:, -1])
        boosted = functional.cross_entropy(attacked, labels) + functional.nll_loss(
            torch.log(1.0001 - shares + 1e-12), other
        )
        before = clean.softmax(1)
        own = before.gather(1, labels[:, None])[:, 0]
        divergence = functional.kl_div(torch.log(shares + 1e-12), before, reduction='none').sum(1)
        theirs = boosted + beta * (divergence * (1.0000001 - own)).mean()

    def loss(params):
        logits = [forward({'params': params}, images)[0] for images in (x, x_adv)]
        if name == 'mart':
            return adversarial.mart_losses(*logits, y, beta).mean()
        fit = adversarial.cross_entropy(logits[0], y).mean()
        return fit + beta * adversarial.divergence(*logits).mean()

    with jax.enable_x64(True):
        found = jax.device_get(jax.jit(jax.value_and_grad(loss))(variables['params']))
    assert_same(found, torch_value_and_gradients(network, theirs))
