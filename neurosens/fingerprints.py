"""Fingerprints of arrays and of JSON records: storage formats do not notice a flipped bit."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np

from neurosens import parallel


def of_tree(tree: Any) -> str:
    """A digest of names, shapes, dtypes and bits of all leaves.

    Args:
      tree: a pytree of arrays, on the host, replicated over all devices or split over them.

    Returns:
      32 hexadecimal digits, the same on every process.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = np.asarray(leaf if not isinstance(leaf, jax.Array) else _whole(leaf))
        digest.update(f'{jax.tree_util.keystr(path)} {value.shape} {value.dtype}'.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _whole(leaf: jax.Array) -> Any:
    """All of an array that is replicated, or split over the devices of all processes."""
    if leaf.is_fully_replicated:
        # The copy on the first local device is the whole.
        return leaf.addressable_data(0)
    return parallel.gather(leaf)


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """A JSON record with a fingerprint of itself, under the key `fingerprint`."""
    text = json.dumps(record, sort_keys=True)
    return {**record, 'fingerprint': hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def is_intact(record: dict[str, Any]) -> bool:
    """Whether a record is one that `signed` made, unchanged."""
    return record == signed({k: value for k, value in record.items() if k != 'fingerprint'})
