"""Times a training step of every update rule beside joint backpropagation, and PyTorch's ways.

``python benchmarks/updates.py`` (needs ``pip install -e '.[benchmark]'``; no data set). Networks
are variants of ``configs/auxnet.py``. Candidates are the rules; every aggregator under ``joint``
and ``multiway``; and ``one_hot``, multi-way backpropagation as products of one-hot vectors with the
Jacobian of the whole network. A step is forward and backward passes and SGD with Nesterov momentum
and weight decay, float32, without augmentation, on random images that are on the device, in the
compiled loop over steps of ``sire_jax.runs.parallel`` with donated state. The peer is the same
network in PyTorch (``updates_torch.py``) in a process of its own.

All candidates of a network are compiled and checked, then take turns: a round is ``--steps`` steps
of each, the others idle, in an order drawn anew. Ratios are within a round: their median and
quartiles over ``--rounds`` rounds. Memory is what XLA allots to intermediate arrays and results.

"Required" are the multiply-adds of the layers, relative to ``joint``: a forward pass F of the whole
network, and backward passes of twice the forward multiply-adds f_k of the part that output k
reaches. ``joint``: F + 2 F; ``multiway``: F + sum_k 2 f_k; ``pairwise``: sum_k 3 f_k; ``one_hot``:
F + sum_k (F + f_k), as the gradients to parameters that a loss does not reach are not used.

Prints tables and writes JSON.
"""

import argparse
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import updates_report
from jax import Array
from ml_collections import ConfigDict

from sire_jax import configuration, traced
from sire_jax.configuration import experiment
from sire_jax.inspect import inspect
from sire_jax.metrics import Average
from sire_jax.networks import MAIN
from sire_jax.runs import parallel
from sire_jax.state import TrainState
from sire_jax.step import make_step
from sire_jax.updates import AGGREGATORS, UPDATES, Losses, Updated, UpdateRule
from sire_jax.updates.reached import Reached
from sire_jax.updates.steps import Steps

PyTree = Any
RULES = (*UPDATES, "one_hot")
# Rules with aggregators; ``effective_joint`` is then ``joint``, ``pairwise`` a pass more.
AGGREGATED = ("joint", "multiway")
PEERS = ("joint", "separate", "mtl_backward", "backward")
PEER = Path(__file__).with_name("updates_torch.py")
# Parameters of ResNet-56 for ten classes (He et al., 2016, 0.85 million).
TRUNK, TRUNK_PARAMETERS = "resnet-56", 853_018
# Small: there is nothing to learn, and a first step shows what rules have in common to first order.
LEARNING_RATE = 1e-3
# By how much of its length one rule's first step may differ from another's.
CLOSE = 1e-2


def one_hot(
    optimizer: optax.GradientTransformation,
    reach: Mapping[str, PyTree],
    main: str = "main",
    adjust: bool = True,
) -> UpdateRule:
    """``multiway`` as it is written first: zeros go through all that a loss does not reach."""
    reached = Reached.of(reach, main)
    steps = Steps(optimizer, reached, adjust, scale_own=False, shared_state=False)

    def update(
        losses: Losses,
        weights: Mapping[str, Array],
        params: PyTree,
        model_state: PyTree,
        state: PyTree,
        key: Array,
    ) -> Updated:
        named, backward, (outputs, new_model_state) = jax.vjp(
            lambda p: losses(p, model_state), params, has_aux=True
        )
        divisors, gradients = steps.divisors(weights), {}
        for name in reached.names:
            hot = {other: jnp.float32(other == name) for other in named}
            gradients[name] = steps.weigh(name, backward(hot)[0], weights[name])
        for name in reached.names:
            params, state = steps.take(
                name, gradients[name], weights[name], divisors[name], params, state
            )
        return Updated(params, state, new_model_state, named, outputs)

    return UpdateRule(steps.init, update)


UPDATES["one_hot"] = one_hot


# ---- A candidate.


@dataclass(frozen=True)
class Candidate:
    """An update rule with an aggregator."""

    rule: str
    aggregator: str = "sum"

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.rule if self.aggregator == "sum" else f"{self.rule} + {self.aggregator}"


def load_config(variant: str, candidate: Candidate, batch_size: int) -> ConfigDict:
    """Loads the shipped config of a network, for a candidate."""
    config = configuration.load(f"{configuration.repository_configs()}/auxnet.py:{variant}")
    config.batch_size = batch_size
    config.optimizer.learning_rate.init_value = LEARNING_RATE
    config.update_rule.name = candidate.rule
    config.aggregator.name = candidate.aggregator
    return config


