"""A run on images that are read and decoded while it trains (``config.data.feed='stream'``).

The order of the examples is that of ``DeviceFeed``, and so are the batches, but for random crops:
where a run is in its data is its number of steps, which its checkpoints have. Each process reads
its own part of each batch.
"""

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sire_jax.configuration.experiment import Experiment, Numbers
from sire_jax.data import contents, stream
from sire_jax.data.augmentation import Batch
from sire_jax.job import distributed
from sire_jax.metrics import Metrics
from sire_jax.registry import located
from sire_jax.runs import parallel
from sire_jax.runs.feed import Measure, Taken, Totals, index_of
from sire_jax.runs.loading import load_data
from sire_jax.runs.placement import Placement
from sire_jax.runs.program import Program
from sire_jax.state import TrainState

PyTree = Any
# A batch of the host, and what places it.
Arrays = Mapping[str, np.ndarray]
# Batches on their way to the devices, and steps on their way through them, beside the present one.
_AHEAD = 2


class Order(NamedTuple):
    """The order of the examples of an epoch.

    Attributes:
        epoch: Its number.
        examples: ``[steps, batch]``.
    """

    epoch: int
    examples: np.ndarray


class StreamFeed:
    """A feed of one run, whose images are streamed to the devices.

    Args:
        parts: The parts of the run.
        placement: The devices.

    Raises:
        ValueError: If the data are not what the config says.
        FileNotFoundError: If the data set is not there.
    """

    def __init__(self, parts: Experiment, placement: Placement):
        self._parts, self._config, self._placement = parts, parts.config, placement
        data = self._config.data
        with distributed.together("opening the data"):
            dataset, (draw,) = load_data(parts)
        self.contents = contents.of(dataset)
        self.names = self.contents.names
        self._records = {"train": dataset.train, "validation": dataset.train, "test": dataset.test}
        self.examples: Mapping[str, np.ndarray] = {
            split: np.asarray(indices)[None] for split, indices in draw._asdict().items()
        }
        self.steps_per_epoch = len(draw.train) // self._config.batch_size
        # What is wrong with the damaged images that this process has met, in their order.
        self._damaged: dict[str, None] = {}
        self._reported = 0
        self._split_over_devices = NamedSharding(placement.mesh, PartitionSpec("data"))
        shape = tuple(data.shape)
        random = data.random_resized_crop
        with located("config.data"):
            self._still = stream.Transform(shape, data.resize)
            self._training = stream.Transform(shape, data.resize, data.crop, random)
        # The stream that is open: its epoch, its next step, its batches.
        self._open: tuple[int, int, Iterator[Batch]] | None = None
        shuffle = partial(parallel.shuffle, batch_size=self._config.batch_size)
        self._shuffle = Program(jax.jit(shuffle))
        self._numbers = parts.numbers()
        self._steps: Any = self._step_program()

    @property
    def arrays(self) -> PyTree:
        """There are none: images are not kept.

        Raises:
            ValueError: Always, for programs that need all images at once.
        """
        raise ValueError(
            "This needs all images on the device, but the run streams them"
            " (config.data.feed is 'stream')."
        )

    # ---- Batches.

    def _batches(
        self,
        split: str,
        examples: np.ndarray,
        transform: stream.Transform,
        epoch: int = 0,
        first: int = 0,
    ) -> Iterator[stream.Batch]:
        """Reads this process's part of batches."""
        data, size = self._config.data, examples.shape[1] // jax.process_count()
        batches = stream.batches(
            self._records[split],
            examples,
            transform,
            (self._config.seed, epoch),
            first,
            slice(jax.process_index() * size, (jax.process_index() + 1) * size),
            data.workers,
            data.threads,
            data.damaged,
        )
        for batch in batches:
            self._damaged |= dict.fromkeys(batch.damaged)
            yield batch

    def _place_part(self, arrays: Arrays) -> Batch:
        """Makes a batch of what all processes have read of it."""
        place = self._split_over_devices
        return {
            key: jax.make_array_from_process_local_data(place, values)
            for key, values in arrays.items()
        }

    def _place_pmapped(self, arrays: Arrays) -> Arrays:
        """Splits this process's part of a batch over its devices, ``[devices, b, …]``."""
        # Several processes use all of their devices; a single one may leave some out.
        devices = jax.local_device_count() if jax.process_count() > 1 else self._placement.mesh.size
        return {k: np.reshape(v, (devices, -1, *v.shape[1:])) for k, v in arrays.items()}

    def _training_batches(self, order: Order, first: int) -> Iterator[Batch]:
        if self._open is None or self._open[:2] != (order.epoch, first):
            place = self._place_pmapped if self._config.parallel == "pmap" else self._place_part
            batches = self._batches("train", order.examples, self._training, order.epoch, first)
            self._open = order.epoch, first, ahead(without_mask(batches), place)
        return self._open[2]

    # ---- Programs over batches.

    def _step_program(self) -> Callable[..., Any]:
        pmap = self._config.parallel == "pmap"
        axis = "data" if pmap else None

        def run(
            numbers: Numbers, state: TrainState, sums: Metrics, broken: Any, batch: Batch
        ) -> Any:
            step = parallel.one_step(self._parts.step(axis, numbers))
            return step(state, sums, broken, self._parts.ready(batch))

        at_once = self._config.seeds_at_once
        if pmap:
            runs = parallel.over_seeds(run, (0, 4), at_once)
            mesh = self._placement.mesh
            return Program(parallel.pmapped(runs, mesh, 5, split=(4,), donated=(1, 2)))
        options = self._parts.rule.compiler_options
        return self._placement.program(run, (0, 4), donate_argnums=(1, 2), compiler_options=options)

    def order(self, state: TrainState, epoch: int) -> Order:
        """Returns the examples of an epoch in their order, for ``take_steps``."""
        examples = self._placement.place(self.examples["train"][0])
        key = jax.tree.map(lambda x: x[0], state.key)
        return Order(epoch, np.asarray(self._shuffle(key, np.int32(epoch), examples)))

    def take_steps(
        self, state: TrainState, sums: Metrics, order: Order, first: int, count: int
    ) -> Taken:
        """Takes steps; see ``parallel.over_steps``."""
        batches = self._training_batches(order, first)
        broken = self._placement.place(jax.tree.map(np.asarray, parallel.never_broken(sums)))
        under_way: deque[dict[str, Array]] = deque()
        for _ in range(count):
            state, sums, broken = self._steps(self._numbers, state, sums, broken, next(batches))
            under_way.append(broken)
            if len(under_way) > _AHEAD:
                # Batches would pile up on the devices.
                jax.block_until_ready(under_way.popleft())
        self._open = (order.epoch, first + count, batches)
        return state, sums, broken

    def planned_memory(self, state: TrainState, sums: Metrics) -> int | None:
        """Returns the bytes of a step on the first batch, which stays the next; may be None."""
        order = self.order(state, 0)
        batches = self._training_batches(order, 0)
        batch = next(batches)
        self._open = order.epoch, 0, itertools.chain([batch], batches)
        broken = self._placement.place(jax.tree.map(np.asarray, parallel.never_broken(sums)))
        return self._steps.memory(self._numbers, state, sums, broken, batch)

    def totals(self, measure: Measure, crop: str) -> Totals:
        """Makes the program that measures a split; see ``Feed``."""

        def measure_batch(
            params: PyTree, model_state: PyTree, fitted: PyTree, batch: Batch
        ) -> PyTree:
            batch = dict(batch)
            mask = batch.pop("intact").astype(jnp.float32)
            return measure(params, model_state, self._parts.ready(batch, crop), mask, fitted)

        program = self._placement.program(measure_batch, (3,))

        def run(params: PyTree, model_state: PyTree, fitted: PyTree, split: str) -> PyTree:
            total = None
            for batch in self._evaluated(split):
                sums = program(params, model_state, fitted, batch)
                total = sums if total is None else _sum(total, sums)
            return total

        return run

    def _evaluated(self, split: str, every: int = 1) -> Iterator[Batch]:
        """Yields the batches of a split; what fills up the last one is not ``intact``."""
        chosen = self.examples[split][0][::every]
        devices = self._placement.mesh.size
        size = -(-min(self._config.evaluate_batch_size, len(chosen)) // devices) * devices
        steps = -(-len(chosen) // size)
        # Begins anew with the first examples, where an array's own method would add zeros.
        filled = np.resize(chosen, steps * size)
        counts = (np.arange(steps * size) < len(chosen)).reshape(steps, size)
        part = size // jax.process_count()
        own = slice(jax.process_index() * part, (jax.process_index() + 1) * part)

        def counted() -> Iterator[Arrays]:
            batches = self._batches(split, filled.reshape(steps, size), self._still)
            for batch, real in zip(batches, counts[:, own], strict=True):
                yield {**batch.arrays, "intact": batch.arrays["intact"] & real}

        return ahead(counted(), self._place_part)

    def predictions(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        """Makes the program that predicts a split; see ``Feed``."""

        def predict_batch(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
            batch = dict(batch)
            mask = batch.pop("intact")
            return predict(params, model_state, self._parts.ready(batch, "measured")), mask

        program = self._placement.program(predict_batch, (2,))

        def run(params: PyTree, model_state: PyTree, split: str, every: int) -> Any:
            outputs = [
                program(params, model_state, batch) for batch in self._evaluated(split, every)
            ]
            joined, mask = jax.tree.map(
                lambda *parts: np.concatenate([np.asarray(x) for x in parts], axis=1), *outputs
            )
            return self._placement.place(jax.tree.map(lambda x: x[:, mask[0]], joined))

        return run

    def gradients(
        self, flow: Callable[[TrainState, Batch], Metrics]
    ) -> Callable[[TrainState, int], Metrics]:
        """Makes the program that measures an epoch's first batch; see ``Feed``."""

        def measure_batch(state: TrainState, batch: Batch) -> Metrics:
            return flow(state, self._parts.ready(batch))

        program = self._placement.program(measure_batch, (1,))

        def run(state: TrainState, epoch: int) -> Metrics:
            order = self.order(state, epoch)
            batches = self._batches("train", order.examples[:1], self._training, epoch)
            return program(state, next(ahead(without_mask(batches), self._place_part)))

        return run

    def newly_skipped(self) -> list[str]:
        """Returns what is wrong with the damaged images skipped since the last call."""
        new = list(self._damaged)[self._reported :]
        self._reported += len(new)
        return _gathered(new)

    def number_skipped(self) -> int:
        """Returns how many damaged images have been skipped, by all processes."""
        return len(set(_gathered(list(self._damaged))))

    def look(self, split: str, chosen: int | Sequence[int], crop: str = "central") -> Batch:
        """Returns examples of a split, to look at; see ``Feed``."""
        batches = self._batches(split, self.examples[split][:, index_of(chosen)], self._still)
        batch = jax.device_put(dict(next(without_mask(batches))))
        return self._parts.ready(batch, crop)


@jax.jit
def _sum(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _gathered(messages: list[str]) -> list[str]:
    """Returns the messages of all processes."""
    answers = distributed.exchange(json.dumps(messages))
    return [message for answer in answers for message in json.loads(answer)]


def without_mask(batches: Iterator[stream.Batch]) -> Iterator[Arrays]:
    """Yields the arrays that a network is trained on: what is damaged has been replaced."""
    for batch in batches:
        yield {key: values for key, values in batch.arrays.items() if key != "intact"}


def ahead(batches: Iterator[Arrays], place: Callable[[Arrays], Any]) -> Iterator[Any]:
    """Starts to bring batches to the devices before they are asked for.

    Args:
        batches: Batches of the host.
        place: Starts to bring one to the devices.
    """
    # The first ones take as long as workers need to start.
    with distributed.patience("reading the first images"):
        waiting = deque(map(place, itertools.islice(batches, _AHEAD + 1)))
    for batch in batches:
        yield waiting.popleft()
        waiting.append(place(batch))
    yield from waiting
