"""The arrays of a tree: by their paths, as numbers of the host, on the disk, and back.

The one place that knows orbax, which works in one process at a time: none waits for another in it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

PyTree = Any

# Bytes of an array that are read and written at a time.
_CHUNK = 2**26
# What orbax, which stores no tree of nothing, is given of one.
_NOTHING = {"nothing": np.zeros(1, np.uint8)}


@dataclass(frozen=True)
class ArrayType:
    """What an array is.

    >>> str(ArrayType.of(np.zeros((2, 3), np.float32))), str(ArrayType.of(jax.random.key(0)))
    ('float32[2, 3]', 'key<fry>[]')

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

    >>> tree = {"params": {"layer_1": {"kernel": np.ones((2, 3))}}, "steps": (np.int32(7),)}
    >>> {path: array.shape for path, array in flatten(tree).items()}
    {'params/layer_1/kernel': (2, 3), 'steps/0': ()}

    Args:
        tree: Arrays, shapes, random keys or numbers.

    Returns:
        The arrays by their paths, such as ``params/layer_1/kernel``, in the order of the tree.

    Raises:
        ValueError: If two have the same path, or paths that differ only in what joins their steps.
    """
    arrays: dict[str, Any] = {}
    by_dots: dict[str, str] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        steps = names(path)
        name = "/".join(steps)
        # orbax joins the steps with dots.
        first = by_dots.setdefault(".".join(steps), name)
        if name in arrays or first != name:
            raise ValueError(f"Two arrays of the tree have the same path: {first} and {name}.")
        arrays[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return arrays


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns what a person calls the steps of a path within a tree: keys, fields and places."""
    return tuple(jax.tree_util.keystr((step,), simple=True) for step in path)


def nested(tree: PyTree, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Makes nested mappings of a tree, whatever its nodes are.

    >>> nested((1, {"a": 2}), {"0": "first", "1/a": "second"})
    {'0': 'first', '1': {'a': 'second'}}

    Args:
        tree: Any tree.
        leaves: What takes the place of its leaves, by their paths; the others are left out.

    Returns:
        Mappings by what ``names`` calls the steps.
    """
    root: dict[str, Any] = {}
    for path, _ in jax.tree.leaves_with_path(tree):
        *outer, last = steps = names(path)
        if "/".join(steps) in leaves:
            inner = root
            for name in outer:
                inner = inner.setdefault(name, {})
            inner[last] = leaves["/".join(steps)]
    return root


def to_host(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies arrays from their devices; they may be donated afterwards.

    Args:
        arrays: Arrays or random keys. Those of several processes are the same in all of them, or
            split over them; then all processes have to copy them.

    Returns:
        The numbers that they, or random keys, consist of.
    """
    data = {k: jax.random.key_data(x) if _is_key(x) else x for k, x in arrays.items()}
    data = {k: _of_this_process(x) if isinstance(x, jax.Array) else x for k, x in data.items()}
    # All copies are begun before the first is waited for.
    for array in data.values():
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    # A copy also on CPU, where a view would see what a donated array is overwritten with.
    return {path: np.array(array, order="C") for path, array in data.items()}


def placed_like(numbers: np.ndarray, like: Any) -> Any:
    """Puts numbers where an array is, as its shape, dtype and devices say.

    Args:
        numbers: What ``to_host`` made of such an array.
        like: An array, a shape or random keys.

    Returns:
        Such an array on the same devices; for an array of NumPy's the numbers themselves.
    """
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return numbers
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    array = jax.make_array_from_callback(numbers.shape, sharding, numbers.__getitem__)
    return jax.random.wrap_key_data(array, impl=_implementation(like)) if _is_key(like) else array


def numbers_of(array: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the numbers that an array, or random keys, consist of."""
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.eval_shape(jax.random.key_data, shape) if _is_key(array) else shape


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _of_this_process(array: jax.Array) -> jax.Array | np.ndarray:
    if array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    return multihost_utils.process_allgather(array, tiled=True)


def _implementation(like: jax.Array | jax.ShapeDtypeStruct) -> Any:
    """Returns what makes random keys of a kind, which JAX tells of keys, but not of a shape."""
    implementations: list[Any] = []
    jax.eval_shape(lambda keys: implementations.append(jax.random.key_impl(keys)), like)
    return implementations[0]


# ---- On the disk.


def _checkpointer() -> ocp.Checkpointer:
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    # Numbers hardly compress, and trying takes half of the time.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def write(directory: Path, stored: PyTree) -> None:
    """Writes nested mappings of arrays.

    Args:
        directory: A directory that is not there yet.
        stored: What ``nested`` made, of arrays that are not empty: orbax stores none that is.
    """
    stored = stored or _NOTHING
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), stored)
    with _checkpointer() as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(stored, save_args=chunks))


def read(
    directory: Path, like: PyTree, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Reads what was written of a tree.

    Args:
        directory: Where it was written.
        like: Such a tree.
        shapes: Of the numbers of each of its arrays, by its path.

    Returns:
        The numbers of all arrays, by their paths; of empty ones none is on the disk.

    Raises:
        ValueError: If an array on the disk has another shape or dtype.
    """
    full = {name: shape for name, shape in shapes.items() if shape.size}
    empty = {
        name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items() if not shape.size
    }
    if not full:
        return empty
    stored = nested(like, full)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    with _checkpointer() as checkpointer:
        restored = checkpointer.restore(
            directory, args=ocp.args.PyTreeRestore(stored, restore_args=as_numpy)
        )
    arrays = flatten(restored)
    for name, shape in full.items():
        there, here = ArrayType.of(arrays[name]), ArrayType.of(shape)
        if there != here:
            raise ValueError(f"its {name} is {there}, not {here}")
    return empty | arrays


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Returns the SHA-256 of the bytes of arrays, one after another.

    Args:
        arrays: Of the host.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
