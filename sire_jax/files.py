"""Paths as people write them, and whether they can be written to."""

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Expands ``~``, wherever a path comes in.

    Args:
        path: As the user wrote it.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If it starts with ``~`` and there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            f"{path} starts with a home directory, and this user has none (HOME is not set); give"
            " the path in full."
        ) from None


def check_writable(path: str | Path) -> Path:
    """Checks, before any work, that a file can be written; one that is there is written over.

    Args:
        path: The file.

    Returns:
        Its path.

    Raises:
        IsADirectoryError: If it is a directory.
        FileNotFoundError: If there is no directory to write it to.
        PermissionError: If it can't be written there.
    """
    path = expanded(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it, with --out.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no directory to write {path} to.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path} can't be written; choose another --out.")
    return path
