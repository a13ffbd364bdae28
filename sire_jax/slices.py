"""Which slices of arrays depend on what, followed through a traced program axis by axis.

A network may keep several layers in one array: ``nn.scan`` stacks them along an axis, ``nn.vmap``
the members of an ensemble, and a network may index a stack by hand. An exit after the first layer
then reaches one slice of an array whose others it does not know. What becomes of an axis is known
of the operations that move, pad, cut or join arrays, of sums, matrix products and convolutions.
After others, such as look-ups by an index, all of a result is taken to depend on all of its
operands: no slice is missed that does depend.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
from jax.extend import core

from sire_jax import jaxprs

# For some axes a byte for each slice, 1 where it depends on a mark; the other axes do as a whole.
Slices = dict[int, bytes]
# For each mark the slices that depend on it; a mark without any is absent.
Marks = Mapping[int, Slices]
_NONE: Marks = {}


@dataclass(frozen=True, eq=False)
class Partly:
    """Says of a parameter that a loss reaches some slices of it, not all; true as a condition.

    Attributes:
        mask: Booleans with the parameter's axes, of length 1 where slices don't differ.
        shape: That of the parameter.
    """

    mask: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of(cls, slices: Slices, shape: Sequence[int]) -> "Partly":
        """Says it of slices along one or more axes of an array."""
        mask = np.ones([1] * len(shape), bool)
        for axis, reached in slices.items():
            along = [len(reached) if i == axis else 1 for i in range(len(shape))]
            mask = mask & np.frombuffer(reached, bool).reshape(along)
        return cls(mask, tuple(shape))

    def covers(self, other: "bool | Partly") -> bool:
        """Tells whether these slices are all of those that another reach has."""
        return isinstance(other, Partly) and bool((self.mask | ~other.mask).all())

    def __str__(self) -> str:
        """Returns the numbers of slices, such as ``1 of 4 slices``."""
        return f"{int(self.mask.sum())} of {self.mask.size} slices"


def together(reach: Iterable[Any]) -> bool | Partly:
    """Returns what several losses reach of one parameter, as one of them would reach it."""
    mask = np.zeros((), bool)
    shape: tuple[int, ...] = ()
    for one in reach:
        shape = one.shape if isinstance(one, Partly) else shape
        mask = mask | (one.mask if isinstance(one, Partly) else np.asarray(bool(one)))
    return Partly(mask, shape) if mask.any() and not mask.all() else bool(mask.any())


def dependencies(program: core.Jaxpr, inputs: Sequence[Marks]) -> list[Marks]:
    """Follows marks from the inputs of a program to its outputs, as ``traced.dependencies``.

    Args:
        program: A traced program.
        inputs: For each input its marks.

    Returns:
        For each output the marks on which it depends, and the slices that do.
    """
    known: dict[Any, Marks] = dict(zip(program.invars, inputs, strict=True))

    def read(atom: Any) -> Marks:
        return _NONE if isinstance(atom, core.Literal) else known.get(atom, _NONE)

    for equation in program.eqns:
        given = [read(atom) for atom in equation.invars]
        if any(given):
            results = map(_settled, _through(equation, given))
            known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _through(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    loop = jaxprs.loop(equation)
    if loop is not None and loop.length:
        return _through_loop(loop, given)
    program = jaxprs.called(equation)
    if program is not None:
        return _through_call(equation, program.jaxpr, given)
    name = equation.primitive.name
    if name in _ELEMENTWISE:
        return _elementwise(equation, given)
    if name in _OPERATIONS:
        return _OPERATIONS[name](equation, given)
    return [_everything(given)] * len(equation.outvars)


def _through_call(equation: core.JaxprEqn, program: core.Jaxpr, given: list[Marks]) -> list[Marks]:
    inside, outside = (
        [jaxprs.shape(each) for each in variables]
        for variables in (program.invars + program.outvars, equation.invars + equation.outvars)
    )
    if inside == outside:
        return dependencies(program, given)
    # Of the parts of arrays that lie on several devices.
    results = dependencies(program, [_everything([marks]) for marks in given])
    return [_everything([marks]) for marks in results]


def _everything(given: Iterable[Marks]) -> Marks:
    return {mark: {} for marks in given for mark in marks}


def _through_loop(loop: jaxprs.Loop, given: list[Marks]) -> list[Marks]:
    """Takes a loop turn by turn; turns that are given the same marks are followed once."""
    first, last = loop.constants, loop.constants + loop.carried
    carried, known = given[first:last], {}
    turns: list[list[Marks]] = []
    for turn in reversed(range(loop.length)) if loop.reverse else range(loop.length):
        operands = [*given[:first], *carried, *(_at(marks, turn) for marks in given[last:])]
        key = repr(operands[first:])
        if key not in known:
            known[key] = dependencies(loop.body, operands)
        carried = known[key][: loop.carried]
        turns.append(known[key][loop.carried :])
    if loop.reverse:
        turns.reverse()
    return [*carried, *(_stacked(slices, 0) for slices in zip(*turns, strict=True))]


# ---- Slices of one array.


def _settled(marks: Marks) -> Marks:
    """Drops axes that depend as a whole, and marks on which no slice depends."""
    return {
        mark: {axis: part for axis, part in slices.items() if 0 in part}
        for mark, slices in marks.items()
        if all(1 in part for part in slices.values())
    }


def _union(several: Iterable[Marks]) -> Marks:
    """Joins the marks of arrays of one shape; of a mark on different axes all depends."""
    union: dict[int, Slices] = {}
    for marks in several:
        for mark, slices in marks.items():
            if mark in union:
                before = union[mark]
                slices = {
                    axis: bytes(a | b for a, b in zip(before[axis], slices[axis], strict=True))
                    for axis in before.keys() & slices.keys()
                }
            union[mark] = slices
    return union


def _moved(marks: Marks, places: Mapping[int, int]) -> Marks:
    """Gives axes new places; those without one are summed over."""
    return {
        mark: {places[axis]: part for axis, part in slices.items() if axis in places}
        for mark, slices in marks.items()
    }


def _along(marks: Marks, axis: int, size: int, change: Callable[[bytes], bytes]) -> Marks:
    """Changes the slices along one axis."""
    whole = b"\1" * size
    return {
        mark: {**slices, axis: change(slices.get(axis, whole))} for mark, slices in marks.items()
    }


def _without(rank: int, axes: Iterable[int]) -> dict[int, int]:
    """Returns the new places of the axes that are left when some go."""
    left = [axis for axis in range(rank) if axis not in set(axes)]
    return {axis: i for i, axis in enumerate(left)}


def _at(marks: Marks, index: int) -> Marks:
    """Returns the marks of one slice along the first axis."""
    return {
        mark: {axis - 1: part for axis, part in slices.items() if axis}
        for mark, slices in marks.items()
        if 0 not in slices or slices[0][index]
    }


def _stacked(parts: Sequence[Marks], axis: int) -> Marks:
    """Returns the marks of arrays that are stacked along a new axis."""
    shifted = [
        {m: {a + (a >= axis): part for a, part in s.items()} for m, s in marks.items()}
        for marks in parts
    ]
    union = _union(shifted)
    return {
        mark: {**slices, axis: bytes(mark in marks for marks in parts)}
        for mark, slices in union.items()
    }


# ---- Operations.


def _operand(equation: core.JaxprEqn, index: int = 0) -> tuple[int, ...]:
    return jaxprs.shape(equation.invars[index])


def _elementwise(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    if len(equation.outvars) > 1:
        return given
    shape = jaxprs.shape(equation.outvars[0])
    # A scalar beside an array is in all of it.
    return [
        _union(
            marks if _operand(equation, i) == shape else _everything([marks])
            for i, marks in enumerate(given)
        )
    ]


def _reduce(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    params = equation.params
    axes = params["dimensions"] if "dimensions" in params else params["axes"]
    return [_moved(given[0], _without(len(_operand(equation)), axes))]


def _transpose(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    return [_moved(given[0], {a: i for i, a in enumerate(equation.params["permutation"])})]


def _broadcast(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    return [_moved(given[0], dict(enumerate(equation.params["broadcast_dimensions"])))]


def _reverse(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    marks, shape = given[0], _operand(equation)
    for axis in equation.params["dimensions"]:
        marks = _along(marks, axis, shape[axis], lambda part: part[::-1])
    return [marks]


def _slice(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    marks, params = given[0], equation.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, ((start, limit, stride), size) in enumerate(
        zip(cuts, _operand(equation), strict=True)
    ):
        cut = slice(int(start), int(limit), int(stride))
        marks = _along(marks, axis, size, itemgetter(cut))
    return [marks]


def _pad(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    marks = given[0]
    amounts = zip(equation.params["padding_config"], _operand(equation), strict=True)
    for axis, (amount, size) in enumerate(amounts):
        low, high, interior = map(int, amount)

        def pad(part: bytes, low: int = low, high: int = high, interior: int = interior) -> bytes:
            wide = (b"\0" * interior).join(bytes([byte]) for byte in part)
            wide = b"\0" * low + wide + b"\0" * high
            return wide[max(-low, 0) : len(wide) - max(-high, 0)]

        marks = _along(marks, axis, size, pad)
    return [_union([marks, _everything(given[1:])])]


def _concatenate(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    axis = equation.params["dimension"]
    sizes = [_operand(equation, i)[axis] for i in range(len(given))]
    places = {a: a for a in range(len(_operand(equation))) if a != axis}
    union = _union(_moved(marks, places) for marks in given)

    def part(marks: Marks, mark: int, size: int) -> bytes:
        return marks[mark].get(axis, b"\1" * size) if mark in marks else b"\0" * size

    return [
        {
            mark: {
                **slices,
                axis: b"".join(
                    part(marks, mark, size) for marks, size in zip(given, sizes, strict=True)
                ),
            }
            for mark, slices in union.items()
        }
    ]


def _stack(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    return [_stacked(given, equation.params["axis"])]


def _unstack(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    axis, rank = equation.params["axis"], len(_operand(equation))
    first = _moved(given[0], {axis: 0, **{a: i + 1 for a, i in _without(rank, [axis]).items()}})
    return [_at(first, i) for i in range(len(equation.outvars))]


def _split(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    axis = equation.params["axis"]
    ends = list(accumulate(map(int, equation.params["sizes"]), initial=0))
    whole = _operand(equation)[axis]
    return [
        _along(given[0], axis, whole, itemgetter(slice(start, end)))
        for start, end in pairwise(ends)
    ]


def _dynamic_slice(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    # Where it starts is not known: any slice may depend, on an axis that is not taken whole.
    sizes = zip(_operand(equation), equation.params["slice_sizes"], strict=True)
    places = {axis: axis for axis, (whole, part) in enumerate(sizes) if whole == part}
    return [_union([_moved(given[0], places), _everything(given[1:])])]


def _dynamic_update(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    sizes = zip(_operand(equation), _operand(equation, 1), strict=True)
    places = {axis: axis for axis, (whole, part) in enumerate(sizes) if whole == part}
    return [_union([given[0], _moved(given[1], places), _everything(given[2:])])]


def _product(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    (contracted, batched) = equation.params["dimension_numbers"]
    results, place = [], len(batched[0])
    for i in range(2):
        gone = {*contracted[i], *batched[i]}
        places = {axis: j for j, axis in enumerate(batched[i])}
        free = _without(len(_operand(equation, i)), gone)
        places |= {axis: place + j for axis, j in free.items()}
        place += len(free)
        results.append(_moved(given[i], places))
    return [_union(results)]


def _convolution(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    """Follows batches, and features as far as groups of them are convolved apart."""
    params, result = equation.params, jaxprs.shape(equation.outvars[0])
    numbers = params["dimension_numbers"]
    batch, feature = numbers.out_spec[:2]
    # What is mapped over kernels is a convolution of groups, of batches in some of its gradients.
    grouped = numbers.lhs_spec[0 if params["batch_group_count"] > 1 else 1]
    groups = max(params["batch_group_count"], params["feature_group_count"])

    def by_group(part: bytes) -> bytes:
        size = len(part) // groups
        depends = (1 in part[i * size : (i + 1) * size] for i in range(groups))
        return b"".join(bytes([each]) * (result[feature] // groups) for each in depends)

    images = _along(given[0], grouped, _operand(equation)[grouped], by_group)
    places = {grouped: feature}
    if grouped != numbers.lhs_spec[0]:
        places[numbers.lhs_spec[0]] = batch
    kernels = _moved(given[1], {numbers.rhs_spec[0]: feature})
    return [_union([_moved(images, places), kernels])]


def _reshape(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    before, after = _operand(equation), jaxprs.shape(equation.outvars[0])
    if equation.params["dimensions"] is not None or 0 in before:
        return [_everything(given)]
    groups = list(_groups(before, after))
    result: dict[int, Slices] = {}
    for mark, slices in given[0].items():
        result[mark] = {}
        for old, new in groups:
            if not slices.keys() & set(old):
                continue
            merged = b"\1"
            for axis in old:
                part = slices.get(axis, b"\1" * before[axis])
                merged = b"".join(part if byte else b"\0" * len(part) for byte in merged)
            parts = np.frombuffer(merged, bool).reshape([after[axis] for axis in new])
            for i, axis in enumerate(new):
                others = tuple(j for j in range(len(new)) if j != i)
                result[mark][axis] = parts.any(others).tobytes()
    return [result]


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Finds the least groups of neighbouring axes that a reshape turns into each other."""
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(old), j + len(new)
        while (a := math.prod(before[axis] for axis in old)) != (
            b := math.prod(after[axis] for axis in new)
        ):
            if a < b:
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        yield old, new


# Each value of the result is of the values at its own place.
_ELEMENTWISE = {
    *("add", "add_any", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "clamp"),
    *("select_n", "convert_element_type", "reduce_precision", "copy", "copy_p", "name"),
    *("optimization_barrier", "integer_pow", "pow", "sqrt", "rsqrt", "exp", "log", "tanh"),
    *("logistic", "square", "and", "or", "not", "is_finite", "real", "imag", "conj"),
    *("device_put", "sharding_constraint", "eq", "ne", "lt", "le", "gt", "ge"),
}
_OPERATIONS: dict[str, Callable[[core.JaxprEqn, list[Marks]], list[Marks]]] = {
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_prod": _reduce,
    "squeeze": _reduce,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "rev": _reverse,
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "reshape": _reshape,
}
