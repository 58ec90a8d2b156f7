"""evaluate.py reports what a fresh computation finds, and writes its report."""

import base64
import csv
import html
import json
import shlex
import shutil

import jax
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
    metrics,
    neurons,
    training,
)
from neurosens import scripts as command_scripts

EVALUATE = (
    '--config.evaluation.eps=(0.02,0.1)',
    '--config.evaluation.steps=5',
    '--config.evaluation.limit=200',
    '--config.evaluation.queries=50',
    '--config.evaluation.masking_images=40',
    '--config.neurons.limit=60',
)


@pytest.fixture(scope='module')
def evaluated(trained, scripts):
    workdir, _ = trained
    out, _ = scripts.run('evaluate.py', f'--workdir={workdir}', *EVALUATE)
    return workdir, out, json.loads((workdir / 'report' / 'results.json').read_text())


def test_clean_accuracy_is_that_of_the_loaded_model(evaluated):
    workdir, out, results = evaluated
    model = training.load(workdir)
    test = data.load('digits', 'test')
    logits, _ = jax.jit(model.forward)(model.variables, data.to_float(test.images[:200]))
    correct = np.asarray(logits).argmax(-1) == test.labels[:200]
    interval = metrics.wilson_interval(int(correct.sum()), 200)
    assert results['images'] == 200
    assert results['clean_accuracy'] == pytest.approx(interval.value)
    assert results['clean_accuracy/low'] == pytest.approx(interval.low)
    assert results['step'] == model.step
    assert f'{interval.value * 100:.2f}' in out
    for name, label in (('0', 0), ('7', 7)):
        expected = correct[test.labels[:200] == label].mean()
        assert results[f'class_accuracy/{name}'] == pytest.approx(expected)


def test_attacks_weaken_in_the_expected_order(evaluated):
    _, _, results = evaluated
    clean = results['clean_accuracy']
    fgsm, pgd = (
        [results[f'robust_accuracy/{attack}-linf-{eps}'] for eps in ('0.02', '0.1')]
        for attack in ('fgsm', 'pgd')
    )
    assert clean >= pgd[0] >= pgd[1] and clean >= fgsm[0] >= fgsm[1]
    assert pgd[1] < clean
    assert results['robust_accuracy/worst-linf-0.1'] <= min(fgsm[1], pgd[1])


def test_the_report_is_complete_and_consistent(evaluated):
    workdir, out, results = evaluated
    report = workdir / 'report'
    with (report / 'results.csv').open() as file:
        table = {row['measurement']: row for row in csv.DictReader(file)}
    keys = [key for key in results if key.split('/')[0].endswith('accuracy')]
    assert set(table) == {key for key in keys if not key.endswith(('/low', '/high'))}
    for key, row in table.items():
        assert float(row['value']) == results[key]
        assert key.split('/')[-1].replace('clean_accuracy', 'clean') in out
    pictures = {path.name for path in report.glob('*.png')}
    assert pictures == {
        'accuracy_against_eps.png',
        'class_accuracy.png',
        'training.png',
        'examples-fgsm-linf-0.1.png',
        'examples-pgd-linf-0.1.png',
    }
    for name in pictures:
        with Image.open(report / name) as picture:
            assert len(picture.convert('L').getcolors(65536)) > 5, 'an empty picture'
    assert not list(report.glob('.*partial'))


def test_the_page_has_every_picture_and_says_how_it_was_made(evaluated):
    workdir, _, results = evaluated
    report = workdir / 'report'
    page = (report / 'index.html').read_text(encoding='utf-8')
    pictures = [*report.glob('*.png'), *(report / 'neurons').glob('*.png')]
    for path in pictures:
        assert base64.b64encode(path.read_bytes()).decode() in page, path
    assert page.count('<img ') == len(pictures)
    assert len(page) < 3e6
    command = html.unescape(page[page.index('<code>') + 6 : page.index('</code>')])
    assert shlex.split(command) == ['python', 'evaluate.py', f'--workdir={workdir}', *EVALUATE]
    for key, value in results.items():
        if key != 'config':
            assert html.escape(key) in page
            assert html.escape(json.dumps(value)) in page
    for name in ('jax', 'flax', 'devices'):
        assert f'<th scope="row">{name}</th>' in page
    assert f'{results["clean_accuracy"]:.2%}' in page
    assert f'step {results["step"]} of {workdir}' in page


