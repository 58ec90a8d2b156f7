"""Data parallelism over every device of every host: one mesh, one code path.

Arrays carry their placement (`jit` and `NamedSharding`), so library code names no axes and calls no
collectives; XLA inserts them. The same program runs on one device, on eight simulated ones, on
several processes and on a pod. Batches are split over the mesh axis `'data'`; everything else is
replicated.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar('T')

DATA_AXIS = 'data'
_MIN_EXAMPLES_PER_CPU_DEVICE = 8


def looks_distributed(environment: Mapping[str, str] = os.environ) -> str | None:
    """Says why the environment looks like one process of several, or None if it does not.

    Args:
      environment: environment variables, as set by SLURM, Open MPI, Cloud TPU or by hand.

    Returns:
      The variable that shows it, such as `'SLURM_NTASKS=4'`, or None.
    """
    for name in ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
        value = environment.get(name, '')
        if value.isdigit() and int(value) > 1:
            return f'{name}={value}'
    hosts = environment.get('TPU_WORKER_HOSTNAMES', '')
    return f'TPU_WORKER_HOSTNAMES={hosts}' if ',' in hosts else None


def initialize_distributed(environment: Mapping[str, str] = os.environ) -> None:
    """Joins all processes of a pod or cluster; call it before anything else uses JAX.

    Cloud TPU, SLURM, Open MPI and Kubernetes are detected by `jax.distributed.initialize()`.
    Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in each process.

    Args:
      environment: where those three variables are read.

    Raises:
      ValueError: no cluster was detected and the variables are not set.
    """
    count, index = environment.get('JAX_NUM_PROCESSES'), environment.get('JAX_PROCESS_ID')
    try:
        jax.distributed.initialize(
            coordinator_address=environment.get('JAX_COORDINATOR_ADDRESS'),
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
        )
    except ValueError as error:
        raise ValueError(
            f'No cluster was detected ({error}); set JAX_COORDINATOR_ADDRESS=host:port, '
            'JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process, or run without --distributed.'
        ) from error


def cpu_device_count(batch_size: int | None = None, cores: int | None = None) -> int:
    """How many CPU devices to split a batch over: one per core where the batch allows it.

    XLA runs most of a convolution network on one core per device, so one device per core is what
    makes a multi-core CPU fast.

    Args:
      batch_size: examples in the global batch; None where batches adapt to the devices.
      cores: cores of this machine; by default those this process may use.

    Returns:
      The largest divisor of `batch_size` that is at most `cores` and leaves each device at least 8
      examples, or 1; `cores` where there is no batch size.
    """
    if cores is None:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, 'sched_getaffinity')
            else (os.cpu_count() or 1)
        )
    if batch_size is None:
        return cores
    return max(
        count
        for count in range(1, cores + 1)
        if count == 1
        or (batch_size % count == 0 and batch_size // count >= _MIN_EXAMPLES_PER_CPU_DEVICE)
    )


def use_cpu_devices(count: int) -> None:
    """Splits the CPU into `count` JAX devices; without effect on other platforms.

    Call it before JAX has started its backend.

    Raises:
      RuntimeError: the backend is already running (from JAX).
    """
    jax.config.update('jax_num_cpu_devices', count)


def only_cpu_installed() -> bool:
    """Whether JAX can only run on the CPU here; known without starting it."""
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if chosen:
        return chosen == 'cpu'
    plugins = importlib.metadata.entry_points(group='jax_plugins')
    return not plugins and importlib.util.find_spec('libtpu') is None


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, for its next step to use; glibc only.

    XLA:CPU allocates the temporaries of a program anew at every call. Blocks of their size are
    mapped by the operating system and given back each time, and the fresh pages must be cleared: a
    sixth of a training step of a small network, next to nothing of a ResNet-20's. With this setting
    the process holds its peak memory until it ends.

    Call it before JAX has started its backend, whose threads otherwise have their own arenas
    already.

    Returns:
      Whether the C library took the setting; False where it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    # One arena, as only the main one can grow without limit; no mapping, no trimming.
    settings = ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1))
    return all(mallopt(name, value) for name, value in settings)


def is_primary() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def data_mesh(devices: int | None = None) -> Mesh:
    """A one-dimensional mesh over all devices of all processes.

    Args:
      devices: use only the first so many devices (for tests and scaling measurements).

    Returns:
      A mesh with the single axis `'data'`.

    Raises:
      ValueError: there are fewer devices.
    """
    if devices is not None and not 1 <= devices <= jax.device_count():
        raise ValueError(
            f'devices is {devices}; it must be between 1 and the {jax.device_count()} there are.'
        )
    chosen = jax.devices()[:devices]
    return jax.make_mesh((len(chosen),), (DATA_AXIS,), (AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of parameters: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The placement of batches: the leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicate(mesh: Mesh, tree: T) -> T:
    """Copies a pytree of arrays or typed keys, equal on every process, to every device."""
    sharding = replicated(mesh)

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            # Typed keys cannot be put onto the devices of other processes; their bits can.
            bits = copy(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
        return jax.device_put(leaf, sharding)

    return jax.tree.map(copy, tree)


def shard(mesh: Mesh, batch: T) -> T:
    """Makes one global batch from this process's rows.

    Args:
      mesh: the mesh to split over.
      batch: a pytree of arrays `[b, ...]`: the rows of this process, which are rows
        `[index * b, (index + 1) * b)` of the global batch.

    Returns:
      The same pytree of global arrays `[b * processes, ...]`, split over the mesh.

    Raises:
      ValueError: the rows do not divide evenly over this process's devices.
    """
    local = len(mesh.local_devices)
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % local:
            raise ValueError(
                f'A batch of {leaf.shape[0]} rows does not split over {local} devices; use a '
                f'multiple of {local}.'
            )
    sharding = split(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )


def shard_global(mesh: Mesh, batch: T) -> T:
    """Splits a batch that every process holds whole.

    Args:
      mesh: the mesh to split over.
      batch: a pytree of arrays `[B, ...]`, equal on every process.

    Returns:
      The same pytree of global arrays `[B, ...]`, split over the mesh.
    """
    sharding = split(mesh)

    def place(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        return jax.make_array_from_callback(rows.shape, sharding, lambda at: rows[at])

    return jax.tree.map(place, batch)


def gather(tree: T) -> T:
    """Fetches global arrays `[B, ...]`, whole, to every process as numpy arrays."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def in_batches(
    function: Callable[..., Any], arrays: Sequence[np.ndarray], batch_size: int, mesh: Mesh | None
) -> Any:
    """Applies a function to batches of arrays that every process holds.

    Args:
      function: from arrays `[B, ...]`, split over the mesh, to a pytree of arrays `[B, ...]`.
      arrays: arrays `[M, ...]` of M rows, at least 1, equal on every process.
      batch_size: rows at once, rounded up to a multiple of the devices; the last batch is filled up
        with the last row, so that one program serves all.
      mesh: devices to split batches over; None leaves them whole, on one.

    Returns:
      The pytree for all rows, on the host.
    """
    total = len(arrays[0])
    size = min(batch_size, total)
    size = size if mesh is None else round_up(size, mesh)
    parts = []
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        batch = tuple(array[rows] for array in arrays)
        parts.append(gather(function(*(batch if mesh is None else shard_global(mesh, batch)))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *parts)


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The smallest batch size not below `batch_size` that splits evenly over the mesh."""
    return -(-batch_size // mesh.size) * mesh.size
