"""Batches: order, slices per process, seeking and padding."""

import itertools
import pickle

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens import data
from neurosens.data.batching import TrainOrder, split_positions


def numbered(count):
    """A data set whose pixels and labels tell each example's position."""
    images = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return data.ArrayDataset(images, np.arange(count, dtype=np.int32), data.info('digits'))


def take(batches, count):
    return list(itertools.islice(batches, count))


sizes = st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 8))


@hypothesis.given(sizes, st.integers(0, 2**31), st.integers(0, 5))
def test_an_epoch_visits_every_example_of_its_whole_batches_once(size, seed, epoch):
    rows, processes, _ = size
    batch_size = rows * processes
    count = batch_size * 2 + rows - 1
    steps = data.steps_per_epoch(count, batch_size)
    batches = take(
        data.train_batches(
            numbered(count), batch_size=batch_size, seed=seed, start_step=epoch * steps
        ),
        steps,
    )
    seen = np.concatenate([batch.index for batch in batches])
    np.testing.assert_array_equal(seen, data.epoch_order(count, seed, epoch)[: steps * batch_size])
    assert len(set(seen.tolist())) == steps * batch_size


@hypothesis.given(sizes, st.integers(0, 100), st.integers(0, 30))
def test_processes_together_see_the_batches_of_a_single_process(size, seed, start):
    rows, processes, extra = size
    batch_size = rows * processes
    dataset = numbered(batch_size + extra)
    whole = take(data.train_batches(dataset, batch_size=batch_size, seed=seed, start_step=start), 3)
    parts = [
        take(
            data.train_batches(
                dataset,
                batch_size=batch_size,
                seed=seed,
                start_step=start,
                process_index=process,
                process_count=processes,
            ),
            3,
        )
        for process in range(processes)
    ]
    for step, batch in enumerate(whole):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *[part[step] for part in parts])
        jax.tree.map(np.testing.assert_array_equal, batch, joined)


@hypothesis.given(sizes, st.integers(0, 100), st.integers(0, 40))
def test_starting_at_a_step_gives_what_an_uninterrupted_run_sees(size, seed, start):
    batch_size, _, extra = size
    dataset = numbered(batch_size + extra)
    uninterrupted = take(data.train_batches(dataset, batch_size=batch_size, seed=seed), start + 2)
    resumed = take(
        data.train_batches(dataset, batch_size=batch_size, seed=seed, start_step=start), 2
    )
    for expected, batch in zip(uninterrupted[start:], resumed):
        jax.tree.map(np.testing.assert_array_equal, expected, batch)


@hypothesis.given(st.integers(0, 2**40), st.integers(0, 1000))
def test_order_is_a_permutation_fixed_by_seed_and_epoch(seed, epoch):
    order = data.epoch_order(50, seed, epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
    np.testing.assert_array_equal(order, data.epoch_order(50, seed, epoch))
    assert np.any(order != data.epoch_order(50, seed, epoch + 1))
    assert np.any(order != data.epoch_order(50, seed + 1, epoch))


@hypothesis.given(
    st.integers(1, 60), st.integers(1, 6), st.integers(1, 4), st.none() | st.integers(1, 70)
)
def test_evaluation_sees_every_example_once_in_order(count, rows, processes, limit):
    batch_size = rows * processes
    parts = [
        list(
            data.eval_batches(
                numbered(count),
                batch_size=batch_size,
                process_index=process,
                process_count=processes,
                limit=limit,
            )
        )
        for process in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for step in zip(*parts):
        for batch in step:
            assert batch.image.shape == (rows, 1, 1, 1) and batch.image.dtype == np.uint8
            assert batch.label.dtype == batch.index.dtype == np.int32 and batch.mask.dtype == bool
            np.testing.assert_array_equal(batch.label, batch.index)
            seen.extend(batch.index[batch.mask].tolist())
    expected = count if limit is None else min(count, limit)
    assert seen == list(range(expected))
    padding = [
        index for part in parts for batch in part for index in batch.index[~batch.mask].tolist()
    ]
    assert set(padding) <= {expected - 1} and len(padding) < batch_size


def test_rows_hold_the_image_and_label_of_their_index():
    batch = next(data.train_batches(numbered(20), batch_size=7, seed=3))
    np.testing.assert_array_equal(batch.image.ravel(), batch.index)
    np.testing.assert_array_equal(batch.label, batch.index)
    assert batch.mask.all()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'batch_size': 21}, 'batch size 21 does not fit 20 examples'),
        ({'batch_size': 0}, 'batch size 0'),
        ({'batch_size': 8, 'process_count': 3}, 'cannot be shared by 3 processes'),
        ({'batch_size': 8, 'process_index': 2, 'process_count': 2}, 'process index 2'),
        ({'batch_size': 8, 'start_step': -1}, 'start step -1'),
        ({'batch_size': 8, 'seed': -1}, 'seed -1'),
    ],
)
def test_impossible_training_batches_are_refused_at_the_call(arguments, words):
    with pytest.raises(ValueError, match=words):
        data.train_batches(numbered(20), **({'seed': 0} | arguments))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'batch_size': 8, 'limit': 0}, 'limit 0'),
        ({'batch_size': 8, 'process_count': 3}, 'cannot be shared by 3 processes'),
    ],
)
def test_impossible_evaluation_batches_are_refused_at_the_call(arguments, words):
    with pytest.raises(ValueError, match=words):
        data.eval_batches(numbered(20), **arguments)


def test_train_order_survives_pickling():
    order = TrainOrder(20, 6, 1, start_step=2, process_index=1, process_count=2)
    copy = pickle.loads(pickle.dumps(order))
    assert [copy[k] for k in range(30)] == [order[k] for k in range(30)]
    np.testing.assert_array_equal(order.batch(4), [order[k] for k in range(12, 15)])


@hypothesis.given(st.integers(2, 80), st.integers(1, 79), st.integers(0, 5))
def test_training_and_validation_split_the_official_training_examples(count, size, seed):
    hypothesis.assume(size < count)
    train = split_positions(count, 'train', validation_size=size, seed=seed)
    validation = split_positions(count, 'validation', validation_size=size, seed=seed)
    assert len(validation) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(count))


def test_to_float_scales_bytes_and_leaves_floats_alone():
    pixels = jnp.array([0, 51, 255], jnp.uint8)
    np.testing.assert_allclose(jax.jit(data.to_float)(pixels), [0, 0.2, 1], rtol=1e-6)
    floats = jnp.array([0.25, 3.0], jnp.bfloat16)
    assert data.to_float(floats) is floats
    with pytest.raises(ValueError, match='int32'):
        data.to_float(jnp.arange(3))
