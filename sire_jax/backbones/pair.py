"""Networks that compare two digits.

Peeters and Schlyter, *Classification, weight sharing, auxiliary losses*. Each network maps pairs of
images ``[b, 2, h, w, 1]`` to the logit of "the first digit is less than or equal to the second",
``[b, 1]``. The report leaves open where batch norm, dropout and softmax stand; what is built here
is written at each class.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.settings import check_widths
from sire_jax.layers import BatchNorm, Conv, Dropout, uniform_fan_in
from sire_jax.layers.convolution import prefers_images_last
from sire_jax.layers.pooling import max_pool

Endpoints = dict[str, Array]
# From [b, h, w, c] to [c, h, w, b].
_IMAGES_LAST = (3, 1, 2, 0)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=uniform_fan_in, name=name)


class PairDense(nn.Module):
    """Both images flattened and concatenated, dense layers with ReLU (Section III.A).

    >>> network, pairs = PairDense(), jnp.zeros((3, 2, 14, 14, 1))
    >>> logits, endpoints = jax.eval_shape(network.init_with_output, jax.random.key(0), pairs)[0]
    >>> logits.shape, endpoints["hidden_1"].shape
    ((3, 1), (3, 64))

    Attributes:
        hidden: Widths of the hidden layers.
        dropout: Share of a hidden layer's units that training drops, in [0, 1).
    """

    hidden: tuple[int, ...] = (64, 32)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_widths("PairDense: hidden", *self.hidden)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Endpoints]:
        """Maps ``[b, 2, h, w, 1]`` to ``[b, 1]`` and the endpoints ``hidden_1`` and so on."""
        x = image.reshape(image.shape[0], -1)
        endpoints = {}
        for i, width in enumerate(self.hidden, start=1):
            x = nn.relu(_dense(width, f"hidden_{i}")(x))
            endpoints[f"hidden_{i}"] = x
            x = Dropout(self.dropout)(x, train=train)
        return _dense(1, "output")(x), endpoints


class ConvolutionalFeatures(nn.Module):
    """Convolutions, each with max pooling, then dense layers (Section III.B).

    Batch norm stands between a convolution and its pooling and between a dense layer and its ReLU;
    dropout comes last. The output layer has neither. The report has no activation after
    convolutions, and found ReLU to be no better.

    Attributes:
        outputs: Width of the output layer.
        channels: Output channels of the 3 x 3 convolutions.
        hidden: Width of the dense layer with ReLU.
        padding: Zeros around the images, in pixels; the report has none.
        batch_norm: Whether hidden layers have batch norm.
        convolution_dropout: Dropout after a convolution, in [0, 1).
        dropout: Dropout after the hidden dense layer, in [0, 1).
        relu: Whether convolutions have ReLU.
    """

    outputs: int
    channels: tuple[int, ...] = (16, 16)
    hidden: int = 32
    padding: int = 0
    batch_norm: bool = True
    convolution_dropout: float = 0.0
    dropout: float = 0.0
    relu: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, outputs]``."""
        last = prefers_images_last(x)
        x = jnp.transpose(x, _IMAGES_LAST) if last else x
        for i, width in enumerate(self.channels, start=1):
            x = Conv(width, padding=self.padding, images_last=last, name=f"conv_{i}")(x)
            if self.batch_norm:
                x = BatchNorm(axis=0 if last else -1, name=f"conv_{i}_norm")(x, train=train)
            # Ahead of max pooling or behind, it is the same.
            x = max_pool(nn.relu(x) if self.relu else x)
            # The same values are dropped in either layout.
            counted = () if last else _IMAGES_LAST
            x = Dropout(self.convolution_dropout, counted)(x, train=train)
        # A channel after the other, in either layout.
        x = x.reshape(-1, x.shape[-1]).T if last else x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        x = _dense(self.hidden, "hidden")(x)
        if self.batch_norm:
            x = BatchNorm(name="hidden_norm")(x, train=train)
        x = Dropout(self.dropout)(nn.relu(x), train=train)
        return _dense(self.outputs, "output")(x)


