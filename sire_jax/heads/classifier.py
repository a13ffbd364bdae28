"""Classifiers at the depth of their endpoint."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from sire_jax.backbones.blocks import Unit
from sire_jax.backbones.settings import check_widths
from sire_jax.layers import BatchNorm, Dropout, he_normal, uniform_fan_in


class Classifier(nn.Module):
    """Global average pooling, where there is something to pool, and a dense layer.

    >>> import jax
    >>> head, features = Classifier(endpoints=("middle",), classes=10), jnp.ones((2, 4, 4, 8))
    >>> jax.eval_shape(head.init_with_output, jax.random.key(0), features)[0].shape
    (2, 10)

    Attributes:
        endpoints: The one endpoint that it classifies.
        classes: Number of classes.
        normalize: Whether batch norm and ReLU come first, as features without activation need.
        detached: Whether no gradient flows to the features: a probe, which leaves them as they are.
    """

    endpoints: tuple[str]
    classes: int
    normalize: bool = False
    detached: bool = False

    def __post_init__(self) -> None:
        check_widths("Classifier: classes", self.classes)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: Array, *, train: bool = False) -> Array:
        """Maps ``[b, c]`` or ``[b, …, c]`` to logits ``[b, classes]``, float32."""
        features = lax.stop_gradient(features) if self.detached else features
        if self.normalize:
            features = nn.relu(BatchNorm(name="norm")(features, train=train))
        pooled = features.mean(tuple(range(1, features.ndim - 1)))
        # As a backbone's own output begins.
        output = nn.Dense(self.classes, kernel_init=uniform_fan_in, name="output")
        return output(pooled.astype(jnp.float32))


class ConvolutionalClassifier(nn.Module):
    """The auxiliary classifier of GoogLeNet, with batch norm (Szegedy et al., 2015, Section 5).

    5 x 5 average pooling of stride 3 (of features larger than 4 x 4), a 1 x 1 convolution with
    batch norm and ReLU, a dense layer with ReLU, dropout, and a dense layer.

    >>> import jax
    >>> head = ConvolutionalClassifier(("stage_4_block_1",), classes=10)
    >>> features = jnp.ones((2, 14, 14, 512))
    >>> logits, variables = jax.eval_shape(head.init_with_output, jax.random.key(0), features)
    >>> logits.shape, variables["params"]["hidden"]["kernel"].shape  # 4 x 4 pixels of 128 channels
    ((2, 10), (2048, 1024))

    Attributes:
        endpoints: The one endpoint that it classifies.
        classes: Number of classes.
        width: Output channels of the convolution.
        hidden: Width of the hidden dense layer.
        dropout: Share of the hidden units that training drops, in [0, 1).
    """

    endpoints: tuple[str]
    classes: int
    width: int = 128
    hidden: int = 1024
    dropout: float = 0.7

    def __post_init__(self) -> None:
        for name in ("classes", "width", "hidden"):
            check_widths(f"ConvolutionalClassifier: {name}", getattr(self, name))
        super().__post_init__()

    @nn.compact
    def __call__(self, features: Array, *, train: bool = False) -> Array:
        """Maps ``[b, h, w, c]`` to logits ``[b, classes]``, float32."""
        x = features
        if min(x.shape[1:3]) > 4:
            window, strides = (1, 5, 5, 1), (1, 3, 3, 1)
            # NumPy's zero: of a sum from a traced one JAX has no gradient.
            x = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, window, strides, "VALID") / 25
        x = nn.relu(Unit(self.width, 1, name="unit")(x, train=train)).reshape(len(x), -1)
        x = nn.Dense(self.hidden, kernel_init=he_normal, dtype=x.dtype, name="hidden")(x)
        x = Dropout(self.dropout)(nn.relu(x), train=train)
        # As a backbone's own output begins.
        output = nn.Dense(self.classes, kernel_init=uniform_fan_in, name="output")
        return output(x.astype(jnp.float32))
