"""Image data sets: reading, batching, augmentation and preparation."""

from neurosens.data.augmentation import (
    augment,
    augmentation_names,
    centre_crop,
    pad_crop,
    pad_crop_flip,
    random_resized_crop_flip,
)
from neurosens.data.batching import (
    ArrayDataset,
    Batch,
    Source,
    epoch_order,
    eval_batches,
    steps_per_epoch,
    to_float,
    train_batches,
)
from neurosens.data.catalogue import DatasetInfo, info, names
from neurosens.data.datasets import load, open
from neurosens.data.tfds_source import DatasetDamagedError, DatasetNotPreparedError

__all__ = [
    'ArrayDataset',
    'Batch',
    'DatasetDamagedError',
    'DatasetInfo',
    'DatasetNotPreparedError',
    'Source',
    'augment',
    'augmentation_names',
    'centre_crop',
    'epoch_order',
    'eval_batches',
    'info',
    'load',
    'names',
    'open',
    'pad_crop',
    'pad_crop_flip',
    'random_resized_crop_flip',
    'steps_per_epoch',
    'to_float',
    'train_batches',
]
