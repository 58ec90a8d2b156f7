"""Defences: calibrated on benign images, applied to any forward, and again a forward.

    parameters = inverse_perturbation.calibrate(forward, variables, x, y)
    defended = inverse_perturbation.apply(parameters, forward)
    logits, _ = defended(variables, images)

Every attack and every measure runs on `defended` unchanged. A number about a defence counts only
after attacks that know it: `inverse_perturbation.adaptive` makes the surrogates for them.
"""

from neurosens.defenses import inverse_perturbation, oracles, pruning, rescaling
from neurosens.defenses.storage import (
    DEFENSES,
    DefenseError,
    calibration_of,
    load,
    make_settings,
    name_of,
    save,
)

__all__ = [
    'DEFENSES',
    'DefenseError',
    'calibration_of',
    'inverse_perturbation',
    'load',
    'make_settings',
    'name_of',
    'oracles',
    'pruning',
    'rescaling',
    'save',
]
