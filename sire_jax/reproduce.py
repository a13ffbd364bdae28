"""Trains every row of a printed table and shows it beside the paper's.

``python -m sire_jax.reproduce --table=pairs_1 --seeds=10 [--config.data.dir=DIR …]``

With ``--rehearse`` it takes some steps of each row instead and says what the whole would take; with
``--decide=30`` it adds seeds, at most so many, until the table's claims are confirmed or refuted.

Tables are data, ``configs/tables/NAME.json``, of the current directory or shipped. A row that has
been trained is not trained again.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sire_jax import (
    __version__,
    configuration,
    files,
    paper_tables,
    registry,
    rehearsal,
    text,
)
from sire_jax.configuration import experiment
from sire_jax.diagnostics import figures, gradient_flow
from sire_jax.job import command
from sire_jax.layers import onednn
from sire_jax.runs.divergence import NonFiniteLossError
from sire_jax.storage.workdir import check_writable, read_config, read_results
from sire_jax.train import InterruptedRunError, train


def load_rows(
    table: paper_tables.Table,
    rows: Sequence[Mapping[str, Any]],
    configs: Path,
    option: str,
    overrides: Sequence[str],
) -> dict[str, ConfigDict]:
    """Loads the configs of rows.

    Args:
        table: The table.
        rows: Rows of it.
        configs: The directory of the configs.
        option: One of the table's options, or "".
        overrides: ``--config.a.b=value`` each, for all rows.

    Returns:
        Their configs, by what the rows are called.

    Raises:
        ValueError: If the table has no such option, or a config is wrong; it names the row.
    """
    if option and option not in table.get("options", ()):
        hint = text.nearest(option, table.get("options", ()))
        raise ValueError(f"The table has no option '{option}'.{hint}")
    row_configs = {}
    for row in rows:
        with registry.located(f"The row '{paper_tables.identity(row)}'"):
            row_configs[paper_tables.identity(row)] = paper_tables.row_config(
                table, row, configs, option, overrides
            )
    return row_configs


def _build(name: str, config: ConfigDict, rehearsed: bool = False) -> experiment.Experiment:
    with registry.located(f"The row '{name}'"):
        return experiment.build(configuration.with_groups(config, dealt=rehearsed))


def rehearse(
    table: paper_tables.Table,
    rows: Sequence[Mapping[str, Any]],
    workdir: str | Path,
    configs: Path,
    option: str = "",
    overrides: Sequence[str] = (),
    steps: int = 0,
) -> dict[str, rehearsal.Rehearsal]:
    """Takes some steps of each row as it is, after all have been built.

    Args:
        table: The table.
        rows: Its rows to rehearse.
        workdir: Where ``rehearsal.json``, ``rehearsal.md`` and ``rehearsal.png`` are written.
        configs: The directory of the configs.
        option: One of the table's options.
        overrides: ``--config.a.b=value`` each, for all rows.
        steps: Of each row, at most; see ``rehearsal.rehearse``.

    Returns:
        What they have shown, by row.

    Raises:
        ValueError: If the table has no such option, or a config of any row is wrong.
        PermissionError: If the workdir can't be written to.
    """
    row_configs = load_rows(table, rows, configs, option, overrides)
    workdir = check_writable(workdir)
    experiments = {name: _build(name, config, True) for name, config in row_configs.items()}
    rehearsals: dict[str, rehearsal.Rehearsal] = {}
    title = f"{table['title']}: some steps of each row"

    # Called while a row is under way, too: one that is killed leaves what it has shown.
    def note(name: str, result: rehearsal.Rehearsal) -> None:
        rehearsals[name] = result
        noted = paper_tables.note(overrides, option)
        page = f"{title}\n\n{noted}{rehearsal.markdown(rehearsals)}\n"
        files.replace(workdir / "rehearsal.md", page)
        details = {
            "title": title,
            "option": option,
            "overrides": list(overrides),
            **machine(),
            "rows": {row: asdict(result) for row, result in rehearsals.items()},
        }
        files.replace(workdir / "rehearsal.json", json.dumps(details, indent=1) + "\n")

    for number, (name, parts) in enumerate(experiments.items(), start=1):
        note(name, rehearsal.rehearse(parts, steps, note=partial(note, name)))
        print(f"{number}/{len(experiments)}  {name}: {rehearsals[name].verdict()}", flush=True)
        _draw_rehearsals(rehearsals, workdir / "rehearsal.png")
    return rehearsals


def _draw_rehearsals(rehearsals: Mapping[str, rehearsal.Rehearsal], path: Path) -> None:
    """Draws what each row minimized; of a row alone the losses that this is made of."""
    losses_by_row = {row: result.losses for row, result in rehearsals.items() if result.losses}
    if len(losses_by_row) == 1:
        (losses,) = losses_by_row.values()
        single = {name: values for name, values in losses.items() if name != "total"}
        figures.losses_of_one(single, path)
        return
    totals = {row: losses["total"] for row, losses in losses_by_row.items()}
    figures.losses(totals, path, "weighted sum of the losses")


def reproduce(
    table: paper_tables.Table,
    rows: Sequence[Mapping[str, Any]],
    workdir: str | Path,
    configs: Path,
    option: str = "",
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Trains rows of a table, or takes what has been trained, and compares.

    Args:
        table: The table.
        rows: Its rows to train; others are shown if they have been trained.
        workdir: Where the rows' workdirs are, and ``table.json``, ``table.md``, ``table.png``; of a
            table that varies something ``sweep.png``, too, and of one that shows the gradients of
            its rows ``gradient_flow.png``.
        configs: The directory of the configs.
        option: One of the table's options, such as ``as_released``.
        overrides: ``--config.a.b=value`` each, for all rows.

    Returns:
        A comparison for each row that has been trained.

    Raises:
        ValueError: If the table has no such option, or as ``train`` raises; before anything is
            trained, if a config of any row is wrong.
        PermissionError: If the workdir can't be written to.
    """
    row_configs = load_rows(table, rows, configs, option, overrides)
    workdir = check_writable(workdir)
    # All are built before one is trained: a mistake in the last row should not take days to show.
    for name, config in row_configs.items():
        if _trained(config, workdir / name) is None:
            _build(name, config)
    lines: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    drawn: dict[str, tuple[Path, str]] = {}
    references = {kind.get("relative_time") for kind in table["columns"].values()}
    counts = any("parameters" in kind for kind in table["columns"].values())
    reference = None
    for row in table["rows"]:
        directory = workdir / paper_tables.identity(row)
        config = row_configs.get(paper_tables.identity(row))
        if config is None:
            config = paper_tables.row_config(table, row, configs, option, overrides)
        results = _trained(config, directory)
        if results is None and row not in rows:
            continue
        drawn[row["name"]] = directory, row.get("curve", table["curves"]["metric"])
        results = results or train(config, str(directory))
        # Rows above it have no time relative to it.
        if paper_tables.identity(row) in references:
            reference = row, results
        parameters = 0
        if counts:
            # Some papers print the size of another network than they train.
            counted = {**row, "variant": row.get("counted", row["variant"])}
            chosen = paper_tables.row_config(table, counted, configs, option, overrides)
            parameters = experiment.build(chosen).size()
        lines.append(paper_tables.compare(row, table, results, parameters, reference))
        # After every row, as the next may take days or be stopped.
        (workdir / "table.md").write_text(
            paper_tables.note(overrides, option) + paper_tables.markdown(lines, table) + "\n"
        )
        details = {
            "title": table["title"],
            "option": option,
            "overrides": list(overrides),
            **machine(),
            "rows": lines,
        }
        (workdir / "table.json").write_text(json.dumps(details, indent=1) + "\n")
        curves = table["curves"]
        path = workdir / "table.png"
        split = _curve_split(curves["split"], config)
        figures.compare(drawn, split, path, curves.get("error_percent", False))
        if table.get("gradient_flow"):
            flows = {title: directory for title, (directory, _) in drawn.items()}
            measured = {
                title: run for title, run in flows.items() if gradient_flow.is_measured(run)
            }
            if measured:
                gradient_flow.draw(measured, workdir / "gradient_flow.png")
        if "sweep" in table:
            runs = {column: lines[-1][column]["runs"] for column in table["sweep"]["columns"]}
            points.append({"x": row["x"], "series": row["series"], **runs})
            figures.sweep(points, table["sweep"], workdir / "sweep.png")
    return lines


