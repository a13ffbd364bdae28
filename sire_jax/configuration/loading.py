"""Configs are loaded from files, and changed by overrides.

A config file is a Python file with ``get_config(variant)``; it is executed, so run only files that
you trust. It starts from ``default()`` and describes parts with ``backbone``, ``head`` and so on.
"""

import math
import runpy
import warnings
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from sire_jax import files, registry, text
from sire_jax.configuration import groups
from sire_jax.configuration.sections import SINGLE, augmentation
from sire_jax.data.augmentation import AUGMENTATIONS
from sire_jax.groups.partition import deal
from sire_jax.optimizers import SCHEDULES

# The directory of configs, tables and groups, in the repository and in one of the user's.
CONFIGS = Path("configs")


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a config file as the command line does.

    Args:
        path: ``configs/X.py`` or ``configs/X.py:variant``; where ``find`` finds it.
        overrides: ``--config.a.b=value`` each.

    Returns:
        The config, locked against new keys.

    Raises:
        ValueError: If there is no such variant, or an override names an unknown key or has a value
            of a wrong type.
        FileNotFoundError: If there is no such file.
    """
    file, _, chosen = path.partition(":")
    place = find(file)
    if place is None:
        shipped = repository_configs()
        names = [path.name for path in shipped.glob("*.py")]
        raise FileNotFoundError(
            f"There is no config file {file}.{text.nearest(Path(file).name, names)} It was looked"
            f" for in {Path.cwd()}, in {CONFIGS} there, and among those known, in {shipped}."
        )
    get_config = runpy.run_path(str(place)).get("get_config")
    if get_config is None:
        raise ValueError(f"{file} has no function get_config.")
    try:
        config = get_config(chosen) if chosen else get_config()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path}: get_config returned {config!r}; it should return a ConfigDict.")
    return with_groups(override(config, overrides))


def with_groups(config: ConfigDict, dealt: bool = False) -> ConfigDict:
    """Puts groups in place of the files that they are read from.

    Args:
        config: The config; it is left as it is.
        dealt: Whether labels are dealt in turn to the groups of a file that does not exist, with a
            warning: groups of the right number, which say nothing. Their section keeps the name of
            its file (``groups.is_dealt``).

    Returns:
        A config with ``assignment`` and ``classes`` of each section of ``config.data.groups``; a
        section whose file does not exist is otherwise left as it is, for ``experiment.build`` to
        complain of.

    Raises:
        ValueError: If a section is none, a file does not hold such groups, or labels can't be dealt
            to so many.
    """
    config = config.copy_and_resolve_references()
    data = config.get("data")
    sections = data.get("groups") if isinstance(data, ConfigDict) else None
    # Whether these are sections `experiment.build` checks.
    for name, section in sections.items() if isinstance(sections, ConfigDict) else ():
        groups.check(name, section)
        place = None if section.assignment else find(section.file)
        if place is not None:
            grouping = groups.create({name: {**section, "file": str(place)}})[name]
            section.update(file="", classes=grouping.classes, assignment=grouping.assignment)
        elif dealt and section.file and not section.assignment and _counted(data):
            warnings.warn(
                f"There is no file of groups {section.file}: labels are dealt to {section.groups}"
                " groups in turn, which changes no size.",
                stacklevel=2,
            )
            with registry.located(f"config.data.groups.{name}"):
                grouping = deal(data.classes["label"], section.groups)
            section.update(classes=grouping.classes, assignment=grouping.assignment)
    return config


def _counted(data: ConfigDict) -> bool:
    """Tells whether a config says how many labels there are; if not, its check says so."""
    classes = data.get("classes")
    return isinstance(classes, ConfigDict) and isinstance(classes.get("label"), int)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies overrides to a config.

    Args:
        config: The config; it is left as it is.
        overrides: ``--config.a.b=value`` each.

    Returns:
        A new config, locked against new keys.

    Raises:
        ValueError: If an override names an unknown key or has a value of a wrong type.
    """
    config = ConfigDict(config.to_dict())
    _switch(config, overrides)
    _prepare(config, overrides)
    overrides = _numbers_within(config, overrides)
    for argument in overrides:
        _check_override(config, argument)
    # The last one of a key counts; absl would join those of a tuple.
    last = {argument.partition("=")[0]: argument for argument in overrides}
    arguments = ["sire_jax", *last.values()]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except (TypeError, ValueError, RecursionError, MemoryError, flags.Error) as error:
        raise ValueError(f"An override has a value of a wrong type: {error}") from error
    return values.config


