"""Small networks whose Jacobians are known."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from neurosens.forward import LinenForward


class Linear(nn.Module):
    """z = W x + b."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name='head')(x.reshape(len(x), -1))


class TwoLayers(nn.Module):
    """z = W2 f(W1 x + b1) + b2, f a ReLU or the identity."""

    relu: bool = True

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(5, name='dense1')(x.reshape(len(x), -1))
        act = nn.relu if self.relu else lambda h: h
        return nn.Dense(3, name='head')(Activation(act, name='act1')(h))


class ThreeLayers(nn.Module):
    """Two hidden layers of different size."""

    @nn.compact
    def __call__(self, x):
        for k, size in enumerate((5, 3), start=1):
            x = nn.Dense(size, name=f'dense{k}')(x.reshape(len(x), -1))
            x = Activation(nn.tanh, name=f'act{k}')(x)
        return nn.Dense(2, name='head')(x)


class Activation(nn.Module):
    """A nonlinearity as a module."""

    function: object

    def __call__(self, x):
        return self.function(x)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its weights as matrices, and a batch."""

    forward: LinenForward
    variables: dict
    x: np.ndarray
    y: np.ndarray

    def matrix(self, name):
        return np.float64(self.variables['params'][name]['kernel']).T

    def jacobians(self):
        """d logits / d x `[B, C, D]` and the hidden ones `[B, N, D]`, by hand."""
        first, second = self.matrix('dense1'), self.matrix('head')
        flat = np.float64(self.x).reshape(len(self.x), -1)
        bias = np.float64(self.variables['params']['dense1']['bias'])
        on = np.ones((len(flat), 5))
        if self.forward.module.relu:
            on = flat @ first.T + bias > 0
        hidden = on[:, :, None] * first
        return np.einsum('cn,bnd->bcd', second, hidden), hidden


def make(module, batch=6, seed=0):
    random = np.random.default_rng(seed)
    x = random.random((batch, 2, 2, 1)).astype(np.float32)
    variables = module.init(jax.random.key(seed), x)
    # Biases too, so that some neurons are off.
    variables = jax.tree.map(
        lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32), variables
    )
    y = random.integers(0, 3, batch).astype(np.int32)
    return Problem(LinenForward(module), variables, x, y)


@pytest.fixture(scope='session')
def linear():
    return make(Linear())


@pytest.fixture(scope='session')
def relu():
    return make(TwoLayers(relu=True))


@pytest.fixture(scope='session')
def straight():
    return make(TwoLayers(relu=False))


@pytest.fixture(scope='session')
def deep():
    problem = make(ThreeLayers(), batch=4)
    # Layers that are alike would not tell how they are weighted.
    params = dict(problem.variables['params'])
    params['dense2'] = jax.tree.map(lambda leaf: 2 * leaf, params['dense2'])
    return dataclasses.replace(problem, variables={'params': params})
