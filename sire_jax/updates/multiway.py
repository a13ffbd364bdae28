"""Multi-way backpropagation: one forward pass, then a step of its own for each loss."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax import Array

from sire_jax.updates import gradients
from sire_jax.updates.aggregators import SUM, Aggregator
from sire_jax.updates.gradients import check_aggregator, factors
from sire_jax.updates.reached import Reached, scale
from sire_jax.updates.rule import Losses, Updated, UpdateRule, least_memory
from sire_jax.updates.steps import Steps

PyTree = Any


def multiway(
    optimizer: optax.GradientTransformation,
    reach: Mapping[str, PyTree],
    main: str = "main",
    aggregator: Aggregator = SUM,
    adjust: bool = True,
    scale_own: bool = False,
    shared_state: bool = False,
) -> UpdateRule:
    """Backpropagates each loss alone and takes a step at once (Guo et al., Eqs. 7 and 8).

    From shallow to deep, the main loss last: ``W <- W - 1/S_k optimizer_k(w_k dL_k/dW)`` for the
    parameters W that loss k reaches. All gradients are those at the features of one forward pass.
    As in the authors' program each loss has an optimizer state of its own (so what K losses share
    is decayed K times a step), parameters that it alone reaches have the gradient without weight,
    and ``S_k = max(1, sum_{j >= k} w_j)`` over the auxiliary losses (``Reached.divisors``). A loss
    whose weight is 0, as of an objective that has no examples in a batch, is absent from the step:
    neither momentum nor weight decay act for it, and its optimizer state stays as it is.

    Cost: a forward pass, for each loss a backward pass through what it reaches, and as many
    optimizer steps; the sum is that of a joint step where outputs are independent.

    >>> def losses(params, model_state):
    ...     return {"exit": params["w"] ** 2, "main": (params["w"] - 1) ** 2}, ({}, model_state)
    >>> params = {"w": jax.numpy.array(1.0)}
    >>> weights = {"exit": jax.numpy.array(1.0), "main": jax.numpy.array(1.0)}
    >>> reach = {"exit": {"w": True}, "main": {"w": True}}
    >>> rule = multiway(optax.sgd(0.25), reach)
    >>> update, key = jax.jit(rule.update, static_argnums=0), jax.random.key(0)
    >>> updated = update(losses, weights, params, {}, rule.init(params), key)
    >>> updated.params["w"].item()  # 1 - 0.25 * 2 - 0.25 * 0, both gradients at 1
    0.5

    Args:
        optimizer: Any ``optax`` transformation.
        reach: For each loss a tree over the parameters, from ``traced.reach``.
        main: Name of the final output's loss.
        aggregator: What each loss's gradient is multiplied by in the parameters that it shares,
            from the inner products of all; a sum leaves them as they are.
        adjust: Whether steps are divided by ``S_k``.
        scale_own: Whether parameters that one loss alone reaches have its weight, too.
        shared_state: Whether all losses share one optimizer state. With plain gradient descent,
            ``scale_own`` and no ``adjust`` the rule is then ``joint``. Its counts advance with each
            loss: a schedule in the optimizer runs through K + 1 times as fast.

    Returns:
        The rule.

    Raises:
        ValueError: If a loss reaches no parameter, losses reach different slices of one, or there
            is nothing to aggregate.
    """
    reached = Reached.of(reach, main)
    reached.check_apart()
    check_aggregator(aggregator, reached)
    steps = Steps(optimizer, reached, adjust, scale_own, shared_state)

    def update(
        losses: Losses,
        weights: Mapping[str, Array],
        params: PyTree,
        model_state: PyTree,
        state: PyTree,
        key: Array,
    ) -> Updated:
        reached.check(weights)
        named, (outputs, new_model_state), pull_back = gradients.of_each(
            losses, params, model_state
        )
        # All gradients before the first step, which moves what later losses would see.
        weighted = {n: steps.weigh(n, pull_back(n), weights[n]) for n in reached.names}
        scales = factors(weighted, reached, aggregator, key)
        divisors = steps.divisors(weights)
        for name in reached.names:
            gradient = jax.tree.map(scale, scales[name], weighted[name])
            params, state = steps.take(name, gradient, weights[name], divisors[name], params, state)
        return Updated(params, state, new_model_state, named, outputs)

    return UpdateRule(steps.init, update, least_memory())
