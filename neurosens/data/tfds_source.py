"""Reads data sets prepared by TFDS as ArrayRecord files, without TensorFlow."""

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from neurosens.data.catalogue import DatasetInfo

# What array_record, protobuf and PIL raise, by the damage.
_READ_ERRORS = (
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    SyntaxError,
    DecodeError,
    ParseError,
)
# Bounds the memory that undecoded records take while a split is read.
_RECORDS_PER_READ = 4096


class DatasetNotPreparedError(FileNotFoundError):
    """The data set is not in the data directory; the message says how to prepare it."""


class DatasetDamagedError(ValueError):
    """The data set's files are incomplete or unreadable; the message says what to do."""


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns the directory of prepared data sets, as an absolute path.

    Args:
        data_dir: A directory, or None for TFDS_DATA_DIR or else ~/tensorflow_datasets.
    """
    chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return pathlib.Path(chosen).expanduser().absolute()


def find_prepared(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """Returns the directory of the data set's newest prepared version, or None.

    Args:
        name: The data set's name.
        data_dir: The directory of prepared data sets.
    """
    found = [
        (tuple(int(part) for part in path.parent.name.split('.')), path.parent)
        for path in (data_dir / name).glob('*/dataset_info.json')
        if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
    ]
    return max(found)[1] if found else None


def open_records(
    name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> tuple[Any, tuple[str, ...], pathlib.Path]:
    """Opens a split for random access to its serialised examples.

    Args:
        name: The data set's name.
        split: The name TFDS has for the split.
        data_dir: The directory of prepared data sets; None for the TFDS default.

    Returns:
        An ArrayRecord data source of serialised `tf.train.Example`s, the class names that the
        directory declares, and the directory of the version.

    Raises:
        DatasetNotPreparedError: The data directory does not hold the data set.
        DatasetDamagedError: A file is missing or unreadable, or has another format.
    """
    root = resolve_data_dir(data_dir)
    directory = find_prepared(name, root)
    if directory is None:
        raise DatasetNotPreparedError(
            f'{name} is not prepared in {root}: '
            f'run `python -m neurosens.data prepare {name} --data_dir={root}`'
        )
    import tensorflow_datasets as tfds

    with damage_report(name, directory):
        builder = tfds.builder_from_directory(directory)
        if split not in builder.info.splits:
            raise ValueError(f'there is no {split!r} split')
        for path in builder.info.splits[split].filepaths:
            if not pathlib.Path(path).is_file():
                raise ValueError(f'{pathlib.Path(path).name} is missing')
        # TFDS would decode each image on its own; the raw records are much faster to read.
        records = builder.as_data_source(split=split).data_source
        return records, tuple(builder.info.features['label'].names), directory


def parse_example(record: bytes) -> tuple[bytes, int]:
    """Returns the encoded image and the label of a serialised `tf.train.Example`.

    Args:
        record: The serialised example.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature
    return feature['image'].bytes_list.value[0], feature['label'].int64_list.value[0]


def read_split(
    info: DatasetInfo, split: str, data_dir: str | os.PathLike[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes a whole split.

    Args:
        info: The data set's description.
        split: 'train' or 'test'.
        data_dir: The directory of prepared data sets; None for the TFDS default.

    Returns:
        Images, uint8 [N, H, W, C], and labels, int32 [N], in the stored order.

    Raises:
        DatasetNotPreparedError: The data directory does not hold the data set.
        DatasetDamagedError: A file is missing or unreadable, or its content does not fit the
            data set.
    """
    records, _, directory = open_records(info.name, split, data_dir)
    images = np.empty((len(records), *info.image_shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    with damage_report(info.name, directory):
        for start in range(0, len(records), _RECORDS_PER_READ):
            positions = range(start, min(start + _RECORDS_PER_READ, len(records)))
            for position, record in zip(positions, records.__getitems__(positions)):
                encoded, labels[position] = parse_example(record)
                images[position] = _decode_png(encoded, info.image_shape)
        if not np.all((labels >= 0) & (labels < info.num_classes)):
            raise ValueError(f'a label is outside 0..{info.num_classes - 1}')
    return images, labels


def _decode_png(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    # Naming the format and taking the bytes is a third faster than np.asarray on small images.
    image = Image.open(io.BytesIO(encoded), formats=('PNG',))
    if (image.height, image.width, len(image.getbands())) != shape:
        raise ValueError(f'an image is {image.mode} {image.height}x{image.width}, not {shape}')
    return np.frombuffer(image.tobytes(), np.uint8).reshape(shape)


@contextlib.contextmanager
def damage_report(name: str, directory: pathlib.Path) -> Iterator[None]:
    """Turns whatever a reader says of bad files into one sentence with a remedy."""
    try:
        yield
    except NotImplementedError as error:
        raise DatasetDamagedError(
            f'{name} in {directory} is not stored as array_record: '
            'remove that directory or choose another data_dir, and prepare it again'
        ) from error
    except _READ_ERRORS as error:
        reason = ' '.join(str(error).split())[:200]
        raise DatasetDamagedError(
            f'{name} in {directory} is damaged or incomplete ({reason}): '
            'remove that directory and prepare it again'
        ) from error
