"""Sets that ``tensorflow_datasets`` has prepared, in files of records; TensorFlow isn't needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sire_jax import untrusted
from sire_jax.data import copies
from sire_jax.data.dataset import Selection
from sire_jax.data.images import DamagedImageError


def find(name: str, directory: Path) -> Path:
    """Finds the newest prepared version of a set; never asks the network.

    Args:
        name: Of the set.
        directory: The ``tensorflow_datasets`` data directory.

    Returns:
        The directory of the version.

    Raises:
        ValueError: If the name is empty.
        FileNotFoundError: If the set is not prepared there.
    """
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


def open_builder(version: Path, selection: Selection) -> Any:
    """Opens a prepared set.

    Args:
        version: Its directory.
        selection: What of the set is used.

    Returns:
        The ``tensorflow_datasets`` builder.

    Raises:
        ValueError: If its format needs TensorFlow, it lacks splits, images or labels, or it names
            code that is not allowed (``untrusted.check_features``).
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
    if "image" not in features or "label" not in classes(builder):
        raise ValueError(f"{version} has no 'image' and 'label'; its features: {list(features)}.")
    return builder


def classes(builder: Any) -> dict[str, int]:
    """Returns the number of classes of each kind of label."""
    import tensorflow_datasets as tfds

    features = sorted(builder.info.features.items())
    return {k: f.num_classes for k, f in features if isinstance(f, tfds.features.ClassLabel)}


def names(builder: Any) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes of each kind of label."""
    return {kind: tuple(builder.info.features[kind].names) for kind in classes(builder)}


def copy_place(version: Path, cache: str, what: Sequence[Any], title: str = "") -> Path | None:
    """Names a copy made of a prepared set; see ``copies.place``."""
    files = [path for path in version.iterdir() if path.is_file()]
    return copies.place(cache, f"{version.parent.name}-{version.name}{title}", files, what)


def open_split(builder: Any, split: str) -> Any:
    """Returns the examples of a split by number, their images still encoded."""
    import tensorflow_datasets as tfds

    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


@dataclass(frozen=True, eq=False)
class PreparedSplit:
    """The encoded images of a split, with their labels in the same records.

    Attributes:
        version: The directory of the set.
        split: Name of the split.
        kinds: Kinds of labels.
        number: How many images there are.
        cache: A directory for a copy of the labels; "" for none.
    """

    version: Path
    split: str
    kinds: tuple[str, ...]
    number: int
    cache: str = ""

    def __len__(self) -> int:
        return self.number

    def identity(self) -> list[np.ndarray]:
        """Returns arrays that are others for another split."""
        sizes = sorted((p.name, p.stat().st_size) for p in self.version.iterdir() if p.is_file())
        return [np.frombuffer(repr((self.version.name, self.split, sizes)).encode(), np.uint8)]

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files itself.
        return {k: value for k, value in vars(self).items() if k not in ("_records", "_labels")}

    def open(self) -> None:
        """Opens the files, unless they are; whatever is wrong with all of them fails here."""
        _ = self._records

    def name(self, index: int) -> str:
        """Names an image in messages."""
        return f"record {index} of {self.version.parent.name} {self.split}"

    def record(self, index: int) -> tuple[bytes, dict[str, int]]:
        """Reads an encoded image and its labels."""
        record = self._records[index]
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
        place = copy_place(self.version, self.cache, (), f"-labels-{self.split}")
        found = copies.read(place)
        if found is None:
            self.open()
            title = f"Reading the labels of {self.version.parent.name} {self.split}, once"
            # None: a bar on a terminal, nothing elsewhere.
            numbers = tqdm(range(self.number), desc=title, unit="image", disable=None)
            columns = np.array([self._row(i) for i in numbers], np.int32).T
            found = dict(zip(self.kinds, columns, strict=True))
            copies.write(place, found)
        return found

    def _row(self, index: int) -> list[int]:
        try:
            return list(self.record(index)[1].values())
        except Exception as error:  # Of several libraries.
            raise DamagedImageError.of(self.name(index), error) from error

    @cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        return open_split(tfds.builder_from_directory(self.version), self.split)