class Program:
    """A candidate's compiled loop over steps.

    Args:
        variant: The network.
        candidate: The candidate.
        variables: Where training starts.
        options: The options.

    Attributes:
        facts: What is known before the first round.
        moved: What the first step added to the parameters, as one vector.
    """

    def __init__(
        self, variant: str, candidate: Candidate, variables: PyTree, options: argparse.Namespace
    ):
        config = load_config(variant, candidate, options.batch_size)
        parts = experiment.build(config)
        self._names = [f"{name}/loss" for name in (*parts.objectives, "total")]
        self._steps, self._data = options.steps, random_data(config, options.steps)
        copied = jax.tree.map(jnp.copy, variables)
        self._state = TrainState.start(jax.random.key(1), copied, parts.rule)
        step = make_step(parts.network.apply, parts.objectives, parts.rule)
        loop = jax.jit(
            parallel.over_steps(step, parts.lookup),
            donate_argnums=(0, 1),
            compiler_options=parts.rule.compiler_options,
        )
        started = time.perf_counter()
        lowered = loop.lower(*self._arguments(1))
        traced_at = time.perf_counter()
        self._program = lowered.compile()
        plan = self._program.memory_analysis()
        self.facts = {
            "trace_seconds": traced_at - started,
            "compile_seconds": time.perf_counter() - traced_at,
            "temporary_bytes": plan.temp_size_in_bytes if plan else None,
            "result_bytes": plan.output_size_in_bytes if plan else None,
            "parameters": traced.size(variables["params"]),
        }
        self.take(1)
        self.moved = vector(self._state.params) - vector(variables["params"])

    def _arguments(self, count: int) -> tuple[Any, ...]:
        nothing = {k: Average(total=jnp.zeros(()), count=jnp.zeros(())) for k in self._names}
        return self._state, nothing, *self._data, jnp.int32(0), jnp.int32(count)

    def take(self, count: int) -> float:
        """Takes steps; returns their mean loss."""
        self._state, metrics, _ = self._program(*self._arguments(count))
        total = metrics["total/loss"]
        return float(total.total / total.count)

    def round(self) -> float:
        """Runs a round; returns the seconds of a step."""
        started = time.perf_counter()
        loss = self.take(self._steps)
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        return seconds / self._steps


def random_data(config: ConfigDict, steps: int) -> tuple[dict[str, Array], Array]:
    """Returns random images with labels, and their order ``[steps, b]``."""
    generator = np.random.default_rng(0)
    count = steps * config.batch_size
    images = generator.integers(0, 256, (count, *config.data.shape), np.uint8)
    kinds = config.data.classes.items()
    labels = {kind: generator.integers(0, n, count, np.int32) for kind, n in kinds}
    order = np.arange(count, dtype=np.int32).reshape(steps, -1)
    return jax.device_put({"image": images, **labels}), jax.device_put(order)


def vector(tree: PyTree) -> np.ndarray:
    """Puts arrays into one vector, float64."""
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


# ---- PyTorch's candidates.


