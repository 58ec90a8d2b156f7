"""Speed of attacks beside their PyTorch peers and beside the gradient calls they are made of.

    python -m benchmarks.attacks SUBJECT --weights DIR --data_dir DIR [--rounds N]

SUBJECT is one of

    steps       PGD with 20 steps, Auto-PGD with 100, Square with 100 queries
    autoattack  the whole ensemble; the first round includes compilation
    neurons     16 single neurons in each of 128 images
    overhead    what a step of every gradient attack costs, in calls of the plain gradient
    compile     seconds to compile against the number of steps (needs no peers)

Networks, weights, images, labels, radius and budgets are the same on both sides. PyTorch runs
channels last with frozen parameters, eagerly, and in `steps` also compiled with
batch normalisation folded into kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness, neuron_problems
from benchmarks.attack_settings import Setting
from neurosens import attacks, parallel

NETWORKS = {
    'lenet5_robust': 'An adversarially trained LeNet-5 (advertorch), linf 0.3',
    'resnet20': 'The standard CIFAR ResNet-20 (akamaster), linf 0.5/255',
}
_SHORT = {'lenet5_robust': 'LeNet-5', 'resnet20': 'ResNet-20'}
_RADII = {'lenet5_robust': '0.3', 'resnet20': '0.5/255'}
# On the standard ResNet a radius at which some images stay robust, as on the robust LeNet.
_EPS = {'lenet5_robust': 0.3, 'resnet20': 0.5 / 255}
_NEURON_EPS = {'lenet5_robust': 2.0, 'resnet20': 0.5}
GRADIENTS, FORWARDS = '20 input gradients, one call each', '20 forward passes, one call each'
JACOBIANS = '4 gradients of every logit, one call each'
_CALLS = 20
_PEAK = 'of the peak of convolutions'


class _Overhead(NamedTuple):
    """An attack of `overhead`.

    Attributes:
        attack: its function.
        floor: what a step cannot do without.
        steps: how many it takes.
        options: further ones.
        targeted: whether it aims at the class after the label.
        jitted: whether it is called inside a jit, where it takes all of its steps.
    """

    attack: str
    floor: tuple[str, ...] = (GRADIENTS,)
    steps: int = 20
    options: Mapping[str, Any] = {}
    targeted: bool = False
    jitted: bool = False


_OVERHEADS = {
    'pgd': _Overhead('pgd'),
    'mi_fgsm': _Overhead('mi_fgsm'),
    'ni_fgsm, last iterate': _Overhead('ni_fgsm', options={'keep': 'last'}),
    # Gradients are taken ahead of the iterates, of which each is looked at.
    'ni_fgsm': _Overhead('ni_fgsm', (GRADIENTS, FORWARDS)),
    'apgd': _Overhead('apgd', steps=100),
    'apgd, targeted': _Overhead('apgd', steps=100, options={'loss': 'dlr'}, targeted=True),
    'fmn': _Overhead('fmn', steps=100),
    'carlini_wagner': _Overhead('carlini_wagner', steps=100, options={'searches': 1}),
    # Whether a step is wrong decides where the next one begins.
    'fab, targeted': _Overhead('fab', (GRADIENTS, FORWARDS), 100, targeted=True),
    # Else it ends with the last image, after steps that differ from batch to batch.
    'deepfool': _Overhead('deepfool', (JACOBIANS,), jitted=True),
    'fab': _Overhead('fab', (JACOBIANS,)),
}


def _calls(floor: str) -> int:
    return int(floor.partition(' ')[0])


def _steps_of(name: str) -> str:
    return f'{_OVERHEADS[name].steps} steps of {name}'


# What is only timed on a part of all pairs, see `benchmarks.torch_attacks`: one image of 32.
PAIR_SHARE = 32
PAIRS = 'PyTorch pairs in turn'
_COMPILED_STEPS = (5, 20, 100)


def setting(name: str, **changes: Any) -> Setting:
    """Returns the setting of a network."""
    return Setting(eps=_EPS[name], neuron_eps=_NEURON_EPS[name], **changes)


def prepare(
    *, name: str, weights: str, data_dir: str, setting: dict, output: str = ''
) -> harness.Prepared:
    """Prepares the attacks of neurosens and their floors in a worker process.

    Args:
        name: one of `published.NAMES`.
        weights: folder of the weights.
        data_dir: directory of TFDS.
        setting: fields of `Setting`.
        output: file for what AutoAttack had to compute, see `_necessary`, or empty.

    Returns:
        Units named after attacks, and the floors.
    """
    # Imported here: only what loads weights needs PyTorch.
    from benchmarks import published

    chosen = Setting(**setting)
    mesh = harness.start_jax(chosen.batch_size)
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

    def every_logit(variables: Any, images: jax.Array) -> jax.Array:
        logits, pull = jax.vjp(lambda images: forward(variables, images)[0], images)
        classes = jnp.eye(logits.shape[-1], dtype=logits.dtype)[:, None]
        each = jnp.broadcast_to(classes, (len(classes), *logits.shape))
        return jax.vmap(pull)(each)[0]

    gradient, jacobian = jax.jit(jax.grad(loss, argnums=1)), jax.jit(every_logit)
    logits = jax.jit(lambda variables, images: forward(variables, images)[0])
    on = functools.partial
    call = (forward, variables, x, y, key)
    pgd = on(attacks.pgd, *call, threat=threat, steps=chosen.pgd_steps, step_size=chosen.step_size)
    apgd = on(attacks.apgd, *call, threat=threat, steps=chosen.steps)

    def ensemble() -> None:
        result = attacks.autoattack(
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
        )
        if output:
            pathlib.Path(output).write_text(json.dumps(_necessary(result, chosen)))

    units: dict[str, Callable[[], Any]] = {
        GRADIENTS: lambda: [gradient(variables, x, y) for _ in range(_CALLS)],
        FORWARDS: lambda: [logits(variables, x) for _ in range(_CALLS)],
        JACOBIANS: lambda: [jacobian(variables, x) for _ in range(_calls(JACOBIANS))],
        **{_steps_of(name): _overhead_unit(one, call, threat) for name, one in _OVERHEADS.items()},
        'neurosens pgd': pgd,
        'neurosens apgd-ce': apgd,
        'neurosens apgd-dlr': on(apgd, loss='dlr'),
        'neurosens square': on(attacks.square, *call, threat=threat, queries=chosen.queries),
        'neurosens autoattack': ensemble,
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
    flops = {
        GRADIENTS: harness.count_flops(gradient, variables, x, y, calls=_CALLS),
        FORWARDS: harness.count_flops(logits, variables, x, calls=_CALLS),
        JACOBIANS: harness.count_flops(jacobian, variables, x, calls=_calls(JACOBIANS)),
    }
    details = {'devices': mesh.size, 'units': list(units), 'flops': flops}
    return harness.Prepared(blocking, details)


def _run(unit: Callable[[], Any]) -> None:
    jax.block_until_ready(unit())


def _overhead_unit(
    one: _Overhead, call: tuple[Any, ...], threat: attacks.Threat
) -> Callable[[], attacks.AttackResult | attacks.MinimumResult]:
    forward, *arrays = call
    run = functools.partial(
        getattr(attacks, one.attack),
        threat=attacks.Threat('l2', 2.0) if one.attack == 'carlini_wagner' else threat,
        steps=one.steps,
        **one.options,
        **({'target': (arrays[2] + 1) % 10} if one.targeted else {}),
    )
    if one.jitted:
        jitted = jax.jit(functools.partial(run, forward))
        return lambda: jitted(*arrays)
    return functools.partial(run, *call)


def _necessary(result: attacks.AutoAttackResult, setting: Setting) -> dict[str, float]:
    """Input gradients and forward passes, of a whole batch, that AutoAttack cannot do without.

    Those of the images that a run leaves robust, which take all of its steps.
    """
    found = {'gradients': 0.0, 'forwards': 0.0}
    for run, accuracy in zip(result.runs, result.accuracy[1:], strict=True):
        images = float(accuracy) * len(result.success) / setting.batch_size
        square = run.startswith('square')
        found['forwards' if square else 'gradients'] += images * (
            setting.queries if square else setting.steps
        )
    return found


SUBJECTS: dict[str, tuple[str, ...]] = {
    'steps': (
        GRADIENTS,
        'neurosens pgd',
        'torchattacks pgd',
        'torchattacks, compiled pgd',
        'foolbox pgd',
        'ART pgd',
        'neurosens apgd-ce',
        'torchattacks apgd-ce',
        'torchattacks, compiled apgd-ce',
        'ART apgd-ce',
        'neurosens apgd-dlr',
        'torchattacks apgd-dlr',
        'torchattacks, compiled apgd-dlr',
        FORWARDS,
        'neurosens square',
        'torchattacks square',
        'ART square',
    ),
    'autoattack': (GRADIENTS, FORWARDS, 'neurosens autoattack', 'torchattacks autoattack'),
    'overhead': (
        GRADIENTS,
        FORWARDS,
        JACOBIANS,
        *map(_steps_of, _OVERHEADS),
    ),
    'neurons': (GRADIENTS, 'neurosens neurons', 'PyTorch neurons in turn', PAIRS),
}


class Timed(NamedTuple):
    """What was measured of a subject on one network.

    Attributes:
        measurement: the timings.
        pace: at what share of the peak of convolutions the floors run.
        necessary: what `_necessary` says of AutoAttack, if it ran.
        least: seconds of the operations of each floor at the peak of convolutions, by round.
    """

    measurement: harness.Measurement
    pace: str
    necessary: dict[str, float]
    least: Mapping[str, tuple[float, ...]]


def measure(
    subject: str, name: str, arguments: argparse.Namespace, changes: Mapping[str, Any]
) -> Timed:
    """Times all candidates of a subject on one network in turns.

    Args:
        subject: one of `SUBJECTS`.
        name: of the network.
        arguments: of the command line.
        changes: fields of `Setting`.

    Returns:
        What was measured.
    """
    options = {
        'name': name,
        'weights': arguments.weights,
        'data_dir': arguments.data_dir,
        'setting': dataclasses.asdict(setting(name, **changes)),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / 'necessary.json'
        own = {**options, 'output': str(file)}
        with (
            harness.worker(harness.WorkerSpec('benchmarks.attacks:prepare', own)) as ours,
            harness.worker(
                harness.WorkerSpec('benchmarks.torch_attacks:prepare', options)
            ) as theirs,
        ):
            units = {
                unit: (ours if unit in ours.details['units'] else theirs).unit(unit)
                for unit in SUBJECTS[subject]
                if not arguments.only or any(part in unit for part in arguments.only)
            }
            # The ensembles take minutes: theirs starts cold, and so does ours, with its
            # compilation.
            cold = subject == 'autoattack'
            if cold:
                for floor in (GRADIENTS, FORWARDS):
                    ours.unit(floor)()
            measured, floors = harness.beside_floors(
                units, rounds=arguments.rounds, warmup=0 if cold else 1, announce=_announce
            )
            flops = ours.details['flops']
        necessary = json.loads(file.read_text()) if file.exists() else {}
        least = {
            floor: floors.convolution_seconds(count)
            for floor, count in flops.items()
            if count is not None
        }
        return Timed(measured, floors.pace(measured, flops), necessary, least)


def _of_peak(timed: Timed, name: str, parts: Mapping[str, float]) -> str:
    """Share of the peak of convolutions that the floors of a candidate, so many calls, come to."""
    if not all(part in timed.least for part in parts):
        return '-'
    calls = [count / _calls(part) * np.array(timed.least[part]) for part, count in parts.items()]
    return harness.percent(timed.measurement.share(name, np.sum(calls, axis=0).tolist()))


def _announce(name: str, seconds: float) -> None:
    print(f'  {name}: {seconds:.2f} s', file=sys.stderr, flush=True)


def _budget(name: str, chosen: Setting) -> tuple[str, int] | None:
    """What an attack's budget consists of, and its size: the floor of `steps`."""
    attack = name.rpartition(' ')[2]
    return {
        'pgd': (GRADIENTS, chosen.pgd_steps),
        'apgd-ce': (GRADIENTS, chosen.steps),
        'apgd-dlr': (GRADIENTS, chosen.steps),
        'square': (FORWARDS, chosen.queries),
    }.get(attack)


