"""How much gradient each objective sends to each convolution, measured on a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax import objectives
from sire_jax.backbones.stacked import apart
from sire_jax.data.augmentation import Augmentation, Batch
from sire_jax.metrics import Average, Metrics
from sire_jax.state import TrainState
from sire_jax.step import Apply, make_losses

SPLIT = "gradients"
TOTAL = "total"


def convolutions(params: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lists the paths of the backbone's convolution kernels, shallow to deep.

    >>> kernel = {"kernel": jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)}
    >>> convolutions({"backbone": {"block_10": kernel, "block_9": kernel}, "heads_exit": kernel})
    [('backbone', 'block_9', 'kernel'), ('backbone', 'block_10', 'kernel')]

    Args:
        params: Parameters of a ``Network``, or their shapes.

    Returns:
        Paths of keys, in the order in which the backbone made them.
    """
    leaves = jax.tree_util.tree_leaves_with_path({"backbone": apart(params.get("backbone", {}))})
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
        # As a step splits its key: what is measured is the batch that a step would see.
        augmenting, dropout, _ = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        batch = augment(augmenting, batch) if augment else batch
        losses = make_losses(apply, chosen, batch, dropout)
        named, pull_back = jax.vjp(lambda p: losses(p, state.model_state)[0], state.params)
        weights = objectives.weights(chosen, state.step)
        nothing = {name: jnp.zeros_like(loss) for name, loss in named.items()}
        gradients: dict[str, Any] = {}
        for name in named:
            gradients[name] = pull_back({**nothing, name: weights[name]})[0]
        # The gradient of the weighted sum, without another backward pass.
        gradients[TOTAL] = jax.tree.map(
            lambda *leaves: sum(leaves[1:], leaves[0]), *gradients.values()
        )
        gradients = {name: apart(gradient) for name, gradient in gradients.items()}
        count = jnp.ones((), jnp.float32)
        return {
            f"{name}/{_name(path)}": Average(total=jnp.abs(_at(gradient, path)).mean(), count=count)
            for name, gradient in gradients.items()
            for path in convolutions(state.params)
        }

    return measure


def _at(tree: Any, path: Sequence[str]) -> Array:
    for key in path:
        tree = tree[key]
    return tree
