"""Convolutions whose gradients are fast on a CPU, inside loops over training steps as outside.

Those of ``[b, h, w, c]`` are oneDNN's where that is installed and a program is one device's
(``layers.onednn``). XLA's own CPU convolution is fast in one arrangement of its arguments only; the
gradients that JAX derives are in others, and take up to hundreds of times as long inside a loop.
Here the gradient to the images is the fast arrangement again and that to the kernel is matrix
products. On accelerators all is XLA's.

Two layouts: ``[b, h, w, c]``, the usual one, and ``[c, h, w, b]``, images last, in which all that a
*small* network does between matrix products runs along contiguous memory: it takes half the time.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from functools import partial, reduce, wraps

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from sire_jax.layers import onednn

_WHOLE: contextvars.ContextVar[bool] = contextvars.ContextVar("whole", default=False)

# Zeros before and after the rows, and before and after the columns.
Pads = tuple[tuple[int, int], tuple[int, int]]

# Values of the shifted views that are made at once: 8 MiB, which caches hold, and enough pixels for
# an efficient matrix product.
_CACHED = 2**21

# XLA gives each core its own part of a kernel's features, of at least this many weights: one core
# does all of a convolution with a smaller kernel.
_ONE_CORE = 9 * 64 * 128

# Channels and features from which a matrix product with few of them is still efficient.
_WIDE = 48


def _shifts(x: Array, size: int, stride: int, first: int) -> list[Array]:
    """Returns the size x size shifted views of images, whose rows and columns are two axes."""

    def view(x: Array, start: int, axis: int) -> Array:
        stop = x.shape[axis] - size + 1 + start
        return lax.slice_in_dim(x, start, stop, stride, axis)

    return [view(view(x, i, first), j, first + 1) for i in range(size) for j in range(size)]


def _pad(x: Array, pads: Pads, first: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[first : first + 2] = pads
    return jnp.pad(x, widths)


@jax.custom_vjp
def _product(a: Array, b: Array) -> Array:
    """Multiplies ``[k, m]``, transposed, and ``[k, n]``."""
    return a.T @ b


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    # The derived gradient is (dy @ b.T).T, which takes up to 1.7 times as long on a CPU.
    a, b = saved
    return b @ dy.T, a @ dy


_product.defvjp(lambda a, b: (_product(a, b), (a, b)), _product_backward)


def _images_last(x: Array, kernel: Array, padding: int, stride: int) -> Array:
    """Convolves ``[c, h, w, b]`` by one matrix product."""
    x = _pad(x, ((padding, padding),) * 2, 1)
    views = jnp.concatenate(_shifts(x, len(kernel), stride, 1), axis=0)
    depth, *spatial = views.shape
    product = _product(kernel.reshape(depth, -1), views.reshape(depth, -1))
    return product.reshape(-1, *spatial)


def _chunks(images: int, values: int) -> int:
    """Returns into how many equal parts to split images, each of which needs so many values."""
    most = max(1, _CACHED // values)
    return images // max(n for n in range(1, images + 1) if images % n == 0 and n <= most)


def _split(x: Array, parts: int) -> Array:
    return x.reshape(parts, -1, *x.shape[1:])


def _one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
    """Has ``vmap`` do a function of two arrays in a loop.

    Of a vectorized convolution XLA makes a grouped one, which takes several times as long, and
    chunks that fill the caches once fill them many times over.
    """

    @wraps(function)
    def wrapped(a: Array, b: Array, *static: int | tuple[int, int]) -> Array:
        return sequential_vmap(lambda a, b: function(a, b, *static))(a, b)

    return wrapped


def _sum_of_shifts(x: Array, kernel: Array, pads: Pads) -> Array:
    """Multiplies every pixel with all weights, then sums each pixel's share of its neighbours."""
    size, _, channels, features = kernel.shape
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)

    def convolve_chunk(x: Array) -> Array:
        x = _pad(x, pads, 1)
        products = (x.reshape(-1, channels) @ matrix).reshape(*x.shape[:3], -1, features)
        rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
        # One pass over the products: XLA fuses the sum.
        shifts = [
            products[:, i : i + rows, j : j + columns, i * size + j]
            for i in range(size)
            for j in range(size)
        ]
        return reduce(jnp.add, shifts)

    pixels = math.prod(n + sum(pad) for n, pad in zip(x.shape[1:3], pads, strict=True))
    y = lax.map(convolve_chunk, _split(x, _chunks(len(x), pixels * matrix.shape[1])))
    return y.reshape(-1, *y.shape[2:])


