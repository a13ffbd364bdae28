"""What a traced program says: which inputs an output depends on, and what it costs.

Nothing here is declared by the user or run on data: the functions read the ``jaxpr`` that JAX
traces, so they hold for any network.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sire_jax import jaxprs, slices
from sire_jax.layers import convolution

__all__ = [
    "dependencies",
    "multiply_adds",
    "multiply_adds_together",
    "parameters_read",
    "reach",
    "size",
    "through",
]

PyTree = Any


def dependencies(program: core.Jaxpr, inputs: list[int]) -> list[int]:
    """Follows sets of marks from the inputs of a program to its outputs.

    Args:
        program: A traced program.
        inputs: For each input a set of marks, as the bits of an integer.

    Returns:
        For each output the union of the marks of all inputs that it depends on. Exact through
        calls and loops over blocks; a conditional is taken to depend on all that it is given.
    """
    marks: dict[Any, int] = dict(zip(program.invars, inputs, strict=True))

    def mark_of(atom: Any) -> int:
        return 0 if isinstance(atom, core.Literal) else marks.get(atom, 0)

    for equation in program.eqns:
        operands = [mark_of(atom) for atom in equation.invars]
        marks.update(zip(equation.outvars, through(equation, operands), strict=True))
    return [mark_of(atom) for atom in program.outvars]


def through(equation: core.JaxprEqn, marks: list[int]) -> list[int]:
    """Follows sets of marks from the operands of one equation to its results."""
    loop = jaxprs.loop(equation)
    if loop is not None:
        return _through_loop(loop, marks)
    program = jaxprs.called(equation)
    if program is not None:
        return dependencies(program.jaxpr, marks)
    everything = 0
    for mark in marks:
        everything |= mark
    return [everything] * len(equation.outvars)


def _through_loop(loop: jaxprs.Loop, marks: list[int]) -> list[int]:
    first, last = loop.constants, loop.constants + loop.carried
    operands = list(marks)
    # What is carried only gains marks, so that turns end to change it, whatever the loop's length.
    while True:
        results = dependencies(loop.body, operands)
        carried = [operands[first + i] | results[i] for i in range(loop.carried)]
        if carried == operands[first:last]:
            return results
        operands[first:last] = carried


def parameters_read(
    function: Callable[..., Mapping[str, PyTree]], params: PyTree, *args: Any
) -> dict[str, PyTree]:
    """Finds which parameters each named output is computed from.

    >>> params = {"shared": jnp.ones(3), "own": jnp.ones(3)}
    >>> function = lambda p: {"exit": p["shared"].sum(), "main": (p["shared"] * p["own"]).sum()}
    >>> parameters_read(function, params)["exit"]
    {'own': False, 'shared': True}

    Args:
        function: Maps ``(params, *args)`` to a mapping of named outputs.
        params: Parameters, or their shapes.
        *args: The other arguments, or their shapes.

    Returns:
        For each output a tree like ``params`` of booleans.
    """
    program, results = jax.make_jaxpr(function, return_shape=True)(params, *args)
    leaves, tree = jax.tree.flatten(params)
    bits = [1 << i for i in range(len(leaves))]
    marks = dependencies(program.jaxpr, bits + [0] * (len(program.jaxpr.invars) - len(bits)))
    by_name: dict[str, int] = dict.fromkeys(results, 0)
    # A mapping's leaves are in the order of its sorted keys.
    names = [name for name in sorted(results) for _ in jax.tree.leaves(results[name])]
    for name, mark in zip(names, marks, strict=True):
        by_name[name] |= mark
    return {
        name: jax.tree.unflatten(tree, [bool(mark & bit) for bit in bits])
        for name, mark in by_name.items()
    }


def reach(
    losses: Callable[..., Mapping[str, Any]], params: PyTree, *args: Any
) -> dict[str, PyTree]:
    """Finds which parameters the gradient of each named loss reaches.

    The traced program is the vector-Jacobian product of all losses: a parameter is reached by a
    loss if its gradient depends on that loss's cotangent. A parameter that a loss reads through
    ``stop_gradient`` is therefore not reached; one whose gradient happens to be zero is. Of an
    array of several layers, as ``nn.scan`` makes them, a loss may reach some slices alone.

    >>> losses = lambda layers: {"exit": layers[0] ** 2, "main": (layers**2).sum()}
    >>> {name: str(reached) for name, reached in reach(losses, jnp.ones(4)).items()}
    {'exit': '1 of 4 slices', 'main': 'True'}

    Args:
        losses: Maps ``(params, *args)`` to ``{name: scalar}``.
        params: Parameters, or their shapes.
        *args: The other arguments, or their shapes.

    Returns:
        For each loss a tree like ``params``: whether it reaches a parameter, or ``slices.Partly``,
        true as a condition, if it reaches some slices of it and not others, or ``slices.Unclear``,
        true as well, if it is not known which.
    """
    shapes = dict(jax.eval_shape(losses, params, *args))
    names = sorted(shapes)

    def pull_back(cotangents: dict[str, Any], values: PyTree, args: Any) -> PyTree:
        _, backward = jax.vjp(lambda p: losses(p, *args), values)
        return backward(cotangents)[0]

    program = jax.make_jaxpr(pull_back)(shapes, params, args).jaxpr
    leaves, tree = jax.tree.flatten(params)
    # The cotangents are the first inputs, in the order of their sorted names.
    cotangents: list[slices.Marks] = [{i: {}} for i in range(len(names))]
    unmarked: list[slices.Marks] = [{} for _ in program.invars[len(names) :]]
    gradients = slices.dependencies(program, cotangents + unmarked)

    def reached(mark: int) -> list[Any]:
        return [
            slices.reached(marks.get(mark), jnp.shape(leaf))
            for leaf, marks in zip(leaves, gradients, strict=True)
        ]

    return {name: jax.tree.unflatten(tree, reached(i)) for i, name in enumerate(names)}


def multiply_adds(function: Callable[..., Any], *args: Any) -> int:
    """Counts the multiply-adds of the matrix products and convolutions that a result needs.

    >>> multiply_adds(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 4)))
    24

    Args:
        function: Any traceable function. What its results do not depend on is not counted.
        *args: Its arguments, or their shapes.

    Returns:
        The number of multiply-adds of one call. A loop's body is counted as often as it runs (of a
        ``while_loop``, whose runs the program does not tell, not at all), of a conditional the most
        expensive branch.
    """
    program, _ = _trace_whole(function, args)
    return _count_needed(program, [True] * len(program.outvars))


def multiply_adds_together(
    function: Callable[..., Mapping[str, PyTree]], chosen: Sequence[Collection[str]], *args: Any
) -> list[int]:
    """Counts the multiply-adds of sets of named outputs, what a set has in common only once.

    >>> outputs = lambda x, w: {"exit": x @ w, "main": (x @ w) @ w}
    >>> multiply_adds_together(outputs, [["exit"], ["exit", "main"]], jnp.ones(3), jnp.ones((3, 3)))
    [9, 27]

    Args:
        function: Maps ``args`` to a mapping of named outputs; it is traced once.
        chosen: Sets of names.
        *args: Its arguments, or their shapes.

    Returns:
        For each set the number of one call, as ``multiply_adds``.
    """
    program, results = _trace_whole(function, args)
    names = [name for name in sorted(results) for _ in jax.tree.leaves(results[name])]
    return [
        _count_needed(program, [name in chosen_names for name in names]) for chosen_names in chosen
    ]


def _trace_whole(function: Callable[..., Any], args: Sequence[Any]) -> tuple[core.Jaxpr, Any]:
    """Traces a function with each convolution as one operation; also returns its shapes."""
    with convolution.whole():
        # A function of its own, or JAX might remember how it has traced this one before.
        traced = jax.make_jaxpr(lambda *inputs: function(*inputs), return_shape=True)
        program, shapes = traced(*args)
    return program.jaxpr, shapes


def _count_needed(program: core.Jaxpr, outputs: list[bool]) -> int:
    return _count(jaxprs.needed(program, outputs))


def _count(program: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in program.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    loop = jaxprs.loop(equation)
    if loop is not None:
        return loop.length * _count(loop.body)
    branches = jaxprs.branches(equation)
    if branches:
        return max(map(_count, branches))
    program = jaxprs.called(equation)
    return jaxprs.multiply_adds(equation) if program is None else _count(program.jaxpr)


def size(params: PyTree, chosen: PyTree | None = None) -> int:
    """Counts the values of a tree of arrays, or of those that a tree from ``reach`` chooses.

    >>> import jax.numpy as jnp
    >>> size({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
    16
    """

    def count(param: Any, chosen: Any) -> int:
        shape = jnp.shape(param)
        if isinstance(chosen, slices.Partly):
            return int(np.broadcast_to(chosen.mask, shape).sum())
        return math.prod(shape) if chosen else 0

    chosen = jax.tree.map(lambda _: True, params) if chosen is None else chosen
    return sum(jax.tree.leaves(jax.tree.map(count, params, chosen)))
