"""train.py does what its users see: trains, goes on after any interruption, explains mistakes."""

import json
import random
import signal
import time

import jax
import numpy as np
import pytest
from waiting import wait_for_step

from neurosens import training
from neurosens.training import logs


def final_parameters(workdir):
    return training.load(workdir, 'latest').variables


def metrics_without_times(workdir):
    return [
        {name: value for name, value in line.items() if name != 'images_per_second'}
        for line in logs.read(workdir)
    ]


def assert_same_training(workdir, reference):
    left, right = final_parameters(workdir), final_parameters(reference)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert np.array_equal(a, b), 'parameters must agree bit for bit'
    assert metrics_without_times(workdir) == metrics_without_times(reference)


def test_training_ends_with_a_good_model_and_the_next_command(trained):
    workdir, out = trained
    assert out.splitlines()[-1] == f'Done. Next: python evaluate.py --workdir={workdir}'
    lines = logs.read(workdir)
    steps = [line['step'] for line in lines if 'loss' in line]
    assert steps == list(range(5, 121, 5))
    assert lines[-1]['validation_accuracy'] > 0.5
    assert {'loss', 'accuracy', 'gradient_norm', 'learning_rate', 'images_per_second'} <= set(
        lines[0]
    )
    assert list((workdir / logs.TENSORBOARD_DIRECTORY).glob('events*'))
    config = json.loads((workdir / 'config.json').read_text())
    assert config['steps'] == 120


def test_a_finished_training_is_left_as_it_is(trained, scripts):
    workdir, _ = trained
    before = metrics_without_times(workdir)
    out, _ = scripts.here('train.py', f'--workdir={workdir}', *scripts.tiny)
    assert 'Done.' in out
    assert metrics_without_times(workdir) == before


