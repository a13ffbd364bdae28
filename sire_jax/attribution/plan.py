"""Which networks are trained for each seed, and what their figures say."""

from collections.abc import Mapping, Sequence

import numpy as np

from sire_jax.attribution.results import Attribution
from sire_jax.attribution.shapley import (
    Subset,
    gains,
    interactions,
    orders,
    prefixes,
    shapley,
    subsets,
)
from sire_jax.objectives import Objectives
from sire_jax.text import nearest

Order = tuple[str, ...]
# Of so many objectives all subsets are trained: 64 networks for each seed. Of more a sample.
MOST_EXACT = 6
# Orders in which objectives of a sample come, and their reverses.
ORDERS = 4


def orders_for(names: Sequence[str], sample: int | None) -> int:
    """Returns how many orders to draw of so many objectives; 0: train all subsets.

    Raises:
        ValueError: If ``sample`` is below 0.
    """
    if sample is None:
        return ORDERS if len(names) > MOST_EXACT else 0
    if sample < 0:
        raise ValueError(f"sample is {sample}; it should be at least 0.")
    return sample


def networks(names: Sequence[str], count: int, seed: int) -> tuple[list[Subset], list[Order]]:
    """Returns the subsets to train with a seed, all or those of drawn orders, and the orders.

    Args:
        names: The auxiliary objectives.
        count: How many orders to draw, besides their reverses; 0: all subsets, no order.
        seed: Of the drawing.
    """
    if not count:
        return subsets(names), []
    drawn = orders(names, count, seed)
    ends = [frozenset[str](), frozenset(names)]
    between = [subset for order in drawn for subset in prefixes(order)[1:-1]]
    # As many for each seed, be some the same: one program trains them.
    return [*ends, *between], drawn


def collect(
    metric: str, names: Sequence[str], count: int, measured: Mapping[int, Sequence[float]]
) -> Attribution:
    """Puts together what was measured of networks with subsets of the objectives.

    Args:
        metric: What was measured.
        names: The auxiliary objectives.
        count: As of ``networks``.
        measured: By seed the values of the subsets of ``networks``, and of the control last.
    """
    by_seed, worth, pairs = [], [], []
    for seed, values in measured.items():
        chosen, drawn = networks(names, count, seed)
        by_subset = dict(zip(chosen, values, strict=False))
        arrays = {subset: np.asarray(value) for subset, value in by_subset.items()}
        by_seed.append(by_subset)
        worth.append(gains(drawn, by_subset) if drawn else shapley(arrays))
        pairs.append({} if drawn or len(names) < 2 else interactions(arrays))
    everywhere = [s for s in by_seed[0] if all(s in values for values in by_seed)]
    return Attribution(
        metric,
        {"+".join(sorted(s)): [float(values[s]) for values in by_seed] for s in everywhere},
        [float(values[-1]) for values in measured.values()],
        {name: [float(values[name]) for values in worth] for name in worth[0]},
        {"+".join(pair): [float(values[pair]) for values in pairs] for pair in pairs[0]},
        bool(count),
    )


def factors_of(subset: Subset, names: Sequence[str]) -> dict[str, float]:
    """Returns what the weights of auxiliary objectives are multiplied by, for a subset."""
    return {name: float(name in subset) for name in names}


def effective_factors(weights: Mapping[str, float], main: str) -> dict[str, float]:
    """Returns the factors of the control: the main objective alone, with the weights of all.

    >>> effective_factors({"exit": 0.5, "main": 1.0}, "main")
    {'exit': 0.0, 'main': 1.5}

    Args:
        weights: Of all objectives, at the first step.
        main: The main one, with a weight above 0.
    """
    silent = dict.fromkeys(weights, 0.0)
    return {**silent, main: sum(weights.values()) / weights[main]}


def auxiliary(objectives: Objectives, main: str) -> list[str]:
    """Returns the names of the auxiliary objectives.

    Raises:
        ValueError: If there is no such main objective, it has no weight, or it is the only one.
    """
    if main not in objectives:
        raise ValueError(f"There is no objective '{main}'.{nearest(main, objectives)}")
    if not float(objectives[main].weight_at(0)):
        raise ValueError(f"The objective '{main}' has no weight; it should have one to be learnt.")
    names = [name for name in objectives if name != main]
    if not names:
        raise ValueError(f"There is no objective beside '{main}', of which to tell the worth.")
    return names
