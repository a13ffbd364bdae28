"""Image folders: ``<folder>/<split>/<class>/**/*.jpg``, and what Tiny ImageNet has for it."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sire_jax.data.dataset import Dataset, Selection
from sire_jax.data.images import EXTENSIONS
from sire_jax.names import listed

_LAYOUT = "an image folder is <folder>/<split>/<class>/*.jpg"


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """The image files of a split, with the classes that their directories say.

    Attributes:
        root: The directory of the split.
        files: Paths below it, bytes ``[n]``: of a million files, an array travels to other
            processes at once.
        label: Classes, int32 ``[n]``.
    """

    root: Path
    files: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> list[np.ndarray]:
        """Returns arrays that are others for another split."""
        return [self.files, self.label]

    def open(self) -> None:
        """Does nothing: each image is a file of its own."""

    def path(self, index: int) -> Path:
        """Returns the path of a file."""
        return self.root / os.fsdecode(bytes(self.files[index]))

    def name(self, index: int) -> str:
        """Names an image in messages."""
        return str(self.path(index))

    def record(self, index: int) -> tuple[bytes, dict[str, int]]:
        """Reads an encoded image and its label."""
        return self.path(index).read_bytes(), {"label": int(self.label[index])}

    def labels(self) -> dict[str, np.ndarray]:
        """Returns all labels."""
        return {"label": self.label}


def open_splits(
    name: str, directory: Path, selection: Selection
) -> Dataset[tuple[FolderSplit, ...]]:
    """Lists the files of an image folder.

    Classes are the names of the directories in a split, sorted. Files are taken for images by
    their extension; others are left out, with one warning, and hidden ones without. Tiny ImageNet's
    own layout is understood: ``val/images`` with ``val/val_annotations.txt``.

    Args:
        name: Of the folder in ``directory``; an absolute one stands for itself.
        directory: Where image folders are.
        selection: Which splits are used.

    Returns:
        The splits of training and of test, and the classes.

    Raises:
        ValueError: If the folder doesn't have the splits, or one has no classes, an empty one,
            or others than the first.
        FileNotFoundError: If there is no such folder.
    """
    if not name:
        raise ValueError(
            "The data source 'folder:' names no folder; write folder:my_images, for"
            " my_images in config.data.dir, or folder:/whole/path."
        )
    root = directory / Path(name).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no image folder {root}; {_LAYOUT}. Name the directory that has it with"
            " --config.data.dir=DIR, or the folder by its whole path."
        )
    selection.check_splits(root, _directories(root))
    classes = _directories(root / selection.train_splits[0])
    ignored: list[Path] = []
    train, test = (
        tuple(_split(root / split, classes, ignored) for split in splits)
        for splits in (selection.train_splits, (selection.test_split,))
    )
    if ignored:
        warnings.warn(
            f"{root} has {len(ignored)} files that are left out, as they are not named like images"
            f" ({', '.join(EXTENSIONS)}); the first is {ignored[0]}.",
            stacklevel=2,
        )
    _warn_of_single_images(root, train, classes)
    return Dataset(train, test, {"label": len(classes)}, {"label": tuple(classes)})


def _directories(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir() if each.is_dir() and not _hidden(each.name))


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _split(path: Path, classes: Sequence[str], ignored: list[Path]) -> FolderSplit:
    """Lists a split; files left out are added to ``ignored``."""
    annotations = path / f"{path.name}_annotations.txt"
    if annotations.is_file():
        files, label = _annotated(annotations, classes)
    else:
        files, label = _by_directory(path, classes, ignored)
    _check_counts(path, classes, np.bincount(label, minlength=len(classes)))
    return FolderSplit(path, np.array([os.fsencode(each) for each in files]), label)


def _by_directory(
    path: Path, classes: Sequence[str], ignored: list[Path]
) -> tuple[list[str], np.ndarray]:
    found = _directories(path)
    if not found:
        direct = sum(_is_image(each.name) for each in path.iterdir())
        raise ValueError(
            f"{path} has no directories of classes, and {direct} images outside of any; {_LAYOUT}."
        )
    if found != list(classes):
        other, missing = (sorted({*a} - {*b}) for a, b in ((found, classes), (classes, found)))
        differences = [
            f"{len(names)} {what}: {listed(names)}"
            for what, names in (("more", other), ("missing", missing))
            if names
        ]
        raise ValueError(
            f"{path} has other classes than the first split of training ({'; '.join(differences)});"
            " all splits should have the same directories."
        )
    # None: a bar on a terminal, nothing elsewhere.
    bar = tqdm(found, desc=f"Listing {path}", unit="class", disable=None)
    listings = [_images(path / name, ignored) for name in bar]
    files = [os.path.relpath(each, path) for listing in listings for each in listing]
    counts = [len(listing) for listing in listings]
    return files, np.repeat(np.arange(len(found), dtype=np.int32), counts)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not _hidden(name)


def _images(root: Path, ignored: list[Path]) -> list[str]:
    """Lists the images below a directory, sorted."""
    files = sorted(_walk(root))
    # Tiny ImageNet's boxes around objects are part of its layout.
    boxes = str(root / f"{root.name}_boxes.txt")
    ignored += [Path(each) for each in files if not _is_image(each) and each != boxes]
    return [each for each in files if _is_image(each)]


def _walk(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    for directory, below, files in os.walk(root, onerror=fail, followlinks=True):
        below[:] = [name for name in below if not _hidden(name)]
        yield from (os.path.join(directory, name) for name in files if not _hidden(name))  # noqa: PTH118


def _annotated(annotations: Path, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Reads lines of a file name, a tab and its class; the files are in ``images``."""
    numbers = {name: i for i, name in enumerate(classes)}
    label: dict[str, int] = {}
    for i, line in enumerate(annotations.read_text().splitlines(), 1):
        file, _, rest = line.partition("\t")
        kind = rest.partition("\t")[0]
        if kind not in numbers:
            raise ValueError(
                f"{annotations}, line {i}, is {line!r}; it should be the name of an image, a tab"
                f" and one of the {len(classes)} classes of training."
            )
        label[f"images/{file}"] = numbers[kind]
    root = annotations.parent
    present = {os.path.relpath(each, root) for each in _images(root / "images", [])}
    for what, names in (
        ("names {} images that are not there", label.keys() - present),
        ("has no line for {} images", present - label.keys()),
    ):
        if names:
            raise ValueError(
                f"{annotations} {what.format(len(names))}: {listed(sorted(names))}; mend the file"
                " or the folder."
            )
    files = sorted(label)
    return files, np.array([label[each] for each in files], np.int32)


def _check_counts(path: Path, classes: Sequence[str], counts: np.ndarray) -> None:
    if not counts.sum():
        raise ValueError(
            f"{path} has no images; files count as images if they are named"
            f" {', '.join(EXTENSIONS)}."
        )
    if len(classes) < 2:
        raise ValueError(
            f"{path} has {counts.sum()} image(s) of one class, '{classes[0]}'; there is something"
            " to learn with at least two classes."
        )
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(
            f"{path} has {len(empty)} of {len(classes)} classes without images: {listed(empty)};"
            " add images, or remove these directories from all splits."
        )


def _warn_of_single_images(
    root: Path, train: Sequence[FolderSplit], classes: Sequence[str]
) -> None:
    counts = np.bincount(np.concatenate([each.label for each in train]), minlength=len(classes))
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    if single:
        warnings.warn(
            f"{root} has {len(single)} classes with a single training image: {listed(single)};"
            " none of them can be held out for validation.",
            stacklevel=3,
        )
