"""Alternating timings, worker processes, a description of the machine, and tables.

Candidates take turns round by round and ratios are formed inside a round, so that drift of the
machine (clock speed, other processes) cancels in them. Candidates that need process-wide settings,
or thread pools of their own, live in worker processes that sleep on a pipe between their turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from neurosens import onednn, parallel
from neurosens.evaluation import plots
from neurosens.onednn import kernel_gradient

Unit: TypeAlias = Callable[[], object]

DEVICES = ('cpu', 'gpu')
WIDTH = 100

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
# Workers inherit it, so that both sides of a comparison run on the same device.
_DEVICE_VARIABLE = 'NEUROSENS_BENCHMARK_DEVICE'
# Two sides share one GPU, none of which rounds float32 products to TF32.
_GPU_ENVIRONMENT = {
    'JAX_PLATFORMS': 'cuda,cpu',
    'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
    'NVIDIA_TF32_OVERRIDE': '0',
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
}
# How the names of peers begin, and their colour in plots.
_PEERS = ('PyTorch', 'torchattacks', 'foolbox', 'ART')
_PEER = plots.COLORS[1]
# Options of command lines that hold paths, and what stands for them in a report.
_PATHS = {'--weights': 'DIR', '--data_dir': 'DIR', '--output': 'DIR', '--plot': 'FILE'}
_FILES = ('--json', '--markdown')


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

    def share(self, name: str, floor: Sequence[float]) -> float:
        """Returns the median of the floor's seconds in each round over a candidate's."""
        return float(np.median(np.divide(floor, self.seconds[name])))

    def scaled(self, name: str, factor: float) -> tuple[float, ...]:
        """Returns the seconds of a candidate in each round times a factor."""
        return tuple(factor * value for value in self.seconds[name])

    def per_call(self, calls: Mapping[str, int]) -> Measurement:
        """Returns the seconds of one call of candidates that make so many in a unit."""
        return Measurement({name: self.scaled(name, 1 / calls[name]) for name in self.seconds})

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
        jax.block_until_ready(candidates[name]())
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
        jax.block_until_ready(unit())
        values.append(time.perf_counter() - start)
    return statistics.median(values)


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


# ------------------------------------------------------------------------------------- floors

# Of a turn: long enough to average over what candidates of seconds meet, short enough for those of
# 25 rounds to stay below a minute.
_FLOOR_SECONDS = 0.5
_FLOOR_CASES = ((32, 16, 16), (16, 32, 32), (8, 64, 64), (16, 128, 128), (8, 256, 256))
_FLOOR_UNITS = ('matmul', 'convolution', 'memory')


@dataclasses.dataclass(frozen=True)
class Floors:
    """Fastest rates of the device in each round: the yardsticks of arithmetic and of memory.

    Attributes:
        matmul: FLOP/s of a float32 matrix product.
        convolution: FLOP/s of the fastest of a few convolutions, as one or as a matrix product.
        memory: bytes/s, read plus written, of negating an array.
        fastest: what the fastest convolution is.
    """

    matmul: tuple[float, ...]
    convolution: tuple[float, ...]
    memory: tuple[float, ...]
    fastest: str

    def convolution_seconds(self, flops: float) -> tuple[float, ...]:
        """Returns how long so many operations take in each round at the peak of convolutions."""
        return tuple(flops / rate for rate in self.convolution)

    def matmul_seconds(self, flops: float) -> tuple[float, ...]:
        """Returns how long so many operations take in each round at the peak of products."""
        return tuple(flops / rate for rate in self.matmul)

    def memory_seconds(self, size: float) -> tuple[float, ...]:
        """Returns how long so many bytes take in each round at the peak of memory."""
        return tuple(size / rate for rate in self.memory)

    def pace(self, measurement: Measurement, flops: Mapping[str, float | None]) -> str:
        """Says at what share of the peak of convolutions candidates run, and what the peaks are.

        Args:
            measurement: timings in the same rounds.
            flops: operations of candidates, or None where they are not known; those of candidates
                that were not timed are left out.

        Returns:
            A sentence on the candidates, where any are left, and one on the peaks.
        """
        shares = [
            f'{name}: {count / 1e9:.3g} GFLOP at '
            f'{percent(measurement.share(name, self.convolution_seconds(count)))}'
            for name, count in flops.items()
            if name in measurement.seconds and count is not None
        ]
        return f'Of the peak of convolutions, {"; ".join(shares)}. {self}' if shares else str(self)

    def __str__(self) -> str:
        matmul, convolution, memory = (
            statistics.median(rates) / 1e9 for rates in (self.matmul, self.convolution, self.memory)
        )
        return (
            f'Peaks in the same rounds: {matmul:.0f} GFLOP/s of matrix products, '
            f'{convolution:.0f} GFLOP/s of convolutions ({self.fastest}), '
            f'{memory:.1f} GB/s of memory.'
        )


def prepare_floors(
    *, seconds: float = _FLOOR_SECONDS, size: int = 0, megabytes: int = 0, images: int = 0
) -> Prepared:
    """Prepares what the device does at its best, in a worker process.

    Args:
        seconds: how long a unit lasts at least.
        size: rows per device, and columns, of the float32 matrices; 0 for 2048, or on an
            accelerator, for which that is little, 8192.
        megabytes: size per device of the array that is read and of the one that is written; 0 for
            64, or 1024.
        images: images per device of the convolutions; 0 for 64, or 1024.

    Returns:
        Units of a matrix product, a convolution and memory traffic, with their `work` in
        operations or bytes.
    """
    mesh = start_jax()
    large = jax.default_backend() != 'cpu'
    size, megabytes = size or (8192 if large else 2048), megabytes or (1024 if large else 64)
    images = images or (1024 if large else 64)
    tall, square = np.ones((size * mesh.size, size), 'f4'), np.ones((size, size), 'f4')
    array = parallel.shard(mesh, np.ones((mesh.size, megabytes * 2**18), 'f4'))
    matmul = _compiled(_product, parallel.shard(mesh, tall), parallel.replicate(mesh, square))
    cases: dict[str, tuple[Unit, float]] = {}
    for side, inputs, outputs in _FLOOR_CASES:
        padded = np.ones((images * mesh.size, side + 2, side + 2, inputs), 'f4')
        kernel = np.ones((3, 3, inputs, outputs), 'f4')
        patches = np.ones((len(padded) * side**2, 9 * inputs), 'f4')
        flops = 2.0 * patches.size * outputs
        name = f'{side} x {side} x {inputs} to {outputs}'
        for kind, function, left, right in (
            ('convolved', _convolution, padded, kernel),
            ('as a product', _product, patches, kernel.reshape(-1, outputs)),
        ):
            unit = _compiled(function, parallel.shard(mesh, left), parallel.replicate(mesh, right))
            cases[f'{name}, {kind}'] = unit, flops
    for unit, _ in cases.values():
        unit()
    # In turns, so that no busy moment decides which is the fastest.
    turns = [{name: _turn_seconds(unit, 1) for name, (unit, _) in cases.items()} for _ in range(5)]
    best = max(cases, key=lambda name: cases[name][1] / min(turn[name] for turn in turns))
    once = {
        'matmul': (matmul, 2.0 * tall.size * size),
        'convolution': cases[best],
        # A plain copy is left out by the compiler.
        'memory': (_compiled(jnp.negative, array), 2.0 * array.nbytes),
    }
    units, work = {}, {}
    for name, (unit, amount) in once.items():
        units[name], calls = lasting(unit, seconds)
        work[name] = calls * amount
    return Prepared(units, {'work': work, 'fastest': best})


def count_flops(function: Any, *arguments: Any, calls: int = 1) -> float | None:
    """Counts the operations of a jitted function, as it is before any compiler has changed it.

    The body of a loop counts once. Lowered for a GPU, no convolution is handed over to a library
    that hides its operations.

    Args:
        function: what is counted.
        *arguments: of it.
        calls: how often it is called.

    Returns:
        The number, or None where JAX has no analysis for the device of the arguments.
    """
    lowered = function.trace(*arguments).lower(lowering_platforms=('cuda',))
    analysis = lowered.cost_analysis()
    return None if analysis is None else calls * analysis['flops']


def convolution_flops(side: int, inputs: int, outputs: int, window: int, stride: int = 1) -> float:
    """Counts the operations of a convolution of one square image, as XLA does.

    Its gradient with respect to the image, or to the kernel, takes as many.

    Args:
        side: of the image, around which are `(window - 1) // 2` zeros, products with which do not
            count.
        inputs: channels of the image.
        outputs: channels of the result.
        window: side of the kernel, an odd number.
        stride: of the convolution.

    Returns:
        A product and a sum for every pixel that a window meets, input and output channel.
    """
    edge = (window - 1) // 2
    starts = range(-edge, side + edge - window + 1, stride)
    # Pixels that windows meet along an axis, all windows together.
    met = sum(min(start + window, side) - max(start, 0) for start in starts)
    return 2.0 * met**2 * inputs * outputs


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision='highest')


def _convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _compiled(function: Callable[..., jax.Array], *arrays: jax.Array) -> Unit:
    compiled = jax.jit(function).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def lasting(unit: Unit, seconds: float) -> tuple[Unit, int]:
    """Repeats a unit, so that what a turn takes beside it counts for little.

    Args:
        unit: one call; runs a few times before, to see how long it lasts.
        seconds: how long all calls should last at least.

    Returns:
        The unit of all calls, and how many there are.
    """
    calls = max(math.ceil(seconds / _least_seconds(unit)), 1)

    def run() -> None:
        for _ in range(calls):
            unit()

    return run, calls


def _least_seconds(unit: Unit, repeats: int = 3) -> float:
    unit()
    return min(_turn_seconds(unit, 1) for _ in range(repeats))


def beside_floors(
    candidates: Mapping[str, Unit],
    *,
    rounds: int,
    warmup: int = 1,
    repeats: int = 1,
    announce: Callable[[str, float], None] = lambda name, seconds: None,
) -> tuple[Measurement, Floors]:
    """Times candidates in turns, and in the same rounds what the device does at its best.

    Args:
        candidates: as for `alternate`, like all that follows.
        rounds: measured rounds.
        warmup: rounds before them.
        repeats: units per turn.
        announce: called after each measured turn.

    Returns:
        The seconds of the candidates, and the rates of the device.
    """
    options = {'seconds': _FLOOR_SECONDS / repeats}
    with worker(WorkerSpec('benchmarks.harness:prepare_floors', options)) as host:
        peaks = {f'floor: {name}': host.unit(name) for name in _FLOOR_UNITS}
        whole = alternate(
            {**candidates, **peaks},
            rounds=rounds,
            warmup=warmup,
            repeats=repeats,
            announce=announce,
        )
        rates = {
            name: tuple(work / value for value in whole.seconds[f'floor: {name}'])
            for name, work in host.details['work'].items()
        }
    seconds = {name: whole.seconds[name] for name in candidates}
    return Measurement(seconds), Floors(**rates, fastest=host.details['fastest'])


# ------------------------------------------------------------------------------------- set-up


def add_arguments(
    parser: argparse.ArgumentParser, *, rounds: int = 0, devices: Sequence[str] = DEVICES
) -> None:
    """Adds the options that every benchmark has.

    Args:
        parser: of a command line.
        rounds: default of `--rounds`; 0 where nothing is timed.
        devices: choices of `--device`.
    """
    if rounds:
        parser.add_argument('--rounds', type=int, default=rounds, help='measured rounds')
    parser.add_argument('--device', choices=devices, help='by default what JAX finds')
    parser.add_argument('--json', default='', help='file for the timings of every round')
    parser.add_argument('--markdown', default='', help='file for the report that is printed')


def use_device(name: str | None) -> None:
    """Chooses the device of this process and of its workers; call it before JAX has started.

    Args:
        name: one of `DEVICES`; None for a GPU where JAX finds one, else the CPU.
    """
    chosen = name or found_device()
    variables = environment(chosen)
    os.environ.update(variables)
    # JAX read its variables when it was imported.
    jax.config.update('jax_platforms', variables['JAX_PLATFORMS'])
    if chosen == 'gpu':
        jax.config.update('jax_default_matmul_precision', 'highest')


def environment(device: str) -> dict[str, str]:
    """Returns the environment variables of processes that run on one of `DEVICES`."""
    variables = _GPU_ENVIRONMENT if device == 'gpu' else {'JAX_PLATFORMS': 'cpu'}
    return {**variables, _DEVICE_VARIABLE: device}


def found_device() -> str:
    """Returns which of `DEVICES` JAX would run on."""
    if parallel.only_cpu_installed():
        return 'cpu'
    # In a process of its own: here JAX must not have started yet.
    program = 'import jax; print(jax.default_backend())'
    found = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, check=True
    )
    return 'gpu' if found.stdout.split()[-1] == 'gpu' else 'cpu'


def device() -> str:
    """Returns which of `DEVICES` was chosen for this process."""
    return os.environ.get(_DEVICE_VARIABLE, 'cpu')


def start_jax(
    batch_size: int | None = None,
    *,
    devices: int = 0,
    keep_memory: bool = True,
    by_onednn: bool = True,
) -> jax.sharding.Mesh:
    """Sets JAX up as the scripts do: on a CPU a device for each core, and oneDNN's convolutions.

    Args:
        batch_size: images per batch, which the devices share; None where batches adapt to them.
        devices: XLA devices the CPU is split into; 0 for one per core.
        keep_memory: on a CPU, keep freed memory.
        by_onednn: on a CPU, convolve with oneDNN.

    Returns:
        The mesh: all devices of the CPU, or one GPU.
    """
    if device() == 'cpu':
        if keep_memory:
            parallel.keep_freed_memory()
        parallel.use_cpu_devices(devices or parallel.cpu_device_count(batch_size))
        if by_onednn:
            onednn.use_onednn()
    return mesh()


def mesh() -> jax.sharding.Mesh:
    """Returns the mesh of `start_jax`."""
    return parallel.data_mesh(1 if device() == 'gpu' else None)


def peak_memory(unit: Unit) -> float:
    """The peak of this process in MiB while a unit runs; on a GPU that of what JAX allocated.

    The unit runs once before, which compiles it, and the peak counts from there on. That leaves out
    what compiling took only where freed memory is given back: a process that keeps it, as those of
    `start_jax` do, still holds all of it. Linux only.
    """
    unit()
    if device() == 'gpu':
        return jax.devices()[0].memory_stats()['peak_bytes_in_use'] / 2**20
    # From here on the peak counts anew.
    pathlib.Path('/proc/self/clear_refs').write_text('5')
    for _ in range(3):
        unit()
    status = pathlib.Path('/proc/self/status').read_text()
    (line,) = (line for line in status.splitlines() if line.startswith('VmHWM'))
    return int(line.split()[1]) / 1024


def temporary_memory(mesh: jax.sharding.Mesh, function: Any, *arguments: Any) -> float:
    """What temporaries a jitted function has on all devices, in MiB, as the compiler says."""
    analysis = function.lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes * mesh.size / 2**20


# ----------------------------------------------------------------------------------- reporting


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
        'date': datetime.date.today().isoformat(),
        'cpu': _cpu_model(),
        'cores': cores(),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'system': f'{platform.system()} {platform.release()}',
        'python': platform.python_version(),
        'accelerator': jax.devices()[0].device_kind,
        'versions': versions,
        'load_average': round(os.getloadavg()[0], 2),
    }


def kept(folder: pathlib.Path, name: str, settings: Any, make: Callable[[], Any]) -> Any:
    """What was found before, or what is found now and kept for the next time.

    Counts as before what ran with equal settings, sources and versions on the same kind of
    processor and device.

    Args:
        folder: where results are kept.
        name: of the result.
        settings: everything that decides it; compared by its `repr`.
        make: finds it, as JSON values.

    Returns:
        The result.
    """
    ran_on = {key: machine()[key] for key in ('cpu', 'cores', 'accelerator', 'versions')}
    text = json.dumps([repr(settings), ran_on, _sources()], sort_keys=True)
    file = folder / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json'
    if not file.exists():
        partial = file.with_suffix('.partial')
        partial.write_text(json.dumps(make()))
        partial.replace(file)
    return json.loads(file.read_text())


def _sources() -> str:
    """A digest of this library and its benchmarks."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).resolve().parent.parent
    for path in sorted((*root.glob('neurosens/**/*.py'), *root.glob('benchmarks/*.py'))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu_model() -> str:
    path = pathlib.Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(':') for line in lines)
    models = (value.strip() for key, _, value in fields if key.strip() == 'model name')
    model = next(models, platform.processor() or platform.machine())
    # Clouds give processors of several generations one name.
    lacks = platform.machine() in ('x86_64', 'AMD64') and not kernel_gradient.has_avx512()
    return f'{model} without AVX-512' if lacks else model


