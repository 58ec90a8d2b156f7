"""Random models are averaged out, and hidden gradients replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens.attacks import Threat, is_random, pgd, random_forward, redraw, straight_through
from neurosens.forward import with_edits, with_input_transform


@pytest.fixture(scope='module')
def noisy(net):
    def draw(key):
        return with_input_transform(
            net.forward, lambda x: x + 0.3 * jax.random.normal(key, x.shape)
        )

    return random_forward(draw, jax.random.key(0))


def test_a_random_model_is_a_pure_function_of_its_key(net, noisy):
    one, again = (noisy(net.variables, net.x)[0] for _ in range(2))
    np.testing.assert_array_equal(one, again)
    other = redraw(noisy, jax.random.key(1))(net.variables, net.x)[0]
    assert (one != other).any()


def test_randomness_is_found_below_wrappers(net, noisy):
    wrapped = with_edits(noisy, {'act1': lambda h: 2 * h})
    assert is_random(noisy) and is_random(wrapped)
    assert not is_random(net.forward)
    one = wrapped(net.variables, net.x)[0]
    other = redraw(wrapped, jax.random.key(1))(net.variables, net.x)[0]
    assert (one != other).any()
    np.testing.assert_array_equal(
        redraw(net.forward, jax.random.key(1))(net.variables, net.x)[0],
        net.forward(net.variables, net.x)[0],
    )


def test_averaging_over_draws_makes_the_stronger_attack(net, noisy):
    threat, key = Threat('linf', 0.1), jax.random.key(0)
    options = {'threat': threat, 'steps': 8, 'keep': 'last'}

    def accuracy(result):
        logits = [
            redraw(noisy, jax.random.key(1000 + draw))(net.variables, result.x_adv)[0]
            for draw in range(20)
        ]
        return float(np.mean([np.asarray(each).argmax(-1) == net.y for each in logits]))

    once, often = (
        pgd(noisy, net.variables, net.x, net.y, key, draws=draws, **options) for draws in (1, 16)
    )
    assert accuracy(often) <= accuracy(once) + 0.02
    np.testing.assert_array_equal(often.queries, 16 * (1 + 9))
    margin = pgd(noisy, net.variables, net.x, net.y, key, draws=64, **options).margin
    repeated = pgd(noisy, net.variables, net.x, net.y, key, draws=64, **options).margin
    np.testing.assert_array_equal(margin, repeated)


def test_a_hidden_gradient_is_replaced(net):
    def quantize(x):
        return jnp.round(x * 8) / 8

    hidden = with_input_transform(net.forward, quantize)
    seen = with_input_transform(net.forward, straight_through(quantize))
    options = {'threat': Threat('linf', 0.1), 'steps': 10, 'start': 'clean'}
    key = jax.random.key(0)
    blind = pgd(hidden, net.variables, net.x, net.y, key, **options)
    sighted = pgd(seen, net.variables, net.x, net.y, key, **options)
    np.testing.assert_array_equal(blind.x_adv, net.x)
    assert sighted.success.sum() > blind.success.sum()
    # Values are those of the transform itself.
    np.testing.assert_array_equal(straight_through(quantize)(net.x), quantize(net.x))
    smooth = straight_through(quantize, jnp.sin)
    np.testing.assert_allclose(jax.grad(lambda x: smooth(x).sum())(net.x), jnp.cos(net.x))
