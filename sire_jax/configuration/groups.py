"""From the sections of ``config.data.groups`` to groups of the labels."""

from collections.abc import Mapping
from typing import Any

from sire_jax import registry
from sire_jax.groups.partition import Groups, load

# Each key, with a value of the type that it should have.
_KEYS: dict[str, Any] = {"file": "", "groups": 20, "classes": ("apple",), "assignment": (0,)}


def check(name: str, section: Any) -> None:
    """Checks that a section has the keys and types of one.

    Args:
        name: What the target is called, for messages.
        section: The section.

    Raises:
        ValueError: If it is none, or has other keys or values of other types.
    """
    where = f"config.data.groups.{name}"
    if not registry.is_section(section) or set(section) != set(_KEYS):
        shown = sorted(section) if registry.is_section(section) else section
        raise ValueError(
            f"{where} is {shown}; it should be a section with the keys"
            f" {sorted(_KEYS)}, as configuration.grouping(FILE, GROUPS) returns it."
        )
    for key, like in _KEYS.items():
        registry.check_type(f"{where}.{key}", section[key], like)


def create(sections: Mapping[str, Any]) -> dict[str, Groups]:
    """Returns the groups of sections that have been checked.

    Args:
        sections: ``config.data.groups``: ``{"file", "groups", "classes", "assignment"}`` by what
            the target is called; a file counts only where there is no assignment.

    Raises:
        ValueError: If a section names no file, or the file does not hold such groups.
        FileNotFoundError: If there is no such file; the message has the numbers of all groups that
            it should have.
    """
    numbers: dict[str, set[int]] = {}
    for name, section in sections.items():
        if section["assignment"]:
            continue
        if not section["file"]:
            where = f"config.data.groups.{name}"
            raise ValueError(
                f"{where} names no file of groups; make one with 'python -m sire_jax.grouping' and"
                f" give it by --{where}.file=FILE."
            )
        numbers.setdefault(section["file"], set()).add(section["groups"])
    files = {file: load(file, numbers=sorted(asked)) for file, asked in numbers.items()}
    return {name: _groups(name, section, files) for name, section in sections.items()}


def _groups(
    name: str, section: Mapping[str, Any], files: Mapping[str, Mapping[int, Groups]]
) -> Groups:
    where, number = f"config.data.groups.{name}.groups", section["groups"]
    if section["assignment"]:
        groups = Groups(tuple(section["classes"]), tuple(section["assignment"]))
        if groups.number != number:
            raise ValueError(f"{where} is {number}, but its assignment has {groups.number}.")
        return groups
    groupings = files[section["file"]]
    if number not in groupings:
        raise ValueError(
            f"{where} is {number}, but {section['file']} has the numbers of groups"
            f" {', '.join(map(str, groupings))}."
        )
    return groupings[number]


def is_dealt(section: Mapping[str, Any]) -> bool:
    """Tells whether labels of a section were dealt, as there is no file."""
    return bool(section["file"] and section["assignment"])
