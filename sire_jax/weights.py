"""The weights of objectives: by depth, and multiplied."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optax
from jax import Array

from sire_jax.objectives import Objective, Objectives


def depth_weights(layers: Sequence[int], nu: float) -> list[float]:
    """Returns weights that fall with the distance from the deepest auxiliary output.

    ``gamma_k = max(0.01, (L_k / L_K)^nu)`` (Guo et al., *The Shallow End*, Section 3.1)

    >>> [round(weight, 3) for weight in depth_weights(layers=(15, 25, 35, 45), nu=2.0)]
    [0.111, 0.309, 0.605, 1.0]

    Args:
        layers: The layers ``L_k`` of the auxiliary outputs.
        nu: How fast they fall, at least 0; 1 to 2 is advised, 0 weighs all alike.

    Returns:
        A weight in [0.01, 1] for each.

    Raises:
        ValueError: If nu is negative or not finite.
    """
    if not 0 <= nu < math.inf:
        raise ValueError(
            f"nu is {nu}; it should be at least 0 and finite: the weights of shallow outputs are"
            " (L_k / L_K)^nu."
        )
    return [max(0.01, (layer / max(layers)) ** nu) for layer in layers]


def scaled(objectives: Objectives, factors: Mapping[str, Array | float]) -> dict[str, Objective]:
    """Multiplies weights; 0 leaves an objective out.

    Args:
        objectives: Objectives by name.
        factors: By name, at least 0, may be traced; of others 1.
    """
    return {
        name: replace(o, weight=_times(factors[name], o.weight)) if name in factors else o
        for name, o in objectives.items()
    }


def _times(factor: Array | float, weight: float | optax.Schedule) -> Any:
    return (lambda step: factor * weight(step)) if callable(weight) else factor * weight
