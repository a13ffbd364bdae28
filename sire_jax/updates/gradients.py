"""The gradient of each loss by itself, all at the features of one forward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax.updates.rule import Losses

PyTree = Any
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
