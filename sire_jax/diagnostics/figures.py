"""Pictures of runs, drawn from what the runs have written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sire_jax import files
from sire_jax.networks import MAIN
from sire_jax.storage.workdir import read_metrics

# Colours that stay apart in greys and for most colour-blind readers (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def _colours(number: int) -> list[Any]:
    """Returns that many colours, all different up to twenty."""
    many = [colormaps["tab20"](i % 20) for i in range(number)]
    return list(_COLOURS[:number]) if number <= len(_COLOURS) else many


_DASHES = "mean over runs; dashes: plus and minus one standard deviation"
_LABELS = {"top_1": "accuracy", "top_5": "top-5 accuracy", "loss": "loss"}


def band(
    axes: Axes,
    epochs: Sequence[float],
    values: np.ndarray,
    label: str,
    colour: Any,
    opacity: float = 1.0,
) -> None:
    """Draws a mean over runs as a line, with dashes one standard deviation above and below.

    >>> axes = Figure().subplots()
    >>> band(axes, [1, 2], np.array([[0.5, 0.7], [0.8, 0.9]]), "test", "black")
    >>> axes.lines[0].get_ydata().round(3).tolist(), len(axes.lines)
    ([0.6, 0.85], 3)

    Args:
        axes: Where.
        epochs: ``[n]``, the horizontal positions.
        values: ``[n, runs]``.
        label: Text of the legend.
        colour: Of the lines.
        opacity: Of the lines, in [0, 1].
    """
    mean = values.mean(1)
    # A line through one point would not be seen.
    marker = "o" if len(epochs) == 1 else ""
    axes.plot(epochs, mean, marker=marker, color=colour, label=label, alpha=opacity)
    if values.shape[1] > 1:
        spread = values.std(1, ddof=1)
        for edge in (mean - spread, mean + spread):
            axes.plot(epochs, edge, color=colour, linestyle="--", linewidth=0.8, alpha=opacity)


def series(
    lines: Sequence[Mapping[str, Any]], split: str, metric: str
) -> tuple[list[int], np.ndarray]:
    """Picks one metric of one split out of ``metrics.jsonl``.

    >>> losses, accuracies = [2.0, float("nan")], [0.3, 0.1]
    >>> line = {"epoch": 1, "split": "test", "main/loss": losses, "main/top_1": accuracies}
    >>> series([line], "test", "main/top_1")
    ([1], array([[0.3]]))

    Returns:
        Epochs ``[n]`` and values ``[n, runs]``, of the runs that did not diverge, if there are any.
    """
    chosen = [line for line in lines if line["split"] == split and metric in line]
    epochs = [line["epoch"] for line in chosen]
    values = np.array([line[metric] for line in chosen])
    finite = finite_runs(lines)
    return epochs, values[:, finite] if len(values) and finite.any() else values


def finite_runs(lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Tells of each run whether all losses in ``metrics.jsonl`` are finite.

    >>> finite_runs([{"epoch": 1, "split": "train", "main/loss": [2.3, float("nan")]}])
    array([ True, False])

    Args:
        lines: All lines.

    Returns:
        ``[runs]``, booleans.
    """
    losses = [value for line in lines for k, value in line.items() if k.endswith("/loss")]
    return np.isfinite(np.array(losses, float)).all(0) if losses else np.ones(1, bool)


def _draw(axes: Axes, lines: Sequence[Mapping[str, Any]], kind: str) -> None:
    metrics = {
        (line["split"], name)
        for line in lines
        for name in line
        if name.endswith(f"/{kind}") and line["split"] != "steps"
    }
    # A colour for each output; training, which is not the point, paler.
    names = sorted(
        {metric for _, metric in metrics}, key=lambda name: (not name.startswith(MAIN), name)
    )
    colours = dict(zip(names, _colours(len(names)), strict=True))
    for metric in names:
        for split in sorted(split for split, name in metrics if name == metric):
            epochs, values = series(lines, split, metric)
            label = f"{metric.rsplit('/', 1)[0]}, {split}"
            opacity = 0.4 if split == "train" else 1.0
            band(axes, epochs, values, label, colours[metric], opacity)
    axes.set_xlabel("epoch")
    axes.set_ylabel(_LABELS[kind])
    axes.grid(alpha=0.3)
    if metrics:
        axes.legend(frameon=False, fontsize=8)


def curves(directory: str | Path) -> Path | None:
    """Draws accuracies and losses over the epochs of a run (as Peeters and Schlyter, Figs. 1-4).

    >>> import tempfile
    >>> line = '{"step": 9, "epoch": 1, "split": "test", "main/loss": [0.3], "main/top_1": [0.9]}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Path(directory, "metrics.jsonl").write_text(line)
    ...     curves(directory).name
    'curves.png'

    Args:
        directory: The run's workdir.

    Returns:
        The picture ``curves.png`` in it, ``None`` if there is nothing to draw.
    """
    directory = files.expanded(directory)
    lines = read_metrics(directory)
    if not any(line["split"] != "steps" for line in lines):
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, lines, "top_1")
    _draw(right, lines, "loss")
    figure.suptitle(_DASHES, fontsize=8)
    path = directory / "curves.png"
    figure.savefig(path, dpi=130)
    return path


