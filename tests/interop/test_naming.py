"""Networks of one name that compute something else are told apart, or asked about."""

import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from neurosens import config as config_lib
from neurosens import interop, models, training


def renamed_as_in_torchvision(name, **options):
    """A state dict of random weights of a ResNet, under the names of torchvision."""
    module = models.create(name, num_classes=10, **options)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(module.init, jax.random.key(0), x),
    )
    return {
        entry.replace('shortcut', 'downsample').replace('linear', 'fc'): array
        for entry, array in interop.to_torch(module, variables).items()
    }


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_a_small_first_convolution_under_names_of_torchvision_needs_a_word(name):
    state = renamed_as_in_torchvision(name)
    known = {'mean': (0.5,), 'std': (0.5,)}
    with pytest.raises(interop.WeightsError, match=r"max pool follows it; .* option stem='cifar'"):
        interop.from_torch(state, name, **known)
    # Under the prefix of a wrapper, too.
    wrapped = {f'module.{entry}': array for entry, array in state.items()}
    with pytest.raises(interop.WeightsError, match='max pool'):
        interop.from_torch(wrapped, name, **known)
    module, _ = interop.from_torch(state, name, stem='cifar', **known)
    assert module.stem == 'cifar'
    # A module says what it computes.
    interop.from_torch(state, module)


def test_other_residual_networks_need_no_word():
    state = renamed_as_in_torchvision('resnet18', stem='imagenet')
    module, _ = interop.from_torch(state, 'resnet18', mean=(0.5,), std=(0.5,))
    assert module.stem == 'imagenet' and 'layer2.0.downsample.0.weight' in state


def test_training_asks_for_the_first_convolution_too(tmp_path):
    path = tmp_path / 'weights.safetensors'
    safetensors.numpy.save_file(renamed_as_in_torchvision('resnet18'), path)
    module = models.create('resnet18', num_classes=10)
    config = config_lib.Config(dataset='cifar10', model='resnet18', initial_weights=str(path))
    with pytest.raises(interop.WeightsError, match="option stem='cifar'"):
        training.initial_weights.check(config, module, None)
    config.model_options = {'stem': 'cifar'}
    training.initial_weights.check(config, module, None)


# -------------------------------------------------------------------------------- normalisation

COLOURS = {'0.weight': np.ones((4, 3, 3, 3)), '2.weight': np.ones((3, 4))}
STACK = {'strides': 1, 'padding': 1, 'pool': 'mean'}


@pytest.mark.parametrize('image_shape', [None, (8, 8, 3)])
def test_a_warning_tells_of_colours_that_nothing_normalises(image_shape):
    given = {**STACK, 'image_shape': image_shape}
    with pytest.warns(UserWarning, match='holds no mean and std, and none are given') as caught:
        interop.from_torch(COLOURS, 'sequential', **given)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_no_warning_where_the_normalisation_is_known():
    grey = {**COLOURS, '0.weight': np.ones((4, 1, 3, 3))}
    held = {**COLOURS, 'mean': np.full(3, 0.5), 'std': np.full(3, 0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        interop.from_torch(grey, 'sequential', **STACK)
        interop.from_torch(held, 'sequential', **STACK)
        interop.from_torch(COLOURS, 'sequential', mean=(0.0,), std=(1.0,), **STACK)


@pytest.mark.parametrize('where', ['given', 'file'])
@pytest.mark.parametrize(
    ('known', 'missing', 'number'), [('mean', 'std', '1.0'), ('std', 'mean', '0.0')]
)
def test_half_a_normalisation_is_not_completed(where, known, missing, number):
    state, given = dict(COLOURS), dict(STACK)
    if where == 'given':
        given[known] = (0.25,)
    else:
        state[known] = np.full(3, 0.25)
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(state, 'sequential', **given)
    assert f'but {missing} is neither given nor in the file; give {missing} too, ({number},)' in (
        str(caught.value)
    )
    module, _ = interop.from_torch(state, 'sequential', **given, **{missing: (float(number),)})
    assert len(module.mean) == len(module.std) == (1 if where == 'given' else 3)
