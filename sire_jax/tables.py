"""Tables of figures as text."""

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the mean and the standard deviation over runs (of the sample; 0 for one run)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def align(rows: Sequence[Sequence[str]]) -> str:
    """Writes rows of cells, the first of them the header, as a Markdown table.

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
    """Writes a measurement with four decimals, a small one in powers of ten."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
