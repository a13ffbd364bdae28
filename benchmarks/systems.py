"""Times steps of all four systems beside PyTorch, on a GPU or a CPU.

``python benchmarks/systems.py`` needs ``pip install -e '.[benchmark]'``, and on a GPU JAX and
PyTorch for it; no data set. Networks are shipped configs (``systems_programs.py``), on random
images. Four parts (``--parts``):

* ``steps``: ours and the same networks in PyTorch (``systems_torch.py``), float32 and bfloat16
  (``torch.autocast``). PyTorch is compiled (``torch.compile``), in ``channels_last`` and with fused
  optimizers; ``graphs`` replays CUDA's graphs, too (``mode="reduce-overhead"``). Products of
  float32 are in TF32 on a GPU, in both. Every step takes one batch that stays on the device,
  without augmentation. Parameters and multiply-adds of both have to be the same, or nothing runs.
  The network of pairs has float32 alone.
* ``rules``: AuxNet's rules, and the aggregators UPGrad and MGDA, beside joint backpropagation.
  "Required" are multiply-adds relative to it, as ``benchmarks/updates.py`` counts them.
* ``seeds``: so many runs in one program, vectorized; what a further one costs relative to one that
  is alone, from one row to the next: of the row of 10, behind that of 9, what the tenth does. How
  many fit is read from a line through the memory that XLA plans for the two largest numbers, and
  what JAX may take of the device: three quarters of a GPU, unless
  ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says otherwise. ``--try-largest`` runs that many.
* ``feed``: the steps of ``sire_jax.train``, whose batches are looked up among 50,000 images on the
  device, without and with augmentation, beside those that take one batch. "Shuffling" is that of an
  epoch, over its steps, as a share of one.

Each contender has a process of its own. Those of a network take turns: a round is ``--steps`` steps
of each, the others idle; of ``seeds`` each has the device for itself. Neither compilation nor the
first steps count. Times are medians over ``--rounds`` rounds, ratios the median and the range of
the ratios within a round. A step takes three times the multiply-adds of a forward pass, two
operations each; their peaks are those of dense products (``devices.py``). Peak memory is what the
library's allocator counts: see ``benchmarks/sire.py``.

``--small`` has narrow networks, small batches and few rounds: a try on a CPU, whose times mean
nothing. Prints tables and writes JSON.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import devices
import jax
import systems_programs
import systems_report
import torch
from systems_programs import AUGMENTED, LOOKED_UP, NETWORKS, STILL, Contender, has_dtype
from updates import multiply_adds as required
from workers import OURS, Worker, contest, machine, work

from sire_jax.inspect import inspect
from sire_jax.layers import onednn

DTYPES = ("float32", "bfloat16")
RULES = (
    *(("joint", "sum"), ("joint", "upgrad"), ("joint", "mgda"), ("effective_joint", "sum")),
    *(("multiway", "sum"), ("multiway", "upgrad"), ("pairwise", "sum")),
)
ENGINES = "default: ours and compiled, on a GPU graphs, too"
SEEDS = (1, 2, 4, 9, 10, 16, 32)
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


def prepare(contender: Contender) -> Any:
    """Prepares a contender, in its process."""
    if contender.engine in OURS:
        return systems_programs.prepare(contender)
    # Ours is measured without it.
    import systems_torch

    return systems_torch.prepare(contender)


class Measured:
    """What has been measured, printed and written as it comes.

    Args:
        options: The options.
        kind: What JAX calls the device.

    Attributes:
        written: What is written as JSON.
    """

    def __init__(self, options: argparse.Namespace, kind: str):
        self._options = options
        base = [Contender(network, small=options.small) for network in options.networks]
        self._counts = {each.network: counts(each) for each in base}
        chosen = {
            key: value for key, value in vars(options).items() if key not in ("worker", "json")
        }
        self.written: dict[str, Any] = {
            "machine": machine(),
            "device": kind,
            "versions": {library: version(library) for library in LIBRARIES}
            | {"oneDNN": onednn.version() or "none", "CUDA of PyTorch": torch.version.cuda},
            "command": shlex.join(["python", "benchmarks/systems.py", *sys.argv[1:]]),
            "options": {key: str(value) for key, value in chosen.items()},
            "peak": dict(zip(DTYPES, options.peak or (None, None), strict=True)),
            "memory": int(2**30 * options.memory) if options.memory else None,
            "multiply_adds": {name: each["multiply_adds"] for name, each in self._counts.items()},
            "required": required(systems_programs.variant("auxnet", options.small).split(",")[0]),
            "parts": {},
        }

    def run(self, part: str, contenders: Sequence[Contender], rounds: int = 0) -> list[Any]:
        """Has contenders take turns; returns the records of the part so far."""
        records = self.written["parts"].setdefault(part, [])
        before = list(records)

        def note(workers: list[Worker]) -> None:
            records[:] = [*before, *(worker.record() for worker in workers)]
            if self._options.json:
                self._options.json.write_text(json.dumps(self.written, indent=1) + "\n")

        number = rounds or self._options.rounds
        note(contest(contenders, number, __file__, self._check, note))
        return records

    def _check(self, worker: Worker) -> None:
        """Checks that a contender trains the network that it should."""
        for key in ("parameters", "multiply_adds"):
            expected = self._counts[worker.contender.network][key]
            if not worker.error and worker.ready.get(key, expected) != expected:
                raise ValueError(
                    f"The network '{worker.contender.network}' has {worker.ready[key]:,} {key} in"
                    f" {systems_report.TITLES[worker.contender.engine]}; it should have"
                    f" {expected:,}."
                )


def counts(contender: Contender) -> dict[str, Any]:
    """Counts the parameters of a network, and the multiply-adds of one example's forward pass."""
    return inspect(systems_programs.load_config(contender))


