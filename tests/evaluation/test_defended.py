"""Evaluations of defences: rates by hand, and reports that agree with fresh computations."""

import csv
import dataclasses
import math
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from neurosens import (
    attacks,
    command_line,
    config,
    data,
    defenses,
    evaluation,
    neurons,
    parallel,
)
from neurosens.defenses import inverse_perturbation, oracles
from neurosens.evaluation import defended as defended_module
from neurosens.evaluation import defense_moves, defense_report
from neurosens.evaluation.html_page import Figure
from neurosens.forward import LinenForward, with_input_transform

EVALUATION = config.Evaluation(
    batch_size=24,
    attacks=('fgsm', 'pgd'),
    eps=(0.05, 0.12),
    steps=3,
    queries=4,
    auto_steps=3,
    masking_images=0,
)


def test_the_success_rate_counts_what_fooled_the_model():
    # Six attacked images: one holds NaN, two never fooled the model, three did, one came back.
    fooled = np.array([True, False, False, True, True, True])
    valid = np.array([False, True, True, True, True, True])
    recovered = np.array([True, True, True, True, False, False])
    assert evaluation.success_rate(fooled, recovered, valid) == pytest.approx(1 / 3)
    assert math.isnan(evaluation.success_rate(np.zeros(3, bool), np.ones(3, bool)))
    with pytest.raises(ValueError, match=r'shapes \[\(1,\), \(3,\)\]; they must be of the same'):
        evaluation.success_rate(np.ones(3, bool), np.ones(1, bool))


