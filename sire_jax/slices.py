"""Which slices of arrays depend on what, followed through a traced program axis by axis.

A network may keep several layers in one array: ``nn.scan`` stacks them along an axis, ``nn.vmap``
the members of an ensemble, and a network may index a stack by hand. An exit after the first layer
then reaches one slice of an array whose others it does not know. What becomes of an axis is known
of the operations that move, pad, cut or join arrays, of sums, windows, matrix products and
convolutions. Where it is not known which slices depend, such as those at an index that a loop
changes, or of members that go through an operation not known here, that is noted (``Unclear``).

It matters in the end for the axes of parameters alone: what is summed over, as examples and
positions are in the gradients of dense layers and convolutions, is forgotten. So as not to doubt
parameters that no layers share, three things are assumed, by which slices may count as reached that
are not. An operation not known here keeps an axis at its place, if its length is the same there, or
else among those of its length, if any. What is looked up at many places, as in an embedding, is a
table of which any loss reaches all: layers or members picked by an array of indices are not told
apart, as those at one index are. And slices along different axes of one array are together all of
it.
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

# Where it is not known which slices depend, why: with the same reasons the same slices do.
Unknown = tuple[str, ...]
# For some axes a byte for each slice, 1 where it depends on a mark; the other axes do as a whole.
Slices = dict[int, bytes | Unknown]
# In place of an axis: why it is not known whether any slice depends.
_WHETHER = -1
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

    def covers(self, other: "bool | Partly") -> bool:
        """Tells whether these slices are all of those that another reach has."""
        return isinstance(other, Partly) and bool((self.mask | ~other.mask).all())

    def __str__(self) -> str:
        """Returns the numbers of slices, such as ``1 of 4 slices``."""
        return f"{int(self.mask.sum())} of {self.mask.size} slices"


@dataclass(frozen=True, eq=False)
class Unclear:
    """Says of a parameter that a loss reaches slices of it, not known which; true as a condition.

    Attributes:
        slices: What is known of each axis, and why no more is.
        shape: That of the parameter.
    """

    slices: Slices
    shape: tuple[int, ...]

    def covers(self, other: "bool | Partly | Unclear") -> bool:
        """Tells whether these slices, whichever they are, are those that another reach has."""
        return isinstance(other, Unclear) and self.slices == other.slices

    def __str__(self) -> str:
        """Returns ``some slices``."""
        return "some slices"


def reached(slices: Slices | None, shape: Sequence[int]) -> bool | Partly | Unclear:
    """Says which slices of a parameter a loss reaches.

    Args:
        slices: Those of its gradient that depend on the loss; ``None`` if it does not.
        shape: The parameter's.
    """
    if slices is None:
        return False
    # A parameter that may be reached is taken to be.
    axes = {axis: part for axis, part in slices.items() if axis != _WHETHER}
    if not axes:
        return True
    mask = np.ones([1] * len(shape), bool)
    for axis, part in axes.items():
        if isinstance(part, tuple):
            return Unclear(axes, tuple(shape))
        along = [len(part) if i == axis else 1 for i in range(len(shape))]
        mask = mask & np.frombuffer(part, bool).reshape(along)
    return Partly(mask, tuple(shape))


def together(reach: Iterable[Any]) -> bool | Partly:
    """Returns what several losses reach of one parameter, as one of them would reach it.

    What one reaches of an array without its being known which slices counts as all of it.
    """
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
    branches = jaxprs.branches(equation)
    if branches:
        results = [dependencies(branch, given[1:]) for branch in branches]
        return [_union([*each, _everything(given[:1])]) for each in zip(*results, strict=True)]
    program = jaxprs.called(equation)
    if program is not None:
        return _through_call(equation, program.jaxpr, given)
    name = equation.primitive.name
    if name in _ELEMENTWISE:
        return _elementwise(equation, given)
    if name in _OPERATIONS:
        return _OPERATIONS[name](equation, given)
    return _blurred(equation, given)


def _through_call(equation: core.JaxprEqn, program: core.Jaxpr, given: list[Marks]) -> list[Marks]:
    inside, outside = (
        [jaxprs.shape(each) for each in variables]
        for variables in (program.invars + program.outvars, equation.invars + equation.outvars)
    )
    if inside == outside:
        return dependencies(program, given)
    # Of the parts of arrays that lie on several devices.
    count = len(given)
    within = map(_parted, [equation] * count, given, outside[:count], inside[:count])
    results = dependencies(program, list(within))
    return list(map(_parted, [equation] * len(results), results, inside[count:], outside[count:]))


def _parted(
    equation: core.JaxprEqn, marks: Marks, before: Sequence[int], after: Sequence[int]
) -> Marks:
    """Keeps what is told of axes that don't lie on several devices."""
    if len(before) != len(after):
        return _everything([marks])
    changed = {axis for axis, size in enumerate(before) if size != after[axis]}
    return _blur(marks, changed, _causes(equation, [marks]))


