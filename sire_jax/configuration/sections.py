"""Parts written down as sections of a config, which show every setting.

So each can be overridden: ``--config.backbone.dropout=0.3``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sire_jax import registry
from sire_jax.backbones import BACKBONES
from sire_jax.data.augmentation import AUGMENTATIONS
from sire_jax.data.tasks import TASKS
from sire_jax.fitted_prediction import PREDICTIONS
from sire_jax.heads import HEADS
from sire_jax.losses import LOSSES, LOSSES_WITH_SETTINGS
from sire_jax.optimizers import OPTIMIZERS
from sire_jax.updates import AGGREGATORS, UPDATES, WEIGHTINGS

# Sections of one part, with its registry, what it is called, and what the program supplies.
SWITCHED: dict[str, tuple[Mapping[str, Any], str, tuple[str, ...]]] = {
    "optimizer": (OPTIMIZERS, "optimizer", ()),
    "update_rule": (UPDATES, "update rule", ("main", "aggregator")),
    "aggregator": (AGGREGATORS, "aggregator", ()),
    "weighting": (WEIGHTINGS, "weighting", ("period",)),
}


def described(parts: Mapping[str, Any], name: str, what: str, **settings: Any) -> ConfigDict:
    """Describes a part of a registry; see ``registry.describe``."""
    return ConfigDict(registry.describe(parts, name, what, **settings))


def backbone(name: str, **settings: Any) -> ConfigDict:
    """Describes a backbone; see ``registry.describe``."""
    return described(BACKBONES, name, "backbone", **settings)


def head(name: str, **settings: Any) -> ConfigDict:
    """Describes a head; see ``registry.describe``."""
    return described(HEADS, name, "head", **settings)


def task(name: str, **settings: Any) -> ConfigDict:
    """Describes a task; see ``registry.describe``."""
    return described(TASKS, name, "task", **settings)


def augmentation(name: str, **settings: Any) -> ConfigDict:
    """Describes an augmentation; see ``registry.describe``."""
    return described(AUGMENTATIONS, name, "augmentation", **settings)


def prediction(name: str, **settings: Any) -> ConfigDict:
    """Describes a prediction rule; see ``registry.describe``."""
    return described(PREDICTIONS, name, "prediction", **settings)


def optimizer(name: str, **settings: Any) -> ConfigDict:
    """Describes an optimizer; see ``registry.describe``."""
    return described(OPTIMIZERS, name, "optimizer", **settings)


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
    section = described(UPDATES, name, "update rule", **settings)
    # What the program supplies.
    _, _, supplied = SWITCHED["update_rule"]
    return ConfigDict({k: v for k, v in section.items() if k not in supplied})


def loss(name: str, **settings: Any) -> ConfigDict:
    """Describes a loss that has settings; see ``registry.describe``."""
    return described(LOSSES_WITH_SETTINGS, name, "loss", **settings)


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


def variant(variants: Mapping[str, Any], name: str) -> Any:
    """Looks a variant up; ``ValueError`` if there is none."""
    return registry.choose(variants, name, "variant")
