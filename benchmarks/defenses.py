"""What defences are worth on published networks, against attacks that know them.

    python -m benchmarks.defenses SUBJECT --weights DIR --data_dir DIR --output DIR [--networks ...]
        [--plot FILE]

SUBJECT is one of

    defended    inverse perturbation, compress/amplify and pruning: static and adaptive attacks
    curves      accuracy against the size of inverse perturbation, the strength of compress/amplify
                and the number of pruned neurons
    fragile     fragile and robust first filters, and whether FGSM targets them

Attacks on what a curve shows are made anew on every rescaled or pruned model. Every part is kept in
the output folder, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from benchmarks import harness, published
from neurosens import config, data, evaluation, parallel
from neurosens.defenses import inverse_perturbation, pruning, rescaling
from neurosens.evaluation import plots

BATCH_SIZE = 128
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURES = ('scaled_sensitivity', 'sensitivity', 'ablation')
ORDERS = ('most', 'least', 'random')
INVERSE = 'inverse_perturbation'


class Setting(NamedTuple):
    """How a network is attacked and defended.

    Attributes:
        eps: linf radii.
        images: test images of the evaluation of defences.
        attacks: made on the undefended and on the defended model.
        steps: of PGD and Auto-PGD.
        queries: of Square.
        curve_images: test images of a point of a curve.
        front: layer behind whose neurons inverse perturbation stands.
        first: first layer, behind its nonlinearity, and the one with its kernel.
        rho: sizes of moves.
        prune: numbers of pruned neurons of the last layer's input.
    """

    eps: tuple[float, ...]
    images: int
    attacks: tuple[str, ...]
    steps: int
    queries: int
    curve_images: int
    front: str
    first: tuple[str, str]
    rho: tuple[float, ...]
    prune: tuple[int, ...]


_MNIST = Setting(
    (0.1, 0.3),
    128,
    ('fgsm', 'pgd', 'apgd', 'apgd_dlr', 'square'),
    50,
    1000,
    512,
    'act2',
    ('act1', 'conv1'),
    (0.01, 0.03, 0.1, 0.3),
    (0, 10, 25, 50, 100, 150),
)
SETTINGS = {
    'lenet5': _MNIST,
    'lenet5_robust': _MNIST,
    'resnet20': Setting(
        (0.5 / 255, 2 / 255),
        64,
        ('fgsm', 'pgd', 'apgd', 'apgd_dlr', 'square'),
        20,
        1000,
        128,
        'head:in',
        ('act1', 'conv1'),
        (0.001, 0.003, 0.01, 0.03),
        (0, 4, 8, 16, 32, 48),
    ),
}


class Problem(NamedTuple):
    """A network on its devices, with its data.

    Attributes:
        name: of the network.
        setting: how it is attacked.
        forward: the network.
        variables: replicated.
        train: benign images for calibration.
        test: images to attack.
        mesh: devices.
    """

    name: str
    setting: Setting
    forward: Any
    variables: Any
    train: data.Source
    test: data.Source
    mesh: jax.sharding.Mesh


def load(name: str, arguments: argparse.Namespace, mesh: jax.sharding.Mesh) -> Problem:
    """Loads a network and its data."""
    network = published.load(name, arguments.weights)
    variables = parallel.replicate(mesh, network.variables)
    train, test = (
        data.open(network.data_set, split, arguments.data_dir, 0) for split in ('train', 'test')
    )
    return Problem(name, SETTINGS[name], network.forward, variables, train, test, mesh)


def _calibrated(problem: Problem, settings: config.Defense) -> Any:
    return evaluation.calibrate_defense(
        problem.forward,
        problem.variables,
        problem.train,
        problem.mesh,
        settings,
        jax.random.key(0),
        batch_size=BATCH_SIZE,
    )


# ------------------------------------------------------------------------------------- defended


def defended(problem: Problem, folder: pathlib.Path) -> str:
    """Evaluates each defence with static and adaptive attacks; returns a Markdown table."""
    setting = problem.setting
    few = setting.prune[1]
    options: dict[str, dict[str, Any]] = {
        INVERSE: {'layers': (setting.front,), 'rho': setting.rho},
        'rescaling': {'layer': setting.first[0], 'strength': 0.5},
        'pruning': {'count': few},
    }
    rows = []
    for name, chosen in options.items():
        facts = _kept(
            folder / f'{problem.name}_{name}.json',
            lambda name=name, chosen=chosen: _defended(problem, name, chosen, folder),
        )
        for eps in setting.eps:
            threat = f'linf-{eps:.3g}'
            pgd = f'defense/success_rate/pgd-{threat}'
            cells = (
                facts['defense/undefended/clean_accuracy'],
                facts['defense/clean_accuracy'],
                facts[f'defense/worst/undefended-{threat}'],
                facts[f'defense/worst/static-{threat}'],
                facts.get(pgd),
                facts[f'defense/worst/all-{threat}'],
            )
            cost = f'{facts["defense/relative_cost"]:.1f}'
            shown = [_percent(cell) for cell in cells]
            shown[4] += f' of {facts[f"{pgd}/fooled"]}'
            rows.append((name, threat, *shown, cost))
    header = (
        'Defence',
        'threat',
        'clean, undefended',
        'clean',
        'undefended, all attacks',
        'the same images, defended',
        'recovered of PGD',
        'all attacks on the defence',
        'cost',
    )
    return harness.markdown_table(header, rows)


def _percent(share: float | None) -> str:
    return '-' if share is None else f'{100 * share:.1f}'


def _defended(
    problem: Problem, name: str, options: dict[str, Any], folder: pathlib.Path
) -> dict[str, Any]:
    settings = config.Defense(
        name=name,
        options=options,
        attacks=(),
        surrogates=('straight_through', 'soft'),
        surrogate_attacks=('pgd', 'apgd_dlr'),
    )
    parameters = _calibrated(problem, settings)
    report = evaluation.evaluate_defense(
        problem.forward,
        problem.variables,
        problem.test,
        problem.mesh,
        config.Evaluation(
            batch_size=BATCH_SIZE,
            limit=problem.setting.images,
            attacks=problem.setting.attacks,
            eps=problem.setting.eps,
            steps=problem.setting.steps,
            auto_steps=problem.setting.steps,
            queries=problem.setting.queries,
            masking_images=64,
        ),
        settings,
        jax.random.key(0),
        parameters=parallel.replicate(problem.mesh, parameters),
    )
    print(f'\n{problem.name}\n{evaluation.defense_table(report)}', flush=True)
    evaluation.write_defense(report, folder / f'{problem.name}_{name}')
    return evaluation.defense_facts(report)


# --------------------------------------------------------------------------------------- curves


def curves(problem: Problem, folder: pathlib.Path) -> str:
    """Moves, rescales and prunes by degrees; returns a Markdown table."""
    found = _kept(_curve_file(folder, problem.name), lambda: _curves(problem))
    rows = [
        (name, degree, *(_percent(values[kind]) for kind in ('clean', 'fgsm', 'pgd', 'apgd')))
        for name, by_degree in found.items()
        for degree, values in by_degree.items()
    ]
    eps = problem.setting.eps[0]
    return harness.markdown_table(
        ('Change', 'degree', 'clean %', f'FGSM {eps:.3g}', 'PGD-20', 'APGD-DLR'), rows
    )


def _curve_file(folder: pathlib.Path, network: str) -> pathlib.Path:
    return folder / f'{network}_curves.json'


def _curves(problem: Problem) -> dict[str, dict[str, dict[str, float]]]:
    setting = problem.setting
    changed: dict[str, dict[str, Any]] = {}
    options = {'layers': (setting.front,), 'rho': setting.rho}
    moving = _calibrated(problem, config.Defense(name=INVERSE, options=options))
    for rho in (0.0, *setting.rho):
        # Directions do not depend on how far images are moved along them.
        chosen = dataclasses.replace(moving.settings, rho=(rho,))
        parameters = dataclasses.replace(moving, settings=chosen)
        changed.setdefault('inverse perturbation', {})[f'{rho:g}'] = inverse_perturbation.apply(
            parallel.replicate(problem.mesh, parameters), problem.forward
        )
    report = _measure(problem, setting.first[0], ('ablation',))
    assert report.clean is not None
    for strength in STRENGTHS:
        rescaled = rescaling.calibrate(
            report.clean.accuracy,
            settings=rescaling.Settings(layer=setting.first[0], strength=strength),
        )
        changed.setdefault('compress/amplify', {})[f'{strength:g}'] = rescaling.apply(
            rescaled, problem.forward
        )
    last = _measure(problem, 'head:in', ('sensitivity', 'ablation'))
    for measure in MEASURES:
        for order in ORDERS if measure == MEASURES[0] else ORDERS[:2]:
            label = order if order == 'random' else f'{order} {measure}'
            for count in setting.prune:
                pruned = pruning.calibrate(
                    evaluation.pruning_scores(last, measure),
                    settings=pruning.Settings(count=count, order=order),
                )
                changed.setdefault(f'prune {label}', {})[str(count)] = pruning.apply(
                    pruned, problem.forward
                )
    return {
        name: {degree: _accuracies(problem, model) for degree, model in by_degree.items()}
        for name, by_degree in changed.items()
    }


def _measure(problem: Problem, layer: str, measures: tuple[str, ...]) -> evaluation.LayerReport:
    report = evaluation.measure_neurons(
        problem.forward,
        problem.variables,
        problem.train,
        problem.mesh,
        config.Neurons(measures=measures, layers=(layer,), limit=1000, batch_size=BATCH_SIZE),
        jax.random.key(0),
        split='train',
        eps=problem.setting.eps[0],
    )
    return report.layers[0]


def _accuracies(problem: Problem, model: Any) -> dict[str, float]:
    """Clean and under attacks made on the model itself."""
    report = evaluation.evaluate(
        model,
        problem.variables,
        problem.test,
        problem.mesh,
        config.Evaluation(
            batch_size=BATCH_SIZE,
            limit=problem.setting.curve_images,
            attacks=('fgsm', 'pgd', 'apgd_dlr'),
            eps=problem.setting.eps[:1],
            steps=20,
            auto_steps=20,
            masking_images=0,
        ),
        jax.random.key(0),
    )
    found = {'clean': report.predictions.accuracy}
    for outcome in report.outcomes:
        name = {'apgd_dlr': 'apgd'}.get(outcome.attack, outcome.attack)
        found[name] = float(1 - outcome.attacked.success.mean())
    return found


def curve_figure(networks: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Figure:
    """Accuracy against degree, clean and attacked.

    Args:
        networks: by name, what `curves` found by change, degree and kind of accuracy.

    Returns:
        A row of three panels for each network.
    """
    figure = Figure(figsize=(13, 0.4 + 3.4 * len(networks)), layout='constrained')
    rows = figure.subplots(len(networks), 3, sharey=True, squeeze=False)
    strokes = {'clean': '-', 'fgsm': ':', 'pgd': '--', 'apgd': '-.'}
    for panels, (network, found) in zip(rows, networks.items()):
        pruned = [name for name in found if name.startswith('prune')]
        for axes, chosen, label in zip(
            panels,
            (['inverse perturbation'], ['compress/amplify'], pruned),
            (
                'inverse perturbation: size of the move rho, rms per pixel',
                'compress/amplify: strength',
                "pruning: neurons taken from the last layer's input",
            ),
        ):
            for place, name in enumerate(chosen):
                degrees = list(found[name])
                # Sizes of moves are a factor apart.
                moves = axes is panels[0]
                places = list(range(len(degrees)) if moves else map(float, degrees))
                for kind, stroke in strokes.items():
                    values = [100 * values[kind] for values in found[name].values()]
                    axes.plot(places, values, stroke, **_appearance(place), markersize=3)
                if moves:
                    axes.set_xticks(places, degrees)
            axes.set_xlabel(label)
            axes.set_ylim(-2, 102)
            plots.style(axes)
        panels[0].set_ylabel(f'{network}: accuracy (%)')
        eps = SETTINGS[network].eps[0]
        kinds = ('clean', f'FGSM {eps:.3g}', 'PGD', 'Auto-PGD on DLR')
        for kind, stroke in zip(kinds, strokes.values()):
            panels[0].plot([], [], stroke, color='0.3', label=kind)
        for place, name in enumerate(pruned):
            shown = name.removeprefix('prune ').replace('_', ' ')
            panels[2].plot([], [], **_appearance(place), label=shown)
        for axes in (panels[0], panels[2]):
            axes.legend(fontsize=7, framealpha=0.8, edgecolor='none')
    return figure


def _appearance(place: int) -> dict[str, Any]:
    count = len(plots.COLORS)
    return {'color': plots.COLORS[place % count], 'marker': 'os'[place // count % 2]}


# -------------------------------------------------------------------------------------- fragile


def fragile(problem: Problem, folder: pathlib.Path) -> str:
    """Labels the first filters and correlates them with what FGSM targets."""
    found = _kept(folder / f'{problem.name}_fragile.json', lambda: _fragile(problem))
    return harness.markdown_table(('Fact', 'value'), [(k, v) for k, v in found.items()])


def _fragile(problem: Problem) -> dict[str, str]:
    eps = problem.setting.eps[0]
    report = evaluation.measure_neurons(
        problem.forward,
        problem.variables,
        problem.test,
        problem.mesh,
        config.Neurons(
            measures=('ablation', 'targeting'),
            layers=(problem.setting.first[0],),
            limit=2000,
            batch_size=BATCH_SIZE,
        ),
        jax.random.key(0),
        split='test',
        eps=eps,
    )
    facts = evaluation.neuron_facts(report)
    prefix = f'neurons/{problem.setting.first[0]}/'
    return {
        key.removeprefix(prefix): f'{value:.3g}' if isinstance(value, float) else str(value)
        for key, value in facts.items()
        if key.startswith(prefix)
    }


# --------------------------------------------------------------------------------------- common


def _kept(file: pathlib.Path, make: Any) -> dict[str, Any]:
    """What a file holds, or what is made and then held there."""
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


_SUBJECTS = {'defended': defended, 'curves': curves, 'fragile': fragile}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=_SUBJECTS)
    parser.add_argument('--weights', required=True, help='folder of the published weights')
    parser.add_argument('--data_dir', required=True, help='directory of TFDS')
    parser.add_argument('--output', required=True, help='folder of the results')
    parser.add_argument('--networks', nargs='+', default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument('--images', type=int, default=0, help='in place of those of the settings')
    parser.add_argument('--plot', help='where the plot of curves goes')
    harness.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs a subject on every network and prints its tables."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    mesh = harness.start_jax(BATCH_SIZE)
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for name in arguments.networks:
        problem = load(name, arguments, mesh)
        if arguments.images:
            changed = problem.setting._replace(
                images=arguments.images, curve_images=arguments.images
            )
            problem = problem._replace(setting=changed)
        tables += [f'{name}:', _SUBJECTS[arguments.subject](problem, folder)]
    if arguments.subject == 'curves' and arguments.plot:
        found = {
            name: json.loads(_curve_file(folder, name).read_text()) for name in arguments.networks
        }
        plots.save(curve_figure(found), pathlib.Path(arguments.plot))
    harness.report(arguments, *tables)


if __name__ == '__main__':
    main()
