"""Activation sensitivity: closed forms, every estimator on average the exact value."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import interop, models
from neurosens.forward import LayerError, LinenForward
from neurosens.regularizers import (
    activation_norm,
    activation_sensitivity,
    jacobian,
    sensitivity_and_jacobian,
)
from neurosens.regularizers.activation_sensitivity import ESTIMATORS
from neurosens.regularizers.regularizer import hidden_of, hidden_taps

KEY = jax.random.key(0)
STOCHASTIC = ('tangent', 'cotangent', 'neuron_sampling', 'finite_difference')


def evaluate(problem, regularizer, key=KEY, variables=None):
    variables = problem.variables if variables is None else variables
    return regularizer(problem.forward, variables, problem.x, problem.y, key)


def problem_of(module, shape=(6, 2, 2, 1)):
    """A network with its first weights, and a batch."""
    x = np.random.default_rng(0).random(shape).astype(np.float32)
    return types.SimpleNamespace(
        forward=LinenForward(module), variables=module.init(KEY, x), x=x, y=np.zeros(len(x), int)
    )


class Activation(nn.Module):
    """A nonlinearity as a module."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def exact_value(problem):
    _, hidden = problem.jacobians()
    return (hidden**2).sum((1, 2)).mean() / hidden.shape[1]


def test_before_the_nonlinearity_it_is_the_norm_of_the_weights(relu):
    penalty, metrics = evaluate(relu, activation_sensitivity(estimator='exact', position='pre'))
    expected = (relu.matrix('dense1') ** 2).sum() / 5
    assert penalty == pytest.approx(expected, rel=1e-5)
    assert metrics['act1'] == penalty


def test_behind_it_units_that_are_on_count(relu):
    penalty, metrics = evaluate(relu, activation_sensitivity(estimator='exact'))
    assert penalty == pytest.approx(exact_value(relu), rel=1e-5)
    hidden = relu.jacobians()[1]
    never_on = ~(hidden != 0).any(2).any(0)
    assert metrics['dead'] == pytest.approx(never_on.mean())


@pytest.mark.parametrize('make', [activation_sensitivity, sensitivity_and_jacobian])
def test_the_share_of_dead_neurons_is_that_of_what_the_layer_returns(relu, make):
    """Of two neurons that no image puts on, one is exactly at the kink: in front of it not 0."""
    params = dict(relu.variables['params'])
    first = params['dense1']
    kernel = jnp.zeros_like(first['kernel'])
    params['dense1'] = {'kernel': kernel, 'bias': jnp.array([-1.0, 0.0, 1.0, 2.0, 3.0])}
    found = {
        position: evaluate(relu, make(position=position), variables={'params': params})[1]
        for position in ('post', 'pre')
    }
    assert found['post']['dead'] == pytest.approx(2 / 5)
    # There one of five entries is 0, which is neither of the two shares.
    assert 'dead' not in found['pre']


EXACT = activation_sensitivity(estimator='exact')
EXACT_JACOBIAN = jacobian(projections=-1)


def exact_sum(*arguments):
    return 0.5 * EXACT(*arguments)[0] + 2.0 * EXACT_JACOBIAN(*arguments)[0], {}


# Estimates, and what each is an estimate of.
AVERAGED = {
    # A change so small that no unit is switched by it.
    **{name: (activation_sensitivity(estimator=name), EXACT) for name in STOCHASTIC[:-1]},
    'finite_difference': (activation_sensitivity(estimator=STOCHASTIC[-1], sigma=1e-4), EXACT),
    'two tangents': (activation_sensitivity(samples=2), EXACT),
    'two cotangents': (activation_sensitivity(estimator='cotangent', samples=2), EXACT),
    'two neurons': (activation_sensitivity(estimator='neuron_sampling', samples=2), EXACT),
    'jacobian': (jacobian(), EXACT_JACOBIAN),
    'jacobian, two projections': (jacobian(projections=2), EXACT_JACOBIAN),
    'jacobian, along inputs': (jacobian(probe='input'), EXACT_JACOBIAN),
    'both': (sensitivity_and_jacobian(sensitivity=0.5, jacobian=2.0), exact_sum),
}


