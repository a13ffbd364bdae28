"""Layers whose training step is fast on a CPU, inside loops and under ``vmap`` as outside."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from sire_jax.layers.convolution import at_least_float32, convolve
from sire_jax.layers.normalization import broadcast_along

# The default of PyTorch's layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the pairs system comes from
# there, and shallow networks without batch norm are sensitive to it.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# Keeps the variance through a layer with ReLU, N(0, 2 / fan_in) (He et al., 2015, Eq. 10); the
# kernel of a transposed convolution has its inputs last.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
he_normal_transposed = nn.initializers.variance_scaling(
    2.0, "fan_in", "normal", in_axis=-1, out_axis=-2
)
Initializer = Callable[..., Array]


def _check_floating(x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"A convolution is given {x.dtype} values; scale images to floats first.")


class Conv(nn.Module):
    """A convolution, in the dtype of its input; parameters are float32.

    >>> layer, x = Conv(8, 3, padding=1), jnp.ones((2, 4, 4, 3))
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4, 4, 8)

    Attributes:
        features: Output channels.
        kernel_size: Side of the square kernel, in pixels.
        padding: Zeros around the image, in pixels.
        stride: Pixels from one window to the next.
        use_bias: Whether to add a bias.
        kernel_init: Initializer of the kernel.
        images_last: Whether images are ``[c, h, w, b]`` rather than ``[b, h, w, c]``.

    Raises:
        ValueError: If there are no features, or the padding is negative.
    """

    features: int
    kernel_size: int = 3
    padding: int = 0
    stride: int = 1
    use_bias: bool = True
    kernel_init: Initializer = uniform_fan_in
    images_last: bool = False

    def __post_init__(self) -> None:
        if self.features < 1 or self.padding < 0:
            raise ValueError(
                f"A convolution has a width of {self.features} and padding {self.padding}; they"
                " should be at least 1 and at least 0."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h', w', features]``, or likewise with images last.

        Raises:
            ValueError: If the values are no floats, or the images are smaller than the kernel.
        """
        _check_floating(x)
        if min(x.shape[1:3]) + 2 * self.padding < self.kernel_size:
            raise ValueError(
                f"Features of {x.shape[1]} x {x.shape[2]} are too small for a kernel of"
                f" {self.kernel_size} x {self.kernel_size}; take larger images, or more padding."
            )
        axis = 0 if self.images_last else -1
        shape = (self.kernel_size, self.kernel_size, x.shape[axis], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        y = convolve(x, kernel, self.padding, self.stride, self.images_last)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return y + broadcast_along(bias.astype(x.dtype), y, axis)


class TransposedConv(nn.Module):
    """The transpose of a convolution that keeps the size of images (Dumoulin and Visin, 2016).

    ``y[n, i, j, o] = sum_{u, v, c} kernel[u, v, o, c] x[n, i - u + p, j - v + p, c]``, with
    ``p = (k - 1) / 2``: the kernel is that of the convolution from ``features`` channels that this
    one reads backwards.

    >>> layer, x = TransposedConv(3, 3), jnp.ones((2, 4, 4, 8))
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4, 4, 3)

    Attributes:
        features: Output channels.
        kernel_size: Side of the square kernel, in pixels, odd.
        use_bias: Whether to add a bias.
        kernel_init: Initializer of the kernel ``[k, k, features, c]``.
    """

    features: int
    kernel_size: int = 3
    use_bias: bool = True
    kernel_init: Initializer = he_normal_transposed

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, features]``."""
        _check_floating(x)
        shape = (self.kernel_size, self.kernel_size, self.features, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
        y = convolve(x, flipped, self.kernel_size // 2)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return y + broadcast_along(bias.astype(x.dtype), y, -1)


def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """Hashes positions to 32 random bits each, for dropout only.

    A key is mixed into each position's number and the result scrambled, twice (``lowbias32``,
    Wellons, *Prospecting for hash functions*, 2018). Unlike ``jax.random.bits`` it becomes part of
    the loop that uses it: a quarter of a small network's training step, and of its compilation, is
    saved on a CPU. It is the same under ``vmap``. Don't use it where quality matters.

    Args:
        key: A random key.
        shape: Shape of the result.

    Returns:
        uint32, of that shape.
    """
    data = jax.random.key_data(key).reshape(-1).astype(jnp.uint32)
    bits = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    for word in (data[0], data[-1]):
        bits = bits ^ word
        bits = (bits ^ (bits >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
        bits = bits ^ (bits >> jnp.uint32(16))
    return bits


class Dropout(nn.Module):
    """Sets a share of the values to 0 and scales the others up (Srivastava et al., 2014).

    >>> x = jnp.ones(8)
    >>> Dropout(0.5).apply({}, x, train=False).tolist() == x.tolist()
    True

    Attributes:
        rate: The share, in [0, 1).
        counted: The order of the axes in which values have numbers, from which is drawn what to
            drop; as they are if it is empty.

    Raises:
        ValueError: If the rate is out of its range.
    """

    rate: float
    counted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"A dropout rate is {self.rate}; it should be in [0, 1).")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Drops values of ``x`` when training, under the random key ``dropout``."""
        if not train or self.rate == 0:
            return x
        order = self.counted or tuple(range(x.ndim))
        bits = random_bits(self.make_rng("dropout"), tuple(x.shape[axis] for axis in order))
        bits = bits.transpose(np.argsort(order))
        # A rate just below 1 rounds to 2^32, which is no uint32.
        mask = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(mask, x / (1 - self.rate), 0.0)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate that is computed from the means of all.

    ``y = s x``, ``s = sigmoid(W_2 relu(W_1 z))``, ``z`` the means over all pixels (Hu et al., 2018,
    Section 3, Eqs. 2 to 4), without biases, which they found better in residual networks. The gates
    are computed in float32.

    >>> layer, x = SqueezeExcitation(4), jnp.ones((2, 4, 4, 8))
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4, 4, 8)

    Attributes:
        reduction: r: ``W_1`` leads from c channels to ``c // r``, at least 1.

    Raises:
        ValueError: If the reduction is below 1.
    """

    reduction: int = 16

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(
                f"The reduction of a SqueezeExcitation is {self.reduction}; it should be at least"
                " 1."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to the same shape.

        Raises:
            ValueError: If there are fewer channels than ``reduction``.
        """
        channels = x.shape[-1]
        if channels < self.reduction:
            raise ValueError(
                f"A SqueezeExcitation can't reduce {channels} channels {self.reduction} times; its"
                f" reduction should be at most {channels}."
            )
        z = x.astype(at_least_float32(x.dtype)).mean((1, 2))
        reduce = nn.Dense(
            channels // self.reduction, use_bias=False, kernel_init=he_normal, name="reduce"
        )
        expand = nn.Dense(channels, use_bias=False, name="expand")
        gates = nn.sigmoid(expand(nn.relu(reduce(z))))
        return x * gates.astype(x.dtype)[:, None, None]
