"""Trainings that start from the weights of others, rescaled or as they are."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from interruptions import assert_same_bits, train

from neurosens import config as config_lib
from neurosens import defenses, training
from neurosens.training import checkpoints

CONFIG = config_lib.Config(
    dataset='digits',
    validation_size=64,
    model='cnn',
    model_options={'features': (4,), 'hidden': (8,)},
    steps=12,
    batch_size=32,
    optimizer=config_lib.Optimizer(learning_rate=0.05),
    log_every=4,
    evaluate_every=6 / 42,
)


def with_average(decay, **changes):
    optimizer = dataclasses.replace(CONFIG.optimizer, ema_decay=decay)
    return dataclasses.replace(CONFIG, optimizer=optimizer, **changes)


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    """Finished trainings by the decay of their average: (work directory, result)."""

    @functools.cache
    def finished(decay):
        workdir = tmp_path_factory.mktemp('first')
        return workdir, train(training.prepare(with_average(decay)), workdir)

    return finished


def test_training_starts_from_other_weights_with_a_fresh_optimizer(first, tmp_path):
    workdir, result = first(0.0)
    settings = dataclasses.replace(CONFIG, initial_weights=str(workdir))
    experiment = training.prepare(settings)
    state = training.experiment.initial_state(experiment)
    best = training.load(workdir).variables
    assert_same_bits(jax.device_get(state.variables), jax.device_get(best))
    assert state.step == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(state.optimizer))
    again = train(experiment, tmp_path / 'second')
    assert again.step == 12
    assert_differ(again.state.variables, result.state.variables)


def assert_differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    assert any((np.asarray(one) != np.asarray(other)).any() for one, other in pairs)


def test_weights_of_another_model_are_refused(first):
    workdir, _ = first(0.0)
    other = dataclasses.replace(
        CONFIG, initial_weights=str(workdir), model_options={'features': (5,)}
    )
    with pytest.raises(config_lib.ConfigError, match='must hold the arrays of the model'):
        training.prepare(other)


def test_weights_that_are_not_there_are_named(tmp_path):
    missing = dataclasses.replace(CONFIG, initial_weights=str(tmp_path / 'nothing'))
    with pytest.raises(checkpoints.CheckpointError, match='nothing'):
        training.prepare(missing)


@pytest.mark.parametrize('decays', [(0.0, 0.5), (0.5, 0.5), (0.5, 0.0)])
def test_averages_start_from_the_weights_that_are_evaluated(first, tmp_path, decays):
    workdir, _ = first(decays[0])
    experiment = training.prepare(with_average(decays[1], initial_weights=str(workdir)))
    state = training.experiment.initial_state(experiment)
    best = training.load(workdir).variables
    assert_same_bits(jax.device_get(state.variables), jax.device_get(best))
    if decays[1]:
        assert_same_bits(jax.device_get(state.average), jax.device_get(best['params']))
    assert train(experiment, tmp_path / 'second').step == 12


@pytest.mark.parity
def test_a_state_dict_is_chosen_among_several(tmp_path):
    torch = pytest.importorskip('torch', reason='files of PyTorch need it')
    shapes = {'0.weight': (48, 64), '0.bias': (48,), '2.weight': (10, 48), '2.bias': (10,)}
    content = {
        place: {name: torch.full(shape, value) for name, shape in shapes.items()}
        for place, value in {'net': 1.0, 'ema': 2.0}.items()
    }
    torch.save(content, tmp_path / 'two.pt')
    settings = dataclasses.replace(
        CONFIG, model='mlp', model_options={'hidden': (48,)},
        initial_weights=str(tmp_path / 'two.pt'),
    )  # fmt: skip
    with pytest.raises(ValueError, match='holds 2 state dicts; choose one by its key'):
        training.prepare(settings)
    chosen = training.prepare(dataclasses.replace(settings, weights_key='ema'))
    variables = training.experiment.initial_state(chosen).variables
    assert all((np.asarray(leaf) == 2).all() for leaf in jax.tree.leaves(variables))
    with pytest.raises(ValueError, match="has no state dict at 'teacher'; it has them at"):
        training.prepare(dataclasses.replace(settings, weights_key='teacher'))


def test_a_key_without_a_file_is_refused(first):
    with pytest.raises(config_lib.ConfigError, match="weights_key is 'ema', but there is no file"):
        training.prepare(dataclasses.replace(CONFIG, weights_key='ema'))
    settings = dataclasses.replace(CONFIG, weights_key='ema', initial_weights=str(first(0.0)[0]))
    with pytest.raises(config_lib.ConfigError, match='which is none; leave weights_key out'):
        training.prepare(settings)


# ------------------------------------------------------------------------------- rescaled weights


def normalized(**changes):
    """The settings of a model with normalisation of batches."""
    options = {**CONFIG.model_options, 'features': (4, 4), 'norm': 'batch'}
    return dataclasses.replace(CONFIG, model_options=options, **changes)


@pytest.fixture(scope='module')
def first_normalized(tmp_path_factory):
    """The work directory of a finished training with normalisation."""
    workdir = tmp_path_factory.mktemp('normalized')
    train(training.prepare(normalized()), workdir)
    return workdir


def keep(workdir, directory, layer='conv1', variables=None):
    """Keeps a rescaling of a model, as settings: (the settings, parameters, variables)."""
    model = training.load(workdir)
    settings = defenses.rescaling.Settings(layer=layer)
    parameters = defenses.rescaling.calibrate([0.0, 0.1, 0.3, 0.0], settings=settings)
    variables = model.variables if variables is None else variables
    defenses.save(directory, parameters, variables=variables)
    names = {'initial_weights': str(workdir), 'initial_rescaling': str(directory)}
    return names, parameters, model.variables


def test_the_rest_is_trained_around_a_rescaled_layer(first, tmp_path):
    names, parameters, before = keep(first(0.0)[0], tmp_path / 'defense')
    optimizer = dataclasses.replace(CONFIG.optimizer, freeze=('conv1',))
    experiment = training.prepare(dataclasses.replace(CONFIG, optimizer=optimizer, **names))
    result = train(experiment, tmp_path / 'tuned')
    after = result.state.variables['params']
    for name, weights in before['params']['conv1'].items():
        wanted = np.asarray(weights) * np.asarray(parameters.scale)
        np.testing.assert_array_equal(np.asarray(after['conv1'][name]), wanted)
        assert (wanted != np.asarray(weights)).any()
    assert_differ(after['head'], before['params']['head'])
    assert result.step == 12


def test_normalisation_behind_a_rescaled_layer_keeps_its_statistics(first_normalized, tmp_path):
    """Of batches they would divide by what the filters were multiplied with."""
    names, parameters, before = keep(first_normalized, tmp_path / 'defense')
    with pytest.raises(config_lib.ConfigError, match=r"'conv1'.*freeze_statistics"):
        training.prepare(normalized(**names))
    still = {'freeze': ('conv1', 'norm1'), 'freeze_statistics': ('norm1',)}
    optimizer = dataclasses.replace(CONFIG.optimizer, **still)
    experiment = training.prepare(normalized(optimizer=optimizer, **names))
    state = training.experiment.initial_state(experiment)
    x = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    rescaled, _ = defenses.rescaling.apply(parameters, experiment.forward)(before, x)
    found, _ = experiment.forward(state.variables, x)
    np.testing.assert_allclose(found, rescaled, rtol=1e-4, atol=1e-5)
    after = train(experiment, tmp_path / 'tuned').state.variables
    for collection in ('params', 'batch_stats'):
        expected = jax.device_get(state.variables[collection]['norm1'])
        assert_same_bits(jax.device_get(after[collection]['norm1']), expected)
    assert_differ(after['batch_stats']['norm2'], state.variables['batch_stats']['norm2'])
    assert_differ(after['params']['head'], state.variables['params']['head'])


def test_a_rescaling_needs_weights_that_it_was_calibrated_on(first, tmp_path):
    workdir, _ = first(0.0)
    names, _, before = keep(workdir, tmp_path / 'defense')
    alone = {'initial_rescaling': names['initial_rescaling']}
    with pytest.raises(config_lib.ConfigError, match='initial_weights'):
        training.prepare(dataclasses.replace(CONFIG, **alone))
    others = jax.tree.map(lambda leaf: leaf + 1, before)
    names, _, _ = keep(workdir, tmp_path / 'others', variables=others)
    with pytest.raises(defenses.DefenseError, match='not known to be calibrated on this model'):
        training.prepare(dataclasses.replace(CONFIG, **names))


def test_what_cannot_go_into_weights_is_refused_before_training(first, tmp_path):
    names, _, before = keep(first(0.0)[0], tmp_path / 'defense', layer='act1')
    with pytest.raises(ValueError, match="layer with a kernel 'act1'"):
        training.prepare(dataclasses.replace(CONFIG, **names))
    pruned = defenses.pruning.calibrate(np.arange(4.0), settings=defenses.pruning.Settings())
    defenses.save(tmp_path / 'pruned', pruned, variables=before)
    with pytest.raises(defenses.DefenseError, match=r"'pruning'.*'rescaling'"):
        training.prepare(
            dataclasses.replace(CONFIG, **{**names, 'initial_rescaling': str(tmp_path / 'pruned')})
        )


def test_a_layer_without_statistics_is_named():
    optimizer = dataclasses.replace(CONFIG.optimizer, freeze_statistics=('conv1',))
    with pytest.raises(ValueError, match=r"running statistics.*'conv1'.*norm1"):
        training.prepare(normalized(optimizer=optimizer))
