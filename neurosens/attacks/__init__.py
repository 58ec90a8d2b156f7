"""Adversarial attacks: one call form, per-example results, any `Forward`.

result = attack(forward, variables, x, y, key, *, threat, ...) -> AttackResult
"""

from neurosens.attacks import losses
from neurosens.attacks.adaptive import (
    ExpectedForward,
    RandomForward,
    SubstitutedForward,
    expected_forward,
    is_random,
    random_forward,
    redraw,
    straight_through,
    with_gradients_of,
)
from neurosens.attacks.apgd import apgd, apgd_example
from neurosens.attacks.autoattack import CLEAN, ROBUST, AutoAttackResult, Progress, autoattack
from neurosens.attacks.carlini_wagner import carlini_wagner, carlini_wagner_example
from neurosens.attacks.deepfool import deepfool, deepfool_example
from neurosens.attacks.fab import fab, fab_example
from neurosens.attacks.fmn import fmn, fmn_example
from neurosens.attacks.latent_attack import (
    ActivationResult,
    activation_attack,
    activation_attack_example,
    latent_attack,
    latent_attack_example,
)
from neurosens.attacks.minimum import Median, MinimumResult, median_distance, robust_accuracy
from neurosens.attacks.neuron_attack import (
    NeuronAttackReport,
    NeuronAttackResult,
    easiest_neurons,
    neuron_attack,
    neuron_attack_example,
    neuron_attack_report,
)
from neurosens.attacks.noise import noise, noise_example
from neurosens.attacks.pgd import bim, fgsm, fgsm_rs, mi_fgsm, ni_fgsm, pgd, pgd_example
from neurosens.attacks.result import AttackResult, worst_case
from neurosens.attacks.spatial import Motion, SpatialResult, moved, spatial, spatial_example
from neurosens.attacks.square import square, square_example
from neurosens.attacks.targets import TARGETS, target_classes
from neurosens.attacks.threat import (
    Threat,
    inside,
    length,
    project,
    random_start,
    steepest_ascent,
)
from neurosens.attacks.transfer import transfer

__all__ = [
    'CLEAN',
    'ROBUST',
    'TARGETS',
    'Progress',
    'ActivationResult',
    'AttackResult',
    'AutoAttackResult',
    'ExpectedForward',
    'Median',
    'MinimumResult',
    'Motion',
    'NeuronAttackReport',
    'NeuronAttackResult',
    'RandomForward',
    'SpatialResult',
    'SubstitutedForward',
    'Threat',
    'activation_attack',
    'activation_attack_example',
    'apgd',
    'apgd_example',
    'autoattack',
    'bim',
    'carlini_wagner',
    'carlini_wagner_example',
    'deepfool',
    'deepfool_example',
    'easiest_neurons',
    'expected_forward',
    'fab',
    'fab_example',
    'fgsm',
    'fgsm_rs',
    'fmn',
    'fmn_example',
    'inside',
    'is_random',
    'latent_attack',
    'latent_attack_example',
    'length',
    'losses',
    'median_distance',
    'mi_fgsm',
    'moved',
    'neuron_attack',
    'neuron_attack_example',
    'neuron_attack_report',
    'ni_fgsm',
    'noise',
    'noise_example',
    'pgd',
    'pgd_example',
    'project',
    'random_forward',
    'random_start',
    'redraw',
    'robust_accuracy',
    'spatial',
    'spatial_example',
    'square',
    'square_example',
    'steepest_ascent',
    'straight_through',
    'target_classes',
    'transfer',
    'with_gradients_of',
    'worst_case',
]
