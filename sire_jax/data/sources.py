"""Sources of labelled images, by name: ``digits`` (bundled) and ``tfds:<set>`` (prepared)."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    train: Source
    test: Source
    classes: Mapping[str, int]


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


def load(name: str, directory: str, cache: str = "") -> Dataset:
    """Loads a data set by its name.

    Args:
        name: ``digits``, or ``tfds:<set>`` with the name of a ``tensorflow_datasets`` set.
        directory: The ``tensorflow_datasets`` data directory.
        cache: A directory for decoded images, which makes the next start fast; "" for none.

    Returns:
        The data set, checked.

    Raises:
        ValueError: If there is no such source, or the data hold impossible values.
        FileNotFoundError: If the set is not prepared in ``directory``.
    """
    if name == "digits":
        dataset = _digits()
    elif name.startswith("tfds:"):
        dataset = _tfds(name.removeprefix("tfds:"), Path(directory).expanduser(), cache)
    else:
        raise ValueError(
            f"There is no data source '{name}'.{nearest(name, ['digits', 'tfds:<set>'])}"
        )
    check(dataset)
    return dataset


def _digits() -> Dataset:
    """The 1,797 digits of 8 x 8 that come with scikit-learn; every third is for the test."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    image = np.round(bundled.images * (255 / 16)).astype(np.uint8)[..., None]
    label = bundled.target.astype(np.int32)
    # By class, so that both parts have the same share of each.
    order = np.argsort(label, kind="stable")
    test = np.zeros(len(label), bool)
    test[order[::3]] = True
    parts = [Source(image[part], {"label": label[part]}) for part in (~test, test)]
    return Dataset(parts[0], parts[1], classes={"label": 10})


def _tfds(name: str, directory: Path, cache: str) -> Dataset:
    prepared = _prepared(name, directory)
    stored = _cache_file(prepared, cache)
    if stored is not None and stored.exists():
        return _read(stored)
    dataset = _decode(prepared)
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


def _decode(prepared: Path) -> Dataset:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{prepared} is in the format {builder.info.file_format.value}, which needs TensorFlow;"
            " prepare the set with --file_format=array_record."
        )
    features = builder.info.features
    kinds = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    for split in ("train", "test"):
        if split not in builder.info.splits:
            raise ValueError(
                f"{prepared} has no split '{split}', only {list(builder.info.splits)}."
            )
    if "image" not in features or "label" not in kinds:
        raise ValueError(f"{prepared} has no 'image' and 'label'; its features: {list(features)}.")
    train, test = (_decode_split(builder, split, kinds) for split in ("train", "test"))
    return Dataset(train, test, classes={kind: features[kind].num_classes for kind in kinds})


def _decode_split(builder: Any, split: str, kinds: list[str]) -> Source:
    records = builder.as_data_source(split=split)
    title = f"Decoding {builder.name} {split}, once"
    # None: a bar on a terminal, nothing elsewhere.
    indices = tqdm(range(len(records)), desc=title, unit="image", disable=None)
    examples = [records[i] for i in indices]
    labels = {k: np.array([example[k] for example in examples], np.int32) for k in kinds}
    return Source(np.stack([example["image"] for example in examples]), labels)


def _cache_file(prepared: Path, cache: str) -> Path | None:
    """Names the decoded copy by the files that it was decoded from: other files, another copy."""
    if not cache:
        return None
    files = sorted(path for path in prepared.iterdir() if path.is_file())
    identity = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime) for path in files]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Path(cache).expanduser() / f"{prepared.parent.name}-{prepared.name}-{digest}.npz"


def _write(path: Path, dataset: Dataset) -> None:
    arrays = {"classes": np.array(json.dumps(dict(dataset.classes)))}
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        arrays[f"{split}/image"] = source.image
        arrays |= {f"{split}/labels/{kind}": values for kind, values in source.labels.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: whoever reads finds all of it or nothing.
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.replace(path)


def _read(path: Path) -> Dataset:
    with np.load(path, allow_pickle=False) as arrays:
        classes = json.loads(str(arrays["classes"]))
        train, test = (
            Source(arrays[f"{split}/image"], {k: arrays[f"{split}/labels/{k}"] for k in classes})
            for split in ("train", "test")
        )
    return Dataset(train, test, classes=classes)
