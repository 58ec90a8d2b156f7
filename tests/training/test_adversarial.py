"""Adversarial objectives: losses by hand, attacks that stay inside, statistics that stay honest."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models, parallel
from neurosens.attacks import Threat
from neurosens.forward import LinenForward
from neurosens.regularizers import neuron_contribution, sensitivity_and_jacobian
from neurosens.training import adversarial, inner, multi_norm, run_training_mode, standard

KEY = jax.random.key(0)
ORDER = {'linf': np.inf, 'l2': 2, 'l1': 1}
DUAL = {'linf': 1, 'l2': 2, 'l1': np.inf}
MAKERS = {
    'pgd': functools.partial(adversarial.pgd, steps=2),
    'fgsm_rs': adversarial.fgsm_rs,
    'trades': functools.partial(adversarial.trades, steps=2),
    'mart': functools.partial(adversarial.mart, steps=2),
    'multi_norm': functools.partial(multi_norm.multi_norm, norms=('linf', 'l2'), steps=2),
}


@pytest.fixture(scope='module')
def net():
    """A small network with BatchNorm and dropout, images and labels."""
    module = models.create('cnn', num_classes=4, features=(3,), hidden=(6,), norm='batch')
    x = jax.random.uniform(KEY, (16, 6, 6, 1))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    variables['params'] = jax.tree.map(lambda leaf: 2 * leaf, variables['params'])
    y = jax.random.randint(jax.random.key(2), (16,), 0, 4)
    return module, variables, x, y


def run(objective, net, key=KEY):
    """Loss and outcome, compiled."""
    module, variables, x, y = net
    return jax.jit(functools.partial(objective, module))(variables, x, y, key)


def radius(name, eps):
    return {'eps': (eps, eps)} if name == 'multi_norm' else {'eps': eps}


# ------------------------------------------------------------------------------------ losses


def softmax(z):
    shares = np.exp(np.float64(z) - z.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def logits_pair(scale):
    random = np.random.default_rng(0)
    return (scale * random.standard_normal((7, 5)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize('scale', [1.0, 5.0])
def test_the_divergence_is_that_of_the_definition(scale):
    clean, attacked = logits_pair(scale)
    p, q = softmax(clean), softmax(attacked)
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(adversarial.divergence(clean, attacked), expected, rtol=1e-4)
    np.testing.assert_allclose(adversarial.divergence(clean, clean), 0, atol=1e-6)


@pytest.mark.parametrize('scale', [1.0, 5.0])
def test_the_loss_of_mart_is_that_of_the_definition(scale):
    clean, attacked = logits_pair(scale)
    labels = np.array([0, 1, 2, 3, 4, 0, 1])
    p, q = softmax(clean), softmax(attacked)
    expected = []
    for before, after, y in zip(p, q, labels):
        wrong = max(after[c] for c in range(5) if c != y)
        boosted = -np.log(after[y]) - np.log(1.0001 - wrong + 1e-12)
        away = sum(b * np.log(b / (a + 1e-12)) for b, a in zip(before, after))
        expected.append(boosted + 6 * away * (1.0000001 - before[y]))
    found = adversarial.mart_losses(clean, attacked, labels, 6.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_losses_of_certain_models_have_finite_gradients():
    clean, attacked = (1000 * jnp.eye(3)[jnp.array(order)] for order in ([0, 1], [1, 2]))
    y = jnp.array([0, 0])
    for loss in (
        lambda clean, attacked: adversarial.mart_losses(clean, attacked, y, 5.0).sum(),
        lambda clean, attacked: adversarial.divergence(clean, attacked).sum(),
    ):
        value, gradients = jax.value_and_grad(loss, (0, 1))(clean, attacked)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(gradient).all() for gradient in gradients)


# ------------------------------------------------------------------------------------ attacks


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_ascent_of_a_linear_loss_goes_as_far_as_the_ball_allows(norm):
    weight = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    threat = Threat(norm, 0.2, (-10.0, 10.0))
    x = np.zeros((5, 3, 4), np.float32)

    def loss(images):
        return (images * weight).sum((1, 2))

    first = inner.start(threat, x, KEY)
    x_adv = inner.maximize(loss, x, first, threat=threat, steps=40, step_size=0.05)
    lengths = np.linalg.norm(np.reshape(x_adv, (5, -1)), ORDER[norm], axis=1)
    assert (lengths <= 0.2 * (1 + 1e-5)).all()
    most = 0.2 * np.linalg.norm(weight.ravel(), DUAL[norm])
    np.testing.assert_allclose(loss(x_adv), most, rtol=1e-3)
    assert len({tuple(row) for row in np.reshape(first, (5, -1)).tolist()}) == 5


def test_the_steepest_of_several_balls_is_taken():
    weight = np.full((3, 4), 1.0, np.float32)
    threats = [Threat('linf', 0.1, (-9.0, 9.0)), Threat('l2', 0.9, (-9.0, 9.0))]
    x = np.zeros((2, 3, 4), np.float32)

    def loss(images):
        return (images * weight).sum((1, 2))

    x_adv = inner.maximize_steepest(loss, x, threats=threats, steps=30, step_sizes=[0.02, 0.1])
    # 0.1 x 12 in linf, 0.9 x sqrt(12) = 3.1 in l2.
    np.testing.assert_allclose(loss(x_adv), 0.9 * np.sqrt(12), rtol=1e-3)


@pytest.mark.parametrize('name', ['pgd', 'trades', 'mart', 'multi_norm'])
def test_attacks_raise_the_loss(net, name):
    (still, calm), (moved, outcome) = (
        run(MAKERS[name](**radius(name, eps)), net) for eps in (0.0, 0.3)
    )
    assert moved > still
    assert outcome.metrics['attacked_accuracy'] <= calm.metrics['attacked_accuracy']
    if 'clean_accuracy' in outcome.metrics:
        module, variables, x, y = net
        logits = run_training_mode(module, variables, x, KEY)[0]
        assert outcome.metrics['clean_accuracy'] == (logits.argmax(-1) == y).mean()


@pytest.mark.parametrize('name', ['pgd', 'multi_norm'])
def test_without_room_to_attack_the_loss_is_the_standard_one(net, name):
    module, variables, x, y = net
    objective = MAKERS[name](**radius(name, 0.0))

    def of(objective):
        def loss(params):
            return objective(module, {**variables, 'params': params}, x, y, KEY)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])

    (one, outcome), gradient = of(objective)
    (other, expected), expected_gradient = of(standard())
    assert one == pytest.approx(float(other), rel=1e-6)
    np.testing.assert_allclose(outcome.logits, expected.logits, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient
    )


def test_clean_images_have_their_share(net):
    losses = [
        float(run(adversarial.pgd(eps=0.2, clean_share=share), net)[0])
        for share in (0.0, 0.25, 1.0)
    ]
    expected = 0.75 * losses[0] + 0.25 * losses[2]
    # Dropout is off in this network, so that all three see the same attacked images.
    assert losses[1] == pytest.approx(expected, rel=1e-5)
    assert losses[2] == pytest.approx(float(run(standard(), net)[0]), rel=1e-5)


def test_several_norms_are_averaged_or_the_worst_taken(net):
    options = {'norms': ('linf', 'l2'), 'eps': (0.02, 1.5), 'steps': 3}
    loss = {
        strategy: float(run(multi_norm.multi_norm(strategy=strategy, **options), net)[0])
        for strategy in multi_norm.STRATEGIES
    }
    clean = float(run(standard(), net)[0])
    assert clean < loss['average'] < loss['max']
    assert clean < loss['msd']


def test_of_several_norms_each_and_the_mean_accuracy_are_logged(net):
    module, variables, x, _ = net
    logits, _ = module.apply(
        variables, x, train=True, mutable=['batch_stats'], rngs={'dropout': KEY}
    )
    net = module, variables, x, logits.argmax(-1)
    threats = {'linf': 0.3, 'l2': 1e-6}
    options = {'norms': tuple(threats), 'eps': tuple(threats.values()), 'steps': 3}
    metrics = run(multi_norm.multi_norm(strategy='average', **options), net)[1].metrics
    found = {name: float(value) for name, value in metrics.items()}
    assert found.keys() == {'attacked_accuracy', *(f'attacked_accuracy/{name}' for name in threats)}
    assert found['attacked_accuracy/linf'] < found['attacked_accuracy/l2']
    mean = (found['attacked_accuracy/linf'] + found['attacked_accuracy/l2']) / 2
    assert found['attacked_accuracy'] == pytest.approx(mean)
    worst = run(multi_norm.multi_norm(strategy='max', **options), net)[1].metrics
    assert worst.keys() == {'attacked_accuracy'}


# ------------------------------------------------------------------------------- statistics


def test_running_statistics_are_of_clean_images_and_then_of_attacked_ones(net):
    module, variables, x, _ = net
    updates = {}
    for name in ('pgd', 'trades', 'mart'):
        updates[name] = run(MAKERS[name](**radius(name, 0.0)), net)[1].updates
    _, once = run_training_mode(module, variables, x, KEY)
    _, twice = run_training_mode(module, {**variables, **once}, x, KEY)
    for name, expected in (('pgd', once), ('trades', twice), ('mart', twice)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), updates[name], expected
        )


def test_the_attack_may_see_the_statistics_of_the_batch(net):
    module, variables, _, _ = net
    losses = {}
    for mode in adversarial.ATTACK_MODES:
        loss, outcome = run(adversarial.pgd(eps=0.2, steps=3, attack_mode=mode), net)
        losses[mode] = float(loss)
        # The attack updates none: there was one pass, over what it found.
        _, once = run_training_mode(module, variables, outcome.attacked, KEY)
        assert jax.tree.structure(outcome.updates) == jax.tree.structure(once)
        for found, expected in zip(*map(jax.tree.leaves, (outcome.updates, once))):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Against the loss that counts, which uses them too, this is the stronger attack.
    assert losses['train'] > losses['eval']


# ----------------------------------------------------------------------- weight perturbation


@pytest.mark.parametrize('beta', [0.0, 3.0])
@pytest.mark.parametrize('name', ['trades', 'mart'])
def test_the_loss_is_the_formula_of_the_logits_it_saw(net, name, beta):
    module, variables, x, y = net
    loss, outcome = jax.jit(MAKERS[name](eps=0.1, beta=beta), static_argnums=0)(
        module, variables, x, y, KEY
    )
    clean, attacked = (
        np.exp(np.float64(jax.nn.log_softmax(logits)))
        for logits in (outcome.clean_logits, outcome.logits)
    )
    own = np.arange(len(y)), np.asarray(y)
    divergence = (clean * np.log(clean / attacked)).sum(-1)
    assert divergence.min() > -1e-9 and divergence.max() > 1e-3
    if name == 'trades':
        expected = -np.log(clean[own]) + beta * divergence
    else:
        others = attacked.copy()
        others[own] = 0
        expected = -np.log(attacked[own]) - np.log(1.0001 - others.max(-1))
        expected += beta * divergence * (1 - clean[own])
    assert float(loss) == pytest.approx(expected.mean(), rel=1e-4)


def test_weights_are_moved_uphill_by_their_share():
    params = {'kernel': jnp.arange(1.0, 7.0).reshape(2, 3), 'bias': jnp.ones(3)}

    def loss(params):
        return (params['kernel'] * jnp.array([[1.0, -2, 0], [0, 2, 4]])).sum() + params[
            'bias'
        ].sum()

    moved = adversarial.weight_perturbation(loss, params, 0.1)
    slope = np.array([[1.0, -2, 0], [0, 2, 4]])
    expected = params['kernel'] + 0.1 * np.linalg.norm(params['kernel']) * slope / 5
    np.testing.assert_allclose(moved['kernel'], expected, rtol=1e-5)
    np.testing.assert_array_equal(moved['bias'], params['bias'])


def test_gradients_through_moved_weights_are_those_at_them():
    params = {'kernel': jax.random.normal(KEY, (4, 3)), 'bias': jnp.arange(3.0)}
    x = jax.random.normal(jax.random.key(9), (5, 4))

    def loss(params):
        return jnp.tanh(x @ params['kernel'] + params['bias']).std()

    moved = adversarial.weight_perturbation(loss, params, 0.3)
    through = jax.grad(lambda p: loss(adversarial.weight_perturbation(loss, p, 0.3)))(params)
    at_moved, at_given = jax.grad(loss)(moved), jax.grad(loss)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), through, at_moved)
    assert not np.allclose(through['kernel'], at_given['kernel'], rtol=1e-2)


def cross_entropy(logits, y):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y]


def mart_formula(clean, attacked, y):
    clean, attacked = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
    own = jnp.arange(len(y)), y
    boosted = -attacked[own] - jnp.log(1.0001 - jnp.exp(attacked).at[own].set(0).max(-1))
    # With the guard of the released program.
    kl = (jnp.exp(clean) * (clean - jnp.log(jnp.exp(attacked) + 1e-12))).sum(-1)
    return (boosted + 5 * kl * (1 - jnp.exp(clean[own]))).mean()


FORMULAS = {
    'pgd': lambda clean, attacked, y: cross_entropy(attacked, y).mean(),
    'trades': lambda clean, attacked, y: (
        cross_entropy(clean, y)
        + 6 * (jax.nn.softmax(clean) * (jax.nn.log_softmax(clean) - jax.nn.log_softmax(attacked)))
        .sum(-1)
    ).mean(),
    'mart': mart_formula,
}  # fmt: skip


@pytest.mark.parametrize('name', FORMULAS)
def test_gradients_are_taken_at_the_moved_weights(net, name):
    module, variables, x, y = net

    def value_and_gradient(gamma, params):
        objective = MAKERS[name](eps=0.1, weight_gamma=gamma)

        def loss(params):
            value, outcome = objective(module, {**variables, 'params': params}, x, y, KEY)
            return value, outcome.attacked

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (plain, images), _ = value_and_gradient(0.0, variables['params'])
    (moved, same), gradient = value_and_gradient(0.01, variables['params'])
    # The attack is on the weights as they are.
    np.testing.assert_array_equal(images, same)
    assert moved > plain

    # The objective of the weights that are uphill, on the images that were found.
    def fixed(params):
        _, _, clean_key, attacked_key = jax.random.split(KEY, 4)
        seen = {**variables, 'params': params}
        clean, changed = run_training_mode(module, seen, x, clean_key)
        if name != 'pgd':
            seen = {**seen, **changed}
        attacked, _ = run_training_mode(module, seen, images, attacked_key)
        return FORMULAS[name](clean, attacked, y)

    there = adversarial.weight_perturbation(fixed, variables['params'], 0.01)
    value, expected = jax.jit(jax.value_and_grad(fixed))(there)
    assert float(value) == pytest.approx(float(moved), rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, expected))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


# ------------------------------------------------------------------------- jit and devices


SPLIT = {
    **{name: functools.partial(make, **radius(name, 0.1)) for name, make in MAKERS.items()},
    'free': functools.partial(adversarial.free, eps=0.1),
    'multi_norm, average': functools.partial(
        MAKERS['multi_norm'], eps=(0.1, 0.3), strategy='average'
    ),
    'multi_norm, steepest': functools.partial(
        multi_norm.multi_norm,
        norms=('linf', 'l2', 'l1'),
        eps=(0.05, 0.3, 1.0),
        strategy='msd',
        steps=2,
    ),
    'pgd, weights moved': functools.partial(MAKERS['pgd'], eps=0.1, weight_gamma=0.01),
    'pgd, statistics of the batch': functools.partial(MAKERS['pgd'], eps=0.1, attack_mode='train'),
    'trades, weights moved': functools.partial(MAKERS['trades'], eps=0.1, weight_gamma=0.01),
}


@pytest.mark.parametrize('name', [name for name in SPLIT if name != 'trades, weights moved'])
def test_without_jit_the_loss_and_its_gradient_are_the_same(net, name):
    module, variables, x, y = net
    objective = SPLIT[name]()

    def loss(params):
        return objective(module, {**variables, 'params': params}, x, y, KEY)[0]

    plain = jax.value_and_grad(loss)(variables['params'])
    compiled = jax.jit(jax.value_and_grad(loss))(variables['params'])
    assert float(compiled[0]) == pytest.approx(float(plain[0]), rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain[1]))
    for a, b in zip(*map(jax.tree.leaves, (plain[1], compiled[1]))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize('name', SPLIT)
def test_one_and_eight_devices_have_the_same_loss_and_gradient(net, name):
    module, variables, x, y = net
    objective = SPLIT[name]()
    terms = (sensitivity_and_jacobian(), neuron_contribution(top=3))

    @jax.jit
    def both(variables, x, y, key):
        forward = LinenForward(module, {'train': False})

        def loss(params):
            changed = {**variables, 'params': params}
            total = objective(module, changed, x, y, key)[0]
            for term in terms:
                total += term(forward, changed, x, y, key)[0]
            return total

        return jax.value_and_grad(loss)(variables['params'])

    alone = both(variables, x, y, KEY)
    mesh = parallel.data_mesh()
    inputs = (
        *parallel.replicate(mesh, (variables,)),
        *parallel.shard(mesh, (np.asarray(x), np.asarray(y))),
        parallel.replicate(mesh, KEY),
    )
    program = both.lower(*inputs).compile()
    assert 'all-gather' not in program.as_text(), 'no device does the work of all'
    together = program(*inputs)
    assert float(together[0]) == pytest.approx(float(alone[0]), rel=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), together[1], alone[1]
    )


@pytest.mark.parametrize(
    ('make', 'options', 'message'),
    [
        (adversarial.pgd, {'norm': 'l3'}, "Unknown norm 'l3'"),
        (adversarial.pgd, {'eps': -0.1}, 'eps is -0.1'),
        (adversarial.pgd, {'norm': ['linf']}, r"Unknown norm \['linf'\]; valid names are"),
        (adversarial.pgd, {'steps': 0}, 'steps is 0'),
        (adversarial.pgd, {'steps': 7.0}, 'steps is 7.0; it must be a whole number, such as 7'),
        (adversarial.pgd, {'steps': True}, 'steps is True; it must be a whole number, such as 1'),
        (adversarial.pgd, {'random_start': 'no'}, "random_start is 'no'; it must be True or False"),
        (adversarial.free, {'replays': 8.0}, 'replays is 8.0; it must be a whole number'),
        (adversarial.pgd, {'clean_share': 1.5}, 'clean_share is 1.5'),
        (adversarial.fgsm_rs, {'step_size': -1.0}, 'step_size is -1.0'),
        (adversarial.fgsm_rs, {'step_size': 0.0}, 'step_size is 0.0'),
        (adversarial.trades, {'beta': -1.0}, 'beta is -1.0'),
        (adversarial.mart, {'attack_mode': 'both'}, "Unknown attack_mode 'both'; valid names are"),
        (multi_norm.multi_norm, {'norms': ('l2',)}, 'give one radius for each norm'),
        (multi_norm.multi_norm, {'norms': 3}, 'both must be lists'),
        (multi_norm.multi_norm, {'norms': (['l2'],), 'eps': (1.0,)}, r"Unknown norm \['l2'\]"),
        (multi_norm.multi_norm, {'strategy': 'min'}, "Unknown strategy 'min'"),
    ],
)
def test_mistakes_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_integers_of_numpy_are_whole_numbers():
    assert adversarial.free(replays=np.int64(3)).replays == 3


class Zero(nn.Module):
    """Logits that no image changes."""

    @nn.compact
    def __call__(self, x, train=False):
        return jnp.zeros((len(x), 3)) + self.param('bias', nn.initializers.zeros, (3,))


def test_a_model_without_gradient_is_no_trouble():
    x, y = jnp.full((4, 2, 2, 1), 0.5), jnp.zeros(4, jnp.int32)
    variables = Zero().init(KEY, x)
    for name, make in MAKERS.items():
        loss, _ = run(make(**radius(name, 0.1)), (Zero(), variables, x, y))
        assert np.isfinite(loss)
