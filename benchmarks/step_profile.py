"""Where the time of a training step goes, by the profiler of JAX, on CPU devices.

    python -m benchmarks.step_profile [--batch_size B] [--steps N] [--rounds R]

The plain step of ResNet-20, one XLA device per core. Every operation's own time, without that of
operations inside it, is summed over a few steps and divided by devices and steps. Noting an
operation takes time itself, which is most of that of short ones.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from benchmarks import harness, training_step
from neurosens import data
from neurosens.models import BatchNorm
from neurosens.onednn import kernel_gradient

# What names of operations begin with or hold.
_CONVOLUTION, _PRODUCT = 'onednn_convolution', 'onednn_product'
_BETWEEN_DEVICES = ('psum', 'all-reduce', 'Rendezvous', 'InvokeRendezvous', 'Wait')
KINDS = (
    'convolutions, and their gradients of images, by oneDNN',
    'gradients of kernels, in loops over images',
    'loops for sums of batch normalisation',
    'fused elementwise operations',
    'sums over devices, with waiting for the other',
    'everything else',
)


ALL = 'all'
_STEP = 'step'
# Operations of the first convolution of the ResNet-20 on one image.
_FIRST_CONVOLUTION = harness.convolution_flops(32, 3, 16, 3)
# Arrays of the size of the input of a normalisation that must be read or written: for its sums the
# input, and in the gradient the input again and a derivative; between the sums input and result,
# and in the gradient a derivative, the input and the derivative with respect to it.
_ARRAYS = {KINDS[2]: 3, KINDS[3]: 5}


class Event(NamedTuple):
    """An operation on one thread.

    Attributes:
        name: of the operation.
        start: when it began, in nanoseconds.
        duration: how long it took, with those inside it, in nanoseconds.
    """

    name: str
    start: float
    duration: float


class Spent(NamedTuple):
    """What operations of a kind took.

    Attributes:
        nanoseconds: their own times together.
        operations: how many there were.
    """

    nanoseconds: float = 0.0
    operations: int = 0

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(self.nanoseconds + other.nanoseconds, self.operations + other.operations)


def own_times(events: Iterable[Event]) -> dict[str, Spent]:
    """Sums the own times of the operations of one thread by kind.

    Args:
        events: of the thread, in any order; those inside another are nested.

    Returns:
        By `KINDS`, without the times of operations inside others.
    """
    # An operation that begins with another, but lasts longer, is around it.
    ordered = sorted(events, key=lambda event: (event.start, -event.duration))
    found = dict.fromkeys(KINDS, Spent())
    open_events: list[tuple[Event, int]] = []
    # Of each outermost loop what is spent inside it, and whether it convolves or multiplies.
    loops: list[tuple[Spent, bool]] = []
    inside = -1
    own = [event.duration for event in ordered]
    place: list[int] = []
    for number, event in enumerate(ordered):
        while open_events and _end(open_events[-1][0]) <= event.start:
            open_events.pop()
        if not any(_is_loop(outer.name) for outer, _ in open_events):
            inside = -1
            if _is_loop(event.name):
                inside = len(loops)
                loops.append((Spent(), False))
        if open_events:
            own[open_events[-1][1]] -= event.duration
        place.append(inside)
        open_events.append((event, number))
    for event, time_alone, loop in zip(ordered, own, place):
        spent = Spent(time_alone, 1)
        if loop >= 0:
            total, convolves = loops[loop]
            multiplies = event.name.startswith((_CONVOLUTION, _PRODUCT))
            loops[loop] = total.plus(spent), convolves or multiplies
        else:
            kind = _kind(event.name)
            found[kind] = found[kind].plus(spent)
    for total, convolves in loops:
        kind = KINDS[1] if convolves else KINDS[2]
        found[kind] = found[kind].plus(total)
    return found


def _end(event: Event) -> float:
    return event.start + event.duration


def _is_loop(name: str) -> bool:
    return name.startswith('while')


def _kind(name: str) -> str:
    if name.startswith(_CONVOLUTION):
        return KINDS[0]
    if name.startswith(_BETWEEN_DEVICES):
        return KINDS[4]
    return KINDS[3] if 'fusion' in name else KINDS[5]


def profiled(unit: harness.Unit) -> list[list[Event]]:
    """Runs a unit of work under the profiler.

    Args:
        unit: what to run; it should have run before.

    Returns:
        The operations of each thread of XLA's.

    Raises:
        ValueError: the profiler noted none.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            unit()
        (file,) = pathlib.Path(folder).rglob('*.xplane.pb')
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        threads = [
            [Event(event.name, event.start_ns, event.duration_ns) for event in line.events]
            for plane in planes
            for line in plane.lines
            if 'XLAEigen' in line.name
        ]
    if not any(threads):
        raise ValueError('The profiler noted no operation of XLA; is this a CPU?')
    return threads


