"""Worker processes of a stream that die, and those of a program that dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictured import write_folder

from sire_jax.data.records import open_records
from sire_jax.data.stream import Transform, WorkerError, batches

AS_IT_IS = Transform(shape=(4, 6, 3))


@pytest.fixture
def stream(tmp_path):
    """A stream that two processes make, longer than any test."""
    write_folder(tmp_path / "pets")
    records = open_records("folder:pets", str(tmp_path)).train
    order = np.random.default_rng(0).integers(0, 9, (100_000, 4))
    found = batches(records, order, AS_IT_IS, (0,), workers=2)
    yield found
    found.close()


def test_a_killed_worker_is_noticed_within_seconds(stream):
    next(stream)
    killed = multiprocessing.active_children()[0]
    os.kill(killed.pid, signal.SIGKILL)
    start = time.monotonic()
    message = r"worker process that decodes images died .*exit code -9.*config.data.workers=N"
    with pytest.raises(WorkerError, match=message):
        for _ in stream:
            pass
    assert time.monotonic() - start < 15
    assert not multiprocessing.active_children()
    assert list(stream) == []


def test_signals_that_stop_a_program_do_not_stop_its_workers(stream):
    # A whole job gets them, and the main process decides when to end. They come as soon as there
    # are processes, ahead of the first batch.
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.001)
    for each in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(each.pid, number)
    for _ in range(50):
        assert next(stream).arrays["intact"].all()
    assert len(multiprocessing.active_children()) == 2
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 15
    assert not multiprocessing.active_children()


PROGRAM = """
import multiprocessing, sys, time
import numpy as np
from sire_jax.data.records import open_records
from sire_jax.data.stream import Transform, batches

if __name__ == "__main__":
    records = open_records("folder:pets", sys.argv[1]).train
    order = np.random.default_rng(0).integers(0, 9, (100_000, 4))
    stream = batches(records, order, Transform((4, 6, 3)), (0,), workers=1)
    next(stream)
    print(multiprocessing.active_children()[0].pid, flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
    if sys.argv[2] == "fail":
        raise ValueError("something else")
"""


@pytest.fixture
def program(tmp_path):
    """Starts a program that holds a stream; returns it and the number of its worker."""
    write_folder(tmp_path / "pets")
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def start(then):
        command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), then]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1], int(started[-1].stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _is_running(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_ends_with_a_program_that_was_killed(program):
    process, worker = program("wait")
    assert _is_running(worker)
    process.kill()
    deadline = time.monotonic() + 15
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def test_the_first_worker_of_a_program_is_not_ended_by_signals_however_early(program):
    _, worker = program("wait")
    status = Path(f"/proc/{worker}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        assert blocked >> (number - 1) & 1, number.name


@pytest.mark.parametrize(("then", "code"), [("end", 0), ("fail", 1)])
def test_a_program_that_still_holds_a_stream_ends_by_itself(program, then, code):
    process, worker = program(then)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert not _is_running(worker)
    # Neither warnings of leaked memory nor errors of modules that are gone.
    assert errors.splitlines()[-1:] == (["ValueError: something else"] if code else [])
