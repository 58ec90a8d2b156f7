"""Pruning and rescaling: by hand, and the same as changing the weights."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from neurosens import defenses
from neurosens.defenses import pruning, rescaling
from neurosens.forward import LinenForward
from neurosens.neurons import kernels


class Net(nn.Module):
    """A convolution with normalisation, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name='conv1')(x)
        x = nn.BatchNorm(use_running_average=True, name='norm')(x)
        x = nn.Dropout(0.0, deterministic=True, name='act1')(nn.relu(x))
        return nn.Dense(3, name='head')(x.mean((1, 2)))


@pytest.fixture(scope='module')
def net():
    x = np.random.default_rng(0).random((6, 5, 5, 2), np.float32)
    variables = Net().init(jax.random.key(0), x)
    variables['params']['conv1']['bias'] = np.float32([0.1, -0.2, 0.3, 0.4])
    return LinenForward(Net()), variables, x


# ------------------------------------------------------------------------------------- rescaling


def test_factors_by_hand():
    # Mean 0.1; distances 0.3, 0.1, 0.1, 0.1; the first alone is fragile.
    found = rescaling.calibrate(
        [0.4, 0.0, 0.0, 0.0], settings=rescaling.Settings(strength=0.6, layer='act1')
    )
    np.testing.assert_allclose(found.scale, [1.6, 0.8, 0.8, 0.8], rtol=1e-6)


def test_equal_responses_and_no_strength_change_nothing(net):
    settings = rescaling.Settings(strength=1.0)
    np.testing.assert_array_equal(
        rescaling.calibrate([0.1] * 4, settings=settings).scale, np.ones(4)
    )
    none = rescaling.calibrate([1, 2, 3, 4], settings=rescaling.Settings(strength=0.0))
    forward, variables, x = net
    logits = rescaling.apply(none, forward)(variables, x)[0]
    np.testing.assert_array_equal(logits, forward(variables, x)[0])


def test_renormalized_weights_keep_their_sum_of_squares(net):
    norms = kernels.norms(net[1], 'conv1')
    kernel = np.asarray(net[1]['params']['conv1']['kernel'], np.float64)
    np.testing.assert_allclose(norms**2, (kernel**2).sum((0, 1, 2)), rtol=1e-6)
    settings = rescaling.Settings(layer='conv1', renormalize=True)
    scale = rescaling.calibrate([0.4, 0.1, 0.0, 0.2], settings=settings, norms=norms).scale
    np.testing.assert_allclose((scale**2 * norms**2).sum(), (norms**2).sum(), rtol=1e-5)
    plain = rescaling.calibrate([0.4, 0.1, 0.0, 0.2], settings=rescaling.Settings()).scale
    np.testing.assert_allclose(scale / scale[0], plain / plain[0], rtol=1e-5)
    with pytest.raises(ValueError, match='renormalize needs the norm'):
        rescaling.calibrate([0.4, 0.1], settings=settings)


def test_scaling_a_convolution_is_scaling_kernel_and_bias(net):
    forward, variables, x = net
    settings = rescaling.Settings(layer='conv1', strength=0.9)
    found = rescaling.calibrate([0.4, 0.1, 0.0, 0.2], settings=settings)
    logits = rescaling.apply(found, forward)(variables, x)[0]
    folded = rescaling.fold(found, variables)
    np.testing.assert_allclose(forward(folded, x)[0], logits, rtol=1e-5, atol=1e-6)
    assert np.abs(logits - forward(variables, x)[0]).max() > 1e-3
    # The caller's variables stay as they were.
    np.testing.assert_array_equal(
        variables['params']['conv1']['bias'], np.float32([0.1, -0.2, 0.3, 0.4])
    )
    behind = rescaling.calibrate([0.4, 0.1, 0.0, 0.2])
    with pytest.raises(ValueError, match=r"'act1'.*apply"):
        rescaling.fold(behind, variables)


def test_units_are_scaled_apart(net):
    forward, variables, x = net
    responses = np.random.default_rng(0).random(100)
    settings = rescaling.Settings(unit='unit')
    found = rescaling.calibrate(responses, settings=settings)
    _, tapped = rescaling.apply(found, forward)(variables, x, taps=('act1',))
    plain = forward(variables, x, taps=('act1',))[1]['act1']
    np.testing.assert_allclose(tapped['act1'], plain * found.scale.reshape(5, 5, 4), rtol=1e-6)


