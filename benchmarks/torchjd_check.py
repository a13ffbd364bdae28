"""Compares the gradient aggregators with torchjd's, on random matrices of gradients.

``python benchmarks/torchjd_check.py`` needs ``pip install torch clarabel 'torchjd[full]==0.18.*'``.
A matrix has 2 to 8 gradients of ``--dimensions`` values: normal numbers times a norm factor from
10^-0.5 to 10^0.5. Ours in float32 from the Gramian, torchjd's in float64 from the matrix, with its
default settings and with tight tolerances where it has some; its scale is converted to ours. A
difference is that of the aggregated gradients, as a part of the norm of torchjd's; the ratio is of
their norms, ours to torchjd's. Times are of five gradients (PCGrad: two), the fastest call, the
median over matrices. Prints a table and writes JSON.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

from sire_jax.text import align
from sire_jax.updates import AGGREGATORS

Theirs = Callable[[torch.Tensor], torch.Tensor]
RADIUS = 0.5
COUNTS = range(2, 9)


def nash(matrix: torch.Tensor) -> torch.Tensor:
    """Returns torchjd's solution: anew, as it starts from its last one, not cut to a norm of 1."""
    return aggregation.NashMTL(len(matrix), max_norm=0.0)(matrix)


def solved(aggregated: torch.Tensor, count: int) -> torch.Tensor:
    """Returns what is a bargaining solution, whose squared norm is K, and NaN for what is not."""
    is_one = abs(float(aggregated @ aggregated) / count - 1) < 1e-2
    return aggregated if is_one else torch.full_like(aggregated, math.nan)


def theirs() -> dict[str, tuple[str, list[int], Theirs]]:
    """Returns what is compared: our name, the numbers of gradients and torchjd in our scale."""
    several = list(COUNTS)
    tight = QuadprogProjector(reg_eps=1e-12)
    return {
        "Sum": ("sum", several, aggregation.Sum()),
        # With two gradients there is one order; with more torchjd's can't be given.
        "PCGrad": ("pcgrad", [2], aggregation.PCGrad()),
        "MGDA": ("mgda", several, aggregation.MGDA()),
        "MGDA, 10,000 turns": (
            "mgda",
            several,
            aggregation.MGDA(epsilon=1e-12, max_iters=10_000),
        ),
        # Around the mean; K times that is around the sum.
        "CAGrad": ("cagrad", several, lambda m: len(m) * aggregation.CAGrad(c=RADIUS)(m)),
        "UPGrad": ("upgrad", several, lambda m: len(m) * aggregation.UPGrad()(m)),
        "UPGrad, reg_eps 1e-12": (
            "upgrad",
            several,
            lambda m: len(m) * aggregation.UPGrad(projector=tight)(m),
        ),
        "IMTLG": ("imtl_g", several, aggregation.IMTLG()),
        "NashMTL": ("nash_mtl", several, nash),
        "NashMTL, where it solves": ("nash_mtl", several, lambda m: solved(nash(m), len(m))),
        "AlignedMTL": ("aligned_mtl", several, lambda m: len(m) * aggregation.AlignedMTL()(m)),
    }


def matrices(number: int, counts: list[int], dimensions: int) -> list[np.ndarray]:
    """Draws matrices of gradients whose numbers take turns."""
    drawn = []
    for seed in range(number):
        random, count = np.random.default_rng(seed), counts[seed % len(counts)]
        norms = 10 ** random.uniform(-0.5, 0.5, size=(count, 1))
        drawn.append((random.normal(size=(count, dimensions)) * norms).astype(np.float32))
    return drawn


def ours(name: str) -> Callable[[np.ndarray], jax.Array]:
    """Returns our compiled aggregator, which maps a matrix to coefficients."""
    settings = {"radius": RADIUS} if name == "cagrad" else {}
    aggregator, key = AGGREGATORS[name](**settings), jax.random.key(0)
    return jax.jit(lambda matrix: aggregator(matrix @ matrix.T, key))


def compare(name: str, drawn: list[np.ndarray], reference: Theirs) -> np.ndarray:
    """Returns for each matrix the relative difference and the ratio of the norms, ``[n, 2]``."""
    aggregate = ours(name)
    compared = []
    for matrix in drawn:
        exact = matrix.astype(np.float64)
        expected = reference(torch.from_numpy(exact)).numpy()
        aggregated = np.asarray(aggregate(jnp.asarray(matrix)), np.float64) @ exact
        norms = [np.linalg.norm(vector) for vector in (aggregated - expected, aggregated)]
        compared.append(np.asarray(norms) / np.linalg.norm(expected))
    return np.stack(compared)


def fastest(run: Callable[[], object], rounds: int = 20) -> float:
    """Returns the fewest microseconds of a call; the first, which may compile, does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    return min(times)


def times(name: str, drawn: list[np.ndarray], reference: Theirs) -> tuple[float, float]:
    """Returns the median microseconds of a call, ours and torchjd's, both in float32."""
    aggregate = ours(name)
    our_times, their_times = [], []
    for matrix in drawn:
        array, tensor = jnp.asarray(matrix), torch.from_numpy(matrix)
        our_times.append(fastest(lambda array=array: aggregate(array).block_until_ready()))
        their_times.append(fastest(lambda tensor=tensor: reference(tensor), rounds=3))
    return float(np.median(our_times)), float(np.median(their_times))


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrices", type=int, default=100)
    parser.add_argument("--dimensions", type=int, default=16)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for title, (name, counts, reference) in theirs().items():
        drawn = matrices(options.matrices, counts, options.dimensions)
        compared = compare(name, drawn, reference)
        compared = compared[~np.isnan(compared).any(1)]
        timed = [m for m in drawn if len(m) == (2 if counts == [2] else 5)][:8]
        our_time, their_time = times(name, timed, reference)
        figures[title] = {
            "matrices": len(compared),
            "largest": float(compared[:, 0].max()),
            "median": float(np.median(compared[:, 0])),
            "ratios": [float(compared[:, 1].min()), float(compared[:, 1].max())],
            "ours_us": our_time,
            "torchjd_us": their_time,
        }
    report(figures, options)


def report(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the table and writes the JSON."""
    rows = [["torchjd", "matrices", "largest difference", "median", "ratio", "us, ours", "torchjd"]]
    for title, figure in figures.items():
        sizes = [f"{figure[key]:.0e}" for key in ("largest", "median")]
        ratio = "{:.4f} to {:.4f}".format(*figure["ratios"])
        spent = [f"{figure[key]:.0f}" for key in ("ours_us", "torchjd_us")]
        rows.append([title, str(figure["matrices"]), *sizes, ratio, *spent])
    print(align(rows))
    packages = ("jax", "numpy", "torch", "torchjd", "quadprog", "qpsolvers", "cvxpy", "clarabel")
    versions = {name: version(name) for name in (*packages, "ecos")}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    if options.json:
        settings = {"dimensions": options.dimensions, "machine": platform.machine()}
        written = {"versions": versions, **settings, "aggregators": figures}
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
