"""Sources of images in memory, by name: ``digits``, ``tfds:<set>`` and ``folder:<folder>``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sire_jax import untrusted
from sire_jax.data import copies, images, prepared
from sire_jax.data.dataset import EVERYTHING, Dataset, Selection, Source, draw_classes
from sire_jax.data.records import Records, open_records
from sire_jax.names import nearest


def _draw(dataset: Dataset[Source], selection: Selection) -> Dataset[Source]:
    """Drops images of other classes and numbers the drawn ones 0, 1, …; only labels are kept."""
    number = selection.draw_classes
    if not number:
        return dataset
    drawn = draw_classes(dataset.classes["label"], number, selection.draw_seed)
    parts = [_of_classes(source, drawn) for source in (dataset.train, dataset.test)]
    names = tuple(dataset.names["label"][i] for i in drawn)
    return Dataset(parts[0], parts[1], {"label": number}, {"label": names})


def _of_classes(source: Source, drawn: np.ndarray) -> Source:
    label = source.labels["label"]
    kept = np.isin(label, drawn)
    # Not a copy of many images where others have not been decoded.
    image = source.image if kept.all() else source.image[kept]
    return Source(image, {"label": np.searchsorted(drawn, label[kept]).astype(np.int32)})


def check(dataset: Dataset[Source]) -> None:
    """Checks a data set's values.

    Args:
        dataset: The data set.

    Raises:
        ValueError: If an image is not finite, a label is outside its classes, or numbers of images
            and labels differ; the message has the first such example.
    """
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        if source.image.ndim != 4:
            raise ValueError(
                f"{split} images have the shape {source.image.shape}, not [n, h, w, c]."
            )
        if np.issubdtype(source.image.dtype, np.floating):
            finite = np.isfinite(source.image).all(axis=(1, 2, 3))
            if not finite.all():
                raise ValueError(
                    f"{(~finite).sum()} of {len(finite)} {split} images hold NaN or infinity,"
                    f" the first at index {int(np.argmin(finite))}. Remove or mend them."
                )
        for kind, values in source.labels.items():
            _check_labels(f"{split} '{kind}'", values, len(source.image), dataset.classes[kind])


def _check_labels(what: str, labels: np.ndarray, images: int, classes: int) -> None:
    if len(labels) != images:
        raise ValueError(f"{what} has {len(labels)} labels for {images} images.")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(
            f"{what} has {outside.sum()} labels outside the {classes} classes 0..{classes - 1}:"
            f" the first is {labels[first]} at index {first}."
        )


def load(
    name: str,
    directory: str,
    cache: str = "",
    selection: Selection = EVERYTHING,
    resize: int = 0,
    channels: int = 3,
) -> Dataset[Source]:
    """Loads a data set by its name.

    Args:
        name: ``digits``; ``tfds:<set>`` with the name of a ``tensorflow_datasets`` set; or
            ``folder:<folder>`` with the name of an image folder (see ``folders.open_splits``).
        directory: The ``tensorflow_datasets`` data directory, or where image folders are.
        cache: A directory for decoded images, which makes the next start fast; "" for none.
        selection: What of the set is used. Of drawn classes, only ``"label"`` is kept of the kinds
            of labels, with the drawn classes numbered 0, 1, … in their order.
        resize: What the shorter side of images is scaled to, of which the central square is taken
            (see ``images.central_square``); 0: images stay as they are.
        channels: Of the images of a folder: 3 (colour) or 1 (grey).

    Returns:
        The data set, checked.

    Raises:
        ValueError: If there is no such source or split or are too few classes, or the data hold
            impossible values or images of several sizes.
        FileNotFoundError: If the set is not in ``directory``.
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        dataset = _digits(selection)
    elif kind == "tfds":
        root = Path(directory).expanduser()
        dataset = _tfds(rest, root, cache, selection, resize)
    elif kind == "folder":
        # Its classes are drawn ahead of decoding.
        return _folder(name, directory, cache, selection, resize, channels)
    else:
        known = ["digits", "tfds:<set>", "folder:<folder>"]
        raise ValueError(f"There is no data source '{name}'.{nearest(name, known)}")
    check(dataset)
    return _draw(dataset, selection)


