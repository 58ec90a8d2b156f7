"""neurosens: which neurons make a classifier fragile, measured and trained away in JAX."""

from neurosens import (
    attacks,
    config,
    data,
    defenses,
    evaluation,
    interop,
    models,
    neurons,
    onednn,
    parallel,
    regularizers,
    training,
)
from neurosens.attacks import Threat
from neurosens.forward import (
    Forward,
    LayerError,
    LinenForward,
    NNXForward,
    layers,
    with_edits,
    with_input_transform,
)

__all__ = [
    'Forward',
    'LayerError',
    'LinenForward',
    'NNXForward',
    'Threat',
    'attacks',
    'config',
    'data',
    'defenses',
    'evaluation',
    'interop',
    'layers',
    'models',
    'neurons',
    'onednn',
    'parallel',
    'regularizers',
    'training',
    'with_edits',
    'with_input_transform',
]
