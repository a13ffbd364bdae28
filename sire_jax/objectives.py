"""Objectives: which output is compared with which target, by which loss, with which weight."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sire_jax.names import nearest

Loss = Callable[[Array, Array], Array]


def _sum_positions(values: Array) -> Array:
    """Sums ``[b, …]`` over all axes but the first."""
    return values.reshape(values.shape[0], -1).sum(-1)


def _one_logit(logit: Array) -> Array:
    if logit.ndim != 2 or logit.shape[1] != 1:
        raise ValueError(f"A binary loss needs one logit, [b, 1]; the output is {logit.shape}.")
    return logit[:, 0]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross entropy of integer labels, summed over the positions of an example.

    ``loss = -sum_i log softmax(logits_i)[labels_i]``

    Args:
        logits: ``[b, …, classes]``.
        labels: ``[b, …]``, integers in [0, classes).

    Returns:
        ``[b]``.
    """
    return _sum_positions(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """Cross entropy of labels that share some of their probability with all classes.

    ``loss = -sum_ij q_ij log softmax(logits_i)_j``, ``q = (1 - s) onehot(label) + s / classes``
    (Szegedy et al., *Rethinking the Inception Architecture*, 2016, Section 7)

    Attributes:
        smoothing: The share ``s``, in [0, 1).
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"A label smoothing is {self.smoothing}; it should be at least 0 and below 1."
            )

    def __call__(self, logits: Array, labels: Array) -> Array:
        """Maps ``[b, …, classes]`` and integers ``[b, …]`` in [0, classes) to ``[b]``."""
        uniform = _sum_positions(-jax.nn.log_softmax(logits).mean(-1))
        return (1 - self.smoothing) * cross_entropy(logits, labels) + self.smoothing * uniform


def negative_probability(logits: Array, labels: Array) -> Array:
    """The negative probability of the right class, summed over the positions of an example.

    ``loss = -sum_i softmax(logits_i)[labels_i]``. It is what the released pairs program calls cross
    entropy on the digits.

    Args:
        logits: ``[b, …, classes]``.
        labels: ``[b, …]``, integers in [0, classes).

    Returns:
        ``[b]``, at least minus the number of positions.
    """
    probabilities = jax.nn.softmax(logits)
    return -_sum_positions(jnp.take_along_axis(probabilities, labels[..., None], axis=-1)[..., 0])


def binary_cross_entropy(logit: Array, label: Array) -> Array:
    """Cross entropy of a label that is 0 or 1, of one logit.

    ``loss = -z log sigmoid(logit) - (1 - z) log(1 - sigmoid(logit))``
    (Peeters and Schlyter, Section II.A, where the sign is missing)

    Args:
        logit: ``[b, 1]``.
        label: ``[b]``, 0 or 1.

    Returns:
        ``[b]``.

    Raises:
        ValueError: If there is not one logit.
    """
    return optax.sigmoid_binary_cross_entropy(_one_logit(logit), label.astype(logit.dtype))


def binary_squared_error(logit: Array, label: Array) -> Array:
    """Squared error of a probability: ``(sigmoid(logit) - z)^2`` (Peeters and Schlyter, II.A).

    Args:
        logit: ``[b, 1]``.
        label: ``[b]``, 0 or 1.

    Returns:
        ``[b]``, in [0, 1].

    Raises:
        ValueError: If there is not one logit.
    """
    return (jax.nn.sigmoid(_one_logit(logit)) - label.astype(logit.dtype)) ** 2


def mean_squared_error(output: Array, target: Array) -> Array:
    """Squared error, a mean over all that one example has.

    ``loss = 1/n sum_j (output_j - target_j)^2``

    Args:
        output: ``[b, …]``.
        target: As ``output``.

    Returns:
        ``[b]``.

    Raises:
        ValueError: If the shapes differ.
    """
    if output.shape != target.shape:
        raise ValueError(f"An output {output.shape} can't be compared with {target.shape}.")
    error = (output - target) ** 2
    return error.reshape(error.shape[0], -1).mean(-1)


def classifies(loss: Loss) -> bool:
    """Tells whether a loss takes a logit for each class, and integer labels."""
    return loss in (cross_entropy, negative_probability) or isinstance(loss, SmoothedCrossEntropy)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "negative_probability": negative_probability,
    "binary_cross_entropy": binary_cross_entropy,
    "binary_squared_error": binary_squared_error,
    "mean_squared_error": mean_squared_error,
}
# Those with settings, chosen by a section {"name": …, setting: value}.
LOSSES_WITH_SETTINGS = {"smoothed_cross_entropy": SmoothedCrossEntropy}


@dataclass(frozen=True)
class Objective:
    """One term of the loss.

    Attributes:
        output: Name of the output.
        target: Key of the batch that the output should match.
        loss: Maps the output and the target to a loss per example, ``[b]``.
        weight: A number, or an ``optax`` schedule from the step to one.
    """

    output: str
    target: str
    loss: Loss
    weight: float | optax.Schedule = 1.0

    def weight_at(self, step: Array | int) -> Array:
        """Returns the weight at a step, a scalar."""
        weight = self.weight(step) if callable(self.weight) else self.weight
        return jnp.asarray(weight, jnp.float32)


Objectives = Mapping[str, Objective]


def evaluate(
    objectives: Objectives, outputs: Mapping[str, Array], batch: Mapping[str, Array]
) -> dict[str, Array]:
    """Computes every objective's loss per example, without its weight.

    Args:
        objectives: Objectives by name.
        outputs: Outputs of the network.
        batch: Targets by key.

    Returns:
        ``{name: [b]}``.
    """
    return {k: o.loss(outputs[o.output], batch[o.target]) for k, o in objectives.items()}


def weights(objectives: Objectives, step: Array | int) -> dict[str, Array]:
    """Returns every objective's weight at a step, ``{name: scalar}``."""
    return {name: objective.weight_at(step) for name, objective in objectives.items()}


def weighted_sum(losses: Mapping[str, Array], weights: Mapping[str, Array]) -> Array:
    """Returns the total loss, ``sum_k w_k L_k``, a scalar."""
    return sum((weights[name] * loss for name, loss in losses.items()), jnp.float32(0))


def depth_weights(layers: Sequence[int], nu: float) -> list[float]:
    """Returns weights that fall with the distance from the deepest auxiliary output.

    ``gamma_k = max(0.01, (L_k / L_K)^nu)`` (Guo et al., *The Shallow End*, Section 3.1)

    Args:
        layers: The layers ``L_k`` of the auxiliary outputs.
        nu: How fast they fall, at least 0; 1 to 2 is advised, 0 weighs all alike.

    Returns:
        A weight in [0.01, 1] for each.

    Raises:
        ValueError: If nu is negative or not finite.
    """
    if not 0 <= nu < math.inf:
        raise ValueError(
            f"nu is {nu}; it should be at least 0 and finite: the weights of shallow outputs are"
            " (L_k / L_K)^nu."
        )
    return [max(0.01, (layer / max(layers)) ** nu) for layer in layers]


def check(
    objectives: Objectives, outputs: Mapping[str, object], batch: Mapping[str, object]
) -> None:
    """Checks that each objective has its output and its target.

    Args:
        objectives: Objectives by name.
        outputs: The outputs that exist.
        batch: The targets that exist.

    Raises:
        ValueError: If there is no objective, or one names an output or a target that is not there.
    """
    if not objectives:
        raise ValueError("There is no objective; give config.objectives at least one.")
    for name, objective in objectives.items():
        for kind, key, known in (
            ("output", objective.output, outputs),
            ("target", objective.target, batch),
        ):
            if key not in known:
                raise ValueError(
                    f"The objective '{name}' is on the {kind} '{key}', which does not"
                    f" exist.{nearest(key, known)}"
                )
