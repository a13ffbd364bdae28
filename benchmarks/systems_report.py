"""The tables of ``benchmarks/systems.py``, from what it writes as JSON."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from devices import peak
from workers import mebibytes, number

from sire_jax.text import align

Record = Mapping[str, Any]
TITLES = {
    "ours": "sire_jax",
    "eager": "PyTorch eager",
    "compiled": "PyTorch compiled",
    "graphs": "PyTorch compiled, graphs",
}


def seconds(record: Record) -> list[float]:
    """Returns the seconds of a step in each round."""
    return [each["seconds"] for each in record["rounds"]]


def milliseconds(record: Record) -> str:
    """Writes the median of a step."""
    return number(1e3 * median(seconds(record)), 2)


def find(records: Sequence[Record], **same: Any) -> Record | None:
    """Returns the first record with these values, if it was measured."""
    return next(
        (r for r in records if not r["error"] and all(r[k] == v for k, v in same.items())), None
    )


def relative(record: Record, other: Record | None) -> str:
    """Writes how many times the other's time a contender takes: median and range over rounds."""
    if other is None:
        return "-"
    if record is other:
        return "1"
    ratios = [a / b for a, b in zip(seconds(record), seconds(other), strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def memory(record: Record) -> list[str]:
    """Writes the peak of the allocator, and what XLA plans."""
    return [mebibytes(record["rounds"][-1]["memory"]), mebibytes(record["plan"])]


def table(
    header: Sequence[str],
    records: Sequence[Record],
    names: Callable[[Record], list[str]],
    figures: Callable[[Record], list[str]],
) -> str:
    """Writes a row for each record: what it is, and what was measured, or why nothing was."""
    rows = []
    for record in records:
        cells, error = names(record), record["error"]
        missing = [""] * (len(header) - len(cells))
        measured = missing if error else figures(record)
        rows.append([*cells, *measured, f"not run: {error}" if error else ""])
    noted = any(row[-1] for row in rows)
    rows = [[*header, ""], *rows]
    return align(rows if noted else [row[:-1] for row in rows])


# ---- A table for each part.


def steps(written: Mapping[str, Any]) -> str:
    """Writes a step of each system beside PyTorch's."""
    records = written["parts"]["steps"]
    header = ["network", "contender", "dtype", "ms/step", "images/s", "/ compiled (range)"]
    header += ["TFLOP/s", "of the peak", "peak MiB", "XLA plan MiB"]

    def names(record: Record) -> list[str]:
        return [record["network"], TITLES[record["engine"]], record["dtype"]]

    def figures(record: Record) -> list[str]:
        same = {key: record[key] for key in ("network", "dtype")}
        middle, adds = median(seconds(record)), written["multiply_adds"][record["network"]]
        # A backward pass takes twice a forward pass; a multiply-add is two operations.
        speed = 6 * adds * record["batch_size"] / middle
        given = written["peak"][record["dtype"]]
        most = 1e12 * given if given else peak(record["kind"], record["dtype"])
        return [
            milliseconds(record),
            number(record["batch_size"] / middle, 0),
            relative(record, find(records, **same, engine="compiled")),
            f"{speed / 1e12:.3g}",
            f"{speed / most:.1%}" if most else "unknown card",
            *memory(record),
        ]

    return table(header, records, names, figures)


def rules(written: Mapping[str, Any]) -> str:
    """Writes each update rule and aggregator beside joint backpropagation."""
    records = written["parts"]["rules"]
    header = ["rule", "ms/step", "/ joint (range)", "required", "peak MiB", "XLA plan MiB"]

    def names(record: Record) -> list[str]:
        summed = record["aggregator"] == "sum"
        return [record["rule"] if summed else f"{record['rule']} + {record['aggregator']}"]

    def figures(record: Record) -> list[str]:
        joint = find(records, rule="joint", aggregator="sum")
        rule = "multiway" if record["aggregator"] != "sum" else record["rule"]
        required = number(written["required"][rule])
        taken = [milliseconds(record), relative(record, joint), required]
        return [*taken, *memory(record), number(record["compile_seconds"], 1)]

    return table([*header, "compile s"], records, names, figures)


def seeds(written: Mapping[str, Any]) -> str:
    """Writes what vectorized runs take, and how many fit."""
    records = written["parts"]["seeds"]
    header = ["network", "runs", "ms/step", "/ one after another", "a further run / alone"]

    def names(record: Record) -> list[str]:
        return [record["network"], str(record["seeds"])]

    def figures(record: Record) -> list[str]:
        own = [r for r in records if r["network"] == record["network"] and not r["error"]]
        time = {r["seeds"]: median(seconds(r)) for r in own}
        count, alone = record["seeds"], time.get(1)
        in_turn = further = None
        if alone:
            in_turn = time[count] / (count * alone)
        fewer = max((n for n in time if n < count), default=None)
        if alone and fewer:
            further = (time[count] - time[fewer]) / (count - fewer) / alone
        return [milliseconds(record), number(in_turn), number(further), *memory(record)]

    written_table = table([*header, "peak MiB", "XLA plan MiB"], records, names, figures)
    return f"{written_table}\n\n{fitting(records, written['memory'])}"


def fitting(records: Sequence[Record], given: int | None) -> str:
    """Writes how many runs of each network fit."""
    rows = [["network", "runs that fit", "MiB a run", "MiB in all"]]
    for network in dict.fromkeys(record["network"] for record in records):
        if found := fit(records, network, given):
            each = number(found.each / 2**20, 1)
            rows.append([network, f"{found.runs:,}", each, mebibytes(found.limit)])
    return align(rows)


class Fit(NamedTuple):
    """How many runs fit: the bytes that there are, and those of a further run."""

    runs: int
    each: float
    limit: int


def fit(records: Sequence[Record], network: str, given: int | None) -> Fit | None:
    """Returns how many runs fit, by a line through the plans of the two largest programs.

    >>> plans = {1: 300, 2: 400, 4: 600}
    >>> record = {"network": "sire", "error": "", "available": 1050}
    >>> fit([{**record, "seeds": n, "plan": plan} for n, plan in plans.items()], "sire", None)
    Fit(runs=8, each=100.0, limit=1050)

    Args:
        records: What was measured.
        network: Of which network.
        given: Bytes that there are; ``None`` for those that there were.

    Returns:
        ``None`` if fewer than two programs said what they need.
    """
    own = [r for r in records if r["network"] == network and not r["error"] and r["plan"]]
    plans = {record["seeds"]: record["plan"] for record in own}
    if len(plans) < 2:
        return None
    fewer, most = sorted(plans)[-2:]
    each = (plans[most] - plans[fewer]) / (most - fewer)
    limit = given or own[-1]["available"]
    return Fit(most + int((limit - plans[most]) // each), each, limit)


def feed(written: Mapping[str, Any]) -> str:
    """Writes steps that are fed beside steps that take one batch."""
    records = written["parts"]["feed"]
    header = ["network", "batches", "ms/step", "steps/s", "/ one batch (range)", "shuffling"]

    def names(record: Record) -> list[str]:
        return [record["network"], record["feed"]]

    def figures(record: Record) -> list[str]:
        middle = median(seconds(record))
        still = find(records, network=record["network"], feed="one batch")
        shuffle = record.get("shuffle_seconds")
        share = "-" if shuffle is None else f"{shuffle / middle:.3%}"
        return [milliseconds(record), number(1 / middle, 1), relative(record, still), share]

    return table(header, records, names, figures)


PARTS = {"steps": steps, "rules": rules, "seeds": seeds, "feed": feed}
