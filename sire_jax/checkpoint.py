"""Checkpoints of a run, the one place that knows orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

PyTree = Any


class Checkpoints:
    """The newest checkpoints in a directory; writes in the background.

    Args:
        directory: Where they are; made if need be.
        keep: How many are kept.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(Path(directory).resolve(), options=options)

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint, ``None`` if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Starts to save a tree of arrays and random keys, unless that step is saved already."""
        if self.latest() != step:
            self._manager.save(step, args=ocp.args.StandardSave(tree))

    def restore(self, like: PyTree) -> PyTree:
        """Restores the newest checkpoint.

        Args:
            like: A tree of arrays or shapes as it was saved.

        Returns:
            The saved tree, bit for bit.

        Raises:
            FileNotFoundError: If there is no checkpoint.
        """
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"There is no checkpoint in {self._manager.directory}.")
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()
