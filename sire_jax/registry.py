"""Parts chosen by name: what a config section ``{"name": …, setting: value}`` stands for.

A registry is a plain dictionary from names to classes, or to functions that make the part. Its
settings are their arguments, so a config can name nothing that the code does not have.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import GenericAlias, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from sire_jax.text import nearest

# Fields that Flax adds to every module and that a config never sets.
_FLAX_FIELDS = {"parent", "name"}
# What is not computed with: whole numbers are int32, others float32.
_INT_LIMIT, _FLOAT_LIMIT = 2**31, 2.0**128


def choose(registry: Mapping[str, Any], name: Any, what: str, where: str = "") -> Any:
    """Looks something up by its name.

    >>> choose({"joint": "all at once"}, "joint", "rule")
    'all at once'

    Args:
        registry: What there is, by name.
        name: A name in ``registry``.
        what: What it is, for the message ("table", "variant", …).
        where: The path of the name in a config, for the message.

    Raises:
        ValueError: If there is none of that name; the message has the nearest one.
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    start = f"{where}: " if where else ""
    text = name if isinstance(name, str) else shown(name)
    raise ValueError(f"{start}There is no {what} '{text}'.{nearest(text, registry)}")


def choose_part(registry: Mapping[str, Any], name: Any, what: str, where: str = "") -> Any:
    """Looks a part up by its name, or imports one of the user's own.

    Args:
        registry: Parts by name.
        name: A name in ``registry``, or ``package.module:attribute`` for a part of one's own.
        what: What the part is, for the message ("backbone", "loss", …).
        where: The path of the name in a config, for the message.

    Returns:
        The class or function.

    Raises:
        ValueError: If there is no such part; the message has the nearest one.
    """
    if not isinstance(name, str) or name in registry or ":" not in name:
        return choose(registry, name, what, where)
    module, attribute = name.split(":", 1)
    try:
        if not module or module.startswith(".") or not attribute:
            raise ValueError("it should be package.module:Name")
        part = getattr(importlib.import_module(module), attribute)
        if not callable(part):
            raise ValueError("it is no class or function")
    except (ImportError, AttributeError, ValueError) as error:
        start = f"{where}: " if where else ""
        raise ValueError(f"{start}The {what} '{name}' can't be imported: {error}.") from error
    return part


