"""Layers for small networks, with the images of a batch in the last axis: ``[c, h, w, b]``.

With the batch last, all that a small convolutional network does between matrix products (patches,
pooling, batch norm) runs along contiguous memory. On two CPU cores this and the gradients below
make a training step of the pairs network several times as fast as the same network from stock
layers in ``[b, h, w, c]`` (``benchmarks/pairs.py``).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

# The default of PyTorch's layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the pairs system comes from
# there, and shallow networks without batch norm are sensitive to it.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Values of stacked views up to which they beat XLA's convolution on a CPU (4 MiB).
_CACHED = 2**20


def _patches(x: Array, size: int) -> Array:
    """Stacks the shifted views: ``[c, h, w, b] -> [size * size * c, h', w', b]``."""
    _, height, width, _ = x.shape
    rows, columns = height - size + 1, width - size + 1
    shifts = [x[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=0)


def _convolve_by_patches(x: Array, kernel: Array, padding: int) -> Array:
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    views = _patches(x, kernel.shape[0])
    depth, *spatial = views.shape
    return _product(kernel.reshape(depth, -1), views.reshape(depth, -1)).reshape(-1, *spatial)


@jax.custom_vjp
def _product(a: Array, b: Array) -> Array:
    """Multiplies ``[k, m]``, transposed, and ``[k, n]``."""
    return a.T @ b


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    # The derived gradient is (dy @ b.T).T, for which XLA's CPU kernels take up to 1.7 times as long.
    a, b = saved
    return b @ dy.T, a @ dy


_product.defvjp(lambda a, b: (_product(a, b), (a, b)), _product_backward)


def convolve(x: Array, kernel: Array, padding: int) -> Array:
    """Convolves images with a square kernel at stride 1 (a cross-correlation, as in all libraries).

    ``y[o, i, j, n] = sum_{u, v, c} kernel[u, v, c, o] x[c, i + u, j + v, n]``

    On a CPU, while the k x k shifted views fit in its caches, they are stacked for one matrix
    product; beyond that, and on accelerators, XLA's own convolution is faster.

    Args:
        x: Images ``[c, h, w, b]``.
        kernel: Weights ``[k, k, c, o]``.
        padding: Zeros put around the image, in pixels.

    Returns:
        ``[o, h + 2 padding - k + 1, w + 2 padding - k + 1, b]``.
    """
    size = kernel.shape[0]
    if jax.default_backend() == "cpu" and x.size * size * size <= _CACHED:
        return _convolve_by_patches(x, kernel, padding)
    layout = ("CHWN", "HWIO", "CHWN")
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=layout)


class Conv(nn.Module):
    """A biased convolution at stride 1 on ``[c, h, w, b]``.

    Attributes:
        features: Output channels.
        kernel_size: Side of the square kernel, in pixels.
        padding: Zeros around the image, in pixels.
    """

    features: int
    kernel_size: int = 3
    padding: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[c, h, w, b]`` to ``[features, h', w', b]``."""
        shape = (self.kernel_size, self.kernel_size, x.shape[0], self.features)
        kernel = self.param("kernel", uniform_fan_in, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return convolve(x, kernel, self.padding) + bias[:, None, None, None]


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

    Attributes:
        rate: The share, in [0, 1).
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"A dropout rate is {self.rate}; it should be in [0, 1).")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Drops values of ``x`` when training, under the random key ``dropout``."""
        if not train or self.rate == 0:
            return x
        bits = random_bits(self.make_rng("dropout"), x.shape)
        kept = bits >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(kept, x / (1 - self.rate), 0.0)


def max_pool(x: Array) -> Array:
    """Takes the largest value of each 2 x 2 window: ``[c, h, w, b] -> [c, h // 2, w // 2, b]``.

    Two pairwise maxima instead of a window reduction, whose gradient is slow on a CPU. Where values
    tie, the gradient is shared between them. An odd last row or column is dropped.
    """
    channels, height, width, images = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(channels, height // 2, 2, -1, images)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    x = x.reshape(channels, height // 2, width // 2, 2, images)
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def _broadcast(vector: Array, x: Array, axis: int) -> Array:
    shape = [1] * x.ndim
    shape[axis] = -1
    return vector.reshape(shape)


def _other_axes(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Array, scale: Array, bias: Array, axis: int, epsilon: float
) -> tuple[Array, Array, Array]:
    """Normalizes over all axes but one, with a gradient in two sums and one pass.

    ``y = scale (x - mean) / sqrt(variance + epsilon) + bias`` (Ioffe and Szegedy, 2015, Alg. 1)

    Args:
        x: Features, any rank; float32.
        scale: ``[c]``.
        bias: ``[c]``.
        axis: The axis of ``x`` that has the c channels.
        epsilon: Added to the variance.

    Returns:
        ``y`` like ``x``; the mean and the (biased) variance, ``[c]``, for running averages only:
        no gradient flows through these two.
    """
    return _normalize_forward(x, scale, bias, axis, epsilon)[0]


def _normalize_forward(
    x: Array, scale: Array, bias: Array, axis: int, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    axes = _other_axes(x, axis)
    mean = x.mean(axes)
    variance = jnp.maximum((x * x).mean(axes) - mean * mean, 0.0)
    inverse = lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    offset = bias - mean * slope
    y = x * _broadcast(slope, x, axis) + _broadcast(offset, x, axis)
    return (y, mean, variance), (x, scale, mean, inverse)


def _normalize_backward(
    axis: int, epsilon: float, saved: tuple[Array, ...], cotangents: tuple[Array, ...]
) -> tuple[Array, Array, Array]:
    # dx = scale inverse (dy - mean(dy) - normalized mean(dy normalized)) written as a dy + b x + c,
    # two sums and one pass, where the derived gradient takes several.
    x, scale, mean, inverse = saved
    dy = cotangents[0]
    axes = _other_axes(x, axis)
    count = x.size // x.shape[axis]
    dbias = dy.sum(axes)
    dscale = inverse * ((dy * x).sum(axes) - mean * dbias)
    a = scale * inverse
    b = -a * dscale * inverse / count
    c = -a * dbias / count - b * mean
    dx = _broadcast(a, x, axis) * dy + _broadcast(b, x, axis) * x + _broadcast(c, x, axis)
    return dx, dscale, dbias


normalize.defvjp(_normalize_forward, _normalize_backward)


class BatchNorm(nn.Module):
    """Batch normalization over all axes but one (Ioffe and Szegedy, 2015).

    Attributes:
        axis: The axis with the channels.
        momentum: What a step keeps of the running averages; 0.9 is PyTorch's 0.1.
        epsilon: Added to the variance.
    """

    axis: int = 0
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Normalizes ``x`` with its own statistics (``train``) or with the running averages."""
        channels = (x.shape[self.axis],)
        scale = self.param("scale", nn.initializers.ones_init(), channels)
        bias = self.param("bias", nn.initializers.zeros_init(), channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        if not train:
            slope = scale * lax.rsqrt(variance.value + self.epsilon)
            offset = bias - mean.value * slope
            return x * _broadcast(slope, x, self.axis) + _broadcast(offset, x, self.axis)
        y, batch_mean, batch_variance = normalize(x, scale, bias, self.axis, self.epsilon)
        if not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * lax.stop_gradient(batch_mean)
            variance.value = keep * variance.value + (1 - keep) * lax.stop_gradient(batch_variance)
        return y
