"""What regularizers and adversarial objectives cost in training, against plain steps and PyTorch.

    python -m benchmarks.regularizers steps [--rounds N] [--networks NAME ...]
    python -m benchmarks.regularizers memory [--networks NAME ...]
    python -m benchmarks.regularizers variance --plot PATH [--rounds N]

`steps` times training steps with each term against the plain step of the same network and batch,
and against the same term in PyTorch by double backpropagation, all in turns. `memory` measures the
peak of a process that takes such steps, each in a process of its own, and the temporaries of the
compiled step. `variance` compares the
estimators of activation sensitivity and of the Jacobian: their spread against their cost.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks import harness
from neurosens import config, data, models, parallel, regularizers
from neurosens.convolution import with_fast_input_gradients
from neurosens.evaluation import plots
from neurosens.forward import LinenForward
from neurosens.training import objectives, optimizers, step

PGD_STEPS = 7
STEPS = 2
# Units of a turn, of which the median counts: the first step after another process has had the
# cores is slow.
_REPEATS = 3
_FIT = 'cross-entropy'
_UPDATES = 100_000


class Network(NamedTuple):
    """A network and the data set whose images it takes."""

    model: str
    dataset: str
    eps: float


NETWORKS = {
    'ResNet-20': Network('cifar_resnet20', 'cifar10', 8 / 255),
    'LeNet-5': Network('lenet5_wide', 'mnist', 0.3),
}


class Term(NamedTuple):
    """What is added to the loss, or takes its place.

    Attributes:
        objective: name and options of the objective.
        regularizer: name and options of the regularizer, or None.
        limit: what its step may cost in plain steps; infinite where nothing is asked of it.
    """

    objective: tuple[str, dict[str, Any]]
    regularizer: tuple[str, dict[str, Any]] | None
    limit: float


_PLAIN: tuple[str, dict[str, Any]] = ('standard', {})
# Of terms that use the pass of the objective.
SHARED = ', shared pass'
# Activation sensitivity by pullbacks of random cotangents in place of a random tangent.
CALLED_BACK = 'activation sensitivity, cotangents'
_PENALTIES = {
    'T1 + T2': ('neuron_contribution', {}, 1.1),
    'activation sensitivity': ('activation_sensitivity', {}, 2.2),
    # What double backpropagation in PyTorch draws too.
    CALLED_BACK: ('activation_sensitivity', {'estimator': 'cotangent'}, math.inf),
    'Jacobian, one projection': ('jacobian', {'projections': 1}, 2.5),
    'both in one pass': ('sensitivity_and_jacobian', {}, 2.7),
}
TERMS = {
    'plain': Term(_PLAIN, None, 1.0),
    **{
        f'{term}{suffix}': Term(_PLAIN, (name, {**options, 'shared': bool(suffix)}), limit)
        for term, (name, options, limit) in _PENALTIES.items()
        for suffix in ('', SHARED)
    },
    f'PGD-{PGD_STEPS}': Term(('pgd', {'steps': PGD_STEPS}), None, 1.1 * (PGD_STEPS + 1)),
}


def make_module(network: Network) -> nn.Module:
    """Returns the network."""
    info = data.info(network.dataset)
    return models.create(network.model, num_classes=info.num_classes, mean=info.mean, std=info.std)


def noise(network: Network, batch_size: int) -> list[data.Batch]:
    """Returns two batches of noise."""
    random = np.random.default_rng(0)
    shape = data.info(network.dataset).image_shape
    return [
        data.Batch(
            image=random.integers(0, 256, (batch_size, *shape), np.uint8),
            label=random.integers(0, 10, batch_size, np.int32),
            mask=np.ones(batch_size, bool),
            index=np.arange(batch_size, dtype=np.int32),
        )
        for _ in range(2)
    ]


def _initial_state(network: Network, mesh: jax.sharding.Mesh) -> tuple[step.TrainState, Any, Any]:
    optimizer, schedule = optimizers.make_optimizer(
        # Slow enough for the noise to be learnt by no one.
        config.Optimizer(learning_rate=1e-4),
        config.Schedule(warmup=0.0),
        _UPDATES,
    )
    shape = data.info(network.dataset).image_shape
    init = functools.partial(step.init_state, make_module(network), optimizer, shape)
    return parallel.replicate(mesh, jax.jit(init)(jax.random.key(0))), optimizer, schedule


def _make_step(
    name: str, term: Term, mesh: jax.sharding.Mesh
) -> tuple[step.TrainState, Any, jax.Array]:
    """A state, the compiled training step with a term, and a key."""
    network = NETWORKS[name]
    state, optimizer, schedule = _initial_state(network, mesh)
    objective, options = term.objective
    if objective != 'standard':
        options = {**options, 'eps': network.eps}
    terms = []
    if term.regularizer is not None:
        options_of = dict(term.regularizer[1])
        shared = options_of.pop('shared', False)
        made = objectives.REGULARIZERS[term.regularizer[0]](**options_of)
        terms.append(step.WeightedRegularizer('term', made, 1e-4, 0, shared=shared))
    train_step = step.make_train_step(
        make_module(network),
        optimizer,
        schedule,
        objectives.OBJECTIVES[objective](**options),
        terms,
        mesh,
    )
    return state, train_step, parallel.replicate(mesh, jax.random.key(1))


def _training_unit(name: str, term: Term, mesh: jax.sharding.Mesh, batch_size: int) -> harness.Unit:
    state, train_step, key = _make_step(name, term, mesh)
    batches = [parallel.shard(mesh, batch) for batch in noise(NETWORKS[name], batch_size)]
    stream = itertools.cycle(batches)

    def unit() -> None:
        nonlocal state
        for batch in itertools.islice(stream, STEPS):
            state, metrics = train_step(state, batch, key)
        jax.block_until_ready((state, metrics))

    return unit


def prepare(
    *, name: str, terms: list[str], batch_size: int, peak: bool = False
) -> harness.Prepared:
    """Prepares our training steps in a worker process.

    Args:
        name: one of `NETWORKS`.
        terms: names of `TERMS`.
        batch_size: images per step.
        peak: run the first term and note the peak of the process, and what temporaries the
            compiler says that the step has on all devices, in MiB.

    Returns:
        A unit of a few training steps per term; as details also the `flops` of one with
        the first term, without `peak`.
    """
    mesh = harness.start_jax(batch_size)
    units = {term: _training_unit(name, TERMS[term], mesh, batch_size) for term in terms}
    details: dict[str, Any] = {'devices': mesh.size}
    if peak:
        details['peak'] = harness.peak_memory(units[terms[0]])
    state, train_step, key = _make_step(name, TERMS[terms[0]], mesh)
    batch = parallel.shard(mesh, noise(NETWORKS[name], batch_size)[0])
    if peak:
        details['temporary'] = harness.temporary_memory(mesh, train_step, state, batch, key)
    else:
        details['flops'] = harness.count_flops(train_step, state, batch, key, calls=STEPS)
    return harness.Prepared(units, details)


def _steps(arguments: argparse.Namespace) -> None:
    measurements, tables = {}, []
    for name in arguments.networks:
        options = {'name': name, 'terms': list(TERMS), 'batch_size': arguments.batch_size}
        with (
            harness.worker(harness.WorkerSpec('benchmarks.regularizers:prepare', options)) as ours,
            harness.worker(
                harness.WorkerSpec('benchmarks.torch_regularizers:prepare', options)
            ) as theirs,
        ):
            units = {term: ours.unit(term) for term in TERMS}
            units |= {f'PyTorch: {term}': theirs.unit(term) for term in TERMS}
            measured, floors = harness.beside_floors(
                units, rounds=arguments.rounds, repeats=_REPEATS
            )
            pace = floors.pace(measured, {'plain': ours.details['flops']})
        measurements[name] = measured
        rows = [_row(measured, term, known) for term, known in TERMS.items()]
        header = ('Term', 'ms per step', 'in plain steps', 'limit', 'share of floor', 'PyTorch, ms')
        header = (*header, 'in its plain steps', 'PyTorch / neurosens', 'share of floor, PyTorch')
        tables += [harness.wrapped(f'{name}. {pace}'), harness.markdown_table(header, rows)]
    definition = (
        f'Batches of {arguments.batch_size}; of each turn the median of {_REPEATS} times {STEPS} '
        'steps. Floor: the plain step of neurosens in the same round. PyTorch draws activation '
        'sensitivity by cotangents in all of its rows, as double backpropagation does.'
    )
    if arguments.plot:
        harness.draw_times(measurements, arguments.plot, 'ms per step', 1e3 / STEPS)
    harness.report(arguments, harness.wrapped(definition), *tables, measurements=measurements)


def _row(measured: harness.Measurement, term: str, known: Term) -> tuple[str, ...]:
    """Cells of one term."""
    theirs = f'PyTorch: {term}'
    plain = term == 'plain'
    return (
        term,
        f'{1000 * measured.summary(term).median / STEPS:.0f}',
        '1' if plain else harness.ratio_text(measured.ratio(term, 'plain')),
        f'{known.limit:g}' if math.isfinite(known.limit) and not plain else '',
        harness.percent(measured.share(term, measured.seconds['plain'])),
        f'{1000 * measured.summary(theirs).median / STEPS:.0f}',
        '1' if plain else harness.ratio_text(measured.ratio(theirs, 'PyTorch: plain')),
        harness.ratio_text(measured.ratio(theirs, term)),
        harness.percent(measured.share(theirs, measured.seconds['plain'])),
    )


def _memory(arguments: argparse.Namespace) -> None:
    tables = []
    for name in arguments.networks:
        rows, floor = [], 0.0
        for term in TERMS:
            options = {'name': name, 'terms': [term], 'batch_size': arguments.batch_size}
            found = {}
            for module in ('regularizers', 'torch_regularizers'):
                spec = harness.WorkerSpec(f'benchmarks.{module}:prepare', {**options, 'peak': True})
                with harness.worker(spec) as worker:
                    found[module] = dict(worker.details)
            ours, theirs = found['regularizers'], found['torch_regularizers']
            # The plain step comes first.
            floor = floor or ours['temporary']
            peaks = (f'{side["peak"]:.0f}' for side in (ours, theirs))
            share = harness.percent(floor / ours['temporary'])
            rows.append((term, f'{ours["temporary"]:.0f}', share, *peaks))
        header = ('Term', 'temporaries of the step', 'share of floor')
        header = (*header, 'peak of the process', 'that of PyTorch')
        tables += [f'{name}:', harness.markdown_table(header, rows)]
    definition = (
        f'MiB for training steps on batches of {arguments.batch_size}, each in a process of its '
        'own, which keeps what it frees; the temporaries are those of all devices. Floor: those of '
        'the plain step.'
    )
    harness.report(arguments, harness.wrapped(definition), *tables)


# ------------------------------------------------------------------------------------ variance


def _estimators() -> dict[str, Callable[..., Any]]:
    sensitivity = regularizers.activation_sensitivity
    jacobian = regularizers.jacobian
    return {
        'sensitivity, tangent': sensitivity(estimator='tangent'),
        'sensitivity, tangent, 4 draws': sensitivity(estimator='tangent', samples=4),
        'sensitivity, cotangent': sensitivity(estimator='cotangent'),
        'sensitivity, cotangent, 4 draws': sensitivity(estimator='cotangent', samples=4),
        'sensitivity, neuron sampling': sensitivity(estimator='neuron_sampling'),
        'sensitivity, neuron sampling, 4 neurons': sensitivity(
            estimator='neuron_sampling', samples=4
        ),
        'sensitivity, finite difference': sensitivity(estimator='finite_difference'),
        'Jacobian, 1 projection': jacobian(projections=1),
        'Jacobian, 3 projections': jacobian(projections=3),
        'Jacobian, forward probe': jacobian(projections=1, probe='input'),
        'Jacobian, 3 forward probes': jacobian(projections=3, probe='input'),
        'Jacobian, exact': jacobian(projections=-1),
    }


def _variance(arguments: argparse.Namespace) -> None:
    mesh = harness.start_jax(arguments.batch_size)
    network = NETWORKS[arguments.networks[0]]
    module = make_module(network)
    forward = LinenForward(module, {'train': False})
    state, *_ = _initial_state(network, mesh)
    random = np.random.default_rng(0)
    shape = data.info(network.dataset).image_shape
    x = parallel.shard(mesh, random.random((arguments.batch_size, *shape), np.float32))
    y = parallel.shard(mesh, random.integers(0, 10, arguments.batch_size, np.int32))
    params = state.variables['params']
    rest = {name: value for name, value in state.variables.items() if name != 'params'}

    def value_and_gradient(regularizer: Any) -> Callable[[jax.Array], Any]:
        def penalty(params: Any, key: jax.Array) -> jax.Array:
            return regularizer(forward, {**rest, 'params': params}, x, y, key)[0]

        # As in a training step.
        return jax.jit(jax.value_and_grad(with_fast_input_gradients(penalty)))

    units, values, gradients, temporary = {}, {}, {}, {}
    for name, regularizer in _estimators().items():
        run = value_and_gradient(regularizer)
        found = [run(params, jax.random.key(seed)) for seed in range(arguments.draws)]
        values[name] = np.array([float(value) for value, _ in found])
        flat = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
            for _, gradient in found
        ]
        gradients[name] = np.stack(flat)
        units[name] = functools.partial(_blocked, run, params)
        temporary[name] = harness.temporary_memory(mesh, run, params, jax.random.key(0))

    def fit(params: Any, key: jax.Array) -> jax.Array:
        del key
        logits = forward({**rest, 'params': params}, x)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    fitted = jax.jit(jax.value_and_grad(with_fast_input_gradients(fit)))
    units[_FIT] = functools.partial(_blocked, fitted, params)
    measured = harness.alternate(units, rounds=arguments.rounds)
    rows, points = [], {}
    for name in gradients:
        milliseconds = 1000 * measured.summary(name).median
        variance = gradients[name].var(0, ddof=1).sum()
        # The mean of few draws is longer than what they estimate, by a part of their variance.
        square = (gradients[name].mean(0) ** 2).sum() - variance / len(gradients[name])
        spread = np.sqrt(variance / square) if square > 0 else float('inf')
        relative = values[name].std(ddof=1) / values[name].mean()
        points[name] = (milliseconds, spread)
        rows.append(
            (
                name,
                f'{milliseconds:.0f}',
                f'{temporary[name]:.0f}',
                f'{values[name].mean():.4g}',
                '0' if relative < 1e-5 else f'{relative:.2%}'.replace('%', ' %'),
                '0' if spread < 1e-4 else f'{100 * spread:.0f} %',
                '-' if spread < 1e-4 else f'{milliseconds * spread**2:.0f}',
                harness.percent(measured.share(name, measured.seconds[_FIT])),
            )
        )
    header = (
        'Estimator',
        'ms',
        'temporary MiB',
        'mean',
        'spread of the value',
        'of the gradient',
        'ms x spread squared',
        'share of floor',
    )
    definition = (
        f'{arguments.networks[0]}, one batch of {arguments.batch_size}, {arguments.draws} draws. '
        'Floor: the value and gradient of the cross-entropy of the same batch. The mean of N draws '
        'spreads by sqrt(N) less in N times the time: of estimators the one with the smallest '
        'product of time and squared spread is the best.'
    )
    if arguments.plot:
        harness.save_figure(_scatter(points), arguments.plot)
    harness.report(
        arguments,
        harness.wrapped(definition),
        harness.markdown_table(header, rows),
        measurements={'variance': measured},
    )


def _blocked(run: Callable[..., Any], params: Any) -> None:
    jax.block_until_ready(run(params, jax.random.key(0)))


def _scatter(points: Mapping[str, tuple[float, float]]) -> Figure:
    """Spread of the gradient against the time it takes, one panel per quantity."""
    figure = Figure(figsize=(2 * plots.PANEL, 4.2), layout='constrained')
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, ('sensitivity', 'Jacobian')):
        chosen = {name: point for name, point in points.items() if name.startswith(quantity)}
        for place, (name, (cost, spread)) in enumerate(chosen.items()):
            color = plots.COLORS[place % len(plots.COLORS)]
            marker = 'os^'[place // len(plots.COLORS) % 3]
            label = name.partition(', ')[2]
            axes.scatter(cost, 100 * spread, color=color, marker=marker, label=label)
        axes.set_xlabel('value and gradient of a batch (ms)')
        axes.set_ylabel('spread of the gradient, relative (%)')
        axes.set_title(quantity)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        # The mean of more draws of one estimator moves along such a line.
        times = np.linspace(axes.get_xlim()[1] / 100, axes.get_xlim()[1], 100)
        top = axes.get_ylim()[1]
        finite = [(cost, spread) for cost, spread in chosen.values() if np.isfinite(spread)]
        for work in {round(cost * spread**2) for cost, spread in finite} - {0}:
            line = 100 * np.sqrt(work / times)
            shown = line <= top
            axes.plot(times[shown], line[shown], ':', color='0.8', linewidth=1, zorder=0)
        axes.legend(frameon=False, fontsize=8)
        plots.style(axes)
    return figure


_SUBJECTS = {'steps': _steps, 'memory': _memory, 'variance': _variance}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=_SUBJECTS)
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument('--batch_size', type=int, default=128, help='images per step')
    parser.add_argument('--draws', type=int, default=30, help='draws of each estimator')
    parser.add_argument('--plot', default='', help='PNG file of variance or steps')
    harness.add_arguments(parser, rounds=5)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    _SUBJECTS[arguments.subject](arguments)


if __name__ == '__main__':
    main()