def settings(part: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the settings of a class or function by name, those that a config may give."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(part).parameters
    return {k: p for k, p in parameters.items() if k not in _FLAX_FIELDS and p.kind in named}


def describe(registry: Mapping[str, Any], name: str, what: str, **changes: Any) -> dict[str, Any]:
    """Writes a part down as a section that shows every setting with its value.

    Args:
        registry: Known parts by name.
        name: The part.
        what: What the part is, for messages.
        **changes: Settings that differ from the part's defaults.

    Returns:
        ``{"name": name, …}`` with all settings that have a value.

    Raises:
        ValueError: If the part or a setting does not exist.
    """
    parameters = settings(choose_part(registry, name, what))
    for key in changes:
        if key not in parameters:
            raise ValueError(
                f"The {what} '{name}' has no setting '{key}'.{nearest(key, parameters)}"
            )
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    return {"name": name, **defaults, **changes}


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
    check(registry, section, what, supplied=supplied)
    return make(registry, section, what, **supplied)


def make(
    registry: Mapping[str, Any], section: Mapping[str, Any], what: str, **supplied: Any
) -> Any:
    """Makes the part of a section that ``check`` has checked; see ``create``.

    Args:
        registry: Known parts by name.
        section: ``{"name": …, setting: value, …}``.
        what: What the part is, for messages.
        **supplied: Arguments that come from the program.
    """
    part = choose_part(registry, section["name"], what)
    parameters = settings(part)
    values = {
        key: _as_kind(_plain(value), parameters[key].annotation)
        for key, value in section.items()
        if key != "name"
    }
    return part(**values, **{k: value for k, value in supplied.items() if k in parameters})


def check(
    registry: Mapping[str, Any],
    section: Any,
    what: str,
    where: str = "",
    supplied: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Checks the keys and types of a section, and makes nothing.

    Args:
        registry: Known parts by name.
        section: ``{"name": …, setting: value, …}``.
        what: What the part is, for messages.
        where: The path of the section, such as ``"config.backbone"``, for messages.
        supplied: Names of the arguments that come from the program.
        optional: Keys that the program reads itself, or supplies where they are missing.

    Raises:
        ValueError: If the part or a setting does not exist, a setting without a default is missing,
            or a value is not of the setting's type; the message has the path.
    """
    start = f"{where}: " if where else ""
    if not is_section(section):
        raise ValueError(
            f"{start}A {what} is {shown(section)}; it should be a section with a 'name'."
        )
    if "name" not in section:
        raise ValueError(f"{start}A {what} needs a 'name'; it has only {sorted(section)}.")
    part = choose_part(registry, section["name"], what, where and f"{where}.name")
    values = {key: _plain(value) for key, value in section.items() if key != "name"}
    check_settings(part, values, f"{what} '{section['name']}'", where, supplied, optional)


def check_settings(
    part: Callable[..., Any],
    values: Mapping[str, Any],
    what: str,
    where: str = "",
    supplied: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Checks the settings that a config gives to a class or function.

    Args:
        part: The class or function.
        values: The settings.
        what: What the part is, with its name, for messages: ``"backbone 'vgg'"``.
        where: The path of its section, for messages.
        supplied: Names of the arguments that come from the program.
        optional: Keys that the program reads itself, or supplies where they are missing.

    Raises:
        ValueError: If a setting does not exist, one without a default is missing, or a value is not
            of the setting's type.
    """
    start = f"{where}: " if where else ""
    parameters = {k: p for k, p in settings(part).items() if k not in supplied}
    for key, value in values.items():
        path = f"{where}.{key}" if where else f"{what}: {key}"
        if key in parameters:
            _check_kind(path, value, parameters[key].annotation, parameters[key].default)
        elif key not in optional:
            hint = nearest(key, [*parameters, *optional])
            raise ValueError(f"{start}The {what} has no setting '{key}'.{hint}")
    needed = [k for k, p in parameters.items() if p.default is p.empty and k not in optional]
    missing = [key for key in needed if key not in values]
    if missing:
        raise ValueError(f"{start}The {what} needs a value for {', '.join(missing)}.")


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the path of a section ahead of the messages on what is done with it.

    Errors of a kind of their own, such as one on a damaged image, stay what they are.

    Raises:
        FileNotFoundError: If that is what the block raises.
        ValueError: Likewise.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if type(error) not in (FileNotFoundError, ValueError) or getattr(error, "errno", None):
            raise
        raise type(error)(f"{where}: {error}") from error


def is_section(value: Any) -> bool:
    """Tells whether a value of a config is a section: a mapping, or a ``ConfigDict``."""
    return isinstance(value, Mapping) or _becomes_mapping(value)


def _becomes_mapping(value: Any) -> bool:
    """Tells a ``ConfigDict`` or its class by what it can do, so that no config has to be known."""
    return hasattr(value, "to_dict")


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Returns ``{"a.b": value}`` for a section with sections in it.

    Args:
        section: The section.
        prefix: Of all names.
    """
    values: dict[str, Any] = {}
    for key, value in section.items():
        if is_section(value):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = tuple(value) if isinstance(value, list) else value
    return values


def check_type(where: str, value: Any, default: Any) -> None:
    """Checks that a value has the type of the default: a float may be an int, a bool may not.

    Args:
        where: What the value is, for the message.
        value: The value.
        default: The default; ``None`` or an empty parameter allow any value. The first element of a
            tuple stands for all, an empty tuple allows any.

    Raises:
        ValueError: If the types differ, or a number is not finite or not below 2**31.
    """
    if default is inspect.Parameter.empty or default is None:
        return
    kind: Any = type(default)
    if isinstance(default, tuple) and default:
        kind = GenericAlias(tuple, (type(default[0]), ...))
    _check_kind(where, value, kind, default)


def _check_kind(where: str, value: Any, kind: Any, default: Any) -> None:
    _check_numbers(where, value)
    if not _is_of(value, kind):
        has_default = default is not inspect.Parameter.empty and default is not None
        example = f" like {default!r}" if has_default else ""
        of_type = "" if value is None else f", {_described(type(value))}"
        raise ValueError(
            f"{where} is {shown(value)}{of_type}; it should be {_described(kind)}{example}."
        )


def _check_numbers(where: str, value: Any) -> None:
    """Checks that numbers can be computed with, those of tuples and sections, too."""
    for key, element in _elements(value):
        _check_numbers(f"{where}{key}", element)
    if isinstance(value, float) and not abs(value) < _FLOAT_LIMIT:
        raise ValueError(f"{where} is {value}; it should be finite, as a float32.")
    if isinstance(value, int) and abs(value) >= _INT_LIMIT:
        raise ValueError(f"{where} is {shown(value)}; it should be below 2**31.")


def _elements(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a tuple or a section holds, with how a path goes on to it."""
    if is_section(value):
        yield from ((f".{key}", element) for key, element in value.items())
    elif isinstance(value, tuple | list):
        yield from ((f"[{i}]", element) for i, element in enumerate(value))


def _is_of(value: Any, kind: Any) -> bool:
    """Tells whether a value is of an annotated type, as far as a config can say."""
    arguments, origin = get_args(kind), get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(_is_of(value, member) for member in _alternatives(arguments))
    if origin in (bool, int, float):
        numbers = (int, float) if origin is float else origin
        return isinstance(value, numbers) and isinstance(value, bool) == (origin is bool)
    if origin in (str, NoneType):
        return isinstance(value, origin)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        whole = isinstance(value, tuple) and len(value) == len(arguments)
        return whole and all(map(_is_of, value, arguments))
    if origin in (tuple, Sequence):
        return isinstance(value, tuple) and all(_is_of(v, k) for v in value for k in arguments[:1])
    if origin in (dict, Mapping):
        return is_section(value)
    if origin is Callable:
        return callable(value)
    # Whatever else a part of one's own takes, it checks itself.
    return True


def _alternatives(kinds: Sequence[Any]) -> Sequence[Any]:
    """Returns the types of a union; of what may be any scalar or array, a number is left."""
    anything = complex in kinds
    return [k for k in (float, NoneType) if k in kinds] if anything else kinds


def _as_kind(value: Any, kind: Any) -> Any:
    """Makes a float of a whole number that is given for one, in tuples, too."""
    if kind is float:
        return float(value)
    if get_origin(kind) is tuple and set(get_args(kind)) <= {float, ...}:
        return tuple(map(float, value))
    return value


def _described(kind: Any) -> str:
    arguments, origin = get_args(kind), get_origin(kind) or kind
    if origin in (Union, UnionType):
        return " or ".join(_described(member) for member in _alternatives(arguments))
    if origin in (tuple, Sequence):
        of = f" of {arguments[0].__name__}" if arguments and isinstance(arguments[0], type) else ""
        return f"a tuple{of}"
    if origin is NoneType:
        return "None"
    if origin is Callable:
        return "a function"
    sections = isinstance(origin, type) and (
        issubclass(origin, Mapping) or _becomes_mapping(origin)
    )
    return "a section" if sections else f"a {getattr(origin, '__name__', origin)}"


def shown(value: Any, most: int = 100) -> str:
    """Writes a value into a message, not all of a very long one."""
    try:
        text = repr(value.to_dict() if _becomes_mapping(value) else value)
    except ValueError:
        # Of a whole number with thousands of digits.
        text = "very large"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _plain(value: Any) -> Any:
    if _becomes_mapping(value):
        return value.to_dict()
    return tuple(value) if isinstance(value, list) else value