class Templates(nn.Module):
    """A linear classifier behind a rectified layer that has the input's own features."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64, use_bias=False, name='hidden')(x.reshape(len(x), -1)))
        return nn.Dense(10, name='head')(h)


@pytest.fixture(scope='module')
def problem():
    """Noisy versions of ten patterns, and the classifier that takes the nearest one."""
    generator = np.random.default_rng(0)
    patterns = 0.3 + 0.4 * generator.random((10, 64))
    labels = np.arange(60, dtype=np.int32) % 10
    noisy = patterns[labels] + 0.1 * generator.normal(size=(60, 64))
    images = np.uint8(255 * np.clip(noisy, 0, 1)).reshape(60, 8, 8, 1)
    source = data.ArrayDataset(images, labels, data.info('digits'))
    variables = {
        'params': {
            'hidden': {'kernel': np.eye(64, dtype=np.float32)},
            'head': {
                'kernel': np.float32(patterns.T),
                'bias': np.float32(-(patterns**2).sum(1) / 2),
            },
        }
    }
    return LinenForward(Templates()), variables, source


def run(
    problem,
    name,
    options,
    devices=8,
    batch_size=24,
    masking_images=0,
    attacked_by=EVALUATION.attacks,
    eps=EVALUATION.eps,
    directory=None,
    ensemble_progress=None,
    attacks=('square',),
    surrogate=None,
    calibration=None,
    **changes,
):
    forward, variables, source = problem
    mesh = parallel.data_mesh(devices)
    variables = parallel.replicate(mesh, variables)
    settings = config.Defense(name=name, options=options, images=0, attacks=attacks, **changes)
    key = jax.random.key(3)
    parameters = evaluation.calibrate_defense(
        forward, variables, source, mesh, settings, key, batch_size=16
    )
    report = evaluation.evaluate_defense(
        forward,
        variables,
        source,
        mesh,
        dataclasses.replace(
            EVALUATION,
            batch_size=batch_size,
            masking_images=masking_images,
            attacks=attacked_by,
            eps=eps,
        ),
        settings,
        key,
        parameters=parallel.replicate(mesh, parameters),
        directory=directory,
        ensemble_progress=ensemble_progress,
        surrogate=surrogate,
        calibration=calibration,
    )
    return parameters, report


INVERSE = {'front': 2, 'tail': 2, 'rho': (0.02, 0.1)}


@pytest.fixture(scope='module')
def inverse(problem):
    surrogates = ('straight_through', 'soft')
    return run(problem, 'inverse_perturbation', INVERSE, surrogates=surrogates)


def test_a_report_agrees_with_fresh_computations(problem, inverse):
    forward, variables, source = problem
    parameters, report = inverse
    x, y = source.images / np.float32(255), source.labels
    defended = inverse_perturbation.apply(parameters, forward)

    def right(model, images):
        return np.asarray(model(variables, images)[0]).argmax(-1) == y

    np.testing.assert_array_equal(report.undefended.correct, right(forward, x))
    np.testing.assert_array_equal(report.defended.correct, right(defended, x))
    outcomes = {outcome.name: outcome for outcome in report.outcomes}
    assert set(outcomes) == {
        *(f'static/{a}-linf-{e}' for a in ('fgsm', 'pgd', 'square') for e in ('0.05', '0.12')),
        *(
            f'adaptive/{a}-linf-{e}'
            for a in ('fgsm', 'pgd', 'square', 'transfer', 'pgd_straight_through', 'pgd_soft')
            for e in ('0.05', '0.12')
        ),
    }
    found = attacks.fgsm(
        forward, variables, x, y, jax.random.key(3), threat=attacks.Threat('linf', 0.12)
    )
    static = outcomes['static/fgsm-linf-0.12']
    np.testing.assert_array_equal(static.fooled, right(forward, x) & ~right(forward, found.x_adv))
    np.testing.assert_array_equal(
        static.success, ~right(defended, found.x_adv) | ~right(defended, x)
    )
    assert static.fooled.any() and not static.fooled.all()
    for eps in EVALUATION.eps:
        worst = report.worst_case(eps)
        for outcome in report.outcomes:
            if outcome.eps == eps:
                assert not (worst & outcome.success).any()
    assert report.passes == inverse_perturbation.passes(parameters) == 5
    assert report.cost > 0


def test_controls_bound_the_defence(problem, inverse):
    _, report = inverse
    assert [moves.attack.split('-')[-1] for moves in report.moves] == ['0.05', '0.12']
    moves = report.moves[-1]
    assert set(moves.controls) == set(oracles.NAMES)
    recovered = {name: by_size[0.1] for name, by_size in moves.controls.items()}
    assert recovered['identity'] == 0
    assert recovered['random'] <= recovered['random, oracle sign']
    assert recovered['true margin, oracle'] == max(recovered.values()) > 0
    axes = defense_report.control_figure(report).axes[0]
    assert len(axes.lines) == len(oracles.NAMES)
    groups = moves.shifts['head:in']
    assert set(groups) == {'front', 'middle', 'tail'}
    # An attack on a linear model lowers what speaks for the class and raises what speaks against.
    assert groups['front'].mean() < 0 < groups['tail'].mean()
    # Noise of its size does neither.
    noise = moves.noise['head:in']
    assert noise['front'].shape == groups['front'].shape
    for group in ('front', 'tail'):
        assert abs(noise[group].mean()) < abs(groups[group].mean()) / 4


def test_noise_is_as_large_as_the_attack():
    generator = np.random.default_rng(0)
    x = np.float32(0.4 + 0.2 * generator.random((3, 5, 5, 1)))
    x_adv = x + np.float32([0.01, 0.02, 0.0])[:, None, None, None]
    noisy = defense_moves._noise_of_size(x, x_adv, jax.random.key(0), jnp.arange(3))
    size = np.sqrt(np.square(noisy - x).sum((1, 2, 3)))
    np.testing.assert_allclose(size, [0.05, 0.1, 0], rtol=1e-5, atol=1e-7)
    alone = defense_moves._noise_of_size(x[1:], x_adv[1:], jax.random.key(0), jnp.arange(1, 3))
    np.testing.assert_array_equal(alone, noisy[1:])
    assert (np.abs(noisy[0] - x[0]) > 0.02).any()


def outcome_of(kind, attack, success, fooled=None):
    flags = [None if value is None else np.array(value, bool) for value in (success, fooled)]
    outcome = evaluation.DefenseOutcome(kind, attack, 'linf', 0.1, *flags)
    return outcome._replace(undefended=flags[1])


def test_of_attacks_that_fool_equally_often_one_along_gradients_is_the_strongest():
    outcomes = [
        outcome_of('static', 'fgsm', [1, 1, 0], [1, 1, 0]),
        outcome_of('static', 'pgd', [1, 0, 1], [1, 0, 1]),
        outcome_of('static', 'apgd', [0, 1, 1], [0, 1, 1]),
        outcome_of('static', 'square', [1, 1, 0], [1, 1, 0]),
        outcome_of('static', 'autoattack', [1, 1, 1], [1, 1, 1]),
        # Its images stop at the boundary.
        outcome_of('static', 'fab', [1, 1, 1], [1, 1, 1]),
    ]
    (found,) = defense_moves.strongest_static(outcomes)
    assert found.attack == 'pgd'
    more = outcome_of('static', 'square', [1, 1, 1], [1, 1, 1])
    (found,) = defense_moves.strongest_static([*outcomes, more])
    assert found is more


def test_images_that_only_attacks_without_gradients_break_are_counted(inverse):
    _, report = inverse
    right = report.defended._replace(
        labels=np.zeros(8, np.int32), predictions=np.int32([0] * 7 + [1])
    )
    outcomes = (
        outcome_of('static', 'pgd', [1, 1, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 1]),
        outcome_of('adaptive', 'pgd', [1, 0, 1, 0, 0, 0, 0, 1]),
        outcome_of('adaptive', 'apgd_soft', [1, 0, 0, 1, 0, 0, 0, 1]),
        outcome_of('adaptive', 'square', [0, 0, 0, 0, 1, 0, 0, 1]),
        outcome_of('adaptive', 'transfer_other', [0, 0, 0, 0, 0, 1, 0, 1]),
    )
    found = dataclasses.replace(report, defended=right, outcomes=outcomes)
    assert np.flatnonzero(found.missed_by_gradients(0.1)).tolist() == [1, 4, 5]
    assert found.missed_by_gradients(0.2) is None
    (warning,) = found.warnings['worst/all-linf-0.1']
    assert warning.startswith('3 of 8 images withstand every attack along gradients')
    # What only Square breaks of an ensemble is not broken along gradients.
    blind = np.array([0, 0, 0, 0, 1, 0, 0, 0], bool)
    ensemble = outcome_of('adaptive', 'autoattack', [1, 1, 1, 0, 1, 0, 0, 1])._replace(blind=blind)
    more = dataclasses.replace(found, outcomes=(*outcomes, ensemble))
    assert np.flatnonzero(more.missed_by_gradients(0.1)).tolist() == [4, 5]
    fewer = dataclasses.replace(found, outcomes=outcomes[1:4])
    assert fewer.missed_by_gradients(0.1).sum() == 1 and not fewer.warnings


def test_devices_and_batches_change_nothing(problem, inverse):
    other = run(
        problem, 'inverse_perturbation', INVERSE, 1, 60, surrogates=('straight_through', 'soft')
    )[1]
    for ours, theirs in zip(inverse[1].outcomes, other.outcomes):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.success, theirs.success)
    for ours, theirs in zip(inverse[1].moves, other.moves, strict=True):
        for name, by_size in ours.controls.items():
            assert theirs.controls[name] == pytest.approx(by_size, nan_ok=True)


def test_a_report_is_shown_and_written(inverse, tmp_path):
    _, report = inverse
    rows = {key: interval for key, interval, _ in evaluation.defense_rows(report)}
    assert rows['worst/all-linf-0.12'].value == report.worst_case(0.12).mean()
    assert rows['undefended/pgd-linf-0.12'].value <= rows['undefended/clean_accuracy'].value
    text = evaluation.defense_table(report)
    for words in ('5 forward passes', 'adaptive/square-linf-0.05', 'random, oracle sign', 'front'):
        assert words in text
    facts = evaluation.defense_facts(report)
    assert facts['defense/clean_accuracy'] == report.defended.accuracy
    assert facts['defense/success_rate/pgd-linf-0.12'] == pytest.approx(
        evaluation.success_rate(
            next(o for o in report.outcomes if o.name == 'static/pgd-linf-0.12').fooled,
            ~next(o for o in report.outcomes if o.name == 'static/pgd-linf-0.12').success,
        )
    )
    outcome = next(o for o in report.outcomes if o.name == 'static/pgd-linf-0.12')
    fooled, recovered = (
        int(flags.sum()) for flags in (outcome.fooled, outcome.fooled & ~outcome.success)
    )
    assert fooled > 0
    assert facts['defense/success_rate/pgd-linf-0.12/fooled'] == fooled
    assert facts['defense/success_rate/pgd-linf-0.12/recovered'] == recovered
    low, value, high = (
        facts[f'defense/success_rate/pgd-linf-0.12{end}'] for end in ('/low', '', '/high')
    )
    assert low <= value <= high and high - low > 0.05
    assert f', {recovered:,} of {fooled:,}' in text
    for name in ('defense_notes.txt', 'defense_examples-old.png'):
        (tmp_path / name).touch()
    written = evaluation.write_defense(report, tmp_path)
    assert {path.name for path in set(tmp_path.iterdir()) - set(written)} == {'defense_notes.txt'}
    names = {path.name for path in written}
    shown = defense_report.strongest_with_examples(report)
    assert [outcome.eps for outcome in shown] == [0.05, 0.12]
    for outcome in shown:
        known = [o for o in report.outcomes if o.kind == 'adaptive' and o.eps == outcome.eps]
        own = [o for o in known if o.attack in ('fgsm', 'pgd', 'square')]
        assert outcome.attack in ('fgsm', 'pgd', 'square')
        assert outcome.attacked.success.sum() == max(o.success.sum() for o in own)
    assert names == {
        *('defense.csv', 'defense.png', 'defense_controls.png', 'defense_shifts.png'),
        *(f'defense_examples-{outcome.name}.png' for outcome in shown),
    }
    section = evaluation.defense_section(report, written)
    pictures = [block for block in section.blocks if isinstance(block, Figure)]
    assert len(pictures) == 5
    assert sum('made on the defended model' in block.caption for block in pictures) == 2
    values = section.lead[0].items
    assert values[0][:2] == (
        'Defence: inverse perturbation, clean',
        f'{report.defended.accuracy:.2%}',
    )
    assert values[2][0].endswith('all attacks, linf eps 0.12')
    assert values[2][1] == f'{report.worst_case(0.12).mean():.2%}'
    assert f'undefended {report.undefended_worst_case(0.12).mean():.2%}' in values[2][2]
    with (tmp_path / 'defense.csv').open() as file:
        lines = list(csv.DictReader(file))
    table = {line['measurement']: line['value'] for line in lines}
    images = {line['measurement']: line['images'] for line in lines}
    assert float(table['clean_accuracy']) == pytest.approx(report.defended.accuracy)
    moves = report.moves[-1]
    attack = moves.attack.removeprefix('static/')
    control = f'control/{attack}/random, oracle sign/0.1'
    assert float(table[control]) == moves.controls['random, oracle sign'][0.1]
    front = moves.shifts['head:in']['front']
    assert float(table[f'shift/{attack}/head:in/front']) == pytest.approx(front.mean())
    assert images[control] == images[f'noise_shift/{attack}/head:in/tail'] == str(len(front))
    missed = int(report.missed_by_gradients(0.12).sum())
    assert table['missed_by_gradients/linf-0.12'] == str(missed)
    assert facts['defense/missed_by_gradients/linf-0.12'] == missed
    rate = defense_report.rates(report)['pgd-linf-0.12']
    assert table['lost/pgd-linf-0.12'] == str(rate.lost)
    assert images['lost/pgd-linf-0.12'] == str(rate.withstood) != '0'
    assert 'masking_images is 0' in facts['defense/masking/undiagnosed']
    assert text.endswith(facts['defense/masking/undiagnosed'])
    assert facts['defense/masking/undiagnosed'] in section.blocks
    assert float(table['passes']) == 5
    for path in written:
        if path.suffix == '.png':
            assert np.asarray(Image.open(path).convert('L')).std() > 5


@pytest.mark.parametrize(
    ('name', 'options', 'changes'),
    [
        ('pruning', {'count': 20, 'order': 'least'}, {'measure': 'influence'}),
        ('pruning', {'count': 3}, {'measure': 'targeting_log'}),
        ('rescaling', {'layer': 'head:in', 'strength': 0.5}, {}),
        ('rescaling', {'layer': 'hidden', 'renormalize': True}, {}),
    ],
)
def test_other_defences_are_evaluated_alike(problem, name, options, changes):
    forward, variables, source = problem
    parameters, report = run(problem, name, options, **changes)
    assert defenses.name_of(parameters) == name and report.defense == name
    defended = defenses.DEFENSES[name].apply(parameters, forward)
    logits, _ = defended(variables, source.images / np.float32(255))
    right = np.asarray(logits).argmax(-1) == source.labels
    np.testing.assert_array_equal(report.defended.correct, right)
    assert report.moves == () and report.passes == 1
    assert {outcome.attack for outcome in report.outcomes} == {'fgsm', 'pgd', 'square', 'transfer'}
    evaluation.defense_table(report)


@pytest.fixture(scope='module')
def measured(problem):
    """Every measure of the last layer's neurons."""
    forward, variables, source = problem
    wanted = config.Neurons(
        measures=('sensitivity', 'influence', 'ablation', 'targeting', 'input_gradients'),
        layers=('head:in',),
        batch_size=60,
    )
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    return evaluation.measure_neurons(
        forward, variables, source, mesh, wanted, key, split='train', eps=0.12
    ).layers[0]


