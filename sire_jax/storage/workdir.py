"""The directory of a run: its config, its metrics, its checkpoints, its results."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sire_jax import configuration, files, untrusted
from sire_jax.data import contents
from sire_jax.job import distributed

# {metric name: a value for each run}
Values = Mapping[str, np.ndarray]
CHECKPOINTS = "checkpoints"
# Bytes of the smallest piece of a disk.
_BLOCK = 4096


class Workdir:
    """Where one run is kept.

    ``config.json``: the resolved config. ``metrics.jsonl``: a line for each measurement,
    ``{"step", "epoch", "split", "<metric>": [a value for each seed]}``. ``checkpoints/``.
    ``results.json``: the final measurements. ``curves.png``. ``data.json``: what the data are (see
    ``contents``). Of several processes the first writes them all.

    Args:
        path: The directory; made if need be.
        config: The config of the run.

    Raises:
        ValueError: If the directory holds a run of another config; the message has the difference.
            If the path is empty.
        PermissionError: If nothing can be written there.
    """

    def __init__(self, path: str | Path, config: ConfigDict):
        self.path = check_writable(path)
        stored = self.path / "config.json"
        if stored.exists():
            changed = configuration.differences(read_config(self.path, building=False), config)
            if (self.path / contents.FILE).exists():
                # What the data are decides `check_data`, whatever they are called now.
                changed = [line for line in changed if not line.startswith("data.name:")]
            if changed:
                lines = "\n".join(f"  {line}" for line in changed)
                raise ValueError(
                    f"{self.path} holds a run of another config:\n{lines}\n"
                    "Choose another --workdir, or remove this one."
                )
        self._config = config

    def write_config(self) -> None:
        """Writes ``config.json``: from now on the directory is this run's."""
        text = configuration.to_json(self._config)
        untrusted.remember(self._config, text)
        _replace(self.path / "config.json", text)

    def check_data(self, data: contents.Contents) -> None:
        """Checks that the data are those of the run in the directory, wherever they lie now.

        Raises:
            ValueError: If they are others; the message has the difference.
        """
        # Before the config, which is written last, the directory is nobody's run yet.
        old = contents.read(self.path) if (self.path / "config.json").exists() else None
        changed = contents.differences(old, data) if old else []
        if changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise ValueError(
                f"{self.path} holds a run on other data:\n{lines}\n"
                "Give it the data that it was begun with (where they are now:"
                " --config.data.dir=DIR), choose another --workdir, or remove this one."
            )

    def write_data(self, data: contents.Contents) -> None:
        """Writes ``data.json``, unless it is there, ahead of the config."""
        if distributed.is_main():
            contents.keep(self.path, data, _replace)

    def check_room(self, size: int) -> None:
        """Checks that there is room for a checkpoint.

        Args:
            size: Of a checkpoint, in bytes.

        Raises:
            OSError: If there is not.
        """
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise OSError(
                f"The disk of the workdir {self.path} has {free / 1e6:,.0f} MB left, and a"
                f" checkpoint of this run takes {size / 1e6:,.0f} MB; free some space, or choose"
                " another --workdir."
            )

    def check_shared(self) -> None:
        """Checks that all processes see the same directory; each has to call it.

        Raises:
            OSError: If this process does not see what process 0 wrote.
        """
        probe = self.path / ".shared"
        # Another one each time: what an earlier start left there proves nothing.
        token = distributed.exchange(uuid.uuid4().hex)[0]
        with distributed.together("writing to the workdir"):
            if distributed.is_main():
                probe.write_text(token)
        with distributed.together("looking for the workdir of process 0"):
            if not (probe.exists() and probe.read_text() == token):
                raise OSError(
                    f"The workdir {self.path} is not the one that process 0 writes to; it has to be"
                    " on a file system that all hosts share."
                )
        if distributed.is_main():
            probe.unlink(missing_ok=True)

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / CHECKPOINTS

    def record(self, step: int, epoch: int, split: str, values: Values) -> None:
        """Appends a measurement to ``metrics.jsonl``."""
        if not distributed.is_main():
            return
        line = {"step": step, "epoch": epoch, "split": split}
        line |= {name: np.asarray(value).tolist() for name, value in values.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops measurements of later steps, which a resumed run will take again."""
        path = self.path / "metrics.jsonl"
        lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        _replace(path, "".join(json.dumps(line) + "\n" for line in lines))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes ``results.json``."""
        _replace(self.path / "results.json", json.dumps(results, indent=2) + "\n")


def at(path: str | Path) -> Path:
    """Returns the path of a workdir.

    Raises:
        ValueError: If it is empty, which would be the current directory.
    """
    if not str(path):
        raise ValueError("The workdir is empty; name a directory, such as --workdir=runs/first.")
    return files.expanded(path)


def check_writable(path: str | Path) -> Path:
    """Checks that a workdir can be written to; it is made if need be.

    Args:
        path: The directory.

    Returns:
        Its path.

    Raises:
        ValueError: If the path is empty.
        PermissionError: If nothing can be written there.
    """
    path = at(path)
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "It is a file")
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        try:
            # Something, as a full disk still takes empty files.
            probe.write_bytes(bytes(_BLOCK))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise PermissionError(
            f"The workdir {path} can't be written to ({error.strerror}); choose another --workdir."
        ) from error
    return path


