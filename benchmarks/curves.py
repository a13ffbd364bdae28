"""What a step costs by outputs, depth, width, seeds, devices: ``python benchmarks/curves.py``.

Networks are pre-activation ResNets with exits (``configs/auxnet.py``) on random images of CIFAR's
size, trained as ``sire_jax.train`` does, float32, one loop over steps in one program. Each curve
changes one thing:

* ``outputs``: a trunk of 44 layers with 1 to 20 outputs, evenly placed; ``joint`` and ``multiway``.
* ``depth``: 20 to 110 layers, two outputs; ``joint``.
* ``width``: 20 layers, two outputs, half to four times the paper's channels; ``joint``.
* ``seeds``: 1 to 32 runs of 20 layers at a quarter of the width in one program; a step of all.
* ``devices``: 1 to 8 devices that share a batch; on a CPU they are virtual, have the same cores,
  and can gain nothing; where several share a batch convolutions are XLA's.

PyTorch, eager and in ``channels_last``, has a process of its own and takes turns with ours at each
point: joint backpropagation beside ``joint``, a backward pass for each loss beside ``multiway``,
and the time of one run as often as there are runs beside ``seeds``. Milliseconds are medians over
``--rounds`` rounds of ``--steps`` steps, of which a first does not count. Prints a table, draws a
picture and writes JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import devices
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from updates import LEARNING_RATE, Peer

from sire_jax import configuration, traced
from sire_jax.configuration import experiment
from sire_jax.metrics import Average
from sire_jax.reproduce import machine
from sire_jax.runs import parallel
from sire_jax.step import make_step
from sire_jax.text import align

CURVES: dict[str, tuple[float, ...]] = {
    "outputs": (1, 2, 5, 10, 20),
    "depth": (20, 32, 44, 56, 110),
    "width": (0.5, 1, 2, 4),
    "seeds": (1, 2, 4, 8, 16, 32),
    "devices": (1, 2, 4, 8),
}
# Ours, and what PyTorch does beside it.
RULES = {
    "outputs": {"joint": "joint", "multiway": "separate"},
    **{curve: {"joint": "joint"} for curve in ("depth", "width", "seeds", "devices")},
}
TRUNK = "resnet-20"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def network(curve: str, x: float) -> dict[str, Any]:
    """Returns depth, width and exits of the network at a point of a curve."""
    depth, width, outputs = 20, 1.0, 2
    if curve == "outputs":
        depth, outputs = 44, int(x)
    elif curve == "depth":
        depth = int(x)
    elif curve == "width":
        width = x
    elif curve == "seeds":
        width = 0.25
    blocks = (depth - 2) // 2
    exits = np.linspace(0, blocks, outputs + 1)[1:-1].round().astype(int)
    return {"depth": depth, "width": width, "layers": [2 * int(block) + 1 for block in exits]}


def config_of(settings: dict[str, Any], rule: str, batch_size: int) -> Any:
    """Loads the config of a network."""
    path = f"{configuration.repository_configs()}/auxnet.py:20-2"
    chosen = {
        "backbone.depth": settings["depth"],
        "backbone.width": settings["width"],
        "heads.exit.layers": tuple(settings["layers"]),
        "update_rule.name": rule,
        "batch_size": batch_size,
        "optimizer.learning_rate": LEARNING_RATE,
    }
    return configuration.load(path, [f"--config.{key}={value}" for key, value in chosen.items()])


class Ours:
    """A compiled loop over steps, without augmentation, as PyTorch's are.

    Args:
        settings: The network.
        rule: The update rule.
        seeds: Runs.
        options: The options.
    """

    def __init__(
        self, settings: dict[str, Any], rule: str, seeds: int, options: argparse.Namespace
    ):
        config = config_of(settings, rule, options.batch_size)
        config.devices = jax.device_count()
        parts = experiment.build(config)
        mesh = parallel.device_mesh(config.devices, "batch", options.batch_size, seeds)
        self.facts = {
            "classes": config.backbone.classes,
            "parameters": traced.size(parts.variables["params"]),
        }
        step = make_step(parts.network.apply, parts.objectives, parts.rule)
        generator, count = np.random.default_rng(0), options.batch_size * options.steps
        arrays = {"image": generator.integers(0, 256, (count, *config.data.shape), np.uint8)}
        for name, classes in config.data.classes.items():
            arrays[name] = generator.integers(0, classes, count, np.int32)
        order = np.arange(count, dtype=np.int32).reshape(1, options.steps, -1).repeat(seeds, 0)

        def lookup(arrays: Any, rows: jax.Array) -> Any:
            return parallel.split_batch(parts.lookup(arrays, rows), mesh)

        loop = parallel.over_seeds(
            parallel.over_steps(step, lookup), (2, 4, 5), config.seeds_at_once
        )
        started = jax.jit(parallel.over_seeds(parts.initial_state, (), config.seeds_at_once))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._state = jax.device_put(started(jnp.arange(seeds)), everywhere)
        names = [f"{name}/loss" for name in (*parts.objectives, "total")]
        self._sums = {n: Average(total=jnp.zeros(seeds), count=jnp.zeros(seeds)) for n in names}
        self._data = jax.device_put((arrays, order), everywhere)
        self._steps = options.steps
        options_of_rule = parts.rule.compiler_options
        self._program = jax.jit(loop, donate_argnums=0, compiler_options=options_of_rule)
        self.round()

    def round(self) -> float:
        """Takes steps; returns the seconds of one."""
        began = time.perf_counter()
        span = jnp.int32(0), jnp.int32(self._steps)
        self._state, _, broken = self._program(self._state, self._sums, *self._data, *span)
        jax.block_until_ready(broken)
        return (time.perf_counter() - began) / self._steps


def peer(settings: dict[str, Any], ours: Ours, candidate: str, options: argparse.Namespace) -> Peer:
    """Starts PyTorch's process.

    Raises:
        ValueError: If its network is another one.
    """
    weights = [0.3] * len(settings["layers"]) + [1.0]
    started = Peer(
        {
            **settings,
            "classes": ours.facts["classes"],
            "weights": weights,
            "learning_rate": LEARNING_RATE,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "batch_size": options.batch_size,
            "steps": options.steps,
            "candidates": [candidate],
            "device": options.device,
            "trunk": TRUNK,
        },
        sys.executable,
    )
    if started.facts["parameters"] != ours.facts["parameters"]:
        raise ValueError(f"PyTorch has {started.facts['parameters']}, ours {ours.facts}.")
    return started


def point(curve: str, x: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the milliseconds of a step of each contender in each round, at a point."""
    settings, seeds = network(curve, x), int(x) if curve == "seeds" else 1
    measured = {}
    for rule, candidate in RULES[curve].items():
        ours = Ours(settings, rule, seeds, options)
        # Sharing a batch is not what its users would do on one machine's cores.
        beside = peer(settings, ours, candidate, options) if curve != "devices" else None
        own, others = measured.setdefault(rule, []), measured.setdefault(f"PyTorch {candidate}", [])
        if beside:
            beside.round(candidate)
        for _ in range(options.rounds):
            own.append(1e3 * ours.round())
            if beside:
                others.append(1e3 * seeds * beside.round(candidate))
        if beside:
            beside.close()
        jax.clear_caches()
    return {name: times for name, times in measured.items() if times}


