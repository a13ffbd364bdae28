"""Configs with other values, of whatever type: what a config's own assignment would refuse."""

from ml_collections import ConfigDict


def changed(config, changes):
    """Returns a config with other values, by their paths, such as ``data.shape``."""
    plain = config.to_dict()
    for path, value in dict(changes).items():
        *sections, key = path.split(".")
        section = plain
        for each in sections:
            section = section[each]
        section[key] = value.to_dict() if isinstance(value, ConfigDict) else value
    return ConfigDict(plain)
