"""Trains every row of a printed table and shows it beside the paper's.

``python -m sire_jax.reproduce --table=pairs_1 --seeds=10 [--config.data.dir=DIR …]``

Tables are data, ``configs/tables/NAME.json``. A row that has been trained is not trained again.
"""

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sire_jax import __version__, command, configuration, figures, names, registry, tables
from sire_jax.train import InterruptedRunError, NonFiniteLossError, train
from sire_jax.workdir import read_config, read_results

Table = dict[str, Any]


def load_table(name: str, configs: Path) -> Table:
    """Reads a table.

    Args:
        name: Such as ``pairs_1``.
        configs: The directory of the configs.

    Returns:
        What ``tables/NAME.json`` holds.

    Raises:
        ValueError: If there is no such table.
    """
    known = {path.stem: path for path in (configs / "tables").glob("*.json")}
    return json.loads(registry.choose(known, name, "table").read_text())


def choose_rows(table: Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """Picks rows by their variants, all if no name is given.

    Raises:
        ValueError: If there is no such row.
    """
    known = {row["variant"]: row for row in table["rows"]}
    return [registry.choose(known, name, "row") for name in names] or table["rows"]


def compare(row: Mapping[str, Any], table: Table, results: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a row's figures beside the paper's.

    Args:
        row: The row of the table.
        table: The table.
        results: Final measurements of the row's run.

    Returns:
        ``{"name", "variant", "<column>": {"paper", "ours", "difference", "deviations", "runs"}}``:
        means with standard deviations, the difference of the means, and that in the paper's
        standard deviations (``None`` where the paper has no figure or prints 0).
    """
    line: dict[str, Any] = {"name": row["name"], "variant": row["variant"]}
    for column, where in table["columns"].items():
        runs = results["splits"][where["split"]][where["metric"]]
        mean, deviation = tables.spread(runs)
        paper = row.get(column)
        difference = None if paper is None else mean - paper[0]
        line[column] = {
            "paper": paper,
            "ours": [mean, deviation],
            "difference": difference,
            "deviations": difference / paper[1] if paper and paper[1] else None,
            "runs": list(runs),
        }
    return {**line, "seconds": results["seconds"]}


def markdown(lines: Sequence[Mapping[str, Any]], table: Table) -> str:
    """Writes the compared rows as a Markdown table."""
    has_paper = any(line[column]["paper"] for line in lines for column in table["columns"])
    heads = ["row"]
    for column in table["columns"]:
        heads += [f"{column}, paper", "ours", "difference"] if has_paper else [column]
    rows = [[*heads, "seconds"]]
    for line in lines:
        cells = [cell for column in table["columns"] for cell in _cells(line[column], has_paper)]
        rows.append([line["name"], *cells, f"{line['seconds']:.0f}"])
    return tables.align(rows)


def _cells(figure: Mapping[str, Any], has_paper: bool) -> list[str]:
    ours = "{:.3f} ± {:.3f}".format(*figure["ours"])
    if not has_paper:
        return [ours]
    if figure["paper"] is None:
        return ["", ours, ""]
    far = "" if figure["deviations"] is None else f" ({figure['deviations']:+.1f} sd)"
    return ["{:.3f} ± {:.3f}".format(*figure["paper"]), ours, f"{figure['difference']:+.3f}{far}"]


def reproduce(
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    workdir: Path,
    configs: Path,
    option: str = "",
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Trains rows of a table, or takes what has been trained, and compares.

    Args:
        table: The table.
        rows: Its rows to train; others are shown if they have been trained.
        workdir: Where the rows' workdirs are, and ``table.json``, ``table.md``, ``table.png``.
        configs: The directory of the configs.
        option: One of the table's options, such as ``as_released``.
        overrides: ``--config.a.b=value`` each, for all rows.

    Returns:
        A comparison for each row that has been trained.

    Raises:
        ValueError: If the table has no such option, or as ``train`` raises.
    """
    if option and option not in table["options"]:
        raise ValueError(
            f"The table has no option '{option}'.{names.nearest(option, table['options'])}"
        )
    lines, directories = [], {}
    for row in table["rows"]:
        variant = f"{row['variant']},{option}" if option else row["variant"]
        config = configuration.load(f"{configs / table['config']}:{variant}", overrides)
        directory = workdir / row["variant"]
        results = _trained(config, directory)
        if results is None and row not in rows:
            continue
        directories[row["name"]] = directory
        lines.append(compare(row, table, results or train(config, str(directory))))
        (workdir / "table.md").write_text(markdown(lines, table) + "\n")
        details = {
            "title": table["title"],
            "option": option,
            "overrides": list(overrides),
            **_machine(),
            "rows": lines,
        }
        (workdir / "table.json").write_text(json.dumps(details, indent=1) + "\n")
        figures.compare(directories, **table["curves"], path=workdir / "table.png")
    return lines


def _trained(config: ConfigDict, directory: Path) -> dict[str, Any] | None:
    """Returns the final measurements of a row that has been trained with that config, if any."""
    results = read_results(directory)
    if results and not configuration.differences(read_config(directory), config):
        return results
    return None


def _machine() -> dict[str, Any]:
    versions = f"sire_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"versions": versions, "devices": devices, "platform": platform.platform()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--table", required=True, help="name of a table in configs/tables")
    parser.add_argument("--rows", default="", help="variants, separated by commas; all by default")
    parser.add_argument("--seeds", type=int, help="runs of each row; as in the config by default")
    parser.add_argument("--option", default="", help="a reading of the paper, such as as_released")
    parser.add_argument("--workdir", help="where the runs are kept; runs/TABLE by default")
    known, overrides = parser.parse_known_args(arguments)
    configs = configuration.repository_configs()
    if known.seeds is not None:
        overrides.append(f"--config.seeds={known.seeds}")
    workdir = Path(
        known.workdir or Path("runs") / "-".join(filter(None, (known.table, known.option)))
    )
    started = time.perf_counter()
    with command.readable_errors(NonFiniteLossError):
        table = load_table(known.table, configs)
        rows = choose_rows(table, [name for name in known.rows.split(",") if name])
        try:
            lines = reproduce(table, rows, workdir, configs, known.option, overrides)
        except InterruptedRunError as stopped:
            print(stopped, flush=True)
            sys.exit(command.INTERRUPTED)
    print(f"\n{table['title']}\n\n{markdown(lines, table)}\n")
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s; curves: {workdir / 'table.png'}, and in each row's directory")


if __name__ == "__main__":
    main()
