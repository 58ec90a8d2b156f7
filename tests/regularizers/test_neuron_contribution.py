"""T1 and T2 against loops over pairs, images and neurons; Delta against finite changes."""

import functools
import itertools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models, neurons
from neurosens.forward import LinenForward
from neurosens.regularizers import (
    activation_norm,
    contribution,
    direct_sensitivity,
    input_gradient,
    neuron_contribution,
    weight_difference,
)
from neurosens.regularizers.neuron_contribution import _smooth_maximum

KEY = jax.random.key(0)


def top_mean(values, top):
    return np.sort(values)[::-1][:top].mean()


def t1_by_loops(weights, top):
    pairs = itertools.product(range(len(weights)), repeat=2)
    return max(top_mean(np.abs(weights[a] - weights[b]), top) for a, b in pairs)


def t2_by_loops(weights, features, labels, top):
    total = 0.0
    for h, y in zip(features, labels):
        for c in range(len(weights)):
            parts = [abs(h[i] * (weights[y, i] - weights[c, i])) / h.sum() for i in range(len(h))]
            total += top_mean(np.array(parts), top)
    return total / (len(features) * len(weights))


@pytest.mark.parametrize('top', [1, 3, 50])
@pytest.mark.parametrize('classes', [2, 19])
def test_both_terms_are_those_of_plain_loops(top, classes):
    random = np.random.default_rng(classes)
    weights = random.standard_normal((classes, 12)).astype(np.float32)
    features = np.maximum(random.standard_normal((5, 12)), 0).astype(np.float32)
    labels = random.integers(0, classes, 5)
    wide = np.float64(weights)
    assert weight_difference(weights, top) == pytest.approx(t1_by_loops(wide, top), rel=1e-5)
    parts = jax.vmap(contribution, (None, 0, 0, None))(weights, features, labels, top)
    expected = t2_by_loops(wide, np.float64(features), labels, top)
    assert parts.mean() == pytest.approx(expected, rel=1e-5)


def test_pairs_of_classes_that_do_not_count_leave_nothing_for_the_gradient():
    classes, neurons = 256, 64
    slope = jax.jit(jax.grad(functools.partial(weight_difference, top=4)))
    shape = jax.ShapeDtypeStruct((classes, neurons), jnp.float32)
    memory = slope.lower(shape).compile().memory_analysis().temp_size_in_bytes
    assert memory < classes**2 * neurons * 4 / 2
    weights = jax.random.normal(KEY, shape.shape)
    found = np.asarray(slope(weights))
    # Two classes, and of each the four neurons that differ most.
    assert sorted((found != 0).sum(1))[-3:] == [0, 4, 4]
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-6)


def test_weights_that_are_alike_in_all_classes_do_not_differ():
    weights = np.tile(np.array([[1.5, -2, 0.25]], np.float32), (4, 1))
    assert weight_difference(weights, 2) == 0


def test_a_single_active_feature_by_hand():
    weights = np.array([[1, 9], [-2, 0], [4, -7], [1, 3]], np.float32)
    # Of feature 0 alone, |W[0] - W[c]| is 0, 3, 3 and 0; the mean over k = 2 halves it.
    features = np.array([3, 0], np.float32)
    assert contribution(weights, features, 0, 2) == (0 + 3 + 3 + 0) / 4 / 2
    assert contribution(weights, features, 2, 2) == (3 + 6 + 0 + 3) / 4 / 2


def test_features_that_add_up_to_nothing_contribute_nothing():
    weights = jnp.arange(6.0).reshape(2, 3)
    value, gradient = jax.value_and_grad(contribution, argnums=1)(weights, jnp.zeros(3), 0, 2)
    assert value == 0 and not jnp.isnan(gradient).any()


