"""Whether the gradients of outputs agree, segment by segment of the parameters that they share.

``python -m sire_jax.diagnostics.conflict --workdir=DIR --out=conflict.png [--json]``

The cosine of the angle between the gradients of two losses: 1 where they agree, below 0 where a
step down one climbs the other. A panel for each group of parameters that the same losses reach: of
outputs at rising depth the segments of the network between them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sire_jax.job import command
from sire_jax.networks import MAIN
from sire_jax.runs.trained import Trained
from sire_jax.step import make_losses
from sire_jax.updates import Losses, gradients
from sire_jax.updates.gradients import gramians
from sire_jax.updates.reached import Reached

PyTree = Any
Cosines = dict[tuple[str, ...], np.ndarray]


def cosines_of(
    losses: Losses,
    reach: Mapping[str, PyTree],
    params: PyTree,
    model_state: PyTree,
    main: str = MAIN,
) -> Cosines:
    """Measures the cosines between the gradients of losses.

    ``cos_ij = g_i . g_j / (|g_i| |g_j|)``

    >>> import jax.numpy as jnp
    >>> def losses(params, model_state):
    ...     x = params["shared"]
    ...     named = {"exit": x[0] + x[1], "main": x[0] * params["own"]}
    ...     return named, ({}, model_state)
    >>> params = {"shared": jnp.array([1.0, 2.0]), "own": jnp.array(3.0)}
    >>> reach = {"exit": {"shared": True, "own": False}, "main": {"shared": True, "own": True}}
    >>> cosines_of(losses, reach, params, {})["exit", "main"].round(2).tolist()
    [[1.0, 0.71], [0.71, 1.0]]

    Args:
        losses: The function of the losses, from ``step.make_losses``.
        reach: For each loss a tree of booleans over the parameters, from ``step.find_reach``.
        params: Parameters.
        model_state: State of the network.
        main: Name of the final output's loss.

    Returns:
        For each group of shared parameters, by the k losses that reach it, ``[k, k]``; those that
        most losses share first.

    Raises:
        ValueError: If no two losses share a parameter.
    """
    reached = Reached.of(reach, main)
    if not reached.groups():
        raise ValueError(f"No two of the losses {', '.join(reached.names)} share a parameter.")

    def products(params: PyTree) -> list[Array]:
        _, _, pull_back = gradients.of_each(losses, params, model_state)
        loss_gradients = {name: pull_back(name) for name in reached.names}
        return list(gramians(loss_gradients, reached).values())

    by_group = zip(reached.groups(), jax.jit(products)(params), strict=True)
    cosines = {names: _cosines(gramian) for names, gramian in by_group}
    return dict(sorted(cosines.items(), key=lambda item: -len(item[0])))


def measure(trained: Trained) -> Cosines:
    """Measures the cosines between the gradients of a batch of a trained network.

    Args:
        trained: A trained network.

    Returns:
        As ``cosines_of``.

    Raises:
        ValueError: If no two losses share a parameter.
    """
    parts = trained.parts
    losses = make_losses(parts.network.apply, parts.objectives, trained.batch, jax.random.key(0))
    return cosines_of(
        losses, parts.reach, trained.params, trained.model_state, parts.main_objective()
    )


def _cosines(gramian: Array) -> np.ndarray:
    wide = np.asarray(gramian, np.float64)
    norms = np.sqrt(np.diag(wide))
    # A gradient of zero has no angle: its cosines are 0.
    return wide / np.maximum(np.outer(norms, norms), np.finfo(np.float64).tiny)


def draw(cosines: Mapping[tuple[str, ...], np.ndarray]) -> Figure:
    """Draws a matrix of cosines for each group, with their values.

    >>> figure = draw({("exit", "main"): np.array([[1.0, -0.2], [-0.2, 1.0]])})
    >>> figure.axes[0].get_title()
    'what exit and main share'
    """
    figure = Figure(figsize=(3.2 * len(cosines) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(cosines), squeeze=False)[0]
    colours = ScalarMappable(Normalize(-1, 1), "RdBu_r")
    for axes, (names, matrix) in zip(panels, cosines.items(), strict=True):
        axes.imshow(matrix, norm=colours.norm, cmap=colours.cmap)
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(f"what {', '.join(names[:-1])} and {names[-1]} share", fontsize=7)
    figure.colorbar(colours, ax=list(panels), label="cosine of gradients", shrink=0.8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--out", default="conflict.png", help="the picture")
    parser.add_argument("--json", action="store_true", help="print the cosines as JSON")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_picture(options.out)
        cosines = measure(Trained.load(options.workdir, overrides))
        draw(cosines).savefig(out, dpi=130)
    if options.json:
        groups = [{"losses": list(n), "cosines": m.tolist()} for n, m in cosines.items()]
        print(json.dumps(groups))
    else:
        print(out)


if __name__ == "__main__":
    main()
