"""Objectives: which output is compared with which target, by which loss, with which weight.

A label outside of its classes has no meaning: losses of it are not a number, and metrics count it
as wrong. What has no label is left out of all means where its objective says so
(``Objective.ignore``, ``Objective.mask``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sire_jax import traced
from sire_jax.losses import BINARY, Loss, classifies, sum_positions
from sire_jax.metrics import is_classification
from sire_jax.text import nearest

# At which the weights of schedules are checked.
_CHECKED_STEPS = (0, 1_000_000)


@dataclass(frozen=True)
class Objective:
    """One term of the loss, and what is measured of it.

    >>> from sire_jax.losses import cross_entropy
    >>> exit_ = Objective("exit", "label", cross_entropy, weight=0.3, ignore=-1)
    >>> batch = {"label": jnp.array([0, -1])}
    >>> exit_.counts(batch)  # of the second example nothing is known
    Array([1., 0.], dtype=float32)

    Attributes:
        output: Name of the output.
        target: Key of the batch that the output should match.
        loss: Maps the output ``[b, …]`` and the target to a loss per example, ``[b]``.
        weight: A number, at least 0, or an ``optax`` schedule from the step to one.
        ignore: The label that says that there is none, such as -1 or 255: examples, and positions
            of an example, that have it are left out of the loss and of all metrics.
        mask: Key of the batch that says which examples count, ``[b]``: booleans, or how much each
            counts, at least 0 (what is below, or not a number, is 0). What counts 0 may have any
            target.
        classifies: Whether the output holds logits of classes and the target labels, of which
            accuracies are measured; ``None``: if the loss is one of this module that needs them.

    Raises:
        ValueError: If the loss is no function, what is ignored no whole number, or the weight no
            number, negative or not finite (of a schedule, at steps 0 and 1,000,000).
    """

    output: str
    target: str
    loss: Loss
    weight: float | optax.Schedule = 1.0
    ignore: int | None = None
    mask: str | None = None
    classifies: bool | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise ValueError(
                f"The loss of an objective is {self.loss!r}; it should be a function of an output"
                " and a target."
            )
        whole = isinstance(self.ignore, int | np.integer) and not isinstance(self.ignore, bool)
        if self.ignore is not None and not whole:
            raise ValueError(
                f"An objective ignores {self.ignore!r}; it should be a whole number, such as -1."
            )
        if not callable(self.weight):
            _check_weight(self.weight)
            return
        # Schedules of optax mix dtypes.
        with jax.numpy_dtype_promotion("standard"):
            for step in _CHECKED_STEPS:
                _check_weight(self.weight(jnp.int32(step)), f" at step {step:,}")

    @property
    def labelled(self) -> bool:
        """Whether the output holds logits of classes, and the target labels."""
        if self.classifies is not None:
            return self.classifies
        return classifies(self.loss) or self.loss in BINARY

    def weight_at(self, step: Array | int) -> Array:
        """Returns the weight at a step, a scalar."""
        weight = self.weight(step) if callable(self.weight) else self.weight
        return jnp.asarray(weight, jnp.float32)

    def counts(self, batch: Mapping[str, Any]) -> Array | None:
        """Returns how much each label counts, or each example where a target is no labels.

        Args:
            batch: Targets and masks by key.

        Returns:
            ``[b]``, or ``[b, …]`` as the labels where some are ignored; ``None``: all count 1.
        """
        mask = None
        if self.mask is not None:
            counts = batch[self.mask].astype(jnp.float32)
            mask = jnp.where(counts > 0, counts, 0)
        if self.ignore is None:
            return mask
        # Labels of few bits would wrap what is ignored: 256 to 0.
        labelled = (batch[self.target].astype(jnp.int32) != int(self.ignore)).astype(jnp.float32)
        return labelled if mask is None else labelled * _beside(mask, labelled)

    def values(self, output: Array, batch: Mapping[str, Any]) -> Array:
        """Returns the loss of each example, without its weight.

        Args:
            output: ``[b, …]``.
            batch: Targets and masks by key.

        Returns:
            ``[b]``. Of what does not count it is a number, of no use, with a gradient of 0.
        """
        target, counts = batch[self.target], self.counts(batch)
        if counts is None:
            return self.loss(output, target)
        # Not only the loss: the gradient of what is dropped later may be infinite, times 0.
        target = jax.tree.map(lambda x: jnp.where(_beside(counts > 0, x), x, _zero(x)), target)
        if counts.ndim == 1:
            return jnp.where(counts > 0, self.loss(output, target), 0.0)
        alone = self.loss(output.reshape(-1, output.shape[-1]), target.reshape(-1))
        return sum_positions(jnp.where(counts > 0, alone.reshape(counts.shape), 0.0))


def _check_weight(weight: Any, where: str = "") -> None:
    """Checks a weight whose value is known.

    Raises:
        ValueError: If it is no number, negative or not finite.
    """
    if isinstance(weight, jax.core.Tracer):
        return
    value = np.asarray(weight)
    is_number = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating))
    if value.ndim or not is_number or not 0 <= value < math.inf:
        raise ValueError(
            f"The weight of an objective is {weight!r}{where}; it should be finite and at least 0."
        )


def _beside(values: Array, x: Array) -> Array:
    """Gives values ``[b, …]`` further axes, as many as ``x`` has."""
    return values.reshape(*values.shape, *(1,) * (x.ndim - values.ndim))


def _zero(x: Array) -> Array:
    return jnp.zeros((), x.dtype)


Objectives = Mapping[str, Objective]


def evaluate(
    objectives: Objectives, outputs: Mapping[str, Array], batch: Mapping[str, Any]
) -> dict[str, Array]:
    """Computes every objective's loss per example, without its weight.

    Args:
        objectives: Objectives by name.
        outputs: Outputs of the network.
        batch: Targets and masks by key.

    Returns:
        ``{name: [b]}``.

    Raises:
        ValueError: As ``check``, or if a loss can't compare its output and target, or returns
            something else than a number for each example.
    """
    check(objectives, outputs, batch)
    return {name: _values(name, o, outputs[o.output], batch) for name, o in objectives.items()}


def _values(name: str, objective: Objective, output: Array, batch: Mapping[str, Any]) -> Array:
    target = batch[objective.target]
    compared = (
        f"the output '{objective.output}', {_shown(output)}, with the target"
        f" '{objective.target}', {_shown(target)}"
    )
    try:
        values = objective.values(output, batch)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The loss of the objective '{name}' can't compare {compared}: {error}"
        ) from error
    returned = list(values.shape) if hasattr(values, "shape") else type(values).__name__
    if returned != list(output.shape[:1]):
        raise ValueError(
            f"The loss of the objective '{name}' compares {compared} and returns {returned}; it"
            f" should return one number for each example, {list(output.shape[:1])}, neither their"
            " mean nor one for each pair of examples."
        )
    if not objective.labelled and _broadcasts(objective.loss, output, target):
        raise ValueError(
            f"The loss of the objective '{name}' compares {compared}: their shapes broadcast, so"
            " that each example is compared with the targets of all. Give both the same shape, such"
            " as output[:, 0]."
        )
    return values


def _broadcasts(loss: Loss, output: Array, target: Any) -> bool:
    """Tells whether a loss compares examples with all targets, as NumPy's rules make of [b, 1]."""
    if not hasattr(target, "shape") or target.shape == output.shape:
        return False
    # One example more than there are targets: whoever compares them one by one can't.
    more = jax.ShapeDtypeStruct((output.shape[0] + 1, *output.shape[1:]), output.dtype)
    same = jax.ShapeDtypeStruct(target.shape, target.dtype)
    try:
        program = jax.make_jaxpr(loss)(more, same).jaxpr
    except Exception:  # Of whatever finds the shapes wrong.
        return False
    return bool(traced.dependencies(program, [0, 1])[0])


