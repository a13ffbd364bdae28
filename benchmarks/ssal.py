"""Times what the branches of SSAL cost over the bare network, in training and in evaluation.

``python benchmarks/ssal.py`` (needs ``pip install -e '.[benchmark]'``; no data set). Networks are
variants of ``configs/ssal.py``, beside the same with the option ``0``, which is the bare network. A
step is as ``sire_jax.train`` takes it, in the compiled loop over steps: crops and flips, forward
and backward passes, SGD with momentum and weight decay, float32, on random images that are on the
device. Evaluation is the compiled loop over batches, from images to log probabilities: of the joint
prediction, which takes all outputs, and of the main output alone (``aux=False``), which should take
no branch.

Each contender has a process of its own. They take turns: a round is ``--steps`` steps, or batches,
of every contender of a network, the others idle, in an order drawn anew; first come the rounds of
training, then those of evaluation. Times are medians over ``--rounds`` rounds, ratios the median
and the quartiles of the ratios within a round.

"Required" are the multiply-adds of a forward pass over those of the bare network: the ratio if time
were multiply-adds, in training, too, as backward passes take twice as many of both. "Peak" is the
memory of training as ``benchmarks/sire.py`` measures it: on a CPU the growth of the process since
its imports, with what compilation left behind. "XLA plan" is what XLA allots to the program that
trains. Compiling is tracing and compiling that program.

Prints a table and writes JSON.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import devices
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict
from updates import contest, random_data, say
from updates_report import figures, ratios, spread
from workers import Memory, machine, mebibytes, planned_bytes

from sire_jax import configuration, traced
from sire_jax.configuration import experiment
from sire_jax.inspect import inspect
from sire_jax.metrics import Average
from sire_jax.predictions import Output, Prediction
from sire_jax.runs import parallel
from sire_jax.text import align

OUT = Path("docs/results/benchmark_ssal.json")
NETWORKS = ("resnet50", "resnet18")
# The programs of a contender: a step of training; evaluation of all outputs and of the main one.
STEP, ALL, MAIN = "step", "all outputs", "main alone"
# How far the main output may be from that of the bare network with the same parameters.
CLOSE = 1e-4


def load_config(variant: str, batch_size: int) -> ConfigDict:
    """Loads the shipped config of a network."""
    config = configuration.load(f"{configuration.repository_configs()}/ssal.py:{variant}")
    config.batch_size = batch_size
    return config


# ---- A contender's process.


class Programs:
    """A network's compiled programs.

    Args:
        variant: The network.
        options: The options.

    Attributes:
        facts: What is known before the first round.
        main: Log probabilities of the main output before training, of the images of a round.
        runs: Programs by name; each runs a round.
    """

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        config = load_config(variant, options.batch_size)
        self._parts = experiment.build(config)
        self._data, self._order = random_data(config, options.steps)
        # The same backbone in every contender: it does not depend on the heads.
        self._state = jax.jit(self._parts.initial_state)(jnp.int32(0))
        size = traced.size(self._state.params)
        self.facts: dict[str, Any] = {"parameters": size, "compile_seconds": {}, "plan": {}}
        self.runs: dict[str, Callable[[], Any]] = {MAIN: self._evaluation(MAIN, Output(), False)}
        if "joint" in self._parts.predictions:
            self.runs[ALL] = self._evaluation(ALL, self._parts.predictions["joint"], True)
        self.main = np.asarray(self.runs[MAIN]())
        self.runs[STEP] = self._training()
        for run in self.runs.values():
            run()

    def _compile(self, name: str, program: Any, arguments: Sequence[Any]) -> Any:
        started = time.perf_counter()
        compiled = program.lower(*arguments).compile()
        self.facts["compile_seconds"][name] = time.perf_counter() - started
        self.facts["plan"][name] = planned_bytes(compiled)
        return compiled

    def _training(self) -> Callable[[], None]:
        names = [f"{name}/loss" for name in (*self._parts.objectives, "total")]
        loop = parallel.over_steps(self._parts.step(), self._parts.lookup)

        def arguments() -> tuple[Any, ...]:
            nothing = {k: Average(total=jnp.zeros(()), count=jnp.zeros(())) for k in names}
            span = jnp.int32(0), jnp.int32(len(self._order))
            return self._state, nothing, self._data, self._order, *span

        program = self._compile(STEP, jax.jit(loop, donate_argnums=(0, 1)), arguments())

        def run() -> None:
            self._state, metrics, _ = program(*arguments())
            loss = float(metrics["total/loss"].mean())
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss}")

        return run

    def _evaluation(self, name: str, rule: Prediction, aux: bool) -> Callable[[], Array]:
        apply = self._parts.network.apply

        def predict(params: Any, model_state: Any, batch: Mapping[str, Array]) -> Any:
            outputs: Any = apply({"params": params, **model_state}, batch["image"], aux=aux)
            return rule(outputs)

        loop = parallel.collected(predict, self._parts.lookup, self._order.shape[1])

        def arguments() -> tuple[Any, ...]:
            return self._state.params, self._state.model_state, self._data, self._order.reshape(-1)

        program = self._compile(name, jax.jit(loop), arguments())
        return lambda: program(*arguments()).block_until_ready()


def serve(connection: Connection, variant: str, options: argparse.Namespace) -> None:
    """Prepares a contender, and answers with the seconds of a step or batch, or its memory."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    memory = Memory(device)
    programs = Programs(variant, options)
    memory.reset()
    connection.send((programs.facts, programs.main))
    with contextlib.suppress(EOFError):
        while name := connection.recv():
            if name == "memory":
                connection.send(memory.peak())
                continue
            started = time.perf_counter()
            programs.runs[name]()
            connection.send((time.perf_counter() - started) / options.steps)


