"""Decides the claims of a table by adding seeds: ``python -m sire_jax.reproduce --decide=30 …``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sire_jax import claims, configuration, files, paper_tables, registry, rehearsal, text
from sire_jax.claims import Claim, Judged
from sire_jax.configuration import experiment
from sire_jax.reproduce import load_rows, machine, reproduce
from sire_jax.storage.workdir import check_writable

# Of each row and column that of each seed.
Figures = dict[tuple[str, str], list[float]]
# Of a rehearsal that tells how long a row takes; the first compiles.
_STEPS = 4


def cost(
    table: paper_tables.Table,
    rows: Sequence[Mapping[str, Any]],
    configs: Path,
    option: str = "",
    overrides: Sequence[str] = (),
) -> dict[str, float | None]:
    """Tells how many hours one seed of each row takes, by some steps of it; nothing is measured.

    ``None`` of a row whose steps diverge, or that is too large for this machine.

    Args:
        table: The table.
        rows: Its rows.
        configs: The directory of the configs.
        option: One of the table's options, or "".
        overrides: ``--config.a.b=value`` each.

    Raises:
        ValueError: If a config is wrong; it names the row.
    """
    hours = {}
    one = [*overrides, "--config.seeds=1"]
    for name, config in load_rows(table, rows, configs, option, one).items():
        with registry.located(f"The row '{name}'"):
            parts = experiment.build(configuration.with_groups(config, dealt=True))
            hours[name] = rehearsal.rehearse(parts, _STEPS).hours()
    return hours


def describe_cost(hours: Mapping[str, float | None], most: int) -> str:
    """Says what a decision will cost.

    >>> describe_cost({"aux": 0.25, "bare": 0.25}, most=20)
    'A seed of 2 rows takes about 0.50 h without measurements; decisions take 5 to 20: 2.5 to 10 h.'
    """
    known = [each for each in hours.values() if each is not None]
    total, least = sum(known), min(claims.fewest(), most)
    unknown = [name for name, each in hours.items() if each is None]
    rest = f" Without {', '.join(unknown)}, of which it is not known." * bool(unknown)
    return (
        f"A seed of {len(hours)} rows takes about {total:.2f} h without measurements; decisions"
        f" take {least} to {most}: {least * total:.2g} to {most * total:.2g} h.{rest}"
    )


def decide(
    table: paper_tables.Table,
    workdir: str | Path,
    configs: Path,
    option: str = "",
    overrides: Sequence[str] = (),
    most: int = 30,
) -> list[Judged]:
    """Trains the rows of a table's claims, a seed after the other, until all claims are decided.

    Rows of a claim have the same seeds: the same order of examples, and the same initial weights as
    far as networks share them. Those of which all claims are decided are trained no further. Each
    seed has a directory of its own, in which what was trained is not trained again: the same
    command goes on after an interruption, and with a higher ``most`` from where it ended.

    Args:
        table: The table, with ``"claims"``.
        workdir: Where the seeds' directories are, and ``claims.json``, ``claims.md`` and
            ``claims.png``, written after each seed.
        configs: The directory of the configs.
        option: One of the table's options.
        overrides: ``--config.a.b=value`` each, for all rows.
        most: The bound of the cost: the most seeds.

    Returns:
        What is decided of each claim.

    Raises:
        ValueError: If the table has no claims, or one does not fit it, ``most`` is below 1, or as
            ``reproduce`` raises.
        PermissionError: If the workdir can't be written to.
    """
    chosen = claims.read(table, [paper_tables.identity(row) for row in table["rows"]])
    if most < 1:
        raise ValueError(f"--decide is {most}; it should be at least 1 seed.")
    if own := [o for o in overrides if o.startswith(("--config.seed=", "--config.seeds="))]:
        raise ValueError(f"--decide takes the seeds 0, 1, … by itself; leave out {own[0]}.")
    workdir = check_writable(workdir)
    figures: Figures = {}
    seconds: dict[str, list[float]] = {}
    judged = [claims.judge(claim, []) for claim in chosen]
    for seed in range(most):
        undecided = [decision.claim for decision in judged if not decision.decided]
        if not undecided:
            break
        of_seed = [*overrides, f"--config.seed={seed}", "--config.seeds=1"]
        directory = workdir / f"seed_{seed}"
        directory.mkdir(exist_ok=True)
        rows = rows_of(undecided, table)
        lines = reproduce(table, rows, directory, configs, option, of_seed)
        of_rows = {line["variant"]: line for line in lines}
        _add(figures, undecided, of_rows)
        for row in map(paper_tables.identity, rows):
            seconds.setdefault(row, []).append(of_rows[row]["seconds"])
        judged = [_judge_anew(decision, figures) for decision in judged]
        _write(workdir, table, judged, figures, seconds, option, overrides)
        decided = sum(decision.decided for decision in judged)
        print(f"Seed {seed}: {decided} of {len(judged)} claims decided.", flush=True)
    return judged


def rows_of(chosen: Sequence[Claim], table: paper_tables.Table) -> list[dict[str, Any]]:
    """Returns the rows that claims are about, in the table's order."""
    names = {name for claim in chosen for name in (claim.row, claim.than)}
    return [row for row in table["rows"] if paper_tables.identity(row) in names]


