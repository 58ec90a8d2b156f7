"""Adversarial training against several norms at once.

Tramer & Boneh 2019 (the worst of the norms, or their average) and Maini, Wong & Kolter 2020 (one
attack that takes the steepest of their steps). BatchNorm is used as in `adversarial`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import Threat
from neurosens.forward import Variables
from neurosens.training import inner
from neurosens.training.adversarial import (
    absolute_step,
    attacked_logits,
    check_attack,
    cross_entropy,
)
from neurosens.training.objective import Objective, Outcome, refuse_taps, run_training_mode

STRATEGIES = ('max', 'average', 'msd')


def multi_norm(
    *,
    norms: Sequence[str] = ('linf', 'l2', 'l1'),
    eps: Sequence[float] = (8 / 255, 0.5, 12.0),
    steps: int = 10,
    step_size: float = 0.0,
    strategy: str = 'max',
    attack_mode: str = 'eval',
) -> Objective:
    """Cross-entropy on images that attacks of several norms find.

    Args:
      norms: of the threats.
      eps: their radii, in pixels of [0, 1].
      steps: steps of each attack.
      step_size: their length as a share of eps; 0 for 2.5 / steps.
      strategy: `'max'`, for each image the attack of largest loss, `'average'`, all of them (Tramer
        & Boneh 2019), or `'msd'`, one attack that takes, step by step, the norm of largest loss
        (Maini, Wong & Kolter 2020).
      attack_mode: as of `pgd`.

    Returns:
      The objective. Its logits are those of the attacked images, of `'average'` of the last norm,
      whose images are also those that regularizers see with `'attacked'`; it then logs the accuracy
      under each norm too, and their mean.

    Raises:
      ValueError: a choice is unknown, a number out of range, or there are not as many radii as
        norms.
    """
    if not all(
        isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str)
        for given in (norms, eps)
    ):
        raise ValueError(
            f'norms are {norms!r} and eps {eps!r}; both must be lists, with a radius for each norm.'
        )
    if not len(norms) or len(norms) != len(eps):
        raise ValueError(
            f'norms are {tuple(norms)} and eps {tuple(eps)}; give one radius for each norm.'
        )
    for name, radius in zip(norms, eps):
        check_attack(name, radius, steps, step_size, attack_mode)
    _validate.check_choice('strategy', strategy, STRATEGIES)
    norms = list(norms)
    threats = [Threat(name, radius) for name, radius in zip(norms, eps)]
    sizes = [absolute_step(radius, steps, step_size) for radius in eps]

    def objective(
        module: nn.Module,
        variables: Variables,
        x: Array,
        y: Array,
        key: PRNGKeyArray,
        taps: Collection[str] | None = None,
    ) -> tuple[Array, Outcome]:
        refuse_taps(taps)
        start_key, attack_key, loss_key = jax.random.split(key, 3)
        seen = attacked_logits(module, jax.lax.stop_gradient(variables), attack_mode, attack_key)

        def loss(images: Array) -> Array:
            return cross_entropy(seen(images), y)

        if strategy == 'msd':
            found = [
                inner.maximize_steepest(loss, x, threats=threats, steps=steps, step_sizes=sizes)
            ]
        else:
            found = [
                inner.maximize(
                    loss,
                    x,
                    inner.start(threat, x, own),
                    threat=threat,
                    steps=steps,
                    step_size=size,
                )
                for threat, size, own in zip(
                    threats, sizes, jax.random.split(start_key, len(threats))
                )
            ]
        if strategy == 'max':
            tried = jnp.stack(found)
            worst = jax.lax.map(loss, tried).argmax(0)
            rows = worst.reshape(1, -1, *[1] * (x.ndim - 1))
            found = [jnp.take_along_axis(tried, rows, axis=0)[0]]
        terms, accuracies = {}, {}
        updates: Mapping[str, Any] = {}
        for number, x_adv in enumerate(found):
            attacked, updates = run_training_mode(
                module,
                {**variables, **updates},
                x_adv,
                jax.random.fold_in(loss_key, number),
            )
            # Radii of one norm may be several.
            name = norms[number] if norms.count(norms[number]) == 1 else f'{norms[number]}_{number}'
            terms[name] = cross_entropy(attacked, y).mean() / len(found)
            accuracies[name] = (attacked.argmax(-1) == y).mean()
        several = terms if len(terms) > 1 else {}
        total = sum(accuracies.values(), start=jnp.zeros(()))
        metrics = {'attacked_accuracy': total / len(accuracies)}
        if several:
            metrics |= {f'attacked_accuracy/{name}': value for name, value in accuracies.items()}
        outcome = Outcome(attacked, updates, metrics, attacked=found[-1], terms=several)
        return sum(terms.values(), start=jnp.zeros(())), outcome

    return objective
