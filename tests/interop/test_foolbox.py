"""Attacks of foolbox run on our models, and find what ours find."""

import jax
import numpy as np
import pytest

from neurosens import attacks, data, interop, with_input_transform
from neurosens.attacks import Threat
from neurosens.forward import LinenForward

foolbox = pytest.importorskip('foolbox', reason='parity needs requirements-bench.txt')

pytestmark = pytest.mark.parity


# Of images of each network, by norm: that both attacks fool some and not all.
EPS = {'linear': {'linf': 0.02, 'l2': 0.12}, 'convolutional': {'linf': 0.02, 'l2': 0.12}}


def features_and_state(name, images):
    """Features `[N, F]` of images, the state dict before the head, and options of the stack."""
    x = images.transpose(0, 3, 1, 2)
    if name == 'linear':
        return x.reshape(len(x), -1), {}, {}
    kernel = np.random.default_rng(0).normal(size=(8, 1, 3, 3)) / 3
    padded = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    maps = np.maximum(np.einsum('nhwij,coij->nchw', windows, kernel), 0)
    pooled = maps.reshape(len(x), 8, 4, 2, 4, 2).max((3, 5))
    options = {'strides': 1, 'padding': 1, 'pool': 'max', 'image_shape': (8, 8, 1)}
    return pooled.reshape(len(x), -1), {'conv.weight': kernel}, options


@pytest.fixture(scope='module', params=EPS)
def classifier(request):
    """A classifier of digits whose head is of least squares: `(name, forward, variables, x, y)`."""
    train, test = (data.load('digits', split) for split in ('train', 'test'))
    images = np.asarray(data.to_float(train.images))
    features, state, options = features_and_state(request.param, images)
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    weights = np.linalg.lstsq(features, np.eye(10)[train.labels], rcond=None)[0].T
    state |= {'head.weight': 8 * weights[:, :-1], 'head.bias': 8 * weights[:, -1]}
    module, variables = interop.from_torch(state, 'sequential', **options)
    x = jax.numpy.asarray(data.to_float(test.images[:100]))
    return request.param, LinenForward(module), variables, x, jax.numpy.asarray(test.labels[:100])


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_robust_accuracy_is_ours(classifier, norm):
    name, forward, variables, x, y = classifier
    eps = EPS[name][norm]
    model = interop.foolbox_model(forward, variables)
    assert model.bounds == (0, 1) and model.data_format == 'channels_last'
    accuracy = float((forward(variables, x)[0].argmax(-1) == y).mean())
    assert accuracy > 0.9 and foolbox.accuracy(model, x, y) == pytest.approx(accuracy)
    kind = {'linf': foolbox.attacks.LinfPGD, 'l2': foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=eps / 4, steps=10, random_start=False)
    _, adversarial, success = attack(model, x, y, epsilons=eps)
    ours = attacks.pgd(
        forward, variables, x, y, jax.random.key(0), threat=Threat(norm, eps), steps=10,
        step_size=eps / 4, start='clean', keep='last',
    )  # fmt: skip
    robust, expected = 1 - float(np.mean(success)), 1 - float(ours.success.mean())
    assert 0.05 < robust < 0.9
    assert robust == pytest.approx(expected, abs=0.011)
    found = np.asarray(adversarial - x)
    size = np.abs(found).max() if norm == 'linf' else np.sqrt((found**2).sum((1, 2, 3))).max()
    # Pixels that leave their bounds shorten it.
    assert size == pytest.approx(eps, rel=5e-3)


def test_a_defended_model_is_attacked_too(classifier):
    _, forward, variables, x, y = classifier
    defended = with_input_transform(forward, lambda x: jax.numpy.round(4 * x) / 4)
    model = interop.foolbox_model(defended, variables)
    np.testing.assert_allclose(model(x), defended(variables, x)[0], rtol=1e-5, atol=1e-6)
    _, adversarial, _ = foolbox.attacks.LinfAdditiveUniformNoiseAttack()(model, x, y, epsilons=0.1)
    assert np.abs(adversarial - x).max() <= 0.1001
