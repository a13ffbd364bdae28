"""Convolutions whose gradients are fast on a CPU, inside loops over training steps as outside.

On a CPU those of ``[b, h, w, c]`` are oneDNN's where that is installed and a program is one
device's (``layers.onednn``), and else matrix products (``layers.products``); on accelerators all is
XLA's.

Two layouts: ``[b, h, w, c]``, the usual one, and ``[c, h, w, b]``, images last, in which all that a
*small* network does between matrix products runs along contiguous memory: without oneDNN it takes
half the time.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from functools import partial, wraps

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from sire_jax.job import cpu
from sire_jax.layers import onednn, products
from sire_jax.layers.varying import vary_alike

_WHOLE: contextvars.ContextVar[bool] = contextvars.ContextVar("whole", default=False)


def _one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
    """Has ``vmap`` do a function of two arrays in a loop.

    Of a vectorized convolution XLA makes a grouped one, which takes several times as long, and
    chunks that fill the caches once fill them many times over.
    """

    @wraps(function)
    def wrapped(a: Array, b: Array, *static: int | tuple[int, int]) -> Array:
        return sequential_vmap(lambda a, b: function(a, b, *static))(a, b)

    return wrapped


# ---- The three passes of a convolution of [b, h, w, c]. Each is linear in both of its arrays, and
# its gradients are the other two.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
@_one_by_one
def _forward(x: Array, kernel: Array, padding: int, stride: int) -> Array:
    if onednn.takes(x, kernel):
        return onednn.forward(x, kernel, padding, stride)
    return products.forward(x, kernel, padding, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
@_one_by_one
def _to_images(
    dy: Array, kernel: Array, shape: tuple[int, int], padding: int, stride: int
) -> Array:
    if onednn.takes(dy, kernel):
        return onednn.to_images(dy, kernel, shape, padding, stride)
    return products.to_images(dy, kernel, shape, padding, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
@_one_by_one
def _to_kernel(x: Array, dy: Array, size: int, padding: int, stride: int) -> Array:
    weights = size * size * x.shape[3] * dy.shape[3]
    # oneDNN sums a kernel for each thread: of few images and many weights that takes longer than
    # matrix products do.
    few_images = weights > 2 * max(x.size, dy.size)
    if onednn.takes(x, dy) and not few_images:
        return onednn.to_kernel(x, dy, size, padding, stride).astype(x.dtype)
    wide = at_least_float32(x.dtype)
    found = products.to_kernel(x.astype(wide), dy.astype(wide), size, padding, stride)
    return found.astype(x.dtype)


def _keep(function: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    return lambda a, b, *static: (function(a, b, *static), (a, b))


def _forward_gradients(
    padding: int, stride: int, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    return (
        _to_images(dy, kernel, x.shape[1:3], padding, stride),
        _to_kernel(x, dy, len(kernel), padding, stride),
    )


def _to_images_gradients(
    shape: tuple[int, int], padding: int, stride: int, kept: tuple[Array, Array], dx: Array
) -> tuple[Array, Array]:
    dy, kernel = kept
    return (
        _forward(dx, kernel, padding, stride),
        _to_kernel(dx, dy, len(kernel), padding, stride),
    )


def _to_kernel_gradients(
    size: int, padding: int, stride: int, kept: tuple[Array, Array], dkernel: Array
) -> tuple[Array, Array]:
    x, dy = kept
    return (
        _to_images(dy, dkernel, x.shape[1:3], padding, stride),
        _forward(x, dkernel, padding, stride),
    )


_forward.defvjp(_keep(_forward), _forward_gradients)
_to_images.defvjp(_keep(_to_images), _to_images_gradients)
_to_kernel.defvjp(_keep(_to_kernel), _to_kernel_gradients)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which values of a dtype are summed."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Within it a convolution is traced as the one operation it is, on a CPU, too.

    For counting: how it is computed on some device is not what it costs on paper.
    """
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def convolve_line(x: Array, kernel: Array, axis: int) -> Array:
    """Convolves images along rows or columns with a kernel that is one pixel wide.

    ``y[n, i, j, o] = sum_{u, c} kernel[u, c, o] x[n, i, j + u - p, c]`` with ``p = (k - 1) / 2``,
    along the columns' axis, 2; likewise along the rows', 1. The size is kept.

    Args:
        x: Images ``[b, h, w, c]``.
        kernel: Weights ``[k, c, o]``, k odd.
        axis: 1 or 2.

    Returns:
        ``[b, h, w, o]``.
    """
    size = len(kernel)
    pads = [(size // 2, size // 2) if i == axis else (0, 0) for i in range(4)]
    if jax.default_backend() == "cpu" and not _WHOLE.get():
        padded = jnp.pad(x, pads)
        views = [lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(size)]
        # One matrix product, whose gradients are such products, too.
        return jnp.concatenate(views, -1) @ kernel.reshape(-1, kernel.shape[-1])
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, jnp.expand_dims(kernel, 2 - axis), (1, 1), pads[1:3], dimension_numbers=layout
    )


def prefers_images_last(x: Array) -> bool:
    """Tells whether a small network is faster on images ``[c, h, w, b]``: on a CPU, by itself.

    Args:
        x: Images ``[b, h, w, c]``.
    """
    return jax.default_backend() == "cpu" and not onednn.takes(x, x)


def convolve(
    x: Array, kernel: Array, padding: int = 0, stride: int = 1, images_last: bool = False
) -> Array:
    """Convolves images with a square kernel (a cross-correlation, as in all libraries).

    ``y[n, i, j, o] = sum_{u, v, c} kernel[u, v, c, o] x[n, s i + u - p, s j + v - p, c]`` at stride
    s and padding p.

    Args:
        x: Images ``[b, h, w, c]``, or ``[c, h, w, b]`` where ``images_last``.
        kernel: Weights ``[k, k, c, o]``.
        padding: Zeros put around the image, in pixels, 0 to k - 1.
        stride: Pixels from one result to the next, at least 1.
        images_last: The layout, also of the result.

    Returns:
        ``[b, h', w', o]`` with ``h' = (h + 2 padding - k) // stride + 1``, or ``[o, h', w', b]``.

    Raises:
        ValueError: If the kernel is not square, or padding or stride are out of range.
    """
    if kernel.ndim == 4 and kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"A kernel [k, k, c, o] should be square; this one is {kernel.shape}.")
    if not 0 <= padding < len(kernel) or stride < 1:
        raise ValueError(
            f"padding is {padding} and stride {stride}; of a kernel of {len(kernel)} pixels padding"
            f" should be 0 to {len(kernel) - 1}, and stride at least 1."
        )
    if jax.default_backend() == "cpu" and not _WHOLE.get():
        cpu.warn_of_few_threads()
        x, kernel = vary_alike(x, kernel)
        method = products.images_last if images_last else _forward
        # Sums are float32 where the inputs are less; oneDNN's are.
        takes = not images_last and onednn.takes(x, kernel)
        wide = x.dtype if takes else at_least_float32(x.dtype)
        y = method(x.astype(wide), kernel.astype(wide), padding, stride)
        return y.astype(x.dtype)
    layout = ("CHWN", "HWIO", "CHWN") if images_last else ("NHWC", "HWIO", "NHWC")
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)