def _shown(tree: Any) -> Any:
    """Writes shapes and dtypes of an array, or of a tree of them, into a message."""
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)


def example_counts(objectives: Objectives, batch: Mapping[str, Any]) -> dict[str, Array | None]:
    """Returns how much each example counts in every objective's mean, by name.

    Args:
        objectives: Objectives by name.
        batch: Targets and masks by key.

    Returns:
        ``[b]`` each; ``None``: all count 1. An example with several labels counts as much as the
        one that counts most.
    """
    counts = {name: objective.counts(batch) for name, objective in objectives.items()}
    return {
        name: values if values is None else values.reshape(len(values), -1).max(1)
        for name, values in counts.items()
    }


def accurate(
    objectives: Objectives, outputs: Mapping[str, Any], batch: Mapping[str, Any]
) -> list[str]:
    """Lists the objectives of which accuracies are measured: logits of classes, and their labels.

    Args:
        objectives: Objectives by name.
        outputs: The outputs, or their shapes.
        batch: Targets, or their shapes.
    """
    return [
        name
        for name, o in objectives.items()
        if o.labelled and is_classification(outputs[o.output], batch[o.target])
    ]


def weights(objectives: Objectives, step: Array | int) -> dict[str, Array]:
    """Returns every objective's weight at a step, ``{name: scalar}``."""
    return {name: objective.weight_at(step) for name, objective in objectives.items()}


