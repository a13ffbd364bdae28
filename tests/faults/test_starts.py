"""Signals before the first step, readers of the output that end, and programs run by their path."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest

from sire_jax.job import command

pytestmark = pytest.mark.optax_dtypes

PACKAGE = programs.CONFIGS.parent / "sire_jax"
ENDLESS = ("--config.seeds=1", "--config.epochs=1000000", "--config.evaluate_every=0")
SMALL = ("--config.seeds=1", "--config.epochs=1", "--config.data.task.train=100")


def _start(*arguments, **options):
    """Starts Python with the handlers of a terminal, whatever the tests were started with."""
    programs.link_compiled(Path(os.environ["HOME"]))
    environment = {**os.environ, **programs.ENVIRONMENT, "JAX_NUM_CPU_DEVICES": "1"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {"cwd": PACKAGE.parent, **pipes, **options}
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) == signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
            **options,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(process, seconds=120):
    """Returns the status and the lines of both outputs of a process that ends."""
    try:
        written = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, [line for each in written for line in (each or "").splitlines()]


def _stopped(after, number, *arguments):
    """Sends a signal to a program after some seconds; returns the status and what it said last."""
    process = _start("-m", *arguments, stderr=subprocess.STDOUT)  # In the order of a terminal.
    time.sleep(after)
    assert process.poll() is None, _ended(process)
    process.send_signal(number)
    sent = time.monotonic()
    status, lines = _ended(process)
    assert time.monotonic() - sent < 5
    assert not any("Traceback" in line or "Error" in line for line in lines), lines
    return status, [line for line in lines if line][-1]


KEPT = "What has been saved is kept, and the same command goes on."


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, command.INTERRUPTED), (signal.SIGTERM, command.AGAIN)],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_program_that_starts_ends_at_once_with_a_line(number, status, tmp_path):
    # While it imports.
    train = ("sire_jax.train", programs.TINY, f"--workdir={tmp_path}", *ENDLESS)
    said = f"{number.name}: ended. {KEPT}"
    assert _stopped(1, number, *train) == (status, said)


def test_a_program_that_is_not_resumed_ends_of_ctrl_c_with_a_line():
    arguments = ("sire_jax.inspect", programs.TINY)
    assert _stopped(1, signal.SIGINT, *arguments) == (command.INTERRUPTED, "SIGINT: ended.")


def test_what_is_started_in_the_background_ends_of_sigterm_and_not_of_ctrl_c(tmp_path):
    train = ("sire_jax.train", programs.TINY, f"--workdir={tmp_path}", *ENDLESS)
    process = _start("-c", _IGNORING, "-m", *train)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    status, lines = _ended(process)
    # What it says depends on how far it has come: it ends, or saves first.
    assert status == command.AGAIN
    saved = rf"SIGTERM: saved after step \d+ in {re.escape(str(tmp_path))}\."
    assert lines[-1] == f"SIGTERM: ended. {KEPT}" or re.fullmatch(saved, lines[-1])


# As `nohup` and shells that are no terminal's start what ends in `&`.
_IGNORING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 1, 2, 3, 4, 5])
def test_ctrl_c_ends_a_program_whenever_it_comes(after, tmp_path):
    # Importing, building, loading, compiling, training.
    train = ("sire_jax.train", programs.TINY, f"--workdir={tmp_path}", *ENDLESS)
    status, said = _stopped(after, signal.SIGINT, *train)
    assert status == command.INTERRUPTED
    assert said == f"SIGINT: ended. {KEPT}" or said.startswith("SIGINT: saved after step "), said


def test_ctrl_c_again_ends_what_is_saving_at_once(tmp_path):
    train = ("sire_jax.train", programs.TINY, f"--workdir={tmp_path}", *ENDLESS)
    process = _start("-u", "-m", *train)
    for line in process.stdout:
        if line.startswith("First step"):
            break
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    status, lines = _ended(process)
    assert status == command.INTERRUPTED
    assert "SIGINT: saving first; once more ends it at once." in lines
    assert not any("Traceback" in line for line in lines)


def test_training_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    train = ("sire_jax.train", programs.TINY, f"--workdir={tmp_path}", *SMALL)
    process = _start("-m", *train)
    assert process.stdout.readline().startswith("tiny")
    process.stdout.close()
    process.stdout = None
    assert _ended(process) == (0, [])
    assert (tmp_path / "results.json").exists()


def test_training_goes_on_without_any_output(tmp_path):
    train = ("sire_jax.train", programs.TINY, f"--workdir={tmp_path}", *SMALL)
    process = _start("-c", _CLOSED, "-m", *train, stdout=None)
    assert _ended(process) == (0, [])
    assert (tmp_path / "results.json").exists()


# As `>&- 2>&-` in a shell.
_CLOSED = """
import os, sys
os.close(1), os.close(2)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_short_program_ends_quietly_when_nobody_reads_what_it_prints():
    process = _start("-m", "sire_jax.inspect", programs.TINY)
    process.stdout.close()
    process.stdout = None
    assert _ended(process) == (command.UNREAD, [])


BY_PATH = "the programs of sire_jax are run by module, and from another directory than their own"


@pytest.mark.parametrize("program", ["train", "inspect", "evaluate"])
def test_programs_run_by_path_say_how_they_are_run(program):
    status, lines = _ended(_start(str(PACKAGE / f"{program}.py"), "--help"))
    assert status == command.EXPLAINED
    assert len(lines) == 1
    assert BY_PATH in lines[0]


def test_programs_run_in_their_own_directory_say_where_they_are_run():
    status, lines = _ended(_start("-m", "sire_jax.train", "--help", cwd=PACKAGE))
    assert status == command.EXPLAINED
    assert BY_PATH in lines[0]


def test_diagnostics_run_by_path():
    status, lines = _ended(_start(str(PACKAGE / "diagnostics" / "conflict.py"), "--help"))
    assert status == 0
    assert lines[0].startswith("usage: conflict.py")
