"""A neuron is a channel or a unit; pooling and spreading between the two are transposes."""

import math
import re

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens.neurons import units

shapes = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)
kinds = st.sampled_from(units.UNITS)
FEW = hypothesis.settings(max_examples=10, deadline=None, derandomize=True)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ('shape', 'channels', 'entries'),
    [((), 1, 1), ((5,), 5, 5), ((4, 5), 5, 20), ((2, 3, 5), 5, 30), ((7, 1), 1, 7)],
)
def test_count(shape, channels, entries):
    assert units.count(shape) == units.count(shape, 'channel') == channels
    assert units.count(shape, 'unit') == entries
    assert units.count(list(shape)) == channels


@pytest.mark.parametrize(
    ('shape', 'unit', 'expected'),
    [
        ((), 'channel', False),
        ((), 'unit', False),
        ((5,), 'channel', True),
        ((5,), 'unit', True),
        ((4, 5), 'channel', True),
        ((4, 5), 'unit', False),
        ((2, 3, 5), 'channel', True),
        ((2, 3, 5), 'unit', False),
    ],
)
def test_are_channels(shape, unit, expected):
    assert units.are_channels(shape, unit) is expected


@FEW
@hypothesis.given(shapes, kinds, st.integers(0, 2**31 - 1))
def test_pool_and_spread_are_transposes(shape, unit, seed):
    """<pool(v), n> = <v, spread(n)>, whatever the shape."""
    neurons = units.count(shape, unit)
    values, weights = random(seed, *shape), random(seed + 1, neurons)
    pooled, spread = units.pool(jnp.asarray(values), unit), units.spread(weights, shape, unit)
    assert pooled.shape == (neurons,)
    assert spread.shape == shape
    left = np.vdot(np.asarray(pooled, np.float64), weights)
    right = np.vdot(values, np.asarray(spread, np.float64))
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


@FEW
@hypothesis.given(shapes, kinds)
def test_pooling_what_was_spread_counts_the_positions(shape, unit):
    neurons = units.count(shape, unit)
    weights = np.arange(1.0, neurons + 1, dtype=np.float32)
    positions = math.prod(shape) // neurons
    pooled = units.pool(units.spread(weights, shape, unit), unit)
    np.testing.assert_array_equal(pooled, positions * weights)


@FEW
@hypothesis.given(shapes, kinds)
def test_directions_divide_the_activation_among_the_neurons(shape, unit):
    neurons = units.count(shape, unit)
    directions = [units.direction(np.int32(i), shape, unit) for i in range(neurons)]
    np.testing.assert_array_equal(np.sum(directions, axis=0), np.ones(shape))
    for i, direction in enumerate(directions):
        assert direction.shape == shape
        assert direction.dtype == jnp.float32
        indicator = np.eye(neurons)[i]
        np.testing.assert_array_equal(direction, units.spread(indicator, shape, unit))


def test_a_direction_by_hand():
    channel = units.direction(jnp.asarray(1), (2, 2), dtype='bfloat16')
    assert channel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(channel, [[0, 1], [0, 1]])
    np.testing.assert_array_equal(units.direction(jnp.asarray(2), (2, 2), 'unit'), [[0, 0], [1, 0]])


@pytest.mark.parametrize('unit', units.UNITS)
@pytest.mark.parametrize('shape', [(), (3,), (2, 3)])
def test_the_direction_of_a_neuron_that_does_not_exist_is_zero(shape, unit):
    beyond = jnp.asarray(units.count(shape, unit))
    assert not np.any(units.direction(beyond, shape, unit))


@pytest.mark.parametrize('shape', [(), (3,), (4, 3), (2, 4, 3)])
@pytest.mark.parametrize('unit', units.UNITS)
def test_rows_hold_the_values_of_one_neuron_in_one_column(shape, unit):
    batch = random(0, 5, *shape)
    neurons = units.count(shape, unit)
    table = np.asarray(units.rows(batch, unit))
    assert table.shape == (batch.size // neurons, neurons)
    for i in range(neurons):
        mask = np.asarray(units.direction(jnp.asarray(i), shape, unit)) == 1
        np.testing.assert_array_equal(table[:, i], batch[:, mask].ravel())


def test_an_unknown_unit_is_named():
    message = re.escape("Unknown unit 'filter'; valid names are channel, unit.")
    for check in (
        lambda: units.check_unit('filter'),
        lambda: units.count((3,), 'filter'),
        lambda: units.direction(jnp.asarray(0), (3,), 'filter'),
    ):
        with pytest.raises(ValueError, match=message):
            check()
