"""Metrics as sums and counts, which add up exactly over batches, devices and machines."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


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
        """Sums values ``[b, …]``, all or those of the examples where ``mask`` (``[b]``) is 1."""
        values = values.astype(jnp.float32).reshape(values.shape[0], -1)
        mask = jnp.ones(values.shape[0], jnp.float32) if mask is None else mask
        # Not values * mask: what is masked may be infinite.
        kept = jnp.where(mask[:, None] > 0, values, 0.0)
        return cls(total=kept.sum(), count=mask.sum() * values.shape[1])

    def mean(self) -> Array:
        """Returns total / count, NaN where nothing was counted."""
        return self.total / self.count


Metrics = dict[str, Average]


def add(a: Metrics, b: Metrics) -> Metrics:
    """Merges the metrics of two batches."""
    return jax.tree.map(jnp.add, a, b)


def is_classification(output: jax.ShapeDtypeStruct | Array, target: Array) -> bool:
    """Tells whether an output holds logits of classes: its target is integers with one axis less.

    An output ``[b, 1]`` with targets ``[b]`` is the one logit of a binary choice.
    """
    integers = jnp.issubdtype(target.dtype, jnp.integer)
    return bool(integers and output.shape[:-1] == target.shape)


def class_logits(logits: Array) -> Array:
    """Returns logits with a value per class: ``[…, 1]``, of a binary choice, becomes ``[…, 2]``."""
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def top_k(logits: Array, labels: Array, k: int) -> Array:
    """Tells for each example whether the label is among the k largest logits.

    Args:
        logits: ``[b, …, classes]``.
        labels: ``[b, …]``, integers in [0, classes).
        k: How many guesses count, at least 1.

    Returns:
        ``[b, …]``, booleans. Of equal logits the class with the smaller index counts as larger.
    """
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    before = jnp.arange(logits.shape[-1]).reshape((1,) * labels.ndim + (-1,)) < labels[..., None]
    larger = (logits > right) | ((logits == right) & before)
    # Not a number compares false with everything: without this it would count as right.
    return (larger.sum(-1) < k) & ~jnp.isnan(logits).any(-1)


def classification(prefix: str, logits: Array, labels: Array, mask: Array | None = None) -> Metrics:
    """Measures top-1 accuracy, and top-5 where there are more than five classes.

    Args:
        prefix: Start of the names.
        logits: ``[b, …, classes]``, or ``[b, 1]`` of a binary choice.
        labels: Integers, ``[b, …]``.
        mask: ``[b]``, 1 for the examples that count.

    Returns:
        ``{"<prefix>/top_1": …, "<prefix>/top_5": …}``, values in [0, 1].
    """
    logits = class_logits(logits)
    ks = (1, 5) if logits.shape[-1] > 5 else (1,)
    return {f"{prefix}/top_{k}": Average.of(top_k(logits, labels, k), mask) for k in ks}


def means(metrics: Mapping[str, Average]) -> dict[str, Array]:
    """Divides all metrics."""
    return {name: metric.mean() for name, metric in metrics.items()}
