"""Pages of docs/results and the recorded figures beside them, as the tests of pages read them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sire_jax import configuration, paper_tables
from sire_jax.claims import Claim, judge

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "docs" / "results"


def tables(page, heading):
    """Returns the tables of a section of a page: rows of cells, the header first."""
    text = (RESULTS / page).read_text()
    return tables_of(text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0])


def tables_of(text):
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for table in found
    ]


def prose(page):
    """Returns a page's text as one line."""
    return " ".join((RESULTS / page).read_text().split())


def whole(page):
    return (RESULTS / page).read_text()


def decided(name):
    """Returns the claims of a record as it judges them, judged anew by the figures of each seed."""
    stored, found = recorded(name), []
    for details in stored["claims"]:
        claim = Claim(**details["claim"])
        figures = {
            (row, column): values[: details["seeds"]]
            for column, rows in stored["figures"].items()
            for row, values in rows.items()
        }
        decision = judge(claim, claim.differences(figures))
        assert decision.verdict == details["verdict"]
        assert decision.mean == pytest.approx(details["mean"])
        found.append(decision)
    return found


def recorded(name):
    return json.loads((RESULTS / name).read_text())


def rows(name):
    """Returns the rows of a paper's table, each with its ``id``."""
    table = paper_tables.load_table(name, configuration.repository_configs())
    return [{**row, "id": paper_tables.identity(row)} for row in table["rows"]]


def ratios(found, name, other):
    return np.divide(found["seconds"][name], found["seconds"][other])


def spread(values):
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def mean(figure):
    return "" if figure["ours"] is None else "{:.2f} ± {:.2f}".format(*figure["ours"])


def scientific(value, digits=1):
    """As 1.5e-2."""
    return re.sub(r"e-0", "e-", f"{value:.{digits}e}")
