"""Sets that ``tensorflow_datasets`` has prepared, in files of records; TensorFlow isn't needed."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sire_jax import untrusted
from sire_jax.data import copies
from sire_jax.data.dataset import Dataset, Listed, Selection
from sire_jax.data.images import DamagedImageError
from sire_jax.text import listed

# Bytes that are read of the files of a set, in blocks, to tell it from another.
_BLOCK, _BLOCKS = 2**16, 256
_INT32 = np.iinfo(np.int32).min, np.iinfo(np.int32).max
# Records that are read together.
_AT_ONCE = 64


def find(name: str, directory: Path) -> Path:
    """Finds a prepared version of a set; never asks the network.

    Args:
        name: Of the set, in the words of the library: ``name``, ``name/config``,
            ``name:version`` or ``name/config:version``. Without a version the newest is taken, by
            its number, and where there are others a warning says so.
        directory: The ``tensorflow_datasets`` data directory.

    Returns:
        The directory of the version.

    Raises:
        ValueError: If the name is empty, or there are several configurations and it names none.
        FileNotFoundError: If the set is not prepared there.
    """
    title, _, number = name.partition(":")
    if not title:
        raise ValueError("The data source 'tfds:' names no set; write tfds:mnist, for example.")
    root = directory / title
    directories = {path.parent for path in root.glob("**/dataset_info.json")}
    configs = sorted({version.parent for version in directories})
    if len(configs) > 1:
        names = [f"tfds:{title}/{config.relative_to(root)}" for config in configs]
        raise ValueError(
            f"{root} has {len(configs)} configurations of the set; choose one by its name:"
            f" {listed(names)}."
        )
    versions = sorted(directories, key=_version, reverse=True)
    for version in versions:
        if number in ("", version.name):
            _say_newest(title, versions, number)
            return version
    names = [version.name for version in versions]
    there = f" in the version {number}, only {listed(names)}" if versions else ""
    raise FileNotFoundError(
        f"The data set '{title}' is not prepared in {directory}{there}. Prepare it once with\n"
        f"  pip install tensorflow && tfds build {title} --data_dir={directory}"
        " --file_format=array_record\n"
        "or name the directory that has it (--config.data.dir=DIR)."
    )


def _version(path: Path) -> list[int]:
    # As numbers: of texts "10.0.0" would come ahead of "9.0.0".
    return [int(n) for n in path.name.split(".") if n.isdigit()]


def _say_newest(title: str, versions: Sequence[Path], number: str) -> None:
    if number or len(versions) == 1:
        return
    newest, second, *_ = versions
    warnings.warn(
        f"{newest.parent} has {len(versions)} versions; the newest, {newest.name}, is used."
        f" Another is chosen by its name, such as 'tfds:{title}:{second.name}'.",
        stacklevel=3,
    )


def open_builder(version: Path, selection: Selection) -> Any:
    """Opens a prepared set.

    Args:
        version: Its directory.
        selection: What of the set is used.

    Returns:
        The ``tensorflow_datasets`` builder.

    Raises:
        ValueError: If its format needs TensorFlow, it lacks splits, images or labels, or has others
            than can be read, or it names code that is not allowed (``untrusted.check_features``).
    """
    import tensorflow_datasets as tfds

    untrusted.check_features(version)
    builder = tfds.builder_from_directory(version)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{version} is in the format {builder.info.file_format.value}, which needs TensorFlow;"
            " prepare the set with --file_format=array_record."
        )
    selection.check_splits(version, builder.info.splits)
    features = builder.info.features
    for key in ("image", "label"):
        if key not in features:
            raise ValueError(
                f"{version} has no 'image' and 'label', only the features {list(features)}."
            )
    if not isinstance(features["image"], tfds.features.Image):
        raise ValueError(f"The 'image' of {version} is {_described(features['image'])}, no image.")
    if np.dtype(features["image"].np_dtype) != np.uint8:
        raise ValueError(
            f"The images of {version} are {np.dtype(features['image'].np_dtype)}; only uint8 can be"
            " read."
        )
    if not _is_number(features["label"]):
        raise ValueError(
            f"The 'label' of {version} is {_described(features['label'])}; labels should be numbers"
            " of classes: prepare the set with tfds.features.ClassLabel(names=[...]), or with"
            " integers 0, 1, ... in place of texts or of one-hot vectors."
        )
    return builder


def _described(feature: Any) -> str:
    return f"{type(feature).__name__} of the shape {feature.shape} and type {feature.np_dtype}"


def _is_number(feature: Any) -> bool:
    """Tells whether a feature is an integer, such as a label is."""
    shape, dtype = getattr(feature, "shape", None), getattr(feature, "np_dtype", object)
    kind = np.dtype(dtype).kind if isinstance(dtype, type | np.dtype) else "O"
    return shape == () and kind in "iub"


def classes(builder: Any, plain: Mapping[str, int] | None = None) -> dict[str, int | None]:
    """Returns the number of classes of each kind of label.

    Args:
        builder: The set.
        plain: The numbers of classes of labels that are plain integers, of which the set says none;
            they count as labels only if they are here, but for ``"label"``.

    Returns:
        Numbers of classes; None where nothing says it.
    """
    import tensorflow_datasets as tfds

    features, plain = builder.info.features, plain or {}
    numbers: dict[str, int | None] = {}
    for kind in sorted(features):
        if isinstance(features[kind], tfds.features.ClassLabel):
            numbers[kind] = features[kind].num_classes
        elif _is_number(features[kind]) and kind in {"label", *plain}:
            numbers[kind] = plain.get(kind)
    return numbers


def names(builder: Any) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes of each kind of label that has them."""
    import tensorflow_datasets as tfds

    features = sorted(builder.info.features.items())
    return {k: tuple(f.names) for k, f in features if isinstance(f, tfds.features.ClassLabel)}


