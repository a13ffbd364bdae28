"""Times training on more devices and processes, checkpoints, and how soon a run goes on.

``python benchmarks/scaling.py`` (no data set). The network is that of ``--config``, on random
images of CIFAR's size that are on the devices; the steps are those of ``sire_jax.train``.

**Scaling.** ``strong``: the same batch is shared by more and more; ``weak``: each gets as many
images as one had. ``devices`` are virtual devices of one process that has all cores of the machine,
also where it has but one device: they have nothing to gain, and what is lost is what sharing costs.
``processes`` have a core each, and one device. Efficiency is images/s over those of one, and per
core where there are more cores. A row is the median of ``--rounds`` starts, which take turns.

**Checkpoints.** Rounds of ``--saves`` times 100 steps, with a checkpoint after each 100 and without
one, take turns in one process; a round with checkpoints lasts until the last one is on the disk.
The target is that they cost less than 2%. The same in seconds of the processor, which training uses
all of on a CPU, does not depend on what else the machine does.

**Restart.** The program ``sire_jax.train`` from its start to the end of its first step, where
compiled programs are kept from a former start and where not.

Prints tables and writes JSON.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.job import distributed
from sire_jax.runs.on_device import DeviceFeed
from sire_jax.runs.placement import Placement
from sire_jax.runs.runs import Checkpoint, Runs
from sire_jax.storage.checkpoint import Checkpoints
from sire_jax.text import align

OUT = Path("docs/results/benchmark_scaling.json")
DEVICES = (1, 2, 4, 8)
PROCESSES = (1, 2)
JIT, PMAP = "parallel=jit", "parallel=pmap"
UNITS = {"devices": "device", "processes": "process"}
# Batch statistics of each device's part of a batch.
OWN_STATISTICS = "parallel=pmap, batch_norm=device"
STEPS_OF_A_SAVE = 100
TARGET = 0.02
IMAGES = 2048


def random_images(parts: experiment.Experiment, placement: Placement) -> DeviceFeed:
    """Feeds random images, so that no data set is needed."""
    data, generator = parts.config.data, np.random.default_rng(0)
    arrays = {"image": generator.integers(0, 256, (IMAGES, *data.shape), np.uint8)}
    arrays |= {k: generator.integers(0, n, IMAGES, np.int32) for k, n in data.classes.items()}
    examples = np.arange(IMAGES, dtype=np.int32)[None]
    splits = dict.fromkeys(("train", "validation", "test"), examples)
    return DeviceFeed(parts, placement, arrays, splits)


class Training:
    """A run that has been compiled, and its steps."""

    def __init__(self, path: str, overrides: Sequence[str]):
        config = configuration.load(path, [f"--config.{override}" for override in overrides])
        self.runs = Runs(experiment.build(config), random_images)
        self.batch = config.batch_size
        self.state = self.runs.initial()
        self.order = self.runs.feed.order(self.state, 0)
        self.take(1)

    def take(self, steps: int) -> float:
        """Takes steps; returns the seconds they took."""
        started = time.perf_counter()
        while steps:
            count = min(steps, self.runs.feed.steps_per_epoch)
            self.state, _, broken = self.runs.feed.take_steps(
                self.state, self.runs.no_metrics(), self.order, 0, count
            )
            jax.block_until_ready(broken)
            steps -= count
        return time.perf_counter() - started

    def save(self, checkpoints: Checkpoints) -> None:
        """Saves as the training program does."""
        seconds = self.runs.placement.place(np.float32(0))
        tree = Checkpoint(self.state, self.runs.no_metrics(), None, seconds)
        checkpoints.save(
            int(np.asarray(self.state.step)[0]),
            tree,
            distributed.describe(self.runs.placement.mesh),
        )


# ---- Scaling.


def step(path: str, steps: int, overrides: Sequence[str]) -> None:
    """Prints the images/s of one process of a job: the program of ``--worker``."""
    distributed.start()
    with distributed.ended_together():
        training = Training(path, overrides)
        training.take(steps)
        seconds = training.take(steps)
    print(json.dumps({"images": training.batch * steps / seconds}), flush=True)


def started(arguments: Sequence[str], processes: int, devices: int) -> float:
    """Starts the processes of a job and returns the images/s of its first one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    cores = sorted(os.sched_getaffinity(0))
    job = []
    for i in range(processes):
        environment = {**os.environ, "NPROC": "16", "JAX_NUM_CPU_DEVICES": str(devices)}
        environment["JAX_PLATFORMS"] = "cpu"
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(i),
            }
        pinned = ["taskset", "-c", str(cores[i])] if devices == 0 else []
        environment["JAX_NUM_CPU_DEVICES"] = str(max(devices, 1))
        job.append(
            subprocess.Popen(
                [*pinned, sys.executable, __file__, "--worker", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    printed = [process.communicate()[0] for process in job]
    for process, text in zip(job, printed, strict=True):
        if process.returncode:
            raise RuntimeError(f"A process ended with status {process.returncode}: {text}")
    return float(json.loads(printed[0].splitlines()[-1])["images"])


def scaling(options: argparse.Namespace, cache: str) -> list[dict[str, Any]]:
    """Measures all numbers of devices and processes, in turns."""
    cases = []
    for kind in ("strong", "weak"):
        for parallel in (JIT, PMAP) if kind == "strong" else (JIT,):
            cases += [(kind, parallel, "devices", n) for n in DEVICES]
        cores = len(os.sched_getaffinity(0))
        for parallel in (JIT, PMAP, OWN_STATISTICS):
            cases += [(kind, parallel, "processes", n) for n in PROCESSES if n <= cores]
    speeds: dict[Any, list[float]] = {case: [] for case in cases}
    for turn in range(options.rounds):
        for i in np.random.default_rng(turn).permutation(len(cases)):
            kind, parallel, unit, number = cases[i]
            batch = options.batch * (number if kind == "weak" else 1)
            arguments = [f"--config={options.config}", f"--steps={options.steps}"]
            arguments += [f"--override={override}" for override in options.override]
            arguments += [f"--override={override}" for override in parallel.split(", ")]
            arguments += [f"--override=batch_size={batch}"]
            arguments += [f"--override=compilation_cache={cache}"]
            processes = number if unit == "processes" else 1
            # 0: one device, on a core of its own.
            devices = 0 if unit == "processes" else number
            speeds[cases[i]].append(started(arguments, processes, devices))
            print(f"round {turn + 1}: {cases[i]} {speeds[cases[i]][-1]:,.0f} images/s", flush=True)
    rows = []
    for kind, parallel, unit, number in cases:
        images = median(speeds[kind, parallel, unit, number])
        alone = median(speeds[kind, parallel, unit, 1])
        cores = number if unit == "processes" else 1
        rows.append(
            {
                "scaling": kind,
                "parallel": parallel,
                "unit": unit,
                "number": number,
                "batch": options.batch * (number if kind == "weak" else 1),
                "images_per_second": images,
                "efficiency": images / alone / cores,
                "rounds": speeds[kind, parallel, unit, number],
            }
        )
    return rows


# ---- Checkpoints.


def checkpoints(options: argparse.Namespace, directory: Path, cache: str) -> dict[str, Any]:
    """Measures rounds of steps with checkpoints and without."""
    overrides = [*options.override, f"compilation_cache={cache}", "devices=1"]
    training = Training(options.config, [*overrides, f"batch_size={options.batch}"])
    manager = Checkpoints(directory / "checkpoints")
    training.take(STEPS_OF_A_SAVE)
    times: dict[bool, list[float]] = {True: [], False: []}
    processor: dict[bool, list[float]] = {True: [], False: []}
    blocking: list[float] = []
    for turn in range(options.rounds):
        # In turns: neither is always the first.
        for saving in (True, False) if turn % 2 else (False, True):
            began, processor_began = time.perf_counter(), time.process_time()
            for _ in range(options.saves):
                training.take(STEPS_OF_A_SAVE)
                if saving:
                    called = time.perf_counter()
                    training.save(manager)
                    blocking.append(time.perf_counter() - called)
            if saving:
                manager.wait()
            times[saving].append(time.perf_counter() - began)
            processor[saving].append(time.process_time() - processor_began)
            print(f"round {turn + 1}: saving {saving}: {times[saving][-1]:.2f} s", flush=True)
    manager.close()
    steps = options.saves * STEPS_OF_A_SAVE
    leaves = jax.tree.leaves(training.state)
    return {
        "step_ms": 1e3 * median(times[False]) / steps,
        "megabytes": sum(x.size * x.dtype.itemsize for x in leaves) / 1e6,
        "blocking_ms": 1e3 * median(blocking),
        "overhead": median(times[True]) / median(times[False]) - 1,
        "processor_overhead": median(processor[True]) / median(processor[False]) - 1,
        "seconds": {"saving": times[True], "not saving": times[False]},
        "processor_seconds": {"saving": processor[True], "not saving": processor[False]},
        "saves_a_round": options.saves,
        "target": TARGET,
    }


# ---- Restart.


def restart(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Measures the program from its start to the end of its first step."""
    rows = []
    for name, arguments in RESTARTED.items():
        seconds: dict[str, list[float]] = {"compiled": [], "loaded": []}
        for turn in range(options.rounds):
            workdir = directory / f"{name}_{turn}"
            cache = f"--config.compilation_cache={workdir}_compiled"
            for kind in seconds:
                seconds[kind].append(_first_step([*arguments, cache, f"--workdir={workdir}"]))
                print(f"round {turn + 1}: {name}, {kind}: {seconds[kind][-1]:.1f} s", flush=True)
        rows.append({"program": name, **{k: median(v) for k, v in seconds.items()}})
    return rows


_CONFIGS = configuration.repository_configs()
RESTARTED = {
    "quickstart": [f"--config={_CONFIGS}/quickstart.py"],
    "auxnet 20-2": [
        f"--config={_CONFIGS}/auxnet.py:20-2",
        "--config.data.name=digits",
        "--config.data.shape=(8, 8, 1)",
        "--config.data.images=0",
        "--config.data.mean=()",
        "--config.data.std=()",
        "--config.optimizer.learning_rate.unit=step",
        "--config.optimizer.learning_rate.boundaries=(1000, 2000)",
    ],
}


def _first_step(arguments: Sequence[str]) -> float:
    began = time.perf_counter()
    program = subprocess.Popen(
        [sys.executable, "-u", "-m", "sire_jax.train", *arguments, "--config.devices=1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    printed = []
    for line in program.stdout:
        printed.append(line)
        if line.startswith("First step"):
            seconds = time.perf_counter() - began
            program.terminate()
            program.communicate()
            return seconds
    raise RuntimeError(f"The program took no step:\n{''.join(printed)}")


# ---- What is printed.


def report(measured: Mapping[str, Any]) -> str:
    """Writes all measurements as tables."""
    rows = [["scaling", "by", "of", "batch", "images/s", "efficiency"]]
    for row in measured.get("scaling", ()):
        by = f"{row['number']} {row['unit'] if row['number'] > 1 else UNITS[row['unit']]}"
        images, efficiency = f"{row['images_per_second']:,.0f}", f"{row['efficiency']:.2f}"
        rows.append([row["scaling"], by, row["parallel"], str(row["batch"]), images, efficiency])
    tables = [align(rows)] if len(rows) > 1 else []
    if figures := measured.get("checkpoints"):
        heads = ["step ms", "MB", "save() ms", "overhead", "of processor", "target"]
        values = [f"{figures[k]:.1f}" for k in ("step_ms", "megabytes", "blocking_ms")]
        values += [f"{100 * figures[k]:.2f}%" for k in ("overhead", "processor_overhead", "target")]
        tables.append(align([heads, values]))
    if figures := measured.get("restart"):
        rows = [["program", "compiling s", "loading s"]]
        rows += [[r["program"], f"{r['compiled']:.1f}", f"{r['loaded']:.1f}"] for r in figures]
        tables.append(align(rows))
    return "\n\n".join(tables)


PARTS = ("scaling", "checkpoints", "restart")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=f"{_CONFIGS}/sire.py:cnn_base")
    parser.add_argument("--override", action="append", help="key=value, of the config")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.override = options.override or ["backbone.width=0.25"]
    if options.worker:
        step(options.config, options.steps, options.override)
        return
    measured: dict[str, Any] = {
        "config": Path(options.config).name,
        "overrides": options.override,
        "jax": jax.__version__,
        "platform": f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores",
    }
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        cache = str(directory / "compiled")
        if "scaling" in options.parts:
            measured["scaling"] = scaling(options, cache)
        if "checkpoints" in options.parts:
            measured["checkpoints"] = checkpoints(options, directory, cache)
        if "restart" in options.parts:
            measured["restart"] = restart(options, directory)
    print("\n" + report(measured))
    options.out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
