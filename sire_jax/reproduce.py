"""Trains every row of a printed table and shows it beside the paper's.

``python -m sire_jax.reproduce --table=pairs_1 --seeds=10 [--config.data.dir=DIR …]``

With ``--rehearse`` it takes some steps of each row instead and says what the whole would take.

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

from sire_jax import __version__, configuration, files, names, registry, rehearsal, tables
from sire_jax.configuration import experiment
from sire_jax.diagnostics import figures, gradient_flow
from sire_jax.job import command
from sire_jax.runs import divergence
from sire_jax.runs.divergence import DIVERGED, NonFiniteLossError
from sire_jax.storage.workdir import check_writable, read_config, read_results
from sire_jax.train import InterruptedRunError, train

Table = dict[str, Any]
_TABLES = "tables"


def find_configs(name: str) -> Path:
    """Returns the directory of the configs that has a table; that of the shipped ones if none has.

    Args:
        name: The table.
    """
    table = configuration.find(configuration.CONFIGS / _TABLES / f"{name}.json")
    return table.parent.parent if table else configuration.repository_configs()


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
    known = {path.stem: path for path in (configs / _TABLES).glob("*.json")}
    return json.loads(registry.choose(known, name, "table").read_text())


def identity(row: Mapping[str, Any]) -> str:
    """Returns what a row is called on the command line and in the workdir."""
    return row.get("id", row["variant"])


def choose_rows(table: Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """Picks rows by their names, all if no name is given.

    Raises:
        ValueError: If there is no such row.
    """
    known = {identity(row): row for row in table["rows"]}
    return [registry.choose(known, name, "row") for name in names] or table["rows"]


def row_config(
    table: Table, row: Mapping[str, Any], configs: Path, option: str, overrides: Sequence[str]
) -> ConfigDict:
    """Loads the config of a row.

    Args:
        table: The table.
        row: One of its rows.
        configs: The directory of the configs.
        option: One of the table's options, or "".
        overrides: ``--config.a.b=value`` each, after those of the row.

    Returns:
        The config.
    """
    variant = f"{row['variant']},{option}" if option else row["variant"]
    # A row that diverges is a result, too.
    given = ["--config.on_diverged=record", *row.get("overrides", []), *overrides]
    return configuration.load(f"{configs / table['config']}:{variant}", given)


def load_rows(
    table: Table,
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
        hint = names.nearest(option, table.get("options", ()))
        raise ValueError(f"The table has no option '{option}'.{hint}")
    found = {}
    for row in rows:
        with registry.located(f"The row '{identity(row)}'"):
            found[identity(row)] = row_config(table, row, configs, option, overrides)
    return found


def _build(name: str, config: ConfigDict, rehearsed: bool = False) -> experiment.Experiment:
    with registry.located(f"The row '{name}'"):
        return experiment.build(configuration.with_groups(config, dealt=rehearsed))


def rehearse(
    table: Table,
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
    workdir = check_writable(workdir)
    row_configs = load_rows(table, rows, configs, option, overrides)
    parts = {name: _build(name, config, True) for name, config in row_configs.items()}
    found: dict[str, rehearsal.Rehearsal] = {}
    title = f"{table['title']}: some steps of each row"

    def note(name: str, shown: rehearsal.Rehearsal) -> None:
        found[name] = shown
        text = f"{title}\n\n{_note(overrides)}{rehearsal.markdown(found)}\n"
        files.replace(workdir / "rehearsal.md", text)
        details = {
            "title": title,
            "option": option,
            "overrides": list(overrides),
            **machine(),
            "rows": {row: asdict(each) for row, each in found.items()},
        }
        files.replace(workdir / "rehearsal.json", json.dumps(details, indent=1) + "\n")

    for number, (name, each) in enumerate(parts.items(), start=1):
        note(name, rehearsal.rehearse(each, steps, note=partial(note, name)))
        print(f"{number}/{len(parts)}  {name}: {found[name].verdict()}", flush=True)
        _draw_rehearsals(found, workdir / "rehearsal.png")
    return found


def _draw_rehearsals(found: Mapping[str, rehearsal.Rehearsal], path: Path) -> None:
    """Draws what each row minimized; of a row alone the losses that this is made of."""
    shown = {row: each.losses for row, each in found.items() if each.losses}
    if len(shown) == 1:
        (losses,) = shown.values()
        single = {name: each for name, each in losses.items() if name != "total"}
        figures.losses_of_one(single, path)
        return
    totals = {row: losses["total"] for row, losses in shown.items()}
    figures.losses(totals, path, "weighted sum of the losses")


Figure = dict[str, Any]


def compare(
    row: Mapping[str, Any],
    table: Table,
    results: Mapping[str, Any],
    parameters: int = 0,
    reference: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Puts a row's figures beside the paper's.

    Args:
        row: The row of the table.
        table: The table. A column is a metric of a split, ``{"split", "metric"}``, in percent if it
            has ``"percent": true``, as an error in percent with ``"error_percent": true``;
            ``{"parameters": true}``, in millions; or ``{"relative_time": ID}``, the time of a
            training step over that of the row ID (the paper's: of the whole training). It may have
            a ``"format"`` of its numbers.
        results: Final measurements of the row's run.
        parameters: The row's number of parameters.
        reference: The row that times are relative to and its measurements, if it has been trained.

    Returns:
        ``{"name", "variant", "diverged"}``, the steps after which each run did, and for each column
        ``{"paper", "ours", "difference", "deviations", "runs"}``: of the runs that did not diverge,
        if there are any, means with standard deviations, the difference of the means, and that in
        the paper's standard deviations (``None`` where the paper has no figure, or no deviation
        above 0).
    """
    diverged = results.get(DIVERGED, [])
    line: dict[str, Any] = {"name": row["name"], "variant": identity(row), DIVERGED: diverged}
    for column, kind in table["columns"].items():
        if "relative_time" in kind:
            line[column] = _relative_time(row, results, reference)
        elif "parameters" in kind:
            line[column] = _figure(row.get(column), [parameters / 1e6])
        else:
            # A row without decoders has no errors of theirs.
            runs = results["splits"][kind["split"]].get(kind["metric"])
            runs = None if runs is None else divergence.converged(runs, diverged)
            if runs is not None and kind.get("error_percent"):
                runs = [100 * (1 - each) for each in runs]
            elif runs is not None and kind.get("percent"):
                runs = [100 * each for each in runs]
            line[column] = _figure(row.get(column), runs)
    return {**line, "seconds": results["seconds"]}


