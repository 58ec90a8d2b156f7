"""The training step: one global batch, whatever the devices; every term where it belongs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import config as config_lib
from neurosens import data, models, parallel, training
from neurosens.forward import LinenForward
from neurosens.regularizers import neuron_contribution, sensitivity_and_jacobian
from neurosens.training import adversarial

RATE = 0.1
PLAIN = config_lib.Optimizer(
    name='sgd', learning_rate=RATE, momentum=0.0, nesterov=False, weight_decay=0.0
)
MOMENTUM = dataclasses.replace(PLAIN, momentum=0.9, nesterov=True, weight_decay=5e-3)
STANDARD = training.standard()
CONSTANT = config_lib.Schedule(name='constant', warmup=0.0)
COSINE = config_lib.Schedule(name='cosine', warmup=0.0)
COMMUNICATION = ('all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter')


def squared_logits(forward, variables, x, y, key):
    logits, _ = forward(variables, x)
    return (logits**2).mean(), {'draw': jax.random.uniform(key)}


@functools.cache
def cnn(norm, dtype=jnp.float32):
    return models.create('cnn', num_classes=10, features=(4,), hidden=(8,), norm=norm, dtype=dtype)


@functools.cache
def initial_variables(norm):
    make = jax.jit(lambda key: cnn(norm).init(key, jnp.zeros((1, 8, 8, 1))))
    return jax.device_get(make(jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training step and its first state; the constants below share their programs."""

    devices: int = 8
    norm: str = 'none'
    augmentation: str = 'none'
    settings: config_lib.Optimizer = dataclasses.field(default_factory=lambda: PLAIN)
    schedule: config_lib.Schedule = dataclasses.field(default_factory=lambda: CONSTANT)
    ema_decay: float = 0.0
    terms: tuple = ()
    objective: training.Objective = STANDARD
    dtype: type = jnp.float32

    @functools.cached_property
    def optimizer(self):
        return training.make_optimizer(self.settings, self.schedule, updates=10)

    @functools.cached_property
    def step(self):
        return training.make_train_step(
            cnn(self.norm, self.dtype),
            *self.optimizer,
            self.objective,
            self.terms,
            parallel.data_mesh(self.devices),
            augmentation=self.augmentation,
            image_size=8,
            accumulate=self.settings.accumulate,
            ema_decay=self.ema_decay,
        )

    @property
    def initial(self):
        variables = initial_variables(self.norm)
        return training.TrainState(
            step=np.int32(0),
            variables=variables,
            optimizer=jax.device_get(self.optimizer[0].init(variables['params'])),
            average=variables['params'] if self.ema_decay else None,
        )

    def place(self, batch, state=None):
        """The arguments of a step, on the devices; a new copy every time."""
        mesh = parallel.data_mesh(self.devices)
        return (
            parallel.replicate(mesh, self.initial if state is None else state),
            parallel.shard(mesh, batch),
            parallel.replicate(mesh, jax.random.key(7)),
        )

    def run(self, batches, state=None):
        """Takes one step per batch; returns every state and all metrics, on the host."""
        state, _, key = self.place(batches[0], state)
        states, metrics = [], []
        for batch in batches:
            state, values = self.step(state, parallel.shard(key.sharding.mesh, batch), key)
            # The next step donates the state, so the host keeps copies.
            states.append(jax.tree.map(lambda leaf: np.array(leaf), state))
            metrics.append({name: float(value) for name, value in values.items()})
        return states, metrics

    @functools.cached_property
    def compiled(self):
        return self.step.lower(*self.place(random_batch(BATCH))).compile()


BATCH, TOP = 256, 3
FULL = {
    (norm, devices): Setup(devices, norm, 'pad_crop', MOMENTUM, COSINE)
    for norm in ('none', 'batch')
    for devices in (1, 8)
}
HARDENED = {
    (shared, devices): Setup(
        devices,
        'batch',
        'none' if shared else 'pad_crop',
        MOMENTUM,
        terms=(
            training.WeightedRegularizer('both', sensitivity_and_jacobian(), 0.5, 0, shared=shared),
            training.WeightedRegularizer(
                'contribution', neuron_contribution(top=TOP), 0.1, 0, shared=shared
            ),
        ),
        objective=adversarial.trades(eps=0.1, steps=2),
        # In single precision rounding moves signs of gradients and what ReLUs let through.
        dtype=jnp.float64,
    )
    for shared in (False, True)
    for devices in (1, 8)
}
BARE = Setup()
AVERAGED = {
    accumulate: Setup(settings=dataclasses.replace(PLAIN, accumulate=accumulate), ema_decay=0.8)
    for accumulate in (1, 2)
}
WEIGHT, RAMP = 0.5, 4
REGULARIZED = Setup(
    norm='batch', terms=(training.WeightedRegularizer('small', squared_logits, WEIGHT, RAMP),)
)
TWO_TERMS = Setup(
    terms=tuple(
        training.WeightedRegularizer(name, squared_logits, weight, 0)
        for name, weight in (('first', 0.5), ('second', 2.0))
    )
)


