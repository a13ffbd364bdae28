"""Maps what trains of SIRe-CNN: ``python benchmarks/stability.py --data=DIR``.

Some steps of readings of what the paper leaves open (the table ``sire_readings``). Two maps: all
readings at full width with the batches of the paper, and four of them at three widths in small
batches. Takes minutes on an accelerator, and hours on a CPU; what is recorded is not run again.
Writes JSON and pictures, also of the first steps of the shipped networks, and prints tables.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rehearsals import write

from sire_jax import paper_tables, reproduce
from sire_jax.text import align

TABLE = "sire_readings"
LAMBDAS = ("0.1", "0.2", "0.5", "1.0")
# What guessing among 100 classes costs, and what can't be guessing with a batch's noise.
GUESSING, LEARNING = np.log(100), 4.5
# Readings by the names of rows, and what they are.
READINGS = {
    "normalized_pytorch": "batch norm, PyTorch's initial values (as shipped)",
    "normalized": "batch norm",
    "sigmoid": "sigmoid",
    "no_norm_sigmoid": "sigmoid, decoders without batch norm, PyTorch's initial values",
    "normalized_mean": "batch norm, classification divided by 100 as Eq. 1 prints it",
    "linear_heavy_ball": "nothing, heavy ball",
    "linear": "nothing",
    "linear_pytorch": "nothing, PyTorch's initial values",
    "no_norm": "nothing, decoders without batch norm",
    "no_norm_pytorch": "nothing, decoders without batch norm, PyTorch's initial values",
    "normalized_sum": "batch norm, errors summed over pixels",
}


@dataclass(frozen=True)
class Map:
    """Which steps are taken.

    Attributes:
        name: Of the files.
        steps: How many.
        batch: Images in a batch.
        widths: Of the network.
        readings: By the names of rows.
    """

    name: str
    steps: int
    batch: int
    widths: tuple[float, ...]
    readings: tuple[str, ...]

    def cells(self) -> Iterator[tuple[float, str, str, str]]:
        """Yields width, lambda, reading and what the cell is called."""
        for width, weight, reading in product(self.widths, LAMBDAS, self.readings):
            yield width, weight, reading, self.called(reading, weight, width)

    def called(self, reading: str, weight: str, width: float) -> str:
        """Returns what a cell is called; the width is left out where there is but one."""
        return f"{reading}_{weight}" + f"/{width:g}" * (len(self.widths) > 1)


MAPS = (
    Map("sire_readings", 300, 128, (1.0,), tuple(READINGS)),
    Map(
        *("sire_stability", 60, 32, (0.25, 0.5, 1.0)),
        ("normalized_pytorch", "normalized", "linear_heavy_ball", "linear"),
    ),
)


def cell(row: Mapping[str, Any] | None) -> str:
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


def colour(text: str) -> str:
    """Returns the colour of a cell: red if a loss is not finite, dark green if it learns."""
    if not text or text == "too big":
        return "white"
    if text.startswith("NaN"):
        return "#E8A08C"
    return "#8FC08F" if float(text) < LEARNING else "#D5E6D5"


def rows(chosen: Map, recorded: Mapping[str, Any], width: float) -> list[list[str]]:
    """Returns the table of a width, with its header.

    Args:
        chosen: The map.
        recorded: What rehearsals have shown, by what cells are called.
        width: Of the network.
    """
    head = ["what ends a decoder", *(f"lambda {weight}" for weight in LAMBDAS)]
    return [
        head,
        *(
            [
                READINGS[reading],
                *(cell(recorded.get(chosen.called(reading, w, width))) for w in LAMBDAS),
            ]
            for reading in chosen.readings
        ),
    ]


def draw(chosen: Map, recorded: Mapping[str, Any]) -> Figure:
    """Draws a map, a panel for each width.

    Args:
        chosen: The map.
        recorded: What rehearsals have shown, by what cells are called.
    """
    lines = len(chosen.readings)
    size = 4.5 + 2.4 * len(chosen.widths), 0.9 + 0.42 * lines
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(chosen.widths), sharey=True, squeeze=False)[0]
    for axes, width in zip(panels, chosen.widths, strict=True):
        shown = rows(chosen, recorded, width)[1:]
        for i, j in product(range(lines), range(len(LAMBDAS))):
            text = shown[i][j + 1]
            corner = (j - 0.5, i - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour(text), edgecolor="white"))
            axes.text(j, i, text.replace(" at ", "\n"), ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(LAMBDAS) - 0.5)
        axes.set_ylim(lines - 0.5, -0.5)
        axes.set_xticks(range(len(LAMBDAS)), LAMBDAS)
        axes.set_yticks(
            range(lines), [READINGS[reading] for reading in chosen.readings], fontsize=8
        )
        axes.set_xlabel("lambda")
        axes.set_title("full width" if width == 1 else f"{width:g} of the width", fontsize=10)
    return figure


def smooth(losses: Sequence[float], steps: int = 10) -> np.ndarray:
    """Returns means of as many steps; the first ones of fewer.

    Args:
        losses: One a step.
        steps: How many.
    """
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - steps, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_steps(recorded: Mapping[str, Any]) -> Figure:
    """Draws classification and decoders of the shipped networks over their first steps.

    Args:
        recorded: What rehearsals have shown, by the names of rows of ``sire_4``.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    main, decoders = figure.subplots(1, 2)
    for name, row in recorded.items():
        losses = row["losses"]
        steps = np.arange(1, len(losses["main"]) + 1)
        main.plot(steps, smooth(losses["main"]), label=name)
        every = [values for key, values in losses.items() if key.startswith("decoder")]
        decoders.plot(steps, smooth(np.mean(every, 0)), label=name)
    main.axhline(GUESSING, color="grey", linewidth=0.8, linestyle=":", label="guessing")
    main.set_ylim(3, 7)
    main.set_ylabel("cross entropy")
    decoders.set_yscale("log")
    decoders.set_ylabel("squared error, mean of the decoders")
    for axes in (main, decoders):
        axes.set_xlabel("step")
    main.legend(fontsize=8)
    return figure


