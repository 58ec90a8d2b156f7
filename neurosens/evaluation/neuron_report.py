"""Reports on single neurons of a model over a data set: what they hold, as arrays and as facts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from neurosens import attacks, data, neurons
from neurosens.neurons import filtering

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclasses.dataclass(frozen=True)
class ThroughNeurons:
    """Attacks through the n easiest neurons of each of M images, beside PGD on the whole model.

    Both leave the class that the model predicts, within the same threat and with equally many
    steps.

    Attributes:
      attack: the threat and the steps in words.
      neurons: the neurons, the easiest first `[M, n]`.
      success: whether the attack through each changed the prediction `[M, n]`.
      reached: whether the neuron reached its Delta on the way `[M, n]`.
      gain: the largest share of Delta by which it moved `[M, n]`.
      pgd: whether PGD changed the prediction `[M]`.
    """

    attack: str
    neurons: Int[np.ndarray, 'images n']
    success: Bool[np.ndarray, 'images n']
    reached: Bool[np.ndarray, 'images n']
    gain: Float[np.ndarray, 'images n']
    pgd: Bool[np.ndarray, ' images']

    def summary(self) -> attacks.NeuronAttackReport:
        """Success of the first 1, 4, 8, 16 and all n neurons, and by rank."""
        attacked = self.success.shape[1]
        counts = sorted({count for count in (1, 4, 8, 16) if count < attacked} | {attacked})
        return attacks.neuron_attack_report(self, counts)


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
      front: how many neurons of the largest influence are front neurons.
      tail: how many of the smallest are tail neurons.
      clean: nodal-dropout responses on clean images.
      attacked: the same on attacked images.
      fragility: labels by the accuracy response on clean images.
      attacked_fragility: labels by that on attacked images.
      targeting: for each score, which neurons the attack targets.
      shift: mean change of each neuron under the attack, over the images that it moves `[N]`.
      gradient: estimate of the squared input gradient norm `[M, N]`.
      gradient_error: its standard error `[M, N]`.
      gradient_l1: l1 norm of the input gradient, where gradients are exact `[M, N]`.
      gradient_linf: its linf norm `[M, N]`.
      curves: synaptic filtering of the layer's kernel, for each kind of filter.
      through: the attacks through the easiest neurons of each image.
      ranking: the score of Delta that ranks neurons, see `neurosens.neurons.scaled_sensitivity`.
      agreement_top: how many neurons count as those that matter most; 0 for a tenth of them.
      varying: which neurons are not constant over the M images `[N]`.
    """

    layer: neurons.NeuronLayer
    statistics: neurons.Statistics | None = None
    peak: Float[np.ndarray, 'images neurons'] | None = None
    method: str = ''
    delta: Float[np.ndarray, 'images neurons'] | None = None
    flips_to: Int[np.ndarray, 'images neurons'] | None = None
    influence: Float[np.ndarray, 'images neurons'] | None = None
    front: int = 0
    tail: int = 0
    clean: neurons.Response | None = None
    attacked: neurons.Response | None = None
    fragility: neurons.Fragility | None = None
    attacked_fragility: neurons.Fragility | None = None
    targeting: Mapping[str, neurons.TargetingReport] = dataclasses.field(default_factory=dict)
    shift: Float[np.ndarray, ' neurons'] | None = None
    gradient: Float[np.ndarray, 'images neurons'] | None = None
    gradient_error: Float[np.ndarray, 'images neurons'] | None = None
    gradient_l1: Float[np.ndarray, 'images neurons'] | None = None
    gradient_linf: Float[np.ndarray, 'images neurons'] | None = None
    curves: Mapping[str, filtering.Curve] = dataclasses.field(default_factory=dict)
    through: ThroughNeurons | None = None
    ranking: str = 'scaled'
    agreement_top: int = 0
    varying: Bool[np.ndarray, ' neurons'] | None = None

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

    def sensitivity_rank(self) -> Int[np.ndarray, ' neurons']:
        """Place of each neuron by its mean score where that is finite, 0 for the easiest `[N]`."""
        assert self.delta is not None and self.statistics is not None
        score = neurons.scaled_sensitivity(
            self.delta, self.statistics.mean, self.statistics.std(), self.ranking
        )
        mean = jnp.asarray(neurons.mean_where_finite(np.asarray(score)))
        order = np.asarray(neurons.ranking(mean))
        return np.argsort(order).astype(np.int32)

    def influence_groups(
        self, influence: Float[np.ndarray, ' neurons']
    ) -> Int[np.ndarray, ' neurons']:
        """1 for front neurons, -1 for tail neurons, else 0, by one influence for each `[N]`."""
        part = neurons.partition(jnp.asarray(influence), front=self.front, tail=self.tail)
        return np.asarray(neurons.labels(part, self.layer.neurons))

    def importance(self) -> dict[str, Float[np.ndarray, ' neurons']]:
        """One value per neuron for each measure, larger where the neuron matters more.

        Returns:
          `sensitivity`: median over images of std / |Delta|, 0 where most images cannot be flipped;
          `influence`: mean of |influence|; `ablation` and `ablation_attacked`: rise of the loss
          without the neuron; `targeting`: mean l2 norm of its change under the attack,
          `targeting_relative` of that relative to the clean activation, and `targeting_log` of the
          logarithm of the change; `input_gradient`: root of the mean squared l2 gradient norm.
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
        for name, score in (
            ('targeting', 'l2'),
            ('targeting_relative', 'relative_l2'),
            ('targeting_log', 'mean_log'),
        ):
            if score in self.targeting:
                values[name] = self.targeting[score].mean_score
        if self.gradient is not None:
            values['input_gradient'] = np.sqrt(self.gradient.mean(0))
        return values

    @functools.cached_property
    def agreement(self) -> neurons.Agreement | None:
        """How far the measures of `importance` agree; None for fewer than two, or no neuron.

        Where activations were measured, neurons that are constant over these images are left out:
        most measures put dead ones last together, which would make them agree.
        """
        measures = self.importance()
        if self.varying is not None:
            measures = {name: values[self.varying] for name, values in measures.items()}
        count = min((len(values) for values in measures.values()), default=0)
        if len(measures) < 2 or not count:
            return None
        top_k = min(self.agreement_top, count) or None
        return neurons.agreement(measures, top_k=top_k)


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
      curves: synaptic filtering of all kernels with the same thresholds, by kind of filter.
    """

    info: data.DatasetInfo
    split: str
    labels: Int[np.ndarray, ' images']
    predictions: Int[np.ndarray, ' images']
    attack: str
    layers: tuple[LayerReport, ...]
    curves: Mapping[str, filtering.Curve] = dataclasses.field(default_factory=dict)


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
      `delta`, `flips_to` `[M, N]`; `mean_scaled_delta`, `sensitivity_rank` `[N]`;
      `influence` `[M, N]`, `class_influence` `[K, N]` (mean over the images of a class that
      are classified correctly), `influence_groups` `[N]`
      and `class_influence_groups` `[K, N]` (1 front, 0 middle, -1 tail of the means);
      `ablation_accuracy`, `ablation_loss`, `ablation_margin`, the same with `_attacked`, and
      `fragile`, `fragile_attacked` `[N]`, by the rules `fragile_rule`, `fragile_rule_attacked`;
      `shift` `[N]`; `target_<score>` (mean t_k) and `target_histogram_<score>` `[N]`,
      `target_class_histogram_<score>` `[K, N]`;
      `input_gradient_squared`, `input_gradient_squared_error` `[M, N]`, and of exact gradients
      `input_gradient_l1`, `input_gradient_linf`;
      `attack_neurons`, `attack_success`, `attack_reached`, `attack_gain` `[M, n]` and `attack_pgd`
      `[M]`, see `ThroughNeurons`;
      `filtering_<kind>` `[T, 4]`: threshold, share present, accuracy clean and under FGSM;
      `filtering_<kind>_baselines` `[2]`, those accuracies with nothing removed, and
      `filtering_<kind>_scores` `[3]`, clean, adversarial and their difference.
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
            found['sensitivity_rank'] = layer.sensitivity_rank()
    if layer.influence is not None:
        found['influence'] = layer.influence
        # Influence is that on the predicted class, which should be the one it is called after.
        right = report.predictions == report.labels
        of_classes = neurons.class_influence(
            layer.influence[right], report.labels[right], report.info.num_classes
        )
        found['class_influence'] = of_classes
        found['influence_groups'] = layer.influence_groups(layer.influence.mean(0))
        # A class without images has no groups.
        found['class_influence_groups'] = np.stack(
            [layer.influence_groups(row) * np.isfinite(row) for row in of_classes]
        )
    for suffix, response, label in (
        ('', layer.clean, layer.fragility),
        ('_attacked', layer.attacked, layer.attacked_fragility),
    ):
        if response is not None and label is not None:
            for name in ('accuracy', 'loss', 'margin'):
                found[f'ablation_{name}{suffix}'] = getattr(response, name)
            found[f'fragile{suffix}'] = label.fragile
            found[f'fragile_rule{suffix}'] = np.array(label.rule)
    if layer.shift is not None:
        found['shift'] = layer.shift
    for score, targeting in layer.targeting.items():
        found[f'target_{score}'] = targeting.mean_score
        found[f'target_histogram_{score}'] = targeting.histogram
        found[f'target_class_histogram_{score}'] = targeting.class_histogram
    if layer.gradient is not None:
        found['input_gradient_squared'] = layer.gradient
        found['input_gradient_squared_error'] = layer.gradient_error
    if layer.gradient_l1 is not None:
        found['input_gradient_l1'] = layer.gradient_l1
        found['input_gradient_linf'] = layer.gradient_linf
    if layer.through is not None:
        for name in ('neurons', 'success', 'reached', 'gain', 'pgd'):
            found[f'attack_{name}'] = getattr(layer.through, name)
    return found | curve_arrays(layer.curves)


