"""What the data of a run are, kept with it: names of classes, and a fingerprint of the images.

``data.json`` in the workdir, for people, too; ``data_files.gz`` has a line for each image, so that
a difference can be named. Where the data lie, and when they were written, is no part of it.

Of images in memory it is what they are, of a prepared set samples of its files, and of a folder
names, classes and sizes of its files, and samples of what is in them (``FolderSplit.sampled``).
"""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sire_jax import files, untrusted
from sire_jax.data.dataset import Dataset, Listed
from sire_jax.text import listed

FILE, FILES = "data.json", "data_files.gz"
# Of the list of images, unpacked: that of several million.
_MOST_BYTES = 2**28
# Names in a message.
_SHOWN = 3
_quoted = json.JSONEncoder().encode


@dataclass(frozen=True)
class Part:
    """The training or the test images.

    Attributes:
        images: How many.
        digest: Of their list.
        listing: Lists them (``dataset.Listed``).
        sampled: Digest of samples of what the list can't tell; "" if it tells everything.
    """

    images: int
    digest: str
    listing: Callable[[], Iterator[Listed]]
    sampled: str = ""

    def is_same(self, other: "Part") -> bool:
        """Tells whether these are the same images, as far as lists and samples tell."""
        return (self.digest, self.sampled) == (other.digest, other.sampled)


@dataclass(frozen=True)
class Contents:
    """What the data of a run are, wherever they lie.

    Attributes:
        names: For each kind of label the names of its classes.
        parts: The ``"train"`` and the ``"test"`` images.
    """

    names: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, Part]

    def brief(self) -> str:
        """Describes them in a line: another one for other data."""
        counts = " + ".join(f"{part.images:,}" for part in self.parts.values())
        classes = {kind: len(names) for kind, names in self.names.items()}
        digest = hashlib.sha256(json.dumps(dict(self.names), sort_keys=True).encode())
        for part in self.parts.values():
            digest.update((part.digest + part.sampled).encode())
        return f"{counts} images of {classes}, checksum {digest.hexdigest()[:16]}"


def of(dataset: Dataset[Any]) -> Contents:
    """Returns what a data set is; for it samples of its files are read.

    >>> from sire_jax.data import load
    >>> of(load("digits")).brief()
    "1,198 + 599 images of {'label': 10}, checksum eab7703ab2c2f4ab"
    """
    parts = {"train": dataset.train, "test": dataset.test}
    return Contents(dataset.names, {name: _part(source) for name, source in parts.items()})


def _part(source: Any) -> Part:
    # Of images that were decoded the records, so that the images themselves are not kept.
    origin = getattr(source, "origin", source)
    if origin is None:
        entries = list(source.listing())
        return _listed_part(len(source), lambda: iter(entries))
    return _listed_part(len(source), origin.listing, origin.sampled())


def _listed_part(images: int, listing: Callable[[], Iterator[Listed]], sampled: str = "") -> Part:
    digest = hashlib.sha256()
    for entry in listing():
        digest.update(_line(entry))
    return Part(images, digest.hexdigest(), listing, sampled)


def _line(entry: Listed, before: str = "") -> bytes:
    """Returns an entry as ``json.dumps`` writes it, which takes several times as long."""
    name, size, detail = entry
    return f"[{before}{_quoted(name)}, {size}, {_quoted(detail)}]\n".encode()


def keep(directory: Path, contents: Contents, replace: Callable[[Path, bytes], None]) -> None:
    """Writes what the data of a run are into its directory, unless it is there.

    Args:
        directory: The workdir.
        contents: What the data are.
        replace: Writes a file at once.
    """
    described = {
        "classes": {kind: list(names) for kind, names in contents.names.items()},
        **{
            name: {"images": part.images, "digest": part.digest, "sampled": part.sampled}
            for name, part in contents.parts.items()
        },
    }
    stored, content = directory / FILE, (json.dumps(described, indent=2) + "\n").encode()
    if (directory / FILES).exists() and stored.exists() and stored.read_bytes() == content:
        return
    lines = (
        _line(entry, f"{_quoted(name)}, ")
        for name, part in contents.parts.items()
        for entry in part.listing()
    )
    # The list first: once the file for people is there, so is what tells a difference. Without a
    # time: the same data, the same file.
    replace(directory / FILES, gzip.compress(b"".join(lines), 6, mtime=0))
    replace(stored, content)


