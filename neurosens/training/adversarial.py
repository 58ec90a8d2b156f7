"""Adversarial objectives: what is minimised on images that an attack finds during training.

Madry et al. 2018 (PGD), Wong, Rice & Kolter 2020 (FGSM from a random start), Shafahi et al. 2019
(free), Zhang et al. 2019 (TRADES), Wang et al. 2020 (MART), Wu, Xia & Wang 2020 (adversarial weight
perturbation); against several norms see `multi_norm`.

BatchNorm: losses are taken with the statistics of their batch, clean and attacked images apart;
each forward pass updates the running statistics, the attacked images last. The attack sees running
statistics (`attack_mode='eval'`) or those of the batch, without updating any (`'train'`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import Threat
from neurosens.attacks.threat import DUAL
from neurosens.forward import LinenForward, Variables
from neurosens.training import inner
from neurosens.training.objective import (
    Objective,
    Outcome,
    Replayed,
    refuse_taps,
    run_training_mode,
    tap_training_mode,
)

ATTACK_MODES = ('eval', 'train')

Logits = Callable[[Array], Float[Array, 'batch classes']]
# Guards of the released program of MART.
_TINY, _ABOVE_ONE = 1e-12, 1.0001


def attacked_logits(module: nn.Module, variables: Variables, mode: str, key: Array) -> Logits:
    """The model as an attack of training sees it.

    Args:
      module: the model.
      variables: its variables, without derivatives.
      mode: one of `ATTACK_MODES`.
      key: of dropout in training mode.

    Returns:
      From images `[B, ...]` to logits `[B, K]`.
    """
    if mode == 'eval':
        forward = LinenForward(module, {'train': False})
        return lambda x: forward(variables, x)[0]
    return lambda x: run_training_mode(module, variables, x, key)[0]


def cross_entropy(logits: Array, y: Array) -> Float[Array, ' batch']:
    """Cross-entropy of each image."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def divergence(clean: Array, attacked: Array) -> Float[Array, ' batch']:
    """KL(softmax(clean) || softmax(attacked)) of each image."""
    clean, attacked = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
    return (jnp.exp(clean) * (clean - attacked)).sum(-1)


def absolute_step(eps: float, steps: int, share: float) -> float:
    """Length of a step of an attack.

    Args:
      eps: radius.
      steps: number of steps.
      share: length as a share of eps; 0 stands for 2.5 / steps.

    Returns:
      The length in the units of eps.
    """
    return eps * (share or 2.5 / steps)