def test_the_regularizer_reads_the_weights_of_any_model(relu):
    weights = relu.matrix('head')
    features = np.float64(relu.forward(relu.variables, relu.x, taps=('act1',))[1]['act1'])
    regularizer = neuron_contribution(weight_difference_weight=2.0, contribution_weight=3.0, top=2)
    penalty, metrics = jax.jit(regularizer, static_argnums=0)(
        relu.forward, relu.variables, relu.x, relu.y, KEY
    )
    assert metrics['weight_difference'] == pytest.approx(t1_by_loops(weights, 2), rel=1e-5)
    expected = t2_by_loops(weights, features, relu.y, 2)
    assert metrics['contribution'] == pytest.approx(expected, rel=1e-4)
    assert penalty == pytest.approx(2 * t1_by_loops(weights, 2) + 3 * expected, rel=1e-4)

    def term(kernel):
        params = dict(relu.variables['params'])
        params['head'] = {**params['head'], 'kernel': kernel}
        return regularizer(relu.forward, {'params': params}, relu.x, relu.y, KEY)[0]

    # Its gradient, against differences of the loops.
    kernel = jnp.asarray(relu.variables['params']['head']['kernel'])
    gradient = jax.grad(term)(kernel)
    change = np.zeros_like(weights)
    change[1, 2] = 1e-5
    differences = [
        2 * t1_by_loops(moved, 2) + 3 * t2_by_loops(moved, features, relu.y, 2)
        for moved in (weights + change, weights - change)
    ]
    assert gradient[2, 1] == pytest.approx((differences[0] - differences[1]) / 2e-5, abs=1e-3)


def test_a_layer_that_logits_are_not_affine_in_is_refused(relu):
    with pytest.raises(ValueError, match='no closed form'):
        neuron_contribution(layer='dense1')(relu.forward, relu.variables, relu.x, relu.y, KEY)


@pytest.mark.parametrize(
    ('model', 'options', 'signed'),
    [
        ('cnn', {'features': (2,), 'hidden': (4,)}, False),
        ('vgg11', {}, False),
        ('cifar_resnet20', {}, False),
        ('cnn', {'features': (2,), 'hidden': (4,), 'activation': 'gelu'}, True),
        ('mlp', {'hidden': (4,), 'activation': 'tanh'}, True),
    ],
)
def test_of_features_that_may_be_negative_a_warning_says_so(model, options, signed):
    module = models.create(model, num_classes=3, **options)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    variables = jax.eval_shape(module.init, KEY, x)
    forward = LinenForward(module, {'train': False})

    def warned(**weights):
        regularizer = neuron_contribution(top=2, **weights)
        labels = jax.ShapeDtypeStruct((2,), np.int32)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            jax.eval_shape(functools.partial(regularizer, forward), variables, x, labels, KEY)
        return [str(one.message) for one in found]

    # When the program is made, and not for T1 alone.
    assert [("'head:in' may be negative" in text) for text in warned()] == [True] * signed
    assert warned(contribution_weight=0.0) == []


def direct_by_loops(relu, top, order, floor):
    delta_scale = np.float64(relu.forward(relu.variables, relu.x, taps=('act1',))[1]['act1'])
    size = np.sqrt((delta_scale**2).mean(0))
    weights = relu.matrix('head')
    logits = np.float64(relu.forward(relu.variables, relu.x)[0])
    total = 0.0
    for z, y in zip(logits, relu.y):
        p = z.argmax()
        if p != y:
            continue
        nearest = []
        for i in range(weights.shape[1]):
            closeness = [
                size[i] * abs(weights[c, i] - weights[p, i]) / (z[p] - z[c] + floor)
                for c in range(len(z))
                if c != p
            ]
            nearest.append((np.array(closeness) ** order).sum() ** (1 / order))
        total += top_mean(np.array(nearest), top)
    return total / len(logits)


