"""Shapley values and interactions, from the values of all subsets or of drawn orders."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

Subset = frozenset[str]


def subsets(names: Sequence[str]) -> list[Subset]:
    """Returns all subsets, smaller ones first.

    >>> [sorted(subset) for subset in subsets(("a", "b"))]
    [[], ['a'], ['b'], ['a', 'b']]
    """
    sizes = range(len(names) + 1)
    return [frozenset(s) for size in sizes for s in itertools.combinations(names, size)]


def shapley(values: Mapping[Subset, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the Shapley value of each member, from the values of all subsets.

    ``phi_k = sum_{S without k} |S|! (K - |S| - 1)! / K! (v(S + k) - v(S))`` (Shapley, 1953)

    >>> worth = {(): 0.0, ("a",): 1.0, ("b",): 2.0, ("a", "b"): 5.0}
    >>> solved = shapley({frozenset(s): np.array(v) for s, v in worth.items()})
    >>> {name: value.item() for name, value in solved.items()}  # 1 or 3, and 2 or 4
    {'a': 2.0, 'b': 3.0}

    Args:
        values: Of every subset a number, or one for each seed, ``[seeds]``.
    """
    names = sorted(frozenset().union(*values))
    size = len(names)

    def value(name: str) -> np.ndarray:
        without = [s for s in values if name not in s]
        chances = [1 / (size * math.comb(size - 1, len(s))) for s in without]
        added = [np.asarray(values[s | {name}] - values[s]) for s in without]
        return np.sum([c * g for c, g in zip(chances, added, strict=True)], axis=0)

    return {name: value(name) for name in names}


def interactions(values: Mapping[Subset, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """Returns what each two members gain together beyond what each gains without the other.

    ``I_kl = sum_{S without k, l} |S|! (K - |S| - 2)! / (K - 1)!
    (v(S + k + l) - v(S + k) - v(S + l) + v(S))`` (Grabisch and Roubens, 1999)

    >>> worth = {(): 0.0, ("a",): 1.0, ("b",): 2.0, ("a", "b"): 5.0}
    >>> solved = interactions({frozenset(s): np.array(v) for s, v in worth.items()})
    >>> {pair: value.item() for pair, value in solved.items()}
    {('a', 'b'): 2.0}

    Args:
        values: Of every subset a number, or one for each seed, ``[seeds]``.
    """
    names = sorted(frozenset().union(*values))
    size = len(names)

    def value(a: str, b: str) -> np.ndarray:
        without = [s for s in values if not s & {a, b}]
        chances = [1 / ((size - 1) * math.comb(size - 2, len(s))) for s in without]
        gains = [
            values[s | {a, b}] - values[s | {a}] - values[s | {b}] + values[s] for s in without
        ]
        return np.sum([c * g for c, g in zip(chances, gains, strict=True)], axis=0)

    return {pair: value(*pair) for pair in itertools.combinations(names, 2)}


def orders(names: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """Draws orders of objectives and their reverses, which even out who comes first.

    Args:
        names: The objectives.
        count: How many orders to draw.
        seed: Of the drawing.

    Returns:
        ``2 count`` orders (Castro et al., *Polynomial Calculation of the Shapley Value Based on
        Sampling*, 2009; with reverses, Mitchell et al., 2022).
    """
    generator = np.random.default_rng(seed)
    drawn = [tuple(str(n) for n in generator.permutation(names)) for _ in range(count)]
    return [order for chosen in drawn for order in (chosen, chosen[::-1])]


def prefixes(order: Sequence[str]) -> list[Subset]:
    """Returns the subsets that grow by one objective of an order at a time, the empty one first."""
    return [frozenset(order[:size]) for size in range(len(order) + 1)]


def gains(drawn: Sequence[Sequence[str]], values: Mapping[Subset, float]) -> dict[str, float]:
    """Returns the mean gain of each objective where it comes in drawn orders.

    >>> worth = {frozenset(s): len(s) ** 2 for s in ("", "a", "b", "ab")}
    >>> gains([("a", "b"), ("b", "a")], worth)
    {'a': 2.0, 'b': 2.0}

    Args:
        drawn: Orders.
        values: Of the subsets that they pass.
    """
    added: dict[str, list[float]] = {name: [] for name in sorted(drawn[0])}
    for order in drawn:
        for name, before, after in zip(order, prefixes(order), prefixes(order)[1:], strict=False):
            added[name].append(float(values[after] - values[before]))
    return {name: float(np.mean(each)) for name, each in added.items()}
