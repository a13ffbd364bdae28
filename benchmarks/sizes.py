"""Counts the parameters of the networks of the tables: ``python benchmarks/sizes.py``.

Those that some loss reaches, as the tables' own column has them, of every row of a table that
prints sizes (and of the network that it trains, where it prints another's), of SSAL's also as Keras
counts; and what each output of AuxNet-56-5 costs. Nothing is trained and no data are needed. Prints
a table and writes JSON.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.tree_util import DictKey

from sire_jax import configuration, inspect, paper_tables, traced
from sire_jax.configuration import experiment
from sire_jax.text import align

TABLES = ("sire_3", "sire_4", "ssal_1", "ssal_2", "ssal_3")
# Those of a paper that counted in Keras.
KERAS_TABLES = ("ssal_1", "ssal_2", "ssal_3")
# A network whose outputs are models of their own.
OUTPUTS = "auxnet.py:56-5"


def as_keras_counts(parts: experiment.Experiment) -> int:
    """Counts what Keras has in a network: moving statistics and biases of all convolutions, too.

    Args:
        parts: The network and what its losses reach.

    Returns:
        The number.
    """
    params = jax.tree_util.tree_leaves_with_path(parts.variables["params"])
    reached = jax.tree.map(lambda *flags: any(flags), *parts.reach.values())
    kernels = {
        path[:-1]: leaf
        for (path, leaf), is_reached in zip(params, jax.tree.leaves(reached), strict=True)
        if path[-1] == DictKey("kernel") and leaf.ndim == 4 and is_reached
    }
    with_bias = {path[:-1] for path, _ in params if path[-1] == DictKey("bias")}
    biases = sum(leaf.shape[-1] for path, leaf in kernels.items() if path not in with_bias)
    return parts.size() + traced.size(parts.variables["batch_stats"]) + biases


def build(name: str, row: Mapping[str, Any], variant: str) -> experiment.Experiment:
    """Builds the network of a row of a table, or of another variant of its config."""
    configs = paper_tables.find_configs(name)
    table = paper_tables.load_table(name, configs)
    config = paper_tables.row_config(table, {**row, "variant": variant}, configs, "", [])
    return experiment.build(configuration.with_groups(config, dealt=True))


def count(name: str) -> dict[str, dict[str, int]]:
    """Counts the parameters of a table's rows.

    Args:
        name: The table.

    Returns:
        For each way of counting numbers of parameters by what the rows are called.
    """
    sizes: dict[str, dict[str, int]] = {name: {}}
    for row in paper_tables.load_table(name, paper_tables.find_configs(name))["rows"]:
        identity = paper_tables.identity(row)
        parts = build(name, row, row.get("counted", row["variant"]))
        sizes[name][identity] = parts.size()
        if "counted" in row:
            trained = build(name, row, row["variant"])
            sizes.setdefault(f"{name}, as trained", {})[identity] = trained.size()
        if name in KERAS_TABLES:
            sizes.setdefault(f"{name}, as Keras counts", {})[identity] = as_keras_counts(parts)
        print(f"{name} {identity}: {parts.size():,}", flush=True)
    return sizes


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", default=TABLES)
    parser.add_argument("--json", type=Path, default=Path("docs/results/sizes.json"))
    options = parser.parse_args()
    sizes: dict[str, Any] = {}
    for name in options.tables:
        sizes |= count(name)
    config = configuration.load(str(configuration.CONFIGS / OUTPUTS))
    outputs = inspect.inspect(config)["outputs"]
    lines = [["table", "row", "parameters"]]
    lines += [[name, row, f"{n:,}"] for name, rows in sizes.items() for row, n in rows.items()]
    print(align(lines))
    # Those of other tables stay.
    recorded = json.loads(options.json.read_text()) if options.json.exists() else {}
    sizes[OUTPUTS] = outputs
    options.json.write_text(json.dumps({**recorded, **sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