def curve_arrays(curves: Mapping[str, filtering.Curve]) -> dict[str, np.ndarray]:
    """Filtering sweeps as arrays, with what their scores are made of; see `arrays`."""
    found = {}
    for kind, curve in curves.items():
        found[f'filtering_{kind}'] = np.stack(curve[:4], axis=1)
        found[f'filtering_{kind}_baselines'] = np.array(curve[4:6])
        found[f'filtering_{kind}_scores'] = np.array(filtering.scores(curve))
    return found


def per_neuron(report: NeuronReport, layer: LayerReport) -> dict[str, np.ndarray]:
    """The columns of `neurons.csv`: one value per neuron.

    Args:
      report: the whole report.
      layer: one of its layers.

    Returns:
      The arrays `[N]` of `arrays`, medians over images of |Delta| and of |Delta| / std, the share
      of images in which no change flips the prediction, mean influence, and the gradient norms:
      root mean square of l2, and means of l1 and linf where they are exact.
    """
    everything = arrays(report, layer)
    columns = {
        name: value
        for name, value in everything.items()
        if value.shape == (layer.layer.neurons,)
        and name not in ('labels', 'predictions', 'quantile_levels', 'attack_pgd')
        and not name.startswith('filtering_')
    }
    if layer.delta is not None:
        columns['median_absolute_delta'] = _medians(np.abs(layer.delta))
        if layer.statistics is not None:
            columns['median_scaled_distance'] = _medians(layer.scaled_distance())
        columns['unreachable_share'] = np.isinf(layer.delta).mean(0)
    if layer.influence is not None:
        columns['mean_influence'] = layer.influence.mean(0)
    if layer.gradient is not None:
        columns['input_gradient'] = np.sqrt(layer.gradient.mean(0))
    for norm, values in (('l1', layer.gradient_l1), ('linf', layer.gradient_linf)):
        if values is not None:
            columns[f'input_gradient_{norm}'] = values.mean(0)
    return columns