def _switch(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Gives a section the settings of the part that an override names; common ones are kept."""
    for key, kind in SINGLE.items():
        start = f"--config.{key}.name="
        chosen = [a.removeprefix(start) for a in overrides if a.startswith(start)]
        section = config.get(key)
        if not isinstance(section, ConfigDict):
            continue
        if not chosen or chosen[-1] not in kind.parts or chosen[-1] == section.get("name"):
            continue
        new = kind.describe(chosen[-1])
        settings = registry.settings(kind.parts[chosen[-1]])
        kept = {k: v for k, v in section.items() if k in settings and k not in kind.supplied}
        config[key] = ConfigDict({**new, **kept})


def _prepare(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Makes a place for overrides that name none yet.

    An augmentation that the config does not have; a number in place of a schedule, or of another
    section that stands for one; the ``warmup`` or the ``unit`` of a schedule, or of a number, which
    becomes a constant one.
    """
    for argument in sorted(overrides, key=_is_of_schedule):
        path, _, value = argument.removeprefix("--config.").partition("=")
        *sections, last = path.split(".")
        augmentations = _section_at(config, sections[:1])
        if sections[:1] == ["augmentation"] and len(sections) == 2 and augmentations is not None:
            name = sections[1]
            if name not in augmentations and name in AUGMENTATIONS:
                augmentations[name] = augmentation(name)
        owner = _section_at(config, sections[:-1])
        if last in _OF_SCHEDULES and owner is not None and sections[-1] in _NUMBERS:
            _make_schedule(owner, sections[-1])
        section = _section_at(config, sections)
        if section is None:
            continue
        if section.get("name") in SCHEDULES and last in _OF_SCHEDULES:
            section.update({last: section.get(last, _OF_SCHEDULES[last])})
        # Settings in braces are ml_collections' own.
        braced = value.lstrip().startswith("{")
        if last in _NUMBERS and isinstance(section.get(last), ConfigDict) and not braced:
            if not _is_number(value):
                raise ValueError(
                    f"--config.{path} is {value!r}; it should be a number, which takes the place of"
                    f" the settings there, or change one of them: --config.{path}.KEY=…, of"
                    f" {', '.join(sorted(section[last]))}."
                )
            with section.ignore_type():
                section[last] = float(value)


# What any schedule may have beside its settings, and what is a number or such a section.
_OF_SCHEDULES = {"unit": "step", "warmup": 0.0}


_NUMBERS = ("learning_rate", "weight", "weight_decay")


def _is_of_schedule(argument: str) -> bool:
    """Tells what is added to a schedule or a number, which has to be there first."""
    return argument.partition("=")[0].rpartition(".")[2] in _OF_SCHEDULES


def _numbers_within(config: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Gives a number that has become a constant schedule to that."""
    arguments = []
    for argument in overrides:
        path, equals, value = argument.partition("=")
        *sections, last = path.removeprefix("--config.").split(".")
        schedule = _section_at(config, [*sections, last])
        constant = last in _NUMBERS and schedule is not None and schedule.get("name") == "constant"
        within = ".value" if constant and _is_number(value) else ""
        arguments.append(f"{path}{within}{equals}{value}")
    return arguments


def _make_schedule(owner: ConfigDict, key: str) -> None:
    """Puts a constant schedule in the place of a number."""
    number = owner.get(key)
    if isinstance(number, int | float) and not isinstance(number, bool):
        with owner.ignore_type():
            owner[key] = ConfigDict({"name": "constant", "value": float(number)})


def _section_at(config: ConfigDict, keys: Sequence[str]) -> ConfigDict | None:
    for key in keys:
        config = config.get(key) if isinstance(config, ConfigDict) else None
    return config if isinstance(config, ConfigDict) else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_override(config: ConfigDict, argument: str) -> None:
    """Checks that an override is one, and that its key exists."""
    if not argument.startswith("--config.") or "=" not in argument:
        raise ValueError(f"There is no option '{argument}'; overrides are --config.key=value.")
    section, where = config, "config"
    for key in argument.removeprefix("--config.").partition("=")[0].split("."):
        if not isinstance(section, ConfigDict) or key not in section:
            keys = [*section] if isinstance(section, ConfigDict) else []
            # One that is not there can be added by its settings.
            keys += AUGMENTATIONS if where == "config.augmentation" else []
            raise ValueError(f"{where} has no key '{key}'.{text.nearest(key, keys)}")
        section, where = section[key], f"{where}.{key}"
    if section is None:
        raise ValueError(
            f"{where} is None, of no type that an override could have; change it in a config file."
        )


def repository_configs() -> Path:
    """Returns the directory of the shipped configs, their tables and groups.

    It is ``configs`` beside the package in the repository, and inside of it where it is installed.
    """
    package = files.PACKAGE.resolve()
    installed = package / CONFIGS
    return installed if installed.is_dir() else package.parent / CONFIGS


def find(file: str | Path) -> Path | None:
    """Finds a config, a table or a file of groups, here or among the shipped ones.

    What is in the current directory, or in ``configs`` there, comes before what is shipped.

    Args:
        file: Its path; for a shipped one ``configs/pairs.py`` or ``pairs.py``,
            ``configs/groups/cifar100_join.json`` or ``groups/cifar100_join.json``.

    Returns:
        Where it is; ``None`` if it is nowhere.
    """
    path = files.expanded(file)
    places = [path]
    if not path.is_absolute() and ".." not in path.parts:
        inner = path.relative_to(CONFIGS) if path.is_relative_to(CONFIGS) else path
        places += [CONFIGS / inner, repository_configs() / inner]
    return next((place for place in places if place.is_file()), None)
