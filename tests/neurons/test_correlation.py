"""Rank correlations: hand-worked, as SciPy has them, with honest p-values, without confounders."""

import dataclasses
import itertools
import re
import tracemalloc

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from neurosens.neurons import correlation
from neurosens.neurons.correlation import overlap, partial_spearman, permutation_test, spearman

MANY = hypothesis.settings(max_examples=60, deadline=None)
NAN, INF = float('nan'), float('inf')
# Few distinct values, so that ties are common.
tied = st.integers(-4, 4).map(float)
pairs = st.lists(st.tuples(tied, tied), min_size=3, max_size=30)


def columns(rows):
    return (np.array(column) for column in zip(*rows))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def same(actual, expected):
    np.testing.assert_allclose(
        dataclasses.astuple(actual), dataclasses.astuple(expected), rtol=0, atol=1e-12
    )


# -------------------------------------------------------------------------------- Spearman


@pytest.mark.parametrize(
    ('a', 'b', 'rho'),
    [
        ([1, 2, 3], [10, 20, 400], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        # 1 - 6 * (1 + 1 + 0 + 0) / (4 * 15)
        ([1, 2, 3, 4], [2, 1, 3, 4], 0.8),
        # Ranks 1, 2.5, 2.5 and 1, 2, 3: 1.5 / sqrt(1.5 * 2).
        ([0, 5, 5], [0, 1, 2], 1.5 / np.sqrt(3)),
    ],
)
def test_a_hand_worked_rank_correlation(a, b, rho):
    assert spearman(a, b) == pytest.approx(rho, abs=1e-12)


@MANY
@hypothesis.given(pairs)
def test_it_is_what_scipy_says_and_symmetric(rows):
    a, b = columns(rows)
    value = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(value)
        return
    assert value == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert value == pytest.approx(spearman(b, a), abs=1e-12)


@MANY
@hypothesis.given(pairs, st.randoms(use_true_random=False))
def test_it_depends_neither_on_the_scale_nor_on_the_order_of_neurons(rows, random):
    a, b = columns(rows)
    expected = spearman(a, b)
    order = random.sample(range(len(a)), len(a))
    np.testing.assert_allclose(spearman(np.exp(a), b**3 + 7), expected, atol=1e-12)
    np.testing.assert_allclose(spearman(a[order], b[order]), expected, atol=1e-12)
    np.testing.assert_allclose(spearman(-a, b), -expected, atol=1e-12)


@pytest.mark.parametrize(
    ('a', 'b'),
    [([], []), ([1, 2], [2, 1]), ([3, 3, 3], [1, 2, 3]), ([1, NAN, 2, INF], [1, 2, 3, 4])],
)
def test_it_is_nan_where_it_is_not_defined(a, b):
    assert np.isnan(spearman(a, b))
    for result in (permutation_test(a, b), partial_spearman(a, b, np.arange(len(a)))):
        assert np.isnan(result.value) and np.isnan(result.p_value)
        assert result.count == np.sum(np.isfinite(a) & np.isfinite(b))


def test_pairs_that_are_not_finite_are_left_out():
    a, b, control = normal(0, 3, 20)
    dirty = [np.concatenate([array, [1.0, 2.0, 3.0]]) for array in (a, b, control)]
    dirty[0][20], dirty[1][21], dirty[2][22] = NAN, INF, -INF
    same(partial_spearman(*dirty), partial_spearman(a, b, control))
    same(permutation_test(dirty[0][:22], dirty[1][:22]), permutation_test(a, b))
    assert spearman(dirty[0][:22], dirty[1][:22]) == spearman(a, b)


# ---------------------------------------------------------------------------- permutations


@pytest.mark.parametrize('b', [[1, 2, 4, 3, 5, 6], [2, 1, 2, 3, 4, 2], [6, 1, 2, 5, 4, 3]])
def test_the_p_value_is_the_share_of_all_permutations(b):
    a = np.arange(6)
    values = np.array([spearman(a, order) for order in itertools.permutations(b)])
    exact = (np.abs(values) >= abs(spearman(a, b)) - 1e-12).mean()
    result = permutation_test(a, b, permutations=40_000)
    assert result.value == spearman(a, b)
    # Four standard deviations of the estimate.
    assert abs(result.p_value - exact) < 4 * np.sqrt(exact * (1 - exact) / 40_000) + 1e-4
    # The two sides count: a one-sided p would be about half of it.
    assert exact > 1.5 * (values >= abs(spearman(a, b)) - 1e-12).mean()


def test_the_smallest_p_value_is_one_in_all_permutations_and_itself():
    a = normal(0, 50)
    same(permutation_test(a, a, permutations=99), correlation.Correlation(1.0, 0.01, 50))
    assert permutation_test(a, -a, permutations=99).p_value == 0.01


def p_values(test):
    return np.array([test(np.random.default_rng(seed)) for seed in range(200)])


def assert_uniform(values):
    # Kolmogorov-Smirnov: a p-value of 0.001 in a fixed set of seeds.
    assert scipy.stats.kstest(values, 'uniform').pvalue > 1e-3
    assert abs((values <= 0.1).mean() - 0.1) < 0.06


def test_without_association_p_values_are_uniform():
    assert_uniform(
        p_values(
            lambda generator: (
                permutation_test(*generator.normal(size=(2, 25)), permutations=300).p_value
            )
        )
    )


def test_without_partial_association_p_values_are_uniform_though_both_follow_the_control():
    def test(generator):
        control, a, b = generator.normal(size=(3, 30))
        return partial_spearman(a + control, b + control, control, permutations=300).p_value

    assert_uniform(p_values(test))

    def raw(generator):
        control, a, b = generator.normal(size=(3, 30))
        return permutation_test(a + control, b + control, permutations=300).p_value

    assert (p_values(raw) <= 0.1).mean() > 0.6


@pytest.mark.parametrize('seed', [2, 3, 7])
def test_a_partial_p_value_regresses_every_permutation_anew(seed):
    a, b, *controls = normal(seed, 4, 6)
    ranks = np.array([scipy.stats.rankdata(values) for values in (a, b, *controls)])
    design = np.stack([np.ones(6), *ranks[2:]], axis=1)

    def residual(values):
        return values - design @ np.linalg.lstsq(design, values)[0]

    left, right = residual(ranks[0]), residual(ranks[1])
    observed = np.corrcoef(left, right)[0, 1]
    values = [
        np.corrcoef(residual(ranks[0] - left + left[list(order)]), right)[0, 1]
        for order in itertools.permutations(range(6))
    ]
    exact = (np.abs(values) >= abs(observed) - 1e-9).mean()
    result = partial_spearman(a, b, controls, permutations=40_000)
    assert result.value == pytest.approx(observed, abs=1e-12)
    assert abs(result.p_value - exact) < 4 * np.sqrt(exact * (1 - exact) / 40_000) + 1e-4


def test_seeds_and_blocks(monkeypatch):
    a, b = normal(0, 2, 30)
    first = permutation_test(a, b, permutations=1000)
    assert permutation_test(a, b, permutations=1000) == first
    assert permutation_test(a, b, permutations=1000, seed=1) != first
    partial = partial_spearman(a, b, normal(1, 30), permutations=1000)
    for block in (1, 37, 1000):
        monkeypatch.setattr(correlation, '_BLOCK', 30 * block)
        assert permutation_test(a, b, permutations=1000) == first
        assert partial_spearman(a, b, normal(1, 30), permutations=1000) == partial


def test_memory_does_not_grow_with_the_permutations():
    a, b = normal(0, 2, 1000)

    def peak(permutations):
        tracemalloc.start()
        permutation_test(a, b, permutations=permutations)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    # All permutations at once would take 48 MB.
    assert peak(6000) < 25e6


# --------------------------------------------------------------------- partial correlation


def test_one_control_is_the_textbook_formula():
    a, b, control = normal(0, 3, 40)
    a, b = a + control, b - control
    ab, ac, bc = spearman(a, b), spearman(a, control), spearman(b, control)
    expected = (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))
    assert partial_spearman(a, b, control).value == pytest.approx(expected, abs=1e-12)


