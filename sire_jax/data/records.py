"""Encoded images, read one at a time: sets that don't fit in memory. Nothing here needs JAX."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sire_jax.data import folders, images, prepared
from sire_jax.data.dataset import EVERYTHING, Dataset, Listed, Selection, draw
from sire_jax.data.images import DamagedImageError
from sire_jax.files import expanded
from sire_jax.text import nearest


class Split(Protocol):
    """The encoded images of a split, by number, with their labels; it can be pickled."""

    def __len__(self) -> int: ...

    def open(self) -> None:
        """Opens what all images need, unless it is open."""

    def listing(self, numbers: np.ndarray | None = None) -> Iterator[Listed]:
        """Lists what the images are made of, all or those of these numbers."""

    def sampled(self, numbers: np.ndarray | None = None) -> str:
        """Returns a digest of samples of what the list can't tell; "" if it tells everything."""

    def name(self, index: int) -> str:
        """Names an image in messages."""

    def record(self, index: int) -> tuple[bytes, dict[str, int]]:
        """Reads an encoded image and its label of each kind."""

    def ahead(self, indices: Sequence[int]) -> list[tuple[bytes, dict[str, int]] | None]:
        """Reads several at once where that is faster; ``None`` is one to be read by itself."""

    def labels(self) -> Mapping[str, np.ndarray]:
        """Reads all labels of each kind, int32 ``[n]``."""


@dataclass(frozen=True, eq=False)
class Records:
    """Images of one or several splits that are read and decoded when asked for.

    Safe for threads; other processes that get it open its files themselves.

    Attributes:
        splits: The splits, one after another.
        classes: For each kind of label the number of classes.
        channels: Of an image: 3 (colour) or 1 (grey).
        chosen: Which images of the splits, ``[n]``; None for all.
        drawn: The labels of the chosen images, ascending, which are numbered 0, 1, …; None for all.
        ignored: For a kind of label the values that are allowed, although they are no class.
    """

    splits: tuple[Split, ...]
    classes: Mapping[str, int]
    channels: int
    chosen: np.ndarray | None = None
    drawn: np.ndarray | None = None
    ignored: Mapping[str, Collection[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.splits)) if self.chosen is None else len(self.chosen)

    def listing(self) -> Iterator[Listed]:
        """Lists what the images are made of, in their order; no image is read for it."""
        for split, numbers in self._parts():
            yield from split.listing(numbers)

    def sampled(self) -> str:
        """Returns a digest of samples of what the list can't tell; "" if it tells everything."""
        return " ".join(split.sampled(numbers) for split, numbers in self._parts()).strip()

    def _parts(self) -> Iterator[tuple[Split, np.ndarray | None]]:
        """Yields the splits, each with the numbers of those of its images that are chosen."""
        start = 0
        for split in self.splits:
            stop = start + len(split)
            numbers = self.chosen
            if numbers is not None:
                numbers = numbers[(numbers >= start) & (numbers < stop)] - start
            yield split, numbers
            start = stop

    def without(self, indices: Collection[int]) -> "Records":
        """Returns the records without some of them, such as damaged ones."""
        if not indices:
            return self
        numbers = np.arange(len(self)) if self.chosen is None else self.chosen
        return replace(self, chosen=np.delete(numbers, sorted(indices)))

    def __getstate__(self) -> dict[str, Any]:
        # The labels of a batch come with its records.
        return {key: value for key, value in vars(self).items() if key != "labels"}

    @cached_property
    def labels(self) -> dict[str, np.ndarray]:
        """For each kind of label integers ``[n]``, int32; of a ``tfds`` set its files are read."""
        parts = [split.labels() for split in self.splits]
        joined = {kind: np.concatenate([part[kind] for part in parts]) for kind in self.classes}
        if self.chosen is not None:
            joined = {kind: values[self.chosen] for kind, values in joined.items()}
        if self.drawn is None:
            return joined
        return {"label": np.searchsorted(self.drawn, joined["label"]).astype(np.int32)}

    def name(self, index: int) -> str:
        """Names an image in messages: its path, or its number in its split."""
        split, number = self._find(index)
        return split.name(number)

    def _numbered(self, encoded: bytes, labels: dict[str, int]) -> tuple[bytes, dict[str, int]]:
        if self.drawn is not None:
            labels = {"label": int(np.searchsorted(self.drawn, labels["label"]))}
        return encoded, labels

    def examples(
        self, indices: Sequence[int]
    ) -> list[tuple[Image.Image, dict[str, int]] | DamagedImageError]:
        """Reads and decodes images, read together where that is faster.

        Args:
            indices: Of the images, in 0..n - 1.

        Returns:
            For each what ``example`` returns, or the error that it raises.
        """
        examples: list[tuple[Image.Image, dict[str, int]] | DamagedImageError] = []
        for index, stored in zip(indices, self._ahead(indices), strict=True):
            try:
                examples.append(self.example(index, stored))
            except DamagedImageError as error:
                examples.append(error)
        return examples

    def _ahead(self, indices: Sequence[int]) -> list[tuple[bytes, dict[str, int]] | None]:
        places = [self._find(index) for index in indices]
        if not places:
            return []
        split = places[0][0]
        # At a border between two splits each is read by itself.
        if any(other is not split for other, _ in places):
            return [None] * len(indices)
        split.open()
        records = split.ahead([number for _, number in places])
        return [record and self._numbered(*record) for record in records]

    def example(
        self, index: int, stored: tuple[bytes, dict[str, int]] | None = None
    ) -> tuple[Image.Image, dict[str, int]]:
        """Reads and decodes an image.

        Args:
            index: Of the image, in 0..n - 1.
            stored: The bytes of its file and its labels, if they have been read.

        Returns:
            The image, and its label of each kind.

        Raises:
            DamagedImageError: If it can't be read or decoded, or a label is outside its classes.
        """
        split, number = self._find(index)
        # Apart: what is wrong with all images is no damage of this one.
        split.open()
        try:
            encoded, labels = stored or self._numbered(*split.record(number))
            image = images.decode(encoded, self.channels)
        except MemoryError:
            raise
        except Exception as error:  # Damage makes Pillow raise errors of many kinds.
            raise DamagedImageError.of(self.name(index), error) from error
        for kind, label in labels.items():
            if not 0 <= label < self.classes[kind] and label not in self.ignored.get(kind, ()):
                raise DamagedImageError(
                    f"{self.name(index)} has the {kind} {label}, which is outside the"
                    f" {self.classes[kind]} classes 0..{self.classes[kind] - 1}."
                )
        return image, labels

    def read(self, index: int) -> np.ndarray:
        """Reads and decodes an image; see ``example``.

        Returns:
            ``[h, w, c]``, uint8.
        """
        return images.to_array(self.example(index)[0])

    def _find(self, index: int) -> tuple[Split, int]:
        """Finds the split of an image and its number in there."""
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index} among {len(self)}.")
        number = int(index if self.chosen is None else self.chosen[index])
        for split in self.splits:
            if number < len(split):
                break
            number -= len(split)
        return split, number


