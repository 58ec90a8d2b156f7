"""What defences are worth on published networks, against attacks that know them.

    python -m benchmarks.defenses SUBJECT --weights DIR --data_dir DIR --output DIR [--networks ...]
        [--plot FILE]

SUBJECT is one of

    defended    inverse perturbation, compress/amplify and pruning: static and adaptive attacks
    curves      accuracy against the size of inverse perturbation, the strength of compress/amplify
                and the number of pruned neurons
    fragile     fragile and robust first filters, and whether FGSM targets them

Attacks are made anew on everything that a curve shows, on inverse perturbation also along gradients
of surrogates. Every part is kept in the output folder, so that an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from matplotlib.figure import Figure

from benchmarks import harness, published
from neurosens import attacks, config, data, evaluation, parallel
from neurosens.defenses import inverse_perturbation, pruning, rescaling
from neurosens.evaluation import plots
from neurosens.neurons import correlation

BATCH_SIZE = 128
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURES = ('scaled_sensitivity', 'sensitivity', 'ablation')
ORDERS = ('most', 'least', 'random')
_ATTACKS = {'fgsm': 'FGSM', 'pgd': 'PGD', 'apgd_dlr': 'APGD-DLR', 'square': 'Square'}
INVERSE = 'inverse_perturbation'
SURROGATES = ('straight_through', 'soft', 'candidates')
# Of a point of a curve.
_STEPS, _QUERIES = 20, 300
_CHANGES = {'l2': 'l2 norm', 'relative_l2': 'relative l2 norm', 'mean_log': 'mean logarithm'}
# Without a filter a network loses few images of a hundred: fewer would tell no filters apart.
_RESPONSE_IMAGES = 10_000

# From a name and what finds a result to the result, found now or before.
Keep: TypeAlias = Callable[[str, Callable[[], Any]], Any]


class Setting(NamedTuple):
    """How a network is attacked and defended.

    Attributes:
        eps: linf radii.
        images: test images of the evaluation of defences.
        attacks: made on the undefended and on the defended model.
        steps: of PGD, Auto-PGD and FAB.
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
    ('fgsm', 'pgd', 'apgd', 'apgd_dlr', 'square', 'autoattack'),
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
        ('fgsm', 'pgd', 'apgd', 'apgd_dlr', 'square', 'autoattack'),
        20,
        1000,
        128,
        'head:in',
        ('act1', 'conv1'),
        (0.001, 0.003, 0.01, 0.03),
        (0, 4, 8, 16, 32, 48),
    ),
}


class Table(NamedTuple):
    """A table of a report.

    Attributes:
        header: names of the columns.
        rows: their cells.
    """

    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]


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


def defended(problem: Problem, folder: pathlib.Path) -> list[Table]:
    """Evaluates each defence with static and adaptive attacks."""
    setting = problem.setting
    few = setting.prune[1]
    defences = (
        config.Defense(name=INVERSE, options={'layers': (setting.front,), 'rho': setting.rho}),
        config.Defense(
            name='rescaling',
            options={'layer': setting.first[0], 'strength': 0.5},
            images=_RESPONSE_IMAGES,
        ),
        config.Defense(name='pruning', options={'count': few}, measure=MEASURES[0]),
    )
    rows: list[Sequence[str]] = []
    moves: list[Table] = []
    for defence in defences:
        defence = dataclasses.replace(
            defence, attacks=(), surrogates=SURROGATES, surrogate_attacks=('pgd', 'apgd_dlr')
        )
        facts = harness.kept(
            folder,
            f'{problem.name}_{defence.name}',
            (setting, defence),
            lambda defence=defence: _defended(problem, defence, folder),
        )
        rows += [_row(problem.name, defence.name, eps, facts) for eps in setting.eps]
        if defence.name == INVERSE:
            moves = [_along(problem, facts), *_moves(problem, facts)]
    header = (
        'Network',
        'defence',
        'eps',
        'clean, undefended',
        'clean',
        'undefended',
        'the same images, defended',
        'recovered of PGD',
        'all attacks on the defence',
        'strongest alone',
        'missed along gradients',
        'warnings of masking, of checks that apply',
        'cost',
    )
    return [Table(header, rows), *moves]


