"""Single measures of one layer over a data set: one function each, from a `Task` to its results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PRNGKeyArray

from neurosens import attacks, data, neurons, parallel
from neurosens import config as config_lib
from neurosens.attacks.result import predicted_classes
from neurosens.evaluation import accuracy
from neurosens.evaluation.neuron_report import ThroughNeurons
from neurosens.forward import Forward, Variables
from neurosens.neurons import filtering, kernels
from neurosens.neurons.statistics import activation_summary, from_summary

# Several, since the sign of the correlation with fragility can differ between them.
TARGET_SCORES = ('l2', 'relative_l2', 'mean_log')


@jax.jit
def predict_batch(forward: Forward, variables: Variables, batch: data.Batch) -> dict[str, Array]:
    """Classifies a batch.

    Args:
      forward: the model.
      variables: its variables.
      batch: uint8 images and labels.

    Returns:
      `labels` and `predictions` `[B]`, -1 where logits are NaN.
    """
    logits = forward(variables, data.to_float(batch.image))[0]
    return {'labels': batch.label, 'predictions': predicted_classes(logits)}


def fgsm_images(eps: Array, forward: Forward, variables: Variables, x: Array, y: Array) -> Array:
    """Attacks by FGSM in linf; images that are misclassified already stay as they are.

    Args:
      eps: radius in pixel units, traced.
      forward: the model.
      variables: its variables.
      x: images `[B, ...]` in [0, 1].
      y: labels `[B]`.

    Returns:
      Attacked images `[B, ...]`.
    """
    threat = attacks.Threat('linf', eps)
    return attacks.fgsm(forward, variables, x, y, jax.random.key(0), threat=threat).x_adv


_attack_batch = jax.jit(lambda attack, forward, variables, x, y: attack(forward, variables, x, y))


@functools.partial(jax.jit, static_argnames=('layer', 'unit'))
def _peaks(forward: Forward, variables: Variables, x: Array, layer: str, unit: str) -> Array:
    activation = forward(variables, x, taps=(layer,))[1][layer]
    if unit == 'unit' or activation.ndim <= 2:
        return activation.reshape(activation.shape[0], -1)
    return activation.max(tuple(range(1, activation.ndim - 1)))


class Task(NamedTuple):
    """One measure of one layer.

    Attributes:
      forward: the model.
      variables: its variables.
      layer: the layer.
      settings: how to measure.
      run: streams a function of batches over the data set.
      wrap: of its iterator of batches.
      attack: the FGSM attack of the settings.
      key: randomness.
      mesh: devices to run on.
      measured: what the measures before this one found of the layer.
      spread: like `run`, over each data set of which statistics are taken; empty for that of `run`.
    """

    forward: Forward
    variables: Variables
    layer: neurons.NeuronLayer
    settings: config_lib.Neurons
    run: Callable[..., dict[str, np.ndarray]]
    wrap: accuracy.Progress
    attack: Any
    key: PRNGKeyArray
    mesh: Mesh
    measured: Mapping[str, Any]
    spread: Sequence[Callable[..., dict[str, np.ndarray]]] = ()


def _statistics(task: Task) -> dict[str, Any]:
    def over(run: Callable[..., dict[str, np.ndarray]]) -> tuple[neurons.Statistics, np.ndarray]:
        total: list[neurons.Statistics] = []
        pending: list[Any] = []

        def fetch() -> None:
            while pending:
                part = from_summary(pending.pop())
                total[:] = [neurons.merge(total[0], part)] if total else [part]

        def step(batch: data.Batch) -> dict[str, Array]:
            x, name, unit = data.to_float(batch.image), task.layer.name, task.layer.unit
            summary = activation_summary(
                task.forward, task.variables, x, batch.mask, layer=name, unit=unit
            )
            # Fetched one batch late, so that devices do not wait for the host.
            fetch()
            pending.append(summary)
            return {'peak': _peaks(task.forward, task.variables, x, name, unit)}

        arrays = run(step, progress=task.wrap)
        fetch()
        return total[0], arrays['peak']

    measured, peak = over(task.run)
    varying = measured.minimum != measured.maximum
    if measured.count < 2:
        # One value says nothing of others.
        varying = np.ones_like(varying)
    statistics = measured
    if task.spread:
        statistics = functools.reduce(neurons.merge, [over(run)[0] for run in task.spread])
    return {'statistics': statistics, 'peak': peak, 'varying': varying}


def _sensitivity(task: Task) -> dict[str, Any]:
    method = task.settings.method
    if method == 'auto':
        method = 'closed_form' if task.layer.facts.affine_tail else 'first_order'

    def step(batch: data.Batch) -> dict[str, Array]:
        result = neurons.sensitivity(
            task.forward,
            task.variables,
            data.to_float(batch.image),
            layer=task.layer.name,
            unit=task.layer.unit,
            method=method,
            direction=task.settings.direction,
            chunk=task.settings.chunk or None,
            limit=task.settings.search_limit or None,
        )
        return result._asdict()

    return {'method': method, **task.run(step, progress=task.wrap)}


def _influence(task: Task) -> dict[str, Any]:
    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        values = neurons.influence(
            task.forward,
            task.variables,
            x,
            layer=task.layer.name,
            unit=task.layer.unit,
            score=task.settings.score,
        )
        return {'influence': values}

    influence = task.run(step, progress=task.wrap)['influence']
    # A small layer is divided as far as it goes, the front first.
    front = min(task.settings.front, task.layer.neurons)
    tail = min(task.settings.tail, task.layer.neurons - front)
    return {'influence': influence, 'front': front, 'tail': tail}


def _ablation(task: Task) -> dict[str, Any]:
    mode = task.settings.ablation
    ablate = functools.partial(
        neurons.ablation,
        task.forward,
        task.variables,
        layer=(task.layer.kernel_layer if mode == 'weights' else None) or task.layer.name,
        unit=task.layer.unit,
        mode=mode,
        chunk=task.settings.chunk or None,
    )

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        attacked = ablate(
            _attack_batch(task.attack, task.forward, task.variables, x, batch.label), batch.label
        )
        clean = ablate(x, batch.label)
        return {
            **{f'clean {name}': value for name, value in clean._asdict().items()},
            **{f'attacked {name}': value for name, value in attacked._asdict().items()},
        }

    arrays = task.run(step, progress=task.wrap)
    results = {}
    for kind in ('clean', 'attacked'):
        fields = (arrays[f'{kind} {name}'] for name in neurons.Ablation._fields)
        results[kind] = neurons.response(neurons.Ablation._make(fields))
    given = task.settings.fragile
    rule = float(given) if config_lib.is_number(given) else given
    return {
        **results,
        'fragility': neurons.fragility(results['clean'].accuracy, rule),
        'attacked_fragility': neurons.fragility(results['attacked'].accuracy, rule),
    }


def _targeting(task: Task) -> dict[str, Any]:
    # Feature maps before the normalisation where the layer belongs to filters.
    name = task.layer.kernel_layer if _is_filter(task.layer) else task.layer.name

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        x_adv = _attack_batch(task.attack, task.forward, task.variables, x, batch.label)
        target = functools.partial(
            neurons.shift, task.forward, task.variables, x, x_adv, unit=task.layer.unit
        )
        before = target(layer=name)
        moved = (x_adv != x).reshape(len(x), -1).any(-1)
        return {**before._asdict(), 'after': target(layer=task.layer.name).mean, 'moved': moved}

    arrays = task.run(step, progress=task.wrap)
    # The attack leaves images that are misclassified already as they are.
    moved = arrays.pop('moved')
    after = arrays.pop('after')
    shift = after[moved].mean(0) if moved.any() else np.full(task.layer.neurons, np.nan)
    return {
        'shift': shift,
        '_shift': neurons.Shift._make(arrays[name] for name in neurons.Shift._fields),
        '_moved': moved,
    }


def has_filters(layer: neurons.NeuronLayer) -> bool:
    """Whether the neurons of a layer are the filters of a kernel."""
    return layer.kernel_layer is not None and layer.unit == 'channel'


def _is_filter(layer: neurons.NeuronLayer) -> bool:
    return has_filters(layer) and len(layer.shape) > 1


def targeting_reports(
    measured: dict[str, Any],
    labels: np.ndarray,
    num_classes: int,
    variables: Variables,
    layer: neurons.NeuronLayer,
) -> dict[str, neurons.TargetingReport]:
    """How far the attack targets the fragile neurons of a layer, by score.

    Args:
      measured: what `LAYER_MEASURES` found of targeting and ablation.
      labels: of all images `[N]`.
      num_classes: classes of the data set.
      variables: of the model, for the norms of filters.
      layer: the layer.

    Returns:
      Reports by `TARGET_SCORES`; none where the attack moved no image.
    """
    moved: Bool[np.ndarray, ' images'] = measured['_moved']
    if not moved.any():
        return {}
    shift = jax.tree.map(lambda leaf: leaf[moved], measured['_shift'])
    norms = None
    if layer.kernel_layer is not None and has_filters(layer):
        norms = np.asarray(kernels.norms(variables, layer.kernel_layer))
    responses = measured['clean'].accuracy
    return {
        score: neurons.targeting_report(
            neurons.target(shift, score), labels[moved], responses, num_classes, norms=norms
        )
        for score in TARGET_SCORES
    }


def _input_gradients(task: Task) -> dict[str, Any]:
    def step(batch: data.Batch) -> dict[str, Array]:
        norms = neurons.input_gradient_norms(
            task.forward,
            task.variables,
            data.to_float(batch.image),
            layer=task.layer.name,
            unit=task.layer.unit,
            chunk=task.settings.chunk or None,
        )
        squared = norms.l2**2
        return {
            'gradient': squared,
            'gradient_error': jnp.zeros_like(squared),
            'gradient_l1': norms.l1,
            'gradient_linf': norms.linf,
        }

    return task.run(step, progress=task.wrap)


def probe_estimates(
    forward: Forward,
    variables: Variables,
    layers: Iterable[neurons.NeuronLayer],
    settings: config_lib.Neurons,
    run: Callable[..., dict[str, np.ndarray]],
    wrap: accuracy.Progress,
    key: PRNGKeyArray,
) -> dict[str, dict[str, np.ndarray]]:
    """Estimates squared norms of gradients of neurons: a probe serves all layers at once.

    Args:
      forward: the model.
      variables: its variables.
      layers: the layers.
      settings: number of probes, and unit.
      run: streams a function of batches over N images.
      wrap: of its iterator of batches.
      key: randomness of the probes.

    Returns:
      For each layer `gradient` and its standard error `gradient_error`, both `[N, neurons]`.
    """
    names = tuple(layer.name for layer in layers)

    def step(batch: data.Batch) -> dict[str, Array]:
        found = neurons.probe_gradients(
            forward,
            variables,
            data.to_float(batch.image),
            key,
            probes=settings.probes,
            layers=names,
            unit=settings.unit,
            index=batch.index,
        )
        values = {f'{name} value': found[name].value for name in names}
        return values | {f'{name} error': found[name].standard_error for name in names}

    arrays = run(step, progress=wrap)
    return {
        name: {'gradient': arrays[f'{name} value'], 'gradient_error': arrays[f'{name} error']}
        for name in names
    }


def _filtering(task: Task) -> dict[str, Any]:
    name = task.layer.kernel_layer
    if name is None:
        return {}
    kernel = kernels.by_layer(task.variables)[name]
    alphas = filtering.thresholds(kernel, task.settings.thresholds)
    curves = filtering_curves(
        task.forward, task.variables, task.run, task.wrap, task.attack, layer=name, alphas=alphas
    )
    return {'curves': curves}


def filtering_curves(
    forward: Forward,
    variables: Variables,
    run: Callable[..., dict[str, np.ndarray]],
    wrap: accuracy.Progress,
    attack: Any,
    *,
    layer: str | None,
    alphas: np.ndarray,
) -> dict[str, filtering.Curve]:
    """Sweeps one layer's kernel, or all, by each kind of filter.

    Args:
      forward: the model.
      variables: its variables.
      run: streams a function of batches over the data.
      wrap: of its iterator of batches.
      attack: makes the attacked images, see `fgsm_images`.
      layer: whose kernel; None for all at once.
      alphas: thresholds `[T]`.

    Returns:
      A curve for each of `filtering.KINDS`.
    """

    def step(batch: data.Batch) -> dict[str, Array]:
        x, found = data.to_float(batch.image), {}
        for kind in filtering.KINDS:
            # The first threshold removes nothing: the baseline, by the same program.
            sweep = jnp.append(filtering.removing_nothing(kind), alphas)
            result = filtering.filtering_responses(
                forward,
                variables,
                x,
                batch.label,
                alphas=sweep,
                kind=kind,
                layer=layer,
                attack=attack,
            )
            found[f'{kind} clean'] = result.clean
            assert result.adversarial is not None
            found[f'{kind} adversarial'] = result.adversarial
        return found

    arrays = run(step, progress=wrap)
    curves = {}
    for kind in filtering.KINDS:
        clean = arrays[f'{kind} clean'].mean(0)
        adversarial = arrays[f'{kind} adversarial'].mean(0)
        curves[kind] = filtering.Curve(
            alphas,
            filtering.present_shares(variables, jnp.asarray(alphas), kind, layer=layer),
            clean[1:],
            adversarial[1:],
            float(clean[0]),
            float(adversarial[0]),
        )
    return curves


@jax.jit
def _rows(values: Any, index: Array) -> Any:
    """Rows of arrays by their place; places of padding, beyond the end, give the last."""
    return jax.tree.map(lambda array: array.at[index].get(mode='clip'), values)


def _attack_through(task: Task) -> dict[str, Any]:
    statistics = task.measured['statistics']
    count = min(task.settings.attack_neurons, task.layer.neurons)
    # Images of undefined logits have no Delta; their neurons are left where they are.
    delta = np.nan_to_num(task.measured['delta'], nan=np.inf)
    chosen, change = attacks.easiest_neurons(
        delta, statistics.mean, statistics.std(), count, by=task.settings.ranking
    )
    aims = parallel.replicate(
        task.mesh, {'neurons': np.asarray(chosen), 'delta': np.asarray(change)}
    )
    threat = attacks.Threat(task.settings.attack_norm, task.settings.attack_eps)
    through: Callable[..., attacks.NeuronAttackResult] = functools.partial(
        attacks.neuron_attack,
        layer=task.layer.name,
        unit=task.layer.unit,
        straight_layer=task.settings.straight_layer or None,
        chunk=task.settings.chunk or None,
    )

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        predictions = predict_batch(task.forward, task.variables, batch)['predictions']
        # Logits that are NaN show no class to leave.
        defined = predictions >= 0
        problem = (task.forward, task.variables, x, jnp.maximum(predictions, 0), task.key)
        budget: dict[str, Any] = {
            'threat': threat,
            'steps': task.settings.attack_steps,
            'index': batch.index,
        }
        result = through(
            *problem,
            **budget,
            **_rows(aims, batch.index),
            weight=task.settings.attack_weight,
            start=task.settings.attack_start,
            restarts=task.settings.attack_restarts,
            keep=task.settings.attack_keep,
        )
        return {
            'success': result.success & defined[:, None],
            'reached': result.reached,
            'gain': result.gain,
            'pgd': defined
            & attacks.pgd(*problem, **budget, restarts=task.settings.attack_restarts).success,
        }

    arrays = task.run(step, progress=task.wrap)
    words = f'{threat.norm} eps {threat.eps:g}, {task.settings.attack_steps} steps'
    if task.settings.attack_start == 'random':
        words += f', {task.settings.attack_restarts} random starts'
    return {'through': ThroughNeurons(words, np.asarray(chosen), **arrays)}


LAYER_MEASURES: Mapping[str, Callable[[Task], dict[str, Any]]] = {
    'statistics': _statistics,
    'sensitivity': _sensitivity,
    'influence': _influence,
    'ablation': _ablation,
    'targeting': _targeting,
    'input_gradients': _input_gradients,
    'attack': _attack_through,
    'filtering': _filtering,
}
