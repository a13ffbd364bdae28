"""How much of a layer's gradient is supervision: Fig. 2a of Guo et al., *The Shallow End*.

``python -m sire_jax.diagnostics.supervision --workdir=DIR --workdir=DIR2 --out=supervision.png``

The gradient of a loss at a layer is its gradient where its output is, plus what the layers between
make of that. The share of the first in the norm of the whole is the supervision ratio (Section
3.3). A panel for each run; a line for each way of backpropagation at the run's weights, the thick
one for the way that it was trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sire_jax import objectives
from sire_jax.backbones.plan import OFFSETS, features
from sire_jax.job import command
from sire_jax.networks import MAIN
from sire_jax.runs.trained import Trained
from sire_jax.step import make_losses
from sire_jax.storage.workdir import titles
from sire_jax.updates import gradients
from sire_jax.updates.reached import Reached

_COLOURS = {name: colormaps["tab10"](i) for i, name in enumerate(("main", "joint", "multiway"))}
_COLOURS |= {"effective_joint": colormaps["tab10"](3)}
_TITLES = {
    "main": "main loss alone (ResNet)",
    "joint": "joint",
    "multiway": "multi-way and pair-wise",
    "effective_joint": "effective joint",
}


@dataclass(frozen=True)
class Norms:
    """Norms of gradients at the features of each layer.

    Attributes:
        layers: The layers, ``[l]``.
        at: For each loss the layer of its output.
        by_loss: For each loss ``|dL_k / dx_l|``, ``[l]``; 0 behind its output.
        joint: ``|sum_k w_k dL_k / dx_l|``, ``[l]``.
        effective: The same with the effective weights ``w_k / S_k`` of multi-way backpropagation.
        weights: The weights ``w_k``.
        divisors: The ``S_k``.
    """

    layers: list[int]
    at: dict[str, int]
    by_loss: dict[str, np.ndarray]
    joint: np.ndarray
    effective: np.ndarray
    weights: dict[str, float]
    divisors: dict[str, float]


def measure(trained: Trained) -> Norms:
    """Measures the gradients of a batch at all layers.

    The weights are the objectives' own: what a weighting multiplied them by is not in it, and the
    effective ones are those with divided steps.

    Args:
        trained: A trained network.

    Returns:
        The norms, over a batch and all values of a feature.

    Raises:
        ValueError: If the backbone is not a plan.
    """
    parts = trained.parts
    plan = getattr(parts.network.backbone, "plan", None)
    if plan is None:
        raise ValueError("The supervision ratio is of the layers of a plan; the backbone has none.")
    layers = plan.layers()
    at = {name: layers[end] for name, end in _ends(trained, list(layers)).items()}
    reached = Reached.of(parts.reach, parts.main_objective())
    weights = objectives.weights(parts.objectives, trained.step)
    divisors = reached.divisors(weights)
    effective = {name: weights[name] / divisors[name] for name in weights}

    def norms(offsets: Any) -> Any:
        def losses(offsets: Any, model_state: Any) -> Any:
            # The gradient to an offset of zero is that to the features that it is added to.
            def offset(variables: Any, image: Array, **settings: Any) -> Any:
                return parts.network.apply(
                    {**variables, OFFSETS: {"backbone": offsets}}, image, **settings
                )

            key = jax.random.key(0)
            return make_losses(offset, parts.objectives, trained.batch, key)(
                trained.params, model_state
            )

        named, _, pull_back = gradients.of_each(losses, offsets, trained.model_state)
        loss_gradients = {name: pull_back(name) for name in named}
        norms_by_loss = {name: _norm(gradient) for name, gradient in loss_gradients.items()}
        return (
            norms_by_loss,
            _norm(_sum(loss_gradients, weights)),
            _norm(_sum(loss_gradients, effective)),
        )

    order = list(layers)
    zeros = _zeros(trained, order)
    by_loss, joint, total = jax.jit(norms)(zeros)

    def listed(values: Mapping[str, Array]) -> np.ndarray:
        return np.array([float(values[name]) for name in order])

    return Norms(
        layers=[layers[name] for name in order],
        at=at,
        by_loss={name: listed(values) for name, values in by_loss.items() if name in at},
        joint=listed(joint),
        effective=listed(total),
        weights={name: float(weights[name]) for name in at},
        divisors={name: float(divisors[name]) for name in at},
    )


def _ends(trained: Trained, blocks: list[str]) -> dict[str, str]:
    """Returns the block behind which each loss is taken; losses of other outputs are left out."""
    heads = trained.parts.network.heads
    ends = {}
    for name, objective in trained.parts.objectives.items():
        attached: tuple[str, ...] = getattr(heads.get(objective.output), "endpoints", ())
        if objective.output == MAIN:
            ends[name] = blocks[-1]
        elif len(attached) == 1 and attached[0] in blocks:
            ends[name] = attached[0]
    return ends


def _zeros(trained: Trained, blocks: list[str]) -> dict[str, Array]:
    """Makes the offsets of all blocks."""
    backbone, variables = trained.parts.network.backbone, trained.variables
    shapes = jax.eval_shape(
        lambda image: features(backbone, variables, image, blocks), trained.batch["image"]
    )
    return {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in blocks}


def _norm(gradient: Mapping[str, Array]) -> dict[str, Array]:
    # bfloat16 has too few digits for a sum of many squares.
    wide = {name: values.astype(jnp.float32) for name, values in gradient.items()}
    return {name: jnp.sqrt((values**2).sum()) for name, values in wide.items()}


def _sum(loss_gradients: Mapping[str, Any], weights: Mapping[str, Array]) -> Any:
    scaled = [jax.tree.map(lambda g, n=n: weights[n] * g, g) for n, g in loss_gradients.items()]
    return jax.tree.map(lambda *g: sum(g[1:], g[0]), *scaled)


def ratios(norms: Norms) -> dict[str, np.ndarray]:
    """Returns the supervision ratio of each way of backpropagation at each layer.

    Of loss k alone at a layer l below its own ``L_k``: ``|dL_k/dx_{L_k}| / |dL_k/dx_l|``. ``main``:
    that of the main loss, as of a network without auxiliary outputs. ``multiway`` (and pair-wise,
    whose gradients are the same at the same features): that of the nearest output behind the layer.
    ``joint``: ``sqrt(sum_k |w_k dL_k/dx_{L_k}|^2) / |sum_k w_k dL_k/dx_l|`` over all outputs behind
    the layer; the paper's numerator is the norm of a sum (Eq. 5), but features of different shapes
    can't be added. ``effective_joint``: likewise with effective weights.

    >>> norms = Norms(
    ...     layers=[1, 2],
    ...     at={"main": 2},
    ...     by_loss={"main": np.array([10.0, 5.0])},
    ...     joint=np.array([10.0, 5.0]),
    ...     effective=np.array([10.0, 5.0]),
    ...     weights={"main": 1.0},
    ...     divisors={"main": 1.0},
    ... )
    >>> ratios(norms)["main"]
    array([0.5, 1. ])

    Args:
        norms: The norms of a network.

    Returns:
        ``{way: [l]}``, mostly in [0, 1].
    """
    order = sorted(norms.at, key=lambda name: norms.at[name])
    main = order[-1]
    own = {n: norms.by_loss[n][norms.layers.index(norms.at[n])] for n in order}
    by_way: dict[str, list[float]] = {way: [] for way in ("main", "joint", "multiway")}
    by_way["effective_joint"] = []
    for i, layer in enumerate(norms.layers):
        behind = [n for n in order if norms.at[n] >= layer]
        nearest = behind[0]
        by_way["main"].append(own[main] / norms.by_loss[main][i])
        by_way["multiway"].append(own[nearest] / norms.by_loss[nearest][i])
        squares = {n: (norms.weights[n] * own[n]) ** 2 for n in behind}
        by_way["joint"].append(np.sqrt(sum(squares.values())) / norms.joint[i])
        shares = [squares[n] / norms.divisors[n] ** 2 for n in behind]
        by_way["effective_joint"].append(np.sqrt(sum(shares)) / norms.effective[i])
    return {way: np.array(values) for way, values in by_way.items()}


def draw(measured: Mapping[str, tuple[Norms, str]]) -> Figure:
    """Draws the ratios, a panel for each run.

    >>> slopes = np.array([10.0, 5.0])
    >>> one = Norms([1, 2], {"main": 2}, {"main": slopes}, slopes, slopes, {"main": 1}, {"main": 1})
    >>> figure = draw({"ResNet": (one, "joint")})
    >>> [line.get_label() for line in figure.axes[0].get_legend_handles_labels()[0]]
    ['main loss alone (ResNet)']

    Args:
        measured: For each run, by its title, its norms and the rule that it was trained with.
    """
    figure = Figure(figsize=(max(4.6 * len(measured), 6.4), 4.0), layout="constrained")
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, (title, (norms, rule)) in zip(panels, measured.items(), strict=True):
        # Pair-wise has the gradients of multi-way; of one output all ways are the same.
        chosen = {"pairwise": "multiway"}.get(rule, rule) if len(norms.at) > 1 else "main"
        for way, values in ratios(norms).items():
            if len(norms.at) == 1 and way != "main":
                continue
            width = 2.6 if way == chosen else 1.0
            # The two joint ones are often the same.
            style = "--" if way == "joint" else "-"
            line: Any = {"color": _COLOURS[way], "lw": width, "ls": style, "label": _TITLES[way]}
            axes.plot(norms.layers, values, zorder=3 if style == "--" else 2, **line)
        for layer in norms.at.values():
            axes.axvline(layer, color="0.5", lw=0.8, ls=":", zorder=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("layer (dotted: outputs)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("supervision ratio")
    figure.suptitle("share of an output's own gradient in the gradient at each layer", fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, action="append", help="a run; can be repeated")
    parser.add_argument("--out", default="supervision.png", help="the picture")
    parser.add_argument("--json", action="store_true", help="print the ratios as JSON")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_picture(options.out)
        measured = {}
        for title, path in titles(options.workdir).items():
            trained = Trained.load(path, overrides)
            measured[title] = (measure(trained), trained.parts.config.update_rule.name)
        draw(measured).savefig(out, dpi=130)
    if options.json:
        lines = {
            title: {"layers": norms.layers, **{k: v.tolist() for k, v in ratios(norms).items()}}
            for title, (norms, _) in measured.items()
        }
        print(json.dumps(lines))
    else:
        print(out)


if __name__ == "__main__":
    main()