def record(chosen: Map, path: Path, data: str) -> dict[str, Any]:
    """Runs the cells of a map that are not recorded, and writes each.

    Args:
        chosen: The map.
        path: The JSON.
        data: Directory of ``tensorflow_datasets``.

    Returns:
        What rehearsals have shown, by what cells are called.
    """
    recorded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    recorded.update(steps=chosen.steps, batch_size=chosen.batch)
    configs = paper_tables.find_configs(TABLE)
    table = paper_tables.load_table(TABLE, configs)
    for width, weight, reading, called in chosen.cells():
        if called in recorded["rows"]:
            continue
        overrides = [
            f"--config.data.dir={data}",
            f"--config.batch_size={chosen.batch}",
            f"--config.backbone.width={width}",
        ]
        row = f"{reading}_{weight}"
        with tempfile.TemporaryDirectory() as workdir:
            chosen_rows = paper_tables.choose_rows(table, [row])
            result = reproduce.rehearse(
                table, chosen_rows, workdir, configs, "", overrides, chosen.steps
            )[row]
        recorded["rows"][called] = {"machine": reproduce.machine(), **asdict(result)}
        write(recorded, path)
    return recorded["rows"]


def main() -> None:
    """Runs the program with command line arguments."""
    maps = {chosen.name: chosen for chosen in MAPS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="directory of tensorflow_datasets")
    parser.add_argument("--maps", nargs="+", choices=list(maps), default=list(maps))
    parser.add_argument("--draw", action="store_true", help="only draw what is recorded")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    if not (options.data or options.draw):
        parser.error("--data=DIR is needed, where real images are, or --draw")
    for chosen in map(maps.get, options.maps):
        path = options.results / f"{chosen.name}.json"
        if options.draw:
            recorded = json.loads(path.read_text())["rows"]
        else:
            recorded = record(chosen, path, options.data)
        draw(chosen, recorded).savefig(options.images / f"{chosen.name}.png", dpi=130)
        for width in chosen.widths:
            print(f"\n{chosen.name}, width {width:g}\n\n{align(rows(chosen, recorded, width))}")
    networks = options.results / "sire_4-rehearsal.json"
    if networks.exists():
        shown = json.loads(networks.read_text())["rows"]
        draw_steps(shown).savefig(options.images / "sire_networks_steps.png", dpi=130)


if __name__ == "__main__":
    main()
