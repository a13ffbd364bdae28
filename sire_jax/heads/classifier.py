"""A classifier at the depth of its endpoint."""

from flax import linen as nn
from jax import Array


class Classifier(nn.Module):
    """Global average pooling, where there is something to pool, and a dense layer.

    Attributes:
        endpoints: The one endpoint that it classifies.
        classes: Number of classes.
    """

    endpoints: tuple[str, ...]
    classes: int

    @nn.compact
    def __call__(self, features: Array, *, train: bool = False) -> Array:
        """Maps ``[b, c]`` or ``[b, …, c]`` to logits ``[b, classes]``."""
        pooled = features.mean(tuple(range(1, features.ndim - 1)))
        return nn.Dense(self.classes, name="output")(pooled)