@pytest.mark.parametrize('labels', ['given', 'predicted'])
def test_direct_sensitivity_is_that_of_plain_loops(relu, labels):
    if labels == 'predicted':
        logits = relu.forward(relu.variables, relu.x)[0]
        relu = type(relu)(relu.forward, relu.variables, relu.x, np.asarray(logits.argmax(-1)))
    regularizer = direct_sensitivity(top=2, order=5.0, floor=0.1)
    penalty, metrics = regularizer(relu.forward, relu.variables, relu.x, relu.y, KEY)
    assert penalty == pytest.approx(direct_by_loops(relu, 2, 5.0, 0.1), rel=1e-4)
    assert np.isfinite(metrics['mean_distance'])


class Conv(nn.Module):
    """z = W h + b of a convolution h, whose entries are mostly above 0."""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(3, (2, 2), padding='VALID', name='conv')(x)
        return nn.Dense(4, name='head')(h.reshape(len(h), -1))


def direct_of_convolution_by_loops(h, weights, logits, unit, valid_only):
    """With the two largest of each image, order 5 and floor 0.1; every image counts."""
    if unit == 'channel':
        slopes, lowest = weights.reshape(4, -1, 3).sum(1), h.min((1, 2))
        size = [np.sqrt((h[..., channel] ** 2).mean()) for channel in range(3)]
    else:
        slopes, lowest = weights, h.reshape(len(h), -1)
        size = np.sqrt((lowest**2).mean(0))
    total = 0.0
    for z, low in zip(logits, lowest):
        p, nearest = z.argmax(), []
        for i in range(slopes.shape[1]):
            closeness = []
            for c in range(4):
                gain, margin = slopes[c, i] - slopes[p, i], z[p] - z[c]
                falls_too_low = gain < 0 and low[i] + margin / gain < 0
                if c != p and not (valid_only and falls_too_low):
                    closeness.append(size[i] * abs(gain) / (margin + 0.1))
            nearest.append((np.array(closeness) ** 5).sum() ** (1 / 5))
        total += top_mean(np.array(nearest), 2)
    return total / len(logits)


@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_direct_sensitivity_of_a_convolution_is_that_of_plain_loops(unit):
    x = np.random.default_rng(0).random((5, 4, 4, 1)).astype(np.float32)
    variables = Conv().init(KEY, x)
    params = dict(variables['params'])
    params['conv'] = {**params['conv'], 'bias': jnp.array([1.0, 2.0, 0.5])}
    variables, forward = {'params': params}, LinenForward(Conv())
    logits, tapped = forward(variables, x, taps=('conv',))
    labels = logits.argmax(-1)
    weights = np.float64(params['head']['kernel']).T
    expected = [
        direct_of_convolution_by_loops(
            np.float64(tapped['conv']), weights, np.float64(logits), unit, valid_only
        )
        for valid_only in (False, True)
    ]
    assert expected[1] < 0.99 * expected[0], 'else falls would not matter'
    for valid_only, value in zip((False, True), expected):
        regularizer = direct_sensitivity(
            layer='conv', unit=unit, top=2, order=5.0, valid_only=valid_only
        )
        found, _ = regularizer(forward, variables, x, labels, KEY)
        assert found == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize('order', [1.5, 8.0])
def test_with_all_classes_alike_the_norm_overshoots_as_documented(order):
    """Nine classes equally near, after which the norm is 9^(1 / p) times the largest."""
    values = jnp.full((10, 2), 0.25).at[3].set(0.0)
    found = _smooth_maximum(values, order)
    np.testing.assert_allclose(found, 0.25 * 9 ** (1 / order), rtol=1e-6)


def test_without_smoothing_it_is_one_over_delta(straight):
    logits = straight.forward(straight.variables, straight.x)[0]
    labels = logits.argmax(-1)
    delta = neurons.sensitivity(
        straight.forward, straight.variables, straight.x, layer='act1', method='first_order'
    ).delta
    expected = np.where(np.isfinite(delta), 1 / np.abs(np.float64(delta)), 0)
    regularizer = direct_sensitivity(layer='act1', top=5, order=400.0, floor=1e-6, scale='none')
    penalty, _ = regularizer(straight.forward, straight.variables, straight.x, labels, KEY)
    assert penalty == pytest.approx(expected.mean(), rel=1e-2)


