"""Metrics as sums and counts, which add up exactly over batches, devices and machines."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "Average",
    "Metrics",
    "add",
    "at_label",
    "class_logits",
    "classification",
    "is_classification",
    "is_label",
    "means",
    "top_k",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Average:
    """A weighted mean that is still to be divided.

    Attributes:
        total: Sum of the values.
        count: Number of values.
    """

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> "Average":
        """Sums values.

        Args:
            values: ``[b, …]``.
            mask: What each counts, at least 0 (what is below, or not a number, is 0), ``[b]`` or
                with further axes of ``values``; all count 1 by default. What counts 0 may be
                anything, infinite, too.
        """
        values = values.astype(jnp.float32)
        mask = jnp.ones(values.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
        mask = mask.reshape(*mask.shape, *(1,) * (values.ndim - mask.ndim))
        weights = jnp.broadcast_to(jnp.where(mask > 0, mask, 0), values.shape)
        # Not values * weights alone: nothing times infinity is no number.
        weighted = jnp.where(weights > 0, values, 0.0) * weights
        return cls(total=weighted.sum(), count=weights.sum())

    def mean(self) -> Array:
        """Returns total / count, NaN where nothing was counted."""
        return self.total / self.count


Metrics = dict[str, Average]


def add(a: Metrics, b: Metrics) -> Metrics:
    """Merges the metrics of two batches.

    >>> batch = {"loss": Average(total=jnp.array(3.0), count=jnp.array(2.0))}
    >>> means(add(batch, batch))["loss"].item()
    1.5
    """
    return jax.tree.map(jnp.add, a, b)


def is_classification(output: jax.ShapeDtypeStruct | Array, target: Array) -> bool:
    """Tells whether an output can hold logits of classes: its target is integers, an axis less.

    An output ``[b, 1]`` with targets ``[b]`` is the one logit of a binary choice. Whether it does
    hold them, its loss says (``objectives.Objective.labelled``): integers can also be ages.
    """
    integers = jnp.issubdtype(target.dtype, jnp.integer) or target.dtype == bool
    return bool(integers and output.shape[:-1] == target.shape)


def is_label(labels: Array, classes: int) -> Array:
    """Tells which integers, or booleans, are labels: those in [0, classes).

    >>> is_label(jnp.array([0, 9, 10, -1]), 10).tolist()
    [True, True, False, False]
    """
    whole = labels.astype(jnp.int32)
    return (whole >= 0) & (whole < classes)


def at_label(values: Array, labels: Array) -> Array:
    """Looks up the value of each example's label.

    >>> at_label(jnp.array([[0.25, 0.75], [0.5, 0.5]]), jnp.array([1, 0])).tolist()
    [0.75, 0.5]

    Args:
        values: A value for each class, ``[b, …, classes]``.
        labels: Integers, ``[b, …]``.

    Returns:
        ``[b, …]``; not a number where the label is outside of [0, classes), on whichever side.
    """
    inside = is_label(labels, values.shape[-1])
    chosen = jnp.where(inside, labels.astype(jnp.int32), 0)[..., None]
    looked_up = jnp.take_along_axis(values, chosen, axis=-1)[..., 0]
    return jnp.where(inside, looked_up, jnp.nan)


def class_logits(logits: Array) -> Array:
    """Returns logits with a value per class: ``[…, 1]``, of a binary choice, becomes ``[…, 2]``.

    >>> class_logits(jnp.array([[2.0]])).tolist()  # one logit is a choice of two
    [[0.0, 2.0]]
    """
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def top_k(logits: Array, labels: Array, k: int) -> Array:
    """Tells for each example whether the label is among the k largest logits.

    >>> logits, labels = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), jnp.array([1, 2])
    >>> top_k(logits, labels, k=2)
    Array([ True, False], dtype=bool)

    Args:
        logits: ``[b, …, classes]``.
        labels: ``[b, …]``, integers; one outside of [0, classes) is never among them.
        k: How many guesses count, at least 1.

    Returns:
        ``[b, …]``, booleans. Of equal logits the class with the smaller index counts as larger.

    Raises:
        ValueError: If labels are no whole numbers, or not one for each row of logits.
    """
    if labels.dtype.kind not in "iub" or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Labels are {labels.dtype}{list(labels.shape)}; they should be whole numbers, one for"
            f" each of the logits {list(logits.shape)}."
        )
    right = at_label(logits, labels)[..., None]
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32).reshape((1,) * labels.ndim + (-1,))
    before = places < labels.astype(jnp.int32)[..., None]
    larger = (logits > right) | ((logits == right) & before)
    # Not a number compares false with everything: without this it would count as right.
    valid = is_label(labels, logits.shape[-1]) & ~jnp.isnan(logits).any(-1)
    return (larger.sum(-1) < k) & valid


def classification(prefix: str, logits: Array, labels: Array, mask: Array | None = None) -> Metrics:
    """Measures top-1 accuracy, and top-5 where there are more than five classes.

    >>> measured = classification("main", jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1]))
    >>> means(measured)["main/top_1"].item()
    0.5

    Args:
        prefix: Start of the names.
        logits: ``[b, …, classes]``, or ``[b, 1]`` of a binary choice.
        labels: Integers, ``[b, …]``.
        mask: What each label counts, ``[b]`` or ``[b, …]``, at least 0; 1 by default.

    Returns:
        ``{"<prefix>/top_1": …, "<prefix>/top_5": …}``, values in [0, 1].
    """
    logits = class_logits(logits)
    ks = (1, 5) if logits.shape[-1] > 5 else (1,)
    return {f"{prefix}/top_{k}": Average.of(top_k(logits, labels, k), mask) for k in ks}


def means(metrics: Mapping[str, Average]) -> dict[str, Array]:
    """Divides all metrics.

    >>> means({"loss": Average(total=jnp.array(3.0), count=jnp.array(2.0))})["loss"].item()
    1.5
    """
    return {name: metric.mean() for name, metric in metrics.items()}
