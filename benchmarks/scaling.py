"""Work per device, collectives and time on 1, 2, 4 and 8 simulated devices.

    python -m benchmarks.scaling [--rounds N] [--batch_size B] [--plot FILE]

The CPU is split into so many XLA devices, each number in processes of its own, and the same
global batch is split over them. What every device computes, and what it exchanges with the others,
is read off the compiled programs. The time of the same total work only shows what more devices
cost, not what they gain, once there are more of them than cores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks import harness, neuron_problems, training_step
from neurosens import attacks, neurons, parallel
from neurosens.evaluation import plots
from neurosens.forward import LinenForward

DEVICES = (1, 2, 4, 8)
_COLLECTIVES = re.compile(
    r' (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
_PGD_STEPS = 5
TRAINING, PGD, DELTA = 'training step', f'PGD, {_PGD_STEPS} steps', 'Delta'


def programs(mesh: jax.sharding.Mesh, batch_size: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns jitted functions of a ResNet-20, by title, with their arguments.

    Args:
        mesh: devices.
        batch_size: images over all devices.
    """
    state, train_step, key = training_step.make_step(mesh, 'none')
    batch = parallel.shard(mesh, training_step.load_batches(batch_size, '')[0])
    forward = LinenForward(neuron_problems.resnet20(), {'train': False})
    variables = parallel.replicate(mesh, neuron_problems.resnet20_variables(0))
    x = parallel.shard(mesh, neuron_problems.images(batch_size, 0))
    y = parallel.shard(mesh, neuron_problems.labels(batch_size, 0))

    @jax.jit
    def pgd(variables: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        threat = attacks.Threat('linf', 8 / 255)
        return attacks.pgd(forward, variables, x, y, key, threat=threat, steps=_PGD_STEPS)

    @jax.jit
    def delta(variables: Any, x: jax.Array) -> Any:
        return neurons.sensitivity(forward, variables, x)

    return {
        TRAINING: (train_step, (state, batch, key)),
        PGD: (pgd, (variables, x, y, key)),
        DELTA: (delta, (variables, x)),
    }


def count(*, devices: int, batch_size: int) -> harness.Prepared:
    """Compiles the programs for so many devices and counts what they do.

    Args:
        devices: XLA devices.
        batch_size: images over all devices.

    Returns:
        No units; in `programs` the operations of a device and its collectives by program, in
        `least` what a program cannot do without on all devices, with all steps of its loop.
    """
    # Operations of oneDNN are not counted.
    mesh = harness.start_jax(devices=devices, by_onednn=False)
    found: dict[str, Any] = {}
    for title, (function, arguments) in programs(mesh, batch_size).items():
        compiled = function.lower(*arguments).compile()
        found[title] = {
            'flops': compiled.cost_analysis()['flops'],
            'collectives': collectives(compiled.as_text()),
        }
    least = _least_flops(mesh, batch_size)
    return harness.Prepared({}, {'programs': found, 'least': least})


def _least_flops(mesh: jax.sharding.Mesh, batch_size: int) -> dict[str, float | None]:
    state, train_step, key = training_step.make_step(mesh, 'none')
    batch = parallel.shard(mesh, training_step.load_batches(batch_size, '')[0])
    forward = LinenForward(neuron_problems.resnet20(), {'train': False})
    variables = neuron_problems.resnet20_variables(0)
    x, y = neuron_problems.images(batch_size, 0), neuron_problems.labels(batch_size, 0)

    def loss(x: jax.Array) -> jax.Array:
        fit = optax.softmax_cross_entropy_with_integer_labels
        return fit(forward(variables, x)[0], y).sum()

    logits = jax.jit(lambda x: forward(variables, x)[0])
    gradients = harness.count_flops(jax.jit(jax.grad(loss)), x, calls=_PGD_STEPS)
    return {
        TRAINING: harness.count_flops(train_step, state, batch, key),
        PGD: gradients,
        DELTA: harness.count_flops(logits, x),
    }


def collectives(program: str) -> dict[str, int]:
    """Returns how often each kind of collective occurs in the text of a compiled program."""
    return dict(sorted(Counter(_COLLECTIVES.findall(program)).items()))


def prepare(*, devices: int, batch_size: int) -> harness.Prepared:
    """Prepares the programs, as the scripts run them, in a worker process.

    Args:
        devices: XLA devices.
        batch_size: images over all devices.

    Returns:
        One unit per program.
    """
    mesh = harness.start_jax(devices=devices)
    units: dict[str, harness.Unit] = {}
    for title, (function, arguments) in programs(mesh, batch_size).items():
        if title == TRAINING:
            units[title] = _training_unit(function, *arguments)
        else:
            units[title] = functools.partial(_run, function, arguments)
    return harness.Prepared(units, {'units': list(units)})


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    jax.block_until_ready(function(*arguments))


def _training_unit(function: Any, state: Any, batch: Any, key: jax.Array) -> harness.Unit:
    def unit() -> None:
        nonlocal state
        # The step takes its state over.
        state, metrics = function(state, batch, key)
        jax.block_until_ready((state, metrics))

    return unit


def _rows(
    title: str,
    counted: Mapping[int, Mapping[str, Any]],
    measured: harness.Measurement,
    floor: Sequence[float],
) -> list[tuple[str, ...]]:
    rows = []
    first = counted[min(counted)][title]['flops']
    for devices, found in counted.items():
        own, name = found[title], f'{title}, {devices}'
        exchanged = ', '.join(f'{number} {kind}' for kind, number in own['collectives'].items())
        rows.append(
            (
                str(devices),
                f'{own["flops"] / 1e9:.3g}',
                f'{own["flops"] * devices / first / min(counted):.3f}',
                exchanged or 'none',
                f'{1000 * measured.summary(name).median:.0f}',
                harness.ratio_text(measured.ratio(name, f'{title}, {min(counted)}')),
                harness.percent(measured.share(name, floor)),
            )
        )
    return rows


def figure(
    counted: Mapping[int, Mapping[str, Mapping[str, Any]]], measured: harness.Measurement
) -> Figure:
    """Operations of a device and time of all, relative to one device.

    Args:
        counted: by number of devices and program, its `flops` on each device.
        measured: timings, by program and number of devices.

    Returns:
        Two panels.
    """
    drawn = Figure(figsize=(2 * plots.PANEL, 3.4), layout='constrained')
    work, time = drawn.subplots(1, 2)
    numbers = list(counted)
    first = numbers[0]
    for place, title in enumerate(counted[first]):
        look = {'color': plots.COLORS[place], 'marker': 'os^'[place % 3], 'label': title}
        flops = [counted[devices][title]['flops'] for devices in numbers]
        work.loglog(numbers, np.array(flops) / flops[0], **look)
        ratios = [measured.ratio(f'{title}, {devices}', f'{title}, {first}') for devices in numbers]
        middle, low, high = np.array(ratios).T
        time.errorbar(numbers, middle, (middle - low, high - middle), capsize=2, **look)
    ideal = np.array(numbers) / first
    work.loglog(numbers, 1 / ideal, color='0.6', linestyle=':', label='an equal share')
    work.set_ylabel(f'operations of a device / those of {first}')
    work.set_yticks(1 / ideal, [f'1/{count:g}' if count > 1 else '1' for count in ideal])
    time.set_ylabel(f'time / that of {first}')
    time.set_xscale('log')
    time.set_ylim(bottom=0)
    for axes in (work, time):
        axes.set_xlabel('XLA devices')
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        plots.style(axes)
    work.legend(frameon=False, fontsize=8)
    return drawn


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch_size', type=int, default=128, help='images over all devices')
    parser.add_argument('--devices', type=int, nargs='+', default=DEVICES, help='numbers of them')
    parser.add_argument('--plot', default='', help='PNG file')
    harness.add_arguments(parser, rounds=5, devices=('cpu',))
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    harness.use_device('cpu')
    counted: dict[int, dict[str, Any]] = {}
    least: dict[str, float] = {}
    for devices in sorted(arguments.devices):
        options = {'devices': devices, 'batch_size': arguments.batch_size}
        with harness.worker(harness.WorkerSpec('benchmarks.scaling:count', options)) as worker:
            counted[devices], least = worker.details['programs'], worker.details['least']
    titles = list(counted[min(counted)])
    with contextlib.ExitStack() as stack:
        units = {}
        for devices in counted:
            options = {'devices': devices, 'batch_size': arguments.batch_size}
            spec = harness.WorkerSpec('benchmarks.scaling:prepare', options)
            worker = stack.enter_context(harness.worker(spec))
            units |= {f'{title}, {devices}': worker.unit(title) for title in titles}
        measured, floors = harness.beside_floors(units, rounds=arguments.rounds)
    header = ('Devices', 'GFLOP per device', 'of all / of one device', 'collectives')
    header = (*header, 'ms', f'time / that of {min(counted)}', 'share of floor')
    tables = []
    for title in titles:
        tables += [
            f'{title[0].upper()}{title[1:]}:',
            harness.markdown_table(
                header,
                _rows(title, counted, measured, floors.convolution_seconds(least[title])),
            ),
        ]
    if arguments.plot:
        harness.save_figure(figure(counted, measured), arguments.plot)
    definition = (
        f'ResNet-20, {arguments.batch_size} images over all devices, on {harness.cores()} cores: '
        'time beyond as many devices as cores is only what more devices cost. Operations and '
        'collectives are those of the compiled programs with the convolutions of XLA, the body of '
        'a loop counted once. Floor of the operations: as many in all as on one device; of the '
        f'times: {", ".join(f"{least[title] / 1e9:.3g} GFLOP ({title})" for title in titles)}, of '
        'PGD those of its gradients, of Delta those of the forward pass, at the peak rate of '
        f'convolutions. {floors}'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        *tables,
        measurements={'scaling': measured},
        details={'counted': {str(devices): found for devices, found in counted.items()}},
    )


if __name__ == '__main__':
    main()
