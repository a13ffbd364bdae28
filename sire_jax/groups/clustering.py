"""Groups of labels by their distances: those that a network confuses together, or kept apart."""

from collections.abc import Sequence

import numpy as np

from sire_jax.groups.confusion import check_confusion
from sire_jax.groups.partition import Groups
from sire_jax.text import listed, nearest

CRITERIA = ("join", "split")
METHODS = ("paper", "released")
# Distances that differ by less, relative to the largest, are equal but for rounding.
TIE = 1e-12


def distances(confusion: np.ndarray, criterion: str = "join") -> np.ndarray:
    """Turns a confusion matrix into distances between labels.

    ``D = (D^ + D^T) / 2`` with ``D^ = 1 - F`` to join what is confused, or ``D^ = F`` to split it;
    F has the rows of the confusion matrix divided by their sums, and then a diagonal of zeros
    (Palacio et al., *Contextual Classification Using Self-Supervised Auxiliary Models for Deep
    Neural Networks*, Section 3.1, Eqs. 1 and 2).

    >>> distances(np.array([[8, 2], [1, 9]])).round(2).tolist()
    [[0.0, 0.85], [0.85, 0.0]]

    Args:
        confusion: ``[classes, classes]``, counts, a row for each true label.
        criterion: ``"join"`` or ``"split"``.

    Returns:
        ``[classes, classes]``, in [0, 1], symmetric; 0 on the diagonal, which nothing reads.

    Raises:
        ValueError: If there is no such criterion, or the matrix holds something else.
    """
    if criterion not in CRITERIA:
        raise ValueError(
            f"There is no criterion '{criterion}' of grouping.{nearest(criterion, CRITERIA)}"
        )
    check_confusion(confusion)
    counts = np.asarray(confusion, np.float64)
    rates = counts / counts.sum(1, keepdims=True)
    directed = 1 - rates if criterion == "join" else rates
    symmetric = (directed + directed.T) / 2
    np.fill_diagonal(symmetric, 0)
    return symmetric


def balanced(distances: np.ndarray, number: int, seed: int) -> tuple[int, ...]:
    """Groups labels by their distances into groups of one size.

    Each group starts with one of the labels that have the highest average distance to all others;
    then always the unassigned label goes first that has the smallest distance to a group with room
    (Palacio et al., Section 3.1). The distance of a label to a group is the mean of those to its
    labels, of which the paper says nothing. Ties are broken at random: among the labels to start
    with, and among pairs of label and group.

    Of C labels every group gets ``floor(C / k)``, and ``C mod k`` groups one more, so that sizes
    are within one of each other. (The paper's "fewer than c / k" lets all groups grow to
    ``ceil(C / k)``, which leaves others smaller than that where k does not divide C.)

    >>> far = np.array([[0, 1, 9, 8], [1, 0, 7, 7], [9, 7, 0, 1], [8, 7, 1, 0]])
    >>> balanced(far, 2, seed=0)
    (0, 0, 1, 1)

    Args:
        distances: ``[classes, classes]``, symmetric; the diagonal is not read.
        number: How many groups, k, in 2..classes // 2.
        seed: Seed of the random choices, at least 0.

    Returns:
        The group of each label; groups are numbered by their first label.

    Raises:
        ValueError: If a value is out of range, or the distances are not square or not finite.
    """
    check_number(number, len(distances))
    size, larger = divmod(len(distances), number)
    return _cluster(distances, number, size, larger, seed)


def released(confusion: np.ndarray, number: int, seed: int) -> tuple[int, ...]:
    """Groups labels as the program does that the authors of SSAL have released.

    ``D = max(M) - M`` of the mean M of F and its transpose (see ``distances``), which is that of
    "join" but for a constant. As in ``balanced``, but a group is full when it holds ``1.1 C / k``
    labels or more, so that it may have up to ``ceil(1.1 C / k)`` and others have few: sizes are not
    within one of each other. There is always room, since the groups hold ``1.1 C`` together.

    >>> confusion = np.array([[7, 3, 0, 0], [3, 6, 0, 1], [0, 0, 7, 3], [0, 1, 3, 6]])
    >>> released(confusion, 2, seed=0)
    (0, 0, 1, 1)

    Args:
        confusion: ``[classes, classes]``, counts, a row for each true label.
        number: How many groups, k, in 2..classes // 2.
        seed: Seed of the random choices, at least 0.

    Returns:
        The group of each label; groups are numbered by their first label.

    Raises:
        ValueError: If a value is out of range, or the matrix holds something else.
    """
    mean = distances(confusion, "split")
    check_number(number, len(mean))
    # In integers: 1.1 * 20 / 2 is not 11.
    size = -(-11 * len(mean) // (10 * number))
    return _cluster(mean.max() - mean, number, size, 0, seed)


def check_number(number: int, classes: int) -> None:
    """Checks a number of groups.

    Raises:
        ValueError: If it is not in 2..classes // 2 (Palacio et al., Section 3.1).
    """
    if classes < 4:
        raise ValueError(f"{classes} labels can't be grouped; it takes 4, for 2 groups of 2.")
    if not 2 <= number <= classes // 2:
        raise ValueError(
            f"{classes} labels can't be put into {number} groups; it should be 2..{classes // 2}:"
            " at least two groups, of two labels on average (2 <= k <= C / 2)."
        )


def _cluster(
    distances: np.ndarray, number: int, size: int, larger: int, seed: int
) -> tuple[int, ...]:
    """Grows groups of up to ``size`` labels, and ``larger`` of them of one more."""
    if seed < 0:
        raise ValueError(f"The seed is {seed}; it should be at least 0.")
    generator = np.random.default_rng(seed)
    distances = _checked(distances)
    tolerance = TIE * np.abs(distances).max()
    starts = _starts(distances, number, tolerance, generator)
    groups = np.full(len(distances), -1)
    groups[starts] = np.arange(number)
    sums, sizes = distances[:, starts], np.ones(number, int)
    # Of each label to each group; infinite where the label is taken or the group is full.
    means = sums.copy()
    means[starts] = np.inf
    for _ in range(len(distances) - number):
        ties = np.flatnonzero(means <= means.min() + tolerance)
        label, group = divmod(int(generator.choice(ties)), number)
        groups[label] = group
        sizes[group] += 1
        sums[:, group] += distances[:, label]
        means[:, group] = np.where(groups < 0, sums[:, group] / sizes[group], np.inf)
        means[label] = np.inf
        room = size + int((sizes > size).sum() < larger)
        means[:, sizes >= room] = np.inf
    return _numbered(groups)


def _checked(distances: np.ndarray) -> np.ndarray:
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"Distances have the shape {distances.shape}; it should be square.")
    # A copy: the caller's diagonal stays as it is.
    values = np.array(distances, np.float64)
    np.fill_diagonal(values, 0)
    if not np.isfinite(values).all():
        raise ValueError("Distances hold NaN or infinity; all should be finite.")
    return values


