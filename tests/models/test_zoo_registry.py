"""Creation of models by name: options, equality and the message of every error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models


def test_names_are_unique_and_all_can_be_created():
    assert len(set(models.names())) == len(models.names()) == 20
    for name in models.names():
        assert models.create(name, num_classes=3).num_classes == 3


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('mlp', {'activation': 'relu', 'hidden': (200, 200), 'initialization': 'he'}),
        (
            'cnn',
            {
                'activation': 'relu',
                'features': (32, 64),
                'kernel_size': 3,
                'strides': 1,
                'padding': None,
                'pool': 'max',
                'hidden': (128,),
                'norm': 'none',
                'dropout': 0.0,
            },
        ),
        ('lenet5', {'activation': 'relu', 'pool': 'max'}),
        ('lenet5_wide', {'activation': 'relu'}),
        ('cifar_resnet20', {'activation': 'relu', 'remat': False}),
        ('resnet18', {'activation': 'relu', 'stem': 'cifar', 'remat': False}),
        ('preact_resnet18', {'activation': 'relu', 'remat': False}),
        (
            'wide_resnet',
            {
                'activation': 'relu',
                'depth': 28,
                'width': 10,
                'padding': 'symmetric',
                'remat': False,
            },
        ),
        ('wide_resnet28_10', {'activation': 'relu', 'padding': 'symmetric', 'remat': False}),
        (
            'vgg16',
            {'activation': 'relu', 'classifier': 'cifar', 'dropout': 0.0, 'norm': 'batch'},
        ),
        (
            'densenet121',
            {
                'activation': 'relu',
                'growth_rate': 32,
                'newest_first': False,
                'stem': 'cifar',
                'remat': False,
            },
        ),
    ],
)
def test_options_and_defaults(name, expected):
    assert models.options(name) == expected
    assert models.create(name, num_classes=10, **expected) == models.create(name, num_classes=10)


@pytest.mark.parametrize('name', models.names())
def test_equal_arguments_give_equal_models(name):
    arguments = {'num_classes': 10, 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.2, 0.2)}
    first, second = models.create(name, **arguments), models.create(name, **arguments)
    assert first == second
    assert hash(first) == hash(second)
    assert first != models.create(name, **arguments, activation='gelu')
    assert first != models.create(name, **{**arguments, 'num_classes': 9})
    assert first != models.create(name, **arguments, dtype='bfloat16')


def test_lists_and_array_values_become_tuples_of_numbers():
    ours = models.create('mlp', num_classes=10, mean=[0.5], std=np.ones(1), hidden=[30, 20])
    assert (ours.mean, ours.std, ours.hidden) == ((0.5,), (1.0,), (30, 20))
    assert hash(ours) == hash(models.create('mlp', num_classes=10, mean=(0.5,), hidden=(30, 20)))


def test_spellings_of_a_type_give_equal_models():
    spellings = ('bfloat16', jnp.bfloat16, jnp.dtype('bfloat16'))
    assert len({models.create('mlp', num_classes=10, dtype=dtype) for dtype in spellings}) == 1


def test_equal_models_share_a_compilation():
    traces = []

    def forward(model, x):
        traces.append(model)
        return model.init_with_output(jax.random.key(0), x)[0]

    compiled = jax.jit(forward, static_argnums=0)
    x = jnp.zeros((1, 2, 2, 1))
    for _ in range(2):
        compiled(models.create('mlp', num_classes=2, hidden=[3]), x)
    assert len(traces) == 1
    compiled(models.create('mlp', num_classes=2, hidden=[4]), x)
    assert len(traces) == 2


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        (
            'resnt18',
            {},
            "Unknown model 'resnt18'; the closest names are resnet18, resnet50, preact_resnet18.",
        ),
        ('zzz', {}, f"Unknown model 'zzz'; valid names are {', '.join(models.names())}."),
        (
            'wide_resnet28_10',
            {'depth': 40},
            "Unknown wide_resnet28_10 option 'depth'; valid names are activation, padding, remat.",
        ),
        ('mlp', {'num_classes': 1}, 'num_classes is 1, but it must be an integer of at least 2.'),
        (
            'mlp',
            {'num_classes': 2.5},
            'num_classes is 2.5, but it must be an integer of at least 2.',
        ),
        (
            'mlp',
            {'mean': (0.5, 0.5)},
            'mean (0.5, 0.5) has 2 values and std (1.0,) has 1, but both need one value for all '
            'channels or one value per channel.',
        ),
        (
            'mlp',
            {'mean': (), 'std': ()},
            'mean () has 0 values and std () has 0, but both need one value for all channels or '
            'one value per channel.',
        ),
        ('mlp', {'std': (0,)}, 'std is (0.0,), but every value must be greater than 0.'),
        (
            'mlp',
            {'std': (float('nan'),)},
            'std is (nan,), but every value must be greater than 0.',
        ),
        (
            'mlp',
            {'mean': 0.5},
            'mean is 0.5, but it must be a tuple of numbers, one for all channels or one per '
            'channel.',
        ),
        (
            'mlp',
            {'dtype': 'int32'},
            'dtype is int32, but it must be a floating-point type such as float32 or bfloat16.',
        ),
        (
            'mlp',
            {'activation': 'rellu'},
            "activation is 'rellu', but it must be one of relu, gelu, silu, tanh, softplus, "
            'leaky_relu, elu, identity.',
        ),
        (
            'mlp',
            {'hidden': ()},
            'hidden is (), but it must be a non-empty tuple of positive integers.',
        ),
        (
            'mlp',
            {'hidden': 100},
            'hidden is 100, but it must be a non-empty tuple of positive integers.',
        ),
        (
            'cnn',
            {'hidden': (10, 0)},
            'hidden is (10, 0), but it must be a tuple of positive integers.',
        ),
        (
            'cnn',
            {'features': ()},
            'features is (), but it must be a non-empty tuple of positive integers.',
        ),
        ('cnn', {'kernel_size': 0}, 'kernel_size is 0, but it must be an integer of at least 1.'),
        ('cnn', {'strides': 1.5}, 'strides is 1.5, but it must be an integer of at least 1.'),
        (
            'cnn',
            {'strides': (1, 2, 2)},
            'strides (1, 2, 2) has 3 values for 2 convolutions: give one integer or one per '
            'convolution.',
        ),
        ('cnn', {'padding': -1}, 'padding is -1, but it must be an integer of at least 0.'),
        ('cnn', {'pool': 'min'}, "pool is 'min', but it must be one of max, avg, none."),
        ('cnn', {'norm': 'layer'}, "norm is 'layer', but it must be one of none, batch."),
        ('lenet5', {'pool': 'none'}, "pool is 'none', but it must be one of max, avg."),
        ('resnet18', {'stem': 'x'}, "stem is 'x', but it must be one of cifar, imagenet."),
        ('densenet121', {'stem': 'x'}, "stem is 'x', but it must be one of cifar, imagenet."),
        (
            'densenet121',
            {'growth_rate': 0},
            'growth_rate is 0, but it must be an integer of at least 1.',
        ),
        (
            'wide_resnet',
            {'depth': 30},
            'depth is 30, but it must be 6n + 4 for a positive integer n, such as 10 or 16.',
        ),
        (
            'wide_resnet',
            {'depth': 4},
            'depth is 4, but it must be 6n + 4 for a positive integer n, such as 10 or 16.',
        ),
        (
            'wide_resnet',
            {'padding': 'valid'},
            "padding is 'valid', but it must be one of symmetric, same.",
        ),
        ('wide_resnet', {'width': 0}, 'width is 0, but it must be an integer of at least 1.'),
        ('vgg16', {'classifier': 'x'}, "classifier is 'x', but it must be one of cifar, imagenet."),
        ('vgg16', {'norm': 'x'}, "norm is 'x', but it must be one of batch, none."),
        (
            'vgg16',
            {'classifier': 'imagenet', 'dropout': 1.0},
            'dropout is 1.0, but it must be at least 0 and less than 1.',
        ),
        (
            'vgg16',
            {'dropout': 0.5},
            "dropout is 0.5, but the classifier 'cifar' has no dense layers to drop: use 0 or "
            "the classifier 'imagenet'.",
        ),
    ],
)
def test_invalid_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        models.create(name, **{'num_classes': 10, **arguments})


def test_options_of_an_unknown_name():
    with pytest.raises(ValueError, match=r"^Unknown model 'vgg'; the closest names are vgg"):
        models.options('vgg')


@pytest.mark.parametrize(
    ('model', 'arguments', 'message'),
    [
        (
            models.CIFARResNet,
            {'depth': 21},
            'depth is 21, but it must be 6n + 2 for a positive integer n, such as 8 or 14.',
        ),
        (models.ResNet, {'block': 'x'}, "block is 'x', but it must be one of basic, bottleneck."),
        (
            models.PreActResNet,
            {'stage_sizes': (1, 1, 1, 1, 1)},
            'stage_sizes is (1, 1, 1, 1, 1), but this network has at most 4 stages: give at most '
            '4 values.',
        ),
        (
            models.DenseNet,
            {'stage_sizes': ()},
            'stage_sizes is (), but it must be a non-empty tuple of positive integers.',
        ),
    ],
)
def test_classes_check_the_fields_that_names_fix(model, arguments, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        model(num_classes=10, **arguments)


@pytest.mark.parametrize(
    ('name', 'shape', 'dtype', 'message'),
    [
        (
            'mlp',
            (28, 28, 3),
            'float32',
            'Images have shape (28, 28, 3), but a model needs the four dimensions '
            '[batch, height, width, channels].',
        ),
        (
            'mlp',
            (1, 8, 8, 3),
            'uint8',
            'Images have type uint8, but a model needs floating-point values in [0, 1]: divide '
            '8-bit images by 255.',
        ),
        (
            'mlp',
            (1, 8, 8, 1),
            'float32',
            'mean and std have length 3, but the number of image channels is 1: give one value for '
            'all channels or one value per channel.',
        ),
        (
            'vgg11',
            (1, 16, 16, 3),
            'float32',
            'The last feature map has size 0 x 0: the images are too small for this network, so '
            'use larger images or fewer strides and pools.',
        ),
        (
            'lenet5',
            (1, 8, 8, 3),
            'float32',
            'The last feature map has size 0 x 0: the images are too small for this network, so '
            'use larger images or fewer strides and pools.',
        ),
    ],
)
def test_unsuitable_images(name, shape, dtype, message):
    model = models.create(name, num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    # JAX may append a note on hidden frames.
    with pytest.raises(ValueError, match=f'^{re.escape(message)}(\n-|$)'):
        jax.eval_shape(model.init, jax.random.key(0), images)