def test_results_do_not_depend_on_devices_and_batches(evaluated, scripts, tmp_path):
    _, _, results = evaluated
    workdir = tmp_path / 'run'
    shutil.copytree(evaluated[0], workdir, ignore=shutil.ignore_patterns('report'))
    changes = (
        '--config.evaluation.batch_size=48',
        '--config.neurons.batch_size=25',
        # That does not depend on them either, see the tests of the library, and takes long.
        '--config.evaluation.masking_images=0',
        '--config.cpu_devices=1',
    )
    scripts.run('evaluate.py', f'--workdir={workdir}', *EVALUATE, *changes)
    again = json.loads((workdir / 'report' / 'results.json').read_text())
    assert 'masking_images is 0' in again.pop('masking/undiagnosed')
    assert again.keys() == {key for key in results if not key.startswith('masking/')}
    for key, value in again.items():
        if key == 'clean_loss' or (key.startswith('neurons/') and isinstance(value, float)):
            # Sums of other batches round differently, and so do ranks of nearly equal neurons.
            ranked = 'agreement' in key or 'targeting' in key
            tolerance = {'abs': 0.05} if ranked else {'rel': 1e-4, 'abs': 1e-6}
            assert value == pytest.approx(results[key], **tolerance), key
        elif key not in ('config', 'workdir') and not key.endswith('_rule'):
            assert value == results[key], key


def test_signs_of_masking_are_reported(evaluated):
    workdir, out, results = evaluated
    with (workdir / 'report' / 'masking.csv').open() as file:
        lines = list(csv.DictReader(file))
    # Every radius, on the first images.
    for eps in (0.02, 0.1):
        assert results[f'masking/linf-{eps}/images'] == 40
        assert f'gradient masking, linf {eps}, 40 images' in out
    assert {line['eps'] for line in lines} == {'0.02', '0.1'}
    for line in lines:
        key = f'masking/{line["norm"]}-{line["eps"]}/{line["check"]}'
        passed = results[key]
        assert line['verdict'] == {True: 'pass', False: 'warn', None: 'n/a'}[passed]
        assert f'{line["verdict"]:<4}   {line["check"]}' in out
        if line['figure']:
            assert results[f'{key}/{line["figure"]}'] == float(line['value'])
    not_run = {line['check'] for line in lines if line['verdict'] == 'n/a' and not line['figure']}
    assert not_run == {'transfer', 'straight_through'}
    found = {key.removeprefix('masking/linf-0.1/'): value for key, value in results.items()}
    assert found['single_step/pgd'] + found['monotone/correct_at_0.1'] == 40
    assert found['randomness'] and found['gradients']


# ------------------------------------------------------------------------------------ neurons


def test_neuron_arrays_are_those_of_the_library(evaluated):
    workdir, out, results = evaluated
    model = training.load(workdir)
    test = data.load('digits', 'test')
    x = data.to_float(test.images[:60])
    arrays = dict(np.load(workdir / 'report' / 'neurons' / 'head-in.npz'))
    delta, flips_to = neurons.sensitivity(model.forward, model.variables, x, layer='head:in')
    # Logits are as exact as the largest of them, and Delta as their smallest difference is.
    logits = np.sort(np.float64(model.forward(model.variables, x)[0]), axis=1)
    exact = np.abs(logits).max(1) / (logits[:, -1] - logits[:, -2])
    np.testing.assert_array_equal(np.isfinite(arrays['delta']), np.isfinite(delta))
    finite = np.isfinite(delta)
    with np.errstate(invalid='ignore'):
        error = np.abs(arrays['delta'] - np.asarray(delta)) / np.abs(delta)
    assert (error <= 1e-5 * (1 + exact[:, None]))[finite].all()
    np.testing.assert_array_equal(arrays['flips_to'], flips_to)
    without = neurons.ablation(model.forward, model.variables, x, test.labels[:60], layer='head:in')
    np.testing.assert_allclose(
        arrays['ablation_accuracy'], neurons.response(without).accuracy, atol=1e-6
    )
    influence = neurons.influence(model.forward, model.variables, x, layer='head:in')
    np.testing.assert_allclose(arrays['influence'], influence, rtol=1e-4, atol=1e-5)
    statistics = neurons.statistics(model.forward, model.variables, x, layer='head:in')
    np.testing.assert_allclose(arrays['mean'], statistics.mean, rtol=1e-6, atol=1e-6)
    assert results['neurons/images'] == 60
    assert results['neurons/head:in/sensitivity_method'] == 'closed_form'
    assert results['neurons/act1/sensitivity_method'] == 'first_order'
    assert 'head:in: 16 neurons' in out and 'act1: 4 neurons' in out


