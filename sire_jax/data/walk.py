"""What is in a folder of images: its directories and files, wherever links lead."""

import os
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from sire_jax.data.images import EXTENSIONS
from sire_jax.text import printable

# What systems and programs leave in directories, beside what starts with a dot.
_LEFT = {
    *("@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "lost+found"),
    *("#recycle", "@recycle", "$recycle.bin", "system volume information", "icon\r"),
}
# The split and the class that each directory belongs to, by its number.
Owners: TypeAlias = dict[tuple[int, int], tuple[str, str]]


def directories(path: Path) -> dict[str, str]:
    """Returns the directories in one, by their names as all systems write them, sorted.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("dog", "cat", ".git", "@eaDir"):
    ...         Path(root, name).mkdir()
    ...     list(directories(Path(root)))
    ['cat', 'dog']

    Args:
        path: The directory.

    Raises:
        ValueError: If two have the same name but for how accents are written.
    """
    names: dict[str, str] = {}
    for entry in sorted(path.iterdir()):
        if _is_left_out(entry.name) or not entry.is_dir():
            continue
        name = composed(entry.name)
        if name in names:
            raise ValueError(
                f"{path} has two directories '{name}', whose accents are written in two ways"
                " (Unicode NFC and NFD); make them one."
            )
        names[name] = entry.name
    # Again, by the composed names: the order of those on the disk may be another one.
    return dict(sorted(names.items()))


def composed(name: str) -> str:
    """Writes accents as most systems do (NFC): some take them apart, and no name is the same."""
    return unicodedata.normalize("NFC", name)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _LEFT


def is_image(name: str) -> bool:
    """Tells whether a file is named like an image, and not like what systems leave.

    >>> is_image("cat.JPG"), is_image("._cat.jpg"), is_image("labels.txt")
    (True, False, False)
    """
    return name.lower().endswith(EXTENSIONS) and not _is_left_out(name)


class Walk:
    """Lists the files of the classes of a split, each directory once, whatever links lead to it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     Path(root, "cat/indoors").mkdir(parents=True)
    ...     Path(root, "cat/again").symlink_to(Path(root, "cat/indoors"))
    ...     Path(root, "cat/indoors/0.jpg").touch()
    ...     [Path(path).name for path in Walk(Path(root), {"cat": "cat"}, {}).files("cat")]
    ['0.jpg']

    Args:
        split: The directory of the split.
        classes: The directories in it by the names of their classes.
        owners: The directories of other splits, to which those of this one are added.

    Raises:
        ValueError: If two classes or splits have the same directory, or one has the split in it.
    """

    def __init__(self, split: Path, classes: Mapping[str, str], owners: Owners):
        self._split, self._owners = split.name, owners
        # Where a link in a loop leads: to other data.
        places = split, split.parent
        above = {*places, *(parent for place in places for parent in place.resolve().parents)}
        self._above = {_number(str(directory)) for directory in above}
        self._roots = {name: str(split / actual) for name, actual in classes.items()}
        # Ahead of what is in them: a link from one to another is refused, whichever is first.
        for name, root in self._roots.items():
            if not self._take(root, name):
                raise ValueError(
                    f"{printable(root)} is a link to {printable(str(Path(root).resolve()))}, which"
                    " has the split itself in it; mend or remove it."
                )

    def _take(self, directory: str, name: str) -> bool:
        """Takes a directory for a class; False if it has been, or is above all classes."""
        number = _number(directory)
        if number in self._above:
            return False
        is_known = number in self._owners
        split, owner = self._owners.setdefault(number, (self._split, name))
        if split != self._split:
            raise ValueError(
                f"{printable(directory)} leads to images of the split '{split}', which would be"
                f" those of '{self._split}' at the same time; an image is in one split. Share one"
                " out instead: 'train[:80%]' and 'train[80%:]'."
            )
        if owner != name:
            raise ValueError(
                f"{printable(directory)} leads to images of the class '{owner}', which would be"
                f" '{name}' at the same time; an image has one class."
            )
        return not is_known

    def files(self, name: str) -> Iterator[str]:
        """Yields the files of a class, in no order: those in real directories ahead of links."""
        real, links = [self._roots[name]], deque[str]()
        while real:
            for entry in sorted(os.scandir(real.pop()), key=lambda entry: entry.name):
                if _is_left_out(entry.name):
                    continue
                if not _is_directory(entry):
                    yield entry.path
                elif entry.is_symlink():
                    links.append(entry.path)
                elif self._take(entry.path, name):
                    real.append(entry.path)
            while links and not real:
                link = links.popleft()
                real += [link] * self._take(link, name)


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # Of a link to itself.
        return False


def _number(path: str) -> tuple[int, int]:
    """Returns what tells a directory from any other, whatever its name."""
    status = os.stat(path)  # noqa: PTH116 (of millions of files)
    return status.st_dev, status.st_ino
