"""ImageNet-size images: streamed with Grain, decoded on the host, cropped on the device."""

import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from neurosens.data import catalogue, tfds_source
from neurosens.data.batching import Batch, TrainOrder, eval_rows, split_positions
from neurosens.data.catalogue import DatasetInfo

# The usual evaluation transform: shorter side 256, centre crop 224.
RESIZED_SIDE = 256
# Labelled test images: the official test labels are not public.
_TEST_SPLIT = 'validation'


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedDataset:
    """A split read example by example while it is used.

    Training images are uint8 [256, 256, C], the centre of the image at shorter side 256, of
    which the device takes random crops; evaluation images are the centre crop of
    `info.image_shape`.

    Attributes:
        records: Random access to serialised examples.
        positions: int64 [N], the record of each example of the split.
        info: The data set's description.
        directory: The directory of the prepared version.
        threads: Decoding threads per worker.
        workers: Decoding processes; 0 decodes in this process.
    """

    records: Any
    positions: np.ndarray
    info: DatasetInfo
    directory: pathlib.Path
    threads: int = 16
    workers: int = 0

    @property
    def num_examples(self) -> int:
        """Number of examples in the split."""
        return len(self.positions)

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Yields shuffled batches without end, in the order of `batching.train_batches`.

        Args:
            batch_size: Global batch size, over all processes.
            seed: Seed of the run.
            start_step: The first step to yield, reached without reading the ones before.
            process_index: This process, from 0.
            process_count: Number of processes.

        Returns:
            An endless iterator over this process's rows of each global batch.

        Raises:
            ValueError: As `batching.train_batches`.
            DatasetDamagedError: At the batch that holds an unreadable example.
        """
        order = TrainOrder(
            self.num_examples, batch_size, seed, start_step, process_index, process_count
        )
        rows = _Rows(order, None)
        return self._stream(rows, order.rows, crop=RESIZED_SIDE, reduced=True)

    def eval_batches(
        self,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """Yields every example exactly once, in the order of `batching.eval_batches`.

        Args:
            batch_size: Global batch size, over all processes.
            process_index: This process, from 0.
            process_count: Number of processes.
            limit: Yield at most this many examples from the start of the split.

        Returns:
            An iterator over this process's rows of each global batch.

        Raises:
            ValueError: As `batching.eval_batches`.
            DatasetDamagedError: At the batch that holds an unreadable example.
        """
        positions, mask = eval_rows(
            self.num_examples, batch_size, process_index, process_count, limit
        )
        rows = _Rows(positions.ravel(), mask.ravel())
        return self._stream(rows, positions.shape[1], crop=self.info.image_shape[0], reduced=False)

    def _stream(
        self, rows: '_Rows', batch_rows: int, *, crop: int, reduced: bool
    ) -> Iterator[Batch]:
        read = functools.partial(_read_row, dataset=self, crop=crop, reduced=reduced)
        stream = (
            grain.MapDataset.source(rows)
            .map(read)
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=self.threads,
                    prefetch_buffer_size=max(2 * batch_rows, self.threads),
                )
            )
        )
        if self.workers:
            # Grain's processes read absl flags, which only absl.app programs have parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            # Before batching: workers share examples, so batches do not depend on their number.
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.workers, per_worker_buffer_size=batch_rows
                )
            )
        return iter(stream.batch(batch_rows, batch_fn=_stack))


def open_split(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation_size: int = 0,
    seed: int = 0,
    threads: int = 16,
    workers: int = 0,
) -> StreamedDataset:
    """Opens a split without reading its images.

    Args:
        name: The data set's name.
        split: 'train'; 'validation', held out of the training images; or 'test', the official
            labelled validation images.
        data_dir: The directory of prepared data sets; None for the TFDS default.
        validation_size: Number of training examples held out as the 'validation' split.
        seed: Chooses another held-out set; not the seed of a run.
        threads: Decoding threads per worker.
        workers: Decoding processes; 0 decodes in this process.

    Returns:
        The split.

    Raises:
        ValueError: The validation size or a count is not valid.
        DatasetNotPreparedError: The data directory does not hold the data set.
        DatasetDamagedError: Its files are incomplete or unreadable.
    """
    if threads < 1 or workers < 0:
        raise ValueError(
            f'{threads} threads with {workers} workers cannot decode: '
            'choose at least one thread and a worker count from 0'
        )
    info = catalogue.info(name)
    records, class_names, directory = tfds_source.open_records(
        name, _TEST_SPLIT if split == 'test' else 'train', data_dir
    )
    if split == 'test':
        positions = np.arange(len(records))
    else:
        positions = split_positions(len(records), split, validation_size=validation_size, seed=seed)
    if len(class_names) == info.num_classes:
        info = dataclasses.replace(info, class_names=class_names)
    return StreamedDataset(records, positions, info, directory, threads, workers)


def decode_image(encoded: bytes, *, resized_side: int, crop: int, reduced: bool) -> np.ndarray:
    """Decodes an image, scales its shorter side and takes the centre.

    Args:
        encoded: JPEG or PNG bytes of an image of any size and colour mode.
        resized_side: Length of the shorter side after scaling, in pixels.
        crop: Side of the square centre crop, in pixels, at most `resized_side`.
        reduced: Let the JPEG decoder scale down by a power of two first, as long as the result
            is not smaller than `resized_side`: faster, and slightly different pixels.

    Returns:
        uint8 [crop, crop, 3].
    """
    image: Image.Image = Image.open(io.BytesIO(encoded))
    if reduced:
        image.draft('RGB', (resized_side, resized_side))
    image = image.convert('RGB')
    scale = resized_side / min(image.size)
    width, height = (max(resized_side, int(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


class _Rows:
    """The rows to read: entry `k` is a position in the split and whether it counts."""

    def __init__(self, positions: Sequence[int] | TrainOrder | np.ndarray, mask: np.ndarray | None):
        self._positions = positions
        self._mask = mask

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, row: int) -> tuple[int, bool]:
        return int(self._positions[row]), self._mask is None or bool(self._mask[row])


def _read_row(
    row: tuple[int, bool], *, dataset: StreamedDataset, crop: int, reduced: bool
) -> Batch:
    """Reads one example, as a batch without its leading axis."""
    index, counts = row
    position = int(dataset.positions[index])
    with tfds_source.damage_report(dataset.info.name, dataset.directory):
        encoded, label = tfds_source.parse_example(dataset.records[position])
        if not 0 <= label < dataset.info.num_classes:
            raise ValueError(f'label {label} is outside 0..{dataset.info.num_classes - 1}')
        image = decode_image(encoded, resized_side=RESIZED_SIDE, crop=crop, reduced=reduced)
    return Batch(image, np.int32(label), np.bool_(counts), np.int32(index))


def _stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack(column) for column in zip(*rows)))