def _add(figures: Figures, chosen: Sequence[Claim], lines: Mapping[str, Any]) -> None:
    """Adds what claims need of a seed; what diverged has no figure, and is no number."""
    for row, column in sorted({side for claim in chosen for side in claim.sides()}):
        line = lines[row]
        if (runs := line[column]["runs"]) is None:
            raise ValueError(f"The row '{row}' has no figure '{column}'.")
        diverged = any(step is not None for step in line.get("diverged", []))
        figures.setdefault((row, column), []).append(math.nan if diverged else float(runs[0]))


def _judge_anew(decision: Judged, figures: Figures) -> Judged:
    # The first verdict counts: to look on would be to look for another.
    if decision.decided:
        return decision
    return claims.judge(decision.claim, decision.claim.differences(figures))


def markdown(judged: Sequence[Judged]) -> str:
    """Writes claims, with the paper's figure, ours and the verdict."""
    rows = [["claim", "paper", "ours", "95% interval, at all looks", "seeds", "verdict"]]
    for decision in judged:
        known = math.isfinite(decision.low) and math.isfinite(decision.high)
        interval = (
            f"{decision.low:+.3g} to {decision.high:+.3g}" if known else "none of so few seeds"
        )
        more = f" (about {decision.needed} seeds may decide)" if decision.needed else ""
        rows.append(
            [
                str(decision.claim),
                _printed(decision.claim),
                f"{decision.mean:+.3g}",
                interval,
                str(decision.seeds),
                decision.verdict + more,
            ]
        )
    return text.align(rows)


def _printed(claim: Claim) -> str:
    """Writes the paper's figure, and where it is if it is in another table."""
    figure = f"{claim.by:+g}" if claim.by else "no figure"
    return f"{figure} ({claim.source})" if claim.source else figure


def draw(judged: Sequence[Judged]) -> Figure:
    """Draws the interval of each claim, beside the paper's figure."""
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(judged)))
    axes: Axes = figure.add_subplot()
    colours = {"confirmed": "#009E73", "smaller": "#E69F00", "refuted": "#D55E00"}
    for place, decision in enumerate(judged):
        colour = colours.get(decision.verdict, "#777777")
        half = decision.high - decision.mean
        error = half if math.isfinite(half) else None
        axes.errorbar(decision.mean, place, xerr=error, marker="o", capsize=3, color=colour)
        if decision.claim.by:
            axes.plot(decision.claim.by, place, "kD", fillstyle="none")
        axes.annotate(
            f"{decision.verdict}, {decision.seeds} seeds",
            (decision.mean, place),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=colour,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [str(decision.claim).replace(" better", "\nbetter") for decision in judged]
    axes.set_yticks(range(len(judged)), labels, fontsize=8)
    axes.set_ylim(len(judged) - 0.4, -0.6)
    axes.set_xlabel("better by; diamond: the paper's")
    figure.tight_layout()
    return figure


def _write(
    workdir: Path,
    table: paper_tables.Table,
    judged: Sequence[Judged],
    figures: Figures,
    seconds: Mapping[str, list[float]],
    option: str,
    overrides: Sequence[str],
) -> None:
    note = paper_tables.note(overrides, option)
    page = f"{table['title']}: claims\n\n{note}{markdown(judged)}\n"
    files.replace(workdir / "claims.md", page)
    by_column: dict[str, dict[str, list[float | None]]] = {}
    for (row, column), values in figures.items():
        by_column.setdefault(column, {})[row] = [_finite(value) for value in values]
    details = {
        "title": table["title"],
        "option": option,
        "overrides": list(overrides),
        **machine(),
        "claims": [_details(decision) for decision in judged],
        "figures": by_column,
        "seconds": seconds,
    }
    files.replace(workdir / "claims.json", json.dumps(details, indent=1) + "\n")
    draw(judged).savefig(workdir / "claims.png", dpi=130)


def _details(decision: Judged) -> dict[str, Any]:
    return jax.tree.map(_finite, asdict(decision))


def _finite(value: Any) -> Any:
    """Returns what JSON can hold of a number that is none, or without bounds."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
