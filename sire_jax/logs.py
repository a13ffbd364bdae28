"""Where measurements are written while a network trains."""

from collections.abc import Mapping

import numpy as np

from sire_jax import distributed
from sire_jax.workdir import Workdir


class Logs:
    """``metrics.jsonl``, and TensorBoard where asked for.

    Args:
        directory: The directory of the run.
        tensorboard: Whether to write for TensorBoard, too.

    Raises:
        ValueError: If tensorboardX is asked for and not installed.
    """

    def __init__(self, directory: Workdir, tensorboard: bool):
        self._directory, self._writer = directory, None
        if tensorboard and distributed.is_main():
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    "config.tensorboard needs tensorboardX: pip install 'sire_jax[tensorboard]'."
                ) from error
            self._writer = SummaryWriter(str(directory.path / "tensorboard"))

    def record(self, step: int, epoch: int, split: str, values: Mapping[str, np.ndarray]) -> None:
        """Writes a measurement: of each metric a value for each run."""
        self._directory.record(step, epoch, split, values)
        if self._writer is not None:
            for name, each in values.items():
                self._writer.add_scalar(f"{split}/{name}", float(np.mean(each)), step)
            self._writer.flush()
