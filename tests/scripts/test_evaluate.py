"""evaluate.py reports what a fresh computation finds, and writes its report."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from neurosens import data, metrics, training

EVALUATE = (
    '--config.evaluation.eps=(0.02,0.1)',
    '--config.evaluation.steps=5',
    '--config.evaluation.limit=200',
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
        'examples-fgsm-linf-0.1.png',
        'examples-pgd-linf-0.1.png',
    }
    for name in pictures:
        with Image.open(report / name) as picture:
            assert len(picture.convert('L').getcolors(65536)) > 5, 'an empty picture'
    assert not list(report.glob('.*partial'))


@pytest.mark.parametrize(
    'changes', [('--config.cpu_devices=1',), ('--config.evaluation.batch_size=48',)]
)
def test_results_do_not_depend_on_devices_and_batches(evaluated, scripts, changes):
    workdir, _, results = evaluated
    scripts.run('evaluate.py', f'--workdir={workdir}', *EVALUATE, *changes)
    again = json.loads((workdir / 'report' / 'results.json').read_text())
    same = {key: value for key, value in again.items() if key not in ('config', 'clean_loss')}
    assert same == {key: results[key] for key in same}
    assert again['clean_loss'] == pytest.approx(results['clean_loss'], rel=1e-6)


MISTAKES = [
    (['--config.model=mlp'], '--config.model is fixed by the trained model'),
    (['--config=configs/mnist.py'], '--config is fixed by the trained model'),
    (['--checkpoint=7'], "There is no checkpoint '7'"),
    (['--config.evaluation.norm=l3'], "Unknown evaluation.norm 'l3'; valid names are linf, l2"),
    (['--config.evaluation.attacks=cw'], "Unknown evaluation.attacks item 'cw'"),
    (['--config.evaluation.eps=(-1.0,)'], 'evaluation.eps item is -1.0'),
]


@pytest.mark.parametrize(('arguments', 'sentence'), MISTAKES)
def test_a_mistake_is_one_sentence(trained, arguments, sentence, capsys):
    import evaluate

    workdir, _ = trained
    # In process: JAX runs already, so the number of CPU devices is left alone.
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([f'--workdir={workdir}', '--config.cpu_devices=8', *arguments])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.startswith('error: ') and err.count('\n') == 1


def test_a_directory_without_training_is_named(scripts, tmp_path):
    _, err = scripts.run('evaluate.py', f'--workdir={tmp_path}', status=2)
    assert f'There is no checkpoint in {tmp_path}' in err
