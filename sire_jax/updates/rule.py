"""The interface of all update rules."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

PyTree = Any

# (params, model state) -> ({name: scalar}, (outputs, new model state))
Losses = Callable[[PyTree, PyTree], tuple[dict[str, Array], tuple[Mapping[str, Array], PyTree]]]


class Updated(NamedTuple):
    """What an update rule returns.

    Attributes:
        params: New parameters.
        state: New state of the rule.
        model_state: New state of the network, such as batch statistics.
        losses: The losses by name, without their weights.
        outputs: The outputs of the network that the losses were taken of.
    """

    params: PyTree
    state: PyTree
    model_state: PyTree
    losses: dict[str, Array]
    outputs: Mapping[str, Array]


class UpdateRule(NamedTuple):
    """A way of putting several losses' gradients together, as a pair of pure functions.

    Attributes:
        init: Maps parameters to the rule's state.
        update: Maps ``(losses, weights, params, model_state, state, key)`` to ``Updated``.
            ``losses`` is a function of type ``Losses``; ``weights`` has a scalar for each loss;
            ``key`` is the step's random key, for rules that draw.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[Losses, Mapping[str, Array], PyTree, PyTree, PyTree, Array], Updated]