def _starts(
    distances: np.ndarray, number: int, tolerance: float, generator: np.random.Generator
) -> np.ndarray:
    """Chooses the labels with the highest average distance to all others, ties at random."""
    averages = distances.sum(1) / (len(distances) - 1)
    least = np.sort(averages)[-number]
    above = np.flatnonzero(averages > least + tolerance)
    tied = np.flatnonzero(np.abs(averages - least) <= tolerance)
    drawn = generator.choice(tied, number - len(above), replace=False)
    return np.sort(np.concatenate([above, drawn]))


def _numbered(groups: np.ndarray) -> tuple[int, ...]:
    """Numbers groups by their first label, whatever was drawn."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return tuple(first.argsort().argsort()[inverse].tolist())


def coarse(
    labels: np.ndarray, coarse: np.ndarray, names: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Groups labels by the coarse labels that a data set has beside them.

    >>> coarse(np.array([0, 1, 2, 0]), np.array([5, 8, 5, 5]))  # labels 0 and 2 are of 5
    (0, 1, 0)

    Args:
        labels: Integers ``[n]``.
        coarse: Coarse labels of the same examples, integers ``[n]``.
        names: The names of the labels; default: their numbers, up to the largest.

    Returns:
        The group of each label; groups have the order of the coarse labels.

    Raises:
        ValueError: If a label has several coarse labels or none.
    """
    names = [str(i) for i in range(int(labels.max()) + 1)] if names is None else names
    pairs = np.unique(np.stack([labels, coarse], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0], minlength=len(names))
    several = np.flatnonzero(counts > 1)
    if len(several):
        own = pairs[pairs[:, 0] == several[0], 1].tolist()
        raise ValueError(
            f"The label '{names[several[0]]}' has the coarse labels {own}; each label should have"
            " one, to be in one group."
        )
    absent = [names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if absent:
        raise ValueError(f"There are no images, and so no coarse label, of {listed(absent)}.")
    return tuple(np.unique(pairs[:, 1], return_inverse=True)[1].tolist())


def mean_confusion(confusion: np.ndarray, assignment: Sequence[int]) -> tuple[float, float]:
    """Returns how often two labels of one group are confused, and two of different groups.

    >>> confusion = np.array([[8, 2, 0, 0], [2, 8, 0, 0], [0, 0, 7, 3], [0, 0, 3, 7]])
    >>> mean_confusion(confusion, (0, 0, 1, 1))
    (0.25, 0.0)

    Args:
        confusion: ``[classes, classes]``, counts, a row for each true label.
        assignment: The group of each label.

    Returns:
        Means over pairs of labels of the share of one's images taken for the other, in [0, 1]. NaN
        where there is no such pair.
    """
    mean, together = distances(confusion, "split"), np.equal.outer(assignment, assignment)
    other = ~np.eye(len(mean), dtype=bool)
    parts = (mean[together & other], mean[~together])
    within, across = (float(part.mean()) if part.size else float("nan") for part in parts)
    return within, across


def make(
    confusion: np.ndarray,
    names: Sequence[str],
    numbers: Sequence[int],
    criterion: str = "join",
    method: str = "paper",
    seed: int = 0,
) -> dict[int, Groups]:
    """Makes groupings of several numbers of groups.

    >>> confusion = np.array([[7, 3, 0, 0], [3, 6, 0, 1], [0, 0, 7, 3], [0, 1, 3, 6]])
    >>> make(confusion, ("cat", "dog", "car", "bus"), numbers=(2,))[2].labels()
    (('cat', 'dog'), ('car', 'bus'))

    Args:
        confusion: ``[classes, classes]``, counts, a row for each true label.
        names: The names of the labels.
        numbers: Numbers of groups.
        criterion: ``"join"`` or ``"split"``.
        method: ``"paper"`` (``balanced``) or ``"released"``.
        seed: Seed of the random choices, at least 0.

    Returns:
        Groupings by their number of groups.

    Raises:
        ValueError: If a value is out of range, there is no such criterion or method, or the matrix
            holds something else.
    """
    if method not in METHODS:
        raise ValueError(f"There is no method '{method}' of grouping.{nearest(method, METHODS)}")
    check_confusion(confusion, names)
    apart = distances(confusion, criterion)
    assignments = {
        number: released(confusion, number, seed)
        if method == "released"
        else balanced(apart, number, seed)
        for number in numbers
    }
    return {n: Groups(tuple(names), assignment) for n, assignment in assignments.items()}
