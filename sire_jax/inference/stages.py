"""Splits a network's program at its outputs: each stage computes what the next output adds.

The program is the one that JAX traces; nothing depends on how the network is written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend import core

from sire_jax import jaxprs, traced

PyTree = Any
# Values of a program by number; a literal stands for itself.
Atom = int | core.Literal
Rows = tuple[Array, ...]
Apply = Callable[[PyTree, Rows, Rows], tuple[Array, Rows, Rows]]


@dataclass(frozen=True)
class Stage:
    """What one output needs and no earlier stage has computed.

    >>> network = lambda params, x: {"exit": x @ params, "main": x @ params @ params}
    >>> params, images = (jax.ShapeDtypeStruct((n, 2), "float32") for n in (2, 3))
    >>> exit_, main = split(network, ["exit", "main"], params, images)
    >>> _, rows, shared = jax.eval_shape(exit_.apply, params, (images,), ())
    >>> [row.shape for row in rows]  # what "main" goes on from
    [(3, 2)]
    >>> jax.eval_shape(main.apply, params, rows, shared)[0].shape
    (3, 2)

    Attributes:
        output: Name of the output.
        multiply_adds: Those of one example in this stage alone.
        rows: Shapes of the values that are left for later stages and have a row for each image.
        apply: Maps ``(params, rows, shared)`` to ``(output, rows, shared)``, given what the stage
            before returned; the first one is given ``((images,), ())``. ``rows`` may be gathered
            along their first axis in between; ``shared`` depends on the parameters alone.
    """

    output: str
    multiply_adds: int
    rows: tuple[jax.ShapeDtypeStruct, ...]
    apply: Apply


class _Equation(NamedTuple):
    """An equation with its operands and results as numbers."""

    equation: core.JaxprEqn
    inputs: list[Atom]
    outputs: list[int]


@dataclass
class _Program:
    """A program without calls, whose values are numbered.

    Attributes:
        equations: In order.
        constants: Values by number.
        shapes: Abstract values by number.
    """

    equations: list[_Equation] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    shapes: list[Any] = field(default_factory=list)
    _results: dict[Any, list[int]] = field(default_factory=dict)

    def new(self, variable: core.Var) -> int:
        """Numbers a value."""
        self.shapes.append(variable.aval)
        return len(self.shapes) - 1

    def inline(self, closed: core.ClosedJaxpr, inputs: Sequence[Atom]) -> list[Atom]:
        """Appends the equations of a program and of all that it calls; returns its results."""
        program = closed.jaxpr
        atoms: dict[core.Var, Atom] = dict(zip(program.invars, inputs, strict=True))
        for variable, value in zip(program.constvars, closed.consts, strict=True):
            number = self.new(variable)
            atoms[variable], self.constants[number] = number, value

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, core.Literal) else atoms[atom]

        for equation in program.eqns:
            operands = [read(atom) for atom in equation.invars]
            called = jaxprs.called(equation)
            if called is None:
                results = self.append(equation, operands)
            else:
                results = self.inline(called, operands)
            atoms.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars]

    def append(self, equation: core.JaxprEqn, inputs: list[Atom]) -> list[Atom]:
        """Appends an equation, unless there is the same one; returns its results."""
        key: Any = (equation.primitive, tuple(equation.params.items()), tuple(map(_key, inputs)))
        try:
            # An effect, such as a print, happens as often as it is asked for.
            results = None if equation.effects else self._results.get(key)
        except TypeError:  # a parameter that has no hash
            key, results = (len(self.shapes),), None
        if results is None:
            results = [self.new(variable) for variable in equation.outvars]
            self.equations.append(_Equation(equation, inputs, results))
            self._results[key] = results
        return list(results)

    def depend_on(self, number: int) -> set[int]:
        """Finds the values that depend on one."""
        marked = {number}
        for equation, inputs, outputs in self.equations:
            marks = traced.through(equation, [int(n in marked) for n in _numbers(inputs)])
            marked.update(n for n, mark in zip(outputs, marks, strict=True) if mark)
        return marked

    def fixed(self) -> set[int]:
        """Finds the equations, by position, whose results are the same for any inputs."""
        positions: set[int] = set()
        # A literal, which has the number -1, is the same for any inputs.
        values: set[int] = {-1}
        for i, (_, inputs, outputs) in enumerate(self.equations):
            if values.issuperset(_numbers(inputs)):
                positions.add(i)
                values.update(outputs)
        return positions

    def assign(self, results: Sequence[Atom]) -> list[list[_Equation]]:
        """Gives each equation to the first result that needs it; others are dropped.

        What is the same for any inputs, such as zeros, is given to every result that needs it.
        """
        makers = {n: i for i, equation in enumerate(self.equations) for n in equation.outputs}
        fixed, taken = self.fixed(), set[int]()
        parts = []
        for result in results:
            part = set[int]()
            pending = _numbers([result])
            while pending:
                maker = makers.get(pending.pop())
                if maker is not None and maker not in part and maker not in taken:
                    part.add(maker)
                    pending += _numbers(self.equations[maker].inputs)
            taken |= part - fixed
            parts.append([self.equations[i] for i in sorted(part)])
        return parts


def _key(atom: Atom) -> Any:
    """Tells atoms apart; 0 and -0, which are equal, are not the same."""
    if not isinstance(atom, core.Literal):
        return atom
    aval: Any = atom.aval
    return (repr(atom.val) if aval.shape == () else id(atom.val)), aval


def _numbers(atoms: Sequence[Atom]) -> list[int]:
    """Returns the numbers of values; of literals -1, which none has."""
    return [-1 if isinstance(atom, core.Literal) else atom for atom in atoms]


class _Traced(NamedTuple):
    """A numbered program with its inputs and results."""

    program: _Program
    params: list[int]
    images: int
    outputs: list[Atom]


def _trace(
    function: Callable[..., Any], names: Sequence[str], params: PyTree, images: Any
) -> _Traced:
    # Images first and alone: their number is then known whatever the parameters are.
    def chosen(images: Any, params: PyTree) -> list[Any]:
        outputs = function(params, images)
        return [outputs[name] for name in names]

    closed = jax.make_jaxpr(chosen)(images, params)
    program = _Program()
    image, *inputs = [program.new(variable) for variable in closed.jaxpr.invars]
    return _Traced(program, inputs, image, program.inline(closed, [image, *inputs]))


def split(
    function: Callable[..., Mapping[str, PyTree]],
    names: Sequence[str],
    params: PyTree,
    images: jax.ShapeDtypeStruct,
) -> list[Stage]:
    """Splits the program of a network in evaluation at some of its outputs.

    >>> def network(params, images):
    ...     middle = jax.nn.relu(images @ params["middle"])
    ...     return {"exit": middle @ params["exit"], "main": middle @ params["main"]}
    >>> square = jax.ShapeDtypeStruct((4, 4), "float32")
    >>> params = {"middle": square, "exit": square, "main": square}
    >>> stages = split(network, ["exit", "main"], params, jax.ShapeDtypeStruct((2, 4), "float32"))
    >>> [(stage.output, stage.multiply_adds) for stage in stages]  # "main" has the middle already
    [('exit', 32), ('main', 16)]

    Args:
        function: Maps ``(params, images)`` to a mapping of named outputs.
        names: The outputs, ``[b, …]`` each. They become stages in the order of their multiply-adds,
            of equal ones in the order given; what no output needs is left out.
        params: Parameters and all else that is not of the images, or their shapes.
        images: Shape of the images, ``[b, …]``.

    Returns:
        The stages. Their programs hold for ``b`` images at a time.

    Raises:
        ValueError: If what one stage leaves for later ones depends on the images and does not have
            them as its first axis, so that images can't be taken out.
    """
    ordered, costs = _by_cost(function, names, params, images)
    whole = _trace(function, ordered, params, images)
    parts = whole.program.assign(whole.outputs)
    of_images = whole.program.depend_on(whole.images)
    left = _left_for_later(whole, parts)
    rows = [[n for n in numbers if n in of_images] for numbers in left]
    shared = [[n for n in numbers if n not in of_images] for numbers in left]
    # With another number of images the first axis, and it alone, is another one.
    doubled = jax.ShapeDtypeStruct((2 * images.shape[0], *images.shape[1:]), images.dtype)
    probe = _trace(function, ordered, params, doubled)
    stages = []
    taken: tuple[list[int], list[int]] = ([whole.images], [])
    for i, name in enumerate(ordered):
        numbers = [*rows[i], *(n for n in _numbers([whole.outputs[i]]) if n >= 0)]
        _check_rows(name, images.shape[0], whole.program, probe.program, numbers)
        apply = _apply(whole, parts[i], taken, whole.outputs[i], (rows[i], shared[i]))
        shapes = tuple(_shape(whole.program.shapes[n]) for n in rows[i])
        stages.append(Stage(name, costs[i], shapes, apply))
        taken = (rows[i], shared[i])
    return stages


def cut_out(
    function: Callable[..., Mapping[str, PyTree]], name: str, params: PyTree, images: Array
) -> tuple[Array, Rows]:
    """Computes one output of a network and nothing else, as the whole network computes it.

    What other outputs read on the way is returned, too, and has to be left in the results of a
    compiled program: a value that is read once is fused with what reads it, and rounded otherwise
    than one that is kept for others.

    Args:
        function: Maps ``(params, images)`` to a mapping of named outputs.
        name: The output, an array.
        params: Parameters; those that the output is not computed from are not read.
        images: ``[b, …]``.

    Returns:
        The output, and what other outputs would have read.
    """
    others = sorted(jax.eval_shape(function, params, images).keys() - {name})
    whole = _trace(function, [name, *others], params, images)
    parts = whole.program.assign(whole.outputs)
    left = _left_for_later(whole, parts)[0]
    apply = _apply(whole, parts[0], ([whole.images], []), whole.outputs[0], (left, []))
    return apply(params, (images,), ())[:2]


def _by_cost(
    function: Callable[..., Any], names: Sequence[str], params: PyTree, images: Any
) -> tuple[list[str], list[int]]:
    """Orders outputs by their multiply-adds; also returns what each adds to those before it."""
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    alone = traced.multiply_adds_together(function, [{name} for name in names], params, image)
    costs = dict(zip(names, alone, strict=True))
    ordered = sorted(names, key=lambda name: costs[name])
    sets = [set(ordered[: i + 1]) for i in range(len(ordered))]
    sums = traced.multiply_adds_together(function, sets, params, image)
    return ordered, [b - a for a, b in zip([0, *sums], sums, strict=False)]


def _left_for_later(whole: _Traced, parts: Sequence[Sequence[_Equation]]) -> list[list[int]]:
    """Finds for each stage what it or an earlier one has made and a later one reads."""
    made, left = {whole.images}, []
    reads = [_reads(*stage) for stage in zip(parts, whole.outputs, strict=True)]
    for i, part in enumerate(parts):
        made |= {n for equation in part for n in equation.outputs}
        left.append(sorted(made & set().union(*reads[i + 1 :])))
    return left


def _reads(part: Sequence[_Equation], output: Atom) -> set[int]:
    """Finds what a stage reads and has not made itself."""
    inputs = {n for equation in part for n in _numbers(equation.inputs)} | {*_numbers([output])}
    return inputs - {n for equation in part for n in equation.outputs}


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _check_rows(
    name: str, images: int, program: _Program, probe: _Program, numbers: Sequence[int]
) -> None:
    """Checks that values have the images as their first axis, by a program of twice as many."""
    if len(program.shapes) != len(probe.shapes):
        raise ValueError(
            f"The network can't be split at '{name}': its program is not the same for {images} and"
            f" for {2 * images} images."
        )
    for number in numbers:
        shape, other = program.shapes[number].shape, probe.shapes[number].shape
        if shape[:1] != (images,) or other != (2 * images, *shape[1:]):
            raise ValueError(
                f"The network can't be split at '{name}': {shape}, which it returns or leaves for"
                f" later outputs, does not have the {images} images as its first axis, so that"
                " images can't be taken out."
            )


def _apply(
    whole: _Traced,
    equations: Sequence[_Equation],
    taken: tuple[Sequence[int], Sequence[int]],
    output: Atom,
    left: tuple[Sequence[int], Sequence[int]],
) -> Apply:
    """Makes the function of a stage."""
    shapes = whole.program.shapes

    def apply(params: PyTree, rows: Rows, shared: Rows) -> tuple[Array, Rows, Rows]:
        for number, row in zip(taken[0], rows, strict=True):
            # Equations that were traced for other shapes would compute something else.
            if row.shape != shapes[number].shape:
                raise ValueError(
                    f"A stage is given {row.shape}, but was made for {shapes[number].shape}."
                )
        values = dict(whole.program.constants)
        values |= dict(zip(whole.params, jax.tree.leaves(params), strict=True))
        for numbers, arrays in zip(taken, (rows, shared), strict=True):
            values |= dict(zip(numbers, arrays, strict=True))

        def read(atom: Atom) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for equation, inputs, outputs in equations:
            values |= dict(zip(outputs, _evaluate(equation, map(read, inputs)), strict=True))
        rows, shared = (tuple(values[n] for n in numbers) for numbers in left)
        return read(output), rows, shared

    return apply


def _evaluate(equation: core.JaxprEqn, inputs: Iterable[Any]) -> list[Any]:
    """Applies the operation of an equation, as a program of its own."""
    # Literals stay in the equation; a value may be given twice.
    pairs = zip(equation.invars, inputs, strict=True)
    values = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    program = core.Jaxpr((), list(values), equation.outvars, [equation], equation.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*values.values())
