"""Counts the parameters of the networks of the tables: ``python benchmarks/sizes.py``.

Those that some loss reaches, as the tables' own column has them, of every row of a table that
prints sizes; and what each output of AuxNet-56-5 costs. Nothing is trained and no data are needed.
Prints a table and writes JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sire_jax import configuration, experiment, inspect, reproduce
from sire_jax.tables import align

TABLES = ("sire_3", "sire_4", "ssal_1", "ssal_2", "ssal_3")
# A network whose outputs are models of their own.
OUTPUTS = "auxnet.py:56-5"


def rows(name: str) -> dict[str, int]:
    """Counts the parameters of a table's rows.

    Args:
        name: The table.

    Returns:
        Numbers of parameters by what the rows are called.
    """
    configs = reproduce.find_configs(name)
    table, found = reproduce.load_table(name, configs), {}
    for row in table["rows"]:
        counted = {**row, "variant": row.get("counted", row["variant"])}
        config = reproduce.row_config(table, counted, configs, "", [])
        parts = experiment.build(configuration.with_groups(config, dealt=True))
        found[reproduce.identity(row)] = parts.size()
        print(f"{name} {reproduce.identity(row)}: {parts.size():,}", flush=True)
    return found


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", default=TABLES)
    parser.add_argument("--json", type=Path, default=Path("docs/results/sizes.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {name: rows(name) for name in options.tables}
    config = configuration.load(str(configuration.CONFIGS / OUTPUTS))
    outputs = inspect.inspect(config)["outputs"]
    lines = [["table", "row", "parameters"]]
    lines += [[name, row, f"{n:,}"] for name, each in found.items() for row, n in each.items()]
    print(align(lines))
    # Those of other tables stay.
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    options.json.write_text(json.dumps({**known, **found, OUTPUTS: outputs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