@pytest.mark.parametrize('estimator', AVERAGED)
def test_estimates_and_their_gradients_are_those_of_the_exact_value_on_average(relu, estimator):
    draws = 20_000 // len(relu.x)
    regularizer, exactly = AVERAGED[estimator]

    def penalty(regularizer, variables, key):
        return evaluate(relu, regularizer, key, variables)[0]

    both = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(penalty, regularizer)), (None, 0)))
    values, gradients = both(relu.variables, jax.random.split(KEY, draws))
    exact, slope = jax.value_and_grad(functools.partial(penalty, exactly))(relu.variables, KEY)
    values = np.float64(values)
    rounding = 2e-3 * exact if estimator == 'finite_difference' else 1e-6
    assert abs(values.mean() - exact) <= 4 * values.std() / np.sqrt(draws) + rounding
    found = np.float64(gradients['params']['dense1']['kernel'])
    expected = np.float64(slope['params']['dense1']['kernel'])
    error = 4 * found.std(0) / np.sqrt(draws)
    rounding = 2e-2 * np.abs(expected).max() if estimator == 'finite_difference' else 1e-6
    assert (np.abs(found.mean(0) - expected) <= error + rounding).all()
    assert values.std() > 0


@pytest.mark.parametrize(
    ('estimator', 'options'),
    [
        *((estimator, {}) for estimator in STOCHASTIC),
        ('tangent', {'distribution': 'normal'}),
        ('tangent', {'distribution': 'uniform'}),
        ('finite_difference', {'distribution': 'normal'}),
        ('finite_difference', {'distribution': 'uniform'}),
        ('neuron_sampling', {'samples': 2}),
    ],
)
def test_layers_of_any_size_count_alike_in_all_estimates(deep, estimator, options):
    problem = deep

    def values(x):
        _, tapped = problem.forward(problem.variables, x[None], taps=('act1', 'act2'))
        return {name: value[0] for name, value in tapped.items()}

    jacobians = jax.vmap(jax.jacrev(values))(problem.x)
    parts = {
        name: float((jacobian**2).sum() / (len(problem.x) * jacobian.shape[1]))
        for name, jacobian in jacobians.items()
    }
    exact = sum(parts.values()) / 2
    whole, found = evaluate(problem, activation_sensitivity(estimator='exact'))
    assert whole == pytest.approx(exact, rel=1e-5)
    assert {name: found[name] for name in parts} == pytest.approx(parts, rel=1e-5)
    assert abs(parts['act1'] / parts['act2'] - 1) > 0.2, 'else their weights would not matter'
    if estimator == 'finite_difference':
        options = {**options, 'sigma': 1e-3}
    regularizer = activation_sensitivity(estimator=estimator, **options)
    draw = jax.jit(jax.vmap(lambda key: evaluate(problem, regularizer, key)))
    draws, metrics = draw(jax.random.split(KEY, 5000))
    # Changes of a thousandth are known to a few thousandths in single precision.
    rounding = 3e-3 if estimator == 'finite_difference' else 1e-5
    for name, expected in {'': exact, **parts}.items():
        each = np.float64(draws if not name else metrics.get(name, draws))
        if estimator != 'cotangent' or not name:
            error = 4 * each.std() / np.sqrt(len(each))
            assert abs(each.mean() - expected) <= error + rounding * expected
            assert each.std() > 0.01 * expected


def test_the_variance_of_cotangents_is_that_of_signs(relu):
    hidden = relu.jacobians()[1][0]
    gram = hidden @ hidden.T / hidden.shape[0]
    variance = 2 * ((gram**2).sum() - (np.diag(gram) ** 2).sum())
    regularizer = activation_sensitivity(estimator='cotangent')
    one = relu.x[:1], relu.y[:1]
    draws = jax.jit(jax.vmap(lambda key: regularizer(relu.forward, relu.variables, *one, key)[0]))(
        jax.random.split(KEY, 20_000)
    )
    assert np.float64(draws).var() == pytest.approx(variance, rel=0.1)


def test_several_samples_are_a_mean(relu):
    def spread(samples):
        regularizer = activation_sensitivity(samples=samples)
        keys = jax.random.split(KEY, 500)
        return float(jax.vmap(lambda key: evaluate(relu, regularizer, key)[0])(keys).var())

    assert spread(4) == pytest.approx(spread(1) / 4, rel=0.4)


def test_a_factor_moved_between_layers_changes_it_alone(relu):
    """The penalty can be driven down without changing the classifier."""
    # A power of two, with which no product is rounded.
    factor = 4.0
    moved = jax.tree.map(jnp.asarray, relu.variables)
    first, last = moved['params']['dense1'], moved['params']['head']
    moved = {
        'params': {
            'dense1': jax.tree.map(lambda leaf: factor * leaf, first),
            'head': {'kernel': last['kernel'] / factor, 'bias': last['bias']},
        }
    }
    np.testing.assert_allclose(
        relu.forward(moved, relu.x)[0], relu.forward(relu.variables, relu.x)[0], atol=1e-5
    )
    for estimator in ESTIMATORS:
        regularizer = activation_sensitivity(estimator=estimator)
        before = evaluate(relu, regularizer)[0]
        after = evaluate(relu, regularizer, variables=moved)[0]
        assert after == factor**2 * before, estimator
    exact = jacobian(projections=-1)
    assert evaluate(relu, exact, variables=moved)[0] == evaluate(relu, exact)[0]