@pytest.mark.parametrize('measure', config.PRUNED_BY)
def test_every_measure_prunes_what_it_ranks_first(problem, measured, measure):
    forward, variables, source = problem
    settings = config.Defense(name='pruning', options={'count': 5}, images=0, measure=measure)
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    parameters = evaluation.calibrate_defense(
        forward, variables, source, mesh, settings, key, eps=0.12, batch_size=60
    )
    scores = evaluation.pruning_scores(measured, measure)
    # The hidden layer is the input, whose gradients are alike and which FGSM moves alike.
    assert len(np.unique(scores)) > 5 or measure in ('input_gradients', 'targeting_log')
    chosen = np.argsort(-scores, kind='stable')[:5]
    np.testing.assert_array_equal(np.flatnonzero(parameters.removed), np.sort(chosen))


def test_random_pruning_measures_nothing(problem):
    forward, variables, source = problem
    # Of which no measure is a number.
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variables)
    settings = config.Defense(name='pruning', options={'count': 5, 'order': 'random', 'seed': 2})
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    parameters = evaluation.calibrate_defense(forward, broken, source, mesh, settings, key)
    expected = defenses.pruning.calibrate(np.zeros(64), settings=parameters.settings)
    np.testing.assert_array_equal(parameters.removed, expected.removed)
    assert evaluation.calibration_facts(settings, 0.1) == {}


