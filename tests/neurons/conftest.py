"""A small network and images that the tests of neuron measures share."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurosens import models, parallel
from neurosens.forward import LinenForward, NNXForward

Net = collections.namedtuple('Net', 'forward variables x y module')


@pytest.fixture(scope='session')
def small_net():
    """A convolutional network with 4 and 6 filters, 12 hidden neurons and 5 classes; 16 images."""
    module = models.create('cnn', num_classes=5, features=(4, 6), hidden=(12,))
    x = jax.random.uniform(jax.random.key(1), (16, 8, 8, 1))
    variables = jax.jit(module.init)(jax.random.key(0), x[:1])
    y = (np.arange(16) % 5).astype(np.int32)
    return Net(LinenForward(module), variables, x, y, module)


@pytest.fixture(scope='session')
def random_variables():
    """Makes variables of a Linen module, without the cost of compiling its initialisation."""

    def make(module, x, seed=0):
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        generator = np.random.default_rng(seed)

        def draw(path, leaf):
            values = generator.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
            if path[-1].key == 'var':
                values = 0.5 + np.abs(values)
            return jnp.asarray(values, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, shapes)

    return make


class Act(nnx.Module):
    """A ReLU that can be addressed by its name."""

    def __call__(self, x):
        return nnx.relu(x)


class Twin(nnx.Module):
    """The architecture of `small_net`, written in NNX with the same names."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), padding=1, rngs=rngs)
        self.dense3 = nnx.Linear(24, 12, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)
        self.act1, self.act2, self.act3 = Act(), Act(), Act()

    def __call__(self, x):
        for conv, act in ((self.conv1, self.act1), (self.conv2, self.act2)):
            x = nnx.max_pool(act(conv(x)), (2, 2), (2, 2))
        return self.head(self.act3(self.dense3(x.reshape(len(x), -1))))


@pytest.fixture(scope='session')
def nnx_net(small_net):
    """The NNX twin of `small_net`, with its weights."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Twin(nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, small_net.variables['params'])
    return small_net._replace(forward=NNXForward(graphdef), variables=state, module=None)


@pytest.fixture(scope='session')
def assert_splits_over_devices():
    """Checks that a function of (variables, batch pytree) is the same, and split, on 8 devices."""

    def check(function, variables, batch, rtol=1e-4, atol=1e-5):
        mesh = parallel.data_mesh()
        placed = parallel.replicate(mesh, variables), parallel.shard(mesh, batch)
        one, eight = (
            jax.jit(function).lower(*arguments).compile()
            for arguments in ((variables, batch), placed)
        )
        alone, together = one(variables, batch), eight(*placed)

        def equal(a, b):
            assert len(b.sharding.device_set) == 8 and not b.is_fully_replicated
            np.testing.assert_allclose(b, a, rtol=rtol, atol=atol)

        jax.tree.map(equal, alone, together)
        program = eight.as_text()
        assert not re.findall(r'all-reduce|all-gather|all-to-all|collective-permute', program)
        # An eighth, and what each device does with the weights alone.
        assert eight.cost_analysis()['flops'] < one.cost_analysis()['flops'] / 4

    return check
