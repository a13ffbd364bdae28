"""A run in a workdir that is on a full or read-only disk, with the real program."""

import subprocess

import programs
import pytest
from disks import mounted

from sire_jax.job import command
from sire_jax.storage.workdir import read_results

SMALL = (
    "--config.seeds=1",
    "--config.epochs=2",
    "--config.data.task.train=100",
    "--config.data.task.test=30",
    # A checkpoint takes more than is left on the disks below.
    "--config.backbone.hidden=(64,32)",
)


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk", 2**20) as path:
        yield path


def _refused(workdir, tmp_path):
    program = programs.train(workdir, tmp_path / "log", *SMALL)
    with programs.started(program):
        assert program.wait() == command.EXPLAINED, program.output
    assert "Traceback" not in program.output
    # Before anything was compiled.
    assert "First step" not in program.output
    return program.output


def test_a_read_only_disk_is_refused_at_once(disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    message = f"The workdir {disk / 'run'} can't be written to (Read-only file system); choose"
    assert message in _refused(disk / "run", tmp_path)


@pytest.mark.slow  # Another start of the program for the same look.
def test_a_full_disk_is_refused_at_once(disk, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        (disk / "filling").write_bytes(bytes(2**21))
    message = f"The workdir {disk / 'run'} can't be written to (No space left on device); choose"
    assert message in _refused(disk / "run", tmp_path)


@pytest.mark.slow  # Two starts, the second of which trains.
def test_a_disk_without_room_for_a_checkpoint_is_refused_and_used_when_there_is_room(
    disk, tmp_path
):
    (disk / "filling").write_bytes(bytes(2**20 - 2**15))
    output = _refused(disk / "run", tmp_path)
    assert f"The disk of the workdir {disk / 'run'} has 0 MB left, and a checkpoint of" in output
    (disk / "filling").unlink()
    program = programs.train(disk / "run", tmp_path / "log", *SMALL)
    with programs.started(program):
        assert program.wait() == 0, program.output
    assert read_results(disk / "run")["step"] == 4
