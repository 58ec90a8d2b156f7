"""Speed of attacks beside their PyTorch peers and beside the gradient calls they are made of.

    python -m benchmarks.attacks SUBJECT --weights DIR --data_dir DIR [--rounds N] [--json PATH]

SUBJECT is one of

    steps       PGD with 20 steps, Auto-PGD with 100, Square with 100 queries
    autoattack  the whole ensemble; the first round includes compilation
    neurons     16 single neurons in each of 128 images
    compile     seconds to compile against the number of steps (needs no peers)

Networks, weights, images, labels, radius and budgets are the same on both sides. PyTorch runs
channels last with frozen parameters in two threads, its fastest setting on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness, neuron_problems, published
from benchmarks.attack_settings import Setting
from neurosens import attacks, onednn, parallel

NETWORKS = ('lenet5_robust', 'resnet20')
# On the standard ResNet a radius at which some images stay robust, as on the robust LeNet.
_EPS = {'lenet5_robust': 0.3, 'resnet20': 0.5 / 255}
_NEURON_EPS = {'lenet5_robust': 2.0, 'resnet20': 0.5}
GRADIENTS = '20 input gradients, one call each'
_CALLS = 20


def setting(name: str, **changes: Any) -> Setting:
    """Returns the setting of a network."""
    return Setting(eps=_EPS[name], neuron_eps=_NEURON_EPS[name], **changes)


def prepare(*, name: str, weights: str, data_dir: str, setting: dict) -> harness.Prepared:
    """Prepares the attacks of neurosens and their floors in a worker process.

    Args:
        name: one of `published.NAMES`.
        weights: folder of the weights.
        data_dir: directory of TFDS.
        setting: fields of `Setting`.

    Returns:
        Units named after attacks, and the floors.
    """
    chosen = Setting(**setting)
    parallel.keep_freed_memory()
    parallel.use_cpu_devices(parallel.cpu_device_count(chosen.batch_size))
    onednn.use_onednn()
    mesh = parallel.data_mesh()
    pair = published.load(name, weights)
    images, labels = published.images(pair.data_set, data_dir, chosen.batch_size)
    forward = pair.forward
    chosen_neurons, delta, _ = neuron_problems.single_neurons(
        forward, pair.variables, images, chosen.neurons
    )
    variables = parallel.replicate(mesh, jax.tree.map(jnp.asarray, pair.variables))
    x, y, aimed, change = parallel.shard(mesh, (images, labels, chosen_neurons, delta))
    key = parallel.replicate(mesh, jax.random.key(0))
    threat = attacks.Threat(chosen.norm, chosen.eps)

    def loss(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = forward(variables, images)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    gradient = jax.jit(jax.grad(loss, argnums=1))
    logits = jax.jit(lambda variables, images: forward(variables, images)[0])
    on = functools.partial
    call = (forward, variables, x, y, key)
    pgd = on(attacks.pgd, *call, threat=threat, steps=chosen.pgd_steps, step_size=chosen.step_size)
    apgd = on(attacks.apgd, *call, threat=threat, steps=chosen.steps)
    units: dict[str, Callable[[], Any]] = {
        GRADIENTS: lambda: [gradient(variables, x, y) for _ in range(_CALLS)],
        '20 forward passes, one call each': lambda: [logits(variables, x) for _ in range(_CALLS)],
        'neurosens pgd': pgd,
        'neurosens apgd-ce': apgd,
        'neurosens apgd-dlr': on(apgd, loss='dlr'),
        'neurosens square': on(attacks.square, *call, threat=threat, queries=chosen.queries),
        'neurosens autoattack': on(
            attacks.autoattack,
            forward,
            variables,
            images,
            labels,
            jax.random.key(0),
            threat=threat,
            steps=chosen.steps,
            queries=chosen.queries,
            batch_size=chosen.batch_size,
            mesh=mesh,
        ),
        'neurosens neurons': on(
            attacks.neuron_attack,
            forward,
            variables,
            x,
            logits(variables, x).argmax(-1),
            key,
            threat=attacks.Threat('l2', chosen.neuron_eps),
            neurons=aimed,
            delta=change,
            steps=chosen.neuron_steps,
        ),
    }
    blocking = {name: on(_run, unit) for name, unit in units.items()}
    return harness.Prepared(blocking, {'devices': mesh.size, 'units': list(units)})


def _run(unit: Callable[[], Any]) -> None:
    jax.block_until_ready(unit())


SUBJECTS: dict[str, tuple[str, ...]] = {
    'steps': (
        GRADIENTS,
        'neurosens pgd',
        'torchattacks pgd',
        'foolbox pgd',
        'ART pgd',
        'neurosens apgd-ce',
        'torchattacks apgd-ce',
        'ART apgd-ce',
        'neurosens apgd-dlr',
        'torchattacks apgd-dlr',
        '20 forward passes, one call each',
        'neurosens square',
        'torchattacks square',
        'ART square',
    ),
    'autoattack': ('neurosens autoattack', 'torchattacks autoattack'),
    'neurons': (
        GRADIENTS,
        'neurosens neurons',
        'PyTorch neurons in turn',
        'PyTorch pairs in turn',
    ),
}
# Budgets that differ from those of `Setting`: Square's cost is the same for every query.
_CHANGES: dict[str, Mapping[str, Any]] = {'steps': {'queries': 100}}


def measure(
    subject: str, name: str, arguments: argparse.Namespace, changes: Mapping[str, Any]
) -> harness.Measurement:
    """Times all candidates of a subject on one network in turns."""
    options = {
        'name': name,
        'weights': arguments.weights,
        'data_dir': arguments.data_dir,
        'setting': dataclasses.asdict(setting(name, **changes)),
    }
    with (
        harness.worker(harness.WorkerSpec('benchmarks.attacks:prepare', options)) as ours,
        harness.worker(harness.WorkerSpec('benchmarks.torch_attacks:prepare', options)) as theirs,
    ):
        units = {
            unit: (ours if unit in ours.details['units'] else theirs).unit(unit)
            for unit in SUBJECTS[subject]
            if not arguments.only or any(part in unit for part in arguments.only)
        }
        # The ensembles take minutes: theirs starts cold, and so does ours, with its compilation.
        warmup = 0 if subject == 'autoattack' else 1
        return harness.alternate(units, rounds=arguments.rounds, warmup=warmup, announce=_announce)


def _announce(name: str, seconds: float) -> None:
    print(f'  {name}: {seconds:.2f} s', file=sys.stderr, flush=True)


def table(subject: str, measurement: harness.Measurement, scale: Mapping[str, float]) -> str:
    """Returns the Markdown table of one network.

    Args:
        subject: one of `SUBJECTS`.
        measurement: its timings.
        scale: what part of the work some candidates did, by name.
    """
    rows = []
    for name in measurement.seconds:
        summary = measurement.summary(name)
        part = scale.get(name, 1.0)
        reference = name.replace(name.split()[0], 'neurosens', 1)
        if subject == 'neurons':
            reference = 'neurosens neurons'
        ratio = '-'
        if reference in measurement.seconds and reference != name and name[0] not in '0123456789':
            found = measurement.ratio(name, reference)
            ratio = harness.ratio_text(harness.Ratio(*(value / part for value in found)))
        rows.append((name, f'{summary.median / part:.2f}', f'{summary.minimum / part:.2f}', ratio))
    return harness.markdown_table(('Candidate', 's', 'best round', 'time / neurosens'), rows)


def overheads(measurement: harness.Measurement) -> str:
    """Returns how many gradient calls a step of PGD and Auto-PGD costs, as Markdown."""
    rows = []
    for name, steps in (('neurosens pgd', 20), ('neurosens apgd-ce', 100)):
        quotients = np.divide(measurement.seconds[name], measurement.seconds[GRADIENTS])
        per_step = quotients * _CALLS / steps
        low, middle, high = np.quantile(per_step, (0.1, 0.5, 0.9))
        rows.append((name, str(steps), harness.ratio_text(harness.Ratio(middle, low, high))))
    return harness.markdown_table(('Attack', 'steps', 'gradient calls per step'), rows)


def compile_seconds(name: str, arguments: argparse.Namespace) -> str:
    """Returns a Markdown table of the seconds to trace and compile for several numbers of steps."""
    pair = published.load(name, arguments.weights)
    images, labels = published.images(pair.data_set, arguments.data_dir, 16)
    threat = attacks.Threat('linf', _EPS[name])
    steps = (5, 20, 100)
    rows = []
    kinds: Mapping[str, Callable[..., Any]] = {'pgd': attacks.pgd, 'apgd': attacks.apgd}
    for kind, attack in kinds.items():
        found = []
        for count in steps:
            jax.clear_caches()

            def run(attack: Callable[..., Any] = attack, count: int = count) -> None:
                call = (pair.forward, pair.variables, images, labels, jax.random.key(0))
                jax.block_until_ready(attack(*call, threat=threat, steps=count))

            start = time.perf_counter()
            run()
            first = time.perf_counter() - start
            start = time.perf_counter()
            run()
            found.append(f'{first - (time.perf_counter() - start):.2f}')
        rows.append((kind, *found))
    return harness.markdown_table(('Attack', *(f'{count} steps, s' for count in steps)), rows)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=(*SUBJECTS, 'compile'))
    parser.add_argument('--weights', required=True, help='folder of the published weights')
    parser.add_argument('--data_dir', required=True, help='directory of TFDS')
    parser.add_argument('--networks', nargs='+', default=NETWORKS, choices=NETWORKS)
    parser.add_argument('--only', nargs='+', default=(), help='parts of names of candidates')
    parser.add_argument('--rounds', type=int, default=3, help='measured rounds')
    parser.add_argument('--json', default='', help='file for the timings of every round')
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    description = harness.machine()
    print(harness.machine_line(description))
    measurements = {}
    for name in arguments.networks:
        if arguments.subject == 'compile':
            onednn.use_onednn()
            print(f'\n{name}:\n\n{compile_seconds(name, arguments)}')
            continue
        changes = _CHANGES.get(arguments.subject, {})
        measured = measure(arguments.subject, name, arguments, changes)
        measurements[name] = measured
        scale = {'PyTorch pairs in turn': 1 / 32} if arguments.subject == 'neurons' else {}
        print(f'\n{name}, eps {_EPS[name]:.4g}, {arguments.rounds} rounds:\n')
        print(table(arguments.subject, measured, scale), flush=True)
        if arguments.subject == 'steps' and not arguments.only:
            print(f'\n{overheads(measured)}', flush=True)
    if arguments.json and measurements:
        harness.write_json(
            arguments.json,
            description=description,
            measurements=measurements,
            details=vars(arguments),
        )


if __name__ == '__main__':
    main()