@pytest.mark.parametrize('valid_only', [False, True])
def test_falls_below_zero_count_unless_they_are_left_out(relu, valid_only):
    labels = np.asarray(relu.forward(relu.variables, relu.x)[0].argmax(-1))
    ranges = {True: (0.0, np.inf), False: (-np.inf, np.inf)}
    delta = [
        np.abs(
            neurons.sensitivity(
                relu.forward,
                relu.variables,
                relu.x,
                layer='act1',
                method='first_order',
                activation_range=ranges[valid],
            ).delta
        )
        for valid in (valid_only, not valid_only)
    ]
    assert (delta[0] != delta[1]).any()
    regularizer = direct_sensitivity(
        layer='act1', top=1000, order=400.0, floor=1e-6, scale='none', valid_only=valid_only
    )
    penalty, metrics = regularizer(relu.forward, relu.variables, relu.x, labels, KEY)
    assert penalty == pytest.approx((1 / np.float64(delta[0])).mean(), rel=1e-2)
    distance = np.where(np.isfinite(delta[0]), delta[0], np.nan)
    distance = distance[~np.isnan(distance).all(1)]
    expected = np.nanmean(distance, axis=1).mean()
    assert metrics['mean_distance'] == pytest.approx(expected, rel=5e-2)


@pytest.mark.parametrize('right', [0, 2, 6])
def test_the_mean_distance_is_that_of_images_that_are_right(relu, right):
    """Where there are none it is 0, which `counted` tells from a distance."""
    labels = np.array(relu.forward(relu.variables, relu.x)[0].argmax(-1))
    labels[right:] = (labels[right:] + 1) % 3
    regularizer = direct_sensitivity(top=2, scale='none')

    def metrics(count):
        rows = relu.x[:count], labels[:count]
        return regularizer(relu.forward, relu.variables, *rows, KEY)[1]

    found = metrics(6)
    assert found['counted'] == pytest.approx(right / 6)
    if right:
        alone = metrics(right)
        assert alone['counted'] == 1
        assert found['mean_distance'] == pytest.approx(float(alone['mean_distance']), rel=1e-5)
    else:
        assert found['mean_distance'] == 0


@pytest.mark.parametrize('scale', ['rms', 'none'])
def test_dead_neurons_are_at_no_distance_and_have_no_gradient(relu, scale):
    """Of two classes, where nothing but one neuron says how near the other one is."""
    head = relu.variables['params']['head']
    dense = relu.variables['params']['dense1']
    params = {
        'dense1': {'kernel': dense['kernel'], 'bias': dense['bias'].at[0].set(-1e3)},
        'head': {'kernel': head['kernel'].at[1].set(0.0), 'bias': head['bias']},
    }
    regularizer = direct_sensitivity(top=1000, scale=scale)

    def penalty(params):
        labels = relu.forward({'params': params}, relu.x)[0].argmax(-1)
        return regularizer(relu.forward, {'params': params}, relu.x, labels, KEY)

    (value, metrics), gradient = jax.value_and_grad(penalty, has_aux=True)(params)
    assert value > 0 and 0 < metrics['mean_distance'] < 1e4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # The first neuron is never on, the second counts for no class.
    assert (np.asarray(gradient['dense1']['bias'])[:2] == 0).all()


def test_direct_sensitivity_is_blind_to_factors_between_layers(relu):
    params = relu.variables['params']
    moved = {
        'params': {
            'dense1': jax.tree.map(lambda leaf: 4 * leaf, params['dense1']),
            'head': {'kernel': params['head']['kernel'] / 4, 'bias': params['head']['bias']},
        }
    }
    for scale, same in (('rms', True), ('none', False)):
        regularizer = direct_sensitivity(scale=scale)
        before, after = (
            float(regularizer(relu.forward, variables, relu.x, relu.y, KEY)[0])
            for variables in (relu.variables, moved)
        )
        assert (after == pytest.approx(before, rel=1e-4)) == same