class Worker:
    """A contender in a process of its own; see ``Programs`` for what it tells first."""

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        say(f"{variant}: compiling")
        # Not forked: the libraries have threads.
        spawn = multiprocessing.get_context("spawn")
        self._connection, other_end = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other_end, variant, options), daemon=True)
        self._process.start()
        other_end.close()
        self.facts, self.main = self._connection.recv()

    def ask(self, name: str) -> Any:
        """Runs a round of a program and returns the seconds of a step, or returns the memory."""
        self._connection.send(name)
        return self._connection.recv()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()


# ---- The contest of one network.


def multiply_adds(branched: str, bare: str) -> dict[str, int]:
    """Counts the multiply-adds of one image's forward pass.

    Raises:
        ValueError: If the network with branches, applied without them, takes other ones.
    """
    by_variant = {variant: inspect(load_config(variant, 1)) for variant in (branched, bare)}
    alone, expected = by_variant[branched]["without_heads"], by_variant[bare]["without_heads"]
    if alone != expected:
        raise ValueError(f"{branched} without its branches takes {alone}, {bare} takes {expected}.")
    return {variant: counts["multiply_adds"] for variant, counts in by_variant.items()}


def measure(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles, checks and times a network with and without branches."""
    branched, bare = (f"{network}{count}{',small' * options.small}" for count in ("", ",0"))
    required = multiply_adds(branched, bare)
    workers: dict[str, Worker] = {}
    try:
        for variant in (branched, bare):
            workers[variant] = Worker(variant, options)
        if not np.allclose(workers[branched].main, workers[bare].main, rtol=CLOSE, atol=CLOSE):
            raise ValueError(f"The main output of {branched} is not that of {bare}.")
        load = os.getloadavg()
        seconds = contest(options.rounds, rounds(workers, STEP))
        memory = {variant: worker.ask("memory") for variant, worker in workers.items()}
        seconds |= contest(options.rounds, rounds(workers, ALL, MAIN))
    finally:
        for worker in workers.values():
            worker.close()
    facts = {variant: {**w.facts, "memory": memory[variant]} for variant, w in workers.items()}
    return {"load": load, "multiply_adds": required, "facts": facts, "seconds": seconds}


def rounds(workers: Mapping[str, Worker], *programs: str) -> dict[str, Callable[[], float]]:
    """Lists by name what runs a round of each of these programs that a contender has."""
    pairs = ((variant, program) for variant in workers for program in programs)
    programs_of = [
        (variant, program)
        for variant, program in pairs
        if program in workers[variant].facts["plan"]
    ]
    return {
        f"{variant}: {program}": partial(workers[variant].ask, program)
        for variant, program in programs_of
    }


# ---- The report.


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes a row for each contender."""
    header = ["configs/ssal.py:", "parameters", "multiply-adds", "required"]
    header += ["ms/step", "/ bare (quartiles)", "joint, ms/batch", "/ bare", "main, ms/batch"]
    header += ["/ bare", "peak MiB", "XLA plan MiB", "compile s"]
    return align(
        [
            header,
            *(row(network, name) for network in measured.values() for name in network["facts"]),
        ]
    )


def row(measured: Mapping[str, Any], variant: str) -> list[str]:
    """Writes the figures of a contender; the last of its network is the bare one."""
    bare, facts = list(measured["facts"])[-1], measured["facts"][variant]
    count, least = measured["multiply_adds"][variant], measured["multiply_adds"][bare]
    times = []
    for program, other in ((STEP, STEP), (ALL, MAIN), (MAIN, MAIN)):
        times += time_cells(measured, f"{variant}: {program}", f"{bare}: {other}")
    return [
        variant,
        f"{facts['parameters']:,}",
        f"{count:,}",
        f"{count / least:.2f}",
        *times,
        mebibytes(facts["memory"]),
        mebibytes(facts["plan"][STEP]),
        f"{facts['compile_seconds'][STEP]:.1f}",
    ]


def time_cells(measured: Mapping[str, Any], name: str, other: str) -> list[str]:
    """Writes the milliseconds of a program, and how many times another's they are."""
    if name not in measured["seconds"]:
        return ["-", "-"]
    relative = "1" if name == other else spread(ratios(measured, name, other))
    return [f"{1e3 * median(measured['seconds'][name]):.1f}", relative]


# ---- The program.


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--small", action="store_true", help="a quarter of all widths")
    devices.add_option(parser)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write the figures")
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    options.device = devices.choose(options.device).platform
    # This process measures nothing: it leaves the GPU alone, which its workers share.
    jax.config.update("jax_platforms", "cpu")
    measured = {}
    for network in options.networks:
        measured[network] = measure(network, options)
        written = {**figures(measured, options), "machine": machine()}
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    print("\n" + table(measured))


if __name__ == "__main__":
    main()
