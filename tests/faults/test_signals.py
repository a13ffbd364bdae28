"""SIGTERM, SIGINT and SIGUSR1, to one process and to one of two."""

import re
import signal
import time

import programs
import pytest

from sire_jax.job import command
from sire_jax.storage.checkpoint import Checkpoints

pytestmark = pytest.mark.optax_dtypes

STATUS = {
    signal.SIGTERM: command.AGAIN,
    signal.SIGUSR1: command.AGAIN,
    signal.SIGINT: command.INTERRUPTED,
}
# Endless; only the signal saves.
OVERRIDES = (
    "--config.seeds=1",
    "--config.epochs=1000000",
    "--config.checkpoint_every=0",
    "--config.evaluate_every=50",
)
SECONDS = 15
# One is quick; the other takes the same path through several starts of the program.
slow = pytest.mark.slow
ONE = [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=slow)]


def _saved(output):
    return int(re.search(r"saved after step (\d+) in", output)[1])


@pytest.mark.parametrize("number", ONE, ids=lambda number: number.name)
def test_one_process_saves_ends_and_goes_on_at_the_next_step(number, tmp_path):
    program = programs.train(tmp_path / "run", tmp_path / "log", *OVERRIDES)
    with programs.started(program):
        program.wait_for("First step")
        time.sleep(0.5)
        sent = time.monotonic()
        program.process.send_signal(number)
        assert program.wait() == STATUS[number], program.output
        assert time.monotonic() - sent < SECONDS
    step = _saved(program.output)
    assert f"{number.name}: saved after step {step} in {tmp_path / 'run'}." in program.output
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == step > 0
    again = programs.train(tmp_path / "run", tmp_path / "log_again", *OVERRIDES)
    with programs.started(again):
        again.wait_for("First step")
        assert f"Going on after step {step}.\n" in again.output
        again.process.send_signal(signal.SIGTERM)
        again.wait()
    assert _saved(again.output) > step


@slow
def test_what_is_being_saved_is_saved_though_the_signal_comes_again(tmp_path):
    program = programs.train(tmp_path / "run", tmp_path / "log", *OVERRIDES)
    with programs.started(program):
        program.wait_for("First step")
        while program.process.poll() is None:
            program.process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        assert program.wait() == command.AGAIN
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == _saved(program.output)


@slow
def test_two_processes_end_at_the_same_step_though_one_is_asked(tmp_path):
    job = programs.job(tmp_path / "run", tmp_path, *OVERRIDES)
    asked, number = 1, signal.SIGTERM
    with programs.started(*job):
        job[0].wait_for("First step")
        time.sleep(0.5)
        sent = time.monotonic()
        job[asked].process.send_signal(number)
        statuses = [each.wait() for each in job]
        assert time.monotonic() - sent < SECONDS
    # The other one was not asked by a person.
    expected = [command.AGAIN, command.AGAIN]
    expected[asked] = STATUS[number]
    assert statuses == expected, job[0].output + job[1].output
    # Both saved at this step, on which they agree before each call: had one gone on, it would have
    # waited for the other, and neither had ended in order. The first one says it.
    step = _saved(job[0].output)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == step > 0
    assert "saved" not in job[1].output
    # One process goes on where two ended.
    again = programs.train(tmp_path / "run", tmp_path / "log_again", *OVERRIDES)
    with programs.started(again):
        again.wait_for("First step")
        again.process.send_signal(signal.SIGTERM)
        again.wait()
    assert f"Going on after step {step}. Not on what it was saved on: devices 2 -> 1, " in (
        again.output
    )
    assert "processes 2 -> 1" in again.output
    assert "no longer bit for bit" in again.output
    assert _saved(again.output) > step
