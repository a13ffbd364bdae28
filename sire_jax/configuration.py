"""Configs: their defaults, how they are written, loaded, checked and compared.

A config file is a Python file with ``get_config(variant)``; it is executed, so run only files that
you trust. It starts from ``default()`` and describes parts with ``backbone``, ``head`` and so on,
which show every setting, so that each can be overridden: ``--config.backbone.dropout=0.3``.
"""

import json
import math
import runpy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from sire_jax import files, names, registry, untrusted
from sire_jax.backbones import BACKBONES
from sire_jax.data.augmentation import AUGMENTATIONS
from sire_jax.data.tasks import TASKS
from sire_jax.fitted_prediction import PREDICTIONS
from sire_jax.groups import partition
from sire_jax.heads import HEADS
from sire_jax.objectives import LOSSES, LOSSES_WITH_SETTINGS
from sire_jax.optimizers import OPTIMIZERS, SCHEDULES
from sire_jax.updates import AGGREGATORS, UPDATES, WEIGHTINGS

SPLITS = ("train", "validation", "test")
# The directory of configs, tables and groups, in the repository and in one of the user's.
CONFIGS = Path("configs")


def default() -> ConfigDict:
    """Returns a config with every key; a file changes what it needs."""
    return ConfigDict(
        {
            "name": "",
            # Run i has the seed `seed + i`, alone or as one of several.
            "seed": 0,
            "seeds": 1,
            "seeds_at_once": 0,  # vectorized together; 0: all on an accelerator, 1 on a CPU
            "parallel": "jit",  # over a mesh of devices; or "pmap"
            "devices": 0,  # of all processes together; 0: all
            "devices_share": "batch",  # that of each run; or the "runs", whose batches stay whole
            "batch_norm": "batch",  # statistics over the whole batch; or each "device", with pmap
            "epochs": 1,
            "batch_size": 100,
            # At most so many steps of one call of the compiled program, within an epoch.
            "steps_per_call": 100,
            "data": {
                "name": "digits",
                "dir": "~/tensorflow_datasets",
                "feed": "device",  # all images on the device; or a "stream" of batches from disk
                "cache": "~/.cache/sire_jax",  # decoded images; "" for none
                # That make the training images; also shares of splits: "train[:80%]".
                "train_splits": ("train",),
                "test_split": "test",
                "draw_classes": 0,  # of the labels, at random; other kinds of labels go; 0: all
                "draw_seed": 0,  # of that draw, which is the same for all runs
                "shape": (8, 8, 1),
                "classes": {"label": 10},  # after the draw
                "groups": {},  # of the labels, as further targets
                "images": 0,  # that training has, which schedules in epochs need; 0: unknown
                "crop": 0,  # side of the square that the network sees of an image; 0: all of it
                "ten_crop": False,  # measures by the mean logits of ten crops, not by the central
                "resize": 0,  # what the shorter side of images is scaled to, as they are read
                "random_resized_crop": False,  # in training, of streamed images, to `crop`
                "workers": 0,  # processes that read and decode a stream; 0: threads of this one
                "threads": 8,  # of each of these processes; those that decode, of either feed
                "damaged": "raise",  # on an image that can't be decoded; or "skip" and count it
                "scale": 1 / 255,  # what pixels are multiplied by
                "mean": (),  # what is then subtracted from each channel, if anything
                "std": (),  # what it is then divided by
                "task": task("images"),
            },
            "augmentation": {},
            "initialization": "modules",  # each module's own; or that of layers of "pytorch"
            "backbone": {},
            "heads": {},
            "objectives": {},
            "predictions": {},
            "update_rule": update_rule("joint"),
            "aggregator": {"name": "sum"},  # how gradients of shared parameters are put together
            "weighting": {"name": "fixed"},  # what the objectives' weights are multiplied by
            "optimizer": optimizer("adam"),
            "evaluate_every": 1,  # epochs
            "evaluate_splits": ("train", "test"),
            "evaluate_batch_size": 1000,
            "checkpoint_every": 10,  # epochs; and at the end and when interrupted
            "checkpoint_steps": 0,  # further checkpoints, after every so many steps; 0: none
            "checkpoints_kept": 2,  # the newest
            # Where compiled programs are kept for the next start; "" for nowhere.
            "compilation_cache": "~/.cache/sire_jax/compiled",
            "on_diverged": "stop",  # of a loss that is not finite; or "record" it, others go on
            "peer_timeout": 12.0,  # seconds without a sign of a process, or of its next step
            "chance_after": 10,  # epochs after which a run at chance level says so; 0: never
            "gradient_flow_every": 0,  # epochs between measurements of gradients; 0: none
            "tensorboard": False,
        }
    )


