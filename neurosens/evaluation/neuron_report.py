"""What single neurons of a model do over a data set: every measure of `neurosens.neurons`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens import attacks, data, neurons
from neurosens import config as config_lib
from neurosens.evaluation import accuracy
from neurosens.forward import Forward, Variables
from neurosens.neurons import filtering
from neurosens.neurons.statistics import activation_summary, from_summary

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Both, since the sign of the correlation with fragility can differ between them.
TARGET_SCORES = ('l2', 'relative_l2')


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Everything measured of one layer of N neurons on M images; None where it was not asked for.

    Attributes:
      layer: the layer.
      statistics: of its activations.
      peak: largest activation of each neuron over its positions, per image `[M, N]`.
      method: how Delta was computed.
      delta: Delta(i, x) `[M, N]`.
      flips_to: the class it flips to `[M, N]`.
      influence: signed influence on the predicted class `[M, N]`.
      clean: nodal-dropout responses on clean images.
      attacked: the same on attacked images.
      fragility: labels by the accuracy response on clean images.
      attacked_fragility: labels by that on attacked images.
      targeting: for each score, which neurons the attack targets.
      shift: mean change of each neuron under the attack, over the images that it moves `[N]`.
      gradient: estimate of the squared input gradient norm `[M, N]`.
      gradient_error: its standard error `[M, N]`.
      curves: synaptic filtering of the layer's kernel, for each kind of filter.
    """

    layer: neurons.NeuronLayer
    statistics: neurons.Statistics | None = None
    peak: Float[np.ndarray, 'images neurons'] | None = None
    method: str = ''
    delta: Float[np.ndarray, 'images neurons'] | None = None
    flips_to: Int[np.ndarray, 'images neurons'] | None = None
    influence: Float[np.ndarray, 'images neurons'] | None = None
    clean: neurons.Response | None = None
    attacked: neurons.Response | None = None
    fragility: neurons.Fragility | None = None
    attacked_fragility: neurons.Fragility | None = None
    targeting: Mapping[str, neurons.TargetingReport] = dataclasses.field(default_factory=dict)
    shift: Float[np.ndarray, ' neurons'] | None = None
    gradient: Float[np.ndarray, 'images neurons'] | None = None
    gradient_error: Float[np.ndarray, 'images neurons'] | None = None
    curves: Mapping[str, filtering.Curve] = dataclasses.field(default_factory=dict)

    def scaled_distance(self) -> Float[np.ndarray, 'images neurons']:
        """|Delta| in standard deviations of the neuron `[M, N]`; infinite for a dead neuron."""
        assert self.delta is not None and self.statistics is not None
        statistics = self.statistics
        return np.asarray(
            neurons.scaled_sensitivity(
                self.delta, statistics.mean, statistics.std(), 'scaled_absolute'
            )
        )

    def mean_scaled_delta(self) -> Float[np.ndarray, ' neurons']:
        """Mean of (Delta - mean) / std where finite `[N]`: the summary of Suri & Evans."""
        assert self.delta is not None and self.statistics is not None
        score = neurons.scaled_sensitivity(
            self.delta, self.statistics.mean, self.statistics.std(), 'scaled'
        )
        return neurons.mean_where_finite(np.asarray(score))

    def importance(self) -> dict[str, Float[np.ndarray, ' neurons']]:
        """One value per neuron for each measure, larger where the neuron matters more.

        Returns:
          `sensitivity`: median over images of std / |Delta|, 0 where most images cannot be flipped;
          `influence`: mean of |influence|; `ablation` and `ablation_attacked`: rise of the loss
          without the neuron; `targeting`: mean norm of its change under the attack;
          `input_gradient`: root of the mean squared gradient norm.
        """
        values = {}
        if self.delta is not None:
            # Images with undefined logits say nothing of any neuron.
            distance = self.scaled_distance()
            with np.errstate(divide='ignore'):
                closeness = 1 / distance[~np.isnan(distance).all(1)]
            if len(closeness):
                values['sensitivity'] = np.median(closeness, axis=0)
        if self.influence is not None:
            values['influence'] = np.abs(self.influence).mean(0)
        if self.clean is not None:
            values['ablation'] = self.clean.loss
        if self.attacked is not None:
            values['ablation_attacked'] = self.attacked.loss
        if 'l2' in self.targeting:
            values['targeting'] = self.targeting['l2'].mean_score
        if self.gradient is not None:
            values['input_gradient'] = np.sqrt(self.gradient.mean(0))
        return values

    def agreement(self) -> neurons.Agreement | None:
        """How far the measures of `importance` agree; None for fewer than two of them."""
        measures = self.importance()
        return neurons.agreement(measures) if len(measures) > 1 else None