def on_devices(count: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns ``point`` of a process with so many devices, virtual ones on a CPU."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(count)}
    if count > 1:
        # More threads than cores: devices wait for each other.
        environment["NPROC"] = "16"
    command = [sys.executable, __file__, f"--worker={count}", f"--batch-size={options.batch_size}"]
    command += [f"--rounds={options.rounds}", f"--steps={options.steps}"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(curve: str, points: dict[str, dict[str, list[float]]]) -> str:
    """Writes a curve: medians over the rounds."""
    contenders = list(next(iter(points.values())))
    rows = [[curve, *(f"{name}, ms" for name in contenders)]]
    for x, measured in points.items():
        rows.append([x, *(f"{median(times):.1f}" for times in measured.values())])
    return align(rows)


def draw(results: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Draws a panel for each curve: milliseconds of a step, both axes logarithmic."""
    figure = Figure(figsize=(3.4 * len(results), 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (curve, points) in zip(panels, results.items(), strict=True):
        for name, colour in zip(next(iter(points.values())), COLOURS, strict=False):
            xs, ys = [float(x) for x in points], [median(each[name]) for each in points.values()]
            style = "--" if name.startswith("PyTorch") else "-"
            axes.plot(xs, ys, style, marker="o", markersize=3, color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = [float(x) for x in points]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(curve)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("milliseconds a step")
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--points", type=int, help="only so many of each, from the first")
    devices.add_option(parser)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--picture", type=Path, help="where to draw them")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    if options.worker:
        print(json.dumps(point("devices", options.worker, options)))
        return
    options.device = devices.choose(options.device).platform
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for curve in options.curves:
        results[curve] = {}
        for x in CURVES[curve][: options.points]:
            print(f"{curve} {x:g} …", file=sys.stderr, flush=True)
            virtual = curve == "devices" and jax.default_backend() == "cpu"
            measured = on_devices(int(x), options) if virtual else point(curve, x, options)
            results[curve][f"{x:g}"] = measured
        print(table(curve, results[curve]) + "\n", flush=True)
    if options.json:
        chosen = {"batch_size": options.batch_size, "steps": options.steps}
        figures = {**machine(), "torch": version("torch"), "options": chosen, "curves": results}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
