"""Inverse perturbation: strengthens front neurons and weakens tail neurons through the input.

After Chen et al. 2021, "Fight Perturbations with Perturbations: Defending Adversarial Attacks via
Neuron Influence" (https://arxiv.org/abs/2112.13060), of which the abstracts and the first released
program are known. That program moves an attacked image along the gradient of its clean twin and
picks the sign with the true answer; it is an upper bound (`neurosens.defenses.oracles`), not a
defence. The defence here sees images alone, and is ours: directions are calibrated once for each
class, and an image of unknown origin is classified beside versions of it that are moved along the
directions of its likeliest classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from neurosens import _validate, parallel
from neurosens.defenses import images
from neurosens.forward import Edit, Forward, Variables
from neurosens.neurons import tail, units
from neurosens.neurons.influence import SCORES, Partition, influence_example, labels
from neurosens.neurons.influence import partition as front_and_tail

TAIL_MODES = ('lowest', 'offset')
RULES = ('average', 'margin', 'majority')
GRADIENTS = ('exact', 'straight_through', 'soft')
# Of the released program: keeps a direction finite where the gradient vanishes.
_SMALLEST = 1e-5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How directions are made and used; hashable, so that it is a static argument.

    Attributes:
      layers: layers whose neurons make the directions; several add up.
      unit: `'unit'` (every entry is a neuron, as in the released program) or `'channel'`.
      front: number of neurons that are strengthened, those of largest influence.
      tail: number of neurons that are weakened.
      tail_mode: `'lowest'` (the smallest signed influences) or `'offset'` (the ranks that begin
        `offset` behind the front: where many influences are 0, the lowest say little).
      offset: ranks between front and tail with `'offset'`.
      score: `'logit'` or `'probability'`, whose influence is 0 where the model is certain.
      prototypes: directions per class, the centres of a k-means clustering; 1 is the mean.
      rho: sizes of the move, root mean square per pixel, in pixels of [0, 1].
      top: how many of the likeliest classes have their directions tried.
      rule: how candidates are combined: `'average'` (mean logits), `'margin'` (the candidate whose
        margin for its own class gains most over the image itself) or `'majority'` (mean logits of
        the candidates that vote for the most frequent class, the lowest of equal ones).
      adaptive: one size per image and class instead of all: the further its front and tail lie
        from their benign mean, in standard deviations, the larger.
      temperature: of the soft choices that stand in for hard ones in gradients, in logits.
    """

    layers: tuple[str, ...] = ('head:in',)
    unit: str = 'unit'
    front: int = 1
    tail: int = 5
    tail_mode: str = 'lowest'
    offset: int = 0
    score: str = 'logit'
    prototypes: int = 1
    rho: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    top: int = 2
    rule: str = 'average'
    adaptive: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        units.check_unit(self.unit)
        for name, choices in (
            ('tail_mode', TAIL_MODES),
            ('score', SCORES),
            ('rule', RULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(_validate.unknown(name, getattr(self, name), choices))
        for name, low in (('front', 0), ('tail', 0), ('offset', 0), ('prototypes', 1), ('top', 1)):
            _validate.check_range(name, getattr(self, name), low=low)
        if self.front + self.tail == 0:
            raise ValueError('front and tail are both 0; a direction needs neurons, name some.')
        named = not isinstance(self.layers, str) and all(isinstance(n, str) for n in self.layers)
        if not self.layers or not named:
            raise ValueError(f'layers is {self.layers!r}; it must be a tuple of layer names.')
        sizes = self.rho if isinstance(self.rho, (tuple, list)) else ()
        for size in sizes:
            _validate.check_range('rho', size, low=0)
        if not sizes or list(sizes) != sorted(sizes):
            raise ValueError(f'rho is {self.rho!r}; it must hold rising sizes of at least 0.')
        _validate.check_range('temperature', self.temperature, low=0, low_open=True)


DEFAULT = Settings()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('directions', 'front', 'tail', 'mean', 'std'),
    meta_fields=('settings',),
)
@dataclasses.dataclass(frozen=True)
class Parameters:
    """What calibration found.

    Attributes:
      directions: for each of K classes P directions of root mean square 1 `[K, P, ...]`.
      front: by layer, the front neurons of each class, of its mean influence, int32 `[K, front]`.
      tail: by layer, its tail neurons, int32 `[K, tail]`.
      mean: mean over benign images of the class of J, the sum of its front minus the sum of its
        tail over all layers `[K]`.
      std: standard deviation of J `[K]`.
      settings: of the calibration.
    """

    directions: Float[Array, 'classes prototypes ...']
    front: dict[str, Int[Array, 'classes front']]
    tail: dict[str, Int[Array, 'classes tail']]
    mean: Float[Array, ' classes']
    std: Float[Array, ' classes']
    settings: Settings


# ------------------------------------------------------------------------------------- directions


class Direction(NamedTuple):
    """The direction of one image.

    Attributes:
      direction: of root mean square 1, or 0 where the gradient is 0, in the shape of the image.
      influence: by layer, signed influence of its neurons on the class `[N]`.
      activation: by layer, activation of its neurons, summed over positions of channels `[N]`.
      logits: of the image `[K]`.
    """

    direction: Float[Array, '...']
    influence: dict[str, Float[Array, ' neurons']]
    activation: dict[str, Float[Array, ' neurons']]
    logits: Float[Array, ' classes']


def normalize(gradient: Float[Array, '...']) -> Float[Array, '...']:
    """A gradient divided by its root mean square plus 1e-5; 0 stays 0.

    As in the released program, over one example.
    """
    return gradient / (jnp.sqrt(jnp.mean(gradient**2)) + _SMALLEST)


def partition(influence: Float[Array, ' neurons'], settings: Settings) -> Partition:
    """Front and tail of a layer's neurons, of equal influences the lowest index first.

    Args:
      influence: signed influence `[N]`.
      settings: numbers of front and tail neurons, and the mode of the tail.

    Returns:
      Indices of both.

    Raises:
      ValueError: they do not fit into N neurons together.
    """
    if settings.tail_mode == 'lowest':
        return front_and_tail(influence, front=settings.front, tail=settings.tail)
    start = settings.front + settings.offset
    if start + settings.tail > len(influence):
        raise ValueError(
            f'front {settings.front}, offset {settings.offset} and tail {settings.tail} do not fit '
            f'into {len(influence)} neurons; make them smaller.'
        )
    falling = jnp.argsort(-influence, stable=True).astype(jnp.int32)
    return Partition(falling[: settings.front], falling[start : start + settings.tail])


def direction_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''] | None = None,
    *,
    settings: Settings = DEFAULT,
) -> Direction:
    """The direction that strengthens one image's front neurons and weakens its tail neurons.

    d = g / (rms(g) + 1e-5) with g the gradient of J = sum over the front - sum over the tail of the
    activations, front and tail held fixed (section 2 of the released program).

    Args:
      forward: the model.
      variables: its variables.
      x: one image.
      y: the class whose influence divides the neurons; the predicted one by default.
      settings: layers, and how neurons are divided.

    Returns:
      The direction, and what it was made of.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: front and tail do not fit into a layer.
    """
    influences, signs = {}, {}
    for layer in settings.layers:
        influences[layer] = influence_example(
            forward, variables, x, y, layer=layer, unit=settings.unit, score=settings.score
        )
        part = partition(influences[layer], settings)
        signs[layer] = labels(part, len(influences[layer])).astype(jnp.float32)

    def tapped(x: Array) -> tuple[dict[str, Array], Array]:
        logits, values = forward(variables, x[None], taps=settings.layers)
        for layer in settings.layers:
            tail.check_neurons(layer, values[layer])
        return {layer: values[layer][0] for layer in settings.layers}, logits[0]

    values, pull, logits = jax.vjp(tapped, x, has_aux=True)
    (gradient,) = pull(
        {
            layer: units.spread(signs[layer].astype(h.dtype), h.shape, settings.unit)
            for layer, h in values.items()
        }
    )
    pooled = {layer: units.pool(h, settings.unit) for layer, h in values.items()}
    return Direction(normalize(gradient.astype(jnp.float32)), influences, pooled, logits)


