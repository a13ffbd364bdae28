"""What a set of labelled images is, and what of it is used."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from sire_jax.data.shares import Share

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class Listed(NamedTuple):
    """What an image was made of, or many of them together, wherever that lies.

    Attributes:
        name: Its name, within the set.
        size: In bytes.
        detail: What else tells it from another, such as its class.
    """

    name: str
    size: int
    detail: str


class Listing(Protocol):
    """What lists the images of a part of a set."""

    def listing(self) -> Iterator[Listed]:
        """Lists what the images are made of, in their order; another list for other images."""

    def sampled(self) -> str:
        """Returns a digest of samples of what the list can't tell; "" if it tells everything."""


@dataclass(frozen=True)
class Source:
    """Images with their labels, in memory.

    >>> source = Source(np.full((3, 8, 8, 1), 255, np.uint8), {"label": np.array([0, 1, 1])})
    >>> batch = source.batch(source.labels["label"] == 1)
    >>> batch["image"].shape, float(batch["image"].max()), batch["label"].tolist()
    ((2, 8, 8, 1), 1.0, [1, 1])

    Attributes:
        image: ``[n, h, w, c]``, uint8 in [0, 255], or finite floats.
        labels: For each kind of label (``"label"`` and any other) integers ``[n]``.
        origin: What the images were decoded from, if from anything.
    """

    image: np.ndarray
    labels: Mapping[str, np.ndarray]
    origin: Listing | None = None

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, examples: Any = slice(None)) -> dict[str, np.ndarray]:
        """Returns images as networks see them, with their labels.

        Args:
            examples: Indices, a mask or a slice; all by default.

        Returns:
            ``"image"``, float32, in [0, 1] where pixels are bytes; and the labels by their kind.
        """
        image = self.image[examples]
        scale = np.float32(255) if image.dtype == np.uint8 else np.float32(1)
        labels = {kind: values[examples] for kind, values in self.labels.items()}
        return {"image": image.astype(np.float32) / scale, **labels}

    def listing(self) -> Iterator[Listed]:
        """Lists what the images are made of, in their order."""
        if self.origin is not None:
            yield from self.origin.listing()
            return
        yield _array("images", self.image)
        for kind in sorted(self.labels):
            yield _array(kind, self.labels[kind])


def _array(name: str, values: np.ndarray) -> Listed:
    digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
    return Listed(name, values.nbytes, f"{values.dtype} {values.shape} {digest[:16]}")


