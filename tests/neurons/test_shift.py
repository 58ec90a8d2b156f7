"""What an attack moves, and how that goes with what a classifier needs."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from neurosens.attacks import Threat, fgsm
from neurosens.forward import LinenForward
from neurosens.neurons.shift import Targeting, shift, targeting, targeting_report


@pytest.mark.parametrize('eps', [0.02, 0.2])
def test_fgsm_moves_a_first_convolution_by_at_most_eps_times_its_l1_norm(small_net, eps):
    forward, variables, x, y, _ = small_net
    x_adv = fgsm(forward, variables, x, y, jax.random.key(0), threat=Threat('linf', eps)).x_adv
    moved = shift(forward, variables, x, x_adv, layer='conv1', unit='unit')
    bound = eps * jnp.abs(variables['params']['conv1']['kernel']).sum((0, 1, 2))
    change = moved.l2.reshape(16, 64, 4)
    assert (change <= bound * (1 + 1e-5) + 1e-6).all()
    assert (change.max((0, 1)) > 0.2 * bound).all(), 'the bound says something'


def test_nothing_moves_between_equal_images(small_net):
    moved = shift(small_net.forward, small_net.variables, small_net.x, small_net.x, layer='act1')
    assert not np.asarray(moved.mean).any() and not np.asarray(moved.l2).any()
    np.testing.assert_allclose(moved.mean_log, math.log(1e-12), rtol=1e-6)


class Pass(nn.Module):
    """Its layer `map` is the input, two positions of two channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.0, deterministic=True, name='map')(x)
        return nn.Dense(2, name='head')(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def passing():
    x = jnp.zeros((1, 2, 2))
    return LinenForward(Pass()), Pass().init(jax.random.key(0), x)


def test_scores_by_hand(passing):
    clean = np.array([[[3, 0], [4, 0]]], np.float32)
    attacked = np.array([[[3, 0.5], [2, -0.5]]], np.float32)
    moved = shift(*passing, clean, attacked, layer='map')
    np.testing.assert_allclose(moved.mean, [[-1, 0]])
    np.testing.assert_allclose(moved.l2, [[2, 0.5**0.5]], rtol=1e-6)
    # The silent channel is compared with a thousandth of the mean norm, 2.5.
    np.testing.assert_allclose(moved.relative_l2, [[0.4, 0.5**0.5 / 0.0025]], rtol=1e-5)
    expected = [[(math.log(1e-12) + math.log(2)) / 2, math.log(0.5)]]
    np.testing.assert_allclose(moved.mean_log, expected, rtol=1e-6)


def test_single_units_have_scores_of_their_own(passing):
    clean = np.array([[[3, 0], [4, -2]]], np.float32)
    attacked = np.array([[[3, 0.5], [2, -2.5]]], np.float32)
    moved = shift(*passing, clean, attacked, layer='map', unit='unit')
    np.testing.assert_array_equal(moved.mean, [[0, 0.5, -2, -0.5]])
    np.testing.assert_array_equal(moved.l2, [[0, 0.5, 2, 0.5]])
    # The silent unit is compared with a thousandth of the mean size, 9 / 4.
    np.testing.assert_allclose(moved.relative_l2, [[0, 0.5 / 0.00225, 0.5, 0.25]], rtol=1e-5)
    logarithms = [math.log(1e-12), math.log(0.5), math.log(2), math.log(0.5)]
    np.testing.assert_allclose(moved.mean_log, [logarithms], rtol=1e-6)


def test_the_floor_is_that_of_each_example(passing):
    """A loud example leaves the relative scores of a faint one alone."""
    clean = np.array([[[3, 0], [4, 0]], [[3000, 0], [4000, 0]]], np.float32)
    moved = shift(*passing, clean, clean + 1, layer='map')
    np.testing.assert_allclose(moved.relative_l2[:, 1], 2**0.5 / np.array([2.5e-3, 2.5]), rtol=1e-5)


def test_a_silent_layer_has_finite_scores(passing):
    clean = np.zeros((1, 2, 2), np.float32)
    moved = shift(*passing, clean, clean + 1, layer='map')
    np.testing.assert_allclose(moved.relative_l2, 2**0.5 / 1e-12, rtol=1e-5)
    still = shift(*passing, clean, clean, layer='map')
    np.testing.assert_array_equal(still.relative_l2, np.zeros((1, 2)))


def test_half_precision_is_measured_in_float32(passing):
    clean = np.zeros((1, 2, 2), jnp.bfloat16)
    attacked = np.array([[[1, 0], [1 / 16, 0]]], jnp.bfloat16)
    moved = shift(*passing, clean, attacked, layer='map')
    assert all(values.dtype == jnp.float32 for values in moved)
    # In bfloat16, the norm would be 1.
    np.testing.assert_allclose(moved.l2[0, 0], (1 + 1 / 256) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize(('score', 'target'), [('l2', 0), ('relative_l2', 1), ('mean_log', 1)])
def test_the_targeted_neuron_has_the_largest_score(passing, score, target):
    clean = np.array([[[3, 0.1], [4, 0.1]]], np.float32)
    attacked = np.array([[[3, 0.6], [2, -0.4]]], np.float32)
    result = targeting(*passing, clean, attacked, layer='map', score=score)
    assert result.targeted.tolist() == [target]
    assert result.targeted.dtype == jnp.int32
    moved = shift(*passing, clean, attacked, layer='map')
    np.testing.assert_array_equal(result.scores, getattr(moved, score))


def test_of_equal_scores_the_first_is_targeted(passing):
    clean = np.zeros((1, 2, 2), np.float32)
    assert targeting(*passing, clean, clean + 1, layer='map').targeted.tolist() == [0]


def test_twin_filters_have_twin_scores(small_net):
    forward, variables, x, *_ = small_net
    params = dict(variables['params'])
    order = np.array([2, 0, 2, 1])
    params['conv1'] = {name: leaf[..., order] for name, leaf in params['conv1'].items()}
    moved = shift(forward, {'params': params}, x, x * 0.9, layer='conv1')
    for values in moved:
        np.testing.assert_array_equal(values[:, 0], values[:, 2])


def report(scores, responses, norms=None, labels=None):
    scores = np.asarray(scores, np.float64)
    labels = np.arange(len(scores)) % 3 if labels is None else labels
    result = Targeting(scores, scores.argmax(-1))
    return targeting_report(result, labels, responses, 3, norms=norms, permutations=999)


def test_histograms_count_every_image_once():
    generator = np.random.default_rng(0)
    scores, labels = generator.random((50, 6)), generator.integers(0, 3, 50)
    found = report(scores, generator.random(6), labels=labels)
    expected = np.zeros((3, 6), int)
    for row, label in zip(scores, labels):
        expected[label, row.argmax()] += 1
    np.testing.assert_array_equal(found.class_histogram, expected)
    np.testing.assert_array_equal(found.histogram, expected.sum(0))
    assert found.histogram.sum() == 50
    np.testing.assert_allclose(found.mean_score, scores.mean(0))
    assert found.score_partial is None and found.histogram_partial is None


def test_correlations_are_those_of_the_scores_and_of_the_histogram():
    generator = np.random.default_rng(2)
    scores, responses, norms = generator.random((60, 9)), generator.random(9), generator.random(9)
    found = report(scores, responses, norms)
    values = {'score': scores.mean(0), 'histogram': np.bincount(scores.argmax(-1), minlength=9)}
    for name, value in values.items():
        raw = scipy.stats.spearmanr(value, responses).statistic
        assert getattr(found, f'{name}_correlation').value == pytest.approx(raw)
        a, b, c = (scipy.stats.rankdata(v) for v in (value, responses, norms))
        ab, ac, bc = (np.corrcoef(*pair)[0, 1] for pair in ((a, b), (a, c), (b, c)))
        # The textbook formula for one control.
        partial = (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))
        assert getattr(found, f'{name}_partial').value == pytest.approx(partial)
        assert abs(partial - raw) > 1e-3


def test_a_correlation_through_the_norm_alone_vanishes_when_it_is_controlled_for():
    generator = np.random.default_rng(1)
    norms = generator.random(200)
    # Both follow the norm, and share nothing else.
    scores = norms + 0.1 * generator.normal(size=(4, 200))
    responses = norms + 0.1 * generator.normal(size=200)
    found = report(scores, responses, norms)
    assert found.score_correlation.value > 0.8 and found.score_correlation.p_value < 0.01
    assert abs(found.score_partial.value) < 0.2
    assert found.score_partial.p_value > 0.01


def test_devices_agree_without_communication(small_net, assert_splits_over_devices):
    def run(variables, batch):
        return shift(small_net.forward, variables, *batch, layer='act1')

    assert_splits_over_devices(run, small_net.variables, (small_net.x, 0.9 * small_net.x))


def test_an_unknown_score_is_refused(passing):
    x = np.zeros((1, 2, 2), np.float32)
    with pytest.raises(ValueError, match="Unknown score 'linf'; valid names are l2, relative_l2"):
        targeting(*passing, x, x, layer='map', score='linf')
