"""A classifier of several outputs or features together."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.settings import check_widths
from sire_jax.layers import he_normal, uniform_fan_in


class Combination(nn.Module):
    """Concatenates features and outputs, and classifies them by dense layers.

    Attached to ``"pooled"`` and branches without a loss of their own it is *GapCatNoSSAL*; to
    ``"main"`` and a branch, with 2,048 hidden units, *CatFCNoSSAL* (Palacio et al., Section 4.3).

    >>> import jax
    >>> head = Combination(endpoints=("early", "late"), classes=10)
    >>> features = jnp.ones((2, 4, 4, 8)), jnp.ones((2, 16))
    >>> jax.eval_shape(head.init_with_output, jax.random.key(0), *features)[0].shape
    (2, 10)

    Attributes:
        endpoints: What it concatenates: endpoints, ``"main"``, or heads.
        classes: Number of classes.
        hidden: Widths of dense layers with ReLU before the last one.

    Raises:
        ValueError: If there are no endpoints, or a width is below 1.
    """

    endpoints: tuple[str, ...]
    classes: int
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_widths("Combination: classes", self.classes)
        check_widths("Combination: hidden", *self.hidden)
        if not self.endpoints:
            raise ValueError("A Combination has no endpoints; it should have at least one.")
        super().__post_init__()

    @nn.compact
    def __call__(self, *features: Array, train: bool = False) -> Array:
        """Maps each ``[b, …, c]``, averaged over what is between, to logits ``[b, classes]``."""
        pooled = [x.mean(tuple(range(1, x.ndim - 1))).astype(jnp.float32) for x in features]
        x = jnp.concatenate(pooled, -1)
        for i, width in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(width, kernel_init=he_normal, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, kernel_init=uniform_fan_in, name="output")(x)
