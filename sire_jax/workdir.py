"""The directory of a run: its config, its metrics, its checkpoints, its results."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sire_jax import configuration

# {metric name: a value for each run}
Values = Mapping[str, np.ndarray]
CHECKPOINTS = "checkpoints"


class Workdir:
    """Where one run is kept.

    ``config.json``: the resolved config. ``metrics.jsonl``: a line for each measurement,
    ``{"step", "epoch", "split", "<metric>": [a value for each seed]}``. ``checkpoints/``.
    ``results.json``: the final measurements. ``curves.png``.

    Args:
        path: The directory; made if need be.
        config: The config of the run.

    Raises:
        ValueError: If the directory holds a run of another config; the message has the difference.
        PermissionError: If nothing can be written there.
    """

    def __init__(self, path: str | Path, config: ConfigDict):
        self.path = Path(path).expanduser()
        self._check_writable()
        stored = self.path / "config.json"
        if stored.exists():
            changed = configuration.differences(read_config(self.path), config)
            if changed:
                lines = "\n".join(f"  {line}" for line in changed)
                raise ValueError(
                    f"{self.path} holds a run of another config:\n{lines}\n"
                    "Choose another --workdir, or remove this one."
                )
        self._config = config

    def write_config(self) -> None:
        """Writes ``config.json``: from now on the directory is this run's."""
        _replace(self.path / "config.json", configuration.to_json(self._config))

    def _check_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise PermissionError(
                f"The workdir {self.path} can't be written to ({error.strerror});"
                " choose another --workdir."
            ) from error

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / CHECKPOINTS

    def record(self, step: int, epoch: int, split: str, values: Values) -> None:
        """Appends a measurement to ``metrics.jsonl``."""
        line = {"step": step, "epoch": epoch, "split": split}
        line |= {name: np.asarray(each).tolist() for name, each in values.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops measurements of later steps, which a resumed run will take again."""
        path = self.path / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        _replace(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes ``results.json``."""
        _replace(self.path / "results.json", json.dumps(results, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file aside and renames it: a crash leaves the old one or the new one, whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def read_results(path: str | Path) -> dict[str, Any] | None:
    """Reads the final measurements of the run in a directory, ``None`` if it has not ended."""
    stored = Path(path).expanduser() / "results.json"
    return json.loads(stored.read_text()) if stored.exists() else None


def read_config(path: str | Path) -> ConfigDict:
    """Reads the config of the run in a directory.

    Raises:
        FileNotFoundError: If there is no run.
    """
    stored = Path(path).expanduser() / "config.json"
    if not stored.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json.")
    return configuration.from_json(stored.read_text())


def titles(paths: Sequence[str]) -> dict[str, str]:
    """Names runs by their directory, or by the whole path where names repeat.

    Args:
        paths: Workdirs.

    Returns:
        ``{title: path}``.
    """
    names = [Path(path).name for path in paths]
    return {n if names.count(n) == 1 else p: p for n, p in zip(names, paths, strict=True)}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl`` of the run in a directory; a line cut off by a crash is left out."""
    stored = Path(path).expanduser() / "metrics.jsonl"
    lines = []
    for line in stored.read_text().splitlines() if stored.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
