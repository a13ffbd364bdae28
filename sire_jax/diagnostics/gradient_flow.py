"""How much gradient each objective sends to each convolution.

``config.gradient_flow_every = 1`` measures it after every epoch of a run, and draws it at the end.
``python -m sire_jax.diagnostics.gradient_flow --workdir=DIR --workdir=DIR2 --out=FILE [--json]``
compares runs, as Fig. 3 of Avola et al., *SIRe-Networks* (2022).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sire_jax.diagnostics.figures import finite_runs
from sire_jax.job import command
from sire_jax.networks import MAIN
from sire_jax.runs.gradient_flow import SPLIT, TOTAL
from sire_jax.storage import workdir

# Panels side by side.
_COLUMNS = 3


def is_measured(path: str | Path) -> bool:
    """Tells whether a run has measurements of gradients; one that diverged early has none.

    >>> import tempfile
    >>> line = '{"step": 9, "epoch": 1, "split": "gradients", "total/conv_1": [0.5]}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Path(directory, "metrics.jsonl").write_text(line)
    ...     is_measured(directory)
    True
    """
    return any(line["split"] == SPLIT for line in workdir.read_metrics(path))


def read(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads the measurements of a run.

    >>> import tempfile
    >>> line = '{"step": 9, "epoch": 1, "split": "gradients", "total/conv_1": [0.5]}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Path(directory, "metrics.jsonl").write_text(line)
    ...     read(directory)
    {'total': {'conv_1': array([0.5])}}

    Args:
        path: The run's workdir.

    Returns:
        ``{objective: {convolution: [measurements]}}``, means over the runs of the workdir that did
        not diverge, if there are any.

    Raises:
        ValueError: If the run has none.
    """
    all_lines = workdir.read_metrics(path)
    lines = [line for line in all_lines if line["split"] == SPLIT]
    finite = finite_runs(all_lines)
    if not lines:
        raise ValueError(
            f"{path} has no measurements of gradients; train with --config.gradient_flow_every=1."
        )
    flow: dict[str, dict[str, np.ndarray]] = {}
    for key in lines[0]:
        objective, _, convolution = key.partition("/")
        if convolution:
            values = np.array([line[key] for line in lines])
            values = (values[:, finite] if finite.any() else values).mean(1)
            flow.setdefault(objective, {})[convolution] = values
    return flow


def draw(workdirs: Mapping[str, str | Path], path: str | Path) -> Path:
    """Draws the gradient of each convolution, a panel for each run.

    Thick: the mean over training; thin: each measurement, paler the earlier it was.

    >>> import tempfile
    >>> line = '{"step": 9, "epoch": 1, "split": "gradients", "total/conv_1": [0.5]}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Path(directory, "metrics.jsonl").write_text(line)
    ...     draw({"a run": directory}, Path(directory, "flow.png")).name
    'flow.png'

    Args:
        workdirs: Runs by the title of their panel.
        path: The picture to write.

    Returns:
        The picture.

    Raises:
        ValueError: If a run has no measurements.
    """
    flows = {title: read(directory) for title, directory in workdirs.items()}
    columns = min(len(flows), _COLUMNS)
    lines = -(-len(flows) // columns)
    size = max(4.6 * columns, 6.4), 4.2 * lines + 0.2
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    panels = grid.ravel()[: len(flows)]
    for unused in grid.ravel()[len(flows) :]:
        unused.axis("off")
    # One colour for an objective in all panels.
    names = sorted({n for flow in flows.values() for n in flow}, key=lambda n: (n != MAIN, n))
    colours = {name: colormaps["tab10"](i % 10) for i, name in enumerate(names)} | {TOTAL: "0.8"}
    for axes, (title, flow) in zip(panels, flows.items(), strict=True):
        _panel(axes, flow, colours)
        axes.set_title(title, fontsize=9)
    for axes in panels[::columns]:
        axes.set_ylabel("mean |weighted gradient|")
    figure.suptitle("mean over training; thin: each measurement, paler the earlier", fontsize=8)
    figure.savefig(path, dpi=130)
    return Path(path)


def _panel(
    axes: Axes, flow: Mapping[str, Mapping[str, np.ndarray]], colours: Mapping[str, Any]
) -> None:
    # The total first, a broad line beneath the others.
    for name in sorted(flow, key=lambda name: (name != TOTAL, name)):
        # [measurements, convolutions]; what an objective does not reach has nothing, not zero.
        values = np.stack(list(flow[name].values()), axis=1)
        values = np.where(values > 0, values, np.nan)
        positions = np.arange(1, values.shape[1] + 1)
        reached = ~np.isnan(values).all(0)
        means = np.nanmean(values[:, reached], axis=0)
        line: Any = {"color": colours[name], "label": name, "lw": 6 if name == TOTAL else 1.4}
        axes.plot(positions[reached], means, "o-", ms=3, **line)
        # Each measurement, paler the earlier it was.
        for opacity, measurement in zip(np.linspace(0.1, 0.5, len(values)), values, strict=True):
            axes.plot(positions, measurement, color=colours[name], lw=0.5, alpha=opacity)
    labels = list(flow[TOTAL])
    axes.set_xticks(range(1, len(labels) + 1), labels, rotation=90, fontsize=6)
    axes.set_yscale("log")
    axes.set_xlabel("convolution of the backbone")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)


def _listed(flow: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Returns measurements for JSON, convolutions shallow to deep; null for what isn't finite."""
    return {
        objective: {
            name: [value if np.isfinite(value) else None for value in values.tolist()]
            for name, values in convolutions.items()
        }
        for objective, convolutions in flow.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__, overrides=False)
    parser.add_argument("--workdir", required=True, action="append", help="a run; can be repeated")
    parser.add_argument("--out", default="gradient_flow.png", help="the picture")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    options = parser.parse_args(arguments)
    with command.readable_errors():
        out = command.check_picture(options.out)
        titles = workdir.titles(options.workdir)
        draw(titles, out)
        lines = {title: _listed(read(path)) for title, path in titles.items()}
    print(json.dumps(lines) if options.json else out)


if __name__ == "__main__":
    main()
