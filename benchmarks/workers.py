"""Contenders of benchmarks in processes of their own, which take turns; how long and how large.

A program of contenders starts itself again for each, with ``--worker=JSON``; that process answers
with a line of JSON when it is ready, and then for every line of standard input. PyTorch is imported
where it is asked: reports of what was measured need none.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import jax

from sire_jax.layers.onednn.library import SWITCH

# Engines that are JAX's.
OURS = ("ours", "plain")


class Contender(Protocol):
    """What is timed: a dataclass of what can be written as JSON."""

    @property
    def engine(self) -> str:
        """``"ours"``, ``"plain"`` (without oneDNN), or one of PyTorch's."""

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""

    @property
    def steps(self) -> int:
        """Steps in a round."""


@dataclass(frozen=True)
class Training:
    """A contender, compiled and warmed up.

    Attributes:
        take: Takes so many steps and returns their mean loss.
        parameters: Number of parameters.
        plan: Bytes that the compiled program needs, if known.
        facts: What else is told before the first round.
    """

    take: Callable[[int], float]
    parameters: int
    plan: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def planned_bytes(program: Any) -> int | None:
    """Returns the bytes of a compiled program's arguments, results and intermediate arrays."""
    plan = program.memory_analysis()
    if plan is None:
        return None
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + results + plan.temp_size_in_bytes


# ---- A contender's process.


class Memory:
    """Measures the peak memory of this process, or of its GPU.

    Not by ``getrusage``, whose peak holds what the parent process had and can't be reset.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        engine: Whose allocator it is on a GPU.
    """

    def __init__(self, device: str, engine: str = "ours") -> None:
        self._device, self._engine = device, engine
        self._before = _status("VmRSS")

    def reset(self) -> None:
        """Forgets the peak so far."""
        if self._device == "cpu":
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
        elif self._engine not in OURS:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Returns the peak in bytes, if the system tells."""
        if self._device == "cpu":
            peak = _status("VmHWM")
            return None if peak is None or self._before is None else peak - self._before
        if self._engine in OURS:
            return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        import torch

        return torch.cuda.max_memory_allocated()


def _status(key: str) -> int | None:
    """Reads a size of this process in bytes, where the system has ``/proc``."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(sizes[key].split()[0]) * 1024


def answers(contender: Contender, prepare: Callable[[Any], Training]) -> Iterator[dict[str, Any]]:
    """Prepares a contender, and runs a round for each line of standard input."""
    memory = Memory(contender.device, contender.engine)
    training = prepare(contender)
    memory.reset()
    yield {"parameters": training.parameters, "plan": training.plan, **training.facts}
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = training.take(contender.steps)
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        yield {"seconds": seconds / contender.steps, "loss": loss, "memory": memory.peak()}


def work(contender: Contender, prepare: Callable[[Any], Training]) -> None:
    """Writes the answers to standard output, a line of JSON each."""
    output = os.fdopen(os.dup(1), "w")
    # What libraries print should not be among the answers.
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=output, flush=True)

    try:
        for answer in answers(contender, prepare):
            say(answer)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        say({"error": textwrap.shorten(reason, 80, placeholder=" …")})


# ---- The contest.


class Worker:
    """A contender in a process of its own, and what it measured.

    Args:
        contender: The contender.
        program: The program that takes it as ``--worker``.

    Attributes:
        contender: The contender.
        ready: What it said before the first round.
        rounds: What it said after each round.
        error: Why it did not run, if it did not.
    """

    def __init__(self, contender: Any, program: str) -> None:
        self.contender = contender
        self.rounds: list[dict[str, Any]] = []
        self.error = ""
        environment = {
            **os.environ,
            # Beside PyTorch, JAX leaves the GPU alone.
            "JAX_PLATFORMS": contender.device if contender.engine in OURS else "cpu",
        }
        if contender.engine == "plain":
            environment[SWITCH] = "0"
        self._process = subprocess.Popen(
            [sys.executable, program, "--worker", json.dumps(asdict(contender))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ready = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        ended = "" if line else f"its process ended with status {self._process.wait()}"
        answer = json.loads(line) if line else {"error": ended}
        self.error = answer.get("error", "")
        return answer

    def run_round(self) -> None:
        """Runs a round, if nothing failed before."""
        if self.error:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        answer = self._answer()
        if not self.error:
            self.rounds.append(answer)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def record(self) -> dict[str, Any]:
        """Returns what is written as JSON."""
        told = {**self.ready, "rounds": self.rounds, "error": self.error}
        return {**asdict(self.contender), **told}

    @property
    def seconds(self) -> list[float]:
        """Seconds of a step in each round."""
        return [round_["seconds"] for round_ in self.rounds]


def contest(
    contenders: Sequence[Any],
    rounds: int,
    program: str,
    check: Callable[[Worker], None],
    note: Callable[[list[Worker]], None] = lambda workers: None,
) -> list[Worker]:
    """Prepares the contenders one after another, then runs the rounds, in which they take turns.

    Args:
        contenders: Contenders, each with a ``network`` and a ``title``.
        rounds: How many.
        program: The program that takes one as ``--worker``.
        check: Checks one that is ready.
        note: Is told the workers after each round.

    Returns:
        What they measured; their processes have ended.
    """
    workers: list[Worker] = []
    try:
        for contender in contenders:
            print(f"Preparing {contender.network}: {contender.title} …", file=sys.stderr)
            workers.append(Worker(contender, program))
            check(workers[-1])
        for i in range(rounds):
            print(f"Round {i + 1} of {rounds} …", file=sys.stderr)
            for worker in workers:
                worker.run_round()
            note(workers)
    finally:
        for worker in workers:
            worker.close()
    return workers


# ---- What is reported.


def ratio(worker: Worker, other: Worker | None) -> float | None:
    """Returns the median over rounds of how many times the other's time a contender takes."""
    if other is None or worker.error or other.error:
        return None
    return median(a / b for a, b in zip(worker.seconds, other.seconds, strict=False))


def number(value: float | None, digits: int = 2) -> str:
    """Writes a number, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def mebibytes(size: int | None) -> str:
    """Writes a size in MiB."""
    return number(None if size is None else size / 2**20, 0)


def machine() -> str:
    """Describes the processor, and the GPU if there is one."""
    import torch

    described = platform.processor() or platform.machine()
    processors = Path("/proc/cpuinfo")
    if processors.exists():
        lines = processors.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        described = names[0] if names else described
    described = f"{described}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        described += f", {torch.cuda.get_device_name()}"
    return described
