"""The interface of all update rules."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

PyTree = Any


def least_memory() -> dict[str, str | bool | int | float] | None:
    """Returns the compiler options by which backward passes take turns in memory.

    A CPU's compiler orders work so that as much as can be runs at once, and keeps what all backward
    passes remember until the last of them. Others have no such option, and no need of one.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


# (params, model state) -> ({name: scalar}, (outputs, new model state))
Losses = Callable[[PyTree, PyTree], tuple[dict[str, Array], tuple[Mapping[str, Array], PyTree]]]


class Updated(NamedTuple):
    """What an update rule returns.

    >>> import jax
    >>> import optax
    >>> from sire_jax.updates import joint
    >>> losses = lambda params, model_state: ({"main": params["w"] ** 2}, ({}, model_state))
    >>> rule = joint(optax.sgd(0.25), {"main": {"w": True}})
    >>> weights, params = {"main": jax.numpy.array(1.0)}, {"w": jax.numpy.array(3.0)}
    >>> update, key = jax.jit(rule.update, static_argnums=0), jax.random.key(0)
    >>> updated = update(losses, weights, params, {}, rule.init(params), key)
    >>> updated.losses["main"].item(), updated.params["w"].item()
    (9.0, 1.5)

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

    >>> import jax
    >>> import optax
    >>> from sire_jax.updates import joint
    >>> rule = joint(optax.adam(1e-3), {"main": {"kernel": True, "unused": False}})
    >>> params = {"kernel": jax.numpy.ones((2, 3)), "unused": jax.numpy.ones(4)}
    >>> [leaf.shape for leaf in jax.tree.leaves(rule.init(params))]  # "unused" has no moments
    [(), (2, 3), (2, 3)]

    Attributes:
        init: Maps parameters to the rule's state.
        update: Maps ``(losses, weights, params, model_state, state, key)`` to ``Updated``.
            ``losses`` is a function of type ``Losses``; ``weights`` has a scalar for each loss;
            ``key`` is the step's random key, for rules that draw.
        compiler_options: What a program with the rule should be compiled with, as ``jax.jit`` takes
            it (``jax.pmap`` does not). It computes the same.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[Losses, Mapping[str, Array], PyTree, PyTree, PyTree, Array], Updated]
    compiler_options: dict[str, str | bool | int | float] | None = None
