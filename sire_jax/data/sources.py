"""Sources of images in memory, by name: ``digits``, ``tfds:``, ``folder:`` and ``idx:<set>``."""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sire_jax.data import copies, idx, images, shares
from sire_jax.data.dataset import EVERYTHING, Dataset, Selection, Source, draw
from sire_jax.data.folders import FolderSplit
from sire_jax.data.images import DamagedImageError
from sire_jax.data.prepared import PreparedSplit, copy_place
from sire_jax.data.records import Records, open_records
from sire_jax.files import expanded
from sire_jax.text import listed, nearest

DIGITS = Path(__file__).with_name("digits.npz")
# Images that a thread decodes at a time: single small ones would cost more to pass on.
_PART = 64


def _of_classes(source: Source, drawn: np.ndarray) -> Source:
    label = source.labels["label"]
    mask = np.isin(label, drawn)
    return Source(
        source.image[mask], {"label": np.searchsorted(drawn, label[mask]).astype(np.int32)}
    )


def load(
    name: str,
    directory: str = "~/tensorflow_datasets",
    cache: str = "",
    selection: Selection = EVERYTHING,
    resize: int = 0,
    channels: int = 0,
    threads: int = 8,
    damaged: str = "raise",
    classes: Mapping[str, int] | None = None,
    ignored: Mapping[str, Collection[int]] | None = None,
) -> Dataset[Source]:
    """Loads a data set by its name.

    >>> digits = load("digits")
    >>> digits.train.image.shape, digits.test.image.shape, digits.classes
    ((1198, 8, 8, 1), (599, 8, 8, 1), {'label': 10})
    >>> shared = load("digits", selection=Selection(("train[:50%]",), "train[50%:]"))
    >>> len(shared.train), len(shared.test)
    (599, 599)

    Args:
        name: ``digits``; ``tfds:<set>`` with the name of a ``tensorflow_datasets`` set (see
            ``prepared.find``); ``folder:<folder>`` with that of an image folder (see
            ``folders.open_splits``); or ``idx:<folder>`` with that of files as MNIST has them (see
            ``idx.read``), whose classes are as many as the largest label says.
        directory: The ``tensorflow_datasets`` data directory, or where folders are.
        cache: A directory for decoded images, which makes the next start fast; "" for none.
        selection: What of the set is used. Of drawn classes, only ``"label"`` is kept of the kinds
            of labels, with the drawn classes numbered 0, 1, … in their order.
        resize: What the shorter side of images is scaled to, of which the central square is taken
            (see ``images.central_square``); 0: images stay as they are.
        channels: Of the images: 3 (colour) or 1 (grey); 0: as a prepared set has them, 3 of a
            folder.
        threads: How many decode.
        damaged: What is done about images that can't be decoded: ``"raise"``, or ``"skip"``, which
            leaves them out.
        classes: Numbers of classes of labels that are plain integers (see ``prepared.classes``).
        ignored: For a kind of label the values that are allowed, although they are no class.

    Returns:
        The data set, checked.

    Raises:
        ValueError: If there is no such source or split or are too few classes, or the data hold
            impossible values or images of several sizes.
        DamagedImageError: If an image can't be decoded, or its label is outside of its classes, and
            such images are not skipped.
        FileNotFoundError: If the set is not in ``directory``.
    """
    kind, _, folder = name.partition(":")
    if name == "digits":
        return draw(_digits(selection), selection, _of_classes)
    if kind == "idx" and folder:
        return draw(_idx(folder, directory, selection), selection, _of_classes)
    if kind in ("tfds", "folder"):
        opened = open_records(name, directory, cache, selection, channels, classes, ignored)
        return _decoded(name, opened, cache, _Decoding(resize, threads, damaged == "skip"))
    names = ["digits", "tfds:<set>", "folder:<folder>", "idx:<folder>"]
    raise ValueError(f"There is no data source '{name}'.{nearest(name, names)}")


def _digits(selection: Selection) -> Dataset[Source]:
    """Loads the digits that come with the package; every third is for the test.

    1,797 of 8 x 8 pixels in 0..16 (E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten
    Digits*, UCI Machine Learning Repository, 1998, CC BY 4.0): the test set, in its order.
    """
    with np.load(DIGITS, allow_pickle=False) as bundled:
        image = np.round(bundled["image"] * (255 / 16)).astype(np.uint8)[..., None]
        label = bundled["label"].astype(np.int32)
    # By class, so that both parts have the same share of each.
    order = np.argsort(label, kind="stable")
    test = np.zeros(len(label), bool)
    test[order[::3]] = True
    splits = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    return _of_splits("digits", image, label, splits, selection)