def test_the_neuron_section_is_complete(evaluated):
    workdir, _, _ = evaluated
    directory = workdir / 'report' / 'neurons'
    names = {path.name for path in directory.iterdir()}
    for layer in ('act1', 'head-in'):
        assert {name for name in names if name.startswith(f'{layer}-') and name[-3:] == 'png'} == {
            f'{layer}-{plot}.png'
            for plot in (
                'sensitivity_curve',
                'sensitivity_histogram',
                'measure_scatter',
                'measure_heatmap',
                'top_neurons',
                'targeting',
            )
        }
    assert names >= {'act1.npz', 'head-in.npz', 'neurons.csv', 'agreement.csv'}
    with (directory / 'neurons.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['layer'] for row in rows] == ['act1'] * 4 + ['head:in'] * 16


def test_every_kind_of_attack_is_reported(trained, scripts, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns('report'))
    out, _ = scripts.here(
        'evaluate.py',
        f'--workdir={workdir}',
        "--config.evaluation.attacks=('noise','mi_fgsm','fmn','latent','autoattack')",
        '--config.evaluation.norm=l2',
        '--config.evaluation.eps=(0.3,0.8)',
        '--config.evaluation.steps=4',
        '--config.evaluation.auto_steps=10',
        '--config.evaluation.queries=10',
        '--config.evaluation.limit=40',
        '--config.evaluation.batch_size=16',
        '--config.evaluation.masking_images=0',
        '--config.neurons.measures=()',
    )
    report = workdir / 'report'
    results = json.loads((report / 'results.json').read_text())
    clean = results['clean_accuracy']
    for eps in ('0.3', '0.8'):
        accuracy = {
            name: results[f'robust_accuracy/{name}-l2-{eps}']
            for name in ('noise', 'mi_fgsm', 'fmn', 'latent', 'autoattack')
        }
        assert clean >= accuracy['noise'] >= accuracy['autoattack']
        assert results[f'robust_accuracy/worst-l2-{eps}'] <= min(accuracy.values())
        with (report / f'autoattack-l2-{eps}.csv').open() as file:
            broken = [line['broken_by'] for line in csv.DictReader(file)]
        assert len(broken) == 40
        assert np.mean([name == '' for name in broken]) == pytest.approx(accuracy['autoattack'])
        assert np.mean([name != 'clean' for name in broken]) == pytest.approx(clean)
    assert accuracy['autoattack'] < clean
    assert 'autoattack-l2-0.8' in out
    assert not (report / 'unfinished').exists()
    assert not (report / 'masking.csv').exists()
    assert 'masking was not looked for: evaluation.masking_images is 0.' in out
    assert 'masking, ' not in out


@pytest.mark.parametrize(('norm', 'attack'), [('l0', 'pgd'), ('spatial', 'spatial')])
def test_threats_that_no_norm_bounds_are_reported(trained, capsys, tmp_path, norm, attack):
    import evaluate

    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns('report'))
    arguments = [
        f'--workdir={workdir}',
        '--noprogress',
        '--config.cpu_devices=8',
        f'--config.evaluation.norm={norm}',
        f'--config.evaluation.attacks={attack}',
        '--config.evaluation.eps=(2,20)',
        '--config.evaluation.steps=5',
        '--config.evaluation.limit=24',
        # No motion can be diagnosed, however many images there are.
        f'--config.evaluation.masking_images={0 if norm == "l0" else 8}',
        '--config.neurons.measures=()',
    ]
    assert evaluate.main(arguments) == 0
    results = json.loads((workdir / 'report' / 'results.json').read_text())
    why = 'masking_images is 0' if norm == 'l0' else "norm 'spatial'"
    assert why in results['masking/undiagnosed'] and 'masking/passed' not in results
    model, test = training.load(workdir), data.load('digits', 'test')
    accuracy = []
    for eps in (2, 20):
        name = f'{attack}-{norm}-{eps}'
        assert name in capsys.readouterr().out or accuracy
        accuracy.append(results[f'robust_accuracy/{name}'])
    threat = attacks.Motion(20) if norm == 'spatial' else attacks.Threat(norm, 20)
    options = {} if norm == 'spatial' else {'steps': 5}
    x, y = data.to_float(test.images[:24]), test.labels[:24]
    run = getattr(attacks, attack)
    found = run(
        model.forward, model.variables, x, y, evaluation.fixed_key(0), threat=threat, **options
    )
    assert accuracy[1] == pytest.approx(np.mean(~found.success))
    assert results['clean_accuracy'] >= accuracy[0] >= accuracy[1]
    assert (workdir / 'report' / 'accuracy_against_eps.png').exists()


