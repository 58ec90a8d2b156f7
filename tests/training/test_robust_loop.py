"""Training of robust models: replayed batches, what is watched, and where it stops or starts."""

import dataclasses
import functools
import pathlib
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interruptions import Killed, assert_same_bits, interrupted, lines, train

from neurosens import config as config_lib
from neurosens import data, fingerprints, neurons, parallel, training
from neurosens.attacks import Threat, pgd
from neurosens.forward import LayerError, LinenForward
from neurosens.regularizers import activation_norm
from neurosens.training import adversarial, checkpoints, loop, monitor, step

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
FREE = dataclasses.replace(
    CONFIG, objective='free', objective_options={'eps': 0.1, 'replays': 3}, augmentation='pad_crop'
)
WATCHED = dataclasses.replace(
    CONFIG, monitor=config_lib.Monitor(images=40, eps=0.1, steps=3, layer='head:in', top=2)
)


# -------------------------------------------------------------------------------------- free


class _Linear(nn.Module):
    """Logits that are linear in the pixels."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name='head')(x.reshape(len(x), -1))


def test_free_training_is_that_of_plain_loops():
    """One backward pass moves weights and images; a batch starts where the last one ended."""
    module, mesh = _Linear(), parallel.data_mesh(1)
    optimizer = optax.sgd(0.1)
    objective = adversarial.free(eps=0.2, step_size=0.5, replays=2)
    run = training.make_train_step(
        module, optimizer, lambda _: 0.1, objective, (), mesh, image_size=2
    )
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 4, 2, 2, 1), np.uint8)
    labels = random.integers(0, 3, (2, 4), np.int32)
    state = training.init_state(module, optimizer, (2, 2, 1), jax.random.key(0), perturbed=4)
    kernel, bias = (np.float64(state.variables['params']['head'][k]) for k in ('kernel', 'bias'))
    moved = np.zeros((4, 4))
    for number in range(4):
        batch = data.Batch(images[number // 2], labels[number // 2], np.ones(4, bool), np.arange(4))
        state, metrics = run(state, batch, jax.random.key(1))
        x = batch.image.reshape(4, 4) / 255
        seen = np.clip(x + moved, 0, 1)
        shares = np.exp(seen @ kernel + bias)
        shares /= shares.sum(1, keepdims=True)
        assert metrics['loss'] == pytest.approx(
            -np.log(shares[np.arange(4), batch.label]).mean(), rel=1e-5
        )
        error = (shares - np.eye(3)[batch.label]) / 4
        slope = error @ kernel.T
        kernel, bias = kernel - 0.1 * seen.T @ error, bias - 0.1 * error.sum(0)
        moved = np.clip(moved + 0.1 * np.sign(slope), -0.2, 0.2)
        np.testing.assert_allclose(state.perturbation.reshape(4, 4), moved, atol=1e-6)
    np.testing.assert_allclose(state.variables['params']['head']['kernel'], kernel, atol=1e-5)


def test_every_batch_is_taken_as_often_as_it_is_replayed():
    experiment = training.prepare(FREE)
    whole = [batch.index for _, batch in zip(range(7), loop._batches(experiment, 0))]
    for first, again in ((0, 1), (1, 2), (3, 4)):
        np.testing.assert_array_equal(whole[first], whole[again])
    assert (whole[2] != whole[3]).any()
    later = [batch.index for _, batch in zip(range(3), loop._batches(experiment, 4))]
    np.testing.assert_array_equal(later, whole[4:])


def test_a_replayed_batch_is_augmented_alike():
    objective = training.OBJECTIVES['free'](replays=2)
    see = step._make_images('pad_crop', 8, objective)
    batch = next(training.prepare(FREE).source.train_batches(batch_size=8, seed=0))
    zeros = jnp.zeros((8, 8, 8, 1))
    seen = [
        see(training.TrainState(number, {}, (), None, zeros), batch, jax.random.key(0))[0]
        for number in range(3)
    ]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[1] != seen[2]).any()


def assert_goes_on_bit_for_bit(config, after, tmp_path):
    """Interrupts a training before batch number `after`; returns what one that is not gives."""
    experiment = training.prepare(config)
    whole = train(experiment, tmp_path / 'whole')
    with pytest.raises(Killed):
        train(interrupted(experiment, after), tmp_path / 'cut')
    again = train(experiment, tmp_path / 'cut')
    assert_same_bits(jax.device_get(again.state), jax.device_get(whole.state))
    assert lines(tmp_path / 'cut') == lines(tmp_path / 'whole')
    return whole


def test_free_training_goes_on_bit_for_bit(tmp_path):
    config = dataclasses.replace(FREE, checkpoint_every=4)
    whole = assert_goes_on_bit_for_bit(config, 2, tmp_path)
    assert np.abs(whole.state.perturbation).max() > 0


def test_free_training_is_the_same_on_one_device_and_on_eight(tmp_path):
    results = [
        train(training.prepare(FREE, parallel.data_mesh(count)), tmp_path / str(count))
        for count in (1, 8)
    ]
    one, eight = (jax.device_get(result.state) for result in results)
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(eight.variables)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    # Steps by the sign of a gradient differ where it is next to 0.
    same = np.isclose(one.perturbation, eight.perturbation, atol=1e-5)
    assert same.mean() > 0.99


def test_free_training_goes_on_on_other_devices(tmp_path):
    """The perturbations are split over the devices; their checkpoint is not."""
    config = dataclasses.replace(FREE, checkpoint_every=4)
    with pytest.raises(Killed):
        train(interrupted(training.prepare(config, parallel.data_mesh(4)), 2), tmp_path / 'cut')
    again = train(training.prepare(config, parallel.data_mesh(2)), tmp_path / 'cut')
    whole = train(training.prepare(config, parallel.data_mesh(1)), tmp_path / 'whole')
    for a, b in zip(*map(jax.tree.leaves, (again.state.variables, whole.state.variables))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_a_damaged_perturbation_is_found():
    mesh = parallel.data_mesh()
    values = np.zeros((16, 3), np.float32)
    whole = fingerprints.of_tree({'perturbation': parallel.shard(mesh, values)})
    values[-1, -1] = 1e-30
    assert fingerprints.of_tree({'perturbation': parallel.shard(mesh, values)}) != whole


def test_free_training_of_one_replay_is_that_of_one_step_from_the_last(tmp_path):
    options = {'eps': 0.1, 'replays': 1}
    result = train(training.prepare(dataclasses.replace(FREE, objective_options=options)), tmp_path)
    assert 0 < np.abs(result.state.perturbation).max() <= 0.1 + 1e-6


# --------------------------------------------------------------------------------- regularizers


REGULARIZED = dataclasses.replace(
    CONFIG,
    regularizers={
        'jacobian': {'weight': 0.1, 'projections': 1},
        'activation_norm': {'weight': 0.01, 'start': 0.5, 'ramp': 0.5},
    },
)


def test_shares_of_the_gradient_are_those_of_its_terms(tmp_path):
    train(training.prepare(REGULARIZED), tmp_path)
    logged = [line for line in lines(tmp_path) if 'loss' in line]
    names = ('objective', 'jacobian', 'activation_norm')
    for line in logged:
        shares = [line[f'{name}/gradient_share'] for name in names]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares[:2]) > 0
    # It sets in after half of the training.
    assert logged[0]['activation_norm/gradient_share'] == 0
    assert logged[-1]['activation_norm/gradient_share'] > 0


@pytest.mark.parametrize(
    ('objective', 'options', 'terms'),
    [
        ('trades', {'eps': 0.1, 'steps': 2}, ('cross_entropy', 'divergence')),
        ('mart', {'eps': 0.1, 'steps': 2}, ('boosted', 'divergence')),
        ('pgd', {'eps': 0.1, 'steps': 2, 'clean_share': 0.5}, ('attacked', 'clean')),
        (
            'multi_norm',
            {
                'norms': ('linf', 'l2', 'l2'),
                'eps': (0.1, 0.5, 1),
                'steps': 2,
                'strategy': 'average',
            },
            ('linf', 'l2_1', 'l2_2'),
        ),
    ],
)
def test_terms_of_an_objective_are_logged_with_their_shares(tmp_path, objective, options, terms):
    settings = dataclasses.replace(CONFIG, objective=objective, objective_options=options, steps=4)
    train(training.prepare(settings), tmp_path)
    for line in (line for line in lines(tmp_path) if 'loss' in line):
        values = [line[f'objective/{term}'] for term in terms]
        assert sum(values) == pytest.approx(line['loss'], rel=1e-5) and min(values) > 0
        shares = [line[f'objective/{term}/gradient_share'] for term in terms]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) > 0
        assert 'objective/gradient_share' not in line


def test_objectives_of_one_term_have_no_shares():
    for objective, options in (('standard', {}), ('pgd', {'eps': 0.1, 'steps': 2})):
        settings = dataclasses.replace(CONFIG, objective=objective, objective_options=options)
        assert training.prepare(settings).gradient_shares is None
    off = dataclasses.replace(REGULARIZED, gradient_shares=False)
    assert training.prepare(off).gradient_shares is None


def test_a_regularizer_may_be_there_several_times(tmp_path):
    settings = dataclasses.replace(
        CONFIG,
        objective='pgd',
        objective_options={'eps': 0.1, 'steps': 2},
        regularizers={
            'clean': {'regularizer': 'jacobian', 'projections': -1, 'weight': 0.1},
            'moved': {'regularizer': 'jacobian', 'projections': -1, 'attacked': True},
            'jacobian': {'projections': -1, 'weight': 0.2},
        },
        steps=2,
    )
    train(training.prepare(settings), tmp_path)
    first = next(line for line in lines(tmp_path) if 'loss' in line)
    penalties = [first[f'{name}/penalty'] for name in ('clean', 'moved', 'jacobian')]
    assert penalties[0] == pytest.approx(penalties[2], rel=1e-6)
    assert penalties[0] != pytest.approx(penalties[1], rel=1e-3)
    added = 0.1 * penalties[0] + penalties[1] + 0.2 * penalties[2]
    assert first['loss'] == pytest.approx(first['objective'] + added, rel=1e-5)


def test_the_terms_of_a_regularizer_have_shares_where_the_guide_splits_them(tmp_path):
    guide = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'training.md'
    blocks = re.findall(r'```python\n(.*?)```', guide.read_text(encoding='utf-8'), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith('regularizers = '))
    found: dict = {}
    exec(compile(block, guide.name, 'exec'), found)
    split = found['regularizers']
    train(training.prepare(dataclasses.replace(CONFIG, regularizers=split, steps=1)), tmp_path)
    (line,) = (line for line in lines(tmp_path) if 'loss' in line)
    shares = [line[f'{name}/gradient_share'] for name in split]
    assert min(shares) > 0 and sum(shares) < 1
    assert line['T1/penalty'] == pytest.approx(10 * line['T1/weight_difference'], rel=1e-5)
    assert line['T2/penalty'] == pytest.approx(100 * line['T2/contribution'], rel=1e-5)
    sensitivity, jacobian = line['sensitivity/sensitivity'], line['logits/jacobian']
    assert line['sensitivity/penalty'] == pytest.approx(0.1 * sensitivity, rel=1e-5)
    assert line['logits/penalty'] == pytest.approx(0.05 * jacobian, rel=1e-5)


def test_weight_and_shares_of_a_regularizer_default_to_what_is_documented():
    term = training.experiment._weighted_regularizer('jacobian', {}, 100)
    assert (term.weight, term.start, term.ramp) == (1.0, 0, 0)
    guide = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'training.md'
    text = ' '.join(guide.read_text(encoding='utf-8').split())
    assert '`weight` is the factor of a regularizer in the loss, 1 by default' in text
    assert "`'weight'` (1 by default)" in ' '.join(config_lib.Config.__doc__.split())


def test_a_share_is_the_norm_of_the_gradient_of_one_term():
    module, mesh = _Linear(), parallel.data_mesh(1)

    def half_square(forward, variables, x, y, key):
        return (variables['params']['head']['kernel'] ** 2).sum() / 2, {}

    terms = [training.WeightedRegularizer('square', half_square, 3.0, 0)]
    shares = training.make_gradient_shares(module, training.standard(), terms, mesh, image_size=2)
    state = training.init_state(module, optax.sgd(0.1), (2, 2, 1), jax.random.key(0))
    batch = data.Batch(
        np.full((4, 2, 2, 1), 128, np.uint8), np.zeros(4, 'i4'), np.ones(4, bool), np.arange(4)
    )
    found = shares(state, batch, jax.random.key(1))
    kernel = np.float64(state.variables['params']['head']['kernel'])
    x = np.full((4, 4), 128 / 255)
    z = np.exp(x @ kernel)
    error = (z / z.sum(1, keepdims=True) - np.eye(3)[[0] * 4]) / 4
    own = np.sqrt(((x.T @ error) ** 2).sum() + (error.sum(0) ** 2).sum())
    other = 3 * np.linalg.norm(kernel)
    assert found['objective/gradient_share'] == pytest.approx(own / (own + other), rel=1e-5)
    assert found['square/gradient_share'] == pytest.approx(other / (own + other), rel=1e-5)


@pytest.mark.parametrize(
    ('objective', 'options'),
    [
        ('pgd', {'eps': 0.05, 'steps': 1, 'clean_share': 0.5, 'weight_gamma': 0.01}),
        ('multi_norm', {'norms': ('linf', 'l2'), 'eps': (0.05, 0.5), 'steps': 1}),
    ],
)
def test_training_against_attacks_goes_on_bit_for_bit(tmp_path, objective, options):
    config = dataclasses.replace(
        CONFIG, objective=objective, objective_options=options, steps=6, checkpoint_every=2
    )
    assert_goes_on_bit_for_bit(config, 5, tmp_path)


def test_training_with_regularizers_goes_on_bit_for_bit(tmp_path):
    regularizers = {
        'activation_sensitivity': {'weight': 0.1, 'estimator': 'tangent'},
        'jacobian': {'weight': 0.1, 'ramp': 0.5},
    }
    config = dataclasses.replace(
        WATCHED, regularizers=regularizers, objective='trades', checkpoint_every=5,
        objective_options={'eps': 0.05, 'steps': 2},
    )  # fmt: skip
    assert_goes_on_bit_for_bit(config, 9, tmp_path)


def test_training_goes_on_with_regularizers_in_the_same_order_alone(tmp_path):
    """Their random directions go by their places."""
    terms = {'jacobian': {'weight': 0.1}, 'activation_sensitivity': {'weight': 0.1}}
    config = dataclasses.replace(CONFIG, regularizers=terms, checkpoint_every=2, steps=6)
    assert_goes_on_bit_for_bit(config, 5, tmp_path / 'same')
    with pytest.raises(Killed):
        train(interrupted(training.prepare(config), 5), tmp_path / 'turned')
    turned = dataclasses.replace(config, regularizers=dict(reversed(terms.items())))
    with pytest.raises(training.CheckpointError, match=r'order of regularizers \(\[.jacobian'):
        train(training.prepare(turned), tmp_path / 'turned')


CONTRIBUTION = {'neuron_contribution': {'weight': 0.01, 'top': 2}}
SHARING = {
    'values': CONTRIBUTION,
    'tangents': {'activation_sensitivity': {'weight': 0.5}},
    'several tangents': {'activation_sensitivity': {'weight': 0.5, 'samples': 2}},
    'pre-activations': {'activation_sensitivity': {'weight': 0.5, 'position': 'pre'}},
    'cotangents': {'activation_sensitivity': {'weight': 0.5, 'estimator': 'cotangent'}},
    'neurons': {'activation_sensitivity': {'weight': 0.5, 'estimator': 'neuron_sampling'}},
    'tangents of all': {'sensitivity_and_jacobian': {'weight': 1.0}},
    'gradients of logits': {'jacobian': {'weight': 0.5}},
    'derivatives of logits': {'jacobian': {'weight': 0.5, 'probe': 'input'}},
    'values and tangents': {**CONTRIBUTION, 'activation_sensitivity': {'weight': 0.5}},
    'values and gradients': {**CONTRIBUTION, 'jacobian': {'weight': 0.5}},
}


def shared(regularizers):
    return {name: {**options, 'shared': True} for name, options in regularizers.items()}


SHARED = shared(CONTRIBUTION)


@pytest.mark.parametrize(
    ('objective', 'terms'),
    [
        *(('standard', terms) for terms in SHARING),
        ('trades', 'values and tangents'),
        ('trades', 'values and gradients'),
        ('mart', 'tangents of all'),
        ('pgd', 'tangents of all'),
    ],
)
def test_regularizers_share_the_pass_of_the_objective(objective, terms):
    """Without BatchNorm and dropout, training and evaluation mode are the same."""
    options = {'objective_options': {'clean_share': 0.5}} if objective == 'pgd' else {}
    config = dataclasses.replace(CONFIG, objective=objective, **options)
    experiments = [
        training.prepare(dataclasses.replace(config, regularizers=regularizers))
        for regularizers in (shared(SHARING[terms]), SHARING[terms])
    ]
    batch = next(experiments[0].source.train_batches(batch_size=32, seed=0))
    results = []
    for experiment in experiments:
        mesh = experiment.mesh
        state = training.experiment.initial_state(experiment)
        key = parallel.replicate(mesh, jax.random.key(0))
        results.append(experiment.train_step(state, parallel.shard(mesh, batch), key))
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('terms', 'saved'),
    [
        # A term's own forward pass; its gradient is that of derivatives, which stay.
        ('tangents', 1),
        ('gradients of logits', 1),
        # Of values the gradient too.
        ('values', 2),
        ('values and gradients', 3),
    ],
)
def test_a_shared_pass_is_not_run_again(terms, saved):
    """Convolutions of a network with one, in the traced step."""
    counts = []
    for regularizers in (SHARING[terms], shared(SHARING[terms])):
        experiment = training.prepare(dataclasses.replace(CONFIG, regularizers=regularizers))
        batch = next(experiment.source.train_batches(batch_size=32, seed=0))
        state = training.experiment.initial_state(experiment)
        jaxpr = jax.make_jaxpr(experiment.train_step)(state, batch, jax.random.key(0))
        counts.append(str(jaxpr).count('conv_general_dilated['))
    # Traced gradients of kernels carry unused forward passes besides.
    assert counts[0] - counts[1] >= saved


def test_a_shared_pass_has_the_statistics_of_the_batch():
    options = {'features': (4,), 'hidden': (8,), 'norm': 'batch', 'dropout': 0.5}
    config = dataclasses.replace(CONFIG, regularizers=SHARED, model_options=options)
    experiment = training.prepare(config)
    x = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1))
    variables = experiment.module.init(jax.random.key(1), x)
    key = jax.random.key(2)
    logits, tapped, updates = training.tap_training_mode(
        experiment.module, variables, x, key, ('head:in',)
    )
    expected, expected_updates = training.run_training_mode(experiment.module, variables, x, key)
    np.testing.assert_array_equal(logits, expected)
    chex_equal(updates, expected_updates)
    head = variables['params']['head']
    again = tapped['head:in'] @ head['kernel'] + head['bias']
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-6)


def test_shared_derivatives_are_those_of_training_mode():
    """With BatchNorm, of the batch as a whole; against a derivative of the pass taken here."""
    options = {'features': (4,), 'hidden': (8,), 'norm': 'batch'}
    terms = {'activation_sensitivity': {'weight': 1.0, 'layers': ('act1',), 'shared': True}}
    config = dataclasses.replace(CONFIG, regularizers=terms, model_options=options)
    experiment = training.prepare(config)
    mesh = experiment.mesh
    batch = next(experiment.source.train_batches(batch_size=32, seed=0))
    state, key = training.experiment.initial_state(experiment), jax.random.key(0)
    # The step donates its state.
    variables = jax.device_get(state.variables)
    placed = parallel.shard(mesh, batch), parallel.replicate(mesh, key)
    metrics = experiment.train_step(state, *placed)[1]
    x = jnp.asarray(batch.image, jnp.float32) / 255

    def in_training(x):
        return training.tap_training_mode(experiment.module, variables, x, key, ('act1',))[1]

    def in_evaluation(x):
        forward = LinenForward(experiment.module, {'train': False})
        return forward(variables, x, taps=('act1',))[1]

    def draws(activations):
        def draw(key):
            signs = jax.random.rademacher(key, x.shape).astype(x.dtype)
            return (jax.jvp(activations, (x,), (signs,))[1]['act1'] ** 2).mean()

        return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 100)))

    found = float(metrics['activation_sensitivity/penalty'])
    same, other = draws(in_training), draws(in_evaluation)
    # Other signs were drawn there.
    assert abs(found - same.mean()) <= 3 * same.std()
    assert abs(found - other.mean()) > 5 * other.std()


def test_an_objective_need_not_know_of_taps():
    plain = training.standard()

    def objective(module, variables, x, y, key):
        return plain(module, variables, x, y, key)

    experiment = training.prepare(CONFIG)
    optimizer = training.make_optimizer(CONFIG.optimizer, CONFIG.schedule, 12)
    terms = [training.WeightedRegularizer('norm', activation_norm(), 0.1, 0)]
    step = training.make_train_step(
        experiment.module, *optimizer, objective, terms, experiment.mesh
    )
    batch = next(experiment.source.train_batches(batch_size=32, seed=0))
    shapes = jax.eval_shape(
        step, training.experiment.initial_state(experiment), batch, jax.random.key(0)
    )
    assert 'norm/penalty' in shapes[1]


def chex_equal(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'objective': 'pgd'}, 'this objective runs none in training mode'),
        ({'objective': 'free'}, 'this objective runs none in training mode'),
        ({'regularizers': {'direct_sensitivity': {'shared': True}}}, 'one image at a time'),
        (
            {'regularizers': shared({'jacobian': {}, 'activation_sensitivity': {}})},
            'not those of jacobian and activation_sensitivity',
        ),
        (
            {'objective': 'trades', 'objective_options': {'weight_gamma': 0.01}},
            'a model of perturbed weights',
        ),
        ({'objective': 'pgd', 'regularizers': shared({'jacobian': {}})}, 'runs none in'),
        ({'regularizers': {'jacobian': {'weight': 'a'}}}, 'The weight of regularizer'),
        ({'regularizers': {'mine': {}}}, "Unknown regularizer 'mine'"),
        ({'regularizers': {'mine': {'regularizer': 'j'}}}, "Unknown regularizer 'j'"),
        ({'regularizers': {'objective': {'regularizer': 'jacobian'}}}, "named 'objective'"),
        ({'regularizers': {'objective/a': {'regularizer': 'jacobian'}}}, "has no '/'"),
        ({'regularizers': {'jacobian': {'weight': None}}}, 'it must be a number'),
        ({'regularizers': {'jacobian': {'weight': -1}}}, 'at least 0'),
        ({'objective': 'free', 'objective_options': {'step_size': 0}}, 'greater than 0'),
        ({'objective': 'free', 'objective_options': {'replays': 2.5}}, 'a whole number'),
        ({'objective': 'pgd', 'objective_options': {'steps': 2.5}}, 'a whole number'),
        ({'objective': 'multi_norm', 'objective_options': {'eps': 0.1}}, 'both must be lists'),
        ({'regularizers': {'jacobian': {'shared': 'head:in'}}}, 'it is True or False'),
        ({'regularizers': {'jacobian': {'attacked': 1}}}, "The 'attacked' of .* is 1; it is True"),
        ({'regularizers': {'jacobian': {'attacked': True}}}, 'but the objective attacks none'),
        (
            {'regularizers': {'jacobian': {'attacked': True, 'shared': True}}},
            "both 'shared' and 'attacked'",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(changes, sentence):
    config = dataclasses.replace(CONFIG, **{'regularizers': SHARED, **changes})
    with pytest.raises(ValueError, match=sentence):
        training.prepare(config)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('activation_sensitivity', {'layers': ('nowhere',), 'shared': True}),
        ('activation_sensitivity', {'layers': ('nowhere',)}),
        ('direct_sensitivity', {'layer': 'nowhere'}),
    ],
)
def test_an_unknown_layer_to_regularize_is_named_before_training(name, options):
    with pytest.raises(LayerError, match='nowhere'):
        training.prepare(dataclasses.replace(CONFIG, regularizers={name: options}))


def test_a_layer_without_closed_form_is_found_before_training():
    regularizers = {'neuron_contribution': {'layer': 'conv1'}}
    with pytest.raises(ValueError, match='no closed form'):
        training.prepare(dataclasses.replace(CONFIG, regularizers=regularizers))


def test_a_model_without_named_nonlinearities_is_found_before_training(monkeypatch):
    monkeypatch.setattr(training.experiment, 'make_model', lambda config: _Linear())
    config = dataclasses.replace(CONFIG, regularizers={'activation_norm': {}})
    with pytest.raises(ValueError, match='No layer of this model has the name of a nonlinearity'):
        training.prepare(config)


class _Reused(nn.Module):
    """Two hidden layers that share a nonlinearity."""

    @nn.compact
    def __call__(self, x, train=False):
        relu = _Relu(name='relu')
        x = relu(nn.Dense(5, name='dense1')(x.reshape(len(x), -1)))
        return nn.Dense(10, name='head')(relu(nn.Dense(4, name='dense2')(x)))


class _Relu(nn.Module):
    def __call__(self, x):
        return nn.relu(x)


@pytest.mark.parametrize('shared', [False, True])
def test_a_nonlinearity_that_runs_twice_is_found_before_training(monkeypatch, shared):
    monkeypatch.setattr(training.experiment, 'make_model', lambda config: _Reused())
    terms = {'activation_sensitivity': {'shared': shared}}
    with pytest.raises(LayerError, match=r"'relu' is a nonlinearity .* give layers"):
        training.prepare(dataclasses.replace(CONFIG, regularizers=terms))
    named = {'activation_sensitivity': {'shared': shared, 'layers': ('dense1', 'dense2')}}
    training.prepare(dataclasses.replace(CONFIG, regularizers=named))


def test_a_nonlinearity_that_cannot_be_watched_is_found_before_training(monkeypatch):
    monkeypatch.setattr(training.experiment, 'make_model', lambda config: _Reused())
    settings = config_lib.Monitor(images=8, layer='', probes=2)
    with pytest.raises(LayerError, match=r"'relu' is a nonlinearity .* leave out monitor.probes\."):
        training.prepare(dataclasses.replace(CONFIG, monitor=settings))
    training.prepare(dataclasses.replace(CONFIG, monitor=dataclasses.replace(settings, probes=0)))


@pytest.mark.parametrize('name', ['ramp', 'start'])
@pytest.mark.parametrize('value', [-0.1, 1.5, 'half', True])
def test_a_share_of_training_out_of_range_is_one_sentence(name, value):
    regularizers = {'jacobian': {name: value}}
    with pytest.raises(config_lib.ConfigError, match=f"The {name} of regularizer 'jacobian' is"):
        training.prepare(dataclasses.replace(CONFIG, regularizers=regularizers))


def test_a_weight_that_is_never_reached_is_one_sentence():
    regularizers = {'jacobian': {'start': 0.75, 'ramp': 0.5}}
    with pytest.raises(config_lib.ConfigError, match=r'is 0\.75 and its ramp 0\.5, so that'):
        training.prepare(dataclasses.replace(CONFIG, regularizers=regularizers))


@pytest.mark.parametrize(('start', 'ramp'), [(0.5, 0.5), (0.7, 0.3), (0.0, 1.0)])
@pytest.mark.parametrize('steps', [7, 11, 100])
def test_weights_that_rise_to_the_end_reach_their_value(start, ramp, steps):
    options = {'start': start, 'ramp': ramp, 'weight': 3.0}
    term = training.experiment._weighted_regularizer('jacobian', options, steps)
    assert (term.factor(term.start - 1), term.factor(steps - 1)) == (0, 3.0)


PROBE = np.random.default_rng(5).normal(size=(32, 8, 8, 1)).astype(np.float32)


def probed(name, attacked):
    """A regularizer of weight 0 that logs what it sees."""

    def regularizer(forward, variables, x, y, key):
        del forward, variables, y, key
        return x.mean(), {'seen': (x * PROBE).sum()}

    return step.WeightedRegularizer(name, regularizer, 0.0, 0, attacked=attacked)


def recorded(objective):
    """An objective that logs the images it is trained on."""

    def wrapped(module, variables, x, y, key, taps=None):
        del taps
        loss, outcome = objective(module, variables, x, y, key)
        images = x if outcome.attacked is None else outcome.attacked
        return loss, outcome._replace(metrics={'seen': (images * PROBE).sum()})

    return wrapped


@pytest.mark.parametrize('name', ['pgd', 'trades', 'mart', 'free', 'multi_norm'])
def test_penalties_may_be_of_attacked_images(name):
    options = {'eps': (0.1,), 'norms': ('linf',)} if name == 'multi_norm' else {'eps': 0.1}
    objective = training.objectives.create(
        'objective', name, options, training.objectives.OBJECTIVES
    )
    if name == 'free':
        # Each batch starts where the last one ended, the first at no change at all.
        objective = dataclasses.replace(objective, objective=recorded(objective.objective))
    else:
        objective = recorded(objective)
    settings = dataclasses.replace(CONFIG, objective=name, objective_options=options)
    experiment = training.prepare(settings)
    run = training.make_train_step(
        experiment.module,
        experiment.optimizer,
        lambda _: 0.1,
        objective,
        [probed('clean', False), probed('attacked', True)],
        experiment.mesh,
    )
    state = training.experiment.initial_state(experiment)
    batch = next(experiment.source.train_batches(batch_size=32, seed=0))
    batch = parallel.shard(experiment.mesh, batch)
    for _ in range(2):
        state, metrics = run(state, batch, experiment.key(1))
    assert float(metrics['attacked/seen']) == pytest.approx(float(metrics['seen']), rel=1e-5)
    assert abs(metrics['clean/seen'] - metrics['seen']) > 0.1


# -------------------------------------------------------------------------------------- monitor


@functools.cache
def prepared():
    """`WATCHED`, whose programs do not depend on what is done with the figures."""
    return training.prepare(WATCHED)


def watched_by(**changes):
    settings = dataclasses.replace(WATCHED.monitor, **changes)
    return dataclasses.replace(prepared(), config=dataclasses.replace(WATCHED, monitor=settings))


def test_what_is_watched_is_what_evaluation_says(tmp_path):
    experiment = prepared()
    result = train(experiment, tmp_path)
    watched = [line for line in lines(tmp_path) if 'monitor/pgd_accuracy' in line]
    assert [line['step'] for line in watched] == [6, 12]
    images = next(experiment.validation.eval_batches(batch_size=40))
    x, variables = data.to_float(images.image), result.state.variables
    logits, tapped = experiment.forward(variables, x, taps=('head:in',))
    correct = np.asarray(logits.argmax(-1) == images.label)
    assert watched[-1]['monitor/clean_accuracy'] == pytest.approx(correct.mean())
    attacked = pgd(
        experiment.forward,
        variables,
        x,
        images.label,
        experiment.key(2),
        threat=Threat('linf', 0.1),
        steps=3,
    )
    robust = 1 - np.asarray(attacked.success).mean()
    assert watched[-1]['monitor/pgd_accuracy'] == pytest.approx(robust)
    assert robust < correct.mean()
    dead = (np.asarray(tapped['head:in']) == 0).all(0).mean()
    assert watched[-1]['monitor/dead_share'] == pytest.approx(dead)
    delta = neurons.sensitivity(experiment.forward, variables, x).delta
    distance = np.median(np.abs(delta) / np.asarray(tapped['head:in']).std(0, ddof=1), axis=0)
    easiest = np.sort(distance[np.isfinite(distance)])[:2]
    assert watched[-1]['monitor/sensitivity'] == pytest.approx(easiest.mean(), rel=1e-3)


@pytest.mark.parametrize(('batch_size', 'devices'), [(40, 1), (16, 8)])
def test_watched_derivatives_are_those_of_the_whole_jacobian(batch_size, devices):
    experiment = training.prepare(CONFIG)
    variables = training.experiment.initial_state(experiment).variables
    images = next(experiment.validation.eval_batches(batch_size=40))
    mesh = parallel.data_mesh(devices)
    found = monitor.measure(
        experiment.forward,
        parallel.replicate(mesh, variables),
        experiment.validation,
        mesh,
        config_lib.Monitor(images=40, eps=0.1, steps=1, layer='', probes=200),
        jax.random.key(3),
        batch_size,
    )

    def values(x):
        logits, tapped = experiment.forward(variables, x[None], taps=('*',))
        layers = {name: value for name, value in tapped.items() if name.startswith('act')}
        return logits[0], {name: value.ravel() for name, value in layers.items()}

    jacobian, hidden = jax.vmap(jax.jacrev(values))(data.to_float(images.image))
    expected = {'monitor/jacobian_norm': float(np.sqrt((jacobian**2).sum() / 40))}
    for name, each in hidden.items():
        size = float((each**2).sum()) / (40 * each.shape[1])
        expected[f'monitor/activation_sensitivity/{name}'] = size
    assert len(hidden) > 0
    expected['monitor/activation_sensitivity'] = np.mean(list(expected.values())[1:])
    x = data.to_float(images.image)
    logits = np.asarray(experiment.forward(variables, x)[0])
    first, second = np.argsort(-logits, axis=1)[:, :2].T
    rows = np.arange(40)
    slopes = np.asarray(jacobian)[rows, first] - np.asarray(jacobian)[rows, second]
    distance = (logits[rows, first] - logits[rows, second]) / np.sqrt((slopes**2).sum((1, 2, 3)))
    assert found['monitor/boundary_distance'] == pytest.approx(np.median(distance), rel=1e-4)
    measured = {name: found[name] for name in found if 'jacobian' in name or 'sensitivity' in name}
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        # 200 directions for each of 40 images.
        assert measured[name] == pytest.approx(value, rel=0.03)


def fallen(monkeypatch, values):
    """Training whose accuracy under PGD takes given values."""
    remaining = iter(values)
    watch = lambda *args: {monitor.PGD_ACCURACY: next(remaining)}  # noqa: E731
    monkeypatch.setattr(loop.monitor, 'measure', watch)


def test_the_guard_stops_at_a_fall_and_keeps_what_was_good(tmp_path, monkeypatch):
    experiment = watched_by(guard=0.2)
    fallen(monkeypatch, [0.5, 0.29])
    with pytest.raises(
        training.TrainingStopped, match=r'from 50\.00% at step 6 to 29\.00% at step 12'
    ):
        train(experiment, tmp_path)
    assert training.load(tmp_path, 'latest').step == 6
    # Started again, it remembers what it had reached.
    fallen(monkeypatch, [0.29])
    with pytest.raises(training.TrainingStopped, match='from 50'):
        train(experiment, tmp_path)


ROBUST = dataclasses.replace(
    CONFIG,
    model_options={'features': (16,), 'hidden': (32,)},
    objective='pgd',
    objective_options={'eps': 0.15, 'steps': 3},
    steps=200,
    evaluate_every=200 / 42,
)


@pytest.fixture(scope='module')
def robust(tmp_path_factory):
    """The work directory of a finished adversarial training."""
    workdir = tmp_path_factory.mktemp('robust')
    train(training.prepare(ROBUST), workdir)
    return workdir


@pytest.mark.parametrize(
    ('objective', 'options'),
    # The second in so small a ball that it is next to plain.
    [('standard', {}), ('fgsm_rs', {'eps': 0.001})],
)
def test_the_guard_stops_training_that_loses_what_adversarial_training_gave(
    robust, tmp_path, objective, options
):
    config = dataclasses.replace(
        ROBUST,
        objective=objective,
        objective_options=options,
        initial_weights=str(robust),
        evaluate_every=8 / 42,
        monitor=config_lib.Monitor(images=64, eps=0.15, steps=10, guard=0.2),
    )
    with pytest.raises(training.TrainingStopped) as stopped:
        train(training.prepare(config), tmp_path)
    watched = [line for line in lines(tmp_path) if monitor.PGD_ACCURACY in line]
    *before, last = [(line[monitor.PGD_ACCURACY], line['step']) for line in watched]
    for number, (accuracy, _) in enumerate(before):
        assert accuracy >= max(before[: number + 1])[0] - 0.2
    best = max(before)
    assert last[0] < best[0] - 0.2
    assert f'from {best[0]:.2%} at step' in str(stopped.value)
    assert f'to {last[0]:.2%} at step {last[1]}' in str(stopped.value)
    assert training.load(tmp_path, 'latest').step == before[-1][1]
    assert training.load(tmp_path, str(best[1])).step == best[1]


def test_the_guard_keeps_what_was_most_robust_among_later_checkpoints(tmp_path, monkeypatch):
    """Validated after 4, 8 and 12 steps, and saved after each: unseen ones do not rotate it out."""
    experiment = watched_by(guard=0.2)
    config = dataclasses.replace(experiment.config, checkpoint_every=1)
    experiment = dataclasses.replace(experiment, config=config, evaluate_every=4)
    clean = iter([0.6, 0.7, 0.8])
    monkeypatch.setattr(loop, '_score', lambda *args: next(clean))
    fallen(monkeypatch, [0.5, 0.35, 0.2])
    with pytest.raises(training.TrainingStopped, match=r'from 50\.00% at step 4 .*checkpoint=4\.'):
        train(experiment, tmp_path)
    kept = {int(child.name) for child in (tmp_path / 'checkpoints').iterdir()}
    assert kept == {4, 8, 10, 11}
    for which, at in (('4', 4), ('best', 8), ('latest', 11)):
        assert training.load(tmp_path, which).step == at


def test_single_step_training_without_a_guard_is_warned_of():
    config = dataclasses.replace(CONFIG, objective='fgsm_rs', objective_options={'eps': 0.1})
    with pytest.warns(UserWarning, match=r'catastrophic overfitting.*monitor\.guard is 0') as seen:
        training.prepare(config)
    assert len([one for one in seen if 'fgsm_rs' in str(one.message)]) == 1
    guarded = dataclasses.replace(config, monitor=config_lib.Monitor(images=40, guard=0.2))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Training with fgsm_rs')
        training.prepare(guarded)


def test_a_checkpoint_from_before_there_was_a_monitor_is_gone_on_from(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, checkpoint_every=4)
    whole = train(training.prepare(config), tmp_path / 'whole')
    save = checkpoints.save

    def without(checkpointer, step, items, config, state, *scores):
        kept = {name: value for name, value in state.items() if not name.startswith('best_')}
        save(checkpointer, step, items, config, kept, *scores)

    with monkeypatch.context() as older:
        older.setattr(loop.checkpoints, 'save', without)
        with pytest.raises(Killed):
            train(interrupted(training.prepare(config), 7), tmp_path / 'cut')
    again = train(training.prepare(config), tmp_path / 'cut')
    assert_same_bits(jax.device_get(again.state), jax.device_get(whole.state))


def test_smaller_falls_go_on(tmp_path, monkeypatch):
    fallen(monkeypatch, [0.5, 0.31])
    assert train(watched_by(guard=0.2), tmp_path).step == 12


@pytest.mark.parametrize(('choose', 'best'), [(True, 6), (False, 12)])
def test_the_best_is_chosen_by_robust_accuracy_where_asked(tmp_path, monkeypatch, choose, best):
    fallen(monkeypatch, [0.5, 0.4])
    clean = iter([0.6, 0.7])
    monkeypatch.setattr(loop, '_score', lambda *args: next(clean))
    train(watched_by(choose=choose), tmp_path)
    assert training.load(tmp_path, 'best').step == best


@pytest.mark.parametrize(
    ('settings', 'sentence'),
    [
        ({'images': 65}, 'monitor.images is 65, but validation_size is 64'),
        ({'images': 0, 'guard': 0.2}, 'need the accuracy under PGD'),
        ({'images': 0, 'probes': 4}, 'monitor.probes is 4, but nothing is watched'),
        ({'images': 8, 'norm': 'l7'}, 'l7'),
        ({'images': 8, 'steps': 0}, 'monitor.steps'),
    ],
)
def test_mistakes_in_the_monitor_are_one_sentence(settings, sentence):
    with pytest.raises(config_lib.ConfigError, match=sentence):
        training.prepare(dataclasses.replace(CONFIG, monitor=config_lib.Monitor(**settings)))


def test_an_unknown_layer_is_named_before_training():
    settings = config_lib.Monitor(images=8, layer='nowhere')
    with pytest.raises(Exception, match='nowhere'):
        training.prepare(dataclasses.replace(CONFIG, monitor=settings))
