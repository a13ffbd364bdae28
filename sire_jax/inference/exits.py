"""The exits of a trained network: outputs at which images may leave, with all that tells when."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sire_jax import objectives, traced
from sire_jax.configuration.experiment import Experiment
from sire_jax.inference.cascade import filled
from sire_jax.inference.stages import Stage, split
from sire_jax.metrics import class_logits
from sire_jax.networks import MAIN
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import kept_weights, of_first_seed, open_run

PyTree = Any


def classified(parts: Experiment, output: str) -> list[str]:
    """Returns the targets, one label an example, that an output is trained to classify."""
    names = objectives.accurate(parts.objectives, parts.outputs, parts.batch)
    chosen = [parts.objectives[name] for name in names]
    targets = [o.target for o in chosen if o.output == output]
    return [target for target in targets if parts.batch[target].ndim == 1]


def find_exits(parts: Experiment) -> tuple[list[str], str]:
    """Finds the outputs at which images can leave.

    Args:
        parts: The parts of a run.

    Returns:
        The outputs with an objective on the target that the main output classifies, and that need
        no more multiply-adds than the main one, which is the last; and the target.

    Raises:
        ValueError: If the main output classifies nothing, or there is no other such output.
    """
    targets = classified(parts, MAIN)
    if not targets:
        raise ValueError("The main output has no objective on labels, so that no image can leave.")
    target = targets[0]
    names = [name for name in parts.output_names() if target in classified(parts, name)]
    image = jax.ShapeDtypeStruct((1, *parts.batch["image"].shape[1:]), jnp.float32)
    alone = [{name} for name in names]
    counted = traced.multiply_adds_together(parts.apply, alone, parts.variables, image)
    costs = dict(zip(names, counted, strict=True))
    early = [name for name in names if name != MAIN and costs[name] <= costs[MAIN]]
    if not early:
        raise ValueError(
            f"No auxiliary output classifies '{target}', as the main one does, with no more"
            " multiply-adds than it; there is no exit."
        )
    return [*early, MAIN], target


class Exits:
    """The exits of a trained network, its first seed's weights and the examples of its run.

    Args:
        workdir: The run.
        batch_size: Images computed at once.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Attributes:
        step: After how many steps of training.
        stages: The network in stages.
        names: The outputs at which images leave, in the order of the stages.
        costs: Multiply-adds of an image that leaves at each.
        main_cost: Those of the main output alone.
        classes: Number of classes.
        variables: Parameters and all other variables of the network.
        images: Training and test images, ``[m, …]``, as the source has them.
        examples: Indices into the images, of ``"validation"`` and ``"test"``.
        labels: The classes of these examples.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        ValueError: If the run has no exit or no validation examples, or an override changes it.
    """

    def __init__(self, workdir: str | Path, batch_size: int, overrides: Sequence[str] = ()):
        if batch_size < 1:
            raise ValueError(f"--batch_size is {batch_size}; it should be at least 1.")
        runs = open_run(workdir, overrides)
        names, self._target = find_exits(runs.parts)
        if not runs.feed.examples["validation"].shape[1]:
            raise ValueError(
                f"The run {workdir} has no validation examples to fit thresholds on; train with"
                " --config.data.task.validation_per_class=N."
            )
        self._parts, self._batch_size = runs.parts, batch_size
        self._place(runs, workdir)
        # As the source has them: the network's program scales and crops.
        example = self.examples["test"].shape[1:]
        shape = (batch_size, *example, *self.images.shape[1:])
        images = jax.ShapeDtypeStruct(shape, self.images.dtype)
        self.stages: list[Stage] = split(self._parts.apply, names, self.variables, images)
        self.names = [stage.output for stage in self.stages]
        self.costs = np.cumsum([stage.multiply_adds for stage in self.stages]).tolist()
        image = jax.ShapeDtypeStruct((1, *shape[1:]), images.dtype)
        self.main_cost = traced.multiply_adds(self._main, self.variables, image)
        # One logit is a choice of two.
        self.classes = max(2, runs.parts.outputs[MAIN].shape[-1])
        self._programs: dict[Callable[..., Any], Callable[..., Any]] = {}

    def _place(self, runs: Runs, workdir: str | Path) -> None:
        """Puts weights and images on one device."""
        weights = kept_weights(runs, workdir)
        device = jax.local_devices()[0]
        self.step = int(np.asarray(weights.step)[0])
        arrays = jax.device_put(dict(runs.feed.arrays), device)
        self.variables = jax.device_put(of_first_seed(weights), device)
        self.images = arrays["image"]
        self.examples = {k: np.asarray(v[0]) for k, v in runs.feed.examples.items() if k != "train"}
        self.labels = {
            kind: np.asarray(runs.parts.task.batch(arrays, jnp.asarray(index))[self._target])
            for kind, index in self.examples.items()
        }

    def _all(self, variables: PyTree, images: Array) -> list[Array]:
        outputs = self._parts.apply(variables, images)
        return [class_logits(outputs[name]) for name in self.names]

    def _main(self, variables: PyTree, images: Array) -> Array:
        outputs = self._parts.apply(variables, images, aux=False)
        return class_logits(outputs[MAIN]).argmax(-1)

    def _over(self, function: Callable[..., Any], examples: np.ndarray) -> list[Any]:
        """Applies a program to examples, batch by batch."""
        # A new jit for each call would compile each time.
        if function not in self._programs:
            self._programs[function] = jax.jit(lambda v, x, i: function(v, x[i]))
        size = self._batch_size
        batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        program = partial(self._programs[function], self.variables, self.images)
        return [program(filled(batch, size)) for batch in batches]

    def logits(self, kind: str) -> np.ndarray:
        """Computes all exits of all examples of a split, ``[exits, n, classes]``."""
        batches = self._over(self._all, self.examples[kind])
        joined = [np.concatenate(exit_batches) for exit_batches in zip(*batches, strict=True)]
        return np.stack(joined)[:, : len(self.labels[kind])]

    def whole(self) -> tuple[float, float]:
        """Returns the test accuracy of the main output, computed alone, and its seconds."""
        examples = self.examples["test"]
        # A first batch, for which the program is compiled: the time is of the others.
        jax.block_until_ready(self._over(self._main, examples[: self._batch_size]))
        started = time.perf_counter()
        predicted = np.concatenate(jax.block_until_ready(self._over(self._main, examples)))
        seconds = time.perf_counter() - started
        right = predicted[: len(examples)] == self.labels["test"]
        return float(right.mean()), seconds