def test_several_controls_are_the_inverse_of_the_correlation_matrix():
    values = normal(0, 5, 40)
    values[:2] += values[2] - values[3]
    precision = np.linalg.inv(scipy.stats.spearmanr(values, axis=1).statistic)
    expected = -precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1])
    a, b, *controls = values
    for form in (controls, tuple(controls), np.stack(controls)):
        assert partial_spearman(a, b, form).value == pytest.approx(expected, abs=1e-12)
    assert abs(expected - spearman(a, b)) > 0.1


def test_a_planted_confounder_is_removed():
    norm = np.abs(normal(0, 300)) + 0.1
    a = norm * np.exp(0.3 * normal(1, 300))
    b = norm**2 * np.exp(0.3 * normal(2, 300))
    raw, partial = permutation_test(a, b), partial_spearman(a, b, norm)
    assert raw.value > 0.8 and raw.p_value < 1e-3
    assert abs(partial.value) < 0.15 and partial.p_value > 0.05


def test_an_association_beside_the_control_is_kept():
    norm, shared, *noise = normal(0, 4, 300)
    result = partial_spearman(norm + shared, -norm + shared + 0.1 * noise[0], norm)
    assert abs(spearman(norm + shared, -norm + shared)) < 0.15
    assert result.value > 0.8 and result.p_value < 1e-3