def steps_table(timed: Timed, chosen: Setting) -> str:
    """Returns the Markdown table of one network, the fastest peer of each attack in bold."""
    measurement, rows = timed.measurement, []
    for name in measurement.seconds:
        summary = measurement.summary(name)
        budget = _budget(name, chosen)
        label, ratio, share, of_peak = name, '-', '-', '-'
        if name in timed.least:
            of_peak = _of_peak(timed, name, {name: _calls(name)})
        if budget is not None:
            unit, count = budget
            attack = name.rpartition(' ')[2]
            ours = f'neurosens {attack}'
            peers = [
                other
                for other in measurement.seconds
                if other.endswith(f' {attack}') and other != ours
            ]
            if name == ours:
                kind = 'steps' if unit == GRADIENTS else 'queries'
                label = f'{name} ({count} {kind})'
            elif ours in measurement.seconds:
                label = harness.bold(name, harness.fastest(measurement, peers))
                ratio = harness.ratio_text(measurement.ratio(name, ours))
            if unit in measurement.seconds:
                floor = measurement.scaled(unit, count / _CALLS)
                share = harness.percent(measurement.share(name, floor))
            of_peak = _of_peak(timed, name, {unit: count})
        seconds = (f'{summary.median:.2f}', f'{summary.minimum:.2f}')
        rows.append((label, *seconds, ratio, share, of_peak))
    header = ('Candidate', 's', 'best round', 'time / neurosens', 'share of floor', _PEAK)
    return harness.markdown_table(header, rows)


