r"""Trains rows of the papers' tables in slices of time, those that are worth most an hour first.

    python launch/rows.py --workdir=runs/rows --minutes=10 --config.data.dir=DIR
    python launch/rows.py --list  # which rows, in which order

For an accelerator that is lent in pieces: each start trains for at most so many minutes, saves, and
ends with status 85; the same command goes on, bit for bit, until it ends with 0, as all rows are
trained. ``launch/rows.json`` has the rows, as the papers have them, full schedules on CIFAR-100; a
queue of one's own is ``--queue=FILE``. The worth of a row is how many figures the paper prints of
it; its cost, the operations of its training. Each row is ``python -m sire_jax.reproduce``, in
``WORKDIR/TABLE``, with the paper's figures beside ours in its ``table.md``. ``--bfloat16`` trains
the rows of SIRe, whose page says what that changes, in half precision.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sire_jax import files, paper_tables, text
from sire_jax.job import command
from sire_jax.storage.workdir import Workdir, read_results

_ROWS = Path(__file__).with_suffix(".json")
# Seconds that saving takes, which a slice leaves.
_SAVING = 20.0
# What clusters end programs with.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Row:
    """A row of a table, in the queue.

    Attributes:
        table: The table.
        row: What the row is called.
        figures: How many figures the paper prints of it.
        flop: Operations of the training of one seed: the forward passes, and backward ones of twice
            as many, of multi-way backpropagation one for each output; a multiply-add is two.
        bfloat16: The override by which it trains in half precision, ``""`` if it should not.
    """

    table: str
    row: str
    figures: int
    flop: float
    bfloat16: str = ""

    @property
    def worth(self) -> float:
        """Figures for 1e15 operations."""
        return 1e15 * self.figures / self.flop

    def arguments(self, workdir: Path, half: bool) -> list[str]:
        """Returns those of ``sire_jax.reproduce``.

        Args:
            workdir: Of the queue.
            half: Whether rows that can train in bfloat16 do.
        """
        own = [f"--table={self.table}", f"--rows={self.row}", f"--workdir={workdir / self.table}"]
        return [*own, self.bfloat16] if half and self.bfloat16 else own


def read(path: Path) -> list[Row]:
    """Reads a queue, the rows that are worth most first.

    Args:
        path: A JSON file: ``[{"table", "row", "figures", "flop"}, …]``.

    Raises:
        ValueError: If an entry has other keys, names a row that is not there, or costs nothing.
    """
    rows = []
    for entry in json.loads(path.read_text()):
        try:
            row = Row(**entry)
        except TypeError as error:
            raise ValueError(
                f"{path}: the entry {entry} should have 'table', 'row', 'figures' and 'flop', and"
                " may have 'bfloat16'."
            ) from error
        if not row.flop > 0:
            raise ValueError(f"{path}: {entry} has flop {row.flop}; it should be above 0.")
        table = paper_tables.load_table(row.table, paper_tables.find_configs(row.table))
        paper_tables.choose_rows(table, [row.row])
        rows.append(row)
    return sorted(rows, key=lambda row: -row.worth)


def describe(rows: Sequence[Row], teraflops: float) -> str:
    """Writes the queue as a table.

    Args:
        rows: Its rows.
        teraflops: What a device does of these networks, in 1e12 operations a second.
    """
    heads = ["table", "row", "figures", "1e15 operations a seed", "figures for 1e15"]
    lines = [[*heads, f"hours at {teraflops:g} TFLOP/s"]]
    for row in rows:
        seconds = row.flop / teraflops / 1e12
        cost = [f"{row.flop / 1e15:.1f}", f"{row.worth:.2f}", f"{seconds / 3600:.2f}"]
        lines.append([row.table, row.row, str(row.figures), *cost])
    return text.align(lines)


def run(
    rows: Sequence[Row], workdir: Path, overrides: Sequence[str], minutes: float, half: bool
) -> int:
    """Trains rows until they are done or the time is up.

    Args:
        rows: The rows, in their order.
        workdir: Where each table has a directory.
        overrides: Further arguments of ``sire_jax.reproduce``.
        minutes: The slice.
        half: Whether rows that can train in bfloat16 do.

    Returns:
        The status: 0, all are done; 85, saved; that of the first row that failed, once the others
        are done.

    Raises:
        ValueError: If a row that is done was trained with another config; before any trains.
    """
    ends, failed = time.monotonic() + 60 * minutes - _SAVING, 0
    done = [row for row in rows if read_results(workdir / row.table / row.row)]
    for row in done:
        Workdir(workdir / row.table / row.row, _config(row, workdir, overrides, half))
    for number, row in enumerate(rows, start=1):
        if row in done:
            continue
        if time.monotonic() >= ends:
            status = command.AGAIN
        else:
            print(f"{number}/{len(rows)}  {row.table}/{row.row}", flush=True)
            arguments = [*row.arguments(workdir, half), *overrides]
            status = _run(["-m", "sire_jax.reproduce", *arguments], ends)
        if status in (command.AGAIN, command.INTERRUPTED):
            print(f"Saved; the same command goes on with {row.table}/{row.row}.", flush=True)
            return status
        failed = failed or status
    return failed


def _config(row: Row, workdir: Path, overrides: Sequence[str], half: bool) -> ConfigDict:
    """Returns the config that a row would be trained with."""
    configs = paper_tables.find_configs(row.table)
    table = paper_tables.load_table(row.table, configs)
    (entry,) = paper_tables.choose_rows(table, [row.row])
    # As `sire_jax.reproduce` takes them.
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds")
    parser.add_argument("--option", default="")
    given = [*row.arguments(workdir, half), *overrides]
    options, settings = parser.parse_known_args(given)
    settings = [each for each in settings if each.startswith("--config.")]
    if options.seeds is not None:
        settings.append(f"--config.seeds={options.seeds}")
    return paper_tables.row_config(table, entry, configs, options.option, settings)


class _ToldError(Exception):
    """A signal asked this program to end."""


def _told(number: int, frame: Any) -> None:
    raise _ToldError


def _run(arguments: Sequence[str], ends: float) -> int:
    """Runs a Python program until it ends, or tells it to save where the time is up."""
    process = subprocess.Popen([sys.executable, *arguments])
    before = {number: signal.signal(number, _told) for number in _ENDING}
    try:
        return process.wait(max(0.0, ends - time.monotonic()))
    except KeyboardInterrupt:
        # A terminal has told it, too.
        process.wait()
        return command.INTERRUPTED
    except (_ToldError, subprocess.TimeoutExpired):
        process.send_signal(signal.SIGTERM)
        process.wait()
        # Whether it has saved, or ended before there was anything to save.
        return command.AGAIN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", type=files.expanded, help="where each table has a directory")
    parser.add_argument("--queue", type=Path, default=_ROWS, help="JSON; launch/rows.json")
    parser.add_argument("--minutes", type=float, default=10, help="a slice, saving included")
    parser.add_argument("--list", action="store_true", help="only show the rows, in their order")
    parser.add_argument("--teraflops", type=float, default=20, help="of the device, for --list")
    parser.add_argument("--bfloat16", action="store_true", help="of rows that can train in it")
    options, overrides = parser.parse_known_args(arguments)
    if options.minutes * 60 <= _SAVING:
        parser.error(f"--minutes is {options.minutes:g}; saving alone takes {_SAVING:.0f} s")
    if options.workdir is None and not options.list:
        parser.error("--workdir is needed, where the runs are kept")
    with command.readable_errors(goes_on=True):
        rows = read(options.queue)
        if options.list:
            print(describe(rows, options.teraflops))
            return
        sys.exit(run(rows, options.workdir, overrides, options.minutes, options.bfloat16))


if __name__ == "__main__":
    main()