def test_five_kills_at_random_moments_change_nothing(trained, scripts, tmp_path):
    reference, _ = trained
    workdir = tmp_path / 'killed'
    generator = random.Random(time.time_ns())
    targets = sorted(generator.sample(range(1, 110), 5))
    for target in targets:
        process = scripts.start('train.py', f'--workdir={workdir}', *scripts.tiny, '--noprogress')
        wait_for_step(workdir, target, process)
        # Any moment: in a step, in a validation, in the middle of writing a checkpoint.
        time.sleep(generator.random() * 0.2)
        process.kill()
        process.communicate()
    scripts.run('train.py', f'--workdir={workdir}', *scripts.tiny)
    assert_same_training(workdir, reference)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_first(trained, scripts, tmp_path, number):
    reference, _ = trained
    workdir = tmp_path / 'stopped'
    process = scripts.start('train.py', f'--workdir={workdir}', *scripts.tiny)
    wait_for_step(workdir, 20, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f'Stopped by {number.name} after step' in err
    stopped_at = int(err.split('after step ')[1].split(';')[0])
    checkpoints = {int(path.name) for path in (workdir / 'checkpoints').iterdir()}
    assert stopped_at in checkpoints
    if number == signal.SIGINT:
        return
    # What is saved is the same for both: going on once shows that it is whole.
    out, _ = scripts.run('train.py', f'--workdir={workdir}', *scripts.tiny)
    assert f'Going on from the checkpoint of step {stopped_at}.' in out
    assert_same_training(workdir, reference)


def test_robust_training_logs_every_term(scripts, tmp_path):
    workdir = tmp_path / 'robust'
    terms = "{'sensitivity_and_jacobian': {'weight': 0.5, 'ramp': 0.5}, 'neuron_contribution': {}}"
    scripts.run(
        'train.py',
        f'--workdir={workdir}',
        *scripts.tiny,
        '--config.steps=20',
        '--config.objective=trades',
        "--config.objective_options={'eps': 0.05, 'steps': 2}",
        f'--config.regularizers={terms}',
    )
    last = [line for line in logs.read(workdir) if 'loss' in line][-1]
    assert last['step'] == 20
    assert last['attacked_accuracy'] <= last['clean_accuracy']
    for name in (
        'sensitivity_and_jacobian/penalty',
        'sensitivity_and_jacobian/jacobian',
        'sensitivity_and_jacobian/dead',
        'neuron_contribution/weight_difference',
        'neuron_contribution/contribution',
    ):
        assert np.isfinite(last[name]), name
    assert training.load(workdir).config.objective_options == {'eps': 0.05, 'steps': 2}


def test_divergence_is_named_and_keeps_the_last_checkpoint(scripts, tmp_path):
    workdir = tmp_path / 'diverged'
    arguments = (f'--workdir={workdir}', *scripts.tiny, '--config.schedule.name=piecewise')
    # The rate explodes half-way, after the first checkpoints.
    _, err = scripts.here(
        'train.py', *arguments, '--config.schedule.factor=1e30', '--noprogress', status=1
    )
    assert 'Training diverged at step 6' in err
    assert 'the checkpoint of step 60 is kept' in err
    assert 'Traceback' not in err
    assert training.load(workdir, 'latest').step == 60


MISTAKES = [
    ('--config.modle=cnn', "Unknown config key 'modle'; the closest names are model"),
    ('--config.steps=many', "'steps' cannot take 'many'; it must be of type int"),
    ('--config.batch_size=-1', 'batch_size is -1; it must be at least 1'),
    ('--config.model=resnet19', 'the closest names are resnet18'),
    ("--config.model_options={'width': 3}", "Unknown cnn option 'width'"),
    ('--config.dataset=digit', "Unknown data set 'digit'; valid names are digits"),
    ('--config.optimizer.name=adam', "Unknown optimizer.name 'adam'; valid names are sgd, adamw"),
    ('--config.schedule.name=linear', "Unknown schedule.name 'linear'"),
    ('--config.objective=hinge', "Unknown objective 'hinge'"),
    ("--config.regularizers={'l3': {}}", "Unknown regularizer 'l3'"),
    ("--config.regularizers={'jacobian': 0.1}", "Regularizer 'jacobian' is given as 0.1"),
    (
        "--config.regularizers={'activation_sensitivity': {'layers': ('nowhere',)}}",
        "Unknown layer 'nowhere'",
    ),
    ('--config.augmentation=crop', "Unknown augmentation 'crop'"),
    ('--config=configs/digit.py', "Config file 'configs/digit.py' does not exist"),
    ('--wrkdir=x', "Unknown flag '--wrkdir'; valid names are --config, --workdir"),
    ('now', "Unexpected argument 'now'"),
]


@pytest.mark.parametrize(('argument', 'sentence'), MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(argument, sentence, tmp_path, capsys):
    import train

    workdir = tmp_path / 'nothing'
    # In process: JAX runs already, so the number of CPU devices is left alone.
    with pytest.raises(SystemExit) as stopped:
        train.main([argument, f'--workdir={workdir}', '--config.cpu_devices=8'])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert not workdir.exists()


def test_an_unprepared_data_set_names_the_command_that_prepares_it(scripts, tmp_path):
    _, err = scripts.here(
        'train.py',
        '--config=configs/cifar10.py',
        f'--config.data_dir={tmp_path}',
        status=2,
    )
    assert f'python -m neurosens.data prepare cifar10 --data_dir={tmp_path}' in err
    assert err.count('\n') == 1


def test_another_config_is_refused_with_the_differing_keys(trained, scripts):
    workdir, _ = trained
    _, err = scripts.here(
        'train.py', f'--workdir={workdir}', *scripts.tiny, '--config.seed=7', status=2
    )
    assert 'seed (0 there, 7 now)' in err
    assert err.count('\n') == 1


def test_help_lists_the_flags(scripts):
    out, _ = scripts.here('train.py', '--help')
    assert '--workdir' in out and '--[no]distributed' in out


def test_a_process_of_several_must_say_so(scripts, monkeypatch):
    monkeypatch.setenv('SLURM_NTASKS', '4')
    _, err = scripts.here('train.py', status=2)
    assert 'SLURM_NTASKS=4' in err and '--distributed' in err
