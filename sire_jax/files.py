"""Paths as people write them, whether they can be written to, and files that are written whole."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# Where the code of the library is.
PACKAGE = Path(__file__).parent


def expanded(path: str | Path, before: str = "") -> Path:
    """Expands ``~``, wherever a path comes in.

    >>> expanded("~/runs") == Path.home() / "runs"
    True

    Args:
        path: As the user wrote it.
        before: What is written before it, such as the name of a setting, for the message.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If it starts with ``~`` and there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0][1:]
        whose = (
            f"the home directory of '{user}', and there is no such user"
            if user
            else "a home directory, and this user has none (HOME is not set)"
        )
        raise FileNotFoundError(
            f"{before}{path} starts with {whose}; give the path in full."
        ) from None


def check_writable(path: str | Path, option: str = "--out") -> Path:
    """Checks, before any work, that a file can be written; one that is there is written over.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     check_writable(f"{directory}/curves.png").name
    'curves.png'

    Args:
        path: The file.
        option: The argument that names it.

    Returns:
        Its path.

    Raises:
        IsADirectoryError: If it is a directory.
        FileNotFoundError: If there is no directory to write it to.
        PermissionError: If it can't be written there.
    """
    path = expanded(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it, with {option}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no directory to write {path} to.")
    writable = os.access(path, os.W_OK) if path.exists() else _takes_files(path.absolute().parent)
    if not writable:
        raise PermissionError(f"{path} can't be written; choose another {option}.")
    return path


def _takes_files(directory: Path) -> bool:
    """Tells whether a file can be made in a directory; permissions alone don't say."""
    if not os.access(directory, os.W_OK):
        return False
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return False
    return True


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file aside and renames it: a crash leaves the old one or the new one, whole.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory) / "results.json"
    ...     replace(path, "{}")
    ...     path.read_text(), len(list(path.parent.iterdir()))
    ('{}', 1)

    Args:
        path: The file.
        content: What it will hold.
    """
    with _whole(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def replace_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays and texts into an uncompressed ``.npz`` archive, as ``replace`` does.

    Args:
        path: The file.
        arrays: Arrays and texts by name.
    """
    # What listens to signals is imported ahead of all libraries, and imports this.
    import numpy as np

    with _whole(path) as file:
        np.savez(file, allow_pickle=False, **{k: np.asarray(v) for k, v in arrays.items()})


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        # Else a crash of the machine may leave the new name with nothing in it.
        os.fsync(file.fileno())
    partial.replace(path)
