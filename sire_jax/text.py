"""Text that people read: names in error messages, and tables of figures."""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np


def nearest(name: str, names: Iterable[str]) -> str:
    """Ends an error message on a mistyped name: `` Did you mean 'x'? Known: …``.

    >>> print("There is no loss 'focl'." + nearest("focl", ("mse", "focal")))
    There is no loss 'focl'. Did you mean 'focal'? Known: focal, mse.

    Args:
        name: What somebody wrote.
        names: What there is.
    """
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


def listed(names: Sequence[str], most: int = 10) -> str:
    """Lists names in an error message, not all of very many.

    >>> listed(["exit_1", "exit_2", "main"], most=2)
    "'exit_1', 'exit_2' and 1 more"

    Args:
        names: The names.
        most: How many of them at most.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{printable(name)}'" for name in names[:most]) + more


def printable(text: str) -> str:
    r"""Writes a file name of any bytes so that it can be printed: odd characters as escapes.

    >>> print(printable("a\nb ü"))
    a\nb ü

    Args:
        text: The name.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def spread(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the mean and the standard deviation over runs (of the sample; 0 for one run).

    >>> spread([1.0, 2.0, 3.0]), spread([0.5])
    ((2.0, 1.0), (0.5, 0.0))

    Args:
        values: A value for each run.
    """
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def align(rows: Sequence[Sequence[str]]) -> str:
    """Writes rows of cells, the first of them the header, as a Markdown table.

    >>> print(align([["output", "top_1"], ["main", "0.9"]]))
    | output | top_1 |
    | ------ | ----- |
    | main   | 0.9   |

    Args:
        rows: Cells; every row has as many as the header.

    Returns:
        Lines of equal length.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Writes a measurement with four decimals, a small one in powers of ten.

    >>> number(0.98765), number(0.00012)
    ('0.9877', '1.2e-04')

    Args:
        value: The measurement.
    """
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
