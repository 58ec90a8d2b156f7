"""Alternating timings, worker processes, a description of the machine, and tables.

Candidates take turns round by round and ratios are formed inside a round, so that drift of the
machine (clock speed, other processes) cancels in them. Candidates that need process-wide settings,
or thread pools of their own, live in worker processes that sleep on a pipe between their turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from neurosens import onednn, parallel

Unit: TypeAlias = Callable[[], object]

_PACKAGES = (
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'numpy',
    'torch',
    'captum',
    'torchattacks',
    'foolbox',
    'adversarial-robustness-toolbox',
)
_STOP_SECONDS = 10.0


# ------------------------------------------------------------------------------------- timing


class Summary(NamedTuple):
    """Seconds per unit of work over all rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float


class Ratio(NamedTuple):
    """Quotient of two candidates' seconds, formed in each round: median and 10-90 % spread."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Timings of candidates that took turns.

    Attributes:
        seconds: for each candidate, seconds per unit of work in each round.
    """

    seconds: Mapping[str, tuple[float, ...]]

    def summary(self, name: str) -> Summary:
        """Returns median, quartiles and minimum of one candidate."""
        low, middle, high = np.quantile(self.seconds[name], (0.25, 0.5, 0.75)).tolist()
        return Summary(middle, low, high, min(self.seconds[name]))

    def ratio(self, name: str, reference: str) -> Ratio:
        """Returns how many times as long as `reference` a candidate takes."""
        quotients = np.divide(self.seconds[name], self.seconds[reference])
        low, middle, high = np.quantile(quotients, (0.1, 0.5, 0.9)).tolist()
        return Ratio(middle, low, high)


def alternate(
    candidates: Mapping[str, Unit],
    *,
    rounds: int,
    warmup: int = 1,
    repeats: int = 1,
    announce: Callable[[str, float], None] = lambda name, seconds: None,
) -> Measurement:
    """Times candidates in turns.

    Every round runs each candidate. The order rotates from round to round and runs backwards in
    every other one, so that no candidate always follows the same other.

    Args:
        candidates: functions that each do one full unit of work and block until it is done.
        rounds: measured rounds.
        warmup: rounds before them that are not measured.
        repeats: units per turn, of which the median counts.
        announce: called after each measured turn with the candidate and its seconds.

    Returns:
        The seconds of every candidate in every round.
    """
    names = list(candidates)
    for name in names * warmup:
        candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        order = names[shift:] + names[:shift]
        for name in order[::-1] if index % 2 else order:
            seconds[name].append(_turn_seconds(candidates[name], repeats))
            announce(name, seconds[name][-1])
    return Measurement({name: tuple(values) for name, values in seconds.items()})


def _turn_seconds(unit: Unit, repeats: int) -> float:
    values = []
    for _ in range(repeats):
        start = time.perf_counter()
        unit()
        values.append(time.perf_counter() - start)
    return statistics.median(values)


class Floors(NamedTuple):
    """Fastest rates of the default device, the yardsticks of compute and of memory traffic."""

    matmul_gflops: float
    copy_gbytes: float


def floors(*, size: int = 2048, megabytes: int = 256, repeats: int = 10) -> Floors:
    """Measures what the default device reaches at its best.

    Args:
        size: rows and columns of the float32 matrices.
        megabytes: size of the array that is read and of the one that is written.
        repeats: runs, of which the fastest counts.

    Returns:
        GFLOP/s of a float32 matrix product, and GB/s (read plus written) of negating an array.
    """
    matrix = jnp.ones((size, size), jnp.float32)
    array = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    units: dict[str, Unit] = {
        'matmul': _compiled_unit(lambda a: jnp.matmul(a, a, precision='highest'), matrix),
        # A plain copy is left out by the compiler.
        'copy': _compiled_unit(jnp.negative, array),
    }
    measurement = alternate(units, rounds=repeats, warmup=2)
    return Floors(
        matmul_gflops=2 * size**3 / measurement.summary('matmul').minimum / 1e9,
        copy_gbytes=2 * array.nbytes / measurement.summary('copy').minimum / 1e9,
    )