def test_attacks_aim_at_a_class(trained, capsys, tmp_path):
    import evaluate

    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns('report'))
    arguments = [
        f'--workdir={workdir}',
        '--noprogress',
        '--config.cpu_devices=8',
        '--config.evaluation.target=random',
        "--config.evaluation.attacks=('pgd','fmn')",
        '--config.evaluation.eps=(0.1,0.3)',
        '--config.evaluation.steps=5',
        '--config.evaluation.auto_steps=10',
        '--config.evaluation.limit=24',
        '--config.evaluation.batch_size=8',
        '--config.evaluation.masking_images=0',
        '--config.neurons.measures=()',
    ]
    assert evaluate.main(arguments) == 0
    out = capsys.readouterr().out
    results = json.loads((workdir / 'report' / 'results.json').read_text())
    model, test = training.load(workdir), data.load('digits', 'test')
    x, y = data.to_float(test.images[:24]), test.labels[:24]
    key = evaluation.fixed_key(0)
    problem = (model.forward, model.variables, x, y)
    own = jax.random.fold_in(key, 2**32 - 1)
    target = attacks.target_classes(*problem, own, kind='random')
    right = model.forward(model.variables, x)[0].argmax(-1) == y
    nearest = attacks.fmn(
        *problem, key, threat=attacks.Threat('linf', 0.3), target=target, steps=10
    )
    for eps in (0.1, 0.3):
        found = attacks.pgd(
            *problem, key, threat=attacks.Threat('linf', eps), target=target, steps=5
        )
        predictions = model.forward(model.variables, found.x_adv)[0].argmax(-1)
        name = f'pgd_random-linf-{eps}'
        assert results[f'target_rate/{name}'] == pytest.approx(np.mean(predictions == target))
        robust = np.mean(right & (predictions == y))
        assert results[f'robust_accuracy/{name}'] == pytest.approx(robust)
        share = np.mean(nearest.distance <= eps)
        assert results[f'target_rate/fmn_random-linf-{eps}'] == pytest.approx(share)
        robust = np.mean(right & ~(nearest.distance <= eps))
        assert results[f'robust_accuracy/fmn_random-linf-{eps}'] == pytest.approx(robust)
    assert 0 < results['target_rate/pgd_random-linf-0.3'] < 1
    assert 'taken for the target' in out and 'fmn_random-linf-0.3' in out
    # Attacks that cannot aim are refused, before anything runs.
    arguments[4] = "--config.evaluation.attacks=('pgd','fab')"
    with pytest.raises(SystemExit, match='2'):
        evaluate.main(arguments)
    assert "evaluation.attacks has 'fab', which does not aim" in capsys.readouterr().err


