"""Steps of one loss at a time, in the parameters that it reaches."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sire_jax.updates.reached import Reached, masked, move, scale

PyTree = Any
_SHARED = "shared"


class Steps:
    """What multi-way and pair-wise backpropagation do with the gradient of one loss.

    A loss whose weight is 0 in a step is absent from it: it takes no step, whatever momentum and
    weight decay would do, and its optimizer state stays as it is.

    Args:
        optimizer: Any ``optax`` transformation.
        reached: Who reaches what.
        adjust: Whether steps are divided by ``Reached.divisors``.
        scale_own: Whether parameters that one loss alone reaches have its weight, too.
        shared_state: Whether all losses share one optimizer state. Its counts, and with them
            schedules of the optimizer, advance with each loss.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        reached: Reached,
        adjust: bool,
        scale_own: bool,
        shared_state: bool,
    ):
        self._reached, self._adjust, self._scale_own = reached, adjust, scale_own
        self._masks = {name: reached.trees[name] for name in reached.names}
        if shared_state:
            everything = reached.any()
            self._optimizers = {_SHARED: masked(optimizer, everything)}
            # As the state has it: nothing where no loss reaches.
            self._touched = {
                name: jax.tree.map(lambda r, m: m if r else optax.MaskedNode(), everything, mask)
                for name, mask in self._masks.items()
            }
        else:
            self._optimizers = {n: masked(optimizer, m) for n, m in self._masks.items()}

    def init(self, params: PyTree) -> PyTree:
        """Returns the optimizer states: of each loss, or the shared one."""
        return {name: optimizer.init(params) for name, optimizer in self._optimizers.items()}

    def weigh(self, name: str, gradient: PyTree, weight: Array) -> PyTree:
        """Multiplies a loss's gradient by its weight, where it shares the parameters."""
        leaves, structure = jax.tree.flatten(gradient)
        scaled = [
            scale(weight, leaf) if self._scale_own or len(names) > 1 else leaf
            for leaf, names in zip(leaves, self._reached.by_leaf, strict=True)
        ]
        return jax.tree.unflatten(structure, scaled)

    def divisors(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Returns what each loss's step is divided by."""
        if self._adjust:
            return self._reached.divisors(weights)
        return {name: jnp.ones((), jnp.float32) for name in self._reached.names}

    def take(
        self,
        name: str,
        gradient: PyTree,
        weight: Array,
        divisor: Array,
        params: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """Takes a loss's step.

        Args:
            name: The loss.
            gradient: Its gradient.
            weight: Its weight; at 0 nothing changes.
            divisor: What the step is divided by.
            params: Parameters.
            state: The optimizer states.

        Returns:
            New parameters and states; what the loss does not reach is as it was. Both keep their
            dtypes.
        """
        mask = self._masks[name]
        holder = name if name in self._optimizers else _SHARED
        optimizer = self._optimizers[holder]
        step, new = optimizer.update(gradient, state[holder], params)
        if holder == _SHARED:
            # What this loss does not reach is not a zero gradient to the moments of the others.
            touched = optax.tree_utils.tree_map_params(
                optimizer,
                lambda _, m: m,
                new,
                self._touched[name],
                transform_non_params=lambda _: True,
            )
            new = jax.tree.map(lambda m, a, b: a if m else b, touched, new, state[holder])
        # The step, not the gradient, of which Adam for one would take the scale away.
        step = jax.tree.map(partial(scale, 1 / divisor), step)
        choose = partial(jnp.where, weight != 0)
        moved = jax.tree.map(
            lambda reached, new, old: choose(new, old) if reached else old,
            mask,
            move(params, step, mask),
            params,
        )
        return moved, {**state, holder: jax.tree.map(choose, new, state[holder])}
