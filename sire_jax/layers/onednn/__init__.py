"""oneDNN's convolutions on a CPU, an optional extra: the passes of one, as XLA operations.

``pip install 'sire_jax[onednn]'`` on x86-64 Linux; ``SIRE_JAX_ONEDNN=0`` in the environment turns
it off. oneDNN is the library in which PyTorch convolves.

Every pass takes two of images ``x[n, h, w, c]``, a kernel ``[k, k, c, o]`` and results
``y[n, h', w', o]``, where

    ``y[n, i, j, o] = sum_{u, v, c} kernel[u, v, c, o] x[n, s i + u - p, s j + v - p, c]``

at padding p and stride s, and returns the third, or the gradient to it. They are float32 or
bfloat16, and summed in float32. A pass is one call of a program that XLA doesn't look into: it has
no derivative here (``layers.convolution`` has), and is neither split over devices nor exported.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sire_jax.layers.onednn.library import TARGET, has_bfloat16, load, version
from sire_jax.layers.varying import vary_alike

__all__ = ["forward", "load", "takes", "to_images", "to_kernel", "version"]

# As convolution.cc numbers them.
_FORWARD, _TO_IMAGES, _TO_KERNEL = range(3)


def takes(a: Array, b: Array) -> bool:
    """Returns whether two arrays of a pass are for oneDNN, in the program that is traced.

    It is one of a single device, be it that there is no other, or that it sees its own part of all
    arrays (``jax.shard_map``, ``jax.pmap``): where XLA splits a program, it should see what
    convolutions are.

    Args:
        a: Images or results.
        b: A kernel or results.
    """
    known = jnp.float32, jnp.bfloat16
    if not (a.ndim == b.ndim == 4 and a.dtype == b.dtype and a.dtype in known):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    alone = jax.device_count() == 1 or (bool(mesh.axis_names) and mesh.are_all_axes_manual)
    return alone and load() and (a.dtype == jnp.float32 or has_bfloat16())


def _call(
    which: int, a: Array, b: Array, shape: tuple[int, ...], dtype: Any, padding: int, stride: int
) -> Array:
    if not load():
        raise RuntimeError("oneDNN is not here: pip install 'sire_jax[onednn]', on x86-64 Linux.")
    attributes = {"pass": which, "padding": padding, "stride": stride}
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, dtype))
    y = call(a, b, **{name: np.int64(value) for name, value in attributes.items()})
    # To JAX a result of nothing: within `shard_map` it would be the same on all devices.
    return vary_alike(a, b, y)[2]


def _check(
    x: tuple[int, ...],
    kernel: tuple[int, ...],
    y: tuple[int, ...],
    padding: int,
    stride: int,
    *arrays: Array,
) -> None:
    """Checks shapes, on which oneDNN relies, and dtypes."""
    dtypes = [str(array.dtype) for array in arrays]
    square = len(x) == len(kernel) == len(y) == 4 and kernel == (kernel[0], kernel[0], x[3], y[3])
    if not (
        square
        and min(padding, stride - 1) >= 0
        and y[:3] == (x[0], *_sides(x[1:3], kernel[0], padding, stride))
        and len(set(dtypes)) == 1
    ):
        raise ValueError(
            "oneDNN convolves images [n, h, w, c] with kernels [k, k, c, o] to results"
            f" [n, h', w', o], all of one dtype; images {x}, a kernel {kernel} and results {y}, of"
            f" {' and '.join(dtypes)}, with padding {padding} and stride {stride}, don't fit"
            " together."
        )


def _sides(images: tuple[int, ...], size: int, padding: int, stride: int) -> list[int]:
    """Returns the rows and columns of results."""
    return [max(0, (n + 2 * padding - size) // max(1, stride) + 1) for n in images]


def forward(x: Array, kernel: Array, padding: int, stride: int) -> Array:
    """Convolves images.

    Args:
        x: Images ``[n, h, w, c]``.
        kernel: Weights ``[k, k, c, o]`` of the same dtype.
        padding: Zeros put around the image, in pixels, at least 0.
        stride: Pixels from one result to the next, at least 1.

    Returns:
        ``[n, h', w', o]`` with ``h' = (h + 2 padding - k) // stride + 1``.

    Raises:
        ValueError: If shapes or dtypes don't fit together.
        RuntimeError: If oneDNN is not installed.
    """
    shape = (len(x), *_sides(x.shape[1:3], len(kernel), padding, stride), kernel.shape[-1])
    _check(x.shape, kernel.shape, shape, padding, stride, x, kernel)
    return _call(_FORWARD, x, kernel, shape, x.dtype, padding, stride)


def to_images(dy: Array, kernel: Array, shape: tuple[int, int], padding: int, stride: int) -> Array:
    """Returns the gradient to images of a loss whose gradient to the results is ``dy``.

    Args:
        dy: Gradients ``[n, h', w', o]``.
        kernel: Weights ``[k, k, c, o]`` of the same dtype.
        shape: The rows and columns of the images.
        padding: As in ``forward``.
        stride: As in ``forward``.

    Returns:
        ``[n, h, w, c]``.

    Raises:
        ValueError: If shapes or dtypes don't fit together.
        RuntimeError: If oneDNN is not installed.
    """
    images = (len(dy), *shape, kernel.shape[2])
    _check(images, kernel.shape, dy.shape, padding, stride, dy, kernel)
    return _call(_TO_IMAGES, dy, kernel, images, dy.dtype, padding, stride)


def to_kernel(x: Array, dy: Array, size: int, padding: int, stride: int) -> Array:
    """Returns the gradient to the kernel of a loss whose gradient to the results is ``dy``.

    Args:
        x: Images ``[n, h, w, c]``.
        dy: Gradients ``[n, h', w', o]`` of the same dtype.
        size: The side of the kernel, k.
        padding: As in ``forward``.
        stride: As in ``forward``.

    Returns:
        ``[k, k, c, o]``, float32.

    Raises:
        ValueError: If shapes or dtypes don't fit together.
        RuntimeError: If oneDNN is not installed.
    """
    kernel = (size, size, x.shape[-1], dy.shape[-1])
    _check(x.shape, kernel, dy.shape, padding, stride, x, dy)
    return _call(_TO_KERNEL, x, dy, kernel, jnp.float32, padding, stride)