def test_two_models_are_compared(trained, scripts, tmp_path):
    workdir, _ = trained
    other = tmp_path / 'other'
    short = ('--config.steps=40', '--config.seed=1')
    scripts.here('train.py', f'--workdir={other}', *scripts.tiny, *short)
    few = ('--config.evaluation.attacks=()', '--config.evaluation.eps=(0.1,)')
    few += (
        '--config.evaluation.limit=30',
        '--config.neurons.limit=30',
        '--config.neurons.probes=1',
    )
    few += ("--config.neurons.measures=('attack',)", "--config.neurons.layers=('act2',)")
    few += ('--config.neurons.attack_steps=4', '--config.neurons.attack_neurons=3')
    few += ('--config.evaluation.masking_images=0',)
    others = (f'--compare={other}', f'--transfer_from={other}')
    out, _ = scripts.here('evaluate.py', f'--workdir={workdir}', *others, *few)
    directory = workdir / 'report' / 'neurons'
    assert (directory / 'act2-compare.npz').exists()
    ours = np.load(directory / 'act2.npz')['delta']
    theirs = np.load(directory / 'act2-compare.npz')['delta']
    assert ours.shape == theirs.shape == (30, 16)
    assert not np.allclose(ours, theirs)
    model = training.load(other)
    x = data.to_float(data.load('digits', 'test').images[:30])
    expected = neurons.sensitivity(model.forward, model.variables, x, layer='act2').delta
    np.testing.assert_allclose(theirs, expected, rtol=1e-3)
    results = json.loads((workdir / 'report' / 'results.json').read_text())
    assert results['compared/workdir'] == str(other)
    assert not (directory / 'act1.npz').exists(), 'files of an earlier evaluation are gone'
    # Images that fool the other model, and attacks through single neurons of this one.
    assert results['transfer_from'] == str(other)
    assert results['robust_accuracy/transfer-linf-0.1'] <= results['clean_accuracy']
    target, labels = training.load(workdir), data.load('digits', 'test').labels[:30]
    moved = attacks.transfer(
        target.forward,
        target.variables,
        x,
        labels,
        evaluation.fixed_key(0),
        threat=attacks.Threat('linf', 0.1),
        surrogate=model.forward,
        surrogate_variables=model.variables,
    )
    assert results['robust_accuracy/transfer-linf-0.1'] == np.mean(~moved.success)
    arrays = dict(np.load(directory / 'act2.npz'))
    assert arrays['attack_neurons'].shape == arrays['attack_success'].shape == (30, 3)
    predictions = np.asarray(target.forward(target.variables, x)[0]).argmax(-1)
    chosen = arrays['attack_neurons']
    found = attacks.neuron_attack(
        target.forward,
        target.variables,
        x,
        predictions,
        evaluation.fixed_key(0),
        threat=attacks.Threat('l2', 0.5),
        neurons=chosen,
        delta=np.take_along_axis(arrays['delta'], chosen, 1),
        layer='act2',
        steps=4,
    )
    np.testing.assert_array_equal(arrays['attack_success'], found.success)
    np.testing.assert_allclose(arrays['attack_gain'], found.gain, atol=1e-4)
    share = found.success.any(1).mean()
    assert results['neurons/act2/attack_broken_by_3'] == pytest.approx(share)
    assert f' {share:.2%}' in out
    assert (directory / 'act2-attack.png').exists()


