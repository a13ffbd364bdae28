"""Whether a config has the keys, types and ranges that it should have."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sire_jax import names, registry
from sire_jax.configuration import SPLITS, default
from sire_jax.data.sources import Selection


def validate(config: ConfigDict) -> None:
    """Checks keys, types and ranges of a config, but for its parts, which check themselves.

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
    _check_least("data.images", config.data.images, 0)
    _check_least("data.crop", config.data.crop, 0)
    for key in ("mean", "std"):
        _check_channels(key, config.data[key], config.data.shape)
    if not all(value > 0 for value in config.data.std):
        raise ValueError(f"config.data.std is {tuple(config.data.std)}; it should be above 0.")
    if not math.isfinite(config.data.scale) or config.data.scale <= 0:
        raise ValueError(f"config.data.scale is {config.data.scale}; it should be above 0.")
    if "label" not in config.data.classes:
        raise ValueError("config.data.classes has no 'label'; it should say how many there are.")
    drawn = Selection.of(config.data).draw_classes
    if drawn and config.data.classes.to_dict() != {"label": drawn}:
        raise ValueError(
            f"config.data.classes is {config.data.classes.to_dict()}; where draw_classes is {drawn}"
            f" it should be {{'label': {drawn}}}, as other kinds of labels are dropped."
        )
    if config.seed + config.seeds > 2**31:
        raise ValueError(f"config.seed is {config.seed}; seeds should be below 2**31.")
    shape = tuple(config.data.shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"config.data.shape is {shape}; it should be (height, width, channels).")
    for split in config.evaluate_splits:
        if split not in SPLITS:
            raise ValueError(f"config.evaluate_splits has '{split}'.{names.nearest(split, SPLITS)}")


_AT_LEAST_0 = (
    "seed",
    "seeds_at_once",
    "devices",
    "evaluate_every",
    "checkpoint_every",
    "chance_after",
    "gradient_flow_every",
)


def _check_channels(key: str, values: Sequence[float], shape: Sequence[int]) -> None:
    """Checks that there is a finite number for each channel, or none at all."""
    finite = all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if not finite or len(values) not in (0, shape[-1]):
        raise ValueError(
            f"config.data.{key} is {tuple(values)}; it should be a number for each of the"
            f" {shape[-1]} channels, or ()."
        )


def _check_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"config.{key} is {value}; it should be at least {least}.")


# Sections whose keys the user chooses: names, and the settings of the part that is named.
_OPEN = (
    "backbone",
    "heads",
    "objectives",
    "predictions",
    "augmentation",
    "optimizer",
    "update_rule",
    "aggregator",
    "weighting",
)


_OPEN_DATA = ("config.data.task", "config.data.classes", "config.data.groups")


def _check_section(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no key '{key}'.{names.nearest(key, known)}")
    for key, value in known.items():
        if key not in given:
            raise ValueError(f"{where} lacks the key '{key}'; start from configuration.default().")
        path = f"{where}.{key}"
        if key in _OPEN or path in _OPEN_DATA:
            if not isinstance(given[key], ConfigDict):
                raise ValueError(f"{path} is {given[key]!r}; it should be a section.")
        elif isinstance(value, ConfigDict):
            if not isinstance(given[key], ConfigDict):
                raise ValueError(f"{path} is {given[key]!r}; it should be a section.")
            _check_section(path, given[key], value)
        else:
            registry.check_type(path, given[key], value)