def _replace(path: Path, content: str | bytes) -> None:
    """Writes a file whole, by one process of a job."""
    if distributed.is_main():
        files.replace(path, content)


def read_results(path: str | Path) -> dict[str, Any] | None:
    """Reads the final measurements of the run in a directory, ``None`` if it has not ended.

    Raises:
        ValueError: If the file holds something else.
    """
    stored = at(path) / "results.json"
    if not stored.exists():
        return None
    results = untrusted.read_json(stored)
    if not _are_results(results):
        raise ValueError(f"{stored} holds no results of a run; remove it, to measure again.")
    return dict(results)


def _are_results(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("splits"), dict):
        return False
    numbers = [content.get(key) for key in ("step", "seconds")]
    return all(isinstance(number, int | float) for number in numbers) and all(
        isinstance(metrics, dict) for metrics in content["splits"].values()
    )


def read_config(path: str | Path, building: bool = True) -> ConfigDict:
    """Reads the config of the run in a directory, which may be a stranger's.

    Args:
        path: The directory.
        building: Whether something is to be made of it, rather than only compared. Then it may name
            only code that the user allows or has run in training (``untrusted.check_names``), and
            compiled programs, which are code, too, are kept where they are by default.

    Returns:
        The config, not yet checked.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the file is damaged, or names code that is not allowed.
    """
    stored = at(path) / "config.json"
    if not stored.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json.")
    text = untrusted.read_text(stored)
    config = configuration.completed(configuration.from_json(text, str(stored)))
    if building:
        untrusted.check_names(config, text, stored)
        config.compilation_cache = configuration.default().compilation_cache
    return config


def is_own(path: str | Path) -> bool:
    """Tells whether this user has trained the run in a directory (``untrusted.remember``).

    Args:
        path: The directory.
    """
    return untrusted.is_remembered(untrusted.read_text(at(path) / "config.json"))


def titles(paths: Sequence[str]) -> dict[str, str]:
    """Names runs by their directory, or by the whole path where names repeat.

    >>> titles(["runs/first", "runs/second"])
    {'first': 'runs/first', 'second': 'runs/second'}
    >>> list(titles(["a/run", "b/run"]))
    ['a/run', 'b/run']

    Args:
        paths: Workdirs.

    Returns:
        ``{title: path}``.
    """
    names = [Path(path).name for path in paths]
    pairs = zip(names, paths, strict=True)
    return {name if names.count(name) == 1 else path: path for name, path in pairs}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    r"""Reads ``metrics.jsonl`` of the run in a directory; a line cut off by a crash is left out.

    >>> import tempfile
    >>> line = '{"step": 5, "epoch": 1, "split": "test", "main/top_1": [0.9, 0.8]}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Path(directory, "metrics.jsonl").write_text(line + "\n" + line[:-9])
    ...     [(entry["step"], entry["main/top_1"]) for entry in read_metrics(directory)]
    [(5, [0.9, 0.8])]
    """
    stored = at(path) / "metrics.jsonl"
    lines = []
    # What is no text is no measurement, either.
    text = stored.read_text(encoding="utf-8", errors="replace") if stored.exists() else ""
    for line in text.splitlines():
        try:
            content = untrusted.parse_json(line, "a line")
        except ValueError:
            continue
        if _is_measurement(content):
            lines.append(content)
    return lines


def _is_measurement(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    types = {"step": int, "epoch": int, "split": str}
    if not all(type(content.get(key)) is kind for key, kind in types.items()):
        return False
    # `type`, as for `isinstance` a truth value is an integer.
    metrics = [values for key, values in content.items() if key not in types]
    return all(isinstance(values, list) for values in metrics) and all(
        type(number) in (int, float) for values in metrics for number in values
    )