def _everything(given: Iterable[Marks]) -> Marks:
    return _union(_moved(marks, {}) for marks in given)


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
        mark: {a: part for a, part in slices.items() if isinstance(part, tuple) or 0 in part}
        for mark, slices in marks.items()
        if all(isinstance(part, tuple) or 1 in part for part in slices.values())
    }


def _unknown(parts: Iterable[bytes | Unknown]) -> Unknown:
    """Returns all reasons of several parts, one of them not known."""
    return tuple(
        sorted({why for p in parts for why in (p if isinstance(p, tuple) else (p.hex(),))})
    )


def _joined(parts: Sequence[bytes | Unknown]) -> bytes | Unknown:
    """Returns the union of slices along the same axis."""
    told = [part for part in parts if isinstance(part, bytes)]
    if len(told) == len(parts):
        return bytes(map(max, zip(*told, strict=True)))
    return next((part for part in told if 0 not in part), _unknown(parts))


def _union(several: Iterable[Marks]) -> dict[int, Slices]:
    """Joins the marks of arrays of one shape; of a mark on different axes all depends."""
    union: dict[int, Slices] = {}
    for marks in several:
        for mark, slices in marks.items():
            union[mark] = _both(union[mark], slices) if mark in union else slices
    return union


def _both(first: Slices, second: Slices) -> Slices:
    """Joins the slices of two arrays of one shape that depend on the same mark."""
    if (_WHETHER in first) == (_WHETHER in second):
        return {axis: _joined([first[axis], second[axis]]) for axis in first if axis in second}
    sure, perhaps = (second, first) if _WHETHER in first else (first, second)
    added = perhaps[_WHETHER]
    return {axis: _joined([part, added, perhaps.get(axis, ())]) for axis, part in sure.items()}


def _moved(marks: Marks, places: Mapping[int, int]) -> dict[int, Slices]:
    """Gives axes new places; those without one are summed over."""
    places = {**places, _WHETHER: _WHETHER}
    return {
        mark: {places[axis]: part for axis, part in slices.items() if axis in places}
        for mark, slices in marks.items()
    }


def _along(marks: Marks, axis: int, size: int, change: Callable[[bytes], bytes]) -> Marks:
    """Changes the slices along one axis, if it is known which depend."""

    def changed(part: bytes | Unknown) -> bytes | Unknown:
        return part if isinstance(part, tuple) else change(part)

    whole = b"\1" * size
    return {
        mark: {**slices, axis: changed(slices.get(axis, whole))} for mark, slices in marks.items()
    }


def _causes(equation: core.JaxprEqn, given: Sequence[Marks]) -> dict[int, Unknown]:
    """Returns for each mark why the slices that depend after an operation are not known.

    Marks on which the same slices of all operands depend have the same reason, since whatever the
    operation does, the same slices of its results depend on them.
    """
    alike: dict[str, list[int]] = {}
    for mark in sorted({mark for marks in given for mark in marks}):
        slices = [sorted(marks[mark].items()) if mark in marks else None for marks in given]
        alike.setdefault(repr(slices), []).append(mark)
    return {mark: (f"{id(equation)} {marks}",) for marks in alike.values() for mark in marks}


def _blur(marks: Marks, axes: Iterable[int], causes: Mapping[int, Unknown]) -> Marks:
    """Forgets which slices depend along some axes, but not that they differ."""
    axes = set(axes)
    return {
        mark: {axis: causes[mark] if axis in axes else part for axis, part in slices.items()}
        for mark, slices in marks.items()
    }


def _without(rank: int, axes: Iterable[int]) -> dict[int, int]:
    """Returns the new places of the axes that are left when some go."""
    left = [axis for axis in range(rank) if axis not in set(axes)]
    return {axis: i for i, axis in enumerate(left)}


def _at(marks: Marks, index: int) -> Marks:
    """Returns the marks of one slice along the first axis."""
    result = {}
    for mark, slices in marks.items():
        first = slices.get(0, b"")
        if isinstance(first, tuple) or not first or first[index]:
            result[mark] = _taken(slices, {0}, {a: a - 1 for a in slices if a > 0})
    return result


