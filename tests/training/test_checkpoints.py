"""Checkpoints come back bit for bit, or say why not; training goes on from the one before."""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neurosens import config as config_lib
from neurosens import fingerprints, parallel
from neurosens.training import CheckpointError, checkpoints

CONFIG = config_lib.Config(
    model_options={'features': (4,), 'hidden': (8,)}, objective_options={'label_smoothing': 0.1}
)
LOOP = {'window': {'counts': {'loss': 2}, 'sums': {'loss': 0.1 + 0.2}}, 'validation_accuracy': None}


def items_of(seed):
    """Checkpointables with everything that a training state may hold."""
    generator = np.random.default_rng(seed)
    params = {
        'kernel': generator.normal(size=(64, 32)).astype(np.float32),
        'half': jnp.asarray(generator.normal(size=7), jnp.bfloat16),
        'odd': np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
    }
    rule = optax.chain(optax.trace(0.9), optax.scale_by_adam(), optax.identity())
    return {
        'variables': {'params': params, 'batch_stats': {}, 'nested': {'empty': {}}},
        'optimizer': (optax.MultiSteps(rule, 2).init({'kernel': params['kernel']}), None),
        'average': {'count': np.int32(seed), 'on': np.array([True, False])},
    }


def placed(seed):
    return parallel.replicate(parallel.data_mesh(), items_of(seed))


@pytest.fixture(scope='module')
def abstract():
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), placed(0)
    )


@pytest.fixture(scope='module')
def three_checkpoints(tmp_path_factory):
    """A work directory with the steps 10, 20 and 30, of which nobody writes."""
    workdir = tmp_path_factory.mktemp('three')
    with checkpoints.open_directory(workdir, keep=3) as checkpointer:
        for step in (10, 20, 30):
            checkpoints.save(checkpointer, step, placed(step), CONFIG, {**LOOP, 'step': step}, 0.5)
    return workdir


@pytest.fixture
def workdir(three_checkpoints, tmp_path):
    return shutil.copytree(three_checkpoints, tmp_path / 'work')


def steps_in(workdir):
    return sorted(int(child.name) for child in (workdir / 'checkpoints').iterdir())


def read_latest(workdir, abstract):
    step, _ = checkpoints.read_config(workdir, 'latest')
    return checkpoints.read_items(workdir, step, {'variables': abstract['variables']})


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def resume(workdir, abstract, config=CONFIG):
    checkpointer, restored = checkpoints.resume(workdir, 3, abstract, config)
    checkpointer.close()
    return restored


# ------------------------------------------------------------------------------ round trip


def test_what_was_saved_comes_back_bit_for_bit(workdir, abstract):
    restored = resume(workdir, abstract)
    assert restored.step == 30
    assert_same_bits(restored.items, items_of(30))
    assert restored.loop == {**LOOP, 'step': 30}


def test_what_comes_back_lies_on_every_device(workdir, abstract):
    for leaf in jax.tree.leaves(resume(workdir, abstract).items):
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 8


def test_a_new_work_directory_has_nothing_to_restore(tmp_path, abstract):
    assert resume(tmp_path / 'new', abstract) is None


def test_one_checkpointable_can_be_read_alone(workdir, abstract):
    read = checkpoints.read_items(workdir, 20, {'average': abstract['average']})
    assert_same_bits(read, {'average': items_of(20)['average']})


def test_the_config_comes_back_equal(workdir):
    step, config = checkpoints.read_config(workdir, 'latest')
    assert (step, config) == (30, CONFIG)
    assert isinstance(config.model_options['features'], tuple)


# ------------------------------------------------------------------------------- selection


@pytest.fixture(scope='module')
def scored(tmp_path_factory):
    """A work directory that keeps two of seven checkpoints, and its steps after every save."""
    workdir = tmp_path_factory.mktemp('scored')
    history = []
    with checkpoints.open_directory(workdir, keep=2) as checkpointer:
        for step, accuracy in enumerate((0.5, 0.9, None, 0.7, 0.6, None, 0.8), start=1):
            checkpoints.save(checkpointer, step, placed(step), CONFIG, LOOP, accuracy)
            history.append(steps_in(workdir))
    return workdir, history


def test_the_latest_checkpoints_and_the_best_are_kept(scored):
    _, history = scored
    assert history == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]


@pytest.mark.parametrize(('which', 'step'), [('best', 2), ('latest', 7), ('6', 6), ('2', 2)])
def test_a_checkpoint_is_chosen_by_accuracy_age_or_step(scored, which, step):
    assert checkpoints.read_config(scored[0], which)[0] == step


