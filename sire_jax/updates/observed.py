"""The interface of all weightings: what a step shows them, and what they return."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

PyTree = Any
Named = dict[str, Array]


class Observed(NamedTuple):
    """What a step shows a weighting; what costs something is computed only if it is called.

    >>> observed = Observed({"main": jnp.array(2.0)}, lambda: {"main": jnp.array(1.5)}, dict)
    >>> observed.after()["main"].item()  # computed only now
    1.5

    Attributes:
        losses: The losses before the step, without weights.
        after: Returns the losses of the same batch after the step; costs a forward pass.
        norms: Returns the norm of each unweighted loss's gradient to the parameters that all losses
            reach; costs a backward pass for each loss.
        present: Whether the step has a loss: its own weight is not 0, and it is finite. ``None``
            of a step that has all that are finite.
    """

    losses: Mapping[str, Array]
    after: Callable[[], Mapping[str, Array]]
    norms: Callable[[], Mapping[str, Array]]
    present: Mapping[str, Array] | None = None


class Weighting(Protocol):
    """A way of weighting losses: three pure functions. States are trees of arrays.

    >>> import jax
    >>> from sire_jax.updates import Uncertainty
    >>> weighting: Weighting = Uncertainty(learning_rate=0.25)
    >>> step = Observed({"main": jnp.array(3.0), "exit": jnp.array(1.0)}, dict, dict)
    >>> update = jax.jit(lambda state: weighting.update(state, step))
    >>> update(weighting.init(["main", "exit"]))["main"].item()  # its log variance rises
    0.5
    """

    def init(self, names: Sequence[str]) -> PyTree:
        """Returns the state before the first step, for losses of these names."""

    def weights(self, state: PyTree, key: Array) -> Named:
        """Returns the factor of each loss's own weight in the coming step, a scalar each."""

    def update(self, state: PyTree, observed: Observed) -> PyTree:
        """Returns the state after a step."""


def presence(observed: Observed) -> Named:
    """Returns which losses a step has (``Observed.present``), a boolean each."""
    finite = {name: jnp.isfinite(loss) for name, loss in observed.losses.items()}
    present = observed.present
    return finite if present is None else {name: finite[name] & present[name] for name in finite}


def stack(values: Mapping[str, Array], dtype: Any = jnp.float32) -> Array:
    """Stacks scalars in the order of their names, ``[k]``."""
    return jnp.stack([values[name].astype(dtype) for name in sorted(values)])


def unstack(names: Iterable[str], values: Array) -> Named:
    """Undoes ``stack``."""
    return {name: values[i] for i, name in enumerate(sorted(names))}
