"""Inverse perturbation: strengthens front neurons and weakens tail neurons through the input.

After Chen et al. 2021, "Fight Perturbations with Perturbations: Defending Adversarial Attacks via
Neuron Influence" (https://arxiv.org/abs/2112.13060), of which the abstracts and the first released
program are known. That program moves an attacked image along the gradient of its clean twin and
picks the sign with the true answer; it is an upper bound (`neurosens.defenses.oracles`), not a
defence. The defence here sees images alone, and is ours: directions are calibrated once for each
class, and an image of unknown origin is classified beside versions of it that are moved along the
directions of its likeliest classes.
"""

from neurosens.defenses.inverse_perturbation.calibration import calibrate
from neurosens.defenses.inverse_perturbation.defended import (
    GRADIENTS,
    InverseForward,
    adaptive,
    apply,
)
from neurosens.defenses.inverse_perturbation.direction import (
    Direction,
    direction_example,
    directions,
    normalize,
    partition,
)
from neurosens.defenses.inverse_perturbation.settings import (
    DEFAULT,
    RULES,
    TAIL_MODES,
    Parameters,
    Settings,
    passes,
    skeleton,
)

__all__ = [
    'DEFAULT',
    'GRADIENTS',
    'RULES',
    'TAIL_MODES',
    'Direction',
    'InverseForward',
    'Parameters',
    'Settings',
    'adaptive',
    'apply',
    'calibrate',
    'direction_example',
    'directions',
    'normalize',
    'partition',
    'passes',
    'skeleton',
]
