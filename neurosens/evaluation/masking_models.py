"""Other versions of a model whose gradients may be better: straight through, and in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from neurosens.attacks import RandomForward, straight_through
from neurosens.defenses.inverse_perturbation import InverseForward
from neurosens.forward import (
    EditedForward,
    Forward,
    LinenForward,
    TransformedForward,
    Variables,
)

TRANSFORMS, EDITS = 'transforms', 'edits'
_WRAPPERS = (TransformedForward, EditedForward, InverseForward, RandomForward)


def straight_forward(forward: Forward, kind: str) -> tuple[Forward, int]:
    """A forward whose transforms or edits have the derivative of the identity.

    Wrappers are found at any depth, also inside of what a `RandomForward` draws and inside of
    wrappers that are pytrees; what a model does inside of its modules is not. A function that
    changes the shape, or returns no floating-point numbers, keeps its own derivative. An inverse
    perturbation takes its own straight-through gradients.

    Args:
      forward: any forward.
      kind: `'transforms'` (of inputs) or `'edits'` (of activations).

    Returns:
      The forward, of the same values, and how many functions were replaced.
    """
    count = 0

    def replace(node: Any) -> Any:
        nonlocal count
        if isinstance(node, RandomForward):
            count += straight_forward(node.draw(node.key), kind)[1]
            draw = jax.tree_util.Partial(_DRAWS[kind], node.draw)
            return dataclasses.replace(node, draw=draw)
        if not isinstance(node, (TransformedForward, EditedForward, InverseForward)):
            return node
        inner, found = straight_forward(node.forward, kind)
        count += found
        if isinstance(node, InverseForward):
            if kind != TRANSFORMS:
                return dataclasses.replace(node, forward=inner)
            count += 1
            return dataclasses.replace(node, forward=inner, gradient='straight_through')
        if isinstance(node, TransformedForward):
            if kind == TRANSFORMS:
                count += 1
                return TransformedForward(inner, _straight(node.transform))
            return TransformedForward(inner, node.transform)
        edits = node.edits
        if kind == EDITS:
            count += len(edits)
            edits = {name: _straight(edit) for name, edit in edits.items()}
        return EditedForward(inner, edits)

    replaced = jax.tree.map(replace, forward, is_leaf=lambda node: isinstance(node, _WRAPPERS))
    return replaced, count


def _straight(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    # A Partial keeps the arrays of the function as leaves, so that other ones compile nothing anew.
    return jax.tree_util.Partial(_call_straight, function)


def _call_straight(function: Callable[[Array], Array], x: Array) -> Array:
    out = jax.eval_shape(function, x)
    if out.shape != x.shape or not jnp.issubdtype(out.dtype, jnp.floating):
        return function(x)
    return straight_through(function, lambda x: x.astype(out.dtype))(x)


def _draw_transforms(draw: Callable[[PRNGKeyArray], Forward], key: PRNGKeyArray) -> Forward:
    return straight_forward(draw(key), TRANSFORMS)[0]


def _draw_edits(draw: Callable[[PRNGKeyArray], Forward], key: PRNGKeyArray) -> Forward:
    return straight_forward(draw(key), EDITS)[0]


_DRAWS = {TRANSFORMS: _draw_transforms, EDITS: _draw_edits}


def float64_forward(
    forward: Forward, variables: Variables, x: Float[np.ndarray, 'batch ...']
) -> tuple[Forward, Variables] | None:
    """A model in double precision; call it, and use what it returns, inside `jax.enable_x64(True)`.

    Its arrays become float64, and so does the `dtype` of Linen modules that have one.

    Args:
      forward: any forward.
      variables: its variables.
      x: images `[B, ...]`.

    Returns:
      A forward and its variables; None where the model still casts a float64 value to a narrower
      type on the way, or cannot be traced in float64.
    """
    wide = jax.tree.map(_widened, forward, is_leaf=lambda node: isinstance(node, LinenForward))
    wide, variables = _float64((wide, variables))
    image = jax.ShapeDtypeStruct((1, *x.shape[1:]), np.float64)
    try:
        closed = jax.make_jaxpr(lambda variables, x: wide(variables, x)[0])(variables, image)
    except (TypeError, ValueError):
        return None
    return None if _narrows(closed.jaxpr) else (wide, variables)


def _widened(node: Any) -> Any:
    if not isinstance(node, LinenForward):
        return node
    dtype = getattr(node.module, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return node
    return dataclasses.replace(node, module=node.module.clone(dtype=jnp.float64))


@jax.jit
def _float64(tree: Any) -> Any:
    def convert(leaf: Array) -> Array:
        return leaf.astype(jnp.float64) if _is_floating(leaf) else leaf

    return jax.tree.map(convert, tree)


def _is_floating(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _narrows(jaxpr: jex.Jaxpr) -> bool:
    """Whether an equation, at any depth, makes a narrower float of a float64."""
    for equation in jaxpr.eqns:
        inner = list(jex.jaxprs_in_params(equation.params))
        if inner:
            if any(map(_narrows, inner)):
                return True
            continue
        wide = any(getattr(atom.aval, 'dtype', None) == np.float64 for atom in equation.invars)
        outputs = [
            variable.aval for variable in equation.outvars if hasattr(variable.aval, 'dtype')
        ]
        if wide and any(_is_floating(aval) and aval.dtype != np.float64 for aval in outputs):
            return True
    return False
