"""Checkpoints of a run: what is saved, when, and what is done about damage.

A checkpoint counts only once all of it is on the disk and a manifest of it, written last, says so;
older ones are removed only after that. One that differs from its manifest in a single bit is never
restored: the newest intact one is, bit for bit, and a warning says what is wrong with the others.

The directory has ``<step>/``, which is what orbax wrote and ``manifest``, and ``newest``, the step
saved last. Nothing in it is ever unpickled. What orbax wrote is the tree itself, as nested mappings
without its empty arrays, and random keys as their numbers; orbax alone restores it, too::

    ocp.StandardCheckpointer().restore(workdir.resolve() / "checkpoints/700")["state"]["params"]
"""

import concurrent.futures
import contextlib
import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from sire_jax.job import distributed
from sire_jax.storage import manifest, trees
from sire_jax.storage.trees import ArrayType

PyTree = Any
T = TypeVar("T")

_NEWEST = "newest"
# What a killed process leaves beside the steps: a removal or a write of orbax's, half done.
_LEFTOVERS = (".removing-*", "*.orbax-checkpoint-tmp*")
# Written by orbax into each of its directories.
_ORBAX = "_CHECKPOINT_METADATA"
# Bytes that a checkpoint needs beside those of its arrays: in all, and for each array's own entry.
_ROOM, _ENTRY = 2**18, 2**10


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says why, and which one is left."""


def room(arrays: Iterable[Any]) -> int:
    """Returns the bytes that a checkpoint takes on the disk, at most.

    Args:
        arrays: Arrays or their shapes; of random keys the numbers that they consist of.
    """
    sizes = (math.prod(array.shape) * array.dtype.itemsize + _ENTRY for array in arrays)
    return _ROOM + sum(sizes)


class Checkpoints:
    """The newest checkpoints in a directory; written in the background.

    Several processes share the directory and call ``latest``, ``save``, ``wait``, ``restore`` and
    ``notes`` together. Process 0 verifies, writes, cleans up and warns; all use what it found, and
    what fails in one is raised in all.

    Args:
        directory: Where they are; made by the first ``save``.
        keep: How many intact ones are kept, at least 1.

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"Can't keep {keep} checkpoints; it should be at least 1.")
        self._directory = Path(directory).resolve()
        self._keep = keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future | None = None
        # {step: (state of its directory, what is wrong with it)}: read again only if it changes.
        self._verified: dict[int, tuple[Any, str | None]] = {}
        self._warned: set[str] = set()

    def latest(self) -> int | None:
        """Returns the step of the newest intact checkpoint, ``None`` if there is none.

        Waits until what is being written is, and warns of each newer one that is damaged or gone.
        """
        return _on_first(self._latest)

    def lost(self) -> bool:
        """Tells whether there were checkpoints of later steps than 0, and none is intact."""
        return _on_first(lambda: self._latest() is None and self._had_any())

    def _had_any(self) -> bool:
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, RecursionError):
            if int(manifest.read_sealed(self._directory / _NEWEST)["step"]) > 0:
                return True
        paths = (self._path(step) / manifest.MANIFEST for step in self._steps() if step)
        return any(path.exists() for path in paths)

    def save(self, step: int, tree: PyTree, notes: Mapping[str, Any] | None = None) -> None:
        """Copies a tree and starts to write it, unless that step is saved and intact already.

        Waits until the one before is written.

        Args:
            step: The step, at least 0, after that of the newest intact checkpoint.
            tree: Arrays and random keys; they may be donated as soon as this returns. Several
                processes give global arrays.
            notes: What JSON can hold, kept beside the tree.

        Raises:
            CheckpointError: If the one before could not be written; this one is not begun then.
            ValueError: If there is a later one, or ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"Can't save step {step}; it should be at least 0.")
        newest = _on_first(self._settle)
        if newest == step:
            return
        if newest is not None and newest > step:
            raise ValueError(
                f"Can't save step {step}: {self._directory} has a checkpoint of step {newest}."
            )
        # Through JSON now: a copy, and what it can't hold fails here and not in the background.
        arrays, noted = trees.flatten(tree), json.loads(json.dumps(dict(notes or {})))
        types = {path: ArrayType.of(array) for path, array in arrays.items()}
        # In every process, as the arrays of several are gathered together.
        numbers = trees.to_host(arrays)
        stored = trees.nested(tree, {path: array for path, array in numbers.items() if array.size})
        if jax.process_index() == 0:
            arguments = step, stored, numbers, types, noted, newest
            self._writing = self._thread.submit(self._write, *arguments)

    def check(self) -> None:
        """Raises if a background save has failed; never waits.

        Of several processes none raises here, as they would part: the next ``save`` or ``wait``
        does, in all of them.

        Raises:
            CheckpointError: Once for each failure.
        """
        if jax.process_count() == 1:
            self._raise_failure()

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
            CheckpointError: If it could not be.
        """
        _on_first(self._settle)

    def restore(self, like: PyTree) -> PyTree:
        """Restores the newest intact checkpoint.

        Args:
            like: A tree of arrays or shapes as it was saved.

        Returns:
            The saved tree, bit for bit, placed like the arrays of ``like``.

        Raises:
            FileNotFoundError: If there is no intact checkpoint.
            ValueError: If the checkpoint has other arrays, shapes or dtypes than ``like``, or is of
                another version, which the message names.
            CheckpointError: If it can't be read.
        """
        step, seal = _on_first(self._newest)
        return _in_all(lambda: self._read(step, seal, like))

    def notes(self) -> dict[str, Any]:
        """Returns the notes saved with the newest intact checkpoint.

        Raises:
            FileNotFoundError: If there is no intact checkpoint.
        """
        return _on_first(lambda: dict(manifest.read(self._path(self._newest()[0])).notes))

    def close(self) -> None:
        """Waits until all that this process writes is written; it alone raises.

        Raises:
            CheckpointError: If it could not be.
        """
        self._thread.shutdown()
        self._raise_failure()

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _raise_failure(self) -> None:
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()

    # ---- Find; process 0 does.

    def _latest(self) -> int | None:
        if self._writing is not None:
            concurrent.futures.wait([self._writing])
        newest, faults = self._find()
        used = "there is no other" if newest is None else f"checkpoint {newest} is used"
        for fault in faults:
            if fault not in self._warned:
                self._warned.add(fault)
                warnings.warn(f"{fault}; {used}.", stacklevel=2)
        return newest

    def _settle(self) -> int | None:
        newest = self._latest()
        self._raise_failure()
        return newest

    def _newest(self) -> tuple[int, str | None]:
        """Returns the newest intact step and the seal of its manifest."""
        newest = self._latest()
        if newest is None:
            raise FileNotFoundError(f"There is no checkpoint in {self._directory}.")
        return newest, manifest.seal(self._path(newest))

    def _find(self) -> tuple[int | None, list[str]]:
        """Returns the newest intact step, and what is wrong with those after it."""
        steps, faults, newest = self._steps(), [], None
        for step in steps:
            damage = self._damage(step)
            if damage is None:
                newest = step
                break
            faults.append(f"Checkpoint {step} in {self._directory} {damage}")
        try:
            saved = int(manifest.read_sealed(self._directory / _NEWEST)["step"])
            if saved not in steps and (newest is None or saved > newest):
                faults.append(f"Checkpoint {saved} in {self._directory} is missing altogether")
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else _reason(error)
            faults.append(f"'{_NEWEST}' in {self._directory}, the step saved last, {reason}")
        return newest, faults

    def _steps(self) -> list[int]:
        """Lists what is named like a step, newest first."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir()]
        steps = (int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
        return sorted(steps, reverse=True)

    def _damage(self, step: int) -> str | None:
        try:
            state = manifest.state(self._path(step))
            if step not in self._verified or self._verified[step][0] != state:
                self._verified[step] = state, manifest.damage(self._path(step), step)
            return self._verified[step][1]
        except OSError as error:
            return f"can't be read ({_reason(error)})"

    # ---- Write; process 0 does, in the background.

    def _write(
        self,
        step: int,
        stored: PyTree,
        numbers: Mapping[str, np.ndarray],
        types: Mapping[str, ArrayType],
        notes: Mapping[str, Any],
        newest: int | None,
    ) -> None:
        path = self._path(step)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove([*self._leftovers(), path])
            _check_room(self._directory, room(numbers.values()))
            trees.write(path, stored)
            manifest.write(path, step, types, trees.digest(numbers.values()), notes)
            manifest.write_sealed(self._directory / _NEWEST, {"step": step})
            self._verified[step] = manifest.state(path), None
        except Exception as error:
            with contextlib.suppress(OSError):
                self._remove([*self._leftovers(), path])
            left = "there is no other" if newest is None else f"checkpoint {newest} remains"
            raise CheckpointError(
                f"Checkpoint {step} could not be saved in {self._directory}: {_reason(error)};"
                f" {left}."
            ) from error
        # What can't be removed now is tried again after the next save.
        with contextlib.suppress(OSError):
            self._remove_old()

    def _leftovers(self) -> list[Path]:
        return [path for pattern in _LEFTOVERS for path in self._directory.glob(pattern)]

    def _remove_old(self) -> None:
        """Removes checkpoints but the newest intact ones; not what never was a checkpoint."""
        intact = 0
        for step in self._steps():
            if intact < self._keep and self._damage(step) is None:
                intact += 1
            elif any((self._path(step) / name).exists() for name in (manifest.MANIFEST, _ORBAX)):
                self._remove([self._path(step)])

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
                continue
            # Renamed first: a process killed in between leaves no half of a checkpoint.
            doomed = path.with_name(f".removing-{path.name.removeprefix('.removing-')}")
            path.replace(doomed)
            shutil.rmtree(doomed)

    # ---- Read; every process does.

    def _read(self, step: int, seal: str | None, like: PyTree) -> PyTree:
        path, name = self._path(step), f"Checkpoint {step} in {self._directory}"
        if manifest.seal(path) != seal:
            raise CheckpointError(
                f"{name} is not what process 0 finds there; all processes should share the"
                " directory."
            )
        saved, arrays = manifest.read(path), trees.flatten(like)
        if saved.format != manifest.FORMAT:
            other = "revision 160d875" if saved.format < manifest.FORMAT else "a later version"
            raise ValueError(f"{name} is of another version of sire_jax; {other} can read it.")
        types = {path: ArrayType.of(array) for path, array in arrays.items()}
        _check_same_types(name, saved.arrays, types)
        shapes = {path: trees.numbers_of(array) for path, array in arrays.items()}
        try:
            numbers = trees.read(path, like, shapes)
        except Exception as error:
            raise CheckpointError(f"{name} can't be read: {_reason(error)}.") from error
        # Of what is in memory now: the files were verified once, and may have changed since.
        if trees.digest(numbers[path] for path in saved.arrays) != saved.sha256:
            raise CheckpointError(f"{name} can't be read: it differs from what was saved.")
        leaves = [trees.placed_like(numbers[path], array) for path, array in arrays.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _check_same_types(
    name: str, saved: Mapping[str, ArrayType], types: Mapping[str, ArrayType]
) -> None:
    for path in (*types, *saved):
        there, here = saved.get(path, "missing"), types.get(path, "not asked for")
        if there != here:
            raise ValueError(
                f"{name} does not fit: {path} is {there} in it, but {here} here. It is of another"
                " network, optimizer or config."
            )


def _check_room(directory: Path, size: int) -> None:
    """Raises where orbax would fail midway, with less to say."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)} ({free / 1e6:.1f} MB of {size / 1e6:.1f} MB)",
        )


def _reason(error: BaseException) -> str:
    """Says in a few words why something failed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    # Errors of tensorstore, which writes for orbax, have the system's number in their text alone.
    if system := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(system[1]))
    return f"{type(error).__name__}: {text.partition(' [tensorstore_spec')[0][:300]}"


def _on_first(work: Callable[[], T]) -> T:
    """Returns to every process, through JSON, what work in process 0 returns."""
    result = _in_all(lambda: work() if jax.process_index() == 0 else None)
    return json.loads(distributed.exchange(json.dumps(result))[0])


def _in_all(work: Callable[[], T]) -> T:
    """Works in every process; what fails in one is raised in all, so that none goes on alone."""
    failure = None
    try:
        result = work()
    except Exception as error:
        failure = error
    text = "" if failure is None else str(failure) or type(failure).__name__
    messages = map(json.loads, distributed.exchange(json.dumps(text)))
    if failure is not None:
        raise failure
    for process, message in enumerate(messages):
        if message:
            raise CheckpointError(f"Process {process}: {message}")
    return result
