"""One program at a time in a workdir."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from sire_jax.job import lock

# Holds the lock of a directory until it is killed, in another process.
HOLD = """
import sys, time
from pathlib import Path
from sire_jax.job import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def _take(directory):
    with lock.held(directory):
        return json.loads((directory / lock.FILE).read_text())


def test_another_process_is_refused_and_told_who_has_it(holder, tmp_path):
    who = rf"process {holder.pid} on {socket.gethostname()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,"
    with pytest.raises(BlockingIOError, match=f"workdir {tmp_path} is in use: {who} trains in it"):
        _take(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_process_that_ends_ends_with_it(number, holder, tmp_path):
    holder.send_signal(number)
    holder.wait()
    # Its file is still there.
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == holder.pid
    assert _take(tmp_path)["pid"] == os.getpid()


def test_the_same_process_is_refused_too_until_it_lets_go(tmp_path):
    with lock.held(tmp_path), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        _take(tmp_path)
    assert _take(tmp_path)["pid"] == os.getpid()


def test_a_lost_host_is_waited_for(tmp_path, monkeypatch):
    answers = [BlockingIOError(errno.EAGAIN, "taken"), None]

    def flock(file, how):
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    owner = {"host": "another", "pid": 7, "since": "2026-01-01 00:00:00"}
    (tmp_path / lock.FILE).write_text(json.dumps(owner))
    with pytest.warns(UserWarning, match=r"process 7 on another, since 2026.*lost with its host"):
        assert _take(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_apart(number, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path):
        _take(tmp_path)


def test_where_nothing_can_be_written_nobody_is_kept_apart(tmp_path):
    with lock.held(tmp_path / "absent"):
        pass
    assert not (tmp_path / "absent").exists()
