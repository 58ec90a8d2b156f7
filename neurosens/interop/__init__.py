"""Networks trained in PyTorch as Flax modules and variables, and back; attacks of foolbox."""

from neurosens.interop.cleaning import Cleaned, clean
from neurosens.interop.conversion import from_torch, load_torch, to_torch, torch_shapes
from neurosens.interop.errors import WeightsError
from neurosens.interop.foolbox_model import foolbox_model
from neurosens.interop.reading import TORCH_SUFFIXES, StateDict, read_state_dict
from neurosens.interop.sequential import Sequential, infer

__all__ = [
    'TORCH_SUFFIXES',
    'Cleaned',
    'Sequential',
    'StateDict',
    'WeightsError',
    'clean',
    'foolbox_model',
    'from_torch',
    'infer',
    'load_torch',
    'read_state_dict',
    'to_torch',
    'torch_shapes',
]
