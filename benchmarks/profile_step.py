"""Where the time of a training step goes: ``python benchmarks/profile_step.py``.

For each ``--networks``, a config with its variant, ``--steps`` steps on random images in the
compiled loop of ``sire_jax.train``, under JAX's profiler. Every operation of the compiled program
is one of a kind: the three passes of convolutions, where they are oneDNN's (XLA's are all
"forward"); matrix products, as which gradients to large kernels of few images are computed, too;
fusions that sum, such as batch norm's statistics; other fusions, element by element; the rest, such
as copies. Operations that run at the same time count each, and one that several threads share
counts once, so that all of them are not what the step lasts. Prints a table and writes JSON.
"""

import argparse
import json
import math
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import devices
import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.data.dataset import Source
from sire_jax.layers.onednn.library import TARGET
from sire_jax.metrics import Average
from sire_jax.reproduce import machine
from sire_jax.runs import parallel
from sire_jax.text import align

NETWORKS = (
    "sire.py:cnn_base",
    "sire.py:cnn",
    "auxnet.py:56-5,joint",
    "auxnet.py:56-5,multiway",
    "ssal.py:resnet18",
)
PASSES = ("convolutions, forward", "convolutions, to images", "convolutions, to kernels")
KINDS = (*PASSES, "matrix products", "fusions that sum", "other fusions", "the rest")
FUSED = {" dot(": "matrix products", " reduce(": "fusions that sum"}
# Small: on random images there is nothing to learn, and losses should stay finite.
LEARNING_RATE = 1e-3


def kinds(program: str) -> dict[str, str]:
    """Returns the kind of each operation of a compiled program, by its name.

    Args:
        program: Its text.
    """
    bodies = {
        body.split(" ", 1)[0]: body for body in re.split(r"\n(?=(?:ENTRY )?%\S+ \()", program)
    }
    found = {}
    for name, operation, rest in re.findall(
        r"^\s+(?:ROOT )?%(\S+) = .*? ([a-z][\w-]*)\((.*)$", program, re.MULTILINE
    ):
        called = re.search(r"calls=(%\S+?),", rest + ",")
        if TARGET in rest:
            found[name] = PASSES[int(re.search(r"pass = (\d)", rest).group(1))]
        elif operation == "convolution":
            found[name] = PASSES[0]
        elif operation == "dot":
            found[name] = "matrix products"
        elif operation == "fusion" and called:
            body = bodies[called.group(1)]
            contained = [kind for word, kind in FUSED.items() if word in body]
            found[name] = (*contained, "other fusions")[0]
        elif operation not in ("while", "conditional", "call"):
            found[name] = "the rest"
    return found


def prepare(path: str, batch_size: int, steps: int, dtype: str) -> tuple[Any, Any]:
    """Returns the compiled loop over steps, and its arguments."""
    rate = f"--config.optimizer.learning_rate={LEARNING_RATE}"
    config = configuration.load(f"{configuration.repository_configs()}/{path}", [rate])
    config.batch_size = batch_size
    if "dtype" in config.backbone:
        config.backbone.dtype = dtype
    parts = experiment.build(config)
    generator = np.random.default_rng(0)
    # An example is one image, or two.
    example = parts.batch["image"].shape[1:-3]
    count = steps * batch_size * math.prod(example)
    images = generator.integers(0, 256, (count, *config.data.shape), np.uint8)
    labels = {
        name: generator.integers(0, classes, count, np.int32)
        for name, classes in config.data.classes.items()
    }
    arrays = parts.task.prepare(Source(images, labels))
    order = np.arange(count, dtype=np.int32).reshape(steps, batch_size, *example)
    names = [f"{name}/loss" for name in (*parts.objectives, "total")]
    sums = {name: Average(total=jnp.zeros(()), count=jnp.zeros(())) for name in names}
    state = jax.jit(parts.initial_state)(jnp.int32(0))
    arguments = state, sums, *jax.device_put((arrays, order)), jnp.int32(0), jnp.int32(steps)
    loop = jax.jit(
        parallel.over_steps(parts.step(), parts.lookup),
        compiler_options=parts.rule.compiler_options,
    )
    return loop.lower(*arguments).compile(), arguments


def measure(path: str, options: argparse.Namespace) -> dict[str, float]:
    """Returns the milliseconds a step of each kind, and those that a step lasts (``"step"``)."""
    program, arguments = prepare(path, options.batch_size, options.steps, options.dtype)
    named = kinds(program.as_text())
    jax.block_until_ready(program(*arguments))
    started = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    lasted = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(program(*arguments))
        (trace,) = Path(directory).rglob("*.xplane.pb")
        planes = ProfileData.from_file(str(trace)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
    spent = Counter[str]()
    for event in events:
        if event.name in named:
            spent[named[event.name]] += event.duration_ns / 1e6 / options.steps
    return {kind: spent[kind] for kind in KINDS} | {"step": 1e3 * lasted / options.steps}


def total(spent: dict[str, float]) -> float:
    """Returns the milliseconds of all kinds."""
    return sum(spent[kind] for kind in KINDS)


def report(results: dict[str, dict[str, float]]) -> str:
    """Writes a column for each network: milliseconds, and their share of all operations."""
    rows = [["ms a step", *results]]
    for kind in KINDS:
        cells = [f"{each[kind]:.1f} ({each[kind] / total(each):.0%})" for each in results.values()]
        rows.append([kind, *cells])
    rows.append(["all operations", *(f"{total(each):.1f}" for each in results.values())])
    rows.append(["the step lasts", *(f"{each['step']:.1f}" for each in results.values())])
    return align(rows)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="CONFIG:VARIANT")
    devices.add_option(parser)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    devices.choose(options.device)
    results = {path: measure(path, options) for path in options.networks}
    print(report(results))
    if options.json:
        chosen = {"batch_size": options.batch_size, "dtype": options.dtype, "steps": options.steps}
        figures = {**machine(), "options": chosen, "results": results}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
