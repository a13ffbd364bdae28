"""Shares of splits, in the words of ``tensorflow_datasets``: ``train[:80%]``, ``test[1000:]``."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FORM = re.compile(r"(?P<split>[^\[\]]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Share:
    """A split, or a part of its images.

    >>> share = Share.parse("train[80%:]")
    >>> share.split, share.span(1000)
    ('train', range(800, 1000))
    >>> Share.parse("train[-500:]").span(1000)
    range(500, 1000)

    Attributes:
        split: Name of the split.
        start: Where the part starts: a number of images, or a percentage such as ``"80%"``; below
            0 it counts from the end. "" for the first image.
        stop: Where it stops, likewise; "" for behind the last image.
    """

    split: str
    start: str = ""
    stop: str = ""

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Reads ``split``, ``split[start:stop]``, ``split[start:]`` or ``split[:stop]``.

        Raises:
            ValueError: If it is none of these.
        """
        parts = _FORM.fullmatch(text)
        if parts is None:
            raise ValueError(
                f"'{text}' is no split; write its name, such as 'train', or a share of it, such as"
                " 'train[:80%]', 'train[80%:]', 'train[:1000]' or 'train[-500:]'."
            )
        return cls(parts["split"], parts["start"] or "", parts["stop"] or "")

    def __str__(self) -> str:
        is_part = self.start or self.stop
        return f"{self.split}[{self.start}:{self.stop}]" if is_part else self.split

    def span(self, images: int) -> range:
        """Returns which images of the split it has, by their places in the order of shares.

        A percentage is rounded to the nearest number of images, halves to the even one, so that
        ``[:80%]`` and ``[80%:]`` have each image once; ``-20%`` is the same place as ``80%``.

        Args:
            images: How many the split has.

        Raises:
            ValueError: If it reaches beyond the images, or has none.
        """
        start = self._place(self.start or "0", images)
        stop = self._place(self.stop, images) if self.stop else images
        if start >= stop:
            raise ValueError(
                f"'{self}' has no images: of the {images:,} of '{self.split}' it would be those"
                f" from {start:,} up to {stop:,}."
            )
        return range(start, stop)

    def _place(self, boundary: str, images: int) -> int:
        number = int(boundary.rstrip("%"))
        of = 100 if boundary.endswith("%") else images
        number = number + of if boundary.startswith("-") else number
        if not 0 <= number <= of:
            raise ValueError(
                f"'{self}' reaches beyond the {images:,} images of '{self.split}'; its boundaries"
                f" should be in 0..{images}, or 0%..100%."
            )
        return round(number * images / 100) if boundary.endswith("%") else number


def order(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Puts images in the order that shares are taken from: the same wherever they lie.

    At random, by a digest of their names; and each class evenly spread, so that shares have as much
    of each, but for one image.

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> half = order(["a", "b", "c", "d", "e", "f"], labels)[:3]
    >>> np.bincount(labels[half]).tolist()
    [2, 1]

    Args:
        names: Of the images, each once.
        labels: Their classes, ``[n]``.

    Returns:
        Their numbers, ``[n]``.
    """
    # Of names, not places: the others stay in their order if an image is added or removed.
    digests = [hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names]
    drawn = np.array(sorted(range(len(names)), key=digests.__getitem__), np.int64)
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    rank = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    place = np.empty(len(names))
    place[by_class] = rank
    # Stable: of several classes at one place the drawn order decides.
    return drawn[np.argsort(place[drawn], kind="stable")]