# Characters of a value in a message.
_LONG = 100

# Keys that change how a run is carried out, not what it computes: a run goes on under other values.
_FREE = {
    "devices",
    "steps_per_call",
    "checkpoint_every",
    "checkpoint_steps",
    "checkpoints_kept",
    "compilation_cache",
    "peer_timeout",
    "data.workers",
    "data.threads",
    # What it changes would otherwise have ended the run.
    "data.damaged",
    "on_diverged",
    "chance_after",
    "gradient_flow_every",
    "tensorboard",
    "data.dir",
    "data.cache",
}


def _described(parts: Mapping[str, Any], name: str, what: str, **settings: Any) -> ConfigDict:
    return ConfigDict(registry.describe(parts, name, what, **settings))


def backbone(name: str, **settings: Any) -> ConfigDict:
    """Describes a backbone; see ``registry.describe``."""
    return _described(BACKBONES, name, "backbone", **settings)


def head(name: str, **settings: Any) -> ConfigDict:
    """Describes a head; see ``registry.describe``."""
    return _described(HEADS, name, "head", **settings)


def task(name: str, **settings: Any) -> ConfigDict:
    """Describes a task; see ``registry.describe``."""
    return _described(TASKS, name, "task", **settings)


def augmentation(name: str, **settings: Any) -> ConfigDict:
    """Describes an augmentation; see ``registry.describe``."""
    return _described(AUGMENTATIONS, name, "augmentation", **settings)


def prediction(name: str, **settings: Any) -> ConfigDict:
    """Describes a prediction rule; see ``registry.describe``."""
    return _described(PREDICTIONS, name, "prediction", **settings)


def optimizer(name: str, **settings: Any) -> ConfigDict:
    """Describes an optimizer; see ``registry.describe``."""
    return _described(OPTIMIZERS, name, "optimizer", **settings)


def stream(config: ConfigDict, resize: int = 256, crop: int = 224) -> None:
    """Sets a config for photographs of all sizes that are read from disk while it trains.

    Training sees random parts of random sizes; evaluation the central square of images whose
    shorter side has been scaled (Szegedy et al., 2015, Section 6; He et al., 2016).

    Args:
        config: The config.
        resize: What the shorter side is scaled to for evaluation, in pixels.
        crop: Side of what the network sees, in pixels.
    """
    config.data.update(feed="stream", shape=(resize, resize, 3), resize=resize, crop=crop)
    config.data.random_resized_crop = True


def grouping(file: str | Path, groups: int) -> ConfigDict:
    """Describes a target made of labels: their groups, from a file that ``sire_jax.grouping`` made.

    Args:
        file: The file; "" where the user has to name one.
        groups: Which of its groupings, by the number of groups.

    Returns:
        The section. ``load`` puts the groups themselves in place of the file, so that a run doesn't
        change with it.
    """
    return ConfigDict({"file": str(file), "groups": groups, "classes": (), "assignment": ()})


def update_rule(name: str, **settings: Any) -> ConfigDict:
    """Describes an update rule; see ``registry.describe``."""
    described = _described(UPDATES, name, "update rule", **settings)
    # What the program supplies.
    _, _, supplied = _SWITCHED["update_rule"]
    return ConfigDict({k: v for k, v in described.items() if k not in supplied})


def loss(name: str, **settings: Any) -> ConfigDict:
    """Describes a loss that has settings; see ``registry.describe``."""
    return _described(LOSSES_WITH_SETTINGS, name, "loss", **settings)


