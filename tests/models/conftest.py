"""Shape-level traces of models: what they hold and which modules they call, without computing."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from neurosens import models


@dataclasses.dataclass(frozen=True)
class Call:
    """One module call, in the order in which calls begin."""

    path: str
    module: nn.Module
    input: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one forward pass of a model would do."""

    variables: Any
    logits: jax.ShapeDtypeStruct
    calls: tuple[Call, ...]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.variables['params']))

    def of(self, kind: type[nn.Module]) -> list[Call]:
        return [call for call in self.calls if isinstance(call.module, kind)]

    def paths(self, under: str = '') -> list[str]:
        """The paths of the calls below one module, relative to it."""
        prefix = under and f'{under}/'
        return [
            call.path[len(prefix) :]
            for call in self.calls
            if call.path and call.path.startswith(prefix)
        ]

    def __getitem__(self, path: str) -> Call:
        (found,) = [call for call in self.calls if call.path == path]
        return found


def _shape(value: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


@functools.cache
def _trace(name: str, image: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> Trace:
    model = models.create(name, **dict(options))
    calls: list[Call | None] = []

    def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name != '__call__':
            return call(*args, **kwargs)
        position = len(calls)
        calls.append(None)
        output = call(*args, **kwargs)
        path = '/'.join(context.module.path)
        module = context.module.clone(parent=None)
        calls[position] = Call(path, module, _shape(args[0]), _shape(output))
        return output

    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    with nn.intercept_methods(record):
        logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    return Trace(variables, logits, tuple(calls))


@pytest.fixture(scope='session')
def trace() -> Callable[..., Trace]:
    """Traces a model by name on two images of one shape; repeated traces are free."""

    def trace(name: str, image: tuple[int, ...] = (32, 32, 3), **options: Any) -> Trace:
        defaults = {'num_classes': 10, 'dtype': 'float32', 'activation': 'relu'}
        return _trace(name, image, tuple(sorted({**defaults, **options}.items())))

    return trace
