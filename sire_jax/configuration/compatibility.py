"""Whether the parts of an experiment fit together; each check raises ``ValueError`` if not."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sire_jax import objectives, optimizers, registry
from sire_jax.groups import Groups
from sire_jax.losses import classifies
from sire_jax.metrics import is_classification
from sire_jax.networks import MAIN
from sire_jax.text import nearest

_UNITS = ("step", "epoch", "run")


def widths(
    classes: Mapping[str, int], chosen: objectives.Objectives, outputs: Mapping[str, Any]
) -> None:
    """Checks that an output has as many logits as its target has classes.

    Raises:
        ValueError: If an output that classifies has another number of logits.
    """
    for name, objective in chosen.items():
        width = outputs[objective.output].shape[-1]
        number = classes.get(objective.target, width)
        if classifies(objective.loss) and width != number:
            raise ValueError(
                f"The objective '{name}' compares '{objective.output}', which has {width} logits,"
                f" with '{objective.target}', which has {number} classes."
            )


def groups(groups: Mapping[str, Groups], classes: int, batch: Mapping[str, Any]) -> None:
    """Checks that groups are of all labels, and have names of their own.

    Raises:
        ValueError: If they are of other labels, or have the name of something in a batch.
    """
    for name, partition in groups.items():
        if len(partition.classes) != classes:
            raise ValueError(
                f"config.data.groups.{name} groups {len(partition.classes)} labels, but there are"
                f" {classes}."
            )
        if name in batch:
            raise ValueError(
                f"Groups can't be called '{name}': batches have that already. Rename them."
            )


def ignored(chosen: objectives.Objectives, pairs: bool) -> None:
    """Checks that what objectives ignore can't be taken for a label: of pairs, their order.

    Raises:
        ValueError: If, of pairs, an objective ignores a number that is not negative.
    """
    for name, objective in chosen.items():
        if pairs and objective.ignore is not None and objective.ignore >= 0:
            raise ValueError(
                f"The objective '{name}' ignores {objective.ignore}, but of pairs a digit that is"
                " none is a negative number, such as -1: others have an order."
            )


def labels(predictions: Mapping[str, Any], chosen: objectives.Objectives) -> None:
    """Checks that the main output predicts the label where a rule over groups needs it to.

    Raises:
        ValueError: If a rule over groups has no main output that is trained on ``"label"``.
    """
    targets = {objective.target for objective in chosen.values() if objective.output == MAIN}
    for name, prediction in predictions.items():
        if hasattr(prediction, "groups") and "label" not in targets:
            raise ValueError(
                f"The prediction '{name}' needs a main output that is trained on 'label'; its"
                f" targets are {sorted(targets)}."
            )


def ranges(
    heads: Mapping[str, Any], chosen: objectives.Objectives, low: float, high: float
) -> None:
    """Checks that what predicts images says that it predicts the values that images have.

    Raises:
        ValueError: If a head that predicts images states another range.
    """
    for name, objective in chosen.items():
        stated = getattr(heads.get(objective.output), "value_range", None)
        if stated is None or objective.target != "image":
            continue
        if not np.allclose(stated, (low, high), atol=1e-2 * (high - low)):
            raise ValueError(
                f"The objective '{name}' reconstructs images whose values are in"
                f" [{low:.4g}, {high:.4g}] (config.data.scale, mean and std), but the head"
                f" '{objective.output}' states the range [{stated[0]:.4g}, {stated[1]:.4g}]. Set"
                f" its value_range to ({low:.4g}, {high:.4g}), or the images' to what it states."
            )


def selection(
    chosen: objectives.Objectives, outputs: Mapping[str, Any], batch: Mapping[str, Any]
) -> None:
    """Checks that the accuracy of the main output, which chooses the best weights, is measured.

    Raises:
        ValueError: If no objective on the main output has an accuracy.
    """
    accurate = objectives.accurate(chosen, outputs, batch)
    if not any(chosen[name].output == MAIN for name in accurate):
        raise ValueError(
            "config.evaluate_splits has 'validation', where the best accuracy of the main output"
            " chooses the weights, but no objective on 'main' has labels."
        )


def augmentations(augmentations: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Checks that a batch has what each augmentation changes, and that it can be changed.

    Raises:
        ValueError: If a batch lacks what an augmentation needs.
    """
    for name, augment in augmentations.items():
        for key in getattr(augment, "needs", ("image",)):
            if key not in batch:
                raise ValueError(
                    f"The augmentation '{name}' needs '{key}', which the task's batches don't have;"
                    f" they have {', '.join(sorted(batch))}."
                )
        jax.eval_shape(augment, jax.random.key(0), dict(batch))


def crop(side: int, ten: bool, image: Sequence[int]) -> None:
    """Checks the side of crops against images ``[…, h, w, c]``; 0 stands for no crops.

    Raises:
        ValueError: If crops are larger than the images, or ten crops not smaller.
    """
    height, width = image[-3:-1]
    smallest = min(height, width)
    if side > smallest:
        raise ValueError(
            f"config.data.crop is {side}, but images are {height} x {width}; it should be at most"
            f" {smallest}, or 0 for no crops."
        )
    if ten and not 0 < side < smallest:
        raise ValueError(
            f"config.data.ten_crop needs crops that are smaller than the images, {height} x"
            f" {width}; config.data.crop is {side}. Set it to 1..{smallest - 1}."
        )


def averages(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Checks that all outputs are logits, which can be averaged over crops.

    Raises:
        ValueError: If an output does not classify.
    """
    for name, output in outputs.items():
        if not any(is_classification(output, target) for target in batch.values()):
            raise ValueError(
                f"config.data.ten_crop averages logits, but the output '{name}', {output}, does not"
                " classify. Set it to False, or leave the output's head out."
            )


def number_or_schedule(where: str, value: Any) -> None:
    """Checks a setting of a config that is a number or the section of a schedule.

    Raises:
        ValueError: If it is neither, or a setting of the schedule is wrong.
    """
    if not registry.is_section(value):
        optimizers.number_or_schedule(value, f"value of {where}")
        return
    unit = value.get("unit", "step")
    if unit not in _UNITS:
        raise ValueError(f"{where}.unit is {unit!r}.{nearest(str(unit), _UNITS)}")
    warmup = value.get("warmup", 0.0)
    registry.check_type(f"{where}.warmup", warmup, 0.0)
    optimizers.number_or_schedule(warmup, f"value of {where}.warmup")
    registry.check(optimizers.SCHEDULES, value, "schedule", where, optional=("unit", "warmup"))


def schedule(name: str, weight: optax.Schedule, steps: int) -> None:
    """Checks a weight at the beginning, in the middle and at the end of the run.

    Raises:
        ValueError: If it is negative or not finite there.
    """
    for step in (0, steps // 2, steps):
        value = float(weight(jnp.asarray(step, jnp.int32)))
        if not 0 <= value < np.inf:
            raise ValueError(
                f"The weight of the objective '{name}' is {value:.4g} after {step} steps; it should"
                " be finite and at least 0."
            )
