"""Optax optimizers and learning-rate schedules from settings."""

from __future__ import annotations

import jax
import optax

from neurosens import _validate
from neurosens import config as config_lib

SCHEDULES = ('constant', 'cosine', 'piecewise', 'onecycle')
OPTIMIZERS = ('sgd', 'adamw')


def make_schedule(
    schedule: config_lib.Schedule, learning_rate: float, updates: int
) -> optax.Schedule:
    """The learning rate as a function of the number of updates done.

    Args:
      schedule: its form; see `neurosens.config.Schedule`.
      learning_rate: its peak.
      updates: updates of the whole training.

    Returns:
      An Optax schedule.

    Raises:
      ValueError: the name is unknown, 'onecycle' has no warm-up, or boundaries are not increasing
        and after the warm-up.
    """
    # At least one update follows the warm-up, or a short training would learn nothing.
    warmup = min(round(schedule.warmup * updates), updates - 1)
    after = max(updates - warmup, 1)
    if schedule.name == 'onecycle':
        if warmup < 1:
            raise ValueError(
                f"schedule.warmup is {schedule.warmup!r}; 'onecycle' needs at least one of the "
                f'{updates} updates to rise.'
            )
        return optax.cosine_onecycle_schedule(updates, learning_rate, pct_start=schedule.warmup)
    if schedule.name == 'constant':
        main = optax.constant_schedule(learning_rate)
    elif schedule.name == 'cosine':
        main = optax.cosine_decay_schedule(learning_rate, after, schedule.end)
    elif schedule.name == 'piecewise':
        steps = [round(share * updates) - warmup for share in schedule.boundaries]
        if any(b <= a for a, b in zip([0, *steps], steps)):
            raise ValueError(
                f'schedule.boundaries are {schedule.boundaries!r}; they must increase and lie '
                f'after the warm-up of {schedule.warmup!r}.'
            )
        main = optax.piecewise_constant_schedule(
            learning_rate, dict.fromkeys(steps, schedule.factor)
        )
    else:
        raise ValueError(_validate.unknown('schedule.name', schedule.name, SCHEDULES))
    if warmup == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), main], [warmup])


def decayed(parameters: optax.Params) -> optax.Params:
    """Marks the parameters that weight decay applies to: kernels, not biases or norms."""
    return jax.tree.map(lambda parameter: parameter.ndim > 1, parameters)


def make_optimizer(
    optimizer: config_lib.Optimizer, schedule: config_lib.Schedule, updates: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation that an experiment uses.

    Args:
      optimizer: its settings.
      schedule: the form of its learning rate.
      updates: updates of the whole training (steps divided by `optimizer.accumulate`).

    Returns:
      `(gradient transformation, learning rate by number of updates done)`.

    Raises:
      ValueError: a name is unknown or the schedule is impossible.
    """
    rate = make_schedule(schedule, optimizer.learning_rate, updates)
    if optimizer.name == 'sgd':
        momentum = optimizer.momentum or None
        rule = optax.chain(
            optax.add_decayed_weights(optimizer.weight_decay, decayed),
            optax.sgd(rate, momentum, nesterov=optimizer.nesterov and momentum is not None),
        )
    elif optimizer.name == 'adamw':
        rule = optax.adamw(
            rate,
            b1=optimizer.b1,
            b2=optimizer.b2,
            weight_decay=optimizer.weight_decay,
            mask=decayed,
        )
    else:
        raise ValueError(_validate.unknown('optimizer.name', optimizer.name, OPTIMIZERS))
    if optimizer.clip_norm:
        rule = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), rule)
    if optimizer.accumulate > 1:
        rule = optax.MultiSteps(rule, optimizer.accumulate).gradient_transformation()
    return rule, rate