def _taken(slices: Slices, gone: Iterable[int], places: Mapping[int, int]) -> Slices:
    """Drops axes of which one slice is left, and moves others."""
    unknown = [p for axis in (*gone, _WHETHER) if isinstance(p := slices.get(axis), tuple)]
    whether: Slices = {_WHETHER: _unknown(unknown)} if unknown else {}
    return whether | {places[axis]: part for axis, part in slices.items() if axis in places}


def _stacked(parts: Sequence[Marks], axis: int) -> Marks:
    """Returns the marks of arrays that are stacked along a new axis."""
    shifted = [
        {m: {a + (a >= axis): part for a, part in s.items()} for m, s in marks.items()}
        for marks in parts
    ]

    def along(mark: int) -> bytes | Unknown:
        slices = bytes(mark in marks for marks in parts)
        unknown = [marks[mark][_WHETHER] for marks in parts if _WHETHER in marks.get(mark, {})]
        return _unknown([*unknown, slices]) if unknown else slices

    return {
        mark: {**{a: part for a, part in slices.items() if a != _WHETHER}, axis: along(mark)}
        for mark, slices in _union(shifted).items()
    }


# ---- Operations.


def _operand(equation: core.JaxprEqn, index: int = 0) -> tuple[int, ...]:
    return jaxprs.shape(equation.invars[index])


