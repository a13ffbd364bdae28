"""Runs whose images are all on the devices (``config.data.feed='device'``)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from sire_jax.configuration.experiment import Experiment, Numbers
from sire_jax.data import contents, tasks
from sire_jax.data.augmentation import Batch
from sire_jax.job import distributed
from sire_jax.metrics import Metrics
from sire_jax.runs import parallel
from sire_jax.runs.feed import Measure, Taken, Totals, index_of
from sire_jax.runs.loading import load_data
from sire_jax.runs.placement import Placement
from sire_jax.runs.program import Program
from sire_jax.state import TrainState

PyTree = Any


class DeviceFeed:
    """A feed whose images are on every device, where batches are looked up and shuffled.

    Args:
        parts: The parts of the runs.
        placement: The devices.
        arrays: All images and labels, of the host.
        examples: The examples of each split, as indices into ``arrays``, ``[runs, n, …]``.
        described: What the data are; ``None`` if they are made up.
        skipped: What is wrong with each damaged image that was left out.
    """

    def __init__(
        self,
        parts: Experiment,
        placement: Placement,
        arrays: Mapping[str, np.ndarray],
        examples: Mapping[str, np.ndarray],
        described: contents.Contents | None = None,
        skipped: Sequence[str] = (),
    ):
        self._parts, self._config, self._placement = parts, parts.config, placement
        self.contents = described or contents.Contents({}, {})
        self.names = self.contents.names
        self._skipped, self._unreported = len(skipped), list(skipped)
        self.arrays = placement.place(arrays)
        self.examples: Mapping[str, Any] = placement.place(examples)
        self.steps_per_epoch = examples["train"].shape[1] // self._config.batch_size
        # Vectorizing over runs comes first: shuffling is no work.
        shuffle = partial(parallel.shuffle, batch_size=self._config.batch_size)
        shuffle = parallel.over_seeds(shuffle, (1,), self._config.seeds)
        shuffle = parallel.over_runs(shuffle, (1,), placement.mesh)
        self._shuffle = Program(jax.jit(shuffle, out_shardings=placement.of_runs))
        self._numbers = parts.numbers(), dict(parts.members.factors) if parts.members else {}
        self._steps: Any = self._step_program()

    @classmethod
    def load(cls, parts: Experiment, placement: Placement) -> "DeviceFeed":
        """Loads the data of the config, and draws the examples of each run.

        Args:
            parts: The parts of the runs.
            placement: The devices.

        Raises:
            ValueError: If the data are not what the config says.
            FileNotFoundError: If the data set is not prepared.
        """
        with distributed.together("loading the data"):
            dataset, draws = load_data(parts)
        # Training and test images in one array, so that one program measures all splits of a size.
        halves = [parts.task.prepare(source) for source in (dataset.train, dataset.test)]
        arrays = {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}
        train, validation, test = (np.stack(indices) for indices in zip(*draws, strict=True))
        examples = {"train": train, "validation": validation, "test": test + len(dataset.train)}
        return cls(parts, placement, arrays, examples, contents.of(dataset), dataset.skipped)

    def _lookup(self, crop: str = "none") -> Callable[[PyTree, jax.Array], Batch]:
        """Returns the function that makes the batch of examples, each device a part of it."""

        def lookup(arrays: tasks.Arrays, examples: jax.Array) -> Batch:
            batch = self._parts.lookup(arrays, examples, crop)
            return parallel.split_batch(batch, self._placement.mesh)

        return lookup

    def _step_program(self) -> Callable[..., Any]:
        placement = self._placement
        if self._config.parallel == "pmap":

            def lookup_part(arrays: tasks.Arrays, examples: jax.Array) -> Batch:
                return self._parts.lookup(arrays, parallel.own_part(examples, "data"))

            steps = self._over_steps(lookup_part, "data")
            runs = parallel.over_seeds(steps, (0, 4, 6, 7), self._config.seeds_at_once)
            return Program(parallel.pmapped(runs, placement.mesh, 8, donated=(2, 3)))
        # Every process reads at which steps losses broke.
        places = (placement.of_runs, placement.of_runs, placement.everywhere)
        options = self._parts.rule.compiler_options
        steps, shared = self._over_steps(self._lookup()), (0, 4, 6, 7)
        return placement.program(
            steps, shared, places, donate_argnums=(2, 3), compiler_options=options
        )

    def _over_steps(
        self, lookup: Callable[[PyTree, jax.Array], Batch], axis: str | None = None
    ) -> Callable[..., Any]:
        def steps(numbers: Numbers, factors: Mapping[str, jax.Array], *arrays: Any) -> Any:
            step = self._parts.step(axis, numbers, factors)
            return parallel.over_steps(step, lookup)(*arrays)

        return steps

    def order(self, state: TrainState, epoch: int) -> jax.Array:
        """Returns the examples of an epoch in their order, ``[runs, steps, batch, …]``."""
        return self._shuffle(state.key, np.int32(epoch), self.examples["train"])

    def take_steps(
        self, state: TrainState, sums: Metrics, order: jax.Array, first: int, count: int
    ) -> Taken:
        """Takes steps in all runs; see ``parallel.over_steps``."""
        span = np.int32(first), np.int32(count)
        return self._steps(*self._numbers, state, sums, self.arrays, order, *span)

    def planned_memory(self, state: TrainState, sums: Metrics) -> int | None:
        """Returns the bytes that a step takes with all arrays; see ``Feed``."""
        span = np.int32(0), np.int32(1)
        arrays, order = self.arrays, self.order(state, 0)
        return self._steps.memory(*self._numbers, state, sums, arrays, order, *span)

    def totals(self, measure: Measure, crop: str) -> Totals:
        """Makes the program that measures a split; see ``Feed``."""
        size = self._config.evaluate_batch_size
        batches = parallel.over_batches(measure, self._lookup(crop), size, self._placement.sharing)
        program = self._placement.program(batches, (3,))

        def run(params: PyTree, model_state: PyTree, fitted: PyTree, split: str) -> PyTree:
            return program(params, model_state, fitted, self.arrays, self.examples[split])

        return run

    def predictions(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        """Makes the program that predicts a split; see ``Feed``."""
        size, lookup = self._config.evaluate_batch_size, self._lookup("measured")
        batches = parallel.collected(predict, lookup, size, self._placement.sharing)
        program = self._placement.program(batches, (2,))

        def run(params: PyTree, model_state: PyTree, split: str, every: int) -> Any:
            thinned = self._placement.place(np.asarray(self.examples[split])[:, ::every])
            return program(params, model_state, self.arrays, thinned)

        return run

    def gradients(
        self, flow: Callable[[TrainState, Batch], Metrics]
    ) -> Callable[[TrainState, int], Metrics]:
        """Makes the program that measures an epoch's first batch; see ``Feed``."""
        lookup = self._lookup()
        program = self._placement.program(
            lambda state, arrays, order: flow(state, lookup(arrays, order[0])), (1,)
        )
        return lambda state, epoch: program(state, self.arrays, self.order(state, epoch))

    def look(self, split: str, chosen: int | Sequence[int], crop: str = "central") -> Batch:
        """Returns examples of a split of the first run, to look at; see ``Feed``."""
        return self._parts.lookup(self.arrays, self.examples[split][0][index_of(chosen)], crop)

    def newly_skipped(self) -> list[str]:
        """Returns what is wrong with the damaged images skipped since the last call."""
        new, self._unreported = self._unreported, []
        return new

    def number_skipped(self) -> int:
        """Returns how many damaged images have been skipped, by all processes."""
        return self._skipped
