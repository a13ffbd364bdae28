"""Measures a trained network: ``python -m sire_jax.evaluate --workdir=DIR [--json]``.

For each output the top-1 and top-5 accuracy and the loss, and the same for each prediction rule,
as mean and standard deviation over the runs of the workdir.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sire_jax import configuration, tables
from sire_jax.configuration import experiment
from sire_jax.data import contents
from sire_jax.job import command
from sire_jax.runs import divergence
from sire_jax.runs.divergence import DIVERGED, converged
from sire_jax.runs.runs import Runs, UnloadedRuns
from sire_jax.runs.streamed import open_runs
from sire_jax.step import Best, TrainState
from sire_jax.storage.checkpoint import Checkpoints
from sire_jax.storage.workdir import CHECKPOINTS, at, read_config

METRICS = ("top_1", "top_5", "loss")


def restore(runs: Runs, checkpoints: Path) -> tuple[TrainState, Best | None]:
    """Restores the newest checkpoint of a run.

    Args:
        runs: The programs of the run.
        checkpoints: The directory of its checkpoints.

    Returns:
        The last state, and the weights with the best validation accuracy, if the run validates.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    manager = Checkpoints(checkpoints)
    try:
        state, _, best, _ = manager.restore(runs.checkpoint_shapes())
    finally:
        manager.close()
    return state, best


def diverged(workdir: str | Path) -> list[int | None]:
    """Returns for each run the steps after which it diverged, ``None`` if it hasn't; or nothing.

    Args:
        workdir: The directory of the runs.
    """
    checkpoints = Checkpoints(at(workdir) / CHECKPOINTS)
    try:
        return list(checkpoints.notes().get(DIVERGED) or ())
    finally:
        checkpoints.close()


def kept_weights(
    runs: Runs, workdir: str | Path, used: Sequence[int] | None = (0,)
) -> TrainState | Best:
    """Restores the weights that a run is judged by.

    Args:
        runs: The programs of the run.
        workdir: Its directory.
        used: Which of its runs are looked at, from 0: none of them may have diverged. ``None``:
            all.

    Returns:
        The best on validation data if it has any, else the last.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If one has diverged.
    """
    if not (at(workdir) / contents.FILE).exists() and not isinstance(runs, UnloadedRuns):
        warnings.warn(
            f"{workdir} has no {contents.FILE}: whether these are the data of the run, and its"
            " classes, can't be told.",
            stacklevel=2,
        )
    for i, steps in enumerate(diverged(workdir)):
        if steps is not None and (used is None or i in used):
            raise ValueError(
                f"The run with seed {runs.config.seed + i} in {workdir} diverged after {steps}"
                " steps: its weights mean nothing."
            )
    state, best = restore(runs, at(workdir) / CHECKPOINTS)
    return state if best is None else best


def open_run(
    workdir: str | Path,
    overrides: Sequence[str] = (),
    needs_data: bool = True,
    changed_data: bool = False,
) -> Runs:
    """Opens the run in a directory, without its weights.

    Args:
        workdir: The run.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.
        needs_data: Whether the data are used. If not, they need not be there: what classes are
            called is kept with the run (by a former version it was not: they are loaded).
        changed_data: Whether data with other test images than the run's are taken, with a warning.

    Returns:
        Its programs and data.

    Raises:
        FileNotFoundError: If there is no run, or the data set is not prepared.
        ValueError: If an override changes the run, or the data are not those of the run; those that
            moved are.
    """
    trained = read_config(workdir)
    config = configuration.override(trained, overrides)
    kept = contents.read(workdir)
    # How a run is measured, not what it is; and where its data are, if it is known what they are.
    free = ("data.ten_crop:", "predictions.", *(("data.name:",) if kept else ()))
    changed = configuration.differences(trained, config)
    changed = [each for each in changed if not each.startswith(free)]
    if changed:
        raise ValueError(f"An override would change the run: {'; '.join(changed)}.")
    if kept and not needs_data:
        return UnloadedRuns(experiment.build(config), kept.names)
    runs = open_runs(experiment.build(config))
    if kept:
        _check_data(workdir, kept, runs.contents, changed_data)
    return runs


def _check_data(
    workdir: str | Path, kept: contents.Contents, now: contents.Contents, changed_data: bool
) -> None:
    lines = [f"\n  {line}" for line in contents.differences(kept, now)]
    if not lines:
        return
    # What predictions are fitted on is drawn from the training images.
    only_test = not contents.of_names(kept, now) and kept.parts["train"].is_same(now.parts["train"])
    if changed_data and only_test:
        warnings.warn(f"These are not the data of {workdir}:{''.join(lines)}", stacklevel=3)
        return
    other = " Other test images alone, of these classes, are measured by evaluate --changed_data."
    if changed_data:
        other = (
            " --changed_data is for other test images: classes and training images have to be those"
            " of the run, as predictions are fitted on images that it was not trained on."
        )
    elif not only_test:
        other = ""
    raise ValueError(
        f"The data are not those of the run {workdir}:{''.join(lines)}\n"
        f"If those are elsewhere, say where: --config.data.dir=DIR.{other}"
    )


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
    if not runs.examples[split].shape[1]:
        raise ValueError(f"The run has no {split} examples.")
    kept, steps = kept_weights(runs, workdir, used=()), diverged(workdir)
    fitted = runs.fit(kept.params, kept.model_state)
    found = runs.measure(kept.params, kept.model_state, split, fitted)
    predictions = runs.parts.predictions
    names = {name.rsplit("/", 1)[0] for name in found}
    first = [*runs.parts.output_names(), *runs.parts.objectives]
    ordered = sorted(names, key=lambda n: (first.index(n) if n in first else len(first), n))
    measured = {name: _statistics(found, name, steps) for name in ordered}
    return {
        "step": int(np.max(kept.step)),
        "split": split,
        "seeds": runs.config.seeds,
        DIVERGED: steps,
        "outputs": {k: v for k, v in measured.items() if k not in predictions},
        "predictions": {k: v for k, v in measured.items() if k in predictions},
        "skipped": runs.newly_skipped(),
    }


def _statistics(
    found: Mapping[str, np.ndarray], name: str, steps: Sequence[int | None]
) -> dict[str, Any]:
    statistics = {}
    for metric in METRICS:
        runs = found.get(f"{name}/{metric}")
        if runs is not None:
            mean, deviation = tables.spread(converged(runs.tolist(), steps))
            statistics[metric] = {"mean": mean, "std": deviation, "runs": runs.tolist()}
    return statistics


def report(results: Mapping[str, Any]) -> str:
    """Writes measurements as a table with a row per output and prediction rule."""
    rows = [["output", *METRICS]]
    for kind in ("outputs", "predictions"):
        for name, statistics in results[kind].items():
            label = name if kind == "outputs" else f"{name} (prediction)"
            rows.append([label, *(_cell(statistics.get(metric)) for metric in METRICS)])
    return tables.align(rows)


def _cell(statistics: Mapping[str, Any] | None) -> str:
    if statistics is None:
        return "-"
    deviation = f" ± {tables.number(statistics['std'])}" if len(statistics["runs"]) > 1 else ""
    return f"{tables.number(statistics['mean'])}{deviation}"


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
    known, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        results = evaluate(known.workdir, known.split, overrides, known.changed_data)
    if known.json:
        print(json.dumps(results))
        return
    for message in results["skipped"]:
        print(f"Skipped: {message}")
    note = divergence.described(results[DIVERGED])
    print(f"{results['split']} after step {results['step']}, {results['seeds']} run(s){note}")
    print(report(results))


if __name__ == "__main__":
    main()
