"""Layers whose training step is fast on a CPU, inside loops and under ``vmap`` as outside."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from sire_jax.layers.convolution import at_least_float32, convolve

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

    >>> Conv(8, 3, padding=1).init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 3)))[0].shape
    (2, 4, 4, 8)

    Attributes:
        features: Output channels.
        kernel_size: Side of the square kernel, in pixels.
        padding: Zeros around the image, in pixels.
        stride: Pixels from one window to the next.
        use_bias: Whether to add a bias.
        kernel_init: Initializer of the kernel.
        images_last: Whether images are ``[c, h, w, b]`` rather than ``[b, h, w, c]``.
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
        """Maps ``[b, h, w, c]`` to ``[b, h', w', features]``, or likewise with images last."""
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
        return y + _broadcast(bias.astype(x.dtype), y, axis)


class TransposedConv(nn.Module):
    """The transpose of a convolution that keeps the size of images (Dumoulin and Visin, 2016).

    ``y[n, i, j, o] = sum_{u, v, c} kernel[u, v, o, c] x[n, i - u + p, j - v + p, c]``, with
    ``p = (k - 1) / 2``: the kernel is that of the convolution from ``features`` channels that this
    one reads backwards.

    >>> layer = TransposedConv(3, 3)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 8)))[0].shape
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
        return y + _broadcast(bias.astype(x.dtype), y, -1)


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
        # A rate just below 1 rounds to 2^32, which is no uint32.
        mask = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(mask, x / (1 - self.rate), 0.0)


def _broadcast(vector: Array, x: Array, axis: int) -> Array:
    shape = [1] * x.ndim
    shape[axis] = -1
    return vector.reshape(shape)


def _average(values: Array, devices: str | None) -> Array:
    """Averages over devices that have as many examples each."""
    return values if devices is None else lax.pmean(values, devices)


def _other_axes(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
    x: Array, scale: Array, bias: Array, axis: int, epsilon: float, devices: str | None = None
) -> tuple[Array, Array, Array]:
    """Normalizes over all axes but one, with a gradient in two sums and one pass.

    ``y = scale (x - mean) / sqrt(variance + epsilon) + bias`` (Ioffe and Szegedy, 2015, Alg. 1).
    The variance is ``E[x^2] - E[x]^2``, as Flax's: inexact where the mean is hundreds of times the
    deviation.

    Args:
        x: Features, any rank; sums are taken in float32 whatever the dtype.
        scale: ``[c]``.
        bias: ``[c]``.
        axis: The axis of ``x`` that has the c channels.
        epsilon: Added to the variance.
        devices: An axis of devices whose parts of ``x`` are normalized together, if any.

    Returns:
        ``y`` like ``x``; the mean and the (biased) variance, ``[c]``, for running averages only:
        no gradient flows through these two.
    """
    return _normalize_forward(x, scale, bias, axis, epsilon, devices)[0]


