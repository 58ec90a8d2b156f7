"""Helpers to attack models whose gradients mislead: random models, and transforms without one.

Athalye et al. 2018 (https://arxiv.org/abs/1802.00420): a random model is attacked through the mean
of its gradients over draws (expectation over transformation), a transform without a useful gradient
through that of a smooth one in its place (backward pass differentiable approximation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, Shaped

from neurosens import _validate
from neurosens.forward import Edit, Forward, Variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RandomForward:
    """A forward whose outcome is random; made by `random_forward`.

    It is a pure function all the same, of the randomness in its field `key`. Attacks put fresh keys
    in its place, so that every query is another draw.

    Attributes:
      draw: from a key to a forward.
      key: the randomness of calls that nobody redraws.
    """

    draw: Callable[[PRNGKeyArray], Forward]
    key: PRNGKeyArray

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Runs the forward that `key` draws; see `Forward`."""
        return self.draw(self.key)(variables, x, edits=edits, taps=taps)


def random_forward(draw: Callable[[PRNGKeyArray], Forward], key: PRNGKeyArray) -> RandomForward:
    """A forward with randomness that attacks can average out.

        def noisy(key):
            noise = functools.partial(jax.random.normal, key)
            return with_input_transform(forward, lambda x: x + 0.1 * noise(x.shape))

        model = random_forward(noisy, jax.random.key(0))

    Args:
      draw: from a key to a forward.
      key: the randomness of calls outside attacks.

    Returns:
      A forward; wrappers around it stay random.
    """
    partial = draw if isinstance(draw, jax.tree_util.Partial) else jax.tree_util.Partial(draw)
    return RandomForward(partial, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ExpectedForward:
    """The mean of a random forward over fixed draws; made by `expected_forward`.

    Attributes:
      forward: the random forward.
      keys: the draws `[D]`.
    """

    forward: Forward
    keys: PRNGKeyArray

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Runs all draws; logits and tapped values are means over them. See `Forward`."""

        def one(key: PRNGKeyArray) -> tuple[Array, dict[str, Array]]:
            return redraw(self.forward, key)(variables, x, edits=edits, taps=taps)

        return jax.tree.map(lambda value: value.mean(0), jax.vmap(one)(self.keys))


def expected_forward(forward: Forward, draws: int, key: PRNGKeyArray) -> ExpectedForward:
    """A random forward turned into a deterministic one: the mean of its logits over fixed draws.

    Expectation over transformation for any attack, defence or measure, those included that look
    for the smallest perturbation and have no draws of their own.

    Args:
      forward: a forward with a `random_forward` in it.
      draws: over how many draws the mean is taken; a pass and its memory cost as many.
      key: their randomness.

    Returns:
      A forward, no longer random to `is_random`. What a draw does may depend on the shape of the
      batch, as noise of that shape does; attacks call it with one example.

    Raises:
      ValueError: there is no draw, or the forward is not random.
    """
    _validate.check_whole('draws', draws)
    if not is_random(forward):
        raise ValueError(
            'The forward is not random; make it a random_forward, or take it as it is.'
        )
    return ExpectedForward(forward, jax.random.split(key, draws))


def is_random(forward: Forward) -> bool:
    """Whether a forward has randomness that `redraw` can change, at any depth of wrappers."""
    return any(_is_random(leaf) for leaf in jax.tree.leaves(forward, is_leaf=_is_whole))


def redraw(forward: Forward, key: PRNGKeyArray) -> Forward:
    """The same forward with other randomness.

    Args:
      forward: any forward.
      key: the randomness of its next calls.

    Returns:
      The forward with the key in every `RandomForward` in it; the same forward if there is none.
    """

    def replace(leaf: Any) -> Any:
        return dataclasses.replace(leaf, key=key) if _is_random(leaf) else leaf

    return jax.tree.map(replace, forward, is_leaf=_is_whole)


def _is_random(leaf: Any) -> bool:
    return isinstance(leaf, RandomForward)


def _is_whole(leaf: Any) -> bool:
    # The draws behind a mean are fixed.
    return isinstance(leaf, (RandomForward, ExpectedForward))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SubstitutedForward:
    """A forward with the gradients of another one; made by `with_gradients_of`.

    Attributes:
      forward: what is computed.
      surrogate: what is differentiated.
    """

    forward: Forward
    surrogate: Forward

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Runs both; values are those of `forward`, derivatives of `surrogate`. See `Forward`."""
        # Not differentiated: what it does may have no derivative at all.
        fixed, image = jax.lax.stop_gradient((variables, x))
        found = self.forward(fixed, image, edits=edits, taps=taps)
        smooth = self.surrogate(variables, x, edits=edits, taps=taps)
        return jax.tree.map(_value_of, found, smooth)


@jax.custom_jvp
def _value_of(value: Array, smooth: Array) -> Array:
    """The first argument, differentiated as the second."""
    del smooth
    return value


@_value_of.defjvp
def _derivative_of_smooth(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return _value_of(*primals), tangents[1].astype(primals[0].dtype)


def with_gradients_of(forward: Forward, surrogate: Forward) -> SubstitutedForward:
    """A model that answers as one forward does and is differentiated as another.

    The backward pass differentiable approximation of Athalye et al. (2018, section 4.1.2) for a
    whole model: an attack follows the gradients of the surrogate, while its losses, the iterate
    that it keeps and its success are those of the model itself. (`transfer` sees nothing of the
    model until it is done, and leaves what the surrogate already misclassifies.)

        smooth = defenses.inverse_perturbation.apply(parameters, forward, gradient='soft')
        result = pgd(with_gradients_of(defended, smooth), variables, x, y, key, threat=threat)

    Args:
      forward: the model to attack.
      surrogate: a forward of the same variables, classes and layers, with useful gradients.

    Returns:
      A forward; each pass costs one of both, each gradient one of the surrogate.
    """
    return SubstitutedForward(forward, surrogate)


def straight_through(
    transform: Callable[[Array], Array], surrogate: Callable[[Array], Array] = lambda x: x
) -> Callable[[Array], Array]:
    """A transform with the derivative of another one.

    Args:
      transform: what is computed, such as rounding or compression; its derivative is not used.
      surrogate: what is differentiated, of the same shapes; the identity by default.

    Returns:
      A function for `with_input_transform` or an edit.
    """

    @jax.custom_jvp
    def replaced(x: Array) -> Array:
        return transform(x)

    @replaced.defjvp
    def derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        return replaced(*primals), jax.jvp(surrogate, primals, tangents)[1]

    return replaced
