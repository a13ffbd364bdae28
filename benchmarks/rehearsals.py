"""Rehearses every row of every table, as shipped: ``python benchmarks/rehearsals.py``.

Some full-size steps of each, on real images where they are at hand (``--data=DIR``), on made-up
ones elsewhere. Rows of several tables that are the same run are rehearsed once. Takes hours; what
is recorded is not rehearsed again. Writes JSON and the page that shows it.
"""

import argparse
import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sire_jax import configuration, files, paper_tables, rehearsal, reproduce, text
from sire_jax.rehearsal import Rehearsal

RESULTS = Path("docs/results")
# One compiles, the others are timed.
STEPS = 3
# Readings of one network, which no paper prints; docs/results/sire.md shows those that were tried.
LEFT_OUT = ("sire_readings",)

Row = dict[str, Any]


def known_tables() -> list[str]:
    """Returns the names of all tables that papers print, and of those beside them."""
    folder = configuration.repository_configs() / "tables"
    # In their natural order: auxnet_2 ahead of auxnet_10.
    return sorted(
        {path.stem for path in folder.glob("*.json")}.difference(LEFT_OUT),
        key=lambda name: (name.split("_")[0], len(name), name),
    )


class Run(NamedTuple):
    """A row of a table.

    Attributes:
        table: The table.
        row: What the row is called.
        same: ``"TABLE/ROW"`` of the first row whose config is the same but for its name.
        config: A digest of that config.
    """

    table: str
    row: str
    same: str
    config: str


def runs(names: list[str]) -> Iterator[Run]:
    """Yields the rows of tables.

    Args:
        names: Of the tables.
    """
    first: dict[str, str] = {}
    for name in names:
        configs = paper_tables.find_configs(name)
        table = paper_tables.load_table(name, configs)
        for row in table["rows"]:
            config = paper_tables.row_config(table, row, configs, "", [])
            config.name = ""
            digest = hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()[:16]
            called = paper_tables.identity(row)
            yield Run(name, called, first.setdefault(digest, f"{name}/{called}"), digest)


def rehearse(run: Run, overrides: list[str]) -> Row:
    """Rehearses one row of a table.

    Args:
        run: The row.
        overrides: ``--config.a.b=value`` each.

    Returns:
        What it has shown, losses with five digits; with the digest of its config, and the machine.
    """
    configs = paper_tables.find_configs(run.table)
    table = paper_tables.load_table(run.table, configs)
    chosen = paper_tables.choose_rows(table, [run.row])
    with tempfile.TemporaryDirectory() as workdir:
        result = reproduce.rehearse(
            table, chosen, workdir, configs, overrides=overrides, steps=STEPS
        )[run.row]
    result.losses = {k: [float(f"{x:.5g}") for x in values] for k, values in result.losses.items()}
    result.seconds = [round(seconds, 5) for seconds in result.seconds]
    jax.clear_caches()
    gc.collect()
    return {"config": run.config, "machine": reproduce.machine(), **asdict(result)}


def shown(row: Row) -> Rehearsal:
    """Returns what a recorded row has shown."""
    return Rehearsal(**{k: v for k, v in row.items() if k not in ("config", "machine")})


def write(recorded: dict[str, Any], path: Path) -> None:
    """Writes what was recorded, each row in a line.

    Args:
        recorded: ``{"rows": {"TABLE/ROW": …}, …}``.
        path: The file.
    """
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in recorded["rows"].items())
    head = json.dumps({k: v for k, v in recorded.items() if k != "rows"})
    files.replace(path, f'{head[:-1]},\n"rows": {{\n{lines}\n}}}}\n')


def page(recorded: dict[str, Any]) -> str:
    """Writes the page of what was recorded.

    Args:
        recorded: ``{"steps": …, "tables": {TABLE: {"title": …, "rows": {ROW: "TABLE/ROW"}}},
            "rows": {"TABLE/ROW": …}}``; with a ``"note"`` on how it was measured, if there is one.
    """
    rehearsals = {same: shown(row) for same, row in recorded["rows"].items()}
    tables = {
        name: [(row, same, rehearsals.get(same)) for row, same in table["rows"].items()]
        for name, table in recorded["tables"].items()
    }
    machines = sorted({_machine(row["machine"]) for row in recorded["rows"].values()})
    onednn = sum("oneDNN" in row["machine"]["versions"] for row in recorded["rows"].values())
    settings = {"steps": recorded["steps"], "machines": "; ".join(machines), "onednn": onednn}
    head = _HEAD.format(**settings)
    note = [recorded["note"]] if recorded.get("note") else []
    parts = [head, *note, _summary(tables)]
    for name, rows in tables.items():
        parts.append(f"## {name}\n\n{recorded['tables'][name]['title']}\n\n{_table(name, rows)}")
    return "\n\n".join(parts) + "\n"