@MANY
@hypothesis.given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_a_partial_correlation_depends_on_ranks_alone(seed, random):
    a, b, control = normal(seed, 3, 12)
    expected = partial_spearman(a, b, control, permutations=1).value
    order = random.sample(range(12), 12)
    for x, y, z in ((np.exp(a), b**3, 2 * control), (a[order], b[order], control[order])):
        value = partial_spearman(x, y, z, permutations=1).value
        assert value == pytest.approx(expected, abs=1e-9)
    assert partial_spearman(b, a, control, permutations=1).value == pytest.approx(
        expected, abs=1e-9
    )
    assert -1 <= expected <= 1


def test_a_constant_control_changes_nothing_and_a_repeated_one_counts_once():
    a, b, control = normal(0, 3, 20)
    same(partial_spearman(a, b, np.ones(20)), permutation_test(a, b))
    once, twice = (partial_spearman(a, b, c) for c in (control, [control, np.exp(control)]))
    assert twice.value == pytest.approx(once.value, abs=1e-12)
    # Four neurons leave two free directions to one control, repeated or not, and one to two.
    short = [array[:4] for array in (a, b, control)]
    assert not np.isnan(partial_spearman(*short[:2], [short[2]] * 2).value)
    assert np.isnan(partial_spearman(*short[:2], [short[2], normal(5, 4)]).value)


def test_nothing_is_left_of_a_measure_that_the_control_explains():
    a, b = normal(0, 2, 20)
    for pair in ((a, b), (b, a)):
        result = partial_spearman(*pair, np.exp(a))
        assert np.isnan(result.value) and np.isnan(result.p_value)
        assert result.count == 20


# --------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize(
    ('a', 'b', 'k', 'share'),
    [
        ([4, 3, 2, 1], [1, 2, 3, 4], 2, 0.0),
        ([4, 3, 2, 1], [4, 1, 2, 3], 2, 0.5),
        ([4, 3, 2, 1], [1, 2, 3, 4], 3, 2 / 3),
        ([4, 3, 2, 1], [1, 2, 3, 4], 4, 1.0),
        # Of equal values the first are taken.
        ([1, 1, 1, 1], [9, 8, 0, 0], 2, 1.0),
        ([1, 1, 1, 1], [0, 0, 8, 9], 2, 0.0),
        ([-INF, 0, INF], [0, 1, 2], 1, 1.0),
        # NaN is in no set, so a set can be smaller than k.
        ([NAN, 5, 1], [9, 2, 1], 1, 0.0),
        ([NAN, NAN, 1], [9, 2, 1], 3, 1 / 3),
        ([NAN, NAN, 1], [NAN, NAN, 1], 2, 0.5),
    ],
)
def test_a_hand_worked_overlap(a, b, k, share):
    assert overlap(a, b, k) == pytest.approx(share)
    assert overlap(b, a, k) == pytest.approx(share)


def test_equal_values_are_taken_in_order_however_many():
    values = np.random.default_rng(0).integers(0, 4, 200)
    # Python's sort keeps the order of equal values.
    first = sorted(range(200), key=lambda index: -values[index])[:30]
    indicator = np.isin(np.arange(200), first)
    assert values[first[-1]] == np.sort(values)[-31]
    assert overlap(values, indicator, 30) == 1


def test_unrelated_measures_overlap_by_k_of_n():
    shares = [overlap(*normal(seed, 2, 50), 10) for seed in range(400)]
    assert np.mean(shares) == pytest.approx(10 / 50, abs=0.02)


# ---------------------------------------------------------------------------------- errors


SHAPES = (
    'The measures have shapes {}; give one value per neuron, for the same neurons, in arrays of '
    'one axis.'
)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: spearman([1, 2], [1, 2, 3]), SHAPES.format('(2,), (3,)')),
        (lambda: overlap(np.ones((2, 2)), np.ones((2, 2)), 1), SHAPES.format('(2, 2), (2, 2)')),
        (
            lambda: partial_spearman([1, 2, 3], [1, 2, 3], [1, 2]),
            SHAPES.format('(3,), (3,), (2,)'),
        ),
        (
            lambda: partial_spearman([1, 2, 3], [1, 2, 3], [[1, 2, 3], [1, 2]]),
            SHAPES.format('(3,), (3,), (3,), (2,)'),
        ),
        (
            lambda: permutation_test([1, 2, 3], [1, 2, 3], permutations=0),
            'permutations is 0; it must be at least 1.',
        ),
        (
            lambda: partial_spearman([1, 2, 3], [1, 2, 3], [1, 2, 3], permutations=0),
            'permutations is 0; it must be at least 1.',
        ),
        (lambda: overlap([1, 2], [1, 2], 0), 'k is 0; it must be at least 1, at most 2.'),
        (lambda: overlap([1, 2], [1, 2], 3), 'k is 3; it must be at least 1, at most 2.'),
    ],
)
def test_what_cannot_be_correlated_is_refused(call, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        call()
