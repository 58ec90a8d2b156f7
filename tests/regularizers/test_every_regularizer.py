"""Every regularizer is the same compiled or not, and on any number of devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models, parallel, regularizers
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import LinenForward
from neurosens.training import REGULARIZERS

KEY = jax.random.key(4)
CASES = {name: (name, {}) for name in REGULARIZERS}
CASES |= {
    f'activation_sensitivity {estimator}': ('activation_sensitivity', {'estimator': estimator})
    for estimator in ('tangent', 'cotangent', 'neuron_sampling', 'finite_difference', 'exact')
}
CASES |= {
    f'activation_sensitivity {estimator}, 3 draws': (
        'activation_sensitivity',
        {'estimator': estimator, 'samples': 3},
    )
    for estimator in ('tangent', 'cotangent', 'neuron_sampling', 'finite_difference')
}
CASES |= {
    'jacobian, 3 projections': ('jacobian', {'projections': 3}),
    'jacobian, 3 probes': ('jacobian', {'projections': 3, 'probe': 'input'}),
    'jacobian exact': ('jacobian', {'projections': -1}),
    'direct_sensitivity of channels': ('direct_sensitivity', {'layer': 'act1', 'top': 2}),
    'jacobian_root of the first image': ('jacobian_root', {'first_sample_only': True}),
}


@pytest.fixture(scope='module')
def net():
    """A small convolutional network whose labels it mostly gets right, and 16 images."""
    module = models.create('cnn', num_classes=4, features=(3,), hidden=(6,))
    x = jax.random.uniform(KEY, (16, 6, 6, 1))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    forward = LinenForward(module, {'train': False})
    y = jnp.where(jnp.arange(16) < 12, forward(variables, x)[0].argmax(-1), 0)
    return forward, variables, x, y


def doubled(net):
    """The network and its images in double precision, inside `jax.enable_x64(True)`."""
    forward, variables, x, y = net
    module = forward.module.clone(dtype='float64')
    variables, x = jax.tree.map(np.float64, (variables, x))
    return LinenForward(module, {'train': False}), variables, x, y


def value_and_gradient(case, forward):
    name, options = CASES[case]
    regularizer = REGULARIZERS[name](**options)

    def penalty(params, x, y, key):
        return regularizer(forward, {'params': params}, x, y, key)[0]

    return jax.value_and_grad(penalty)


def assert_same(one, other, tolerance):
    value, gradient = one
    np.testing.assert_allclose(value, other[0], rtol=tolerance)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert largest > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest),
        gradient,
        other[1],
    )


@pytest.mark.parametrize('case', CASES)
def test_it_is_the_same_compiled_or_not_and_on_one_or_eight_devices(net, case):
    # Differences of nearly equal activations are only as exact as these are.
    precise = 'finite' in case
    with jax.enable_x64(precise):
        forward, variables, x, y = doubled(net) if precise else net
        function = value_and_gradient(case, forward)
        compiled = jax.jit(function)
        alone = compiled(variables['params'], x, y, KEY)
        assert np.isfinite(alone[0])
        assert_same(alone, function(variables['params'], x, y, KEY), 1e-5)
        mesh = parallel.data_mesh()
        params, key = parallel.replicate(mesh, (variables['params'], KEY))
        split = compiled(params, *parallel.shard(mesh, (np.asarray(x), np.asarray(y))), key)
        assert_same(alone, split, 1e-5)


SEVERAL = {
    'jacobian': {'projections': 3},
    'jacobian, input': {'projections': 3, 'probe': 'input'},
    'jacobian_root': {},
    'activation_sensitivity': {'samples': 3},
    'activation_sensitivity, cotangent': {'estimator': 'cotangent', 'samples': 3},
    'activation_sensitivity, neurons': {'estimator': 'neuron_sampling', 'samples': 3},
    'activation_sensitivity, differences': {'estimator': 'finite_difference', 'samples': 3},
    'activation_sensitivity, exact': {'estimator': 'exact'},
    'activation_sensitivity, before nonlinearities': {'position': 'pre'},
    'direct_sensitivity': {'top': 3},
    'direct_sensitivity, channels': {'layer': 'act1', 'top': 2},
    'direct_sensitivity, in front of a convolution': {'layer': 'act1', 'top': 2},
    'activation_norm': {},
    'input_gradient': {},
}


@pytest.mark.parametrize('name', SEVERAL)
def test_devices_share_the_work_without_gathering_images(name):
    """Gradients of the penalty of a convolutional network, whose images are split."""
    regularizer = getattr(regularizers, name.partition(',')[0])(**SEVERAL[name])
    # Kernels behind a layer have gradients of another kind: derivatives behind it depend on them.
    channels = (4, 4) if 'in front of' in name else (4,)
    module = models.create('cnn', num_classes=3, features=channels, hidden=(8,))
    forward = LinenForward(module, {'train': False})
    # So many that what each device does for the parameters is next to nothing.
    x = np.random.default_rng(0).random((256, 8, 8, 1)).astype(np.float32)
    y, key = np.arange(256) % 3, jax.random.key(0)
    params = jax.jit(module.init)(key, x)['params']

    @jax.jit
    def slope(params, x, y, key):
        @with_fast_input_gradients
        def penalty(params):
            return regularizer(forward, {'params': params}, x, y, key)[0]

        return jax.grad(penalty)(params)

    alone = slope.lower(params, x, y, key).compile()
    mesh = parallel.data_mesh()
    images, labels = parallel.shard(mesh, (x, y))
    inputs = parallel.replicate(mesh, params), images, labels, parallel.replicate(mesh, key)
    together = slope.lower(*inputs).compile()
    assert not re.findall(r' (all-gather|all-to-all|collective-permute)', together.as_text())
    share = together.cost_analysis()['flops'] / alone.cost_analysis()['flops']
    assert share == pytest.approx(1 / 8, rel=0.15)
    plain = jax.tree.leaves(alone(params, x, y, key))
    largest = max(np.abs(leaf).max() for leaf in plain)
    for one, other in zip(plain, jax.tree.leaves(together(*inputs))):
        scale = np.abs(one).max()
        # Else it is the rounding of 0, as of a bias whose effect cancels in differences.
        scale = scale if scale > 1e-5 * largest else largest
        # Sums over so many images are rounded more than those above.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * scale)
