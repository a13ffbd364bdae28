"""Layers whose training step is fast on a CPU, inside loops and under ``vmap`` as outside.

XLA's CPU convolution is fast in one arrangement of its arguments and outside of loops only; its
gradients inside a loop over steps take 20 to 60 times as long, and ``vmap`` over seeds makes slow
grouped convolutions of it. Here a convolution on a CPU is shifted views and matrix products. On
accelerators it is XLA's.

Two layouts: ``[b, h, w, c]``, the usual one, and ``[c, h, w, b]``, images last, in which all that a
*small* network does between matrix products runs along contiguous memory: it takes half the time.
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

# Values of the shifted views that are made at once: 4 MiB, about what a core's caches hold.
_CACHED = 2**20


def _shifts(x: Array, size: int, first: int) -> list[Array]:
    """Returns the size x size shifted views of images, whose rows and columns are two axes."""
    rows, columns = (x.shape[axis] - size + 1 for axis in (first, first + 1))
    return [
        lax.slice_in_dim(
            lax.slice_in_dim(x, i, i + rows, axis=first), j, j + columns, axis=first + 1
        )
        for i in range(size)
        for j in range(size)
    ]


def _pad(x: Array, padding: int, first: int) -> Array:
    widths = [(padding, padding) if axis in (first, first + 1) else (0, 0) for axis in range(4)]
    return jnp.pad(x, widths) if padding else x


@jax.custom_vjp
def _product(a: Array, b: Array) -> Array:
    """Multiplies ``[k, m]``, transposed, and ``[k, n]``."""
    return a.T @ b


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    # The derived gradient is (dy @ b.T).T, which takes up to 1.7 times as long on a CPU.
    a, b = saved
    return b @ dy.T, a @ dy


_product.defvjp(lambda a, b: (_product(a, b), (a, b)), _product_backward)


def _images_last(x: Array, kernel: Array, padding: int) -> Array:
    """Convolves ``[c, h, w, b]`` by one matrix product."""
    size = kernel.shape[0]
    views = jnp.concatenate(_shifts(_pad(x, padding, 1), size, 1), axis=0)
    depth, *spatial = views.shape
    product = _product(kernel.reshape(depth, -1), views.reshape(depth, -1))
    return product.reshape(-1, *spatial)


def _chunks(x: Array, kernel: Array) -> Array:
    """Splits the images ``[b, h, w, c]`` so that the views of a chunk stay in cache."""
    images = len(x)
    most = max(1, _CACHED * images // (x.size * kernel.shape[0] ** 2))
    chunk = max(n for n in range(1, images + 1) if images % n == 0 and n <= most)
    return x.reshape(-1, chunk, *x.shape[1:])


def _views(x: Array, size: int) -> Array:
    """Stacks the shifted views of ``[b, h, w, c]`` as rows of a matrix, one for each pixel."""
    views = jnp.concatenate(_shifts(x, size, 1), axis=-1)
    return views.reshape(-1, views.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _chunked(x: Array, kernel: Array, padding: int) -> Array:
    """Convolves ``[b, h, w, c]`` by matrix products, a few images at a time."""
    size, _, _, features = kernel.shape
    x = _pad(x, padding, 1)
    matrix = kernel.reshape(-1, features)
    y = lax.map(lambda chunk: _views(chunk, size) @ matrix, _chunks(x, kernel))
    return y.reshape(len(x), x.shape[1] - size + 1, x.shape[2] - size + 1, features)


def _chunked_backward(padding: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    size = kernel.shape[0]
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    dx = _chunked(dy, flipped, size - 1 - padding)
    chunks = _chunks(_pad(x, padding, 1), kernel)
    dys = dy.reshape(len(chunks), -1, dy.shape[-1])

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _views(chunk[0], size).T @ chunk[1], None

    start = jnp.zeros((size * size * x.shape[-1], dy.shape[-1]), dy.dtype)
    dkernel, _ = lax.scan(add, start, (chunks, dys))
    return dx, dkernel.reshape(kernel.shape)


_chunked.defvjp(
    lambda x, kernel, padding: (_chunked(x, kernel, padding), (x, kernel)), _chunked_backward
)


def convolve(x: Array, kernel: Array, padding: int = 0, images_last: bool = False) -> Array:
    """Convolves images with a square kernel at stride 1 (a cross-correlation, as in all libraries).

    ``y[n, i, j, o] = sum_{u, v, c} kernel[u, v, c, o] x[n, i + u, j + v, c]``

    Args:
        x: Images ``[b, h, w, c]``, or ``[c, h, w, b]`` where ``images_last``.
        kernel: Weights ``[k, k, c, o]``.
        padding: Zeros put around the image, in pixels, less than k.
        images_last: The layout, also of the result.

    Returns:
        ``[b, h', w', o]`` with ``h' = h + 2 padding - k + 1``, or ``[o, h', w', b]``.
    """
    if jax.default_backend() == "cpu":
        method = _images_last if images_last else _chunked
        return method(x, kernel, padding)
    layout = ("CHWN", "HWIO", "CHWN") if images_last else ("NHWC", "HWIO", "NHWC")
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=layout)


class Conv(nn.Module):
    """A biased convolution at stride 1.

    Attributes:
        features: Output channels.
        kernel_size: Side of the square kernel, in pixels.
        padding: Zeros around the image, in pixels.
        images_last: Whether images are ``[c, h, w, b]`` rather than ``[b, h, w, c]``.
    """

    features: int
    kernel_size: int = 3
    padding: int = 0
    images_last: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h', w', features]``, or likewise with images last."""
        channels = x.shape[0 if self.images_last else -1]
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel = self.param("kernel", uniform_fan_in, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        y = convolve(x, kernel, self.padding, self.images_last)
        return y + _broadcast(bias, y, 0 if self.images_last else -1)


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
        kept = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(kept, x / (1 - self.rate), 0.0)


def max_pool(x: Array) -> Array:
    """Takes the largest value of each 2 x 2 window; an odd last row or column is dropped.

    Two pairwise maxima instead of a window reduction, whose gradient is slow on a CPU. Where values
    tie, the gradient is shared between them.

    Args:
        x: Images ``[b, h, w, c]`` or ``[c, h, w, b]``: the windows are in the two middle axes.

    Returns:
        ``[b, h // 2, w // 2, c]`` or ``[c, h // 2, w // 2, b]``.
    """
    first, height, width, last = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(first, height // 2, 2, -1, last)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    x = x.reshape(first, height // 2, width // 2, 2, last)
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

    ``y = scale (x - mean) / sqrt(variance + epsilon) + bias`` (Ioffe and Szegedy, 2015, Alg. 1).
    The variance is ``E[x^2] - E[x]^2``, as Flax's: inexact where the mean is hundreds of times the
    deviation.

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

    axis: int = -1
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
