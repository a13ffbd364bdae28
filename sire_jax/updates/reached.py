"""What the reach of losses says: their order, what they share, and the sizes of their steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

PyTree = Any


def scale(factor: Array, values: Array) -> Array:
    """Multiplies values, which keep their dtype, by a scalar."""
    return factor.astype(values.dtype) * values


@dataclass(frozen=True)
class Reached:
    """Losses in order, and which parameters each reaches.

    Attributes:
        names: Losses from shallow to deep: each after those that reach part of what it reaches; the
            main one last.
        trees: For each loss a tree of booleans over the parameters.
    """

    names: tuple[str, ...]
    trees: Mapping[str, PyTree]

    @classmethod
    def of(cls, reach: Mapping[str, PyTree], main: str = "main") -> "Reached":
        """Puts losses in order.

        Args:
            reach: For each loss a tree of booleans over the parameters, from ``traced.reach``.
            main: Name of the final output's loss; the deepest takes its place if there is none.

        Returns:
            The order.

        Raises:
            ValueError: If no loss reaches any parameter.
        """
        found = cls(tuple(reach), reach)
        if not any(found.by_leaf):
            raise ValueError(f"None of the losses {sorted(reach)} reaches a parameter.")
        sizes = {name: sum(found._shares(name)) for name in reach}
        return cls(tuple(sorted(reach, key=lambda name: (name == main, sizes[name]))), reach)

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """All losses but the last."""
        return self.names[:-1]

    @cached_property
    def by_leaf(self) -> list[tuple[str, ...]]:
        """For each parameter, in the order of ``jax.tree.leaves``, who reaches it."""
        leaves = {name: jax.tree.leaves(self.trees[name]) for name in self.names}
        count = len(next(iter(leaves.values())))
        return [tuple(n for n in self.names if leaves[n][i]) for i in range(count)]

    def groups(self) -> dict[tuple[str, ...], list[int]]:
        """Returns the parameters that the same losses share, two or more, by those losses.

        Of losses at rising depth these are the segments of the network between them.
        """
        found: dict[tuple[str, ...], list[int]] = {}
        for i, names in enumerate(self.by_leaf):
            if len(names) > 1:
                found.setdefault(names, []).append(i)
        return found

    def _shares(self, name: str) -> list[bool]:
        return [name in names and len(names) > 1 for names in self.by_leaf]

    def any(self) -> PyTree:
        """Returns the tree of what any loss reaches."""
        return jax.tree.map(lambda *each: any(each), *self.trees.values())

    def move(self, params: PyTree, step: PyTree) -> PyTree:
        """Adds a step to the parameters that any loss reaches; the others stay as they are."""
        moved = optax.apply_updates(params, step)
        return jax.tree.map(lambda r, new, old: new if r else old, self.any(), moved, params)

    def divisors(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Returns by how much the steps of each loss's own backpropagation are smaller.

        ``S_k = max(1, sum_{j >= k} w_j)`` over the auxiliary losses j that reach all that k shares
        with others, k itself among them; 1 for the main loss and for one that shares nothing (Guo
        et al., below Eq. 4; with their weights the sum is never below 1, and steps never grow).

        Args:
            weights: The losses' weights.
        """
        shares = {name: self._shares(name) for name in self.names}
        found = {name: jnp.ones((), jnp.float32) for name in self.names}
        for name in self.auxiliary:
            later = [
                other
                for other in self.auxiliary
                if all(b for a, b in zip(shares[name], shares[other], strict=True) if a)
            ]
            if any(shares[name]):
                found[name] = self._at_least_1(weights, later)
        return found

    def leaf_divisors(self, weights: Mapping[str, Array]) -> PyTree:
        """Returns by how much a joint step is smaller, for each parameter.

        ``S_l = max(1, sum_j w_j)`` over the auxiliary losses j that reach the parameter, where it
        is shared (Guo et al., below Eq. 4).

        Args:
            weights: The losses' weights.
        """
        one = jnp.ones((), jnp.float32)
        each = [
            self._at_least_1(weights, [n for n in names if n in self.auxiliary])
            if len(names) > 1
            else one
            for names in self.by_leaf
        ]
        return jax.tree.unflatten(jax.tree.structure(self.any()), each)

    def _at_least_1(self, weights: Mapping[str, Array], names: Sequence[str]) -> Array:
        total = sum((weights[name] for name in names), jnp.zeros((), jnp.float32))
        return jnp.maximum(jnp.ones((), jnp.float32), total)