def random_batch(size, seed=0):
    generator = np.random.default_rng(seed)
    return data.Batch(
        image=generator.integers(0, 256, (size, 8, 8, 1), np.uint8),
        label=generator.integers(0, 10, size).astype(np.int32),
        mask=np.ones(size, bool),
        index=(np.arange(size) + 1000 * seed).astype(np.int32),
    )


def cross_entropy(params, rest, batch, norm='none'):
    """Mean cross-entropy in training mode, written without the library's objective."""
    x = jnp.asarray(batch.image, jnp.float32) / 255
    variables = {**rest, 'params': params}
    logits, updates = cnn(norm).apply(variables, x, train=True, mutable=list(rest))
    chosen = jax.nn.log_softmax(logits)[jnp.arange(len(x)), batch.label]
    return -chosen.mean(), (logits, updates)


def assert_close(actual, expected, relative=1e-5):
    """Each leaf agrees to `relative` of its largest entry."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= relative * np.abs(b).max() + 1e-12

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(check, actual, expected)


def in_double(tree):
    """Floating-point leaves in float64."""

    def cast(leaf):
        return np.float64(leaf) if np.issubdtype(leaf.dtype, np.floating) else leaf

    return jax.tree.map(cast, tree)


def distance(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def part(batch, rows):
    return data.Batch(*(values[rows] for values in batch))


# -------------------------------------------------------------------------------- devices


@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_five_steps_give_the_same_variables_on_one_and_on_eight_devices(norm):
    batches = [random_batch(BATCH, seed) for seed in range(5)]
    one, logged_on_one = FULL[norm, 1].run(batches)
    eight, logged_on_eight = FULL[norm, 8].run(batches)
    assert distance(one[-1].variables, FULL[norm, 1].initial.variables) > 1e-2
    assert_close(eight[-1].variables, one[-1].variables)
    for alone, together in zip(logged_on_one, logged_on_eight):
        assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize('shared', [False, True])
def test_attacks_and_regularizers_are_the_same_on_one_and_on_eight_devices(shared):
    with jax.enable_x64(True):
        batches = [random_batch(BATCH, seed) for seed in range(2)]
        initial = in_double(HARDENED[shared, 1].initial)
        (*_, one), logged_on_one = HARDENED[shared, 1].run(batches, initial)
        (*_, eight), logged_on_eight = HARDENED[shared, 8].run(batches, initial)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(one.variables))
    assert distance(one.variables, initial.variables) > 1e-2
    assert_close(eight.variables, one.variables, relative=1e-9)
    for alone, together in zip(logged_on_one, logged_on_eight):
        assert together == pytest.approx(alone, rel=1e-5)


def test_running_statistics_are_those_of_the_global_batch():
    batch = random_batch(64)
    # Each device holds images of another brightness, so that its own statistics would be others.
    brightness = np.linspace(0.05, 1.0, 64)[:, None, None, None]
    batch = batch._replace(image=(batch.image * brightness).astype(np.uint8))
    states, _ = REGULARIZED.run([batch])
    variables = initial_variables('batch')
    rest = {'batch_stats': variables['batch_stats']}
    _, (_, updates) = jax.jit(cross_entropy, static_argnums=3)(
        variables['params'], rest, batch, 'batch'
    )
    assert distance(updates['batch_stats'], rest['batch_stats']) > 1e-2
    assert_close(states[0].variables['batch_stats'], updates['batch_stats'])


def test_augmentation_follows_the_image_and_not_its_row():
    batch = random_batch(BATCH)
    order = np.random.default_rng(3).permutation(BATCH)
    straight, _ = FULL['none', 8].run([batch])
    mixed, _ = FULL['none', 8].run([part(batch, order)])
    renamed, _ = FULL['none', 8].run([batch._replace(index=batch.index[order])])
    assert_close(mixed[0].variables, straight[0].variables)
    # The same images in other positions of the data set are cropped otherwise.
    assert distance(renamed[0].variables, straight[0].variables) > 1e-4


def test_augmentation_changes_from_step_to_step():
    setup = FULL['none', 8]
    _, first = setup.run([random_batch(BATCH)])
    _, later = setup.run([random_batch(BATCH)], setup.initial._replace(step=np.int32(1)))
    assert abs(first[0]['loss'] - later[0]['loss']) > 1e-5


# ------------------------------------------------------------------------------ the update


def test_a_step_without_extras_is_gradient_descent_on_the_mean_cross_entropy():
    batch, params = random_batch(64), initial_variables('none')['params']
    states, metrics = BARE.run([batch])
    (loss, (logits, _)), gradients = jax.jit(jax.value_and_grad(cross_entropy, has_aux=True))(
        params, {}, batch
    )
    expected = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
    assert_close(states[0].variables['params'], expected)
    assert states[0].step == 1
    squares = [np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradients)]
    by_hand = {
        'loss': float(loss),
        'accuracy': float((np.argmax(logits, -1) == batch.label).mean()),
        'gradient_norm': np.sqrt(sum(squares)),
        'update_norm': RATE * np.sqrt(sum(squares)),
        'learning_rate': RATE,
    }
    assert metrics[0] == pytest.approx(by_hand, rel=1e-5)


def test_the_logged_learning_rate_follows_the_schedule():
    _, metrics = FULL['none', 8].run([random_batch(BATCH)] * 3)
    expected = [RATE * (1 + np.cos(np.pi * update / 10)) / 2 for update in range(3)]
    assert [values['learning_rate'] for values in metrics] == pytest.approx(expected, rel=1e-6)


def test_accumulated_batches_make_the_update_of_one_big_batch():
    batch = random_batch(64)
    halves = [part(batch, slice(32)), part(batch, slice(32, None))]
    states, metrics = AVERAGED[2].run(halves)
    whole, whole_metrics = BARE.run([batch])
    first, second = (state.variables['params'] for state in states)
    jax.tree.map(np.testing.assert_array_equal, first, initial_variables('none')['params'])
    assert_close(second, whole[0].variables['params'])
    mean_loss = np.mean([values['loss'] for values in metrics])
    assert mean_loss == pytest.approx(whole_metrics[0]['loss'], rel=1e-5)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_the_average_is_the_exponential_moving_average_over_updates(accumulate):
    setup = AVERAGED[accumulate]
    states, _ = setup.run([random_batch(32, seed) for seed in range(4)])
    average = jax.tree.map(np.float64, setup.initial.average)
    for number, state in enumerate(states, start=1):
        if number % accumulate == 0:
            params = state.variables['params']
            average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, params)
        assert_close(state.average, average)
    assert distance(states[-1].average, states[-1].variables['params']) > 1e-3


def test_the_average_is_evaluated_where_there_is_one():
    averaged, plain = AVERAGED[1].initial, REGULARIZED.initial
    averaged = averaged._replace(average={'other': 1}, variables={'params': {}, 'batch_stats': {}})
    assert training.evaluated_variables(averaged) == {'params': {'other': 1}, 'batch_stats': {}}
    assert training.evaluated_variables(plain) is plain.variables


def test_the_first_average_is_a_copy_of_the_first_parameters():
    make = functools.partial(
        training.init_state, cnn('none'), BARE.optimizer[0], (8, 8, 1), average=True
    )
    state = jax.jit(make)(jax.random.key(0))
    assert state.step == 0
    jax.tree.map(np.testing.assert_array_equal, state.average, state.variables['params'])
    for one, other in zip(jax.tree.leaves(state.average), jax.tree.leaves(state.variables)):
        assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()


# ---------------------------------------------------------------------------- regularizers


def test_a_regularizer_enters_with_its_weight_and_ramp_on_running_statistics():
    batches = [random_batch(64, seed) for seed in range(6)]
    states, metrics = REGULARIZED.run(batches)
    forward = LinenForward(cnn('batch'), {'train': False})

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params, rest, batch, factor):
        loss, _ = cross_entropy(params, rest, batch, 'batch')
        x = jnp.asarray(batch.image, jnp.float32) / 255
        penalty = jnp.square(forward({**rest, 'params': params}, x)[0]).mean()
        return loss + factor * penalty, penalty

    for number, share in enumerate((0.25, 0.5, 0.75, 1.0, 1.0, 1.0)):
        before = states[number - 1] if number else REGULARIZED.initial
        params, rest = before.variables['params'], dict(before.variables)
        del rest['params']
        (loss, penalty), gradients = total(params, rest, batches[number], WEIGHT * share)
        assert metrics[number]['loss'] == pytest.approx(float(loss), rel=1e-5)
        assert metrics[number]['small/penalty'] == pytest.approx(float(penalty), rel=1e-5)
        expected = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        assert_close(states[number].variables['params'], expected)


def test_a_regularizer_without_ramp_has_its_whole_weight_from_the_first_step():
    plain = BARE.run([random_batch(64)])[1][0]
    _, metrics = TWO_TERMS.run([random_batch(64)] * 2)
    penalty = metrics[0]['first/penalty']
    assert metrics[0]['second/penalty'] == penalty
    assert metrics[0]['loss'] == pytest.approx(plain['loss'] + 2.5 * penalty, rel=1e-5)


def test_every_regularizer_draws_its_own_randomness_in_every_step():
    _, metrics = TWO_TERMS.run([random_batch(64)] * 2)
    draws = {values[f'{name}/draw'] for values in metrics for name in ('first', 'second')}
    assert len(draws) == 4


def test_a_regularizer_that_shares_the_pass_sees_features_of_training_mode():
    batch, variables = random_batch(BATCH), initial_variables('batch')
    hardened = HARDENED[True, 8]
    with jax.enable_x64(True):
        metrics = hardened.run([batch], in_double(hardened.initial))[1][0]
    x = jnp.asarray(batch.image, jnp.float32) / 255

    def contribution(train):
        forward = LinenForward(cnn('batch'), {'train': train})
        mutable = ['batch_stats']
        apply = jax.jit(lambda x: forward.apply(variables, x, taps=('head:in',), mutable=mutable))
        features = np.float64(apply(x)[1]['head:in'])
        weights = np.float64(variables['params']['head']['kernel']).T
        gaps = np.abs(weights[batch.label][:, None] - weights)
        shares = (features / features.sum(1, keepdims=True))[:, None] * gaps
        return np.sort(shares, axis=-1)[..., -TOP:].mean()

    in_training, in_evaluation = contribution(True), contribution(False)
    assert metrics['contribution/contribution'] == pytest.approx(in_training, rel=1e-5)
    assert in_evaluation != pytest.approx(in_training, rel=1e-2)


# ------------------------------------------------------------------------ compiled program


def test_a_step_donates_its_state_and_keeps_its_batch():
    state, batch, key = BARE.place(random_batch(64))
    BARE.step(state, batch, key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.variables))
    assert not any(leaf.is_deleted() for leaf in (*batch, key))


def test_all_steps_share_one_compiled_program():
    BARE.step.clear_cache()
    BARE.run([random_batch(64)] * 3)
    assert BARE.step._cache_size() == 1


def instructions(setup, name):
    """Instructions of one kind in the optimized program: their results' types."""
    pattern = rf'^ *(?:ROOT )?%?[\w.-]+ = (.*?) {name}(?:-start)?\('
    return re.findall(pattern, setup.compiled.as_text(), re.MULTILINE)


