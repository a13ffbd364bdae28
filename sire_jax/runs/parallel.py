"""Wrappers around the pure step: loops over steps, runs over seeds, either over devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sire_jax.data.augmentation import Batch
from sire_jax.job import cpu
from sire_jax.metrics import Metrics, add
from sire_jax.state import SHUFFLE, TrainState
from sire_jax.step import Predict, Step

PyTree = Any
NEVER = jnp.iinfo(jnp.int32).max


def device_mesh(devices: int, share: str, batch_size: int, seeds: int) -> Mesh:
    """Makes the mesh of the devices of all processes that train together.

    Args:
        devices: How many devices to use; 0 for all.
        share: What they share: the ``"batch"`` of each run, along the axis ``"data"``, or the runs
            themselves, along the axis ``"runs"``.
        batch_size: Examples in a batch, over all processes.
        seeds: Number of runs.

    Returns:
        A mesh with one axis, in the order of the processes.

    Raises:
        ValueError: If there are fewer devices, several processes should not use all of theirs, the
            batch or the runs can't be shared evenly, or those of a CPU have too few threads.
    """
    # Those of a process beside each other: what it reads of a batch is then one piece.
    available = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if devices > len(available):
        raise ValueError(f"config.devices is {devices}, but JAX finds only {len(available)}.")
    used = available[: devices or len(available)]
    processes, number = jax.process_count(), len(used)
    if number != len(available) and processes > 1:
        raise ValueError(
            f"config.devices is {devices}, but the {processes} processes have {len(available)} and"
            " train on all of theirs; set it to 0, or start fewer processes."
        )
    shared = {"batch": ("batch_size", batch_size, "data"), "runs": ("seeds", seeds, "runs")}
    key, divided, axis = shared[share]
    if divided % number:
        raise ValueError(
            f"config.{key} is {divided}, which {number} devices can't share evenly"
            f" ({processes} process{'es' * (processes > 1)} x {number // processes}); take a"
            f" multiple of {number}, or other config.devices{_advice(share, seeds, number)}."
        )
    if used[0].platform == "cpu":
        cpu.check_threads(number // processes)
    # Not jax.make_mesh, which would put TPUs in another order.
    return Mesh(np.array(used), (axis,), axis_types=(jax.sharding.AxisType.Auto,))


def _advice(share: str, seeds: int, devices: int) -> str:
    possible = share == "batch" and seeds > 1 and seeds % devices == 0
    return ", or let them share the runs: config.devices_share='runs'" if possible else ""


def split_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits every array of a batch over the mesh, along its first axis.

    Nothing changes on one device, or where each device has the whole batches of its own runs.
    """
    if mesh.size == 1 or "data" not in mesh.axis_names:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))


def own_part(examples: Array, axis: str) -> Array:
    """Returns this device's part of examples ``[b, …]``, inside of ``pmap``."""
    size = len(examples) // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(examples, jax.lax.axis_index(axis) * size, size)


def over_runs(function: Callable[..., Any], shared: tuple[int, ...], mesh: Mesh) -> Any:
    """Gives each device runs of its own, where the devices share those.

    Args:
        function: A function of arrays with a leading axis of runs (``over_seeds``).
        shared: Positions of the arguments that are the same for all runs.
        mesh: The devices; where they share batches, the function is returned as it is.

    Returns:
        The function, which each device computes for its share of the runs.
    """
    if "runs" not in mesh.axis_names:
        return function
    everyone, own = PartitionSpec(), PartitionSpec("runs")

    def run(*args: Any) -> Any:
        specs = tuple(everyone if i in shared else own for i in range(len(args)))
        # Nothing in a run depends on another one: there is nothing for the check to find.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
        return mapped(*args)

    return run


def pmapped(
    function: Callable[..., Any],
    mesh: Mesh,
    arguments: int,
    split: tuple[int, ...] = (),
    donated: tuple[int, ...] = (),
) -> Any:
    """Runs a function on every device with ``jax.pmap``; its results are the same on all.

    Args:
        function: A function of arrays that averages over the axis ``"data"`` by itself.
        mesh: The devices.
        arguments: How many arguments it takes.
        split: Positions of arguments ``[devices of this process, …]`` of which each device has its
            own; all others are the same on all devices.
        donated: Positions of arguments whose memory the results may take.

    Returns:
        The function; arrays go in and come out as under ``jit``, replicated over the mesh.
    """
    devices = mesh.devices.ravel().tolist()
    local = sum(device.process_index == jax.process_index() for device in devices)
    everywhere = NamedSharding(mesh, PartitionSpec())
    # pmap insists on an argument that differs: the first.
    mapped = jax.pmap(
        lambda _, *args: function(*args),
        axis_name="data",
        in_axes=(0, *(0 if i in split else None for i in range(arguments))),
        out_axes=None,
        devices=devices,
        donate_argnums=tuple(i + 1 for i in donated),
    )

    def run(*args: Any) -> Any:
        results = mapped(np.arange(local), *args)
        return jax.tree.map(lambda x: _everywhere(x, everywhere), results)

    return run