def _compiled_unit(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> Unit:
    compiled = jax.jit(function).lower(argument).compile()
    return lambda: jax.block_until_ready(compiled(argument))


# ------------------------------------------------------------------------------------ workers


class WorkerError(RuntimeError):
    """A worker could not prepare or run; the message carries its traceback."""


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """How to start a worker process.

    Attributes:
        factory: `'package.module:function'`; called in the worker, it returns a `Prepared`.
        options: keyword arguments of the factory, of types that JSON knows.
        environment: environment variables set on top of the inherited ones.
    """

    factory: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Prepared(NamedTuple):
    """What a worker offers.

    Attributes:
        units: functions that each do one full unit of work and block until it is done.
        details: facts to report, of types that JSON knows.
    """

    units: Mapping[str, Unit]
    details: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Worker:
    """A prepared worker process.

    Attributes:
        process: the process, asleep until a unit is called.
        details: the facts it reported.
    """

    process: subprocess.Popen[str]
    details: Mapping[str, Any]

    def unit(self, name: str) -> Unit:
        """Returns a function that runs one unit in the worker and blocks until it is done."""

        def run() -> None:
            _send(self.process.stdin, name)
            _receive(self.process)

        return run


@contextlib.contextmanager
def worker(spec: WorkerSpec) -> Iterator[Worker]:
    """Starts a worker, yields it once it is prepared, and stops it at the end.

    Args:
        spec: how to start it.

    Raises:
        WorkerError: the worker failed, now or in a later unit.
    """
    process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.worker', spec.factory, json.dumps(dict(spec.options))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **spec.environment},
    )
    try:
        yield Worker(process, _receive(process))
    finally:
        # The end of its input, which this closes, tells the worker to leave.
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            process.communicate(timeout=_STOP_SECONDS)
        process.kill()
        process.wait()


def _send(pipe: IO[str] | None, message: str) -> None:
    assert pipe is not None
    pipe.write(message + '\n')
    pipe.flush()


def _receive(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next reply, one JSON object per line: `{'ok': value}` or `{'error': traceback}`."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise WorkerError(f'A worker ended without a reply, with exit code {process.wait()}.')
    reply = json.loads(line)
    if 'error' in reply:
        raise WorkerError(f'A worker failed:\n{reply["error"]}')
    return reply['ok']


# ----------------------------------------------------------------------------------- reporting


def start_jax(batch_size: int) -> None:
    """Sets JAX up as the scripts do: a device for each core, and on a CPU oneDNN's convolutions.

    Args:
        batch_size: images per batch, which the devices share.
    """
    parallel.keep_freed_memory()
    parallel.use_cpu_devices(parallel.cpu_device_count(batch_size))
    if jax.default_backend() == 'cpu':
        onednn.use_onednn()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Describes the machine and the software; starts JAX on its default device."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        'cpu': _cpu_model(),
        'cores': cores(),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'system': f'{platform.system()} {platform.release()}',
        'python': platform.python_version(),
        'accelerator': jax.devices()[0].device_kind,
        'versions': versions,
        'load_average': round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    path = pathlib.Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(':') for line in lines)
    models = (value.strip() for key, _, value in fields if key.strip() == 'model name')
    return next(models, platform.processor() or platform.machine())


def machine_line(description: Mapping[str, Any]) -> str:
    """Returns the description of `machine` as one line."""
    versions = ', '.join(f'{name} {version}' for name, version in description['versions'].items())
    device = description['accelerator']
    accelerator = '' if device.lower() == 'cpu' else f'accelerator {device}, '
    return (
        f'{description["cpu"]}, {description["cores"]} cores, {description["memory_gib"]} GiB, '
        f'{accelerator}{description["system"]}, Python {description["python"]}, {versions}'
    )


def ratio_text(ratio: Ratio) -> str:
    """Returns a ratio with its spread, such as `'1.52 (1.49-1.57)'`."""
    return f'{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, its first column aligned left and the others right."""
    rule = ['---'] + ['---:'] * (len(header) - 1)
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (header, rule, *rows))


def run_subject(
    subjects: Mapping[str, Callable[[argparse.Namespace], Mapping[str, Measurement]]],
    arguments: argparse.Namespace,
) -> None:
    """Runs the subject that a command line names, and prints what it was measured on.

    Args:
        subjects: by name, what measures and prints.
        arguments: with `subject`, and `json`, a file for the timings or empty.
    """
    measurements = subjects[arguments.subject](arguments)
    description = machine()
    print(f'\n{machine_line(description)}')
    if arguments.json:
        write_json(
            arguments.json,
            description=description,
            measurements=measurements,
            details=vars(arguments),
        )


def write_json(
    path: str | os.PathLike[str],
    *,
    description: Mapping[str, Any],
    measurements: Mapping[str, Measurement],
    details: Mapping[str, Any],
) -> None:
    """Writes the timings of every round with what they were measured on.

    Args:
        path: the file; its directory is made if it is missing.
        description: result of `machine`.
        measurements: measurements by name.
        details: settings and facts to keep with them.
    """
    content = {
        'machine': dict(description),
        'details': dict(details),
        'measurements': {
            title: {
                name: {'seconds': values, **measurement.summary(name)._asdict()}
                for name, values in measurement.seconds.items()
            }
            for title, measurement in measurements.items()
        },
    }
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + '\n')
