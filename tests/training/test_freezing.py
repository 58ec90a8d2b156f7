"""Frozen parameters stay as they are, bit for bit, and the others train as without them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neurosens import config, training
from neurosens.training import freezing

PARAMETERS = {
    'conv1': {'kernel': jnp.arange(6.0).reshape(2, 3), 'bias': jnp.ones(3)},
    'block1': {'conv1': {'kernel': jnp.full((4,), 2.0)}, 'scale': jnp.ones(2)},
    'temperature': jnp.ones(()),
}


def chosen(names):
    return jax.tree.map(bool, freezing.layers(PARAMETERS, names))


def test_a_layer_is_chosen_with_all_that_is_inside_it():
    assert chosen(['block1']) == {
        'conv1': {'kernel': False, 'bias': False},
        'block1': {'conv1': {'kernel': True}, 'scale': True},
        'temperature': False,
    }
    # By its whole name: the layer inside the block is another one.
    assert chosen(['conv1']) == {
        'conv1': {'kernel': True, 'bias': True},
        'block1': {'conv1': {'kernel': False}, 'scale': False},
        'temperature': False,
    }
    assert not any(jax.tree.leaves(chosen([])))


@pytest.mark.parametrize('name', ['conv2', 'kernel', 'conv1/kernel', ''])
def test_an_unknown_layer_is_an_error_that_names_the_known_ones(name):
    with pytest.raises(ValueError, match=r'block1/conv1'):
        freezing.layers(PARAMETERS, [name])


@pytest.mark.parametrize('names', [['conv1'], ['block1', 'conv1'], []])
def test_the_control_freezes_exactly_as_many_single_parameters(names):
    layers = freezing.layers(PARAMETERS, names)
    expected = sum(
        parameter.size
        for parameter, still in zip(jax.tree.leaves(PARAMETERS), jax.tree.leaves(layers))
        if still
    )
    drawn = [
        freezing.as_many_at_random(PARAMETERS, layers, jax.random.key(seed)) for seed in range(40)
    ]
    for one in drawn:
        assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, PARAMETERS)
        assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(one)) == expected
    # Every parameter is as likely as any other: 16 in all.
    flat = np.array([jax.flatten_util.ravel_pytree(one)[0] for one in drawn])
    assert np.abs(flat.mean(0) - expected / 16).max() < 0.35
    assert len({row.tobytes() for row in flat}) > 5 or not expected


def test_frozen_parameters_see_neither_gradient_nor_decay_nor_momentum():
    rule = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, 0.9))
    frozen = freezing.freeze(rule, lambda tree: freezing.layers(tree, ['conv1']))
    gradient = jax.tree.map(jnp.ones_like, PARAMETERS)
    ours, theirs = PARAMETERS, PARAMETERS
    state, plain = frozen.init(ours), rule.init(theirs)
    for _ in range(3):
        updates, state = jax.jit(frozen.update)(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, plain = rule.update(gradient, plain, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(np.testing.assert_array_equal, ours['conv1'], PARAMETERS['conv1'])
    jax.tree.map(np.testing.assert_array_equal, ours['block1'], theirs['block1'])
    assert float(ours['temperature']) == float(theirs['temperature']) != 1


def test_frozen_gradients_do_not_count_in_a_clipped_norm():
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    frozen = freezing.freeze(rule, lambda tree: freezing.layers(tree, ['conv1', 'block1']))
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 100.0), PARAMETERS)
    updates, _ = frozen.update(gradient, frozen.init(PARAMETERS), PARAMETERS)
    assert float(updates['temperature']) == pytest.approx(-1)


@pytest.mark.parametrize('at_random', [False, True])
def test_training_from_a_config_leaves_them(tmp_path, at_random):
    settings = config.Config(
        model='mlp',
        model_options={'hidden': (8, 8)},
        steps=4,
        batch_size=32,
        optimizer=config.Optimizer(freeze=('dense1',), freeze_random=at_random),
    )
    experiment = training.prepare(settings)
    before = jax.tree.map(np.array, training.experiment.initial_state(experiment))
    training.train(experiment, tmp_path)
    after = training.load(tmp_path, which='latest').variables['params']
    same = jax.tree.map(lambda a, b: np.asarray(a) == b, after, before.variables['params'])
    frozen = jax.tree.map(np.asarray, before.optimizer.frozen)
    if at_random:
        count = before.variables['params']['dense1']['kernel'].size + 8
        assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(frozen)) == count
        assert not same['dense1']['kernel'].all()
    jax.tree.map(
        lambda still, equal: np.testing.assert_array_less(still, equal + 0.5), frozen, same
    )
    # Of all parameters, those of dense1 are three in four.
    share = 0.05 if at_random else 0.3
    assert 1 - same['head']['kernel'].mean() > share and 1 - same['dense2']['kernel'].mean() > share


def test_a_layer_that_the_model_lacks_is_found_before_training():
    settings = config.Config(optimizer=config.Optimizer(freeze=('conv9',)))
    with pytest.raises(ValueError, match="'conv9'"):
        training.prepare(settings)


def test_a_control_needs_layers():
    optimizer = dataclasses.replace(config.Optimizer(), freeze_random=True)
    with pytest.raises(config.ConfigError, match='freeze_random'):
        training.prepare(config.Config(optimizer=optimizer))
