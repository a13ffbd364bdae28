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
from sire_jax.groups import balanced as balanced
from sire_jax.groups import distances as distances
from sire_jax.groups.clustering import CRITERIA, METHODS, check_number
from sire_jax.inference import confusion
from sire_jax.job import command
from sire_jax.runs.trained import open_run
from sire_jax.storage.workdir import read_config
from sire_jax.text import nearest


def report(groupings: dict[int, Groups], confusion: np.ndarray | None = None) -> str:
    """Writes a table with a row per grouping: sizes, and how often labels are confused."""
    header = ["groups", "smallest", "largest", "confusion within", "confusion across"]
    rows = [header if confusion is not None else header[:3]]
    for number, each in groupings.items():
        sizes = np.bincount(each.assignment)
        row = [str(number), str(sizes.min()), str(sizes.max())]
        if confusion is not None:
            row += [text.number(mean) for mean in mean_confusion(confusion, each.assignment)]
        rows.append(row)
    return text.align(rows)


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
        found, own = groups.confusion.read(known.matrix)
        given = own if own and known.classes is None else _names(known.classes, len(found))
        groups.confusion.check_confusion(found, given)
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
                groups.confusion.write(files.expanded(known.save_matrix), counts, names)
                print(f"{known.save_matrix}: the counts, for --matrix")
            how = known.criterion, known.method, known.seed
            groupings = make(counts, names, known.groups, *how)
            made = f"{_source(known)}, criterion {how[0]}, method {how[1]}, seed {how[2]}"
        groups.save(out, groupings, made)
    print(report(groupings, counts))
    print(f"{known.out}: the groups, which may be edited")


if __name__ == "__main__":
    main()
