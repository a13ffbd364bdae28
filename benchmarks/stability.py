"""Maps what trains of SIRe-CNN: ``python benchmarks/stability.py --data=DIR``.

Some steps of readings of what the paper leaves open (the table ``sire_readings``), at several
lambdas and widths. Takes an hour; what is recorded is not run again. Writes JSON and a picture, and
prints a table.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rehearsals import write

from sire_jax import paper_tables, reproduce
from sire_jax.tables import align

TABLE, STEPS, BATCH = "sire_readings", 60, 32
# Readings by the names of rows, and what they are.
READINGS = {
    "normalized_pytorch": "batch norm, PyTorch's initial values (as shipped)",
    "normalized": "batch norm",
    "linear_heavy_ball": "nothing, heavy ball",
    "linear": "nothing",
}
LAMBDAS = ("0.1", "0.2", "0.5", "1.0")
WIDTHS = (0.25, 0.5, 1.0)


def name(reading: str, weight: str, width: float) -> str:
    """Returns what a cell of the map is called."""
    return f"{reading}_{weight}/{width:g}"


def cell(row: dict[str, Any] | None) -> str:
    """Says what became of a row: classification's mean of the last five steps, or the end.

    Args:
        row: What its rehearsal has shown, if it was run.
    """
    if row is None:
        return ""
    if row["refused"]:
        return "too big"
    if row["diverged"] is not None:
        return f"NaN at {row['diverged']}"
    return f"{np.mean(row['losses']['main'][-5:]):.2f}"


def colour(said: str) -> str:
    """Returns the colour of a cell: red where a loss is not finite, white where there is none."""
    if not said or said == "too big":
        return "white"
    return "#E8A08C" if said.startswith("NaN") else "#BFD9BF"


def rows(recorded: dict[str, Any], width: float) -> list[list[str]]:
    """Returns the table of a width, with its header.

    Args:
        recorded: What rehearsals have shown, by ``name``.
        width: Of the network.
    """
    cells = [
        [called, *(cell(recorded.get(name(reading, weight, width))) for weight in LAMBDAS)]
        for reading, called in READINGS.items()
    ]
    return [["what ends a decoder", *(f"lambda {weight}" for weight in LAMBDAS)], *cells]


def draw(recorded: dict[str, Any], path: Path) -> None:
    """Draws the map, a panel for each width; red is where a loss is not finite.

    Args:
        recorded: What rehearsals have shown, by ``name``.
        path: The picture to write.
    """
    figure = Figure(figsize=(11.5, 2.9), layout="constrained")
    panels = figure.subplots(1, len(WIDTHS), sharey=True)
    for axes, width in zip(panels, WIDTHS, strict=True):
        shown = rows(recorded, width)[1:]
        for i, j in product(range(len(READINGS)), range(len(LAMBDAS))):
            said = shown[i][j + 1]
            corner = (j - 0.5, i - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour(said), edgecolor="white"))
            axes.text(j, i, said.replace(" at ", "\n"), ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(LAMBDAS) - 0.5)
        axes.set_ylim(len(READINGS) - 0.5, -0.5)
        axes.set_xticks(range(len(LAMBDAS)), LAMBDAS)
        axes.set_yticks(range(len(READINGS)), READINGS.values(), fontsize=8)
        axes.set_xlabel("lambda")
        axes.set_title(f"{width:g} of the width", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="directory of tensorflow_datasets")
    parser.add_argument("--widths", type=float, nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--lambdas", nargs="+", choices=LAMBDAS, default=LAMBDAS)
    parser.add_argument("--json", type=Path, default=Path("docs/results/sire_stability.json"))
    parser.add_argument("--png", type=Path, default=Path("docs/images/sire_stability.png"))
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    recorded = found.setdefault("rows", {})
    found.update(steps=STEPS, batch_size=BATCH)
    configs = paper_tables.find_configs(TABLE)
    table = paper_tables.load_table(TABLE, configs)
    for width, weight, reading in product(options.widths, options.lambdas, READINGS):
        called = name(reading, weight, width)
        if called in recorded:
            continue
        given = [
            f"--config.data.dir={options.data}",
            f"--config.batch_size={BATCH}",
            f"--config.backbone.width={width}",
        ]
        row = f"{reading}_{weight}"
        with tempfile.TemporaryDirectory() as workdir:
            chosen = paper_tables.choose_rows(table, [row])
            told = reproduce.rehearse(table, chosen, workdir, configs, "", given, STEPS)[row]
        recorded[called] = {"machine": reproduce.machine(), **asdict(told)}
        write(found, options.json)
    draw(recorded, options.png)
    for width in WIDTHS:
        print(f"\n{width:g} of the width\n\n{align(rows(recorded, width))}")


if __name__ == "__main__":
    main()