def _curve_split(split: str, config: ConfigDict) -> str:
    """Returns the split of the table's curves, or what a row measures in its place."""
    measured = tuple(config.evaluate_splits)
    return split if split in measured or not measured else measured[-1]


def _trained(config: ConfigDict, directory: Path) -> dict[str, Any] | None:
    """Returns the final measurements of a row that has been trained with that config, if any."""
    results = read_results(directory)
    if results and not configuration.differences(read_config(directory, building=False), config):
        return results
    return None


def machine() -> dict[str, Any]:
    """Returns what a table was measured on: versions, devices, processor, platform."""
    versions = f"sire_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    if jax.default_backend() == "cpu" and (library := onednn.version()):
        versions += f", oneDNN {library}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    # On Linux `platform.processor` knows the architecture at most.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return {
        "versions": versions,
        "devices": devices,
        "processor": f"{os.cpu_count()} x {next(models, platform.processor())}",
        "platform": platform.platform(),
    }


def _decide(
    table: paper_tables.Table, options: Any, configs: Path, overrides: Sequence[str]
) -> None:
    # It reproduces in its turn.
    from sire_jax import claims, decide

    chosen = claims.read(table, [paper_tables.identity(row) for row in table["rows"]])
    rows = decide.rows_of(chosen, table)
    hours = decide.cost(table, rows, configs, options.option, overrides)
    print(decide.describe_cost(hours, options.decide), flush=True)
    settings = (options.workdir, configs, options.option, overrides, options.decide)
    judged = decide.decide(table, *settings)
    note = paper_tables.note(overrides, options.option)
    print(f"\n{table['title']}\n\n{note}{decide.markdown(judged)}\n")
    print(f"Raw figures and picture: {files.expanded(options.workdir) / 'claims.json'}, .png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--table", required=True, help="name of a table in configs/tables")
    parser.add_argument("--rows", default="", help="rows, separated by commas; all by default")
    parser.add_argument("--seeds", type=int, help="runs of each row; as in the config by default")
    parser.add_argument("--option", default="", help="a reading of the paper, such as as_released")
    parser.add_argument("--workdir", help="where the runs are kept; runs/TABLE by default")
    parser.add_argument(
        "--decide", type=int, metavar="SEEDS", help="decide the table's claims, by at most so many"
    )
    rehearsal.add_option(parser)
    options, overrides = parser.parse_known_args(arguments)
    configs = paper_tables.find_configs(options.table)
    if options.seeds is not None:
        overrides.append(f"--config.seeds={options.seeds}")
    rehearsed = "rehearsal" * (options.rehearse is not None)
    if options.decide is not None and (options.seeds is not None or options.rows or rehearsed):
        parser.error("--decide chooses seeds and rows by itself: leave out --seeds and --rows")
    if options.workdir is None:
        parts = filter(None, (options.table, options.option, rehearsed))
        options.workdir = Path("runs") / "-".join(parts)
    started = time.perf_counter()
    with command.readable_errors(NonFiniteLossError, goes_on=True):
        table = paper_tables.load_table(options.table, configs)
        rows = paper_tables.choose_rows(table, [name for name in options.rows.split(",") if name])
        if rehearsed:
            settings = (options.workdir, configs, options.option, overrides, options.rehearse)
            print(f"\n{rehearsal.markdown(rehearse(table, rows, *settings))}")
            print(f"Losses: {files.expanded(options.workdir) / 'rehearsal.png'}")
            return
        try:
            if options.decide is not None:
                _decide(table, options, configs, overrides)
                return
            lines = reproduce(table, rows, options.workdir, configs, options.option, overrides)
        except InterruptedRunError as stopped:
            print(stopped, flush=True)
            sys.exit(stopped.status)
    note = paper_tables.note(overrides, options.option)
    written = note + paper_tables.markdown(lines, table)
    print(f"\n{table['title']}\n\n{written}\n")
    seconds = time.perf_counter() - started
    drawn = files.expanded(options.workdir) / "table.png"
    print(f"{seconds:.0f} s; curves: {drawn}, and in each row's directory")


if __name__ == "__main__":
    main()
