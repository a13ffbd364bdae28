"""From the sections of ``config.data.groups`` to groups of the labels."""

from collections.abc import Mapping
from typing import Any

from sire_jax import registry
from sire_jax.groups.partition import Groups, check_file, load

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
    """Returns the groups of all sections, which have been checked.

    Args:
        sections: ``config.data.groups``.

    Raises:
        ValueError: As ``of_section``.
        FileNotFoundError: If there is no such file; the message has its numbers.
    """
    read = [s for s in sections.values() if s["file"] and not s["assignment"]]
    for file in {section["file"] for section in read}:
        check_file(file, sorted({s["groups"] for s in read if s["file"] == file}))
    return {name: of_section(name, section) for name, section in sections.items()}


def of_section(name: str, section: Mapping[str, Any]) -> Groups:
    """Returns the groups of a section that has been checked.

    Args:
        name: What the target is called, for messages.
        section: ``{"file", "groups", "classes", "assignment"}``; the file counts only where there
            is no assignment.

    Raises:
        ValueError: If the section names no file, or the file does not hold such groups.
        FileNotFoundError: If there is no such file.
    """
    where = f"config.data.groups.{name}"
    number, file = section["groups"], section["file"]
    if section["assignment"]:
        groups = Groups(tuple(section["classes"]), tuple(section["assignment"]))
        if groups.number != number:
            raise ValueError(f"{where}.groups is {number}, but its assignment has {groups.number}.")
        return groups
    if not file:
        raise ValueError(
            f"{where} names no file of groups; make one with 'python -m sire_jax.grouping' and give"
            f" it by --{where}.file=FILE."
        )
    groupings = load(file)
    if number not in groupings:
        raise ValueError(
            f"{where}.groups is {number}, but {file} has the numbers of groups"
            f" {', '.join(map(str, groupings))}."
        )
    return groupings[number]


def is_dealt(section: Mapping[str, Any]) -> bool:
    """Tells whether labels of a section were dealt, as there is no file."""
    return bool(section["file"] and section["assignment"])
