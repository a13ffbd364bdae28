"""Wrappers around the pure step: loops over steps, runs over seeds, a batch over devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sire_jax.data.augmentation import Batch
from sire_jax.metrics import Metrics, add
from sire_jax.step import Predict, Step, TrainState

PyTree = Any
NEVER = jnp.iinfo(jnp.int32).max
# Folded into a run's key, apart from its steps, which are folded in as 0, 1, … below 2**31.
SHUFFLE, INITIAL = 2**32 - 1, 2**32 - 2


def data_mesh(devices: int, batch_size: int) -> Mesh:
    """Makes the mesh over whose ``"data"`` axis batches are split.

    Args:
        devices: How many devices to use; 0 for all.
        batch_size: Examples in a batch.

    Returns:
        A mesh with one axis.

    Raises:
        ValueError: If there are fewer devices, or the batch can't be split evenly over them.
    """
    available = jax.devices()
    if devices > len(available):
        raise ValueError(f"config.devices is {devices}, but JAX finds only {len(available)}.")
    used = available[: devices or len(available)]
    if batch_size % len(used):
        raise ValueError(
            f"config.batch_size is {batch_size}, which {len(used)} devices can't share evenly;"
            f" take a multiple of {len(used)}, or other config.devices."
        )
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(used),), ("data",), axis_types=kind, devices=used)


def split_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits every array of a batch over the mesh, along its first axis; a no-op on one device."""
    if mesh.size == 1:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))


def over_steps(
    step: Step, lookup: Callable[[PyTree, Array], Batch]
) -> Callable[..., tuple[TrainState, Metrics, dict[str, Array]]]:
    """Repeats a step inside one program.

    Args:
        step: The training step.
        lookup: Maps ``(arrays, examples)`` to a batch.

    Returns:
        A function ``(state, sums, arrays, order, first, count)`` that takes ``count`` steps with
        the examples ``order[first]``, ``order[first + 1]``, …, and returns the state, ``sums`` with
        the steps' metrics added, and for each metric the first step whose value was not finite,
        ``NEVER`` if all were. The program is the same for any ``first`` and ``count``.
    """

    def run(
        state: TrainState, sums: Metrics, arrays: PyTree, order: Array, first: Array, count: Array
    ) -> tuple[TrainState, Metrics, dict[str, Array]]:
        def body(i: Array, carry: Any) -> Any:
            state, sums, broken = carry
            at = state.step
            state, found = step(state, lookup(arrays, order[i]))
            now = {k: jnp.where(jnp.isfinite(v.total), NEVER, at) for k, v in found.items()}
            return state, add(sums, found), jax.tree.map(jnp.minimum, broken, now)

        broken = {name: jnp.asarray(NEVER, jnp.int32) for name in sums}
        return jax.lax.fori_loop(first, first + count, body, (state, sums, broken))

    return run


def over_batches(
    measure: Callable[..., PyTree], lookup: Callable[[PyTree, Array], Batch], batch_size: int
) -> Callable[[PyTree, PyTree, Mapping[str, PyTree], PyTree, Array], PyTree]:
    """Measures any number of examples, batch by batch, inside one program.

    Args:
        measure: Measures a batch: sums over the examples that its mask, ``[b]``, counts.
        lookup: Maps ``(arrays, examples)`` to a batch.
        batch_size: Examples measured at once.

    Returns:
        A function ``(params, model_state, fitted, arrays, examples)`` to the sums.
    """

    def run(
        params: PyTree,
        model_state: PyTree,
        fitted: Mapping[str, PyTree],
        arrays: PyTree,
        examples: Array,
    ) -> PyTree:
        filled = _in_batches(examples, batch_size)
        mask = jnp.arange(filled.shape[0] * filled.shape[1]) < len(examples)

        def one(chosen: tuple[Array, Array]) -> PyTree:
            indices, counts = chosen
            return measure(params, model_state, lookup(arrays, indices), counts, fitted)

        each = jax.lax.map(one, (filled, mask.astype(jnp.float32).reshape(filled.shape[:2])))
        return jax.tree.map(lambda x: x.sum(0), each)

    return run


def collected(
    predict: Predict, lookup: Callable[[PyTree, Array], Batch], batch_size: int
) -> Callable[[PyTree, PyTree, PyTree, Array], Any]:
    """Collects what is predicted of any number of examples, batch by batch, inside one program.

    Args:
        predict: Maps ``(params, model_state, batch)`` to a tree of arrays ``[b, …]``.
        lookup: Maps ``(arrays, examples)`` to a batch.
        batch_size: Examples at once.

    Returns:
        A function ``(params, model_state, arrays, examples)`` to the tree, ``[n, …]``.
    """

    def run(params: PyTree, model_state: PyTree, arrays: PyTree, examples: Array) -> Any:
        filled = _in_batches(examples, batch_size)
        each = jax.lax.map(lambda some: predict(params, model_state, lookup(arrays, some)), filled)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(examples)], each)

    return run


def _in_batches(examples: Array, batch_size: int) -> Array:
    """Puts examples ``[n, …]`` in batches; the last is filled up with the first example."""
    size = min(batch_size, len(examples))
    batches = -(-len(examples) // size)
    missing = batches * size - len(examples)
    filled = jnp.concatenate([examples, jnp.repeat(examples[:1], missing, axis=0)])
    return filled.reshape(batches, size, *examples.shape[1:])


def over_seeds(function: Callable[..., Any], shared: tuple[int, ...], at_once: int) -> Any:
    """Makes one program of independent runs, which lie along a new first axis.

    Args:
        function: Any function of arrays.
        shared: Positions of the arguments that are the same for all runs.
        at_once: How many runs are vectorized with ``vmap``; the others follow in a loop. 0 chooses:
            all on an accelerator, one by one on a CPU, whose caches hold one small network and
            which would turn a vectorized convolution into a slow grouped one.

    Returns:
        The function with a leading axis of runs on the arguments not in ``shared`` and on its
        results.
    """

    def run(*args: Any) -> Any:
        own = [i for i in range(len(args)) if i not in shared]
        runs = jax.tree.leaves(args[own[0]])[0].shape[0]
        size = at_once or (1 if jax.default_backend() == "cpu" else runs)

        def one(given: tuple[Any, ...]) -> Any:
            placed = dict(zip(own, given, strict=True))
            return function(*(placed.get(i, arg) for i, arg in enumerate(args)))

        given = tuple(args[i] for i in own)
        if size >= runs > 1:
            return jax.vmap(lambda *each: one(each))(*given)
        if runs == 1:
            # No loop around a single run: a compiler sees more without.
            alone = one(jax.tree.map(lambda x: x[0], given))
            return jax.tree.map(lambda x: jnp.asarray(x)[None], alone)
        # Not batch_size=1, which would vectorize over one run.
        return jax.lax.map(one, given, batch_size=size if size > 1 else None)

    return run


def shuffle(key: Array, epoch: Array, examples: Array, batch_size: int) -> Array:
    """Puts the examples of an epoch in random order and in batches.

    Args:
        key: The run's random key.
        epoch: Number of the epoch; the same epoch always has the same order.
        examples: Indices ``[n]`` or ``[n, 2]``.
        batch_size: Examples in a batch; what is left over waits for another epoch.

    Returns:
        ``[n // batch_size, batch_size, …]``.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, SHUFFLE), epoch)
    steps = len(examples) // batch_size
    order = jax.random.permutation(key, len(examples))[: steps * batch_size]
    return examples[order].reshape(steps, batch_size, *examples.shape[1:])
