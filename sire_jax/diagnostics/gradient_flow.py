"""How much gradient each objective sends to each convolution.

``config.gradient_flow_every = 1`` measures it after every epoch of a run, and draws it at the end.
``python -m sire_jax.diagnostics.gradient_flow --workdir=DIR --workdir=DIR2 --out=FILE [--json]``
compares runs, as Fig. 3 of Avola et al., *SIRe-Networks* (2022).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sire_jax import objectives
from sire_jax.data.augmentation import Augmentation, Batch
from sire_jax.diagnostics.figures import finite_runs
from sire_jax.job import command
from sire_jax.metrics import Average, Metrics
from sire_jax.networks import MAIN
from sire_jax.step import Apply, TrainState, make_losses
from sire_jax.storage import workdir

SPLIT = "gradients"
TOTAL = "total"
# Panels side by side.
_COLUMNS = 3


def convolutions(params: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lists the paths of the backbone's convolution kernels, shallow to deep.

    Args:
        params: Parameters of a ``Network``, or their shapes.

    Returns:
        Paths of keys, in the order in which the backbone made them.
    """
    leaves = jax.tree_util.tree_leaves_with_path({"backbone": params.get("backbone", {})})
    paths = [(tuple(step.key for step in path), leaf) for path, leaf in leaves]
    kernels = [path for path, leaf in paths if path[-1] == "kernel" and leaf.ndim == 4]
    return sorted(kernels, key=_natural)


def check(every: int, params: Mapping[str, Any]) -> None:
    """Checks that there is something to measure.

    Args:
        every: Epochs between measurements; 0: none.
        params: Parameters of a ``Network``, or their shapes.

    Raises:
        ValueError: If gradients are to be measured of a backbone without convolutions.
    """
    if every and not convolutions(params):
        raise ValueError(
            f"config.gradient_flow_every is {every}, but the backbone has no convolution whose"
            " gradient could be measured; set it to 0."
        )


def _natural(path: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Orders ``stage_2_block_10`` after ``stage_2_block_9``, and a tail last."""
    words = [word for key in path for word in key.split("_")]
    return [(1, int(word), "") if word.isdigit() else (0, 0, word) for word in words]


def _name(path: tuple[str, ...]) -> str:
    return "/".join(key for key in path[1:-1] if key not in ("unit", "conv"))


def make_gradient_flow(
    apply: Apply, chosen: objectives.Objectives, augment: Augmentation | None = None
) -> Callable[[TrainState, Batch], Metrics]:
    """Makes the measurement of the gradients of one batch.

    ``flow_{k,l} = mean |w_k dL_k / dW_l|`` over the values of the kernel W_l, and for the whole
    ``mean |sum_k w_k dL_k / dW_l|``.

    Args:
        apply: ``apply`` of a ``Network``.
        chosen: Objectives by name.
        augment: Changes a batch under a random key; nothing by default.

    Returns:
        A pure function from ``(state, batch)`` to ``"<objective>/<convolution>"``, with
        ``"total/<convolution>"``: one forward pass and a backward pass for each objective.
    """

    def measure(state: TrainState, batch: Batch) -> Metrics:
        augmenting, dropout, _ = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        batch = augment(augmenting, batch) if augment else batch
        losses = make_losses(apply, chosen, batch, dropout)
        named, pull_back = jax.vjp(lambda p: losses(p, state.model_state)[0], state.params)
        weights = objectives.weights(chosen, state.step)
        nothing = {name: jnp.zeros_like(loss) for name, loss in named.items()}
        found: dict[str, Any] = {}
        for name in named:
            found[name] = pull_back({**nothing, name: weights[name]})[0]
        found[TOTAL] = jax.tree.map(lambda *each: sum(each[1:], each[0]), *found.values())
        one = jnp.ones((), jnp.float32)
        return {
            f"{name}/{_name(path)}": Average(total=jnp.abs(_at(gradient, path)).mean(), count=one)
            for name, gradient in found.items()
            for path in convolutions(state.params)
        }

    return measure


def _at(tree: Any, path: Sequence[str]) -> Array:
    for key in path:
        tree = tree[key]
    return tree


def is_measured(path: str | Path) -> bool:
    """Tells whether a run has measurements of gradients; one that diverged early has none."""
    return any(line["split"] == SPLIT for line in workdir.read_metrics(path))


def read(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads the measurements of a run.

    Args:
        path: The run's workdir.

    Returns:
        ``{objective: {convolution: [measurements]}}``, means over the runs of the workdir that did
        not diverge, if there are any.

    Raises:
        ValueError: If the run has none.
    """
    every = workdir.read_metrics(path)
    lines = [line for line in every if line["split"] == SPLIT]
    kept = finite_runs(every)
    if not lines:
        raise ValueError(
            f"{path} has no measurements of gradients; train with --config.gradient_flow_every=1."
        )
    found: dict[str, dict[str, np.ndarray]] = {}
    for key in lines[0]:
        objective, _, convolution = key.partition("/")
        if convolution:
            values = np.array([line[key] for line in lines])
            values = (values[:, kept] if kept.any() else values).mean(1)
            found.setdefault(objective, {})[convolution] = values
    return found


def draw(workdirs: Mapping[str, str | Path], path: str | Path) -> Path:
    """Draws the gradient of each convolution, a panel for each run.

    Thick: the mean over training; thin: each measurement, paler the earlier it was.

    Args:
        workdirs: Runs by the title of their panel.
        path: The picture to write.

    Returns:
        The picture.

    Raises:
        ValueError: If a run has no measurements.
    """
    flows = {title: read(each) for title, each in workdirs.items()}
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
        for opacity, each in zip(np.linspace(0.1, 0.5, len(values)), values, strict=True):
            axes.plot(positions, each, color=colours[name], lw=0.5, alpha=opacity)
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
            for name, values in each.items()
        }
        for objective, each in flow.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__, overrides=False)
    parser.add_argument("--workdir", required=True, action="append", help="a run; can be repeated")
    parser.add_argument("--out", default="gradient_flow.png", help="the picture")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    known = parser.parse_args(arguments)
    with command.readable_errors():
        out = command.check_picture(known.out)
        titles = workdir.titles(known.workdir)
        draw(titles, out)
        lines = {title: _listed(read(path)) for title, path in titles.items()}
    print(json.dumps(lines) if known.json else out)


if __name__ == "__main__":
    main()
