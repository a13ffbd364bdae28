"""Groups labels that a network confuses, or that it keeps apart, for auxiliary objectives.

``python -m sire_jax.grouping --workdir=DIR --groups=20,33,50 --out=groups.json``

A run's main output is applied to its validation images; labels that it takes for each other come
into one group (``--criterion=join``) or into several (``--criterion=split``). Instead of a run, the
counts may come from a file (``--matrix=FILE``, .npy or .csv, with the names of the labels in the
first line of a .csv or, one a line, in ``--classes=FILE``), or the groups from coarse labels that
the data have (``--coarse=coarse_label --data=tfds:cifar100``). The file that comes of it can be
edited. A run's counts are kept by ``--save_matrix=FILE.csv``, for other numbers of groups without
the run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sire_jax import command, configuration, confusion, files, groups, tables
from sire_jax.confusion import check_confusion
from sire_jax.data import sources
from sire_jax.evaluate import open_run
from sire_jax.groups import Groups
from sire_jax.names import listed, nearest
from sire_jax.workdir import read_config

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
    each = 1 - rates if criterion == "join" else rates
    found = (each + each.T) / 2
    np.fill_diagonal(found, 0)
    return found


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
    found = np.full(len(distances), -1)
    found[starts] = np.arange(number)
    sums, sizes = distances[:, starts], np.ones(number, int)
    # Of each label to each group; infinite where the label is taken or the group is full.
    means = sums.copy()
    means[starts] = np.inf
    for _ in range(len(distances) - number):
        ties = np.flatnonzero(means <= means.min() + tolerance)
        label, group = divmod(int(generator.choice(ties)), number)
        found[label] = group
        sizes[group] += 1
        sums[:, group] += distances[:, label]
        means[:, group] = np.where(found < 0, sums[:, group] / sizes[group], np.inf)
        means[label] = np.inf
        room = size + int((sizes > size).sum() < larger)
        means[:, sizes >= room] = np.inf
    return _numbered(found)


def _checked(distances: np.ndarray) -> np.ndarray:
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"Distances have the shape {distances.shape}; it should be square.")
    found = np.array(distances, np.float64)
    np.fill_diagonal(found, 0)
    if not np.isfinite(found).all():
        raise ValueError("Distances hold NaN or infinity; all should be finite.")
    return found


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


def _numbered(found: np.ndarray) -> tuple[int, ...]:
    """Numbers groups by their first label, whatever was drawn."""
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return tuple(first.argsort().argsort()[inverse].tolist())


def coarse(
    labels: np.ndarray, coarse: np.ndarray, names: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Groups labels by the coarse labels that a data set has beside them.

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
    none = [names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if none:
        raise ValueError(f"There are no images, and so no coarse label, of {listed(none)}.")
    return tuple(np.unique(pairs[:, 1], return_inverse=True)[1].tolist())


def mean_confusion(confusion: np.ndarray, assignment: Sequence[int]) -> tuple[float, float]:
    """Returns how often two labels of one group are confused, and two of different groups.

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
        ValueError: If a value is out of range, or the matrix holds something else.
    """
    check_confusion(confusion, names)
    apart = distances(confusion, criterion)
    found = {
        number: released(confusion, number, seed)
        if method == "released"
        else balanced(apart, number, seed)
        for number in numbers
    }
    return {number: Groups(tuple(names), each) for number, each in found.items()}


def report(groupings: dict[int, Groups], confusion: np.ndarray | None = None) -> str:
    """Writes a table with a row per grouping: sizes, and how often labels are confused."""
    header = ["groups", "smallest", "largest", "confusion within", "confusion across"]
    rows = [header if confusion is not None else header[:3]]
    for number, each in groupings.items():
        sizes = np.bincount(each.assignment)
        row = [str(number), str(sizes.min()), str(sizes.max())]
        if confusion is not None:
            row += [tables.number(mean) for mean in mean_confusion(confusion, each.assignment)]
        rows.append(row)
    return tables.align(rows)


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list such as 20,33,50") from None


def _arguments() -> argparse.ArgumentParser:
    defaults = configuration.default().data
    parser = command.parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="directory of a run")
    source.add_argument("--matrix", help="counts, a row for each true label: .npy or .csv")
    source.add_argument("--coarse", help="a kind of coarse labels, such as coarse_label")
    parser.add_argument("--groups", type=_numbers, help="numbers of groups, such as 20,33,50")
    parser.add_argument("--out", default="groups.json", help="the file to write")
    parser.add_argument("--criterion", default="join", choices=CRITERIA)
    parser.add_argument("--method", default="paper", choices=METHODS)
    parser.add_argument("--seed", type=int, default=0, help="seed by which ties are broken")
    parser.add_argument("--split", default="validation", choices=configuration.SPLITS)
    parser.add_argument("--classes", help="with --matrix: names of the labels, one a line")
    parser.add_argument("--save_matrix", help="with --workdir: a file .csv to write the counts to")
    parser.add_argument("--data", help="with --coarse: a data set, such as tfds:cifar100")
    parser.add_argument("--dir", default=defaults.dir, help="with --coarse: where it is prepared")
    return parser


def _check(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks that arguments fit together."""
    if known.seed < 0:
        raise ValueError(f"--seed is {known.seed}; it should be at least 0.")
    if known.coarse is None and not known.groups:
        raise ValueError("--groups is missing; give numbers of groups, such as --groups=20,33,50.")
    if known.coarse is not None and known.groups:
        raise ValueError("--groups goes without --coarse: coarse labels say how many groups.")
    if known.coarse is not None and not known.data:
        raise ValueError("--data is missing; name the data set with coarse labels.")
    pairs = (("classes", "matrix"), ("data", "coarse"), ("save_matrix", "workdir"))
    for name, source in pairs:
        if getattr(known, name) is not None and getattr(known, source) is None:
            raise ValueError(f"--{name} goes only with --{source}.")
    if known.method == "released" and known.criterion != "join":
        raise ValueError("--method=released only joins what is confused; leave --criterion out.")
    if known.save_matrix is not None:
        _check_matrix(known.save_matrix, known.out)
    if overrides and known.workdir is None:
        raise ValueError(f"Unknown without --workdir: {' '.join(overrides)}.")


