"""Order, batches and per-process slices: the same for every data set and process count."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from neurosens.data.catalogue import DatasetInfo

# Fixes which training examples validate; deliberately unrelated to the seed of a run.
_VALIDATION_SEED = 7_919


class Batch(NamedTuple):
    """One batch, or this process's rows of one; a pytree.

    Attributes:
        image: uint8 [b, H, W, C].
        label: int32 [b].
        mask: bool [b], False for the rows that only fill up the last evaluation batch.
        index: int32 [b], each example's position in the split.
    """

    image: Any
    label: Any
    mask: Any
    index: Any


class Source(Protocol):
    """A readable split, in memory or streamed: training need not know which."""

    @property
    def info(self) -> DatasetInfo:
        """The data set's description."""

    @property
    def num_examples(self) -> int:
        """Number of examples in the split."""

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Yields shuffled batches without end; see `train_batches`."""

    def eval_batches(
        self,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """Yields every example once, in order; see `eval_batches`."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A split held in memory.

    Attributes:
        images: uint8 [N, H, W, C], read-only.
        labels: int32 [N], read-only.
        info: The data set's description.
    """

    images: np.ndarray
    labels: np.ndarray
    info: DatasetInfo

    @property
    def num_examples(self) -> int:
        """Number of examples in the split."""
        return len(self.labels)

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Yields shuffled batches without end; see `train_batches`."""
        return train_batches(
            self,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            process_index=process_index,
            process_count=process_count,
        )

    def eval_batches(
        self,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """Yields every example once, in order; see `eval_batches`."""
        return eval_batches(
            self,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            limit=limit,
        )


def to_float(images: jax.Array) -> jax.Array:
    """Scales uint8 pixels to [0, 1]; float images pass unchanged.

    Args:
        images: uint8 or floating-point [..., H, W, C].

    Returns:
        float32 [..., H, W, C] for uint8 images, else `images`.

    Raises:
        ValueError: The images are neither uint8 nor floating-point.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    if images.dtype != jnp.uint8:
        raise ValueError(f'images are {images.dtype}: pass uint8, or floats in [0, 1]')
    return images.astype(jnp.float32) / 255


def split_positions(
    num_examples: int, split: str, *, validation_size: int = 0, seed: int = 0
) -> np.ndarray:
    """Returns which examples of the official training split belong to a split.

    Args:
        num_examples: Size N of the official training split.
        split: 'train' or 'validation'.
        validation_size: Number of examples held out for validation.
        seed: Chooses another held-out set; not the seed of a run.

    Returns:
        int64 [validation_size] or [N - validation_size], ascending: validation takes the last
        entries of a fixed permutation, training the rest.

    Raises:
        ValueError: The validation size or the seed is negative, leaves no training example, or
            is 0 while the validation split is asked for.
    """
    if not 0 <= validation_size < num_examples or seed < 0:
        raise ValueError(
            f'validation size {validation_size} with seed {seed} does not fit {num_examples} '
            f'training examples: choose a size from 0 to {num_examples - 1} and a seed from 0'
        )
    if split == 'validation' and validation_size == 0:
        raise ValueError(
            'the validation split is empty with validation size 0: '
            'pass how many training examples to hold out'
        )
    bits = np.random.PCG64(np.random.SeedSequence([_VALIDATION_SEED, seed]))
    permutation = np.random.Generator(bits).permutation(num_examples)
    boundary = num_examples - validation_size
    held_out = split == 'validation'
    return np.sort(permutation[boundary:] if held_out else permutation[:boundary])


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch visits the examples.

    Args:
        num_examples: Number of examples N.
        seed: Non-negative seed of the run.
        epoch: Non-negative epoch number.

    Returns:
        int64 [N], a permutation that depends on the seed and the epoch only.

    Raises:
        ValueError: The seed or the epoch is negative.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f'seed {seed} and epoch {epoch} must not be negative')
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.Generator(bits).permutation(num_examples)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole training batches in an epoch.

    Args:
        num_examples: Number of examples.
        batch_size: Global batch size.

    Raises:
        ValueError: The batch size is not positive or exceeds the number of examples.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f'batch size {batch_size} does not fit {num_examples} examples: '
            f'choose one from 1 to {num_examples}'
        )
    return num_examples // batch_size


def rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    """Returns how many rows of each global batch one process gets.

    Args:
        batch_size: Global batch size.
        process_index: This process, from 0.
        process_count: Number of processes.

    Raises:
        ValueError: The processes cannot share the batch evenly, or there is no such process.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(
            f'process index {process_index} is not below the process count {process_count}: '
            'count processes from 0'
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f'batch size {batch_size} cannot be shared by {process_count} processes: '
            'choose a positive multiple of the process count'
        )
    return batch_size // process_count


class TrainOrder:
    """This process's endless sequence of training examples, with random access.

    Entry `k` is row `k % b` of this process's share of training step `start_step + k // b`,
    given as a position in the split; `b` is the number of rows per process.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._arguments = (
            num_examples,
            batch_size,
            seed,
            start_step,
            process_index,
            process_count,
        )
        self.rows = rows_per_process(batch_size, process_index, process_count)
        self._steps_per_epoch = steps_per_epoch(num_examples, batch_size)
        if start_step < 0 or seed < 0:
            raise ValueError(f'start step {start_step} and seed {seed} must not be negative')
        self._batch_size = batch_size
        self._start_step = start_step
        self._first_row = process_index * self.rows
        # Prefetching threads work on both sides of an epoch's end, hence two orders.
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, num_examples, seed)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainOrder, self._arguments

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        step, row = divmod(int(position), self.rows)
        return int(self.batch(step)[row])

    def batch(self, step: int) -> np.ndarray:
        """Returns this process's rows, int64 [b], `step` steps after the start step."""
        epoch, step_of_epoch = divmod(self._start_step + step, self._steps_per_epoch)
        first = step_of_epoch * self._batch_size + self._first_row
        return self._order(epoch)[first : first + self.rows]


def eval_rows(
    num_examples: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which examples this process evaluates, batch by batch.

    Args:
        num_examples: Number of examples in the split.
        batch_size: Global batch size.
        process_index: This process, from 0.
        process_count: Number of processes.
        limit: Evaluate at most this many examples from the start of the split.

    Returns:
        Positions in the split, int64 [batches, b], and mask, bool [batches, b]; padding repeats
        the last example.

    Raises:
        ValueError: The limit is not positive, or the processes cannot share the batch evenly.
    """
    rows = rows_per_process(batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise ValueError(f'limit {limit} must be at least 1, or None for the whole split')
    count = num_examples if limit is None else min(limit, num_examples)
    batches = -(-count // batch_size)
    positions = np.arange(batches * batch_size).reshape(batches, process_count, rows)
    positions = positions[:, process_index]
    return np.minimum(positions, count - 1), positions < count


def train_batches(
    dataset: ArrayDataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields shuffled training batches without end.

    Each epoch visits the examples in its own `epoch_order` and leaves out the remainder that
    does not fill a batch. The global batch of a step depends on the seed and the step only, so
    neither the number of processes nor a restart at `start_step` changes it.

    Args:
        dataset: The split.
        batch_size: Global batch size, over all processes.
        seed: Seed of the run.
        start_step: The first step to yield, reached without reading the ones before.
        process_index: This process, from 0.
        process_count: Number of processes.

    Returns:
        An endless iterator over this process's rows of each global batch.

    Raises:
        ValueError: The batch size exceeds the split or cannot be shared by the processes, or a
            number is negative.
    """
    order = TrainOrder(
        dataset.num_examples, batch_size, seed, start_step, process_index, process_count
    )
    mask = np.ones(order.rows, bool)
    # Errors above come at the call; the generator starts at the first `next`.
    return (_gather(dataset, order.batch(step), mask) for step in itertools.count())


def eval_batches(
    dataset: ArrayDataset,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yields every example exactly once, in order.

    The last global batch is filled up with copies of the last example whose mask is False, so
    all batches of all processes have the same shape, and all processes get as many of them.

    Args:
        dataset: The split.
        batch_size: Global batch size, over all processes.
        process_index: This process, from 0.
        process_count: Number of processes.
        limit: Yield at most this many examples from the start of the split.

    Returns:
        An iterator over this process's rows of each global batch.

    Raises:
        ValueError: The limit is not positive, or the processes cannot share the batch evenly.
    """
    positions, masks = eval_rows(
        dataset.num_examples, batch_size, process_index, process_count, limit
    )
    return (_gather(dataset, rows, mask) for rows, mask in zip(positions, masks))


def _gather(dataset: ArrayDataset, rows: np.ndarray, mask: np.ndarray) -> Batch:
    return Batch(dataset.images[rows], dataset.labels[rows], mask.copy(), rows.astype(np.int32))
