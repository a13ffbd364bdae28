"""Measures a trained network: ``python -m sire_jax.evaluate --workdir=DIR [--json]``.

For each output the top-1 and top-5 accuracy and the loss, and the same for each prediction rule,
as mean and standard deviation over the runs of the workdir.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sire_jax import configuration, text
from sire_jax.job import command
from sire_jax.runs import divergence
from sire_jax.runs.divergence import DIVERGED, converged
from sire_jax.runs.trained import diverged, kept_weights, open_run

METRICS = ("top_1", "top_5", "loss")


def evaluate(
    workdir: str | Path,
    split: str = "test",
    overrides: Sequence[str] = (),
    changed_data: bool = False,
) -> dict[str, Any]:
    """Measures the weights of a run: the best on validation data if it has any, else the last.

    Args:
        workdir: The run.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved,
            ``--config.data.ten_crop=True``, or ``--config.predictions.joint.eta=0.3``.
        changed_data: Whether the test images, and they alone, may be others than those of the run,
            of the same classes; a warning says what differs.

    Returns:
        ``{"step", "split", "seeds", "diverged", "outputs": {name: {metric: {"mean", "std",
        "runs"}}}, "predictions": …, "skipped"}``, the last what is wrong with each damaged image
        that is left out; means and deviations are over the runs that did not diverge, if any.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        ValueError: If there are no examples of that split, an override changes the run, or the data
            are not those of the run.
    """
    if changed_data and split != "test":
        raise ValueError(
            f"--changed_data is for test images; the split is '{split}', and which images were"
            " trained on follows from the data of the run."
        )
    runs = open_run(workdir, overrides, changed_data=changed_data)
    if not runs.feed.examples[split].shape[1]:
        raise ValueError(f"The run has no {split} examples.")
    # Runs that diverged are listed, too; the means leave them out.
    weights, steps = kept_weights(runs, workdir, used=()), diverged(workdir)
    fitted = runs.fit(weights.params, weights.model_state)
    metrics = runs.measure(weights.params, weights.model_state, split, fitted)
    predictions = runs.parts.predictions
    names = {name.rsplit("/", 1)[0] for name in metrics}
    # Outputs in the network's order, then the rest, such as predictions, by name.
    first = [*runs.parts.output_names(), *runs.parts.objectives]
    ordered = sorted(names, key=lambda n: (first.index(n) if n in first else len(first), n))
    measured = {name: _statistics(metrics, name, steps) for name in ordered}
    return {
        # The best weights of each run are of a step of its own.
        "step": int(np.max(weights.step)),
        "split": split,
        "seeds": runs.config.seeds,
        DIVERGED: steps,
        "outputs": {k: v for k, v in measured.items() if k not in predictions},
        "predictions": {k: v for k, v in measured.items() if k in predictions},
        "skipped": runs.feed.newly_skipped(),
    }


def _statistics(
    metrics: Mapping[str, np.ndarray], name: str, steps: Sequence[int | None]
) -> dict[str, Any]:
    statistics = {}
    for metric in METRICS:
        runs = metrics.get(f"{name}/{metric}")
        if runs is not None:
            mean, deviation = text.spread(converged(runs.tolist(), steps))
            statistics[metric] = {"mean": mean, "std": deviation, "runs": runs.tolist()}
    return statistics


def report(results: Mapping[str, Any]) -> str:
    """Writes measurements as a table with a row per output and prediction rule."""
    rows = [["output", *METRICS]]
    for kind in ("outputs", "predictions"):
        for name, statistics in results[kind].items():
            label = name if kind == "outputs" else f"{name} (prediction)"
            rows.append([label, *(_cell(statistics.get(metric)) for metric in METRICS)])
    return text.align(rows)


def _cell(statistics: Mapping[str, Any] | None) -> str:
    if statistics is None:
        return "-"
    deviation = f" ± {text.number(statistics['std'])}" if len(statistics["runs"]) > 1 else ""
    return f"{text.number(statistics['mean'])}{deviation}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--split", default="test", choices=configuration.SPLITS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--changed_data",
        action="store_true",
        help="also on other test images than those of the run, of the same classes",
    )
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        results = evaluate(options.workdir, options.split, overrides, options.changed_data)
    if options.json:
        print(json.dumps(results))
        return
    for message in results["skipped"]:
        print(f"Skipped: {message}")
    note = divergence.described(results[DIVERGED])
    print(f"{results['split']} after step {results['step']}, {results['seeds']} run(s){note}")
    print(report(results))


if __name__ == "__main__":
    main()