def objective(
    output: str,
    target: str,
    loss: Any,
    weight: Any = 1.0,
    weights: Sequence[Any] = (),
    **others: Any,
) -> ConfigDict:
    """Describes an objective, or one for each output of a family.

    Args:
        output: Name of the output, or of a family of heads.
        target: Key of the batch.
        loss: Name of the loss; of one with settings a section, ``loss(name, …)``.
        weight: A number; a schedule (``optimizers.number_or_schedule``); or, of a family of exits,
            ``{"name": "depth", "nu": 2.0}`` (``objectives.depth_weights``).
        weights: Weights of a family's outputs, one by one, in place of ``weight``.
        **others: ``ignore``, ``mask`` and ``classifies``, as of ``objectives.Objective``.

    Returns:
        The section.

    Raises:
        ValueError: If there is no such loss.
    """
    if isinstance(loss, str):
        registry.choose(LOSSES, loss, "loss")
    return ConfigDict(
        {
            "output": output,
            "target": target,
            "loss": loss,
            "weight": weight,
            "weights": tuple(weights),
            **others,
        }
    )


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
        known = [each.name for each in shipped.glob("*.py")]
        raise FileNotFoundError(
            f"There is no config file {file}.{names.nearest(Path(file).name, known)} It was looked"
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
            its file (``partition.is_dealt``).

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
    found = data.get("groups") if isinstance(data, ConfigDict) else None
    # Whether these are sections `experiment.build` checks.
    for name, section in found.items() if isinstance(found, ConfigDict) else ():
        partition.check_section(name, section)
        place = None if section.assignment else find(section.file)
        if place is not None:
            read = partition.from_section(name, {**section, "file": str(place)})
            section.update(file="", classes=read.classes, assignment=read.assignment)
        elif dealt and section.file and not section.assignment and _counted(data):
            warnings.warn(
                f"There is no file of groups {section.file}: labels are dealt to {section.groups}"
                " groups in turn, which changes no size.",
                stacklevel=2,
            )
            with registry.located(f"config.data.groups.{name}"):
                made = partition.deal(data.classes["label"], section.groups)
            section.update(classes=made.classes, assignment=made.assignment)
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
    for key, (parts, what, supplied) in _SWITCHED.items():
        start = f"--config.{key}.name="
        chosen = [a.removeprefix(start) for a in overrides if a.startswith(start)]
        section = config.get(key)
        if not isinstance(section, ConfigDict):
            continue
        if not chosen or chosen[-1] not in parts or chosen[-1] == section.get("name"):
            continue
        new = _described(parts, chosen[-1], what)
        kept = {k: v for k, v in section.items() if k in new and k != "name"}
        config[key] = ConfigDict({k: v for k, v in {**new, **kept}.items() if k not in supplied})


def _prepare(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Makes a place for overrides that name none yet.

    An augmentation that the config does not have; the ``warmup`` or the ``unit`` of a schedule; a
    number in place of a schedule, or of another section that stands for one.
    """
    for argument in overrides:
        path, _, value = argument.removeprefix("--config.").partition("=")
        *sections, last = path.split(".")
        augmentations = _section_at(config, sections[:1])
        if sections[:1] == ["augmentation"] and len(sections) == 2 and augmentations is not None:
            name = sections[1]
            if name not in augmentations and name in AUGMENTATIONS:
                augmentations[name] = augmentation(name)
        section = _section_at(config, sections)
        if section is None:
            continue
        if section.get("name") in SCHEDULES and last in _OF_SCHEDULES:
            section.update({last: section.get(last, _OF_SCHEDULES[last])})
        if last in _NUMBERS and isinstance(section.get(last), ConfigDict) and _is_number(value):
            with section.ignore_type():
                section[last] = float(value)


# What any schedule may have beside its settings, and what is a number or such a section.
_OF_SCHEDULES = {"unit": "step", "warmup": 0.0}
_NUMBERS = ("learning_rate", "weight", "weight_decay")


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
            known = section.keys() if isinstance(section, ConfigDict) else ()
            raise ValueError(f"{where} has no key '{key}'.{names.nearest(key, known)}")
        section, where = section[key], f"{where}.{key}"
    if section is None:
        raise ValueError(
            f"{where} is None, of no type that an override could have; change it in a config file."
        )


# Sections of one part, with its registry, what it is called, and what the program supplies.
_SWITCHED: dict[str, tuple[Mapping[str, Any], str, tuple[str, ...]]] = {
    "optimizer": (OPTIMIZERS, "optimizer", ()),
    "update_rule": (UPDATES, "update rule", ("main", "aggregator")),
    "aggregator": (AGGREGATORS, "aggregator", ()),
    "weighting": (WEIGHTINGS, "weighting", ("period",)),
}


def to_json(config: ConfigDict) -> str:
    """Writes a resolved config as JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str, source: str = "The config") -> ConfigDict:
    """Reads what ``to_json`` wrote.

    Args:
        text: The JSON.
        source: Where it comes from, for messages.

    Returns:
        The config, not yet checked.

    Raises:
        ValueError: If it is no such JSON.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(each) for key, each in value.items()}
        return tuple(tuples(each) for each in value) if isinstance(value, list) else value

    found = untrusted.parse_json(text, source)
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds no config; it should be a JSON object.")
    try:
        return ConfigDict(tuples(found))
    # Of keys with a dot, or that a ConfigDict keeps for itself.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} holds no config: {error}") from None


def completed(config: ConfigDict) -> ConfigDict:
    """Returns a config with the settings that a former version did not have.

    Args:
        config: A config that was stored; it is left as it is.

    Returns:
        The same with the defaults of what is missing, which are what that version did.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    for section in _sections(config.get("heads")):
        if section.get("name") == "decoders":
            _complete(section, {"last": "linear"})
    return _with_defaults(config)


def _with_defaults(config: ConfigDict) -> ConfigDict:
    """Returns a config with all that it leaves out, which is as its default."""
    config, known = config.copy_and_resolve_references(), default()
    config.unlock()
    for section, defaults in ((config, known), (config.get("data"), known.data)):
        _complete(section, defaults)
    for key, (parts, what, supplied) in _SWITCHED.items():
        _complete_part(config.get(key), parts, what, supplied)
    _complete_part(config.get("backbone"), BACKBONES, "backbone")
    for section in _sections(config.get("heads")):
        _complete_part(section, HEADS, "head")
    return config


def _sections(section: Any) -> list[ConfigDict]:
    """Returns the sections within one, if it is one."""
    inner = section.values() if isinstance(section, ConfigDict) else ()
    return [each for each in inner if isinstance(each, ConfigDict)]


def _complete(section: Any, defaults: Mapping[str, Any]) -> None:
    if isinstance(section, ConfigDict):
        section.update({k: v for k, v in defaults.items() if k not in section})


def _complete_part(
    section: Any, parts: Mapping[str, Any], what: str, supplied: Sequence[str] = ("plan",)
) -> None:
    name = section.get("name") if isinstance(section, ConfigDict) else None
    if isinstance(name, str) and name in parts:
        defaults = _described(parts, name, what)
        _complete(section, {k: v for k, v in defaults.items() if k not in supplied})


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns ``{"a.b": value}`` for a nested config."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = tuple(value) if isinstance(value, list) else value
    return found


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lists what two configs compute differently, a line ``key: old -> new`` each."""
    a, b = flat(_with_defaults(old)), flat(_with_defaults(new))
    keys = sorted((a.keys() | b.keys()) - _FREE)
    absent = "(absent)"
    changed = [key for key in keys if a.get(key, absent) != b.get(key, absent)]
    return [
        f"{key}: {_short(a.get(key, absent))} -> {_short(b.get(key, absent))}" for key in changed
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def repository_configs() -> Path:
    """Returns the directory of the shipped configs, their tables and groups.

    It is ``configs`` beside the package in the repository, and inside of it where it is installed.
    """
    package = Path(__file__).resolve().parent
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


def variant(variants: Mapping[str, Any], name: str) -> Any:
    """Looks a variant up; ``ValueError`` if there is none."""
    return registry.choose(variants, name, "variant")
