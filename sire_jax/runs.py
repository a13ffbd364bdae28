"""A number of independent runs: their compiled programs, and their data on the device."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sire_jax import experiment, parallel
from sire_jax.data import tasks
from sire_jax.diagnostics import gradient_flow
from sire_jax.fitted_prediction import MOST, is_fitted
from sire_jax.metrics import Average, Metrics, means
from sire_jax.step import Best, TrainState

PyTree = Any


class Runs:
    """The compiled programs of a number of independent runs, and the data on the device.

    Args:
        parts: The parts of the run.

    Attributes:
        names: For each kind of label, of the images, the names of its classes.

    Raises:
        ValueError: If the data or the devices are not what the config says.
        FileNotFoundError: If the data set is not prepared.
    """

    def __init__(self, parts: experiment.Experiment):
        config = parts.config
        self.config, self.parts = config, parts
        self.mesh = parallel.data_mesh(config.devices, config.batch_size)
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        dataset, draws = parts.load()
        self.names = dataset.names
        # Training and test images in one array, so that one program measures all splits of a size.
        halves = [parts.task.prepare(source) for source in (dataset.train, dataset.test)]
        joined = {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}
        self.arrays = self.place(joined)
        # {split: [runs, examples, …]}
        train, validation, test = (np.stack(each) for each in zip(*draws, strict=True))
        test = test + len(dataset.train.image)
        self.examples = self.place({"train": train, "validation": validation, "test": test})
        self.steps_per_epoch = draws[0].train.shape[0] // config.batch_size
        self._compile()

    def place(self, tree: PyTree) -> PyTree:
        """Puts arrays on all devices."""
        return jax.device_put(tree, self.everywhere)

    def _compile(self) -> None:
        parts, config = self.parts, self.config
        at_once = config.seeds_at_once

        def lookup(arrays: tasks.Arrays, examples: jax.Array) -> dict[str, jax.Array]:
            return parallel.split_batch(parts.lookup(arrays, examples), self.mesh)

        steps = parallel.over_steps(parts.step(), lookup)
        batches = parallel.over_batches(
            parts.measure(), parts.lookup_cropped, config.evaluate_batch_size
        )
        # Runs once: not worth the compiler's seconds of optimization.
        self._initial = jax.jit(
            parallel.over_seeds(parts.initial_state, (), at_once),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        self._steps = jax.jit(parallel.over_seeds(steps, (2, 4, 5), at_once), donate_argnums=(0, 1))
        self._measure = jax.jit(parallel.over_seeds(batches, (3,), at_once))
        predict = parallel.collected(
            parts.predict(), parts.lookup_cropped, config.evaluate_batch_size
        )
        self._predict = jax.jit(parallel.over_seeds(predict, (2,), at_once))
        self._shuffle = jax.jit(
            parallel.over_seeds(
                lambda key, examples, epoch: parallel.shuffle(
                    key, epoch, examples, config.batch_size
                ),
                (2,),
                config.seeds,
            )
        )
        self._best = jax.jit(jax.vmap(Best.update), donate_argnums=0)
        flow = gradient_flow.make_gradient_flow(
            parts.network.apply, parts.objectives, parts.augment
        )
        self._gradients = jax.jit(
            parallel.over_seeds(
                lambda state, arrays, order: flow(state, lookup(arrays, order[0])), (1,), at_once
            )
        )

    def initial(self) -> TrainState:
        """Returns the initial states of all runs."""
        seeds = jnp.arange(self.config.seed, self.config.seed + self.config.seeds, dtype=jnp.int32)
        return self.place(self._initial(seeds))

    def checkpoint_tree(self) -> tuple[TrainState, Metrics, Best | None, jax.Array]:
        """Returns what a checkpoint holds, before the first step.

        The states of all runs; sums of the epoch's metrics; the best weights so far, if the run
        validates; the seconds spent.
        """
        state = self.initial()
        validates = "validation" in self.config.evaluate_splits
        best = jax.tree.map(jnp.copy, jax.vmap(Best.start)(state)) if validates else None
        return state, self.no_metrics(), best, jnp.zeros((), jnp.float32)

    def no_metrics(self) -> Metrics:
        """Returns sums of nothing, for the metrics of a step."""
        names = [f"{name}/loss" for name in (*self.parts.objectives, "total")]
        nothing = jnp.zeros(self.config.seeds, jnp.float32)
        # An array each: they are donated.
        return {k: self.place(Average(total=nothing.copy(), count=nothing.copy())) for k in names}

    def epoch_order(self, state: TrainState, epoch: int) -> jax.Array:
        """Returns the examples of an epoch, ``[runs, steps, batch, …]``."""
        return self._shuffle(state.key, self.examples["train"], jnp.asarray(epoch, jnp.int32))

    def take_steps(
        self, state: TrainState, sums: Metrics, order: jax.Array, first: int, count: int
    ) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
        """Takes steps in all runs; see ``parallel.over_steps``."""
        span = (jnp.asarray(first, jnp.int32), jnp.asarray(count, jnp.int32))
        return self._steps(state, sums, self.arrays, order, *span)

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
        examples, rules = self.examples[split], self.parts.predictions
        others = {k: each for k, each in (fitted or {}).items() if rules[k].split != split}
        found = self._measure(params, model_state, others, self.arrays, examples)
        return {name: np.asarray(each) for name, each in means(found).items()}

    def fit(self, params: PyTree, model_state: PyTree) -> dict[str, PyTree]:
        """Fits the prediction rules that have parameters; a value for each run."""
        rules = {k: each for k, each in self.parts.predictions.items() if is_fitted(each)}
        predicted = {}
        for split in sorted({each.split for each in rules.values()}):
            examples = self.examples[split]
            some = examples[:, :: -(-examples.shape[1] // MOST)]
            predicted[split] = self._predict(params, model_state, self.arrays, some)
        # One by one: a rule searches for as long as its own run needs.
        return {
            name: jax.jit(lambda given, rule=rule: jax.lax.map(lambda x: rule.fit(*x), given))(
                predicted[rule.split]
            )
            for name, rule in rules.items()
        }

    def gradients(self, state: TrainState, epoch: int) -> dict[str, np.ndarray]:
        """Measures the gradients of an epoch's first batch; a value for each run."""
        found = self._gradients(state, self.arrays, self.epoch_order(state, epoch))
        return {name: np.asarray(each) for name, each in means(found).items()}

    def better(self, best: Best, score: np.ndarray, state: TrainState) -> Best:
        """Keeps the weights of the runs whose validation accuracy is the best so far."""
        return self._best(best, jnp.asarray(score, jnp.float32), state)