def _idx(folder: str, directory: str, selection: Selection) -> Dataset[Source]:
    parts = idx.read(expanded(directory) / folder)
    image, label = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    first = len(parts["train"][1])
    splits = {"train": np.arange(first), "test": np.arange(first, len(label))}
    return _of_splits(f"idx:{folder}", image, label, splits, selection)


def _of_splits(
    name: str,
    image: np.ndarray,
    label: np.ndarray,
    splits: Mapping[str, np.ndarray],
    selection: Selection,
) -> Dataset[Source]:
    """Makes a data set of images in memory: what is selected of the images of each split."""
    selection.check_splits(name, splits)
    spans = selection.spans({split: len(part) for split, part in splits.items()})
    *train, test_part = (
        _share(splits[share.split], label, span)
        for share, span in zip(selection.shares, spans, strict=True)
    )
    training, testing = (
        Source(image[part], {"label": label[part]}) for part in (np.concatenate(train), test_part)
    )
    return Dataset(training, testing, classes={"label": int(label.max()) + 1})


def _share(examples: np.ndarray, label: np.ndarray, span: range) -> np.ndarray:
    """Takes a share of examples, which stay in their order; see ``shares.order``."""
    drawn = shares.order([str(i) for i in examples], label[examples])
    return examples[np.sort(drawn[span.start : span.stop])]


# ---- Decoding, once: the copy is kept.


@dataclass(frozen=True)
class _Decoding:
    """How records are decoded.

    Attributes:
        resize: What the shorter side is scaled to; 0: nothing.
        threads: How many decode.
        skips: Whether damaged images are left out.
    """

    resize: int
    threads: int
    skips: bool


def _decoded(
    name: str, opened: Dataset[Records], cache: str, decoding: _Decoding
) -> Dataset[Source]:
    place = _place(name, opened, cache, decoding)
    parts = {"train": opened.train, "test": opened.test}
    decoded = _read(place, parts)
    if decoded is None:
        decoded = {
            part: _decode(f"{name} {part}", records, decoding) for part, records in parts.items()
        }
        _write(place, decoded)
    # A copy may have been made with "skip", where "raise" has to fail.
    damaged = [damage for images in decoded.values() for damage in images.damaged]
    if damaged and not decoding.skips:
        raise DamagedImageError(damaged[0]).advised()
    _check_left(name, opened, decoded["train"])
    train, test = (
        Source(decoded[part].image, decoded[part].labels, records.without(decoded[part].skipped))
        for part, records in parts.items()
    )
    return Dataset(train, test, opened.classes, opened.names, tuple(damaged))


@dataclass(frozen=True)
class _Decoded:
    """What was decoded of records.

    Attributes:
        image: ``[m, h, w, c]``, uint8.
        labels: Of each kind ``[m]``, int32.
        skipped: Indices of the records that are damaged.
        damaged: What is wrong with them.
    """

    image: np.ndarray
    labels: dict[str, np.ndarray]
    skipped: tuple[int, ...] = ()
    damaged: tuple[str, ...] = ()


def _decode(title: str, records: Records, decoding: _Decoding) -> _Decoded:
    examples, damage = [], dict[int, str]()
    for i, example in enumerate(_examples(title, records, decoding)):
        if not isinstance(example, DamagedImageError):
            examples.append(example)
        elif decoding.skips:
            damage[i] = str(example)
        else:
            raise example.advised()
    if not examples:
        raise DamagedImageError(
            f"All {len(records)} images of {title} are damaged: {next(iter(damage.values()), '')}"
        )
    shapes = {image.shape for image, _ in examples}
    if len(shapes) != 1:
        raise ValueError(
            f"{title} has {len(examples)} images of {len(shapes)} sizes, such as"
            f" {sorted(shapes)[:2]}; scale them to one with resize=SIDE"
            " (--config.data.resize=SIDE)."
        )
    kinds = records.classes
    labels = {k: np.array([labels[k] for _, labels in examples], np.int32) for k in kinds}
    image = np.stack([image for image, _ in examples])
    return _Decoded(image, labels, tuple(damage), tuple(damage.values()))


