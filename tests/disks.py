"""Small disks of their own for tests."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(path, size):
    """Mounts a disk of so many bytes; skips the test, saying so, where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
