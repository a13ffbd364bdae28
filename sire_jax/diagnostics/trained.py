"""A trained network with a batch of its training images, for looking into it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import Array

from sire_jax.configuration.experiment import Experiment
from sire_jax.data.augmentation import Batch
from sire_jax.evaluate import kept_weights, open_run
from sire_jax.step import Best, TrainState

PyTree = Any


@dataclass(frozen=True)
class Trained:
    """A trained network: the first seed's weights, and a batch of its training images.

    Attributes:
        parts: The parts of the run.
        step: After how many steps of training.
        params: Parameters.
        model_state: Other variables of the network.
        batch: The first training images, without augmentation, and their targets.
    """

    parts: Experiment
    step: Array
    params: PyTree
    model_state: PyTree
    batch: Batch

    @classmethod
    def load(cls, workdir: str | Path, overrides: Sequence[str] = ()) -> "Trained":
        """Loads the network of a run: the best weights on validation data if it has any.

        Args:
            workdir: The run.
            overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

        Returns:
            The network.

        Raises:
            FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
            ValueError: If an override changes the run.
        """
        runs = open_run(workdir, overrides)
        kept = kept_weights(runs, workdir)
        step, params, model_state = jax.tree.map(
            lambda x: x[0], (kept.step, kept.params, kept.model_state)
        )
        batch = runs.look("train", runs.config.batch_size)
        return cls(runs.parts, step, params, model_state, batch)

    @staticmethod
    def first(kept: TrainState | Best) -> dict[str, PyTree]:
        """Returns all variables of the network of the first seed."""
        params, model_state = jax.tree.map(lambda x: x[0], (kept.params, kept.model_state))
        return {"params": params, **model_state}

    @property
    def variables(self) -> dict[str, PyTree]:
        """All variables of the network."""
        return {"params": self.params, **self.model_state}
