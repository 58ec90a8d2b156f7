"""Attacks of foolbox run on our models, and find what ours find."""

import jax
import numpy as np
import pytest

from neurosens import attacks, data, interop, with_input_transform
from neurosens.attacks import Threat
from neurosens.forward import LinenForward

foolbox = pytest.importorskip('foolbox', reason='parity needs requirements-bench.txt')

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def classifier():
    """A linear classifier of digits, by least squares: `(forward, variables, x, y)`."""
    train, test = (data.load('digits', split) for split in ('train', 'test'))
    x = np.float32(train.images).reshape(len(train.images), -1) / 255
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    weights = np.linalg.lstsq(x, np.eye(10)[train.labels], rcond=None)[0].T
    state = {'head.weight': 8 * weights[:, :-1], 'head.bias': 8 * weights[:, -1]}
    module, variables = interop.from_torch(state, 'sequential')
    images = jax.numpy.asarray(data.to_float(test.images[:100]))
    return LinenForward(module), variables, images, jax.numpy.asarray(test.labels[:100])


@pytest.mark.parametrize(('norm', 'eps'), [('linf', 0.02), ('l2', 0.12)])
def test_robust_accuracy_is_ours(classifier, norm, eps):
    forward, variables, x, y = classifier
    model = interop.foolbox_model(forward, variables)
    assert model.bounds == (0, 1) and model.data_format == 'channels_last'
    assert foolbox.accuracy(model, x, y) == pytest.approx(
        float((forward(variables, x)[0].argmax(-1) == y).mean())
    )
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
    assert size == pytest.approx(eps, rel=1e-3)


def test_a_defended_model_is_attacked_too(classifier):
    forward, variables, x, y = classifier
    defended = with_input_transform(forward, lambda x: jax.numpy.round(4 * x) / 4)
    model = interop.foolbox_model(defended, variables)
    np.testing.assert_allclose(model(x), defended(variables, x)[0], rtol=1e-5, atol=1e-6)
    _, adversarial, _ = foolbox.attacks.LinfAdditiveUniformNoiseAttack()(model, x, y, epsilons=0.1)
    assert np.abs(adversarial - x).max() <= 0.1001