def _row(network: str, name: str, eps: float, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What a defence does at one radius."""
    threat = f'linf-{eps:.3g}'
    pgd = f'defense/success_rate/pgd-{threat}'
    least = {
        key.removeprefix('defense/').removesuffix(f'-{threat}'): share
        for key, share in facts.items()
        if key.startswith(('defense/static/', 'defense/adaptive/')) and key.endswith(f'-{threat}')
    }
    strongest = min(least, key=lambda attack: least[attack])
    worst = f'defense/worst/all-{threat}'
    low, high = (_percent(facts[f'{worst}/{end}']) for end in ('low', 'high'))
    return (
        network,
        name.replace('_', ' '),
        f'{eps:.3g}',
        _percent(facts['defense/undefended/clean_accuracy']),
        _percent(facts['defense/clean_accuracy']),
        _percent(facts[f'defense/worst/undefended-{threat}']),
        _percent(facts[f'defense/worst/static-{threat}']),
        f'{_percent(facts.get(pgd))} of {facts[f"{pgd}/fooled"]}',
        f'{_percent(facts[worst])} ({low}-{high})',
        f'{_percent(least[strongest])}, {strongest.replace("_", " ")}',
        f'{facts[f"defense/missed_by_gradients/{threat}"]} of {facts["defense/images"]}',
        _warned(eps, facts),
        f'{facts["defense/relative_cost"]:.1f}',
    )


def _warned(eps: float, facts: Mapping[str, Any]) -> str:
    """Checks for gradient masking that warn at a radius, and how many of them apply."""
    pattern = re.compile(rf'defense/masking/linf-{re.escape(f"{eps:.3g}")}/(\w+)')
    checks = {
        match[1].replace('_', ' '): passed
        for key, passed in facts.items()
        if (match := pattern.fullmatch(key)) and isinstance(passed, bool)
    }
    # Of all of them together.
    checks.pop('passed')
    warned = ', '.join(name for name, passed in checks.items() if not passed)
    return f'{warned or "-"} of {len(checks)}'


def _along(problem: Problem, facts: Mapping[str, Any]) -> Table:
    """The least that attacks along each gradient leave of inverse perturbation, by radius."""
    kinds = {
        'its own': r'(fgsm|pgd|apgd|apgd_dlr)',
        'its own, AutoAttack': 'autoattack',
        'straight through': r'\w+_straight_through',
        'soft choices': r'\w+_soft',
        'single candidates': r'\w+_candidate_\d+',
    }
    rows = []
    for kind, pattern in kinds.items():
        cells = []
        for eps in problem.setting.eps:
            key = re.compile(rf'defense/adaptive/{pattern}-linf-{re.escape(f"{eps:.3g}")}')
            left = [share for name, share in facts.items() if key.fullmatch(name)]
            cells.append(_percent(min(left, default=None)))
        rows.append((kind, *cells))
    radii = (f'{eps:.3g}' for eps in problem.setting.eps)
    return Table((f'{problem.name}: left along gradients', *radii), rows)


def _moves(problem: Problem, facts: Mapping[str, Any]) -> list[Table]:
    """What moves recover, and how the attack changes front, middle and tail neurons."""
    recovered: dict[tuple[str, str], dict[str, str]] = {}
    shifts: dict[str, dict[str, str]] = {}
    for key, value in facts.items():
        kind, *rest = key.removeprefix('defense/').split('/')
        if kind == 'control':
            attack, move, size = rest
            recovered.setdefault((attack, move), {})[size] = _percent(value)
        elif kind in ('shift', 'noise_shift'):
            attack, *_, group = rest
            made = attack if kind == 'shift' else f'noise of the size of {attack}'
            shifts.setdefault(made, {})[group] = '-' if value is None else f'{value:+.2f}'
    sizes = [f'{size:g}' for size in problem.setting.rho]
    header = ('Fooled by', f'{problem.name}: a move along', *(f'rho {size}' for size in sizes))
    rows = [(*names, *(found[size] for size in sizes)) for names, found in recovered.items()]
    groups = ('front', 'middle', 'tail')
    changes = [(attack, *(found[group] for group in groups)) for attack, found in shifts.items()]
    title = f'{problem.name}: mean change of a neuron under'
    return [Table(header, rows), Table((title, *groups), changes)]


def _percent(share: float | None) -> str:
    return '-' if share is None else f'{100 * share:.1f}'


def _defended(problem: Problem, settings: config.Defense, folder: pathlib.Path) -> dict[str, Any]:
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
    evaluation.write_defense(report, folder / f'{problem.name}_{settings.name}')
    return evaluation.defense_facts(report)


# --------------------------------------------------------------------------------------- curves


def curves(problem: Problem, folder: pathlib.Path) -> list[Table]:
    """Moves, rescales and prunes by degrees."""
    found = found_curves(problem, folder)
    kinds = ('clean', *_ATTACKS, 'worst')
    rows = [
        (name, degree, *(_percent(values[kind]) for kind in kinds))
        for name, by_degree in found.items()
        for degree, values in by_degree.items()
    ]
    eps = problem.setting.eps[0]
    header = (f'{problem.name}, linf {eps:.3g}', 'degree', 'clean %', *_ATTACKS.values(), 'all')
    return [Table(header, rows)]


def found_curves(problem: Problem, folder: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies by change, degree and attack."""
    settings = (
        problem.setting,
        _STEPS,
        _QUERIES,
        STRENGTHS,
        MEASURES,
        ORDERS,
        _ATTACKS,
        _RESPONSE_IMAGES,
    )

    def keep(name: str, make: Callable[[], Any]) -> Any:
        return harness.kept(folder, f'{problem.name}_curves{name}', settings, make)

    return keep('', lambda: _curves(problem, _changed(problem), keep))


class Changed(NamedTuple):
    """A network that a defence changes to some degree.

    Attributes:
        model: the changed network.
        surrogates: whose gradients attacks follow besides its own, by name.
    """

    model: Any
    surrogates: Mapping[str, Any] = {}


def _curves(
    problem: Problem, changed: Mapping[str, Mapping[str, Changed]], keep: Keep
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies of all, those of each model kept on their own, should the run be stopped."""

    def accuracies(name: str, degree: str, of: Changed) -> dict[str, float]:
        label = re.sub(r'\W+', '_', f' {name} {degree}')
        return keep(label, lambda: _accuracies(problem, of.model, of.surrogates))

    # Nothing moved, rescaled or pruned is the same model for all.
    unchanged = {'0': accuracies('unchanged', '0', Changed(problem.forward))}
    return {
        name: unchanged | {degree: accuracies(name, degree, of) for degree, of in by_degree.items()}
        for name, by_degree in changed.items()
    }


def _changed(problem: Problem) -> dict[str, dict[str, Changed]]:
    """The changed networks by change and degree above 0."""
    setting = problem.setting
    changed: dict[str, dict[str, Changed]] = {}
    options = {'layers': (setting.front,), 'rho': setting.rho}
    moving = _calibrated(problem, config.Defense(name=INVERSE, options=options))
    for rho in setting.rho:
        # Directions do not depend on how far images are moved along them.
        chosen = dataclasses.replace(moving.settings, rho=(rho,))
        parameters = dataclasses.replace(moving, settings=chosen)
        parameters = parallel.replicate(problem.mesh, parameters)
        model = inverse_perturbation.apply(parameters, problem.forward)
        adaptive = inverse_perturbation.adaptive(parameters, problem.forward)
        through = {name: adaptive[name] for name in SURROGATES[:2]}
        changed.setdefault('inverse perturbation', {})[f'{rho:g}'] = Changed(model, through)
    report = _measure(problem, setting.first[0], ('ablation',), _RESPONSE_IMAGES)
    assert report.clean is not None
    for strength in STRENGTHS[1:]:
        rescaled = rescaling.calibrate(
            report.clean.accuracy,
            settings=rescaling.Settings(layer=setting.first[0], strength=strength),
        )
        model = rescaling.apply(rescaled, problem.forward)
        changed.setdefault('compress/amplify', {})[f'{strength:g}'] = Changed(model)
    last = _measure(problem, 'head:in', ('sensitivity', 'ablation'))
    for measure in MEASURES:
        for order in ORDERS if measure == MEASURES[0] else ORDERS[:2]:
            label = order if order == 'random' else f'{order} {measure}'
            for count in setting.prune[1:]:
                pruned = pruning.calibrate(
                    evaluation.pruning_scores(last, measure),
                    settings=pruning.Settings(count=count, order=order),
                )
                model = pruning.apply(pruned, problem.forward)
                changed.setdefault(f'prune {label}', {})[str(count)] = Changed(model)
    return changed


def _measure(
    problem: Problem, layer: str, measures: tuple[str, ...], images: int = 1000
) -> evaluation.LayerReport:
    report = evaluation.measure_neurons(
        problem.forward,
        problem.variables,
        problem.train,
        problem.mesh,
        config.Neurons(measures=measures, layers=(layer,), limit=images, batch_size=BATCH_SIZE),
        jax.random.key(0),
        split='train',
        eps=problem.setting.eps[0],
    )
    return report.layers[0]


def _accuracies(problem: Problem, model: Any, surrogates: Mapping[str, Any]) -> dict[str, float]:
    """Clean, under attacks made on the model itself, and under the worst for each image."""

    def report(of: Any, names: Sequence[str]) -> evaluation.RobustnessReport:
        return evaluation.evaluate(
            of,
            problem.variables,
            problem.test,
            problem.mesh,
            config.Evaluation(
                batch_size=BATCH_SIZE,
                limit=problem.setting.curve_images,
                attacks=tuple(names),
                eps=problem.setting.eps[:1],
                steps=_STEPS,
                auto_steps=_STEPS,
                queries=_QUERIES,
                masking_images=0,
            ),
            jax.random.key(0),
        )

    (eps,) = problem.setting.eps[:1]
    exact = report(model, list(_ATTACKS))
    found = {'clean': exact.predictions.accuracy}
    for outcome in exact.outcomes:
        found[outcome.attack] = float(1 - outcome.attacked.success.mean())
    worst = exact.worst_case(eps)
    for surrogate in surrogates.values():
        through = attacks.with_gradients_of(model, surrogate)
        worst &= report(through, ('pgd', 'apgd_dlr')).worst_case(eps)
    return {**found, 'worst': float(worst.mean())}


def curve_figure(networks: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Figure:
    """Accuracy against degree, clean and attacked.

    Args:
        networks: by name, what `curves` found by change, degree and kind of accuracy.

    Returns:
        A row of three panels for each network.
    """
    figure = Figure(figsize=(13, 0.4 + 3.4 * len(networks)), layout='constrained')
    rows = figure.subplots(len(networks), 3, sharey=True, squeeze=False)
    strokes = {'clean': '-', 'fgsm': ':', 'pgd': '--', 'worst': '-.'}
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
        kinds = ('clean', f'FGSM {eps:.3g}', 'PGD', 'worst of all attacks')
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


def fragile(problem: Problem, folder: pathlib.Path) -> list[Table]:
    """Labels the first filters and correlates them with what FGSM targets."""
    (eps,) = problem.setting.eps[:1]
    facts = harness.kept(folder, f'{problem.name}_fragile', eps, lambda: _fragile(problem))
    agreements = (facts[f'agreement_of_{kind}'] for kind in ('accuracy', 'loss'))
    row = (
        problem.name,
        f'{eps:.3g}',
        f'{facts["filters"]}, {facts["fragile"]}',
        f'{100 * facts["response"]:+.3f}',
        f'{100 * facts["response_attacked"]:+.3f}',
        *(f'{agreement:+.2f}' for agreement in agreements),
    )
    header = (
        'Network',
        'eps',
        'filters, fragile',
        'mean d_k, %',
        'attacked',
        'd_k, clean and attacked',
        'loss, clean and attacked',
    )
    targeting = (
        'FGSM and fragility',
        "change of a filter's map",
        'mean (p)',
        'controlled (p)',
        'histogram (p)',
        'controlled (p)',
    )
    kinds = ('score_correlation', 'score_partial', 'histogram_correlation', 'histogram_partial')
    rows = [
        (problem.name, label, *(_with_p(facts, f'targeting_{score}_{kind}') for kind in kinds))
        for score, label in _CHANGES.items()
    ]
    return [Table(header, [row]), Table(targeting, rows)]


def _with_p(facts: Mapping[str, Any], name: str) -> str:
    value, p_value = facts.get(name), facts.get(f'{name}_p')
    return '-' if value is None else f'{value:+.2f} ({p_value:.2g})'


def _fragile(problem: Problem) -> dict[str, Any]:
    eps = problem.setting.eps[0]
    report = evaluation.measure_neurons(
        problem.forward,
        problem.variables,
        problem.test,
        problem.mesh,
        config.Neurons(
            measures=('ablation', 'targeting'),
            layers=(problem.setting.first[0],),
            limit=_RESPONSE_IMAGES,
            batch_size=BATCH_SIZE,
        ),
        jax.random.key(0),
        split='test',
        eps=eps,
    )
    facts = evaluation.neuron_facts(report)
    prefix = f'neurons/{problem.setting.first[0]}/'
    (layer,) = report.layers
    assert layer.fragility is not None and layer.clean is not None and layer.attacked is not None
    pairs = {
        'accuracy': (layer.clean.accuracy, layer.attacked.accuracy),
        'loss': (layer.clean.loss, layer.attacked.loss),
    }
    agreement = {
        f'agreement_of_{name}': correlation.spearman(*pair) for name, pair in pairs.items()
    }
    of_layer = {key.removeprefix(prefix): facts[key] for key in facts if key.startswith(prefix)}
    means = {
        'response': float(layer.clean.accuracy.mean()),
        'response_attacked': float(layer.attacked.accuracy.mean()),
    }
    return {**of_layer, **agreement, **means, 'filters': len(layer.fragility.fragile)}


# --------------------------------------------------------------------------------------- common


def merged(tables: Sequence[Table]) -> list[str]:
    """Tables as Markdown, those of equal columns as one, in the order of the first of each."""
    rows: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for table in tables:
        rows.setdefault(table.header, []).extend(table.rows)
    return [harness.markdown_table(header, found) for header, found in rows.items()]


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
    parser.add_argument('--plot', help='where the plot of curves or of changed neurons goes')
    harness.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    if parsed.subject == 'defended' and parsed.plot and len(parsed.networks) != 1:
        parser.error('the plot of changed neurons is of one network; give --networks one name.')
    return parsed


def _copy_shifts(folder: pathlib.Path, plot: pathlib.Path) -> None:
    """Copies the picture of changed neurons, which is not drawn where no image was fooled."""
    picture = folder / 'defense_shifts.png'
    if picture.exists():
        plot.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, plot)


def main() -> None:
    """Runs a subject on every network and prints its tables."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    mesh = harness.start_jax(BATCH_SIZE)
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    tables: list[Table] = []
    drawn = {}
    for name in arguments.networks:
        problem = load(name, arguments, mesh)
        if arguments.images:
            changed = problem.setting._replace(
                images=arguments.images, curve_images=arguments.images
            )
            problem = problem._replace(setting=changed)
        tables += _SUBJECTS[arguments.subject](problem, folder)
        if arguments.subject == 'curves' and arguments.plot:
            drawn[name] = found_curves(problem, folder)
    if drawn:
        harness.save_figure(curve_figure(drawn), arguments.plot)
    harness.report(arguments, *merged(tables))
    if arguments.subject == 'defended' and arguments.plot:
        _copy_shifts(folder / f'{arguments.networks[0]}_{INVERSE}', pathlib.Path(arguments.plot))


if __name__ == '__main__':
    main()
