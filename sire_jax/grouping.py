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

from sire_jax import configuration, files, groups, text
from sire_jax.data import sources
from sire_jax.groups import Groups, coarse, make, mean_confusion
from sire_jax.groups.clustering import CRITERIA, METHODS, check_number
from sire_jax.inference import confusion
from sire_jax.job import command
from sire_jax.runs.trained import open_run
from sire_jax.storage.workdir import read_config
from sire_jax.text import nearest


def report(groupings: dict[int, Groups], confusion: np.ndarray | None = None) -> str:
    """Writes a table with a row per grouping: sizes, and how often labels are confused.

    >>> print(report({2: Groups(("apple", "oak", "pear"), (0, 1, 0))}))
    | groups | smallest | largest |
    | ------ | -------- | ------- |
    | 2      | 1        | 2       |

    Args:
        groupings: By their numbers of groups.
        confusion: Counts, a row for each true label; without them sizes alone are shown.
    """
    header = ["groups", "smallest", "largest", "confusion within", "confusion across"]
    rows = [header if confusion is not None else header[:3]]
    for number, grouping in groupings.items():
        sizes = np.bincount(grouping.assignment)
        row = [str(number), str(sizes.min()), str(sizes.max())]
        if confusion is not None:
            row += [text.number(mean) for mean in mean_confusion(confusion, grouping.assignment)]
        rows.append(row)
    return text.align(rows)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
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


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks that arguments fit together."""
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}; it should be at least 0.")
    if options.coarse is None and not options.groups:
        raise ValueError("--groups is missing; give numbers of groups, such as --groups=20,33,50.")
    if options.coarse is not None and options.groups:
        raise ValueError("--groups goes without --coarse: coarse labels say how many groups.")
    if options.coarse is not None and not options.data:
        raise ValueError("--data is missing; name the data set with coarse labels.")
    pairs = (("classes", "matrix"), ("data", "coarse"), ("save_matrix", "workdir"))
    for name, source in pairs:
        if getattr(options, name) is not None and getattr(options, source) is None:
            raise ValueError(f"--{name} goes only with --{source}.")
    if options.method == "released" and options.criterion != "join":
        raise ValueError("--method=released only joins what is confused; leave --criterion out.")
    if options.save_matrix is not None:
        _check_matrix(options.save_matrix, options.out)
    if overrides and options.workdir is None:
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
    kinds = [name for name in dataset.classes if name != "label"]
    if kind not in kinds:
        raise ValueError(f"{data} has no coarse labels '{kind}'.{nearest(kind, kinds)}")
    both = (dataset.train.labels, dataset.test.labels)
    label, above = (np.concatenate([part[name] for part in both]) for name in ("label", kind))
    names = dataset.names["label"]
    grouping = Groups(names, coarse(label, above, names))
    return {grouping.number: grouping}


def _of_matrix(
    options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[np.ndarray, Sequence[str]]:
    """Returns the confusion matrix of a file or a run, and the names of its labels."""
    if options.matrix is not None:
        matrix, own_names = groups.confusion.read(options.matrix)
        # Names of the user's count more than those in the file.
        labels = (
            own_names
            if own_names and options.classes is None
            else _names(options.classes, len(matrix))
        )
        groups.confusion.check_confusion(matrix, labels)
        return matrix, labels
    runs = open_run(options.workdir, overrides)
    # Checked before the network is applied to all images.
    names = confusion.names_of(runs)
    for number in options.groups:
        check_number(number, len(names))
    return confusion.of_run(runs, options.workdir, options.split), names


def _source(options: argparse.Namespace) -> str:
    """Says what was counted, without a directory of whose machine it was."""
    if options.matrix is not None:
        return f"the confusion matrix {Path(options.matrix).name}"
    return f"{options.split} images of {read_config(options.workdir, building=False).name}"


def _names(path: str | None, classes: int) -> list[str]:
    if path is None:
        return [str(i) for i in range(classes)]
    if not files.expanded(path).is_file():
        raise FileNotFoundError(f"There is no file {path} with the names of the classes.")
    return files.expanded(path).read_text(encoding="utf-8").splitlines()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    options, overrides = _arguments().parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_new(options.out)
        _check(options, overrides)
        counts = None
        if options.coarse is not None:
            groupings = _of_coarse(options.coarse, options.data, options.dir)
            origin = f"{options.coarse} of {options.data}"
        else:
            counts, names = _of_matrix(options, overrides)
            if options.save_matrix is not None:
                groups.confusion.write(files.expanded(options.save_matrix), counts, names)
                print(f"{options.save_matrix}: the counts, for --matrix")
            settings = options.criterion, options.method, options.seed
            groupings = make(counts, names, options.groups, *settings)
            origin = "{}, criterion {}, method {}, seed {}".format(_source(options), *settings)
        groups.save(out, groupings, origin)
    print(report(groupings, counts))
    print(f"{options.out}: the groups, which may be edited")


if __name__ == "__main__":
    main()
