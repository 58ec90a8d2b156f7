"""What needs no PyTorch to check: layouts against NumPy, names as written, files."""

import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy

from neurosens import interop, models
from neurosens.forward import LinenForward

NAMES = {
    'cifar_resnet20': ({}, ['conv1', 'bn1', 'layer1.0.conv1', 'layer3.2.bn2', 'linear']),
    'resnet18': ({}, ['layer2.0.shortcut.0', 'layer2.0.shortcut.1', 'linear']),
    'resnet50': (
        {'stem': 'imagenet'}, ['layer2.0.downsample.0', 'layer2.0.downsample.1', 'fc']
    ),
    'preact_resnet18': ({}, ['layer2.0.shortcut.0', 'layer4.1.bn2', 'bn', 'linear']),
    'wide_resnet': (
        {'depth': 10, 'width': 2},
        ['block1.layer.0.convShortcut', 'block3.layer.0.bn1', 'bn1', 'fc'],
    ),
    'vgg11': ({'norm': 'none'}, ['features.0', 'features.3', 'features.18', 'classifier']),
    'densenet121': (
        {'stem': 'imagenet', 'growth_rate': 4},
        ['features.norm0', 'features.denseblock4.denselayer16.conv2', 'features.transition3.norm',
         'features.norm5', 'classifier'],
    ),
    'lenet5': ({}, ['conv1', 'conv2', 'fc1', 'fc2', 'fc3']),
    'cnn': ({'norm': 'batch'}, ['conv1', 'norm2', 'dense3', 'head']),
    'mlp': ({}, ['dense1', 'dense2', 'head']),
}  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_variables_come_back_bit_for_bit_under_the_usual_names(name, tmp_path):
    options, layers = NAMES[name]
    module = models.create(name, num_classes=10, **options)
    x = jax.ShapeDtypeStruct((1, 28, 28, 1) if name == 'lenet5' else (1, 32, 32, 3), np.float32)
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(module.init, jax.random.key(0), x),
    )
    state = interop.to_torch(module, variables)
    assert {f'{layer}.weight' for layer in layers} <= state.keys()
    shapes = interop.torch_shapes(module, x.shape[1:])
    assert {entry: array.shape for entry, array in state.items()} == shapes
    # Through a file, under the prefix of a wrapper.
    path = tmp_path / 'weights.safetensors'
    safetensors.numpy.save_file({f'module.{entry}': a for entry, a in state.items()}, path)
    loaded, again = interop.load_torch(path, name, **options)
    assert loaded == module
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_files_of_deepmind_tell_padding_and_activation():
    size = {'depth': 10, 'width': 1}
    options = {'padding': 'same', 'activation': 'silu'}
    module = models.create('wide_resnet', num_classes=5, **size, **options)
    shapes = interop.torch_shapes(module)
    state = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    assert interop.from_torch(state, 'wide_resnet', **size)[0] == module
    given, _ = interop.from_torch(state, 'wide_resnet', activation='relu', **size)
    assert given.activation == 'relu' and given.padding == 'same'


def test_inputs_behind_a_flatten_change_their_order(images):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(5, 3 * 4 * 6))
    state = {
        '0.weight': np.eye(3)[:, :, None, None],
        '2.weight': weight,
    }
    module, variables = interop.from_torch(
        state, 'sequential', strides=1, padding=0, pool='none', image_shape=(4, 6, 3)
    )
    x = images(2, 4, 6, 3)
    flattened = x.transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(module.apply(variables, x), flattened @ weight.T, rtol=1e-4)