def test_a_defence_is_calibrated_kept_and_attacked(trained, scripts, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns('report'))
    out, _ = scripts.here(
        'evaluate.py',
        f'--workdir={workdir}',
        '--config.defense.name=inverse_perturbation',
        "--config.defense.options={'layers': ('act2',), 'rho': (0.02, 0.05)}",
        "--config.defense.attacks=('square',)",
        "--config.defense.surrogates=('soft',)",
        "--config.evaluation.attacks=('pgd',)",
        '--config.evaluation.eps=(0.1,)',
        '--config.evaluation.steps=4',
        '--config.evaluation.queries=10',
        '--config.evaluation.limit=80',
        '--config.evaluation.masking_images=0',
        '--config.neurons.measures=()',
    )
    results = json.loads((workdir / 'report' / 'results.json').read_text())
    assert results['defense/name'] == 'inverse_perturbation' and results['defense/passes'] == 5
    worst = results['defense/worst/all-linf-0.1']
    attacked = ('static/pgd', 'adaptive/pgd', 'adaptive/pgd_soft', 'adaptive/square')
    assert worst <= min(results[f'defense/{name}-linf-0.1'] for name in attacked)
    assert 'adaptive/pgd_soft-linf-0.1' in out and 'true logit, oracle' in out
    assert (workdir / 'report' / 'defense_shifts.png').exists()
    page = (workdir / 'report' / 'index.html').read_text(encoding='utf-8')
    assert 'Defence: inverse perturbation</h2>' in page and '>adaptive/pgd_soft-linf-0.1<' in page
    # The parameters on disk are those that were attacked.
    model = training.load(workdir)
    parameters = defenses.load(workdir / 'defense', variables=model.variables)
    defended = defenses.inverse_perturbation.apply(parameters, model.forward)
    test = data.load('digits', 'test')
    logits, _ = jax.jit(defended)(model.variables, data.to_float(test.images[:80]))
    accuracy = (np.asarray(logits).argmax(-1) == test.labels[:80]).mean()
    assert results['defense/clean_accuracy'] == pytest.approx(accuracy)
    assert results['defense/calibration'] == {'images': 1000}
    # Kept parameters serve another evaluation.
    again = (
        f'--workdir={workdir}',
        f'--config.defense.parameters={workdir / "defense"}',
        '--config.defense.attacks=()',
        '--config.defense.surrogates=()',
        '--config.defense.controls=False',
        "--config.evaluation.attacks=('pgd',)",
        '--config.evaluation.eps=(0.1,)',
        '--config.evaluation.steps=4',
        '--config.evaluation.limit=80',
        '--config.evaluation.masking_images=0',
        '--config.neurons.measures=()',
    )
    before = (workdir / 'defense').stat()
    scripts.here('evaluate.py', *again, '--config.defense.name=inverse_perturbation')
    # They stay as they are, not written anew.
    assert (workdir / 'defense').stat() == before
    repeated = json.loads((workdir / 'report' / 'results.json').read_text())
    for key in ('clean_accuracy', 'settings', 'calibration', 'adaptive/pgd-linf-0.1'):
        assert repeated[f'defense/{key}'] == results[f'defense/{key}']
    # What a calibration would take is said of that one only.
    assert 'options' in results['config']['defense']
    assert not set(config.CALIBRATION) & set(repeated['config']['defense'])
    _, error = scripts.here('evaluate.py', *again, '--config.defense.name=pruning', status=2)
    assert "is 'inverse_perturbation', but defense.name is 'pruning'; name the same." in error


def test_kept_parameters_need_nothing_of_the_calibration_of_the_training():
    import evaluate

    defense = config.Defense(name='rescaling', options={'layer': 'act1'}, response='loss')
    trained = config.Config(defense=defense)
    kept = ['--config.defense.parameters=runs/digits/defense']
    for arguments in ([], ['--config.evaluation.limit=3']):
        assert evaluate._trained(trained, arguments) == trained
    found, _ = command_line.override(evaluate._trained(trained, kept), kept, evaluate._flags())
    usual = config.Defense(name='rescaling', parameters='runs/digits/defense')
    assert found.defense == usual and trained.defense.response == 'loss'
    # What the command says itself is still refused beside them.
    both = [*kept, '--config.defense.images=5']
    before = evaluate._trained(trained, both)
    assert command_line.override(before, both, evaluate._flags(), checked=False)
    with pytest.raises(config.ConfigError, match=r'defense\.images is for a calibration'):
        command_line.override(before, both, evaluate._flags())


QUICK = [
    "--config.evaluation.attacks=('fgsm',)",
    '--config.evaluation.eps=(0.1,)',
    '--config.evaluation.limit=40',
    '--config.evaluation.queries=4',
    '--config.evaluation.auto_steps=2',
    '--config.evaluation.masking_images=0',
    "--config.defense.attacks=('square',)",
    '--config.defense.images=100',
    '--config.neurons.measures=()',
]


