"""Batch normalization, with a gradient that is fast on a CPU, over one device or several."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from sire_jax.layers.convolution import at_least_float32
from sire_jax.layers.varying import vary_alike


def broadcast_along(vector: Array, x: Array, axis: int) -> Array:
    """Returns a vector with the axes of an array, its own values along one of them."""
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
    y = wide * broadcast_along(slope, x, axis) + broadcast_along(offset, x, axis)
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
    dx = (
        broadcast_along(a, x, axis) * dy
        + broadcast_along(b, x, axis) * x
        + broadcast_along(c, x, axis)
    )
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
    >>> jax.jit(jax.vmap(normalized, axis_name="devices"))(parts).round(2).tolist()
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

    >>> init = partial(BatchNorm().init, train=False)
    >>> variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 8)))
    >>> {kind: sorted(values) for kind, values in sorted(variables.items())}
    {'batch_stats': ['mean', 'var'], 'params': ['bias', 'scale']}

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
            y = x.astype(at_least_float32(x.dtype)) * broadcast_along(slope, x, self.axis)
            return (y + broadcast_along(offset, x, self.axis)).astype(x.dtype)
        y, batch_mean, batch_variance = normalize(
            *vary_alike(x, scale, bias), self.axis, self.epsilon, _BATCH_AXIS.get()
        )
        # To initialize is no step: the averages begin with 0 and 1, as Flax's do.
        if not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * lax.stop_gradient(batch_mean)
            variance.value = keep * variance.value + (1 - keep) * lax.stop_gradient(batch_variance)
        return y
