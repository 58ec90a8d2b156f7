"""The objective's pass over clean images, lent to regularizers that can use it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float

from neurosens.convolution import with_fast_input_gradients, with_fast_pooling
from neurosens.forward import Forward, Variables, is_asked
from neurosens.regularizers import passes
from neurosens.training.objective import Outcome

# From images to the loss and what else the objective computes.
Run: TypeAlias = Callable[[Array], tuple[Array, Outcome]]


class Requests(passes.SharedPass):
    """Runs the model, and notes what a regularizer wants of its pass over a batch.

    Attributes:
      taps: names of layers that it taps.
      passes: how often it wants the pass.
      derivatives: how often with derivatives.
    """

    def __init__(self, forward: Forward, x: Array) -> None:
        """Watches the batch `x`, by object."""
        self._forward, self._x = forward, x
        self.taps: set[str] = set()
        self.passes = self.derivatives = 0

    def _note(self, x: Array, taps: Collection[str], edits: Any = ()) -> bool:
        wanted = x is self._x and not edits
        if wanted:
            self.taps |= set(taps)
            self.passes += 1
        return wanted

    def __call__(
        self,
        variables: Variables,
        x: Array,
        edits: Mapping[str, Any] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Runs the model."""
        self._note(x, taps, edits)
        return self._forward(variables, x, edits=edits, taps=taps)

    def linearize(
        self, variables: Variables, x: Array, read: passes.Read, taps: Collection[str]
    ) -> tuple[Any, Callable[[Array], Any]]:
        """Linearizes the model."""
        self.derivatives += self._note(x, taps)
        return passes.linearize(self._forward, variables, x, read, taps)

    def vjp(
        self, variables: Variables, x: Array, read: passes.Read, taps: Collection[str]
    ) -> tuple[Any, Callable[[Any], Array]]:
        """Differentiates the model."""
        self.derivatives += self._note(x, taps)
        return passes.vjp(self._forward, variables, x, read, taps)


class ObjectivePass(passes.SharedPass):
    """Gives what the objective's pass over a batch finds, and for other batches runs the model.

    The objective is evaluated once: with the derivatives of its pass, if those are asked for
    before anything else is.
    """

    def __init__(self, forward: Forward, x: Array, run: Run) -> None:
        """Shares what `run` does with the batch `x`, by object."""
        self._forward, self._x, self._run = forward, x, run
        self._found: tuple[Array, Outcome] | None = None

    def objective(self) -> tuple[Float[Array, ''], Outcome]:
        """The loss and the outcome."""
        if self._found is None:
            self._found = self._run(self._x)
        return self._found

    def __call__(
        self,
        variables: Variables,
        x: Array,
        edits: Mapping[str, Any] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Recalls, or runs the model."""
        if x is not self._x or edits:
            return self._forward(variables, x, edits=edits, taps=taps)
        return _clean(self.objective()[1], taps)

    def linearize(
        self, variables: Variables, x: Array, read: passes.Read, taps: Collection[str]
    ) -> tuple[Any, Callable[[Array], Any]]:
        """Linearizes the objective, or the model."""
        if x is not self._x:
            return passes.linearize(self._forward, variables, x, read, taps)
        fast = with_fast_pooling(self._reading(read, taps))
        values, push, self._found = jax.linearize(fast, x, has_aux=True)
        return values, push

    def vjp(
        self, variables: Variables, x: Array, read: passes.Read, taps: Collection[str]
    ) -> tuple[Any, Callable[[Any], Array]]:
        """Differentiates the objective, or the model."""
        if x is not self._x:
            return passes.vjp(self._forward, variables, x, read, taps)
        fast = with_fast_input_gradients(self._reading(read, taps))
        values, pull, self._found = jax.vjp(fast, x, has_aux=True)
        return values, lambda cotangents: pull(cotangents)[0]

    def _reading(
        self, read: passes.Read, taps: Collection[str]
    ) -> Callable[[Array], tuple[Any, tuple[Array, Outcome]]]:
        def reading(x: Array) -> tuple[Any, tuple[Array, Outcome]]:
            found = self._run(x)
            return read(*_clean(found[1], taps)), found

        return reading


def _clean(outcome: Outcome, taps: Collection[str]) -> tuple[Array, dict[str, Array]]:
    """Logits of the clean images, and of all activations those that these taps ask for."""
    assert outcome.clean_logits is not None, 'objectives refuse taps where they have none'

    return outcome.clean_logits, {
        name: value for name, value in outcome.tapped.items() if is_asked(name, taps)
    }
