"""Reading files that may come from strangers: nothing that they hold is executed.

Nothing is ever unpickled. Parts that a config names are looked up in registries; those of one's
own, ``package.module:Name``, run code as they are imported and made: a config that was read from a
file may only name those of modules that the user allows, by ``SIRE_JAX_TRUST=package,other.module``
in the environment, unless this user has trained by it.
"""

import hashlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sire_jax import files, registry

if TYPE_CHECKING:
    from ml_collections import ConfigDict

TRUST = "SIRE_JAX_TRUST"
# An empty file for each config that this user has trained by. The owner of the config says little:
# whoever unpacks a stranger's files owns them.
_TRAINED = "~/.local/state/sire_jax/trained"
# Of text files: far more than groups of a hundred thousand labels have.
MOST_BYTES = 2**24
# Sections within sections; what is nested deeper ends Python's stack.
_MOST_NESTED = 50


def read_text(path: Path) -> str:
    """Reads a small text file.

    Args:
        path: The file.

    Returns:
        The text.

    Raises:
        ValueError: If it is very large, or no UTF-8.
        OSError: If it can't be read.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; it should have at most {MOST_BYTES:,}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} can't be read as text: {error}.") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file; see ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, source: str) -> Any:
    """Parses JSON.

    >>> parse_json('{"epochs": 3}', "config.json")
    {'epochs': 3}
    >>> parse_json('{"epochs": 3, "epochs": 4}', "config.json")
    Traceback (most recent call last):
    ValueError: config.json can't be read as JSON: the key 'epochs' stands twice.

    Args:
        text: The JSON.
        source: Where it comes from, for messages.

    Returns:
        What it stands for; numbers may be ``nan`` or infinite.

    Raises:
        ValueError: If it is no JSON, has a key twice, or is nested more than 50 deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        _check_nested(value)
    except RecursionError:
        raise ValueError(f"{source} can't be read as JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{source} can't be read as JSON: {error}.") from None
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a mapping; ``json`` itself would drop the first of two values with one key."""
    doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if doubled:
        raise ValueError(f"the key '{doubled[0]}' stands twice")
    return dict(pairs)


def _check_nested(tree: Any) -> None:
    level = [tree]
    for _ in range(_MOST_NESTED):
        level = [child for value in level for child in _inner(value)]
    if level:
        raise ValueError("it is nested too deeply")


def _inner(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads a ``.npz`` archive that ``numpy.savez`` wrote, uncompressed.

    Args:
        path: The file.

    Returns:
        Its arrays by name; none of objects.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        _check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        for name, values in arrays.items():
            if not isinstance(values, np.ndarray):
                raise ValueError(f"{name} is no array")
    # There is no end to what archives and headers, damaged or made so, make these readers raise.
    except Exception as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path} is damaged, or holds no arrays: {reason}.") from error
    return arrays


def _check_archive(path: Path) -> None:
    """Checks that arrays are stored once and as they are: small files can claim to be huge."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no npz archive")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("it claims to hold more bytes than it has")


def remember(config: "ConfigDict", text: str) -> None:
    """Remembers that this user trains by a config, if it names parts of one's own.

    Args:
        config: The config, which the user has given, or which is that of a remembered one.
        text: As it is written.
    """
    if not has_names(config):
        return
    try:
        place = _place(text)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    except OSError:
        # Without a home, or where it can't be written to: then the user has to allow it.
        return


def _place(text: str) -> Path:
    return files.expanded(_TRAINED) / hashlib.sha256(text.encode()).hexdigest()


def is_remembered(text: str) -> bool:
    """Tells whether this user has trained by a config.

    Args:
        text: As it is stored.
    """
    try:
        return _place(text).is_file()
    except OSError:
        return False


def check_names(config: "ConfigDict", text: str, source: str | Path) -> None:
    """Refuses a config that names parts of one's own in modules that the user does not allow.

    Args:
        config: A config that was read from a file.
        text: What it was read from: all is allowed that this user has trained by (``remember``).
        source: The file, for the message.

    Raises:
        ValueError: If it has such a name; the message says how to allow it.
    """
    if is_remembered(text):
        return
    for path, name in _names(config, "config"):
        _check_allowed(name.partition(":")[0], f"{source} names code of its own, {path}: {name!r},")


def check_features(version: Path) -> None:
    """Refuses a prepared ``tensorflow_datasets`` set that names code which is not that library's.

    It imports the modules of the features that ``features.json`` names.

    Args:
        version: The directory of the set.

    Raises:
        ValueError: If a feature is of another module that the user does not allow.
    """
    path = version / "features.json"
    for name in _features(read_json(path)) if path.is_file() else ():
        if not name.startswith("tensorflow_datasets."):
            _check_allowed(name.rpartition(".")[0], f"{path} names code of its own, {name!r},")


def _check_allowed(module: str, subject: str) -> None:
    """Checks that the user allows a module, or a package that it is in."""
    allowed = [package.strip() for package in os.environ.get(TRUST, "").split(",")]
    if not any(package and f"{module}.".startswith(f"{package}.") for package in allowed):
        raise ValueError(
            f"{subject} which would be run. If you trust whoever made it, allow its module:"
            f" {TRUST}={module}."
        )


# What the library looks classes up by, in JSON now and formerly.
_CLASS_NAMES = ("pythonClassName", "python_class_name", "type")


def _features(value: Any) -> Iterator[str]:
    """Yields the names of classes in the description of features, also in JSON within it."""
    if isinstance(value, dict):
        yield from (str(value[key]) for key in _CLASS_NAMES if key in value)
    elif isinstance(value, str) and value.lstrip().startswith("{"):
        yield from _features(parse_json(value, "a feature"))
    for child in _inner(value):
        yield from _features(child)


def has_names(config: "ConfigDict") -> bool:
    """Tells whether a config names parts of one's own."""
    return any(True for _ in _names(config, "config"))


# What is no part and is never looked up by name: free text, labels, paths and kinds of labels.
_TEXTS = ("config.data.groups", "config.data.classes")


def _names(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields the paths and values of texts that may be looked up as ``package.module:Name``."""
    if path in _TEXTS:
        return
    if registry.is_section(value):
        for key, child in value.items():
            yield from _names(child, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for child in value:
            yield from _names(child, path)
    elif isinstance(value, str) and ":" in value and not _is_plain(path):
        yield path, value


def _is_plain(path: str) -> bool:
    """Tells whether a path is that of a key of the config or of its data, not of a part's."""
    parent = path.rpartition(".")[0]
    return parent in ("config", "config.data")
