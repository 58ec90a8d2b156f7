"""Opens data sets: in memory where they fit, streamed where they do not."""

import os

from neurosens import _validate
from neurosens.data import catalogue, digits, tfds_source
from neurosens.data.batching import ArrayDataset, Source, split_positions

SPLITS = ('train', 'validation', 'test')


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation_size: int = 0,
    seed: int = 0,
) -> ArrayDataset:
    """Reads a split into memory; never downloads.

    Args:
        name: One of `names()` whose `info` says `in_memory`.
        split: 'train', 'validation' or 'test'.
        data_dir: The directory of prepared data sets; None for TFDS_DATA_DIR or else
            ~/tensorflow_datasets.
        validation_size: Number of training examples held out as the 'validation' split.
        seed: Chooses another held-out set; keep it fixed, whatever the seed of the run.

    Returns:
        The split, with read-only arrays.

    Raises:
        ValueError: The name, the split or the validation size is not valid.
        DatasetNotPreparedError: The data directory does not hold the data set.
        DatasetDamagedError: Its files are incomplete or unreadable.
    """
    info = catalogue.info(name)
    _check_split(split)
    if not info.in_memory:
        raise ValueError(f'{name} does not fit in memory: use neurosens.data.open instead of load')
    stored_split = 'test' if split == 'test' else 'train'
    # Before the slow part, so that a wrong size is reported at once.
    if split != 'test':
        split_positions(info.train_size, split, validation_size=validation_size, seed=seed)
    if name == 'digits':
        images, labels = digits.read_split(stored_split)
    else:
        images, labels = tfds_source.read_split(info, stored_split, data_dir)
    if split != 'test' and validation_size:
        positions = split_positions(len(labels), split, validation_size=validation_size, seed=seed)
        images, labels = images[positions], labels[positions]
    images.setflags(write=False)
    labels.setflags(write=False)
    return ArrayDataset(images, labels, info)


def open(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    validation_size: int = 0,
    *,
    seed: int = 0,
    threads: int = 16,
    workers: int = 0,
) -> Source:
    """Opens a split for batches, from memory or streamed from disk.

    Args:
        name: One of `names()`.
        split: 'train', 'validation' or 'test'.
        data_dir: The directory of prepared data sets; None for TFDS_DATA_DIR or else
            ~/tensorflow_datasets.
        validation_size: Number of training examples held out as the 'validation' split.
        seed: Chooses another held-out set; keep it fixed, whatever the seed of the run.
        threads: Decoding threads of a streamed data set, per worker.
        workers: Decoding processes of a streamed data set; 0 decodes in this process.

    Returns:
        The split.

    Raises:
        ValueError: The name, the split, the validation size or a count is not valid.
        DatasetNotPreparedError: The data directory does not hold the data set.
        DatasetDamagedError: Its files are incomplete or unreadable.
    """
    if catalogue.info(name).in_memory:
        return load(name, split, data_dir=data_dir, validation_size=validation_size, seed=seed)
    _check_split(split)
    # Grain is needed for streamed data sets only.
    from neurosens.data import imagenet

    return imagenet.open_split(
        name,
        split,
        data_dir=data_dir,
        validation_size=validation_size,
        seed=seed,
        threads=threads,
        workers=workers,
    )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(_validate.unknown('split', split, SPLITS))
