"""Training from a config: what is logged and kept, and that interruptions change nothing."""

import dataclasses
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from interruptions import Killed, assert_same_bits, interrupted, kill, lines, train

from neurosens import config as config_lib
from neurosens import data, parallel, training
from neurosens.training import checkpoints, logs, objectives
from neurosens.training import experiment as experiment_lib

BATCH = 32
STEPS = 11
PER_EPOCH = (1437 - 37) // BATCH
# Everything that has state: momentum, accumulation, averaged weights, running statistics.
CONFIG = config_lib.Config(
    dataset='digits',
    validation_size=37,
    augmentation='pad_crop',
    model='cnn',
    model_options={'features': (4,), 'hidden': (8,), 'norm': 'batch'},
    steps=STEPS,
    batch_size=BATCH,
    optimizer=config_lib.Optimizer(learning_rate=0.05, accumulate=2, ema_decay=0.5),
    log_every=3,
    evaluate_every=4 / PER_EPOCH,
    checkpoint_every=5,
)


def steps_in(workdir):
    return sorted(int(child.name) for child in (workdir / 'checkpoints').iterdir())


@pytest.fixture(scope='module')
def experiment():
    return training.prepare(CONFIG)


@pytest.fixture(scope='module')
def uninterrupted(experiment, tmp_path_factory):
    """The work directory of a whole training, and its result."""
    workdir = tmp_path_factory.mktemp('uninterrupted')
    return workdir, train(experiment, workdir)


# -------------------------------------------------------------------------- what it leaves


def test_lines_are_logged_at_the_steps_asked_for_and_at_the_last(uninterrupted):
    logged = logs.read(uninterrupted[0])
    trained = [line['step'] for line in logged if 'loss' in line]
    validated = [line['step'] for line in logged if 'validation_loss' in line]
    assert trained == [3, 6, 9, 11]
    assert validated == [4, 8, 11]
    assert [line['step'] for line in logged] == sorted(trained + validated)


def test_a_training_line_holds_every_metric(uninterrupted):
    line = logs.read(uninterrupted[0])[-2]
    assert set(line) == {
        *('step', 'loss', 'accuracy', 'gradient_norm', 'update_norm', 'learning_rate'),
        'images_per_second',
    }
    assert 0 <= line['accuracy'] <= 1 and line['images_per_second'] > 0


def test_the_result_is_that_of_the_last_validation(uninterrupted, experiment):
    workdir, result = uninterrupted
    assert result.step == result.state.step == experiment.total_steps == STEPS
    last = lines(workdir)[-1]
    assert last['validation_accuracy'] == result.validation_accuracy
    assert last['validation_accuracy'] * 37 == pytest.approx(
        round(last['validation_accuracy'] * 37)
    )


def test_the_latest_checkpoints_and_the_best_are_left(uninterrupted):
    workdir, _ = uninterrupted
    scores = {
        line['step']: line['validation_accuracy']
        for line in lines(workdir)
        if 'validation_accuracy' in line
    }
    best = max(scores, key=lambda step: (scores[step], step))
    assert set(steps_in(workdir)) == {10, 11, best}
    assert checkpoints.read_config(workdir, 'best') == (best, CONFIG)


def test_the_averaged_parameters_are_validated(uninterrupted, experiment):
    _, result = uninterrupted
    evaluated = training.evaluated_variables(result.state)
    batch = next(experiment.validation.eval_batches(batch_size=37))
    logits, _ = jax.jit(experiment.forward)(evaluated, data.to_float(jax.device_put(batch.image)))
    accuracy = float((np.argmax(logits, -1) == batch.label).mean())
    assert accuracy == pytest.approx(result.validation_accuracy, abs=1e-6)


def test_the_config_lies_beside_the_checkpoints(uninterrupted):
    text = (uninterrupted[0] / 'config.json').read_text()
    assert config_lib.from_dict(json.loads(text)) == CONFIG


# --------------------------------------------------------------------------- interruption


