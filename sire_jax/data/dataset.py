"""What a set of labelled images is, and what of it is used."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

S_co = TypeVar("S_co", covariant=True)


@dataclass(frozen=True)
class Source:
    """Images with their labels, in memory.

    Attributes:
        image: ``[n, h, w, c]``, uint8 in [0, 255], or finite floats.
        labels: For each kind of label (``"label"`` and any other) integers ``[n]``.
    """

    image: np.ndarray
    labels: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.image)

    def identity(self) -> list[np.ndarray]:
        """Returns arrays that are others for another source."""
        return [self.image, *(self.labels[kind] for kind in sorted(self.labels))]


@dataclass(frozen=True)
class Dataset(Generic[S_co]):
    """The training and test images of a set.

    Attributes:
        train: Training images: a ``Source``, or ``records.Records``.
        test: Test images.
        classes: For each kind of label the number of classes.
        names: For each kind of label the names of its classes; of kinds without names "0", "1", ….
    """

    train: S_co
    test: S_co
    classes: Mapping[str, int]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {kind: map(str, range(number)) for kind, number in self.classes.items()}
        names = {kind: tuple(self.names.get(kind, each)) for kind, each in numbers.items()}
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Selection:
    """What of a set is used.

    Attributes:
        train_splits: The splits that make the training images, one after another.
        test_split: The split that makes the test images.
        draw_classes: How many classes are drawn at random (see ``draw_classes``); 0: all are used.
        draw_seed: Seed of that draw, at least 0.
    """

    train_splits: tuple[str, ...] = ("train",)
    test_split: str = "test"
    draw_classes: int = 0
    draw_seed: int = 0

    def __post_init__(self) -> None:
        splits = self.train_splits
        if not splits or not all(isinstance(split, str) for split in splits):
            raise ValueError(
                f"config.data.train_splits is {splits!r}; it should be names of splits, such as"
                " ('train',)."
            )
        if len({*splits, self.test_split}) <= len(splits):
            raise ValueError(
                f"config.data.train_splits is {splits} and test_split '{self.test_split}'; no split"
                " should be named twice."
            )
        if self.draw_classes < 0 or self.draw_classes == 1:
            raise ValueError(
                f"config.data.draw_classes is {self.draw_classes}; it should be at least 2, or 0 to"
                " use all classes."
            )
        if self.draw_seed < 0:
            raise ValueError(f"config.data.draw_seed is {self.draw_seed}; it should be at least 0.")

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Selection":
        """Returns what the section ``config.data`` says.

        Raises:
            ValueError: If a value is out of range.
        """
        splits = tuple(data["train_splits"])
        return cls(splits, data["test_split"], data["draw_classes"], data["draw_seed"])

    def check_splits(self, what: object, known: Collection[str]) -> None:
        """Checks that a set has the splits.

        Args:
            what: What the set is called in the message.
            known: Its splits.

        Raises:
            ValueError: If it lacks one.
        """
        for split in (*self.train_splits, self.test_split):
            if split not in known:
                raise ValueError(
                    f"{what} has no split '{split}', only {list(known)}; choose with"
                    " config.data.train_splits and config.data.test_split."
                )


EVERYTHING = Selection()


def draw_classes(classes: int, number: int, seed: int) -> np.ndarray:
    """Draws classes at random without replacement, the same ones on every machine.

    Args:
        classes: How many there are.
        number: How many are drawn, in 2..classes.
        seed: Seed of ``numpy.random.default_rng``.

    Returns:
        ``[number]``, integers in 0..classes - 1, ascending.

    Raises:
        ValueError: If ``number`` is out of range.
    """
    if not 2 <= number <= classes:
        raise ValueError(
            f"config.data.draw_classes is {number}; of {classes} classes it should be in"
            f" 2..{classes}, or 0 to use all."
        )
    return np.sort(np.random.default_rng(seed).choice(classes, number, replace=False))
