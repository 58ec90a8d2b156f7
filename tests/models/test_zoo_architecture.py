"""Architecture of every model in the zoo: parameters, names, order and settings of its layers."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from neurosens import models
from neurosens.models import BatchNorm

MNIST = (28, 28, 1)
CIFAR = (32, 32, 3)
IMAGENET = (224, 224, 3)

MLP_5X100 = (784 * 100 + 100) + 4 * (100 * 100 + 100) + (100 * 10 + 10)
MNIST_CNN = (9 * 32 + 32) + (9 * 32 * 64 + 64) + (3136 * 200 + 200) + (200 * 10 + 10)
CNN_A = (16 * 3 * 16 + 16) + (16 * 16 * 32 + 32) + (2048 * 100 + 100) + (100 * 10 + 10)
CNN_A_OPTIONS = {
    'features': (16, 32),
    'kernel_size': 4,
    'strides': 2,
    'padding': 1,
    'pool': 'none',
    'hidden': (100,),
}

PARAMETERS = [
    ('mlp', MNIST, 10, {'hidden': (100,) * 5}, MLP_5X100),
    ('cnn', MNIST, 10, {'features': (32, 64), 'padding': 1, 'hidden': (200,)}, MNIST_CNN),
    ('cnn', CIFAR, 10, CNN_A_OPTIONS, CNN_A),
    ('lenet5', MNIST, 10, {}, 61_706),
    ('lenet5_wide', MNIST, 10, {}, MNIST_CNN),
    ('cifar_resnet20', CIFAR, 10, {}, 269_722),
    ('cifar_resnet32', CIFAR, 10, {}, 464_154),
    ('cifar_resnet44', CIFAR, 10, {}, 658_586),
    ('cifar_resnet56', CIFAR, 10, {}, 853_018),
    ('cifar_resnet110', CIFAR, 10, {}, 1_727_962),
    ('resnet18', CIFAR, 10, {}, 11_173_962),
    ('resnet50', CIFAR, 10, {}, 23_520_842),
    ('resnet18', IMAGENET, 1000, {'stem': 'imagenet'}, 11_689_512),
    ('resnet50', IMAGENET, 1000, {'stem': 'imagenet'}, 25_557_032),
    ('preact_resnet18', CIFAR, 10, {}, 11_172_170),
    ('wide_resnet', CIFAR, 10, {'depth': 34, 'width': 10}, 46_160_474),
    ('wide_resnet28_10', CIFAR, 10, {}, 36_479_194),
    ('wide_resnet34_10', CIFAR, 10, {}, 46_160_474),
    ('vgg11', CIFAR, 10, {}, 9_231_114),
    ('vgg16', CIFAR, 10, {}, 14_728_266),
    ('vgg19', CIFAR, 10, {}, 20_040_522),
    ('vgg11', IMAGENET, 1000, {'classifier': 'imagenet'}, 132_868_840),
    ('vgg16', IMAGENET, 1000, {'classifier': 'imagenet'}, 138_365_992),
    ('vgg19', IMAGENET, 1000, {'classifier': 'imagenet'}, 143_678_248),
    ('vgg19', IMAGENET, 1000, {'classifier': 'imagenet', 'norm': 'none'}, 143_667_240),
    ('densenet121', CIFAR, 10, {}, 6_956_298),
    ('densenet121', IMAGENET, 1000, {'stem': 'imagenet'}, 7_978_856),
    ('densenet169', IMAGENET, 1000, {'stem': 'imagenet'}, 14_149_480),
]

VARIANTS = [
    *((name, CIFAR, {}) for name in models.names()),
    ('cnn', CIFAR, CNN_A_OPTIONS),
    ('cnn', CIFAR, {'norm': 'batch'}),
    ('resnet50', IMAGENET, {'stem': 'imagenet', 'num_classes': 1000}),
    ('vgg16', IMAGENET, {'classifier': 'imagenet', 'num_classes': 1000}),
    ('densenet121', IMAGENET, {'stem': 'imagenet', 'num_classes': 1000}),
]


@pytest.mark.parametrize(('name', 'image', 'num_classes', 'options', 'count'), PARAMETERS)
def test_parameter_count_is_the_published_one(trace, name, image, num_classes, options, count):
    assert trace(name, image, num_classes=num_classes, **options).num_parameters == count


@pytest.mark.parametrize(
    ('name', 'image', 'options', 'dtype', 'activation'),
    [
        *((*variant, 'float32', 'relu') for variant in VARIANTS),
        *((name, CIFAR, {}, 'bfloat16', 'gelu') for name in models.names()),
    ],
)
def test_dtype_and_activation(trace, name, image, options, dtype, activation):
    traced = trace(name, image, dtype=dtype, activation=activation, **options)
    assert traced.logits.shape == (2, options.get('num_classes', 10))
    assert traced.logits.dtype == jnp.float32
    assert traced['head'].input.dtype == dtype
    assert {call.output.dtype for call in traced.of(nn.Conv)} <= {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(traced.variables)} == {jnp.dtype('float32')}
    assert {call.module.function for call in traced.of(models.Activation)} == {activation}


@pytest.mark.parametrize(('name', 'image', 'options'), VARIANTS)
def test_every_module_is_called_once_and_head_reads_activations(trace, name, image, options):
    traced = trace(name, image, **options)
    counts = collections.Counter(call.path for call in traced.calls)
    assert {path: count for path, count in counts.items() if count > 1} == {}
    assert traced.paths()[0] == 'normalize'
    assert isinstance(traced['normalize'].module, models.Normalize)
    # Only a pool or a reshape can lie between the last activation and the head.
    assert isinstance(traced.calls[-2].module, models.Activation)
    assert traced.calls[-1].path == 'head'
    assert type(traced.calls[-1].module) is nn.Dense
    features = traced['head'].input.shape[-1]
    assert traced.variables['params']['head']['kernel'].shape == (
        features,
        options.get('num_classes', 10),
    )


@pytest.mark.parametrize(('name', 'image', 'options'), VARIANTS)
def test_layer_settings(trace, name, image, options):
    traced = trace(name, image, **options)
    for call in traced.of(nn.Conv):
        module = call.module
        width = module.kernel_size[0]
        expected = (width - 1) // 2
        if (name, call.path) == ('lenet5', 'conv2'):
            expected = 0
        assert module.kernel_size == (width, width)
        assert module.padding == ((expected, expected), (expected, expected)), call.path
        assert module.strides in ((1, 1), (2, 2))
    for call in traced.of(BatchNorm):
        assert (call.module.momentum, call.module.epsilon) == (0.9, 1e-5)
        assert call.module.use_running_average is True


@pytest.mark.parametrize(
    ('name', 'image', 'options', 'count'),
    [
        ('mlp', MNIST, {'hidden': (100,) * 5}, 5),
        ('cnn', MNIST, {}, 3),
        ('lenet5', MNIST, {}, 4),
        ('lenet5_wide', MNIST, {}, 3),
        ('cifar_resnet20', CIFAR, {}, 1 + 9 * 2),
        ('cifar_resnet110', CIFAR, {}, 1 + 54 * 2),
        ('resnet18', CIFAR, {}, 1 + 8 * 2),
        ('resnet50', CIFAR, {}, 1 + 16 * 3),
        ('preact_resnet18', CIFAR, {}, 8 * 2 + 1),
        ('wide_resnet28_10', CIFAR, {}, 12 * 2 + 1),
        ('vgg16', CIFAR, {}, 13),
        ('vgg16', IMAGENET, {'classifier': 'imagenet', 'num_classes': 1000}, 15),
        ('densenet121', CIFAR, {}, 58 * 2 + 3 + 1),
        (
            'densenet121',
            IMAGENET,
            {'stem': 'imagenet', 'num_classes': 1000},
            1 + 58 * 2 + 3 + 1,
        ),
    ],
)
def test_number_of_activations(trace, name, image, options, count):
    assert len(trace(name, image, **options).of(models.Activation)) == count


BASIC = ['conv1', 'norm1', 'act1', 'conv2', 'norm2', 'act2']
PROJECTED = [*BASIC[:-1], 'shortcut_conv', 'shortcut_norm', 'act2']
PREACT = ['norm1', 'act1', 'conv1', 'norm2', 'act2', 'conv2']


@pytest.mark.parametrize(
    ('name', 'block', 'layers'),
    [
        ('cifar_resnet20', 'stage1_block1', BASIC),
        ('cifar_resnet20', 'stage2_block1', BASIC),
        ('resnet18', 'stage1_block1', BASIC),
        ('resnet18', 'stage2_block1', PROJECTED),
        ('resnet18', 'stage2_block2', BASIC),
        (
            'resnet50',
            'stage4_block3',
            ['conv1', 'norm1', 'act1', 'conv2', 'norm2', 'act2', 'conv3', 'norm3', 'act3'],
        ),
        ('preact_resnet18', 'stage1_block1', PREACT),
        ('preact_resnet18', 'stage4_block1', [*PREACT[:2], 'shortcut_conv', *PREACT[2:]]),
        ('wide_resnet28_10', 'stage1_block1', [*PREACT[:2], 'shortcut_conv', *PREACT[2:]]),
        ('wide_resnet28_10', 'stage1_block4', PREACT),
        ('densenet121', 'stage4_block16', PREACT),
        ('densenet121', 'transition3', ['norm1', 'act1', 'conv1']),
    ],
)
def test_layer_order_in_blocks(trace, name, block, layers):
    assert trace(name).paths(block) == layers


@pytest.mark.parametrize(
    ('name', 'image', 'options', 'layers'),
    [
        ('mlp', MNIST, {}, 'normalize dense1 act1 dense2 act2 head'),
        (
            'cnn',
            MNIST,
            {'norm': 'batch'},
            'normalize conv1 norm1 act1 conv2 norm2 act2 dense3 act3 head',
        ),
        ('lenet5', MNIST, {}, 'normalize conv1 act1 conv2 act2 dense3 act3 dense4 act4 head'),
        (
            'vgg11',
            CIFAR,
            {},
            'normalize conv1_1 norm1_1 act1_1 conv2_1 norm2_1 act2_1 conv3_1 norm3_1 act3_1 '
            'conv3_2 norm3_2 act3_2 conv4_1 norm4_1 act4_1 conv4_2 norm4_2 act4_2 '
            'conv5_1 norm5_1 act5_1 conv5_2 norm5_2 act5_2 head',
        ),
        (
            'resnet18',
            CIFAR,
            {},
            'normalize conv1 norm1 act1 stage1_block1 stage1_block2 stage2_block1 stage2_block2 '
            'stage3_block1 stage3_block2 stage4_block1 stage4_block2 head',
        ),
        (
            'wide_resnet',
            CIFAR,
            {'depth': 10, 'width': 1},
            'normalize conv1 stage1_block1 stage2_block1 stage3_block1 final_norm final_act head',
        ),
    ],
)
def test_top_level_layer_order(trace, name, image, options, layers):
    paths = [path for path in trace(name, image, **options).paths() if '/' not in path]
    assert paths == layers.split()


@pytest.mark.parametrize(
    ('name', 'image', 'options', 'outputs'),
    [
        (
            'cnn',
            CIFAR,
            {'features': (8, 8), 'strides': (2, 1), 'pool': 'none'},
            {'act1': (16, 16, 8), 'act2': (16, 16, 8)},
        ),
        (
            'cifar_resnet20',
            CIFAR,
            {},
            {'stage1_block3': (32, 32, 16), 'stage3_block1/conv1': (8, 8, 64)},
        ),
        ('resnet18', CIFAR, {}, {'stage1_block2': (32, 32, 64), 'stage4_block2': (4, 4, 512)}),
        (
            'resnet50',
            IMAGENET,
            {'stem': 'imagenet', 'num_classes': 1000},
            {
                'conv1': (112, 112, 64),
                'stage1_block1': (56, 56, 256),
                # The stride sits in the 3 x 3 convolution.
                'stage2_block1/conv1': (56, 56, 128),
                'stage2_block1/conv2': (28, 28, 128),
                'stage4_block3': (7, 7, 2048),
            },
        ),
        ('preact_resnet18', CIFAR, {}, {'final_act': (4, 4, 512)}),
        ('wide_resnet28_10', CIFAR, {}, {'final_act': (8, 8, 640)}),
        (
            'densenet121',
            CIFAR,
            {},
            {'conv1': (32, 32, 64), 'stage1_block6': (32, 32, 256), 'transition1': (16, 16, 128)},
        ),
        (
            'densenet121',
            IMAGENET,
            {'stem': 'imagenet', 'num_classes': 1000},
            {'stage1_block1': (56, 56, 96), 'final_act': (7, 7, 1024)},
        ),
        (
            'vgg16',
            IMAGENET,
            {'classifier': 'imagenet', 'num_classes': 1000},
            {'act5_3': (14, 14, 512)},
        ),
    ],
)
def test_layer_shapes(trace, name, image, options, outputs):
    traced = trace(name, image, **options)
    assert {path: traced[path].output.shape[1:] for path in outputs} == outputs


def test_imagenet_classifier_reads_a_seven_by_seven_map_of_any_image(trace):
    traced = trace('vgg11', (64, 64, 3), classifier='imagenet')
    assert traced['dense6'].input.shape == (2, 7 * 7 * 512)


@pytest.mark.parametrize('name', ['cifar_resnet20', 'resnet18', 'preact_resnet18'])
def test_remat_keeps_paths_and_parameters(trace, name):
    plain, remat = trace(name), trace(name, remat=True)
    assert remat.paths() == plain.paths()
    assert remat.variables == plain.variables


def test_deep_networks_have_the_remat_option():
    without = [name for name in models.names() if 'remat' not in models.options(name)]
    assert without == ['mlp', 'cnn', 'lenet5', 'lenet5_wide', 'vgg11', 'vgg16', 'vgg19']
