"""Statistics of activations: right on any data, and the same however the data is cut up."""

import functools
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
from fractions import Fraction

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import neurosens as ns
from neurosens import forward as forward_lib
from neurosens import parallel
from neurosens.neurons.statistics import (
    Statistics,
    activation_summary,
    from_summary,
    merge,
    statistics,
    summarize,
)

FEW = hypothesis.settings(max_examples=50, deadline=None)
ROWS, NEURONS, BINS = 16, 3, 8
TINY = np.finfo(np.float32).tiny


def collect(activations, mask=None, **options):
    return from_summary(summarize(activations, mask, **options))


def assert_same(a, b, *, tolerance=1e-9):
    """Equal but for rounding in the moments, which is measured in standard deviations."""
    assert a.count == b.count
    for name in ('nonfinite', 'zeros', 'minimum', 'maximum', 'histogram'):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.m2, b.m2, rtol=tolerance, err_msg='m2')
    largest = np.maximum(abs(a.minimum), abs(a.maximum))
    room = tolerance * a.std(0) + 1e-15 * np.where(np.isfinite(largest), largest, 0)
    difference = np.nan_to_num(abs(a.mean - b.mean))
    np.testing.assert_array_less(difference, np.nan_to_num(room) + 1e-300)
    np.testing.assert_array_equal(np.isnan(a.mean), np.isnan(b.mean))


def reference(values, bins):
    """Statistics of `[samples, N]` by exact fractions and the definitions, one by one."""
    columns = [[Fraction(float(value)) for value in column] for column in values.T]
    means = [sum(column) / len(column) for column in columns]
    deviations = [
        sum((value - mean) ** 2 for value in column) for column, mean in zip(columns, means)
    ]
    histogram = np.zeros((len(columns), bins), np.int64)
    for neuron, column in enumerate(columns):
        exponent, first = reference_grid(column, bins)
        for value in column:
            histogram[neuron, math.floor(value / Fraction(2) ** exponent) - first] += 1
    return Statistics(
        count=len(values),
        nonfinite=np.zeros(len(columns), np.int64),
        zeros=(values == 0).sum(0),
        mean=np.array([float(mean) for mean in means]),
        m2=np.array([float(total) for total in deviations]),
        minimum=values.min(0).astype(np.float64),
        maximum=values.max(0).astype(np.float64),
        histogram=histogram,
    )


def reference_grid(column, bins):
    """The finest power of two that needs no more than `bins` bins, and its first bin."""
    for exponent in range(-126, 200):
        width = Fraction(2) ** exponent
        first, last = (math.floor(value / width) for value in (min(column), max(column)))
        if last - first < bins and max(map(abs, column)) < width * 2**24:
            return exponent, first
    raise AssertionError('no width is wide enough')


def normal_or_zero(values):
    """Subnormal numbers are outside of what devices agree on, and count as zero."""
    return np.where(abs(values) < TINY, np.float32(0), values)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-100, 100, width=32)
few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, 0.1, 1e4, 10000.001])
arrays = st.one_of(
    hnp.arrays(np.float32, (ROWS, NEURONS), elements=elements)
    for elements in (finite, moderate, few_values)
)


# ------------------------------------------------------------------------------- hand-worked


