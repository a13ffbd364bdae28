"""What pages of results say is what the recorded figures beside them say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sire_jax import configuration, reproduce

RESULTS = Path(__file__).parent.parent / "docs" / "results"
# What the page calls the readings of the table sire_readings.
READINGS = {
    128: {
        "batch norm (as shipped)": "normalized",
        "nothing, heavy ball in place of Nesterov": "linear_heavy_ball",
        "nothing": "linear",
    },
    32: {
        "batch norm": "normalized",
        "batch norm, PyTorch's initial values": "normalized_pytorch",
        "sigmoid": "sigmoid",
        "nothing, heavy ball": "linear_heavy_ball",
        "nothing": "linear",
        "nothing, PyTorch's initial values": "linear_pytorch",
        "nothing, decoders without batch norm": "no_norm",
        "nothing, decoders without batch norm, PyTorch's initial values": "no_norm_pytorch",
        "sigmoid, decoders without batch norm, PyTorch's initial values": "no_norm_sigmoid",
        "batch norm, classification divided by 100 as Eq. 1 prints it": "normalized_mean",
        "batch norm, errors summed over pixels": "normalized_sum",
    },
}
FILES = {128: "sire_readings.json", 32: "sire_readings-batch_32.json"}


def _tables(page, heading):
    """Returns the tables of a section of a page: rows of cells, the header first."""
    text = (RESULTS / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for table in found
    ]


def _said(row, decoders):
    """Says what became of a row of a rehearsal, as the page does."""
    if row["diverged"] is not None:
        return f"NaN at step {row['diverged']}"
    losses = row["losses"]
    text = f"main {np.mean(losses['main'][-5:]):.2f}"
    if not decoders:
        return text
    first, last = (losses[f"decoder_{i}"][-1] for i in (1, 4))
    return f"{text}, decoders {first:.3f} and {last:.3f}"


@pytest.mark.parametrize(("place", "batch"), [(0, 128), (1, 32)])
def test_what_became_of_readings_is_what_was_recorded(place, batch):
    header, _, *rows = _tables("sire.md", "What trains")[place]
    lambdas = [re.sub("lambda ", "", cell) for cell in header[1:]]
    recorded = json.loads((RESULTS / FILES[batch]).read_text())["rows"]
    shown = {
        f"{READINGS[batch][reading]}_{weight}": cell
        for reading, *cells in rows
        for weight, cell in zip(lambdas, cells, strict=True)
        if cell
    }
    assert shown == {name: _said(row, batch == 128) for name, row in recorded.items()}


@pytest.mark.parametrize(
    ("page", "heading", "recorded", "table"),
    [
        ("pairs.md", "As reported", "pairs_1.json", "pairs_1"),
        ("pairs.md", "As released", "pairs_1-as_released.json", "pairs_1"),
        ("pairs.md", "Figures of the text", "pairs_choices.json", "pairs_choices"),
        ("auxnet.md", "The rules compared", "auxnet_rules-reduced.json", "auxnet_rules"),
    ],
)
def test_a_table_is_what_reproduce_wrote(page, heading, recorded, table):
    lines = json.loads((RESULTS / recorded).read_text())["rows"]
    about = reproduce.load_table(table, configuration.repository_configs())
    written = reproduce.markdown(lines, about).splitlines()
    expected = [[cell.strip() for cell in line.strip("|").split("|")] for line in written]
    (found,) = _tables(page, heading)
    # A row that was not run stands on the page alone.
    found = [row for row in found if "not run" not in row]
    assert found[:1] + found[2:] == expected[:1] + expected[2:]
