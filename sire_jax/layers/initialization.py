"""Initial values of a whole network, where they should not be those of its modules."""

import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

PyTree = Any
# Those that each module has of its own, or those of ``as_pytorch``.
INITIALIZATIONS = ("modules", "pytorch")


def as_pytorch(key: Array, params: PyTree) -> PyTree:
    """Draws kernels and their biases as layers of PyTorch do by default.

    Both are uniform in ``[-1 / sqrt(n), 1 / sqrt(n)]``, with n the inputs of an output: height
    times width times channels of a kernel; of a transposed one PyTorch takes the channels of what
    it returns (``torch.nn.modules.conv``, ``torch.nn.modules.linear``). What stands beside a kernel
    only is drawn: batch norm begins with scale 1 and bias 0 there, too.

    Args:
        key: A random key.
        params: Parameters: kernels ``[…, in, out]`` (transposed: ``[h, w, out, in]``).

    Returns:
        Parameters of the same shapes.

    Raises:
        ValueError: If a kernel is of neither a dense layer nor a convolution of images, as one
            that holds those of several layers: its inputs are not known.
    """
    flat = flatten_dict(params)
    kernels = [path for path in flat if path[-1] == "kernel"]
    keys = jax.random.split(key, max(len(kernels), 1))
    # Sorted: what is drawn must not depend on the order in which modules were called.
    for path, layer_key in zip(sorted(kernels), keys, strict=False):
        if flat[path].ndim not in (2, 4):
            raise ValueError(
                f"The kernel '{'/'.join(path)}' has the shape {flat[path].shape}; PyTorch's initial"
                " values are known of kernels [in, out] and [height, width, in, out] alone. Take"
                " config.initialization 'modules'."
            )
        limit = 1 / math.sqrt(math.prod(flat[path].shape[:-1]))
        bias = (*path[:-1], "bias")
        for name, array_key in zip((path, bias), jax.random.split(layer_key), strict=True):
            if name in flat:
                values = flat[name]
                flat[name] = jax.random.uniform(
                    array_key, values.shape, values.dtype, -limit, limit
                )
    return unflatten_dict(flat)