def _check_matrix(path: str, out: str) -> None:
    """Checks where counts are to be written."""
    if Path(path).suffix != ".csv":
        raise ValueError(f"--save_matrix is {path}; it should be a file .csv.")
    if files.expanded(path).absolute() == files.expanded(out).absolute():
        raise ValueError(f"--save_matrix and --out are both {path}; name two files.")
    command.check_new(path, "--save_matrix")


def _of_coarse(kind: str, data: str, directory: str) -> dict[int, Groups]:
    dataset = sources.load(data, directory, configuration.default().data.cache)
    kinds = [each for each in dataset.classes if each != "label"]
    if kind not in kinds:
        raise ValueError(f"{data} has no coarse labels '{kind}'.{nearest(kind, kinds)}")
    both = (dataset.train.labels, dataset.test.labels)
    label, above = (np.concatenate([part[each] for part in both]) for each in ("label", kind))
    names = dataset.names["label"]
    found = Groups(names, coarse(label, above, names))
    return {found.number: found}


def _of_matrix(
    known: argparse.Namespace, overrides: Sequence[str]
) -> tuple[np.ndarray, Sequence[str]]:
    """Returns the confusion matrix of a file or a run, and the names of its labels."""
    if known.matrix is not None:
        found, own = confusion.read(known.matrix)
        given = own if own and known.classes is None else _names(known.classes, len(found))
        check_confusion(found, given)
        return found, given
    runs = open_run(known.workdir, overrides)
    names = confusion.names_of(runs)
    for number in known.groups:
        check_number(number, len(names))
    return confusion.of_run(runs, known.workdir, known.split), names


def _source(known: argparse.Namespace) -> str:
    """Says what was counted, without a directory of whose machine it was."""
    if known.matrix is not None:
        return f"the confusion matrix {Path(known.matrix).name}"
    return f"{known.split} images of {read_config(known.workdir, building=False).name}"


def _names(path: str | None, classes: int) -> list[str]:
    if path is None:
        return [str(i) for i in range(classes)]
    if not files.expanded(path).is_file():
        raise FileNotFoundError(f"There is no file {path} with the names of the classes.")
    return files.expanded(path).read_text(encoding="utf-8").splitlines()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    known, overrides = _arguments().parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_new(known.out)
        _check(known, overrides)
        counts = None
        if known.coarse is not None:
            groupings = _of_coarse(known.coarse, known.data, known.dir)
            made = f"{known.coarse} of {known.data}"
        else:
            counts, names = _of_matrix(known, overrides)
            if known.save_matrix is not None:
                confusion.write(files.expanded(known.save_matrix), counts, names)
                print(f"{known.save_matrix}: the counts, for --matrix")
            how = known.criterion, known.method, known.seed
            groupings = make(counts, names, known.groups, *how)
            made = f"{_source(known)}, criterion {how[0]}, method {how[1]}, seed {how[2]}"
        groups.save(out, groupings, made)
    print(report(groupings, counts))
    print(f"{known.out}: the groups, which may be edited")


if __name__ == "__main__":
    main()
