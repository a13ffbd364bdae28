"""Pair-wise backpropagation: a forward pass, a backward pass and a step for each loss in turn."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax import Array

from sire_jax import traced
from sire_jax.updates import gradients
from sire_jax.updates.aggregators import SUM, Aggregator, Sum
from sire_jax.updates.gradients import check_aggregator, factors
from sire_jax.updates.reached import Reached, scale
from sire_jax.updates.rule import Losses, Updated, UpdateRule, least_memory
from sire_jax.updates.steps import Steps

PyTree = Any


def pairwise(
    optimizer: optax.GradientTransformation,
    reach: Mapping[str, PyTree],
    main: str = "main",
    aggregator: Aggregator = SUM,
    adjust: bool = True,
    scale_own: bool = False,
) -> UpdateRule:
    """Takes the losses in turn, each at the parameters that the one before has left (Eq. 6).

    From shallow to deep, the main loss last: ``W <- W - 1/S_k optimizer_k(w_k dL_k(W)/dW)`` for the
    parameters W that loss k reaches (Guo et al., *The Shallow End*, Section 3.2.2). States, weights
    and sizes of steps are those of ``multiway``, where a loss of weight 0 is absent; the paper says
    nothing of them here.

    Cost: for each loss a forward pass as far as its output, a backward pass from there and an
    optimizer step. An aggregator costs a multi-way pass more, at the parameters before the step,
    for the inner products of all gradients.

    The network's own state, such as batch statistics, changes once a step: each part as the last
    loss sees it whose forward pass comes by.

    >>> def losses(params, model_state):
    ...     return {"exit": params["w"] ** 2, "main": (params["w"] - 1) ** 2}, ({}, model_state)
    >>> params = {"w": jax.numpy.array(1.0)}
    >>> weights = {"exit": jax.numpy.array(1.0), "main": jax.numpy.array(1.0)}
    >>> reach = {"exit": {"w": True}, "main": {"w": True}}
    >>> rule = pairwise(optax.sgd(0.25), reach)
    >>> update, key = jax.jit(rule.update, static_argnums=0), jax.random.key(0)
    >>> updated = update(losses, weights, params, {}, rule.init(params), key)
    >>> updated.params["w"].item()  # 1 - 0.25 * 2 = 0.5, then 0.5 + 0.25 * 1
    0.75

    Args:
        optimizer: Any ``optax`` transformation.
        reach: For each loss a tree over the parameters, from ``traced.reach``.
        main: Name of the final output's loss.
        aggregator: What each loss's gradient is multiplied by in the parameters that it shares.
        adjust: Whether steps are divided by ``S_k`` (``Reached.divisors``).
        scale_own: Whether parameters that one loss alone reaches have its weight, too.

    Returns:
        The rule. Each loss is the one before its own step.

    Raises:
        ValueError: If a loss reaches no parameter, losses reach different slices of one, or there
            is nothing to aggregate.
    """
    reached = Reached.of(reach, main)
    reached.check_apart()
    check_aggregator(aggregator, reached)
    steps = Steps(optimizer, reached, adjust, scale_own, shared_state=False)

    def update(
        losses: Losses,
        weights: Mapping[str, Array],
        params: PyTree,
        model_state: PyTree,
        state: PyTree,
        key: Array,
    ) -> Updated:
        reached.check(weights)
        divisors = steps.divisors(weights)
        scales = None
        if not isinstance(aggregator, Sum):
            _, _, pull_back = gradients.of_each(losses, params, model_state)
            weighted = {n: steps.weigh(n, pull_back(n), weights[n]) for n in reached.names}
            scales = factors(weighted, reached, aggregator, key)
        last = _last_to_see(losses, params, model_state, reached.names)
        named, states = {}, []
        for name in reached.names:
            # The compiler drops what nobody uses of the rest, and the forward pass beyond the loss.
            def loss(params: PyTree, name: str = name) -> tuple[Array, Any]:
                values, rest = losses(params, model_state)
                return values[name], rest

            passed, gradient = jax.value_and_grad(loss, has_aux=True)(params)
            named[name], (outputs, new_state) = passed
            states.append(new_state)
            gradient = steps.weigh(name, gradient, weights[name])
            if scales is not None:
                gradient = jax.tree.map(scale, scales[name], gradient)
            params, state = steps.take(name, gradient, weights[name], divisors[name], params, state)
        new_model_state = jax.tree.map(lambda i, *leaves: leaves[i], last, *states)
        return Updated(params, state, new_model_state, named, outputs)

    return UpdateRule(steps.init, update, least_memory())


def _last_to_see(
    losses: Losses, params: PyTree, model_state: PyTree, names: tuple[str, ...]
) -> PyTree:
    """Finds for each part of the network's state the last loss that reads all that it depends on.

    The compiler drops what is not used: so no forward pass goes further than its loss for the
    sake of a batch's statistics. A part that no loss covers is the last one's.
    """

    def losses_and_parts(params: PyTree) -> dict[str, Any]:
        named, (_, state) = losses(params, model_state)
        parts = {f"part {i}": part for i, part in enumerate(jax.tree.leaves(state))}
        return {**{f"loss {name}": value for name, value in named.items()}, **parts}

    sources = {
        key: {i for i, leaf in enumerate(jax.tree.leaves(tree)) if leaf}
        for key, tree in traced.parameters_read(losses_and_parts, params).items()
    }
    last = []
    for i in range(len(jax.tree.leaves(model_state))):
        part = sources[f"part {i}"]
        covers = [k for k, name in enumerate(names) if part <= sources[f"loss {name}"]]
        last.append(max(covers, default=len(names) - 1))
    return jax.tree.unflatten(jax.tree.structure(model_state), last)
