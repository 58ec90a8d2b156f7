"""The device of the PyTorch peers: the one that JAX was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import harness


def start() -> torch.device:
    """Sets PyTorch up: all cores of a CPU, or the GPU at full float32 precision.

    Returns:
        Where its networks and images belong.
    """
    torch.set_num_threads(harness.cores())
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device('cuda' if harness.device() == 'gpu' else 'cpu')


def synchronized(unit: harness.Unit) -> harness.Unit:
    """Returns a unit that blocks until the GPU has finished it; on a CPU they all do."""
    if harness.device() != 'gpu':
        return unit

    def run() -> None:
        unit()
        torch.cuda.synchronize()

    return run


def prepared(units: Mapping[str, harness.Unit], details: Mapping[str, Any]) -> harness.Prepared:
    """Returns what a worker offers, each unit blocking until it is done."""
    return harness.Prepared({name: synchronized(unit) for name, unit in units.items()}, details)


def peak_memory(unit: harness.Unit) -> float:
    """The peak of this process in MiB while a unit runs; on a GPU that of PyTorch's allocations."""
    if harness.device() != 'gpu':
        return harness.peak_memory(unit)
    unit()
    torch.cuda.reset_peak_memory_stats()
    unit()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20
