"""Whether a config has the keys, types and ranges that it should have."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sire_jax import registry, text
from sire_jax.configuration import SPLITS, compatibility, default
from sire_jax.configuration import groups as group_sections
from sire_jax.configuration import objectives as objective_sections
from sire_jax.configuration.sections import NAMED, SINGLE, TASK
from sire_jax.data.dataset import Selection
from sire_jax.layers.initialization import INITIALIZATIONS
from sire_jax.optimizers import OPTIMIZERS

# What may be done about a run that diverges: to end all, or to record it and go on with the others.
POLICIES = ("stop", "record")


def validate(config: ConfigDict) -> None:
    """Checks keys, types and ranges of a config, and the keys and types of its parts.

    Ranges of the parts' settings, and whether parts fit together, are checked as they are made.

    Args:
        config: The config.

    Raises:
        ValueError: If a key is unknown or missing, or a value has the wrong type or is out of
            range.
    """
    _check_section("config", config, default())
    for key in ("seeds", "epochs", "batch_size", "steps_per_call", "evaluate_batch_size"):
        _check_least(key, config[key], 1)
    for key in _AT_LEAST_0:
        _check_least(key, config[key], 0)
    _check_least("checkpoints_kept", config.checkpoints_kept, 1)
    if config.peer_timeout <= 0:
        raise ValueError(f"config.peer_timeout is {config.peer_timeout}; it should be above 0.")
    if config.seed + config.seeds > 2**31:
        raise ValueError(f"config.seed is {config.seed}; seeds should be below 2**31.")
    for split in config.evaluate_splits:
        if split not in SPLITS:
            raise ValueError(f"config.evaluate_splits has '{split}'.{text.nearest(split, SPLITS)}")
    _check_devices(config)
    _check_data(config.data)
    _check_feed(config)
    _check_parts(config)


_AT_LEAST_0 = (
    "seed",
    "seeds_at_once",
    "devices",
    "evaluate_every",
    "checkpoint_every",
    "checkpoint_steps",
    "chance_after",
    "gradient_flow_every",
)


def _check_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"config.{key} is {value}; it should be at least {least}.")


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"config.{key} is '{value}'.{text.nearest(value, choices)}")


def _check_devices(config: ConfigDict) -> None:
    _check_choice("parallel", config.parallel, ("jit", "pmap"))
    _check_choice("devices_share", config.devices_share, ("batch", "runs"))
    _check_choice("batch_norm", config.batch_norm, ("batch", "device"))
    _check_choice("initialization", config.initialization, INITIALIZATIONS)
    _check_choice("on_diverged", config.on_diverged, POLICIES)
    if config.batch_norm == "device" and config.parallel != "pmap":
        raise ValueError(
            "config.batch_norm is 'device', which needs config.parallel 'pmap': under"
            f" '{config.parallel}' statistics are always over the whole batch."
        )
    if config.devices_share == "runs" and config.parallel != "jit":
        raise ValueError(
            "config.devices_share is 'runs', which needs config.parallel 'jit'; it is"
            f" '{config.parallel}', in which devices share batches."
        )


# More would fill the memory before anything is said.
_MOST_PIXELS = 2**28


def _check_data(data: ConfigDict) -> None:
    shape = tuple(data.shape)
    if len(shape) != 3 or not all(n > 0 for n in shape):
        raise ValueError(f"config.data.shape is {shape}; it should be (height, width, channels).")
    if math.prod(shape) > _MOST_PIXELS:
        raise ValueError(
            f"config.data.shape is {shape}; an image should have at most {_MOST_PIXELS:,} values."
        )
    for key in ("images", "crop", "resize", "workers"):
        _check_least(f"data.{key}", data[key], 0)
    _check_least("data.threads", data.threads, 1)
    for key in ("mean", "std"):
        _check_channels(key, data[key], shape)
    if not all(value > 0 for value in data.std):
        raise ValueError(f"config.data.std is {tuple(data.std)}; it should be above 0.")
    if data.scale <= 0:
        raise ValueError(f"config.data.scale is {data.scale}; it should be above 0.")
    if "label" not in data.classes:
        raise ValueError("config.data.classes has no 'label'; it should say how many there are.")
    for kind, classes in data.classes.items():
        registry.check_type(f"config.data.classes.{kind}", classes, 10)
        _check_least(f"data.classes.{kind}", classes, 1)
    with registry.located("config.data"):
        drawn = Selection.of(data).draw_classes
    if drawn and data.classes.to_dict() != {"label": drawn}:
        raise ValueError(
            f"config.data.classes is {data.classes.to_dict()}; where draw_classes is {drawn}"
            f" it should be {{'label': {drawn}}}, as other kinds of labels are dropped."
        )
    for name, section in data.groups.items():
        group_sections.check(name, section)


def _check_channels(key: str, values: Sequence[float], shape: Sequence[int]) -> None:
    """Checks that there is a number for each channel, or none at all."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) not in (0, shape[-1]):
        raise ValueError(
            f"config.data.{key} is {tuple(values)}; it should be a number for each of the"
            f" {shape[-1]} channels, or ()."
        )