def test_a_threshold_says_which_neurons_are_fragile():
    responses = [0.0, 0.1, 0.2, 0.5]
    found = rescaling.calibrate(responses, settings=rescaling.Settings(rule=0.3, strength=1.0))
    # The mean is 0.2: shares 2/3, 1/3, 0 and 1; only the last is fragile.
    np.testing.assert_allclose(found.scale, [1 / 3, 2 / 3, 1, 2], rtol=1e-6)
    settings = defenses.make_settings('rescaling', {'rule': 0})
    assert settings == rescaling.Settings(rule=0.0)


def test_bad_settings_and_responses_are_refused():
    with pytest.raises(
        ValueError, match='rule of rescaling is None; it must be of type str or float'
    ):
        defenses.make_settings('rescaling', {'rule': None})
    for changes in (
        {'strength': 1.5}, {'strength': 'a'}, {'rule': 'max'}, {'rule': float('nan')},
        {'unit': 'filter'}, {'renormalize': 'no'}, {'layer': 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(changes))):
            rescaling.Settings(**changes)
    for responses in ([], [np.nan, 1.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match='measure them'):
            rescaling.calibrate(responses)


# --------------------------------------------------------------------------------------- pruning


def removed(scores, **settings):
    found = pruning.calibrate(scores, settings=pruning.Settings(**settings))
    return np.flatnonzero(found.removed).tolist()


def test_the_most_and_the_least_go_first():
    scores = [0.3, np.nan, 0.9, 0.1, 0.9]
    assert removed(scores, count=1) == [2]
    assert removed(scores, count=2) == [2, 4]
    assert removed(scores, count=2, order='least') == [0, 3]
    assert removed(scores, count=4) == [0, 2, 3, 4]
    assert removed(scores, count=0) == []


def test_what_flips_nothing_is_the_least_sensitive():
    scores = [-np.inf, 0.3, -np.inf, 0.1]
    assert removed(scores, count=3, order='least') == [0, 2, 3]
    assert removed(scores, count=3) == [0, 1, 3]


def test_more_random_pruning_removes_the_same_and_more():
    sets = [set(removed(range(20), count=n, order='random', seed=3)) for n in (3, 7, 20)]
    assert sets[0] < sets[1] < sets[2]
    other = set(removed(range(20), count=7, order='random', seed=4))
    assert other != sets[1]


def test_pruning_the_last_layer_zeroes_its_weights(net):
    forward, variables, x = net
    found = pruning.calibrate([1.0, 5.0, 2.0, 4.0], settings=pruning.Settings(count=2))
    logits = pruning.apply(found, forward)(variables, x)[0]
    head = variables['params']['head']
    kernel = np.asarray(head['kernel']) * np.float32([1, 0, 1, 0])[:, None]
    changed = {**variables, 'params': {**variables['params'], 'head': {**head, 'kernel': kernel}}}
    np.testing.assert_allclose(logits, forward(changed, x)[0], rtol=1e-5, atol=1e-6)


def test_pruning_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match='count is 3, but scores of shape'):
        pruning.calibrate([1.0, 2.0], settings=pruning.Settings(count=3))
    with pytest.raises(ValueError, match='None of the 2 scores is a number'):
        pruning.calibrate([np.nan, np.nan], settings=pruning.Settings(count=1))
    assert len(removed([np.nan, np.nan], count=1, order='random')) == 1
    for changes in ({'count': -1}, {'order': 'best'}, {'unit': 'filter'}, {'layer': None}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            pruning.Settings(**changes)


@pytest.mark.parametrize(
    ('unit', 'layer', 'right'), [('channel', 'act1', 4), ('unit', 'act1', 100), ('unit', 'head', 3)]
)
def test_a_value_is_needed_for_every_neuron(net, unit, layer, right):
    forward, variables, x = net
    for count in (right - 1, right + 1, right):
        pruned = pruning.calibrate(
            np.arange(count), settings=pruning.Settings(layer=layer, unit=unit)
        )
        scaled = rescaling.calibrate(
            np.arange(count), settings=rescaling.Settings(layer=layer, unit=unit)
        )
        for found in (pruning.apply(pruned, forward), rescaling.apply(scaled, forward)):
            if count == right:
                found(variables, x)
                continue
            message = rf'shape \({count},\) are given for the {unit}s .* has {right} of them'
            with pytest.raises(ValueError, match=message):
                found(variables, x)
