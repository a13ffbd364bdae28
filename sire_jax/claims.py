"""Claims of papers that are decided by adding seeds: intervals that hold however often one looks.

A claim says that one row of a table is better than another, and by how much. Both are trained with
the same seeds; what is judged are the differences within seeds. After each seed there is an
interval that holds the true mean difference with a chance of 95%, *at all looks together*, so that
one may stop as soon as it decides.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIRMED, SMALLER, REFUTED, OPEN = "confirmed", "smaller", "refuted", "undecided"
# Whether there is an effect at all is not known yet; if there is, it is below the paper's.
LESS = "less, maybe none"
# A seed without a figure: to leave it out would favour the row that diverges.
DIVERGED = "diverged"
# The deviation of the mixture over standardized effects: differences about as large as what seeds
# do to them are found soonest.
_EFFECT = 1.0
# Seeds that are foretold, at most.
_MOST = 10_000


def half_width(deviation: float, number: int, error: float = 0.05) -> float:
    """Returns half the width of an interval that holds at all looks together.

    Of ``n`` normal differences with mean m and deviation s, ``t = sqrt(n) (m - mu) / s``, and

        ``E_n(mu) = r^(-1/2) ((1 + t^2 / (n - 1)) / (1 + t^2 / (r (n - 1))))^(n / 2)``,

    ``r = 1 + n c^2``, is a martingale of mean 1 at the true mu: a likelihood ratio that is mixed
    over effects ``N(0, c^2)`` in units of the deviation (Lai, 1976; Wang and Ramdas, *Anytime-valid
    t-tests and confidence sequences for Gaussian means with unknown variance*, 2023). It exceeds
    ``1 / error`` ever with a chance of at most ``error`` (Ville): those mu are out.

    >>> round(half_width(1.0, 10), 3)  # of 10 looked at once: 0.715
    1.224
    >>> half_width(1.0, 4)  # of so few it says nothing
    inf

    Args:
        deviation: s, with n - 1 in the denominator.
        number: n, at least 1.
        error: The chance that the true mean is ever outside, in (0, 1).
    """
    if number < 2:
        return math.inf
    ratio = 1 + number * _EFFECT**2
    least = (math.sqrt(ratio) / error) ** (2 / number)
    if least >= ratio:
        return math.inf
    squared = (number - 1) * (least - 1) / (1 - least / ratio)
    return math.sqrt(squared / number) * deviation


def fewest(error: float = 0.05) -> int:
    """Returns the fewest seeds after which an interval is finite.

    >>> fewest()
    5
    """
    return next(n for n in range(2, 1000) if math.isfinite(half_width(1.0, n, error)))


@dataclass(frozen=True)
class Claim:
    """That one row of a table is better than another.

    Attributes:
        row: The better row.
        than: The other, or the same.
        column: By the figure of this column of the table.
        by: By how much in the paper, in the column's unit; 0: it prints no figure, only that.
        lower: Whether less is better, as of errors.
        than_column: The column of the other; "" for the same.
        source: Where the paper has it; "" in this table.
    """

    row: str
    than: str
    column: str
    by: float
    lower: bool
    than_column: str = ""
    source: str = ""

    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Returns ``(row, column)`` of the better figure and of the other."""
        return (self.row, self.column), (self.than, self.than_column or self.column)

    def differences(self, figures: Mapping[tuple[str, str], Sequence[float]]) -> list[float]:
        """Returns by how much the row is better, for each seed that both have.

        Args:
            figures: By row and column that of each seed, in their order.
        """
        sign = -1 if self.lower else 1
        better, other = (figures.get(side, ()) for side in self.sides())
        return [sign * (a - b) for a, b in zip(better, other, strict=False)]

    def __str__(self) -> str:
        (better, column), (other, other_column) = self.sides()
        if column == other_column:
            return f"{better} better than {other}, {column}"
        return f"{better} ({column}) better than {other} ({other_column})"


def read(table: Mapping[str, Any], rows: Sequence[str]) -> list[Claim]:
    """Reads the claims of a table.

    Args:
        table: With ``"claims"``: ``[{"row", "better_than", "column", "by"}, …]``; with
            ``"than_column"``, too, where the other's figure is in another column, without ``"by"``
            where the paper prints no figure, and with ``"source"`` where that is elsewhere.
        rows: What its rows are called.

    Raises:
        ValueError: If it has none, or one has other keys, names a row or a column that is not
            there, compares a figure with itself or an error with an accuracy, or has a difference
            that is not above 0.
    """
    if not table.get("claims"):
        raise ValueError("The table has no claims to decide; give it some under 'claims'.")
    return [_read(section, table["columns"], rows) for section in table["claims"]]