def overheads(name: str, measurement: harness.Measurement, chosen: Setting) -> tuple[str, ...]:
    """Returns how many gradient calls a step of PGD and Auto-PGD costs: a row of a table."""
    cells = []
    for attack, steps in (('neurosens pgd', chosen.pgd_steps), ('neurosens apgd-ce', chosen.steps)):
        quotients = np.divide(measurement.seconds[attack], measurement.seconds[GRADIENTS])
        low, middle, high = np.quantile(quotients * _CALLS / steps, (0.1, 0.5, 0.9))
        cells.append(harness.ratio_text(harness.Ratio(middle, low, high)))
    return (_SHORT[name], *cells)


def compile_rows(name: str, arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """Returns the seconds to trace and compile for several numbers of steps: rows of a table."""
    # Imported here: only what loads weights needs PyTorch.
    from benchmarks import published

    pair = published.load(name, arguments.weights)
    images, labels = published.images(pair.data_set, arguments.data_dir, 16)
    threat = attacks.Threat('linf', _EPS[name])
    rows = []
    kinds: Mapping[str, Callable[..., Any]] = {'pgd': attacks.pgd, 'apgd': attacks.apgd}
    for kind, attack in kinds.items():
        found = []
        for count in _COMPILED_STEPS:
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
        rows.append((_SHORT[name], kind, *found))
    return rows


# ------------------------------------------------------------------------------------ subjects


def _steps(arguments: argparse.Namespace) -> None:
    measurements, tables, rows = {}, [], []
    # Square's cost is the same for every query.
    changes = {'queries': 100}
    for name in arguments.networks:
        chosen = setting(name, **changes)
        timed = measure('steps', name, arguments, changes)
        measurements[name] = timed.measurement
        title = harness.wrapped(f'{NETWORKS[name]}. {timed.pace}')
        tables += [title, steps_table(timed, chosen)]
        if not arguments.only:
            rows.append(overheads(name, measurements[name], chosen))
    if rows:
        header = ('Network', 'PGD', 'Auto-PGD')
        title = (
            'What a step costs, in calls of the compiled input gradient of the same batch (PGD '
            'makes two forward passes more than it has steps):'
        )
        tables += [harness.wrapped(title), harness.markdown_table(header, rows)]
    if arguments.plot:
        named = {_SHORT[name]: measured for name, measured in measurements.items()}
        harness.draw_times(named, arguments.plot, 'seconds', 1.0)
    definition = (
        f'{Setting.batch_size} images in one batch. Floor: one call of the '
        'compiled input gradient per step, of the compiled forward pass per query of Square, '
        'which an attack that computes the same otherwise may beat; beside it, what the operations '
        'of these calls would take at the peak of convolutions.'
    )
    harness.report(arguments, harness.wrapped(definition), *tables, measurements=measurements)


def _ensembles(arguments: argparse.Namespace) -> None:
    measurements, details, rows, paces = {}, {}, [], []
    for name in arguments.networks:
        measured, pace, necessary, _ = measure('autoattack', name, arguments, {})
        measurements[name], details[name] = measured, necessary
        paces.append(harness.wrapped(f'{NETWORKS[name]}. {pace}'))
        rows += ensemble_rows(f'{_SHORT[name]}, {_RADII[name]}', measured, necessary)
    header = (
        'Network, linf eps',
        'Round',
        'neurosens, s',
        'torchattacks, s',
        'torchattacks / neurosens',
        'share of floor, neurosens',
        'share of floor, torchattacks',
    )
    definition = (
        f'Standard AutoAttack on {Setting.batch_size} images. The first round of a process '
        'includes compilation. Floor: for every image that a run leaves robust the input '
        "gradients of its steps, or the forward passes of Square's queries, at the cost of "
        'compiled calls of a full batch.'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        harness.markdown_table(header, rows),
        *paces,
        measurements=measurements,
        details={'necessary': details},
    )


def ensemble_rows(
    label: str, measured: harness.Measurement, necessary: Mapping[str, float]
) -> list[tuple[str, ...]]:
    """Returns a row for the first round and, where there are any, one for those after it.

    Args:
        label: of the network.
        measured: timings of both sides and of the floors.
        necessary: as of `_necessary`.
    """
    ours, theirs = 'neurosens autoattack', 'torchattacks autoattack'
    rows = []
    for title, rounds in (('first', slice(1)), ('later', slice(1, None))):
        part = harness.Measurement(
            {name: seconds[rounds] for name, seconds in measured.seconds.items()}
        )
        if not part.seconds[ours]:
            continue
        gradients = part.scaled(GRADIENTS, necessary['gradients'] / _CALLS)
        forwards = part.scaled(FORWARDS, necessary['forwards'] / _CALLS)
        floor = np.add(gradients, forwards).tolist()
        rows.append(
            (
                label,
                title,
                *(f'{part.summary(side).median:.0f}' for side in (ours, theirs)),
                harness.ratio_text(part.ratio(theirs, ours)),
                *(harness.percent(part.share(side, floor)) for side in (ours, theirs)),
            )
        )
    return rows


def _neurons(arguments: argparse.Namespace) -> None:
    measurements, rows, paces = {}, [], []
    for name in arguments.networks:
        measured, pace, *_ = measure('neurons', name, arguments, {})
        measurements[name] = measured
        paces.append(harness.wrapped(f'{NETWORKS[name]}. {pace}'))
        ours, turns = 'neurosens neurons', 'PyTorch neurons in turn'
        floor = measured.scaled(GRADIENTS, Setting.neurons * Setting.neuron_steps / _CALLS)
        pairs = harness.Ratio(*(PAIR_SHARE * value for value in measured.ratio(PAIRS, ours)))
        rows.append(
            (
                _SHORT[name],
                f'{measured.summary(ours).median:.2f}',
                harness.ratio_text(measured.ratio(turns, ours)),
                harness.ratio_text(pairs),
                *(harness.percent(measured.share(unit, floor)) for unit in (ours, turns)),
            )
        )
    header = ('Network', 'neurosens, s', 'neurons in turn / neurosens', 'pairs in turn / neurosens')
    header = (*header, 'share of floor', 'share of floor, neurons in turn')
    definition = (
        f'{Setting.neurons} neurons in each of {Setting.batch_size} images, '
        f'{Setting.neuron_steps} steps; pairs in turn are timed on every {PAIR_SHARE}nd image and '
        'scaled. Floor: one call of the compiled input gradient of the batch per neuron and step.'
    )
    table = harness.markdown_table(header, rows)
    harness.report(arguments, harness.wrapped(definition), table, *paces, measurements=measurements)


def _every_overhead(arguments: argparse.Namespace) -> None:
    measurements, rows, paces = {}, [], []
    for name in arguments.networks:
        timed = measure('overhead', name, arguments, {})
        measurements[name] = measured = timed.measurement
        paces.append(harness.wrapped(f'{NETWORKS[name]}. {timed.pace}'))
        for attack, one in _OVERHEADS.items():
            unit = _steps_of(attack)
            floors = [measured.scaled(part, one.steps / _calls(part)) for part in one.floor]
            floor = np.sum(floors, axis=0)
            beside = harness.Measurement({**measured.seconds, 'floor': tuple(floor.tolist())})
            rows.append(
                (
                    _SHORT[name],
                    attack,
                    str(one.steps),
                    ', '.join(part.partition(' ')[2].partition(',')[0] for part in one.floor),
                    f'{measured.summary(unit).median / one.steps * 1e3:.1f}',
                    harness.ratio_text(beside.ratio(unit, 'floor')),
                    harness.percent(beside.share(unit, beside.seconds['floor'])),
                    _of_peak(timed, unit, dict.fromkeys(one.floor, one.steps)),
                )
            )
    header = ('Network', 'Attack', 'steps', 'floor of a step', 'ms per step', 'step / floor')
    definition = (
        f'{Setting.batch_size} images in one batch, whole attacks with all that stands before and '
        'behind their steps. Floor: as many calls of the compiled gradient of '
        'the loss (and of the forward pass, where a step is judged before the next), or of the '
        'gradients of all logits where steps need these; beside it, what the operations of these '
        'calls would take at the peak of convolutions. DeepFool is inside a jit, where it takes '
        'all of its steps.'
    )
    table = harness.markdown_table((*header, 'share of floor', _PEAK), rows)
    harness.report(arguments, harness.wrapped(definition), table, *paces, measurements=measurements)


def _compile(arguments: argparse.Namespace) -> None:
    harness.start_jax(devices=1)
    rows = [row for name in arguments.networks for row in compile_rows(name, arguments)]
    header = ('Network', 'Attack', *(f'{count} steps' for count in _COMPILED_STEPS))
    definition = 'Seconds to trace and compile, 16 images; there is no floor.'
    harness.report(arguments, definition, harness.markdown_table(header, rows))


_REPORTS = {
    'steps': _steps,
    'autoattack': _ensembles,
    'neurons': _neurons,
    'overhead': _every_overhead,
    'compile': _compile,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=_REPORTS)
    parser.add_argument('--weights', required=True, help='folder of the published weights')
    parser.add_argument('--data_dir', required=True, help='directory of TFDS')
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument('--only', nargs='+', default=(), help='parts of names, of `steps`')
    parser.add_argument('--plot', default='', help='PNG file of steps')
    harness.add_arguments(parser, rounds=3)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    _REPORTS[arguments.subject](arguments)


if __name__ == '__main__':
    main()
