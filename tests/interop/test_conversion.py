"""Converted networks compute what they computed in PyTorch, and go back bit for bit."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from neurosens import interop, models
from neurosens.interop import naming
from neurosens.models import BatchNorm, vgg

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')

import torch_networks as networks  # noqa: E402

pytestmark = pytest.mark.parity

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def prefixed(state, prefix):
    return {f'{prefix}{name}': value for name, value in state.items()}


CIFAR = {'stage_sizes': (1, 1), 'num_classes': 5}


class Family:
    """A network of a project, with our module of the same size."""

    def __init__(self, network, module, image=(8, 8, 3), wrap=lambda network: network, prefix=''):
        self.network, self.module, self.image = network, module, image
        self.wrap, self.prefix = wrap, prefix


FAMILIES = {
    'torchvision ResNet-18': Family(
        lambda: networks.ResNet(
            networks.Basic, (1, 1), 5, stem='imagenet', shortcut='downsample', head='fc'
        ),
        lambda: models.ResNet(stem='imagenet', block='basic', **CIFAR),
        image=(32, 32, 3),
    ),
    'torchvision ResNet-50': Family(
        lambda: networks.ResNet(
            networks.Bottleneck, (1, 1), 5, stem='imagenet', shortcut='downsample', head='fc'
        ),
        lambda: models.ResNet(stem='imagenet', block='bottleneck', **CIFAR),
        image=(32, 32, 3),
    ),
    'akamaster': Family(
        lambda: networks.ResNet(networks.Basic, (1, 1, 1), 5, (16, 32, 64), shortcut='pad'),
        lambda: models.CIFARResNet(num_classes=5, depth=8),
        prefix='module.',
    ),
    'robustness, CIFAR': Family(
        lambda: networks.ResNet(networks.Bottleneck, (1, 1), 5),
        lambda: models.ResNet(block='bottleneck', mean=MEAN, std=STD, **CIFAR),
        wrap=lambda network: networks.AttackerModel(network, MEAN, STD),
        prefix='module.',
    ),
    'robustness, ImageNet': Family(
        lambda: networks.ResNet(
            networks.Bottleneck, (1, 1), 5, stem='imagenet', shortcut='downsample', head='fc'
        ),
        lambda: models.ResNet(stem='imagenet', block='bottleneck', mean=MEAN, std=STD, **CIFAR),
        image=(32, 32, 3),
        wrap=lambda network: networks.AttackerModel(network, MEAN, STD),
        prefix='module.',
    ),
    'wide ResNet of TRADES': Family(
        lambda: networks.WideResNet(10, 2, 5),
        lambda: models.WideResNet(num_classes=5, depth=10, width=2),
        prefix='module.',
    ),
    'RobustBench with normalisation': Family(
        lambda: networks.WideResNet(10, 1, 5),
        lambda: models.WideResNet(num_classes=5, depth=10, width=1, mean=MEAN, std=STD),
        wrap=lambda network: networks.Normalized(network, MEAN, STD),
    ),
    'wide ResNet of DeepMind': Family(
        lambda: networks.DeepMindWideResNet(16, 2, 5),
        lambda: models.WideResNet(
            num_classes=5, depth=16, width=2, padding='same', activation='silu'
        ),
        prefix='module.',
    ),
    'pre-activation ResNet': Family(
        lambda: networks.PreActResNet((1, 1), 5), lambda: models.PreActResNet(**CIFAR)
    ),
    'VGG': Family(
        lambda: networks.VGG((1, 2), 5, norm=False),
        lambda: models.VGG(num_classes=5, stage_sizes=(1, 2), norm='none'),
    ),
    'VGG with batch normalisation': Family(
        lambda: networks.VGG((1, 2), 5),
        lambda: models.VGG(num_classes=5, stage_sizes=(1, 2)),
        prefix='_orig_mod.module.',
    ),
    'VGG of the robustness library': Family(
        lambda: networks.VGG((1, 2), 5),
        lambda: models.VGG(num_classes=5, stage_sizes=(1, 2), mean=MEAN, std=STD),
        wrap=lambda network: networks.AttackerModel(network, MEAN, STD),
        prefix='module.',
    ),
    'torchvision VGG': Family(
        lambda: networks.VGG((1,), 5, classifier='imagenet'),
        lambda: models.VGG(num_classes=5, stage_sizes=(1,), classifier='imagenet'),
        image=(14, 14, 3),
    ),
    'torchvision DenseNet': Family(
        lambda: networks.DenseNet((1, 2), 4, 5),
        lambda: models.DenseNet(
            num_classes=5, stage_sizes=(1, 2), growth_rate=4, stem='imagenet'
        ),
        image=(32, 32, 3),
    ),
    'DenseNet of the robustness library': Family(
        lambda: networks.NewestFirstDenseNet((2, 2), 4, 5),
        lambda: models.DenseNet(
            num_classes=5, stage_sizes=(2, 2), growth_rate=4, newest_first=True, mean=MEAN, std=STD
        ),
        wrap=lambda network: networks.AttackerModel(network, MEAN, STD),
        prefix='module.',
        image=(16, 16, 3),
    ),
    'LeNet-5': Family(
        networks.LeNet5, lambda: models.LeNet5(num_classes=10), image=(28, 28, 1)
    ),
    'CNN': Family(
        networks.SmallCNN,
        lambda: models.CNN(num_classes=5, features=(4, 6), hidden=(8,), pool='avg', norm='batch'),
        image=(16, 16, 3),
    ),
    'MLP': Family(
        lambda: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5)
        ),
        lambda: models.MLP(num_classes=5, hidden=(7,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_are_those_of_pytorch_and_the_way_back_is_exact(
    name, images, logits_of, assert_same
):
    family = FAMILIES[name]
    network = networks.randomize(family.wrap(family.network()))
    state = prefixed(network.state_dict(), family.prefix)
    module, variables = interop.from_torch(state, family.module())
    x = images(3, *family.image)
    assert_same(logits_of(module, x, variables), logits_of(network, x))

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))

    # Other weights of the same names become ours again, duplicates and all.
    other = prefixed(
        networks.randomize(family.wrap(family.network()), 1).state_dict(), family.prefix
    )
    back = interop.to_torch(module, variables, like=other)
    assert list(back) == list(state)
    for entry, value in state.items():
        # What the network never uses stays as it is.
        expected = other if 'sub_block1' in entry else state
        np.testing.assert_array_equal(back[entry], expected[entry].numpy(), entry)
        assert back[entry].dtype == value.numpy().dtype

    # By their usual names, and read again.
    named = interop.to_torch(module, variables, image_shape=family.image)
    _, again = interop.from_torch(named, module)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


# Whose own names are not those that PyTorch's projects usually have.
UNUSUAL = ('CNN', 'MLP')


@pytest.mark.parametrize('name', [name for name in FAMILIES if name not in UNUSUAL])
def test_usual_names_load_into_a_bare_network(name, images, logits_of, assert_same):
    family = FAMILIES[name]
    source = networks.randomize(family.wrap(family.network()))
    module, variables = interop.from_torch(source.state_dict(), family.module())
    state = interop.to_torch(module, variables, image_shape=family.image, tensors=True)
    fresh = networks.randomize(family.network(), 1)
    found = fresh.load_state_dict(state, strict=False)
    # The first block of a wide ResNet stands there twice.
    assert all('sub_block1' in entry for entry in found.missing_keys)
    assert not found.unexpected_keys
    mean, std = (np.float32(getattr(module, part)) for part in ('mean', 'std'))
    x = images(3, *family.image)
    assert_same(logits_of(fresh, (x - mean) / std), logits_of(source, x))


def test_a_file_tells_the_options_of_wide_residual_networks(images, logits_of, assert_same):
    network = networks.randomize(networks.DeepMindWideResNet(10, 1, 5))
    state = network.state_dict()
    module, variables = interop.from_torch(state, 'wide_resnet', depth=10, width=1)
    assert module.padding == 'same' and module.activation == 'silu'
    x = images(2, 8, 8, 3)
    assert_same(logits_of(module, x, variables), logits_of(network, x))
    # The other padding would go unnoticed: names and shapes are all that a file has.
    other = models.WideResNet(num_classes=5, depth=10, width=1)
    with pytest.raises(interop.WeightsError, match='does not fit WideResNet: missing'):
        interop.from_torch(state, other)
    with pytest.raises(interop.WeightsError, match='does not fit WideResNet: missing'):
        interop.from_torch(networks.WideResNet(10, 1, 5).state_dict(), module)


def test_vggs_of_imagenet_need_no_image_shape(monkeypatch, images, logits_of, assert_same):
    # Narrow, for the smallest images that are tried leave one position, and its pool spreads it.
    widths = (4, 6, 8, 10, 12)
    monkeypatch.setattr(vgg, 'STAGE_FEATURES', widths)
    network = networks.VGG((1,), 5, classifier='imagenet')
    steps, inputs = [], 3
    for features, size in zip(widths, (1, 1, 2, 2, 2)):
        for _ in range(size):
            steps += [torch.nn.Conv2d(inputs, features, 3, padding=1), torch.nn.ReLU()]
            inputs = features
        steps += [torch.nn.MaxPool2d(2)]
    network.features = torch.nn.Sequential(*steps)
    network.classifier[0] = torch.nn.Linear(49 * inputs, 4096)
    state = networks.randomize(network).state_dict()
    module, variables = interop.from_torch(state, 'vgg11', mean=(0.0,), std=(1.0,))
    x = images(2, 32, 32, 3)
    assert_same(logits_of(module, x, variables), logits_of(network, x))
    for shape in (None, (32, 32, 3)):
        back = interop.to_torch(module, variables, image_shape=shape)
        for entry, value in state.items():
            np.testing.assert_array_equal(back[entry], value.numpy(), entry)
    _, again = interop.from_torch(state, module, image_shape=(32, 32, 3))
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_options_given_win_over_those_that_a_file_implies():
    state = networks.VGG((1, 1, 2, 2, 2), 5, norm=False).state_dict()
    module, _ = interop.from_torch(state, 'vgg11')
    assert module.norm == 'none'
    with pytest.raises(interop.WeightsError, match=r'running_mean'):
        interop.from_torch(state, 'vgg11', norm='batch')


def test_dense_layers_of_old_files_have_a_dot_more(images, logits_of, assert_same):
    family = FAMILIES['torchvision DenseNet']
    network = networks.randomize(family.network())
    state = {
        re.sub(r'(denselayer\d+\.(?:norm|conv))([12])', r'\1.\2', name): value
        for name, value in network.state_dict().items()
    }
    assert any('.norm.1.' in name for name in state)
    module, variables = interop.from_torch(state, family.module())
    x = images(2, *family.image)
    assert_same(logits_of(module, x, variables), logits_of(network, x))


def test_averaged_models_are_read_like_others(images, logits_of, assert_same):
    network = networks.randomize(networks.LeNet5())
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    assert 'n_averaged' in averaged.state_dict()
    module, variables = interop.from_torch(averaged.state_dict(), 'lenet5')
    x = images(2, 28, 28, 1)
    assert_same(logits_of(module, x, variables), logits_of(network, x))


def test_usual_names_load_into_the_network_itself():
    network = networks.randomize(networks.LeNet5())
    module, variables = interop.from_torch(network.state_dict(), 'lenet5')
    assert module == models.create('lenet5', num_classes=10)
    fresh = networks.LeNet5()
    fresh.load_state_dict(interop.to_torch(module, variables, tensors=True))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


def test_variables_share_no_memory_with_the_network():
    network = networks.randomize(networks.LeNet5())
    _, variables = interop.from_torch(network.state_dict(), 'lenet5')
    before = np.array(variables['params']['head']['bias'])
    with torch.no_grad():
        network.fc3.bias.zero_()
    np.testing.assert_array_equal(variables['params']['head']['bias'], before)


# ------------------------------------------------------------------------------ large networks

LARGE = {
    'resnet18': (
        lambda: networks.ResNet(
            networks.Basic, (2, 2, 2, 2), 1000, stem='imagenet', shortcut='downsample', head='fc'
        ),
        {'stem': 'imagenet'},
        11_689_512,
    ),
    'resnet18 for CIFAR': (lambda: networks.ResNet(networks.Basic, (2, 2, 2, 2), 1000), {}, None),
    'resnet50': (
        lambda: networks.ResNet(
            networks.Bottleneck, (3, 4, 6, 3), 1000, stem='imagenet', shortcut='downsample',
            head='fc',
        ),
        {'stem': 'imagenet'},
        25_557_032,
    ),
    'vgg11': (
        lambda: networks.VGG((1, 1, 2, 2, 2), 1000, classifier='imagenet'),
        {'classifier': 'imagenet'},
        132_868_840,
    ),
    'vgg16': (
        lambda: networks.VGG((2, 2, 3, 3, 3), 1000, norm=False, classifier='imagenet'),
        {'classifier': 'imagenet', 'norm': 'none'},
        138_357_544,
    ),
    'vgg19': (
        lambda: networks.VGG((2, 2, 4, 4, 4), 1000, classifier='imagenet'),
        {'classifier': 'imagenet'},
        143_678_248,
    ),
    'vgg19 for CIFAR': (lambda: networks.VGG((2, 2, 4, 4, 4), 1000), {}, None),
    'densenet121': (
        lambda: networks.DenseNet((6, 12, 24, 16), 32, 1000),
        {'stem': 'imagenet'},
        7_978_856,
    ),
    'densenet169': (
        lambda: networks.DenseNet((6, 12, 32, 32), 32, 1000),
        {'stem': 'imagenet'},
        14_149_480,
    ),
    'densenet169 of the robustness library': (
        lambda: networks.NewestFirstDenseNet((6, 12, 32, 32), 32, 1000),
        {'newest_first': True},
        None,
    ),
    'wide_resnet28_10': (lambda: networks.WideResNet(28, 10, 1000), {}, None),
    'wide_resnet28_10 of DeepMind': (
        lambda: networks.DeepMindWideResNet(28, 10, 1000),
        {'padding': 'same', 'activation': 'silu'},
        None,
    ),
    'wide_resnet34_10': (lambda: networks.WideResNet(34, 10, 1000), {}, None),
    'preact_resnet18': (lambda: networks.PreActResNet((2, 2, 2, 2), 1000), {}, None),
    **{
        f'cifar_resnet{6 * n + 2}': (
            lambda n=n: networks.ResNet(
                networks.Basic, (n, n, n), 1000, (16, 32, 64), shortcut='pad'
            ),
            {},
            None,
        )
        for n in (3, 5, 7, 9, 18)
    },
}  # fmt: skip


@pytest.mark.parametrize('name', LARGE)
def test_names_and_shapes_of_large_networks(name):
    make, options, parameters = LARGE[name]
    with torch.device('meta'):
        state = make().state_dict()
    theirs = {
        entry: tuple(value.shape) for entry, value in state.items() if 'sub_block1' not in entry
    }
    module = models.create(name.split()[0], num_classes=1000, **options)
    assert interop.torch_shapes(module) == theirs
    # The file alone tells the options.
    arrays = {entry: np.broadcast_to(np.float32(0), shape) for entry, shape in theirs.items()}
    assert naming.implied_options(name.split()[0], arrays) == options
    if parameters:
        counted = (n for n in theirs if n.endswith(('weight', 'bias')))
        assert sum(int(np.prod(theirs[entry])) for entry in counted) == parameters


def test_a_file_tells_the_order_of_new_channels(images, logits_of, assert_same):
    network = networks.randomize(networks.NewestFirstDenseNet((6, 12, 24, 16), 2, 5))
    module, variables = interop.from_torch(network.state_dict(), 'densenet121', growth_rate=2)
    assert module.newest_first
    x = images(2, 16, 16, 3)
    assert_same(logits_of(module, x, variables), logits_of(network, x))
    with pytest.raises(interop.WeightsError, match=r'dense1\.0\.bn1\.weight'):
        interop.from_torch(network.state_dict(), 'densenet121', growth_rate=2, newest_first=False)


def test_recomputed_blocks_have_the_same_names():
    for name in ('cifar_resnet20', 'densenet121'):
        plain, remat = (models.create(name, num_classes=10, remat=remat) for remat in (False, True))
        shape = (32, 32, 3)
        assert interop.torch_shapes(remat, shape) == interop.torch_shapes(plain, shape)


# ------------------------------------------------------------------------------- other modules


LENET5 = {
    'conv1': 'conv1', 'conv2': 'conv2', 'dense3': 'fc1', 'dense4': 'fc2', 'head': 'fc3',
}  # fmt: skip


class Residual(nn.Module):
    """The network of `torch_networks.ResNet2B`, of a user."""

    @nn.compact
    def __call__(self, x):
        def conv(name, features, size=3, stride=1):
            return nn.Conv(features, (size, size), stride, padding=size // 2, name=name)

        x = nn.relu(conv('first', 8, stride=2)(x))
        y = nn.relu(conv('a1', 16, stride=2)(x))
        x = nn.relu(conv('a2', 16)(y) + conv('a_shortcut', 16, 1, 2)(x))
        x = nn.relu(x + conv('b2', 16)(nn.relu(conv('b1', 16)(x))))
        x = nn.relu(nn.Dense(100, name='dense')(x.reshape(len(x), -1)))
        return nn.Dense(10, name='head')(x)


def test_a_module_of_a_user_goes_by_the_order_of_its_layers(images, logits_of, assert_same):
    network = networks.randomize(networks.ResNet2B())
    x = images(2, 32, 32, 3)
    module, variables = interop.from_torch(network.state_dict(), Residual())
    # Order does not tell kernels of one shape; here it is that of the calls on both sides.
    assert_same(logits_of(module, x, variables), logits_of(network, x))


def test_names_say_what_order_does_not(images, logits_of, assert_same):
    network = networks.randomize(networks.ResNet2B())
    state = dict(reversed(network.state_dict().items()))
    names = {
        'first': 'conv1', 'a1': 'block1_conv1', 'a2': 'block1_conv2',
        'a_shortcut': 'block1_shortcut', 'b1': 'block2_conv1', 'b2': 'block2_conv2',
        'dense': 'dense', 'head': 'head',
    }  # fmt: skip
    module, variables = interop.from_torch(state, Residual(), names=names)
    x = images(2, 32, 32, 3)
    assert_same(logits_of(module, x, variables), logits_of(network, x))
    with pytest.raises(interop.WeightsError, match="Unknown layer in names 'dens'"):
        interop.from_torch(state, Residual(), names={'dens': 'dense'})
    with pytest.raises(interop.WeightsError, match="Unknown layer in names 'dens'"):
        interop.to_torch(module, variables, names={'dens': 'dense'})


@pytest.mark.parametrize('prefix', ['', 'module.model.'])
def test_names_may_be_those_of_the_file(prefix):
    network = networks.randomize(networks.LeNet5())
    state = dict(reversed(prefixed(network.state_dict(), 'module.model.').items()))
    module, expected = interop.from_torch(network.state_dict(), 'lenet5')
    names = {ours: f'{prefix}{theirs}' for ours, theirs in LENET5.items()}
    _, variables = interop.from_torch(state, module, names=names)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    back = interop.to_torch(module, variables, like=state, names=names)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value.numpy())
    with pytest.raises(
        interop.WeightsError,
        match=r"layer of the state dict in names 'module\.fc1'; .* are module\.model\.fc1, ",
    ):
        interop.from_torch(state, module, names={'dense3': 'module.fc1'})


def test_names_are_a_dict():
    with pytest.raises(interop.WeightsError, match=r"names is 'fc1', but it must be a dict of lay"):
        interop.from_torch(networks.LeNet5().state_dict(), 'lenet5', names='fc1')


@pytest.mark.parametrize(
    ('names', 'pair'), [({'head': ['x']}, "'head': ['x']"), ({3: 'fc3'}, "3: 'fc3'")]
)
def test_names_are_strings(names, pair):
    state = networks.LeNet5().state_dict()
    module, variables = interop.from_torch(state, 'lenet5')
    for convert in (
        lambda: interop.from_torch(state, 'lenet5', names=names),
        lambda: interop.to_torch(module, variables, names=names),
        lambda: interop.to_torch(module, variables, names=names, like=state),
    ):
        with pytest.raises(interop.WeightsError) as caught:
            convert()
        assert str(caught.value) == (
            f'names has {pair}, but both must be strings: the path of a layer of the module and '
            'the name of one of the file.'
        )


def test_what_mends_the_order_of_a_users_module_is_named():
    state = networks.randomize(networks.ResNet2B()).state_dict()
    state = dict(reversed(state.items()))
    with pytest.raises(interop.WeightsError, match=r'; give names=\{path: layer\} where the order'):
        interop.from_torch(state, Residual(), image_shape=(32, 32, 3))
    with pytest.raises(
        interop.WeightsError, match=r'; give image_shape=\(height, width, channels\), or names=\{p'
    ):
        interop.from_torch(state, Residual())


def test_images_of_an_unusual_size_need_their_shape():
    module = models.CNN(num_classes=3, features=(4,), hidden=(5,))
    image = (20, 12, 1)
    variables = module.init(jax.random.key(0), np.zeros((1, *image), np.float32))
    state = interop.to_torch(module, variables, image_shape=image)
    _, again = interop.from_torch(state, module, image_shape=image)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    with pytest.raises(
        interop.WeightsError, match=r'; give image_shape=\(height, width, channels\), or the model'
    ):
        interop.from_torch(state, module)
    with pytest.raises(
        interop.WeightsError, match=r'that they are of, and image_shape=\(height, width, channels\)'
    ):
        interop.to_torch(module, variables)


class OfOneSize(nn.Module):
    """Flattens maps of one size alone; JAX refuses others with a TypeError."""

    side: int

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape((-1, self.side**2)))


def test_images_that_a_module_cannot_reshape_are_not_those_of_the_weights(
    images, logits_of, assert_same
):
    def network(features):
        return networks.randomize(
            torch.nn.Sequential(
                torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Flatten(), torch.nn.Linear(features, 3),
            )
        )  # fmt: skip

    fits = network(28 * 28)
    module, variables = interop.from_torch(fits.state_dict(), OfOneSize(28))
    x = images(2, 28, 28, 1)
    assert_same(logits_of(module, x, variables), logits_of(fits, x))
    _, again = interop.from_torch(interop.to_torch(module, variables), module)
    jax.tree.map(np.testing.assert_array_equal, again, variables)

    # Of no usual size: 22 x 22.
    other = network(22 * 22).state_dict()
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(other, OfOneSize(22))
    sentence = str(caught.value)
    assert sentence.startswith('OfOneSize takes none of the images that were tried (TypeError: ')
    assert sentence.endswith('); give image_shape=(height, width, channels).')
    assert '\n' not in sentence
    interop.from_torch(other, OfOneSize(22), image_shape=(22, 22, 1))
    with pytest.raises(TypeError):
        interop.from_torch(other, OfOneSize(22), image_shape=(28, 28, 1))


def test_the_network_of_the_tutorial_does_not_pad(images, logits_of, assert_same):
    network = networks.randomize(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(6, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
            torch.nn.Linear(400, 120), torch.nn.ReLU(), torch.nn.Linear(120, 84), torch.nn.ReLU(),
            torch.nn.Linear(84, 10),
        )
    )  # fmt: skip
    state = network.state_dict()
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(state, 'lenet5')
    assert str(caught.value) == (
        'The state dict fits LeNet5 for images of 28 x 28 pixels, and without padding for those of '
        '32 x 32; give image_shape=(28, 28, 3) if its first convolution pads, or else the model '
        "'sequential' with strides=1, padding=0 and pool='max'."
    )
    module, _ = interop.from_torch(state, 'lenet5', image_shape=(28, 28, 3))
    assert isinstance(module, models.LeNet5)
    module, variables = interop.from_torch(state, 'sequential', strides=1, padding=0, pool='max')
    x = images(2, 32, 32, 3)
    assert_same(logits_of(module, x, variables), logits_of(network, x))


def test_a_layer_that_cannot_be_converted_is_named():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.GroupNorm(1)(nn.Conv(4, (3, 3))(x)).mean((1, 2)))

    state = {'conv.weight': np.ones((4, 3, 3, 3))}
    with pytest.raises(interop.WeightsError, match="the array 'params/GroupNorm_0/"):
        interop.from_torch(state, Grouped())


# -------------------------------------------------------------------------------- normalisation


def test_numbers_of_the_normalisation_come_from_the_file(images, logits_of, assert_same):
    network = networks.randomize(
        networks.AttackerModel(
            networks.ResNet(networks.Basic, (2, 2, 2, 2), 3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        )
    )
    module, _ = interop.from_torch(network.state_dict(), 'resnet18')
    np.testing.assert_allclose(module.mean, (0.5, 0.4, 0.3), rtol=1e-6)
    np.testing.assert_allclose(module.std, (0.2, 0.3, 0.4), rtol=1e-6)
    same, _ = interop.from_torch(network.state_dict(), 'resnet18', mean=(0.5, 0.4, 0.3))
    assert same.mean == (0.5, 0.4, 0.3) and same.std == module.std
    with pytest.raises(
        interop.WeightsError, match=r'std is \(0\.5,\), but the network in the file'
    ):
        interop.from_torch(network.state_dict(), 'resnet18', std=(0.5,))
    with pytest.raises(interop.WeightsError, match=r'mean is \(0\.0,\), but the network'):
        interop.from_torch(network.state_dict(), models.create('resnet18', num_classes=3))


def test_a_module_of_a_user_is_told_of_the_numbers_in_the_file():
    network = networks.AttackerModel(networks.ResNet2B(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with pytest.warns(UserWarning, match='normalises') as caught:
        interop.from_torch(network.state_dict(), Residual())
    (warning,) = caught
    assert str(warning.message) == (
        'The state dict normalises images by mean (0.5, 0.4, 0.3) and std (0.2, 0.3, 0.4), which '
        'is left out: Residual has to do so itself.'
    )
    assert warning.filename == __file__


@pytest.mark.parametrize('wrap', [False, True])
@pytest.mark.parametrize('name', ['mean', 'std'])
def test_one_number_in_place_of_a_tuple_is_named(name, wrap):
    network = networks.LeNet5()
    state = (networks.AttackerModel(network, (0.5,), (0.2,)) if wrap else network).state_dict()
    with pytest.raises(ValueError, match=rf'^{name} is 0\.5, but it must be a tuple of numbers'):
        interop.from_torch(state, 'lenet5', **{name: 0.5})


def test_given_numbers_are_applied_inside(images, logits_of, assert_same):
    network = networks.randomize(networks.LeNet5())
    module, variables = interop.from_torch(network.state_dict(), 'lenet5', mean=(0.1,), std=(0.3,))
    x = images(2, 28, 28, 1)
    assert_same(logits_of(module, x, variables), logits_of(network, (x - 0.1) / np.float32(0.3)))


def test_the_normalisations_of_every_family_have_the_epsilon_of_pytorch():
    found = []

    def visit(call, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            found.append((context.module.epsilon, 1 - context.module.momentum))
        return call(*args, **kwargs)

    # The first network of each class.
    families = {type(models.create(name, num_classes=10)): name for name in models.names()[::-1]}
    assert len(families) == 9
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    reference = torch.nn.BatchNorm2d(1)
    for kind, name in families.items():
        found.clear()
        options = {models.CNN: {'norm': 'batch'}, models.WideResNet: {'depth': 10}}.get(kind, {})
        module = models.create(name, num_classes=10, **options)
        with nn.intercept_methods(visit):
            jax.eval_shape(module.init, jax.random.key(0), x)
        assert bool(found) == (kind not in (models.MLP, models.LeNet5))
        for epsilon, momentum in found:
            assert epsilon == reference.eps and momentum == pytest.approx(reference.momentum)


# --------------------------------------------------------------------------------- what is wrong


def test_everything_that_does_not_fit_is_named_at_once():
    state = dict(networks.randomize(networks.LeNet5()).state_dict())
    del state['fc2.bias']
    state['conv2.weight'] = torch.full_like(state['conv2.weight'], torch.inf)
    state['conv1.bias'] = torch.zeros(6, dtype=torch.int8)
    state['fc3.weight'] = torch.zeros(10, 80)
    state['fc1.scale'] = torch.zeros(3)
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(prefixed(state, 'module.'), 'lenet5')
    assert str(caught.value) == (
        "The state dict does not fit LeNet5: missing 'fc2.bias'; unexpected 'module.fc1.scale'; "
        "'module.fc3.weight' has shape (10, 80) in place of (10, 84); not of floating-point type "
        "'module.conv1.bias' (int8); not finite 'module.conv2.weight'; give the model and the "
        'options that it was trained with, or names={path: layer} where the order of the layers '
        'differs.'
    )


def test_numbers_too_large_for_float32_are_not_finite():
    state = networks.randomize(networks.LeNet5()).double().state_dict()
    state['fc1.bias'][0] = 1e300
    with pytest.raises(interop.WeightsError, match=r"not finite 'fc1\.bias'"):
        interop.from_torch(state, 'lenet5')


MISTAKES = [
    ({'model': 'lenet'}, "^Unknown model 'lenet'; the closest names are lenet5"),
    ({'model': 'lenet5', 'pol': 'max'}, "^Unknown lenet5 option 'pol'"),
    ({'model': 'lenet5', 'num_classes': 9}, r"'fc3.weight' has shape \(10, 84\) in place of \(9, "),
    ({'model': 'lenet5', 'image_shape': (32, 32, 1)}, r'\(120, 400\) in place of \(120, 576\)'),
    ({'model': 'lenet5', 'image_shape': (28, 28, 3)}, r'\(6, 1, 5, 5\) in place of \(6, 3'),
    ({'model': models.LeNet5(10), 'num_classes': 9}, 'the model is a module; give it to LeNet5'),
    ({'model': 'vgg11'}, "missing 'features.0.weight', 'features.0.bias', 'features.1.weight'"),
]  # fmt: skip


@pytest.mark.parametrize(('arguments', 'sentence'), MISTAKES)
def test_a_mistake_is_one_sentence(arguments, sentence):
    state = networks.randomize(networks.LeNet5()).state_dict()
    with pytest.raises(ValueError, match=sentence) as caught:
        interop.from_torch(state, **arguments)
    assert '\n' not in str(caught.value) and str(caught.value).endswith('.')


def test_duplicates_that_differ_are_refused():
    network = networks.AttackerModel(networks.LeNet5(), (0.5,), (0.2,))
    state = dict(network.state_dict())
    state['attacker.model.fc3.bias'] = state['attacker.model.fc3.bias'] + 1
    with pytest.raises(interop.WeightsError, match='stand for one array but differ'):
        interop.from_torch(state, 'lenet5')


def test_variables_of_another_module_are_refused():
    module, variables = interop.from_torch(networks.LeNet5().state_dict(), 'lenet5')
    del variables['params']['dense4']['bias']
    with pytest.raises(interop.WeightsError, match="'params/dense4/bias' differ in name or shape"):
        interop.to_torch(module, variables)
