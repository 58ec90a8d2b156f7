"""The one boundary between a model and everything that measures, attacks or defends it.

A `Forward` is a pure function

    logits, tapped = forward(variables, x, edits={}, taps=())

that runs a model in evaluation mode, applies `edits` to named activations on the way and returns
the activations named in `taps`. A layer is named by its '/'-joined module path:

- `block1/act2` is what the module `block1/act2` returns,
- `block1/act2:in` is the value that enters it (its first positional argument).

So `head:in` is the penultimate representation of any classifier whose last layer is named `head`.
An edit is any function from an activation to an activation of the same shape (add, scale, mask,
replace); it sees and returns the whole batch `[B, ...]`. A tap of an edited layer reads the value
after the edit. The pattern `'*'` in `taps` stands for every tappable output and `'*:in'` for every
tappable input; `'*nonlinearity'` and `'*nonlinearity:in'` for those of every module with the name
of a nonlinearity (`act1`, `relu_1`, `final_act`, ...), each of which then has to be tappable.

Forwards are pytrees: the adapters `LinenForward` and `NNXForward` are static (no leaves, hashable),
and wrappers carry the arrays of their edits as leaves. A jitted function can take a forward as an
ordinary argument and is not traced again when only those arrays change.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

Edit: TypeAlias = Callable[[Array], Array]
Variables: TypeAlias = Any

EVERY_OUTPUT = '*'
EVERY_INPUT = '*:in'
# Of modules with the name of a nonlinearity alone, none of which may be left out.
EVERY_NONLINEARITY = '*nonlinearity'
EVERY_NONLINEARITY_INPUT = '*nonlinearity:in'
_INPUT_SUFFIX = ':in'
_COLLECTION = 'neurosens_taps'
_OUTPUT = '__output__'
_INPUT = '__input__'
_HOOK = 'neurosens_hook'
_PATTERNS = frozenset({EVERY_OUTPUT, EVERY_INPUT, EVERY_NONLINEARITY, EVERY_NONLINEARITY_INPUT})
# Such as `act1`, `act3_2`, `final_act` and `relu_1`, or, as Flax names modules itself, `PReLU_0`.
_NONLINEARITY = re.compile(
    r'(^|_)(act|activation|nonlinearity|(leaky|p|r)?relu|gelu|mish|s?elu|celu|softplus|softsign'
    r'|(hard)?(silu|swish|tanh|sigmoid)|logsigmoid)(_?\d+)*$',
    re.IGNORECASE,
)


class LayerError(KeyError):
    """A layer name that cannot be tapped or edited; the message says why and what to do."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which hides the sentence in quotes.
        return str(self.args[0])


class Forward(Protocol):
    """Runs a classifier on a batch, edits activations on the way and returns tapped ones."""

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Float[Array, 'batch classes'], dict[str, Array]]:
        """Computes logits and tapped activations.

        Args:
          variables: the model's variables (a Linen variable dict or an NNX state).
          x: a batch of inputs `[B, ...]`.
          edits: for each layer name, a function applied to its activation `[B, ...]`.
          taps: layer names whose activations are returned.

        Returns:
          `(logits [B, K], {layer name: activation [B, ...]})`.

        Raises:
          LayerError: a name is unknown, runs more than once, lies inside a lifted loop or does
            not carry an array.
        """


# ------------------------------------------------------------------------------- bookkeeping


