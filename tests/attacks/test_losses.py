"""Losses: hand-worked values, invariances, and gradients against finite differences."""

import hypothesis
import hypothesis.extra.numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens.attacks import losses

QUICK = hypothesis.settings(deadline=None, max_examples=60)
# Tiny logits become 0: XLA flushes subnormal numbers, and so differences of tiny ones, to 0.
logits = npst.arrays(
    np.float32,
    6,
    elements=st.floats(-20, 20, width=32).map(lambda z: z if abs(z) > 1e-30 else 0.0),
)
classes = st.integers(0, 5)
Z = jnp.array([1.0, 4.0, 2.5, -1.0])

untargeted = {name: jax.jit(loss) for name, loss in losses.UNTARGETED.items()}
targeted = {name: jax.jit(loss) for name, loss in losses.TARGETED.items()}


@pytest.mark.parametrize(
    ('name', 'y', 'expected'),
    [
        ('cross_entropy', 1, np.log(np.exp([1, 4, 2.5, -1]).sum()) - 4),
        ('margin', 1, -1.5),
        ('margin', 0, 3.0),
        # z_(1) - z_(3) = 4 - 1.
        ('dlr', 1, -1.5 / 3),
        ('dlr', 2, 1.5 / 3),
        # The range is 5.
        ('scaled_cross_entropy', 1, np.log(np.exp(np.array([1, 4, 2.5, -1]) / 5).sum()) - 4 / 5),
    ],
)
def test_values_by_hand(name, y, expected):
    assert float(losses.named(name)(Z, y)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ('name', 'y', 'target', 'expected'),
    [
        ('cross_entropy', 1, 2, 2.5 - np.log(np.exp([1, 4, 2.5, -1]).sum())),
        ('margin', 1, 3, -5.0),
        # Ahead of the label, but not of the second class.
        ('margin', 0, 2, 1.5),
        ('lead', 0, 2, -1.5),
        # z_(1) - (z_(3) + z_(4)) / 2 = 4 - (1 - 1) / 2.
        ('dlr', 1, 2, -1.5 / 4),
        ('dlr', 0, 1, 3 / 4),
    ],
)
def test_targeted_values_by_hand(name, y, target, expected):
    value = losses.named(name, targeted=True)(Z, y, target)
    assert float(value) == pytest.approx(expected, rel=1e-5)


@QUICK
@hypothesis.given(logits, classes, classes, st.floats(0.1, 50), st.floats(-30, 30))
def test_ratios_of_logits_ignore_scale_and_offset(z, y, target, scale, offset):
    ordered = np.sort(z)
    hypothesis.assume(ordered[-1] - ordered[-3] > 0.1 and y != target)
    moved = jnp.asarray(scale * np.float64(z) + offset, jnp.float32)
    for before, after in (
        (untargeted['dlr'](z, y), untargeted['dlr'](moved, y)),
        (targeted['dlr'](z, y, target), targeted['dlr'](moved, y, target)),
    ):
        np.testing.assert_allclose(after, before, rtol=0.01, atol=0.01)


@QUICK
@hypothesis.given(logits, classes)
def test_margin_losses_are_positive_exactly_where_the_label_is_not_first(z, y):
    other = max(z[:y].max(initial=-np.inf), z[y + 1 :].max(initial=-np.inf))
    for name in ('margin', 'dlr'):
        assert (untargeted[name](z, y) > 0) == (other > z[y])


def test_a_saturated_model_still_has_a_gradient_of_the_scaled_loss():
    z = jnp.array([400.0, 0.0, -50.0])
    assert not jax.grad(losses.cross_entropy)(z, 0).any()
    assert jnp.abs(jax.grad(losses.scaled_cross_entropy)(z, 0)).max() > 1e-4


@pytest.mark.parametrize(('name', 'number'), [('dlr', 2), ('dlr', 3)])
def test_too_few_classes_are_named(name, number):
    few = jnp.arange(float(number))
    if number == 2:
        with pytest.raises(ValueError, match=r'dlr needs at least 3 classes, the model has 2; use'):
            losses.named(name)(few, 0)
    else:
        assert np.isfinite(losses.named(name)(few, 0))
    with pytest.raises(ValueError, match=f'needs at least 4 classes, the model has {number}'):
        losses.named(name, targeted=True)(few, 0, 1)


def test_an_unknown_loss_is_named_and_a_function_is_its_own_loss():
    with pytest.raises(ValueError, match="Unknown loss 'hinge'; valid names are cross_entropy, "):
        losses.named('hinge')
    assert losses.named(losses.dlr) is losses.dlr
