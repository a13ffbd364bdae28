"""The data of runs: loaded or opened, checked against the config, and drawn for each seed."""

from collections.abc import Sequence
from typing import Any

from sire_jax.configuration.experiment import Experiment
from sire_jax.data import records, sources, tasks
from sire_jax.data.dataset import Dataset, Selection, Source
from sire_jax.groups.partition import check_names
from sire_jax.predictions import is_fitted
from sire_jax.registry import located
from sire_jax.text import listed


def load_data(parts: Experiment) -> tuple[Dataset[Any], list[tasks.Draw]]:
    """Loads the data, or opens those that are streamed, and draws the examples of every run.

    Args:
        parts: The parts of the runs.

    Returns:
        The data set, and a draw for each run.

    Raises:
        ValueError: If the data are not what the config says, or too few.
        FileNotFoundError: If the data set is not prepared.
    """
    data = parts.config.data
    dataset = _streamed(parts) if data.feed == "stream" else _decoded(parts)
    drawn, skipped = data.draw_classes > 0, len(dataset.skipped)
    without = f", without damaged ones ({skipped} with those of the test)" * (skipped > 0)
    if data.images not in (0, len(dataset.train)):
        raise ValueError(
            f"config.data.images is {data.images}, but {data.name} has"
            f" {len(dataset.train)} training images{' of these classes' * drawn}{without}; set"
            f" --config.data.images={len(dataset.train)}."
        )
    for kind, classes in data.classes.items():
        if dataset.classes.get(kind) != classes:
            raise ValueError(
                f"config.data.classes.{kind} is {classes}, but {data.name} has"
                f" {dict(dataset.classes)}{_named(dataset.names.get(kind, ()))}."
            )
    for name, groups in parts.groups.items():
        check_names(f"config.data.groups.{name}", groups, dataset.names["label"])
    with located("config.data.task"):
        draws = [parts.task.draw(dataset, seed) for seed in parts.seeds]
    if len(draws[0].train) < parts.config.batch_size:
        raise ValueError(
            f"config.batch_size is {parts.config.batch_size}, but there are only"
            f" {len(draws[0].train)} training examples."
        )
    # Every run ends with a measurement of the test images.
    for split in (*parts.config.evaluate_splits, "test"):
        if not len(getattr(draws[0], split)):
            raise ValueError(
                f"There are no {split} examples to measure; give config.data.task some (the"
                " validation examples are validation_per_class or validation)."
            )
    for name, rule in parts.predictions.items():
        if is_fitted(rule) and not len(getattr(draws[0], rule.split)):
            raise ValueError(
                f"The prediction '{name}' is fitted to {rule.split} examples, and there"
                " are none; hold some out with --config.data.task.validation_per_class=50."
            )
    return dataset, draws


def _decoded(parts: Experiment) -> Dataset[Source]:
    data = parts.config.data
    with located("config.data"):
        dataset = sources.load(
            data.name,
            data.dir,
            data.cache,
            Selection.of(data),
            data.resize,
            data.shape[-1],
            data.threads,
            data.damaged,
            data.classes.to_dict(),
            ignored(parts),
        )
    for split, source in (("training", dataset.train), ("test", dataset.test)):
        if source.image.shape[1:] != tuple(data.shape):
            raise ValueError(
                f"config.data.shape is {tuple(data.shape)}, but the {split} images of"
                f" {data.name} are {source.image.shape[1:]}."
            )
    return dataset


def _streamed(parts: Experiment) -> Dataset[records.Records]:
    data = parts.config.data
    with located("config.data"):
        return records.open_records(
            data.name,
            data.dir,
            data.cache,
            Selection.of(data),
            data.shape[-1],
            data.classes.to_dict(),
            ignored(parts),
        )


def ignored(parts: Experiment) -> dict[str, set[int]]:
    """Returns the labels, by kind, that are none and that objectives leave out.

    Args:
        parts: The parts of the runs.
    """
    ignored: dict[str, set[int]] = {}
    for objective in parts.objectives.values():
        if objective.ignore is not None:
            ignored.setdefault(objective.target, set()).add(objective.ignore)
    return ignored


def _named(names: Sequence[str]) -> str:
    return f" ({listed(names)})" if names else ""