@dataclasses.dataclass(frozen=True)
class NeuronReport:
    """Reports of several layers of a model on the first M images of a data set.

    Attributes:
      info: the data set.
      split: its split.
      labels: labels of the images, int32 `[M]`.
      predictions: predicted classes, int32 `[M]`.
      attack: the attack in words.
      layers: one report per layer.
    """

    info: data.DatasetInfo
    split: str
    labels: Int[np.ndarray, ' images']
    predictions: Int[np.ndarray, ' images']
    attack: str
    layers: tuple[LayerReport, ...]


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
      ValueError: the method of sensitivity does not fit a layer.
    """
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    names = settings.layers or neurons.default_layers(forward, variables, image)
    layers = tuple(
        neurons.describe(forward, variables, image, name, unit=settings.unit) for name in names
    )
    for layer in layers:
        if 'sensitivity' in settings.measures and settings.method == 'closed_form':
            neurons.check_closed_form(layer.facts, layer.name)
    return layers


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
    reports = []
    for layer in layers:
        measured: dict[str, Any] = {'layer': layer}
        for measure_name in _with_prerequisites(settings.measures):
            wrap = progress(f'{layer.name} {measure_name}')
            step = functools.partial(_MEASURES[measure_name], forward, variables, layer, settings)
            measured.update(step(run=run, wrap=wrap, attack=attack, key=key, predicted=predicted))
        if 'targeting' in settings.measures:
            measured['targeting'] = _targeting_reports(
                measured, predicted['labels'], source.info.num_classes, variables, layer
            )
        measured = {name: value for name, value in measured.items() if not name.startswith('_')}
        reports.append(LayerReport(**measured))
    return NeuronReport(
        source.info,
        split,
        predicted['labels'],
        predicted['predictions'],
        f'FGSM, linf eps {eps:g}',
        tuple(reports),
    )


def _with_prerequisites(measures: Iterable[str]) -> list[str]:
    """The measures asked for and those that their summaries need, in a fixed order."""
    wanted = set(measures)
    if 'sensitivity' in wanted:
        wanted.add('statistics')
    if 'targeting' in wanted:
        wanted.add('ablation')
    return [name for name in config_lib.MEASURES if name in wanted]


# ---------------------------------------------------------------------------------- per batch


@jax.jit
def _predicted(forward: Forward, variables: Variables, batch: data.Batch) -> dict[str, Array]:
    logits = forward(variables, data.to_float(batch.image))[0]
    return {'labels': batch.label, 'predictions': logits.argmax(-1).astype(jnp.int32)}


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

Run = Callable[..., dict[str, np.ndarray]]


def _statistics(
    forward: Forward,
    variables: Variables,
    layer: neurons.NeuronLayer,
    settings: config_lib.Neurons,
    *,
    run: Run,
    wrap: accuracy.Progress,
    **rest: Any,
) -> dict[str, Any]:
    del rest
    total: list[neurons.Statistics] = []
    pending: list[Any] = []

    def fetch() -> None:
        while pending:
            part = from_summary(pending.pop())
            total[:] = [neurons.merge(total[0], part)] if total else [part]

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        summary = activation_summary(
            forward, variables, x, batch.mask, layer=layer.name, unit=layer.unit
        )
        # Fetched one batch late, so that devices do not wait for the host.
        fetch()
        pending.append(summary)
        return {'peak': _peaks(forward, variables, x, layer.name, layer.unit)}

    arrays = run(step, progress=wrap)
    fetch()
    return {'statistics': total[0], 'peak': arrays['peak']}


def _sensitivity(
    forward: Forward,
    variables: Variables,
    layer: neurons.NeuronLayer,
    settings: config_lib.Neurons,
    *,
    run: Run,
    wrap: accuracy.Progress,
    **rest: Any,
) -> dict[str, Any]:
    del rest
    method = settings.method
    if method == 'auto':
        method = 'closed_form' if layer.facts.affine_tail else 'first_order'

    def step(batch: data.Batch) -> dict[str, Array]:
        result = neurons.sensitivity(
            forward,
            variables,
            data.to_float(batch.image),
            layer=layer.name,
            unit=layer.unit,
            method=method,
            chunk=settings.chunk or None,
        )
        return result._asdict()

    return {'method': method, **run(step, progress=wrap)}


def _influence(
    forward: Forward,
    variables: Variables,
    layer: neurons.NeuronLayer,
    settings: config_lib.Neurons,
    *,
    run: Run,
    wrap: accuracy.Progress,
    **rest: Any,
) -> dict[str, Any]:
    del settings, rest

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        values = neurons.influence(forward, variables, x, layer=layer.name, unit=layer.unit)
        return {'influence': values}

    return run(step, progress=wrap)


def _ablation(
    forward: Forward,
    variables: Variables,
    layer: neurons.NeuronLayer,
    settings: config_lib.Neurons,
    *,
    run: Run,
    wrap: accuracy.Progress,
    attack: Any,
    **rest: Any,
) -> dict[str, Any]:
    del rest
    ablate = functools.partial(
        neurons.ablation,
        forward,
        variables,
        layer=layer.name,
        unit=layer.unit,
        chunk=settings.chunk or None,
    )

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        attacked = ablate(_attack_batch(attack, forward, variables, x, batch.label), batch.label)
        clean = ablate(x, batch.label)
        return {
            **{f'clean {name}': value for name, value in clean._asdict().items()},
            **{f'attacked {name}': value for name, value in attacked._asdict().items()},
        }

    arrays = run(step, progress=wrap)
    results = {}
    for kind in ('clean', 'attacked'):
        fields = (arrays[f'{kind} {name}'] for name in neurons.Ablation._fields)
        results[kind] = neurons.response(neurons.Ablation._make(fields))
    rule = settings.fragile
    return {
        **results,
        'fragility': neurons.fragility(results['clean'].accuracy, rule),
        'attacked_fragility': neurons.fragility(results['attacked'].accuracy, rule),
    }


def _targeting(
    forward: Forward,
    variables: Variables,
    layer: neurons.NeuronLayer,
    settings: config_lib.Neurons,
    *,
    run: Run,
    wrap: accuracy.Progress,
    attack: Any,
    **rest: Any,
) -> dict[str, Any]:
    del settings, rest
    # Feature maps before the normalisation where the layer belongs to filters.
    name = layer.kernel_layer if _is_filter(layer) else layer.name

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        x_adv = _attack_batch(attack, forward, variables, x, batch.label)
        target = functools.partial(neurons.shift, forward, variables, x, x_adv, unit=layer.unit)
        before = target(layer=name)
        moved = (x_adv != x).reshape(len(x), -1).any(-1)
        return {**before._asdict(), 'after': target(layer=layer.name).mean, 'moved': moved}

    arrays = run(step, progress=wrap)
    # The attack leaves images that are misclassified already as they are.
    moved = arrays.pop('moved')
    after = arrays.pop('after')
    shift = after[moved].mean(0) if moved.any() else np.full(layer.neurons, np.nan)
    return {
        'shift': shift,
        '_shift': neurons.Shift._make(arrays[name] for name in neurons.Shift._fields),
        '_moved': moved,
    }


def _is_filter(layer: neurons.NeuronLayer) -> bool:
    return layer.kernel_layer is not None and layer.unit == 'channel' and len(layer.shape) > 1


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
    if layer.kernel_layer is not None and layer.unit == 'channel':
        norms = np.asarray(filtering.filter_norms(variables, layer.kernel_layer))
    responses = measured['clean'].accuracy
    return {
        score: neurons.targeting_report(
            neurons.target(shift, score), labels[moved], responses, num_classes, norms=norms
        )
        for score in TARGET_SCORES
    }


def _input_gradients(
    forward: Forward,
    variables: Variables,
    layer: neurons.NeuronLayer,
    settings: config_lib.Neurons,
    *,
    run: Run,
    wrap: accuracy.Progress,
    key: PRNGKeyArray,
    **rest: Any,
) -> dict[str, Any]:
    del rest

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        if settings.probes == 0:
            norms = neurons.input_gradient_norms(
                forward,
                variables,
                x,
                layer=layer.name,
                unit=layer.unit,
                chunk=settings.chunk or None,
            )
            squared = norms.l2**2
            return {'gradient': squared, 'gradient_error': jnp.zeros_like(squared)}
        estimate = neurons.probe_gradients(
            forward,
            variables,
            x,
            key,
            probes=settings.probes,
            layers=(layer.name,),
            unit=layer.unit,
            index=batch.index,
        )[layer.name]
        return {'gradient': estimate.value, 'gradient_error': estimate.standard_error}

    return run(step, progress=wrap)


def _filtering(
    forward: Forward,
    variables: Variables,
    layer: neurons.NeuronLayer,
    settings: config_lib.Neurons,
    *,
    run: Run,
    wrap: accuracy.Progress,
    attack: Any,
    **rest: Any,
) -> dict[str, Any]:
    del rest
    if layer.kernel_layer is None:
        return {}
    name = layer.kernel_layer
    alphas = filtering.thresholds(filtering.kernels(variables)[name], settings.thresholds)

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
                layer=name,
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
            filtering.present_shares(variables, jnp.asarray(alphas), kind, layer=name),
            clean[1:],
            adversarial[1:],
            float(clean[0]),
            float(adversarial[0]),
        )
    return {'curves': curves}


_MEASURES: Mapping[str, Callable[..., dict[str, Any]]] = {
    'statistics': _statistics,
    'sensitivity': _sensitivity,
    'influence': _influence,
    'ablation': _ablation,
    'targeting': _targeting,
    'input_gradients': _input_gradients,
    'filtering': _filtering,
}


# ------------------------------------------------------------------------------------- tables


def arrays(report: NeuronReport, layer: LayerReport) -> dict[str, np.ndarray]:
    """Every array of a layer's report, as `evaluate.py` writes them to one `.npz` file.

    Args:
      report: the whole report.
      layer: one of its layers, of N neurons on M images, K classes.

    Returns:
      Of these, what was measured:
      `labels`, `predictions` `[M]`; `peak_activation` `[M, N]`;
      `mean`, `std` (ddof 1), `minimum`, `maximum`, `zero_share` `[N]`; `quantiles` `[Q, N]` at
      `quantile_levels` `[Q]`;
      `delta`, `flips_to` `[M, N]`; `mean_scaled_delta` `[N]`;
      `influence` `[M, N]`, `class_influence` `[K, N]` (mean per label);
      `ablation_accuracy`, `ablation_loss`, `ablation_margin`, the same with `_attacked`, and
      `fragile`, `fragile_attacked` `[N]`;
      `shift` `[N]`; `target_<score>` (mean t_k) and `target_histogram_<score>` `[N]`,
      `target_class_histogram_<score>` `[K, N]`;
      `input_gradient_squared`, `input_gradient_squared_error` `[M, N]`;
      `filtering_<kind>` `[T, 4]`: threshold, share present, accuracy clean and under FGSM.
    """
    found: dict[str, Any] = {'labels': report.labels, 'predictions': report.predictions}
    if (statistics := layer.statistics) is not None:
        found['peak_activation'] = layer.peak
        found['mean'], found['std'] = statistics.mean, statistics.std()
        found['minimum'], found['maximum'] = statistics.minimum, statistics.maximum
        found['zero_share'] = statistics.zero_share()
        found['quantiles'] = statistics.quantile(QUANTILES)
        found['quantile_levels'] = np.array(QUANTILES)
    if layer.delta is not None:
        found['delta'], found['flips_to'] = layer.delta, layer.flips_to
        if statistics is not None:
            found['mean_scaled_delta'] = layer.mean_scaled_delta()
    if layer.influence is not None:
        found['influence'] = layer.influence
        found['class_influence'] = neurons.class_influence(
            layer.influence, report.labels, report.info.num_classes
        )
    for suffix, response, label in (
        ('', layer.clean, layer.fragility),
        ('_attacked', layer.attacked, layer.attacked_fragility),
    ):
        if response is not None and label is not None:
            for name in ('accuracy', 'loss', 'margin'):
                found[f'ablation_{name}{suffix}'] = getattr(response, name)
            found[f'fragile{suffix}'] = label.fragile
    if layer.shift is not None:
        found['shift'] = layer.shift
    for score, targeting in layer.targeting.items():
        found[f'target_{score}'] = targeting.mean_score
        found[f'target_histogram_{score}'] = targeting.histogram
        found[f'target_class_histogram_{score}'] = targeting.class_histogram
    if layer.gradient is not None:
        found['input_gradient_squared'] = layer.gradient
        found['input_gradient_squared_error'] = layer.gradient_error
    for kind, curve in layer.curves.items():
        found[f'filtering_{kind}'] = np.stack(curve[:4], axis=1)
    return found


def per_neuron(report: NeuronReport, layer: LayerReport) -> dict[str, np.ndarray]:
    """The columns of `neurons.csv`: one value per neuron.

    Args:
      report: the whole report.
      layer: one of its layers.

    Returns:
      The arrays `[N]` of `arrays`, medians over images of |Delta|, the share of images in which no
      change flips the prediction, mean influence, and root mean squared gradient norm.
    """
    everything = arrays(report, layer)
    columns = {
        name: value
        for name, value in everything.items()
        if value.shape == (layer.layer.neurons,)
        and name not in ('labels', 'predictions', 'quantile_levels')
    }
    if layer.delta is not None:
        columns['median_absolute_delta'] = np.median(np.abs(layer.delta), axis=0)
        columns['unreachable_share'] = np.isinf(layer.delta).mean(0)
    if layer.influence is not None:
        columns['mean_influence'] = layer.influence.mean(0)
    if layer.gradient is not None:
        columns['input_gradient'] = np.sqrt(layer.gradient.mean(0))
    return columns


def facts(report: NeuronReport, prefix: str = 'neurons') -> dict[str, Any]:
    """The report's scalar results under flat keys, for `results.json`.

    Args:
      report: the report.
      prefix: first part of every key.

    Returns:
      Keys `<prefix>/<layer>/<fact>`: the number of neurons, how Delta was computed, the median of
      |Delta| / std over images and neurons, the rules and counts of fragile neurons, correlations
      with their p-values, filtering scores, and the rank correlations between measures.
    """
    flat: dict[str, Any] = {f'{prefix}/images': len(report.labels)}
    for layer in report.layers:
        base = f'{prefix}/{layer.layer.name}'
        flat[f'{base}/neurons'] = layer.layer.neurons
        if layer.delta is not None:
            flat[f'{base}/sensitivity_method'] = layer.method
            flat[f'{base}/unreachable_share'] = float(np.isinf(layer.delta).mean())
            flat[f'{base}/median_absolute_delta'] = _finite(np.median(np.abs(layer.delta)))
            flat[f'{base}/median_scaled_distance'] = _finite(np.median(layer.scaled_distance()))
        for name, label in (
            ('fragile', layer.fragility),
            ('fragile_attacked', layer.attacked_fragility),
        ):
            if label is not None:
                flat[f'{base}/{name}'] = int(label.fragile.sum())
                flat[f'{base}/{name}_rule'] = label.rule
        for score, targeting in layer.targeting.items():
            for name in (
                'score_correlation',
                'histogram_correlation',
                'score_partial',
                'histogram_partial',
            ):
                found = getattr(targeting, name)
                if found is not None:
                    flat[f'{base}/targeting_{score}_{name}'] = _finite(found.value)
                    flat[f'{base}/targeting_{score}_{name}_p'] = _finite(found.p_value)
        for kind, curve in layer.curves.items():
            for name, value in filtering.scores(curve)._asdict().items():
                flat[f'{base}/filtering_{kind}_{name}'] = _finite(value)
        agreement = layer.agreement()
        if agreement is not None:
            for i, first in enumerate(agreement.names):
                for j in range(i + 1, len(agreement.names)):
                    key = f'{base}/agreement/{first}-{agreement.names[j]}'
                    flat[key] = _finite(agreement.rho[i, j])
    return flat


def _finite(value: float) -> float | None:
    """A number that JSON can hold: NaN and infinity are no JSON."""
    return float(value) if np.isfinite(value) else None


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
