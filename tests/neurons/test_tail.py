"""A network cut at a layer is the network; what is said of the layer follows from its program."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from neurosens import models
from neurosens.forward import (
    LayerError,
    LinenForward,
    NNXForward,
    with_edits,
    with_input_transform,
)
from neurosens.models.common import relu
from neurosens.neurons.ablation import without_neurons
from neurosens.neurons.tail import cut, layer_facts

CLASSES = 4


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(module, x):
    """Random variables without compiling `init`; variances are positive."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    values = []
    for seed, (path, leaf) in enumerate(leaves):
        value = random(seed, *leaf.shape) / math.sqrt(max(math.prod(leaf.shape[:-1]), 1))
        values.append(np.abs(value) + 0.5 if path[-1].key == 'var' else value)
    return jax.tree.unflatten(structure, values)


class Block(nn.Module):
    """A residual block whose skip connection has a convolution of its own."""

    @nn.compact
    def __call__(self, x):
        normalize = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.Conv(3, (3, 3), use_bias=False, name='conv1')(x)
        y = models.Activation('relu', name='act1')(normalize(name='norm1')(y))
        y = nn.Conv(3, (3, 3), name='conv2')(y)
        y = models.BatchNorm(use_running_average=True, name='norm2')(y)
        return models.Activation('relu', name='act2')(nn.Conv(3, (1, 1), name='skip')(x) + y)