@pytest.mark.parametrize('name', defenses.DEFENSES)
def test_a_calibration_refuses_labels_that_are_no_classes(problem, name):
    forward, variables, source = problem
    labels = source.labels.copy()
    labels[17] = 10
    damaged = data.ArrayDataset(source.images, labels, source.info)
    options = {} if name == 'inverse_perturbation' else {'layer': 'head:in'}
    settings = config.Defense(name=name, options=options)
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    with pytest.raises(ValueError, match='Label 10 is not one of the 10 classes of the model'):
        evaluation.calibrate_defense(
            forward, variables, damaged, mesh, settings, key, batch_size=60
        )


def test_how_a_defence_was_calibrated_and_what_that_found_is_said(problem, tmp_path):
    changes = {'eps': (), 'calibration': {'images': 60, 'measure': 'influence'}}
    parameters, report = run(problem, 'pruning', {'count': 3}, measure='influence', **changes)
    facts = evaluation.defense_facts(report)
    removed = np.flatnonzero(parameters.removed).tolist()
    assert facts['defense/found'] == {'neurons': 64, 'removed': removed}
    assert facts['defense/calibration'] == changes['calibration']
    settings = config.Defense(name='pruning', images=60, measure='influence')
    assert evaluation.calibration_facts(settings, 0.1) == changes['calibration']
    attacked = config.Defense(name='rescaling', images=60, response='loss_attacked')
    assert evaluation.calibration_facts(attacked, 0.1) == {
        'images': 60, 'response': 'loss_attacked', 'eps': 0.1,
    }  # fmt: skip
    table = next(
        block for block in evaluation.defense_section(report).blocks
        if getattr(block, 'caption', '').startswith('How it was calibrated')
    )  # fmt: skip
    shown = dict(table.rows)
    assert shown['measure'] == 'influence' and shown['removed'] == str(removed)
    assert shown['order'] == 'most' and shown['count'] == '3'
    rescaled = defenses.rescaling.calibrate([0.4, 0.0, 0.2])
    assert defended_module._in_short(rescaled) == {
        'neurons': 3, 'amplified': 1, 'compressed': 1, 'smallest factor': 0.5,
        'largest factor': 1.5,
    }  # fmt: skip


