"""Experiment settings: typed dataclasses, their checks, and what a checkpoint stores of them.

A config file is a Python file whose `get_config()` returns a `Config`; `neurosens.command_line`
says how the command line chooses one and changes single settings.
"""

from neurosens.config.checks import check_types, is_number, validate
from neurosens.config.settings import (
    ATTACKS,
    CALIBRATION,
    FRAGILE_RULES,
    FREE_KEYS,
    MEASURES,
    NORMS,
    PROJECTING,
    PRUNED_BY,
    RESPONSES,
    SPLITS,
    SURROGATES,
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
from neurosens.config.values import differences, flatten, from_dict, to_dict

__all__ = [
    'ATTACKS',
    'CALIBRATION',
    'Config',
    'ConfigError',
    'Defense',
    'Evaluation',
    'FRAGILE_RULES',
    'FREE_KEYS',
    'MEASURES',
    'Monitor',
    'NORMS',
    'Neurons',
    'Optimizer',
    'PROJECTING',
    'PRUNED_BY',
    'RESPONSES',
    'SPLITS',
    'SURROGATES',
    'Schedule',
    'THREATS',
    'check_types',
    'differences',
    'flatten',
    'from_dict',
    'is_number',
    'to_dict',
    'validate',
]
