"""How inverse perturbation is set, and what its calibration finds."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neurosens import _validate
from neurosens.neurons import units
from neurosens.neurons.influence import SCORES

TAIL_MODES = ('lowest', 'offset')
RULES = ('average', 'margin', 'majority')


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
        # Lists would not be hashable.
        for name in ('layers', 'rho'):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _validate.check_flag('adaptive', self.adaptive)
        for name, choices in (
            ('tail_mode', TAIL_MODES),
            ('score', SCORES),
            ('rule', RULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(_validate.unknown(name, getattr(self, name), choices))
        for name, low in (('front', 0), ('tail', 0), ('offset', 0), ('prototypes', 1), ('top', 1)):
            _validate.check_whole(name, getattr(self, name), low=low)
        if self.front + self.tail == 0:
            raise ValueError('front and tail are both 0; a direction needs neurons, name some.')
        named = not isinstance(self.layers, str) and all(isinstance(n, str) for n in self.layers)
        if not self.layers or not named:
            raise ValueError(f'layers is {self.layers!r}; it must be a tuple of layer names.')
        sizes = self.rho if isinstance(self.rho, tuple) else ()
        for size in sizes:
            _validate.check_range('rho', size, low=0)
        if not sizes or list(sizes) != sorted(sizes):
            raise ValueError(f'rho is {self.rho!r}; it must hold rising sizes of at least 0.')
        _validate.check_range('temperature', self.temperature, low=0, low_open=True)
        if self.offset and self.tail_mode == 'lowest':
            raise ValueError(
                f"offset is {self.offset}, but the tail_mode 'lowest' has none; leave it out, or "
                "set tail_mode to 'offset'."
            )
        if self.adaptive and len(sizes) == 1:
            raise ValueError(
                f'adaptive chooses among sizes, but rho is {self.rho!r}; give several, or leave '
                'adaptive out.'
            )


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


def passes(parameters: Parameters) -> int:
    """Forward passes of the model that the defence makes for one image."""
    settings = parameters.settings
    sizes = 1 if settings.adaptive else len(settings.rho)
    return 1 + settings.top * settings.prototypes * sizes


def check_classes(parameters: Parameters, classes: int) -> None:
    """Raises a ValueError where a model has not as many classes as there are directions."""
    calibrated = len(parameters.directions)
    if classes != calibrated:
        raise ValueError(
            f'The model has {classes} classes, but the defence was calibrated for {calibrated}; '
            'calibrate it on this model.'
        )


def skeleton(settings: Settings) -> Parameters:
    """Parameters without arrays, of the same structure as those of a calibration."""
    nothing = jnp.zeros(0)
    layers = dict.fromkeys(settings.layers, nothing)
    return Parameters(nothing, layers, dict(layers), nothing, nothing, settings)