def compare(
    runs: Mapping[str, tuple[str | Path, str]],
    split: str,
    path: Path,
    error_percent: bool = False,
) -> None:
    """Draws a metric of several runs in one picture, dotted that of training where it was measured.

    >>> import tempfile
    >>> line = '{"step": 9, "epoch": 1, "split": "test", "main/top_1": [0.9]}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Path(directory, "metrics.jsonl").write_text(line)
    ...     picture = Path(directory, "errors.png")
    ...     compare({"ours": (directory, "main/top_1")}, "test", picture, error_percent=True)
    ...     picture.exists()
    True

    Args:
        runs: Workdirs and metrics, such as ``"main/top_1"``, by the text of their legend; all
            metrics of a kind.
        split: Such as ``"test"``.
        path: The picture to write.
        error_percent: Whether errors in percent are drawn in place of accuracies.

    Raises:
        ValueError: If errors are to be drawn of what is no accuracy.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    metric, trained = "", False
    shown = _errors if error_percent else lambda _, values: values
    colours = _colours(len(runs))
    for (label, (directory, metric)), colour in zip(runs.items(), colours, strict=True):
        lines = read_metrics(directory)
        epochs, values = series(lines, split, metric)
        if len(epochs):
            band(axes, epochs, shown(metric, values), label, colour)
        epochs, values = series(lines, "train", metric)
        if len(epochs) and split != "train":
            trained, mean = True, shown(metric, values).mean(1)
            axes.plot(epochs, mean, color=colour, linestyle=":", linewidth=1.2)
    axes.set_xlabel("epoch")
    measured = _LABELS[metric.rsplit("/", 1)[1]]
    if error_percent:
        measured = f"{measured.replace('accuracy', 'error')}, %"
    axes.set_ylabel(f"{split} {measured}")
    axes.set_title(_DASHES + "; dotted: training" * trained, fontsize=8)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _errors(metric: str, values: np.ndarray) -> np.ndarray:
    """Turns accuracies into errors in percent."""
    if "accuracy" not in _LABELS[metric.rsplit("/", 1)[1]]:
        raise ValueError(f"'{metric}' is no accuracy, and has no error; choose <output>/top_1.")
    return 100 * (1 - values)


def losses(runs: Mapping[str, Sequence[float]], path: Path, label: str) -> None:
    """Draws the losses of the first steps of several runs; a cross is the end of one that diverged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     picture = Path(directory, "losses.png")
    ...     losses({"trains": [2.3, 2.0], "diverges": [2.3, float("nan")]}, picture, "main loss")
    ...     picture.exists()
    True

    Args:
        runs: The loss of each step, by the name of the run.
        path: The picture to write.
        label: What is drawn.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    _draw_losses(figure.subplots(), runs, label)
    figure.savefig(path, dpi=130)


def losses_of_one(objectives: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws the losses of the first steps of one run: the main one, beside it all others.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     picture = Path(directory, "losses.png")
    ...     losses_of_one({"main": [2.3, 2.0], "decoder": [0.2, 0.1]}, picture)
    ...     picture.exists()
    True

    Args:
        objectives: The loss of each step, by the name of the objective.
        path: The picture to write.
    """
    main = {name: values for name, values in objectives.items() if name == MAIN}
    others = {name: values for name, values in objectives.items() if name != MAIN}
    panels = [panel for panel in (main, others) if panel] or [{}]
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _draw_losses(axes, panel, "loss")
    figure.savefig(path, dpi=130)


def _draw_losses(axes: Axes, runs: Mapping[str, Sequence[float]], label: str) -> None:
    for (name, values), colour in zip(runs.items(), _colours(len(runs)), strict=True):
        finite = np.asarray(values)[np.isfinite(values)]
        steps = np.arange(1, len(finite) + 1)
        axes.plot(steps, finite, color=colour, label=name, linewidth=1.2)
        if len(finite) < len(values):
            # Of one that broke at once there is no loss to be drawn.
            last = finite[-1:] if len(finite) else [1.0]
            axes.plot(steps[-1:] if len(finite) else [1], last, color=colour, marker="x")
    drawn = np.array([loss for values in runs.values() for loss in values], np.float64)
    axes.set_yscale(_scale(drawn[np.isfinite(drawn)]))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if runs:
        axes.legend(frameon=False, fontsize=7, ncols=1 + len(runs) // 12)


def _scale(values: np.ndarray) -> str:
    """Returns an axis for values: in powers of ten if they span some."""
    if not (values > 0).all():
        return "symlog"
    return "log" if len(values) and values.max() > 10 * values.min() else "linear"


def sweep(points: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> None:
    """Draws what a table measures against what it varies: Figs. 2 and 3 of Palacio et al.

    >>> import tempfile
    >>> points = [{"x": x, "series": "join", "main": [70.0 + x, 71.0]} for x in (2, 20)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     picture = Path(directory, "groups.png")
    ...     sweep(points, {"x": "groups", "columns": {"main": "main output"}}, picture)
    ...     picture.exists()
    True

    Args:
        points: ``{"x": number, "series": text, "<column>": [value of each run]}`` each.
        about: ``{"x": label of the axis, "columns": {column: title of its panel}}``.
        path: The picture to write.
    """
    figure = Figure(figsize=(4.6 * len(about["columns"]), 3.8), layout="constrained")
    panels = figure.subplots(1, len(about["columns"]), squeeze=False)[0]
    names = list(dict.fromkeys(point["series"] for point in points))
    for axes, (column, title) in zip(panels, about["columns"].items(), strict=True):
        for name, colour in zip(names, _colours(len(names)), strict=True):
            line = sorted((p["x"], p[column]) for p in points if p["series"] == name and p[column])
            if not line:
                continue
            places = [x for x, _ in line]
            means = [np.mean(values) for _, values in line]
            errors = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for _, values in line]
            axes.errorbar(places, means, errors, marker="o", capsize=3, color=colour, label=name)
        axes.set_xticks(sorted({point["x"] for point in points}))
        axes.set_xlabel(about["x"])
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (%)")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("mean over runs, plus and minus one standard deviation", fontsize=8)
    figure.savefig(path, dpi=130)
