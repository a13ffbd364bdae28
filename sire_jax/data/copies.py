"""Copies of what takes long to make, such as decoded images, in the user's cache directory.

A copy can only save time: one that is absent, damaged or another user's is made anew.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sire_jax import untrusted
from sire_jax.files import expanded

_PARTIAL = ".partial"
# Of a title in a file name, which may have 255 bytes.
_LONG = 48
# Names tried for a file that is written, each of which somebody may take for abandoned.
_TRIES = 8


def place(
    cache: str, title: str, files: Iterable[Path], choices: Sequence[Any] = ()
) -> Path | None:
    """Names a copy by what it was made of: other files or choices, another copy.

    Args:
        cache: The directory of the copies; "" for none.
        title: What the file name starts with.
        files: The files that it is made of, in their order; links count as what they lead to.
        choices: What the files stand for and the choices made, which JSON can hold.

    Returns:
        The file; None if there are to be no copies, or the user has no home for them.
    """
    if not cache:
        return None
    identity = [*map(_identity, files), *choices]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    try:
        directory = expanded(cache)
    except FileNotFoundError:  # A user without a home, as in some containers.
        return None
    return directory / f"{title[:_LONG]}-{digest}.npz"


def _identity(path: Path) -> Any:
    resolved = str(path.resolve())
    try:
        status = path.stat()
    except OSError:  # Where a link leads to nothing.
        return resolved, None
    return resolved, status.st_size, status.st_mtime_ns


def write(path: Path | None, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a copy, if there is to be one; where that fails, a warning says why.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as cache:
    ...     copy = place(cache, "squares", files=[], choices=[3])
    ...     write(copy, {"squares": np.arange(3) ** 2})
    ...     read(copy)["squares"].tolist()
    [0, 1, 4]
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with _written_aside(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        warnings.warn(
            f"No copy is kept in {path.parent}, so that the next start takes as long:"
            f" {error.strerror or error}.",
            stacklevel=2,
        )


@contextlib.contextmanager
def _written_aside(path: Path) -> Iterator[Any]:
    """Opens a file that takes the place of another when it is whole, or else is removed.

    Whoever reads finds all of it or nothing. It is locked while it is written: hosts may share the
    directory, and in containers the numbers of their processes.
    """
    file, partial = _open_aside(path)
    try:
        with file:
            yield file
            file.flush()
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _open_aside(path: Path) -> tuple[BinaryIO, Path]:
    """Opens and locks a file of a new name: of another where somebody takes it for abandoned."""
    for _ in range(_TRIES):
        partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
        file = partial.open("wb")
        # Who removes it has its lock, or had it and has removed it.
        if _lock(file) is not False and partial.exists():
            return file, partial
        file.close()
        partial.unlink(missing_ok=True)
    raise BlockingIOError(errno.EAGAIN, f"{_TRIES} new files were locked by others at once")


def _lock(file: BinaryIO) -> bool | None:
    """Locks a file; False if somebody has, None if none can in this file system."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(directory: Path) -> None:
    """Removes what programs were writing as they were killed: nobody locks it any more."""
    for partial in directory.glob(f"*{_PARTIAL}"):
        with contextlib.suppress(OSError), partial.open("r+b") as file:
            if _lock(file):
                partial.unlink(missing_ok=True)


def read(path: Path | None) -> dict[str, np.ndarray] | None:
    """Reads a copy; None if there is none that can be used: one that is damaged is said."""
    if path is None or not _is_readable(path):
        return None
    try:
        return untrusted.read_arrays(path)
    except (OSError, ValueError) as error:
        warn_unusable(str(error))
        return None


def _is_readable(path: Path) -> bool:
    """Tells whether a copy is there and not kept from this user."""
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def warn_unusable(why: str) -> None:
    """Says that a copy can't be used, and what becomes of it."""
    warnings.warn(f"{why} It is a copy, which is made anew.", stacklevel=3)
