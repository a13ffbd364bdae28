"""Image folders: ``<folder>/<split>/<class>/**/*.jpg``, and what Tiny ImageNet has for it."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sire_jax.data import shares
from sire_jax.data.dataset import Dataset, Listed, Selection
from sire_jax.data.images import EXTENSIONS
from sire_jax.data.walk import Owners, Walk, composed, directories, is_image
from sire_jax.files import expanded
from sire_jax.text import listed, printable

_LAYOUT = "an image folder is <folder>/<split>/<class>/*.jpg"
# The whole of a folder that has no splits, for shares of it.
ALL = "all"
# Names of directories that are splits, not classes.
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
# Files whose ends are read, to tell a set from another of the same names and sizes; bytes of an
# end; and files at a time.
_FILES, _END, _THREADS = 512, 2**16, 16


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """The image files of a split, with the classes that their directories say.

    Attributes:
        root: The directory of the split.
        files: Paths below it, bytes ``[n]``: of a million files, an array travels to other
            processes at once.
        label: Classes, int32 ``[n]``.
        size: Of the files in bytes, int64 ``[n]``; -1 of links to nothing.
        number: What tells a file from any other on this machine, whatever its name, int64 ``[n]``.
        classes: Names of the classes.
    """

    root: Path
    files: np.ndarray
    label: np.ndarray
    size: np.ndarray
    number: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def listing(self, numbers: np.ndarray | None = None) -> Iterator[Listed]:
        """Lists the files, all or those of these numbers."""
        chosen = slice(None) if numbers is None else numbers
        # As Python's values all at once: millions, one by one, take seconds.
        columns = (values[chosen].tolist() for values in (self.files, self.size, self.label))
        for file, size, label in zip(*columns, strict=True):
            yield Listed(composed(os.fsdecode(file)), size, self.classes[label])

    def sampled(self, numbers: np.ndarray | None = None) -> str:
        """Returns a digest of both ends of files, evenly chosen of all or those of these numbers.

        Of at most ``_FILES``: the start of a run reads no more than 64 MB of a set. A picture that
        another of its name and size takes the place of goes unnoticed among more files than those,
        or where only the middle of a large file differs.
        """
        numbers = np.arange(len(self)) if numbers is None else numbers
        places = np.unique(np.linspace(0, len(numbers) - 1, _FILES).astype(int))[: len(numbers)]
        # Many at a time, as each may wait for a file system elsewhere.
        with ThreadPoolExecutor(_THREADS) as pool:
            ends = pool.map(_ends, map(self.path, numbers[places]))
            return hashlib.sha256(b"".join(ends)).hexdigest()

    def listed(self, index: int) -> str:
        """Returns the path of a file below the split, the same on all systems."""
        return composed(os.fsdecode(bytes(self.files[index])))

    def open(self) -> None:
        """Does nothing: each image is a file of its own."""

    def path(self, index: int) -> Path:
        """Returns the path of a file."""
        return self.root / os.fsdecode(bytes(self.files[index]))

    def name(self, index: int) -> str:
        """Names an image in messages."""
        return printable(str(self.path(index)))

    def record(self, index: int) -> tuple[bytes, dict[str, int]]:
        """Reads an encoded image and its label.

        Raises:
            ValueError: If the file can't be read.
        """
        path = self.path(index)
        try:
            return path.read_bytes(), {"label": int(self.label[index])}
        except OSError as error:
            if path.is_symlink() and not path.exists():
                target = printable(str(path.readlink()))
                raise ValueError(f"it is a link to {target}, where there is nothing") from None
            raise ValueError(f"it can't be read ({error.strerror})") from error

    def ahead(self, indices: Sequence[int]) -> list[tuple[bytes, dict[str, int]] | None]:
        """Reads none: files are large, and are read when it is their turn."""
        return [None] * len(indices)

    def labels(self) -> dict[str, np.ndarray]:
        """Returns all labels."""
        return {"label": self.label}

    def share(self, span: range) -> "FolderSplit":
        """Returns a share of the files, which stay in their order; see ``shares.order``."""
        if len(span) == len(self):
            return self
        # By names that are the same on all systems, so that each takes the same share.
        names = [self.listed(i) for i in range(len(self))]
        numbers = np.sort(shares.order(names, self.label)[span.start : span.stop])
        per_file = ("files", "label", "size", "number")
        return replace(self, **{name: getattr(self, name)[numbers] for name in per_file})


def open_splits(
    name: str, directory: str | Path, selection: Selection
) -> Dataset[tuple[FolderSplit, ...]]:
    """Lists the files of an image folder.

    Classes are the names of the directories in a split, sorted. Files are taken for images by
    their extension; others are left out, with one warning, and hidden ones and what systems leave
    (``@eaDir``) without. A directory that links lead to counts once, and a warning says how many
    files are trained on several times, or trained on and measured. Tiny ImageNet's own layout is
    understood: ``val/images`` with ``val/val_annotations.txt``. A folder of classes, without
    splits, is the split ``"all"``, for shares of it.

    Args:
        name: Of the folder in ``directory``; an absolute one stands for itself.
        directory: Where image folders are.
        selection: Which splits are used, or which shares of them.

    Returns:
        The splits of training and of test, and the classes.

    Raises:
        ValueError: If the folder doesn't have the splits, one has no classes or others than the
            first, a class has no training images, or two classes or splits have a directory in
            common.
        FileNotFoundError: If there is no such folder, or no such home.
    """
    if not name:
        raise ValueError(
            "The data source 'folder:' names no folder; write folder:my_images, for"
            " my_images in the directory of the data, or folder:/whole/path."
        )
    root = expanded(name, "folder:")
    if not root.is_absolute():
        root = expanded(directory, "the data directory ") / root
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no image folder {root}; {_LAYOUT}. Name the directory that has it"
            " (--config.data.dir=DIR), or the folder by its whole path."
        )
    places = _places(root)
    selection.check_splits(root, places, "" if ALL not in places else _ADVICE)
    ignored: list[Path] = []
    owners: Owners = {}
    splits = dict.fromkeys(share.split for share in selection.shares)
    classes = tuple(directories(places[selection.shares[0].split]))
    whole = {split: _split(places[split], classes, ignored, owners) for split in splits}
    spans = selection.spans({split: len(files) for split, files in whole.items()})
    *train, test = (
        whole[share.split].share(span) for share, span in zip(selection.shares, spans, strict=True)
    )
    if ignored:
        warnings.warn(
            f"{root} has {len(ignored)} files that are left out, as they are not named like images"
            f" ({', '.join(EXTENSIONS)}); the first is {printable(str(ignored[0]))}.",
            stacklevel=2,
        )
    _check_counts(train, classes)
    _warn_of_same_files(root, train, test)
    _warn_of_few_images(root, train, test, classes)
    return Dataset(tuple(train), (test,), {"label": len(classes)}, {"label": classes})


_ADVICE = (
    f" Where directories are classes, the whole folder is the split '{ALL}', to be shared:"
    f" train_splits=('{ALL}[:80%]',), test_split='{ALL}[80%:]'"
    f" (--config.data.train_splits=\"('{ALL}[:80%]',)\" --config.data.test_split='{ALL}[80%:]')."
)


def _places(root: Path) -> dict[str, Path]:
    """Returns the directories of splits; a folder without any is the split ``"all"`` itself."""
    places = {name: root / actual for name, actual in directories(root).items()}
    if ALL in places or {name.casefold() for name in places} & _SPLITS:
        return places
    return {**places, ALL: root}


def _split(path: Path, classes: Sequence[str], ignored: list[Path], owners: Owners) -> FolderSplit:
    """Lists a split; files left out are added to ``ignored``, its directories to ``owners``."""
    annotations = path / f"{path.name}_annotations.txt"
    if annotations.is_file():
        files, label = _annotated(annotations, classes, owners)
    else:
        files, label = _by_directory(path, classes, ignored, owners)
    if not files:
        raise ValueError(
            f"{path} has no images; files count as images if they are named"
            f" {', '.join(EXTENSIONS)}."
        )
    size, number = np.array([_size_and_number(f"{path}/{file}") for file in files], np.int64).T
    encoded = np.array([os.fsencode(file) for file in files])
    return FolderSplit(path, encoded, label, size, number, tuple(classes))


def _ends(path: Path) -> bytes:
    """Returns a digest of the first and the last bytes of a file; of none if it can't be read."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), path.open("rb") as file:
        digest.update(file.read(_END))
        file.seek(max(file.tell(), path.stat().st_size - _END))
        digest.update(file.read(_END))
    return digest.digest()