def check_attack(norm: str, eps: float, steps: int, step_size: float, mode: str) -> None:
    """Checks the settings of an attack of training.

    Args:
      norm: of the threat.
      eps: its radius.
      steps: number of steps.
      step_size: their length as a share of eps.
      mode: what BatchNorm and dropout do in the attack.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    _validate.check_choice('norm', norm, DUAL)
    _validate.check_choice('attack_mode', mode, ATTACK_MODES)
    _validate.check_range('eps', eps, low=0)
    _validate.check_whole('steps', steps)
    _validate.check_range('step_size', step_size, low=0)


def _metrics(clean: Array | None, attacked: Array, y: Array) -> dict[str, Array]:
    found = {'attacked_accuracy': (attacked.argmax(-1) == y).mean()}
    if clean is not None:
        found['clean_accuracy'] = (clean.argmax(-1) == y).mean()
    return found


def weight_perturbation(loss: Callable[[Any], Float[Array, '']], params: Any, gamma: float) -> Any:
    """The worst small change of the weights (Wu, Xia & Wang 2020, one step).

    Args:
      loss: of the parameters.
      params: the parameters.
      gamma: size of the change of each array of more than one dimension, relative to its norm.

    Returns:
      The changed parameters; gradients with respect to them are those with respect to the given.
    """
    gradient = jax.grad(loss)(jax.lax.stop_gradient(params))

    def change(weights: Array, slope: Array) -> Array:
        if weights.ndim < 2:
            return weights
        size = jnp.linalg.norm(slope.ravel())
        step = gamma * jnp.linalg.norm(weights.ravel()) / jnp.where(size > 0, size, 1.0) * slope
        return weights + jax.lax.stop_gradient(step)

    return jax.tree.map(change, params, gradient)


def _against_one_threat(
    *,
    norm: str,
    eps: float,
    steps: int,
    step_size: float,
    attack_mode: str,
    weight_gamma: float,
    start: Callable[[Threat, Array, PRNGKeyArray], Array],
    aim: Callable[[Logits, Array, Array], inner.BatchLoss],
    loss: Callable[[Array | None, Array, Array], dict[str, Array]],
    clean_pass: bool = True,
) -> Objective:
    """An objective of clean images and of those that one attack finds.

    Args:
      norm: as of `pgd`, like the next five.
      eps: radius.
      steps: steps of the attack.
      step_size: their length as a share of eps.
      attack_mode: what BatchNorm and dropout do in the attack.
      weight_gamma: size of adversarial weight perturbation.
      start: from the threat, clean images and a key to where the attack starts.
      aim: from the model as the attack sees it, clean images and labels to what it raises.
      loss: from clean logits, those of attacked images and labels to the terms of what is
        minimised, by name.
      clean_pass: whether clean images are run for the loss; without, their logits are None.

    Returns:
      The objective.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    check_attack(norm, eps, steps, step_size, attack_mode)
    _validate.check_range('weight_gamma', weight_gamma, low=0)
    threat = Threat(norm, eps)

    def objective(
        module: nn.Module,
        variables: Variables,
        x: Array,
        y: Array,
        key: PRNGKeyArray,
        taps: Collection[str] | None = None,
    ) -> tuple[Array, Outcome]:
        if not clean_pass:
            refuse_taps(taps)
        if taps is not None and weight_gamma:
            raise ValueError(
                "A regularizer with 'shared' would see a model of perturbed weights; leave out "
                "'shared' or weight_gamma."
            )
        start_key, attack_key, clean_key, loss_key = jax.random.split(key, 4)
        seen = attacked_logits(module, jax.lax.stop_gradient(variables), attack_mode, attack_key)
        # What is attacked has no derivatives: those of a shared pass are of the clean images alone.
        fixed = jax.lax.stop_gradient(x)
        x_adv = inner.maximize(
            aim(seen, fixed, y),
            fixed,
            start(threat, fixed, start_key),
            threat=threat,
            steps=steps,
            step_size=absolute_step(eps, steps, step_size),
        )

        def total(
            variables: Variables,
        ) -> tuple[Array, tuple[dict[str, Array], Array | None, Array, Any, dict[str, Array]]]:
            clean: Array | None = None
            tapped: dict[str, Array] = {}
            if clean_pass:
                clean, tapped, changed = tap_training_mode(
                    module, variables, x, clean_key, taps or ()
                )
                variables = {**variables, **changed}
            attacked, updates = run_training_mode(module, variables, x_adv, loss_key)
            terms = loss(clean, attacked, y)
            value = sum(terms.values(), start=jnp.zeros(()))
            return value, (terms, clean, attacked, updates, tapped)

        if weight_gamma:
            params = weight_perturbation(
                lambda params: total({**variables, 'params': params})[0],
                variables['params'],
                weight_gamma,
            )
            variables = {**variables, 'params': params}
        value, (terms, clean, attacked, updates, tapped) = total(variables)
        metrics = _metrics(clean, attacked, y)
        several = terms if len(terms) > 1 else {}
        return value, Outcome(attacked, updates, metrics, tapped, clean, x_adv, several)

    return objective


def _near(threat: Threat, x: Array, key: PRNGKeyArray) -> Array:
    """Clean images plus a little noise: at the clean image a divergence has no gradient."""
    del threat
    return x + 1e-3 * jax.random.normal(key, x.shape, x.dtype)


def _higher_cross_entropy(seen: Logits, x: Array, y: Array) -> inner.BatchLoss:
    del x
    return lambda images: cross_entropy(seen(images), y)


def _farther_from_clean(seen: Logits, x: Array, y: Array) -> inner.BatchLoss:
    del y
    reference = seen(x)
    return lambda images: divergence(reference, seen(images))


