"""Rotations and translations: images move as they should, and the worst motion is found."""

import math
import re

import jax
import numpy as np
import pytest
import scipy.ndimage

from neurosens import parallel
from neurosens.attacks import Motion, moved, spatial

KEY = jax.random.key(0)
IMAGE = np.random.default_rng(0).uniform(0, 1, (7, 6, 2)).astype(np.float32)


def test_whole_pixels_are_shifted_and_black_comes_in():
    found = np.asarray(moved(IMAGE, 0.0, np.float32([2, -1]), black=-0.5))
    expected = np.full_like(IMAGE, -0.5)
    expected[2:, :-1] = IMAGE[:-2, 1:]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_quarter_turn_is_counterclockwise():
    square = IMAGE[:6]
    found = moved(square, 90.0, np.zeros(2, np.float32))
    np.testing.assert_allclose(found, np.rot90(square), atol=1e-5)


@pytest.mark.parametrize('degrees', [-30.0, 11.0])
def test_motions_are_those_of_scipy(degrees):
    angle = math.radians(degrees)
    undone = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle, translation = np.array([3, 2.5]), np.array([0.7, -1.2])
    offset = middle - undone @ (middle + translation)
    found = moved(IMAGE, degrees, translation.astype(np.float32))
    for channel in range(2):
        expected = scipy.ndimage.affine_transform(
            np.float64(IMAGE[..., channel]), undone, offset, order=1, mode='grid-constant'
        )
        np.testing.assert_allclose(found[..., channel], expected, atol=1e-5)


def brute_force(net, angles, shifts, threat):
    """Whether any motion of the grid fools, and the largest cross-entropy of those that do."""
    best = []
    for degrees in np.linspace(-threat.degrees, threat.degrees, angles):
        for down in np.linspace(-threat.shift, threat.shift, shifts):
            for right in np.linspace(-threat.shift, threat.shift, shifts):
                step = np.float32([6 * down, 6 * right])
                images = jax.vmap(lambda x: moved(x, degrees, step))(net.x)
                logits = np.asarray(net.forward(net.variables, images)[0], np.float64)
                label = logits[np.arange(len(logits)), net.y]
                loss = np.log(np.exp(logits - label[:, None]).sum(-1))
                best.append(np.where(logits.argmax(-1) != net.y, 1e6, 0) + loss)
    return np.max(best, 0)


def test_the_worst_motion_of_the_grid_is_found(net):
    threat = Motion(40.0, 0.3)
    found = spatial(
        net.forward, net.variables, net.x, net.y, KEY, threat=threat, angles=5, shifts=3
    )
    expected = brute_force(net, 5, 3, threat)
    assert (net.correct & found.success).any()
    np.testing.assert_array_equal(found.success, expected >= 1e6)
    again = jax.vmap(moved)(net.x, found.degrees, found.translation)
    np.testing.assert_allclose(found.x_adv, again, atol=1e-6)
    logits = np.asarray(net.forward(net.variables, found.x_adv)[0], np.float64)
    label = logits[np.arange(len(logits)), net.y]
    loss = np.log(np.exp(logits - label[:, None]).sum(-1))
    right = net.correct
    np.testing.assert_allclose(loss[right], (expected % 1e6)[right], atol=1e-3)
    assert (found.queries == 1 + 5 * 3 * 3).all()
    # What is misclassified already stays.
    np.testing.assert_array_equal(found.x_adv[~right], net.x[~right])
    assert not np.asarray(found.degrees)[~right].any()


def test_random_motions_stay_within_the_limits_and_more_are_never_weaker(net):
    threat = Motion(25.0, 0.2)
    few, many = (
        spatial(net.forward, net.variables, net.x, net.y, KEY, threat=threat, draws=draws)
        for draws in (3, 30)
    )
    assert np.abs(many.degrees).max() <= 25 and np.abs(many.translation).max() <= 0.2 * 6
    assert (many.success | ~few.success).all()
    assert len(np.unique(many.degrees)) > 4


def test_eight_devices_find_the_same_without_exchange(net):
    threat, index = Motion(25.0, 0.2), np.arange(len(net.x))

    @jax.jit
    def run(variables, x, y, key, index):
        options = {'threat': threat, 'draws': 6, 'index': index}
        return spatial(net.forward, variables, x, y, key, **options)

    alone = run(net.variables, net.x, net.y, KEY, index)
    mesh = parallel.data_mesh()
    batch = parallel.shard(mesh, (net.x, net.y, index))
    variables, key = parallel.replicate(mesh, (net.variables, KEY))
    arguments = variables, *batch[:2], key, batch[2]
    assert not re.search(
        'all-reduce|all-gather|all-to-all|collective', run.lower(*arguments).compile().as_text()
    )
    together = run(*arguments)
    np.testing.assert_array_equal(alone.success, together.success)
    np.testing.assert_allclose(alone.x_adv, together.x_adv, atol=1e-5)
    np.testing.assert_allclose(alone.degrees, together.degrees, rtol=1e-6)


def test_without_room_images_stay(net):
    threat = Motion(0.0, 0.0)
    found = spatial(
        net.forward, net.variables, net.x, net.y, KEY, threat=threat, angles=3, shifts=1
    )
    np.testing.assert_array_equal(found.x_adv, net.x)
    np.testing.assert_array_equal(found.success, ~net.correct)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'degrees': 181.0}, 'degrees is 181'),
        ({'shift': -0.1}, 'shift is -0.1'),
        ({'bounds': (1.0, 0.0)}, 'the first must be below'),
    ],
)
def test_an_impossible_motion_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Motion(**settings)


@pytest.mark.parametrize(
    ('shape', 'options', 'message'),
    [
        ((2, 12), {}, 'spatial needs'),
        ((2, 6, 6, 1), {'angles': 0}, 'angles is 0'),
        ((2, 6, 6, 1), {'shifts': 0}, 'shifts is 0'),
        ((2, 6, 6, 1), {'draws': -1}, 'draws is -1'),
    ],
)
def test_impossible_searches_are_refused(net, shape, options, message):
    x, y = np.zeros(shape, np.float32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match=message):
        spatial(net.forward, net.variables, x, y, KEY, threat=Motion(), **options)
