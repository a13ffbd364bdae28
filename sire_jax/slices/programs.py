"""Follows marks through whole programs: their calls, conditionals and loops."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from sire_jax import jaxprs
from sire_jax.slices import operations
from sire_jax.slices.marks import (
    Marks,
    blur,
    causes_of,
    everything,
    settled,
    slice_at,
    stacked,
    union,
)

_NONE: Marks = {}


def dependencies(program: core.Jaxpr, inputs: Sequence[Marks]) -> list[Marks]:
    """Follows marks from the inputs of a program to its outputs, as ``traced.dependencies``.

    Args:
        program: A traced program.
        inputs: For each input its marks.

    Returns:
        For each output the marks on which it depends, and the slices that do.
    """
    marks: dict[Any, Marks] = dict(zip(program.invars, inputs, strict=True))

    def marks_of(atom: Any) -> Marks:
        return _NONE if isinstance(atom, core.Literal) else marks.get(atom, _NONE)

    for equation in program.eqns:
        operands = [marks_of(atom) for atom in equation.invars]
        # Most equations of a gradient are of its forward pass, which no cotangent has entered.
        if any(operands):
            results = map(settled, _through(equation, operands))
            marks.update(zip(equation.outvars, results, strict=True))
    return [marks_of(atom) for atom in program.outvars]


def _through(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    loop = jaxprs.loop(equation)
    if loop is not None and loop.length:
        return _through_loop(loop, operands)
    branches = jaxprs.branches(equation)
    if branches:
        # Which branch runs depends on the first operand, and so does all of each result.
        condition, inputs = everything(operands[:1]), operands[1:]
        results = [dependencies(branch, inputs) for branch in branches]
        return [union([*marks, condition]) for marks in zip(*results, strict=True)]
    program = jaxprs.called(equation)
    if program is not None:
        return _through_call(equation, program.jaxpr, operands)
    return operations.through(equation, operands)


def _through_call(
    equation: core.JaxprEqn, program: core.Jaxpr, operands: list[Marks]
) -> list[Marks]:
    inside, outside = (
        [jaxprs.shape(variable) for variable in variables]
        for variables in (program.invars + program.outvars, equation.invars + equation.outvars)
    )
    if inside == outside:
        return dependencies(program, operands)
    # Of the parts of arrays that lie on several devices.
    count = len(operands)
    inputs = map(_parted, [equation] * count, operands, outside[:count], inside[:count])
    results = dependencies(program, list(inputs))
    return list(map(_parted, [equation] * len(results), results, inside[count:], outside[count:]))


def _parted(
    equation: core.JaxprEqn, marks: Marks, before: Sequence[int], after: Sequence[int]
) -> Marks:
    """Keeps what is told of axes that don't lie on several devices."""
    if len(before) != len(after):
        return everything([marks])
    changed = {axis for axis, size in enumerate(before) if size != after[axis]}
    return blur(marks, changed, causes_of(equation, [marks]))


def _through_loop(loop: jaxprs.Loop, operands: list[Marks]) -> list[Marks]:
    """Takes a loop turn by turn; turns that are given the same marks are followed once."""
    first, last = loop.constants, loop.constants + loop.carried
    constants, carried, sequences = operands[:first], operands[first:last], operands[last:]
    followed: dict[str, list[Marks]] = {}
    turns: list[list[Marks]] = []
    for turn in reversed(range(loop.length)) if loop.reverse else range(loop.length):
        changing = [*carried, *(slice_at(marks, turn) for marks in sequences)]
        key = repr(changing)
        if key not in followed:
            followed[key] = dependencies(loop.body, [*constants, *changing])
        carried = followed[key][: loop.carried]
        turns.append(followed[key][loop.carried :])
    if loop.reverse:
        turns.reverse()
    return [*carried, *(stacked(parts, 0) for parts in zip(*turns, strict=True))]