def _everywhere(x: Array, everywhere: NamedSharding) -> Array:
    """Says of an array that this process's devices hold that those of the others hold it, too."""
    if x.sharding.is_equivalent_to(everywhere, x.ndim):
        return x
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, everywhere, shards)


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
    take = one_step(step)

    def run(
        state: TrainState, sums: Metrics, arrays: PyTree, order: Array, first: Array, count: Array
    ) -> tuple[TrainState, Metrics, dict[str, Array]]:
        def body(i: Array, carry: Any) -> Any:
            return take(*carry, lookup(arrays, order[i]))

        return jax.lax.fori_loop(first, first + count, body, (state, sums, never_broken(sums)))

    return run


def one_step(
    step: Step,
) -> Callable[..., tuple[TrainState, Metrics, dict[str, Array]]]:
    """Takes a step and keeps the books.

    Args:
        step: The training step.

    Returns:
        A function ``(state, sums, broken, batch)`` that returns the state after the step, ``sums``
        with the step's metrics added, and ``broken`` with the step's number for each metric that is
        not finite for the first time.
    """

    def run(
        state: TrainState, sums: Metrics, broken: dict[str, Array], batch: Batch
    ) -> tuple[TrainState, Metrics, dict[str, Array]]:
        number = state.step
        state, metrics = step(state, batch)
        broken_now = {
            k: jnp.where(jnp.isfinite(v.total), NEVER, number) for k, v in metrics.items()
        }
        return state, add(sums, metrics), jax.tree.map(jnp.minimum, broken, broken_now)

    return run


def never_broken(sums: Metrics) -> dict[str, Array]:
    """Returns the books of metrics of which none was not finite yet."""
    return {name: jnp.full(average.count.shape, NEVER, jnp.int32) for name, average in sums.items()}


def over_batches(
    measure: Callable[..., PyTree],
    lookup: Callable[[PyTree, Array], Batch],
    batch_size: int,
    devices: int = 1,
) -> Callable[[PyTree, PyTree, Mapping[str, PyTree], PyTree, Array], PyTree]:
    """Measures any number of examples, batch by batch, inside one program.

    Args:
        measure: Measures a batch: sums over the examples that its mask, ``[b]``, counts.
        lookup: Maps ``(arrays, examples)`` to a batch.
        batch_size: Examples measured at once.
        devices: How many devices share a batch: it is enlarged to a multiple of them.

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
        filled = _in_batches(examples, batch_size, devices)
        mask = jnp.arange(filled.shape[0] * filled.shape[1]) < len(examples)

        def measure_batch(chosen: tuple[Array, Array]) -> PyTree:
            indices, counts = chosen
            return measure(params, model_state, lookup(arrays, indices), counts, fitted)

        sums = jax.lax.map(
            measure_batch, (filled, mask.astype(jnp.float32).reshape(filled.shape[:2]))
        )
        return jax.tree.map(lambda x: x.sum(0), sums)

    return run


def collected(
    predict: Predict,
    lookup: Callable[[PyTree, Array], Batch],
    batch_size: int,
    devices: int = 1,
) -> Callable[[PyTree, PyTree, PyTree, Array], Any]:
    """Collects what is predicted of any number of examples, batch by batch, inside one program.

    Args:
        predict: Maps ``(params, model_state, batch)`` to a tree of arrays ``[b, …]``.
        lookup: Maps ``(arrays, examples)`` to a batch.
        batch_size: Examples at once.
        devices: How many devices share a batch: it is enlarged to a multiple of them.

    Returns:
        A function ``(params, model_state, arrays, examples)`` to the tree, ``[n, …]``.
    """

    def run(params: PyTree, model_state: PyTree, arrays: PyTree, examples: Array) -> Any:
        filled = _in_batches(examples, batch_size, devices)
        predictions = jax.lax.map(
            lambda indices: predict(params, model_state, lookup(arrays, indices)), filled
        )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(examples)], predictions)

    return run


def _in_batches(examples: Array, batch_size: int, devices: int) -> Array:
    """Puts examples ``[n, …]`` in batches; the last is filled up with the first example."""
    size = -(-min(batch_size, len(examples)) // devices) * devices
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
        positions = [i for i in range(len(args)) if i not in shared]
        runs = jax.tree.leaves([args[i] for i in positions])[0].shape[0]
        size = at_once or (1 if jax.default_backend() == "cpu" else runs)

        def single(arrays: tuple[Any, ...]) -> Any:
            placed = dict(zip(positions, arrays, strict=True))
            return function(*(placed.get(i, arg) for i, arg in enumerate(args)))

        arrays = tuple(args[i] for i in positions)
        if size >= runs > 1:
            return jax.vmap(lambda *arrays: single(arrays))(*arrays)
        if runs == 1:
            # No loop around a single run: a compiler sees more without.
            alone = single(jax.tree.map(lambda x: x[0], arrays))
            return jax.tree.map(lambda x: jnp.asarray(x)[None], alone)
        # Not batch_size=1, which would vectorize over one run.
        return jax.lax.map(single, arrays, batch_size=size if size > 1 else None)

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
