"""Gradients of several losses: each by itself, and put together group by group of parameters."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax.objectives import weighted_sum
from sire_jax.updates.aggregators import Aggregator, Sum
from sire_jax.updates.correction import multiply
from sire_jax.updates.reached import Reached, scale
from sire_jax.updates.rule import Losses

PyTree = Any
Factors = dict[str, PyTree]
PullBack = Callable[[str], PyTree]


def of_each(
    losses: Losses, params: PyTree, model_state: PyTree
) -> tuple[dict[str, Array], tuple[Mapping[str, Array], PyTree], PullBack]:
    """Prepares the gradient of each loss.

    One forward pass is linearized; the linear map to one loss is transposed alone. So a backward
    pass does only what that loss needs, where a product of the whole network's Jacobian with a
    one-hot vector would send zeros through all the rest.

    Args:
        losses: The function of the losses.
        params: Parameters.
        model_state: State of the network.

    Returns:
        The losses; the outputs and the new state of the network; and a function from a loss's name
        to its gradient, zero where the loss does not reach.
    """
    named, push, rest = jax.linearize(lambda p: losses(p, model_state), params, has_aux=True)

    def pull_back(name: str) -> PyTree:
        return jax.linear_transpose(lambda tangent: push(tangent)[name], params)(
            jnp.ones_like(named[name])
        )[0]

    return named, rest, pull_back


def check_aggregator(aggregator: Aggregator, reached: Reached) -> None:
    """Checks that there is something to aggregate.

    Raises:
        ValueError: If there is an aggregator other than the sum, but no parameter that two losses
            share.
    """
    if isinstance(aggregator, Sum) or reached.groups():
        return
    if len(reached.names) == 1:
        why = f"there is only one loss, '{reached.names[0]}'"
    else:
        why = f"no two of the losses {', '.join(reached.names)} reach the same parameter"
    raise ValueError(
        f"The aggregator {aggregator} has nothing to aggregate: {why}. Give the network an"
        " auxiliary output with an objective, or take the aggregator 'sum'."
    )


def gramians(gradients: Mapping[str, PyTree], reached: Reached) -> dict[tuple[str, ...], Array]:
    """Returns the inner products of the gradients in each group of shared parameters.

    Args:
        gradients: The gradient of each loss.
        reached: Who reaches what.

    Returns:
        For each group, by the k losses that share it, ``G_ij = g_i . g_j``, ``[k, k]``.
    """
    leaves = {name: jax.tree.leaves(gradient) for name, gradient in gradients.items()}
    products = {}
    for names, indices in reached.groups().items():
        stacked = (jnp.stack([leaves[n][i].ravel() for n in names]) for i in indices)
        # In half precision a square is soon infinite, or 0.
        wide = (rows.astype(jnp.float32) for rows in stacked)
        products[names] = reduce(jnp.add, (multiply(rows, rows.T) for rows in wide))
    return products


def factors(
    gradients: Mapping[str, PyTree], reached: Reached, aggregator: Aggregator, key: Array
) -> Factors:
    """Returns what each gradient is multiplied by before the gradients are summed.

    Args:
        gradients: The weighted gradient of each loss.
        reached: Who reaches what.
        aggregator: Maps a Gramian to a coefficient for each of its gradients.
        key: Random key, for aggregators that draw.

    Returns:
        For each loss a tree of scalars over the parameters: the aggregator's coefficients in the
        groups that losses share, 1 elsewhere.
    """
    tree = reached.any()
    one = jnp.ones((), jnp.float32)
    leaves = {name: [one] * len(jax.tree.leaves(tree)) for name in reached.names}
    # A sum needs no inner products: its coefficients are 1.
    products = {} if isinstance(aggregator, Sum) else gramians(gradients, reached)
    groups = reached.groups()
    for group, (names, gramian) in enumerate(products.items()):
        # Each group is as if it were a network of its own, also in what is drawn.
        coefficients = aggregator(gramian, jax.random.fold_in(key, group))
        for i in groups[names]:
            for k, name in enumerate(names):
                leaves[name][i] = coefficients[k]
    structure = jax.tree.structure(tree)
    return {name: jax.tree.unflatten(structure, scalars) for name, scalars in leaves.items()}


def aggregated_gradient(
    losses: Losses,
    weights: Mapping[str, Array],
    params: PyTree,
    model_state: PyTree,
    reached: Reached,
    aggregator: Aggregator,
    key: Array,
    shares: Mapping[str, Array] | None = None,
) -> tuple[PyTree, dict[str, Array], tuple[Mapping[str, Array], PyTree]]:
    """Returns one gradient of all losses.

    Args:
        losses: The function of the losses.
        weights: Their weights.
        params: Parameters.
        model_state: State of the network.
        reached: Who reaches what.
        aggregator: How gradients are put together; of a sum one backward pass is enough.
        key: Random key, for aggregators that draw.
        shares: What each weighted gradient is multiplied by, unseen by the aggregator; 1 if absent.

    Returns:
        The gradient; the losses; the outputs and the new state of the network.
    """
    shares = shares or dict.fromkeys(reached.names, jnp.ones((), jnp.float32))
    if isinstance(aggregator, Sum):
        effective = {name: weights[name] * shares[name] for name in reached.names}

        def total(params: PyTree) -> tuple[Array, Any]:
            named, rest = losses(params, model_state)
            return weighted_sum(named, effective), (named, rest)

        gradient, (named, rest) = jax.grad(total, has_aux=True)(params)
        return gradient, named, rest
    named, rest, pull_back = of_each(losses, params, model_state)
    weighted = {
        n: jax.tree.map(lambda g, n=n: scale(weights[n], g), pull_back(n)) for n in reached.names
    }
    coefficients = factors(weighted, reached, aggregator, key)
    scaled = [
        jax.tree.map(lambda c, g, n=n: scale(shares[n] * c, g), coefficients[n], weighted[n])
        for n in reached.names
    ]
    return jax.tree.map(lambda *g: sum(g[1:], g[0]), *scaled), named, rest
