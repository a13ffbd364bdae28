"""Parts written down as sections of a config, which show every setting.

So each can be overridden: ``--config.backbone.dropout=0.3``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sire_jax import registry
from sire_jax.backbones import BACKBONES
from sire_jax.data.augmentation import AUGMENTATIONS
from sire_jax.data.tasks import TASKS
from sire_jax.heads import HEADS
from sire_jax.losses import LOSSES, LOSSES_WITH_SETTINGS
from sire_jax.optimizers import OPTIMIZERS
from sire_jax.predictions import PREDICTIONS
from sire_jax.updates import AGGREGATORS, UPDATES, WEIGHTINGS


class Kind(NamedTuple):
    """A kind of part that a section describes.

    Attributes:
        parts: The registry: known parts by name.
        what: What such a part is, for messages.
        supplied: Arguments that come from the program, not from the config.
        optional: Those that the program supplies where the config doesn't.
    """

    parts: Mapping[str, Any]
    what: str
    supplied: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def describe(self, name: str, **settings: Any) -> ConfigDict:
        """Writes a part down with all its settings, but for what the program supplies.

        Args:
            name: The part.
            **settings: Settings that differ from the part's defaults.

        Raises:
            ValueError: If the part or a setting does not exist.
        """
        section = registry.describe(self.parts, name, self.what, **settings)
        of_program = (*self.supplied, *self.optional)
        return ConfigDict({k: v for k, v in section.items() if k not in of_program})

    def check(self, section: Any, where: str) -> None:
        """Checks the keys and types of a section; see ``registry.check``."""
        registry.check(self.parts, section, self.what, where, self.supplied, self.optional)

    def create(self, section: Mapping[str, Any], **supplied: Any) -> Any:
        """Makes the part of a section that has been checked; see ``registry.create``."""
        return registry.make(self.parts, section, self.what, **supplied)


TASK = Kind(TASKS, "task")
LOSS = Kind(LOSSES_WITH_SETTINGS, "loss")
# Sections of one part each, by their key.
SINGLE = {
    "backbone": Kind(BACKBONES, "backbone"),
    "optimizer": Kind(OPTIMIZERS, "optimizer"),
    "update_rule": Kind(UPDATES, "update rule", ("optimizer", "reach", "main", "aggregator")),
    "aggregator": Kind(AGGREGATORS, "aggregator"),
    "weighting": Kind(WEIGHTINGS, "weighting", optional=("period",)),
}
# Sections of parts by name.
NAMED = {
    "augmentation": Kind(AUGMENTATIONS, "augmentation"),
    "heads": Kind(HEADS, "head", ("plan",)),
    "predictions": Kind(PREDICTIONS, "prediction", ("groups",)),
}


def backbone(name: str, **settings: Any) -> ConfigDict:
    """Describes a backbone; see ``Kind.describe``."""
    return SINGLE["backbone"].describe(name, **settings)


def head(name: str, **settings: Any) -> ConfigDict:
    """Describes a head; see ``Kind.describe``."""
    return NAMED["heads"].describe(name, **settings)


def task(name: str, **settings: Any) -> ConfigDict:
    """Describes a task; see ``Kind.describe``."""
    return TASK.describe(name, **settings)


def augmentation(name: str, **settings: Any) -> ConfigDict:
    """Describes an augmentation; see ``Kind.describe``."""
    return NAMED["augmentation"].describe(name, **settings)


def prediction(name: str, **settings: Any) -> ConfigDict:
    """Describes a prediction rule; see ``Kind.describe``."""
    return NAMED["predictions"].describe(name, **settings)


def optimizer(name: str, **settings: Any) -> ConfigDict:
    """Describes an optimizer; see ``Kind.describe``."""
    return SINGLE["optimizer"].describe(name, **settings)


def update_rule(name: str, **settings: Any) -> ConfigDict:
    """Describes an update rule; see ``Kind.describe``."""
    return SINGLE["update_rule"].describe(name, **settings)


def loss(name: str, **settings: Any) -> ConfigDict:
    """Describes a loss that has settings; see ``Kind.describe``."""
    return LOSS.describe(name, **settings)


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


def few_images(config: ConfigDict) -> None:
    """Sets a config of CIFAR-100 for what two cores can carry: few images, small ones, many epochs.

    Of the first 4,000 training images, 28 to 53 of each class, each seed holds 20 of each class
    aside, for what is fitted, and trains on the other 2,000 for 40 epochs. Images are scaled to
    16 x 16 pixels, and padded half as far by a random crop. Measured are all test images, and the
    last weights.

    Args:
        config: The config, with its data and augmentation; the data are changed, the augmentation,
            epochs and measurements.
    """
    config.data.train_splits = ("train[:8%]",)
    config.data.update(images=4_000, resize=16, shape=(16, 16, 3))
    config.data.task.validation_per_class = 20
    if "crop" in config.augmentation:
        config.augmentation.crop.padding //= 2
    config.epochs = 40
    config.evaluate_splits = ("test",)
    # All test images take longer than an epoch of so few.
    config.evaluate_every = 10


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
            ``{"name": "depth", "nu": 2.0}`` (``weights.depth_weights``).
        weights: Weights of a family's outputs, one by one, in place of ``weight``.
        **others: ``ignore``, ``mask`` and ``classifies``, as of ``objectives.Objective``.

    Returns:
        The section.

    Raises:
        ValueError: If there is no such loss.
    """
    if isinstance(loss, str):
        registry.choose_part(LOSSES, loss, "loss")
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