@dataclasses.dataclass
class _Visits:
    """What the modules of one traced call did, in order: the evidence for error messages."""

    edits: Mapping[str, Edit]
    wanted: frozenset[str]
    patterns: frozenset[str]
    # Layer name -> shape of the value where it was visited (None: not an array).
    shapes: dict[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def plan(cls, edits: Mapping[str, Edit], taps: Collection[str]) -> _Visits:
        if isinstance(taps, str):
            raise TypeError(f'taps must be a collection of layer names, not the string {taps!r}.')
        asked = frozenset(taps)
        return cls(edits, frozenset(edits) | (asked - _PATTERNS), asked & _PATTERNS)

    @property
    def idle(self) -> bool:
        return not (self.wanted or self.patterns)

    def visit(self, name: str, value: Any, record: Callable[[Array], object]) -> Any:
        """Edits `value` if asked to, and records it if it is tapped or edited."""
        is_array = isinstance(value, jax.Array)
        self.shapes[name] = value.shape if is_array else None
        if not is_array:
            return value
        edit = self.edits.get(name)
        if edit is not None:
            edited = jnp.asarray(edit(value))
            if edited.shape != value.shape:
                raise LayerError(
                    f'The edit of layer {name!r} returned shape {edited.shape}; it must keep the '
                    f'shape {value.shape}.'
                )
            value = edited.astype(value.dtype)
        if name in self.wanted or any(_matches(pattern, name) for pattern in self.patterns):
            record(value)
        return value

    def run(
        self,
        name: str,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        record: Callable[[str, Array], object],
    ) -> Any:
        """Runs one module `call` with its input and output visited."""
        if args:
            first = self.visit(name + _INPUT_SUFFIX, args[0], functools.partial(record, _INPUT))
            args = (first, *args[1:])
        return self.visit(name, call(*args, **kwargs), functools.partial(record, _OUTPUT))

    def collect(self, recorded: Mapping[str, tuple[Array, ...]], taps: Iterable[str]) -> dict:
        """Checks every requested layer against what was recorded and returns the tapped ones."""
        for name in self.wanted:
            self._check(name, recorded.get(name, ()))
        tapped = {}
        for name in taps:
            if name not in _PATTERNS:
                tapped[name] = recorded[name][0]
                continue
            for seen in filter(functools.partial(_matches, name), self.shapes):
                values = recorded.get(seen, ())
                obstacle = self._obstacle(seen, values)
                if obstacle is None:
                    tapped[seen] = values[0]
                elif name in (EVERY_NONLINEARITY, EVERY_NONLINEARITY_INPUT):
                    raise LayerError(
                        f'Layer {seen!r} is a nonlinearity by its name, but {obstacle[0]}; give '
                        'layers, the names of those to take in place of every nonlinearity.'
                    )
        return tapped

    def _check(self, name: str, values: tuple[Array, ...]) -> None:
        if name not in self.shapes:
            raise LayerError(_unknown_layer(name, self.shapes))
        obstacle = self._obstacle(name, values)
        if obstacle is not None:
            raise LayerError(f'Layer {name!r} {obstacle[0]}; {obstacle[1]}.')

    def _obstacle(self, name: str, values: tuple[Array, ...]) -> tuple[str, str] | None:
        """Why a layer that was visited has no single activation, and what to do; None if it has."""
        shape = self.shapes[name]
        if shape is None:
            return (
                'does not carry a single array, so it can be neither tapped nor edited',
                'name a module inside it',
            )
        if len(values) > 1:
            return (
                f'runs {len(values)} times in one forward pass, so its name is ambiguous',
                'tap or edit a module that runs once',
            )
        # Exactly once, and what was recorded is what was visited.
        if len(values) == 1 and values[0].shape == shape:
            return None
        return (
            'lies inside a lifted transform (scan or vmap over modules), where one name stands for '
            'many activations',
            'name the module that contains the transform, or unroll it',
        )


def is_nonlinearity(layer: str) -> bool:
    """Whether a layer, or what enters it, has the name of a nonlinearity, as `block1/act2` has."""
    return bool(_NONLINEARITY.search(layer.removesuffix(_INPUT_SUFFIX).rpartition('/')[2]))


def is_asked(layer: str, taps: Collection[str]) -> bool:
    """Whether taps ask for a layer, by its name or by a pattern."""
    patterns = _PATTERNS.intersection(taps)
    return layer in taps or any(_matches(pattern, layer) for pattern in patterns)


def _matches(pattern: str, layer: str) -> bool:
    """Whether a pattern stands for a layer."""
    if pattern.endswith(_INPUT_SUFFIX) != layer.endswith(_INPUT_SUFFIX):
        return False
    return pattern in (EVERY_OUTPUT, EVERY_INPUT) or is_nonlinearity(layer)


def _unknown_layer(name: str, known: Iterable[str]) -> str:
    known = list(known)
    outputs = [layer for layer in known if not layer.endswith(_INPUT_SUFFIX)]
    pool = known if name.endswith(_INPUT_SUFFIX) else outputs
    close = difflib.get_close_matches(name, pool, n=5, cutoff=0.4)
    if close:
        hint = 'the closest layers are ' + ', '.join(repr(layer) for layer in close)
    else:
        hint = 'the layers are ' + ', '.join(repr(layer) for layer in outputs[:20])
        hint += ', ...' if len(outputs) > 20 else ''
    return f'Unknown layer {name!r}: {hint}; neurosens.layers() lists them all.'


# ---------------------------------------------------------------------------------- adapters


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LinenForward:
    """A `Forward` of any Flax Linen module, which needs no change.

    Equal modules give equal, hashable forwards, so they share compiled programs.

    Attributes:
      module: the classifier; `module.apply(variables, x, **kwargs)` returns logits `[B, K]`.
      kwargs: hashable keyword arguments of every call, such as `{'train': False}`.
    """

    module: nn.Module
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'module', _with_hashable_fields(self.module, {}))
        object.__setattr__(self, 'kwargs', flax.core.freeze(dict(self.kwargs)))
        try:
            hash(self)
        except TypeError:
            raise TypeError(
                f'{type(self.module).__name__} cannot be hashed; give its fields and the call '
                'arguments hashable values, such as functions or tuples of numbers for arrays.'
            ) from None

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Applies the module; see `Forward`."""
        return self.apply(variables, x, edits, taps)[:2]

    def apply(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
        *,
        mutable: Collection[str] = (),
        rngs: Mapping[str, PRNGKeyArray] | None = None,
    ) -> tuple[Array, dict[str, Array], dict[str, Any]]:
        """Applies the module as training does, with collections that change and randomness.

        Args:
          variables: as of `Forward`, like the next three.
          x: a batch of inputs `[B, ...]`.
          edits: for each layer name, a function applied to its activation.
          taps: layer names whose activations are returned.
          mutable: collections whose new values are returned, such as running statistics.
          rngs: keys by stream, such as `{'dropout': key}`.

        Returns:
          `(logits [B, K], {layer name: activation [B, ...]}, new values of the collections)`.

        Raises:
          LayerError: as of `Forward`.
        """
        visits = _Visits.plan(edits, taps)
        x, kept = jnp.asarray(x), list(mutable)
        keys = None if rngs is None else dict(rngs)
        run = functools.partial(self.module.apply, variables, x, rngs=keys, **self.kwargs)
        if visits.idle:
            if not kept:
                return cast(Array, run()), {}, {}
            logits, updates = cast(tuple[Array, dict[str, Any]], run(mutable=kept))
            return logits, {}, dict(updates)

        def intercept(
            call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
        ) -> Any:
            path = context.module.path
            if context.method_name != '__call__' or not path:
                return call(*args, **kwargs)

            def record(kind: str, value: Array) -> None:
                # `sow` returns values through lifted transforms without leaking tracers.
                context.module.sow(_COLLECTION, kind, value)

            return visits.run('/'.join(path), call, args, kwargs, record)

        with nn.intercept_methods(intercept):
            out = run(mutable=[*kept, _COLLECTION])
        logits, state = cast(tuple[Array, dict[str, dict]], out)
        updates = dict(state)
        tapped = visits.collect(_flat_names(updates.pop(_COLLECTION, {})), taps)
        return logits, tapped, updates


def _with_hashable_fields(value: Any, done: dict[int, Any]) -> Any:
    """A Linen module with the lists and dicts in its fields (`nn.Sequential`) made hashable.

    A module that stands in two fields (shared parameters) remains one module.
    """
    if isinstance(value, (list, tuple)) and not hasattr(value, '_fields'):
        converted = tuple(_with_hashable_fields(item, done) for item in value)
        unchanged = isinstance(value, tuple) and all(a is b for a, b in zip(converted, value))
        return value if unchanged else converted
    if isinstance(value, dict):
        return flax.core.freeze({k: _with_hashable_fields(v, done) for k, v in value.items()})
    if not isinstance(value, nn.Module):
        return value
    if id(value) not in done:
        own = [f.name for f in dataclasses.fields(value) if f.name not in ('parent', 'name')]
        new = {name: _with_hashable_fields(getattr(value, name), done) for name in own}
        changed = {name: field for name, field in new.items() if field is not getattr(value, name)}
        done[id(value)] = value.clone(**changed) if changed else value
    return done[id(value)]


class _Tap(nnx.Variable):
    """An activation recorded on its way through an NNX module."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NNXForward:
    """A `Forward` of any Flax NNX module, which needs no change.

        graphdef, state = nnx.split(model)
        logits, tapped = NNXForward(graphdef)(state, x)

    Every call works on a merged copy, set to evaluation mode (`nnx.Module.eval`) unless `train`;
    what the call changes in that copy (running statistics, random counters) is discarded.

    Attributes:
      graphdef: the static half of `nnx.split(model)`.
      train: leave the modes of dropout and normalisation as they were split.
    """

    graphdef: nnx.GraphDef
    train: bool = False

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Merges and calls the module; see `Forward`."""
        # The copy gives the variables the trace level of this call and shields the caller's.
        model = nnx.merge(self.graphdef, variables, copy=True)
        if not self.train:
            model.eval()
        visits = _Visits.plan(edits, taps)
        x = jnp.asarray(x)
        if visits.idle:
            return model(x), {}
        for path, module in nnx.iter_modules(model):
            if path and callable(module):
                hook = _Hook('/'.join(map(str, path)), visits)
                module.__class__ = _hooked_class(type(module))
                setattr(module, _HOOK, hook)
        logits, state = nnx.capture(model, _Tap)(x)
        return logits, visits.collect(_flat_names(nnx.to_pure_dict(state)), taps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Hook:
    """Static attribute of a hooked NNX module: its name and the call it takes part in."""

    name: str
    visits: _Visits


@functools.cache
def _hooked_class(cls: type) -> type:
    """A subclass of an NNX module class whose calls are visited. One per class, not per trace."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, _HOOK)

        def record(kind: str, value: Array) -> None:
            self.sow(_Tap, kind, value)

        call = functools.partial(cls.__call__, self)
        return hook.visits.run(hook.name, call, args, kwargs, record)

    return type(cls)(cls.__name__, (cls,), {'__call__': __call__, '__module__': cls.__module__})