def pgd(
    *,
    norm: str = 'linf',
    eps: float = 8 / 255,
    steps: int = 7,
    step_size: float = 0.0,
    random_start: bool = True,
    attack_mode: str = 'eval',
    clean_share: float = 0.0,
    weight_gamma: float = 0.0,
) -> Objective:
    """Cross-entropy on images that PGD finds (Madry et al. 2018).

    Args:
      norm: of the threat, `'linf'`, `'l2'` or `'l1'`.
      eps: its radius, in pixels of [0, 1].
      steps: steps of PGD.
      step_size: their length as a share of eps; 0 for 2.5 / steps.
      random_start: start at a random image of the ball, not at the clean one.
      attack_mode: `'eval'` or `'train'`, what BatchNorm and dropout do in the attack.
      clean_share: share of the loss that clean images have, between 0 and 1.
      weight_gamma: size of adversarial weight perturbation relative to the weights' norm; 0 for
        none, 0.005 in its paper.

    Returns:
      The objective. Its logits, from which the accuracy is taken, are those of the attacked images.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    _validate.check_range('clean_share', clean_share, low=0, high=1)
    _validate.check_flag('random_start', random_start)

    def loss(clean: Array | None, attacked: Array, y: Array) -> dict[str, Array]:
        terms = {'attacked': (1 - clean_share) * cross_entropy(attacked, y).mean()}
        if clean is not None:
            terms['clean'] = clean_share * cross_entropy(clean, y).mean()
        return terms

    return _against_one_threat(
        norm=norm,
        eps=eps,
        steps=steps,
        step_size=step_size,
        attack_mode=attack_mode,
        weight_gamma=weight_gamma,
        start=inner.start if random_start else lambda threat, x, key: x,
        aim=_higher_cross_entropy,
        loss=loss,
        clean_pass=clean_share > 0,
    )


def fgsm_rs(
    *,
    norm: str = 'linf',
    eps: float = 8 / 255,
    step_size: float = 1.25,
    attack_mode: str = 'eval',
) -> Objective:
    """Cross-entropy on images of one step from a random start (Wong, Rice & Kolter 2020).

    It can overfit to that step from one epoch to the next, after which PGD breaks everything: set
    `monitor.guard` of the config, which watches the accuracy under PGD.

    Args:
      norm: of the threat.
      eps: its radius, in pixels of [0, 1].
      step_size: length of the step as a share of eps, above 0.
      attack_mode: as of `pgd`.

    Returns:
      The objective.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    # 0 would stand for 2.5 there.
    _validate.check_range('step_size', step_size, low=0, low_open=True)
    return pgd(norm=norm, eps=eps, steps=1, step_size=step_size, attack_mode=attack_mode)


