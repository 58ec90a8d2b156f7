"""A Forward taps and edits any Linen or NNX model, under every JAX transformation."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import neurosens as ns
from neurosens.forward import is_asked


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.features, name='dense')(x)
        x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
        return nn.relu(x)


class UserNet(nn.Module):
    """A model written without this library in mind."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        x = block(8, name='block1')(x, train)
        x = block(6, name='block2')(x, train)
        return nn.Dense(3, name='head')(x)


class ScanBody(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.relu(nn.Dense(4, name='dense')(carry)), None


class AwkwardNet(nn.Module):
    """A shared module, a scanned stack, a vmapped module and a module that returns a tuple."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name='shared')
        x = shared(shared(x))
        scan = nn.scan(ScanBody, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
        x, _ = scan(name='stack')(x, None)
        vmapped = nn.vmap(nn.Dense, variable_axes={'params': None}, split_rngs={'params': False})
        x = vmapped(4, name='vmapped')(x)
        x, _ = ScanBody(name='pair')(x, None)
        return nn.Dense(3, name='head')(x)


class NNXBlock(nnx.Module):
    def __init__(self, din, dout, rngs):
        self.dense = nnx.Linear(din, dout, rngs=rngs)
        self.norm = nnx.BatchNorm(dout, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs, remat=False):
        self.block1 = NNXBlock(5, 8, rngs)
        self.block2 = NNXBlock(8, 6, rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        call = nnx.remat(lambda module, x: module(x)) if self.remat else lambda m, x: m(x)
        x = self.drop(call(self.block2, call(self.block1, x)))
        return self.head(x)


class NNXAwkward(nnx.Module):
    def __init__(self, rngs):
        self.shared = nnx.Linear(5, 5, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.Linear(5, 5, rngs=rngs), in_axes=0, out_axes=0)
        self.stack = make(rngs.split(3))
        self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.shared(self.shared(x))
        run = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = run(x, self.stack)
        for layer in self.layers:
            x = layer(x)
        return x


X = jax.random.normal(jax.random.key(1), (4, 5))


def linen_case(remat=False):
    module = UserNet(remat=remat)
    variables = module.init(jax.random.key(0), X)
    # Running statistics unlike their initial values, so that BatchNorm is not the identity.
    variables = {
        'params': variables['params'],
        'batch_stats': jax.tree.map(lambda s: s + 0.5, variables['batch_stats']),
    }
    return ns.LinenForward(module), variables


def nnx_case(remat=False):
    graphdef, state = nnx.split(NNXNet(nnx.Rngs(0), remat))
    return ns.NNXForward(graphdef), state


CASES = {
    'linen': linen_case,
    'linen-remat': lambda: linen_case(remat=True),
    'nnx': nnx_case,
    'nnx-remat': lambda: nnx_case(remat=True),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_untapped_call_is_the_model_itself():
    forward, variables = linen_case()
    logits, tapped = forward(variables, X)
    chex.assert_trees_all_equal(logits, forward.module.apply(variables, X))
    assert tapped == {}


def test_nnx_runs_in_evaluation_mode_and_leaves_the_state_alone():
    model = NNXNet(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    forward = ns.NNXForward(graphdef)
    first, _ = forward(state, X)
    second, _ = forward(state, X)
    model.eval()
    chex.assert_trees_all_equal(first, second, model(X))
    chex.assert_trees_all_equal(before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    trained, _ = ns.NNXForward(graphdef, train=True)(state, X)
    assert not np.allclose(trained, first), 'train=True keeps dropout and batch statistics'


def test_layers_lists_every_module_in_order_with_shapes(case):
    forward, variables = case
    listed = ns.layers(forward, variables, jax.ShapeDtypeStruct((4, 5), jnp.float32))
    names = [
        'block1/dense', 'block1/norm', 'block1', 'block2/dense', 'block2/norm', 'block2', 'head',
    ]  # fmt: skip
    assert [name for name in listed if name != 'drop'] == names
    assert listed['block1/dense'].shape == (4, 8)
    assert listed['head'].shape == (4, 3)
    inputs = ns.layers(forward, variables, X, inputs=True)
    assert inputs['head:in'].shape == (4, 6)
    assert set(listed) < set(inputs)


def test_taps_read_outputs_and_inputs(case):
    forward, variables = case
    logits, tapped = forward(variables, X, taps=('block1', 'block2:in', 'head', 'head:in'))
    assert list(tapped) == ['block1', 'block2:in', 'head', 'head:in']
    chex.assert_trees_all_equal(tapped['block1'], tapped['block2:in'])
    chex.assert_trees_all_equal(tapped['head'], logits)
    assert tapped['head:in'].min() >= 0


def test_linen_taps_equal_a_layer_by_layer_computation():
    forward, variables = linen_case()
    _, tapped = forward(variables, X, taps=('block1/dense', 'block1'))
    dense = nn.Dense(8).apply({'params': variables['params']['block1']['dense']}, X)
    chex.assert_trees_all_equal(tapped['block1/dense'], dense)
    norm, stats = variables['params']['block1']['norm'], variables['batch_stats']['block1']['norm']
    expected = (dense - stats['mean']) / np.sqrt(stats['var'] + 1e-5) * norm['scale'] + norm['bias']
    chex.assert_trees_all_close(tapped['block1'], np.maximum(expected, 0), atol=1e-6)


def test_identity_edit_changes_nothing_bit_for_bit(case):
    forward, variables = case
    names = ('block1', 'block1/dense:in', 'head:in', 'head')
    edited, _ = forward(variables, X, edits={name: lambda h: h for name in names})
    chex.assert_trees_all_equal(edited, forward(variables, X)[0])


def test_edit_of_the_last_layers_input_moves_logits_by_its_weights():
    forward, variables = linen_case()
    logits, _ = forward(variables, X)
    moved, tapped = forward(
        variables, X, edits={'head:in': lambda h: h.at[:, 2].add(1.5)}, taps=('head:in', 'block2')
    )
    kernel = variables['params']['head']['kernel']
    chex.assert_trees_all_close(moved - logits, jnp.tile(1.5 * kernel[2], (4, 1)), atol=1e-5)
    # A tap of an edited layer sees the edit; the module that produced the value does not.
    chex.assert_trees_all_close(tapped['head:in'][:, 2], tapped['block2'][:, 2] + 1.5)


def test_replacing_an_activation_is_running_from_there(case):
    forward, variables = case
    other = jax.random.normal(jax.random.key(7), X.shape)
    logits, tapped = forward(variables, other, taps=('block1',))
    replaced, _ = forward(variables, X, edits={'block1': lambda h: tapped['block1']})
    chex.assert_trees_all_close(replaced, logits, atol=1e-6)


def test_composes_with_jit_grad_jvp_vmap(case):
    forward, variables = case

    def neuron(x, shift):
        logits, tapped = forward(
            variables, x[None], edits={'block1': lambda h: h.at[:, 0].add(shift)}, taps=('head:in',)
        )
        return logits[0, 0] + tapped['head:in'].sum()

    x, shift, tangent = X[0], jnp.float32(0.1), jnp.ones(5)
    gradient = jax.grad(neuron)(x, shift)
    _, forward_mode = jax.jvp(lambda x: neuron(x, shift), (x,), (tangent,))
    chex.assert_trees_all_close(forward_mode, gradient @ tangent, atol=1e-5)
    batched = jax.jit(jax.vmap(jax.grad(neuron), (0, None)))(X, shift)
    chex.assert_trees_all_close(batched[0], gradient, atol=1e-5)


def test_every_pattern_matches_the_listing(case):
    forward, variables = case
    _, tapped = forward(variables, X, taps=('*', '*:in'))
    listed = ns.layers(forward, variables, X, inputs=True)
    assert {name: value.shape for name, value in tapped.items()} == {
        name: struct.shape for name, struct in listed.items()
    }


def test_equal_linen_models_share_one_trace():
    traces = []

    @jax.jit
    def run(forward, variables, x):
        traces.append(None)
        return forward(variables, x)[0]

    forward, variables = linen_case()
    again, _ = linen_case()
    assert forward == again and hash(forward) == hash(again)
    run(forward, variables, X)
    run(again, variables, X)
    assert len(traces) == 1
    run(ns.LinenForward(UserNet(), kwargs={'train': False}), variables, X)
    assert len(traces) == 2


def test_new_arrays_in_an_edit_need_no_new_trace(case):
    forward, variables = case
    traces = []

    @jax.jit
    def run(forward, variables, x):
        traces.append(None)
        return forward(variables, x)[0]

    for factor in (0.0, 2.0):
        edit = jax.tree_util.Partial(jnp.multiply, jnp.float32(factor))
        scaled = ns.with_edits(forward, {'head:in': edit})
        expected = forward(variables, X, edits={'head:in': lambda h, f=factor: f * h})[0]
        chex.assert_trees_all_close(run(scaled, variables, X), expected, atol=1e-6)
    assert len(traces) == 1


def test_wrappers_nest_and_apply_inner_edits_first(case):
    forward, variables = case
    doubled = ns.with_edits(forward, {'head:in': lambda h: 2 * h})
    shifted = ns.with_edits(doubled, {'head:in': lambda h: h + 1})
    _, tapped = forward(variables, X, taps=('head:in',))
    _, both = shifted(variables, X, taps=('head:in',))
    chex.assert_trees_all_close(both['head:in'], 2 * tapped['head:in'] + 1, atol=1e-6)
    flipped = ns.with_input_transform(shifted, lambda x: -x)
    chex.assert_trees_all_close(flipped(variables, X)[0], shifted(variables, -X)[0])
    assert ns.layers(flipped, variables, X) == ns.layers(forward, variables, X)
    gradient = jax.grad(lambda x: flipped(variables, x)[0].sum())(X)
    expected = -jax.grad(lambda x: shifted(variables, x)[0].sum())(-X)
    chex.assert_trees_all_close(gradient, expected, atol=1e-6)


@pytest.mark.parametrize('where', ['taps', 'edits'])
def test_unknown_layer_names_the_closest(case, where):
    forward, variables = case
    arguments = {'taps': ('blok2',)} if where == 'taps' else {'edits': {'blok2': lambda h: h}}
    with pytest.raises(ns.LayerError, match=r"^Unknown layer 'blok2': the closest .*'block2'"):
        forward(variables, X, **arguments)


def test_unknown_input_names_the_closest_inputs(case):
    forward, variables = case
    with pytest.raises(ns.LayerError, match="'head:in'"):
        forward(variables, X, taps=('hed:in',))


def test_edit_must_keep_the_shape(case):
    forward, variables = case
    with pytest.raises(ns.LayerError, match=r"'block1' returned shape \(4, 7\).*\(4, 8\)"):
        forward(variables, X, edits={'block1': lambda h: h[:, :7]})


def test_taps_given_as_one_string_are_refused(case):
    forward, variables = case
    with pytest.raises(TypeError, match="not the string 'head'"):
        forward(variables, X, taps='head')


AWKWARD = [
    ('shared', 'runs 2 times'),
    ('shared:in', 'runs 2 times'),
    ('stack/dense', 'lifted transform'),
    ('vmapped', 'lifted transform'),
    ('pair', 'single array'),
]


@pytest.mark.parametrize(('name', 'reason'), AWKWARD)
@pytest.mark.parametrize('where', ['taps', 'edits'])
def test_ambiguous_linen_layers_are_refused(name, reason, where):
    x = jnp.ones((2, 4))
    module = AwkwardNet()
    variables = module.init(jax.random.key(0), x)
    arguments = {'taps': (name,)} if where == 'taps' else {'edits': {name: lambda h: h}}
    with pytest.raises(ns.LayerError, match=reason):
        ns.LinenForward(module)(variables, x, **arguments)


@pytest.mark.parametrize(
    ('name', 'reason'), [('shared', 'runs 2 times'), ('stack', 'lifted transform')]
)
@pytest.mark.parametrize('where', ['taps', 'edits'])
def test_ambiguous_nnx_layers_are_refused(name, reason, where):
    graphdef, state = nnx.split(NNXAwkward(nnx.Rngs(0)))
    arguments = {'taps': (name,)} if where == 'taps' else {'edits': {name: lambda h: h}}
    with pytest.raises(ns.LayerError, match=reason):
        ns.NNXForward(graphdef)(state, X, **arguments)


def test_ambiguous_layers_are_left_out_of_the_listing():
    x = jnp.ones((2, 4))
    module = AwkwardNet()
    variables = module.init(jax.random.key(0), x)
    assert list(ns.layers(ns.LinenForward(module), variables, x)) == ['pair/dense', 'head']
    graphdef, state = nnx.split(NNXAwkward(nnx.Rngs(0)))
    assert list(ns.layers(ns.NNXForward(graphdef), state, X)) == ['layers/0', 'layers/1']


class Nonlinearities(nn.Module):
    """Dense layers with nonlinearities of any names; those of `again` run twice."""

    names: tuple[str, ...]
    again: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        for number, name in enumerate(self.names):
            act = Tanh(name=name)
            for time in range(1 + (name in self.again)):
                x = act(nn.Dense(4, name=f'dense{number}_{time}')(x))
        return nn.Dense(3, name='head')(x)


class Tanh(nn.Module):
    def __call__(self, x):
        return nn.tanh(x)


class NNXNonlinearities(nnx.Module):
    """Of the NNX kind."""

    def __init__(self, again):
        self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.act, self.relu_1, self.again = NNXTanh(), NNXTanh(), again

    def __call__(self, x):
        x = self.relu_1(self.act(self.dense(x)))
        return self.relu_1(x) if self.again else x


class NNXTanh(nnx.Module):
    def __call__(self, x):
        return nnx.tanh(x)


NAMES = (
    *('act', 'act1', 'act_0', 'act3_2', 'final_act', 'activation', 'Activation_0', 'relu_1'),
    *('relu6', 'ReLU_0', 'PReLU_0', 'prelu', 'LeakyReLU_1', 'leaky_relu', 'gelu', 'GELU_2'),
    *('sigmoid', 'hard_sigmoid', 'Mish_0', 'mish', 'silu', 'Swish', 'ELU', 'selu2', 'tanh'),
)
OTHERS = ('pact', 'act_norm', 'activations', 'relu_conv', 'react', 'fact1', 'normalize', 'elusive')


def nonlinearities(*names, again=()):
    module = Nonlinearities(names, again)
    x = jnp.ones((2, 4))
    return ns.LinenForward(module), module.init(jax.random.key(0), x), x


def test_nonlinearities_are_known_by_the_usual_names():
    forward, variables, x = nonlinearities(*NAMES, *OTHERS)
    _, tapped = forward(variables, x, taps=('*nonlinearity',))
    assert tuple(tapped) == NAMES
    _, entering = forward(variables, x, taps=('*nonlinearity:in',))
    assert tuple(entering) == tuple(f'{name}:in' for name in NAMES)
    chex.assert_trees_all_equal(tapped['act1'], jnp.tanh(entering['act1:in']))


@pytest.mark.parametrize('pattern', ['*nonlinearity', '*nonlinearity:in'])
def test_no_nonlinearity_is_left_out_without_a_word(pattern):
    forward, variables, x = nonlinearities('act1', 'relu', again=('relu',))
    assert 'act1' in forward(variables, x, taps=('*',))[1]
    sentence = r"^Layer 'relu(:in)?' is a nonlinearity by its name, but runs 2 times.*; give layers"
    with pytest.raises(ns.LayerError, match=sentence):
        forward(variables, x, taps=(pattern,))
    # One of another name may run as often as it likes.
    other, variables, x = nonlinearities('act1', 'squash', again=('squash',))
    assert list(other(variables, x, taps=(pattern,))[1]) == [f'act1{pattern[13:]}']
    for again in (False, True):
        graphdef, state = nnx.split(NNXNonlinearities(again))
        nnx_forward = ns.NNXForward(graphdef)
        if again:
            with pytest.raises(
                ns.LayerError, match=r"'relu_1(:in)?' is a nonlinearity by its name"
            ):
                nnx_forward(state, x, taps=(pattern,))
        else:
            assert len(nnx_forward(state, x, taps=(pattern,))[1]) == 2


class ScannedBody(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return Tanh(name='act')(nn.Dense(4, name='dense')(carry)), None


def test_a_nonlinearity_inside_of_a_scan_is_refused_too():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                ScannedBody, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
            )
            return Tanh(name='act2')(scan(name='stack')(x, None)[0])

    x = jnp.ones((2, 4))
    variables = Scanned().init(jax.random.key(0), x)
    with pytest.raises(ns.LayerError, match=r"'stack/act' is a nonlinearity .* lifted transform"):
        ns.LinenForward(Scanned())(variables, x, taps=('*nonlinearity',))


def test_users_own_sown_values_do_not_collide():
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(3, name='out')(x)
            self.sow('intermediates', 'h', h)
            return h

    variables = {'params': Sower().init(jax.random.key(0), X)['params']}
    logits, tapped = ns.LinenForward(Sower())(variables, X, taps=('out',))
    chex.assert_trees_all_equal(tapped['out'], logits)


def test_modules_with_lists_and_dicts_in_their_fields_work():
    class Branches(nn.Module):
        branches: dict

        def __call__(self, x):
            return self.branches['a'](x) + self.branches['b'](x)

    shared = nn.Dense(4)
    module = nn.Sequential([Branches({'a': shared, 'b': nn.Dense(4)}), nn.relu, nn.Dense(2)])
    variables = module.init(jax.random.key(0), X)
    forward = ns.LinenForward(module)
    assert hash(forward) == hash(ns.LinenForward(module))
    logits, tapped = forward(variables, X, taps=('layers_0', 'layers_2'))
    chex.assert_trees_all_equal(logits, tapped['layers_2'], module.apply(variables, X))

    tied = nn.Sequential([shared, nn.Sequential([shared])])
    x = X[:, :4]
    variables = tied.init(jax.random.key(0), x)
    assert len(variables['params']) == 1, 'the two places share one kernel'
    chex.assert_trees_all_equal(ns.LinenForward(tied)(variables, x)[0], tied.apply(variables, x))


def test_unhashable_module_is_refused_at_once():
    class Unhashable(nn.Module):
        sizes: object

        def __call__(self, x):
            return x

    with pytest.raises(TypeError, match=r'Unhashable cannot be hashed.*tuples'):
        ns.LinenForward(Unhashable(np.ones(2)))


def test_edit_keeps_the_dtype_of_the_activation():
    module = nn.Sequential([nn.Dense(4, dtype=jnp.bfloat16), nn.Dense(2, dtype=jnp.bfloat16)])
    variables = module.init(jax.random.key(0), X)
    forward = ns.LinenForward(module)
    wide = {'layers_0': lambda h: h.astype(jnp.float32) + 1}
    _, tapped = forward(variables, X, edits=wide, taps=('layers_0', 'layers_1'))
    assert tapped['layers_0'].dtype == tapped['layers_1'].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ('taps', 'asked'),
    [
        ((), ''),
        (('act1', 'head:in'), 'act1 head:in'),
        (('*',), 'act1 head'),
        (('*:in',), 'act1:in head:in'),
        (('*nonlinearity', 'head'), 'act1 head'),
        (('*nonlinearity:in',), 'act1:in'),
    ],
)
def test_what_taps_ask_for_is_known_without_a_model(taps, asked):
    layers = ('act1', 'act1:in', 'head', 'head:in')
    assert [name for name in layers if is_asked(name, taps)] == asked.split()
