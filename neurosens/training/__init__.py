"""Training: objectives, optimizers, the compiled step, checkpoints that survive, and the loop."""

from neurosens.training import freezing, logs
from neurosens.training.checkpoints import CheckpointError
from neurosens.training.experiment import Experiment, prepare
from neurosens.training.loading import TrainedModel, load, load_weights, make_model
from neurosens.training.loop import Interrupted, TrainingStopped, train
from neurosens.training.objectives import (
    OBJECTIVES,
    REGULARIZERS,
    Objective,
    Outcome,
    Regularizer,
    Replayed,
    run_training_mode,
    standard,
    tap_training_mode,
)
from neurosens.training.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule
from neurosens.training.step import (
    TrainState,
    WeightedRegularizer,
    evaluated_variables,
    init_state,
    make_gradient_shares,
    make_train_step,
)

__all__ = [
    'OBJECTIVES',
    'OPTIMIZERS',
    'REGULARIZERS',
    'SCHEDULES',
    'CheckpointError',
    'Experiment',
    'Interrupted',
    'Objective',
    'Outcome',
    'Regularizer',
    'Replayed',
    'TrainState',
    'TrainedModel',
    'TrainingStopped',
    'WeightedRegularizer',
    'evaluated_variables',
    'freezing',
    'init_state',
    'load',
    'load_weights',
    'logs',
    'make_gradient_shares',
    'make_model',
    'make_optimizer',
    'make_schedule',
    'make_train_step',
    'prepare',
    'run_training_mode',
    'standard',
    'tap_training_mode',
    'train',
]