def test_one_pass_gives_sensitivity_and_jacobian(relu):
    regularizer = sensitivity_and_jacobian(sensitivity=0.5, jacobian=2.0)
    keys = jax.random.split(KEY, 4000)
    penalties, metrics = jax.jit(jax.vmap(lambda key: evaluate(relu, regularizer, key)))(keys)
    logits, _ = relu.jacobians()
    for name, expected in (
        ('sensitivity', exact_value(relu)),
        ('jacobian', (logits**2).sum((1, 2)).mean() / 2),
    ):
        draws = np.float64(metrics[name])
        assert abs(draws.mean() - expected) <= 4 * draws.std() / np.sqrt(len(draws))
    np.testing.assert_allclose(
        penalties, 0.5 * metrics['sensitivity'] + 2 * metrics['jacobian'], rtol=1e-5
    )
    # Along the same directions as the estimator of its own.
    own = evaluate(relu, activation_sensitivity())[1]['act1']
    assert evaluate(relu, regularizer)[1]['sensitivity'] == pytest.approx(float(own), rel=1e-6)


def test_layers_can_be_named_and_have_to_be_where_none_is_known(relu, linear):
    named = activation_sensitivity(layers=('dense1', 'act1'), estimator='exact')
    _, metrics = evaluate(relu, named)
    assert metrics['dense1'] == pytest.approx((relu.matrix('dense1') ** 2).sum() / 5, rel=1e-5)
    assert metrics['act1'] == pytest.approx(exact_value(relu), rel=1e-5)
    with pytest.raises(ValueError, match='No layer of this model has the name of a nonlinearity'):
        evaluate(linear, activation_sensitivity())


def test_what_enters_a_layer_counts_beside_what_it_returns(relu):
    named = activation_sensitivity(layers=('act1', 'act1:in'), estimator='exact')
    penalty, metrics = evaluate(relu, named)
    before = (relu.matrix('dense1') ** 2).sum() / 5
    assert metrics['act1'] == pytest.approx(exact_value(relu), rel=1e-5)
    assert metrics['act1:in'] == pytest.approx(before, rel=1e-5)
    assert penalty == pytest.approx((before + exact_value(relu)) / 2, rel=1e-5)
    # In front of it layers go by their own names, as ever.
    pre = evaluate(relu, activation_sensitivity(estimator='exact', position='pre'))[1]
    assert pre['act1'] == pytest.approx(before, rel=1e-5)


class Reused(nn.Module):
    """A hidden layer with a nonlinearity of its own, and two that share one."""

    @nn.compact
    def __call__(self, x):
        relu = Activation(nn.relu, name='relu')
        x = Activation(nn.relu, name='act1')(nn.Dense(5)(x.reshape(len(x), -1)))
        return nn.Dense(3, name='head')(relu(nn.Dense(4)(relu(nn.Dense(5)(x)))))


@pytest.mark.parametrize('position', ['post', 'pre'])
@pytest.mark.parametrize(
    'make', [activation_sensitivity, sensitivity_and_jacobian, activation_norm]
)
def test_a_nonlinearity_that_runs_twice_is_not_left_out(make, position):
    problem = problem_of(Reused())
    with pytest.raises(LayerError, match=r"'relu(:in)?' is a nonlinearity by its name, but runs 2"):
        evaluate(problem, make(position=position))
    _, metrics = evaluate(problem, make(position=position, layers=('act1',)))
    assert all(np.isfinite(value) for value in metrics.values())


class Automatic(nn.Module):
    """Nonlinearities without names of their own."""

    @nn.compact
    def __call__(self, x):
        x = nn.PReLU()(nn.Dense(5)(x.reshape(len(x), -1)))
        return nn.Dense(3, name='head')(Activation(nn.gelu)(nn.Dense(4)(x)))


def test_names_that_flax_gives_are_known():
    metrics = evaluate(problem_of(Automatic()), activation_sensitivity())[1]
    assert set(metrics) == {'PReLU_0', 'Activation_0', 'dead'}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_finite_differences_of_half_precision_are_refused(estimator, dtype):
    module = models.create('cnn', num_classes=3, features=(2,), hidden=(4,), dtype=dtype)
    problem = problem_of(module, (2, 8, 8, 1))
    regularizer = activation_sensitivity(estimator=estimator)
    if estimator == 'finite_difference' and dtype != 'float32':
        with pytest.raises(ValueError, match=f"Layer 'act1' is computed in {dtype}, in whose"):
            evaluate(problem, regularizer)
    else:
        assert 0 < evaluate(problem, regularizer)[0] < np.inf


