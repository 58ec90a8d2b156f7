"""A traced function divided into what is known and what waits for one argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax.extend.core import primitives
from jaxtyping import Array


class Later:
    """A value that depends on the argument; one object per value."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One primitive operation of a program.

    Attributes:
      primitive: the operation.
      params: its parameters, as in a jaxpr.
      inputs: arrays, or `Later` values of instructions before it.
      outputs: one `Later` per result.
    """

    primitive: Any
    params: Mapping[str, Any]
    inputs: Sequence[Any]
    outputs: Sequence[Later]

    def run(self, *inputs: Any) -> Sequence[Any]:
        """The results for given inputs."""
        results = self.primitive.bind(*inputs, **self.primitive.get_bind_params(self.params))
        return results if self.primitive.multiple_results else [results]


class Program(NamedTuple):
    """What is left of a function of one array once all else is evaluated.

    Attributes:
      argument: the array.
      instructions: operations in order.
      output: the result: a `Later`, or an array if it does not depend on the argument.
    """

    argument: Later
    instructions: Sequence[Instruction]
    output: Any


def specialize(
    function: Callable[[Array], Array], argument: Array, *, inline: bool = False
) -> Program:
    """Evaluates everything in a function that does not depend on its argument.

    Args:
      function: a traceable function of one array to one array; other arrays it uses, traced ones
        too, are known.
      argument: an array of the argument's shape and type.
      inline: take functions with derivatives of their own, and rematerialized ones, apart too: the
        program is finer but must not be differentiated.

    Returns:
      The rest as a program.
    """
    closed = jax.make_jaxpr(function)(argument)
    later = Later()
    instructions: list[Instruction] = []
    (output,) = _split(closed.jaxpr, closed.consts, [later], instructions, inline, later)
    return Program(later, instructions, output)


def run(program: Program, argument: Array) -> dict[Later, Any]:
    """The value of everything in a program, for a value of its argument."""
    values: dict[Later, Any] = {program.argument: argument}
    for instruction in program.instructions:
        inputs = (values[v] if isinstance(v, Later) else v for v in instruction.inputs)
        values.update(zip(instruction.outputs, instruction.run(*inputs)))
    return values


def result(program: Program, argument: Array) -> Array:
    """The result of a program, for a value of its argument."""
    values = run(program, argument)
    return values[program.output] if isinstance(program.output, Later) else program.output


def inner_jaxpr(equation: Any) -> tuple[jex.Jaxpr, Sequence[Any]] | None:
    """The program inside a call that runs it once on its own inputs, and its constants."""
    if equation.primitive is primitives.jit_p:
        closed = equation.params['jaxpr']
        return closed.jaxpr, closed.consts
    if equation.primitive is primitives.remat_p:
        return equation.params['jaxpr'], ()
    if equation.primitive.name in ('custom_jvp_call', 'custom_vjp_call'):
        closed = equation.params['call_jaxpr']
        return closed.jaxpr, closed.consts
    return None


def _split(
    jaxpr: jex.Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    instructions: list[Instruction],
    inline: bool,
    argument: Later,
) -> list[Any]:
    """Evaluates what does not depend on a `Later` argument; appends the rest to a program."""
    values: dict[jex.Var, Any] = {}
    values.update(zip(jaxpr.constvars, consts))
    values.update(zip(jaxpr.invars, arguments))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        waits = any(isinstance(value, Later) for value in inputs)
        inner = inner_jaxpr(equation) if waits else None
        # The argument itself enters a rematerialized block only if the layer lies inside it.
        apart = inline or equation.primitive is primitives.jit_p
        apart |= equation.primitive is primitives.remat_p and any(v is argument for v in inputs)
        if inner is not None and apart:
            outputs: Sequence[Any] = _split(*inner, inputs, instructions, inline, argument)
        else:
            results = [Later() for _ in equation.outvars]
            instruction = Instruction(equation.primitive, equation.params, inputs, results)
            if waits:
                instructions.append(instruction)
            outputs = results if waits else instruction.run(*inputs)
        values.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]