def open_splits(
    name: str,
    directory: Path,
    cache: str,
    selection: Selection,
    plain: Mapping[str, int] | None = None,
) -> tuple[Dataset[tuple["PreparedSplit", ...]], int]:
    """Opens the splits of a set.

    Args:
        name: Of the set; see ``find``.
        directory: The ``tensorflow_datasets`` data directory.
        cache: A directory for a copy of the labels; "" for none.
        selection: Which splits are used, or which shares of them, which are those of the library.
        plain: See ``classes``; what nothing says is counted, which reads all records once.

    Returns:
        The splits of training and of test, with the classes; and the channels of the images.

    Raises:
        ValueError: If the set can't be read (``open_builder``).
        FileNotFoundError: If it is not prepared.
    """
    version = find(name, directory)
    builder = open_builder(version, selection)
    described = _describe(version, builder)
    numbers = classes(builder, plain)
    infos = builder.info.splits
    spans = selection.spans(
        {share.split: infos[share.split].num_examples for share in selection.shares}
    )
    *train, test = (
        PreparedSplit(version, share.split, tuple(numbers), len(span), cache, span.start, described)
        for share, span in zip(selection.shares, spans, strict=True)
    )
    counted = {
        kind: max(int(split.labels()[kind].max()) + 1 for split in (*train, test))
        if number is None
        else number
        for kind, number in numbers.items()
    }
    channels = builder.info.features["image"].shape[-1] or 3
    return Dataset(tuple(train), (test,), counted, names(builder)), channels