def test_a_neuron_that_flips_no_image_is_the_least_sensitive(measured):
    delta = np.array(measured.delta)
    delta[:, 3] = np.inf
    scores = evaluation.pruning_scores(
        dataclasses.replace(measured, delta=delta), 'scaled_sensitivity'
    )
    assert np.flatnonzero(scores == -np.inf).tolist() == [3] and np.isfinite(scores[:3]).all()
    undefined = dataclasses.replace(measured, delta=np.full_like(delta, np.nan))
    assert np.isnan(evaluation.pruning_scores(undefined, 'scaled_sensitivity')).all()


@pytest.mark.parametrize(
    ('measure', 'value', 'sentence'),
    [
        ('targeting_log', 0, "'targeting_log', but FGSM moves no image"),
        ('sensitivity', np.nan, "'sensitivity', but the logits of every image are NaN"),
    ],
)
def test_a_measure_that_the_images_do_not_show_is_named(problem, measure, value, sentence):
    forward, variables, source = problem
    settings = config.Defense(name='pruning', options={'count': 5}, images=0, measure=measure)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, value), variables)
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    with pytest.raises(ValueError, match=f'defense.measure is {sentence}.*another measure'):
        evaluation.calibrate_defense(
            forward, broken, source, mesh, settings, key, eps=0.12, batch_size=60
        )


