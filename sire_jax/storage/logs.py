"""Where measurements are written while a network trains."""

import contextlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sire_jax.job import distributed
from sire_jax.storage.workdir import Workdir, read_metrics

_EVENTS = "tensorboard"


class Logs:
    """``metrics.jsonl``, and TensorBoard where asked for; both hold the same steps.

    Args:
        directory: The directory of the run.
        tensorboard: Whether to write for TensorBoard, too.

    Raises:
        ValueError: If tensorboardX is asked for and not installed.
    """

    def __init__(self, directory: Workdir, tensorboard: bool):
        self._directory = directory
        self._events = directory.path / _EVENTS
        self._tensorboard = tensorboard and distributed.is_main()
        self._writer: Any = None
        if self._tensorboard:
            try:
                import tensorboardX  # noqa: F401
            except ImportError as error:
                raise ValueError(
                    "config.tensorboard needs tensorboardX: pip install 'sire_jax[tensorboard]'."
                ) from error

    def go_on_after(self, step: int) -> None:
        """Drops measurements of later steps, which a resumed run will take again."""
        self._directory.forget_after(step)
        if not self._tensorboard:
            return
        from tensorboardX import SummaryWriter

        paths = sorted(self._events.glob("*tfevents*"))
        written = {scalar for path in paths for scalar in _forget_after(path, step)}
        # A TensorBoard that is running has read what has just been dropped; this tells it.
        purge = step + 1 if paths else None
        # Names have the second of their start, and a number, as there may be several in one.
        self._writer = SummaryWriter(
            str(self._events), purge_step=purge, filename_suffix=f".{len(paths)}"
        )
        for line in read_metrics(self._directory.path):
            # What the writer still had in its queue when it was killed; all, if it begins now.
            step, split = line["step"], line["split"]
            missing = {
                name: values
                for name, values in line.items()
                if isinstance(values, list) and (step, f"{split}/{name}") not in written
            }
            self._write(step, split, missing)

    def record(self, step: int, epoch: int, split: str, values: Mapping[str, np.ndarray]) -> None:
        """Writes a measurement: of each metric a value for each run."""
        self._directory.record(step, epoch, split, values)
        self._write(step, split, values)

    def _write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{split}/{name}", float(np.mean(value)), step)
            self._writer.flush()

    def close(self) -> None:
        """Writes what is left to write; nothing is recorded any more."""
        if self._writer is not None:
            self._writer.close()


def _forget_after(path: Path, step: int) -> list[tuple[int, str]]:
    """Drops events of later steps from a file of TensorBoard's, and what a kill cut off.

    Returns:
        Step and tag of each scalar that stays.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for record, content in _records(path):
        with contextlib.suppress(DecodeError):  # Damaged: it is written again.
            events.append((record, Event.FromString(content)))
    events = [(record, event) for record, event in events if event.step <= step]
    # TensorBoard reads whatever has "tfevents" in its name.
    partial = path.with_name("partial")
    partial.write_bytes(b"".join(record for record, _ in events))
    partial.replace(path)
    return [(event.step, value.tag) for _, event in events for value in event.summary.value]


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Reads whole records of TensorFlow's: length, its checksum, an event, its checksum."""
    content, start = path.read_bytes(), 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 12 + length + 4
        if end > len(content):
            return
        yield content[start:end], content[start + 12 : end - 4]
        start = end
