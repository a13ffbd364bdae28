"""The arrays of a tree as the bytes of all of them, one after another, and back."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any


@dataclass(frozen=True)
class ArrayType:
    """What an array is.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, ``key<…>`` of random keys.
    """

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: Any) -> "ArrayType":
        """Returns the type of an array, or of a shape."""
        return cls(tuple(array.shape), str(array.dtype))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def flatten(tree: PyTree) -> dict[str, Any]:
    """Lists the arrays of a tree.

    Args:
        tree: Arrays, shapes, random keys or numbers.

    Returns:
        The arrays by their paths, such as ``.params['kernel']``, in the order of the tree.

    Raises:
        ValueError: If two have the same path.
    """
    leaves = [(jax.tree_util.keystr(p), leaf) for p, leaf in jax.tree.leaves_with_path(tree)]
    arrays = {p: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for p, leaf in leaves}
    if len(arrays) < len(leaves):
        raise ValueError("Two arrays of the tree have the same path.")
    return arrays


def size(arrays: Iterable[Any]) -> int:
    """Counts the bytes that ``pack`` makes of arrays.

    Args:
        arrays: Arrays, shapes or random keys.
    """
    # There is at least one byte: nothing at all is hard to store.
    return max(1, sum(_bytes(_data_type(each)) for each in arrays))


def pack(arrays: Iterable[Any]) -> np.ndarray:
    """Copies the bytes of arrays from their devices; the arrays may be donated afterwards.

    Args:
        arrays: Arrays or random keys. Those of several processes are the same in all of them, or
            split over them; then all processes have to pack them.

    Returns:
        ``[size]`` uint8.
    """
    arrays = list(arrays)
    data = [jax.random.key_data(each) if _is_key(each) else each for each in arrays]
    data = [_of_this_process(each) if isinstance(each, jax.Array) else each for each in data]
    for each in data:
        if isinstance(each, jax.Array):
            each.copy_to_host_async()
    packed, end = np.zeros(size(arrays), np.uint8), 0
    for each in data:
        start, end = end, end + each.nbytes
        # A copy also on CPU, where a view would see what a donated array is overwritten with.
        packed[start:end] = np.ascontiguousarray(each).reshape(-1).view(np.uint8)
    return packed


def unpack(packed: np.ndarray, like: Iterable[Any]) -> list[Any]:
    """Makes arrays of their bytes.

    Args:
        packed: ``[size]`` uint8.
        like: An array, shape or random key for each: its shape, dtype, and the devices it is on.

    Returns:
        The arrays, of NumPy where ``like`` is.
    """
    arrays, end = [], 0
    for each in like:
        data = _data_type(each)
        start, end = end, end + _bytes(data)
        # A copy: jax may go on to use its memory.
        numbers = packed[start:end].copy().view(data.dtype).reshape(data.shape)
        arrays.append(_place(numbers, each))
    return arrays


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _data_type(array: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the numbers that an array, or random keys, consist of."""
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.eval_shape(jax.random.key_data, shape) if _is_key(array) else shape


def _bytes(data: jax.ShapeDtypeStruct) -> int:
    return math.prod(data.shape) * data.dtype.itemsize


def _of_this_process(array: jax.Array) -> jax.Array | np.ndarray:
    if array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    return multihost_utils.process_allgather(array, tiled=True)


def _place(data: np.ndarray, like: Any) -> Any:
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return data
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    array = jax.make_array_from_callback(data.shape, sharding, data.__getitem__)
    return jax.random.wrap_key_data(array, impl=_implementation(like)) if _is_key(like) else array


def _implementation(like: jax.Array | jax.ShapeDtypeStruct) -> Any:
    """Returns what makes random keys of a kind, which JAX tells of keys, but not of a shape."""
    told: list[Any] = []
    jax.eval_shape(lambda keys: told.append(jax.random.key_impl(keys)), like)
    return told[0]