def _examples(title: str, records: Records, decoding: _Decoding) -> Iterator[Any]:
    """Decodes all images in their order: pixels and labels, or the error of a damaged one."""
    numbers, together = range(len(records)), _PART * decoding.threads
    # None: a bar on a terminal, nothing elsewhere.
    with (
        tqdm(total=len(numbers), desc=f"Decoding {title}, once", unit="image", disable=None) as bar,
        ThreadPoolExecutor(decoding.threads) as pool,
    ):
        # In rounds: once an image fails, no more than the rest of its round is decoded in vain.
        for start in numbers[::together]:
            batch = numbers[start : start + together]
            parts = [batch[i : i + _PART] for i in range(0, len(batch), _PART)]
            for arrays in pool.map(partial(_arrays, records, decoding.resize), parts):
                yield from arrays
            bar.update(len(batch))


def _arrays(records: Records, resize: int, numbers: range) -> list[Any]:
    return [_array(example, resize) for example in records.examples(numbers)]


def _array(example: Any, resize: int) -> Any:
    if isinstance(example, DamagedImageError):
        return example
    image, labels = example
    return images.to_array(images.central_square(image, resize) if resize else image), labels


def _check_left(name: str, opened: Dataset[Records], train: _Decoded) -> None:
    """Checks that each class that had training images has some that are not damaged."""
    if not train.skipped:
        return
    lost = np.setdiff1d(opened.train.labels["label"], train.labels["label"])
    names = [opened.names["label"][i] for i in lost if 0 <= i < opened.classes["label"]]
    if names:
        raise ValueError(
            f"All training images of {len(names)} classes of {name} are damaged: {listed(names)};"
            f" the first: {train.damaged[0]}"
        )


def _place(name: str, opened: Dataset[Records], cache: str, decoding: _Decoding) -> Path | None:
    """Names the copy: by what is listed, what that leads to, and how it is decoded."""
    if not cache:
        return None
    parts = (opened.train, opened.test)
    choices = [
        *(list(entry) for part in parts for entry in (*part.listing(), ("", 0, ""))),
        {kind: list(names) for kind, names in opened.names.items()},
        {"resize": decoding.resize, "channels": opened.train.channels, "decoder": images.DECODER},
    ]
    split = opened.train.splits[0]
    if isinstance(split, PreparedSplit):
        return copy_place(split.version, cache, choices)
    files = [
        split.path(i)
        for part in parts
        for split in part.splits
        if isinstance(split, FolderSplit)
        for i in range(len(split))
    ]
    return copies.place(cache, Path(name.partition(":")[2]).name, files, choices)


def _write(place: Path | None, parts: Mapping[str, _Decoded]) -> None:
    arrays = dict[str, np.ndarray]()
    for name, part in parts.items():
        arrays |= {f"{name}/image": part.image, f"{name}/skipped": np.array(part.skipped, np.int64)}
        arrays |= {f"{name}/labels/{kind}": values for kind, values in part.labels.items()}
    copies.write(place, arrays)


def _read(place: Path | None, parts: Mapping[str, Records]) -> dict[str, _Decoded] | None:
    """Reads a decoded copy; None if there is none that can be used."""
    arrays = copies.read(place)
    if arrays is None:
        return None
    try:
        return {part: _copied(part, arrays, records) for part, records in parts.items()}
    except _MendedError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        copies.warn_unusable(f"{place} holds no such decoded data set: {error}.")
        return None


class _MendedError(Exception):
    """An image that was damaged when a copy was made no longer is."""


def _copied(part: str, arrays: Mapping[str, np.ndarray], records: Records) -> _Decoded:
    image = arrays[f"{part}/image"]
    skipped = tuple(int(i) for i in arrays[f"{part}/skipped"])
    labels = {kind: arrays[f"{part}/labels/{kind}"] for kind in records.classes}
    shapes = {image.shape[:1], *(values.shape for values in labels.values())}
    if shapes != {(len(records) - len(skipped),)} or image.ndim != 4 or image.dtype != np.uint8:
        raise ValueError(f"images of the shape {image.shape} and type {image.dtype}")
    for kind, values in labels.items():
        outside = (values < 0) | (values >= records.classes[kind])
        if (outside & ~np.isin(values, list(records.ignored.get(kind, ())))).any():
            raise ValueError(f"a {kind} outside the {records.classes[kind]} classes")
    damaged = []
    for i in skipped:
        # Another try: what could not be read, such as another user's file, leaves no trace.
        (example,) = records.examples([i])
        if not isinstance(example, DamagedImageError):
            raise _MendedError
        damaged.append(str(example))
    return _Decoded(image, labels, skipped, tuple(damaged))
