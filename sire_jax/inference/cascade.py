"""Evaluates a network exit by exit, and computes nothing more of an image that has left."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sire_jax.inference.exit_rules import Rule
from sire_jax.inference.stages import Rows, Stage
from sire_jax.metrics import class_logits

PyTree = Any


class CascadeResult(NamedTuple):
    """What a cascade has predicted, and what that has cost.

    >>> result = CascadeResult(np.array([7, 1]), np.array([0, 1]), [1, 1], multiply_adds=600)
    >>> float((result.exits == 0).mean())  # the share that has left at the first exit
    0.5
    >>> result.multiply_adds / len(result.exits)  # of an image, in the mean
    300.0

    Attributes:
        predictions: ``[n]``, the classes.
        exits: ``[n]``, where each image has left.
        batches: For each stage the number of batches that it has computed.
        multiply_adds: Those of all these batches, also of the rows that fill up the last ones.
    """

    predictions: np.ndarray
    exits: np.ndarray
    batches: list[int]
    multiply_adds: int


class Cascade:
    """A network in stages, each of them one compiled program of a fixed number of images.

    A chunk of images passes a stage in full batches; what later stages read of those that stay is
    gathered into new full batches, of which the last is filled up.

    >>> from sire_jax.inference import RULES, split
    >>> network = lambda params, x: {"exit": x @ params, "main": 2 * x @ params}
    >>> images, params = jnp.array([[9.0, 0.0], [0.1, 0.0]]), jnp.eye(2)
    >>> stages = split(network, ["exit", "main"], params, jax.ShapeDtypeStruct((2, 2), "float32"))
    >>> cascade = Cascade(stages, params, RULES["max_probability"], batch_size=2)
    >>> cascade(images, np.arange(2), thresholds=[0.9]).exits  # the second image is not certain
    array([0, 1], dtype=int32)

    Args:
        stages: The stages (``stages.split``) of ``batch_size`` images, in order.
        params: What the stages are given as parameters.
        rule: Which images leave.
        batch_size: Images computed at once.
        chunk: Images that are at one stage at the same time, for which there has to be memory.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        params: PyTree,
        rule: Rule,
        batch_size: int = 100,
        chunk: int = 2000,
    ):
        for name, value in (("batch_size", batch_size), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it should be at least 1.")
        # All is put on one device: what is there by chance only would be compiled for once more.
        self._device = jax.local_devices()[0]
        self._stages, self._rule = stages, rule
        self._params = jax.device_put(params, self._device)
        self._batch_size = batch_size
        # Whole batches, since the last of a chunk is written whole.
        self._capacity = -(-chunk // batch_size) * batch_size
        self._programs = [_compiled(stage, rule) for stage in stages]

    def warm(self, images: Array, examples: np.ndarray) -> None:
        """Compiles all stages, with the first batch."""
        # No image leaves, so that the last stage is computed, too.
        never = [np.inf * self._rule.sign] * (len(self._stages) - 1)
        self(images, examples[: self._batch_size], never)

    def __call__(
        self, images: Array, examples: np.ndarray, thresholds: Sequence[float]
    ) -> CascadeResult:
        """Classifies examples.

        Args:
            images: ``[m, …]``.
            examples: Indices into the images, ``[n]``, or ``[n, …]`` of examples of several.
            thresholds: One for each stage but the last, where all leave.

        Returns:
            Classes, exits and what they have cost.
        """
        images = jax.device_put(images, self._device)
        total = len(examples)
        predictions, exits = np.zeros(total, np.int32), np.zeros(total, np.int32)
        batches = [0] * len(self._stages)
        for first in range(0, total, self._capacity):
            waiting = np.arange(first, min(first + self._capacity, total))
            index = examples[waiting]
            rows: Rows = (images,)
            shared: Rows = ()
            for k, threshold in enumerate([*thresholds, None]):
                classes, scores, rows, shared = self._pass(k, index, rows, shared)
                batches[k] += -(-len(index) // self._batch_size)
                stay = np.zeros(len(index), bool)
                if threshold is not None:
                    stay = ~self._rule.leaves(scores, threshold)
                predictions[waiting[~stay]], exits[waiting[~stay]] = classes[~stay], k
                index = np.flatnonzero(stay)
                waiting = waiting[stay]
                if not len(waiting):
                    break
        costs = [stage.multiply_adds for stage in self._stages]
        images_cost = sum(n * cost for n, cost in zip(batches, costs, strict=True))
        return CascadeResult(predictions, exits, batches, images_cost * self._batch_size)

    def _pass(
        self, k: int, index: np.ndarray, rows: Rows, shared: Rows
    ) -> tuple[np.ndarray, np.ndarray, Rows, Rows]:
        """Applies a stage to some rows: their classes and scores, and what later stages read."""
        left = tuple(
            jnp.zeros((self._capacity, *row.shape[1:]), row.dtype, device=self._device)
            for row in self._stages[k].rows
        )
        results = []
        passed = shared
        for start in range(0, len(index), self._batch_size):
            batch = filled(index[start : start + self._batch_size], self._batch_size)
            *result, left, passed = self._programs[k](
                self._params, rows, shared, batch, left, np.int32(start)
            )
            results.append(result)
        # Beyond the index are the results of what the last batch was filled up with.
        classes, scores = (np.concatenate(x)[: len(index)] for x in zip(*results, strict=True))
        return classes, scores, left, passed


def filled(index: np.ndarray, size: int) -> np.ndarray:
    """Fills indices up to a batch, with the first one."""
    missing = np.repeat(index[:1], size - len(index), axis=0)
    return np.concatenate([index, missing]).astype(np.int32)


def _compiled(stage: Stage, rule: Rule) -> Callable[..., tuple[Array, Array, Rows, Rows]]:
    """Makes the program of a stage: it gathers its batch, and writes what it leaves in place."""

    def run(
        params: PyTree, rows: Rows, shared: Rows, index: Array, left: Rows, start: Array
    ) -> tuple[Array, Array, Rows, Rows]:
        # The cascade's own indices, which need no check.
        batch = tuple(row.at[index].get(mode="promise_in_bounds") for row in rows)
        output, passed, shared = stage.apply(params, batch, shared)
        logits = class_logits(output)
        left = tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, 0)
            for whole, part in zip(left, passed, strict=True)
        )
        return logits.argmax(-1), rule.scores(logits), left, shared

    return jax.jit(run, donate_argnums=4)
