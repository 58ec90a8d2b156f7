"""Wilson intervals and accuracies of classes."""

import math

import hypothesis
import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens import metrics
from neurosens.metrics import wilson_interval

Z = 1.959963984540054

counts = st.integers(1, 10_000_000).flatmap(
    lambda trials: st.tuples(st.integers(0, trials), st.just(trials))
)


@pytest.mark.parametrize(
    ('successes', 'trials', 'low', 'high'),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_that_of_published_examples(successes, trials, low, high):
    interval = wilson_interval(successes, trials)
    assert interval.value == successes / trials
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@hypothesis.given(counts, st.floats(0.01, 6))
def test_the_interval_lies_in_the_unit_interval_around_the_proportion(count, z):
    value, low, high = wilson_interval(*count, z)
    assert 0 <= low <= value <= high <= 1
    assert value == count[0] / count[1]


def bound(successes, trials, z, side):
    """The proportion p0 furthest to one side with |p - p0| <= z sqrt(p0 (1 - p0) / n)."""
    p = successes / trials
    # Bisection, with the invariant that `near` satisfies the inequality and `far` does not.
    near, far = p, float(side > 0)
    if near == far:
        return p
    for _ in range(200):
        middle = (near + far) / 2
        accepted = abs(p - middle) <= z * math.sqrt(middle * (1 - middle) / trials)
        near, far = (middle, far) if accepted else (near, middle)
    return near


@hypothesis.given(
    st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.floats(0.1, 5),
)
def test_the_bounds_are_the_proportions_that_a_score_test_just_accepts(count, z):
    _, low, high = wilson_interval(*count, z)
    successes, trials = count
    if successes > 0:
        assert low == pytest.approx(bound(successes, trials, z, -1), rel=1e-6, abs=1e-12)
    else:
        assert low == 0
    if successes < trials:
        assert high == pytest.approx(bound(successes, trials, z, +1), rel=1e-6, abs=1e-12)
    else:
        assert high == 1


@hypothesis.given(counts)
def test_failures_mirror_successes(count):
    successes, trials = count
    interval, mirrored = wilson_interval(*count), wilson_interval(trials - successes, trials)
    assert mirrored.low == pytest.approx(1 - interval.high, abs=1e-12)
    assert mirrored.high == pytest.approx(1 - interval.low, abs=1e-12)


@pytest.mark.parametrize('trials', [1, 10, 10_000, 10**9])
def test_the_extremes_have_an_exact_bound_and_an_open_one(trials):
    none, all_ = wilson_interval(0, trials), wilson_interval(trials, trials)
    reach = Z**2 / (trials + Z**2)
    assert none.value == none.low == 0.0
    assert all_.value == all_.high == 1.0
    assert none.high == pytest.approx(reach, rel=1e-6)
    assert all_.low == pytest.approx(1 - reach, rel=1e-6)


@pytest.mark.parametrize('p', [0.02, 0.3, 0.5, 0.9])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(p):
    trials, generator = 400, np.random.default_rng(0)
    draws = generator.binomial(trials, p, 4000)
    intervals = {k: wilson_interval(int(k), trials) for k in np.unique(draws)}
    covered = np.mean([intervals[k].low <= p <= intervals[k].high for k in draws])
    assert covered == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize(('successes', 'trials'), [(0, 0), (-1, 5), (6, 5), (1, -1)])
def test_what_is_no_proportion_is_refused(successes, trials):
    with pytest.raises(ValueError, match=f'^{successes} successes in {trials} trials'):
        wilson_interval(successes, trials)


# -------------------------------------------------------------------------------- classes


@hypothesis.given(
    st.integers(0, 40).flatmap(
        lambda n: st.tuples(
            npst.arrays(bool, n), npst.arrays(np.int32, n, elements=st.integers(0, 5))
        )
    )
)
def test_the_accuracy_of_a_class_is_the_mean_over_its_examples(examples):
    correct, labels = examples
    actual = metrics.per_class_accuracy(correct, labels, 7)
    expected = [
        correct[labels == label].mean() if (labels == label).any() else np.nan for label in range(7)
    ]
    np.testing.assert_allclose(actual, expected)


def test_a_class_without_examples_has_no_accuracy():
    accuracy = metrics.per_class_accuracy(np.array([True, False]), np.array([1, 1]), 3)
    np.testing.assert_array_equal(accuracy, [np.nan, 0.5, np.nan])