def test_descending_it_moves_the_nearest_flips_away(relu):
    labels = np.asarray(relu.forward(relu.variables, relu.x)[0].argmax(-1))
    regularizer = direct_sensitivity(layer='act1', top=3)

    @jax.jit
    def step(variables):
        def loss(variables):
            return regularizer(relu.forward, variables, relu.x, labels, KEY)[0]

        value, gradient = jax.value_and_grad(loss)(variables)
        return value, jax.tree.map(lambda leaf, g: leaf - 0.02 * g, variables, gradient)

    first, variables = step(relu.variables)
    for _ in range(20):
        last, variables = step(variables)
    assert last < 0.9 * first
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_the_gradient_of_the_loss_by_hand(linear):
    weights = linear.matrix('head')
    logits = np.float64(linear.forward(linear.variables, linear.x)[0])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradients = (shares - np.eye(3)[linear.y]) @ weights
    call = (linear.forward, linear.variables, linear.x, linear.y, KEY)
    assert input_gradient()(*call)[0] == pytest.approx((gradients**2).sum(1).mean(), rel=1e-5)
    one = input_gradient(order=1)(*call)[0]
    assert one == pytest.approx(np.abs(gradients).sum(1).mean(), rel=1e-5)
    # The gradient of the loss is never larger than sqrt(2) times the Jacobian.
    assert (gradients**2).sum(1).max() <= 2 * (weights**2).sum()


def test_the_size_of_activations_by_hand(relu):
    values = np.float64(relu.forward(relu.variables, relu.x, taps=('act1',))[1]['act1'])
    call = (relu.forward, relu.variables, relu.x, relu.y, KEY)
    assert activation_norm()(*call)[0] == pytest.approx(np.abs(values).mean(), rel=1e-5)
    squared = activation_norm(order=2, layers=('act1',))(*call)
    assert squared[0] == pytest.approx((values**2).mean(), rel=1e-5)
    assert squared[1]['act1'] == squared[0]


@pytest.mark.parametrize(
    ('make', 'options', 'message'),
    [
        (neuron_contribution, {'top': 0}, 'top is 0'),
        (neuron_contribution, {'top': 2.5}, 'top is 2.5; it must be a whole number'),
        (direct_sensitivity, {'top': 2.5}, 'top is 2.5; it must be a whole number'),
        (activation_norm, {'layers': 'act1'}, "layers is 'act1'; it must be a list"),
        (activation_norm, {'layers': []}, r'layers is \[\]; name at least one'),
        (neuron_contribution, {'top': 4.0}, 'top is 4.0; it must be a whole number, such as 4'),
        (neuron_contribution, {'layer': 3}, 'layer is 3; it must be the name of one'),
        (direct_sensitivity, {'layer': ('act1',)}, r"layer is \('act1',\); it must be the name"),
        (direct_sensitivity, {'valid_only': 1}, 'valid_only is 1; it must be True or False'),
        (neuron_contribution, {'contribution_weight': -1.0}, 'contribution_weight is -1.0'),
        (direct_sensitivity, {'order': 1.0}, 'order is 1.0; it must be greater than 1'),
        (direct_sensitivity, {'floor': 0.0}, 'floor is 0.0'),
        (direct_sensitivity, {'scale': 'std'}, "Unknown scale 'std'; valid names are rms, none"),
        (direct_sensitivity, {'unit': 'filter'}, "Unknown unit 'filter'"),
        (input_gradient, {'order': 3}, 'order is 3; it must be 1 or 2.'),
        (activation_norm, {'order': 0}, 'order is 0; it must be 1 or 2.'),
        (activation_norm, {'position': 'mid'}, "Unknown position 'mid'"),
    ],
)
def test_mistakes_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
