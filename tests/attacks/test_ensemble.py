"""Images made for another model, and the worst case over several attacks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models
from neurosens.attacks import Threat, fgsm, noise, pgd, transfer, worst_case
from neurosens.forward import LinenForward

THREAT = Threat('linf', 0.1)
KEY = jax.random.key(5)


@pytest.fixture(scope='module')
def other(net):
    """Another network that agrees with the first on some images."""
    module = models.create('cnn', num_classes=4, features=(2,), hidden=(5,))
    variables = jax.tree.map(lambda leaf: 2 * leaf, jax.jit(module.init)(jax.random.key(0), net.x))
    return LinenForward(module, {'train': False}), variables


def test_a_model_transfers_to_itself(net):
    options = {'threat': THREAT, 'steps': 5}
    direct = pgd(net.forward, net.variables, net.x, net.y, KEY, **options)
    own = {'surrogate': net.forward, 'surrogate_variables': net.variables}
    moved = transfer(net.forward, net.variables, net.x, net.y, KEY, **options, **own)
    np.testing.assert_array_equal(moved.x_adv, direct.x_adv)
    np.testing.assert_array_equal(moved.success, direct.success)
    np.testing.assert_allclose(moved.margin, direct.margin, atol=1e-5)


def test_images_of_another_model_are_judged_by_the_first(net, other):
    call = (net.forward, net.variables, net.x, net.y, KEY)
    moved = transfer(
        *call, threat=THREAT, surrogate=other[0], surrogate_variables=other[1], steps=5
    )
    made = pgd(*other, net.x, net.y, KEY, threat=THREAT, steps=5).x_adv
    logits = np.asarray(net.forward(net.variables, moved.x_adv)[0])
    np.testing.assert_array_equal(moved.success, logits.argmax(-1) != net.y)
    np.testing.assert_array_equal(moved.x_adv[~net.correct], net.x[~net.correct])
    np.testing.assert_array_equal(moved.x_adv[net.correct], made[net.correct])
    assert (moved.x_adv != net.x).any() and moved.success[~net.correct].all()
    # Gradients of the model itself find more.
    own = pgd(*call, threat=THREAT, steps=5)
    assert moved.success.sum() <= own.success.sum()


def test_another_attack_may_make_the_images(net, other):
    surrogate = {'surrogate': other[0], 'surrogate_variables': other[1]}
    call = (net.forward, net.variables, net.x, net.y, KEY)
    moved = transfer(*call, threat=THREAT, attack=fgsm, **surrogate)
    made = fgsm(*other, net.x, net.y, KEY, threat=THREAT).x_adv
    np.testing.assert_array_equal(moved.x_adv[net.correct], made[net.correct])


def test_images_that_aim_at_a_class_are_judged_by_it(net, other):
    target = (net.y + 1) % 4
    surrogate = {'surrogate': other[0], 'surrogate_variables': other[1]}
    options = {'threat': Threat('linf', 0.3), 'steps': 5, 'target': target}
    call = (net.forward, net.variables, net.x, net.y, KEY)
    moved = transfer(*call, **options, **surrogate)
    made = pgd(*other, net.x, net.y, KEY, **options).x_adv
    there = np.asarray(net.logits.argmax(-1) == target)
    np.testing.assert_array_equal(moved.x_adv[there], net.x[there])
    np.testing.assert_array_equal(moved.x_adv[~there], made[~there])
    logits = np.asarray(net.forward(net.variables, moved.x_adv)[0])
    np.testing.assert_array_equal(moved.success, logits.argmax(-1) == target)
    assert moved.success.any() and not moved.success.all()


def test_the_worst_case_is_that_of_each_image(net):
    call = (net.forward, net.variables, net.x, net.y)
    results = [
        noise(*call, KEY, threat=THREAT),
        fgsm(*call, KEY, threat=THREAT),
        pgd(*call, KEY, threat=THREAT, steps=5),
    ]
    worst = jax.jit(worst_case)(*results)
    success = np.stack([result.success for result in results])
    margin = np.stack([result.margin for result in results])
    np.testing.assert_array_equal(worst.success, success.any(0))
    np.testing.assert_array_equal(
        worst.margin, np.where(success == success.any(0), margin, 9).min(0)
    )
    np.testing.assert_array_equal(worst.queries, sum(result.queries for result in results))
    logits = np.asarray(net.forward(net.variables, worst.x_adv)[0])
    np.testing.assert_array_equal(worst.success, logits.argmax(-1) != net.y)
    chex.assert_trees_all_equal(worst_case(results[1]), results[1])
    # A success beats a smaller margin without one, as of a targeted attack.
    aimed = results[1]._replace(success=jnp.ones_like(worst.success), margin=worst.margin + 1)
    np.testing.assert_array_equal(
        worst_case(results[2]._replace(success=~aimed.success), aimed).margin, aimed.margin
    )
