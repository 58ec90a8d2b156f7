"""Every regularizer on models with batch normalisation, in bfloat16, and of NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurosens import models
from neurosens.forward import LinenForward, NNXForward
from neurosens.training import REGULARIZERS

KEY = jax.random.key(7)
X = jax.random.uniform(jax.random.key(0), (4, 6, 6, 1))
CASES = {name: (name, {}) for name in REGULARIZERS}
CASES |= {
    f'activation_sensitivity {estimator}': ('activation_sensitivity', {'estimator': estimator})
    for estimator in ('cotangent', 'neuron_sampling', 'finite_difference', 'exact')
}
CASES |= {
    'jacobian input': ('jacobian', {'probe': 'input'}),
    # Otherwise in units of the size of neurons over the batch.
    'direct_sensitivity': ('direct_sensitivity', {'scale': 'none'}),
}


@pytest.fixture(scope='module')
def normalised():
    """A network whose running statistics are far from those of its images."""
    module = models.create('cnn', num_classes=4, features=(3,), hidden=(6,), norm='batch')
    variables = jax.jit(module.init)(jax.random.key(1), X)
    variables = {
        'params': variables['params'],
        'batch_stats': jax.tree.map(lambda leaf: leaf + 0.5, variables['batch_stats']),
    }
    return LinenForward(module, {'train': False}), variables


def classes(forward, variables):
    """Labels that all images have right: those that they do not may count nothing."""
    return jax.jit(forward)(variables, X)[0].argmax(-1)


def penalty_of(case, forward, **options):
    name, own = CASES[case]
    regularizer = REGULARIZERS[name](**{**own, **options})
    return jax.jit(
        jax.value_and_grad(lambda variables, x, y: regularizer(forward, variables, x, y, KEY)[0])
    )


@pytest.mark.parametrize('case', CASES)
def test_with_batch_normalisation_images_do_not_matter_to_each_other(normalised, case):
    """Penalties add up over images, each at its place: running statistics are used."""
    forward, variables = normalised
    function, y = penalty_of(case, forward), classes(forward, variables)

    def penalty(*places):
        rows = jnp.array(places)
        value, slope = function(variables, X[rows], y[rows])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
        # The root of a sum over images.
        return float(value) ** (2 if case == 'jacobian_root' else 1)

    straight, crossed = penalty(0, 1) + penalty(2, 3), penalty(0, 3) + penalty(2, 1)
    assert straight == pytest.approx(crossed, rel=2e-4 if 'finite' in case else 1e-5)
    assert penalty(0, 1) != pytest.approx(penalty(2, 3), rel=1e-4)


@pytest.fixture(scope='module')
def precisions():
    """A model in single and in half precision, its variables, and labels."""
    forwards = []
    for dtype in ('float32', 'bfloat16'):
        module = models.create('cnn', num_classes=4, features=(3,), hidden=(6,), dtype=dtype)
        forwards.append(LinenForward(module, {'train': False}))
    variables = jax.jit(module.init)(jax.random.key(1), X)
    return forwards, variables, classes(forwards[0], variables)


@pytest.mark.parametrize('case', [case for case in CASES if 'finite' not in case])
def test_in_bfloat16_it_is_nearly_the_same(precisions, case):
    """But by finite differences, which are lost in the rounding of activations."""
    forwards, variables, y = precisions
    found = [penalty_of(case, forward)(variables, X, y) for forward in forwards]
    (plain, slopes), (half, half_slopes) = found
    assert float(half) == pytest.approx(float(plain), rel=0.05) and half != plain
    for leaf in jax.tree.leaves(half_slopes):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    norms = [
        np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))
        for tree in (slopes, half_slopes)
    ]
    assert float(norms[1]) == pytest.approx(float(norms[0]), rel=0.1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), name='conv')(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name='norm')(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(4, name='head')(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(108, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def twins():
    """A model of Linen and of NNX, with the variables of each, and labels."""
    module = Net()
    linen = jax.jit(module.init)(jax.random.key(1), X)
    shifted = jax.tree.map(lambda leaf: leaf + 0.5, linen['batch_stats'])
    linen = {'params': linen['params'], 'batch_stats': shifted}
    twin = NNXNet(nnx.Rngs(0))
    for collection in linen.values():
        for name, layer in collection.items():
            for leaf, value in layer.items():
                getattr(getattr(twin, name), leaf)[...] = value
    graphdef, state = nnx.split(twin)
    forward = LinenForward(module)
    return forward, linen, NNXForward(graphdef), state, classes(forward, linen)


@pytest.mark.parametrize('case', CASES)
def test_of_a_model_of_nnx_it_is_that_of_the_same_model_of_linen(twins, case):
    forward, linen, other, state, y = twins
    layers = {'layers': ('norm',)} if CASES[case][0] in LAYERED else {}
    expected, slopes = penalty_of(case, forward, **layers)(linen, X, y)
    found, own = penalty_of(case, other, **layers)(state, X, y)
    tolerance = 1e-4 if 'finite' in case else 1e-5
    assert float(found) == pytest.approx(float(expected), rel=tolerance)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slopes['params']))
    assert expected > 0 and largest > 0
    for name, layer in slopes['params'].items():
        for leaf, value in layer.items():
            np.testing.assert_allclose(own[name][leaf][...], value, rtol=0, atol=1e-4 * largest)


LAYERED = ('activation_sensitivity', 'sensitivity_and_jacobian', 'activation_norm')
