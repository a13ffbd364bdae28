"""Labels in groups, and the file of such groupings, which a person can read and edit."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array

from sire_jax import files, untrusted
from sire_jax.metrics import is_label
from sire_jax.text import listed, nearest

SHAPE = (
    '{"made": "how", "classes": ["apple", "oak", "pear"], "groups": {"2": [["apple", "pear"],'
    ' ["oak"]]}}'
)

# The group of what is no label.
NO_GROUP = -1


@dataclass(frozen=True)
class Groups:
    """A partition of labels into groups.

    >>> groups = Groups(("apple", "oak", "pear"), (0, 1, 0))
    >>> groups.labels()
    (('apple', 'pear'), ('oak',))
    >>> groups.of(jnp.array([2, 1]))
    Array([0, 1], dtype=int32)

    Attributes:
        classes: The names of all labels, in the order of the labels.
        assignment: The group of each label, in 0..k - 1; no group is empty.

    Raises:
        ValueError: If a name stands twice, a label has no group or a group has no label.
    """

    classes: tuple[str, ...]
    assignment: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_names(self.classes, "The names of labels")
        if len(self.assignment) != len(self.classes):
            raise ValueError(
                f"There are {len(self.classes)} labels, but {len(self.assignment)} assignments to a"
                " group; each label should have one."
            )
        used = set(self.assignment)
        if not used or used != set(range(len(used))):
            raise ValueError(
                f"Labels are in the groups {sorted(used)}; groups should be numbered 0, 1, … and"
                " each should have a label."
            )

    @property
    def number(self) -> int:
        """The number of groups."""
        return len(set(self.assignment))

    def of(self, labels: Array) -> Array:
        """Returns the groups of labels.

        Args:
            labels: Integers of any shape.

        Returns:
            int32 of that shape, ``NO_GROUP`` where a label is none of these: outside of [0,
            classes).

        Raises:
            ValueError: If they are no integers.
        """
        labels = jnp.asarray(labels)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"Labels are {labels.dtype}; they should be integers.")
        inside = is_label(labels, len(self.assignment))
        indices = jnp.where(inside, labels.astype(jnp.int32), 0)
        return jnp.where(inside, jnp.asarray(self.assignment, jnp.int32)[indices], NO_GROUP)

    def labels(self) -> tuple[tuple[str, ...], ...]:
        """Returns the names of the labels of each group, in the order of the labels."""
        members: list[list[str]] = [[] for _ in range(self.number)]
        for name, group in zip(self.classes, self.assignment, strict=True):
            members[group].append(name)
        return tuple(map(tuple, members))


def save(path: str | Path, groupings: Mapping[int, Groups], made: str) -> None:
    """Writes groupings of the same labels, one group a line.

    >>> from tempfile import TemporaryDirectory
    >>> groups = Groups(("apple", "oak", "pear"), (0, 1, 0))
    >>> with TemporaryDirectory() as directory:
    ...     save(f"{directory}/kinds.json", {2: groups}, made="by hand")
    ...     print(Path(directory, "kinds.json").read_text())
    {
      "made": "by hand",
      "classes": ["apple", "oak", "pear"],
      "groups": {
        "2": [
          ["apple", "pear"],
          ["oak"]
        ]
      }
    }
    <BLANKLINE>

    Args:
        path: The file, JSON.
        groupings: Groupings by their number of groups.
        made: How they were made, for who reads the file.

    Raises:
        ValueError: If there are none, their labels differ, or a number is not that of the groups.
    """
    if not groupings:
        raise ValueError(f"There are no groupings to write to {path}; give at least one.")
    classes = next(iter(groupings.values())).classes
    for number, groups in groupings.items():
        if groups.number != number:
            raise ValueError(f"The grouping {number} has {groups.number} groups, not {number}.")
        if groups.classes != classes:
            raise ValueError(
                f"The grouping {number} has other labels, or in another order, than the first;"
                " a file holds groupings of the same labels."
            )
    # By hand: json has either all on one line or each label on a line of its own.
    blocks = [f'    "{n}": [\n{_lines(groupings[n])}\n    ]' for n in sorted(groupings)]
    lines = [
        "{",
        f'  "made": {_text(made)},',
        f'  "classes": {_text(classes)},',
        '  "groups": {',
        ",\n".join(blocks),
        "  }",
        "}",
    ]
    text = "\n".join(lines) + "\n"
    files.expanded(path).write_text(text, encoding="utf-8")


def deal(classes: int, number: int) -> Groups:
    """Deals labels to groups in turn, where only the number of groups counts.

    >>> deal(4, 2).assignment
    (0, 1, 0, 1)

    Args:
        classes: How many labels, called ``label_0`` and so on.
        number: How many groups, at least 1 and at most ``classes``.

    Returns:
        Groups whose sizes are within one of each other.

    Raises:
        ValueError: If a group would have no label.
    """
    if not 1 <= number <= classes:
        raise ValueError(f"{classes} labels can't be dealt to {number} groups; 1..{classes} can.")
    names = tuple(f"label_{i}" for i in range(classes))
    return Groups(names, tuple(i % number for i in range(classes)))


def check_names(what: str, groups: Groups, classes: Sequence[str]) -> None:
    """Checks that the labels of groups are those of a data set, in its order.

    Args:
        what: Where the groups come from, for messages.
        groups: The groups.
        classes: The names of the data set's labels.

    Raises:
        ValueError: If they are not; missing and unknown ones are named.
    """
    _check_same(f"The labels of {what} are not those of the data:", groups.classes, classes)
    if groups.classes != tuple(classes):
        first = next(a for a, b in zip(groups.classes, classes, strict=True) if a != b)
        raise ValueError(
            f"The labels of {what} are in another order than those of the data, from '{first}' on;"
            " put the file's 'classes' in the data's order."
        )


def _text(value: Any) -> str:
    # Names as people write them, who edit the file: not escaped.
    return json.dumps(value, ensure_ascii=False)


def _lines(groups: Groups) -> str:
    return ",\n".join(f"      {_text(names)}" for names in groups.labels())


def load(
    path: str | Path, classes: Sequence[str] | None = None, numbers: Iterable[int] = (20,)
) -> dict[int, Groups]:
    """Reads groupings, also after someone has edited them: groups may have any size but 0.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     save(f"{directory}/kinds.json", {2: Groups(("apple", "oak"), (0, 1))}, made="by hand")
    ...     load(f"{directory}/kinds.json", classes=("oak", "apple"))[2].assignment
    (1, 0)

    Args:
        path: The file that ``save`` wrote.
        classes: The names of the data set's labels, in their order; default: as in the file.
        numbers: The numbers of groups that are looked for, to say how to make a missing file.

    Returns:
        Groupings by their number of groups, of labels in the order of ``classes``; the groups have
        the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file, or a grouping does not have each label once.
    """
    content = _read(files.expanded(path), numbers)
    names = tuple(content["classes"])
    _check_names(names, f"The classes of {path}")
    if classes is not None:
        _check_same(f"The classes of {path} are not those of the data:", names, classes)
        names = tuple(classes)
    return {
        _number(path, key, groups): _grouping(f"The grouping '{key}' of {path}", groups, names)
        for key, groups in content["groups"].items()
    }


def _read(path: Path, numbers: Iterable[int]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file of groups {path}. Make one with\n  python -m sire_jax.grouping"
            f" --workdir=DIR --groups={','.join(map(str, numbers))} --out={path}"
        )
    content = untrusted.read_json(path)
    if not _is_structure(content):
        raise ValueError(f"{path} is no file of groups; it should look like {SHAPE}.")
    return dict(content)


def _is_structure(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("groups"), dict):
        return False
    groupings = content["groups"].values()
    if not groupings or not all(isinstance(groups, list) for groups in groupings):
        return False
    lists = [content.get("classes"), *(names for groups in groupings for names in groups)]
    return all(isinstance(x, list) and all(isinstance(name, str) for name in x) for x in lists)


def _number(path: str | Path, key: str, groups: Sequence[Sequence[str]]) -> int:
    if key != str(len(groups)):
        raise ValueError(
            f"The grouping '{key}' of {path} has {len(groups)} groups; it should be named after"
            f" their number, '{len(groups)}', or have as many as its name says."
        )
    return len(groups)


def _grouping(place: str, groups: Sequence[Sequence[str]], classes: tuple[str, ...]) -> Groups:
    if not all(groups):
        raise ValueError(
            f"{place} has an empty group, the {list(map(bool, groups)).index(False) + 1}. of"
            f" {len(groups)}; give it a label or remove it."
        )
    doubled = _doubled(name for group in groups for name in group)
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    _check_same(f"{place} does not have each label once:", list(group_of), classes, doubled)
    return Groups(classes, tuple(group_of[name] for name in classes))


def _check_names(names: Sequence[str], subject: str) -> None:
    doubled = _doubled(names)
    if doubled:
        raise ValueError(f"{subject} are not distinct: {listed(doubled)} stand more than once.")


def _check_same(
    fault: str, names: Sequence[str], classes: Sequence[str], doubled: Sequence[str] = ()
) -> None:
    """Checks that names are those of all labels, in any order, and that none stands twice."""
    missing = _without(classes, names)
    unknown = _without(names, classes)
    problems = [f" {listed(missing)} missing."] if missing else []
    problems += [f" {listed(doubled)} more than once."] if doubled else []
    if unknown:
        problems.append(f" {listed(unknown)} unknown.{nearest(unknown[0], classes)}")
    if problems:
        raise ValueError(fault + "".join(problems))


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    dropped = set(others)
    return [name for name in names if name not in dropped]


def _doubled(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