def _describe(version: Path, builder: Any) -> str:
    """Describes a set by what was prepared, wherever it lies.

    By a digest of its metadata and of samples of its files: all of a few megabytes, parts of more.
    """
    info = builder.info
    splits = {
        k: [list(map(int, s.shard_lengths)), int(s.num_bytes)] for k, s in info.splits.items()
    }
    features = version / "features.json"
    # As a structure: the library writes its JSON in several ways.
    content = untrusted.read_json(features) if features.is_file() else None
    files = sorted(version.glob("*.array_record*"))
    samples = [[path.name, _sampled(path, max(1, _BLOCKS // len(files)))] for path in files]
    identity = [sorted(splits.items()), content, samples, sorted(names(builder).items())]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    config = f"/{info.config_name}" if info.config_name else ""
    return f"{info.name}{config} {info.version}, {digest}"


def _sampled(path: Path, blocks: int) -> str:
    """Returns a digest of a file's size and of so many blocks, evenly spread over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in np.linspace(0, max(0, size - _BLOCK), blocks).astype(int):
            file.seek(int(start))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def copy_place(version: Path, cache: str, choices: Sequence[Any], title: str = "") -> Path | None:
    """Names a copy made of a prepared set; see ``copies.place``."""
    files = sorted(path for path in version.iterdir() if path.is_file())
    return copies.place(cache, f"{version.parent.name}-{version.name}{title}", files, choices)


@dataclass(frozen=True, eq=False)
class PreparedSplit:
    """The encoded images of a split or of a share of it, with their labels in the same records.

    Attributes:
        version: The directory of the set.
        split: Name of the split.
        kinds: Kinds of labels.
        number: How many images there are.
        cache: A directory for a copy of the labels; "" for none.
        first: The number of the first record.
        described: What was prepared, wherever it lies.
    """

    version: Path
    split: str
    kinds: tuple[str, ...]
    number: int
    cache: str = ""
    first: int = 0
    described: str = ""

    def __len__(self) -> int:
        return self.number

    def listing(self, numbers: np.ndarray | None = None) -> Iterator[Listed]:
        """Lists what was prepared, as one: records have no names."""
        last = self.first + self.number
        numbers = np.arange(self.number) if numbers is None else numbers
        # Little-endian on every machine, so that each has the same digest.
        digest = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]
        title, _, prepared = self.described.partition(", ")
        detail = f"{len(numbers)} records, {digest}, of the set {prepared}"
        yield Listed(f"{title} {self.split}[{self.first}:{last}]", 0, detail)

    def sampled(self, numbers: np.ndarray | None = None) -> str:
        """Returns "": the list has samples of the files (``_describe``)."""
        return ""

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files itself.
        return {k: value for k, value in vars(self).items() if k not in ("_records", "_labels")}

    def open(self) -> None:
        """Opens the files, unless they are; whatever is wrong with all of them fails here."""
        _ = self._records

    def name(self, index: int) -> str:
        """Names an image in messages."""
        return f"record {self.first + index} of {self.version.parent.name} {self.split}"

    def record(self, index: int) -> tuple[bytes, dict[str, int]]:
        """Reads an encoded image and its labels."""
        return self._parsed(self._records[self.first + index])

    def ahead(self, indices: Sequence[int]) -> list[tuple[bytes, dict[str, int]] | None]:
        """Reads several records in one call, which takes a quarter of the time."""
        try:
            records = self._records.__getitems__([self.first + index for index in indices])
            return [self._parsed(record) for record in records]
        except MemoryError:
            raise
        except Exception:  # Of several libraries; which record it is shows when each is read alone.
            return [None] * len(indices)

    def _parsed(self, record: Mapping[str, Any]) -> tuple[bytes, dict[str, int]]:
        if record["image"] is None:
            raise ValueError("its record is empty")
        return record["image"], {kind: int(record[kind]) for kind in self.kinds}

    def labels(self) -> Mapping[str, np.ndarray]:
        """Reads all labels, int32 ``[n]`` each: once from the records, then from a copy.

        Raises:
            DamagedImageError: If a record can't be read.
        """
        return self._labels

    @cached_property
    def _labels(self) -> Mapping[str, np.ndarray]:
        share = [self.first, self.number, list(self.kinds)]
        place = copy_place(self.version, self.cache, share, f"-labels-{self.split}")
        copied = copies.read(place)
        if copied is not None:
            shapes = {kind: values.shape for kind, values in copied.items()}
            if shapes == dict.fromkeys(self.kinds, (self.number,)):
                return copied
            copies.warn_unusable(f"{place} holds other labels: {shapes}.")
        self.open()
        title = f"Reading the labels of {self.version.parent.name} {self.split}, once"
        rows: list[list[int]] = []
        # None: a bar on a terminal, nothing elsewhere.
        with tqdm(total=self.number, desc=title, unit="image", disable=None) as bar:
            for start in range(0, self.number, _AT_ONCE):
                indices = range(start, min(start + _AT_ONCE, self.number))
                rows += map(self._row, indices, self.ahead(indices))
                bar.update(len(indices))
        table = np.array(rows, np.int64).reshape(-1, len(self.kinds))
        # What is outside of int32 stays outside of all classes.
        columns = table.clip(*_INT32).astype(np.int32).T
        labels = dict(zip(self.kinds, columns, strict=True))
        copies.write(place, labels)
        return labels

    def _row(self, index: int, record: tuple[bytes, dict[str, int]] | None) -> list[int]:
        try:
            _, labels = record or self.record(index)
            return list(labels.values())
        except Exception as error:  # Of several libraries.
            raise DamagedImageError.of(self.name(index), error) from error

    @cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.version)
        # Encoded: all images are decoded in the same way, wherever they come from.
        encoded = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(split=self.split, decoders=encoded)
