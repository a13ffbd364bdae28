"""Configs as they are kept with runs, read again, and compared."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sire_jax import registry, untrusted
from sire_jax.configuration.defaults import default
from sire_jax.configuration.sections import NAMED, SINGLE, Kind

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
            return {key: tuples(entry) for key, entry in value.items()}
        return tuple(tuples(entry) for entry in value) if isinstance(value, list) else value

    sections = untrusted.parse_json(text, source)
    if not isinstance(sections, dict):
        raise ValueError(f"{source} holds no config; it should be a JSON object.")
    try:
        return ConfigDict(tuples(sections))
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
    config, model = config.copy_and_resolve_references(), default()
    config.unlock()
    for section, defaults in ((config, model), (config.get("data"), model.data)):
        _complete(section, defaults)
    for key, kind in SINGLE.items():
        _complete_part(config.get(key), kind)
    for section in _sections(config.get("heads")):
        _complete_part(section, NAMED["heads"])
    return config


def _sections(section: Any) -> list[ConfigDict]:
    """Returns the sections within one, if it is one."""
    inner = section.values() if isinstance(section, ConfigDict) else ()
    return [section for section in inner if isinstance(section, ConfigDict)]


def _complete(section: Any, defaults: Mapping[str, Any]) -> None:
    if isinstance(section, ConfigDict):
        section.update({k: v for k, v in defaults.items() if k not in section})


def _complete_part(section: Any, kind: Kind) -> None:
    name = section.get("name") if isinstance(section, ConfigDict) else None
    if isinstance(name, str) and name in kind.parts:
        _complete(section, kind.describe(name))


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lists what two configs compute differently, a line ``key: old -> new`` each."""
    a, b = registry.flat(_with_defaults(old)), registry.flat(_with_defaults(new))
    keys = sorted((a.keys() | b.keys()) - _FREE)
    absent = "(absent)"
    changed = [key for key in keys if a.get(key, absent) != b.get(key, absent)]
    return [
        f"{key}: {_short(a.get(key, absent))} -> {_short(b.get(key, absent))}" for key in changed
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"
