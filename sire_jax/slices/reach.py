"""What a loss reaches of a parameter: nothing, all, or some slices of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sire_jax.slices.marks import WHETHER, Slices


@dataclass(frozen=True, eq=False)
class Partly:
    """Says of a parameter that a loss reaches some slices of it, not all; true as a condition.

    >>> first = Partly(np.array([[True], [False]]), (2, 3))
    >>> str(first), first.covers(Partly(np.array([[True], [True]]), (2, 3)))
    ('1 of 2 slices', False)

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
        # The same reasons stand for the same slices.
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
    axes = {axis: part for axis, part in slices.items() if axis != WHETHER}
    if not axes:
        return True
    mask = np.ones([1] * len(shape), bool)
    for axis, part in axes.items():
        if isinstance(part, tuple):
            return Unclear(axes, tuple(shape))
        along = [len(part) if i == axis else 1 for i in range(len(shape))]
        mask = mask & np.frombuffer(part, bool).reshape(along)
    return Partly(mask, tuple(shape))


def together(reaches: Iterable[Any]) -> bool | Partly:
    """Returns what several losses reach of one parameter, as one of them would reach it.

    What one reaches of an array without its being known which slices counts as all of it.
    """
    mask = np.zeros((), bool)
    shape: tuple[int, ...] = ()
    for reach in reaches:
        shape = reach.shape if isinstance(reach, Partly) else shape
        mask = mask | (reach.mask if isinstance(reach, Partly) else np.asarray(bool(reach)))
    return Partly(mask, shape) if mask.any() and not mask.all() else bool(mask.any())
