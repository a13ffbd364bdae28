"""Sources of labelled images, by name: ``digits`` (bundled) and ``tfds:<set>`` (prepared)."""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sire_jax.names import nearest


@dataclass(frozen=True)
class Source:
    """Images with their labels, in memory.

    Attributes:
        image: ``[n, h, w, c]``, uint8 in [0, 255], or finite floats.
        labels: For each kind of label (``"label"`` and any other) integers ``[n]``.
    """

    image: np.ndarray
    labels: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """The training and test images of a set.

    Attributes:
        train: Training images.
        test: Test images.
        classes: For each kind of label the number of classes.
        names: For each kind of label the names of its classes; of kinds without names "0", "1", ….
    """

    train: Source
    test: Source
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


def _draw(dataset: Dataset, selection: Selection) -> Dataset:
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


def check(dataset: Dataset) -> None:
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


_EVERYTHING = Selection()


def load(name: str, directory: str, cache: str = "", selection: Selection = _EVERYTHING) -> Dataset:
    """Loads a data set by its name.

    Args:
        name: ``digits``, or ``tfds:<set>`` with the name of a ``tensorflow_datasets`` set.
        directory: The ``tensorflow_datasets`` data directory.
        cache: A directory for decoded images, which makes the next start fast; "" for none.
        selection: What of the set is used. Of drawn classes, only ``"label"`` is kept of the kinds
            of labels, with the drawn classes numbered 0, 1, … in their order.

    Returns:
        The data set, checked.

    Raises:
        ValueError: If there is no such source or split or are too few classes, or the data hold
            impossible values.
        FileNotFoundError: If the set is not prepared in ``directory``.
    """
    if name == "digits":
        dataset = _digits(selection)
    elif name.startswith("tfds:"):
        root = Path(directory).expanduser()
        dataset = _tfds(name.removeprefix("tfds:"), root, cache, selection)
    else:
        raise ValueError(
            f"There is no data source '{name}'.{nearest(name, ['digits', 'tfds:<set>'])}"
        )
    check(dataset)
    return _draw(dataset, selection)


def _check_splits(what: object, selection: Selection, known: Collection[str]) -> None:
    for split in (*selection.train_splits, selection.test_split):
        if split not in known:
            raise ValueError(
                f"{what} has no split '{split}', only {list(known)}; choose with"
                " config.data.train_splits and config.data.test_split."
            )


def _digits(selection: Selection) -> Dataset:
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
    _check_splits("digits", selection, chosen)
    parts = {k: Source(image[part], {"label": label[part]}) for k, part in chosen.items()}
    # Of two splits one is for the test.
    (train,) = selection.train_splits
    return Dataset(parts[train], parts[selection.test_split], classes={"label": 10})


def _tfds(name: str, directory: Path, cache: str, selection: Selection) -> Dataset:
    prepared = _prepared(name, directory)
    stored = _cache_file(prepared, cache, selection)
    dataset = None if stored is None or not stored.exists() else _read(stored)
    if dataset is not None:
        return dataset
    dataset = _decode(prepared, selection)
    if stored is not None:
        # Without a copy the next start only takes longer.
        with contextlib.suppress(OSError):
            _write(stored, dataset)
    return dataset


def _prepared(name: str, directory: Path) -> Path:
    """Finds the newest prepared version of a set; never asks the network."""
    if not name:
        raise ValueError("The data source 'tfds:' names no set; write tfds:mnist, for example.")
    root = directory / name
    versions = [path.parent for path in root.glob("**/dataset_info.json")]
    if not versions:
        raise FileNotFoundError(
            f"The data set '{name}' is not prepared in {directory}. Prepare it once with\n"
            f"  pip install tensorflow && tfds build {name} --data_dir={directory}"
            " --file_format=array_record\n"
            "or name the directory that has it with --config.data.dir=DIR."
        )
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()])


def _decode(prepared: Path, selection: Selection) -> Dataset:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{prepared} is in the format {builder.info.file_format.value}, which needs TensorFlow;"
            " prepare the set with --file_format=array_record."
        )
    features = builder.info.features
    _check_splits(prepared, selection, builder.info.splits)
    classes = {
        k: f.num_classes for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)
    }
    if "image" not in features or "label" not in classes:
        raise ValueError(f"{prepared} has no 'image' and 'label'; its features: {list(features)}.")
    drawn = None
    if selection.draw_classes:
        drawn = draw_classes(classes["label"], selection.draw_classes, selection.draw_seed)
    train, test = (
        _decode_splits(builder, splits, list(classes), drawn)
        for splits in (selection.train_splits, (selection.test_split,))
    )
    return Dataset(train, test, classes, {kind: features[kind].names for kind in classes})


def _decode_splits(
    builder: Any, splits: tuple[str, ...], kinds: list[str], drawn: np.ndarray | None
) -> Source:
    examples = [each for split in splits for each in _examples(builder, split, drawn)]
    labels = {k: np.array([example[k] for example in examples], np.int32) for k in kinds}
    shapes = {example["image"].shape for example in examples}
    if len(shapes) != 1:
        raise ValueError(
            f"{builder.name} has {len(examples)} images of {len(shapes)} sizes in {splits}, such as"
            f" {sorted(shapes)[:2]}; prepare a set whose images have one size."
        )
    return Source(np.stack([example["image"] for example in examples]), labels)


def _examples(builder: Any, split: str, drawn: np.ndarray | None) -> Iterator[Mapping[str, Any]]:
    """Decodes the examples of a split, all or those of the drawn classes."""
    import tensorflow_datasets as tfds

    # Decoding takes the time, and all images of a large set don't fit in memory.
    records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    decode = builder.info.features["image"].decode_example_np
    title = f"Decoding {builder.name} {split}, once"
    # None: a bar on a terminal, nothing elsewhere.
    for i in tqdm(range(len(records)), desc=title, unit="image", disable=None):
        record = records[i]
        if drawn is None or record["label"] in drawn:
            yield {**record, "image": decode(record["image"])}


def _cache_file(prepared: Path, cache: str, selection: Selection) -> Path | None:
    """Names the decoded copy by what was decoded: other files or classes, another copy."""
    if not cache:
        return None
    files = sorted(path for path in prepared.iterdir() if path.is_file())
    identity: list[Any] = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime) for path in files
    ]
    if selection != _EVERYTHING:
        identity.append(asdict(selection))
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Path(cache).expanduser() / f"{prepared.parent.name}-{prepared.name}-{digest}.npz"


def _write(path: Path, dataset: Dataset) -> None:
    described = {"classes": dataset.classes, "names": dataset.names}
    arrays = {key: np.array(json.dumps(dict(value))) for key, value in described.items()}
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        arrays[f"{split}/image"] = source.image
        arrays |= {f"{split}/labels/{kind}": values for kind, values in source.labels.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: whoever reads finds all of it or nothing.
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.replace(path)


def _read(path: Path) -> Dataset | None:
    """Reads a decoded copy; None of one without names, which former versions wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        if "names" not in arrays:
            return None
        classes, names = (json.loads(str(arrays[key])) for key in ("classes", "names"))
        train, test = (
            Source(arrays[f"{split}/image"], {k: arrays[f"{split}/labels/{k}"] for k in classes})
            for split in ("train", "test")
        )
    return Dataset(train, test, classes, names)
