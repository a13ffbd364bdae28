"""The control of multi-way backpropagation: its effective weights, in one backward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sire_jax.optimizers import LinearOptimizer
from sire_jax.updates.aggregators import SUM, Aggregator
from sire_jax.updates.gradients import aggregated_gradient, check_aggregator
from sire_jax.updates.reached import Reached, masked, move, scale
from sire_jax.updates.rule import Losses, Updated, UpdateRule

PyTree = Any


def effective_joint(
    optimizer: optax.GradientTransformation,
    reach: Mapping[str, PyTree],
    main: str = "main",
    aggregator: Aggregator = SUM,
    adjust: bool = True,
    scale_own: bool = False,
) -> UpdateRule:
    """Does in one backward pass what ``multiway`` does, to first order in the step.

    ``L = L_main + sum_k (w_k / S_k) L_k``, with ``S_k`` as in ``multiway``; parameters that loss k
    alone reaches have the gradient ``dL_k / S_k``; weight decay is multiplied by
    ``sum_k 1 / S_k`` over the losses k that reach a parameter, the main one counting 1. Whatever
    multi-way backpropagation gains beyond its weights, step sizes and decay would be a difference
    to this rule: backpropagation is linear, so separate passes at the same features add up.

    A loss whose weight is 0 in a step is absent from it, as in multi-way backpropagation: it has no
    gradient and no part in the decay. What is left of its momentum acts here all the same.

    Cost: that of ``joint``, whatever the number of losses; with an aggregator that of ``multiway``.

    >>> def losses(params, model_state):
    ...     return {"exit": params["w"] ** 2, "main": (params["w"] - 1) ** 2}, ({}, model_state)
    >>> params = {"w": jnp.array(1.0)}
    >>> weights = {"exit": jnp.array(4.0), "main": jnp.array(1.0)}
    >>> reach = {"exit": {"w": True}, "main": {"w": True}}
    >>> rule = effective_joint(LinearOptimizer(optax.sgd(0.25)), reach)
    >>> update, key = jax.jit(rule.update, static_argnums=0), jax.random.key(0)
    >>> updated = update(losses, weights, params, {}, rule.init(params), key)
    >>> updated.params["w"].item()  # S of "exit" is 4: 1 - 0.25 (4 / 4 * 2 + 0)
    0.5

    Args:
        optimizer: A transformation whose step is linear in the gradients, with its weight decay
            known: ``optimizers.sgd``, or ``optimizers.LinearOptimizer``.
        reach: For each loss a tree over the parameters, from ``traced.reach``.
        main: Name of the final output's loss.
        aggregator: What each loss's gradient is multiplied by in the parameters that it shares.
        adjust: Whether ``S_k`` is that of ``Reached.divisors`` rather than 1.
        scale_own: Whether parameters that one loss alone reaches have its weight, too.

    Returns:
        The rule.

    Raises:
        ValueError: If the optimizer is not such a one, a loss reaches no parameter, losses reach
            different slices of one, or there is nothing to aggregate.
    """
    if not isinstance(optimizer, LinearOptimizer):
        raise ValueError(
            "effective_joint needs an optimizer whose step is linear in the gradient and whose"
            " weight decay is known: 'sgd' without clip, or"
            " optimizers.LinearOptimizer(transformation, weight_decay). The one that it is given"
            " has no such form."
        )
    reached = Reached.of(reach, main)
    reached.check_apart()
    check_aggregator(aggregator, reached)
    everything = reached.any()
    # Without its weight decay, which is added by the losses that a step has.
    descent = masked(optimizer.linear, everything)

    def update(
        losses: Losses,
        weights: Mapping[str, Array],
        params: PyTree,
        model_state: PyTree,
        state: PyTree,
        key: Array,
    ) -> Updated:
        reached.check(weights)
        divisors = reached.divisors(weights) if adjust else dict.fromkeys(reach, 1)
        share = {
            name: jnp.where(weights[name] != 0, jnp.float32(1 / divisors[name]), jnp.float32(0))
            for name in reached.names
        }
        gradient, named, (outputs, new_model_state) = aggregated_gradient(
            losses, weights, params, model_state, reached, aggregator, key, share
        )
        one = jnp.ones((), jnp.float32)
        if not scale_own:
            # The gradient of the sum has each loss's weight: it is taken out again.
            own = _per_leaf(reached, lambda n: _inverse(weights[n[0]]) if len(n) == 1 else one)
            gradient = jax.tree.map(scale, own, gradient)
        if optimizer.weight_decay:
            zero = jnp.zeros((), jnp.float32)
            times = _per_leaf(reached, lambda n: sum((share[name] for name in n), zero))
            penalty = jax.tree.unflatten(
                jax.tree.structure(params), optimizer.weight_decay.by_leaf(params)
            )
            gradient = jax.tree.map(
                lambda g, d, t, p: g + scale(jnp.float32(d) * t, p),
                gradient,
                penalty,
                times,
                params,
            )
        step, new_state = descent.update(gradient, state, params)
        moved = move(params, step, everything)
        return Updated(moved, new_state, new_model_state, named, outputs)

    return UpdateRule(descent.init, update)


def _per_leaf(reached: Reached, value: Callable[[tuple[str, ...]], Array]) -> PyTree:
    """Returns for each parameter a value of the losses that reach it."""
    structure = jax.tree.structure(reached.any())
    return jax.tree.unflatten(structure, [value(names) for names in reached.by_leaf])


def _inverse(weight: Array) -> Array:
    """Returns 1 / weight; 0 of a weight of 0, whose gradient is lost."""
    positive = weight > 0
    return jnp.where(positive, 1 / jnp.where(positive, weight, 1), 0)
