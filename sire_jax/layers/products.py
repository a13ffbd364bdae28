"""The passes of a convolution as XLA has fast code for them on a CPU.

XLA's own CPU convolution is fast in one arrangement of its arguments only; the gradients that JAX
derives are in others, and take up to hundreds of times as long inside a loop. Here the gradient to
the images is the fast arrangement again, and that to the kernel is matrix products. The passes are
those of ``layers.onednn``, for those who go without.
"""

import math
from functools import reduce

import jax
import jax.numpy as jnp
from jax import Array, lax

from sire_jax.layers.varying import vary_alike

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


def images_last(x: Array, kernel: Array, padding: int, stride: int) -> Array:
    """Convolves ``[c, h, w, b]`` by one matrix product; its derived gradients are fast, too.

    Args:
        x: Images ``[c, h, w, b]``.
        kernel: Weights ``[k, k, c, o]``.
        padding: Zeros put around the image, in pixels.
        stride: Pixels from one result to the next.

    Returns:
        ``[o, h', w', b]``.
    """
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


def forward(x: Array, kernel: Array, padding: int, stride: int) -> Array:
    """Convolves images ``[b, h, w, c]``; see ``onednn.forward``."""
    return _correlate(x, kernel, ((padding, padding),) * 2, stride)


def to_kernel(x: Array, dy: Array, size: int, padding: int, stride: int) -> Array:
    """Returns the gradient to the kernel, by matrix products, a few images at a time.

    See ``onednn.to_kernel``.
    """
    images, *_, channels = x.shape
    features = dy.shape[-1]
    if stride == 1 and features < channels:
        # Shifting dy against x is shifting x against dy the other way: make the smaller views.
        mirrored = to_kernel(dy, x, size, size - 1 - padding, 1)
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
    start = vary_alike(start, x, dy)[0]
    total, _ = lax.scan(add, start, (_split(x, parts), dys))
    return (total if narrow else total.T).reshape(size, size, channels, features)


def to_images(dy: Array, kernel: Array, shape: tuple[int, int], padding: int, stride: int) -> Array:
    """Returns the gradient to images of so many rows and columns; see ``onednn.to_images``.

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
