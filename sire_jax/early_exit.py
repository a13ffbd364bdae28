"""Lets easy images leave a network early.

``python -m sire_jax.early_exit --workdir=DIR --budget=60e6``

Outputs that classify what the main one does are exits: an image leaves at the first one that is
certain enough, and nothing more is computed of it. How certain that is follows, on the run's
validation examples, from a budget of multiply-adds (``--budget=60e6``, a mean over images) or from
shares of images (``--fractions=0.2,0.3,0.5``), or is given (``--thresholds=0.9,0.8``). What comes
of it is measured on the test examples, with the first seed's weights.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sire_jax import text
from sire_jax.inference import calibration, exit_rules
from sire_jax.inference.cascade import Cascade
from sire_jax.inference.exit_rules import RULES, Rule
from sire_jax.inference.exits import Exits
from sire_jax.job import command


@dataclass(frozen=True)
class Wish:
    """Where images should leave: just one of the three.

    Attributes:
        budget: Mean multiply-adds of an image.
        fractions: The share of images that leaves at each exit.
        thresholds: A threshold for each exit but the last.

    Raises:
        ValueError: If not just one of them is given.
    """

    budget: float | None = None
    fractions: Sequence[float] | None = None
    thresholds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        wishes = [wish for wish in vars(self).values() if wish is not None]
        if len(wishes) != 1:
            raise ValueError(
                f"{len(wishes)} of budget, fractions and thresholds are given; give just one."
            )

    def check(self, costs: Sequence[int], classes: int, rule: Rule) -> None:
        """Checks it against the exits, before anything is computed.

        Raises:
            ValueError: If it can't be met.
        """
        if self.budget is not None:
            exit_rules.check_budget(costs, self.budget)
        elif self.fractions is not None:
            exit_rules.check_fractions(self.fractions, len(costs))
        else:
            rule.check(self.thresholds or (), len(costs), classes)

    def fit(self, scores: np.ndarray, costs: Sequence[int], rule: Rule) -> list[float]:
        """Finds the thresholds, by the scores of validation images ``[exits, n]``."""
        if self.budget is not None:
            return exit_rules.fit_budget(scores, costs, self.budget, rule)
        if self.fractions is not None:
            return exit_rules.fit_fractions(scores, self.fractions, rule)
        return list(self.thresholds or ())


def measure(
    workdir: str | Path,
    wish: Wish,
    rule: Rule = RULES["max_probability"],
    points: int = 12,
    batch_size: int = 100,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Fits thresholds on validation examples and measures early exit on test examples.

    Args:
        workdir: The run.
        wish: Where images should leave.
        rule: By which score they leave.
        points: Number of budgets, from the first to the last exit's cost, of the curve.
        batch_size: Images computed at once.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Returns:
        ``{"rule", "step", "images", "batch_size", "exits", "accuracy", "multiply_adds",
        "multiply_adds_done", "seconds", "whole", "curve"}``. Multiply-adds are means over the
        images: of the stages that each has passed, and of all that was computed, with the rows that
        fill up batches. ``whole`` is the main output computed alone.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        ValueError: If the run has no exit or no validation examples, or the wish can't be met.
    """
    if points < 2:
        raise ValueError(f"--points is {points}; it should be at least 2.")
    exits = Exits(workdir, batch_size, overrides)
    wish.check(exits.costs, exits.classes, rule)
    logits = {kind: exits.logits(kind) for kind in ("validation", "test")}
    scores = {
        kind: np.asarray(rule.scores(jnp.asarray(outputs))) for kind, outputs in logits.items()
    }
    thresholds = wish.fit(scores["validation"], exits.costs, rule)
    cascade = Cascade(exits.stages, exits.variables, rule, batch_size)
    # What compiling takes is no part of the seconds.
    cascade.warm(exits.images, exits.examples["test"])
    started = time.perf_counter()
    outcome = cascade(exits.images, exits.examples["test"], thresholds)
    seconds = time.perf_counter() - started
    accuracy, whole_seconds = exits.whole()
    right = outcome.predictions == exits.labels["test"]
    return {
        "rule": rule.name,
        "step": exits.step,
        "images": len(right),
        "batch_size": batch_size,
        "exits": _describe_exits(exits, logits, thresholds, outcome.exits, right),
        "accuracy": float(right.mean()),
        "multiply_adds": float(np.asarray(exits.costs)[outcome.exits].mean()),
        "multiply_adds_done": outcome.multiply_adds / len(right),
        "seconds": seconds,
        "whole": {
            "accuracy": accuracy,
            "multiply_adds": exits.main_cost,
            "seconds": whole_seconds,
        },
        "curve": _curve(exits, scores, logits["test"], rule, points),
    }


