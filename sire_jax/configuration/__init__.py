"""From a config to the parts of a run: defaults, sections, files, overrides, checks.

What files of configs use is here: ``default()``, and ``backbone``, ``head`` and so on.
"""

from sire_jax.configuration.defaults import SPLITS, default
from sire_jax.configuration.loading import (
    CONFIGS,
    find,
    load,
    override,
    repository_configs,
    with_groups,
)
from sire_jax.configuration.sections import (
    augmentation,
    backbone,
    few_images,
    grouping,
    head,
    loss,
    objective,
    optimizer,
    prediction,
    stream,
    task,
    update_rule,
    variant,
)
from sire_jax.configuration.stored import completed, differences, from_json, to_json

__all__ = [
    "CONFIGS",
    "SPLITS",
    "augmentation",
    "backbone",
    "completed",
    "default",
    "differences",
    "few_images",
    "find",
    "from_json",
    "grouping",
    "head",
    "load",
    "loss",
    "objective",
    "optimizer",
    "override",
    "prediction",
    "repository_configs",
    "stream",
    "task",
    "to_json",
    "update_rule",
    "variant",
    "with_groups",
]
