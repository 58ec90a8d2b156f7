"""What regularizers and adversarial objectives cost in training, against plain steps and PyTorch.

    python -m benchmarks.regularizers steps [--rounds N] [--networks NAME ...]
    python -m benchmarks.regularizers memory [--networks NAME ...]
    python -m benchmarks.regularizers variance --plot PATH [--rounds N]

`steps` times training steps with each term against the plain step of the same network and batch,
and against the same term in PyTorch by double backpropagation, all in turns. `memory` measures the
peak of a process that takes such steps, each in a process of its own. `variance` compares the
estimators of activation sensitivity and of the Jacobian: their spread against their cost.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness
from neurosens import config, data, models, onednn, parallel, regularizers
from neurosens.evaluation import plots
from neurosens.forward import LinenForward
from neurosens.training import objectives, optimizers, step

PGD_STEPS = 7
STEPS = 2
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
        limit: what its step may cost in plain steps.
    """

    objective: tuple[str, dict[str, Any]]
    regularizer: tuple[str, dict[str, Any]] | None
    limit: float


_PLAIN: tuple[str, dict[str, Any]] = ('standard', {})
TERMS = {
    'plain': Term(_PLAIN, None, 1.0),
    'T1 + T2': Term(_PLAIN, ('neuron_contribution', {'shared': ('head:in',)}), 1.1),
    'activation sensitivity': Term(_PLAIN, ('activation_sensitivity', {}), 2.2),
    'Jacobian': Term(_PLAIN, ('jacobian', {'projections': 1}), 2.5),
    'both in one pass': Term(_PLAIN, ('sensitivity_and_jacobian', {}), 2.7),
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


def _training_unit(name: str, term: Term, mesh: jax.sharding.Mesh, batch_size: int) -> harness.Unit:
    network = NETWORKS[name]
    state, optimizer, schedule = _initial_state(network, mesh)
    objective, options = term.objective
    if objective != 'standard':
        options = {**options, 'eps': network.eps}
    terms = []
    if term.regularizer is not None:
        options_of = dict(term.regularizer[1])
        shared = options_of.pop('shared', ())
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
    key = parallel.replicate(mesh, jax.random.key(1))
    stream = itertools.cycle([parallel.shard(mesh, batch) for batch in noise(network, batch_size)])

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
        peak: run the first term and note the peak of the process in MiB.

    Returns:
        A unit of a few training steps per term.
    """
    parallel.keep_freed_memory()
    parallel.use_cpu_devices(parallel.cpu_device_count(batch_size))
    onednn.use_onednn()
    mesh = parallel.data_mesh()
    units = {term: _training_unit(name, TERMS[term], mesh, batch_size) for term in terms}
    details = peak_of(units[terms[0]]) if peak else {}
    return harness.Prepared(units, {**details, 'devices': mesh.size})


def peak_of(unit: harness.Unit) -> dict[str, float]:
    """The peak of this process in MiB while a unit runs that has run already; Linux only."""
    unit()
    # From here on the peak counts anew: what compiling took is left out.
    pathlib.Path('/proc/self/clear_refs').write_text('5')
    for _ in range(3):
        unit()
    status = pathlib.Path('/proc/self/status').read_text()
    (line,) = (line for line in status.splitlines() if line.startswith('VmHWM'))
    return {'peak': int(line.split()[1]) / 1024}


def _steps(arguments: argparse.Namespace) -> dict[str, harness.Measurement]:
    measurements = {}
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
            measured = harness.alternate(units, rounds=arguments.rounds)
        measurements[name] = measured
        rows = []
        for term, known in TERMS.items():
            seconds = measured.summary(term).median / STEPS
            peers = measured.summary(f'PyTorch: {term}').median / STEPS
            rows.append(
                (
                    term,
                    f'{1000 * seconds:.0f}',
                    harness.ratio_text(measured.ratio(term, 'plain')),
                    f'{known.limit:g}',
                    f'{1000 * peers:.0f}',
                    harness.ratio_text(measured.ratio(f'PyTorch: {term}', 'PyTorch: plain')),
                    harness.ratio_text(measured.ratio(f'PyTorch: {term}', term)),
                )
            )
        header = ('Term', 'ms per step', 'in plain steps', 'limit', 'PyTorch, ms')
        header = (*header, 'in its plain steps', 'PyTorch / neurosens')
        print(f'\n{name}, batches of {arguments.batch_size}, {arguments.rounds} rounds:\n')
        print(harness.markdown_table(header, rows), flush=True)
    return measurements


def _memory(arguments: argparse.Namespace) -> dict[str, harness.Measurement]:
    for name in arguments.networks:
        rows = []
        for term in TERMS:
            cells = [term]
            for module in ('regularizers', 'torch_regularizers'):
                options = {
                    'name': name,
                    'terms': [term],
                    'batch_size': arguments.batch_size,
                    'peak': True,
                }
                spec = harness.WorkerSpec(f'benchmarks.{module}:prepare', options)
                with harness.worker(spec) as worker:
                    cells.append(f'{worker.details["peak"]:.0f}')
            rows.append(tuple(cells))
        print(f'\n{name}, batches of {arguments.batch_size}, peak of the process in MiB:\n')
        print(harness.markdown_table(('Term', 'neurosens', 'PyTorch'), rows), flush=True)
    return {}


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
        'sensitivity, neuron sampling, 4': sensitivity(estimator='neuron_sampling', samples=4),
        'sensitivity, finite difference': sensitivity(estimator='finite_difference'),
        'Jacobian, 1 projection': jacobian(projections=1),
        'Jacobian, 3 projections': jacobian(projections=3),
        'Jacobian, forward probe': jacobian(projections=1, probe='input'),
        'Jacobian, 3 forward probes': jacobian(projections=3, probe='input'),
        'Jacobian, exact': jacobian(projections=-1),
    }


def _variance(arguments: argparse.Namespace) -> dict[str, harness.Measurement]:
    parallel.keep_freed_memory()
    parallel.use_cpu_devices(parallel.cpu_device_count(arguments.batch_size))
    onednn.use_onednn()
    mesh = parallel.data_mesh()
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

        return jax.jit(jax.value_and_grad(penalty))

    units, values, gradients = {}, {}, {}
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
        print(f'  {name}', flush=True)
    measured = harness.alternate(units, rounds=arguments.rounds)
    rows, points = [], {}
    for name in units:
        milliseconds = 1000 * measured.summary(name).median
        mean = gradients[name].mean(0)
        spread = np.sqrt(gradients[name].var(0, ddof=1).sum()) / np.linalg.norm(mean)
        relative = values[name].std(ddof=1) / values[name].mean()
        points[name] = (milliseconds, spread)
        rows.append(
            (name, f'{milliseconds:.0f}', f'{values[name].mean():.4g}', f'{relative:.2%}',
             f'{spread:.1%}')
        )  # fmt: skip
    header = ('Estimator', 'ms', 'mean', 'spread of the value', 'of the gradient')
    title = f'{arguments.networks[0]}, one batch of {arguments.batch_size}, {arguments.draws} draws'
    print(f'\n{title}:\n')
    print(harness.markdown_table(header, rows), flush=True)
    if arguments.plot:
        plots.save(_scatter(points), pathlib.Path(arguments.plot))
    return {'variance': measured}


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
        axes.legend(frameon=False, fontsize=8)
        plots.style(axes)
    return figure


_SUBJECTS = {'steps': _steps, 'memory': _memory, 'variance': _variance}


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=_SUBJECTS)
    parser.add_argument('--rounds', type=int, default=5, help='measured rounds')
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument('--batch_size', type=int, default=128, help='images per step')
    parser.add_argument('--draws', type=int, default=30, help='draws of each estimator')
    parser.add_argument('--plot', default='', help='PNG file of variance')
    parser.add_argument('--json', default='', help='file for the timings of every round')
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    harness.run_subject(_SUBJECTS, parse_arguments())


if __name__ == '__main__':
    main()
