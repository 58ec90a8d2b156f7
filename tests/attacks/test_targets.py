"""Which class attacks aim at."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import attacks
from neurosens.attacks import TARGETS, Threat, random_forward, target_classes
from neurosens.config import settings
from neurosens.forward import with_input_transform

KEY = jax.random.key(2)


@jax.tree_util.register_static
class Logits:
    """A model whose logits are its images."""

    def __call__(self, variables, x, edits=None, taps=()):
        return x, {}


def chosen(x, y, kind, key=KEY, **options):
    found = target_classes(Logits(), {}, jnp.asarray(x), jnp.asarray(y), key, kind=kind, **options)
    assert found.dtype == jnp.int32
    return np.asarray(found)


def test_the_most_and_the_least_likely_are_not_the_label():
    logits = np.float32([[3, 1, 2, 0]] * 4)
    y = np.arange(4)
    np.testing.assert_array_equal(chosen(logits, y, 'most_likely'), [2, 0, 0, 0])
    np.testing.assert_array_equal(chosen(logits, y, 'least_likely'), [3, 3, 3, 1])


def test_random_classes_are_all_others_equally_often_and_follow_the_example():
    y = np.arange(3000) % 3
    found = chosen(np.zeros((3000, 3), np.float32), y, 'random')
    for label in range(3):
        counts = np.bincount(found[y == label], minlength=3)
        assert counts[label] == 0
        # Five standard deviations of 1,000 throws of a coin.
        assert abs(counts[(label + 1) % 3] - 500) < 80
    rows = np.arange(1200, 900, -1)
    part = chosen(np.zeros((300, 3), np.float32), y[rows], 'random', index=rows)
    np.testing.assert_array_equal(part, found[rows])
    other = chosen(np.zeros((3000, 3), np.float32), y, 'random', jax.random.key(3))
    assert (other != found).any()


@pytest.mark.parametrize('kind', TARGETS)
def test_two_classes_leave_no_choice_and_one_none_at_all(kind):
    y = np.arange(6) % 2
    logits = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    np.testing.assert_array_equal(chosen(logits, y, kind), 1 - y)
    with pytest.raises(ValueError, match='The model has 1 class, and none to aim at'):
        chosen(logits[:, :1], 0 * y, kind)


def test_settings_know_what_can_be_aimed_at_and_by_what():
    assert settings.TARGETS == TARGETS
    for name in settings.AIMING:
        function = getattr(attacks, name)
        parameters = inspect.signature(function).parameters
        # The others hand all their options to PGD.
        assert 'target' in parameters or 'options' in parameters


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="Unknown kind 'next'; valid names are most_likely, "):
        chosen(np.zeros((1, 2)), np.zeros(1, int), 'next')


AIMING = {
    'fgsm': attacks.fgsm,
    'fgsm_rs': attacks.fgsm_rs,
    'bim': functools.partial(attacks.bim, steps=4),
    'mi_fgsm': functools.partial(attacks.mi_fgsm, steps=4),
    'ni_fgsm': functools.partial(attacks.ni_fgsm, steps=4),
    'square': functools.partial(attacks.square, queries=60),
}


@pytest.mark.parametrize('name', AIMING)
def test_success_is_to_be_taken_for_the_target(net, name):
    target = (np.asarray(net.y) + 1) % 4
    threat = Threat('linf', 0.3)
    result = AIMING[name](
        net.forward, net.variables, net.x, net.y, KEY, threat=threat, target=target
    )
    found = np.asarray(net.forward(net.variables, result.x_adv)[0]).argmax(-1)
    np.testing.assert_array_equal(result.success, found == target)
    there = np.asarray(net.logits).argmax(-1) == target
    np.testing.assert_array_equal(result.x_adv[there], net.x[there])
    assert there.any() and result.success.sum() > there.sum()
    assert np.abs(result.x_adv - net.x).max() <= 0.3 + 1e-6


def test_draws_of_a_random_model_follow_the_example(net):
    """Whatever the batch: targets, images of another model, and what AutoAttack takes for clean."""

    def draw(key):
        return with_input_transform(
            net.forward, lambda x: x + 0.3 * jax.random.normal(key, x.shape)
        )

    model = random_forward(draw, KEY)
    index = np.arange(16) + 40
    rows = np.array([5, 12, 3])

    def of(rows):
        threat = Threat('linf', 0.05)
        batch = model, net.variables, net.x[rows], net.y[rows], KEY
        found = {
            kind: target_classes(*batch, kind=kind, index=index[rows])
            for kind in ('most_likely', 'least_likely')
        }
        surrogate = {'surrogate': net.forward, 'surrogate_variables': net.variables, 'steps': 2}
        moved = attacks.transfer(*batch, threat=threat, index=index[rows], **surrogate)
        found['transfer'] = moved.margin
        held = model, net.variables, np.asarray(net.x[rows]), np.asarray(net.y[rows]), KEY
        whole = attacks.autoattack(
            *held, threat=threat, version='rand', attacks=('apgd-ce',), steps=2,
            batch_size=len(rows), index=index[rows],
        )  # fmt: skip
        found['clean'] = whole.broken_by == attacks.CLEAN
        return found

    whole, part = of(np.arange(16)), of(rows)
    for name, values in whole.items():
        np.testing.assert_allclose(np.asarray(values)[rows], part[name], rtol=1e-4, atol=1e-4)
    plain = np.argsort(-np.asarray(net.logits), -1)
    assert (np.asarray(whole['least_likely']) != plain[:, -1]).any(), 'the model is random'