def _flat_names(state: dict) -> dict[str, tuple[Array, ...]]:
    """Recorded values by layer name, from the nested collection of either adapter."""
    recorded = {}
    for path, values in flax.traverse_util.flatten_dict(flax.core.unfreeze(state)).items():
        *module, kind = map(str, path)
        suffix = _INPUT_SUFFIX if kind == _INPUT else ''
        recorded['/'.join(module) + suffix] = values
    return recorded


# ---------------------------------------------------------------------------------- wrappers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EditedForward:
    """A forward with edits that every call applies; made by `with_edits`."""

    forward: Forward
    edits: dict[str, Edit]

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Applies its own edits first and the caller's after them; see `Forward`."""
        merged: dict[str, Edit] = dict(self.edits)
        for name, edit in edits.items():
            merged[name] = _compose(edit, merged[name]) if name in merged else edit
        return self.forward(variables, x, edits=merged, taps=taps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TransformedForward:
    """A forward whose input passes through `transform` first; made by `with_input_transform`."""

    forward: Forward
    transform: Callable[[Array], Array]

    def __call__(
        self,
        variables: Variables,
        x: Shaped[Array, 'batch ...'],
        edits: Mapping[str, Edit] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Runs the forward on `transform(x)`; see `Forward`."""
        return self.forward(variables, self.transform(x), edits=edits, taps=taps)


def _compose(outer: Edit, inner: Edit) -> Edit:
    return lambda activation: outer(inner(activation))


def _as_pytree(function: Callable) -> Callable:
    """A `jax.tree_util.Partial` keeps bound arrays as leaves and the function as static data."""
    if isinstance(function, jax.tree_util.Partial):
        return function
    return jax.tree_util.Partial(function)


def with_edits(forward: Forward, edits: Mapping[str, Edit]) -> Forward:
    """A forward that always applies `edits`: the form of every pruned or rescaled model.

    An edit that depends on arrays should be a `jax.tree_util.Partial(function, array)`, with the
    activation as its last argument: the arrays then are leaves of the returned forward, and new
    values need no new trace.

    Args:
      forward: the forward to wrap (itself possibly wrapped).
      edits: for each layer name, a function of its activation `[B, ...]`; a caller's own edit of
        the same layer is applied after it.

    Returns:
      A forward with the same variables, layers and call form.
    """
    return EditedForward(forward, {name: _as_pytree(edit) for name, edit in edits.items()})


def with_input_transform(forward: Forward, transform: Callable[[Array], Array]) -> Forward:
    """A forward that sees `transform(x)` in place of `x`: the form of every input-side defence.

    Args:
      forward: the forward to wrap (itself possibly wrapped).
      transform: a function from inputs `[B, ...]` to inputs `[B, ...]`; gradients flow through it.
        A `jax.tree_util.Partial` keeps its bound arrays as leaves of the returned forward.

    Returns:
      A forward with the same variables, layers and call form.
    """
    return TransformedForward(forward, _as_pytree(transform))


def layers(
    forward: Forward,
    variables: Variables,
    x: Shaped[Array, 'batch ...'] | jax.ShapeDtypeStruct,
    *,
    inputs: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Lists every layer that can be tapped and edited, without running the model.

    Args:
      forward: any forward.
      variables: its variables, or their shapes.
      x: a batch of inputs `[B, ...]`, or its shape.
      inputs: list the values that enter modules (`name:in`) too.

    Returns:
      For each layer name, in the order of execution, the shape `[B, ...]` and dtype of its
      activation. Modules that run more than once, lie inside a lifted loop or do not return an
      array are left out.
    """
    taps = (EVERY_OUTPUT, EVERY_INPUT) if inputs else (EVERY_OUTPUT,)
    order: list[str] = []

    def tapped(variables: Variables, x: Array) -> dict[str, Array]:
        activations = forward(variables, x, taps=taps)[1]
        # jit sorts the keys of a returned dict; the order of execution is noted here.
        order.extend(activations)
        return activations

    shapes = jax.eval_shape(tapped, variables, x)
    return {name: shapes[name] for name in order}
