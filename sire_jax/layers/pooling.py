"""Pooling and up-sampling of images, with gradients that are fast on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def max_pool(x: Array, size: int = 2, stride: int = 2, padding: tuple[int, int] = (0, 0)) -> Array:
    """Takes the largest value of each window; what is left over at the end is dropped.

    Maxima of shifted views, first of rows, then of columns, instead of a window reduction, whose
    gradient is slow on a CPU. Where values of a 2 x 2 window tie, the first has the gradient; of
    other windows they share it.

    Args:
        x: Images ``[b, h, w, c]`` or ``[c, h, w, b]``: the windows are in the two middle axes.
        size: Side of the windows, in pixels.
        stride: Pixels from one window to the next.
        padding: Rows and columns of minus infinity before and after the image.

    Returns:
        ``[b, h', w', c]`` or likewise, with ``h' = (h + sum(padding) - size) // stride + 1``.

    Raises:
        ValueError: If the images are smaller than a window.
    """
    if min(x.shape[1:3]) + sum(padding) < size:
        raise ValueError(
            f"Features of {x.shape[1]} x {x.shape[2]} are too small for a max pool of {size} x"
            f" {size}; take larger images, or more padding."
        )
    if size == stride == 2 and padding == (0, 0):
        return _halve(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])
    for axis in (1, 2):
        widths = [padding if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, widths, constant_values=-jnp.inf)
        count = (padded.shape[axis] - size) // stride + 1
        last = (count - 1) * stride + 1
        views = [lax.slice_in_dim(padded, i, i + last, stride, axis) for i in range(size)]
        x = functools.reduce(jnp.maximum, views)
    return x


def _corners(x: Array) -> list[Array]:
    """Returns the four pixels of each 2 x 2 window, as views."""
    return [x[:, i::2, j::2] for i in range(2) for j in range(2)]


@jax.custom_vjp
def _halve(x: Array) -> Array:
    """Pools windows of 2 x 2."""
    return functools.reduce(jnp.maximum, _corners(x))


def _halve_forward(x: Array) -> tuple[Array, Array]:
    return _halve(x), x


def _halve_backward(x: Array, dy: Array) -> tuple[Array]:
    # One pass over the small images and one over the large, where the derived gradients, of window
    # reductions as of pairwise maxima, take several. One pixel of each window is chosen, even if a
    # compiler computes x anew and rounds it otherwise: nothing is compared with the result.
    a, b, c, d = _corners(x)
    upper = jnp.maximum(a, b) >= jnp.maximum(c, d)
    chosen = jnp.where(upper, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    rows = lax.broadcasted_iota(chosen.dtype, x.shape, 1)
    columns = lax.broadcasted_iota(chosen.dtype, x.shape, 2)
    corner = 2 * (rows % 2) + columns % 2
    spread = jnp.where(corner == upsample(chosen, 2), upsample(dy, 2), jnp.zeros((), dy.dtype))
    return (spread,)


_halve.defvjp(_halve_forward, _halve_backward)


def local_mean(x: Array, size: int) -> Array:
    """Averages the window around each pixel; what is outside the image does not count.

    Args:
        x: Images ``[b, h, w, c]``.
        size: Side of the windows, in pixels, odd.

    Returns:
        Like ``x``.
    """
    for axis in (1, 2):
        length, half = x.shape[axis], size // 2
        padded = jnp.pad(x, [(half, half) if i == axis else (0, 0) for i in range(x.ndim)])
        views = [lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size)]
        place = np.arange(length)
        inside = np.minimum(place + half, length - 1) - np.maximum(place - half, 0) + 1
        share = jnp.asarray(1 / inside, x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
        x = functools.reduce(jnp.add, views) * share
    return x


def average_pool(x: Array, size: int = 2) -> Array:
    """Takes the mean of each window of ``size x size``; what is left over at the end is dropped.

    Args:
        x: Images ``[b, h, w, c]`` or ``[c, h, w, b]``: the windows are in the two middle axes.
        size: Side of the windows and pixels from one to the next, at least 1.

    Returns:
        ``[b, h // size, w // size, c]`` or likewise.
    """
    first, height, width, last = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    # Its gradient is a broadcast, where that of a window reduction is another, slow one.
    return x.reshape(first, rows, size, columns, size, last).mean((2, 4))


def upsample(x: Array, factor: int) -> Array:
    """Repeats each pixel ``factor`` times along rows and columns: nearest up-sampling.

    Args:
        x: Images ``[b, h, w, c]`` or ``[c, h, w, b]``.
        factor: How many times larger the sides become.

    Returns:
        ``[b, factor h, factor w, c]`` or ``[c, factor h, factor w, b]``.
    """
    if factor == 1:
        return x
    first, height, width, last = x.shape
    # The derived gradient of this broadcast sums over two axes of six, which is fast.
    shape = (first, height, factor, width, factor, last)
    x = jnp.broadcast_to(x[:, :, None, :, None], shape)
    return x.reshape(first, factor * height, factor * width, last)