def test_a_batch_worked_by_hand():
    values = np.array([[1.0, 0.0, -3.0], [3.0, 0.0, 0.0], [5.0, 0.0, 3.0]], np.float32)
    result = collect(values, bins=4)
    assert result.count == 3
    np.testing.assert_array_equal(result.mean, [3, 0, 0])
    np.testing.assert_array_equal(result.m2, [8, 0, 18])
    np.testing.assert_array_equal(result.minimum, [1, 0, -3])
    np.testing.assert_array_equal(result.maximum, [5, 0, 3])
    np.testing.assert_array_equal(result.zeros, [0, 3, 1])
    np.testing.assert_array_equal(result.nonfinite, [0, 0, 0])
    np.testing.assert_allclose(result.zero_share(), [0, 1, 1 / 3])
    # 1 to 5 meets the bins [0, 2), [2, 4), [4, 6); -3 to 3 meets [-4, -2), ..., [2, 4).
    np.testing.assert_array_equal(result.edges()[0], [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(result.edges()[2], [-4, -2, 0, 2, 4])
    np.testing.assert_array_equal(result.histogram, [[1, 1, 1, 0], [3, 0, 0, 0], [1, 0, 1, 1]])
    assert all(
        getattr(result, name).dtype == np.float64 for name in ('mean', 'm2', 'minimum', 'maximum')
    )
    assert all(getattr(result, n).dtype == np.int64 for n in ('zeros', 'nonfinite', 'histogram'))


def test_merging_worked_by_hand():
    # 0 and 1 in bins of 1/2, then -6 as well: bins of 2 from -6 on.
    first = collect(np.array([[0.0], [1.0]], np.float32), bins=4)
    second = collect(np.array([[-6.0]], np.float32), bins=4)
    np.testing.assert_array_equal(first.edges(), [[0, 0.5, 1, 1.5, 2]])
    np.testing.assert_array_equal(first.histogram, [[1, 0, 1, 0]])
    both = merge(first, second)
    np.testing.assert_array_equal(both.edges(), [[-6, -4, -2, 0, 2]])
    np.testing.assert_array_equal(both.histogram, [[1, 0, 0, 2]])
    np.testing.assert_allclose(both.mean, -5 / 3, rtol=1e-15)
    np.testing.assert_allclose(both.m2, 37 - 25 / 3, rtol=1e-15)


def test_the_divisor_of_the_standard_deviation():
    values = np.array([[1.0], [2.0], [3.0], [6.0]], np.float32)
    result = collect(values)
    for ddof in (0, 1, 2):
        np.testing.assert_allclose(result.std(ddof), values.std(0, ddof=ddof), rtol=1e-7)
    np.testing.assert_allclose(result.std(), math.sqrt(14 / 3), rtol=1e-15)
    np.testing.assert_array_equal(result.std(4), [0])
    np.testing.assert_array_equal(collect(values[:1]).std(), [0])
    np.testing.assert_array_equal(collect(values[:1]).std(0), [0])


def test_quantiles_worked_by_hand():
    # Four values in [0, 1), each a bin of width 1/4 to itself: ranks lie at the middle of bins.
    result = collect(np.array([[0.0], [0.25], [0.5], [0.75]], np.float32), bins=4)
    np.testing.assert_array_equal(result.quantile(0.0), [0])
    np.testing.assert_array_equal(result.quantile(1), [0.75])
    np.testing.assert_allclose(result.quantile(1 / 3), [0.375])
    np.testing.assert_allclose(result.quantile(0.5), [0.5])
    np.testing.assert_array_equal(
        result.quantile((0.0, 0.5, 1.0)), [result.quantile(q) for q in (0.0, 0.5, 1.0)]
    )
    assert result.quantile([0.5]).shape == (1, 1)
    # Two values far apart: the median lies between them, where the histogram is empty.
    apart = collect(np.array([[0.0], [100.0]], np.float32))
    np.testing.assert_array_equal(apart.quantile(0.5), [50])


# ------------------------------------------------------------------- any data, however cut up


@FEW
@hypothesis.given(arrays)
def test_a_batch_agrees_with_the_definitions(values):
    assert_same(collect(values, bins=BINS), reference(normal_or_zero(values), BINS))


@FEW
@hypothesis.given(arrays, st.data())
def test_neither_the_split_nor_the_order_matters(values, data):
    whole = collect(values, bins=BINS)
    part_of_row = np.array(data.draw(st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS)))
    # What a batch does not count must not matter, so the other rows are poisoned. Parts can be
    # empty.
    parts = [
        collect(
            np.where((part_of_row == part)[:, None], values, np.float32(np.nan)),
            part_of_row == part,
            bins=BINS,
        )
        for part in range(5)
    ]
    shuffled = data.draw(st.permutations(parts))
    assert_same(functools.reduce(merge, shuffled), whole)
    a, b, c, d, e = shuffled
    assert_same(merge(merge(a, merge(b, c)), merge(d, e)), whole)


@FEW
@hypothesis.given(arrays, st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_a_quantile_errs_by_less_than_a_bin(values, q):
    values = normal_or_zero(values)
    result = collect(values, bins=BINS)
    width = np.diff(result.edges()[:, :2])[:, 0]
    expected = np.quantile(values.astype(np.float64), q, axis=0)
    rounding = 1e-14 * abs(values).max(0)
    assert (abs(result.quantile(q) - expected) <= width + rounding).all()
    ordered = result.quantile(sorted(q))
    assert (np.diff(ordered, axis=0) >= -rounding).all(), 'quantiles grow with q'
    assert (ordered >= result.minimum).all() and (ordered <= result.maximum + rounding).all()


@FEW
@hypothesis.given(arrays)
def test_at_least_half_of_the_bins_span_the_range(values):
    values = normal_or_zero(values)
    edges = collect(values, bins=BINS).edges()
    width = np.diff(edges[:, :2])[:, 0]
    spanned = np.floor(values.max(0) / width) - np.floor(values.min(0) / width) + 1
    largest = abs(values).max(0)
    finest = np.maximum(np.exp2(np.frexp(largest)[1] - 24.0), 2.0**-126)
    assert (spanned <= BINS).all()
    assert ((spanned > BINS / 2) | (width <= finest)).all()


@pytest.mark.parametrize(
    ('shape', 'unit'),
    [
        ((256, 300), 'channel'),
        ((256, 16, 16, 16), 'channel'),
        ((200, 7, 7, 64), 'channel'),
        ((200, 7, 7, 64), 'unit'),
    ],
)
def test_moments_are_as_good_as_those_of_float64(shape, unit):
    # These shapes are compiled differently; float32 sums would be off by 1e-7.
    values = np.random.default_rng(0).normal(1.3, 0.37, shape).astype(np.float32)
    rows = values.reshape(-1, shape[-1]) if unit == 'channel' else values.reshape(shape[0], -1)
    rows = rows.astype(np.float64)
    result = collect(values, unit=unit, bins=0)
    np.testing.assert_allclose(result.mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(result.std(0), rows.std(0), rtol=1e-12)


@pytest.mark.parametrize(
    ('mean', 'std'), [(1e4, 1.0), (0.0, 1.0), (-1e4, 1e-3), (1e-30, 1e-31), (1e30, 1e29)]
)
def test_a_million_values_in_uneven_batches(mean, std):
    values = np.random.default_rng(1).normal(mean, std, 1_000_000).astype(np.float32)
    batches = np.split(values, [1, 1_000, 300_000])
    result = functools.reduce(merge, (collect(batch[:, None]) for batch in batches))
    precise = values.astype(np.float64)
    assert result.count == 1_000_000
    np.testing.assert_allclose(result.mean, precise.mean(), rtol=0, atol=1e-10 * std)
    np.testing.assert_allclose(result.std(), precise.std(ddof=1), rtol=1e-9)
    assert result.minimum == precise.min() and result.maximum == precise.max()
    q = np.linspace(0, 1, 21)
    width = result.edges()[0, 1] - result.edges()[0, 0]
    assert abs(result.quantile(q)[:, 0] - np.quantile(precise, q)).max() <= width
    assert result.histogram.sum() == 1_000_000


# --------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize('value', [0.0, 1.0, -1.0, 0.1, 1e4, -1e30, 1e-30, 3.4e38, -3.4e38, TINY])
def test_constant_neurons(value):
    value = np.float32(value)
    batch = np.full((ROWS, NEURONS), value)
    result = merge(collect(batch), collect(batch))
    for name in ('mean', 'minimum', 'maximum'):
        np.testing.assert_array_equal(getattr(result, name), np.float64(value), err_msg=name)
    np.testing.assert_array_equal(result.std(), 0)
    np.testing.assert_array_equal(result.quantile((0, 0.3, 1)), np.float64(value))
    np.testing.assert_array_equal(result.histogram[:, 0], 2 * ROWS)
    np.testing.assert_array_equal(result.zero_share(), float(value == 0))
    assert (result.edges()[:, 0] <= value).all() and (result.edges()[:, 1] > value).all()


def test_opposite_extremes_and_their_neighbours():
    big = np.finfo(np.float32).max
    values = np.array([[-big], [-TINY], [0], [TINY], [big]], np.float32)
    result = collect(values, bins=2)
    # A number just below 0 lies in the bin below 0, though it is lost at this width.
    np.testing.assert_array_equal(result.edges(), [[-(2.0**128), 0, 2.0**128]])
    np.testing.assert_array_equal(result.histogram, [[2, 3]])
    assert_same(result, reference(values, 2))
    parts = [collect(row[None], bins=2) for row in values]
    assert_same(functools.reduce(merge, parts), result)


def test_one_row_and_one_neuron():
    result = collect(np.array([[2.5]], np.float32))
    assert result.count == 1 and result.mean == 2.5 and result.m2 == 0
    np.testing.assert_array_equal(result.quantile(0.4), [2.5])
    scalar = collect(np.array([1.0, 3.0], np.float32))
    assert scalar.mean.shape == (1,) and scalar.mean == 2


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.uint8])
def test_narrow_types_are_widened_before_anything_is_summed(dtype):
    # In float16 the squares would overflow, in bfloat16 the sum would stand still.
    values = jnp.asarray(np.random.default_rng(2).uniform(1, 250, (2_000, 2)), dtype)
    precise = np.asarray(values, np.float64)
    result = collect(values)
    np.testing.assert_allclose(result.mean, precise.mean(0), rtol=1e-13)
    np.testing.assert_allclose(result.std(), precise.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_array_equal(result.minimum, precise.min(0))


def test_subnormal_float16_is_not_zero():
    result = collect(jnp.array([[6e-8], [1.0]], jnp.float16))
    assert result.minimum == np.float64(np.float16(6e-8)) and result.zeros == 0


def test_subnormal_float32_is_zero_on_every_device():
    result = collect(np.array([[1e-40, -1e-40], [1.0, -1.0]], np.float32))
    np.testing.assert_array_equal(result.zeros, [1, 1])
    np.testing.assert_array_equal(result.minimum, [0, -1])
    np.testing.assert_array_equal(result.maximum, [1, 0])


def test_float64_is_kept_where_it_is_enabled():
    with jax.enable_x64(True):
        values = 1 + 1e-10 * np.random.default_rng(3).normal(size=(500, 2))
        result = collect(jnp.asarray(values))
        parts = [collect(jnp.asarray(part)) for part in np.split(values, [100])]
    np.testing.assert_array_equal(result.minimum, values.min(0))
    np.testing.assert_allclose(result.std(0), values.std(0), rtol=1e-5)
    assert_same(merge(*parts), result, tolerance=1e-5)


def test_a_neuron_is_a_channel_or_a_unit():
    values = np.random.default_rng(4).normal(size=(6, 3, 2, 4)).astype(np.float32)
    channels, each = collect(values, unit='channel'), collect(values, unit='unit')
    assert channels.count == 36 and each.count == 6
    np.testing.assert_allclose(channels.mean, values.mean((0, 1, 2), np.float64), rtol=1e-12)
    np.testing.assert_allclose(each.mean, values.mean(0, np.float64).ravel(), rtol=1e-12)
    np.testing.assert_array_equal(each.maximum, values.max(0).ravel())
    mask = np.array([True, False, True, True, False, False])
    masked = collect(values, mask, unit='channel')
    assert_same(masked, collect(values[mask], unit='channel'))
    assert masked.count == 18


def test_values_that_are_not_finite_are_counted_and_seen():
    values = np.array(
        [[1, np.nan, np.inf, np.nan], [2, 1, -np.inf, np.nan], [4, 0, 3, np.inf]], np.float32
    )
    result = collect(values, bins=4)
    np.testing.assert_array_equal(result.nonfinite, [0, 1, 2, 3])
    for estimate in (result.mean, result.std(), result.std(3), result.quantile(0.5)):
        np.testing.assert_array_equal(np.isnan(estimate), [False, True, True, True])
    np.testing.assert_array_equal(result.minimum, [1, 0, 3, np.inf])
    np.testing.assert_array_equal(result.maximum, [4, 1, 3, -np.inf])
    np.testing.assert_array_equal(result.zeros, [0, 1, 0, 0])
    np.testing.assert_array_equal(result.histogram.sum(1), [3, 2, 1, 0])
    parts = [collect(row[None], bins=4) for row in values]
    assert_same(functools.reduce(merge, parts), result)
    assert_same(
        merge(result, collect(np.ones((1, 4), np.float32), bins=4)),
        merge(*[collect(np.ones((1, 4), np.float32), bins=4), result]),
    )


@pytest.mark.parametrize('bins', [0, 8])
def test_statistics_of_nothing_change_nothing(bins):
    values = np.random.default_rng(5).normal(size=(ROWS, NEURONS)).astype(np.float32)
    some = collect(values, bins=bins)
    for nothing in (
        collect(np.full_like(values, np.nan), np.zeros(ROWS, bool), bins=bins),
        collect(values[:0], bins=bins),
    ):
        assert nothing.count == 0
        np.testing.assert_array_equal(nothing.std(), 0)
        assert np.isnan(nothing.zero_share()).all()
        for merged in (merge(some, nothing), merge(nothing, some)):
            assert_same(merged, some, tolerance=1e-16)
        assert merge(nothing, nothing).count == 0
    if bins:
        assert np.isnan(nothing.quantile((0.1, 0.9))).all()


# ------------------------------------------------------------------------------------ mistakes


def test_without_a_histogram_there_are_no_quantiles():
    values = np.random.default_rng(6).normal(size=(ROWS, NEURONS)).astype(np.float32)
    result = merge(collect(values[:5], bins=0), collect(values[5:], bins=0))
    np.testing.assert_allclose(result.mean, values.mean(0, np.float64), rtol=1e-12)
    for question in (functools.partial(result.quantile, 0.5), result.edges):
        with pytest.raises(ValueError, match='have no histogram; collect them with bins=256'):
            question()


@pytest.mark.parametrize('q', [-0.1, 1.1, math.nan, (0.5, 2.0)])
def test_a_quantile_outside_of_its_range_is_refused(q):
    result = collect(np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match=r'q is .* at least 0, at most 1'):
        result.quantile(q)


def test_mistakes_are_answered_with_the_remedy():
    values = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match='valid names are channel, unit'):
        summarize(values, unit='chanel')
    for bins in (1, -3):
        with pytest.raises(ValueError, match=f'bins is {bins}; it must be at least 2, or 0'):
            summarize(values, bins=bins)
    with pytest.raises(ValueError, match=r'mask has shape \(3,\).*shape \(4,\)'):
        summarize(values, np.ones(3, bool))
    many = jax.ShapeDtypeStruct((2, 2**20, 16), jnp.float32)
    with pytest.raises(ValueError, match=r'use fewer than 128 bins'):
        jax.eval_shape(functools.partial(summarize, unit='unit', bins=128), many)
    assert jax.eval_shape(functools.partial(summarize, unit='unit', bins=127), many)
    long = jax.ShapeDtypeStruct((2**11, 2**20, 3), jnp.float32)
    with pytest.raises(ValueError, match='has 2147483648 values per neuron; split it'):
        jax.eval_shape(summarize, long)
    with pytest.raises(ValueError, match='3 neurons with 4 bins and of 3 neurons with 8 bins'):
        merge(collect(values, bins=4), collect(values, bins=8))
    with pytest.raises(ValueError, match='3 neurons with 4 bins and of 2 neurons with 4 bins'):
        merge(collect(values, bins=4), collect(values[:, :2], bins=4))


# -------------------------------------------------------------------------- devices and models


@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_eight_devices_say_what_one_says(unit):
    rng = np.random.default_rng(7)
    values = np.maximum(rng.normal(0.2, 1.0, (32, 5, 6)), 0).astype(np.float32)
    values[:, :, 2] *= 1e20
    mask = rng.uniform(size=32) < 0.8
    values[~mask] = np.nan
    one, eight = (
        from_summary(summarize(*parallel.shard(parallel.data_mesh(n), (values, mask)), unit=unit))
        for n in (1, 8)
    )
    assert_same(one, eight, tolerance=1e-12)
    assert_same(eight, collect(values[mask], unit=unit), tolerance=1e-12)


def test_activations_stay_where_they_are():
    # Per device only results travel, never the values they came from.
    batch = parallel.shard(parallel.data_mesh(), np.zeros((64, 32, 32, 4), np.float32))
    program = summarize.lower(batch, bins=16).compile().as_text()
    moved = re.findall(
        r'= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(', program
    )
    assert moved
    for shapes in moved:
        for dimensions in re.findall(r'\w+\[([\d,]+)\]', shapes):
            assert math.prod(map(int, dimensions.split(','))) <= 8 * 4 * 16


PROCESS = """
import dataclasses
import jax, numpy as np
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
from neurosens import parallel
from neurosens.neurons.statistics import from_summary, summarize
parallel.initialize_distributed()
index = jax.process_index()
rows = np.arange(48, dtype=np.float32).reshape(12, 4)[6 * index : 6 * index + 6]
mask = np.arange(12)[6 * index : 6 * index + 6] < 11
mesh = parallel.data_mesh()
summary = summarize(*parallel.shard(mesh, (rows, mask)), bins=4)
# No process holds all of a summary that is itself spread over the devices.
spread = jax.jit(lambda counts: counts, out_shardings=parallel.split(mesh))(summary.histogram)
together = from_summary(dataclasses.replace(summary, histogram=spread))
alone = from_summary(summarize(rows, mask, bins=4))
for result in (together, alone):
    print('|', result.count, *result.mean, *result.maximum, *result.histogram.ravel())
"""


def test_two_processes_say_what_one_says():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    root = pathlib.Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS],
            cwd=root,
            env={
                **os.environ,
                'PYTHONPATH': str(root),
                'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
                'JAX_NUM_PROCESSES': '2',
                'JAX_PROCESS_ID': str(index),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    values = np.arange(48, dtype=np.float32).reshape(12, 4)[:11]
    whole = collect(values, bins=4)
    for index, output in enumerate(outputs):
        together, alone = (
            list(map(float, line[1:].split())) for line in output.splitlines() if line[:1] == '|'
        )
        own = collect(values[6 * index : 6 * index + 6], bins=4)
        for said, expected in ((together, whole), (alone, own)):
            assert said == pytest.approx(
                [
                    expected.count,
                    *expected.mean,
                    *expected.maximum,
                    *expected.histogram.ravel(),
                ],
                rel=1e-14,
            )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name='conv')(x))
        return nn.Dense(3, name='head')(x.mean((1, 2)))


