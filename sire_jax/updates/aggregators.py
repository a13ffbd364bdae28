"""Gradient aggregators: how the gradients of several losses become one.

An aggregator sees no gradient, only the Gramian ``G = J J'`` of the K gradients ``g_k``, the rows
of ``J``, and returns coefficients ``c``: the aggregated gradient is ``d = sum_k c_k g_k = J' c``.
Each loss counts once: its weight is in its gradient already. Update rules ask for coefficients in
each group of parameters that the same losses share (of exits: the segments between them), as if it
were a network of its own: what a method promises holds there, and parameters of one loss keep its
gradient. The papers have one Gramian, of all parameters that all losses share. A gradient of zeros,
as of an objective that has no examples in a batch, has no direction and is left out: the others
have the coefficients that they would have alone. All is float32 and part of the compiled step;
nothing is solved on the host.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from sire_jax.updates.correction import (
    Correction,
    Cosines,
    multiply,
    normalized,
    smallest_correction,
)


class Aggregator(Protocol):
    """Maps the Gramian ``[k, k]`` of K gradients and a random key to coefficients ``[k]``.

    >>> def mean(gramian, key):  # an aggregator of one's own
    ...     return jnp.full(len(gramian), 1 / len(gramian))
    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> (mean(gradients @ gradients.T, jax.random.key(0)) @ gradients).tolist()
    [0.5, 1.5]
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients."""


@dataclass(frozen=True)
class Sum:
    """The sum of the gradients, ``c_k = 1``: joint backpropagation.

    >>> Sum()(jnp.eye(2), jax.random.key(0)).tolist()
    [1.0, 1.0]
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns ones, ``[k]``."""
        del key
        # Normalized to be checked, and in float32, as for all other aggregators.
        return jnp.ones_like(jnp.diag(normalized(gramian)[0]))


SUM = Sum()


@dataclass(frozen=True)
class PCGrad:
    """The sum of gradients of which each gives up what conflicts with another (PCGrad).

    ``d = sum_i p_i``, with ``p_i = g_i`` at first and then ``p_i <- p_i - min(p_i . g_j, 0) g_j /
    |g_j|^2`` for all ``j != i`` in a random order. Scale: without conflict the sum; ``d`` grows as
    the gradients do. A gradient of zeros changes which orders are drawn. (Yu, Kumar,
    Gupta, Levine, Hausman and Finn, *Gradient Surgery for Multi-Task Learning*, 2020, Algorithm 1)

    >>> gradients = jnp.array([[1.0, 0.0], [-0.6, 0.8]])  # they conflict
    >>> coefficients = PCGrad()(gradients @ gradients.T, jax.random.key(0))
    >>> [f"{x:.2f}" for x in coefficients @ gradients]
    ['0.64', '1.28']
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients.

        Args:
            gramian: ``[k, k]``.
            key: Random key of the orders, one for each gradient; two gradients need none.

        Returns:
            ``[k]``, at least 1.
        """
        cosines = Cosines.of(gramian)
        orders = jnp.argsort(jax.random.uniform(key, gramian.shape), axis=1)
        unit = jnp.eye(len(orders), dtype=jnp.float32)

        def project(rows: Array, others: Array) -> tuple[Array, None]:
            # Row i is p_i in unit gradients; others[i] is its next j.
            products = (rows * cosines.matrix[others]).sum(1)
            overlaps = jnp.where(others == jnp.arange(len(others)), 0.0, jnp.minimum(products, 0))
            return rows - overlaps[:, None] * unit[others], None

        rows, _ = lax.scan(project, unit, orders.T)
        return 1 + cosines.per_norm(multiply(cosines.norms, rows - unit))


@dataclass(frozen=True)
class MGDA:
    """The shortest vector in the convex hull of the gradients (MGDA).

    ``d = argmin { |J' c|^2 : c >= 0, sum_k c_k = 1 }``: ``g_k . d >= |d|^2`` for all k, and ``d =
    0`` only where no direction descends on all losses. Scale: that of the shortest gradient, at
    most, of those that are not 0. ``c`` is the direction of the corrections ``z`` of
    ``smallest_correction`` as the level that is asked for grows. (Désidéri, *Multiple-gradient
    descent algorithm (MGDA) for multiobjective optimization*, 2012; Sener and Koltun, *Multi-Task
    Learning as Multi-Objective Optimization*, 2018)

    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> coefficients = MGDA()(gradients @ gradients.T, jax.random.key(0))
    >>> [f"{x:.2f}" for x in coefficients @ gradients]  # the shortest of all means
    ['0.90', '0.30']
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients.

        Args:
            gramian: ``[k, k]``.
            key: Not used.

        Returns:
            ``[k]``, in [0, 1], of sum 1; 0 for a gradient of zeros.
        """
        del key
        cosines = Cosines.of(gramian)
        shortest = jnp.argmin(jnp.where(cosines.present, cosines.norms, jnp.inf))
        start, demand = cosines.regular()[shortest], _equal_demand(cosines)
        correction = _correct(cosines, start, demand, math.inf, math.inf)
        amounts = jnp.maximum(correction.direction, 0) * demand
        return amounts / jnp.where(cosines.present.any(), amounts.sum(), 1.0)


@dataclass(frozen=True)
class CAGrad:
    """The best direction for the loss that gains least, near the sum of the gradients (CAGrad).

    ``d = argmax { min_k g_k . d : |d - g_0| <= r |g_0| }``, with ``g_0 = sum_k g_k``: the
    constraint holds with equality, ``d - g_0`` points to a vector of the gradients' convex hull, at
    0 where the gradients cancel. Scale: around the sum, K times the paper's, which is around the
    mean. (Liu, Liu, Jin, Stone and Liu, *Conflict-Averse Gradient Descent for Multi-task Learning*,
    2021, Algorithm 1)

    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> coefficients = CAGrad(0.0)(gradients @ gradients.T, jax.random.key(0))
    >>> (coefficients @ gradients).round(2).tolist()  # without c the sum
    [1.0, 3.0]

    Attributes:
        radius: ``r``, at least 0; the paper's ``c``, which recommends [0, 1). 0 is the sum.

    Raises:
        ValueError: If the radius is negative or not finite.
    """

    radius: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.radius < math.inf:
            raise ValueError(
                f"CAGrad: radius is {self.radius}; it should be at least 0 and finite, below 1 to"
                " reach a minimum of the sum."
            )

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients.

        Args:
            gramian: ``[k, k]``.
            key: Not used.

        Returns:
            ``[k]``, at least 1.
        """
        del key
        cosines = Cosines.of(gramian)
        agreement = multiply(cosines.matrix, cosines.norms)
        squared = jnp.maximum((cosines.norms * agreement).sum(), 0)
        length = self.radius * jnp.sqrt(squared)
        demand = _equal_demand(cosines)
        correction = _correct(cosines, agreement, demand, math.inf, length)
        return 1 + cosines.per_norm(correction.amounts)


@dataclass(frozen=True)
class UPGrad:
    """The sum of the gradients, each projected to where it conflicts with none (UPGrad).

    ``d = sum_i p_i``, with ``p_i = argmin { |p - g_i|^2 : g_k . p >= 0 for all k }``. Scale:
    without conflict the sum (K times the paper's mean); ``d`` grows as the gradients do. (Quinton
    and Rey, *Jacobian Descent for Multi-Objective Optimization*, 2024)

    >>> gradients = jnp.array([[1.0, 0.0], [-0.6, 0.8]])  # they conflict
    >>> coefficients = UPGrad()(gradients @ gradients.T, jax.random.key(0))
    >>> bool((gradients @ (coefficients @ gradients) >= 0).all())  # no loss rises
    True
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients.

        Args:
            gramian: ``[k, k]``.
            key: Not used.

        Returns:
            ``[k]``, at least 1.
        """
        del key
        cosines = Cosines.of(gramian)
        demand = jnp.ones_like(cosines.norms)

        def amounts(agreement: Array) -> Array:
            return _correct(cosines, agreement, demand, 0.0, math.inf).amounts

        corrections = jax.vmap(amounts)(cosines.regular())
        return 1 + cosines.per_norm(multiply(cosines.norms, corrections))


@dataclass(frozen=True)
class IMTLG:
    """The vector on which all gradients have equal projections (IMTL-G).

    ``d . g_k / |g_k|`` is the same for all k and ``sum_k c_k = 1``: ``c_k`` is proportional to
    ``(C^-1 1)_k / |g_k|``, with ``C`` the cosines. Scale: the paper's, an affine combination of the
    gradients; multiplying one of them changes the length of ``d`` only. Coefficients can be
    negative, and where the sum that normalizes them is, ``d`` ascends on all losses. (Liu,
    Li, Kuang, Xue, Chen, Yang, Liao and Zhang, *Towards Impartial Multi-task Learning*, 2021)

    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> coefficients = IMTLG()(gradients @ gradients.T, jax.random.key(0))
    >>> d = coefficients @ gradients
    >>> (d @ gradients.T / jnp.array([1.0, 3.0])).round(2).tolist()  # equal projections
    [0.75, 0.75]
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients.

        Args:
            gramian: ``[k, k]``.
            key: Not used.

        Returns:
            ``[k]``, of sum 1, unless it nearly cancels; 0 for a gradient of zeros.
        """
        del key
        cosines = Cosines.of(gramian)
        present = jnp.where(cosines.present, 1.0, 0.0)
        shares = cosines.per_norm(jnp.linalg.solve(cosines.regular(), present))
        total, least = shares.sum(), 1e-6 * jnp.abs(shares).sum()
        # Shares that nearly cancel would be divided by almost 0.
        total = jnp.where(jnp.abs(total) < least, jnp.copysign(least, total), total)
        return jnp.where(least > 0, shares / jnp.where(least > 0, total, 1.0), 0.0)


@dataclass(frozen=True)
class NashMTL:
    """The Nash bargaining solution of the losses (Nash-MTL).

    ``G c = 1 / c`` element by element, ``c > 0``: the minimum of ``c' G c / 2 - sum_k log c_k``, by
    Newton's method. Scale: the paper's, ``|d|^2 = K`` however long the gradients are, so that the
    learning rate alone sets the step; where gradients cancel, ``d`` is shorter. The
    authors' program also shortens ``d`` to a norm of 1; clip the gradient in the optimizer for
    that. (Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik and Fetaya, *Multi-Task Learning as
    a Bargaining Game*, 2022, Algorithm 1)

    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> coefficients = NashMTL()(gradients @ gradients.T, jax.random.key(0))
    >>> (gradients @ (coefficients @ gradients) * coefficients).round(2).tolist()
    [1.0, 1.0]
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients.

        Args:
            gramian: ``[k, k]``.
            key: Not used.

        Returns:
            ``[k]``, above 0; 0 for a gradient of zeros.
        """
        del key
        cosines = Cosines.of(gramian)
        bargain = cosines.per_norm(_bargain(cosines.regular()))
        # The norms that were divided by are parts of the longest.
        return bargain / jnp.where(cosines.longest > 0, cosines.longest, 1.0)


@dataclass(frozen=True)
class AlignedMTL:
    """The sum of the gradients made orthogonal and equally long (Aligned-MTL).

    ``c = s_min V S^-1 V' 1``, with ``J J' = V S^2 V'`` and ``s_min`` the smallest singular value
    that is not 0: ``d`` is the sum of the rows of the matrix nearest to ``J`` among those with
    orthogonal rows of length ``s_min``. Scale: ``|d| = s_min sqrt(K)``; orthogonal gradients of one
    length are summed; preferences are 1, where the paper's sum to 1. (Senushkin, Patakin, Kuznetsov
    and Konushin, *Independent Component Alignment for Multi-Task Learning*, 2023, Algorithm 1)

    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> coefficients = AlignedMTL()(gradients @ gradients.T, jax.random.key(0))
    >>> (coefficients @ gradients).round(2).tolist()  # each as long as the shortest
    [1.0, 1.0]
    """

    def __call__(self, gramian: Array, key: Array) -> Array:
        """Returns the coefficients.

        Args:
            gramian: ``[k, k]``.
            key: Not used.

        Returns:
            ``[k]``; 0 if all gradients are.
        """
        del key
        matrix, _ = normalized(gramian)
        values, vectors = jnp.linalg.eigh(matrix)
        count = (jnp.diag(matrix) > 0).sum().astype(jnp.float32)
        # What is smaller is rounding: where gradients depend on each other it would be 0.
        present = values > count * jnp.finfo(jnp.float32).eps * values.max()
        smallest = jnp.where(present, values, jnp.inf).min()
        ratios = jnp.where(present, smallest / jnp.where(present, values, 1.0), 0.0)
        return multiply(vectors, jnp.sqrt(ratios) * vectors.sum(0))


# Where a norm divides, a gradient is at least this part of the longest.
_SHORTEST = 1e-12


def _equal_demand(cosines: Cosines) -> Array:
    """Returns what unit gradients need so that all gradients have one inner product, in (0, 1]."""
    norms = jnp.maximum(cosines.norms, _SHORTEST)
    shortest = jnp.where(cosines.present, norms, jnp.inf).min()
    return jnp.where(cosines.present, shortest / norms, 1.0)


def _correct(
    cosines: Cosines,
    agreement: Array,
    demand: Array,
    level: Array | float,
    length: Array | float,
) -> Correction:
    """Returns the smallest correction under which all gradients agree that are not zeros."""
    # What agrees without end never asks for anything.
    agreement = jnp.where(cosines.present, agreement, jnp.inf)
    return smallest_correction(cosines.regular(), agreement, demand, level, length)


def _bargain(matrix: Array) -> Array:
    """Solves ``M a = 1 / a`` for ``a > 0`` by damped Newton steps on ``a' M a / 2 - sum log a``."""
    unit = jnp.eye(len(matrix), dtype=jnp.float32)

    def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        amounts, _, turns = state
        scaled = matrix * amounts[:, None] * amounts[None, :]
        missing = 1 - scaled.sum(1)
        step = jnp.linalg.solve(unit + scaled, missing)
        decrement = jnp.sqrt(jnp.maximum((step * missing).sum(), 0))
        # A full step converges quadratically from here on, and no step leaves the positive ones.
        damping = jnp.where(decrement < 0.25, 1.0, 1 / (1 + decrement))
        return amounts * (1 + damping * step), decrement, turns + 1

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        # What a step of a decrement of 1e-3 leaves is 1e-6.
        return (state[1] > 1e-3) & (state[2] < 50)

    start = 1 / jnp.sqrt(jnp.abs(matrix).sum(1))
    return lax.while_loop(goes_on, newton, (start, jnp.float32(1), jnp.int32(0)))[0]


AGGREGATORS = {
    "sum": Sum,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "upgrad": UPGrad,
    "imtl_g": IMTLG,
    "nash_mtl": NashMTL,
    "aligned_mtl": AlignedMTL,
}