class ResidualFeatures(nn.Module):
    """Convolution, two residual blocks, max pool, two residual blocks, dense (Section III.F).

    Attributes:
        outputs: Width of the output layer.
        channels: Channels of every convolution.
        hidden: Width of the dense layer with ReLU; 50 in the report, 32 in the released program.
        dropout: Dropout after the hidden dense layer, in [0, 1).
        residual: Whether blocks add their input before the last ReLU; without, *Resless*.
    """

    outputs: int
    channels: int = 32
    hidden: int = 50
    dropout: float = 0.0
    residual: bool = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, outputs]``."""
        # Its maps are too large for the layout with images last to pay off.
        x = nn.relu(Conv(self.channels, padding=1, name="stem")(x))
        for i in (1, 2, 3, 4):
            x = self._block(x, f"block_{i}", train)
            if i == 2:
                x = max_pool(x)
        x = nn.relu(_dense(self.hidden, "hidden")(x.reshape(len(x), -1)))
        x = Dropout(self.dropout)(x, train=train)
        return _dense(self.outputs, "output")(x)

    def _block(self, x: Array, name: str, train: bool) -> Array:
        y = Conv(self.channels, padding=1, name=f"{name}_conv_1")(x)
        y = nn.relu(BatchNorm(name=f"{name}_norm_1")(y, train=train))
        y = Conv(self.channels, padding=1, name=f"{name}_conv_2")(y)
        y = BatchNorm(name=f"{name}_norm_2")(y, train=train)
        return nn.relu(y + x if self.residual else y)


class PairConvolutional(nn.Module):
    """Both images as two channels of one (Section III.B).

    >>> network, pairs = PairConvolutional(), jnp.zeros((3, 2, 14, 14, 1))
    >>> logits, endpoints = jax.eval_shape(network.init_with_output, jax.random.key(0), pairs)[0]
    >>> logits.shape, endpoints
    ((3, 1), {})

    Attributes:
        batch_norm: Whether hidden layers have batch norm.
        convolution_dropout: Dropout after a convolution, in [0, 1).
        dropout: Dropout after the hidden dense layer, in [0, 1).
        padding: Zeros around the images, in pixels.
        relu: Whether convolutions have ReLU.
    """

    batch_norm: bool = False
    convolution_dropout: float = 0.0
    dropout: float = 0.0
    padding: int = 0
    relu: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Endpoints]:
        """Maps ``[b, 2, h, w, 1]`` to ``[b, 1]``; there are no endpoints."""
        features = ConvolutionalFeatures(
            outputs=1,
            batch_norm=self.batch_norm,
            convolution_dropout=self.convolution_dropout,
            dropout=self.dropout,
            padding=self.padding,
            relu=self.relu,
            name="features",
        )
        return features(jnp.moveaxis(image[..., 0], 1, -1), train=train), {}


class PairBranches(nn.Module):
    """``f(g_1(a), g_2(b))``, or with shared weights ``f(g(a), g(b))`` (Section III.D-F).

    ``g`` ends in 10 logits; ``f`` sees their softmax, is dense with one hidden layer and ReLU, and
    has the dropout of a dense layer. The logits are the endpoint ``digits``.

    >>> network, pairs = PairBranches(shared=True), jnp.zeros((3, 2, 14, 14, 1))
    >>> logits, endpoints = jax.eval_shape(network.init_with_output, jax.random.key(0), pairs)[0]
    >>> logits.shape, endpoints["digits"].shape
    ((3, 1), (3, 2, 10))

    Attributes:
        shared: Whether both images go through the same ``g``.
        branch: ``"convolutional"`` (Section III.D) or ``"residual"`` (III.F).
        outputs: Width of the output of ``g``.
        hidden: Width of the hidden layer of ``f``.
        convolution_dropout: Dropout after a convolution of the convolutional branch, in [0, 1).
        dropout: Dropout after a hidden dense layer, in [0, 1).
        padding: Zeros around the images of the convolutional branch, in pixels.
        residual: Whether the blocks of the residual branch add their input.
        residual_hidden: Width of the hidden dense layer of the residual branch.
        batch_norm: Whether the convolutional branch has batch norm.
        relu: Whether the convolutions of the convolutional branch have ReLU.

    Raises:
        ValueError: If there is no such branch, or a width is below 1.
    """

    shared: bool = True
    branch: str = "convolutional"
    outputs: int = 10
    hidden: int = 20
    convolution_dropout: float = 0.1
    dropout: float = 0.5
    padding: int = 0
    residual: bool = True
    residual_hidden: int = 50
    batch_norm: bool = True
    relu: bool = False

    def __post_init__(self) -> None:
        if self.branch not in ("convolutional", "residual"):
            raise ValueError(f"branch is {self.branch!r}; it can be 'convolutional' or 'residual'.")
        for name in ("outputs", "hidden", "residual_hidden"):
            check_widths(f"PairBranches: {name}", getattr(self, name))
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Endpoints]:
        """Maps ``[b, 2, h, w, 1]`` to ``[b, 1]`` and ``{"digits": [b, 2, outputs]}``."""
        pairs, _, height, width, channels = image.shape
        if self.shared:
            # One call for both images: batch norm sees twice as many of them.
            images = image.reshape(2 * pairs, height, width, channels)
            digits = self._branch("branch")(images, train=train)
            digits = digits.reshape(pairs, 2, self.outputs)
        else:
            logits = [self._branch(f"branch_{i + 1}")(image[:, i], train=train) for i in (0, 1)]
            digits = jnp.stack(logits, axis=1)
        x = jax.nn.softmax(digits).reshape(pairs, -1)
        x = nn.relu(_dense(self.hidden, "hidden")(x))
        x = Dropout(self.dropout)(x, train=train)
        return _dense(1, "output")(x), {"digits": digits}

    def _branch(self, name: str) -> Any:
        if self.branch == "residual":
            return ResidualFeatures(
                self.outputs,
                hidden=self.residual_hidden,
                dropout=self.dropout,
                residual=self.residual,
                name=name,
            )
        return ConvolutionalFeatures(
            self.outputs,
            padding=self.padding,
            batch_norm=self.batch_norm,
            convolution_dropout=self.convolution_dropout,
            dropout=self.dropout,
            relu=self.relu,
            name=name,
        )