def normalised_bytes(batch_size: int) -> int:
    """Returns the bytes of the inputs of all normalisations of the network, which are float32."""
    sizes: list[int] = []

    def note(run: Any, arguments: Any, options: Any, context: Any) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == '__call__':
            sizes.append(4 * arguments[0].size)
        return run(*arguments, **options)

    images = jax.ShapeDtypeStruct((batch_size, *data.info('cifar10').image_shape), 'f4')
    with nn.intercept_methods(note):
        jax.eval_shape(training_step.make_module().init, jax.random.key(0), images)
    return sum(sizes)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch_size', type=int, default=128, help='images per step')
    parser.add_argument('--steps', type=int, default=20, help='training steps under the profiler')
    harness.add_arguments(parser, rounds=5, devices=('cpu',))
    return parser.parse_args(arguments)


def main() -> None:
    """Profiles, sums and prints."""
    arguments = parse_arguments()
    harness.use_device('cpu')
    mesh = harness.start_jax(arguments.batch_size)
    images = arguments.batch_size // mesh.size
    if images % kernel_gradient.IMAGES or images == kernel_gradient.IMAGES:
        raise SystemExit(
            f'{arguments.batch_size} images are {images} on each of {mesh.size} devices; gradients '
            f'of kernels are told from convolutions by their loops, which take several times '
            f'{kernel_gradient.IMAGES} images.'
        )
    batches = training_step.load_batches(arguments.batch_size, '')
    unit = training_step.training_unit(mesh, 'none', arguments.steps, batches)
    measured, floors = harness.beside_floors({_STEP: unit}, rounds=arguments.rounds)
    found = [own_times(events) for events in profiled(unit)]
    shared = arguments.steps * mesh.size
    totals = {
        kind: functools.reduce(Spent.plus, (one[kind] for one in found), Spent()) for kind in KINDS
    }
    noted = {kind: spent.nanoseconds / 1e6 / shared for kind, spent in totals.items()}
    counts = {kind: spent.operations / shared for kind, spent in totals.items()}
    flops = training_step.step_flops(arguments.batch_size)
    # Of the three passes of a step one is that of the kernels; the images of the first
    # convolution need no gradient.
    of_kernels = (flops + _FIRST_CONVOLUTION * arguments.batch_size) / 3
    least = {
        kind: 1000 * statistics.median(floors.convolution_seconds(part))
        for kind, part in ((KINDS[0], flops - of_kernels), (KINDS[1], of_kernels), (ALL, flops))
    }
    normalised = normalised_bytes(arguments.batch_size)
    least |= {
        kind: 1000 * statistics.median(floors.memory_seconds(arrays * normalised))
        for kind, arrays in _ARRAYS.items()
    }
    noted[ALL], counts[ALL] = sum(noted.values()), sum(counts.values())
    rows = [
        (
            kind,
            f'{counts[kind]:,.0f}',
            f'{noted[kind]:.1f}',
            harness.percent(least[kind] / noted[kind]) if kind in least and noted[kind] else '-',
        )
        for kind in noted
    ]
    step = measured.summary(_STEP).median / arguments.steps
    share = measured.share(_STEP, floors.convolution_seconds(arguments.steps * flops))
    definition = (
        f'ResNet-20, {arguments.steps} steps on {arguments.batch_size} images, {mesh.size} '
        f'devices; for one step and device. Without the profiler a step took {1000 * step:.0f} ms, '
        f'{harness.percent(share)} of the floor. Floor: the {flops / 1e9:.1f} GFLOP of a step, a '
        'third of which is that of the gradients of kernels, at the peak rate of convolutions, '
        f'without what stands between them. Floor of the sums are {_ARRAYS[KINDS[2]]}, and of '
        f'elementwise operations {_ARRAYS[KINDS[3]]}, times the {normalised / 1e6:.0f} MB of the '
        'inputs of normalisations: what is read or written once, at the rate of memory, which '
        f'caches may exceed. Waiting and all else have none. {floors}'
    )
    header = ('Own time of', 'operations', 'ms', 'share of floor')
    harness.report(
        arguments,
        harness.wrapped(definition),
        harness.markdown_table(header, rows),
        measurements={'step': measured},
        details={'milliseconds': noted},
    )


if __name__ == '__main__':
    main()
