"""Parts chosen by name: what a config section ``{"name": …, setting: value}`` stands for.

A registry is a plain dictionary from names to classes, or to functions that make the part. Its
settings are their arguments, so a config can name nothing that the code does not have.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_origin

from ml_collections import ConfigDict

from sire_jax.names import nearest

# Fields that Flax adds to every module and that a config never sets.
_FLAX_FIELDS = {"parent", "name"}


def choose(registry: Mapping[str, Any], name: str, what: str) -> Any:
    """Looks a part up by its name.

    Args:
        registry: Known parts by name.
        name: A name in ``registry``, or ``package.module:attribute`` for a part of one's own.
        what: What the part is, for the message ("backbone", "loss", …).

    Returns:
        The class or function.

    Raises:
        ValueError: If there is no such part; the message names the nearest one.
    """
    if name in registry:
        return registry[name]
    if isinstance(name, str) and ":" in name:
        module, attribute = name.split(":", 1)
        try:
            if not module or not attribute:
                raise ValueError("it should be package.module:Name")
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"The {what} '{name}' can't be imported: {error}.") from error
    raise ValueError(f"There is no {what} '{name}'.{nearest(str(name), registry)}")


def settings(part: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the settings of a class or function by name, those that a config may give."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(part).parameters
    return {k: p for k, p in parameters.items() if k not in _FLAX_FIELDS and p.kind in named}


def describe(registry: Mapping[str, Any], name: str, what: str, **given: Any) -> ConfigDict:
    """Writes a part down as a config section that shows every setting with its value.

    Args:
        registry: Known parts by name.
        name: The part.
        what: What the part is, for messages.
        **given: Settings that differ from the part's defaults.

    Returns:
        ``{"name": name, …}`` with all settings that have a value.

    Raises:
        ValueError: If the part or a setting does not exist.
    """
    known = settings(choose(registry, name, what))
    for key in given:
        if key not in known:
            raise ValueError(f"The {what} '{name}' has no setting '{key}'.{nearest(key, known)}")
    defaults = {k: p.default for k, p in known.items() if p.default is not inspect.Parameter.empty}
    return ConfigDict({"name": name, **defaults, **given})


def create(
    registry: Mapping[str, Any], section: Mapping[str, Any], what: str, **supplied: Any
) -> Any:
    """Makes the part that a config section describes.

    Args:
        registry: Known parts by name.
        section: ``{"name": …, setting: value, …}``.
        what: What the part is, for messages.
        **supplied: Arguments that come from the program, not from the config; those that the part
            does not take are left out.

    Returns:
        What the class or function returns for these settings.

    Raises:
        ValueError: If the part or a setting does not exist, a setting without a default is missing,
            or a value has another type than the setting's default.
    """
    if not isinstance(section, Mapping | ConfigDict):
        raise ValueError(f"A {what} is {section!r}; it should be a section with a 'name'.")
    if "name" not in section:
        raise ValueError(f"A {what} needs a 'name'; it has only {sorted(section)}.")
    given = {key: _plain(value) for key, value in section.items() if key != "name"}
    part = choose(registry, section["name"], what)
    wanted = settings(part)
    known = {k: p for k, p in wanted.items() if k not in supplied}
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"The {what} '{section['name']}' has no setting '{key}'.{nearest(key, known)}"
            )
        _check_setting(f"{what} '{section['name']}': {key}", value, known[key])
    missing = [k for k, p in known.items() if p.default is p.empty and k not in given]
    if missing:
        raise ValueError(f"The {what} '{section['name']}' needs a value for {', '.join(missing)}.")
    return part(**given, **{k: value for k, value in supplied.items() if k in wanted})


def _check_setting(where: str, value: Any, parameter: inspect.Parameter) -> None:
    """Checks a setting whose annotation is a plain type; others, such as schedules, check it."""
    annotation = get_origin(parameter.annotation) or parameter.annotation
    if annotation in (bool, int, float, str, tuple):
        default = parameter.default
        check_type(where, value, annotation() if default is parameter.empty else default)


def check_type(where: str, value: Any, default: Any) -> None:
    """Checks that a value has the type of the default: a float may be an int, a bool may not.

    Args:
        where: What the value is, for the message.
        value: The value.
        default: The default; ``None`` or an empty parameter allow any value.

    Raises:
        ValueError: If the types differ.
    """
    if default is inspect.Parameter.empty or default is None:
        return
    expected = (int, float) if isinstance(default, float) else type(default)
    wrong_bool = isinstance(value, bool) != isinstance(default, bool)
    if wrong_bool or not isinstance(value, expected):
        raise ValueError(
            f"{where} is {value!r}, a {type(value).__name__};"
            f" it should be a {type(default).__name__} like {default!r}."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return value.to_dict()
    return tuple(value) if isinstance(value, list) else value
