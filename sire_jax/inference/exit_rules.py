"""When an image leaves a network at an exit, and thresholds for given shares or a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def max_probability(logits: Array) -> Array:
    """The largest probability, ``max_c softmax(logits)_c``.

    Args:
        logits: ``[…, classes]``.

    Returns:
        ``[…]``, in (0, 1].
    """
    return jax.nn.softmax(logits).max(-1)


def entropy(logits: Array) -> Array:
    """The entropy of the probabilities, ``-sum_c p_c log p_c`` with ``p = softmax(logits)``.

    Args:
        logits: ``[…, classes]``.

    Returns:
        ``[…]``, in nats, in [0, log classes].
    """
    log_p = jax.nn.log_softmax(logits)
    # A probability of 0 adds nothing, even where its logarithm is minus infinity.
    terms = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, jnp.float32(0))
    return jnp.clip(-terms.sum(-1), 0.0, math.log(logits.shape[-1]))


@dataclass(frozen=True)
class Rule:
    """Tells by a score whether an image is certain enough to leave at an exit.

    >>> rule = RULES["entropy"]  # of which a small one is certain
    >>> rule.leaves(np.array([0.1, 0.9]), threshold=0.5).tolist()
    [True, False]

    Attributes:
        name: Its name.
        scores: Maps logits ``[…, classes]`` to scores ``[…]``.
        sign: 1 where a large score is certain: leave at ``score >= threshold``; -1 where a small
            one is: leave at ``score <= threshold``.
        strictest: The threshold at which only complete certainty leaves.
    """

    name: str
    scores: Callable[[Array], Array]
    sign: int
    strictest: float

    def leaves(self, scores: np.ndarray, threshold: float) -> np.ndarray:
        """Tells which scores leave under a threshold, in float32."""
        limit = np.float32(threshold)
        return scores >= limit if self.sign > 0 else scores <= limit

    def check(self, thresholds: Sequence[float], exits: int, classes: int) -> None:
        """Checks the thresholds of all exits but the last, which has none.

        Raises:
            ValueError: If their number is wrong, or one is outside (0, 1] for ``max_probability``
                or [0, log classes] for ``entropy``.
        """
        if len(thresholds) != exits - 1:
            raise ValueError(
                f"There are {len(thresholds)} thresholds for {exits} exits; give {exits - 1}, one"
                " for each but the last, where all leave."
            )
        most = 1.0 if self.sign > 0 else math.log(classes)
        for value in thresholds:
            # A fitted threshold is a float32.
            above = value > 0 if self.sign > 0 else value >= 0
            if not (above and np.float32(value) <= np.float32(most)):
                bounds = "(0, 1]" if self.sign > 0 else f"[0, log {classes}] = [0, {most:.4f}]"
                raise ValueError(
                    f"A threshold is {value}; for the rule '{self.name}' it should be in {bounds}."
                )


RULES = {
    "max_probability": Rule("max_probability", max_probability, 1, 1.0),
    "entropy": Rule("entropy", entropy, -1, 0.0),
}
_DEFAULT = RULES["max_probability"]


def leave(scores: np.ndarray, thresholds: Sequence[float], rule: Rule = _DEFAULT) -> np.ndarray:
    """Finds the exit at which each image leaves: the first that is certain enough.

    >>> leave(np.array([[0.9, 0.4], [0.5, 0.5]]), thresholds=[0.8]).tolist()
    [0, 1]

    Args:
        scores: ``[exits, n]``, the rule's scores at each exit.
        thresholds: One for each exit but the last, where all leave.
        rule: The rule.

    Returns:
        ``[n]``, in 0..exits - 1.
    """
    certain = [rule.leaves(row, limit) for row, limit in zip(scores[:-1], thresholds, strict=True)]
    return np.argmax([*certain, np.ones(scores.shape[1], bool)], axis=0)


def check_fractions(fractions: Sequence[float], exits: int) -> None:
    """Checks shares of images.

    Raises:
        ValueError: If there is not one for each exit, one is outside [0, 1], or their sum is not 1.
    """
    outside = [share for share in fractions if not 0 <= share <= 1]
    if len(fractions) != exits or outside or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"The fractions are {tuple(fractions)}; there should be {exits}, one for each exit, in"
            " [0, 1] and with the sum 1."
        )


def fit_fractions(
    scores: np.ndarray, fractions: Sequence[float], rule: Rule = _DEFAULT
) -> list[float]:
    """Finds thresholds so that given shares of all images leave at each exit.

    At exit k those leave that are most certain there, among those that have not left, until
    ``ceil(n (f_1 + … + f_k))`` of the n images have left. Images whose score ties with the last of
    them leave, too; where none should leave, the threshold is the strictest there is, under which
    those that are completely certain still leave.

    >>> scores = np.array([[0.25, 0.5, 0.75, 0.875], [0.5, 0.875, 0.75, 1.0]])
    >>> fit_fractions(scores, (0.5, 0.5))  # half of the images leave at the first of two exits
    [0.75]

    Args:
        scores: ``[exits, n]``, the rule's scores of validation images at each exit.
        fractions: The shares, one for each exit, with the sum 1.
        rule: The rule.

    Returns:
        A threshold for each exit but the last.

    Raises:
        ValueError: If the fractions are no shares, there are no images, or a score is not finite.
    """
    check_fractions(fractions, len(scores))
    _check_scores(scores)
    images = scores.shape[1]
    stay = np.ones(images, bool)
    thresholds = []
    for row, share in zip(scores[:-1], np.cumsum(fractions), strict=False):
        # Sums of shares are inexact: 0.1 + 0.2 of ten images are three.
        missing = math.ceil(images * share - 1e-6) - (images - stay.sum())
        certain = np.sort(rule.sign * row[stay])[::-1]
        threshold = rule.sign * float(certain[missing - 1]) if missing > 0 else rule.strictest
        thresholds.append(threshold)
        # By the threshold, not by their number: what ties with the last of them leaves, too.
        stay &= ~rule.leaves(row, threshold)
    return thresholds


def _check_scores(scores: np.ndarray) -> None:
    if not scores.shape[1]:
        raise ValueError("There are no validation images to fit thresholds on.")
    if not np.isfinite(scores).all():
        raise ValueError(
            "An exit's outputs for validation images are not finite, so that there are no"
            " thresholds; were its weights trained?"
        )


def check_budget(costs: Sequence[int], budget: float) -> None:
    """Checks a budget of multiply-adds.

    Raises:
        ValueError: If it is below the cost of the first exit or above that of the last.
    """
    if not costs[0] <= budget <= costs[-1]:
        raise ValueError(
            f"The budget is {budget:,.0f} multiply-adds an image; it should be between"
            f" {costs[0]:,}, with which all leave at the first exit, and {costs[-1]:,}, with which"
            " all leave at the last."
        )


# Natural logarithms of q between which there is nothing but one exit.
_LOG_Q = 50.0


def fit_budget(
    scores: np.ndarray, costs: Sequence[int], budget: float, rule: Rule = _DEFAULT
) -> list[float]:
    """Finds thresholds so that an image costs at most a budget, in the mean.

    The shares of images that leave are geometric, ``f_k = q^k / sum_j q^j``, and q is the largest
    with ``sum_k f_k C_k <= budget``, found by bisection (Huang et al., *Multi-Scale Dense Networks
    for Resource Efficient Image Classification*, 2018, Section 4, where an image that reaches an
    exit leaves with the probability 1 - q: ``f_k = z q^(k-1) (1 - q)``). q may be above 1, without
    which no more than the mean of all costs could be spent. The mean cost is that of the images
    given, of which a whole number leaves at each exit.

    >>> scores = np.array([[0.25, 0.5, 0.75, 0.875], [0.5, 0.875, 0.75, 1.0]])
    >>> fit_budget(scores, costs=(10, 40), budget=25)  # as many images as may cost 40
    [0.75]

    Args:
        scores: ``[exits, n]``, the rule's scores of validation images at each exit.
        costs: Multiply-adds of an image that leaves at each exit, ascending.
        budget: Mean multiply-adds of an image, in [first cost, last cost].
        rule: The rule.

    Returns:
        A threshold for each exit but the last. On these images the budget is met or, by less than
        one image or by ties, not used up.

    Raises:
        ValueError: If the budget can't be met, there are no images, or a score is not finite.
    """
    check_budget(costs, budget)
    total = np.asarray(costs, np.int64)

    def thresholds(log_q: float) -> list[float]:
        powers = np.exp(log_q * np.arange(len(costs)) - max(0.0, log_q * (len(costs) - 1)))
        return fit_fractions(scores, powers / powers.sum(), rule)

    def affordable(log_q: float) -> bool:
        return total[leave(scores, thresholds(log_q), rule)].mean() <= budget

    low, high = -_LOG_Q, _LOG_Q
    # What is halved below needs an upper end that costs too much.
    if affordable(high):
        return thresholds(high)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return thresholds(low)
