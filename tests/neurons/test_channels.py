"""Changing one channel behind a cut is the same as replacing it in the activation, for less."""

import functools
import math
import os

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxprs_in_params

from neurosens import models
from neurosens.forward import LinenForward, with_edits
from neurosens.neurons.tail import cut

SIZE, CHANNELS, CLASSES = 6, 3, 4


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def forward_from(function):
    """A `Forward` whose only layer is its input, and whose variables are not used."""

    def forward(variables, x, edits=(), taps=()):
        h = edits['h'](x) if 'h' in edits else x
        return function(h), {'h': h}

    return forward


def random_variables(module, x):
    """Random variables without compiling `init`; variances are positive."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    values = []
    for seed, (path, leaf) in enumerate(leaves):
        value = random(seed, *leaf.shape) / math.sqrt(max(math.prod(leaf.shape[:-1]), 1))
        values.append(np.abs(value) + 0.5 if path[-1].key == 'var' else value)
    return jax.tree.unflatten(structure, values)


def products(jaxpr):
    """How many convolutions and matrix products a program, and those inside it, have.

    A product over a single channel is none: it costs no more than its result.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            contracted = equation.params['dimension_numbers'][0][0]
            total += math.prod(equation.invars[0].aval.shape[axis] for axis in contracted) > 1
        total += equation.primitive.name == 'conv_general_dilated'
        total += sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return total


# Compiling is most of the time here, and the speed of the result does not matter.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
if 'xla_cpu_use_fusion_emitters' in os.environ.get('XLA_FLAGS', ''):
    # The older emitters round equal programs apart.
    QUICK['xla_cpu_use_fusion_emitters'] = True


def compare(forward, variables, x, layer, rtol=1e-5, exact=True, effect=10):
    """Checks every channel, whose changes matter; returns how many products one costs."""
    left = []

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(variables, x):
        made = cut(forward, variables, x, layer)
        h, fast = made.activation, made.channel_logits()
        values = jnp.asarray(3 * random(7, h.shape[-1], *h.shape[:-1]), h.dtype)
        left.append(products(jax.make_jaxpr(fast)(0, values[0]).jaxpr))

        def in_full(k, values):
            return made.logits(h.at[..., k].set(values))

        indices, last = jnp.arange(h.shape[-1]), h.shape[-1] - 1
        changed = (jax.vmap(run)(indices, values) for run in (fast, in_full))
        return *changed, fast(last, h[..., last]), made.logits(h)

    fast, in_full, own, plain = (np.asarray(a) for a in both(variables, x))
    assert fast.dtype == in_full.dtype
    scale = np.abs(in_full).max()
    assert (np.abs(in_full - plain).max(-1) > effect * rtol * scale).all()
    np.testing.assert_allclose(fast, in_full, rtol=rtol, atol=rtol * scale)
    if exact:
        np.testing.assert_array_equal(own, plain)
    else:
        np.testing.assert_allclose(own, plain, rtol=rtol, atol=rtol * scale)
    return left[0]


# --------------------------------------------------------------------- one operation at a time