def test_every_nonlinearity_of_the_zoo_is_found():
    for name, options, count in (
        ('cnn', {'features': (2, 3), 'hidden': (4,)}, 3),
        ('mlp', {'hidden': (5, 4)}, 2),
        ('lenet5', {}, 4),
        ('cifar_resnet20', {}, 19),
        # Eight convolutions; those for ImageNet have two wide dense layers besides.
        ('vgg11', {}, 8),
        ('vgg11', {'classifier': 'imagenet'}, 10),
    ):
        module = models.create(name, num_classes=3, **options)
        x = np.zeros((2, 32, 32, 3), np.float32)
        variables = jax.eval_shape(module.init, KEY, x)
        forward = LinenForward(module, {'train': False})
        # Traced alone: nothing is computed for the names.
        _, metrics = jax.eval_shape(
            functools.partial(activation_sensitivity(), forward), variables, x, None, KEY
        )
        assert len(metrics) == count + 1, metrics.keys()


ZOO = {name: functools.partial(models.create, name) for name in models.names()}
ZOO |= {
    'rematerialized': functools.partial(models.create, 'resnet18', remat=True),
    'a stack of weights': lambda num_classes: interop.infer(
        {
            'convolution.weight': np.zeros((4, 3, 3, 3)),
            'hidden.weight': np.zeros((5, 4)),
            'last.weight': np.zeros((num_classes, 5)),
        },
        strides=1,
        padding=1,
        pool='mean',
    ),
}


@pytest.mark.parametrize('position', ['post', 'pre'])
@pytest.mark.parametrize('name', ZOO)
def test_by_their_names_all_nonlinearities_of_a_model_are_found(name, position):
    module, x = ZOO[name](num_classes=3), jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    variables = jax.eval_shape(module.init, KEY, x)
    forward, ran, found = LinenForward(module, {'train': False}), [], []

    def note(call, args, kwargs, context):
        if isinstance(context.module, models.Activation) and context.method_name == '__call__':
            ran.append('/'.join(context.module.path))
        return call(*args, **kwargs)

    def hidden(variables, x):
        tapped = forward(variables, x, taps=hidden_taps(None, position))[1]
        found.extend(hidden_of(tapped, None, position))
        return tapped

    jax.eval_shape(hidden, variables, x)
    with nn.intercept_methods(note):
        jax.eval_shape(forward, variables, x)
    assert found == ran and len(ran) > 1


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'estimator': 'hutchinson'}, "Unknown estimator 'hutchinson'; valid names are tangent"),
        ({'position': 'mid'}, "Unknown position 'mid'"),
        ({'distribution': 'cauchy'}, "Unknown distribution 'cauchy'"),
        ({'samples': 0}, 'samples is 0'),
        ({'samples': 2.5}, 'samples is 2.5; it must be a whole number'),
        ({'samples': 2.0}, 'samples is 2.0; it must be a whole number, such as 2'),
        ({'layers': ()}, r'layers is \(\); name at least one'),
        ({'layers': 3}, 'layers is 3; it must be a list of names'),
        ({'layers': (3,)}, r'layers is \(3,\); it must be a list of names'),
        ({'layers': 'act1'}, r"layers is 'act1'; it must be a list of names: \('act1',\) for one"),
        ({'sigma': 0.0}, 'sigma is 0.0'),
        ({'sigma': 0.1}, "sigma is 0.1, which estimator 'tangent' has no use for; leave it out"),
        *(
            ({'estimator': estimator, 'sigma': 0.1}, f"sigma is 0.1, which estimator '{estimator}'")
            for estimator in ('cotangent', 'neuron_sampling', 'exact')
        ),
        *(
            (
                {'estimator': estimator, 'distribution': 'normal'},
                f"distribution is 'normal', which estimator '{estimator}' has no use for; .* or "
                'take estimator tangent or finite_difference',
            )
            for estimator in ('cotangent', 'neuron_sampling', 'exact')
        ),
        ({'estimator': 'exact', 'samples': 2}, "samples is 2, which estimator 'exact' has no use"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        activation_sensitivity(**options)
    with pytest.raises(ValueError, match='jacobian is -1'):
        sensitivity_and_jacobian(jacobian=-1)
