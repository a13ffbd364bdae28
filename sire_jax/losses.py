"""Losses: how far an output is from its target, a value for each example.

A label outside of its classes has no meaning: losses of it are not a number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sire_jax.metrics import at_label, is_label

Loss = Callable[[Array, Array], Array]


def sum_positions(values: Array) -> Array:
    """Sums ``[b, …]`` over all axes but the first."""
    return values.reshape(values.shape[0], -1).sum(-1)


def _one_logit(logit: Array) -> Array:
    if logit.ndim != 2 or logit.shape[1] != 1:
        raise ValueError(f"A binary loss needs one logit, [b, 1]; the output is {logit.shape}.")
    return logit[:, 0]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross entropy of integer labels, summed over the positions of an example.

    ``loss = -sum_i log softmax(logits_i)[labels_i]``

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> cross_entropy(logits, jnp.array([1])).round(4)  # -log 0.25
    Array([1.3863], dtype=float32)

    Args:
        logits: ``[b, …, classes]``.
        labels: ``[b, …]``, integers in [0, classes).

    Returns:
        ``[b]``; not a number where a label is outside of its classes.
    """
    inside = is_label(labels, logits.shape[-1])
    # Of a label outside any class serves: its loss is replaced.
    chosen = jnp.where(inside, labels.astype(jnp.int32), 0)
    values = optax.softmax_cross_entropy_with_integer_labels(logits, chosen)
    return sum_positions(jnp.where(inside, values, jnp.nan))


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """Cross entropy of labels that share some of their probability with all classes.

    ``loss = -sum_ij q_ij log softmax(logits_i)_j``, ``q = (1 - s) onehot(label) + s / classes``
    (Szegedy et al., *Rethinking the Inception Architecture*, 2016, Section 7)

    >>> loss = SmoothedCrossEntropy(smoothing=0.3)
    >>> loss(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([0])).round(4)
    Array([0.8318], dtype=float32)

    Attributes:
        smoothing: The share ``s``, in [0, 1).

    Raises:
        ValueError: If the smoothing is out of its range.
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"A label smoothing is {self.smoothing}; it should be at least 0 and below 1."
            )

    def __call__(self, logits: Array, labels: Array) -> Array:
        """Maps ``[b, …, classes]`` and integers ``[b, …]`` in [0, classes) to ``[b]``."""
        uniform = sum_positions(-jax.nn.log_softmax(logits).mean(-1))
        return (1 - self.smoothing) * cross_entropy(logits, labels) + self.smoothing * uniform


def negative_probability(logits: Array, labels: Array) -> Array:
    """The negative probability of the right class, summed over the positions of an example.

    ``loss = -sum_i softmax(logits_i)[labels_i]``. It is what the released pairs program calls cross
    entropy on the digits.

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> negative_probability(logits, jnp.array([0])).round(4)
    Array([-0.5], dtype=float32)

    Args:
        logits: ``[b, …, classes]``.
        labels: ``[b, …]``, integers in [0, classes).

    Returns:
        ``[b]``, at least minus the number of positions; not a number where a label is outside of
        its classes.
    """
    return -sum_positions(at_label(jax.nn.softmax(logits), labels))


def _probability(label: Array, dtype: Any) -> Array:
    """Returns labels as numbers; not a number where one is outside of [0, 1]."""
    return jnp.where((label >= 0) & (label <= 1), label.astype(dtype), jnp.nan)


def binary_cross_entropy(logit: Array, label: Array) -> Array:
    """Cross entropy of a label that is 0 or 1, of one logit.

    ``loss = -z log sigmoid(logit) - (1 - z) log(1 - sigmoid(logit))``
    (Peeters and Schlyter, Section II.A, where the sign is missing)

    >>> binary_cross_entropy(jnp.array([[0.0]]), jnp.array([1])).round(4)  # log 2
    Array([0.6931], dtype=float32)

    Args:
        logit: ``[b, 1]``.
        label: ``[b]``, 0 or 1, or a probability between.

    Returns:
        ``[b]``; not a number where a label is outside of [0, 1].

    Raises:
        ValueError: If there is not one logit.
    """
    return optax.sigmoid_binary_cross_entropy(_one_logit(logit), _probability(label, logit.dtype))


def binary_squared_error(logit: Array, label: Array) -> Array:
    """Squared error of a probability: ``(sigmoid(logit) - z)^2`` (Peeters and Schlyter, II.A).

    >>> binary_squared_error(jnp.array([[0.0]]), jnp.array([1]))
    Array([0.25], dtype=float32)

    Args:
        logit: ``[b, 1]``.
        label: ``[b]``, 0 or 1, or a probability between.

    Returns:
        ``[b]``, in [0, 1]; not a number where a label is outside of [0, 1].

    Raises:
        ValueError: If there is not one logit.
    """
    return (jax.nn.sigmoid(_one_logit(logit)) - _probability(label, logit.dtype)) ** 2


def mean_squared_error(output: Array, target: Array) -> Array:
    """Squared error, a mean over all that one example has.

    ``loss = 1/n sum_j (output_j - target_j)^2``

    >>> mean_squared_error(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]))
    Array([2.5], dtype=float32)

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


# Of one logit and a label that is 0 or 1.
BINARY = (binary_cross_entropy, binary_squared_error)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "negative_probability": negative_probability,
    "binary_cross_entropy": binary_cross_entropy,
    "binary_squared_error": binary_squared_error,
    "mean_squared_error": mean_squared_error,
}
# Those with settings, chosen by a section {"name": …, setting: value}.
LOSSES_WITH_SETTINGS = {"smoothed_cross_entropy": SmoothedCrossEntropy}