def conv(h, features=5, size=3, strides=1, padding='SAME', dilation=1, groups=1, seed=3):
    kernel = random(seed, size, size, h.shape[-1] // groups, features)
    return lax.conv_general_dilated(
        h,
        jnp.asarray(kernel, h.dtype),
        (strides, strides),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def dense(h, features=CLASSES, seed=4):
    return h @ jnp.asarray(random(seed, h.shape[-1], features), h.dtype) + 0.5


def flat(h):
    return h.reshape(len(h), -1)


def head(h):
    """A nonlinear end, so that what the layer before it returns matters everywhere."""
    return dense(flat(nn.relu(h)))


def transposed(h):
    """Channels in front, as other frameworks have them, and back."""
    kernel = jnp.asarray(random(3, 5, CHANNELS, 3, 3))
    h = jnp.transpose(nn.relu(h), (0, 3, 1, 2))
    h = lax.conv_general_dilated(
        h, kernel, (1, 2), 'SAME', dimension_numbers=('NCHW', 'OIHW', 'NCHW')
    )
    return head(jnp.transpose(h, (0, 2, 3, 1)))


def swapped(h):
    """A convolution whose result has its axes in another order than its input."""
    kernel = jnp.asarray(random(3, 3, 3, CHANNELS, 5))
    return head(
        lax.conv_general_dilated(
            h, kernel, (2, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'WCNH')
        ).transpose(2, 0, 3, 1)
    )


def residual(h):
    return head(nn.relu(conv(nn.relu(h), CHANNELS)) + h)


def residual_of_two(h):
    return head(conv(h) + 2 * conv(nn.relu(h), size=1))


def attention(h):
    """Both factors of a product change."""
    tokens = h.reshape(len(h), -1, CHANNELS)
    scores = nn.softmax(jnp.einsum('bic,bjc->bij', tokens, tokens))
    return dense(jnp.einsum('bij,bjc->bic', scores, tokens).mean(1))


def layer_norm(h):
    centred = h - h.mean(-1, keepdims=True)
    return head(conv(centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)))


MAP = (SIZE, SIZE, CHANNELS)
# name: (function, shape of the activation, products left in the part that runs per channel)
TAILS = {
    'conv, relu before': (lambda h: head(conv(nn.relu(h))), MAP, 1),
    'valid': (lambda h: head(conv(h, padding='VALID')), MAP, 1),
    'padding': (lambda h: head(conv(h, padding=((2, 1), (0, 3)))), MAP, 1),
    'stride 2': (lambda h: head(conv(h, strides=2)), MAP, 1),
    'dilation': (lambda h: head(conv(h, dilation=2)), MAP, 1),
    '1 x 1': (lambda h: head(conv(h, size=1)), MAP, 1),
    '7 x 7': (lambda h: head(conv(h, size=7, padding=((3, 3), (3, 3)))), MAP, 1),
    '9 x 9 is applied in full': (
        lambda h: head(conv(h, size=9, padding=((4, 4), (4, 4)))),
        MAP,
        2,
    ),
    'grouped is applied in full': (
        lambda h: head(conv(h, 4, groups=2)),
        (SIZE, SIZE, 4),
        2,
    ),
    'max-pool, conv': (lambda h: head(conv(nn.max_pool(h, (2, 2), (2, 2)))), MAP, 1),
    'padded max-pool, conv': (
        lambda h: head(conv(nn.max_pool(h, (3, 3), (2, 2), 'SAME'))),
        MAP,
        1,
    ),
    'average pool, conv': (lambda h: head(conv(nn.avg_pool(h, (2, 2), (2, 2)))), MAP, 1),
    'mean, dense': (lambda h: dense(nn.relu(h).mean((1, 2))), MAP, 0),
    'max, dense': (lambda h: dense(h.max((1, 2))), MAP, 0),
    'flatten, dense is applied in full': (lambda h: head(h), MAP, 1),
    'dense at every position': (lambda h: head(dense(h, 5)), MAP, 1),
    'dense, dense': (lambda h: dense(nn.relu(dense(nn.tanh(h), 7))), (5,), 1),
    'one channel': (lambda h: head(conv(h)), (SIZE, SIZE, 1), 1),
    'one channel, dense': (lambda h: dense(nn.relu(dense(h, 5))), (1,), 1),
    'skip': (residual, MAP, 1),
    'two branches': (residual_of_two, MAP, 1),
    'channels first': (transposed, MAP, 1),
    'swapped axes': (swapped, MAP, 1),
    'attention is applied in full': (attention, MAP, 3),
    'layer norm is applied in full': (layer_norm, MAP, 2),
    'softmax is applied in full': (lambda h: head(conv(nn.softmax(h))), MAP, 2),
    'one-dimensional': (
        lambda h: head(
            lax.conv_general_dilated(
                h,
                jnp.asarray(random(3, 3, CHANNELS, 5)),
                (2,),
                'SAME',
                dimension_numbers=('NWC', 'WIO', 'NWC'),
            )
        ),
        (SIZE, CHANNELS),
        1,
    ),
    'clip, where, square': (
        lambda h: head(conv(jnp.where(h > 0, jnp.clip(h, -1, 1), h**2))),
        MAP,
        1,
    ),
}


# The compiler adds up in another order where the layout or the number of channels is another.
ROUNDED = {'mean, dense', 'channels first', 'swapped axes'}


@pytest.mark.parametrize('name', TAILS)
def test_a_changed_channel_is_a_replaced_channel(name):
    function, shape, left = TAILS[name]
    forward, x = forward_from(function), random(1, *shape)
    assert compare(forward, (), x, 'h', exact=name not in ROUNDED) == left


def test_a_scale_for_each_channel_treats_channels_apart():
    def function(h):
        return head(conv(h * jnp.arange(1.0, 4.0) + jnp.ones((SIZE, 1, 1))))

    assert compare(forward_from(function), (), random(1, *MAP), 'h') == 1


def test_a_single_channel_that_is_broadcast_is_applied_in_full():
    """One channel becomes three: its index is no longer one of theirs."""

    def function(h):
        return head(conv(h * jnp.arange(1.0, 4.0)))

    assert compare(forward_from(function), (), random(1, SIZE, SIZE, 1), 'h') == 2


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.integers(1, 4),
)
def test_random_convolutions(size, strides, padding, dilation, channels):
    kernel = random(3, *size, channels, 2)

    def function(h):
        h = lax.conv_general_dilated(
            h,
            kernel,
            strides,
            (padding[:2], padding[2:]),
            rhs_dilation=dilation,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        return h.reshape(1, -1)

    assert compare(forward_from(function), (), random(1, 5, 6, channels), 'h') == 0


def test_a_transposed_or_cropped_convolution_is_applied_in_full():
    kernel = random(3, 3, 3, CHANNELS, 2)

    def function(h):
        numbers = ('NHWC', 'HWIO', 'NHWC')
        up = lax.conv_transpose(h, kernel, (2, 2), 'SAME', dimension_numbers=numbers)
        cropped = lax.conv_general_dilated(
            h, kernel, (1, 1), ((-1, 0), (0, 0)), dimension_numbers=numbers
        )
        return jnp.concatenate([flat(up), flat(cropped)], -1)

    assert compare(forward_from(function), (), random(1, *MAP), 'h') == 2


# ----------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """A residual block with batch normalisation; `act2` follows the addition."""

    @nn.compact
    def __call__(self, x):
        normalize = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.Conv(CHANNELS, (3, 3), use_bias=False, name='conv1')(x)
        y = models.Activation('relu', name='act1')(normalize(name='norm1')(y))
        y = nn.Conv(CHANNELS, (3, 3), name='conv2')(y)
        y = models.BatchNorm(use_running_average=True, name='norm2')(y)
        return models.Activation('relu', name='act2')(x + y)


class Net(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        for name in ('block1', 'block2'):
            x = block(name=name)(x)
        return nn.Dense(CLASSES, name='head')(x.mean((1, 2)))


IMAGE = random(5, SIZE, SIZE, CHANNELS)
# The layer, and the products that are left: what follows the next one.
LAYERS = [
    # Batch normalisation with its broadcast statistics lies in between.
    ('block1/conv1', 3),
    ('block1/act1', 3),
    ('block1/act2', 2),
    ('block2', 0),
]


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize(('layer', 'left'), LAYERS)
def test_residual_networks_with_batch_normalization(remat, layer, left):
    module = Net(remat)
    variables = random_variables(module, IMAGE[None])
    exact = layer != 'block2'
    assert compare(LinenForward(module), variables, IMAGE, layer, exact=exact) == left


def test_edited_forwards():
    module = Net()
    variables = random_variables(module, IMAGE[None])
    edits = {'block1/act1': lambda h: h.at[..., 0].set(0), 'block2/conv1:in': lambda h: 2 * h}
    forward = with_edits(LinenForward(module), edits)
    assert compare(forward, variables, IMAGE, 'block1/act1') == 3


def test_a_half_precision_model():
    """Sums of the unchanged result and a difference are rounded to bfloat16 once more.

    That is 2^-9 of a value in each of the layers that follow, which a deep or cancelling sum can
    multiply: a few per cent of the largest logit bound it here.
    """
    module = models.create('cnn', num_classes=3, features=(3, 4), hidden=(5,), dtype='bfloat16')
    variables = random_variables(module, IMAGE[None])
    assert compare(LinenForward(module), variables, IMAGE, 'act1', 0.03, exact=False, effect=1) == 2


def test_a_change_that_the_network_ignores():
    """Logits that do not depend on the channels at all are returned as they are."""
    made = cut(forward_from(lambda h: jnp.ones((1, CLASSES))), (), random(1, 2, CHANNELS), 'h')
    np.testing.assert_array_equal(made.channel_logits()(1, np.zeros(2)), np.ones(CLASSES))


# --------------------------------------------------------------------------------- efficiency


def test_one_channel_costs_a_fraction_of_all():
    """Sixteen channels in, so a change of one should cost about a sixteenth of the convolution."""
    channels = 16

    def function(h):
        return conv(nn.relu(h), 64).sum((1, 2))

    forward = forward_from(function)

    def flops(run):
        compiled = jax.jit(run).lower(random(1, 8, 8, channels), random(2, channels, 8, 8))
        return compiled.compile().cost_analysis()['flops']

    def fast(x, values):
        changed = cut(forward, (), x, 'h').channel_logits()
        return jax.vmap(changed)(jnp.arange(channels), values)

    def in_full(x, values):
        made = cut(forward, (), x, 'h')

        def one(k, values):
            return made.logits(made.activation.at[..., k].set(values))

        return jax.vmap(one)(jnp.arange(channels), values)

    assert flops(fast) < flops(in_full) / 3
