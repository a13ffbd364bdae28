"""What ``jax.shard_map`` has to be told of operations that JAX doesn't look into."""

import jax
from jax import Array, lax


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Has arrays vary over all the devices that any of them varies over, within ``shard_map``.

    Their gradients are then summed over the devices where they did not vary, such as weights'.
    Elsewhere, and with ``check_vma=False``, nothing changes.

    Args:
        arrays: Of any shapes.

    Returns:
        The same values.
    """
    axes = frozenset[str]().union(*map(_varies_over, arrays))

    def cast(array: Array) -> Array:
        missing = tuple(sorted(axes - _varies_over(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return tuple(map(cast, arrays))


def _varies_over(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