def read(directory: str | Path) -> Contents | None:
    """Reads what the data of a run were; None if the file was removed, or the run has not begun.

    Raises:
        ValueError: If the file holds something else.
    """
    stored = files.expanded(directory) / FILE
    if not stored.exists():
        return None
    described = untrusted.read_json(stored)
    try:
        names = {kind: tuple(map(str, names)) for kind, names in described["classes"].items()}
        parts = {
            name: Part(
                int(described[name]["images"]),
                str(described[name]["digest"]),
                partial(_kept_listing, stored.with_name(FILES), name),
                str(described[name]["sampled"]),
            )
            for name in ("train", "test")
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{stored} doesn't say what the data of a run are ({error!r}); remove it, to take the"
            " data as they are."
        ) from None
    return Contents(names, parts)


def _kept_listing(path: Path, part: str) -> Iterator[Listed]:
    with gzip.open(path) as file:
        # A stranger's workdir may unpack to more than the memory.
        text = file.read(_MOST_BYTES)
    for line in text.splitlines():
        name, *entry = json.loads(line)
        if name == part:
            yield Listed(str(entry[0]), int(entry[1]), str(entry[2]))


def differences(old: Contents, new: Contents) -> list[str]:
    """Lists what data have that others have not, a line each; none if they are the same.

    >>> from sire_jax.data import load
    >>> digits = load("digits")
    >>> fewer = Dataset(digits.test, digits.test, digits.classes)
    >>> differences(of(digits), of(digits)), differences(of(digits), of(fewer))
    ([], ["train: 1,198 -> 599 images; 2 changed: 'images', 'label'"])

    Args:
        old: What the data were.
        new: What they are.
    """
    renamed = of_names(old, new)
    if renamed:
        return renamed  # Files of classes of other names differ, too.
    return [
        f"{name}: {_of_images(old.parts[name], new.parts[name])}"
        for name in old.parts
        if not old.parts[name].is_same(new.parts[name])
    ]


def of_names(old: Contents, new: Contents) -> list[str]:
    """Lists how the names of classes differ, a line for each kind of label."""
    kinds = sorted(old.names.keys() | new.names.keys())
    pairs = {kind: (old.names.get(kind, ()), new.names.get(kind, ())) for kind in kinds}
    return [f"{kind}: {_of_classes(a, b)}" for kind, (a, b) in pairs.items() if a != b]


def _of_classes(old: Sequence[str], new: Sequence[str]) -> str:
    changes = [
        f"{len(names)} {change}: {listed(names)}"
        for change, names in (
            ("missing", [name for name in old if name not in set(new)]),
            ("new", [name for name in new if name not in set(old)]),
        )
        if names
    ]
    if changes:
        return f"of {len(old)} classes {', '.join(changes)}"
    place = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    return f"the classes in another order: the class {place} was '{old[place]}', now '{new[place]}'"


def _of_images(old: Part, new: Part) -> str:
    counts = f"{old.images:,} -> {new.images:,} images"
    if old.digest == new.digest:
        return f"{counts} of the same names and sizes, but other content"
    try:
        before, after = Counter(old.listing()), Counter(new.listing())
    except Exception:  # The list was lost or damaged in one of many ways.
        before, after = Counter[Listed](), Counter[Listed]()
    if not before:
        return f"{counts}, not the same"
    gone, more = ({entry.name for entry in entries} for entries in (before - after, after - before))
    changes = [
        f"{len(names)} {change}: {listed(sorted(names), _SHOWN)}"
        for change, names in (
            ("added", more - gone),
            ("removed", gone - more),
            ("changed", gone & more),
        )
        if names
    ]
    return f"{counts}; {'; '.join(changes) or 'the same in another order'}"
