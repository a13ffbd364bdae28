"""Joint backpropagation: one step down the weighted sum of all losses."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax import Array

from sire_jax.updates.aggregators import SUM, Aggregator
from sire_jax.updates.gradients import aggregated_gradient, check_aggregator
from sire_jax.updates.reached import Reached, masked, move, scale
from sire_jax.updates.rule import Losses, Updated, UpdateRule

PyTree = Any


def joint(
    optimizer: optax.GradientTransformation,
    reach: Mapping[str, PyTree],
    main: str = "main",
    aggregator: Aggregator = SUM,
    adjust: bool = False,
) -> UpdateRule:
    """Descends the weighted sum of all losses (Guo et al., *The Shallow End*, Eq. 3).

    ``L = sum_k w_k L_k``. Parameters that no loss reaches keep their value: they are no zero
    gradient to the optimizer, so weight decay and momentum leave them alone, too.

    Cost: one forward and one backward pass; with an aggregator a backward pass for each loss.

    >>> def losses(params, model_state):
    ...     return {"exit": params["w"] ** 2, "main": (params["w"] - 1) ** 2}, ({}, model_state)
    >>> params = {"w": jax.numpy.array(1.0)}
    >>> weights = {"exit": jax.numpy.array(0.5), "main": jax.numpy.array(1.0)}
    >>> reach = {"exit": {"w": True}, "main": {"w": True}}
    >>> rule = joint(optax.sgd(0.25), reach)
    >>> update, key = jax.jit(rule.update, static_argnums=0), jax.random.key(0)
    >>> updated = update(losses, weights, params, {}, rule.init(params), key)
    >>> updated.params["w"].item()  # 1 - 0.25 (0.5 * 2 + 0)
    0.75

    Args:
        optimizer: Any ``optax`` transformation.
        reach: For each loss a tree over the parameters, from ``traced.reach``.
        main: Name of the final output's loss.
        aggregator: How the gradients of parameters that losses share are put together, if not
            summed.
        adjust: Whether the steps of parameters that auxiliary losses share are divided by the sum
            of those losses' weights, where it is above 1 (the text below Eq. 4).

    Returns:
        The rule.

    Raises:
        ValueError: If a loss reaches no parameter, there is nothing to aggregate, or losses reach
            different slices of one parameter and are not just summed.
    """
    reached = Reached.of(reach, main)
    check_aggregator(aggregator, reached)
    if adjust:
        # A step has one divisor for all slices of a parameter.
        reached.check_apart()
    everything = reached.any()
    descent = masked(optimizer, everything)

    def update(
        losses: Losses,
        weights: Mapping[str, Array],
        params: PyTree,
        model_state: PyTree,
        state: PyTree,
        key: Array,
    ) -> Updated:
        reached.check(weights)
        gradient, named, (outputs, new_model_state) = aggregated_gradient(
            losses, weights, params, model_state, reached, aggregator, key
        )
        step, new_state = descent.update(gradient, state, params)
        if adjust:
            # The step, not the gradient, of which Adam for one would take the scale away.
            step = jax.tree.map(
                lambda r, s, d: scale(1 / d, s) if r else s,
                everything,
                step,
                reached.leaf_divisors(weights),
            )
        moved = move(params, step, everything)
        return Updated(moved, new_state, new_model_state, named, outputs)

    return UpdateRule(descent.init, update)
