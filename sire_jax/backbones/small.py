"""A small convolutional network for small images."""

from flax import linen as nn
from jax import Array

from sire_jax.backbones.settings import check_widths
from sire_jax.layers import Conv
from sire_jax.layers.pooling import max_pool

Endpoints = dict[str, Array]


class SmallCNN(nn.Module):
    """3 x 3 convolutions with ReLU, each but the last with 2 x 2 max pooling, and a classifier.

    >>> import jax, jax.numpy as jnp
    >>> network, image = SmallCNN(classes=10), jnp.zeros((2, 8, 8, 1))
    >>> logits, endpoints = jax.eval_shape(network.init_with_output, jax.random.key(0), image)[0]
    >>> logits.shape, {name: features.shape for name, features in endpoints.items()}
    ((2, 10), {'block_1': (2, 8, 8, 16), 'block_2': (2, 4, 4, 32)})

    Attributes:
        classes: Number of classes.
        channels: Output channels of the convolutions.
    """

    classes: int
    channels: tuple[int, ...] = (16, 32)

    def __post_init__(self) -> None:
        check_widths("SmallCNN: classes", self.classes)
        check_widths("SmallCNN: channels", *self.channels)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Endpoints]:
        """Maps ``[b, h, w, c]`` to ``[b, classes]`` and the endpoints ``block_1`` and so on."""
        x, endpoints = image, {}
        for i, width in enumerate(self.channels, start=1):
            x = nn.relu(Conv(width, padding=1, name=f"conv_{i}")(x))
            endpoints[f"block_{i}"] = x
            if i < len(self.channels):
                x = max_pool(x)
        return nn.Dense(self.classes, name="output")(x.mean((1, 2))), endpoints