def open_records(
    name: str,
    directory: str,
    cache: str = "",
    selection: Selection = EVERYTHING,
    channels: int = 0,
    classes: Mapping[str, int] | None = None,
    ignored: Mapping[str, Collection[int]] | None = None,
) -> Dataset[Records]:
    """Opens a data set without decoding it.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
    ...         Path(directory, "pets", name).mkdir(parents=True)
    ...         for i in range(2):
    ...             Image.new("RGB", (8, 6)).save(Path(directory, "pets", name, f"{i}.png"))
    ...     pets = open_records("folder:pets", directory)
    ...     len(pets.train), pets.names["label"], pets.train.read(0).shape
    (4, ('cat', 'dog'), (6, 8, 3))

    Args:
        name: ``tfds:<set>`` with the name of a ``tensorflow_datasets`` set (see
            ``prepared.find``); or ``folder:<folder>`` (see ``folders.open_splits``).
        directory: The ``tensorflow_datasets`` data directory, or where image folders are.
        cache: A directory for copies of labels, which makes the next start fast; "" for none.
        selection: What of the set is used. Of drawn classes, only ``"label"`` is kept of the kinds
            of labels, with the drawn classes numbered 0, 1, … in their order.
        channels: Of the images: 3 (colour) or 1 (grey); 0: as a prepared set has them, 3 of a
            folder.
        classes: Numbers of classes of labels that are plain integers (see ``prepared.classes``).
        ignored: For a kind of label the values that are allowed, although they are no class.

    Returns:
        The data set. Images of several sizes are fine.

    Raises:
        ValueError: If there is no such source or split, are too few classes, or its files are not
            what they should be.
        FileNotFoundError: If the set is not in ``directory``, or there is no such home.
    """
    kind, _, title = name.partition(":")
    opened: Dataset[Any]
    own = 3
    if kind == "tfds":
        # Of drawn classes only "label" is kept: no other integers have to be read.
        plain = None if selection.draw_classes else classes
        root = expanded(directory, "the data directory ")
        opened, own = prepared.open_splits(title, root, cache, selection, plain)
    elif kind == "folder":
        opened = folders.open_splits(title, directory, selection)
    else:
        raise ValueError(
            f"There is no data source '{name}' to stream."
            f"{nearest(name, ['tfds:<set>', 'folder:<folder>'])} Others fit in memory and are"
            " loaded (--config.data.feed=device)."
        )
    channels = channels or own
    images.check_channels(channels)
    train, test = (
        Records(splits, opened.classes, channels, ignored=ignored or {})
        for splits in (opened.train, opened.test)
    )
    return draw(Dataset(train, test, opened.classes, opened.names), selection, _of_classes)


def _of_classes(records: Records, drawn: np.ndarray) -> Records:
    numbers = np.flatnonzero(np.isin(records.labels["label"], drawn))
    return Records(records.splits, {"label": len(drawn)}, records.channels, numbers, drawn)