def test_the_only_communication_is_one_sum_of_all_gradients():
    sums = instructions(FULL['none', 8], 'all-reduce')
    assert len(sums) == 1
    # Every parameter's gradient, the loss and the accuracy travel together.
    parameters = len(jax.tree.leaves(initial_variables('none')['params']))
    assert len(re.findall(r'f32\[', sums[0])) == parameters + 2
    assert not [name for name in COMMUNICATION if instructions(FULL['none', 8], name)]
    assert not instructions(FULL['none', 1], 'all-reduce')


def test_a_batch_normalisation_adds_one_sum_forward_and_one_backward():
    assert len(instructions(FULL['batch', 8], 'all-reduce')) == 3
    assert not [name for name in COMMUNICATION if instructions(FULL['batch', 8], name)]


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='only slow on a CPU')
def test_no_gradient_of_pooling_scatters():
    batch = random_batch(64)
    variables = initial_variables('none')
    plain = jax.jit(jax.grad(cross_entropy, has_aux=True))
    slow = plain.lower(variables['params'], {}, batch).as_text()
    assert 'select_and_scatter' in slow
    assert 'select_and_scatter' not in BARE.step.lower(*BARE.place(batch)).as_text()


@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_each_of_eight_devices_does_an_eighth_of_the_work(norm):
    alone, together = (FULL[norm, devices].compiled.cost_analysis()['flops'] for devices in (1, 8))
    assert together == pytest.approx(alone / 8, rel=0.1)