def _relative_time(
    row: Mapping[str, Any],
    results: Mapping[str, Any],
    reference: tuple[Mapping[str, Any], Mapping[str, Any]] | None,
) -> Figure:
    if reference is None:
        return _figure(None, None)
    paper = row["minutes"] / reference[0]["minutes"] if "minutes" in row else None
    ours, theirs = results.get("step_seconds"), reference[1].get("step_seconds")
    return _figure(paper, [ours / theirs] if ours and theirs else None)


def _figure(paper: Any, runs: list[float] | None) -> Figure:
    """Compares the paper's mean, or mean and deviation, with our runs."""
    if paper is not None and not isinstance(paper, list):
        paper = [paper, None]
    if runs is None:
        return dict.fromkeys(("ours", "difference", "deviations", "runs")) | {"paper": paper}
    mean, deviation = tables.spread(runs)
    difference = None if paper is None else mean - paper[0]
    return {
        "paper": paper,
        "ours": [mean, deviation],
        "difference": difference,
        "deviations": difference / paper[1] if paper and paper[1] else None,
        "runs": runs,
    }


def markdown(lines: Sequence[Mapping[str, Any]], table: Table) -> str:
    """Writes the compared rows as a Markdown table."""
    columns = table["columns"]
    has_paper = {column: any(line[column]["paper"] for line in lines) for column in columns}
    heads = ["row"]
    for column in columns:
        heads += [f"{column}, paper", "ours", "difference"] if has_paper[column] else [column]
    rows = [[*heads, "seconds"]]
    for line in lines:
        cells = [
            cell
            for column, kind in columns.items()
            for cell in _cells(line[column], has_paper[column], kind.get("format", ".3f"))
        ]
        name = line["name"] + divergence.described(line.get(DIVERGED, []))
        rows.append([name, *cells, f"{line['seconds']:.0f}"])
    return tables.align(rows)


def _cells(figure: Figure, has_paper: bool, form: str) -> list[str]:
    several = figure["runs"] is not None and len(figure["runs"]) > 1
    ours = _number(figure["ours"] if several else (figure["ours"] or [None])[:1], form)
    if not has_paper:
        return [ours]
    if figure["difference"] is None:
        return [_number(figure["paper"], form), ours, ""]
    far = "" if figure["deviations"] is None else f" ({figure['deviations']:+.1f} sd)"
    return [_number(figure["paper"], form), ours, f"{figure['difference']:+{form}}{far}"]