def free(
    *,
    norm: str = 'linf',
    eps: float = 8 / 255,
    step_size: float = 1.0,
    replays: int = 8,
) -> Replayed:
    """Cross-entropy on images that are attacked as they are learnt (Shafahi et al. 2019).

    A step of training costs hardly more than a plain one and is one step of the attack too. Each
    batch is taken `replays` times, and steps and epochs count replays: as many of them cost as much
    as in plain training, and see `1 / replays` of the images.

    Args:
      norm: of the threat.
      eps: its radius, in pixels of [0, 1].
      step_size: length of a step of the attack as a share of eps; 1 in the paper.
      replays: times in a row that each batch is taken; 8 in the paper for CIFAR-10, 4 for ImageNet.

    Returns:
      The objective. Its logits are those of the attacked images.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    check_attack(norm, eps, 1, step_size, 'train')
    _validate.check_range('step_size', step_size, low=0, low_open=True)
    _validate.check_whole('replays', replays)

    def objective(
        module: nn.Module,
        variables: Variables,
        x: Array,
        y: Array,
        key: PRNGKeyArray,
        taps: Collection[str] | None = None,
    ) -> tuple[Array, Outcome]:
        refuse_taps(taps)
        attacked, updates = run_training_mode(module, variables, x, key)
        loss = cross_entropy(attacked, y).mean()
        return loss, Outcome(attacked, updates, _metrics(None, attacked, y))

    return Replayed(objective, Threat(norm, eps), eps * step_size, replays)


def trades(
    *,
    norm: str = 'linf',
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float = 0.0,
    beta: float = 6.0,
    attack_mode: str = 'eval',
    weight_gamma: float = 0.0,
) -> Objective:
    """CE(f(x), y) + beta KL(f(x) || f(x')) (Zhang et al. 2019), x' maximising the divergence.

    Args:
      norm: of the threat.
      eps: its radius, in pixels of [0, 1].
      steps: steps of the attack, which starts at the clean image plus 0.001 of normal noise.
      step_size: their length as a share of eps; 0 for 2.5 / steps.
      beta: weight of the divergence; 6 in the paper.
      attack_mode: as of `pgd`.
      weight_gamma: as of `pgd`.

    Returns:
      The objective. Its logits are those of the attacked images.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    _validate.check_range('beta', beta, low=0)

    def loss(clean: Array | None, attacked: Array, y: Array) -> dict[str, Array]:
        assert clean is not None
        return {
            'cross_entropy': cross_entropy(clean, y).mean(),
            'divergence': beta * divergence(clean, attacked).mean(),
        }

    return _against_one_threat(
        norm=norm,
        eps=eps,
        steps=steps,
        step_size=step_size,
        attack_mode=attack_mode,
        weight_gamma=weight_gamma,
        start=_near,
        aim=_farther_from_clean,
        loss=loss,
    )


def mart_losses(clean: Array, attacked: Array, y: Array, beta: float) -> Float[Array, ' batch']:
    """The loss of MART of each image (Wang et al. 2020, equation 11, with the program's guards).

    Args:
      clean: logits of clean images `[B, K]`.
      attacked: logits of attacked ones.
      y: labels `[B]`.
      beta: weight of the divergence.

    Returns:
      BCE(f(x'), y) + beta KL(f(x) || f(x')) (1 - f(x)_y).
    """
    boosted, diverged = _mart_terms(clean, attacked, y)
    return boosted + beta * diverged


def _mart_terms(clean: Array, attacked: Array, y: Array) -> tuple[Array, Array]:
    shares, before = jax.nn.softmax(attacked), jax.nn.softmax(clean)
    own = jax.nn.one_hot(y, shares.shape[-1], dtype=bool)
    second = jnp.where(own, 0.0, shares).max(-1)
    boosted = cross_entropy(attacked, y) - jnp.log(_ABOVE_ONE - second + _TINY)
    # Where a share is 0, its logarithm counts nothing.
    logs = jnp.log(jnp.where(before > 0, before, 1.0)) - jnp.log(shares + _TINY)
    doubt = 1.0000001 - jnp.where(own, before, 0.0).sum(-1)
    return boosted, (before * logs).sum(-1) * doubt


def mart(
    *,
    norm: str = 'linf',
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float = 0.0,
    beta: float = 5.0,
    attack_mode: str = 'eval',
    weight_gamma: float = 0.0,
) -> Objective:
    """Misclassification-aware adversarial training (Wang et al. 2020), see `mart_losses`.

    Args:
      norm: of the threat.
      eps: its radius, in pixels of [0, 1].
      steps: steps of PGD, which starts at the clean image plus 0.001 of normal noise.
      step_size: their length as a share of eps; 0 for 2.5 / steps.
      beta: weight of the divergence.
      attack_mode: as of `pgd`.
      weight_gamma: as of `pgd`.

    Returns:
      The objective. Its logits are those of the attacked images.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    _validate.check_range('beta', beta, low=0)

    def loss(clean: Array | None, attacked: Array, y: Array) -> dict[str, Array]:
        assert clean is not None
        boosted, diverged = _mart_terms(clean, attacked, y)
        return {'boosted': boosted.mean(), 'divergence': beta * diverged.mean()}

    return _against_one_threat(
        norm=norm,
        eps=eps,
        steps=steps,
        step_size=step_size,
        attack_mode=attack_mode,
        weight_gamma=weight_gamma,
        start=_near,
        aim=_higher_cross_entropy,
        loss=loss,
    )
