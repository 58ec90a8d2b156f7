"""Random models are averaged out, and hidden gradients replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import neurons
from neurosens.attacks import (
    Threat,
    expected_forward,
    fmn,
    is_random,
    pgd,
    random_forward,
    redraw,
    straight_through,
    transfer,
    with_gradients_of,
)
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


def test_an_expectation_is_the_mean_of_its_draws_and_no_longer_random(net, noisy):
    key = jax.random.key(7)
    mean = expected_forward(with_edits(noisy, {'act1': lambda h: 2 * h}), 5, key)
    assert not is_random(mean) and not is_random(with_edits(mean, {}))
    logits, tapped = mean(net.variables, net.x, taps=('act1',))
    draws = [
        redraw(with_edits(noisy, {'act1': lambda h: 2 * h}), each)(
            net.variables, net.x, taps=('act1',)
        )
        for each in jax.random.split(key, 5)
    ]
    np.testing.assert_allclose(logits, np.mean([d[0] for d in draws], 0), rtol=1e-4, atol=1e-5)
    expected = np.mean([d[1]['act1'] for d in draws], 0)
    np.testing.assert_allclose(tapped['act1'], expected, rtol=1e-4, atol=1e-5)
    # Nobody can redraw it, inside of other wrappers neither.
    again = redraw(with_edits(mean, {}), jax.random.key(1))(net.variables, net.x)[0]
    np.testing.assert_array_equal(again, mean(net.variables, net.x)[0])
    assert (mean(net.variables, net.x)[0] != noisy(net.variables, net.x)[0]).any()


def test_an_expectation_is_attacked_and_measured_like_any_model(net, noisy):
    mean = expected_forward(noisy, 8, jax.random.key(3))

    def wrong(forward, x_adv):
        # One by one, as attacks see images: noise of the shape of a batch is other noise.
        logits = jax.vmap(lambda x: forward(net.variables, x[None])[0][0])(x_adv)
        return np.asarray(logits.argmax(-1) != net.y)

    options = {'threat': Threat('linf', 0.2), 'steps': 15}
    key = jax.random.key(0)
    result = fmn(mean, net.variables, net.x, net.y, key, **options)
    np.testing.assert_array_equal(wrong(mean, result.x_adv), result.success)
    assert result.success.mean() > 0.5
    # What fools the mean fools many other draws more often than what fools a single one.
    single = fmn(noisy, net.variables, net.x, net.y, key, **options)
    judge = expected_forward(noisy, 64, jax.random.key(11))
    assert wrong(judge, result.x_adv).sum() >= wrong(judge, single.x_adv).sum()
    delta = neurons.sensitivity(mean, net.variables, net.x, layer='act1').delta
    assert np.isfinite(delta).any()


def test_an_expectation_needs_a_random_model_and_a_draw(net, noisy):
    with pytest.raises(ValueError, match='random_forward'):
        expected_forward(net.forward, 3, jax.random.key(0))
    with pytest.raises(ValueError, match='draws'):
        expected_forward(noisy, 0, jax.random.key(0))


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


def test_a_model_answers_as_one_and_is_differentiated_as_another(net):
    steps = with_input_transform(net.forward, lambda x: jnp.round(x * 8) / 8)
    mixed = with_gradients_of(steps, net.forward)

    def total(model, x):
        logits, tapped = model(net.variables, x, taps=('act1',))
        return (logits**2).sum() + tapped['act1'].sum(), (logits, tapped)

    (_, values), gradient = jax.value_and_grad(lambda x: total(mixed, x), has_aux=True)(net.x)
    (_, expected), flat = jax.value_and_grad(lambda x: total(steps, x), has_aux=True)(net.x)
    jax.tree.map(np.testing.assert_array_equal, values, expected)
    np.testing.assert_array_equal(flat, 0)
    # Derivatives of the surrogate at the values of the model.
    logits = values[0]
    _, pull = jax.vjp(lambda x: net.forward(net.variables, x, taps=('act1',)), net.x)
    ones = jnp.ones_like(values[1]['act1'])
    np.testing.assert_allclose(gradient, pull((2 * logits, {'act1': ones}))[0], rtol=1e-5)


def test_with_the_gradients_of_a_surrogate_the_model_itself_decides(net):
    steps = with_input_transform(net.forward, lambda x: jnp.round(x * 8) / 8)
    # Says the last class of every image, whatever it is: nothing for `transfer` to look for.
    surrogate = with_edits(net.forward, {'head': lambda z: z + 100 * jnp.eye(4)[3]})
    options = {'threat': Threat('linf', 0.2), 'steps': 8}
    arguments = net.variables, net.x, net.y, jax.random.key(0)
    exact = pgd(steps, *arguments, **options)
    found = pgd(with_gradients_of(steps, surrogate), *arguments, **options)
    other = transfer(
        steps, *arguments, surrogate=surrogate, surrogate_variables=net.variables, **options
    )
    for result in (exact, found, other):
        judged = np.asarray(steps(net.variables, result.x_adv)[0]).argmax(-1) != net.y
        np.testing.assert_array_equal(result.success, judged)
    assert found.success.sum() > max(exact.success.sum(), other.success.sum())


def test_a_model_without_derivatives_is_attacked_with_those_of_another(net):
    def on_the_host(x):
        return np.round(np.asarray(x) * 8) / np.float32(8)

    def steps(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(on_the_host, shape, x, vmap_method='expand_dims')

    outside = with_input_transform(net.forward, steps)
    mixed = with_gradients_of(outside, net.forward)
    options = {'threat': Threat('linf', 0.2), 'steps': 3}
    found = pgd(mixed, net.variables, net.x, net.y, jax.random.key(0), **options)
    judged = np.asarray(outside(net.variables, found.x_adv)[0]).argmax(-1) != net.y
    np.testing.assert_array_equal(found.success, judged)
    assert found.success.mean() > np.mean(~net.correct)


def test_second_derivatives_are_those_of_the_surrogate_too(net):
    mixed = with_gradients_of(with_input_transform(net.forward, jnp.round), net.forward)
    smooth = straight_through(jnp.round, jnp.sin)

    def slope(model, x):
        return jax.grad(lambda x: jnp.sin(model(net.variables, x)[0]).sum())(x)

    x, along = net.x[:2], jnp.ones_like(net.x[:2])
    # The loss is taken at the values of the model, whose own derivative is 0.
    curved = jax.jvp(lambda x: slope(mixed, x), (x,), (along,))[1]
    assert np.isfinite(curved).all() and (curved != 0).any()
    second = jax.grad(jax.grad(lambda x: smooth(x) ** 2))(0.7)
    # d/dx 2 round(x) cos(x), with cos for the derivative of round.
    assert second == pytest.approx(2 * np.cos(0.7) ** 2 - 2 * np.sin(0.7), rel=1e-5)