def _note(overrides: Sequence[str]) -> str:
    """Says what makes a table another one than the paper's."""
    given = [each for each in overrides if not each.startswith("--config.data.dir=")]
    return f"Overrides: {' '.join(given)}\n\n" if given else ""


def _number(value: Sequence[float | None] | None, form: str) -> str:
    """Writes a mean, with its deviation if there is one."""
    return " ± ".join(f"{each:{form}}" for each in value or [] if each is not None)


def reproduce(
    table: Table,
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
    workdir = check_writable(workdir)
    row_configs = load_rows(table, rows, configs, option, overrides)
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
        directory = workdir / identity(row)
        config = row_configs.get(identity(row))
        if config is None:
            config = row_config(table, row, configs, option, overrides)
        results = _trained(config, directory)
        if results is None and row not in rows:
            continue
        drawn[row["name"]] = directory, row.get("curve", table["curves"]["metric"])
        results = results or train(config, str(directory))
        if identity(row) in references:
            reference = row, results
        parameters = 0
        if counts:
            counted = {**row, "variant": row.get("counted", row["variant"])}
            chosen = row_config(table, counted, configs, option, overrides)
            parameters = experiment.build(chosen).size()
        lines.append(compare(row, table, results, parameters, reference))
        (workdir / "table.md").write_text(_note(overrides) + markdown(lines, table) + "\n")
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
        figures.compare(drawn, curves["split"], path, curves.get("error_percent", False))
        if table.get("gradient_flow"):
            flows = {title: directory for title, (directory, _) in drawn.items()}
            measured = {k: each for k, each in flows.items() if gradient_flow.is_measured(each)}
            if measured:
                gradient_flow.draw(measured, workdir / "gradient_flow.png")
        if "sweep" in table:
            runs = {column: lines[-1][column]["runs"] for column in table["sweep"]["columns"]}
            points.append({"x": row["x"], "series": row["series"], **runs})
            figures.sweep(points, table["sweep"], workdir / "sweep.png")
    return lines


def _trained(config: ConfigDict, directory: Path) -> dict[str, Any] | None:
    """Returns the final measurements of a row that has been trained with that config, if any."""
    results = read_results(directory)
    if results and not configuration.differences(read_config(directory, building=False), config):
        return results
    return None


def machine() -> dict[str, Any]:
    """Returns what a table was measured on: versions, devices, processor, platform."""
    versions = f"sire_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return {
        "versions": versions,
        "devices": devices,
        "processor": f"{os.cpu_count()} x {next(models, platform.processor())}",
        "platform": platform.platform(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--table", required=True, help="name of a table in configs/tables")
    parser.add_argument("--rows", default="", help="rows, separated by commas; all by default")
    parser.add_argument("--seeds", type=int, help="runs of each row; as in the config by default")
    parser.add_argument("--option", default="", help="a reading of the paper, such as as_released")
    parser.add_argument("--workdir", help="where the runs are kept; runs/TABLE by default")
    rehearsal.add_option(parser)
    known, overrides = parser.parse_known_args(arguments)
    configs = find_configs(known.table)
    if known.seeds is not None:
        overrides.append(f"--config.seeds={known.seeds}")
    rehearsed = "rehearsal" * (known.rehearse is not None)
    if known.workdir is None:
        parts = filter(None, (known.table, known.option, rehearsed))
        known.workdir = Path("runs") / "-".join(parts)
    started = time.perf_counter()
    with command.readable_errors(NonFiniteLossError, goes_on=True):
        table = load_table(known.table, configs)
        rows = choose_rows(table, [name for name in known.rows.split(",") if name])
        if rehearsed:
            told = (known.workdir, configs, known.option, overrides, known.rehearse)
            print(f"\n{rehearsal.markdown(rehearse(table, rows, *told))}")
            print(f"Losses: {files.expanded(known.workdir) / 'rehearsal.png'}")
            return
        try:
            lines = reproduce(table, rows, known.workdir, configs, known.option, overrides)
        except InterruptedRunError as stopped:
            print(stopped, flush=True)
            sys.exit(stopped.status)
    print(f"\n{table['title']}\n\n{_note(overrides)}{markdown(lines, table)}\n")
    seconds = time.perf_counter() - started
    drawn = files.expanded(known.workdir) / "table.png"
    print(f"{seconds:.0f} s; curves: {drawn}, and in each row's directory")


if __name__ == "__main__":
    main()
