"""Training that leaves some parameters as they are, such as those of layers found fragile.

Selective re-training follows Pravin et al. 2024, "Fragility, Robustness and Antifragility in Deep
Learning" (https://arxiv.org/abs/2312.09821): layers that synaptic filtering calls fragile are
frozen and the others trained on. The control, equally many parameters drawn at random, is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from neurosens import _validate
from neurosens.forward import Variables
from neurosens.models import BatchNorm

Choice = Callable[[optax.Params], PyTree]


class FrozenState(NamedTuple):
    """State of `freeze`.

    Attributes:
      inner: state of the rule.
      frozen: what the choice returned.
    """

    inner: optax.OptState
    frozen: PyTree


def freeze(rule: optax.GradientTransformation, choice: Choice) -> optax.GradientTransformation:
    """A rule of which frozen parameters see nothing: no gradient, decay, or update.

    Args:
      rule: the gradient transformation.
      choice: from parameters to what is frozen, a tree of the same structure, of bool arrays that
        broadcast to the parameters; see `layers` and `as_many_at_random`.

    Returns:
      The transformation. Its state holds the choice, made once.
    """

    def thaw(updates: optax.Updates, frozen: PyTree) -> optax.Updates:
        return jax.tree.map(
            lambda update, still: jnp.where(still, jnp.zeros_like(update), update), updates, frozen
        )

    def init(parameters: optax.Params) -> FrozenState:
        return FrozenState(rule.init(parameters), choice(parameters))

    def update(
        updates: optax.Updates, state: FrozenState, parameters: optax.Params | None = None
    ) -> tuple[optax.Updates, FrozenState]:
        updates, inner = rule.update(thaw(updates, state.frozen), state.inner, parameters)
        return thaw(updates, state.frozen), FrozenState(inner, state.frozen)

    return optax.GradientTransformation(init, update)


def layers(parameters: optax.Params, names: Sequence[str]) -> PyTree:
    """Chooses all parameters of some layers.

    Args:
      parameters: nested dicts of arrays.
      names: layers such as `'conv1'` or `'stage1_block1'`, with all that is inside them.

    Returns:
      A tree of bool scalars, one for each array.

    Raises:
      ValueError: a layer has no parameters.
    """
    owners = jax.tree_util.tree_map_with_path(lambda path, _: _owners(path), parameters)
    _check_known('layer with parameters', names, owners)
    chosen = set(names)
    return jax.tree.map(
        lambda found: jnp.array(not chosen.isdisjoint(found)), owners, is_leaf=_is_names
    )


def check_statistics(variables: Variables, names: Sequence[str]) -> None:
    """Checks the names of layers whose running statistics are to stay.

    Args:
      variables: of the model, or their shapes.
      names: layers such as `'norm1'` or `'stage1_block1'`, with all that is inside them.

    Raises:
      ValueError: a layer has no running statistics.
    """
    statistics = variables.get('batch_stats', {})
    owners = jax.tree_util.tree_map_with_path(lambda path, _: _owners(path), statistics)
    _check_known('layer with running statistics', names, owners)


@contextlib.contextmanager
def kept_statistics(names: Sequence[str]) -> Iterator[None]:
    """Where modules are called, batch normalisations of some layers act as in evaluation.

    They normalise by their running statistics, and leave them as they are.

    Args:
      names: layers, with all that is inside them, whose normalisations are
        `neurosens.models.BatchNorm`, or `flax.linen.BatchNorm` that are told by their call whether
        to use running averages.
    """
    chosen = set(names)

    def intercept(call: Callable[..., Any], arguments: Any, keywords: Any, context: Any) -> Any:
        kinds = (BatchNorm, nn.BatchNorm)
        called = isinstance(context.module, kinds) and context.method_name == '__call__'
        if called and not chosen.isdisjoint(_prefixes(context.module.path)):
            keywords = {**keywords, 'use_running_average': True}
        return call(*arguments, **keywords)

    with nn.intercept_methods(intercept):
        yield


def as_many_at_random(parameters: optax.Params, frozen: PyTree, key: PRNGKeyArray) -> PyTree:
    """Chooses single parameters at random, exactly as many as another choice.

    Args:
      parameters: nested dicts of arrays.
      frozen: the other choice.
      key: randomness.

    Returns:
      A tree of bool arrays, of the parameters' shapes.
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(parameters)]
    count = sum(
        jnp.broadcast_to(still, leaf.shape).sum()
        for leaf, still in zip(jax.tree.leaves(parameters), jax.tree.leaves(frozen))
    )
    places = jax.random.permutation(key, sum(sizes))
    chosen: Array = places < count
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = [
        chosen[start : start + leaf.size].reshape(leaf.shape)
        for start, leaf in zip(starts, jax.tree.leaves(parameters))
    ]
    return jax.tree.unflatten(jax.tree.structure(parameters), parts)


def _owners(path: tuple) -> tuple[str, ...]:
    """The layers that a parameter belongs to, from the outermost to its own."""
    return _prefixes([str(entry.key) for entry in path[:-1]])


def _prefixes(names: Sequence[str]) -> tuple[str, ...]:
    return tuple('/'.join(names[: depth + 1]) for depth in range(len(names)))


def _check_known(kind: str, names: Sequence[str], owners: PyTree) -> None:
    known = sorted({owner for found in _leaves(owners) for owner in found})
    for name in names:
        if name not in known:
            raise ValueError(_validate.unknown(kind, name, known))


def _is_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _leaves(owners: PyTree) -> list[tuple[str, ...]]:
    return jax.tree.leaves(owners, is_leaf=_is_names)