def stop_by(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(
    scope='module',
    params=[
        (2, kill, []),
        (5, kill, [4, 5]),
        (7, kill, [4, 5]),
        (6, stop_by(signal.SIGTERM), [5, 7]),
    ],
    ids=['before any checkpoint', 'at a checkpoint', 'after a checkpoint', 'by a signal'],
)
def resumed(request, experiment, tmp_path_factory):
    """The work directory of a training stopped on the way and started again, and its result."""
    after, action, saved = request.param
    workdir = tmp_path_factory.mktemp('resumed')
    with pytest.raises((Killed, training.Interrupted)):
        train(interrupted(experiment, after, action), workdir)
    assert set(saved) <= set(steps_in(workdir)) <= {4, *saved}
    return workdir, train(experiment, workdir)


def test_resumed_training_ends_with_the_state_of_an_uninterrupted_one(resumed, uninterrupted):
    (_, result), (_, whole) = resumed, uninterrupted
    assert_same_bits(result.state, whole.state)
    assert (result.step, result.validation_accuracy) == (whole.step, whole.validation_accuracy)


def test_resumed_training_logs_the_lines_of_an_uninterrupted_one(resumed, uninterrupted):
    assert lines(resumed[0]) == lines(uninterrupted[0])


def test_a_restored_state_needs_no_other_program_than_a_fresh_one(resumed, experiment):
    assert experiment.train_step._cache_size() == 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_a_step_whose_checkpoint_is_saved(experiment, tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(training.Interrupted) as stop:
        train(interrupted(experiment, 1, stop_by(number)), tmp_path)
    assert stop.value.signal_number == number
    assert str(stop.value) == (
        f'Stopped by {number.name} after step 2; the checkpoint is saved and the same command goes '
        'on from it.'
    )
    assert steps_in(tmp_path) == [2]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.filterwarnings('ignore:Checkpoint 5')
def test_a_damaged_newest_checkpoint_changes_nothing(uninterrupted, experiment, tmp_path):
    with pytest.raises(Killed):
        train(interrupted(experiment, 7), tmp_path)
    (tmp_path / 'checkpoints' / '5' / '_CHECKPOINT_METADATA').write_text('')
    resumed = train(experiment, tmp_path)
    assert (tmp_path / 'damaged_checkpoints' / '5').is_dir()
    assert_same_bits(resumed.state, uninterrupted[1].state)
    assert lines(tmp_path) == lines(uninterrupted[0])


def test_finished_training_started_again_returns_its_result(uninterrupted, experiment, tmp_path):
    workdir, whole = uninterrupted
    before = logs.read(workdir)
    again = train(interrupted(experiment, 0), workdir)
    assert_same_bits(again.state, whole.state)
    assert (again.step, again.validation_accuracy) == (whole.step, whole.validation_accuracy)
    assert logs.read(workdir) == before


def test_another_config_in_the_same_work_directory_is_refused(uninterrupted, experiment):
    other = dataclasses.replace(experiment, config=dataclasses.replace(CONFIG, log_every=4))
    with pytest.raises(checkpoints.CheckpointError, match=r'log_every \(3 there, 4 now\)'):
        train(other, uninterrupted[0])


# ----------------------------------------------------------------------------- divergence


def test_divergence_is_reported_and_the_checkpoint_before_it_kept(tmp_path):
    # From the sixth update on, the learning rate is absurd.
    config = config_lib.Config(
        model_options={'features': (4,), 'hidden': (8,)},
        steps=10,
        batch_size=BATCH,
        schedule=config_lib.Schedule('piecewise', warmup=0.0, boundaries=(0.5,), factor=1e20),
        checkpoint_every=4,
        log_every=1,
    )
    experiment = training.prepare(config)
    with pytest.raises(training.TrainingStopped) as stop:
        train(experiment, tmp_path)
    message = str(stop.value)
    # The update itself overflows, one step before the loss would.
    assert message.startswith('Training diverged at step 6 (')
    assert 'update_norm inf' in message
    assert message.endswith(
        '; the checkpoint of step 4 is kept. Lower optimizer.learning_rate, lengthen '
        'schedule.warmup or set optimizer.clip_norm.'
    )
    assert steps_in(tmp_path) == [4]
    assert [line['step'] for line in logs.read(tmp_path)] == [1, 2, 3, 4, 5]
    items = {'variables': experiment_lib.abstract_state(experiment).variables}
    restored = checkpoints.read_items(tmp_path, 4, items)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))


