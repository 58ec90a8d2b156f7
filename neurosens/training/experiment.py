"""An experiment: a config turned into the pieces that training needs, and every mistake found."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from neurosens import _validate, data, parallel
from neurosens import config as config_lib
from neurosens.forward import LinenForward
from neurosens.training import freezing, initial_weights, monitor, objectives, optimizers
from neurosens.training.loading import make_model
from neurosens.training.step import (
    GradientShares,
    Metrics,
    TrainState,
    TrainStep,
    WeightedRegularizer,
    init_state,
    make_gradient_shares,
    make_train_step,
    state_shardings,
)

# It runs once: XLA:CPU takes longer to optimise a deep network's random draws than to draw them.
_QUICK_COMPILATION = {'xla_backend_optimization_level': 0}
# The purpose of the key that draws which parameters are frozen.
_FREEZING = 3


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config turned into the pieces that training needs; nothing is written yet.

    Attributes:
      config: the settings.
      mesh: devices to run on.
      module: the model.
      source: training data.
      validation: held-out training data, or None.
      optimizer: the gradient transformation.
      train_step: the compiled step.
      gradient_shares: the compiled function that says what makes a step's gradient, or None.
      replays: times in a row that each batch is taken by a `Replayed` objective; 0 for others.
      total_steps: steps of the whole training.
      evaluate_every: steps between validations.
    """

    config: config_lib.Config
    mesh: Mesh
    module: nn.Module
    source: data.Source
    validation: data.Source | None
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    gradient_shares: GradientShares | None
    replays: int
    total_steps: int
    evaluate_every: int

    @property
    def forward(self) -> LinenForward:
        """The model in evaluation mode."""
        return LinenForward(self.module, {'train': False})

    def key(self, purpose: int) -> jax.Array:
        """The key of one purpose: 0 initialises, 1 is for steps, 2 watches, 3 freezes."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)


def prepare(config: config_lib.Config, mesh: Mesh | None = None) -> Experiment:
    """Builds everything an experiment needs and finds every mistake in its config.

    Args:
      config: the settings.
      mesh: devices to run on; all by default.

    Returns:
      The experiment, ready for `train`.

    Raises:
      ValueError: a setting cannot be used.
      neurosens.data.DatasetNotPreparedError: the data set is not in `data_dir`.
      LayerError: a layer to be watched or regularized is unknown.
      CheckpointError: the initial weights cannot be read.
      DefenseError: the initial rescaling cannot be read, or is of other weights.
    """
    config_lib.validate(config)
    if config.weights:
        raise config_lib.ConfigError(
            f'weights is {config.weights!r}, but only evaluate.py takes a file of weights; leave '
            'it out.'
        )
    mesh = parallel.data_mesh() if mesh is None else mesh
    if config.batch_size % mesh.size:
        raise config_lib.ConfigError(
            f'batch_size is {config.batch_size}; it must be a multiple of the {mesh.size} devices, '
            f'such as {parallel.round_up(config.batch_size, mesh)}.'
        )
    info = data.info(config.dataset)
    module = make_model(config)
    objective = objectives.create(
        'objective', config.objective, config.objective_options, objectives.OBJECTIVES
    )
    if config.objective == 'fgsm_rs' and not config.monitor.guard:
        warnings.warn(
            'Training with fgsm_rs may lose all robustness from one epoch to the next '
            '(catastrophic overfitting), and monitor.guard is 0; set monitor.images, to 500 for '
            'example, and monitor.guard, to 0.2, to stop it there.',
            stacklevel=2,
        )
    if config.augmentation not in data.augmentation_names():
        raise config_lib.ConfigError(
            _validate.unknown('augmentation', config.augmentation, data.augmentation_names())
        )
    data_dir = config.data_dir or None
    source = data.open(config.dataset, 'train', data_dir, config.validation_size)
    validation = (
        data.open(config.dataset, 'validation', data_dir, config.validation_size)
        if config.validation_size
        else None
    )
    per_epoch = data.steps_per_epoch(source.num_examples, config.batch_size)
    total_steps = config.steps or max(1, round(config.epochs * per_epoch))
    accumulate = config.optimizer.accumulate
    updates = max(1, total_steps // accumulate)
    optimizer, schedule = optimizers.make_optimizer(config.optimizer, config.schedule, updates)
    if config.optimizer.freeze:
        optimizer = freezing.freeze(optimizer, _frozen(config))
    terms = [
        _weighted_regularizer(name, options, total_steps)
        for name, options in config.regularizers.items()
    ]
    seen: dict[str, Any] = {
        'augmentation': config.augmentation,
        'image_size': info.image_shape[0],
        'freeze_statistics': config.optimizer.freeze_statistics,
    }
    train_step = make_train_step(
        module,
        optimizer,
        schedule,
        objective,
        terms,
        mesh,
        accumulate=accumulate,
        ema_decay=config.optimizer.ema_decay,
        **seen,
    )
    if config.monitor.images:
        monitor.check(module, info, config.monitor)
    if config.optimizer.freeze_statistics:
        image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), image)
        freezing.check_statistics(shapes, config.optimizer.freeze_statistics)
    if config.initial_weights:
        initial_weights.check(config, module, mesh)
    experiment = Experiment(
        config=config,
        mesh=mesh,
        module=module,
        source=source,
        validation=validation,
        optimizer=optimizer,
        train_step=train_step,
        gradient_shares=None,
        replays=objective.replays if isinstance(objective, objectives.Replayed) else 0,
        total_steps=total_steps,
        evaluate_every=max(1, round(config.evaluate_every * per_epoch)),
    )
    if config.optimizer.freeze:
        _state_shapes(experiment)
    several = bool(terms)
    if terms:
        _trace(experiment)
    elif config.gradient_shares and not terms and config.objective != 'standard':
        several = any(name.startswith('objective/') for name in _trace(experiment))
    if several and config.gradient_shares:
        shares = make_gradient_shares(module, objective, terms, mesh, **seen)
        experiment = dataclasses.replace(experiment, gradient_shares=shares)
    return experiment


def _frozen(config: config_lib.Config) -> freezing.Choice:
    """Which parameters the settings of the optimizer freeze."""

    def choice(parameters: optax.Params) -> PyTree:
        frozen = freezing.layers(parameters, config.optimizer.freeze)
        if not config.optimizer.freeze_random:
            return frozen
        key = jax.random.fold_in(jax.random.key(config.seed), _FREEZING)
        return freezing.as_many_at_random(parameters, frozen, key)

    return choice


def _trace(experiment: Experiment) -> Metrics:
    """Traces a step, which finds regularizers that ask what model and objective have not.

    Returns:
      The shapes of what it logs.
    """
    size = experiment.config.batch_size
    shape = data.info(experiment.config.dataset).image_shape
    kinds = ((size, *shape), jnp.uint8), ((size,), jnp.int32), ((size,), bool), ((size,), jnp.int32)
    # All placed as in training, which then does not trace the step again.
    place = parallel.split(experiment.mesh)
    batch = data.Batch(*(jax.ShapeDtypeStruct(*kind, sharding=place) for kind in kinds))
    key = parallel.replicate(experiment.mesh, experiment.key(1))
    return jax.eval_shape(experiment.train_step, abstract_state(experiment), batch, key)[1]


def _weighted_regularizer(
    name: str, options: Mapping[str, Any], total_steps: int
) -> WeightedRegularizer:
    # Names of terms in the log.
    if not isinstance(name, str) or name in ('', 'objective') or '/' in name:
        raise config_lib.ConfigError(
            f"A regularizer is named {name!r}; a name is a text, not empty or 'objective', and has "
            "no '/'."
        )
    if not isinstance(options, Mapping):
        raise config_lib.ConfigError(
            f'Regularizer {name!r} is given as {options!r}; it must be a dict of its weight and '
            "options, such as {'weight': 0.1}."
        )
    options = dict(options)
    kind = options.pop('regularizer', name)
    weight = options.pop('weight', 1.0)
    _validate.check_range(f'The weight of regularizer {name!r}', weight, low=0)
    shares = {key: options.pop(key, 0.0) for key in ('ramp', 'start')}
    for key, share in shares.items():
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0 <= share <= 1:
            raise config_lib.ConfigError(
                f'The {key} of regularizer {name!r} is {share!r}; it is a share of training, a '
                'number from 0 to 1.'
            )
    # Shares such as 0.7 and 0.3 may add up to a little more by rounding.
    if sum(shares.values()) > 1 + 1e-9:
        raise config_lib.ConfigError(
            f'The start of regularizer {name!r} is {shares["start"]!r} and its ramp '
            f'{shares["ramp"]!r}, so that training ends before its whole weight is reached; '
            'together they must be at most 1.'
        )
    shared, attacked = flags = [options.pop(key, False) for key in ('shared', 'attacked')]
    for key, flag in zip(('shared', 'attacked'), flags):
        if not isinstance(flag, bool):
            raise config_lib.ConfigError(
                f'The {key!r} of regularizer {name!r} is {flag!r}; it is True or False.'
            )
    if shared and attacked:
        raise config_lib.ConfigError(
            f"Regularizer {name!r} is both 'shared' and 'attacked', but only the pass over clean "
            'images can be shared; leave out one of them.'
        )
    regularizer = objectives.create('regularizer', kind, options, objectives.REGULARIZERS)
    ramp, start = (round(share * total_steps) for share in shares.values())
    # Both may have been rounded up.
    ramp = min(ramp, total_steps - start)
    return WeightedRegularizer(name, regularizer, float(weight), ramp, start, shared, attacked)


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, on every device; deterministic in the config's seed.

    Args:
      experiment: from `prepare`.

    Returns:
      The state, with the weights of `initial_weights` where the config names some.

    Raises:
      CheckpointError: they cannot be read.
      WeightsError: they are a file that cannot be read or does not fit.
      DefenseError: the rescaling cannot be read, or is of other weights.
    """
    state, config = _initializer(experiment)(experiment.key(0)), experiment.config
    if not config.initial_weights:
        return state
    variables = initial_weights.variables(config, experiment.module, experiment.mesh)
    average = None if state.average is None else jax.tree.map(jnp.copy, variables['params'])
    return state._replace(variables=variables, average=average)


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and placement of the state, to read a checkpoint into."""
    shapes = _state_shapes(experiment)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(shapes, experiment.mesh),
    )


def _state_shapes(experiment: Experiment) -> TrainState:
    return jax.eval_shape(_plain_initializer(experiment), experiment.key(0))


def _plain_initializer(experiment: Experiment) -> Callable[[jax.Array], TrainState]:
    config = experiment.config
    return functools.partial(
        init_state,
        experiment.module,
        experiment.optimizer,
        data.info(config.dataset).image_shape,
        average=config.optimizer.ema_decay > 0,
        perturbed=config.batch_size if experiment.replays else 0,
    )


def _initializer(experiment: Experiment) -> Callable[[jax.Array], TrainState]:
    return jax.jit(
        _plain_initializer(experiment),
        out_shardings=state_shardings(_state_shapes(experiment), experiment.mesh),
        compiler_options=_QUICK_COMPILATION if jax.default_backend() == 'cpu' else None,
    )