@pytest.mark.parametrize(('keep_robust', 'kept'), [(True, [2, 3, 5]), (False, [3, 5])])
def test_the_most_robust_is_kept_where_asked(tmp_path, keep_robust, kept):
    scores = ((0.5, 0.4), (0.6, 0.4), (0.8, 0.3), (0.7, 0.2), (None, None))
    with checkpoints.open_directory(tmp_path, keep=1, keep_robust=keep_robust) as checkpointer:
        for step, (accuracy, robust) in enumerate(scores, start=1):
            checkpoints.save(checkpointer, step, placed(step), CONFIG, LOOP, accuracy, robust)
    assert steps_in(tmp_path) == kept
    # Of equally robust ones that is the later; the best is by the other accuracy.
    assert checkpoints.read_config(tmp_path, 'best')[0] == 3


def test_without_accuracies_the_latest_is_the_best(tmp_path):
    with checkpoints.open_directory(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpoints.save(checkpointer, step, placed(step), CONFIG, LOOP)
    assert steps_in(tmp_path) == [2, 3]
    assert checkpoints.read_config(tmp_path, 'best')[0] == 3


def test_of_equally_good_checkpoints_the_later_is_the_best(workdir):
    assert checkpoints.read_config(workdir, 'best')[0] == 30


@pytest.mark.parametrize('which', ['3', 'newest', '-7', '', '²'])
def test_a_checkpoint_that_is_not_there_is_reported_with_those_that_are(scored, which):
    with pytest.raises(CheckpointError) as error:
        checkpoints.read_config(scored[0], which)
    assert str(error.value) == (
        f'There is no checkpoint {which!r} in {scored[0]}; choose best, latest or one of the steps '
        '2, 6, 7.'
    )


@pytest.mark.parametrize('exists', ['nothing', 'directory', 'empty checkpoints'])
def test_a_work_directory_without_checkpoints_is_reported_with_the_remedy(tmp_path, exists):
    workdir = tmp_path / 'runs'
    if exists != 'nothing':
        workdir.mkdir()
    if exists == 'empty checkpoints':
        (workdir / 'checkpoints').mkdir()
    with pytest.raises(CheckpointError) as error:
        checkpoints.read_config(workdir, 'best')
    assert str(error.value) == (
        f'There is no checkpoint in {workdir}; train one with python train.py --workdir={workdir}, '
        'or name the --workdir of a finished training.'
    )
    assert workdir.exists() == (exists != 'nothing')


# ---------------------------------------------------------------------------------- damage


def largest_data_file(checkpoint):
    files = [file for file in checkpoint.rglob('*') if file.is_file() and file.parent.name == 'd']
    return max(files, key=lambda file: file.stat().st_size)


def cut(checkpoint):
    file = largest_data_file(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(checkpoint):
    file = largest_data_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def remove_data(checkpoint):
    largest_data_file(checkpoint).unlink()


def empty_the_record(checkpoint):
    (checkpoint / '_CHECKPOINT_METADATA').write_text('')


def cut_the_record(checkpoint):
    file = checkpoint / '_CHECKPOINT_METADATA'
    file.write_text(file.read_text()[:200])


def remove_the_record(checkpoint):
    (checkpoint / '_CHECKPOINT_METADATA').unlink()


def remove_a_checkpointable(checkpoint):
    shutil.rmtree(checkpoint / 'optimizer')


def empty_the_directory(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGE = [
    cut,
    flip_a_bit,
    remove_data,
    empty_the_record,
    cut_the_record,
    remove_the_record,
    remove_a_checkpointable,
    empty_the_directory,
]


@pytest.mark.parametrize('damage', DAMAGE)
def test_training_falls_back_to_the_checkpoint_before_a_damaged_one(workdir, abstract, damage):
    newest = workdir / 'checkpoints' / '30'
    damage(newest)
    left = sorted(file.name for file in newest.rglob('*'))
    with pytest.warns(UserWarning, match=r'^Checkpoint 30 in .* is damaged \(.*\); going back'):
        checkpointer, restored = checkpoints.resume(workdir, 3, abstract, CONFIG)
    with checkpointer:
        assert restored.step == 20
        assert_same_bits(restored.items, items_of(20))
        # Nothing is lost, and the step can be written again.
        aside = workdir / 'damaged_checkpoints' / '30'
        assert sorted(file.name for file in aside.rglob('*')) == left
        assert steps_in(workdir) == [10, 20]
        checkpoints.save(checkpointer, 30, placed(31), CONFIG, LOOP)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = resume(workdir, abstract)
    assert again.step == 30
    assert_same_bits(again.items, items_of(31))


def test_several_damaged_checkpoints_are_skipped(workdir, abstract):
    cut(workdir / 'checkpoints' / '30')
    flip_a_bit(workdir / 'checkpoints' / '20')
    with pytest.warns(UserWarning, match='is damaged') as caught:
        restored = resume(workdir, abstract)
    assert restored.step == 10
    assert len([warning for warning in caught if 'is damaged' in str(warning.message)]) == 2
    assert steps_in(workdir) == [10]


def test_a_step_that_is_damaged_twice_is_set_aside_twice(workdir, abstract):
    for seed in (1, 2):
        cut(workdir / 'checkpoints' / '30')
        with pytest.warns(UserWarning, match='Checkpoint 30'):
            checkpointer, _ = checkpoints.resume(workdir, 3, abstract, CONFIG)
        with checkpointer:
            checkpoints.save(checkpointer, 30, placed(seed), CONFIG, LOOP)
    assert len(list((workdir / 'damaged_checkpoints').iterdir())) == 2


@pytest.mark.filterwarnings('ignore:Checkpoint')
def test_damage_everywhere_stops_training_and_removes_nothing(workdir, abstract):
    for step in ('10', '20', '30'):
        flip_a_bit(workdir / 'checkpoints' / step)
    with pytest.raises(CheckpointError) as error:
        resume(workdir, abstract)
    assert str(error.value) == (
        f'Every checkpoint in {workdir} is damaged (steps 10, 20, 30); choose another --workdir to '
        'start afresh.'
    )
    assert steps_in(workdir) == [10, 20, 30]


@pytest.mark.parametrize('damage', [cut, flip_a_bit, empty_the_record, empty_the_directory])
def test_evaluation_refuses_a_damaged_checkpoint(workdir, abstract, damage):
    damage(workdir / 'checkpoints' / '30')
    with pytest.raises(CheckpointError, match=r'^Checkpoint 30 in .* is damaged .*--checkpoint\.$'):
        read_latest(workdir, abstract)
    assert steps_in(workdir) == [10, 20, 30]


def test_an_unreadable_accuracy_is_damage_like_any_other(workdir, abstract):
    (workdir / 'checkpoints' / '30' / 'metrics' / 'metrics').write_text('')
    with pytest.warns(UserWarning, match='Checkpoint 30'):
        assert resume(workdir, abstract).step == 20


def test_a_half_written_checkpoint_of_a_killed_process_is_ignored(workdir, abstract):
    directory = workdir / 'checkpoints'
    shutil.copytree(directory / '30', directory / '40.orbax-checkpoint-tmp')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert resume(workdir, abstract).step == 30
    assert steps_in(workdir) == [10, 20, 30]


# ----------------------------------------------------------------------------- other config


def test_another_config_is_refused_with_the_differing_keys(workdir, abstract):
    optimizer = dataclasses.replace(CONFIG.optimizer, learning_rate=0.25)
    other = dataclasses.replace(CONFIG, seed=3, optimizer=optimizer)
    with pytest.raises(CheckpointError) as error:
        resume(workdir, abstract, other)
    assert str(error.value) == (
        f'The checkpoint in {workdir}/checkpoints was trained with another config: '
        'optimizer.learning_rate (0.1 there, 0.25 now), seed (0 there, 3 now); use the same '
        'settings to go on, or another --workdir to start afresh.'
    )
    assert steps_in(workdir) == [10, 20, 30]


def test_settings_that_change_no_result_may_differ(workdir, abstract):
    other = dataclasses.replace(
        CONFIG,
        data_dir='elsewhere',
        keep_checkpoints=9,
        checkpoint_every=5,
        evaluation=config_lib.Evaluation(eps=(0.5,), steps=3),
    )
    assert resume(workdir, abstract, other).step == 30


def test_a_changed_record_is_damage(workdir, abstract):
    file = workdir / 'checkpoints' / '30' / '_CHECKPOINT_METADATA'
    text = file.read_text()
    changed = text.replace('"batch_size": 128', '"batch_size": 129')
    assert changed != text
    file.write_text(changed)
    with pytest.warns(UserWarning, match='its record is not what was written'):
        restored = resume(workdir, abstract)
    assert restored.step < 30


def test_a_key_that_the_saved_config_lacks_had_its_default(workdir, abstract):
    file = workdir / 'checkpoints' / '30' / '_CHECKPOINT_METADATA'
    record = json.loads(file.read_text())
    saved = record['custom_metadata']
    del saved['config']['augmentation'], saved['fingerprint']
    record['custom_metadata'] = fingerprints.signed(saved)
    file.write_text(json.dumps(record))
    assert resume(workdir, abstract).step == 30
    flipped = dataclasses.replace(CONFIG, augmentation='flip')
    with pytest.raises(CheckpointError, match="augmentation \\('none' there, 'flip' now\\)"):
        resume(workdir, abstract, flipped)