def test_every_response_rescales_by_its_own_factors(problem, measured):
    forward, variables, source = problem
    options = {'layer': 'head:in', 'rule': 'median', 'strength': 0.25}
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    clean, attacked = measured.clean, measured.attacked
    factors = []
    for response, known in (
        ('accuracy', clean.accuracy),
        ('loss', clean.loss),
        ('margin', clean.margin),
        ('accuracy_attacked', attacked.accuracy),
        ('loss_attacked', attacked.loss),
        ('margin_attacked', attacked.margin),
    ):
        settings = config.Defense(name='rescaling', options=options, images=0, response=response)
        parameters = evaluation.calibrate_defense(
            forward, variables, source, mesh, settings, key, eps=0.12, batch_size=60
        )
        expected = defenses.rescaling.calibrate(known, settings=parameters.settings)
        np.testing.assert_allclose(parameters.scale, expected.scale, rtol=1e-5)
        factors.append(np.round(parameters.scale, 4))
    assert len(np.unique(factors, axis=0)) == 6
    assert config.Defense().response == 'accuracy'


@pytest.mark.parametrize(
    ('name', 'option', 'value'),
    [
        ('pruning', 'measure', 'ablation_attacked'),
        ('pruning', 'measure', 'targeting'),
        ('rescaling', 'response', 'margin_attacked'),
    ],
)
def test_a_measure_under_attack_needs_a_radius(problem, name, option, value):
    forward, variables, source = problem
    settings = config.Defense(name=name, options={'layer': 'head:in'}, **{option: value})
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    message = f"defense.{option} is '{value}', which attacks images, but the radius is 0"
    with pytest.raises(ValueError, match=message):
        evaluation.calibrate_defense(forward, variables, source, mesh, settings, key, eps=0.0)


def test_without_radii_a_defence_is_evaluated_on_clean_images(problem, tmp_path):
    _, report = run(problem, 'pruning', {'count': 3}, measure='influence', eps=())
    assert report.outcomes == () and not report.warnings
    rows = {key: interval for key, interval, _ in evaluation.defense_rows(report)}
    assert set(rows) == {'undefended/clean_accuracy', 'clean_accuracy'}
    assert 'clean_accuracy' in evaluation.defense_table(report)
    written = evaluation.write_defense(report, tmp_path)
    assert [path.name for path in written] == ['defense.csv']
    evaluation.defense_section(report, written)


def test_images_of_another_model_are_transferred_too(problem):
    forward, variables, source = problem
    key = jax.random.key(3)
    scaled = parallel.replicate(
        parallel.data_mesh(8), jax.tree.map(lambda leaf: 3 * leaf, variables)
    )
    parameters, report = run(
        problem,
        'pruning',
        {'count': 3},
        measure='influence',
        attacked_by=('fgsm',),
        eps=(0.12,),
        attacks=(),
        surrogate=(forward, scaled),
    )
    outcomes = {outcome.name: outcome for outcome in report.outcomes}
    assert 'adaptive/transfer-linf-0.12' in outcomes
    found = attacks.transfer(
        defenses.pruning.apply(parameters, forward),
        variables,
        source.images / np.float32(255),
        source.labels,
        key,
        surrogate=forward,
        surrogate_variables=scaled,
        threat=attacks.Threat('linf', 0.12),
        steps=EVALUATION.steps,
    )
    success = outcomes['adaptive/transfer_other-linf-0.12'].success
    np.testing.assert_array_equal(success, np.asarray(found.success))


def test_logits_that_are_not_numbers_are_nothing_to_recover():
    class FirstPixel(nn.Module):
        """Class 1 for a bright first pixel, no number for a black one."""

        @nn.compact
        def __call__(self, x):
            pixel = x[:, 0, 0, 0]
            logits = jnp.stack([0.5 - pixel, pixel - 0.5], -1)
            return jnp.where(pixel[:, None] == 0, jnp.nan, logits)

    def without_numbers(x):
        return jnp.where(x == 1, 0, x)

    forward = LinenForward(FirstPixel())
    defended = with_input_transform(forward, without_numbers)
    x_adv = jnp.asarray([0.0, 0.25, 0.75, 1.0])[:, None, None, None]
    batch = data.Batch(np.uint8(255 * x_adv), np.zeros(4, np.int32), np.ones(4, bool), np.arange(4))
    run = lambda x, y, index: types.SimpleNamespace(x_adv=x_adv)  # noqa: E731
    found = defended_module._static(run, forward, defended, {}, batch)
    # The first shows the model nothing, the last is of class 1, and shows the defence nothing.
    np.testing.assert_array_equal(found['seen'], [-1, 0, 1, 1])
    np.testing.assert_array_equal(found['undefended'], [True, False, True, True])
    np.testing.assert_array_equal(found['broken'], [True, False, True, True])


