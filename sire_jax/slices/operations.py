"""What the functions of ``jax.lax`` do with the slices of their operands, one by one."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from operator import itemgetter

import numpy as np
from jax.extend import core

from sire_jax import jaxprs
from sire_jax.slices.marks import (
    WHETHER,
    Marks,
    Slices,
    Unknown,
    blur,
    causes_of,
    change_along,
    everything,
    moved,
    places_without,
    reasons,
    slice_at,
    stacked,
    union,
    with_axis,
    without,
)


def through(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    """Follows marks from the operands of an equation that holds no program to its results."""
    return _OPERATIONS.get(equation.primitive.name, _blurred)(equation, operands)


def _shape(equation: core.JaxprEqn, index: int = 0) -> tuple[int, ...]:
    return jaxprs.shape(equation.invars[index])


def _blurred(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    """Follows an operation of which nothing is known."""
    causes = causes_of(equation, operands)

    def axes(slices: Slices, before: Sequence[int], after: Sequence[int]) -> Iterator[int]:
        for axis in sorted(slices.keys() - {WHETHER}):
            same = axis < len(after) and before[axis] == after[axis]
            yield from [axis] if same else [i for i, n in enumerate(after) if n == before[axis]]

    def blurred(marks: Marks, before: Sequence[int], after: Sequence[int]) -> Marks:
        whole = everything([marks])
        return {
            mark: whole[mark] | dict.fromkeys(axes(slices, before, after), causes[mark])
            for mark, slices in marks.items()
        }

    return [
        union(
            blurred(marks, _shape(equation, i), jaxprs.shape(variable))
            for i, marks in enumerate(operands)
            if marks
        )
        for variable in equation.outvars
    ]


def _elementwise(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    # Of psum and barriers each result is of the operand at its place.
    if len(equation.outvars) > 1:
        return operands
    shape = jaxprs.shape(equation.outvars[0])
    # A scalar beside an array is in all of it.
    return [
        union(
            marks if _shape(equation, i) == shape else everything([marks])
            for i, marks in enumerate(operands)
        )
    ]


def _reduce(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    params = equation.params
    axes = params["dimensions"] if "dimensions" in params else params["axes"]
    shape = _shape(equation)
    places = places_without(len(shape), axes)
    # The one slice of such an axis may be in doubt, which a sum of several forgets.
    single = [axis for axis in axes if shape[axis] == 1]
    return [{mark: without(slices, single, places) for mark, slices in operands[0].items()}]


def _transpose(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    return [moved(operands[0], {a: i for i, a in enumerate(equation.params["permutation"])})]


def _broadcast(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    return [moved(operands[0], dict(enumerate(equation.params["broadcast_dimensions"])))]


def _reverse(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    marks, shape = operands[0], _shape(equation)
    for axis in equation.params["dimensions"]:
        marks = change_along(marks, axis, shape[axis], lambda part: part[::-1])
    return [marks]


def _slice(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    marks, params = operands[0], equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or [1] * len(starts)
    for axis, size in enumerate(_shape(equation)):
        cut = slice(int(starts[axis]), int(limits[axis]), int(strides[axis]))
        marks = change_along(marks, axis, size, itemgetter(cut))
    return [marks]


def _pad(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    marks = operands[0]
    amounts = zip(equation.params["padding_config"], _shape(equation), strict=True)
    for axis, (amount, size) in enumerate(amounts):
        low, high, interior = map(int, amount)

        def pad(part: bytes, low: int = low, high: int = high, interior: int = interior) -> bytes:
            inner = (b"\0" * interior).join(bytes([byte]) for byte in part)
            wide = b"\0" * low + inner + b"\0" * high
            # The gradient of a pad is one by less than nothing.
            return wide[max(-low, 0) : len(wide) - max(-high, 0)]

        marks = change_along(marks, axis, size, pad)
    return [union([marks, everything(operands[1:])])]


def _concatenate(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    axis = equation.params["dimension"]
    sizes = [_shape(equation, i)[axis] for i in range(len(operands))]
    places = {a: a for a in range(len(_shape(equation))) if a != axis}
    joined = union(moved(marks, places) for marks in operands)

    def part(slices: Slices | None, size: int) -> bytes | Unknown:
        if slices is None:
            return b"\0" * size
        return slices.get(WHETHER) or slices.get(axis, b"\1" * size)

    def along(mark: int) -> bytes | Unknown:
        parts = [part(m.get(mark), size) for m, size in zip(operands, sizes, strict=True)]
        certain = [part for part in parts if isinstance(part, bytes)]
        return b"".join(certain) if len(certain) == len(parts) else reasons(parts)

    return [{mark: with_axis(slices, axis, along(mark)) for mark, slices in joined.items()}]


def _stack(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    return [stacked(operands, equation.params["axis"])]


def _unstack(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    axis, rank = equation.params["axis"], len(_shape(equation))
    places = {a: i + 1 for a, i in places_without(rank, [axis]).items()}
    first = moved(operands[0], {axis: 0, **places})
    return [slice_at(first, i) for i in range(len(equation.outvars))]


def _split(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    axis = equation.params["axis"]
    ends = list(accumulate(map(int, equation.params["sizes"]), initial=0))
    whole = _shape(equation)[axis]
    return [
        change_along(operands[0], axis, whole, itemgetter(slice(start, end)))
        for start, end in pairwise(ends)
    ]


def _dynamic_slice(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    # Where it starts is not known, only which axes it takes whole.
    sizes = zip(_shape(equation), equation.params["slice_sizes"], strict=True)
    cut = {axis for axis, (whole, part) in enumerate(sizes) if whole != part}
    result = blur(operands[0], cut, causes_of(equation, operands))
    return [union([result, everything(operands[1:])])]


def _dynamic_update(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    causes = causes_of(equation, operands)
    sizes = zip(_shape(equation), _shape(equation, 1), strict=True)
    cut = [axis for axis, (whole, part) in enumerate(sizes) if whole != part]
    update = {m: slices | dict.fromkeys(cut, causes[m]) for m, slices in operands[1].items()}
    # What it overwrites still counts: where it starts may be elsewhere.
    return [union([operands[0], update, everything(operands[2:])])]


def _gather(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    numbers, shape = equation.params["dimension_numbers"], _shape(equation)
    batched = numbers.operand_batching_dims
    free = places_without(len(shape), [*numbers.collapsed_slice_dims, *batched])
    places = {axis: numbers.offset_dims[i] for axis, i in free.items()}
    looked_up = list(places_without(len(jaxprs.shape(equation.outvars[0])), numbers.offset_dims))
    of_batches = [looked_up[i] for i in numbers.start_indices_batching_dims]
    places |= dict(zip(batched, of_batches, strict=True))
    sizes = enumerate(zip(shape, equation.params["slice_sizes"], strict=True))
    cut = {axis for axis, (whole, part) in sizes if whole != part and axis not in batched}
    causes = causes_of(equation, operands)
    result = moved(blur(operands[0], cut, causes), places)
    for mark, slices in operands[0].items():
        if slices.keys() & (cut - places.keys()):
            # Any place may be that of a slice that depends.
            unknown = [i for i in looked_up if i not in of_batches] or [WHETHER]
            result[mark] |= dict.fromkeys(unknown, causes[mark])
    return [union([result, everything(operands[1:])])]


def _scatter(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    """Follows what is put, or added, at one place as at an index, at many as from data."""
    numbers = equation.params["dimension_numbers"]
    shape, update_shape = _shape(equation), _shape(equation, 2)
    batched = numbers.operand_batching_dims
    free = places_without(len(shape), [*numbers.inserted_window_dims, *batched])
    places = {numbers.update_window_dims[i]: axis for axis, i in free.items()}
    places = {i: axis for i, axis in places.items() if update_shape[i] == shape[axis]}
    scattered = list(places_without(len(update_shape), numbers.update_window_dims))
    of_batches = [scattered[i] for i in numbers.scatter_indices_batching_dims]
    places |= dict(zip(of_batches, batched, strict=True))
    updates = moved(operands[2], places)
    # Beside batches only the axis of an index's own parts: there is one place.
    if len(_shape(equation, 1)) - 1 == len(batched):
        causes = causes_of(equation, operands)
        cut = [i for i, size in enumerate(shape) if size > 1 and i not in places.values()]
        updates = {m: slices | dict.fromkeys(cut, causes[m]) for m, slices in updates.items()}
    return [union([operands[0], updates, everything(operands[1:2])])]


def _cumulate(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    axis, step = equation.params["axis"], -1 if equation.params["reverse"] else 1

    def change(part: bytes) -> bytes:
        depends = list(accumulate(part[::step], max))
        return bytes(depends)[::step]

    return [change_along(operands[0], axis, _shape(equation)[axis], change)]


def _sort(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    causes, axis = causes_of(equation, operands), equation.params["dimension"]
    # Each result is sorted by the keys: any may depend on what any operand does.
    joined = union(blur(marks, [axis], causes) for marks in operands)
    return [joined] * len(equation.outvars)


def _fourier(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    batched = len(_shape(equation)) - len(equation.params["fft_lengths"])
    return [moved(operands[0], {axis: axis for axis in range(batched)})]


def _window(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    """Follows axes on which a window has one value and moves by one."""
    params, causes = equation.params, causes_of(equation, operands)
    ones = [1] * len(_shape(equation))
    windows = zip(
        params["window_dimensions"],
        params["window_strides"],
        params.get("base_dilation") or ones,
        params.get("window_dilation") or ones,
        params["padding"],
        strict=True,
    )
    wide = {axis for axis, window in enumerate(windows) if window != (1, 1, 1, 1, (0, 0))}
    # A reduction's initial value is an operand, too, without axes.
    joined = union(
        blur(marks, wide, causes) if len(_shape(equation, i)) == len(ones) else marks
        for i, marks in enumerate(operands)
    )
    return [joined] * len(equation.outvars)


def _product(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    contracted, batched = equation.params["dimension_numbers"]
    results, place = [], len(batched[0])
    for i in range(2):
        gone = {*contracted[i], *batched[i]}
        places = {axis: j for j, axis in enumerate(batched[i])}
        free = places_without(len(_shape(equation, i)), gone)
        places |= {axis: place + j for axis, j in free.items()}
        place += len(free)
        results.append(moved(operands[i], places))
    return [union(results)]


def _convolution(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    """Follows batches, and features as far as groups of them are convolved apart."""
    params, result = equation.params, jaxprs.shape(equation.outvars[0])
    numbers = params["dimension_numbers"]
    batch, feature = numbers.out_spec[:2]
    # What is mapped over kernels is a convolution of groups, of batches in some of its gradients.
    grouped = numbers.lhs_spec[0 if params["batch_group_count"] > 1 else 1]
    groups = max(params["batch_group_count"], params["feature_group_count"])

    def by_group(part: bytes) -> bytes:
        size = len(part) // groups
        inputs = [part[i * size : (i + 1) * size] for i in range(groups)]
        return b"".join(bytes([1 in values]) * (result[feature] // groups) for values in inputs)

    images = change_along(operands[0], grouped, _shape(equation)[grouped], by_group)
    places = {grouped: feature}
    if grouped != numbers.lhs_spec[0]:
        places[numbers.lhs_spec[0]] = batch
    kernels = moved(operands[1], {numbers.rhs_spec[0]: feature})
    return [union([moved(images, places), kernels])]


def _reshape(equation: core.JaxprEqn, operands: list[Marks]) -> list[Marks]:
    before, after = _shape(equation), jaxprs.shape(equation.outvars[0])
    # Of arrays without values no groups of axes can be found.
    if equation.params["dimensions"] is not None or 0 in before:
        return _blurred(equation, operands)
    groups = list(_groups(before, after))
    result: dict[int, Slices] = {}
    for mark, slices in operands[0].items():
        single = [axis for axis in slices if axis != WHETHER and before[axis] == 1]
        result[mark] = without(slices, single, {})
        for old, new in groups:
            old = [axis for axis in old if before[axis] > 1]
            parts = {axis: slices[axis] for axis in old if axis in slices}
            if not parts:
                continue
            certain = {axis: part for axis, part in parts.items() if isinstance(part, bytes)}
            if len(certain) < len(parts):
                wide = [axis for axis in new if after[axis] > 1]
                result[mark] |= dict.fromkeys(wide, reasons(parts.values()))
                continue
            merged = b"\1"
            for axis in old:
                part = certain.get(axis, b"\1" * before[axis])
                merged = b"".join(part if byte else b"\0" * len(part) for byte in merged)
            divided = np.frombuffer(merged, bool).reshape([after[axis] for axis in new])
            for i, axis in enumerate(new):
                across = tuple(j for j in range(len(new)) if j != i)
                result[mark][axis] = divided.any(across).tobytes()
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
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod"], _reduce),
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
