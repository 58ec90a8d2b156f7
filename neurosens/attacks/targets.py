"""Which class a targeted attack aims at."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks.objective import drawn_logits
from neurosens.forward import Forward, Variables

TARGETS = ('most_likely', 'least_likely', 'random')


def target_classes(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    kind: str,
    index: Int[Array, ' batch'] | None = None,
) -> Int[Array, ' batch']:
    """Chooses a class other than the label for each image to be taken for, jit-compiled.

    The easiest, the hardest, and one between (Carlini & Wagner 2017, section III-C, whose easiest
    and hardest are found by attacking every class).

    Args:
      forward: the model, whose logits of the clean images decide.
      variables: its variables.
      x: images `[B, ...]`.
      y: labels `[B]`.
      key: randomness of `'random'`, and of a random model.
      kind: `'most_likely'` or `'least_likely'` of the other classes by their logits, or `'random'`,
        any of them with the same probability.
      index: identity of each example `[B]`, which its random class follows; by default its place
        in this batch.

    Returns:
      The classes, int32 `[B]`.

    Raises:
      ValueError: `kind` is unknown, or there is one class only.
    """
    if kind not in TARGETS:
        raise ValueError(_validate.unknown('kind', kind, TARGETS))
    if index is None:
        index = jnp.arange(len(y))
    return _chosen(forward, variables, x, jnp.asarray(y), key, jnp.asarray(index), kind)


@functools.partial(jax.jit, static_argnames='kind')
def _chosen(
    forward: Forward, variables: Variables, x: Array, y: Array, key: Array, index: Array, kind: str
) -> Array:
    logits = drawn_logits(forward, variables, x, key, index)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f'The model has {classes} class, and none to aim at beside the label.')
    if kind == 'random':
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        others = jax.vmap(lambda own: jax.random.randint(own, (), 0, classes - 1))(keys)
        return others + (others >= y)
    own = jnp.arange(classes) == y[:, None]
    if kind == 'most_likely':
        return jnp.where(own, -jnp.inf, logits).argmax(-1).astype(jnp.int32)
    return jnp.where(own, jnp.inf, logits).argmin(-1).astype(jnp.int32)
