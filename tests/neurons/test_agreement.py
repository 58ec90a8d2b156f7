"""Agreement of measures: hand-worked matrices, invariants, tables to print."""

import re

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens.neurons.agreement import agreement, markdown, rows, table

HAND = {
    'gradient': [1.0, 2.0, 3.0, 4.0],
    'ablation': [2.0, 1.0, 3.0, 4.0],
    'norm|2': [4.0, 3.0, 2.0, 1.0],
}


def test_a_hand_worked_agreement():
    result = agreement(HAND, top_k=2)
    assert result.names == ('gradient', 'ablation', 'norm|2')
    np.testing.assert_allclose(result.rho, [[1, 0.8, -1], [0.8, 1, -0.8], [-1, -0.8, 1]])
    np.testing.assert_array_equal(result.overlap, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert (result.top_k, result.chance, result.neurons) == (2, 0.5, 4)


@pytest.mark.parametrize(('count', 'top_k'), [(3, 1), (14, 1), (16, 2), (64, 6), (512, 51)])
def test_by_default_a_tenth_of_the_neurons_matter_most(count, top_k):
    measures = dict(zip('ab', np.random.default_rng(0).normal(size=(2, count))))
    result = agreement(measures)
    assert (result.top_k, result.neurons) == (top_k, count)
    assert result.chance == top_k / count
    np.testing.assert_array_equal(result.overlap, agreement(measures, top_k=top_k).overlap)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(4, 30), st.data())
def test_it_depends_on_the_order_of_values_alone(seed, size, count, data):
    values = np.random.default_rng(seed).normal(size=(size, count))
    names = [f'm{index}' for index in range(size)]
    top_k = data.draw(st.integers(1, count))
    result = agreement(dict(zip(names, values)), top_k=top_k, permutations=0)
    assert np.isnan(result.p_value).all()
    for matrix in (result.rho, result.overlap):
        np.testing.assert_array_equal(matrix, matrix.T)
        np.testing.assert_allclose(np.diag(matrix), 1)
    assert (np.abs(result.rho) <= 1 + 1e-12).all()
    assert (result.overlap >= 0).all() and (result.overlap <= 1).all()
    # Neurons in another order, and measures on other scales.
    order = data.draw(st.permutations(range(count)))
    other = agreement(dict(zip(names, np.exp(values)[:, order])), top_k=top_k, permutations=0)
    np.testing.assert_allclose(other.rho, result.rho, atol=1e-12)
    np.testing.assert_array_equal(other.overlap, result.overlap)
    # Measures in another order.
    turned = agreement(dict(zip(names[::-1], values[::-1])), top_k=top_k, permutations=0)
    np.testing.assert_allclose(turned.rho, result.rho[::-1, ::-1], atol=1e-12)
    np.testing.assert_array_equal(turned.overlap, result.overlap[::-1, ::-1])


def test_values_that_are_missing_or_constant():
    measures = {
        'a': jnp.array([1.0, 2.0, 3.0, 4.0]),
        'b': np.array([1.0, np.nan, 3.0, 9.0]),
        'constant': np.ones(4),
    }
    result = agreement(measures, top_k=1)
    assert result.rho[0, 1] == pytest.approx(1)
    assert result.overlap[0, 1] == 1
    assert np.isnan(result.rho[2]).all()
    assert result.overlap[0, 2] == 0


# ---------------------------------------------------------------------------------- tables


CAPTION = (
    "Upper triangle: Spearman's rho over 4 neurons. Lower triangle: overlap of the top 2 (by "
    'chance 0.50).'
)


def test_the_table_is_aligned():
    assert table(agreement(HAND, top_k=2)).splitlines() == [
        CAPTION,
        '                1      2      3',
        '1 gradient      -  +0.80  -1.00',
        '2 ablation   1.00      -  -0.80',
        '3 norm|2     0.00   0.00      -',
    ]


def test_the_markdown_table():
    assert markdown(agreement(HAND, top_k=2)).splitlines() == [
        r'|  | gradient | ablation | norm\|2 |',
        '| --- | ---: | ---: | ---: |',
        '| gradient | - | +0.80 | -1.00 |',
        '| ablation | 1.00 | - | -0.80 |',
        r'| norm\|2 | 0.00 | 0.00 | - |',
        '',
        CAPTION,
    ]


def test_an_undefined_correlation_is_shown_as_such():
    text = table(agreement({'a': [1, 2, 3], 'constant': [0, 0, 0]}))
    assert re.search(r'1 a +- +nan$', text, re.MULTILINE)


def test_the_rows_are_the_pairs():
    first, second, third = rows(agreement(HAND, top_k=2))
    assert first == {
        'first': 'gradient',
        'second': 'ablation',
        'rho': pytest.approx(0.8),
        # Of 24 orders 8 have a correlation of at least 0.8 in size; a thousand are drawn.
        'p_value': pytest.approx(1 / 3, abs=0.06),
        'overlap': 1.0,
        'chance': 0.5,
        'top_k': 2,
        'neurons': 4,
    }
    assert [(row['first'], row['second'], row['rho']) for row in (second, third)] == [
        ('gradient', 'norm|2', pytest.approx(-1)),
        ('ablation', 'norm|2', pytest.approx(-0.8)),
    ]


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('measures', 'top_k', 'message'),
    [
        ({}, None, '0 measures were given (none); agreement needs at least 2.'),
        ({'a': [1, 2]}, None, '1 measures were given (a); agreement needs at least 2.'),
        (
            {'a': [1, 2], 'b': [1, 2, 3]},
            None,
            'The measures have shapes a (2,), b (3,); give one value per neuron, for the same '
            'neurons, in arrays of one axis.',
        ),
        (
            {'a': np.ones((2, 2)), 'b': np.ones((2, 2))},
            None,
            'The measures have shapes a (2, 2), b (2, 2); give one value per neuron, for the same '
            'neurons, in arrays of one axis.',
        ),
        (HAND, 0, 'top_k is 0; it must be at least 1, at most 4.'),
        (HAND, 5, 'top_k is 5; it must be at least 1, at most 4.'),
    ],
)
def test_measures_that_cannot_be_compared_are_refused(measures, top_k, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        agreement(measures, top_k=top_k)
