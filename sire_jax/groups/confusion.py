"""Confusion matrices: how often one label is taken for another; checked, read and written."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sire_jax import files
from sire_jax.text import listed


def check_confusion(confusion: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Checks a confusion matrix.

    Args:
        confusion: ``[classes, classes]``, a row for each true label, a column for each prediction.
        names: The names of the labels; default: their numbers.

    Raises:
        ValueError: If it is not square, not finite, negative somewhere, or a row is empty.
    """
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or not confusion.size:
        raise ValueError(
            f"The confusion matrix has the shape {confusion.shape}; it should be square, with a row"
            " for each true label and a column for each prediction."
        )
    names = [str(i) for i in range(len(confusion))] if names is None else names
    if len(names) != len(confusion):
        raise ValueError(
            f"There are {len(names)} names of classes for the {len(confusion)} labels of the"
            " confusion matrix; there should be one for each."
        )
    wrong = ~(np.isfinite(confusion) & (confusion >= 0))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"The confusion matrix holds {wrong.sum()} values that are no counts: the first is"
            f" {confusion[row, column]}, in the row of '{names[row]}' and the column of"
            f" '{names[column]}'; they should be finite and at least 0."
        )
    empty = [names[i] for i in np.flatnonzero(confusion.sum(1) == 0).tolist()]
    if empty:
        raise ValueError(
            f"The confusion matrix has empty rows: {listed(empty)}; each label should have been"
            " classified at least once."
        )


def read(path: str | Path) -> tuple[np.ndarray, list[str] | None]:
    """Reads a confusion matrix.

    Args:
        path: A ``.npy`` file, or a ``.csv`` file with a row a line; its first line may name the
            labels.

    Returns:
        ``[classes, classes]``, float64, not yet checked; and the names, if it has any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    path = files.expanded(path)
    readers: dict[str, Any] = {".npy": _read_npy, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"--matrix is {path}; it should be a file .npy or .csv.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with a confusion matrix.")
    try:
        return readers[path.suffix](path)
    # There is no end to what a header, damaged or made so, makes NumPy raise.
    except Exception as error:
        raise ValueError(f"{path} holds no matrix of numbers: {error}.") from None


def write(path: Path, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Writes counts so that ``read`` reads them.

    Args:
        path: A ``.csv`` file.
        confusion: ``[classes, classes]``, whole numbers.
        names: The names of the labels, the first line.

    Raises:
        OSError: If it can't be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *confusion.astype(int).tolist()])
    files.replace(path, text.getvalue())


def _read_npy(path: Path) -> tuple[np.ndarray, None]:
    with path.open("rb") as file:
        matrix = np.lib.format.read_array(file, allow_pickle=False)
    if matrix.dtype.kind not in "iuf":
        raise ValueError(f"its values are {matrix.dtype}")
    return matrix.astype(np.float64), None


def _read_csv(path: Path) -> tuple[np.ndarray, list[str] | None]:
    rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    # A square of numbers has as many rows as columns, and one more with names.
    names = rows.pop(0) if rows and len(rows) == len(rows[0]) + 1 else None
    numbers = [[float(cell) for cell in row] for row in rows]
    lengths = sorted({len(row) for row in numbers})
    if len(lengths) > 1:
        raise ValueError(f"its rows have {lengths[0]} to {lengths[-1]} numbers")
    return np.array(numbers, np.float64), names