def _read(section: Mapping[str, Any], columns: Mapping[str, Any], rows: Sequence[str]) -> Claim:
    keys, needed = set(section), {"row", "better_than", "column"}
    if not needed <= keys or keys - needed - {"by", "than_column", "source"}:
        raise ValueError(
            f"The claim {section} should have 'row', 'better_than' and 'column', and may have 'by',"
            " 'than_column' and 'source'."
        )
    by = section.get("by")
    number = isinstance(by, int | float) and not isinstance(by, bool)
    if by is not None and not (number and 0 < by < math.inf):
        raise ValueError(
            f"The claim {section} has by {by}; it should be above 0, or left out where the paper"
            " has no figure."
        )
    names = section["column"], section.get("than_column", section["column"])
    known = all("metric" in columns.get(name, ()) for name in names)
    if not known or not {section["row"], section["better_than"]} <= set(rows):
        raise ValueError(
            f"The claim {section} should name two rows of the table and columns of metrics."
        )
    lower, other_lower = (_is_lower_better(columns[name]) for name in names)
    claim = Claim(
        section["row"],
        section["better_than"],
        section["column"],
        by or 0.0,
        lower,
        section.get("than_column", ""),
        section.get("source", ""),
    )
    better, other = claim.sides()
    if better == other or lower != other_lower:
        raise ValueError(
            f"The claim {section} should compare two figures, both of which should be errors or"
            " neither."
        )
    return claim


def _is_lower_better(column: Mapping[str, Any]) -> bool:
    return bool(column.get("error_percent")) or column["metric"].endswith("/loss")


@dataclass(frozen=True)
class Judged:
    """What seeds say of a claim.

    Attributes:
        claim: The claim.
        mean: The mean difference, in the claim's direction.
        low: Where its interval begins.
        high: Where it ends.
        seeds: How many seeds were looked at.
        needed: About how many seeds decide, if the mean and the deviation are what they seem.
        verdict: ``"confirmed"``: above 0, and as large as the paper's may be; ``"smaller"``: above
            0 and below the paper's; ``"refuted"``: below 0; ``"less, maybe none"``: below the
            paper's, and above 0 or not, which further seeds may tell; ``"undecided"``;
            ``"diverged"``: a seed of either row has no figure.
    """

    claim: Claim
    mean: float
    low: float
    high: float
    seeds: int
    needed: int | None
    verdict: str

    @property
    def decided(self) -> bool:
        """Whether there is a verdict."""
        return self.verdict not in (OPEN, LESS)


def judge(claim: Claim, differences: Sequence[float], error: float = 0.05) -> Judged:
    """Judges a claim by the differences of seeds, which may be done after each of them.

    >>> claim = Claim("aux", "bare", "accuracy", by=1.0, lower=False)
    >>> judge(claim, [1.3, 0.7, 1.1, 0.8, 1.2, 0.9, 1.0]).verdict
    'confirmed'
    >>> judge(claim, [0.2, -0.1, 0.1, -0.2, 0.1, -0.1, 0.0]).verdict
    'less, maybe none'

    Args:
        claim: The claim.
        differences: Of each seed, in the claim's direction.
        error: The chance of a wrong verdict, ever: of "confirmed", "smaller" or "refuted" where
            the true mean is 0, of "smaller", "less" or "refuted" where it is the paper's.
    """
    number = len(differences)
    if not np.isfinite(differences).all():
        return Judged(claim, math.nan, -math.inf, math.inf, number, None, DIVERGED)
    mean = float(np.mean(differences)) if number else math.nan
    deviation = float(np.std(differences, ddof=1)) if number > 1 else math.nan
    half = half_width(deviation, number, error)
    low, high = mean - half, mean + half
    verdict = _verdict(low, high, claim.by)
    needed = _needed(mean, deviation, error) if verdict in (OPEN, LESS) else None
    return Judged(claim, mean, low, high, number, needed, verdict)


def _verdict(low: float, high: float, by: float) -> str:
    if low > 0:
        return CONFIRMED if high >= by else SMALLER
    if high < 0:
        return REFUTED
    return LESS if high < by else OPEN


def _needed(mean: float, deviation: float, error: float) -> int | None:
    """Returns after how many seeds the interval, were it to shrink around this mean, leaves 0."""
    if not math.isfinite(deviation):
        return None
    # Intervals shrink with seeds: by bisection.
    numbers = range(fewest(error), _MOST + 1)
    found = bisect.bisect_left(
        numbers, True, key=lambda number: half_width(deviation, number, error) < abs(mean)
    )
    return numbers[found] if found < len(numbers) else None
