"""Tables that papers print, as data: their rows as configs, our figures beside the papers'."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sire_jax import configuration, registry, text
from sire_jax.runs import divergence
from sire_jax.runs.divergence import DIVERGED

Table = dict[str, Any]
# Of a column: the paper's figure, ours, their difference.
Figure = dict[str, Any]
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
    tables = {path.stem: path for path in (configs / _TABLES).glob("*.json")}
    return json.loads(registry.choose(tables, name, "table").read_text())


def identity(row: Mapping[str, Any]) -> str:
    """Returns what a row is called on the command line and in the workdir.

    >>> identity({"variant": "cnn"}), identity({"variant": "cnn", "id": "cnn_small"})
    ('cnn', 'cnn_small')

    Args:
        row: A row of a table.
    """
    return row.get("id", row["variant"])


def choose_rows(table: Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """Picks rows by their names, all if no name is given.

    >>> table = {"rows": [{"variant": "cnn"}, {"variant": "cnn_base"}]}
    >>> choose_rows(table, ["cnn_base"])
    [{'variant': 'cnn_base'}]

    Args:
        table: The table.
        names: What the rows are called (``identity``).

    Raises:
        ValueError: If there is no such row.
    """
    rows = {identity(row): row for row in table["rows"]}
    return [registry.choose(rows, name, "row") for name in names] or table["rows"]


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
    settings = ["--config.on_diverged=record", *row.get("overrides", []), *overrides]
    return configuration.load(f"{configs / table['config']}:{variant}", settings)


def compare(
    row: Mapping[str, Any],
    table: Table,
    results: Mapping[str, Any],
    parameters: int = 0,
    reference: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Puts a row's figures beside the paper's.

    >>> columns = {"accuracy": {"split": "test", "metric": "main/top_1", "percent": True}}
    >>> row = {"name": "CNN", "variant": "cnn", "accuracy": [82.0, 0.5]}
    >>> results = {"splits": {"test": {"main/top_1": [0.81, 0.83, 0.85]}}, "seconds": 60.0}
    >>> line = compare(row, {"columns": columns}, results)
    >>> round(line["accuracy"]["difference"], 3), round(line["accuracy"]["deviations"], 3)
    (1.0, 2.0)
    >>> print(markdown([line], {"columns": columns}))
    | row | accuracy, paper | ours           | difference       | seconds |
    | --- | --------------- | -------------- | ---------------- | ------- |
    | CNN | 82.000 ± 0.500  | 83.000 ± 2.000 | +1.000 (+2.0 sd) | 60      |

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
                runs = [100 * (1 - value) for value in runs]
            elif runs is not None and kind.get("percent"):
                runs = [100 * value for value in runs]
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
    seconds, reference_seconds = (run.get("step_seconds") for run in (results, reference[1]))
    return _figure(paper, [seconds / reference_seconds] if seconds and reference_seconds else None)


def _figure(paper: Any, runs: list[float] | None) -> Figure:
    """Compares the paper's mean, or mean and deviation, with our runs."""
    if paper is not None and not isinstance(paper, list):
        paper = [paper, None]
    if runs is None:
        return dict.fromkeys(("ours", "difference", "deviations", "runs")) | {"paper": paper}
    mean, deviation = text.spread(runs)
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
    return text.align(rows)


def _cells(figure: Figure, has_paper: bool, form: str) -> list[str]:
    several = figure["runs"] is not None and len(figure["runs"]) > 1
    # The deviation of a single run is 0, which would look like a measurement.
    ours = _number(figure["ours"] if several else (figure["ours"] or [None])[:1], form)
    if not has_paper:
        return [ours]
    if figure["difference"] is None:
        return [_number(figure["paper"], form), ours, ""]
    far = "" if figure["deviations"] is None else f" ({figure['deviations']:+.1f} sd)"
    return [_number(figure["paper"], form), ours, f"{figure['difference']:+{form}}{far}"]


def note(overrides: Sequence[str], option: str = "") -> str:
    r"""Says what makes a table another one than the paper's.

    >>> note(["--config.data.dir=/data", "--config.epochs=5"], "small")
    'Option: small\n\nOverrides: --config.epochs=5\n\n'

    Args:
        overrides: ``--config.a.b=value`` each.
        option: One of the table's options, or "".
    """
    # Where the data lie changes no figure.
    settings = [override for override in overrides if not override.startswith("--config.data.dir=")]
    chosen = f"Option: {option}\n\n" if option else ""
    return chosen + (f"Overrides: {' '.join(settings)}\n\n" if settings else "")


def _number(value: Sequence[float | None] | None, form: str) -> str:
    """Writes a mean, with its deviation if there is one."""
    return " ± ".join(f"{figure:{form}}" for figure in value or [] if figure is not None)