def test_an_image_without_logits_is_broken_but_not_there_to_be_recovered(inverse):
    _, report = inverse
    right = report.defended._replace(
        labels=np.zeros(4, np.int32), predictions=np.zeros(4, np.int32)
    )
    outcome = outcome_of('static', 'pgd', [1, 0, 0, 0], [0, 1, 0, 0])._replace(
        undefended=np.array([1, 1, 0, 0], bool)
    )
    found = dataclasses.replace(report, undefended=right, defended=right, outcomes=(outcome,))
    rows = {key: interval.value for key, interval, _ in evaluation.defense_rows(found)}
    assert rows['undefended/pgd-linf-0.1'] == rows['worst/undefended-linf-0.1'] == 0.5
    assert defense_report.rates(found)['pgd-linf-0.1'][:2] == (1, 1)


def test_what_the_defence_loses_is_counted_beside_what_it_recovers(inverse):
    _, report = inverse
    labels = np.zeros(6, np.int32)
    # By image: recovered, fooled by both, withstood by both, lost, lost clean, wrong before.
    undefended = report.undefended._replace(labels=labels, predictions=np.int32([0, 0, 0, 0, 0, 1]))
    defended = undefended._replace(predictions=np.int32([0, 0, 0, 0, 1, 1]))
    outcome = outcome_of('static', 'pgd', [0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0])._replace(
        undefended=np.array([1, 1, 0, 0, 0, 1], bool)
    )
    found = dataclasses.replace(
        report, undefended=undefended, defended=defended, outcomes=(outcome,), moves=()
    )
    (rate,) = defense_report.rates(found).values()
    assert (rate.recovered, rate.fooled, rate.lost, rate.withstood) == (1, 2, 2, 3)
    facts = evaluation.defense_facts(found)
    assert facts['defense/success_rate/pgd-linf-0.1/lost'] == 2
    assert facts['defense/success_rate/pgd-linf-0.1/withstood'] == 3
    (line,) = [x for x in evaluation.defense_table(found).splitlines() if '1 of 2' in x]
    assert line.endswith('2 of 3')


def test_controls_that_cannot_be_measured_are_named(problem):
    _, report = run(
        problem,
        'inverse_perturbation',
        INVERSE,
        devices=1,
        attacked_by=('autoattack',),
        eps=(0.12,),
        attacks=(),
        surrogates=(),
    )
    assert report.moves == ()
    assert 'Controls were not measured' in evaluation.defense_table(report)
    section = evaluation.defense_section(report)
    assert any('Controls were not measured' in str(block) for block in section.blocks)


def test_pruning_by_the_papers_score_takes_the_smallest_mean_scaled_delta(problem):
    forward, variables, source = problem
    settings = config.Defense(
        name='pruning', options={'count': 5}, images=0, measure='scaled_sensitivity'
    )
    mesh = parallel.data_mesh(1)
    parameters = evaluation.calibrate_defense(
        forward, variables, source, mesh, settings, jax.random.key(0), batch_size=60
    )
    x = source.images / np.float32(255)
    features = np.float64(forward(variables, x, taps=('head:in',))[1]['head:in'])
    delta = np.float64(neurons.sensitivity(forward, variables, x).delta)
    score = (delta - features.mean(0)) / features.std(0, ddof=1)
    mean = np.nanmean(np.where(np.isfinite(score), score, np.nan), axis=0)
    np.testing.assert_array_equal(
        np.flatnonzero(parameters.removed), np.sort(np.argsort(np.abs(mean))[:5])
    )


def test_smallest_perturbations_count_inside_the_radius_only(problem):
    forward, variables, source = problem
    _, report = run(problem, 'pruning', {'count': 0}, attacked_by=('fab',), measure='influence')
    x, y = source.images / np.float32(255), source.labels
    static = [o for o in report.outcomes if (o.kind, o.attack) == ('static', 'fab')]
    shares = []
    for outcome in static:
        threat = attacks.Threat('linf', outcome.eps)
        found = attacks.fab(
            forward, variables, x, y, jax.random.key(3), threat=threat, steps=EVALUATION.auto_steps
        )
        within = np.asarray(found.distance) <= outcome.eps
        right = np.asarray(forward(variables, x)[0]).argmax(-1) == y
        assert not (outcome.fooled & ~within).any()
        np.testing.assert_array_equal(outcome.fooled, within & right)
        shares.append(outcome.fooled.mean())
    assert shares[0] < shares[1]


