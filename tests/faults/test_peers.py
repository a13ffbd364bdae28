"""A process of a job is killed, or stuck: the others end and say which one it was."""

import signal
import textwrap
import time

import programs
import pytest

from sire_jax.job import command

OVERRIDES = (
    "--config.seeds=1",
    "--config.epochs=1000000",
    "--config.evaluate_every=0",
)
# What is promised is 20.
SECONDS = 20
slow = pytest.mark.slow


SILENT = "process {} ends, because process {} has given no sign of life for "


# The real program; a small one is quick, below.
@slow
@pytest.mark.parametrize(
    ("number", "gone", "reason"),
    [
        # Its sockets stay open: only the silence tells.
        (signal.SIGSTOP, 1, SILENT.format(0, 1)),
        (signal.SIGKILL, 0, "process 0, through which all are connected, is gone"),
    ],
)
def test_the_job_ends_when_a_process_is_gone(number, gone, reason, tmp_path):
    job = programs.job(tmp_path / "run", tmp_path, *OVERRIDES)
    with programs.started(*job):
        job[0].wait_for("First step")
        sent = time.monotonic()
        job[gone].process.send_signal(number)
        left = job[1 - gone]
        assert left.wait() == command.PEER, left.output
        assert time.monotonic() - sent < SECONDS
        assert reason in left.output
        assert "Traceback" not in left.output


@slow
def test_all_that_are_left_say_the_same_reason(tmp_path):
    overrides = (*OVERRIDES, "--config.batch_size=60")
    job = programs.job(tmp_path / "run", tmp_path, *overrides, processes=3)
    with programs.started(*job):
        job[0].wait_for("First step")
        job[2].process.kill()
        for left in job[:2]:
            assert left.wait() == command.PEER, left.output
            assert "because process 2 has given no sign of life for " in left.output


# Lives, with its signs of life, but its main thread does not come to the next step.
STUCK = """
import sys, time
from sire_jax.job import distributed

distributed.start()
stuck = int(sys.argv[1])
import jax
with distributed.ended_together():
    for step in range(1000):
        if jax.process_index() == stuck and step == 3:
            time.sleep(1000)
        distributed.agree(False, step)
        print("step", step, flush=True)
        time.sleep(0.1)
"""


def _job(stuck, tmp_path):
    (tmp_path / "stuck.py").write_text(textwrap.dedent(STUCK))
    return programs.job_of(["stuck", str(stuck)], tmp_path, PYTHONPATH=str(tmp_path))


def test_a_job_that_computes_nothing_ends_when_a_process_is_killed(tmp_path):
    job = _job(-1, tmp_path)
    with programs.started(*job):
        job[0].wait_for("step 2")
        job[1].process.kill()
        began = time.monotonic()
        assert job[0].wait() == command.PEER
        assert time.monotonic() - began < SECONDS
        assert SILENT.format(0, 1) in job[0].output


@pytest.mark.parametrize("stuck", [pytest.param(0, marks=slow), 1])
def test_the_job_ends_when_a_process_lives_but_is_stuck(stuck, tmp_path):
    job = _job(stuck, tmp_path)
    with programs.started(*job):
        job[1 - stuck].wait_for("step 2")
        began = time.monotonic()
        assert job[1 - stuck].wait() == command.PEER
        assert time.monotonic() - began < SECONDS
        message = f"process {stuck} lived but did not come to the next step for "
        assert message in job[1 - stuck].output
