"""Copies of what takes long to make, such as decoded images, in the user's cache directory."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sire_jax import untrusted


def place(cache: str, title: str, files: Iterable[Path], what: Sequence[Any] = ()) -> Path | None:
    """Names a copy by what it was made of: other files or choices, another copy.

    Args:
        cache: The directory of the copies; "" for none.
        title: What the file name starts with.
        files: The files that it is made of.
        what: The choices made, which JSON can hold.

    Returns:
        The file; None if there are to be no copies.
    """
    if not cache:
        return None
    statuses = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    identity: list[Any] = [(path, found.st_size, found.st_mtime) for path, found in statuses]
    digest = hashlib.sha256(json.dumps([*identity, *what]).encode()).hexdigest()[:16]
    return Path(cache).expanduser() / f"{title}-{digest}.npz"


def write(path: Path | None, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a copy, if there is to be one; without it the next start only takes longer."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: whoever reads finds all of it or nothing.
        # Hosts may share the directory, and in containers the numbers of their processes.
        _, name = tempfile.mkstemp(suffix=".npz", prefix=f"{path.stem}.", dir=path.parent)
        np.savez(name, allow_pickle=False, **arrays)
        Path(name).replace(path)


def read(path: Path | None) -> dict[str, np.ndarray] | None:
    """Reads a copy; None if there is none.

    Raises:
        ValueError: If it is damaged, or holds something else.
    """
    if path is None or not path.exists():
        return None
    try:
        return untrusted.read_arrays(path)
    except ValueError as error:
        raise ValueError(f"{error} It is a copy: remove it, to have it made anew.") from None