def _normalize_forward(
    x: Array, scale: Array, bias: Array, axis: int, epsilon: float, devices: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    axes = _other_axes(x, axis)
    wide = x.astype(at_least_float32(x.dtype))
    mean = _average(wide.mean(axes), devices)
    # Rounding may make the difference of two such means negative.
    variance = jnp.maximum(_average((wide * wide).mean(axes), devices) - mean * mean, 0.0)
    inverse = lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    offset = bias - mean * slope
    y = wide * _broadcast(slope, x, axis) + _broadcast(offset, x, axis)
    return (y.astype(x.dtype), mean, variance), (x, scale, mean, inverse)


def _normalize_backward(
    axis: int,
    epsilon: float,
    devices: str | None,
    saved: tuple[Array, ...],
    cotangents: tuple[Array, ...],
) -> tuple[Array, Array, Array]:
    # dx = scale inverse (dy - mean(dy) - normalized mean(dy normalized)) written as a dy + b x + c,
    # two sums and one pass, where the derived gradient takes several.
    x, scale, mean, inverse = saved
    dtype = x.dtype
    wide = at_least_float32(dtype)
    x, dy = x.astype(wide), cotangents[0].astype(wide)
    axes = _other_axes(x, axis)
    count = x.size // x.shape[axis]
    dbias = dy.sum(axes)
    dscale = inverse * ((dy * x).sum(axes) - mean * dbias)
    a = scale * inverse
    b = -a * _average(dscale, devices) * inverse / count
    c = -a * _average(dbias, devices) / count - b * mean
    dx = _broadcast(a, x, axis) * dy + _broadcast(b, x, axis) * x + _broadcast(c, x, axis)
    return dx.astype(dtype), dscale, dbias


normalize.defvjp(_normalize_forward, _normalize_backward)


# The axis of devices that share a batch, where a program sees one device's part of it (pmap).
_BATCH_AXIS: ContextVar[str | None] = ContextVar("batch axis", default=None)


@contextlib.contextmanager
def batch_over(axis: str | None) -> Iterator[None]:
    """Takes batch statistics over an axis of devices, too, in what is traced in this block.

    >>> def normalized(x):  # as pmap would map it
    ...     with batch_over("devices"):
    ...         return BatchNorm().init_with_output(jax.random.key(0), x, train=True)[0]
    >>> parts = jnp.array([[[0.0]], [[2.0]]])  # one example a device
    >>> jax.vmap(normalized, axis_name="devices")(parts).round(2).tolist()
    [[[-1.0]], [[1.0]]]

    Args:
        axis: Name of the axis, as ``jax.pmap`` has it; ``None`` for each device's own statistics.
            Under ``jit`` there is no need: an array is the whole batch, wherever it lies.

    Raises:
        ValueError: If a ``flax.linen.BatchNorm`` is applied in this block that would take each
            device's own statistics.
    """
    if axis is None:
        yield
        return
    token = _BATCH_AXIS.set(axis)
    try:
        with nn.intercept_methods(_check_statistics):
            yield
    finally:
        _BATCH_AXIS.reset(token)


def _check_statistics(
    method: Callable[..., Array],
    args: tuple[Any, ...],
    settings: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Array:
    """Refuses batch statistics of one device where those of the whole batch are asked for."""
    module = context.module
    alone = isinstance(module, nn.BatchNorm) and module.axis_name is None
    running = settings.get("use_running_average", args[1] if len(args) > 1 else None)
    if alone and not (module.use_running_average or running):
        raise ValueError(
            f"The module '{'/'.join(module.path)}' is a flax.linen.BatchNorm, which would take the"
            " statistics of each device's part of the batch. Take sire_jax.layers.BatchNorm; or"
            " have them so deliberately: config.batch_norm='device', Shared(…, batch_norm=False)."
        )
    return method(*args, **settings)


class BatchNorm(nn.Module):
    """Batch normalization over all axes but one (Ioffe and Szegedy, 2015).

    >>> norm, x = BatchNorm(), jnp.array([[1.0, 5.0], [3.0, 9.0]])
    >>> norm.init_with_output(jax.random.key(0), x, train=True)[0].round(2).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]

    Statistics and parameters are float32; the result has the dtype of the input.

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
            y = x.astype(at_least_float32(x.dtype)) * _broadcast(slope, x, self.axis)
            return (y + _broadcast(offset, x, self.axis)).astype(x.dtype)
        y, batch_mean, batch_variance = normalize(
            x, scale, bias, self.axis, self.epsilon, _BATCH_AXIS.get()
        )
        # To initialize is no step: the averages begin with 0 and 1, as Flax's do.
        if not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * lax.stop_gradient(batch_mean)
            variance.value = keep * variance.value + (1 - keep) * lax.stop_gradient(batch_variance)
        return y


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate that is computed from the means of all.

    ``y = s x``, ``s = sigmoid(W_2 relu(W_1 z))``, ``z`` the means over all pixels (Hu et al., 2018,
    Section 3, Eqs. 2 to 4), without biases, which they found better in residual networks. The gates
    are computed in float32.

    >>> layer = SqueezeExcitation(4)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 8)))[0].shape
    (2, 4, 4, 8)

    Attributes:
        reduction: r: ``W_1`` leads from c channels to ``c // r``, at least 1.
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