def _size_and_number(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116 (of millions of files)
    except OSError:
        return -1, 0
    # In 64 bits, which are others by chance once in 10^6 sets of a million files.
    return status.st_size, hash((status.st_dev, status.st_ino))


def _by_directory(
    path: Path, classes: Sequence[str], ignored: list[Path], owners: Owners
) -> tuple[list[str], np.ndarray]:
    _check_links(path)
    names = directories(path)
    if not names:
        direct = sum(is_image(entry.name) for entry in path.iterdir())
        raise ValueError(
            f"{path} has no directories of classes, and {direct} images outside of any; {_LAYOUT}."
        )
    more, missing = sorted({*names} - {*classes}), sorted({*classes} - {*names})
    if more:
        lacks = f"; {len(missing)} missing: {listed(missing)}" if missing else ""
        raise ValueError(
            f"{path} has other classes than the first split of training ({len(more)} more:"
            f" {listed(more)}{lacks}); no other split should have more classes."
        )
    # None: a bar on a terminal, nothing elsewhere.
    bar = tqdm(names.items(), desc=f"Listing {path}", unit="class", disable=None)
    walk = Walk(path, names, owners)
    listings = {name: _images(path / actual, walk.files(name), ignored) for name, actual in bar}
    start = _length_of_prefix(path)
    files = [file[start:] for listing in listings.values() for file in listing]
    numbers = {name: i for i, name in enumerate(classes)}
    label = [numbers[name] for name, listing in listings.items() for _ in listing]
    return files, np.array(label, np.int32)


def _length_of_prefix(directory: Path) -> int:
    """Returns how much of the paths in a directory is its own, which may be "." or "/"."""
    return len(str(directory / "x")) - 1


def _check_links(path: Path) -> None:
    """Checks that no class is a link to nothing: it would be missing without a word."""
    for link in path.iterdir():
        if link.is_symlink() and not link.exists() and not is_image(link.name):
            raise ValueError(
                f"{link} is a link to {link.readlink()}, where there is nothing; mend or remove it."
            )


def _images(root: Path, files: Iterator[str], ignored: list[Path]) -> list[str]:
    """Sorts the files below a directory and returns the images; others are ``ignored``."""
    ordered = sorted(files, key=composed)
    # Tiny ImageNet's boxes around objects are part of its layout.
    boxes = str(root / f"{root.name}_boxes.txt")
    images = [file for file in ordered if is_image(file.rpartition("/")[2])]
    ignored += [Path(file) for file in sorted({*ordered} - {*images, boxes})]
    return images


def _annotated(
    annotations: Path, classes: Sequence[str], owners: Owners
) -> tuple[list[str], np.ndarray]:
    """Reads lines of a file name, a tab and its class; the files are in ``images``."""
    numbers = {name: i for i, name in enumerate(classes)}
    label: dict[str, int] = {}
    for i, line in enumerate(annotations.read_text().splitlines(), 1):
        # Behind the class are the corners of a box around the object.
        file, _, entry = line.partition("\t")
        name = composed(entry.partition("\t")[0])
        if name not in numbers:
            raise ValueError(
                f"{annotations}, line {i}, is {line!r}; it should be the name of an image, a tab"
                f" and one of the {len(classes)} classes of training."
            )
        label[f"images/{file}"] = numbers[name]
    root = annotations.parent
    files = Walk(root, {"images": "images"}, owners).files("images")
    start = _length_of_prefix(root)
    present = {file[start:] for file in _images(root / "images", files, [])}
    for fault, names in (
        ("names {} images that are not there", label.keys() - present),
        ("has no line for {} images", present - label.keys()),
    ):
        if names:
            raise ValueError(
                f"{annotations} {fault.format(len(names))}: {listed(sorted(names))}; mend the file"
                " or the folder."
            )
    ordered = sorted(label)
    return ordered, np.array([label[file] for file in ordered], np.int32)


def _counts(splits: Sequence[FolderSplit], classes: Sequence[str]) -> np.ndarray:
    return np.bincount(np.concatenate([split.label for split in splits]), minlength=len(classes))


def _check_counts(train: Sequence[FolderSplit], classes: Sequence[str]) -> None:
    path, counts = train[0].root, _counts(train, classes)
    if len(classes) < 2:
        raise ValueError(
            f"{path} has {counts.sum()} image(s) of one class, '{classes[0]}'; there is something"
            " to learn with at least two classes."
        )
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(
            f"{path} has {len(empty)} of {len(classes)} classes without training images:"
            f" {listed(empty)}; add images, or remove these directories from all splits."
        )


def _warn_of_same_files(root: Path, train: Sequence[FolderSplit], test: FolderSplit) -> None:
    """Warns of links to files, which a class may be made of, where several lead to the same one."""
    number = np.concatenate([split.number for split in train])
    there = np.concatenate([split.size >= 0 for split in train])
    _, first = np.unique(number, return_index=True)
    again = np.setdiff1d(np.flatnonzero(there), first)
    measured = np.flatnonzero(np.isin(test.number, number[there]) & (test.size >= 0))
    for same, splits, kind, consequence in (
        (again, train, "training images", "what is held out for validation may be trained on"),
        (measured, [test], "test images", "they measure what was learnt by heart"),
    ):
        if len(same):
            warnings.warn(
                f"{root} has {len(same):,} of {sum(map(len, splits)):,} {kind} that are the same"
                f" files as training images, so that {consequence}; the first is"
                f" {_name(splits, int(same[0]))}.",
                stacklevel=3,
            )


def _name(splits: Sequence[FolderSplit], index: int) -> str:
    """Names an image of splits that are counted through."""
    for split in splits:
        if index < len(split):
            break
        index -= len(split)
    return split.name(index)


def _warn_of_few_images(
    root: Path, train: Sequence[FolderSplit], test: FolderSplit, classes: Sequence[str]
) -> None:
    for counts, few, lack, consequence in (
        (_counts(train, classes), 1, "a single training image", "can be held out for validation"),
        (_counts([test], classes), 0, "no test image", "is measured"),
    ):
        names = [name for name, count in zip(classes, counts, strict=True) if count == few]
        if names:
            warnings.warn(
                f"{root} has {len(names)} of {len(classes)} classes with {lack}: {listed(names)};"
                f" none of them {consequence}.",
                stacklevel=3,
            )