def _describe_exits(
    exits: Exits,
    logits: Mapping[str, np.ndarray],
    thresholds: Sequence[float],
    left: np.ndarray,
    right: np.ndarray,
) -> list[dict[str, Any]]:
    """Describes every exit, by the images that leave there and by all test images."""
    descriptions = []
    labels = exits.labels["test"]
    for k, (name, cost) in enumerate(zip(exits.names, exits.costs, strict=True)):
        test, leaves = logits["test"][k], left == k
        temperature = calibration.fit_temperature(
            logits["validation"][k], exits.labels["validation"]
        )
        before, after = (
            calibration.expected_calibration_error(calibration.probabilities(test, t), labels)
            for t in (1.0, temperature)
        )
        descriptions.append(
            {
                "output": name,
                # Whatever comes to the last exit leaves there.
                "threshold": [*thresholds, None][k],
                "share": float(leaves.mean()),
                "accuracy_of_leaving": float(right[leaves].mean()) if leaves.any() else None,
                "accuracy_of_all": float((test.argmax(-1) == labels).mean()),
                "multiply_adds": cost,
                "calibration_error": before,
                "temperature": temperature,
                "calibration_error_after": after,
            }
        )
    return descriptions


def _curve(
    exits: Exits, scores: Mapping[str, np.ndarray], logits: np.ndarray, rule: Rule, points: int
) -> list[dict[str, float]]:
    """Measures budgets from the first to the last exit's cost, on test images."""
    costs = np.asarray(exits.costs)
    right = logits.argmax(-1) == exits.labels["test"]
    curve = []
    for budget in np.linspace(costs[0], costs[-1], points):
        thresholds = exit_rules.fit_budget(scores["validation"], exits.costs, budget, rule)
        left = exit_rules.leave(scores["test"], thresholds, rule)
        accuracy = right[left, np.arange(len(left))].mean()
        spent = costs[left].mean()
        curve.append({"budget": budget, "multiply_adds": float(spent), "accuracy": float(accuracy)})
    return curve


def report(measured: Mapping[str, Any]) -> str:
    """Writes measurements as a table with a row per exit, and the sums."""
    header = ["exit", "threshold", "leaving", "accuracy of leaving", "accuracy of all"]
    rows = [[*header, "multiply-adds", "ECE", "temperature", "ECE after"]]
    keys = ("threshold", "share", "accuracy_of_leaving", "accuracy_of_all")
    ends = ("calibration_error", "temperature", "calibration_error_after")
    for description in measured["exits"]:
        start, end = ([_cell(description[key]) for key in columns] for columns in (keys, ends))
        rows.append([description["output"], *start, f"{description['multiply_adds']:,}", *end])
    whole = measured["whole"]
    return "\n".join(
        [
            text.align(rows),
            f"early exit:       accuracy {measured['accuracy']:.4f},"
            f" {measured['multiply_adds']:,.0f} multiply-adds an image"
            f" ({measured['multiply_adds_done']:,.0f} with the rows that fill up batches),"
            f" {measured['seconds']:.2f} s",
            f"main output only: accuracy {whole['accuracy']:.4f},"
            f" {whole['multiply_adds']:,} multiply-adds an image, {whole['seconds']:.2f} s",
        ]
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else text.number(value)


def draw(measured: Mapping[str, Any]) -> Figure:
    """Draws accuracy against mean multiply-adds, with each exit alone and what was measured."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    curve, exits = measured["curve"], measured["exits"]
    axes.plot(
        [point["multiply_adds"] / 1e6 for point in curve],
        [point["accuracy"] for point in curve],
        color="#0072B2",
        marker=".",
        label="early exit, a point a budget",
    )
    alone = [
        (description["multiply_adds"] / 1e6, description["accuracy_of_all"])
        for description in exits
    ]
    axes.scatter(*zip(*alone, strict=True), color="#D55E00", zorder=3, label="all at one exit")
    for description, point in zip(exits, alone, strict=True):
        above: Any = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
        axes.annotate(description["output"], point, (0, 6), **above)
    axes.margins(0.08, 0.12)
    chosen = measured["multiply_adds"] / 1e6, measured["accuracy"]
    axes.plot(*chosen, "*", color="#000000", markersize=11, label="as asked for")
    axes.set_xlabel("multiply-adds an image, mean (millions)")
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list such as 0.2,0.3,0.5") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--rule", default="max_probability", choices=sorted(RULES))
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--budget", type=float, help="mean multiply-adds of an image")
    group.add_argument("--fractions", type=_numbers, help="share of images for each exit")
    group.add_argument("--thresholds", type=_numbers, help="for each exit but the last")
    parser.add_argument("--points", type=int, default=12, help="budgets in the picture")
    parser.add_argument("--batch_size", type=int, default=100, help="images computed at once")
    parser.add_argument("--out", default="early_exit.png", help="the picture")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_picture(options.out)
        wish = Wish(options.budget, options.fractions, options.thresholds)
        measured = measure(
            options.workdir,
            wish,
            RULES[options.rule],
            options.points,
            options.batch_size,
            overrides,
        )
        draw(measured).savefig(out, dpi=150)
    if options.json:
        print(json.dumps(measured))
        return
    print(f"{measured['rule']}, {measured['images']} test images after step {measured['step']}")
    print(report(measured))
    print(f"{out}: accuracy against multiply-adds")


if __name__ == "__main__":
    main()
