"""The ReLU of the bundled networks against Flax's, and what it is for."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens.models.common import ACTIVATIONS, relu

VALUES = np.asarray([-np.inf, -2.0, -0.0, 0.0, 1e-45, 3.0, np.inf, np.nan], np.float32)


def test_it_is_the_relu_by_name():
    assert ACTIVATIONS['relu'] is relu


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_and_derivatives_are_those_of_flax(dtype):
    x = jnp.asarray(VALUES, dtype)
    both = [(f(x), jax.jvp(f, (x,), (x + 1,)), jax.vjp(f, x)[1](x + 1)) for f in (relu, nn.relu)]
    chex.assert_trees_all_equal(*both)
    chex.assert_trees_all_equal_dtypes(*both)
    assert jnp.isnan(relu(x)[-1])


def test_second_derivatives_are_those_of_flax():
    x, weights = jax.random.normal(jax.random.key(0), (2, 50))
    loss = lambda f: lambda x: (f(weights * x) ** 3).sum()  # noqa: E731
    hessians = [jax.jit(jax.hessian(loss(f)))(x) for f in (relu, nn.relu)]
    chex.assert_trees_all_close(*hessians, rtol=1e-5)
    forward = [jax.jvp(jax.grad(loss(f)), (x,), (weights,))[1] for f in (relu, nn.relu)]
    chex.assert_trees_all_close(*forward, rtol=1e-5)


def test_sums_of_residual_blocks_are_read_once():
    """With the other, each block is computed again from all that came before it."""
    kernels = jax.random.normal(jax.random.key(0), (6, 64, 64)) / 8
    x = jax.random.normal(jax.random.key(1), (1024, 64))

    def read(function):
        def loss(x):
            for kernel in kernels:
                x = function(x + x @ kernel)
            return (x * x).sum()

        program = jax.jit(jax.grad(loss), compiler_options={'xla_backend_optimization_level': 2})
        return program.lower(x).compile().cost_analysis()['bytes accessed']

    assert read(relu) < 0.9 * read(nn.relu)