class NormalizedFeatures(nn.Module):
    """A normalisation and a linear layer behind a flatten."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name='norm')(x.reshape(len(x), -1))
        return nn.Dense(1, name='head')(x)


def test_all_of_a_normalisation_behind_a_flatten_changes_its_order():
    features = np.arange(12, dtype=np.float32)
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    state = {f'norm.{leaf}': features + k for k, leaf in enumerate(leaves)}
    state |= {'head.weight': features[None], 'head.bias': np.ones(1, np.float32)}
    module, variables = interop.from_torch(state, NormalizedFeatures(), image_shape=(2, 2, 3))
    # Of three channels the first four features are of one; here neighbours are of one position.
    order = np.array([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    norm, statistics = variables['params']['norm'], variables['batch_stats']['norm']
    np.testing.assert_array_equal(norm['scale'], order)
    np.testing.assert_array_equal(norm['bias'], order + 1)
    np.testing.assert_array_equal(statistics['mean'], order + 2)
    np.testing.assert_array_equal(statistics['var'], order + 3)
    np.testing.assert_array_equal(variables['params']['head']['kernel'][:, 0], order)
    back = interop.to_torch(module, variables, image_shape=(2, 2, 3))
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, name)


def test_convolutions_are_those_of_numpy(images):
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(2, 3, 3, 2))
    state = {'0.weight': kernel, '1.weight': np.eye(12)}
    module, variables = interop.from_torch(
        state, 'sequential', strides=(2,), padding=(1,), pool='none', activation='identity',
        image_shape=(4, 4, 3),
    )  # fmt: skip
    x = images(1, 4, 4, 3)
    padded = np.pad(x[0].transpose(2, 0, 1), ((0, 0), (1, 1), (1, 1)))
    # A kernel of 3 x 2 leaves 2 x 3 positions, of 6 x 6 padded ones.
    expected = np.array(
        [
            [
                [(padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2] * one).sum() for j in range(3)]
                for i in range(2)
            ]
            for one in kernel
        ]
    )
    np.testing.assert_allclose(module.apply(variables, x)[0], expected.ravel(), rtol=1e-4)


def test_a_file_of_pytorch_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    path = tmp_path / 'weights.pt'
    path.write_bytes(b'')
    with pytest.raises(interop.WeightsError) as caught:
        interop.load_torch(path, 'lenet5')
    assert str(caught.value) == (
        f"Reading '{path}' needs PyTorch, which is not installed: pip install torch, or convert "
        'the file to .safetensors where it is.'
    )


def test_what_is_missing_is_named():
    state = {'fc1.weight': np.full((2, 4), np.nan), 'fc1.bias': np.zeros(3)}
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(state, 'mlp', hidden=(2,))
    assert str(caught.value) == (
        "The state dict does not fit MLP: missing 'head.weight', 'head.bias'; 'fc1.bias' has shape "
        "(3,) in place of (2,); not finite 'fc1.weight'; give the model and the options that it "
        'was trained with, or names={path: layer} where the order of the layers differs.'
    )


def test_names_are_no_remedy_where_layers_do_not_go_by_their_order():
    state = {'conv1.weight': np.ones((16, 3, 3, 3)), 'linear.weight': np.ones((10, 64))}
    with pytest.raises(interop.WeightsError, match=r'options that it was trained with\.$'):
        interop.from_torch(state, 'cifar_resnet20', image_shape=(32, 32, 3))


def test_the_head_may_stand_anywhere():
    state = {'out.weight': (3, 4), 'hidden.weight': (4, 12)}
    state |= {'out.bias': (3,), 'hidden.bias': (4,)}
    state = {f'net.{name}': np.ones(shape, np.float32) for name, shape in state.items()}
    names = {'dense1': 'hidden', 'head': 'net.out'}
    module, variables = interop.from_torch(
        state, 'mlp', hidden=(4,), names=names, image_shape=(2, 2, 3)
    )
    assert module.num_classes == 3
    assert variables['params']['head']['kernel'].shape == (4, 3)


class Switched(nn.Module):
    """A linear layer whose call has arguments of its own."""

    @nn.compact
    def __call__(self, x, train, *, scale, shift=0.0):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(2, name='head')(scale * x + shift)


CALLS = [
    ({}, 'Switched takes train and scale besides images; give '
     "call={'train': ..., 'scale': ...}."),
    ({'train': False}, "Switched takes scale besides images; give call={'scale': ...}."),
    ({'train': False, 'scales': 1.0}, "Unknown argument of Switched in call 'scales'; valid names "
     'are train, scale, shift.'),
    ('train', "call is 'train', but it must be a dict of arguments of the call by name."),
]  # fmt: skip


def test_a_call_may_take_arguments_besides_images(tmp_path):
    state = {'head.weight': np.ones((2, 48), np.float32), 'head.bias': np.ones(2, np.float32)}
    path = tmp_path / 'weights.safetensors'
    safetensors.numpy.save_file(state, path)
    module, call = Switched(), {'train': False, 'scale': 2.0}
    _, variables = interop.from_torch(state, module, call=call)
    jax.tree.map(
        np.testing.assert_array_equal, variables, interop.load_torch(path, module, call=call)[1]
    )
    x = np.full((1, 4, 4, 3), 0.5, np.float32)
    logits, _ = LinenForward(module, call)(variables, x)
    np.testing.assert_allclose(logits, [[49, 49]])
    back = interop.to_torch(module, variables, call=call)
    np.testing.assert_array_equal(back['head.weight'], state['head.weight'])
    shapes = interop.torch_shapes(module, (4, 4, 3), call=call)
    assert shapes == {'head.weight': (2, 48), 'head.bias': (2,)}
    for given, sentence in CALLS:
        for convert in (
            lambda call: interop.from_torch(state, module, call=call),
            lambda call: interop.to_torch(module, variables, call=call),
            lambda call: interop.torch_shapes(module, call=call),
        ):
            with pytest.raises(interop.WeightsError) as caught:
                convert(given)
            assert str(caught.value) == sentence


def save(state, path):
    """A file of safetensors, which keeps no order."""
    generator = np.random.default_rng(0)
    arrays = {name: generator.random(shape, np.float32) for name, shape in state.items()}
    safetensors.numpy.save_file(arrays, path)
    return arrays


def stack(*names, width=64, norm=None):
    """Shapes of linear layers of one width, in this order, and of a normalisation."""
    shapes = {f'{name}.weight': (width, width) for name in names}
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    return shapes | {f'{norm}.{leaf}': (width,) for leaf in leaves if norm}


@pytest.mark.parametrize('model', ['mlp', 'sequential'])
def test_layers_that_could_be_exchanged_need_an_order(tmp_path, model):
    path = tmp_path / 'weights.safetensors'
    state = stack('input', 'hidden', 'output')
    arrays = save(state | {f'{name}.bias': (64,) for name in ('input', 'hidden', 'output')}, path)
    options = {'hidden': (64, 64)} if model == 'mlp' else {}
    with pytest.raises(
        interop.WeightsError, match="not tell which of 'hidden' and 'input' comes first: both have"
    ):
        interop.load_torch(path, model, **options)
    module, variables = interop.from_torch(arrays, model, **options)
    names = {'dense1': 'input', 'dense2': 'hidden', 'head': 'output'}
    # All but one are enough.
    for left in (None, *names):
        known = {ours: theirs for ours, theirs in names.items() if ours != left}
        _, named = interop.load_torch(path, module, names=known)
        jax.tree.map(np.testing.assert_array_equal, named, variables)
    with pytest.raises(interop.WeightsError, match="which of 'hidden' and 'input' comes first"):
        interop.load_torch(path, module, names={'head': 'output'})
    # Numbers tell it, up to 10 and beyond.
    numbered = [f'layer{2 * k}' for k in range(7)]
    arrays = save(stack(*numbered), path)
    _, variables = interop.load_torch(path, 'sequential')
    jax.tree.map(
        np.testing.assert_array_equal, variables, interop.from_torch(arrays, 'sequential')[1]
    )


def test_a_normalisation_may_not_be_put_behind_another_layer(tmp_path):
    path = tmp_path / 'weights.safetensors'
    save(stack('fc1', 'fc2', 'fc3', norm='norm1'), path)
    with pytest.raises(interop.WeightsError, match="not tell which layer 'norm1' follows"):
        interop.load_torch(path, 'sequential')
    save(stack('1', '4', '6', norm='2'), path)
    module, _ = interop.load_torch(path, 'sequential')
    assert [layer.norm for layer in module.hidden] == [True, False]


PLACES = [
    ('2', {}, "'2' is 2 behind '0' by its number, but before the activation it would be 1; give "
     "norm='after' if all stand so, or a module."),
    ('1', {'norm': 'after'}, "'1' is 1 behind '0' by its number, but after the activation it would "
     "be 2; give norm='before' if all stand so, or a module."),
    ('3', {}, "'3' is 3 behind '0' by its number, but before the activation it would be 1; give a "
     'module.'),
]  # fmt: skip


@pytest.mark.parametrize(('norm', 'options', 'sentence'), PLACES)
def test_numbers_tell_what_stands_before_a_normalisation(norm, options, sentence):
    shapes = {**stack('0', width=12, norm=norm), '5.weight': (3, 12)}
    state = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(state, 'sequential', **options)
    assert str(caught.value) == f'The normalisation {sentence}'
    with pytest.raises(ValueError, match="norm is 'batch', but it must be one of before, after"):
        interop.from_torch(state, 'sequential', norm='batch')


def test_a_normalisation_may_stand_behind_the_activation(images):
    generator = np.random.default_rng(0)
    shapes = {**stack('0', width=12, norm='2'), '3.weight': (3, 12)}
    state = {name: generator.uniform(0.5, 1, shape) for name, shape in shapes.items()}
    state['0.weight'] -= 0.75
    module, variables = interop.from_torch(state, 'sequential', norm='after')
    x = images(3, 2, 2, 3)
    f = np.maximum(x.transpose(0, 3, 1, 2).reshape(3, -1) @ state['0.weight'].T, 0)
    f = (f - state['2.running_mean']) / np.sqrt(state['2.running_var'] + 1e-5)
    logits = (f * state['2.weight'] + state['2.bias']) @ state['3.weight'].T
    np.testing.assert_allclose(module.apply(variables, x), logits, rtol=1e-4, atol=1e-4)


class OneDimension(nn.Module):
    """A convolution along columns, and a linear layer behind a flatten."""

    @nn.compact
    def __call__(self, x):
        columns = x[..., 0].swapaxes(1, 2)
        x = nn.Conv(3, (3,), padding='VALID', name='conv')(columns)
        return nn.Dense(2, name='head')(x.reshape(len(x), -1))


def test_convolutions_along_one_dimension(images):
    generator = np.random.default_rng(0)
    shapes = {'conv.weight': (3, 3, 3), 'conv.bias': (3,), 'head.weight': (2, 12), 'head.bias': 2}
    state = {
        name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    module, variables = interop.from_torch(state, OneDimension(), image_shape=(3, 6, 1))
    x = images(2, 3, 6, 1)
    rows, kernel = x[..., 0], state['conv.weight']
    windows = np.stack([rows[:, :, k : k + 4] for k in range(3)], axis=-1)
    features = np.einsum('ncpk,ock->nop', windows, kernel) + state['conv.bias'][:, None]
    logits = features.reshape(2, -1) @ state['head.weight'].T + state['head.bias']
    np.testing.assert_allclose(module.apply(variables, x), logits, rtol=1e-4, atol=1e-5)
    back = interop.to_torch(module, variables, image_shape=(3, 6, 1))
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def test_normalisations_that_could_be_exchanged_need_an_order(tmp_path):
    path = tmp_path / 'weights.safetensors'
    statistics = {
        f'{name}.running_{leaf}': (4,) for name in ('late', 'early') for leaf in ('mean', 'var')
    }
    save({'a.weight': (4, 1, 1, 1), 'b.weight': (2, 4), **statistics}, path)

    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (1, 1), use_bias=False, name='conv')(x)
            for _ in range(2):
                x = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)(x)
            return nn.Dense(2, use_bias=False, name='head')(x.mean((1, 2)))

    with pytest.raises(interop.WeightsError, match="not tell which of 'early' and 'late' comes"):
        interop.load_torch(path, Normalized())
    names = {'BatchNorm_0': 'early', 'BatchNorm_1': 'late'}
    _, variables = interop.load_torch(path, Normalized(), names=names)
    np.testing.assert_array_equal(
        variables['batch_stats']['BatchNorm_0']['mean'],
        interop.read_state_dict(path)['early.running_mean'],
    )


def test_mean_and_std_may_be_arrays():
    state = stack('0', '2', width=12)
    state = {name: np.ones(shape, np.float32) for name, shape in state.items()}
    module, _ = interop.from_torch(
        state, 'sequential', mean=np.array([0.0, 0.5, 0.25]), std=np.ones(1)
    )
    assert module.mean == (0.0, 0.5, 0.25) and module.std == (1.0, 1.0, 1.0)