# ---- The parts.


def steps(base: Sequence[Contender], options: argparse.Namespace, measured: Measured) -> None:
    """Times each network beside PyTorch's."""
    for network in base:
        dtypes = [d for d in options.dtypes if d == "float32" or has_dtype(network.network)]
        contenders = [
            replace(network, engine=engine, dtype=dtype)
            for dtype in dtypes
            for engine in options.engines
        ]
        measured.run("steps", contenders)


def rules(base: Sequence[Contender], options: argparse.Namespace, measured: Measured) -> None:
    """Times AuxNet's rules and aggregators."""
    for network in base:
        if network.network == "auxnet":
            chosen = [replace(network, rule=rule, aggregator=kind) for rule, kind in RULES]
            measured.run("rules", chosen)


def seeds(base: Sequence[Contender], options: argparse.Namespace, measured: Measured) -> None:
    """Times so many runs in one program, one number of them after another."""
    for network in base:
        for number in options.seeds:
            records = measured.run("seeds", [replace(network, seeds=number)])
        fit = systems_report.fit(records, network.network, measured.written["memory"])
        if options.try_largest and fit:
            measured.run("seeds", [replace(network, seeds=fit.runs)], rounds=1)


def feed(base: Sequence[Contender], options: argparse.Namespace, measured: Measured) -> None:
    """Times steps that are fed beside those that take one batch."""
    for network in base:
        augmented = systems_programs.load_config(network).augmentation
        feeds = (STILL, LOOKED_UP, AUGMENTED) if augmented else (STILL, LOOKED_UP)
        measured.run("feed", [replace(network, feed=each) for each in feeds])


PARTS: dict[str, Callable[[Sequence[Contender], argparse.Namespace, Measured], None]] = {
    "steps": steps,
    "rules": rules,
    "seeds": seeds,
    "feed": feed,
}


# ---- The program.


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value} should be at least 1")
        return value

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices.add_option(parser)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--engines", nargs="+", choices=systems_report.TITLES, help=ENGINES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seeds", nargs="+", type=positive, default=list(SEEDS))
    parser.add_argument("--try-largest", action="store_true", help="run as many as fit")
    parser.add_argument("--small", action="store_true", help="a try: narrow networks, few rounds")
    parser.add_argument("--batch-size", type=positive, help="default: the config's; 32 on a CPU")
    parser.add_argument("--rounds", type=positive, help="default: 7; of small ones 2")
    parser.add_argument("--steps", type=positive, help="of a round; default: 50 on a GPU, else 2")
    parser.add_argument(
        "--peak",
        nargs=2,
        type=float,
        metavar=("FLOAT32", "BFLOAT16"),
        help="of another card, in 10^12 FLOP/s",
    )
    parser.add_argument("--memory", type=float, help="GiB in which runs should fit")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def with_defaults(options: argparse.Namespace, device: str) -> argparse.Namespace:
    """Fills in what depends on the device, and on whether this is a try."""
    gpu, small = device == "cuda", options.small
    options.device = device
    options.engines = options.engines or ["ours", "compiled", *["graphs"] * gpu]
    options.batch_size = options.batch_size or (8 if small else 0 if gpu else 32)
    options.rounds = options.rounds or (2 if small else 7)
    options.steps = options.steps or (50 if gpu else 2)
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    if options.worker:
        work(Contender(**json.loads(options.worker)), prepare)
        return
    device = devices.choose(options.device)
    options = with_defaults(options, device.platform)
    # This process measures nothing: it leaves the GPU alone.
    jax.config.update("jax_platforms", "cpu")
    measured = Measured(options, device.kind)
    shared = {key: getattr(options, key) for key in ("device", "batch_size", "steps", "small")}
    base = [Contender(network, **shared) for network in options.networks]
    for part in options.parts:
        PARTS[part](base, options, measured)
        if part in measured.written["parts"]:
            print(f"\n{systems_report.PARTS[part](measured.written)}\n", flush=True)


if __name__ == "__main__":
    main()
