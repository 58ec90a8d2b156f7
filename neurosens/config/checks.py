"""What can be wrong with settings, as far as no other module is needed to tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from neurosens import _validate
from neurosens.config.settings import (
    AIMING,
    ATTACKS,
    CALIBRATION,
    DRAWING,
    FRAGILE_RULES,
    MEASURES,
    NORMS,
    PROJECTING,
    PRUNED_BY,
    RESPONSES,
    SPLITS,
    SURROGATES,
    TARGETS,
    THREATS,
    Config,
    ConfigError,
    Defense,
    Evaluation,
    Monitor,
    Neurons,
    Optimizer,
    Schedule,
)

_check = _validate.check_range


def validate(config: Config) -> None:
    """Checks types and ranges of all settings that need no other module to judge.

    Raises:
      ConfigError: with one sentence that names the key, the value and the remedy.
    """
    check_types(config)
    try:
        _check_training(config)
        _check_optimizer(config.optimizer)
        _check_schedule(config.schedule)
        _check_monitor(config.monitor, config.validation_size)
        _check_evaluation(config.evaluation)
        _check_neurons(config.neurons)
        _check_defense(config)
        _check_attacks(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_types(config: Any, prefix: str = '') -> None:
    """Checks that every setting is of its type; whole numbers become floats where these should be.

    Args:
      config: a dataclass of settings, changed in place.
      prefix: what stands before its keys in messages.

    Raises:
      ConfigError: a value is of another type.
    """
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):  # type: ignore[arg-type]
                raise ConfigError(f'{key} is {value!r}; it must be a {field.type.__name__}.')  # type: ignore[union-attr]
            check_types(value, f'{key}.')
            continue
        item = getattr(field.type, '__args__', (None,))[0]
        kind = getattr(field.type, '__origin__', field.type)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, field.name, float(value))
        elif kind is not type(value):
            raise ConfigError(f'{key} is {value!r}; it must be of type {kind.__name__}.')  # type: ignore[union-attr]
        if kind is tuple:
            if item is float:
                value = tuple(float(v) if type(v) is int else v for v in value)
                setattr(config, field.name, value)
            for entry in value:
                if type(entry) is not item:
                    raise ConfigError(
                        f'{key} holds {entry!r}; every item must be of type {item.__name__}.'  # type: ignore[union-attr]
                    )


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_choices(choices: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
    """Raises an error where a value, by its key, is not one of those that may stand there."""
    for key, (value, valid) in choices.items():
        if value not in valid:
            raise ConfigError(_validate.unknown(key, value, valid))


def _check_items(key: str, items: tuple[str, ...], valid: tuple[str, ...]) -> None:
    for item in items:
        if item not in valid:
            raise ConfigError(_validate.unknown(f'{key} item', item, valid))


def _check_training(config: Config) -> None:
    _check('validation_size', config.validation_size, low=0)
    _check('epochs', config.epochs, low=0, low_open=True)
    _check('steps', config.steps, low=0)
    _check('batch_size', config.batch_size, low=1)
    _check('seed', config.seed, low=0, high=2**32 - 1)
    for mean in config.mean:
        _check('mean item', mean)
    for std in config.std:
        _check('std item', std, low=0, low_open=True)
    _check('log_every', config.log_every, low=1)
    _check('evaluate_every', config.evaluate_every, low=0, low_open=True)
    _check('checkpoint_every', config.checkpoint_every, low=0)
    _check('keep_checkpoints', config.keep_checkpoints, low=1)
    _check('cpu_devices', config.cpu_devices, low=0)
    _check_choices({'dtype': (config.dtype, ('float32', 'bfloat16'))})
    if config.initial_rescaling and not config.initial_weights:
        raise ConfigError(
            f'initial_rescaling is {config.initial_rescaling!r}, but there are no weights to '
            'rescale; name those that it was calibrated on by initial_weights.'
        )
    if config.weights_key and not (config.weights or config.initial_weights):
        raise ConfigError(
            f'weights_key is {config.weights_key!r}, but there is no file of weights to look in; '
            'leave it out, or name a file by weights or initial_weights.'
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    _check('optimizer.learning_rate', optimizer.learning_rate, low=0, low_open=True)
    _check('optimizer.momentum', optimizer.momentum, low=0, high=1, high_open=True)
    _check('optimizer.b1', optimizer.b1, low=0, high=1, high_open=True)
    _check('optimizer.b2', optimizer.b2, low=0, high=1, high_open=True)
    _check('optimizer.weight_decay', optimizer.weight_decay, low=0)
    _check('optimizer.clip_norm', optimizer.clip_norm, low=0)
    _check('optimizer.accumulate', optimizer.accumulate, low=1)
    _check('optimizer.ema_decay', optimizer.ema_decay, low=0, high=1, high_open=True)
    if optimizer.freeze_random and not optimizer.freeze:
        raise ConfigError(
            'optimizer.freeze_random is True, but optimizer.freeze names no layers; name those '
            'whose number of parameters is to be drawn.'
        )


def _check_schedule(schedule: Schedule) -> None:
    _check('schedule.warmup', schedule.warmup, low=0, high=1, high_open=True)
    _check('schedule.factor', schedule.factor, low=0, low_open=True)
    _check('schedule.end', schedule.end, low=0, high=1)
    for share in schedule.boundaries:
        _check('schedule.boundaries item', share, low=0, high=1, low_open=True, high_open=True)


def _check_evaluation(evaluation: Evaluation) -> None:
    _check('evaluation.batch_size', evaluation.batch_size, low=1)
    _check('evaluation.limit', evaluation.limit, low=0)
    _check('evaluation.steps', evaluation.steps, low=1)
    _check('evaluation.step_size', evaluation.step_size, low=0)
    _check('evaluation.restarts', evaluation.restarts, low=1)
    _check('evaluation.auto_steps', evaluation.auto_steps, low=1)
    _check('evaluation.search_steps', evaluation.search_steps, low=0)
    _check('evaluation.queries', evaluation.queries, low=1)
    _check('evaluation.draws', evaluation.draws, low=1)
    _check('evaluation.examples', evaluation.examples, low=0)
    _check('evaluation.masking_images', evaluation.masking_images, low=0)
    _check('evaluation.shift', evaluation.shift, low=0, high=1)
    for eps in evaluation.eps:
        high = 180 if evaluation.norm == 'spatial' else None
        _check('evaluation.eps item', eps, low=0, high=high)
    named: dict[str, float] = {}
    for eps in evaluation.eps:
        # Results are named so.
        name = f'{eps:.3g}'
        if name in named:
            raise ConfigError(
                f'evaluation.eps holds {named[name]} and {eps}, which are the same to three '
                'digits, by which results are named; leave one of them out.'
            )
        named[name] = eps
    losses = ('cross_entropy', 'margin', 'dlr', 'scaled_cross_entropy')
    choices = {
        'evaluation.split': (evaluation.split, ('test', 'validation')),
        'evaluation.norm': (evaluation.norm, THREATS),
        'evaluation.loss': (evaluation.loss, losses),
    }
    if evaluation.target:
        choices['evaluation.target'] = (evaluation.target, TARGETS)
    _check_choices(choices)


def _check_monitor(monitor: Monitor, validation_size: int) -> None:
    _check('monitor.images', monitor.images, low=0)
    _check('monitor.eps', monitor.eps, low=0)
    _check('monitor.steps', monitor.steps, low=1)
    _check('monitor.top', monitor.top, low=1)
    _check('monitor.probes', monitor.probes, low=0)
    _check('monitor.guard', monitor.guard, low=0, high=1)
    if monitor.images > validation_size:
        raise ConfigError(
            f'monitor.images is {monitor.images}, but validation_size is {validation_size}; hold '
            'out at least as many images.'
        )
    if (monitor.guard or monitor.choose) and not monitor.images:
        raise ConfigError(
            'monitor.guard and monitor.choose need the accuracy under PGD; set monitor.images, to '
            '500 for example.'
        )
    if monitor.probes and not monitor.images:
        raise ConfigError(
            f'monitor.probes is {monitor.probes}, but nothing is watched without images; set '
            'monitor.images, to 500 for example, or monitor.probes to 0.'
        )
    _check_choices({'monitor.norm': (monitor.norm, NORMS)})


def _check_neurons(neurons: Neurons) -> None:
    _check('neurons.limit', neurons.limit, low=0)
    _check('neurons.batch_size', neurons.batch_size, low=1)
    _check('neurons.chunk', neurons.chunk, low=0)
    _check('neurons.eps', neurons.eps, low=0)
    _check('neurons.probes', neurons.probes, low=0)
    _check('neurons.thresholds', neurons.thresholds, low=3)
    _check('neurons.attack_eps', neurons.attack_eps, low=0)
    _check('neurons.attack_steps', neurons.attack_steps, low=1)
    _check('neurons.attack_neurons', neurons.attack_neurons, low=1)
    _check('neurons.attack_restarts', neurons.attack_restarts, low=1)
    _check('neurons.attack_weight', neurons.attack_weight, low=0)
    _check('neurons.search_limit', neurons.search_limit, low=0)
    _check('neurons.front', neurons.front, low=0)
    _check('neurons.tail', neurons.tail, low=0)
    _check('neurons.agreement_top', neurons.agreement_top, low=0)
    _check('neurons.top', neurons.top, low=0)
    if not is_number(neurons.fragile) and neurons.fragile not in FRAGILE_RULES:
        raise ConfigError(
            _validate.unknown('neurons.fragile', neurons.fragile, (*FRAGILE_RULES, 'a number'))
        )
    if neurons.attack_restarts > 1 and neurons.attack_start != 'random':
        raise ConfigError(
            f'neurons.attack_restarts is {neurons.attack_restarts}, but runs from '
            f"{neurons.attack_start!r} are all the same; set neurons.attack_start to 'random'."
        )
    choices = {
        'neurons.unit': (neurons.unit, ('channel', 'unit')),
        'neurons.method': (neurons.method, ('auto', 'closed_form', 'first_order', 'exact')),
        'neurons.attack_norm': (neurons.attack_norm, NORMS),
        'neurons.attack_start': (neurons.attack_start, ('clean', 'random')),
        'neurons.attack_keep': (neurons.attack_keep, ('misclassified', 'loss')),
        'neurons.direction': (neurons.direction, ('auto', 'forward', 'reverse')),
        'neurons.ranking': (neurons.ranking, ('scaled', 'absolute', 'scaled_absolute')),
        'neurons.score': (neurons.score, ('logit', 'probability')),
        'neurons.ablation': (neurons.ablation, ('activation', 'weights')),
    }
    _check_choices(choices)
    _check_items('neurons.statistics_splits', neurons.statistics_splits, SPLITS)
    _check_items('neurons.measures', neurons.measures, MEASURES)


def _check_defense(config: Config) -> None:
    defense, evaluation = config.defense, config.evaluation
    _check('defense.images', defense.images, low=0)
    _check_choices(
        {
            'defense.measure': (defense.measure, PRUNED_BY),
            'defense.response': (defense.response, RESPONSES),
        }
    )
    if defense.name and evaluation.norm == 'spatial':
        raise ConfigError(
            f"defense.name is {defense.name!r} and evaluation.norm 'spatial', in which no "
            'attack on a defence follows gradients; evaluate the defence in linf, l2 or l1.'
        )
    if defense.name and evaluation.target:
        raise ConfigError(
            f'defense.name is {defense.name!r} and evaluation.target {evaluation.target!r}; what a '
            'defence recovers is counted of attacks that aim at no class: leave the target out.'
        )
    _check_items('defense.surrogates', defense.surrogates, SURROGATES)
    if defense.parameters and not defense.name:
        raise ConfigError(
            f'defense.parameters is {defense.parameters!r}, but no defence is named; give '
            'defense.name too.'
        )
    usual = Defense()
    for name in CALIBRATION:
        if defense.parameters and getattr(defense, name) != getattr(usual, name):
            raise ConfigError(
                f'defense.{name} is for a calibration, and defense.parameters names the result of '
                'one; leave out one of them.'
            )
    for name, user in (('measure', 'pruning'), ('response', 'rescaling')):
        value, default = getattr(defense, name), getattr(usual, name)
        if defense.name not in ('', user) and value != default:
            raise ConfigError(
                f'defense.{name} is {value!r}, which is for {user!r}, but defense.name is '
                f'{defense.name!r}; leave it at {default!r}.'
            )


def _check_attacks(config: Config) -> None:
    """Checks that attacks fit the norm."""
    defense, evaluation = config.defense, config.evaluation
    for key, named in (
        ('evaluation.attacks', evaluation.attacks),
        ('defense.attacks', defense.attacks),
        ('defense.surrogate_attacks', defense.surrogate_attacks),
    ):
        _check_items(key, named, ATTACKS)
        for attack in named:
            used = defense.name or not key.startswith('defense.')
            if used and (attack == 'spatial') != (evaluation.norm == 'spatial'):
                raise ConfigError(
                    f'{key} has {attack!r} and evaluation.norm is {evaluation.norm!r}; the attack '
                    "'spatial' and the norm 'spatial' go together, without others."
                )
            if evaluation.draws > 1 and used and attack not in DRAWING:
                raise ConfigError(
                    f'{key} has {attack!r}, which does not average gradients over draws, and '
                    f'evaluation.draws is {evaluation.draws}; the attacks that do, or need none, '
                    f'are {", ".join(DRAWING)}.'
                )
            counts = evaluation.norm == 'l0' and used
            if counts and attack not in PROJECTING:
                raise ConfigError(
                    f"{key} has {attack!r}, which does not count pixels as evaluation.norm 'l0' "
                    f'does; the attacks that do are {", ".join(PROJECTING)}.'
                )
            if evaluation.target and used and attack not in AIMING:
                raise ConfigError(
                    f'{key} has {attack!r}, which does not aim at a class, and evaluation.target '
                    f'is {evaluation.target!r}; the attacks that do are {", ".join(AIMING)}.'
                )
            if attack == 'carlini_wagner' and evaluation.norm != 'l2':
                raise ConfigError(
                    f"{key} has 'carlini_wagner', which is for l2, but evaluation.norm is "
                    f"{evaluation.norm!r}; use 'fmn' or 'fab' in its place."
                )
