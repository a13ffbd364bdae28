"""The smallest correction of a gradient under which all gradients agree with it.

What several aggregators solve, on the cosines of K gradients alone: no gradient is touched, and a
gradient that is a million times shorter than another is treated as accurately.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

# Added to the diagonal of the cosines, so that no set of gradients is singular. Smaller, and the
# rounding of a float32 Gramian, about 1e-7, decides which gradients a correction uses.
RIDGE = 1e-5


def multiply(a: Array, b: Array) -> Array:
    """Returns a matrix product in full float32, which accelerators otherwise shorten."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def normalized(gramian: Array) -> tuple[Array, Array]:
    """Divides a Gramian by the longest gradient's square.

    Args:
        gramian: ``[k, k]``.

    Returns:
        ``[k, k]``, float32, and the norm of the longest gradient; a Gramian of zeros stays one.

    Raises:
        ValueError: If it is not square.
    """
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.size:
        raise ValueError(f"A Gramian is {gramian.shape}; it should be [k, k] with k at least 1.")
    gramian = gramian.astype(jnp.float32)
    largest = jnp.diag(gramian).max()
    return gramian / jnp.where(largest > 0, largest, 1.0), jnp.sqrt(largest)


class Cosines(NamedTuple):
    """A Gramian taken apart.

    Attributes:
        matrix: Cosines between the gradients, ``[k, k]``; a gradient of zeros is orthogonal to all.
        norms: Norms divided by the longest, ``[k]``, in [0, 1].
        longest: The longest norm.
    """

    matrix: Array
    norms: Array
    longest: Array

    @classmethod
    def of(cls, gramian: Array) -> "Cosines":
        """Takes a Gramian ``[k, k]`` apart."""
        gramian, longest = normalized(gramian)
        norms = jnp.sqrt(jnp.maximum(jnp.diag(gramian), 0))
        # One by one: the product of two tiny norms is 0.
        rows = gramian / jnp.where(norms > 0, norms, 1.0)[:, None]
        cosines = jnp.clip(rows / jnp.where(norms > 0, norms, 1.0)[None, :], -1, 1)
        return cls(jnp.where(jnp.eye(len(norms), dtype=bool), 1.0, cosines), norms, longest)

    @property
    def present(self) -> Array:
        """Which gradients have a direction, ``[k]``: those that are not zeros."""
        return self.norms > 0

    def regular(self) -> Array:
        """Returns the matrix with a slightly larger diagonal, positive definite."""
        return self.matrix + RIDGE * jnp.eye(len(self.norms), dtype=jnp.float32)

    def per_norm(self, amounts: Array) -> Array:
        """Turns amounts of unit gradients ``[k]`` into coefficients; 0 for a gradient of zeros."""
        return jnp.where(self.present, amounts / jnp.where(self.present, self.norms, 1.0), 0.0)


class Correction(NamedTuple):
    """A correction, as amounts of unit gradients.

    Attributes:
        amounts: How much of each is added, ``[k]``, at least 0.
        direction: How the amounts grow with the level where the path ended, ``[k]``.
        turns: Number of pieces of the path.
    """

    amounts: Array
    direction: Array
    turns: Array


class _Problem(NamedTuple):
    matrix: Array
    agreement: Array
    demand: Array
    level: Array
    length: Array


class _Path(NamedTuple):
    active: Array
    turned: Array
    level: Array
    amounts: Array
    direction: Array
    ended: Array
    turns: Array


