"""The easiest neuron to flip comes first, and dead ones last."""

import jax
import numpy as np
import pytest

from neurosens.neurons.ranking import mean_where_finite, ranking, scaled_sensitivity

DELTA = np.array([[2.0, -6.0, np.inf, 1.0], [-1.0, 3.0, 4.0, np.nan]], np.float32)
MEAN, STD = np.array([1.0, 0.0, 0.0, 5.0]), np.array([0.5, 3.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ('kind', 'scores', 'order'),
    [
        ('scaled', [[2, -2, np.inf, np.inf], [-4, 1, 4, np.nan]], [[1, 0, 2, 3], [0, 1, 2, 3]]),
        ('absolute', [[2, 6, np.inf, np.inf], [1, 3, 4, np.nan]], [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (
            'scaled_absolute',
            [[4, 2, np.inf, np.inf], [2, 1, 4, np.nan]],
            [[1, 0, 2, 3], [1, 0, 2, 3]],
        ),
    ],
)
def test_scores_and_order_by_hand(kind, scores, order):
    found = scaled_sensitivity(DELTA, MEAN, STD, kind)
    np.testing.assert_allclose(found, scores, rtol=1e-6)
    np.testing.assert_array_equal(ranking(found), order)


@pytest.mark.parametrize('kind', ['scaled', 'absolute', 'scaled_absolute'])
def test_a_dead_neuron_comes_last_however_easy_it_looks(kind):
    score = scaled_sensitivity(np.array([0.0, 5.0, -5.0]), np.zeros(3), np.array([0, 1, 1.0]), kind)
    assert np.isposinf(score[0]) and np.isfinite(score[1:]).all()
    assert ranking(score)[-1] == 0


def test_infinities_come_last_and_behind_them_what_is_undefined():
    delta = np.array([[np.nan, np.inf, -1, 2], [np.inf, np.inf, np.nan, np.nan]])
    score = scaled_sensitivity(delta, np.ones(4), np.ones(4))
    np.testing.assert_array_equal(ranking(score), [[2, 3, 1, 0], [0, 1, 2, 3]])
    assert ranking(score).dtype == np.int32
    with jax.enable_x64(True):
        assert ranking(np.ones(3)).dtype == np.int32


@pytest.mark.parametrize('kind', ['scaled', 'absolute', 'scaled_absolute'])
def test_what_no_change_can_flip_comes_last_in_either_direction(kind):
    delta = np.array([-np.inf, 1, np.inf])
    score = np.asarray(scaled_sensitivity(delta, np.ones(3), np.ones(3), kind))
    assert ranking(score).tolist() == [1, 0, 2]
    assert np.isposinf(score[[0, 2]]).all()


def test_of_equal_scores_the_lowest_index_comes_first():
    assert ranking(np.array([1.0, 0.0, 1.0, 0.0])).tolist() == [1, 3, 0, 2]


def test_the_summary_leaves_out_what_is_not_finite():
    found = mean_where_finite(scaled_sensitivity(DELTA, MEAN, STD))
    np.testing.assert_allclose(found, [-1, -0.5, 4, np.nan])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="Unknown kind 'relative'; valid names are scaled"):
        scaled_sensitivity(DELTA, MEAN, STD, 'relative')
