"""Measures single neurons over a data set, with every measure of `neurosens.neurons`."""

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
from neurosens.attacks.representation import activation_and_logits
from neurosens.attacks.result import predicted_classes
from neurosens.evaluation import accuracy
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport, ThroughNeurons
from neurosens.forward import Forward, Variables
from neurosens.neurons import filtering
from neurosens.neurons.statistics import activation_summary, from_summary

# Both, since the sign of the correlation with fragility can differ between them.
TARGET_SCORES = ('l2', 'relative_l2', 'mean_log')


def chosen_layers(
    forward: Forward,
    variables: Variables,
    info: data.DatasetInfo,
    settings: config_lib.Neurons,
) -> tuple[neurons.NeuronLayer, ...]:
    """The layers to measure, without running the model: what is wrong with them shows here.

    Args:
      forward: the model.
      variables: its variables, or their shapes.
      info: the data set.
      settings: layers and measures.

    Returns:
      The layers named in the settings, or the default ones.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: the method of sensitivity, the mode of ablation or the straight layer of attacks
        does not fit.
    """
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    names = settings.layers or neurons.default_layers(forward, variables, image)
    layers = tuple(
        neurons.describe(forward, variables, image, name, unit=settings.unit) for name in names
    )
    for layer in layers:
        if 'sensitivity' in settings.measures and settings.method == 'closed_form':
            neurons.check_closed_form(layer.facts, layer.name)
        if 'ablation' in _with_prerequisites(settings.measures):
            _check_ablation(layer, settings.ablation)
        if 'attack' in settings.measures and settings.straight_layer:
            jax.eval_shape(
                functools.partial(
                    _straight_activation, forward, layer.name, settings.straight_layer
                ),
                variables,
                image,
            )
    return layers


def _check_ablation(layer: neurons.NeuronLayer, mode: str) -> None:
    if mode == 'weights' and not _has_filters(layer):
        raise ValueError(
            f"neurons.ablation is 'weights', but the neurons of layer {layer.name!r} are not the "
            "filters of a kernel; use 'activation', or name other layers."
        )


def _straight_activation(
    forward: Forward, layer: str, straight_layer: str, variables: Variables, x: Array
) -> Array:
    run = activation_and_logits(forward, variables, layer, straight_layer)
    return run(x[0], jax.random.key(0))[0]


def measure(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Neurons,
    key: PRNGKeyArray,
    *,
    split: str,
    eps: float,
    population: Sequence[data.Source] = (),
    progress: Callable[[str], accuracy.Progress] = lambda name: iter,
) -> NeuronReport:
    """Measures the neurons of a model on a data set.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      settings: layers and measures.
      key: randomness of the probes, folded with each image's position in the data set.
      split: name of the split, for the report.
      eps: linf radius of the FGSM attack behind targeting and attacked ablation, in pixel units.
      population: data sets over all of whose images statistics are taken; by default over the
        images that are measured.
      progress: from a label to a wrapper of an iterator of batches.

    Returns:
      The report; results do not depend on batches and devices.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: a measure does not fit a layer.
    """
    layers = chosen_layers(forward, variables, source.info, settings)
    run = functools.partial(
        accuracy.stream,
        source,
        mesh,
        settings.batch_size,
        limit=settings.limit or None,
    )
    label = functools.partial(_predicted, forward, variables)
    predicted = run(label, progress=progress('predictions'))
    attack = jax.tree_util.Partial(_fgsm, jnp.float32(eps))
    spread = [
        functools.partial(accuracy.stream, one, mesh, settings.batch_size) for one in population
    ]
    probed: dict[str, dict[str, np.ndarray]] = {}
    if 'input_gradients' in settings.measures and settings.probes:
        wrap = progress('input_gradients')
        probed = _probes(forward, variables, layers, settings, run, wrap, key)
    reports = []
    for layer in layers:
        measured: dict[str, Any] = {'layer': layer, **probed.get(layer.name, {})}
        for measure_name in _with_prerequisites(settings.measures):
            if measure_name == 'input_gradients' and settings.probes:
                continue
            wrap = progress(f'{layer.name} {measure_name}')
            task = _Task(
                forward, variables, layer, settings, run, wrap, attack, key, mesh, measured, spread
            )
            measured.update(_MEASURES[measure_name](task))
        if 'targeting' in settings.measures:
            measured['targeting'] = _targeting_reports(
                measured, predicted['labels'], source.info.num_classes, variables, layer
            )
        measured = {name: value for name, value in measured.items() if not name.startswith('_')}
        measured |= {'ranking': settings.ranking, 'agreement_top': settings.agreement_top}
        reports.append(LayerReport(**measured))
    curves = {}
    if 'network_filtering' in settings.measures:
        curves = _filtering_curves(
            forward,
            variables,
            run,
            progress('network_filtering'),
            attack,
            layer=None,
            alphas=filtering.global_thresholds(settings.thresholds),
        )
    return NeuronReport(
        source.info,
        split,
        predicted['labels'],
        predicted['predictions'],
        f'FGSM, linf eps {eps:g}',
        tuple(reports),
        curves,
    )


def _with_prerequisites(measures: Iterable[str]) -> list[str]:
    """The measures asked for and those that their summaries need, in a fixed order."""
    wanted = set(measures)
    if 'attack' in wanted:
        wanted.add('sensitivity')
    if 'sensitivity' in wanted:
        wanted.add('statistics')
    if 'targeting' in wanted:
        wanted.add('ablation')
    return [name for name in _MEASURES if name in wanted]


# ---------------------------------------------------------------------------------- per batch