def _digits(selection: Selection) -> Dataset[Source]:
    """The 1,797 digits of 8 x 8 that come with scikit-learn; every third is for the test."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    image = np.round(bundled.images * (255 / 16)).astype(np.uint8)[..., None]
    label = bundled.target.astype(np.int32)
    # By class, so that both parts have the same share of each.
    order = np.argsort(label, kind="stable")
    test = np.zeros(len(label), bool)
    test[order[::3]] = True
    chosen = {"train": ~test, "test": test}
    selection.check_splits("digits", chosen)
    parts = {k: Source(image[part], {"label": label[part]}) for k, part in chosen.items()}
    # Of two splits one is for the test.
    (train,) = selection.train_splits
    return Dataset(parts[train], parts[selection.test_split], classes={"label": 10})


def _tfds(
    name: str, directory: Path, cache: str, selection: Selection, resize: int
) -> Dataset[Source]:
    version = prepared.find(name, directory)
    place = prepared.copy_place(version, cache, _choices(selection, resize=resize))
    dataset = _read(place)
    if dataset is None:
        dataset = _decode(version, selection, resize)
        _write(place, dataset)
    return dataset


def _choices(selection: Selection, **others: int) -> list[Any]:
    """Lists what tells a copy from that of a whole set as it is."""
    chosen = [] if selection == EVERYTHING else [asdict(selection)]
    return [*chosen, *({key: value} for key, value in others.items() if value)]


def _decode(version: Path, selection: Selection, resize: int) -> Dataset[Source]:
    builder = prepared.open_builder(version, selection)
    classes = prepared.classes(builder)
    drawn = None
    if selection.draw_classes:
        drawn = draw_classes(classes["label"], selection.draw_classes, selection.draw_seed)
    train, test = (
        _stack(
            f"{builder.name} {splits}",
            [each for split in splits for each in _examples(builder, split, drawn, resize)],
            list(classes),
        )
        for splits in (selection.train_splits, (selection.test_split,))
    )
    return Dataset(train, test, classes, prepared.names(builder))


def _examples(
    builder: Any, split: str, drawn: np.ndarray | None, resize: int
) -> Iterator[Mapping[str, Any]]:
    """Decodes the examples of a split, all or those of the drawn classes."""
    # Decoding takes the time, and all images of a large set don't fit in memory.
    records = prepared.open_split(builder, split)
    decode = builder.info.features["image"].decode_example_np
    for i in _bar(len(records), f"Decoding {builder.name} {split}, once"):
        record = records[i]
        if drawn is None or record["label"] in drawn:
            image = decode(record["image"])
            yield {**record, "image": _resized(image, resize) if resize else image}


def _bar(number: int, title: str) -> Iterator[int]:
    # None: a bar on a terminal, nothing elsewhere.
    return iter(tqdm(range(number), desc=title, unit="image", disable=None))


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return images.to_array(images.central_square(images.from_array(pixels), side))


def _stack(what: str, examples: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Source:
    shapes = {example["image"].shape for example in examples}
    if len(shapes) != 1:
        raise ValueError(
            f"{what} has {len(examples)} images of {len(shapes)} sizes, such as"
            f" {sorted(shapes)[:2]}; scale them to one with --config.data.resize=SIDE."
        )
    labels = {k: np.array([example[k] for example in examples], np.int32) for k in kinds}
    return Source(np.stack([example["image"] for example in examples]), labels)


def _folder(
    name: str, directory: str, cache: str, selection: Selection, resize: int, channels: int
) -> Dataset[Source]:
    found = open_records(name, directory, cache, selection, channels)
    splits = (*found.train.splits, *found.test.splits)
    files = [Path(split.name(i)) for split in splits for i in range(len(split))]
    choices = _choices(selection, resize=resize, channels=channels)
    place = copies.place(cache, Path(name.partition(":")[2]).name, files, choices)
    dataset = _read(place)
    if dataset is None:
        train, test = (_decode_records(name, each, resize) for each in (found.train, found.test))
        dataset = Dataset(train, test, found.classes, found.names)
        _write(place, dataset)
    return dataset


def _decode_records(name: str, records: Records, resize: int) -> Source:
    examples = []
    for i in _bar(len(records), f"Decoding {name}, once"):
        image, labels = records.example(i)
        scaled = images.central_square(image, resize) if resize else image
        examples.append({**labels, "image": images.to_array(scaled)})
    return _stack(name, examples, list(records.classes))


def _write(place: Path | None, dataset: Dataset[Source]) -> None:
    described = {"classes": dataset.classes, "names": dataset.names}
    arrays = {key: np.array(json.dumps(dict(value))) for key, value in described.items()}
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        arrays[f"{split}/image"] = source.image
        arrays |= {f"{split}/labels/{kind}": values for kind, values in source.labels.items()}
    copies.write(place, arrays)


def _read(place: Path | None) -> Dataset[Source] | None:
    """Reads a decoded copy; None if there is none, or one without names, of a former version."""
    arrays = copies.read(place)
    if arrays is None or "names" not in arrays:
        return None
    try:
        classes, names = (
            untrusted.parse_json(str(arrays[key]), key) for key in ("classes", "names")
        )
        train, test = (
            Source(arrays[f"{split}/image"], {k: arrays[f"{split}/labels/{k}"] for k in classes})
            for split in ("train", "test")
        )
        return Dataset(train, test, classes, names)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} holds no decoded data set: {error}. It is a copy: remove it, to have it made"
            " anew."
        ) from error