def _blurred(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    """Follows an operation of which nothing is known."""
    causes = _causes(equation, given)

    def axes(slices: Slices, before: Sequence[int], after: Sequence[int]) -> Iterator[int]:
        for axis in sorted(slices.keys() - {_WHETHER}):
            same = axis < len(after) and before[axis] == after[axis]
            yield from [axis] if same else [i for i, n in enumerate(after) if n == before[axis]]

    def one(i: int, marks: Marks, after: Sequence[int]) -> Marks:
        whole = _everything([marks])
        return {
            mark: whole[mark]
            | dict.fromkeys(axes(slices, _operand(equation, i), after), causes[mark])
            for mark, slices in marks.items()
        }

    return [
        _union(one(i, marks, jaxprs.shape(variable)) for i, marks in enumerate(given) if marks)
        for variable in equation.outvars
    ]


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
    shape = _operand(equation)
    places, single = _without(len(shape), axes), [axis for axis in axes if shape[axis] == 1]
    return [{mark: _taken(slices, single, places) for mark, slices in given[0].items()}]


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

    def part(slices: Slices | None, size: int) -> bytes | Unknown:
        if slices is None:
            return b"\0" * size
        return slices.get(_WHETHER) or slices.get(axis, b"\1" * size)

    def along(mark: int) -> bytes | Unknown:
        parts = [part(m.get(mark), size) for m, size in zip(given, sizes, strict=True)]
        told = [part for part in parts if isinstance(part, bytes)]
        return b"".join(told) if len(told) == len(parts) else _unknown(parts)

    return [
        {
            mark: {**{a: part for a, part in slices.items() if a != _WHETHER}, axis: along(mark)}
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
    # Where it starts is not known.
    sizes = zip(_operand(equation), equation.params["slice_sizes"], strict=True)
    cut = {axis for axis, (whole, part) in enumerate(sizes) if whole != part}
    taken = _blur(given[0], cut, _causes(equation, given))
    return [_union([taken, _everything(given[1:])])]


def _dynamic_update(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    causes = _causes(equation, given)
    sizes = zip(_operand(equation), _operand(equation, 1), strict=True)
    cut = [axis for axis, (whole, part) in enumerate(sizes) if whole != part]
    put = {mark: slices | dict.fromkeys(cut, causes[mark]) for mark, slices in given[1].items()}
    return [_union([given[0], put, _everything(given[2:])])]


def _gather(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    numbers, shape = equation.params["dimension_numbers"], _operand(equation)
    batched = numbers.operand_batching_dims
    free = _without(len(shape), [*numbers.collapsed_slice_dims, *batched])
    places = {axis: numbers.offset_dims[i] for axis, i in free.items()}
    looked_up = list(_without(len(jaxprs.shape(equation.outvars[0])), numbers.offset_dims))
    of_batches = [looked_up[i] for i in numbers.start_indices_batching_dims]
    places |= dict(zip(batched, of_batches, strict=True))
    sizes = enumerate(zip(shape, equation.params["slice_sizes"], strict=True))
    cut = {axis for axis, (whole, part) in sizes if whole != part and axis not in batched}
    causes = _causes(equation, given)
    taken = _moved(_blur(given[0], cut, causes), places)
    for mark, slices in given[0].items():
        if slices.keys() & (cut - places.keys()):
            # Any place may be that of a slice that depends.
            unknown = [i for i in looked_up if i not in of_batches] or [_WHETHER]
            taken[mark] |= dict.fromkeys(unknown, causes[mark])
    return [_union([taken, _everything(given[1:])])]


def _scatter(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    """Follows what is put, or added, at one place as at an index, at many as from data."""
    numbers = equation.params["dimension_numbers"]
    shape, put = _operand(equation), _operand(equation, 2)
    batched = numbers.operand_batching_dims
    free = _without(len(shape), [*numbers.inserted_window_dims, *batched])
    places = {numbers.update_window_dims[i]: axis for axis, i in free.items()}
    places = {i: axis for i, axis in places.items() if put[i] == shape[axis]}
    scattered = list(_without(len(put), numbers.update_window_dims))
    of_batches = [scattered[i] for i in numbers.scatter_indices_batching_dims]
    places |= dict(zip(of_batches, batched, strict=True))
    updates = _moved(given[2], places)
    if len(_operand(equation, 1)) - 1 == len(batched):
        causes = _causes(equation, given)
        cut = [i for i, size in enumerate(shape) if size > 1 and i not in places.values()]
        updates = {m: slices | dict.fromkeys(cut, causes[m]) for m, slices in updates.items()}
    return [_union([given[0], updates, _everything(given[1:2])])]


def _cumulate(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    axis, step = equation.params["axis"], -1 if equation.params["reverse"] else 1

    def change(part: bytes) -> bytes:
        depends = list(accumulate(part[::step], max))
        return bytes(depends)[::step]

    return [_along(given[0], axis, _operand(equation)[axis], change)]


def _sort(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    causes, axis = _causes(equation, given), equation.params["dimension"]
    union = _union(_blur(marks, [axis], causes) for marks in given)
    return [union] * len(equation.outvars)


def _fourier(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    kept = len(_operand(equation)) - len(equation.params["fft_lengths"])
    return [_moved(given[0], {axis: axis for axis in range(kept)})]


def _window(equation: core.JaxprEqn, given: list[Marks]) -> list[Marks]:
    """Follows axes on which a window has one value and moves by one."""
    params, causes = equation.params, _causes(equation, given)
    ones = [1] * len(_operand(equation))
    alone = zip(
        params["window_dimensions"],
        params["window_strides"],
        params.get("base_dilation") or ones,
        params.get("window_dilation") or ones,
        params["padding"],
        strict=True,
    )
    others = {axis for axis, each in enumerate(alone) if each != (1, 1, 1, 1, (0, 0))}
    union = _union(
        _blur(marks, others, causes) if len(_operand(equation, i)) == len(ones) else marks
        for i, marks in enumerate(given)
    )
    return [union] * len(equation.outvars)


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
        return _blurred(equation, given)
    groups = list(_groups(before, after))
    result: dict[int, Slices] = {}
    for mark, slices in given[0].items():
        single = [axis for axis in slices if axis != _WHETHER and before[axis] == 1]
        result[mark] = _taken(slices, single, {})
        for old, new in groups:
            old = [axis for axis in old if before[axis] > 1]
            told = {axis: slices[axis] for axis in old if axis in slices}
            if not told:
                continue
            known = {axis: part for axis, part in told.items() if isinstance(part, bytes)}
            if len(known) < len(told):
                wide = [axis for axis in new if after[axis] > 1]
                result[mark] |= dict.fromkeys(wide, _unknown(told.values()))
                continue
            merged = b"\1"
            for axis in old:
                part = known.get(axis, b"\1" * before[axis])
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
    *("sin", "cos", "log1p", "expm1", "erf", "rem", "nextafter", "complex"),
    *("logistic", "square", "and", "or", "not", "is_finite", "real", "imag", "conj"),
    *("device_put", "sharding_constraint", "eq", "ne", "lt", "le", "gt", "ge"),
    *("psum", "psum_invariant", "pvary"),
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
    "gather": _gather,
    **dict.fromkeys(["scatter", "scatter-add", "scatter-sub", "scatter-mul"], _scatter),
    **dict.fromkeys(["scatter-min", "scatter-max"], _scatter),
    **dict.fromkeys(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"], _cumulate),
    "sort": _sort,
    "fft": _fourier,
    **dict.fromkeys(["reduce_window_sum", "reduce_window_max", "reduce_window_min"], _window),
    **dict.fromkeys(["reduce_window", "select_and_scatter_add", "select_and_gather_add"], _window),
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "reshape": _reshape,
}
