"""The model behind inverse perturbation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from neurosens import _validate
from neurosens.defenses import images
from neurosens.defenses.inverse_perturbation.settings import Parameters, check_classes, passes
from neurosens.forward import Edit, Forward, Variables, is_asked
from neurosens.neurons import units

GRADIENTS = ('exact', 'straight_through', 'soft')


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
          ValueError: images are not floating-point, or not of the size of calibration, or the model
            has another number of classes; where images are no tracers also: a pixel is outside
            [0, 1] or no number.
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
        return result, {name: value for name, value in tapped.items() if is_asked(name, taps)}

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
        check_classes(self.parameters, classes)
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


def adaptive(parameters: Parameters, forward: Forward) -> dict[str, Forward]:
    """Surrogates for attacks that know the defence, by name.

    Attacks on `apply(parameters, forward)` follow their gradients, see
    `neurosens.attacks.with_gradients_of`.

    Args:
      parameters: of `calibrate`.
      forward: the model.

    Returns:
      The defence with straight-through gradients, with soft choices, and each of its candidates,
      these with straight-through gradients too: at pixels that clipping holds at the border their
      own would be 0.
    """
    surrogates: dict[str, Forward] = {
        name: apply(parameters, forward, gradient=name) for name in GRADIENTS[1:]
    }
    for number in range(passes(parameters) - 1):
        surrogates[f'candidate_{number}'] = apply(
            parameters, forward, gradient='straight_through', candidate=number
        )
    return surrogates