def _medians(values: Float[np.ndarray, 'images neurons']) -> Float[np.ndarray, ' neurons']:
    """Medians over the images whose logits are defined `[N]`; NaN where there is none."""
    values = values[~np.isnan(values).all(1)]
    return np.median(values, axis=0) if len(values) else np.full(values.shape[1], np.nan)


def facts(report: NeuronReport, prefix: str = 'neurons') -> dict[str, Any]:
    """The report's scalar results under flat keys, for `results.json`.

    Args:
      report: the report.
      prefix: first part of every key.

    Returns:
      Keys `<prefix>/<layer>/<fact>`: the number of neurons, how Delta was computed, the median of
      |Delta| / std over images and neurons, the rules and counts of fragile neurons, correlations
      with their p-values, success of attacks through neurons, filtering scores, and the rank
      correlations between measures.
    """
    flat: dict[str, Any] = {f'{prefix}/images': len(report.labels)}
    for layer in report.layers:
        base = f'{prefix}/{layer.layer.name}'
        flat[f'{base}/neurons'] = layer.layer.neurons
        if layer.delta is not None:
            flat[f'{base}/sensitivity_method'] = layer.method
            flat[f'{base}/unreachable_share'] = float(np.isinf(layer.delta).mean())
            for name, values in (
                ('median_absolute_delta', np.abs(layer.delta)),
                ('median_scaled_distance', layer.scaled_distance()),
            ):
                defined = values[~np.isnan(values).all(1)]
                flat[f'{base}/{name}'] = _finite(np.median(defined)) if defined.size else None
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
        if layer.through is not None:
            summary = layer.through.summary()
            flat[f'{base}/attack'] = layer.through.attack
            for count, share in zip(summary.counts.tolist(), summary.broken.tolist()):
                flat[f'{base}/attack_broken_by_{count}'] = share
            for rank, share in enumerate(summary.success_by_rank.tolist(), start=1):
                flat[f'{base}/attack_broken_at_rank_{rank}'] = share
            flat[f'{base}/attack_mean_successes'] = summary.mean_successes
            flat[f'{base}/attack_reached'] = summary.reached
            flat[f'{base}/attack_pgd'] = float(layer.through.pgd.mean())
        flat.update(_curve_facts(base, layer.curves))
        agreement = layer.agreement
        if agreement is not None:
            for i, first in enumerate(agreement.names):
                for j in range(i + 1, len(agreement.names)):
                    key = f'{base}/agreement/{first}-{agreement.names[j]}'
                    flat[key] = _finite(agreement.rho[i, j])
    return flat | _curve_facts(f'{prefix}/network', report.curves)


def _curve_facts(base: str, curves: Mapping[str, filtering.Curve]) -> dict[str, float | None]:
    return {
        f'{base}/filtering_{kind}_{name}': _finite(value)
        for kind, curve in curves.items()
        for name, value in filtering.scores(curve)._asdict().items()
    }


def _finite(value: float) -> float | None:
    """A number that JSON can hold: NaN and infinity are no JSON."""
    return float(value) if np.isfinite(value) else None
