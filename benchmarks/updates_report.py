"""The tables of ``benchmarks/updates.py``, from its figures."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import flax
import jax
import numpy as np
import optax

from sire_jax.reproduce import machine
from sire_jax.text import align

EFFECTIVE_MOST, AGGREGATOR_MOST = 1.05, 1.10
# Which of our candidates does what one of PyTorch's does.
OURS = {
    "joint": "joint",
    "compiled": "joint",
    "separate": "multiway",
    "separate_compiled": "multiway",
}
AGGREGATED = "joint + upgrad"


def ratios(measured: Mapping[str, Any], name: str, other: str) -> list[float]:
    """Returns how many times the other's time a contender takes, by round."""
    pair = measured["seconds"][name], measured["seconds"][other]
    return [a / b for a, b in zip(*pair, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Writes a median with quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def memory(measured: Mapping[str, Any], name: str) -> float:
    """Returns the MiB of intermediate arrays and results; not a number if it is not known."""
    facts = measured["facts"][name]
    sizes = facts["temporary_bytes"], facts["result_bytes"]
    return math.nan if None in sizes else sum(sizes) / 2**20


def our_table(measured: Mapping[str, Any]) -> str:
    """Writes a row for each of our candidates."""
    header = ["", "ms/step", "/ joint (quartiles)", "required", "memory MiB", "/ joint"]
    rows = [[*header, "trace s", "compile s"]]
    for name, facts in measured["facts"].items():
        rule, _, aggregator = name.partition(" + ")
        size = memory(measured, name)
        rows.append(
            [
                name,
                f"{1e3 * median(measured['seconds'][name]):.1f}",
                spread(ratios(measured, name, "joint")),
                f"{measured['required']['multiway' if aggregator else rule]:.2f}",
                f"{size:.0f}",
                f"{size / memory(measured, 'joint'):.2f}",
                f"{facts['trace_seconds']:.1f}",
                f"{facts['compile_seconds']:.1f}",
            ]
        )
    return align(rows)


def targets(measured: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lists candidates, what they are relative to, and what should hold."""
    listed = []
    for name in measured["facts"]:
        if name == "effective_joint":
            listed.append((name, "joint", f"at most {EFFECTIVE_MOST:.2f}"))
        elif name == "multiway":
            listed.append((name, "joint", f"about {measured['required'][name]:.2f}"))
        elif " + " in name and "multiway" in measured["facts"]:
            listed.append((name, "multiway", f"at most {AGGREGATOR_MOST:.2f}"))
    return listed


def target_table(measured: Mapping[str, Any]) -> str:
    """Writes what should hold beside what was measured."""
    rows = [["", "measured (quartiles)", "target"]]
    for name, other, target in targets(measured):
        rows.append([f"{name} / {other}", spread(ratios(measured, name, other)), target])
    return align(rows)


def peer_table(measured: Mapping[str, Any]) -> str:
    """Writes a row for each of PyTorch's candidates; ratios are to its own joint step."""
    rows = [["", "ms/step", "/ PyTorch joint (quartiles)", "ours", "ours / PyTorch's"]]
    for candidate in measured["peer"]["ready"]:
        name, ours = f"PyTorch {candidate}", OURS.get(candidate, AGGREGATED)
        has_joint = "PyTorch joint" in measured["seconds"]
        is_measured = ours in measured["seconds"]
        rows.append(
            [
                name,
                f"{1e3 * median(measured['seconds'][name]):.1f}",
                spread(ratios(measured, name, "PyTorch joint")) if has_joint else "",
                ours if is_measured else "",
                spread(ratios(measured, ours, name)) if is_measured else "",
            ]
        )
    return align(rows)


def report(variant: str, measured: Mapping[str, Any]) -> str:
    """Writes the tables of a network."""
    parts = [f"AuxNet-{variant}", our_table(measured), target_table(measured)]
    if apart := measured["first_step_off_multiway"]:
        distances = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        parts.append(f"First step, distance to that of multiway, relative: {distances}.")
    if measured["peer"]:
        parts.append(peer_table(measured))
        parts += [f"PyTorch {n}: not run: {why}" for n, why in measured["peer"]["errors"].items()]
    return "\n\n".join(parts)


def figures(measured: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns what is written as JSON."""
    libraries = (jax, flax, optax, np)
    return {
        **machine(),
        "cores": os.cpu_count(),
        "libraries": {library.__name__: library.__version__ for library in libraries},
        "options": {
            k: str(v) for k, v in vars(options).items() if k not in ("json", "peer_python")
        },
        "networks": measured,
    }