@functools.partial(jax.jit, static_argnames='settings')
def directions(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'] | None = None,
    *,
    settings: Settings = DEFAULT,
) -> Direction:
    """`direction_example` of every image of a batch, jit-compiled; arrays have a leading `[B]`."""
    example = functools.partial(direction_example, forward, variables, settings=settings)
    if y is None:
        return jax.vmap(example)(jnp.asarray(x))
    return jax.vmap(example)(jnp.asarray(x), jnp.asarray(y))


# ------------------------------------------------------------------------------------ calibration


def calibrate(
    forward: Forward,
    variables: Variables,
    x: Float[ArrayLike, 'examples ...'],
    y: Int[ArrayLike, ' examples'],
    *,
    settings: Settings = DEFAULT,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    seed: int = 0,
) -> Parameters:
    """Finds the directions of every class on benign images.

    Images that the model misclassifies are left out.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      x: benign images with pixels in [0, 1] `[M, ...]`, the same on every process.
      y: their classes `[M]`.
      settings: what directions are made of.
      batch_size: images at once over all devices.
      mesh: devices to run on; all of them by default.
      seed: of the clustering, where there are several prototypes.

    Returns:
      Directions, neurons and benign statistics of each class.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: the images are empty, outside [0, 1] or not finite, labels do not fit, or a class
        has too few correctly classified images.
    """
    x, y = images.check(x, y)
    _validate.check_range('batch_size', batch_size, low=1)
    classes = images.count_classes(forward, variables, x)
    images.check_labels(y, classes)
    mesh = parallel.data_mesh() if mesh is None else mesh
    run = functools.partial(directions, forward, variables, settings=settings)
    found = parallel.in_batches(run, (x, y), batch_size, mesh)
    correct = (found.logits.argmax(-1) == y) & ~np.isnan(found.logits).any(-1)
    members = [np.flatnonzero(correct & (y == label)) for label in range(classes)]
    for label, rows in enumerate(members):
        if len(rows) < settings.prototypes:
            raise ValueError(
                f'Class {label} has {len(rows)} correctly classified calibration images, fewer '
                f'than its {settings.prototypes} directions need; calibrate with more images.'
            )
    front, rear = {}, {}
    for layer in settings.layers:
        means = [found.influence[layer][rows].mean(0, dtype=np.float64) for rows in members]
        parts = [partition(jnp.asarray(mean, jnp.float32), settings) for mean in means]
        front[layer] = np.stack([part.front for part in parts])
        rear[layer] = np.stack([part.tail for part in parts])
    lifts = [
        sum(
            found.activation[layer][rows][:, front[layer][label]].sum(1, dtype=np.float64)
            - found.activation[layer][rows][:, rear[layer][label]].sum(1, dtype=np.float64)
            for layer in settings.layers
        )
        for label, rows in enumerate(members)
    ]
    centres = [_centres(found.direction[rows], settings.prototypes, seed) for rows in members]
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    return Parameters(
        as_float(np.stack(centres)),
        jax.tree.map(jnp.asarray, front),
        jax.tree.map(jnp.asarray, rear),
        as_float([np.mean(lift) for lift in lifts]),
        as_float([np.std(lift) for lift in lifts]),
        settings,
    )