def smallest_correction(
    matrix: Array, agreement: Array, demand: Array, level: Array | float, length: Array | float
) -> Correction:
    """Corrects a gradient until all gradients agree with it to a level, or to a length.

    ``z(l) = argmin_z { z' M z : M z + b >= l h }``, ``z >= 0`` and linear in ``l`` piece by piece.
    The path is followed from ``z = 0`` at ``l = min_k b_k / h_k`` upwards, until ``l`` is ``level``
    or ``sqrt(z' M z)`` is ``length``; where a piece ends, an amount becomes 0 or a further gradient
    is at the level (parametric principal pivoting: Cottle, Pang and Stone, *The Linear
    Complementarity Problem*, Section 4.5). There are about ``k`` pieces, at most ``4 (k + 1)`` are
    followed.

    Args:
        matrix: ``M``, positive definite: the gradients' inner products, ``[k, k]``.
        agreement: ``b``, the inner products with the gradient that is corrected, ``[k]``; infinite
            for a gradient that is left out.
        demand: ``h``, how much of the level is asked for by each, above 0, ``[k]``.
        level: Where to stop, infinite for no end.
        length: Where to stop, at least 0, infinite for no end.

    Returns:
        The correction. Without an end, ``direction`` is what the correction tends to as the level
        grows, ``amounts`` is of no use.
    """
    ends = jnp.asarray(level, jnp.float32), jnp.asarray(length, jnp.float32)
    problem = _Problem(matrix, agreement, demand, *ends)
    ratios = agreement / demand
    first = jnp.argmin(ratios)
    none = jnp.zeros_like(agreement)
    path = _Path(
        active=jnp.arange(len(agreement)) == first,
        turned=first,
        level=ratios[first],
        amounts=none,
        direction=none,
        ended=ratios[first] >= ends[0],
        turns=jnp.int32(0),
    )
    most = 4 * (len(agreement) + 1)
    path = lax.while_loop(
        lambda path: ~path.ended & (path.turns < most), partial(_follow, problem), path
    )
    return Correction(path.amounts, path.direction, path.turns)


def _follow(problem: _Problem, path: _Path) -> _Path:
    """Follows the path to the end of its piece, or to the end of the path."""
    amounts, direction, excess, slope = _piece(problem, path)
    places = jnp.arange(len(amounts))
    value = jnp.maximum(jnp.where(path.active, amounts, excess), 0)
    # What has just turned is at 0 and moves away from it, whatever rounding says.
    falls = (slope < 0) & (places != path.turned)
    until = jnp.where(falls, value / jnp.where(falls, -slope, 1.0), jnp.inf)
    turned = jnp.argmin(until)
    left = jnp.minimum(problem.level - path.level, _until_length(problem, path, amounts, direction))
    ended = until[turned] >= left
    step = jnp.minimum(until[turned], left)
    # Without an end the last step is infinite.
    amounts = amounts + jnp.where(jnp.isfinite(step), step, 0.0) * direction
    return _Path(
        active=path.active ^ ((places == turned) & ~ended),
        turned=turned,
        level=path.level + step,
        amounts=jnp.maximum(amounts, 0),
        direction=direction,
        ended=ended,
        turns=path.turns + 1,
    )


def _piece(problem: _Problem, path: _Path) -> tuple[Array, Array, Array, Array]:
    """Solves for the piece of the path on which the active gradients are at the level.

    Returns:
        The amounts at the path's level and their slope; by how much the agreements exceed the
        level; and the slope of the amounts of active gradients, of the excess of the others.
    """
    matrix, agreement, demand = problem.matrix, problem.agreement, problem.demand
    active = path.active
    both = active[:, None] & active[None, :]
    system = jnp.where(both, matrix, jnp.eye(len(active), dtype=jnp.float32))
    sides = jnp.stack([path.level * demand - agreement, demand], axis=1)
    solved = jnp.linalg.solve(system, jnp.where(active[:, None], sides, 0.0))
    excess = multiply(matrix, solved) - sides
    slope = jnp.where(active, solved[:, 1], excess[:, 1])
    return solved[:, 0], solved[:, 1], excess[:, 0], slope


def _until_length(problem: _Problem, path: _Path, amounts: Array, direction: Array) -> Array:
    """Returns by how much the level can rise until the correction has its length."""
    # On the active gradients M z is what the level asks for, and M dz is the demand.
    asked = jnp.where(path.active, path.level * problem.demand - problem.agreement, 0.0)
    endless = jnp.isinf(problem.length)
    squared = jnp.where(endless, 0.0, problem.length) ** 2
    missing = jnp.maximum(squared - (amounts * asked).sum(), 0)
    growth = jnp.maximum((problem.demand * amounts).sum(), 0)
    curvature = jnp.maximum((problem.demand * direction).sum(), 0)
    # Of growth t + curvature t^2 / 2 = missing / 2 the positive root, without a difference.
    root = growth + jnp.sqrt(growth**2 + curvature * missing)
    rise = jnp.where(missing > 0, missing / jnp.maximum(root, 1e-30), 0.0)
    return jnp.where(endless, jnp.inf, rise)
