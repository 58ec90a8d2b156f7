"""A small network and images that the tests of neuron measures share."""

import collections
import re

import jax
import numpy as np
import pytest

from neurosens import models, parallel
from neurosens.forward import LinenForward

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
def assert_splits_over_devices():
    """Checks that a function of (variables, batch pytree) is the same, and local, on 8 devices."""

    def check(function, variables, batch, rtol=1e-4, atol=1e-5):
        mesh = parallel.data_mesh()
        alone = function(variables, batch)
        placed = parallel.replicate(mesh, variables), parallel.shard(mesh, batch)
        together = function(*placed)

        def equal(a, b):
            assert len(b.sharding.device_set) == 8 and not b.is_fully_replicated
            np.testing.assert_allclose(b, a, rtol=rtol, atol=atol)

        jax.tree.map(equal, alone, together)
        program = jax.jit(function).lower(*placed).compile().as_text()
        assert not re.findall(r'all-reduce|all-gather|all-to-all|collective-permute', program)

    return check
