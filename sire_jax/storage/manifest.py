"""Manifests: whether a directory holds exactly what was once written into it.

A manifest lists every file of a directory with its size and SHA-256, and every directory. Anything
missing, changed or added is damage. It is a line with the SHA-256 of the rest, which is JSON.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sire_jax.storage.trees import ArrayType

MANIFEST = "manifest"
# Of what orbax is given: another number for anything else than the tree itself. Of the first, up to
# revision 160d875, it was the bytes of all arrays as one.
FORMAT = 2


@dataclass(frozen=True)
class FileEntry:
    """A file: its size in bytes and the SHA-256 of what it holds."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: Its step.
        arrays: Its arrays by their paths in the tree, in the order of their bytes.
        sha256: Of the bytes of all arrays, one after another.
        notes: What was noted beside them.
        files: All files of its directory by their paths within, but the manifest itself.
        directories: All directories within.
        format: What orbax was given; see ``FORMAT``.
    """

    step: int
    arrays: Mapping[str, ArrayType]
    sha256: str
    notes: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    directories: tuple[str, ...]
    format: int = FORMAT


def write(
    directory: Path,
    step: int,
    arrays: Mapping[str, ArrayType],
    sha256: str,
    notes: Mapping[str, Any],
) -> None:
    """Writes the manifest of all that is in a directory, after making sure it is on the disk.

    Args:
        directory: The directory.
        step: The step of the checkpoint.
        arrays: Its arrays by their paths in the tree.
        sha256: Of their bytes.
        notes: What JSON can hold.

    Raises:
        OSError: If it can't be written; there is no manifest then.
    """
    statuses = entries(directory)
    inner = [name for name, status in statuses.items() if stat.S_ISDIR(status.st_mode)]
    files = {
        name: FileEntry(status.st_size, _hash_on_disk(directory / name))
        for name, status in statuses.items()
        if name not in inner
    }
    # A file is on the disk once its name in its directory is, too.
    for name in (*inner, "."):
        _sync(directory / name)
    content = Manifest(step, arrays, sha256, notes, files, tuple(inner))
    write_sealed(directory / MANIFEST, vars(content))


def read(directory: Path) -> Manifest:
    """Reads the manifest of a directory.

    Args:
        directory: The directory.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is damaged, or something else.
    """
    content = read_sealed(directory / MANIFEST)
    try:
        return Manifest(
            int(content["step"]),
            {
                path: ArrayType(tuple(map(int, array["shape"])), str(array["dtype"]))
                for path, array in content["arrays"].items()
            },
            str(content["sha256"]),
            dict(content["notes"]),
            {name: FileEntry(**entry) for name, entry in content["files"].items()},
            tuple(map(str, content["directories"])),
            int(content.get("format", 1)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("is not a manifest") from error


def damage(directory: Path, step: int) -> str | None:
    """Says what is wrong with a checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = Path(directory, "numbers")
    ...     _ = file.write_bytes(b"1234")
    ...     write(Path(directory), step=3, arrays={}, sha256="", notes={})
    ...     before = damage(Path(directory), step=3)
    ...     _ = file.write_bytes(b"1235")
    ...     before, damage(Path(directory), step=3)
    (None, "is damaged: 'numbers' differs from what was saved")

    Args:
        directory: Its directory.
        step: Its step.

    Returns:
        How its message goes on after its name, ``None`` if it is intact.

    Raises:
        OSError: If something can't be read.
    """
    if directory.is_symlink() or not directory.is_dir():
        return "is no checkpoint: it is not a directory"
    statuses = entries(directory)
    for name, status in statuses.items():
        # Opening anything else could block, or lead out of the directory.
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return f"is damaged: '{name}' is neither a file nor a directory"
    if MANIFEST not in statuses:
        return (
            f"has no '{MANIFEST}': its writing was cut off or goes on, it is damaged, or it is no"
            " checkpoint"
        )
    try:
        fault = _difference(read(directory), directory, step, statuses)
    except (ValueError, RecursionError) as error:
        fault = f"'{MANIFEST}' {error}"
    return fault and f"is damaged: {fault}"


def _difference(
    manifest: Manifest, directory: Path, step: int, statuses: Mapping[str, os.stat_result]
) -> str | None:
    if manifest.step != step:
        return f"it is a copy of checkpoint {manifest.step}"
    # Only what was found in the directory is opened: a path in a manifest leads nowhere.
    listed = {MANIFEST, *manifest.files, *manifest.directories}
    for name in sorted(listed - set(statuses)):
        return f"'{name}' is missing"
    for name in sorted(set(statuses) - listed):
        return f"'{name}' does not belong to it"
    for name in manifest.directories:
        if not stat.S_ISDIR(statuses[name].st_mode):
            return f"'{name}' is not a directory"
    for name, saved in manifest.files.items():
        if not stat.S_ISREG(statuses[name].st_mode):
            return f"'{name}' is not a file"
        # Sizes first: they are known, and the content of a large file takes long to read.
        if statuses[name].st_size != saved.size:
            return f"'{name}' has {statuses[name].st_size} bytes, not {saved.size}"
        if _hash(directory / name) != saved.sha256:
            return f"'{name}' differs from what was saved"
    return None


def entries(directory: Path) -> dict[str, os.stat_result]:
    """Finds all that is inside a directory, without following links.

    Args:
        directory: The directory.

    Returns:
        The status of each file and directory by its path within.
    """
    return {p.relative_to(directory).as_posix(): p.lstat() for p in directory.rglob("*")}


def state(directory: Path) -> list[tuple[str, int, int, int, int]]:
    """Returns what changes whenever anything inside a directory is written; cheap to ask.

    Args:
        directory: The directory.
    """
    return sorted(
        (name, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
        for name, status in entries(directory).items()
    )


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON below its own SHA-256, whole or not at all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_sealed(Path(directory, "newest"), {"step": 700})
    ...     read_sealed(Path(directory, "newest"))
    {'step': 700}

    Args:
        path: The file.
        content: What JSON can hold, and dataclasses.

    Raises:
        OSError: If it can't be written.
    """
    text = json.dumps(content, default=vars).encode()
    # Beside it, as a file is renamed at once only within a file system.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def read_sealed(path: Path) -> Any:
    """Reads what ``write_sealed`` wrote.

    Args:
        path: The file.

    Raises:
        OSError: If it can't be read.
        ValueError: If a bit of it has changed.
    """
    first, _, text = path.read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != first:
        raise ValueError("differs from what was saved")
    return json.loads(text)


def seal(directory: Path) -> str | None:
    """Returns the SHA-256 that a manifest begins with, ``None`` if it can't be read.

    Args:
        directory: The directory.
    """
    try:
        with (directory / MANIFEST).open("rb") as file:
            # Of a damaged one the first line may be all of it.
            return file.readline(100).decode().strip()
    except (OSError, ValueError):
        return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_on_disk(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    """Makes sure that the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