def weighted_sum(losses: Mapping[str, Array], weights: Mapping[str, Array]) -> Array:
    """Returns the total loss, ``sum_k w_k L_k``, a scalar."""
    return sum((weights[name] * loss for name, loss in losses.items()), jnp.float32(0))


def check(objectives: Objectives, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Checks that objectives fit outputs and batches.

    Args:
        objectives: Objectives by name.
        outputs: The outputs, or their shapes.
        batch: Targets and masks, or their shapes.

    Raises:
        ValueError: If outputs have no names; there is no objective; one names what is not there;
            its labels or its mask have a wrong dtype or shape; its metrics can't be told apart.
    """
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"The network returns a {type(outputs).__name__}; it should return outputs by name, as"
            " sj.Network(backbone, heads) does, where heads may be {}."
        )
    check_keys(objectives, batch)
    for name, objective in objectives.items():
        _check_exists(name, "output", objective.output, outputs)
        _check_name(name, objective, outputs)
        if objective.labelled or objective.ignore is not None:
            _check_labels(name, objective, outputs[objective.output], batch[objective.target])
        if objective.mask is not None:
            _check_mask(name, objective.mask, batch[objective.mask], outputs[objective.output])


def check_keys(objectives: Objectives, batch: Mapping[str, Any]) -> None:
    """Checks that there are objectives, and that a batch has their targets and masks.

    Args:
        objectives: Objectives by name.
        batch: Targets and masks, or their shapes.

    Raises:
        ValueError: If not.
    """
    values = objectives.values() if isinstance(objectives, Mapping) else [None]
    if not all(isinstance(objective, Objective) for objective in values):
        raise ValueError(
            f"Objectives are {objectives!r}; they should be a mapping such as {{'main':"
            " sj.Objective('main', 'label', sj.cross_entropy)}."
        )
    if not objectives:
        raise ValueError("There is no objective; give at least one.")
    for name, objective in objectives.items():
        _check_exists(name, "target", objective.target, batch)
        if objective.mask is not None:
            _check_exists(name, "mask", objective.mask, batch)


def _check_exists(name: str, kind: str, key: str, names: Mapping[str, Any]) -> None:
    if key not in names:
        raise ValueError(
            f"The objective '{name}' is on the {kind} '{key}', which does not"
            f" exist.{nearest(key, names)}"
        )


def _check_name(name: str, objective: Objective, outputs: Mapping[str, Any]) -> None:
    if name == "total":
        raise ValueError("An objective can't be called 'total': that is the weighted sum.")
    if name in outputs and name != objective.output:
        raise ValueError(
            f"The objective '{name}' is on the output '{objective.output}', but has the name of"
            " another; their metrics could not be told apart. Choose another name."
        )


def _check_labels(name: str, objective: Objective, output: Any, target: Any) -> None:
    """Checks that labels are whole numbers, one for each position that has logits."""
    start = f"The objective '{name}'"
    if not hasattr(target, "dtype"):
        raise ValueError(
            f"{start} has labels '{objective.target}' that are {_shown(target)}; they should be one"
            " array of integers."
        )
    whole = jnp.issubdtype(target.dtype, jnp.integer) or target.dtype == bool
    binary = objective.loss in BINARY and objective.ignore is None
    if not (whole or binary):
        raise ValueError(
            f"{start} has labels '{objective.target}' that are {_shown(target)}; they should be"
            " integers, the numbers of classes (of one-hot vectors: their argmax)."
        )
    several = objective.ignore is not None and not objective.labelled and len(target.shape) > 1
    if target.shape != output.shape[:-1] or several:
        raise ValueError(
            f"{start} has labels '{objective.target}', {_shown(target)}, for the logits"
            f" '{objective.output}', {_shown(output)}; there should be a label for each vector of"
            f" logits, {list(output.shape[:1] if several else output.shape[:-1])}."
        )


def _check_mask(name: str, key: str, mask: Any, output: Any) -> None:
    if getattr(mask, "shape", None) != output.shape[:1]:
        raise ValueError(
            f"The mask '{key}' of the objective '{name}' is {_shown(mask)}; it should have a number"
            f" for each example, {list(output.shape[:1])}."
        )
