"""Joint backpropagation: one gradient, of the weighted sum of all losses."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax import Array

from sire_jax.objectives import weighted_sum
from sire_jax.updates.rule import Losses, Updated, UpdateRule

PyTree = Any


def joint(optimizer: optax.GradientTransformation, reach: Mapping[str, PyTree]) -> UpdateRule:
    """Descends the weighted sum of all losses (Guo et al., *The Shallow End*, Eq. 3).

    ``L = sum_k w_k L_k``; one forward and one backward pass. Parameters that no loss reaches keep
    their value: they are no zero gradient to the optimizer, so weight decay and momentum leave
    them alone, too.

    Args:
        optimizer: Any ``optax`` transformation.
        reach: For each loss a tree of booleans over the parameters, from ``traced.reach``.

    Returns:
        The rule.

    Raises:
        ValueError: If no loss reaches any parameter.
    """
    reached = jax.tree.map(lambda *each: any(each), *reach.values())
    if not any(jax.tree.leaves(reached)):
        raise ValueError(f"None of the losses {sorted(reach)} reaches a parameter.")
    masked = optax.masked(optimizer, reached)

    def update(
        losses: Losses,
        weights: Mapping[str, Array],
        params: PyTree,
        model_state: PyTree,
        state: PyTree,
        key: Array,
    ) -> Updated:
        del key

        def total(params: PyTree) -> tuple[Array, Any]:
            named, rest = losses(params, model_state)
            return weighted_sum(named, weights), (named, rest)

        gradient, (named, (outputs, new_model_state)) = jax.grad(total, has_aux=True)(params)
        step, new_state = masked.update(gradient, state, params)
        moved = optax.apply_updates(params, step)
        new_params = jax.tree.map(lambda r, new, old: new if r else old, reached, moved, params)
        return Updated(new_params, new_state, new_model_state, named, outputs)

    return UpdateRule(masked.init, update)