def _centres(vectors: np.ndarray, prototypes: int, seed: int) -> np.ndarray:
    """The directions that stand for many: their mean, or the centres of clusters, of rms 1."""
    shape = vectors.shape[1:]
    flat = vectors.reshape(len(vectors), -1)
    if prototypes == 1:
        means = flat.mean(0, keepdims=True, dtype=np.float64)
    else:
        # Imported here because it takes a second, and one direction is the default.
        from sklearn.cluster import KMeans

        means = KMeans(prototypes, n_init=4, random_state=seed).fit(flat).cluster_centers_
    unit = [normalize(jnp.asarray(mean, jnp.float32)) for mean in means]
    return np.stack(unit).reshape(prototypes, *shape)


# ------------------------------------------------------------------------------------ application


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('parameters', 'forward'),
    meta_fields=('gradient', 'candidate'),
)
@dataclasses.dataclass(frozen=True, eq=False)
class InverseForward:
    """A model behind the defence, itself a `Forward`; made by `apply`.

    Edits act in every pass. Taps read the pass of the image itself, unmoved.

    Attributes:
      parameters: of the calibration.
      forward: the model.
      gradient: see `apply`.
      candidate: see `apply`.
    """

    parameters: Parameters
    forward: Forward
    gradient: str
    candidate: int | None

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Classifies images and moved versions of them; see `Forward`.

        Raises:
          ValueError: images are not floating-point, or not of the size of calibration; where they
            are no tracers also: a pixel is outside [0, 1] or no number.
        """
        settings = self.parameters.settings
        x = jnp.asarray(x)
        shape = self.parameters.directions.shape[2:]
        if x.shape[1:] != shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f'Images have shape {x.shape[1:]} and type {x.dtype}; the defence was calibrated '
                f'on {shape}, floating-point with pixels in [0, 1] (divide bytes by 255).'
            )
        if not isinstance(x, jax.core.Tracer):
            images.check_pixels(x)
        needed = settings.layers if settings.adaptive else ()
        logits, tapped = self.forward(
            variables, x, edits=edits, taps=tuple(dict.fromkeys((*taps, *needed)))
        )
        moved = self._moved(x, logits, tapped)
        if self.candidate is not None:
            moved = moved[:, self.candidate : self.candidate + 1]
        count = moved.shape[1]
        # Batch first: a batch that is split over devices stays so.
        merged = moved.reshape(-1, *x.shape[1:])
        each = {name: _per_candidate(edit, count) for name, edit in edits.items()}
        seen = self.forward(variables, merged, edits=each)[0].reshape(len(x), count, -1)
        result = seen[:, 0] if self.candidate is not None else self._combined(logits, seen)
        return result, {name: value for name, value in tapped.items() if _asked(name, taps)}

    def _moved(
        self, x: Array, logits: Array, tapped: Mapping[str, Array]
    ) -> Float[Array, 'batch candidates ...']:
        """The moved versions, likeliest class first, then prototypes, then sizes."""
        settings, parameters = self.parameters.settings, self.parameters
        candidates = []
        for chosen, weights in self._classes(logits):
            along = self._pick(parameters.directions, chosen, weights)
            sizes = [jnp.full(len(x), size, x.dtype) for size in settings.rho]
            if settings.adaptive:
                sizes = [self._size(chosen, tapped).astype(x.dtype)]
            for prototype in range(settings.prototypes):
                step = along[:, prototype].astype(x.dtype)
                for size in sizes:
                    scale = size.reshape(-1, *[1] * (x.ndim - 1))
                    candidates.append(self._clip(x + scale * step))
        return jnp.stack(candidates, 1)

    def _clip(self, x: Array) -> Array:
        clipped = jnp.clip(x, 0, 1)
        # A pixel at the border has a gradient of 0 that an attacker need not believe.
        return clipped if self.gradient == 'exact' else x + jax.lax.stop_gradient(clipped - x)

    def _classes(self, logits: Array) -> list[tuple[Array, Array | None]]:
        """The likeliest classes `[B]`, and soft weights of all classes `[B, K]` in their place."""
        left = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        classes = left.shape[-1]
        if self.parameters.settings.top > classes:
            raise ValueError(
                f'top is {self.parameters.settings.top}, but the model has {classes} classes.'
            )
        found: list[tuple[Array, Array | None]] = []
        for _ in range(self.parameters.settings.top):
            chosen = left.argmax(-1)
            found.append((chosen, self._choice(left, chosen)))
            left = jnp.where(jnp.arange(classes) == chosen[:, None], -jnp.inf, left)
        return found

    def _choice(self, scores: Array, chosen: Array) -> Array | None:
        """Weights that choose: None for a hard choice, which has no gradient."""
        if self.gradient == 'exact':
            return None
        soft = jax.nn.softmax(scores / self.parameters.settings.temperature, -1)
        if self.gradient == 'soft':
            return soft
        hard = jax.nn.one_hot(chosen, scores.shape[-1], dtype=soft.dtype)
        return soft + jax.lax.stop_gradient(hard - soft)

    def _pick(self, table: Array, chosen: Array, weights: Array | None) -> Array:
        """Rows of a table `[K, ...]`, of a class or weighted over classes `[B, ...]`."""
        if weights is None:
            return table[chosen]
        return jnp.tensordot(weights, table.astype(weights.dtype), 1)

    def _size(self, chosen: Array, tapped: Mapping[str, Array]) -> Float[Array, ' batch']:
        """The size of the move by the distance from benign activations, in deviations."""
        parameters, settings = self.parameters, self.parameters.settings
        lift = jnp.zeros(len(chosen))
        for layer in settings.layers:
            values = jax.vmap(functools.partial(units.pool, unit=settings.unit))(tapped[layer])
            for sign, neurons in ((1, parameters.front), (-1, parameters.tail)):
                lift += sign * jnp.take_along_axis(values, neurons[layer][chosen], 1).sum(1)
        std = jnp.maximum(parameters.std[chosen], jnp.finfo(jnp.float32).tiny)
        shortfall = (parameters.mean[chosen] - lift) / std
        rho = jnp.asarray(settings.rho)
        steps = jnp.arange(len(settings.rho))
        smooth = jnp.interp(shortfall, steps + 0.5, rho)
        hard = rho[jnp.clip(jnp.floor(shortfall), 0, len(settings.rho) - 1).astype(jnp.int32)]
        if self.gradient == 'soft':
            return smooth
        if self.gradient == 'straight_through':
            return smooth + jax.lax.stop_gradient(hard - smooth)
        return hard

    def _combined(self, logits: Array, seen: Array) -> Float[Array, 'batch classes']:
        """One verdict from the logits of the image and of its moved versions."""
        settings = self.parameters.settings
        every = jnp.concatenate([logits[:, None], seen], 1)
        if settings.rule == 'average':
            return every.mean(1)
        wide = every.astype(jnp.promote_types(every.dtype, jnp.float32))
        if settings.rule == 'margin':
            weights = self._best_gain(wide)
        else:
            weights = self._majority(wide)
        return jnp.einsum('bm,bmk->bk', weights.astype(every.dtype), every)

    def _best_gain(self, every: Array) -> Float[Array, 'batch candidates']:
        """Weights of the candidates: all on the one whose class gains the most margin.

        A candidate speaks for the class whose direction it was moved along, the image itself for
        its own, without a gain.
        """
        settings = self.parameters.settings
        order = [chosen for chosen, _ in self._classes(every[:, 0])]
        each = (every.shape[1] - 1) // settings.top
        spoken = jnp.stack([order[0], *[c for c in order for _ in range(each)]], 1)
        own = jax.nn.one_hot(spoken, every.shape[-1], dtype=bool)
        before = jnp.broadcast_to(every[:, :1], every.shape)
        gain = _margin(every, own) - _margin(before, own)
        return self._weights(gain, gain.argmax(1))

    def _majority(self, every: Array) -> Float[Array, 'batch candidates']:
        """Weights of the candidates: equal ones for those of the most frequent class."""
        classes = every.shape[-1]
        hard = jax.nn.one_hot(every.argmax(-1), classes, dtype=every.dtype)
        winner = jax.nn.one_hot(hard.sum(1).argmax(-1), classes, dtype=every.dtype)
        voters = jnp.einsum('bmk,bk->bm', hard, winner)
        chosen = voters / voters.sum(1, keepdims=True)
        if self.gradient == 'exact':
            return chosen
        temperature = self.parameters.settings.temperature
        soft = jax.nn.softmax(every / temperature, -1)
        favourite = jax.nn.softmax(soft.sum(1) / temperature, -1)
        agreement = jnp.einsum('bmk,bk->bm', soft, favourite)
        smooth = agreement / agreement.sum(1, keepdims=True)
        if self.gradient == 'soft':
            return smooth
        return smooth + jax.lax.stop_gradient(chosen - smooth)

    def _weights(self, scores: Array, chosen: Array) -> Array:
        weights = self._choice(scores, chosen)
        if weights is None:
            return jax.nn.one_hot(chosen, scores.shape[-1], dtype=scores.dtype)
        return weights


def _margin(logits: Array, own: Bool[Array, '... classes']) -> Array:
    """Logit of a class minus the largest other."""
    mine = jnp.where(own, logits, -jnp.inf).max(-1)
    return mine - jnp.where(own, -jnp.inf, logits).max(-1)


def _per_candidate(edit: Edit, count: int) -> Edit:
    """An edit of `[B * count, ...]` that shows `[B, ...]` to the given one, `count` times."""

    def edited(activation: Array) -> Array:
        apart = activation.reshape(-1, count, *activation.shape[1:])
        return jax.vmap(edit, 1, 1)(apart).reshape(activation.shape)

    return edited


def _asked(name: str, taps: Collection[str]) -> bool:
    """Whether a caller asked for a layer, by name or by pattern."""
    pattern = '*:in' if name.endswith(':in') else '*'
    return name in taps or pattern in taps


def apply(
    parameters: Parameters,
    forward: Forward,
    *,
    gradient: str = 'exact',
    candidate: int | None = None,
) -> InverseForward:
    """The model behind the defence.

    Every image z is classified as it is, and moved: `clip(z + rho * D_c, 0, 1)` for the `top`
    likeliest classes c, their prototypes and every rho (or, adaptively, one rho). The rule of the
    settings combines the logits. Nothing but the image is used: no label, no clean version.

    Args:
      parameters: of `calibrate`.
      forward: the model.
      gradient: what attacks differentiate. `'exact'`: the defence as it is, whose choices have no
        gradient. `'straight_through'`: the same values, but gradients of soft choices, and of the
        identity for clipping. `'soft'`: soft choices in the values too; a surrogate for the
        gradients of attacks, which the defence itself has to judge (see `adaptive`).
      candidate: classify one moved version alone, by its number (likeliest class first, then
        prototypes, then sizes): a surrogate too.

    Returns:
      A `Forward` with the same variables and layers. An image costs `passes(parameters)` forward
      passes.

    Raises:
      ValueError: the gradient is unknown or there is no such candidate.
    """
    if gradient not in GRADIENTS:
        raise ValueError(_validate.unknown('gradient', gradient, GRADIENTS))
    if candidate is not None and not 0 <= candidate < passes(parameters) - 1:
        raise ValueError(
            f'candidate is {candidate}; there are {passes(parameters) - 1}, counted from 0.'
        )
    return InverseForward(parameters, forward, gradient, candidate)


def passes(parameters: Parameters) -> int:
    """Forward passes of the model that the defence makes for one image."""
    settings = parameters.settings
    sizes = 1 if settings.adaptive else len(settings.rho)
    return 1 + settings.top * settings.prototypes * sizes


def adaptive(parameters: Parameters, forward: Forward) -> dict[str, Forward]:
    """Surrogates for attacks that know the defence, by name.

    Attacks on `apply(parameters, forward)` follow their gradients, see
    `neurosens.attacks.with_gradients_of`.

    Args:
      parameters: of `calibrate`.
      forward: the model.

    Returns:
      The defence with straight-through gradients, with soft choices, and each of its candidates.
    """
    surrogates: dict[str, Forward] = {
        name: apply(parameters, forward, gradient=name) for name in GRADIENTS[1:]
    }
    for number in range(passes(parameters) - 1):
        surrogates[f'candidate_{number}'] = apply(parameters, forward, candidate=number)
    return surrogates


def skeleton(settings: Settings) -> Parameters:
    """Parameters without arrays, of the same structure as those of a calibration."""
    nothing = jnp.zeros(0)
    layers = dict.fromkeys(settings.layers, nothing)
    return Parameters(nothing, layers, dict(layers), nothing, nothing, settings)
