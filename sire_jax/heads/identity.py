"""An endpoint that is an output as it is."""

from flax import linen as nn
from jax import Array


class Identity(nn.Module):
    """Returns its endpoint, without parameters: the digits of the pairs system.

    >>> import jax.numpy as jnp
    >>> Identity(endpoints=("digits",)).apply({}, jnp.ones((3, 2, 10))).shape
    (3, 2, 10)

    Attributes:
        endpoints: The one endpoint.
    """

    endpoints: tuple[str]

    def __call__(self, features: Array, *, train: bool = False) -> Array:
        """Returns ``features``."""
        return features