@jax.jit
def _predicted(forward: Forward, variables: Variables, batch: data.Batch) -> dict[str, Array]:
    logits = forward(variables, data.to_float(batch.image))[0]
    return {'labels': batch.label, 'predictions': predicted_classes(logits)}


def _fgsm(eps: Array, forward: Forward, variables: Variables, x: Array, y: Array) -> Array:
    threat = attacks.Threat('linf', eps)
    return attacks.fgsm(forward, variables, x, y, jax.random.key(0), threat=threat).x_adv


_attack_batch = jax.jit(lambda attack, forward, variables, x, y: attack(forward, variables, x, y))


@functools.partial(jax.jit, static_argnames=('layer', 'unit'))
def _peaks(forward: Forward, variables: Variables, x: Array, layer: str, unit: str) -> Array:
    activation = forward(variables, x, taps=(layer,))[1][layer]
    if unit == 'unit' or activation.ndim <= 2:
        return activation.reshape(activation.shape[0], -1)
    return activation.max(tuple(range(1, activation.ndim - 1)))


# --------------------------------------------------------------------------------- per measure


class _Task(NamedTuple):
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


def _statistics(task: _Task) -> dict[str, Any]:
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


def _sensitivity(task: _Task) -> dict[str, Any]:
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


def _influence(task: _Task) -> dict[str, Any]:
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


def _ablation(task: _Task) -> dict[str, Any]:
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


def _targeting(task: _Task) -> dict[str, Any]:
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


def _has_filters(layer: neurons.NeuronLayer) -> bool:
    return layer.kernel_layer is not None and layer.unit == 'channel'


def _is_filter(layer: neurons.NeuronLayer) -> bool:
    return _has_filters(layer) and len(layer.shape) > 1


def _targeting_reports(
    measured: dict[str, Any],
    labels: np.ndarray,
    num_classes: int,
    variables: Variables,
    layer: neurons.NeuronLayer,
) -> dict[str, neurons.TargetingReport]:
    moved: Bool[np.ndarray, ' images'] = measured['_moved']
    if not moved.any():
        return {}
    shift = jax.tree.map(lambda leaf: leaf[moved], measured['_shift'])
    norms = None
    if layer.kernel_layer is not None and _has_filters(layer):
        norms = np.asarray(filtering.filter_norms(variables, layer.kernel_layer))
    responses = measured['clean'].accuracy
    return {
        score: neurons.targeting_report(
            neurons.target(shift, score), labels[moved], responses, num_classes, norms=norms
        )
        for score in TARGET_SCORES
    }


def _input_gradients(task: _Task) -> dict[str, Any]:
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


def _probes(
    forward: Forward,
    variables: Variables,
    layers: Iterable[neurons.NeuronLayer],
    settings: config_lib.Neurons,
    run: Callable[..., dict[str, np.ndarray]],
    wrap: accuracy.Progress,
    key: PRNGKeyArray,
) -> dict[str, dict[str, np.ndarray]]:
    """Estimates of squared gradient norms: a probe serves all layers at once."""
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


def _filtering(task: _Task) -> dict[str, Any]:
    name = task.layer.kernel_layer
    if name is None:
        return {}
    alphas = filtering.thresholds(filtering.kernels(task.variables)[name], task.settings.thresholds)
    curves = _filtering_curves(
        task.forward, task.variables, task.run, task.wrap, task.attack, layer=name, alphas=alphas
    )
    return {'curves': curves}


def _filtering_curves(
    forward: Forward,
    variables: Variables,
    run: Callable[..., dict[str, np.ndarray]],
    wrap: accuracy.Progress,
    attack: Any,
    *,
    layer: str | None,
    alphas: np.ndarray,
) -> dict[str, filtering.Curve]:
    """A sweep of one layer's kernel, or of all, by each kind of filter."""

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


def _attack_through(task: _Task) -> dict[str, Any]:
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
        predictions = _predicted(task.forward, task.variables, batch)['predictions']
        problem = (task.forward, task.variables, x, predictions, task.key)
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
            'success': result.success,
            'reached': result.reached,
            'gain': result.gain,
            'pgd': attacks.pgd(*problem, **budget, restarts=task.settings.attack_restarts).success,
        }

    arrays = task.run(step, progress=task.wrap)
    words = f'{threat.norm} eps {threat.eps:g}, {task.settings.attack_steps} steps'
    if task.settings.attack_start == 'random':
        words += f', {task.settings.attack_restarts} random starts'
    return {'through': ThroughNeurons(words, np.asarray(chosen), **arrays)}


_MEASURES: Mapping[str, Callable[[_Task], dict[str, Any]]] = {
    'statistics': _statistics,
    'sensitivity': _sensitivity,
    'influence': _influence,
    'ablation': _ablation,
    'targeting': _targeting,
    'input_gradients': _input_gradients,
    'attack': _attack_through,
    'filtering': _filtering,
}


def fetch_images(
    source: data.Source, wanted: Iterable[int], limit: int | None, batch_size: int = 256
) -> dict[int, np.ndarray]:
    """Reads single images of a data set by their positions.

    Args:
      source: the data.
      wanted: positions.
      limit: as in the evaluation that named them.
      batch_size: images read at once.

    Returns:
      uint8 images `[H, W, C]` by position.
    """
    missing, found = set(wanted), {}
    for batch in source.eval_batches(batch_size=batch_size, limit=limit):
        for row, position in enumerate(batch.index):
            if batch.mask[row] and int(position) in missing:
                found[int(position)] = batch.image[row]
                missing.discard(int(position))
        if not missing:
            break
    return found
