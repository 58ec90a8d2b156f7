"""Fetches the published archives of a data set and parses them into arrays."""

import dataclasses
import gzip
import hashlib
import http.client
import os
import pathlib
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping

import numpy as np

_BLOCK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60


class ArchiveError(RuntimeError):
    """An archive cannot be fetched or read; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        url: Where it is published.
        filename: Its name on disk.
        sha256: Check sum of its content, in hexadecimal digits.
    """

    url: str
    filename: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class ParsedSplit:
    """A split as its publisher orders it.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: uint8 [N] by feature name, such as 'label' and 'coarse_label'.
    """

    images: np.ndarray
    labels: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ParsedDataset:
    """A data set's splits, and the class names that the archives state by feature name."""

    splits: Mapping[str, ParsedSplit]
    class_names: Mapping[str, list[str]]


def fetch(archive: Archive, directory: pathlib.Path) -> pathlib.Path:
    """Downloads an archive unless the directory has it already.

    Args:
        archive: What to fetch.
        directory: An existing directory for the archive.

    Returns:
        The path of the verified file.

    Raises:
        ArchiveError: The file cannot be downloaded, or its content is not the published one.
    """
    path = directory / archive.filename
    if path.is_file():
        _verify(archive, path)
        return path
    handle, partial = tempfile.mkstemp(prefix=f'.{archive.filename}.', dir=directory)
    try:
        with (
            os.fdopen(handle, 'wb') as file,
            urllib.request.urlopen(archive.url, timeout=_TIMEOUT_SECONDS) as response,
        ):
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
        _verify(archive, pathlib.Path(partial))
        os.replace(partial, path)
    # URLError and time-outs are OSErrors, a response cut short is an HTTPException.
    except (OSError, http.client.HTTPException) as error:
        raise ArchiveError(
            f'could not download {archive.url} ({error}): connect to the network, or put the file '
            f'into {directory}, and run the command again'
        ) from error
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)
    return path


def parse_mnist(paths: Mapping[str, pathlib.Path]) -> ParsedDataset:
    """Parses the four gzipped IDX files of MNIST or Fashion-MNIST.

    Args:
        paths: The fetched files by file name.

    Raises:
        ArchiveError: A file is not what its name says.
    """
    splits = {}
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        images = _read_idx(paths[f'{prefix}-images-idx3-ubyte.gz'], 3)
        labels = _read_idx(paths[f'{prefix}-labels-idx1-ubyte.gz'], 1)
        if len(images) != len(labels):
            raise ArchiveError(
                f'{split} has {len(images)} images but {len(labels)} labels: '
                'remove the downloaded files and run the command again'
            )
        splits[split] = ParsedSplit(images[..., np.newaxis], {'label': labels})
    return ParsedDataset(splits, {})


def parse_cifar10(paths: Mapping[str, pathlib.Path]) -> ParsedDataset:
    """Parses the binary archive of CIFAR-10.

    Args:
        paths: The fetched file by file name.

    Raises:
        ArchiveError: The archive is damaged.
    """
    return _parse_cifar(
        paths['cifar-10-binary.tar.gz'],
        folder='cifar-10-batches-bin',
        files={
            'train': [f'data_batch_{number}.bin' for number in range(1, 6)],
            'test': ['test_batch.bin'],
        },
        name_files={'label': 'batches.meta.txt'},
    )


def parse_cifar100(paths: Mapping[str, pathlib.Path]) -> ParsedDataset:
    """Parses the binary archive of CIFAR-100.

    Args:
        paths: The fetched file by file name.

    Raises:
        ArchiveError: The archive is damaged.
    """
    return _parse_cifar(
        paths['cifar-100-binary.tar.gz'],
        folder='cifar-100-binary',
        files={'train': ['train.bin'], 'test': ['test.bin']},
        # In the order of the label bytes of a record.
        name_files={'coarse_label': 'coarse_label_names.txt', 'label': 'fine_label_names.txt'},
    )


def _verify(archive: Archive, path: pathlib.Path) -> None:
    with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if digest != archive.sha256:
        raise ArchiveError(
            f'{archive.filename} in {path.parent} is not the published file (its SHA-256 is '
            f'{digest}, not {archive.sha256}): remove any copy of it and run the command again'
        )


def _read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
    """Reads IDX: two zero bytes, type 8 (uint8), rank, big-endian sizes, then the content."""
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:4] != bytes([0, 0, 8, rank]):
            raise ValueError('the header is wrong')
        shape = tuple(np.frombuffer(content, '>u4', count=rank, offset=4).astype(int))
        return np.frombuffer(content, np.uint8, offset=4 * (rank + 1)).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise _damaged(path, error) from error


def _parse_cifar(
    path: pathlib.Path,
    *,
    folder: str,
    files: Mapping[str, list[str]],
    name_files: Mapping[str, str],
) -> ParsedDataset:
    try:
        members = dict(_tar_members(path))
        class_names = {
            feature: members[f'{folder}/{file}'].decode().split()
            for feature, file in name_files.items()
        }
        splits = {}
        for split, split_files in files.items():
            content = b''.join(members[f'{folder}/{file}'] for file in split_files)
            records = np.frombuffer(content, np.uint8).reshape(-1, len(name_files) + 3072)
            images = records[:, len(name_files) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = {feature: records[:, column] for column, feature in enumerate(name_files)}
            splits[split] = ParsedSplit(np.ascontiguousarray(images), labels)
        return ParsedDataset(splits, class_names)
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _tar_members(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name, file.read()


def _damaged(path: pathlib.Path, error: Exception) -> ArchiveError:
    return ArchiveError(
        f'{path} is damaged ({error}): remove it and run the command again to download it anew'
    )
