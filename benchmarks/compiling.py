"""How long deep trunks take to compile, with and without loops: ``python benchmarks/compiling.py``.

A trunk whose features nobody asks for is compiled with one loop for each run of equal blocks; one
whose features are all asked for, block by block. For either, each in a process of its own and with
no programs of a former start: seconds until there is the program that makes the parameters, and
until there is that of a training step (the gradient of the cross entropy of a batch), and the
memory that this would take. Nothing is run, so it may be more than the machine has. Prints a table
and writes JSON.
"""

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sire_jax.backbones import plan
from sire_jax.backbones.plan import Planned
from sire_jax.backbones.preactivation import preactivation_resnet
from sire_jax.reproduce import machine
from sire_jax.text import align

# Depths of AuxNet's trunks, the last with bottlenecks.
DEPTHS = (56, 110, 1001)
BOTTLENECKS = (1001,)
CLASSES = 10
WAYS = {"loops": (), "block by block": None}


def trunk(depth: int, way: str) -> Planned:
    """Returns a ResNet, in loops or block by block."""
    network = preactivation_resnet(CLASSES, depth, bottleneck=depth in BOTTLENECKS)
    return network.clone(endpoints=WAYS[way])


def compile_trunk(depth: int, way: str, batch: int) -> dict[str, float]:
    """Compiles what makes a trunk's parameters, and a step.

    Args:
        depth: Of the ResNet.
        way: ``"loops"`` or ``"block by block"``.
        batch: Images of a step.

    Returns:
        Seconds of either, from tracing to the program; and the bytes that the step plans, its
        arguments included.
    """
    # Of any number of blocks, in this process.
    plan.LONG = 2
    module = trunk(depth, way)
    image = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    label = jax.ShapeDtypeStruct((batch,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def make(key: Array, image: Array) -> Any:
        return module.init(key, image)

    def loss(params: Any, state: Any, image: Array, label: Array) -> tuple[Array, Any]:
        (logits, _), changed = module.apply(
            {"params": params, **state}, image, train=True, mutable=list(state)
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return losses.mean(), changed

    began = time.perf_counter()
    jax.jit(make).lower(key, image).compile()
    compiled = time.perf_counter()
    variables = jax.eval_shape(make, key, image)
    params = variables["params"]
    state = {kind: value for kind, value in variables.items() if kind != "params"}
    ready = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    memory = step.lower(params, state, image, label).compile().memory_analysis()
    return {
        "make": compiled - began,
        "step": time.perf_counter() - ready,
        "bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    }


def _serve(connection: Connection, depth: int, way: str, batch: int) -> None:
    connection.send(compile_trunk(depth, way, batch))


def measure(depth: int, way: str, batch: int, limit: float) -> dict[str, float]:
    """Compiles a trunk in a new process.

    Returns:
        What ``compile_trunk`` does; ``{"over": limit}`` if it takes longer than that, in seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_serve, args=(sender, depth, way, batch))
    process.start()
    compiled = receiver.poll(limit)
    figures: dict[str, float] = receiver.recv() if compiled else {"over": limit}
    process.kill()
    process.join()
    return figures


def report(measured: dict[str, Any]) -> str:
    """Writes the table of what was measured."""
    rows = [["trunk", "compiled", "parameters, s", "step, s", f"GiB, batch of {measured['batch']}"]]
    for name, ways in measured["trunks"].items():
        for way, figures in ways.items():
            if "over" in figures:
                rows.append([name, way, f"both together over {figures['over']:.0f}", "", ""])
                continue
            row = [name, way, f"{figures['make']:.1f}", f"{figures['step']:.1f}"]
            rows.append([*row, f"{figures['bytes'] / 2**30:.1f}"])
    return align(rows)


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=tuple(WAYS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=float, default=150, help="seconds for one trunk")
    parser.add_argument("--json", type=Path, default=Path("docs/results/benchmark_compiling.json"))
    options = parser.parse_args()
    trunks: dict[str, dict[str, Any]] = {}
    for depth in options.depths:
        for way in options.ways:
            name = f"ResNet-{depth}"
            trunks.setdefault(name, {})[way] = measure(depth, way, options.batch, options.limit)
            print(name, way, trunks[name][way], flush=True)
            measured = {"machine": machine(), "batch": options.batch, "trunks": trunks}
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(report(measured))


if __name__ == "__main__":
    main()
