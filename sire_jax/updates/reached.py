"""What the reach of losses says: their order, what they share, and the sizes of their steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sire_jax.slices import Partly, Unclear, together

PyTree = Any


def _widest(*dtypes: Any) -> Any:
    """Returns the widest of some dtypes, at least float32."""
    return max(*dtypes, jnp.float32, key=lambda dtype: jnp.finfo(dtype).bits)


def scale(factor: Array, values: Array) -> Array:
    """Multiplies values, which keep their dtype, by a scalar, in float32 or what is wider."""
    # The inverse of a small weight, or of a short gradient, is no float16.
    wide = _widest(values.dtype)
    return (factor.astype(wide) * values.astype(wide)).astype(values.dtype)


def keep_dtypes(new: PyTree, old: PyTree) -> PyTree:
    """Returns a state in the dtypes of the one before, or every step would be compiled anew."""

    def keep(new: Array, old: Array) -> Array:
        new, dtype = jnp.asarray(new), jnp.asarray(old).dtype
        return new if new.dtype == dtype else new.astype(dtype)

    return jax.tree.map(keep, new, old)


def masked(optimizer: optax.GradientTransformation, mask: PyTree) -> optax.GradientTransformation:
    """Restricts an optimizer to some parameters, whose state keeps its dtypes.

    Args:
        optimizer: Any ``optax`` transformation.
        mask: A tree over the parameters, true where they are the optimizer's.

    Returns:
        The transformation; what is not the optimizer's has no state, and its gradient as step.
    """
    inner = optax.masked(optimizer, mask)

    def update(
        gradient: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        step, new = inner.update(gradient, state, params)
        return step, keep_dtypes(new, state)

    return optax.GradientTransformation(inner.init, update)


def move(params: PyTree, step: PyTree, mask: PyTree) -> PyTree:
    """Adds a step to the parameters, or slices, of a mask, which keep their dtypes."""

    def add(moves: bool | Partly, param: Array, step: Array) -> Array:
        if not moves:
            return param
        dtype = _widest(param.dtype, step.dtype)
        moved = (param.astype(dtype) + step.astype(dtype)).astype(param.dtype)
        return jnp.where(moves.mask, moved, param) if isinstance(moves, Partly) else moved

    return jax.tree.map(add, mask, params, step)


def _why_not_apart(reach: Any, of_losses: Sequence[Any], whole: bool | Partly) -> str:
    """Says why a loss is not treated apart from others, of what it and all reach of a parameter."""
    if isinstance(reach, Unclear) and not all(reach.covers(other) for other in of_losses if other):
        return (
            "not known which, and others may reach others: layers that share an array, and are"
            " taken from it by a changing index or go through an operation that is not followed,"
            " can't be told apart"
        )
    if isinstance(reach, Partly) and not reach.covers(whole):
        return (
            "of which others reach more: layers that share an array, as those of nn.scan, can't be"
            " treated apart"
        )
    return ""


@dataclass(frozen=True)
class Reached:
    """Losses in order, and which parameters each reaches.

    Attributes:
        names: Losses from shallow to deep: each after those that reach part of what it reaches; the
            main one last.
        trees: For each loss a tree over the parameters of what it reaches, from ``traced.reach``.
    """

    names: tuple[str, ...]
    trees: Mapping[str, PyTree]

    @classmethod
    def of(cls, reach: Mapping[str, PyTree], main: str = "main") -> "Reached":
        """Puts losses in order.

        Args:
            reach: For each loss a tree over the parameters, from ``traced.reach``.
            main: Name of the final output's loss; the deepest takes its place if there is none.

        Returns:
            The order.

        Raises:
            ValueError: If there is no loss, or one that reaches no parameter.
        """
        if not reach:
            raise ValueError("An update rule needs at least one objective; it is given none.")
        for name, tree in reach.items():
            if not any(jax.tree.leaves(tree)):
                raise ValueError(
                    f"The objective '{name}' reaches no parameter, so nothing can be learned from"
                    " it: its loss depends on none, or only through stop_gradient or whole numbers,"
                    " or the weights are not in 'params', as those of a module other than Linen's."
                )
        # A loss that reaches all that another one shares, and more of it, comes after that one.
        unordered = cls(tuple(reach), reach)
        sizes = {name: sum(unordered._shares(name)) for name in reach}
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

        Raises:
            ValueError: If losses can't be told apart (``check_apart``).
        """
        self.check_apart()
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, names in enumerate(self.by_leaf):
            if len(names) > 1:
                groups.setdefault(names, []).append(i)
        return groups

    def _shares(self, name: str) -> list[bool]:
        return [name in names and len(names) > 1 for names in self.by_leaf]

    def any(self) -> PyTree:
        """Returns the tree of what any loss reaches, of slices if none reaches the others.

        Where it is not known which slices that is, it is all: decay moves those of no loss, too.
        """
        return jax.tree.map(lambda *reach: together(reach), *self.trees.values())

    def check_apart(self) -> None:
        """Checks that losses can be treated apart: what reaches part of an array reaches it all.

        Raises:
            ValueError: If a loss reaches some slices of a parameter, and another loss others, or
                it is not known which (``slices.Unclear``) and they may.
        """
        reaches = zip(*map(jax.tree.leaves, self.trees.values()), strict=True)
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.any())
        for of_losses, (path, whole) in zip(reaches, leaves, strict=True):
            of = dict(zip(self.trees, of_losses, strict=True))
            for name in self.names:
                reach, why = of[name], _why_not_apart(of[name], of_losses, whole)
                if why:
                    where = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise ValueError(
                        f"The objective '{name}' reaches {reach} of the parameter '{where}',"
                        f" {reach.shape}, {why}. Give the layers parameters of their own, such as"
                        " by a Python loop in place of nn.scan, or take the update rule 'joint'"
                        " with the aggregator 'sum' and without adjust."
                    )

    def check(self, weights: Mapping[str, Array]) -> None:
        """Checks that a step is of these losses.

        Args:
            weights: The weights of the step's losses.

        Raises:
            ValueError: If they are not those of the reach.
        """
        if set(weights) != set(self.names):
            raise ValueError(
                f"The step has the objectives {', '.join(sorted(weights))}, but its update rule was"
                f" made for {', '.join(sorted(self.names))}; make the rule anew, from the reach of"
                " the objectives that the step has."
            )

    def divisors(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Returns by how much the steps of each loss's own backpropagation are smaller.

        ``S_k = max(1, sum_{j >= k} w_j)`` over the auxiliary losses j that reach all that k shares
        with others, k itself among them; 1 for the main loss and for one that shares nothing (Guo
        et al., below Eq. 4; with their weights the sum is never below 1, and steps never grow).

        Args:
            weights: The losses' weights.
        """
        shares = {name: self._shares(name) for name in self.names}
        divisors = {name: jnp.ones((), jnp.float32) for name in self.names}
        for name in self.auxiliary:
            later = [
                other
                for other in self.auxiliary
                if all(b for a, b in zip(shares[name], shares[other], strict=True) if a)
            ]
            if any(shares[name]):
                divisors[name] = self._at_least_1(weights, later)
        return divisors

    def leaf_divisors(self, weights: Mapping[str, Array]) -> PyTree:
        """Returns by how much a joint step is smaller, for each parameter.

        ``S_l = max(1, sum_j w_j)`` over the auxiliary losses j that reach the parameter, where it
        is shared (Guo et al., below Eq. 4).

        Args:
            weights: The losses' weights.
        """
        one = jnp.ones((), jnp.float32)
        divisors = [
            self._at_least_1(weights, [n for n in names if n in self.auxiliary])
            if len(names) > 1
            else one
            for names in self.by_leaf
        ]
        return jax.tree.unflatten(jax.tree.structure(self.any()), divisors)

    def _at_least_1(self, weights: Mapping[str, Array], names: Sequence[str]) -> Array:
        total = sum((weights[name] for name in names), jnp.zeros((), jnp.float32))
        return jnp.maximum(jnp.ones((), jnp.float32), total)