def _correlate(x: Array, kernel: Array, pads: Pads, stride: int = 1) -> Array:
    """Convolves ``[b, h, w, c]`` in the arrangement for which XLA has fast code."""
    size, _, channels, features = kernel.shape
    if stride == 1 and size > 1 and kernel.size <= _ONE_CORE and min(channels, features) >= _WIDE:
        return _sum_of_shifts(x, kernel, pads)
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)


def _kernel_gradient(x: Array, dy: Array, size: int, padding: int, stride: int) -> Array:
    """Returns the gradient to the kernel, by matrix products, a few images at a time."""
    images, *_, channels = x.shape
    features = dy.shape[-1]
    if stride == 1 and features < channels:
        # Shifting dy against x is shifting x against dy the other way: make the smaller views.
        mirrored = _kernel_gradient(dy, x, size, size - 1 - padding, 1)
        return jnp.swapaxes(mirrored[::-1, ::-1], 2, 3)
    x = _pad(x, ((padding, padding),) * 2, 1)
    depth = size * size * channels
    parts = _chunks(images, math.prod(dy.shape[1:3]) * depth)
    dys = dy.reshape(parts, -1, features)
    # Unless it is narrow, a first matrix that is read by columns makes a product take twice as
    # long: transpose it before, behind a barrier, as XLA would put the two together again.
    narrow = depth <= features
    if not narrow:
        dys = lax.optimization_barrier(dys.swapaxes(1, 2))

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x, dy = chunk
        views = jnp.concatenate(_shifts(x, size, stride, 1), axis=-1).reshape(-1, depth)
        return total + (views.T @ dy if narrow else dy @ views), None

    start = jnp.zeros((depth, features) if narrow else (features, depth), dy.dtype)
    total, _ = lax.scan(add, start, (_split(x, parts), dys))
    return (total if narrow else total.T).reshape(size, size, channels, features)


def _images_gradient(
    dy: Array, kernel: Array, shape: tuple[int, int], padding: int, stride: int
) -> Array:
    """Returns the gradient to images of so many rows and columns.

    It is a convolution of dy, with zeros where the stride left out a result, with the kernel
    flipped; pixels at the end may have taken part in no result.
    """
    size = len(kernel)
    if stride > 1:
        between = (0, 0, stride - 1)
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), between, between, (0, 0, 0)))
    before = size - 1 - padding
    rows, columns = (
        (before, n + size - 1 - m - before) for n, m in zip(shape, dy.shape[1:3], strict=True)
    )
    return _correlate(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), (rows, columns))


# ---- The three passes of a convolution of [b, h, w, c]. Each is linear in both of its arrays, and
# its gradients are the other two.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
@_one_by_one
def _forward(x: Array, kernel: Array, padding: int, stride: int) -> Array:
    if onednn.takes(x, kernel):
        return onednn.forward(x, kernel, padding, stride)
    return _correlate(x, kernel, ((padding, padding),) * 2, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
@_one_by_one
def _to_images(
    dy: Array, kernel: Array, shape: tuple[int, int], padding: int, stride: int
) -> Array:
    if onednn.takes(dy, kernel):
        return onednn.to_images(dy, kernel, shape, padding, stride)
    return _images_gradient(dy, kernel, shape, padding, stride)


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
    found = _kernel_gradient(x.astype(wide), dy.astype(wide), size, padding, stride)
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


def convolve(
    x: Array, kernel: Array, padding: int = 0, stride: int = 1, images_last: bool = False
) -> Array:
    """Convolves images with a square kernel (a cross-correlation, as in all libraries).

    ``y[n, i, j, o] = sum_{u, v, c} kernel[u, v, c, o] x[n, s i + u - p, s j + v - p, c]`` at stride
    s and padding p.

    Args:
        x: Images ``[b, h, w, c]``, or ``[c, h, w, b]`` where ``images_last``.
        kernel: Weights ``[k, k, c, o]``.
        padding: Zeros put around the image, in pixels, less than k.
        stride: Pixels from one result to the next.
        images_last: The layout, also of the result.

    Returns:
        ``[b, h', w', o]`` with ``h' = (h + 2 padding - k) // stride + 1``, or ``[o, h', w', b]``.

    Raises:
        ValueError: If the kernel is not square.
    """
    if kernel.ndim == 4 and kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"A kernel [k, k, c, o] should be square; this one is {kernel.shape}.")
    if jax.default_backend() == "cpu" and not _WHOLE.get():
        method = _images_last if images_last else _forward
        # Sums are float32 where the inputs are less; oneDNN's are.
        takes = not images_last and onednn.takes(x, kernel)
        wide = x.dtype if takes else at_least_float32(x.dtype)
        y = method(x.astype(wide), kernel.astype(wide), padding, stride)
        return y.astype(x.dtype)
    layout = ("CHWN", "HWIO", "CHWN") if images_last else ("NHWC", "HWIO", "NHWC")
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)
