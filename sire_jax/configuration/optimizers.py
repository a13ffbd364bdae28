"""From the section of a config to the optimizer, whose schedules count steps."""

from collections.abc import Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from sire_jax import optimizers, registry
from sire_jax.configuration.sections import SINGLE
from sire_jax.data import tasks


def steps_per_epoch(task: tasks.Task, config: ConfigDict) -> int | None:
    """Returns the steps of an epoch as the config tells, ``None`` if it doesn't.

    Args:
        task: What an example is.
        config: The config.

    Raises:
        ValueError: If there are too few examples for one.
    """
    data = config.data
    if not data.images and isinstance(task, tasks.Images):
        return None
    examples = task.examples(data.images, data.classes)
    if examples < 1:
        raise ValueError(
            f"config.data.images is {data.images}, and config.data.task.validation_per_class takes"
            f" {data.images - examples} of them aside, so that none are left to train on; take"
            " fewer."
        )
    if examples < config.batch_size:
        raise ValueError(
            f"config.batch_size is {config.batch_size}, but there are only {examples} training"
            " examples."
        )
    return examples // config.batch_size


def units(task: tasks.Task, config: ConfigDict) -> optimizers.Units:
    """Returns the lengths in steps of what schedules count in."""
    steps = steps_per_epoch(task, config)
    return {"epoch": steps, "run": None if steps is None else steps * config.epochs}


def numbers(config: ConfigDict) -> dict[str, Any]:
    """Returns the numbers of the learning rate that may be traced; none of one's own optimizer."""
    section = config.optimizer
    rate = section.get("learning_rate")
    if section.name not in optimizers.OPTIMIZERS or rate is None or callable(rate):
        return {}
    return {"learning_rate": optimizers.traceable(rate)}


def create(
    config: ConfigDict, units: optimizers.Units, numbers: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Makes the optimizer, with its schedules counting steps.

    Args:
        config: The config.
        units: The lengths in steps of what schedules count in.
        numbers: Takes the place of what the function ``numbers`` returns; may be empty.

    Raises:
        ValueError: If a setting is out of range, or a schedule counts in what is not known.
    """
    section = dict(config.optimizer)
    section |= {k: optimizers.with_traced(section[k], traced) for k, traced in numbers.items()}
    schedules = {
        key: optimizers.number_or_schedule(value, key.replace("_", " "), units)
        for key, value in section.items()
        if registry.is_section(value) and "name" in value
    }
    return SINGLE["optimizer"].create({**section, **schedules})
