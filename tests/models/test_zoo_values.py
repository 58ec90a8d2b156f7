"""Values that the models and their layers compute."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models
from neurosens.models import common, densenet, resnet

# For small computations, the optimiser of the compiler takes longer than it saves.
UNOPTIMISED = {'xla_backend_optimization_level': 0}


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def evaluate(module, variables, x, *flags):
    return jax.jit(
        lambda variables, x: module.apply(variables, x, *flags), compiler_options=UNOPTIMISED
    )(variables, x)


def random_variables(module, x, *flags):
    """He normal kernels and random statistics; compiling the initialisers would dominate here."""
    generator = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == 'kernel':
            scale = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            return generator.normal(0, scale, leaf.shape).astype(np.float32)
        return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *flags), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def test_normalize_per_channel():
    x = jnp.array([[[[0.0, 0.5, 1.0]]]])
    ours = models.Normalize((0.5, 0.25, 0.0), (0.5, 0.25, 4.0)).apply({}, x)
    np.testing.assert_array_equal(ours, [[[[-1.0, 1.0, 0.25]]]])


def test_normalize_broadcasts_a_single_value():
    x = jnp.array([[[[0.0, 0.5, 1.0]]]])
    ours = models.Normalize((0.5,), (0.25,)).apply({}, x)
    np.testing.assert_array_equal(ours, [[[[-2.0, 0.0, 2.0]]]])


@pytest.mark.parametrize(
    ('function', 'expected'),
    [
        ('relu', lambda x: max(x, 0)),
        ('gelu', lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ('silu', lambda x: x / (1 + math.exp(-x))),
        ('tanh', math.tanh),
        ('softplus', lambda x: math.log1p(math.exp(x))),
        ('leaky_relu', lambda x: x if x > 0 else 0.01 * x),
        ('elu', lambda x: x if x > 0 else math.expm1(x)),
        ('identity', lambda x: x),
    ],
)
def test_activation_values(function, expected):
    x = [-3.0, -0.5, 0.0, 0.5, 3.0]
    ours = models.Activation(function).apply({}, jnp.array(x))
    np.testing.assert_allclose(ours, [expected(value) for value in x], rtol=1e-5, atol=1e-6)


def test_every_activation_is_tested():
    marker = test_activation_values.pytestmark[0]
    assert {function for function, _ in marker.args[1]} == set(common.ACTIVATIONS)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"^activation is 'RELU', but it must be one of relu, "):
        models.Activation('RELU')


@pytest.mark.parametrize(('kernel_size', 'stride'), [(3, 2), (7, 2), (1, 2), (3, 1)])
def test_convolution_centers_its_kernel_on_every_stride(kernel_size, stride):
    # 'SAME' padding would read odd positions of an even image here.
    x = images(1, 8, 8, 1)
    center = kernel_size // 2
    kernel = jnp.zeros((kernel_size, kernel_size, 1, 1)).at[center, center].set(1.0)
    layer = common.conv(1, kernel_size, stride=stride, name='conv', dtype=jnp.float32)
    ours = layer.apply({'params': {'kernel': kernel}}, x)
    np.testing.assert_array_equal(ours, x[:, ::stride, ::stride])


@pytest.mark.parametrize(
    ('layer', 'shape', 'scale'),
    [
        (common.conv(64, 3, name='conv', dtype=jnp.float32), (1, 4, 4, 32), 2 / (9 * 64)),
        (common.dense(64, name='dense', dtype=jnp.float32), (1, 512), 2 / 512),
    ],
    ids=['convolution over the fan-out', 'dense over the fan-in'],
)
def test_kernels_are_he_normal(layer, shape, scale):
    init = jax.jit(layer.init, compiler_options=UNOPTIMISED)
    kernel = init(jax.random.key(0), jnp.zeros(shape))['params']['kernel']
    # With some 18,000 values, five standard errors of the variance.
    np.testing.assert_allclose(np.var(kernel), scale, rtol=0.05)
    np.testing.assert_allclose(np.mean(kernel), 0, atol=5 * math.sqrt(scale / kernel.size))
    # A truncated normal would end at two standard deviations.
    assert np.abs(kernel).max() > 3 * math.sqrt(scale)


def test_xavier_kernels_and_biases_are_uniform_within_their_bounds():
    module = models.create('mlp', num_classes=10, hidden=(200,), initialization='xavier')
    init = jax.jit(module.init, compiler_options=UNOPTIMISED)
    params = init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']
    for name, inputs, outputs in (('dense1', 784, 200), ('head', 200, 10)):
        bound = math.sqrt(6 / (inputs + outputs))
        kernel = np.asarray(params[name]['kernel'])
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.var(), bound**2 / 3, rtol=0.05)
        bias = np.asarray(params[name]['bias'])
        assert 0.5 / math.sqrt(inputs) < np.abs(bias).max() <= 1 / math.sqrt(inputs)


def test_unknown_initialization():
    with pytest.raises(ValueError, match=r"^initialization is 'zero', but it must be one of he, "):
        models.create('mlp', num_classes=2, initialization='zero')


def test_dropout_of_a_small_network_acts_in_training_only():
    module = models.create('cnn', num_classes=3, features=(2,), hidden=(50,), dropout=0.5)
    x = images(4, 6, 6, 1)
    variables = module.init(jax.random.key(0), x)
    plain = models.create('cnn', num_classes=3, features=(2,), hidden=(50,))
    np.testing.assert_array_equal(module.apply(variables, x), plain.apply(variables, x))
    draws = [
        module.apply(variables, x, train=True, rngs={'dropout': jax.random.key(seed)})
        for seed in (0, 1)
    ]
    assert np.abs(draws[0] - draws[1]).max() > 0
    with pytest.raises(ValueError, match=r'^dropout is 1, but it must be at least 0'):
        models.create('cnn', num_classes=3, dropout=1)


def test_max_pool_centers_its_windows_and_ignores_padding():
    x = -1.0 - images(1, 8, 8, 2)
    ours = common.max_pool(x, 3, 2, padding=1)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = np.zeros((1, 4, 4, 2))
    for i, j in itertools.product(range(4), repeat=2):
        expected[:, i, j] = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(('height', 'width'), [(7, 7), (10, 8), (14, 7), (3, 1)])
def test_adaptive_average_pool(height, width):
    x = images(2, height, width, 3)
    expected = np.zeros((2, 7, 7, 3))
    for i, j in itertools.product(range(7), repeat=2):
        rows = slice(math.floor(i * height / 7), math.ceil((i + 1) * height / 7))
        columns = slice(math.floor(j * width / 7), math.ceil((j + 1) * width / 7))
        expected[:, i, j] = np.mean(x[:, rows, columns], axis=(1, 2))
    np.testing.assert_allclose(common.adaptive_average_pool(x, 7), expected, rtol=1e-6)


def test_padded_shortcut_subsamples_and_pads_both_sides():
    x = images(2, 4, 6, 16)
    ours = np.asarray(resnet.padded_shortcut(x, 32, 2))
    assert ours.shape == (2, 2, 3, 32)
    np.testing.assert_array_equal(ours[..., 8:24], x[:, ::2, ::2])
    assert not ours[..., :8].any() and not ours[..., 24:].any()


def test_padded_shortcut_is_what_the_block_adds():
    block = resnet.BasicBlock(8, 2, 'identity', jnp.float32, shortcut='pad')
    x = images(1, 4, 4, 4)
    # Normalisation with zero scale leaves the shortcut alone.
    variables = jax.tree.map(jnp.zeros_like, random_variables(block, x, False))
    ours = evaluate(block, variables, x, False)
    np.testing.assert_array_equal(ours, resnet.padded_shortcut(x, 8, 2))


def test_preactivation_block_adds_its_raw_input():
    block = resnet.PreActBlock(4, 1, 'relu', jnp.float32)
    x = images(1, 4, 4, 4) - 0.5
    variables = jax.tree.map(jnp.zeros_like, random_variables(block, x, False))
    np.testing.assert_array_equal(evaluate(block, variables, x, False), x)


def test_preactivation_shortcut_reads_the_activated_input():
    block = resnet.PreActBlock(4, 2, 'relu', jnp.float32)
    x = images(1, 4, 4, 4) - 0.5
    variables = random_variables(block, x, False)
    params = variables['params']
    params['conv2'] = jax.tree.map(jnp.zeros_like, params['conv2'])
    params['shortcut_conv'] = {'kernel': jnp.eye(4)[None, None]}
    norm, statistics = params['norm1'], variables['batch_stats']['norm1']
    normalized = (x - statistics['mean']) / np.sqrt(statistics['var'] + 1e-5)
    activated = np.maximum(normalized * norm['scale'] + norm['bias'], 0)
    assert np.any(activated == 0)
    ours = evaluate(block, variables, x, False)
    np.testing.assert_allclose(ours, activated[:, ::2, ::2], rtol=1e-4, atol=1e-6)


def test_dense_block_appends_its_channels():
    block = densenet.DenseBlock(3, 'relu', jnp.float32)
    x = images(1, 4, 4, 5)
    ours = evaluate(block, random_variables(block, x, False), x, False)
    assert ours.shape == (1, 4, 4, 8)
    np.testing.assert_array_equal(ours[..., :5], x)
    assert np.any(ours[..., 5:])


def test_flatten_order_is_height_width_channels():
    x = images(2, 3, 2, 2)
    model = models.create('mlp', num_classes=2, hidden=(12,), activation='identity')
    variables = {
        'params': {
            'dense1': {'kernel': jnp.eye(12), 'bias': jnp.zeros(12)},
            'head': {'kernel': jnp.eye(12)[:, 5:7], 'bias': jnp.zeros(2)},
        }
    }
    # Features 5 and 6 are (1, 0, 1) and (1, 1, 0).
    expected = np.stack([x[:, 1, 0, 1], x[:, 1, 1, 0]], axis=1)
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-6)


def test_normalization_is_inside_the_model():
    x = images(2, 4, 4, 1)
    plain = models.create('mlp', num_classes=3, hidden=(5,))
    normalized = models.create('mlp', num_classes=3, hidden=(5,), mean=(0.3,), std=(0.5,))
    variables = random_variables(plain, x)
    np.testing.assert_allclose(
        normalized.apply(variables, x), plain.apply(variables, (x - 0.3) / 0.5), rtol=1e-5
    )


def test_average_pool_option_changes_the_pool():
    x = images(1, 28, 28, 1)
    by_maximum = models.create('lenet5', num_classes=10)
    by_mean = models.create('lenet5', num_classes=10, pool='avg')
    variables = random_variables(by_maximum, x)
    assert not np.allclose(evaluate(by_maximum, variables, x), evaluate(by_mean, variables, x))
    means = common.halve(jnp.arange(4.0).reshape(1, 2, 2, 1), 'avg')
    np.testing.assert_array_equal(means, [[[[1.5]]]])


@pytest.mark.parametrize(
    ('name', 'shape', 'options'),
    [
        ('mlp', (28, 28, 1), {}),
        ('cnn', (16, 16, 3), {'features': (4, 8), 'hidden': (16,), 'norm': 'batch'}),
        ('lenet5', (28, 28, 1), {}),
        ('cifar_resnet20', (16, 16, 3), {}),
    ],
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_head_maps_nonnegative_features_to_logits(name, shape, options, dtype):
    model = models.create(name, num_classes=10, dtype=dtype, **options)
    x = images(4, *shape)
    variables = random_variables(model, x)

    @jax.jit
    def forward(variables, x):
        features = []

        def keep(call, args, kwargs, context):
            if context.module.path == ('head',):
                features.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(keep):
            return model.apply(variables, x), features[0]

    logits, features = jax.tree.map(np.asarray, forward(variables, x))
    head = variables['params']['head']
    assert logits.dtype == np.float32
    assert features.min() >= 0
    assert (features > 0).mean() > 0.1
    expected = features.astype(np.float32) @ head['kernel'] + head['bias']
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def small_batch_norm_models():
    return [
        models.create('cnn', num_classes=3, features=(4,), hidden=(), norm='batch'),
        models.CIFARResNet(num_classes=3, depth=8),
    ]


@pytest.mark.parametrize('model', small_batch_norm_models(), ids=lambda m: type(m).__name__)
def test_rows_are_independent_only_in_evaluation(model):
    x = images(3, 8, 8, 3)
    changed = x.at[1:].set(images(2, 8, 8, 3, seed=1) ** 3)
    variables = random_variables(model, x)
    ours, again = (evaluate(model, variables, batch) for batch in (x, changed))
    np.testing.assert_array_equal(ours[0], again[0])

    @jax.jit
    def train(x):
        return model.apply(variables, x, train=True, mutable=['batch_stats'])[0]

    assert not np.allclose(train(x)[0], train(changed)[0], rtol=1e-3)


def test_training_moves_the_batch_statistics_by_a_tenth():
    model = small_batch_norm_models()[0]
    x = images(5, 8, 8, 3)
    variables = random_variables(model, x)

    @jax.jit
    def train(variables, x):
        return model.apply(
            variables,
            x,
            train=True,
            mutable=['batch_stats', 'intermediates'],
            capture_intermediates=lambda module, _: module.name == 'conv1',
        )[1]

    updated = train(variables, x)
    convolved = np.asarray(updated['intermediates']['conv1']['__call__'][0])
    moments = {'mean': convolved.mean((0, 1, 2)), 'var': convolved.var((0, 1, 2))}
    for name, moment in moments.items():
        expected = 0.9 * variables['batch_stats']['norm1'][name] + 0.1 * moment
        ours = updated['batch_stats']['norm1'][name]
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ('model', 'options', 'blocks'),
    [
        (models.CIFARResNet, {'depth': 8}, 3),
        (models.ResNet, {'stage_sizes': (1, 2)}, 3),
        (models.PreActResNet, {'stage_sizes': (2, 1)}, 3),
        (models.WideResNet, {'depth': 10, 'width': 1}, 3),
        (models.DenseNet, {'stage_sizes': (2, 3)}, 5),
    ],
)
@pytest.mark.parametrize('train', [False, True])
def test_remat_wraps_every_block(model, options, blocks, train):
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    plain, remat = (model(num_classes=3, remat=flag, **options) for flag in (False, True))
    variables = jax.eval_shape(plain.init, jax.random.key(0), x)

    def wrapped(model):
        def forward(variables, x):
            return model.apply(variables, x, train=train, mutable=['batch_stats'])

        program = jax.make_jaxpr(forward)(variables, x)
        primitives = [equation.primitive.name for equation in program.eqns]
        return sum(name in ('remat2', 'checkpoint') for name in primitives)

    assert (wrapped(plain), wrapped(remat)) == (0, blocks)


@pytest.mark.parametrize(
    ('model', 'options'),
    [
        (models.ResNet, {'block': 'basic'}),
        (models.ResNet, {'block': 'bottleneck'}),
        (models.PreActResNet, {}),
        (models.DenseNet, {'growth_rate': 4}),
    ],
)
def test_remat_recomputes_without_changing_a_value(model, options):
    x = images(2, 8, 8, 3)
    plain, remat = (
        model(num_classes=3, stage_sizes=(1,), remat=flag, **options) for flag in (False, True)
    )
    variables = random_variables(plain, x)
    shapes = jax.eval_shape(remat.init, jax.random.key(0), x)
    assert shapes == jax.eval_shape(plain.init, jax.random.key(0), x)

    def step(model, params):
        def loss(params):
            logits, updated = model.apply(
                {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
            )
            return jnp.sum(logits**2), (logits, updated)

        return jax.value_and_grad(loss, has_aux=True)(params)

    compiled = jax.jit(step, static_argnums=0, compiler_options=UNOPTIMISED)
    expected, ours = (compiled(model, variables['params']) for model in (plain, remat))
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected
    )


def test_dropout_acts_in_training_only():
    model = models.VGG(
        num_classes=3, stage_sizes=(1,), classifier='imagenet', dropout=0.5, activation='identity'
    )
    x = jax.ShapeDtypeStruct((2, 2, 2, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def forward(variables, x, train, rngs):
        return model.apply(variables, x, train, rngs=rngs, mutable=['batch_stats'])[0]

    def program(train):
        rngs = {'dropout': jax.random.key(0)}
        return str(jax.make_jaxpr(forward, static_argnums=2)(variables, x, train, rngs))

    assert 'random_bits' in program(True)
    assert 'random_bits' not in program(False)


def test_gradients_and_vectorisation_over_examples():
    model = models.create('cnn', num_classes=3, features=(4,), hidden=(), norm='batch')
    x = images(3, 8, 8, 3)
    variables = random_variables(model, x)

    def logit(image):
        return model.apply(variables, image[None])[0, 1]

    each = jax.jit(jax.vmap(jax.grad(logit)))(x)
    together = jax.jit(jax.grad(lambda x: jnp.sum(model.apply(variables, x)[:, 1])))(x)
    np.testing.assert_allclose(each, together, rtol=1e-4, atol=1e-6)
    assert np.all(np.abs(each).max(axis=(1, 2, 3)) > 0)
