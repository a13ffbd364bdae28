"""An update rule under a weighting of the losses."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax.slices import Partly, Unclear
from sire_jax.updates import gradients
from sire_jax.updates.observed import Observed, Weighting
from sire_jax.updates.reached import Reached, keep_dtypes
from sire_jax.updates.rule import Losses, Updated, UpdateRule
from sire_jax.updates.weightings import Fixed, GradNorm

PyTree = Any


def weighted(rule: UpdateRule, weighting: Weighting, reach: Mapping[str, PyTree]) -> UpdateRule:
    """Makes an update rule whose losses are weighted by a weighting.

    The rule is given the objectives' own weights times the weighting's factors; the weighting then
    sees the step. A loss whose own weight is 0 in a step, as of an objective that has no examples
    in a batch, is absent from what it sees; a step with a loss that is not finite, or after which
    the weighting's state would not be, is not seen at all. The losses that the rule returns stay
    unweighted.

    >>> import optax
    >>> import sire_jax as sj
    >>> reach = {"exit": {"w": True}, "main": {"w": True}}
    >>> rule = weighted(sj.joint(optax.sgd(0.1), reach), sj.updates.Uncertainty(), reach)
    >>> {name: float(value) for name, value in rule.init({"w": jnp.ones(2)})["weighting"].items()}
    {'exit': 0.0, 'main': 0.0}

    Args:
        rule: Any update rule.
        weighting: Any weighting.
        reach: For each loss a tree over the parameters, from ``traced.reach``.

    Returns:
        The rule, with the state ``{"rule": …, "weighting": …}``; of ``Fixed`` weights ``rule``
        itself.

    Raises:
        ValueError: If there are fewer than two losses to weigh, or ``GradNorm`` has no parameter
            that all losses reach, all of it.
    """
    if isinstance(weighting, Fixed):
        return rule
    reached = Reached.of(reach)
    shared = jax.tree.map(
        lambda *leaves: all(leaves) and not any(isinstance(x, Partly | Unclear) for x in leaves),
        *reach.values(),
    )
    _check(weighting, reach, shared)

    def init(params: PyTree) -> PyTree:
        return {"rule": rule.init(params), "weighting": weighting.init(sorted(reach))}

    def update(
        losses: Losses,
        weights: Mapping[str, Array],
        params: PyTree,
        model_state: PyTree,
        state: PyTree,
        key: Array,
    ) -> Updated:
        reached.check(weights)
        updating, drawing = jax.random.split(key)
        factors = weighting.weights(state["weighting"], drawing)
        products = {name: weight * factors[name] for name, weight in weights.items()}
        updated = rule.update(losses, products, params, model_state, state["rule"], updating)
        observed = Observed(
            updated.losses,
            lambda: losses(updated.params, updated.model_state)[0],
            lambda: _norms(losses, shared, params, model_state, sorted(reach)),
            {n: (w != 0) & jnp.isfinite(updated.losses[n]) for n, w in weights.items()},
        )
        old = state["weighting"]
        new = keep_dtypes(weighting.update(old, observed), old)
        # An absent loss may be anything: the step is seen all the same.
        present = {n: jnp.where(w != 0, updated.losses[n], 0.0) for n, w in weights.items()}
        finite = _are_finite(present) & _are_finite(new)
        new = jax.tree.map(partial(jnp.where, finite), new, old)
        return updated._replace(state={"rule": updated.state, "weighting": new})

    return rule._replace(init=init, update=update)


def _are_finite(tree: PyTree) -> Array:
    """Tells whether all numbers of a tree are finite."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.ones((), bool), *(jnp.isfinite(x).all() for x in numbers)]).all()


def _check(weighting: Weighting, reach: Mapping[str, PyTree], shared: PyTree) -> None:
    kind = type(weighting).__name__
    if len(reach) < 2:
        raise ValueError(
            f"The weighting {kind} needs at least two losses; there is {sorted(reach)}. Use"
            " 'fixed'."
        )
    if isinstance(weighting, GradNorm) and not any(jax.tree.leaves(shared)):
        raise ValueError(
            f"{kind} compares gradients to the parameters that all losses reach, but no parameter"
            f" is reached, all of it, by all of {sorted(reach)}."
        )


def _norms(
    losses: Losses, shared: PyTree, params: PyTree, model_state: PyTree, names: Sequence[str]
) -> dict[str, Array]:
    """Returns the norm of each loss's gradient to the parameters that are chosen in ``shared``."""
    leaves, tree = jax.tree.flatten(params)
    masks = jax.tree.leaves(shared)

    # Of these parameters alone: a backward pass then goes no further than to them.
    def restricted(varied: list[Array], model_state: PyTree) -> Any:
        variables = iter(varied)
        values = [next(variables) if m else leaf for leaf, m in zip(leaves, masks, strict=True)]
        return losses(jax.tree.unflatten(tree, values), model_state)

    varied = [leaf for leaf, m in zip(leaves, masks, strict=True) if m]
    _, _, pull_back = gradients.of_each(restricted, varied, model_state)

    def norm(name: str) -> Array:
        squares = ((leaf.astype(jnp.float32) ** 2).sum() for leaf in pull_back(name))
        return jnp.sqrt(sum(squares, jnp.float32(0)))

    return {name: norm(name) for name in names}
