"""What training changes: the state of a run and of its network, and the best weights so far."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax.updates import UpdateRule

PyTree = Any
# Folded into a run's key, apart from its steps, which are folded in as 0, 1, … below 2**31.
SHUFFLE, INITIAL = 2**32 - 1, 2**32 - 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes.

    >>> import optax
    >>> from sire_jax.updates import joint
    >>> rule = joint(optax.sgd(0.1), reach={"main": {"kernel": True}})
    >>> variables = {"params": {"kernel": jnp.ones(3)}, "batch_stats": {"mean": jnp.zeros(3)}}
    >>> state = TrainState.start(jax.random.key(0), variables, rule)
    >>> state.step.item(), sorted(state.variables)
    (0, ['batch_stats', 'params'])

    Attributes:
        step: Number of steps taken, int32.
        key: The run's random key; never changes: a step's key is derived from it and ``step``.
        params: Parameters.
        model_state: Other variables of the network, such as batch statistics.
        update_state: State of the update rule.
    """

    step: Array
    key: Array
    params: PyTree
    model_state: PyTree
    update_state: PyTree

    @classmethod
    def start(cls, key: Array, variables: Mapping[str, PyTree], rule: UpdateRule) -> "TrainState":
        """Returns the state before the first step.

        Args:
            key: The run's random key.
            variables: What ``init`` of the network returned.
            rule: Update rule.

        Returns:
            The state.

        Raises:
            ValueError: If a parameter is complex or an integer, which no rule can train.
        """
        params, model_state = parted(variables)
        return cls(
            step=jnp.zeros((), jnp.int32),
            key=key,
            params=params,
            model_state=model_state,
            update_state=rule.init(params),
        )

    @property
    def variables(self) -> dict[str, PyTree]:
        """All variables of the network, as its ``apply`` takes them."""
        return {"params": self.params, **self.model_state}


def parted(variables: Mapping[str, PyTree]) -> tuple[PyTree, dict[str, PyTree]]:
    """Parts variables into parameters and the rest, as plain dictionaries (not Flax's frozen ones).

    Args:
        variables: What ``init`` of a network returned, or their shapes.

    Raises:
        ValueError: If there are no parameters, or one is complex or an integer.
    """
    collections = plain(variables)
    if "params" not in collections:
        raise ValueError(
            f"Variables have the collections {sorted(collections)}; they should have 'params', as"
            " network.init(key, image) returns them."
        )
    params = collections.pop("params")
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"The parameter {jax.tree_util.keystr(path, simple=True, separator='/')} is"
                f" {leaf.dtype}; parameters should be real numbers, which losses can descend on (of"
                " complex ones take the real and the imaginary part; what is not trained belongs to"
                " a collection of its own)."
            )
    return params, collections


def plain(tree: Any) -> Any:
    """Makes plain dictionaries of all mappings in a tree."""
    return {k: plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def apply_in_training(
    apply: Callable[..., Any], params: PyTree, model_state: PyTree, images: Any, dropout: Array
) -> tuple[Any, PyTree]:
    """Applies a network in training, without what it only sows: that would grow with each step.

    Args:
        apply: ``apply`` of a Flax network.
        params: Parameters.
        model_state: Other variables of the network.
        images: Its inputs.
        dropout: Random key for dropout.

    Returns:
        What the network returns, and its other variables after the step.

    Raises:
        ValueError: If the step changes which variables a collection has.
    """

    def applied(params: PyTree, state: PyTree) -> tuple[Any, PyTree]:
        rngs, mutable = {"dropout": dropout}, list(state)
        outputs, new = apply(
            {"params": params, **state}, images, train=True, rngs=rngs, mutable=mutable
        )
        return outputs, plain(new)

    sown = {kind for kind in model_state if _is_only_sown(applied, params, model_state, kind)}
    state = {kind: values for kind, values in model_state.items() if kind not in sown}
    outputs, new = applied(params, state)
    _check_structure(state, new)
    # What is sown stays as it was: a state of another shape would be compiled for anew.
    return outputs, {**new, **{kind: model_state[kind] for kind in sown}}


def _is_only_sown(
    applied: Callable[..., Any], params: PyTree, model_state: PyTree, kind: str
) -> bool:
    """Tells whether a network can do without a collection, into which it only writes."""
    others = {k: values for k, values in model_state.items() if k != kind}
    try:
        jax.eval_shape(applied, params, others)
    except Exception:  # Of Flax, or of whatever looks for the collection.
        return False
    return True


def _check_structure(old: PyTree, new: PyTree) -> None:
    structures: Any = [
        {kind: jax.tree.structure(values) for kind, values in state.items()} for state in (old, new)
    ]
    for kind, structure in structures[0].items():
        if structures[1].get(kind) != structure:
            raise ValueError(
                f"The collection '{kind}' has other variables after a step than before it, so that"
                " each step would be compiled anew. Sow into a collection of its own, and make"
                " variables in init already."
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Best:
    """The weights with the best validation accuracy so far.

    Attributes:
        score: That accuracy, in [0, 1]; -1 before the first.
        step: After how many steps.
        params: Parameters.
        model_state: Other variables of the network.
    """

    score: Array
    step: Array
    params: PyTree
    model_state: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """All variables of the network, as its ``apply`` takes them."""
        return {"params": self.params, **self.model_state}

    @classmethod
    def start(cls, state: TrainState) -> "Best":
        """Returns what any measured weights replace."""
        score = jnp.asarray(-1.0, jnp.float32)
        return cls._of(score, state)

    def update(self, score: Array, state: TrainState) -> "Best":
        """Returns the better of this and a state with ``score``; the earlier one where equal."""
        new = Best._of(score, state)
        return jax.tree.map(lambda a, b: jnp.where(score > self.score, a, b), new, self)

    @classmethod
    def _of(cls, score: Array, state: TrainState) -> "Best":
        return cls(score=score, step=state.step, params=state.params, model_state=state.model_state)