@pytest.mark.parametrize(
    ('name', 'options'),
    [('rescaling', "{'layer': 'act1'}"), ('pruning', "{'layer': 'act2', 'count': 2}")],
)
def test_defences_come_and_go_with_the_command(trained, scripts, tmp_path, name, options):
    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns('report'))
    command = ['evaluate.py', f'--workdir={workdir}', *QUICK]
    defended = [f'--config.defense.name={name}', f'--config.defense.options={options}']
    scripts.here(*command, *defended)
    report = workdir / 'report'
    results = json.loads((report / 'results.json').read_text())
    assert results['defense/name'] == name
    assert results['defense/worst/all-linf-0.1'] <= results['defense/clean_accuracy']
    assert defenses.name_of(defenses.load(workdir / 'defense')) == name
    assert (report / 'defense.csv').exists()
    kept = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
    # Five images do not hold every class: one sentence before anything is attacked or written.
    needs_classes = [
        '--config.defense.name=inverse_perturbation',
        '--config.defense.images=5',
        "--config.defense.options={'layers': ('act2',)}",
    ]
    _, error = scripts.here(*command, *needs_classes, status=2)
    assert 'correctly classified calibration images' in error and 'fgsm' not in error
    assert kept == {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
    # What belongs to another report does not stay beside the next one.
    (report / 'neurons').mkdir()
    (report / 'neurons' / 'neurons.csv').touch()
    scripts.here(*command)
    assert not list(report.glob('defense*')) and not (report / 'neurons').exists()
    assert 'defense/name' not in json.loads((report / 'results.json').read_text())


@pytest.mark.parametrize('function', ['measure_neurons', 'defense_section'])
def test_what_shows_only_in_the_end_is_one_sentence_too(
    trained, scripts, tmp_path, monkeypatch, function
):
    def refuse(*arguments, **options):
        raise ValueError('The weights leave nothing to sweep.')

    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns('report', 'defense'))
    monkeypatch.setattr(evaluation, function, refuse)
    measures = "('statistics',)" if function == 'measure_neurons' else '()'
    out, error = scripts.here(
        'evaluate.py',
        f'--workdir={workdir}',
        '--noprogress',
        '--config.defense.name=pruning',
        "--config.defense.options={'layer': 'act2', 'order': 'random'}",
        '--config.defense.measure=influence',
        '--config.defense.attacks=()',
        '--config.defense.images=40',
        '--config.evaluation.attacks=()',
        '--config.evaluation.eps=()',
        '--config.evaluation.limit=40',
        '--config.evaluation.masking_images=0',
        f'--config.neurons.measures={measures}',
        status=2,
    )
    assert 'clean_accuracy' in out and error == 'error: The weights leave nothing to sweep.\n'
    # Nothing of it stands beside the report of an earlier evaluation.
    assert not (workdir / 'defense').exists()
    assert not list(workdir.rglob('*report*'))


def test_what_the_system_refuses_is_one_sentence(tmp_path, capsys):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit) as stopped, command_scripts.user_errors():
        (tmp_path / 'file' / 'report').mkdir()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{tmp_path / 'file' / 'report'}': Not a directory; see that")
    assert error.count('\n') == 1


def test_commands_are_shown_as_a_shell_takes_them():
    arguments = ["--a=('x','y')", '--b=$HOME/`c`', """--d="e" 'f'""", '--g=(1,2)', '', '--h=!i']
    command = command_scripts.provenance('evaluate.py', arguments)['command']
    assert shlex.split(command) == ['python', 'evaluate.py', *arguments]
    assert """ "--a=('x','y')" """ in command