def test_autoattack_meets_both_models_and_what_it_warns_of_is_said(problem, tmp_path):
    forward, variables, source = problem
    notes = tmp_path / 'unfinished'
    options = {'attacked_by': ('autoattack',), 'eps': (0.12,), 'directory': notes, 'devices': 1}
    settings = {'surrogates': ('soft',), 'surrogate_attacks': ('apgd',), 'controls': False}
    parameters, report = run(problem, 'inverse_perturbation', INVERSE, **options, **settings)
    outcomes = {outcome.name: outcome for outcome in report.outcomes}
    static = outcomes['static/autoattack-linf-0.12']
    adaptive = outcomes['adaptive/autoattack-linf-0.12']
    by = report.adaptive.outcomes[0].broken_by
    np.testing.assert_array_equal(adaptive.blind, [run == 'square' for run in by])
    assert static.blind is None
    assert {'adaptive/apgd_soft-linf-0.12', 'static/square-linf-0.12'} < set(outcomes)
    # The same ensemble from Python, on either model.
    defended = inverse_perturbation.apply(parameters, forward)
    x, y = source.images / np.float32(255), source.labels
    for model, success in ((forward, static.fooled), (defended, adaptive.success)):
        found = attacks.autoattack(
            model,
            variables,
            x,
            y,
            jax.random.key(3),
            threat=attacks.Threat('linf', 0.12),
            steps=EVALUATION.auto_steps,
            queries=EVALUATION.queries,
            batch_size=24,
            mesh=parallel.data_mesh(1),
        )
        right = np.asarray(model(variables, x)[0]).argmax(-1) == y
        expected = found.success & right if model is forward else found.success
        np.testing.assert_array_equal(success, expected)
        if model is forward:
            judged = np.asarray(defended(variables, found.x_adv)[0]).argmax(-1) != y
            np.testing.assert_array_equal(static.success, judged | ~report.defended.correct)
    # Finished work is noted apart for the two models.
    assert list(notes.glob('autoattack-linf-0.12-*/run*.npz'))
    assert list(notes.glob('defended-*/autoattack-linf-0.12-*/run*.npz'))
    # What they hold is not done again.
    calls = []
    _, again = run(
        problem,
        'inverse_perturbation',
        INVERSE,
        **options,
        **settings,
        ensemble_progress=lambda *arguments: calls.append(arguments),
    )
    assert not calls
    for one, other in zip(report.outcomes, again.outcomes, strict=True):
        np.testing.assert_array_equal(one.success, other.success)
    # Another defence, without surrogates, which need nothing of it.
    other = {**settings, 'surrogates': ()}
    run(problem, 'inverse_perturbation', {**INVERSE, 'front': 1}, **options, **other)
    assert len(list(notes.glob('defended-*'))) == 2
    warned = dataclasses.replace(
        report, outcomes=(adaptive._replace(warnings=('It may be random.',)), static)
    )
    assert 'adaptive/autoattack-linf-0.12: It may be random.' in evaluation.defense_table(warned)
    facts = evaluation.defense_facts(warned)
    assert facts['defense/warnings/adaptive/autoattack-linf-0.12'] == ['It may be random.']
    section = evaluation.defense_section(warned)
    said = [text for block in section.blocks for text in getattr(block, 'sentences', ())]
    assert said == ['adaptive/autoattack-linf-0.12: It may be random.']


def test_the_config_of_compress_and_amplify_asks_for_autoattack():
    path = pathlib.Path(__file__).resolve().parents[2] / 'configs/papers/pravin_2021.py'
    settings = command_line.load_file(path)
    # What the undefended model meets the defended one does too.
    assert settings.defense.name == 'rescaling' and 'autoattack' in settings.evaluation.attacks


def test_gradients_of_a_defended_model_are_checked(problem, tmp_path):
    settings = {'masking_images': 8, 'measure': 'influence'}
    _, report = run(problem, 'pruning', {'count': 3, 'order': 'least'}, **settings)
    assert [(each.eps, each.images) for each in report.diagnoses] == [(0.05, 8), (0.12, 8)]
    # Images made for the undefended model are among the attacks it is held against.
    transfer = {check.name: check for check in report.diagnoses[0].checks}['transfer']
    assert 'transfer' in transfer.figures
    facts = evaluation.defense_facts(report)
    for eps in ('0.05', '0.12'):
        assert facts[f'defense/masking/linf-{eps}/images'] == 8
        assert f'gradient masking, linf {eps}, 8 images' in evaluation.defense_table(report)
    (tmp_path / 'defense_controls.png').touch()
    evaluation.write_defense(report, tmp_path)
    assert not (tmp_path / 'defense_controls.png').exists()
    assert (tmp_path / 'defense_masking.csv').exists()


def test_a_class_without_calibration_images_is_named(problem):
    forward, variables, source = problem
    few = data.ArrayDataset(source.images[:9], source.labels[:9], source.info)
    with pytest.raises(ValueError, match='Class 9 has 0 correctly classified'):
        run((forward, variables, few), 'inverse_perturbation', INVERSE)
