"""Confusion matrices of runs: how often the main output takes one label for another."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sire_jax.inference.exits import classified
from sire_jax.metrics import class_logits, is_label
from sire_jax.networks import MAIN
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import kept_weights

PyTree = Any


def names_of(runs: Runs) -> tuple[str, ...]:
    """Returns the names of the labels that a run's main output classifies.

    Raises:
        ValueError: If it classifies none.
    """
    target = _target(runs)
    # Of pairs, the targets have other classes than the images' labels.
    count = runs.parts.task.classes(runs.config.data.classes)[target]
    names = runs.feed.names.get(target, ())
    return names if len(names) == count else tuple(str(i) for i in range(count))


def _target(runs: Runs) -> str:
    targets = [t for t in classified(runs.parts, MAIN) if t not in runs.parts.groups]
    if not targets:
        raise ValueError("The main output has no objective on labels; there is nothing to group.")
    return targets[0]


def of_run(runs: Runs, workdir: str | Path, split: str) -> np.ndarray:
    """Counts what the main output of a run takes its images for.

    Args:
        runs: The programs and data of the run.
        workdir: Its directory.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        ``[classes, classes]``, counts, a row for each true label: the sum over the seeds, each with
        its own weights and examples.

    Raises:
        ValueError: If the split has fewer images than there are labels, or a run diverged.
        FileNotFoundError: If there is no checkpoint.
    """
    target, names = _target(runs), names_of(runs)
    _check_examples(split, runs.feed.examples[split].shape[1], len(names))

    def measure(
        params: PyTree, model_state: PyTree, batch: PyTree, mask: Array, fitted: PyTree
    ) -> Array:
        variables = {"params": params, **model_state}
        outputs: Any = runs.parts.network.apply(variables, batch["image"], aux=False)
        predicted = class_logits(outputs[MAIN]).argmax(-1)
        empty = jnp.zeros((len(names), len(names)), jnp.float32)
        # A label that is none is in no row, not in the last ones.
        rows = jnp.where(is_label(batch[target], len(names)), batch[target], len(names))
        return empty.at[rows, predicted].add(mask, mode="drop")

    weights = kept_weights(runs, workdir, used=None)
    total = runs.feed.totals(measure, "central")
    counts = total(weights.params, weights.model_state, {}, split)
    return np.asarray(counts, np.float64).sum(0)


def _check_examples(split: str, images: int, classes: int) -> None:
    if not images:
        raise ValueError(
            f"The run has no {split} images to count confusions on; train with"
            " --config.data.task.validation_per_class=50, or choose others deliberately with"
            " --split=train or --split=test."
        )
    if images < classes:
        raise ValueError(
            f"The run has {images} {split} images for {classes} classes; each class should have one"
            " at least, better 50."
        )
