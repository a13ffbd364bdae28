"""oneDNN's convolutions on a CPU, an optional extra: the passes of one, as XLA operations.

``pip install 'sire_jax[onednn]'`` on x86-64 Linux; ``SIRE_JAX_ONEDNN=0`` in the environment turns
it off. oneDNN is the library in which PyTorch convolves.

Every pass takes two of images ``x[n, h, w, c]``, a kernel ``[k, k, c, o]`` and results
``y[n, h', w', o]``, where

    ``y[n, i, j, o] = sum_{u, v, c} kernel[u, v, c, o] x[n, s i + u - p, s j + v - p, c]``

at stride s and padding p, and returns the third, or the gradient to it. They are float32 or
bfloat16, and summed in float32. A pass has no derivative here: see ``layers.convolution``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sire_jax.layers.onednn.library import TARGET, load, version

__all__ = ["forward", "load", "to_images", "to_kernel", "version"]

# As convolution.cc numbers them.
_FORWARD, _TO_IMAGES, _TO_KERNEL = range(3)


def _call(
    which: int, a: Array, b: Array, shape: tuple[int, ...], dtype: Any, stride: int, padding: int
) -> Array:
    """Calls oneDNN, which relies on the shapes that it is given."""
    attributes = {"pass": which, "stride": stride, "padding": padding}
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, dtype))
    return call(a, b, **{name: np.int64(value) for name, value in attributes.items()})


def _partitioned(function: Callable[..., Array], rule: str) -> Any:
    """Has XLA's partitioner split a pass over devices that share a batch, as its own convolutions.

    Of a call that it doesn't know it would give all images to all devices.

    Args:
        function: What a device does with its own images, of the two arrays of a pass and settings.
        rule: The axes of the arrays and of the result. Arrays with ``n`` are split along it; a
            result without it is summed over the devices.
    """
    axes = rule.replace(" -> ", ", ").split(", ")
    split = ["n" in names for names in axes]

    def partition(*args: Any) -> tuple[Mesh, Callable[..., Array], NamedSharding, Any]:
        *settings, mesh, arrays, _ = args
        devices = (*arrays[0].sharding.spec, None)[0]
        spec = {True: PartitionSpec(devices), False: PartitionSpec()}
        first, second, result = (NamedSharding(mesh, spec[own]) for own in split)

        def on_device(a: Array, b: Array) -> Array:
            part = function(a, b, *settings)
            return part if split[2] or devices is None else lax.psum(part, devices)

        return mesh, on_device, result, (first, second)

    static = tuple(range(2, len(inspect.signature(function).parameters)))
    operation = custom_partitioning(function, static_argnums=static)
    # In the order of their first appearance, as the partitioner wants it.
    whole = tuple(dict.fromkeys(axis for axis in rule if axis.isalpha() and axis != "n"))
    operation.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return operation


def _check(fits: bool, a: Array, b: Array) -> None:
    if not (a.ndim == b.ndim == 4 and fits and a.dtype == b.dtype):
        raise ValueError(
            "oneDNN convolves images [n, h, w, c] with kernels [k, k, c, o] to results"
            f" [n, h, w, o], all of one dtype; {a.dtype} {a.shape} and {b.dtype} {b.shape} are"
            " not two of them."
        )


def _forward(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    size, _, _, features = kernel.shape
    rows, columns = ((n + 2 * padding - size) // stride + 1 for n in x.shape[1:3])
    return _call(_FORWARD, x, kernel, (len(x), rows, columns, features), x.dtype, stride, padding)


def _to_images(dy: Array, kernel: Array, size: tuple[int, int], stride: int, padding: int) -> Array:
    shape = (len(dy), *size, kernel.shape[2])
    return _call(_TO_IMAGES, dy, kernel, shape, dy.dtype, stride, padding)


def _to_kernel(x: Array, dy: Array, size: int, stride: int, padding: int) -> Array:
    shape = (size, size, x.shape[3], dy.shape[3])
    return _call(_TO_KERNEL, x, dy, shape, jnp.float32, stride, padding)


_forward_over_devices = _partitioned(_forward, "n h w c, k l c o -> n p q o")
_to_images_over_devices = _partitioned(_to_images, "n p q o, k l c o -> n h w c")
_to_kernel_over_devices = _partitioned(_to_kernel, "n h w c, n p q o -> k l c o")


def forward(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Convolves images.

    Args:
        x: Images ``[n, h, w, c]``.
        kernel: Weights ``[k, k, c, o]`` of the same dtype.
        stride: Pixels from one result to the next.
        padding: Zeros put around the image, in pixels, less than k.

    Returns:
        ``[n, h', w', o]`` with ``h' = (h + 2 padding - k) // stride + 1``.

    Raises:
        ValueError: If shapes or dtypes don't fit together.
    """
    _check(x.shape[3:] == kernel.shape[2:3], x, kernel)
    return _forward_over_devices(x, kernel, stride, padding)


def to_images(dy: Array, kernel: Array, size: tuple[int, int], stride: int, padding: int) -> Array:
    """Returns the gradient to images of a loss whose gradient to the results is ``dy``.

    Args:
        dy: Gradients ``[n, h', w', o]``.
        kernel: Weights ``[k, k, c, o]`` of the same dtype.
        size: The rows and columns of the images.
        stride: As in ``forward``.
        padding: As in ``forward``.

    Returns:
        ``[n, h, w, c]``.

    Raises:
        ValueError: If shapes or dtypes don't fit together.
    """
    _check(dy.shape[3:] == kernel.shape[3:], dy, kernel)
    return _to_images_over_devices(dy, kernel, size, stride, padding)


def to_kernel(x: Array, dy: Array, size: int, stride: int, padding: int) -> Array:
    """Returns the gradient to the kernel of a loss whose gradient to the results is ``dy``.

    Args:
        x: Images ``[n, h, w, c]``.
        dy: Gradients ``[n, h', w', o]`` of the same dtype.
        size: The side of the kernel, k.
        stride: As in ``forward``.
        padding: As in ``forward``.

    Returns:
        ``[k, k, c, o]``, float32.

    Raises:
        ValueError: If shapes or dtypes don't fit together.
    """
    _check(x.shape[:1] == dy.shape[:1], x, dy)
    return _to_kernel_over_devices(x, dy, size, stride, padding)