@pytest.fixture(scope='module')
def model():
    x = jax.random.normal(jax.random.key(0), (16, 5, 5, 2))
    return ns.LinenForward(Net()), Net().init(jax.random.key(1), x), x


@pytest.mark.parametrize(('layer', 'unit'), [('head:in', 'channel'), ('conv', 'unit')])
def test_a_layer_of_a_model_is_described(model, layer, unit):
    forward, variables, x = model
    tap = jax.jit(functools.partial(forward, taps=(layer,)))
    rows = np.asarray(tap(variables, x)[1][layer])
    rows = rows.reshape(len(x), -1).astype(np.float64)
    mask = np.arange(16) < 13
    result = statistics(forward, variables, x, layer=layer, unit=unit, mask=mask)
    assert result.count == 13
    np.testing.assert_allclose(result.mean, rows[mask].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.std(), rows[mask].std(0, ddof=1), rtol=1e-4)
    summary = activation_summary(forward, variables, x, mask, layer=layer, unit=unit)
    assert isinstance(summary.histogram, jax.Array)
    assert_same(from_summary(summary), result)


def test_batches_of_a_model_add_up_to_the_data_set(model):
    forward, variables, x = model
    batches = [x[:8], x[8:]]
    parts = (statistics(forward, variables, batch, layer='conv', bins=16) for batch in batches)
    result = functools.reduce(merge, parts)
    whole = statistics(forward, variables, x, layer='conv', bins=16)
    assert result.count == whole.count == 16 * 25
    np.testing.assert_allclose(result.mean, whole.mean, rtol=1e-5)
    np.testing.assert_allclose(result.std(), whole.std(), rtol=1e-5)


def test_new_edits_of_a_model_need_no_new_trace(model):
    forward, variables, x = model
    traced = []

    def scale(factor, activation):
        traced.append(factor)
        return factor * activation

    means = []
    for factor in (1.0, 2.0):
        edit = jax.tree_util.Partial(scale, jnp.float32(factor))
        edited = ns.with_edits(forward, {'conv': edit})
        means.append(statistics(edited, variables, x, layer='conv').mean)
    assert len(traced) == 1
    np.testing.assert_allclose(means[1], 2 * means[0], rtol=1e-6)


def test_an_unknown_layer_is_named(model):
    forward, variables, x = model
    with pytest.raises(forward_lib.LayerError, match="Unknown layer 'cnov'"):
        statistics(forward, variables, x, layer='cnov')
