"""What JAX's traced programs are made of: loops, conditionals, calls, and what products cost.

This module and ``slices`` are the two that know JAX's equations: this one those that hold programs,
``slices`` what the functions of ``jax.lax`` do with an array's axes. The names and parameters of
equations are not part of JAX's public interface and have changed between versions; all of JAX
0.10.2 to 0.12 is understood. Where shapes tell, nothing else is read.
"""

import math
from typing import Any, NamedTuple

from jax.extend import core
from jax.interpreters import partial_eval

# Call-like primitives whose one sub-program has the operands and results of the call itself.
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")


class Loop(NamedTuple):
    """A ``scan`` taken apart.

    Attributes:
        body: What is computed in each turn, of the constants, what is carried, and a slice of each
            sequence, in this order.
        length: How many turns there are.
        constants: How many operands are the same in every turn.
        carried: How many operands go from turn to turn; they are the first results. Operands and
            results after them are sequences, with a slice for each turn along their first axis.
        reverse: Whether the first turn is that of the last slices.
    """

    body: core.Jaxpr
    length: int
    constants: int
    carried: int
    reverse: bool


def _open(program: Any) -> Any:
    """Returns a program without its constants; since JAX 0.11 there is one kind of program."""
    return getattr(program, "jaxpr", program)


def shape(atom: Any) -> tuple[int, ...]:
    """Returns the shape of a variable or literal of a program; what is no array has no axes."""
    return getattr(atom.aval, "shape", ())


def loop(equation: core.JaxprEqn) -> Loop | None:
    """Takes a ``scan`` apart; ``None`` of any other equation."""
    if equation.primitive.name != "scan":
        return None
    body = _open(equation.params["jaxpr"])
    # A sequence has one axis more than its slice.
    sequences = [
        len(shape(whole)) > len(shape(part))
        for whole, part in zip(equation.invars, body.invars, strict=True)
    ]
    stacked = [
        len(shape(whole)) > len(shape(part))
        for whole, part in zip(equation.outvars, body.outvars, strict=True)
    ]
    carried = stacked.count(False)
    constants = sequences.count(False) - carried
    return Loop(
        body, equation.params["length"], constants, carried, equation.params.get("reverse", False)
    )


def called(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the program that an equation calls on its own operands, ``None`` if it is no call."""
    # Their programs may have as many operands, but not those of the equation.
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    for key in _CALLS:
        parameter: Any = equation.params.get(key)
        program = _open(parameter)
        # A program of other operands than the equation's is not simply called.
        arity = (len(equation.invars), len(equation.outvars))
        if hasattr(program, "eqns") and (len(program.invars), len(program.outvars)) == arity:
            return core.ClosedJaxpr(program, getattr(parameter, "consts", ()))
    return None


def branches(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """Returns the programs of which a ``cond`` runs one; none of any other equation."""
    if equation.primitive.name != "cond":
        return []
    return [_open(branch) for branch in equation.params["branches"]]


def needed(program: core.Jaxpr, outputs: list[bool]) -> core.Jaxpr:
    """Drops from a program what some of its results do not need."""
    return partial_eval.dce_jaxpr(program, outputs)[0]


def multiply_adds(equation: core.JaxprEqn) -> int:
    """Counts the multiply-adds of a matrix product or a convolution; 0 of any other equation."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        rows = shape(equation.invars[0])
        return math.prod(shape(equation.outvars[0])) * math.prod(rows[i] for i in contracted)
    if name == "conv_general_dilated":
        # Each output value is a sum over the kernel and the input channels of its group.
        kernel = shape(equation.invars[1])
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return math.prod(shape(equation.outvars[0])) * math.prod(kernel) // outputs
    return 0