def _check_feed(config: ConfigDict) -> None:
    """Checks where images come from, and what is done to them on the way."""
    data = config.data
    _check_choice("data.feed", data.feed, ("device", "stream"))
    _check_choice("data.damaged", data.damaged, ("raise", "skip"))
    streams = data.feed == "stream"
    if streams and config.seeds != 1:
        raise ValueError(
            f"config.data.feed is 'stream', which feeds one run; config.seeds is {config.seeds}."
            " Start a program for each seed, with config.seeds 1."
        )
    if streams and config.devices_share != "batch":
        raise ValueError(
            "config.data.feed is 'stream', which feeds one run; config.devices_share is"
            f" '{config.devices_share}', which needs several. Set it to 'batch'."
        )
    if data.workers and not streams:
        raise ValueError(
            f"config.data.workers is {data.workers}, which is for config.data.feed 'stream'; with"
            " 'device' images are decoded once, by config.data.threads. Set it to 0."
        )
    # One without a name is refused with the other parts.
    if streams and data.task.get("name", "images") != "images":
        raise ValueError(
            "config.data.feed is 'stream', which is for the task 'images'; config.data.task.name is"
            f" '{data.task.get('name')}'."
        )
    if data.random_resized_crop and not (streams and data.crop > 0):
        raise ValueError(
            "config.data.random_resized_crop is for config.data.feed 'stream', with"
            f" config.data.crop above 0; they are '{data.feed}' and {data.crop}."
        )
    resized = (data.resize, data.resize, data.shape[-1])
    if data.resize and tuple(data.shape) != resized:
        raise ValueError(
            f"config.data.resize is {data.resize}, so that config.data.shape should be {resized};"
            f" it is {tuple(data.shape)}."
        )


# Sections whose keys the user chooses: names, and the settings of the part that is named.
_OPEN = (*SINGLE, *NAMED, "objectives")
_OPEN_DATA = ("config.data.task", "config.data.classes", "config.data.groups")


def _check_section(where: str, section: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Checks a section against one that has all its keys, with values of the right types."""
    for key in section:
        if key not in model:
            raise ValueError(f"{where} has no key '{key}'.{text.nearest(key, model)}")
    for key, value in model.items():
        if key not in section:
            raise ValueError(f"{where} lacks the key '{key}'; start from configuration.default().")
        path = f"{where}.{key}"
        if not isinstance(value, ConfigDict):
            registry.check_type(path, section[key], value)
        elif not isinstance(section[key], ConfigDict):
            raise ValueError(f"{path} is {registry.shown(section[key])}; it should be a section.")
        elif key not in _OPEN and path not in _OPEN_DATA:
            _check_section(path, section[key], value)


def _check_parts(config: ConfigDict) -> None:
    """Checks the keys and types of all parts, ahead of making any."""
    TASK.check(config.data.task, "config.data.task")
    for key, kind in SINGLE.items():
        kind.check(config[key], f"config.{key}")
    for key, kind in NAMED.items():
        for name, section in config[key].items():
            kind.check(section, f"config.{key}.{name}")
    for name, section in config.objectives.items():
        objective_sections.check(name, section)
    _check_optimizer(config.optimizer)


def _check_optimizer(section: ConfigDict) -> None:
    """Checks an optimizer's schedules, and makes it without them: that costs nothing."""
    sections = {key: value for key, value in section.items() if registry.is_section(value)}
    # Weight decay may have a section with two numbers.
    scheduled = [k for k, v in sections.items() if k != "weight_decay" or "name" in v]
    for key in scheduled:
        compatibility.number_or_schedule(f"config.optimizer.{key}", section[key])
    with registry.located("config.optimizer"):
        registry.create(OPTIMIZERS, {**section, **dict.fromkeys(scheduled, 0.0)}, "optimizer")
