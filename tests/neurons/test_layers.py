"""Which layers are measured by default, and what is said of a layer; from shapes alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from neurosens import models
from neurosens.forward import LayerError, LinenForward, NNXForward
from neurosens.neurons.layers import default_layers, describe


def shapes_of(module, size=16, channels=3):
    """A forward, the shapes of its variables and the shape of a batch: nothing is computed."""
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return LinenForward(module), variables, x


# name: (options, first layer, its filters, channels, filters of head:in, width of head:in)
ZOO = {
    'cnn': ({'features': (4, 6), 'hidden': (12,)}, 'act1', 'conv1', 4, 'dense3', 12),
    'mlp': ({'hidden': (7, 9)}, 'act1', 'dense1', 7, 'dense2', 9),
    'cifar_resnet20': ({}, 'act1', 'conv1', 16, 'stage3_block3/conv2', 64),
    'wide_resnet': (
        {'depth': 10, 'width': 2},
        'stage1_block1/act1',
        'conv1',
        16,
        'stage3_block1/conv2',
        128,
    ),
    # A dense block appends its channels, so no single layer holds the filters of the features.
    'densenet': (
        {'stage_sizes': (2, 1), 'growth_rate': 4},
        'stage1_block1/act1',
        'conv1',
        8,
        None,
        12,
    ),
}


@pytest.mark.parametrize('name', ZOO)
def test_default_layers_of_the_zoo(name):
    options, first, filters, channels, last_filters, width = ZOO[name]
    make = models.DenseNet if name == 'densenet' else functools.partial(models.create, name)
    net = shapes_of(make(num_classes=5, **options))
    assert default_layers(*net) == (first, 'head:in')
    seen = describe(*net, first)
    assert (seen.name, seen.kernel_layer, seen.neurons) == (first, filters, channels)
    assert seen.shape[-1] == channels
    assert seen.facts.nonnegative
    assert not seen.facts.affine_tail
    last = describe(*net, 'head:in')
    assert (last.shape, last.neurons, last.kernel_layer) == ((width,), width, last_filters)
    assert last.facts.nonnegative
    assert last.facts.affine_tail


def test_default_layers_of_a_deep_network():
    net = shapes_of(models.DenseNet(num_classes=5, stage_sizes=(2, 3), growth_rate=4))
    assert default_layers(*net) == ('stage1_block1/act1', 'head:in')


def test_units_are_counted_and_the_filters_stay():
    net = shapes_of(models.create('cnn', num_classes=5, features=(4,), hidden=(12,)), 6)
    channel, unit = (describe(*net, 'act1', unit=unit) for unit in ('channel', 'unit'))
    assert (channel.unit, channel.neurons, channel.shape) == ('channel', 4, (6, 6, 4))
    assert (unit.unit, unit.neurons, unit.shape) == ('unit', 144, (6, 6, 4))
    assert channel.kernel_layer == unit.kernel_layer == 'conv1'


def test_the_input_of_a_layer_belongs_to_the_filters_before_it():
    net = shapes_of(models.CIFARResNet(num_classes=5, depth=8))
    assert describe(*net, 'stage1_block1:in').kernel_layer == 'conv1'
    assert describe(*net, 'stage1_block1').kernel_layer == 'stage1_block1/conv2'
    assert describe(*net, 'stage1_block1/conv2:in').kernel_layer == 'stage1_block1/conv1'
    assert describe(*net, 'conv1:in').kernel_layer is None
    # Three colours are not the sixteen filters.
    assert describe(*net, 'normalize').kernel_layer is None


def test_a_tanh_network_keeps_its_first_convolution():
    """No layer behind the convolution is known to be nonnegative."""
    module = models.create('cnn', num_classes=5, features=(4,), hidden=(), activation='tanh')
    net = shapes_of(module)
    assert default_layers(*net) == ('conv1', 'head:in')
    assert not describe(*net, 'conv1').facts.nonnegative


class Small(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.act = Relu()
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.act(self.norm(self.conv(x))).mean((1, 2)))


class Relu(nnx.Module):
    def __call__(self, x):
        return nnx.relu(x)


def test_an_nnx_model():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))
    net = NNXForward(graphdef), state, jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)
    assert default_layers(*net) == ('act', 'head:in')
    seen = describe(*net, 'act')
    assert (seen.shape, seen.neurons, seen.kernel_layer) == ((6, 6, 4), 4, 'conv')
    # Only an average and the head follow.
    assert seen.facts.nonnegative
    assert seen.facts.affine_tail
    assert not describe(*net, 'norm').facts.nonnegative


class Positive(nn.Module):
    def __call__(self, x):
        return x > 0


class Net(nn.Module):
    """A network written as a function of the module and its input."""

    body: object

    @nn.compact
    def __call__(self, x):
        return self.body(x)


def test_a_model_whose_only_kernel_is_the_head():
    net = shapes_of(Net(lambda x: nn.Dense(5, name='head')(x.reshape(len(x), -1))), 4)
    assert default_layers(*net) == ('head:in',)
    seen = describe(*net, 'head:in')
    assert (seen.neurons, seen.kernel_layer) == (48, None)
    assert not seen.facts.nonnegative
    assert seen.facts.affine_tail


def test_a_model_without_kernels_has_no_default_layers():
    net = shapes_of(Net(lambda x: models.Activation('relu', name='act')(x).mean((1, 2))))
    with pytest.raises(ValueError, match='No layer of this model has a kernel'):
        default_layers(*net)
    assert describe(*net, 'act').kernel_layer is None


def test_a_mask_between_the_convolution_and_its_nonlinearity_is_passed_over():
    def body(x):
        x = nn.Conv(4, (3, 3), name='conv')(x)
        x = models.Activation('relu', name='act')(x * Positive(name='mask')(x))
        return nn.Dense(5, name='head')(x.mean((1, 2)))

    assert default_layers(*shapes_of(Net(body))) == ('act', 'head:in')


@pytest.mark.parametrize(
    'between',
    [
        # The nonlinearity behind the next convolution is not its own.
        lambda x: x,
        # Nor is one of another shape.
        lambda x: models.Activation('relu', name='pooled')(x[:, ::2, ::2]),
    ],
)
def test_a_convolution_without_a_nonlinearity_of_its_own_is_taken_itself(between):
    def body(x):
        x = between(nn.Conv(4, (3, 3), name='conv1')(x))
        x = models.Activation('relu', name='act')(nn.Conv(4, (3, 3), name='conv2')(x))
        return nn.Dense(5, name='head')(x.mean((1, 2)))

    assert default_layers(*shapes_of(Net(body), 6)) == ('conv1', 'head:in')


def test_a_dense_layer_before_the_first_convolution_is_passed_over():
    def body(x):
        x = models.Activation('relu', name='act0')(nn.Dense(4, name='colours')(x))
        x = models.Activation('relu', name='act1')(nn.Conv(4, (3, 3), name='conv')(x))
        return nn.Dense(5, name='head')(x.mean((1, 2)))

    assert default_layers(*shapes_of(Net(body), 6)) == ('act1', 'head:in')


def test_mistakes():
    net = shapes_of(models.create('mlp', num_classes=5, hidden=(7,)), 4)
    with pytest.raises(LayerError, match=r"Unknown layer 'act9'.*'act1'"):
        describe(*net, 'act9')
    with pytest.raises(ValueError, match="Unknown unit 'filter'"):
        describe(*net, 'act1', unit='filter')
