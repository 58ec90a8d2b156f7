"""Black-box attacks with images made for another model (Papernot et al. 2016).

See https://arxiv.org/abs/1605.07277.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens.attacks.losses import label_margin
from neurosens.attacks.objective import drawn_logits
from neurosens.attacks.pgd import pgd
from neurosens.attacks.result import AttackResult, fooled
from neurosens.attacks.threat import Threat
from neurosens.forward import Forward, Variables


def transfer(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    surrogate: Forward,
    surrogate_variables: Variables,
    attack: Callable[..., AttackResult] = pgd,
    target: Int[Array, ' batch'] | None = None,
    index: Int[Array, ' batch'] | None = None,
    **options: Any,
) -> AttackResult:
    """Attacks a model with the images that an attack finds against another one.

    Neither gradients nor logits of the model are used: what hides them does not help it here.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the attack.
      threat: the perturbations allowed.
      surrogate: the model that is attacked in its place, of the same classes.
      surrogate_variables: its variables.
      attack: an attack of this package on the surrogate. Images that the surrogate misclassifies
        already (with a target, by most attacks: takes for it) it leaves as they are.
      target: classes aimed at `[B]`, if the attack takes them; success is then to be classified as
        them.
      index: identity of each example `[B]`; by default its place in this batch.
      **options: further arguments of the attack.

    Returns:
      Per example the image found, whether the model misclassifies it, and its margin there; images
      that the model misclassifies already (with a target: classifies as it) come back unchanged.
      Queries are forward passes of the model, one without attack and one with.

    Raises:
      ValueError: an argument of the attack is wrong.
    """
    if target is not None:
        options['target'] = target = jnp.asarray(target)
    found = attack(surrogate, surrogate_variables, x, y, key, threat=threat, index=index, **options)
    x, y = jnp.asarray(x), jnp.asarray(y)
    index = jnp.arange(len(y)) if index is None else jnp.asarray(index)
    return _judge(forward, variables, x, found.x_adv, y, target, key, index)


@jax.jit
def _judge(
    forward: Forward,
    variables: Variables,
    x: Array,
    x_adv: Array,
    y: Array,
    target: Array | None,
    key: PRNGKeyArray,
    index: Array,
) -> AttackResult:
    before, after = (drawn_logits(forward, variables, each, key, index) for each in (x, x_adv))
    wrong = jax.vmap(fooled)(before, y, target)
    logits = jnp.where(wrong[:, None], before, after)
    kept = wrong.reshape(-1, *[1] * (x.ndim - 1))
    return AttackResult(
        jnp.where(kept, x, x_adv),
        jax.vmap(fooled)(logits, y, target),
        jax.vmap(label_margin)(logits, y),
        jnp.full(y.shape, 2, jnp.int32),
    )