MISTAKES = [
    (['--config.defense.name=inverse'], "Unknown defense 'inverse'"),
    (
        ['--config.defense.name=pruning', "--config.defense.options={'size': 3}"],
        "Unknown option of pruning 'size'",
    ),
    (
        ['--config.defense.name=rescaling', "--config.defense.options={'layer': 'act9'}"],
        "Unknown layer 'act9'",
    ),
    (
        ['--config.defense.name=pruning', "--config.defense.options={'count': 999}"],
        'count is 999, but layer',
    ),
    (
        ['--config.defense.name=inverse_perturbation', "--config.defense.options={'top': 11}"],
        'top is 11, but the model has 10 classes',
    ),
    (
        [
            '--config.defense.name=rescaling',
            "--config.defense.options={'layer': 'act1', 'renormalize': True}",
        ],
        "Unknown layer with a kernel 'act1'",
    ),
    (
        ['--config.defense.name=inverse_perturbation', "--config.defense.options={'rho': ('a',)}"],
        "rho is 'a'; it must be a number",
    ),
    (
        [
            '--config.defense.name=rescaling',
            "--config.defense.options={'layer': 'conv1', 'unit': 'unit', 'renormalize': True}",
        ],
        "'conv1' has 4 filters and 256 neurons of unit 'unit'; set unit to 'channel'",
    ),
    (['--config.defense.measure=size'], "Unknown defense.measure 'size'"),
    (
        ['--config.defense.name=rescaling', '--config.defense.measure=influence'],
        "defense.measure is 'influence', which is for 'pruning', but defense.name is 'rescaling'",
    ),
    (
        ['--config.evaluation.draws=8', "--config.evaluation.attacks=('pgd','fmn')"],
        "'fmn', which does not average gradients over draws, and evaluation.draws is 8",
    ),
    (['--config.defense.response=size'], "Unknown defense.response 'size'"),
    (
        [
            '--config.defense.name=rescaling',
            '--config.defense.parameters=nowhere',
            '--config.defense.response=loss',
        ],
        'defense.response is for a calibration, and defense.parameters names the result',
    ),
    (["--config.defense.surrogates=('hard',)"], "Unknown defense.surrogates item 'hard'"),
    (['--config.model=mlp'], '--config.model is fixed by the trained model'),
    (['--config=configs/mnist.py'], '--config is fixed by the trained model'),
    (['--checkpoint=7'], "There is no checkpoint '7'"),
    (['--config.evaluation.norm=l3'], "Unknown evaluation.norm 'l3'; valid names are linf, l2"),
    (
        ['--config.evaluation.norm=l0', "--config.evaluation.attacks=('fab',)"],
        "'fab', which does not count pixels as evaluation.norm 'l0' does; the attacks that do are",
    ),
    (
        ['--config.evaluation.norm=spatial', "--config.evaluation.attacks=('pgd',)"],
        "the attack 'spatial' and the norm 'spatial' go together",
    ),
    (
        ['--config.evaluation.norm=spatial', '--transfer_from=SELF'],
        '--transfer_from makes images by PGD, which has no norm spatial; leave it out',
    ),
    (['--config.evaluation.attacks=cw'], "Unknown evaluation.attacks item 'cw'"),
    (['--config.evaluation.eps=(-1.0,)'], 'evaluation.eps item is -1.0'),
    (['--config.evaluation.masking_images=-1'], 'evaluation.masking_images is -1; it must be at'),
    (["--config.neurons.measures=('size',)"], "Unknown neurons.measures item 'size'"),
    (["--config.neurons.layers=('act7',)"], "Unknown layer 'act7'"),
    (
        ["--config.neurons.layers=('act1',)", '--config.neurons.method=closed_form'],
        "sensitivity has no closed form; use method='first_order' or 'exact'",
    ),
    (['--config.neurons.unit=filter'], "Unknown neurons.unit 'filter'; valid names are channel"),
    (
        ["--config.neurons.measures=('attack',)", '--config.neurons.straight_layer=pool9'],
        "Unknown layer 'pool9",
    ),
    (['--compare=nowhere'], 'There is no checkpoint in nowhere'),
    (['--transfer_from=nowhere'], 'There is no checkpoint in nowhere'),
    (['--config.neurons.measures=()', '--compare=SELF'], 'neurons.measures is empty'),
    (['--config.neurons.attack_norm=l3'], "Unknown neurons.attack_norm 'l3'"),
]


@pytest.mark.parametrize(('arguments', 'sentence'), MISTAKES)
def test_a_mistake_is_one_sentence(trained, arguments, sentence, capsys):
    import evaluate

    workdir, _ = trained
    arguments = [argument.replace('SELF', str(workdir)) for argument in arguments]
    # In process: JAX runs already, so the number of CPU devices is left alone.
    few = [
        '--config.cpu_devices=8',
        '--config.evaluation.limit=8',
        '--config.evaluation.attacks=()',
    ]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([f'--workdir={workdir}', '--noprogress', *few, *arguments])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.startswith('error: ') and err.count('\n') == 1


def test_a_directory_without_training_is_named(scripts, tmp_path):
    # In a process of its own, whose exit status is the script's.
    _, err = scripts.run('evaluate.py', f'--workdir={tmp_path}', status=2)
    assert f'There is no checkpoint in {tmp_path}' in err