@dataclass(frozen=True)
class Dataset(Generic[S_co]):
    """The training and test images of a set.

    >>> train = Source(np.zeros((3, 8, 8, 1), np.uint8), {"label": np.array([0, 1, 1])})
    >>> test = Source(np.zeros((1, 8, 8, 1), np.uint8), {"label": np.array([0])})
    >>> pets = Dataset(train, test, {"label": 2}, {"label": ("cat", "dog")})
    >>> [pets.names["label"][i] for i in pets.train.labels["label"]]
    ['cat', 'dog', 'dog']
    >>> Dataset(train, test, {"label": 2}).names
    {'label': ('0', '1')}

    Attributes:
        train: Training images: a ``Source``, or ``records.Records``.
        test: Test images.
        classes: For each kind of label the number of classes.
        names: For each kind of label the names of its classes; of kinds without names "0", "1", ….
        skipped: What is wrong with the damaged images that were left out.
    """

    train: S_co
    test: S_co
    classes: Mapping[str, int]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = {kind: map(str, range(number)) for kind, number in self.classes.items()}
        names = {kind: tuple(self.names.get(kind, texts)) for kind, texts in numbers.items()}
        # It is frozen, and this is still its making.
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Selection:
    """What of a set is used.

    >>> selection = Selection(("train[:80%]",), "train[80%:]")
    >>> selection.spans({"train": 1000})
    (range(0, 800), range(800, 1000))

    Attributes:
        train_splits: The splits that make the training images, one after another, or shares of
            them, such as ``"train[:80%]"`` (see ``shares.Share``).
        test_split: The split that makes the test images, or a share of one.
        draw_classes: How many classes are drawn at random (see ``draw_classes``); 0: all are used.
        draw_seed: Seed of that draw, at least 0.

    Raises:
        ValueError: If a split stands twice or is not written as one, or a number is out of range.
    """

    train_splits: tuple[str, ...] = ("train",)
    test_split: str = "test"
    draw_classes: int = 0
    draw_seed: int = 0

    def __post_init__(self) -> None:
        splits = self.train_splits
        if not splits or not all(isinstance(split, str) for split in splits):
            raise ValueError(
                f"train_splits is {splits!r}; it should be names of splits, such as ('train',)."
            )
        if len({*splits, self.test_split}) <= len(splits):
            raise ValueError(
                f"train_splits is {splits} and test_split '{self.test_split}'; no split"
                " should be named twice."
            )
        for key, texts in (("train_splits", splits), ("test_split", (self.test_split,))):
            for text in texts:
                try:
                    Share.parse(text)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
        if self.draw_classes < 0 or self.draw_classes == 1:
            raise ValueError(
                f"draw_classes is {self.draw_classes}; it should be at least 2, or 0 to use all"
                " classes."
            )
        if self.draw_seed < 0:
            raise ValueError(f"draw_seed is {self.draw_seed}; it should be at least 0.")

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Selection":
        """Returns what the section ``config.data`` says.

        Raises:
            ValueError: If a value is out of range.
        """
        splits = tuple(data["train_splits"])
        return cls(splits, data["test_split"], data["draw_classes"], data["draw_seed"])

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """The shares of splits that make the training images, and last that of the test."""
        return tuple(map(Share.parse, (*self.train_splits, self.test_split)))

    def check_splits(self, name: object, splits: Collection[str], advice: str = "") -> None:
        """Checks that a set has the splits.

        Args:
            name: What the set is called in the message.
            splits: Its splits.
            advice: What else could be done, for the end of the message.

        Raises:
            ValueError: If it lacks one.
        """
        for share in self.shares:
            if share.split not in splits:
                raise ValueError(
                    f"{name} has no split '{share.split}', only {list(splits)}; choose with"
                    " train_splits and test_split, also shares of a split:"
                    f" 'train[:80%]' and 'train[80%:]'.{advice}"
                )

    def spans(self, images: Mapping[str, int]) -> tuple[range, ...]:
        """Returns which images of its split each share has, by places in the order of shares.

        Args:
            images: How many images each split has.

        Returns:
            A span for each of ``shares``.

        Raises:
            ValueError: If one has no images, or two have an image in common.
        """
        spans = [share.span(images[share.split]) for share in self.shares]
        for (a, x), (b, y) in combinations(zip(self.shares, spans, strict=True), 2):
            overlap = range(max(x.start, y.start), min(x.stop, y.stop))
            if a.split == b.split and overlap:
                raise ValueError(
                    f"'{a}' and '{b}' of train_splits and test_split have"
                    f" {len(overlap):,} images in common; shares of a split should have none."
                )
        return tuple(spans)


EVERYTHING = Selection()


def draw_classes(classes: int, number: int, seed: int) -> np.ndarray:
    """Draws classes at random without replacement, the same ones on every machine.

    >>> draw_classes(100, number=5, seed=0).tolist()
    [26, 30, 50, 61, 81]

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
            f"draw_classes is {number}; of {classes} classes it should be in"
            f" 2..{classes}, or 0 to use all."
        )
    return np.sort(np.random.default_rng(seed).choice(classes, number, replace=False))


def draw(
    dataset: Dataset[S], selection: Selection, of_classes: Callable[[S, np.ndarray], S]
) -> Dataset[S]:
    """Keeps the images of drawn classes, if some are drawn, numbered 0, 1, … in their order.

    Args:
        dataset: All images; of their labels only ``"label"`` is kept.
        selection: How many classes are drawn; see ``draw_classes``.
        of_classes: Returns the images of these classes, numbered anew.
    """
    number = selection.draw_classes
    if not number:
        return dataset
    drawn = draw_classes(dataset.classes["label"], number, selection.draw_seed)
    train, test = (of_classes(source, drawn) for source in (dataset.train, dataset.test))
    names = tuple(dataset.names["label"][i] for i in drawn)
    return Dataset(train, test, {"label": number}, {"label": names})


def stratified(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Takes the same number of random examples of each class aside.

    >>> train, validation = stratified(np.array([0, 0, 0, 1, 1, 1]), per_class=1, seed=0)
    >>> len(train), len(validation)
    (4, 2)

    Args:
        labels: Integers ``[n]``.
        per_class: How many of each class, at least 0.
        seed: Seed of the draw.

    Returns:
        Indices of the rest and of those taken, each in ascending order.

    Raises:
        ValueError: If a class has no more than ``per_class`` examples.
    """
    kinds, counts = np.unique(labels, return_counts=True)
    if per_class and counts.min() <= per_class:
        raise ValueError(
            f"validation_per_class is {per_class}, but class {kinds[counts.argmin()]} has only"
            f" {counts.min()} training images; take at most {counts.min() - 1}."
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    # A stable sort keeps the random order within each class.
    order = order[np.argsort(labels[order], kind="stable")]
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    aside = np.arange(len(labels)) - starts < per_class
    return np.sort(order[~aside]).astype(np.int32), np.sort(order[aside]).astype(np.int32)