def _machine(facts: dict[str, str]) -> str:
    return f"{facts['processor']}, {facts['devices']}; {facts['versions']}"


_HEAD = """# Every table, rehearsed

Some full-size steps of each row of each table, as it is shipped: does it build, does it fit, are
its losses finite, and how long would all of it take here? Of one table,
`python -m sire_jax.reproduce --table=TABLE --rehearse` says so anywhere; of all of them:

```bash
python benchmarks/rehearsals.py --data=DIR
```

{steps} steps a row, the first of which compiles. They say that a row runs, not that it learns:
losses of so few steps fall by chance. Images that were not at hand are made up, and so are groups
of labels that have no file yet. Memory is what the compiler plans for a step with all arrays: a
process takes some more. Hours are those of all epochs and of the seeds that the config says, one,
without measurements: of ten seeds, as in the tables of pairs, ten times as many. {onednn} rows ran
with oneDNN, those of pairs and the latest of other tables, as their records say; the others
without, and before multi-way and pair-wise programs were compiled for least memory. Of a row that
stands in several tables the first is shown in all. `sire_readings`, of one network by
readings, is [on its own page](sire.md#what-trains).

Machine: {machines}. Raw figures: [rehearsal.json](rehearsal.json)."""


def _summary(tables: dict[str, list[tuple[str, str, Rehearsal | None]]]) -> str:
    lines = [["table", "rows", "ran", "finite", "too big", "not run", "hours, all rows"]]
    for name, rows in tables.items():
        shown = [result for _, _, result in rows if result is not None]
        ran = [result for result in shown if not result.refused]
        hours = [result.hours() for result in ran]
        total = sum(hour for hour in hours if hour is not None)
        least = "" if len(hours) == len(rows) and None not in hours else "at least "
        lines.append(
            [
                f"[{name}](#{name})",
                str(len(rows)),
                str(len(ran)),
                str(sum(result.diverged is None for result in ran)),
                str(len(shown) - len(ran)),
                str(len(rows) - len(shown)),
                f"{least}{total:,.1f}" if ran else "",
            ]
        )
    return text.align(lines)


def _table(name: str, rows: list[tuple[str, str, Rehearsal | None]]) -> str:
    heads = ["row", "parameters", "images", "losses", "s a step", "GiB", "hours"]
    lines = [heads]
    for row, same, result in rows:
        called = row if same == f"{name}/{row}" else f"{row} (as {same})"
        if result is None:
            lines.append([called, "", "", "not run", "", "", ""])
            continue
        cells = rehearsal.cells(called, result)
        lines.append([*cells[:3], *cells[4:]])
    return text.align(lines)


def _contents(all_runs: list[Run]) -> dict[str, Any]:
    """Returns the titles of tables, and which run each of their rows is."""
    tables: dict[str, Any] = {}
    for run in all_runs:
        title = paper_tables.load_table(run.table, paper_tables.find_configs(run.table))["title"]
        tables.setdefault(run.table, {"title": title, "rows": {}})["rows"][run.row] = run.same
    return tables


def main() -> None:
    """Runs the program with command line arguments."""
    tables = known_tables()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables, metavar="TABLE")
    parser.add_argument("--data", default="", help="directory of tensorflow_datasets")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "rehearsal.json"
    recorded = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    overrides = [f"--config.data.dir={options.data}"] if options.data else []
    ends = time.monotonic() + 60 * options.minutes
    all_runs = list(runs(tables))
    recorded.update(steps=STEPS, tables=_contents(all_runs))
    # What is of another config by now is not of these rows.
    current = {run.same: run.config for run in all_runs}
    recorded["rows"] = {k: v for k, v in recorded["rows"].items() if v["config"] == current.get(k)}
    for run in all_runs:
        chosen = run.table in options.tables and run.same not in recorded["rows"]
        if chosen and time.monotonic() < ends:
            print(f"{run.table}/{run.row}", end="  ", flush=True)
            recorded["rows"][run.same] = rehearse(run, overrides)
            write(recorded, path)
    write(recorded, path)
    (options.out / "rehearsal.md").write_text(page(recorded))
    print(f"{options.out / 'rehearsal.md'} shows {len(recorded['rows'])} runs.")


if __name__ == "__main__":
    main()
