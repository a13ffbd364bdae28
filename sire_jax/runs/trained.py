"""Runs that have been trained: opened with their data, with the weights that they are judged by."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import Array

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.configuration.experiment import Experiment
from sire_jax.data import contents
from sire_jax.data.augmentation import Batch
from sire_jax.runs.divergence import DIVERGED
from sire_jax.runs.feed import NoFeed
from sire_jax.runs.runs import Runs
from sire_jax.state import Best, TrainState
from sire_jax.storage.checkpoint import Checkpoints
from sire_jax.storage.workdir import CHECKPOINTS, at, read_config

PyTree = Any


def restore(runs: Runs, checkpoints: Path) -> tuple[TrainState, Best | None]:
    """Restores the newest checkpoint of a run.

    Args:
        runs: The programs of the run.
        checkpoints: The directory of its checkpoints.

    Returns:
        The last state, and the weights with the best validation accuracy, if the run validates.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    manager = Checkpoints(checkpoints)
    try:
        restored = manager.restore(runs.checkpoint_shapes())
    finally:
        manager.close()
    return restored.state, restored.best


def diverged(workdir: str | Path) -> list[int | None]:
    """Returns for each run the steps after which it diverged, ``None`` if it hasn't; or nothing.

    Args:
        workdir: The directory of the runs.
    """
    checkpoints = Checkpoints(at(workdir) / CHECKPOINTS)
    try:
        return list(checkpoints.notes().get(DIVERGED) or ())
    finally:
        checkpoints.close()


def kept_weights(
    runs: Runs, workdir: str | Path, used: Sequence[int] | None = (0,)
) -> TrainState | Best:
    """Restores the weights that a run is judged by.

    Args:
        runs: The programs of the run.
        workdir: Its directory.
        used: Which of its runs are looked at, from 0: none of them may have diverged. ``None``:
            all.

    Returns:
        The best on validation data if it has any, else the last.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If one has diverged.
    """
    if not (at(workdir) / contents.FILE).exists() and not isinstance(runs.feed, NoFeed):
        warnings.warn(
            f"{workdir} has no {contents.FILE}: whether these are the data of the run, and its"
            " classes, can't be told.",
            stacklevel=2,
        )
    for i, steps in enumerate(diverged(workdir)):
        if steps is not None and (used is None or i in used):
            raise ValueError(
                f"The run with seed {runs.config.seed + i} in {workdir} diverged after {steps}"
                " steps: its weights mean nothing."
            )
    state, best = restore(runs, at(workdir) / CHECKPOINTS)
    return state if best is None else best


def open_run(
    workdir: str | Path,
    overrides: Sequence[str] = (),
    needs_data: bool = True,
    changed_data: bool = False,
) -> Runs:
    """Opens the run in a directory, without its weights.

    Args:
        workdir: The run.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.
        needs_data: Whether the data are used. If not, they need not be there: what classes are
            called is kept with the run (where its data.json was removed, they are loaded).
        changed_data: Whether data with other test images than the run's are taken, with a warning.

    Returns:
        Its programs and data.

    Raises:
        FileNotFoundError: If there is no run, or the data set is not prepared.
        ValueError: If an override changes the run, or the data are not those of the run; those that
            moved are.
    """
    trained = read_config(workdir)
    config = configuration.override(trained, overrides)
    kept = contents.read(workdir)
    # How a run is measured, not what it is; and where its data are, if it is known what they are.
    free = ("data.ten_crop:", "predictions.", *(("data.name:",) if kept else ()))
    changed = configuration.differences(trained, config)
    changed = [line for line in changed if not line.startswith(free)]
    if changed:
        raise ValueError(f"An override would change the run: {'; '.join(changed)}.")
    if kept and not needs_data:
        return Runs(experiment.build(config), lambda *_: NoFeed(kept.names))
    runs = Runs(experiment.build(config))
    if kept:
        _check_data(workdir, kept, runs.feed.contents, changed_data)
    return runs


def _check_data(
    workdir: str | Path, kept: contents.Contents, now: contents.Contents, changed_data: bool
) -> None:
    lines = [f"\n  {line}" for line in contents.differences(kept, now)]
    if not lines:
        return
    # What predictions are fitted on is drawn from the training images.
    only_test = not contents.of_names(kept, now) and kept.parts["train"].is_same(now.parts["train"])
    if changed_data and only_test:
        warnings.warn(f"These are not the data of {workdir}:{''.join(lines)}", stacklevel=3)
        return
    other = " Other test images alone, of these classes, are measured by evaluate --changed_data."
    if changed_data:
        other = (
            " --changed_data is for other test images: classes and training images have to be those"
            " of the run, as predictions are fitted on images that it was not trained on."
        )
    elif not only_test:
        other = ""
    raise ValueError(
        f"The data are not those of the run {workdir}:{''.join(lines)}\n"
        f"If those are elsewhere, say where: --config.data.dir=DIR.{other}"
    )


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

    @property
    def variables(self) -> dict[str, PyTree]:
        """All variables of the network."""
        return {"params": self.params, **self.model_state}

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
        batch = runs.feed.look("train", runs.config.batch_size)
        return cls(runs.parts, step, params, model_state, batch)


def of_first_seed(kept: TrainState | Best) -> dict[str, PyTree]:
    """Returns all variables of the network of the first seed.

    Args:
        kept: The weights of all seeds.
    """
    variables: dict[str, PyTree] = jax.tree.map(lambda x: x[0], kept.variables)
    return variables