class Peer:
    """PyTorch's process.

    Attributes:
        facts: What it said before the first round: parameters, versions, errors by candidate.
    """

    def __init__(self, settings: Mapping[str, Any], python: str):
        self._process = subprocess.Popen(
            [python, str(PEER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"PyTorch's process ended with status {self._process.wait()}.")
        return json.loads(line)

    def round(self, name: str) -> float:
        """Runs a round of a candidate; returns the seconds of a step."""
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def peer_settings(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Describes a network and the training for PyTorch."""
    config = load_config(variant, Candidate("multiway"), options.batch_size)
    parts = experiment.build(config)
    weights = {
        objective.output: float(objective.weight_at(0)) for objective in parts.objectives.values()
    }
    return {
        "depth": config.backbone.depth,
        "width": config.backbone.width,
        "classes": config.backbone.classes,
        "layers": list(config.heads.exit.layers),
        "weights": [weights[n] for n in parts.output_names() if n != MAIN] + [weights[MAIN]],
        "learning_rate": LEARNING_RATE,
        "momentum": config.optimizer.momentum,
        "weight_decay": config.optimizer.weight_decay,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "candidates": options.peers,
        "device": options.device,
        "trunk": TRUNK,
    }


# ---- The contest of one network.


def multiply_adds(variant: str) -> dict[str, float]:
    """Returns what the layers require, relative to ``joint``, by rule."""
    counts = inspect(load_config(variant, Candidate("joint"), 1))
    whole = counts["multiply_adds"]
    reached = [output["multiply_adds"] for output in counts["outputs"].values()]
    passes = {
        "joint": 3 * whole,
        "effective_joint": 3 * whole,
        "multiway": whole + 2 * sum(reached),
        "pairwise": 3 * sum(reached),
        "one_hot": whole + sum(whole + part for part in reached),
    }
    return {rule: count / passes["joint"] for rule, count in passes.items()}


def candidates(options: argparse.Namespace) -> list[Candidate]:
    """Lists our candidates; ``joint`` always takes part."""
    rules = list(dict.fromkeys(["joint", *options.rules]))
    pairs = [
        (rule, aggregator)
        for rule in AGGREGATED
        for aggregator in options.aggregators
        if rule in rules
    ]
    return [*map(Candidate, rules), *(Candidate(*pair) for pair in pairs)]


def check(programs: Mapping[str, Program], peer: Peer | None) -> dict[str, float]:
    """Checks that the candidates do what they should; returns how far first steps are apart.

    Raises:
        ValueError: If PyTorch's network has other parameters, or rules that are the same to first
            order take different steps.
    """
    ours = {"parameters": programs["joint"].facts["parameters"], TRUNK: TRUNK_PARAMETERS}
    for name, size in ours.items() if peer else ():
        if peer.facts[name] != size:
            raise ValueError(f"PyTorch's {name}: {peer.facts[name]}; it should be {size}.")
    if "multiway" not in programs:
        return {}
    step = programs["multiway"].moved
    same = [name for name in ("effective_joint", "one_hot", "pairwise") if name in programs]
    off = {name: np.linalg.norm(programs[name].moved - step) for name in same}
    apart = {name: float(length / np.linalg.norm(step)) for name, length in off.items()}
    for name in {"effective_joint", "one_hot"} & apart.keys():
        if not apart[name] <= CLOSE:
            raise ValueError(f"The first step of {name} is {apart[name]:.1e} off that of multiway.")
    return apart


def contest(rounds: int, contenders: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Runs the rounds; returns the seconds of a step of each contender in each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        for name in random.Random(i).sample(list(contenders), len(contenders)):
            seconds[name].append(contenders[name]())
    return seconds


def measure(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles, checks and times all candidates of a network."""
    config = load_config(variant, Candidate("joint"), options.batch_size)
    network, image = experiment.build(config).network, jnp.zeros((1, *config.data.shape))
    variables = jax.jit(network.init)(jax.random.key(0), image)
    say(f"{variant}: preparing PyTorch")
    peer = Peer(peer_settings(variant, options), options.peer_python) if options.peers else None
    try:
        programs = {}
        for candidate in candidates(options):
            say(f"{variant}: compiling {candidate.title}")
            programs[candidate.title] = Program(variant, candidate, variables, options)
        apart, load = check(programs, peer), os.getloadavg()
        contenders: dict[str, Callable[[], float]] = {n: p.round for n, p in programs.items()}
        for name in peer.facts["ready"] if peer else ():
            contenders[f"PyTorch {name}"] = partial(peer.round, name)
        seconds = contest(options.rounds, contenders)
    finally:
        if peer:
            peer.close()
    return {
        "load": load,
        "required": multiply_adds(variant),
        "first_step_off_multiway": apart,
        "facts": {name: program.facts for name, program in programs.items()},
        "peer": peer.facts if peer else None,
        "seconds": seconds,
    }


def say(text: str) -> None:
    """Tells how far the program is."""
    print(f"{text} …", file=sys.stderr, flush=True)


# ---- The program.


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    aggregators = [name for name in AGGREGATORS if name != "sum"]
    several: dict[str, Any] = {"nargs": "*", "metavar": "NAME"}
    parser.add_argument("--networks", nargs="+", default=["20-2", "56-5", "56-10"])
    parser.add_argument("--rules", choices=RULES, default=list(RULES), **several)
    parser.add_argument("--aggregators", choices=aggregators, default=aggregators, **several)
    peers = (*PEERS, "compiled", "separate_compiled")
    parser.add_argument("--peers", choices=peers, default=list(PEERS), **several)
    parser.add_argument("--peer-python", default=sys.executable, help="the one with torchjd")
    devices.add_option(parser)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    options.device = devices.choose(options.device).platform
    trunk = inspect(load_config(TRUNK, Candidate("joint"), 1))["parameters"]
    if trunk != TRUNK_PARAMETERS:
        raise ValueError(f"{TRUNK} has {trunk:,} parameters, not {TRUNK_PARAMETERS:,}.")
    measured = {}
    for variant in options.networks:
        measured[variant] = measure(variant, options)
        print("\n" + updates_report.report(variant, measured[variant]) + "\n", flush=True)
        jax.clear_caches()
        if options.json:
            figures = updates_report.figures(measured, options)
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
