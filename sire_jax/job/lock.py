"""One program at a time writes to a workdir.

A lock of the system (``flock``) on the file ``.lock``: it ends with the process that has it,
however that ends, so none is ever left over. Processes of one host are always kept apart; those of
several where the file system locks for all of them (NFS on Linux; Lustre mounted with ``flock``),
which may keep the lock of a lost host for a while. Where it has no locks nobody is kept apart.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

FILE = ".lock"
# Seconds: a lost host's lock ends with its lease, which is 90 s on NFS.
_PATIENCE = 120.0
_TAKEN = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Holds the lock of a workdir.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, held(Path(directory)):
    ...     with held(Path(directory)):  # doctest: +ELLIPSIS
    ...         pass
    Traceback (most recent call last):
    BlockingIOError: The workdir ... is in use: process ... trains in it. Wait until it ends, ...

    Args:
        directory: The workdir.

    Raises:
        BlockingIOError: If another program has it; the message says which.
    """
    with _open(directory / FILE) as file:
        if file is not None:
            _take(directory, file)
        yield


def _open(path: Path) -> Any:
    """Opens the file of the lock; where there can be none, no one else writes, either."""
    try:
        # One of another user can be locked, but not signed.
        signed = not path.exists() or os.access(path, os.W_OK)
        return path.open("a+" if signed else "r")
    except OSError:
        return contextlib.nullcontext()


def _take(directory: Path, file: IO[str]) -> None:
    until = time.monotonic() + _PATIENCE
    warned = False
    while not _locked(file):
        owner = _owner(file)
        # One of this host is there, or it would not have the lock.
        if owner.get("host") == socket.gethostname() or time.monotonic() > until:
            raise BlockingIOError(
                f"The workdir {directory} is in use: {_named(owner)} trains in it. Wait until it"
                " ends, stop it, or choose another --workdir."
            )
        if not warned:
            warnings.warn(
                f"The workdir {directory} is in use: {_named(owner)} trains in it, or is lost with"
                f" its host. Waiting for {_PATIENCE:.0f} s.",
                stacklevel=4,
            )
            warned = True
        time.sleep(1)
    _sign(file)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other error: there are no locks here.
        return error.errno not in _TAKEN
    return True


def _sign(file: IO[str]) -> None:
    """Writes who has the lock, for those who find it taken."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(json.dumps(owner) + "\n")
        file.flush()


def _owner(file: IO[str]) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        owner = json.loads(file.read())
        return owner if isinstance(owner, dict) else {}
    return {}


def _named(owner: dict[str, Any]) -> str:
    if not {"host", "pid", "since"} <= owner.keys():
        return "another program"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']},"