class Net(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        for name in ('block1', 'block2'):
            x = block(name=name)(x)
        return nn.Dense(CLASSES, name='head')(x.mean((1, 2)))


class NNXNet(nnx.Module):
    """A convolution, normalisation and a residual convolution."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.conv2 = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.head = nnx.Linear(3, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        return self.head(nnx.relu(x + self.conv2(x)).mean((1, 2)))


IMAGES = random(5, 3, 5, 5, 3)


# Compiling is most of the time here, and the speed of the result does not matter.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


@functools.partial(jax.jit, static_argnames='layer', compiler_options=QUICK)
def both_ways(forward, variables, x, layer):
    """Logits, and logits and gradients at another activation: from the cut, and from an edit."""

    def other(h):
        return jnp.cos(3 * h) + h

    def from_cut(x):
        made = cut(forward, variables, x, layer)
        replaced = other(made.activation)
        gradient = jax.grad(lambda h: made.logits(h)[1])(replaced)
        return made.activation, made.logits(made.activation), made.logits(replaced), gradient

    def from_edit(h):
        return forward(variables, x, edits={layer: lambda _: h})[0]

    logits, tapped = forward(variables, x, taps=(layer,))
    h = tapped[layer]
    gradient = jax.grad(lambda h: from_edit(h)[:, 1].sum())(other(h))
    return jax.vmap(from_cut)(x), (h, logits, from_edit(other(h)), gradient)


def assert_cuts(forward, variables, layer, x=IMAGES):
    of_cut, of_edit = both_ways(forward, variables, x, layer)
    for ours, theirs in zip(of_cut, of_edit):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert np.abs(of_edit[1] - of_edit[2]).max() > 1e-2
    assert np.abs(of_edit[3]).max() > 1e-3


@pytest.fixture(scope='module')
def variables():
    return random_variables(Net(), IMAGES[:1])


@pytest.mark.parametrize(
    ('layer', 'remat'),
    [
        ('block1/conv1:in', False),
        ('block1/act1', False),
        ('block2', False),
        ('block1/act1', True),
        ('block1', True),
    ],
)
def test_the_two_halves_are_the_network(variables, layer, remat):
    assert_cuts(LinenForward(Net(remat)), variables, layer)


def test_a_network_of_the_zoo():
    module = models.CIFARResNet(num_classes=CLASSES, depth=8)
    x = random(5, 2, 8, 8, 3)
    variables = random_variables(module, x)
    assert_cuts(LinenForward(module), variables, 'stage3_block1/act1', x)


def test_an_nnx_network():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0))))
    state = jax.tree.map(lambda leaf: 0.3 * np.abs(random(1, *leaf.shape)), state)
    assert_cuts(NNXForward(graphdef), state, 'norm')


@pytest.mark.parametrize('layer', ['block1/act1', 'block2/conv1'])
def test_an_edited_network(variables, layer):
    """The value at the cut is the one after the network's own edit of that layer."""
    edits = {'block1/act1': lambda h: 2 * h + 1, 'block2/conv2:in': lambda h: h.at[..., 1].set(0)}
    forward = with_edits(LinenForward(Net()), edits)
    assert_cuts(forward, variables, layer)
    if layer != 'block1/act1':
        return
    plain = both_ways(LinenForward(Net()), variables, IMAGES, 'block1/act1')[0]
    edited = both_ways(forward, variables, IMAGES, 'block1/act1')[0]
    np.testing.assert_allclose(edited[0], 2 * plain[0] + 1, rtol=1e-6)


def test_a_network_with_an_input_transform(variables):
    forward = with_input_transform(LinenForward(Net()), lambda x: jnp.tanh(x[:, ::-1]))
    assert_cuts(forward, variables, 'block1/act1')


def test_runs_without_jit():
    forward = forward_from(lambda h: nn.tanh(h) @ random(1, 3, 2), nn.relu)
    made = cut(forward, (), IMAGES[0, 0, 0], 'h')
    expected = np.tanh(made.activation + 1) @ random(1, 3, 2)
    np.testing.assert_allclose(made.logits(made.activation + 1), expected, rtol=1e-6)


def test_values_enter_in_the_layers_own_type():
    """A cut keeps the type that the network computes in, whatever it is given."""
    forward = forward_from(lambda h: 3 * h, lambda x: x)
    made = cut(forward, (), jnp.ones(3, jnp.bfloat16), 'h')
    assert made.activation.dtype == jnp.bfloat16
    logits = made.logits(np.array([1, 1.001, 2], np.float32))
    assert logits.dtype == jnp.float32
    # 1.001 is 1 in 8 bits.
    np.testing.assert_array_equal(logits, [3, 3, 6])


# ------------------------------------------------------------------------- only what is needed


def count(jaxpr, name):
    """How many operations of a program, and of those inside it, have this name."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        total += sum(count(inner, name) for inner in jaxprs_in_params(equation.params))
    return total


def convolutions_behind(forward, variables, layer):
    found = []

    def run(variables, x):
        made = cut(forward, variables, x, layer)
        program = jax.make_jaxpr(made.logits)(made.activation)
        found.append(count(program.jaxpr, 'conv_general_dilated'))
        return made.activation

    jax.eval_shape(run, variables, IMAGES[0])
    return found[0]


@pytest.mark.parametrize(
    ('layer', 'convolutions'),
    [
        ('block1/conv1:in', 5),
        ('block1/conv1', 4),
        ('block1/act1', 4),
        ('block1', 3),
        ('block1/skip', 3),
        ('block2/conv1', 1),
        ('block2/act2', 0),
        ('head:in', 0),
    ],
)
def test_no_convolution_before_the_layer_runs_again(variables, layer, convolutions):
    assert convolutions_behind(LinenForward(Net()), variables, layer) == convolutions
    transformed = with_input_transform(LinenForward(Net()), jnp.tanh)
    assert convolutions_behind(transformed, variables, layer) == convolutions


@pytest.mark.parametrize(
    ('layer', 'convolutions'), [('block1/act1', 4), ('block1', 3), ('block2', 0)]
)
def test_what_a_rematerialized_block_does_before_the_layer_does_not_run_again(
    variables, layer, convolutions
):
    assert convolutions_behind(LinenForward(Net(True)), variables, layer) == convolutions


# ------------------------------------------------------------------------------- layer facts


def forward_from(tail, front=lambda x: x):
    """A `Forward` with one layer, `h`, between two functions of arrays."""

    def forward(variables, x, edits=(), taps=()):
        h = front(x)
        h = edits['h'](h) if 'h' in edits else h
        return tail(h), {'h': h}

    return forward


def facts(tail, front, *shape):
    return layer_facts(forward_from(tail, front), (), jax.ShapeDtypeStruct(shape, jnp.float32), 'h')


def flat(h):
    return h.reshape(len(h), -1)


def dense(h, features=CLASSES):
    return h @ random(1, h.shape[-1], features) + 0.5


def conv(h):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    kernel = random(2, 3, 3, h.shape[-1], 5)
    return jax.lax.conv_general_dilated(h, kernel, (1, 1), 'SAME', dimension_numbers=numbers)


def batch_norm(x):
    """The statistics are variables, which may have any sign."""
    statistics = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
    affine = {'scale': jnp.ones(3), 'bias': jnp.zeros(3)}
    variables = {'params': affine, 'batch_stats': statistics}
    return nn.BatchNorm(use_running_average=True).apply(variables, x)


NONNEGATIVE = {
    'relu': nn.relu,
    'relu of a convolution': lambda x: nn.relu(conv(x)),
    'relu6': nn.relu6,
    'maximum with 0': lambda x: jnp.maximum(x, 0),
    'relu, max-pool': lambda x: nn.max_pool(nn.relu(x), (2, 2), (2, 2), 'SAME'),
    'relu, average pool': lambda x: nn.avg_pool(nn.relu(x), (2, 2), (2, 2), 'SAME'),
    'relu, mean': lambda x: nn.relu(x).mean((1, 2)),
    'relu, flatten': lambda x: flat(nn.relu(x)),
    'relu, transpose': lambda x: jnp.transpose(nn.relu(x), (0, 3, 1, 2)),
    'relu, pad, crop': lambda x: jnp.pad(nn.relu(x), ((0, 0), (1, 1), (0, 0), (0, 0)))[:, 1:3],
    'sum of relus': lambda x: nn.relu(x) + nn.relu(-x),
    'concatenated relus': lambda x: jnp.concatenate([nn.relu(x), nn.relu(-x)], -1),
    'product of relus': lambda x: nn.relu(x) * 2 * nn.relu(1 - x),
    'rematerialized relu': jax.checkpoint(nn.relu),
    'jitted relu': jax.jit(nn.relu),
    'abs': jnp.abs,
    'exp': jnp.exp,
    'square': jnp.square,
    'even power': lambda x: x**4,
    'sigmoid': nn.sigmoid,
    'softmax': nn.softmax,
    'clip': lambda x: jnp.clip(x, 0, 1),
    'clamp': lambda x: jax.lax.clamp(0.0, x, 1.0),
    'relu of the bundled networks': relu,
    'chosen above 0': lambda x: jnp.where(x > 0, x, 0),
    'chosen from 0 on': lambda x: jnp.where(x >= 0, x, jnp.exp(x)),
    'the others below 0': lambda x: jnp.where(x < 0, 1.0, x),
    'gathered or filled with 1': lambda x: (
        nn.relu(x).at[..., jnp.asarray([0, 9])].get(mode='fill', fill_value=1.0)
    ),
    'the same through a jitted function': lambda x: jnp.where(x > 0, jax.jit(lambda x: x)(x), 0),
    'a choice in a jitted function': lambda x: jax.jit(jnp.where)(x <= 0, 0.0, x),
}
NOT_NONNEGATIVE = {
    'input': lambda x: x,
    'tanh': nn.tanh,
    'gelu': nn.gelu,
    'silu': nn.silu,
    'elu': nn.elu,
    'leaky_relu': nn.leaky_relu,
    'batch norm': batch_norm,
    'batch norm of relu': lambda x: batch_norm(nn.relu(x)),
    'convolution': conv,
    'convolution of relu': lambda x: conv(nn.relu(x)),
    'dense of relu': lambda x: dense(nn.relu(x)),
    'negated relu': lambda x: -nn.relu(x),
    'relu - 1': lambda x: nn.relu(x) - 1,
    'relu + x': lambda x: nn.relu(x) + x,
    'minimum with 0': lambda x: jnp.minimum(x, 0),
    'odd power': lambda x: x**3,
    'log of relu': lambda x: jnp.log(nn.relu(x)),
    'clip around 0': lambda x: jnp.clip(x, -1, 1),
    'clamp around 0': lambda x: jax.lax.clamp(-1.0, x, 1.0),
    'relu padded below 0': lambda x: jnp.pad(
        nn.relu(x), ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=-1
    ),
    'relu times a negative constant': lambda x: nn.relu(x) * -2,
    'relu or -1': lambda x: jnp.where(x > 1, nn.relu(x), -1),
    'clamp below its lower limit': lambda x: jax.lax.clamp(0.0, x, -1.0),
    'gathered or filled': lambda x: (
        nn.relu(x).at[..., jnp.asarray([0, 9])].get(mode='fill', fill_value=-1.0)
    ),
    'a comparison the other way round': lambda x: jnp.where(
        jax.lax.lt(jnp.zeros_like(x), x), -x, 1.0
    ),
    'where it is not above 0': lambda x: jnp.where(~(x > 0), x, 1.0),
    'of another in a jitted function': lambda x: jax.jit(lambda a, b: jnp.where(a > 0, b, 0.0))(
        x, x - 1
    ),
    'of the same in the branch of a condition': lambda x: jax.lax.cond(
        x.sum() > 0, lambda x: x, lambda x: x - 1, x
    ),
    'chosen below 0': lambda x: jnp.where(x < 0, x, 0),
    'the others above 0': lambda x: jnp.where(x > 0, 0.0, x),
    'chosen above -1': lambda x: jnp.where(x > -1, x, 0),
    'chosen where another is above 0': lambda x: jnp.where(x + 1 > 0, x, 0),
    'chosen above 0, or below': lambda x: jnp.where(x > 0, x, -x - 5),
    'chosen above some numbers': lambda x: jnp.where(x > -jnp.arange(3.0), x, 0),
}


@pytest.mark.parametrize('name', NONNEGATIVE)
def test_never_negative(name):
    assert facts(lambda h: dense(flat(h)), NONNEGATIVE[name], 4, 4, 3).nonnegative


@pytest.mark.parametrize('name', NOT_NONNEGATIVE)
def test_not_known_to_be_nonnegative(name):
    assert not facts(lambda h: dense(flat(h)), NOT_NONNEGATIVE[name], 4, 4, 3).nonnegative


MASK = np.array([True, False, True])
AFFINE = {
    'dense': lambda h: dense(flat(h)),
    'two dense layers': lambda h: dense(dense(flat(h), 6)),
    'mean, dense': lambda h: dense(h.mean((1, 2))),
    'average pool, dense': lambda h: dense(flat(nn.avg_pool(h, (2, 2), (2, 2)))),
    'convolution': lambda h: dense(flat(conv(h))),
    'batch norm': lambda h: dense(flat(batch_norm(h))),
    'times a constant': lambda h: dense(flat(h * 3)),
    'constant minus': lambda h: dense(flat(1 - h / 2)),
    'residual': lambda h: dense(conv(h).mean((1, 2))) + dense(flat(h)),
    'concatenated': lambda h: dense(jnp.concatenate([flat(h), 2 * flat(h)], -1)),
    'jitted': jax.jit(lambda h: dense(flat(h))),
    'times a constant mask': lambda h: dense(flat(h * MASK)),
    'chosen by a constant mask': lambda h: dense(flat(jnp.where(MASK, h, 0))),
}
NOT_AFFINE = {
    'relu': lambda h: dense(nn.relu(flat(h))),
    'dense, relu, dense': lambda h: dense(nn.relu(dense(flat(h), 6))),
    'max-pool': lambda h: dense(flat(nn.max_pool(h, (2, 2), (2, 2)))),
    'times itself': lambda h: dense(flat(h * h)),
    'squared': lambda h: dense(flat(h**2)),
    'gate': lambda h: dense(flat(h * nn.sigmoid(h))),
    'product of two affine functions': lambda h: dense(flat(h)) * h.mean((1, 2, 3))[:, None],
    'softmax behind': lambda h: nn.softmax(dense(flat(h))),
    'log softmax behind': lambda h: nn.log_softmax(dense(flat(h))),
    'divided by': lambda h: dense(flat(1 / (h + 2))),
    'abs': lambda h: dense(flat(jnp.abs(h))),
    'chosen by sign': lambda h: dense(flat(jnp.where(h > 0, h, 2 * h))),
}


@pytest.mark.parametrize('name', AFFINE)
def test_an_affine_tail(name):
    assert facts(AFFINE[name], nn.relu, 4, 4, 3).affine_tail


def test_a_conversion_to_integers_is_not_affine():
    def quantized(h):
        return dense(flat(h.astype(jnp.int8).astype(h.dtype)))

    assert not facts(quantized, nn.relu, 4, 4, 3).affine_tail


@pytest.mark.parametrize('name', NOT_AFFINE)
def test_a_tail_that_is_not_affine(name):
    assert not facts(NOT_AFFINE[name], nn.relu, 4, 4, 3).affine_tail


def test_a_part_that_depends_on_the_input():
    """It may be added to the logits, but not scale them."""

    def known(join):
        def forward(variables, x, edits=(), taps=()):
            h = edits['h'](x) if 'h' in edits else x
            return join(dense(h), x), {'h': h}

        return layer_facts(forward, (), jax.ShapeDtypeStruct((3,), jnp.float32), 'h')

    assert known(lambda logits, x: logits + dense(nn.relu(x))).affine_tail
    assert not known(lambda logits, x: logits * x.sum()).affine_tail
    assert not known(lambda logits, x: logits / (1 + x.sum() ** 2)).affine_tail
    assert known(lambda logits, x: logits - jnp.exp(x[:, :1])).affine_tail
    assert not known(lambda logits, x: jnp.where(x[:, :1] > 0, logits, 0)).affine_tail
    assert not known(lambda logits, x: logits @ (x.T @ x)[:1].repeat(4, 0)).affine_tail


class Gate(nn.Module):
    """The gate h * g(x) at the layer `inner`."""

    @nn.compact
    def __call__(self, x):
        x = flat(x)
        h = nn.Dense(6, name='inner')(nn.relu(nn.Dense(6, name='dense')(x)))
        return nn.Dense(CLASSES, name='head')(h * nn.sigmoid(nn.Dense(6, name='gate')(x)))


def test_facts_of_modules():
    x = jax.ShapeDtypeStruct((5, 5, 3), jnp.float32)
    batch = jax.ShapeDtypeStruct((1, *x.shape), jnp.float32)

    def known(module, layer):
        variables = jax.eval_shape(module.init, jax.random.key(0), batch)
        return layer_facts(LinenForward(module), variables, x, layer)

    for layer, nonnegative in (('inner', False), ('head:in', False), ('dense', False)):
        assert known(Gate(), layer).nonnegative is nonnegative
    assert known(Gate(), 'head:in') == ((6,), False, True)
    assert known(Gate(), 'inner') == ((6,), False, False)


@pytest.mark.parametrize('remat', [False, True])
def test_facts_of_residual_blocks(remat):
    forward, x = LinenForward(Net(remat)), jax.ShapeDtypeStruct((5, 5, 3), jnp.float32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), IMAGES[:1])
    known = functools.partial(layer_facts, forward, variables, x)
    assert known('head:in') == ((3,), True, True)
    assert known('block2/act1') == ((5, 5, 3), True, False)
    assert known('block2/conv1') == ((5, 5, 3), False, False)
    # The features are only averaged on their way to the head.
    assert known('block2') == ((5, 5, 3), True, True)


class Stack(nn.Module):
    """Three dense layers, with a nonlinearity behind the first only."""

    @nn.compact
    def __call__(self, x):
        x = models.Activation('relu', name='act')(nn.Dense(6, name='first')(x))
        return nn.Dense(CLASSES, name='head')(nn.Dense(3, name='second')(x))


@pytest.mark.parametrize('remove', ['times 0', 'without_neurons'])
def test_removed_neurons_leave_an_affine_tail_affine(random_variables, remove):
    plain, x = LinenForward(Stack()), np.ones((1, 4), np.float32)
    variables = random_variables(Stack(), x)
    if remove == 'times 0':
        forward = with_edits(plain, {'head:in': jax.tree_util.Partial(jnp.multiply, MASK * 1.0)})
    else:
        forward = without_neurons(plain, 'head:in', ~MASK)
    assert layer_facts(forward, variables, x[0], 'act') == ((6,), True, True)
    assert layer_facts(forward, variables, x[0], 'head:in').affine_tail
    assert not layer_facts(forward, variables, x[0], 'first').affine_tail


# ------------------------------------------------------------------------------------- errors


def test_an_unknown_layer_is_answered_with_close_names(variables):
    forward = LinenForward(Net())
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, variables))
    message = r"Unknown layer 'block1/act3'.*'block1/act1'"
    with pytest.raises(LayerError, match=message):
        cut(forward, variables, IMAGES[0], 'block1/act3')
    with pytest.raises(LayerError, match=message):
        layer_facts(forward, shapes, IMAGES[0], 'block1/act3')


@pytest.mark.parametrize(
    ('front', 'message'),
    [
        (lambda x: x.astype(jnp.int32), "Layer 'h' is of type int32; only floating-point"),
        (lambda x: x > 0, "Layer 'h' is of type bool; only floating-point"),
        (lambda x: x.sum(), r"Layer 'h' has shape \(\) for one example; it needs a leading batch"),
        (lambda x: jnp.concatenate([x, x]), r"Layer 'h' has shape \(2, 3\) for one example"),
    ],
)
def test_layers_without_neurons(front, message):
    forward = forward_from(lambda h: jnp.ones((1, CLASSES)), front)
    with pytest.raises(LayerError, match=message):
        cut(forward, (), jnp.ones(3), 'h')
    with pytest.raises(LayerError, match=message):
        layer_facts(forward, (), jnp.ones(3), 'h')
