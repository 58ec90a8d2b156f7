"""Two models to attack: a small network, and a linear one whose weakest points are known."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models
from neurosens.forward import LinenForward

BATCH = 16


@dataclasses.dataclass(frozen=True)
class Setting:
    """A small network and images, half of them with the label that it gives them."""

    forward: LinenForward
    variables: dict
    x: jax.Array
    y: jax.Array
    logits: jax.Array

    @property
    def correct(self):
        return np.asarray(self.logits.argmax(-1) == self.y)


@pytest.fixture(scope='session')
def net():
    module = models.create('cnn', num_classes=4, features=(3,), hidden=(8,))
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.uniform(keys[0], (BATCH, 6, 6, 1))
    variables = jax.jit(module.init)(keys[1], x)
    # A sharper network, so that images differ in what it takes to fool them.
    variables = jax.tree.map(lambda leaf: 2 * leaf, variables)
    forward = LinenForward(module, {'train': False})
    logits = jax.jit(forward)(variables, x)[0]
    other = jax.random.randint(keys[2], (BATCH,), 0, 4)
    y = jnp.where(jnp.arange(BATCH) % 2 == 0, logits.argmax(-1), other)
    return Setting(forward, variables, x, y, logits)


class Linear(nn.Module):
    """Two classes, one linear layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name='head')(x.reshape(len(x), -1))


@pytest.fixture(scope='session')
def linear_forward():
    return LinenForward(Linear())


@pytest.fixture(scope='session')
def linear():
    """A linear problem whose images are classified correctly, away from any box."""
    generator = np.random.default_rng(0)
    kernel = 0.3 * generator.normal(size=(12, 2)).astype(np.float32)
    x = generator.normal(size=(8, 3, 4)).astype(np.float32)
    variables = {'params': {'head': {'kernel': kernel, 'bias': np.zeros(2, np.float32)}}}
    logits = x.reshape(8, -1) @ kernel
    y = logits.argmax(-1).astype(np.int32)
    weight = kernel[:, 0] - kernel[:, 1]
    return variables, x, y, np.float64(weight), np.abs(logits[:, 0] - logits[:, 1])
