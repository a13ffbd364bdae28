"""A number of independent runs: their compiled programs, and their data on the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sire_jax.configuration import experiment
from sire_jax.data import contents, tasks
from sire_jax.data.augmentation import Batch
from sire_jax.data.dataset import Dataset
from sire_jax.fitted_prediction import MOST, is_fitted
from sire_jax.job import compilation, distributed
from sire_jax.metrics import Average, Metrics, means
from sire_jax.runs import gradient_flow, parallel
from sire_jax.runs.loading import load_data
from sire_jax.runs.program import Program
from sire_jax.state import Best, TrainState

PyTree = Any
# The state of all runs, sums of the epoch's metrics, the best weights, the seconds spent.
Checkpoint = tuple[TrainState, Metrics, Best | None, jax.Array]


class Runs:
    """The compiled programs of a number of independent runs, and the data on the device.

    Args:
        parts: The parts of the run.

    Attributes:
        names: For each kind of label, of the images, the names of its classes.
        examples: The examples of each split, as indices into ``arrays``, ``[runs, n, …]``.
        arrays: All images and labels, on every device.
        contents: What the data are, wherever they lie.
        fingerprint: Of the data, which is the same on all processes.

    Raises:
        ValueError: If the data or the devices are not what the config says.
        FileNotFoundError: If the data set is not prepared.
    """

    def __init__(self, parts: experiment.Experiment):
        config = parts.config
        self.config, self.parts = config, parts
        compilation.keep(config.compilation_cache)
        self.mesh = parallel.device_mesh(
            config.devices, config.devices_share, config.batch_size, config.seeds
        )
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        spread = "runs" in self.mesh.axis_names
        self.of_runs = (
            NamedSharding(self.mesh, PartitionSpec("runs")) if spread else self.everywhere
        )
        self._load()
        self._compile()

    def _load(self) -> None:
        with distributed.together("loading the data"):
            dataset, draws = load_data(self.parts)
        self._describe(dataset)
        # What is wrong with damaged images that were left out, until it is said.
        self._skipped, self._unsaid = len(dataset.skipped), list(dataset.skipped)
        # Training and test images in one array, so that one program measures all splits of a size.
        halves = [self.parts.task.prepare(source) for source in (dataset.train, dataset.test)]
        self.arrays = self.place(
            {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}
        )
        train, validation, test = (np.stack(each) for each in zip(*draws, strict=True))
        test = test + len(dataset.train)
        self.examples = self.place({"train": train, "validation": validation, "test": test})
        self.steps_per_epoch = draws[0].train.shape[0] // self.config.batch_size

    def _describe(self, dataset: Dataset[Any]) -> None:
        self.names = dict(dataset.names)
        self.contents = contents.of(dataset)
        self.fingerprint = self.contents.brief()

    def place(self, tree: PyTree) -> PyTree:
        """Puts arrays of the host, which all processes have, on all devices."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self.everywhere)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.everywhere, np.asarray(x)), tree
        )

    def program(
        self, function: Callable[..., Any], shared: tuple[int, ...], result: Any = None, **jit: Any
    ) -> "Program":
        """Compiles a function of one run for all of them (``over_seeds``, ``over_runs``).

        Args:
            function: Any function of arrays.
            shared: Positions of the arguments that are the same for all runs.
            result: Where the results are; on all devices by default.
            **jit: Arguments of ``jax.jit``.

        Returns:
            The function with a leading axis of runs.
        """
        runs = parallel.over_seeds(function, shared, self.config.seeds_at_once)
        runs = parallel.over_runs(runs, shared, self.mesh)
        return Program(jax.jit(runs, out_shardings=result or self.everywhere, **jit))

    def _compile(self) -> None:
        parts, config = self.parts, self.config
        # Runs once: not worth the compiler's seconds of optimization.
        quick = {"xla_backend_optimization_level": 0}
        self._initial = self.program(parts.initial_state, (), self.of_runs, compiler_options=quick)
        best = self.of_runs if "validation" in config.evaluate_splits else None
        places = (self.of_runs, self.of_runs, best, self.everywhere)
        self._start = Program(jax.jit(self._first_checkpoint, out_shardings=places))
        self._no_metrics = Program(jax.jit(self._nothing, out_shardings=self.of_runs))
        self._finite = Program(jax.jit(_finite, out_shardings=self.everywhere))
        self._means = Program(jax.jit(means, out_shardings=self.everywhere))
        self._steps: Any = self._step_program()
        self._measure = self.totals(parts.measure(), "measured")
        self._predict = self._prediction_program()
        self._best = Program(
            jax.jit(jax.vmap(Best.update), donate_argnums=0, out_shardings=self.of_runs)
        )
        self._gradients = self._gradient_program()

    # ---- Programs over the examples; those of a stream are in ``runs.streamed``.

    def _lookup(self, crop: str = "none") -> Callable[[PyTree, jax.Array], Batch]:
        """Returns the function that makes the batch of examples, each device a part of it."""

        def lookup(arrays: tasks.Arrays, examples: jax.Array) -> Batch:
            return parallel.split_batch(self.parts.lookup(arrays, examples, crop), self.mesh)

        return lookup

    def _step_program(self) -> Callable[..., Any]:
        config, at_once = self.config, self.config.seeds_at_once
        # Vectorizing over runs comes first: shuffling is no work.
        self._shuffle = Program(
            jax.jit(
                parallel.over_runs(
                    parallel.over_seeds(self._shuffled, (2,), config.seeds), (2,), self.mesh
                ),
                out_shardings=self.of_runs,
            )
        )
        if config.parallel == "pmap":

            def own(arrays: tasks.Arrays, examples: jax.Array) -> Batch:
                part = parallel.own_part(examples, "data")
                return self.parts.lookup(arrays, part)

            steps = parallel.over_steps(self.parts.step("data"), own)
            runs = parallel.over_seeds(steps, (2, 4, 5), at_once)
            return Program(parallel.pmapped(runs, self.mesh, 6, donated=(0, 1)))
        steps = parallel.over_steps(self.parts.step(), self._lookup())
        places = (self.of_runs, self.of_runs, self.everywhere)
        return self.program(steps, (2, 4, 5), places, donate_argnums=(0, 1))

    def _shuffled(self, key: jax.Array, examples: jax.Array, epoch: jax.Array) -> jax.Array:
        return parallel.shuffle(key, epoch, examples, self.config.batch_size)

    def totals(
        self, measure: Callable[..., PyTree], crop: str
    ) -> Callable[[PyTree, PyTree, Mapping[str, PyTree], str], PyTree]:
        """Makes the program that measures a split.

        Args:
            measure: Measures a batch; a function ``(params, model_state, batch, mask, fitted)`` to
                sums over the examples that the mask counts.
            crop: Which crops of the images are measured; see ``Forward.ready``.

        Returns:
            A function ``(params, model_state, fitted, split)`` to the sums, for each run.
        """
        size, devices = self.config.evaluate_batch_size, self._sharing_a_batch()
        batches = parallel.over_batches(measure, self._lookup(crop), size, devices)
        program = self.program(batches, (3,))

        def run(params: PyTree, model_state: PyTree, fitted: PyTree, split: str) -> PyTree:
            return program(params, model_state, fitted, self.arrays, self.examples[split])

        return run

    def _sharing_a_batch(self) -> int:
        return self.mesh.size if "data" in self.mesh.axis_names else 1

    def _prediction_program(self) -> Callable[[PyTree, PyTree, str, int], Any]:
        size, devices = self.config.evaluate_batch_size, self._sharing_a_batch()
        lookup = self._lookup("measured")
        program = self.program(
            parallel.collected(self.parts.predict(), lookup, size, devices), (2,)
        )

        def run(params: PyTree, model_state: PyTree, split: str, every: int) -> Any:
            some = self.place(np.asarray(self.examples[split])[:, ::every])
            return program(params, model_state, self.arrays, some)

        return run

    def _gradient_program(self) -> Callable[[TrainState, int], Metrics]:
        lookup, flow = self._lookup(), self._flow()
        program = self.program(
            lambda state, arrays, order: flow(state, lookup(arrays, order[0])), (1,)
        )
        return lambda state, epoch: program(state, self.arrays, self.epoch_order(state, epoch))

    def _flow(self) -> Callable[[TrainState, Batch], Metrics]:
        parts = self.parts
        return gradient_flow.make_gradient_flow(
            parts.network.apply, parts.objectives, parts.augment
        )

    # ---- What training and measuring use.

    def initial(self) -> TrainState:
        """Returns the initial states of all runs."""
        return self._initial(self._seeds())

    def _seeds(self) -> np.ndarray:
        return np.arange(self.config.seed, self.config.seed + self.config.seeds, dtype=np.int32)

    def start(self) -> Checkpoint:
        """Returns what a checkpoint holds, before the first step."""
        return self._start(self.initial())

    def checkpoint_shapes(self) -> Checkpoint:
        """Returns the shapes of what a checkpoint holds and its place; nothing is computed."""
        states = jax.eval_shape(jax.vmap(self.parts.initial_state), self._seeds())
        *of_runs, seconds = jax.eval_shape(self._first_checkpoint, states)

        def placed(tree: PyTree, place: NamedSharding) -> PyTree:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
            )

        state, sums, best = placed(of_runs, self.of_runs)
        return state, sums, best, placed(seconds, self.everywhere)

    def _first_checkpoint(self, state: TrainState) -> Checkpoint:
        validates = "validation" in self.config.evaluate_splits
        # Copied, as the state is donated.
        best = jax.tree.map(jnp.copy, jax.vmap(Best.start)(state)) if validates else None
        return state, self._nothing(), best, jnp.zeros((), jnp.float32)

    def _nothing(self) -> Metrics:
        names = [f"{name}/loss" for name in (*self.parts.objectives, "total")]
        zeros = (self.config.seeds,), jnp.float32
        return {k: Average(total=jnp.zeros(*zeros), count=jnp.zeros(*zeros)) for k in names}

    def no_metrics(self) -> Metrics:
        """Returns sums of nothing, for the metrics of a step."""
        return self._no_metrics()

    def epoch_order(self, state: TrainState, epoch: int) -> Any:
        """Returns the examples of an epoch, for ``take_steps``: ``[runs, steps, batch, …]``."""
        return self._shuffle(state.key, self.examples["train"], np.int32(epoch))

    def take_steps(
        self, state: TrainState, sums: Metrics, order: Any, first: int, count: int
    ) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
        """Takes steps in all runs; see ``parallel.over_steps``."""
        span = np.int32(first), np.int32(count)
        return self._steps(state, sums, self.arrays, order, *span)

    def planned_memory(self, state: TrainState) -> int | None:
        """Returns the bytes that a step takes with all arrays, as the compiler plans; may be None.

        The program is compiled; the call that follows doesn't compile it again.
        """
        span = np.int32(0), np.int32(1)
        return self._steps.memory(
            state, self.no_metrics(), self.arrays, self.epoch_order(state, 0), *span
        )

    def measure(
        self,
        params: PyTree,
        model_state: PyTree,
        split: str,
        fitted: Mapping[str, PyTree] | None = None,
    ) -> dict[str, np.ndarray]:
        """Measures a split; a value for each run.

        Fitted predictions need what ``fit`` returned; none is measured on what it was fitted to.
        """
        rules = self.parts.predictions
        others = {k: each for k, each in (fitted or {}).items() if rules[k].split != split}
        return self.averages(self._measure(params, model_state, others, split))

    def averages(self, metrics: Metrics) -> dict[str, np.ndarray]:
        """Divides metrics; a value for each run."""
        return {name: np.asarray(each) for name, each in self._means(metrics).items()}

    def finite(self, state: TrainState) -> np.ndarray:
        """Tells of each run whether all its parameters and states are finite."""
        return np.asarray(self._finite((state.params, state.model_state, state.update_state)))

    def fit(self, params: PyTree, model_state: PyTree) -> dict[str, PyTree]:
        """Fits the prediction rules that have parameters; a value for each run."""
        rules = {k: each for k, each in self.parts.predictions.items() if is_fitted(each)}
        predicted = {}
        for split in sorted({each.split for each in rules.values()}):
            every = -(-self.examples[split].shape[1] // MOST)
            predicted[split] = self._predict(params, model_state, split, every)
        # One by one: a rule searches for as long as its own run needs.
        return {
            name: Program(
                jax.jit(lambda given, rule=rule: jax.lax.map(lambda x: rule.fit(*x), given))
            )(predicted[rule.split])
            for name, rule in rules.items()
        }

    def gradients(self, state: TrainState, epoch: int) -> dict[str, np.ndarray]:
        """Measures the gradients of an epoch's first batch; a value for each run."""
        return self.averages(self._gradients(state, epoch))

    def better(self, best: Best, score: np.ndarray, state: TrainState) -> Best:
        """Keeps the weights of the runs whose validation accuracy is the best so far."""
        return self._best(best, np.asarray(score, np.float32), state)

    def newly_skipped(self) -> list[str]:
        """Returns what is wrong with the damaged images skipped since the last call."""
        new, self._unsaid = self._unsaid, []
        return new

    def number_skipped(self) -> int:
        """Returns how many damaged images have been skipped, by all processes."""
        return self._skipped

    def look(
        self,
        split: str,
        chosen: int | Sequence[int],
        crop: str = "central",
    ) -> Batch:
        """Returns examples of a split of the first run, to look at.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            chosen: How many, the first ones, all if there are fewer; or their numbers.
            crop: Which crops of the images; see ``Forward.ready``.
        """
        return self.parts.lookup(self.arrays, self.examples[split][0][some(chosen)], crop)


def _finite(trees: PyTree) -> jax.Array:
    """Tells of each run, along the first axis, whether all its numbers are finite."""
    numbers = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in numbers]).all(0)


def some(chosen: int | Sequence[int]) -> slice | np.ndarray:
    """Returns the index of the first examples, or of those with some numbers."""
    return slice(chosen) if isinstance(chosen, int) else np.asarray(chosen)


class UnloadedRuns(Runs):
    """Runs without their data: for what needs only weights and the names of classes.

    Args:
        parts: The parts of the run.
        names: For each kind of label the names of its classes.
    """

    def __init__(self, parts: experiment.Experiment, names: Mapping[str, tuple[str, ...]]):
        self.names = dict(names)
        super().__init__(parts)

    def _load(self) -> None:
        """Loads nothing."""
