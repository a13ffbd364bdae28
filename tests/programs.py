"""The real programs, started as a user or a cluster starts them, in processes of their own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import restore

CONFIGS = configuration.repository_configs()
QUICKSTART = f"--config={CONFIGS}/quickstart.py"
# For what has nothing to do with the network.
TINY = f"--config={Path(__file__).with_name('tiny.py')}"
# Flags of the compiler are those of the tests.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "NPROC": "16"}


# Where programs that tests start keep what they compile, for all of them (conftest.py).
COMPILED = Path()


class Program:
    """A program that runs, with what it has printed.

    Args:
        arguments: Of ``python -m``.
        log: File for its output.
        environment: Further variables.
    """

    def __init__(self, arguments, log, **environment):
        self._log = Path(log)
        link_compiled(Path(environment.get("HOME", os.environ["HOME"])))
        with self._log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT, **environment},
                cwd=CONFIGS.parent,
            )

    @property
    def output(self):
        """What it has printed so far."""
        return self._log.read_text()

    def wait_for(self, text, seconds=120):
        """Waits until it has printed a text."""
        until = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, f"It ended without '{text}':\n{self.output}"
            assert time.monotonic() < until, f"No '{text}' in {seconds} s:\n{self.output}"
            time.sleep(0.05)

    def wait(self, seconds=120):
        """Waits until it has ended, and returns its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"It did not end in {seconds} s:\n{self.output}") from None


@contextlib.contextmanager
def started(*programs):
    """Kills what is left of programs at the end of a test."""
    try:
        yield programs
    finally:
        for program in programs:
            program.process.kill()
            program.process.wait()


def link_compiled(home):
    """Has what is compiled with the default of the config be kept for all tests."""
    link = home / ".cache" / "sire_jax" / "compiled"
    if not link.exists():
        COMPILED.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(COMPILED)


def train(workdir, log, *overrides, **environment):
    """Starts to train on one device."""
    arguments = ["sire_jax.train", TINY, f"--workdir={workdir}", *overrides]
    return Program(arguments, log, JAX_NUM_CPU_DEVICES="1", **environment)


def job(workdir, logs, *overrides, config=TINY, **settings):
    """Starts to train in several processes; see ``job_of``."""
    arguments = ["sire_jax.train", config, f"--workdir={workdir}", *overrides]
    return job_of(arguments, logs, **settings)


def job_of(arguments, logs, processes=2, devices=1, **environment):
    """Starts several processes of a program, connected by hand.

    ``arguments`` are those of ``python -m``, or a function from the number of a process to them.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        Program(
            arguments(i) if callable(arguments) else arguments,
            Path(logs) / f"process_{i}",
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(i),
            JAX_NUM_CPU_DEVICES=str(devices),
            **environment,
        )
        for i in range(processes)
    ]


def final(workdir, *overrides, config=TINY):
    """Returns the last state of a run, as arrays of bits."""
    config = configuration.load(config.removeprefix("--config="), [*overrides])
    config.devices = 1
    state, _ = restore(Runs(experiment.build(config)), Path(workdir) / "checkpoints")
    plain = [
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    return [np.asarray(x) for x in plain]


def assert_same_bits(a, b):
    """Asserts that two states are equal bit for bit."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == other.tobytes()