def test_divergence_before_the_first_checkpoint_says_that_nothing_was_saved(experiment, tmp_path):
    def diverging(state, batch, key):
        return state, {'loss': np.float32(np.nan), 'accuracy': np.float32(0.5)}

    with pytest.raises(training.TrainingStopped) as stop:
        train(dataclasses.replace(experiment, train_step=diverging), tmp_path)
    assert str(stop.value).startswith(
        'Training diverged at step 1 (accuracy 0.5, loss nan); nothing was saved yet. Lower '
    )
    assert steps_in(tmp_path) == []


# ------------------------------------------------------------------------------- prepare


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'batch_size': 30},
            'batch_size is 30; it must be a multiple of the 8 devices, such as 32.',
        ),
        ({'dataset': 'digit'}, 'digits'),
        ({'model': 'cn'}, 'cnn'),
        ({'model_options': {'feature': (4,)}}, 'features'),
        ({'model_options': {'features': ()}}, 'features'),
        ({'objective': 'standart'}, "Unknown objective 'standart'"),
        ({'objective_options': {'smoothing': 0.1}}, 'label_smoothing'),
        ({'objective_options': {'label_smoothing': 1.0}}, 'label_smoothing is 1.0'),
        ({'augmentation': 'pad'}, 'pad_crop'),
        ({'regularizers': {'small': {}}}, "Unknown regularizer 'small'"),
        (
            {'regularizers': {'jacobian': 0.1}},
            "Regularizer 'jacobian' is given as 0.1; it must be a dict",
        ),
        ({'regularizers': {3: {'regularizer': 'jacobian'}}}, 'A regularizer is named 3; a name'),
        (
            {'regularizers': {'mine': {'regularizer': ['jacobian']}}},
            "Unknown regularizer ['jacobian']",
        ),
        ({'validation_size': 1437}, '1437'),
        ({'batch_size': 1600}, '1600'),
        ({'schedule': config_lib.Schedule('linear')}, 'cosine'),
        ({'optimizer': config_lib.Optimizer('adam')}, 'adamw'),
        ({'optimizer': config_lib.Optimizer(learning_rate=0.0)}, 'optimizer.learning_rate is 0.0'),
    ],
)
def test_a_mistake_in_the_config_is_found_before_training(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        training.prepare(dataclasses.replace(CONFIG, **changes))
    assert '\n' not in str(error.value)


def test_the_number_of_steps_follows_from_the_epochs():
    config = dataclasses.replace(CONFIG, steps=0, epochs=1.5, evaluate_every=0.5)
    prepared = training.prepare(config, parallel.data_mesh(4))
    assert prepared.total_steps == round(1.5 * PER_EPOCH)
    assert prepared.evaluate_every == round(0.5 * PER_EPOCH)
    assert prepared.source.num_examples == 1400 and prepared.validation.num_examples == 37
    assert prepared.mesh.size == 4


def test_fewer_than_one_step_becomes_one():
    config = dataclasses.replace(CONFIG, steps=0, epochs=1e-6, evaluate_every=1e-6)
    prepared = training.prepare(config)
    assert (prepared.total_steps, prepared.evaluate_every) == (1, 1)


def test_a_regularizer_takes_its_weight_ramp_and_options_from_the_config(monkeypatch):
    made = []

    def small(*, power):
        return f'penalty of power {power}'

    monkeypatch.setitem(objectives.REGULARIZERS, 'small', small)

    def make_train_step(*args, **kwargs):
        made.append(args[4])
        return lambda state, batch, key: (state, {})

    monkeypatch.setattr(experiment_lib, 'make_train_step', make_train_step)
    options = {'small': {'power': 3, 'weight': 2, 'ramp': 0.5, 'start': 0.25}}
    training.prepare(dataclasses.replace(CONFIG, regularizers=options))
    training.prepare(dataclasses.replace(CONFIG, regularizers={'small': {'power': 3}}))
    penalty = 'penalty of power 3'
    ramp, start = round(STEPS / 2), round(STEPS / 4)
    first, second = (
        ('small', penalty, 2.0, ramp, start, False, False),
        ('small', penalty, 1.0, 0, 0, False, False),
    )
    assert made == [[first], [second]]
    assert options == {'small': {'power': 3, 'weight': 2, 'ramp': 0.5, 'start': 0.25}}
    with pytest.raises(ValueError, match="The regularizer 'small' needs the option 'power'"):
        training.prepare(dataclasses.replace(CONFIG, regularizers={'small': {}}))