def machine_line(description: Mapping[str, Any]) -> str:
    """Returns the description of `machine` as one line."""
    versions = ', '.join(f'{name} {version}' for name, version in description['versions'].items())
    found = description['accelerator']
    accelerator = '' if found.lower() == 'cpu' else f'{found} (TF32 off on both sides), '
    return (
        f'{description["cpu"]}, {description["cores"]} cores, {description["memory_gib"]} GiB, '
        f'{accelerator}{description["system"]}, Python {description["python"]}, {versions}'
    )


def ratio_text(ratio: Ratio, digits: int = 2) -> str:
    """Returns a ratio with its spread, such as `'1.52 (1.49-1.57)'`."""
    return _spread_text(*ratio, digits)


def time_text(summary: Summary, scale: float, digits: int) -> str:
    """Returns a time with its quartiles, such as `'4.9 (4.6-5.3)'`.

    Args:
        summary: in seconds.
        scale: what a second of it is in the unit of the text.
        digits: behind the point.
    """
    return _spread_text(*(scale * seconds for seconds in summary[:3]), digits)


def _spread_text(middle: float, low: float, high: float, digits: int) -> str:
    text, *ends = (f'{value:,.{digits}f}' for value in (middle, low, high))
    # A single round has no spread, nor has what is compared with itself.
    return text if low == high else f'{text} ({ends[0]}-{ends[1]})'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, its first column aligned left and the others right."""
    rule = ['---'] + ['---:'] * (len(header) - 1)
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (header, rule, *rows))


def percent(share: float) -> str:
    """Returns a share such as `'87 %'`, with one digit where it is below 1 %."""
    return f'{100 * share:.0f} %' if share >= 0.01 else f'{100 * share:.1g} %'


def fastest(measurement: Measurement, names: Sequence[str]) -> str:
    """Returns which of some candidates has the smallest median; empty where there are none."""
    return min(names, key=lambda name: measurement.summary(name).median, default='')


def bold(name: str, chosen: str) -> str:
    """Returns a name, bold where it is the chosen one."""
    return f'**{name}**' if name == chosen else name


def command(module: str, arguments: Sequence[str]) -> str:
    """Returns a command line as reports show it, without paths, in lines of limited length.

    Args:
        module: what Python runs.
        arguments: of the command line.
    """
    groups = [['python', '-m', module]]
    for argument in arguments:
        if argument.startswith('--'):
            groups.append(argument.split('=', 1))
        else:
            groups[-1].append(argument)
    shown = []
    for name, *values in groups:
        if name in _FILES:
            words = values[1:]
        else:
            words = [name, _PATHS[name], *values[1:]] if name in _PATHS else [name, *values]
        if words:
            shown.append(' '.join(map(shlex.quote, words)))
    # Lines break between options.
    lines = [shown[0]]
    for text in shown[1:]:
        if len(f'{lines[-1]} {text} \\') <= WIDTH:
            lines[-1] += f' {text}'
        else:
            lines.append(f'  {text}')
    return ' \\\n'.join(lines)


def report(
    arguments: argparse.Namespace,
    *parts: str,
    measurements: Mapping[str, Measurement] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Prints the command, what it ran on, and its tables; writes the files that were asked for.

    Args:
        arguments: those of `add_arguments`, and others.
        *parts: what follows: sentences and tables.
        measurements: timings by name, for the JSON file.
        details: facts beside the arguments, for the JSON file.
    """
    description = machine()
    module = sys.modules['__main__'].__spec__.name  # type: ignore[union-attr]
    line = f'{description["date"]}: {machine_line(description)}'
    machine_lines = textwrap.wrap(line, WIDTH, initial_indent='> ', subsequent_indent='> ')
    head = f'```sh\n{command(module, sys.argv[1:])}\n```'
    text = '\n\n'.join((head, '\n'.join(machine_lines), *filter(None, parts))) + '\n'
    print(text, flush=True)
    if arguments.markdown:
        path = pathlib.Path(arguments.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    if arguments.json:
        write_json(
            arguments.json,
            description=description,
            measurements=measurements or {},
            details={**vars(arguments), **(details or {})},
        )


def draw_times(
    measurements: Mapping[str, Measurement], path: str | os.PathLike[str], label: str, scale: float
) -> None:
    """Draws a bar for each candidate of each measurement: its median, and quartiles.

    Args:
        measurements: by title, one panel each.
        path: PNG file.
        label: what a bar is, such as `'ms per step'`.
        scale: what a second of a measured unit of work is in these.
    """
    most = max(len(one.seconds) for one in measurements.values())
    figure = Figure(figsize=(9, 0.6 + 0.28 * most), layout='constrained')
    panels = figure.subplots(1, len(measurements), squeeze=False)[0]
    for axes, (title, measured) in zip(panels, measurements.items(), strict=True):
        names = list(measured.seconds)
        times = np.array([measured.summary(name)[:3] for name in names]) * scale
        middle, low, high = times.T
        colors = [_PEER if name.startswith(_PEERS) else plots.COLORS[0] for name in names]
        axes.barh(names, middle, xerr=(middle - low, high - middle), color=colors, ecolor='0.2')
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.tick_params(axis='y', labelsize=8)
        axes.spines[['top', 'right']].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG file; its directory is made if it is missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(figure, path)


def wrapped(text: str) -> str:
    """Returns a paragraph in lines of limited length."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


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
