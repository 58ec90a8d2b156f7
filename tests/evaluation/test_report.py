"""Reports say what was measured: the table, the files and the pictures agree."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from neurosens import config, data, evaluation, metrics
from neurosens.evaluation import plots


def test_a_whole_report_takes_the_place_of_an_earlier_one(tmp_path):
    fresh, directory = tmp_path / '.new', tmp_path / 'report'
    for place, names in (
        (directory, ('index.html', 'masking.csv', 'defense.csv', 'neurons/act1.npz', 'mine.txt')),
        (directory, ('unfinished/notes.json', 'neurons/old.csv')),
        (fresh, ('index.html', 'results.csv', 'neurons/act1.npz')),
    ):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(f'{place.name} {name}')
    evaluation.put_in_place(fresh, directory)
    found = {
        str(path.relative_to(directory)): path.read_text().split()[0]
        for path in directory.rglob('*')
        if path.is_file()
    }
    assert found == {
        'index.html': '.new',
        'results.csv': '.new',
        'neurons/act1.npz': '.new',
        # Of no report, or of one that is not done.
        'mine.txt': 'report',
        'unfinished/notes.json': 'report',
    }
    # A report without neurons.
    (fresh / 'index.html').write_text('.new')
    evaluation.put_in_place(fresh, directory)
    assert not (directory / 'neurons').exists()


@pytest.fixture
def report():
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3], np.int32)
    predictions = evaluation.Predictions(
        labels,
        np.array([0, 0, 1, 1, 2, 2, 3, 0], np.int32),
        np.full(8, 0.5, np.float32),
        np.array([1, 1, 1, 1, 1, 1, 1, -1], np.float32),
    )

    def outcome(attack, eps, broken):
        success = np.isin(np.arange(8), [*broken, 7])
        images = np.zeros((2, 8, 8, 1), np.uint8)
        attacked = evaluation.Attacked(
            success, np.where(success, -1.0, 1.0), labels, images + np.float32(eps), images
        )
        return evaluation.AttackOutcome(attack, 'linf', eps, attacked)

    outcomes = (
        outcome('fgsm', 0.1, [0]),
        outcome('fgsm', 0.2, [0, 1]),
        outcome('pgd', 0.1, [1]),
        outcome('pgd', 0.2, [0, 1, 2]),
    )
    return evaluation.RobustnessReport(data.info('digits'), 'test', predictions, outcomes)


def test_worst_case_is_per_image(report):
    values = {key: interval.value for key, interval, _ in evaluation.rows(report)}
    assert values['clean_accuracy'] == 7 / 8
    assert values['robust_accuracy/fgsm-linf-0.1'] == 6 / 8
    assert values['robust_accuracy/pgd-linf-0.1'] == 6 / 8
    assert values['robust_accuracy/worst-linf-0.1'] == 5 / 8
    assert values['robust_accuracy/worst-linf-0.2'] == 4 / 8
    assert values['class_accuracy/3'] == 1 / 2
    assert 'class_accuracy/4' not in values, 'a class without images has no accuracy'


def test_files_agree_with_the_rows(report, tmp_path):
    stale = tmp_path / 'examples-cw-l2-9.png'
    stale.touch()
    written = evaluation.write(report, tmp_path, {'step': 3})
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    assert 'examples-pgd-linf-0.2.png' in {path.name for path in written}
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['step'] == 3 and results['images'] == 8 and results['clean_loss'] == 0.5
    with (tmp_path / 'results.csv').open() as file:
        table = {line['measurement']: line for line in csv.DictReader(file)}
    for key, interval, count in evaluation.rows(report):
        assert results[key] == float(table[key]['value']) == interval.value
        assert results[f'{key}/low'] == interval.low == float(table[key]['low'])
        assert int(table[key]['images']) == count


def test_table_lines_up_and_shows_every_accuracy(report):
    table = evaluation.table(report)
    blocks = [block.splitlines() for block in table.split('\n\n')]
    for block in blocks:
        assert len({len(line) for line in block}) == 1, 'columns must line up'
    interval = metrics.wilson_interval(7, 8)
    assert f'{interval.low * 100:.2f}' in blocks[0][2]
    assert any(line.startswith('worst-linf-0.2') and '50.00' in line for line in blocks[0])
    assert len(blocks[1]) == 2 + 4


def test_without_attacks_there_is_no_curve(report, tmp_path):
    clean = evaluation.RobustnessReport(report.info, 'test', report.predictions, ())
    written = {path.name for path in evaluation.write(clean, tmp_path, {})}
    assert written == {'index.html', 'results.json', 'results.csv', 'class_accuracy.png'}


def test_what_attacks_aim_at_is_reported_beside_accuracy(report, tmp_path):
    reached = np.arange(8) < 3
    aimed = evaluation.AttackOutcome(
        'pgd_random', 'linf', 0.1, report.outcomes[0].attacked._replace(reached=reached)
    )
    whole = dataclasses.replace(report, outcomes=(*report.outcomes, aimed))
    values = {key: (interval.value, count) for key, interval, count in evaluation.rows(whole)}
    assert values['target_rate/pgd_random-linf-0.1'] == (3 / 8, 8)
    assert values['robust_accuracy/pgd_random-linf-0.1'] == (6 / 8, 8)
    blocks = evaluation.table(whole).split('\n\n')
    header, _, line = blocks[1].splitlines()
    assert header.startswith('taken for the target') and line.split()[:2] == [
        'pgd_random-linf-0.1',
        '37.50',
    ]
    assert 'target' not in blocks[0] and 'target' not in evaluation.table(report)
    evaluation.write(whole, tmp_path, {})
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['target_rate/pgd_random-linf-0.1'] == 3 / 8
    page = (tmp_path / 'index.html').read_text()
    interval = metrics.wilson_interval(3, 8)
    assert 'Images taken for the class' in page
    assert f'37.50 ({interval.low * 100:.2f}–{interval.high * 100:.2f})' in page


def test_an_ensemble_says_who_broke_each_image_and_what_to_doubt(report, tmp_path):
    images = report.outcomes[0].attacked._replace(success=np.arange(8) % 2 == 1)
    broken_by = ('', 'apgd-ce', '', 'square', '', 'square', '', 'clean')
    ensemble = evaluation.AttackOutcome(
        'autoattack', 'linf', 0.1, images, broken_by, ('Square broke 2 images.',)
    )
    (tmp_path / 'autoattack-l2-9.csv').touch()
    whole = dataclasses.replace(report, outcomes=(*report.outcomes, ensemble))
    written = {path.name for path in evaluation.write(whole, tmp_path, {})}
    assert written == {path.name for path in tmp_path.iterdir()}
    with (tmp_path / 'autoattack-linf-0.1.csv').open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(line['broken_by'] for line in lines) == broken_by
    assert [int(line['label']) for line in lines] == report.predictions.labels.tolist()
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['warnings/autoattack-linf-0.1'] == ['Square broke 2 images.']
    assert evaluation.table(whole).endswith('autoattack-linf-0.1: Square broke 2 images.')


def test_smallest_perturbations_are_reported_for_every_image_and_as_a_curve(report, tmp_path):
    distance = np.array([0.05, 0.11, 0.12, 0.13, 0.3, np.inf, np.inf, 0], np.float32)
    outcomes = tuple(
        evaluation.AttackOutcome(
            'fab',
            'linf',
            eps,
            report.outcomes[0].attacked._replace(success=distance <= eps, distance=distance),
        )
        for eps in (0.1, 0.2)
    )
    lengths = np.array([1, 1, 2, 1, 3, 4, 4, 0], np.float32)
    whole = dataclasses.replace(report, outcomes=(*report.outcomes, *outcomes), lengths=lengths)
    written = {path.name for path in evaluation.write(whole, tmp_path, {})}
    assert 'distances.csv' in written
    with (tmp_path / 'distances.csv').open() as file:
        lines = list(csv.DictReader(file))
    assert [np.float32(line['fab']) for line in lines] == distance.tolist()
    assert [int(line['label']) for line in lines] == report.predictions.labels.tolist()
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['median_distance/fab-linf'] == pytest.approx(0.12)
    assert results['relative_distance/fab-linf'] is None, 'no mean where some have none'
    low, high = (results[f'median_distance/fab-linf/{end}'] for end in ('low', 'high'))
    # Of 8 images, two of which nothing fools, samples may have no finite median.
    assert 0 < low < 0.12 and (high is None or high > 0.12)
    assert any(
        line.startswith('fab-linf ') and '0.12' in line
        for line in evaluation.table(whole).splitlines()
    )
    found = np.array([0.1, 0.2, 0.4, 0, 0.3, 1, 2, 0], np.float32)
    outcome = dataclasses.replace(
        outcomes[0], attacked=outcomes[0].attacked._replace(distance=found)
    )
    relative = dataclasses.replace(whole, outcomes=(outcome,)).relative_distances()
    # Black images have no size.
    shares = [0.1, 0.2, 0.2, 0, 0.1, 0.25, 0.5]
    assert relative == {'fab-linf': pytest.approx(np.mean(shares))}
    axes = plots.accuracy_against_eps(whole).axes[0]
    (curve,) = (line for line in axes.lines if line.get_label() == 'FAB')
    for eps, share in ((0.0, 7 / 8), (0.1, 6 / 8), (0.2, 3 / 8)):
        at_radius = np.interp(eps, *curve.get_data())
        assert at_radius == pytest.approx(100 * share)
    assert len(curve.get_xdata()) > 100
    # An evaluation without such attacks leaves no file of an earlier one.
    evaluation.write(report, tmp_path, {})
    assert not (tmp_path / 'distances.csv').exists()


def test_a_diagnosis_of_masking_stands_in_every_report(report, tmp_path):
    check = evaluation.Check('black_box', False, {'only_square': 9.0}, 'Random search fools more.')
    sound = dataclasses.replace(check, passed=True)
    diagnoses = tuple(
        evaluation.Diagnosis((found,), 128, 'linf', eps)
        for found, eps in ((sound, 0.05), (check, 0.1))
    )
    whole = dataclasses.replace(report, diagnoses=diagnoses)
    written = {path.name for path in evaluation.write(whole, tmp_path, {})}
    assert 'masking.csv' in written
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['masking/linf-0.05/passed'] and not results['masking/linf-0.1/passed']
    assert results['masking/linf-0.1/black_box'] is False and not results['masking/passed']
    text = evaluation.table(whole)
    assert text.endswith('\n\n'.join(map(evaluation.masking_table, diagnoses)))
    evaluation.write(report, tmp_path, {})
    assert not (tmp_path / 'masking.csv').exists(), 'that of an earlier evaluation is gone'


def test_a_report_without_a_diagnosis_says_why(report, tmp_path):
    reason = 'Gradient masking was not looked for: evaluation.masking_images is 0.'
    evaluation.write(dataclasses.replace(report, undiagnosed=reason), tmp_path, {})
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['masking/undiagnosed'] == reason
    assert f'<p>{reason}</p>' in (tmp_path / 'index.html').read_text(encoding='utf-8')
    assert reason in evaluation.table(dataclasses.replace(report, undiagnosed=reason))
    evaluation.write(report, tmp_path, {})
    assert 'masking/undiagnosed' not in json.loads((tmp_path / 'results.json').read_text())


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_the_curve_shows_every_attack_there_is_in_every_norm(report, norm):
    first = report.outcomes[0]
    outcomes = tuple(
        dataclasses.replace(first, attack=attack, norm=norm) for attack in config.ATTACKS
    )
    whole = dataclasses.replace(report, outcomes=outcomes)
    (axes,) = plots.accuracy_against_eps(whole).axes
    curves = [line for line in axes.lines if line.get_label() != 'chance']
    assert len(curves) == len(config.ATTACKS)
    drawn = {(line.get_color(), line.get_linestyle()) for line in curves}
    assert len(drawn) == len(curves), 'no two attacks look the same'
    symbol = {'linf': r'\ell_\infty', 'l2': r'\ell_2', 'l1': r'\ell_1'}[norm]
    assert axes.get_xlabel().startswith(f'${symbol}$')


LOG = [
    {'step': 5, 'loss': 2.0, 'accuracy': 0.3, 'a/penalty': 3.0, 'a/gradient_share': 0.25},
    {'step': 6, 'validation_accuracy': 0.5, 'validation_loss': 1.5},
    {
        'step': 6,
        'monitor/pgd_accuracy': 0.25,
        'monitor/sensitivity': 4.0,
        'monitor/activation_sensitivity': 2.5,
        'monitor/activation_sensitivity/act1': 3.0,
        'monitor/activation_sensitivity/act2': 2.0,
    },
    {'step': 10, 'loss': 1.0, 'accuracy': 0.6, 'a/penalty': 0.0, 'a/gradient_share': 0.5},
    {'step': 11, 'objective/cross_entropy': 0.5, 'objective/cross_entropy/gradient_share': 0.125},
    {'step': 12, 'images_per_second': 800.0, 'attacked_accuracy/l1': 0.125},
]


def test_curves_of_training_are_those_of_the_log():
    figure = evaluation.training_curves(LOG)
    drawn = {
        (axes.get_ylabel(), line.get_label()): line.get_xydata().tolist()
        for axes in figure.axes
        for line in axes.get_lines()
    }
    assert drawn['loss', 'training'] == [[5, 2.0], [10, 1.0]]
    assert drawn['loss', 'validation'] == [[6, 1.5]]
    assert drawn['accuracy (%)', 'watched images under PGD'] == [[6, 25.0]]
    assert drawn['accuracy (%)', 'training, attacked in l1'] == [[12, 12.5]]
    assert drawn['penalty', 'a'] == [[5, 3.0], [10, 0.0]]
    assert drawn['share of gradient (%)', 'a'] == [[5, 25.0], [10, 50.0]]
    assert drawn['terms of the objective', 'cross entropy'] == [[11, 0.5]]
    assert drawn['share of gradient (%)', 'objective/cross entropy'] == [[11, 12.5]]
    assert drawn['activation sensitivity', 'mean'] == [[6, 2.5]]
    assert drawn['activation sensitivity', 'act2'] == [[6, 2.0]]
    assert drawn['images/s', '_child0'] == [[12, 800.0]]
    assert len(figure.axes) == 8
    scales = {axes.get_ylabel(): axes.get_yscale() for axes in figure.axes}
    # 0 has no place on a logarithmic axis.
    assert (scales['loss'], scales['penalty']) == ('log', 'linear')


def test_a_log_without_losses_has_no_curves(report, tmp_path):
    with pytest.raises(ValueError, match='holds no loss'):
        evaluation.training_curves(LOG[1:3])
    assert not any(
        path.name == 'training.png' for path in evaluation.write(report, tmp_path, {}, LOG[1:3])
    )
    assert any(path.name == 'training.png' for path in evaluation.write(report, tmp_path, {}, LOG))
