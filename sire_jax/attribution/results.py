"""What came of it: values with intervals, as a table."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sire_jax.text import align


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and where the mean of all seeds lies, by Student's t.

    Attributes:
        mean: Of the seeds.
        low: The least mean that fits.
        high: The greatest.
        seeds: How many there were; of one nothing is known, and ``low`` and ``high`` are infinite.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, samples: Any, confidence: float = 0.95) -> "Interval":
        """Makes the interval of independent samples.

        >>> interval = Interval.of([1.0, 2.0, 3.0])
        >>> round(interval.low, 2), interval.mean, round(interval.high, 2)
        (-0.48, 2.0, 4.48)

        Args:
            samples: ``[seeds]``.
            confidence: In (0, 1).
        """
        samples = np.asarray(samples, np.float64)
        mean, number = float(samples.mean()), len(samples)
        if number < 2:
            return cls(mean, -math.inf, math.inf, number)
        # A second that only those wait who have values.
        from scipy import stats

        error = float(samples.std(ddof=1)) / math.sqrt(number)
        half = float(stats.t.ppf((1 + confidence) / 2, number - 1)) * error
        return cls(mean, mean - half, mean + half, number)


@dataclass(frozen=True)
class Attribution:
    """What each auxiliary objective is worth, for each seed.

    Attributes:
        metric: What is measured of the main output.
        values: The metric by subset of the objectives, joined by ``"+"``, ``""`` of none: the heads
            are there and silent. A list over seeds for each.
        effective: The metric of the main objective alone with the weights of all, ``[seeds]``: what
            larger steps would do by themselves.
        worth: Shapley values by objective, ``[seeds]``.
        pairs: Interactions by two objectives, joined by ``"+"``; none of a sample.
        sampled: Whether the values are estimates from a sample of orders.
    """

    metric: str
    values: dict[str, list[float]]
    effective: list[float]
    worth: dict[str, list[float]]
    pairs: dict[str, list[float]]
    sampled: bool

    def rows(self) -> list[list[str]]:
        """Returns a table: each objective, each two, all together and the control."""
        silent, names = self.values[""], "+".join(sorted(self.worth))
        together = np.subtract(self.values[names], silent)
        effective = np.subtract(self.effective, silent)
        named = {
            "main output alone": (silent, ""),
            **{name: (values, "+") for name, values in self.worth.items()},
            **{f"{pair}, together beyond each": (v, "+") for pair, v in self.pairs.items()},
            "all together": (together, "+"),
            "main output alone, with the weights of all": (effective, "+"),
        }
        rows = [[self.metric, "mean", "95% interval", "seeds"]]
        for name, (samples, sign) in named.items():
            interval = Interval.of(samples)
            unknown = not math.isfinite(interval.low)
            low, high = (f"{edge:{sign}.4f}" for edge in (interval.low, interval.high))
            between = "unknown of one seed" if unknown else f"{low} to {high}"
            rows.append([name, f"{interval.mean:{sign}.4f}", between, str(interval.seeds)])
        return rows

    def __str__(self) -> str:
        return align(self.rows())
