"""Marks of arrays and the slices that depend on them: joined, moved, changed and forgotten."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from jax.extend import core

# Where it is not known which slices depend, why: with the same reasons the same slices do.
Unknown = tuple[str, ...]
# For some axes a byte for each slice, 1 where it depends on a mark; the other axes do as a whole.
Slices = dict[int, bytes | Unknown]
# In place of an axis: why it is not known whether any slice depends.
WHETHER = -1
# For each mark the slices that depend on it; a mark without any is absent.
Marks = Mapping[int, Slices]


def settled(marks: Marks) -> Marks:
    """Drops axes that depend as a whole, and marks on which no slice depends."""
    return {
        mark: {a: part for a, part in slices.items() if isinstance(part, tuple) or 0 in part}
        for mark, slices in marks.items()
        if all(isinstance(part, tuple) or 1 in part for part in slices.values())
    }


def reasons(parts: Iterable[bytes | Unknown]) -> Unknown:
    """Returns all reasons of several parts, one of them not known."""
    # Slices that are known are a reason, too: joined with others, the same unknown ones differ.
    texts = [part if isinstance(part, tuple) else (part.hex(),) for part in parts]
    # Sorted, as a union has the same reasons in whatever order it is taken.
    return tuple(sorted({reason for text in texts for reason in text}))


def _joined(parts: Sequence[bytes | Unknown]) -> bytes | Unknown:
    """Returns the union of slices along the same axis."""
    certain = [part for part in parts if isinstance(part, bytes)]
    if len(certain) == len(parts):
        return bytes(map(max, zip(*certain, strict=True)))
    # Beside all slices it does not matter which others depend.
    return next((part for part in certain if 0 not in part), reasons(parts))


def union(arrays: Iterable[Marks]) -> dict[int, Slices]:
    """Joins the marks of arrays of one shape; of a mark on different axes all depends."""
    joined: dict[int, Slices] = {}
    for marks in arrays:
        for mark, slices in marks.items():
            joined[mark] = _both(joined[mark], slices) if mark in joined else slices
    return joined


def _both(first: Slices, second: Slices) -> Slices:
    """Joins the slices of two arrays of one shape that depend on the same mark."""
    if (WHETHER in first) == (WHETHER in second):
        return {axis: _joined([first[axis], second[axis]]) for axis in first if axis in second}
    sure, perhaps = (second, first) if WHETHER in first else (first, second)
    # An axis of which the array in doubt says nothing is added whole, or not at all.
    doubt = perhaps[WHETHER]
    return {axis: _joined([part, doubt, perhaps.get(axis, ())]) for axis, part in sure.items()}


def moved(marks: Marks, places: Mapping[int, int]) -> dict[int, Slices]:
    """Gives axes new places; those without one are summed over."""
    places = {**places, WHETHER: WHETHER}
    return {
        mark: {places[axis]: part for axis, part in slices.items() if axis in places}
        for mark, slices in marks.items()
    }


def everything(arrays: Iterable[Marks]) -> Marks:
    """Returns the marks of several arrays as those on which all of a result depends."""
    return union(moved(marks, {}) for marks in arrays)


def change_along(marks: Marks, axis: int, size: int, change: Callable[[bytes], bytes]) -> Marks:
    """Changes the slices along one axis, if it is known which depend."""

    def changed(part: bytes | Unknown) -> bytes | Unknown:
        return part if isinstance(part, tuple) else change(part)

    whole = b"\1" * size
    return {
        mark: {**slices, axis: changed(slices.get(axis, whole))} for mark, slices in marks.items()
    }


def causes_of(equation: core.JaxprEqn, operands: Sequence[Marks]) -> dict[int, Unknown]:
    """Returns for each mark why the slices that depend after an operation are not known.

    Marks on which the same slices of all operands depend have the same reason, since whatever the
    operation does, the same slices of its results depend on them.
    """
    alike: dict[str, list[int]] = {}
    for mark in sorted({mark for marks in operands for mark in marks}):
        slices = [sorted(marks[mark].items()) if mark in marks else None for marks in operands]
        alike.setdefault(repr(slices), []).append(mark)
    # The equation's number tells apart equal operations: they may take different slices.
    return {mark: (f"{id(equation)} {marks}",) for marks in alike.values() for mark in marks}


def blur(marks: Marks, axes: Iterable[int], causes: Mapping[int, Unknown]) -> Marks:
    """Forgets which slices depend along some axes, but not that they differ."""
    axes = set(axes)
    return {
        mark: {axis: causes[mark] if axis in axes else part for axis, part in slices.items()}
        for mark, slices in marks.items()
    }


def places_without(rank: int, axes: Iterable[int]) -> dict[int, int]:
    """Returns the new places of the axes that are left when some go."""
    left = [axis for axis in range(rank) if axis not in set(axes)]
    return {axis: i for i, axis in enumerate(left)}


def slice_at(marks: Marks, index: int) -> Marks:
    """Returns the marks of one slice along the first axis."""
    result = {}
    for mark, slices in marks.items():
        first = slices.get(0, b"")
        if isinstance(first, tuple) or not first or first[index]:
            result[mark] = without(slices, {0}, {a: a - 1 for a in slices if a > 0})
    return result


def without(slices: Slices, gone: Iterable[int], places: Mapping[int, int]) -> Slices:
    """Drops axes of which one slice is left, and moves others."""
    # That slice may be one that depends or one that does not.
    unknown = [part for axis in (*gone, WHETHER) if isinstance(part := slices.get(axis), tuple)]
    whether: Slices = {WHETHER: reasons(unknown)} if unknown else {}
    return whether | {places[axis]: part for axis, part in slices.items() if axis in places}


def with_axis(slices: Slices, axis: int, part: bytes | Unknown) -> Slices:
    """Tells along one axis which slices depend, and no longer whether any does."""
    return {**{a: part for a, part in slices.items() if a != WHETHER}, axis: part}


def stacked(parts: Sequence[Marks], axis: int) -> Marks:
    """Returns the marks of arrays that are stacked along a new axis."""
    shifted = [
        {
            mark: {old + (old >= axis): part for old, part in slices.items()}
            for mark, slices in marks.items()
        }
        for marks in parts
    ]

    def along(mark: int) -> bytes | Unknown:
        slices = bytes(mark in marks for marks in parts)
        doubts = [marks[mark][WHETHER] for marks in parts if WHETHER in marks.get(mark, {})]
        return reasons([*doubts, slices]) if doubts else slices

    return {mark: with_axis(slices, axis, along(mark)) for mark, slices in union(shifted).items()}
