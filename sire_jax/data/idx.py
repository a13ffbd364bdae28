"""Sets in files of the format of MNIST, idx: Fashion-MNIST, EMNIST, KMNIST; also in gzip."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

# The first part of the names of the files of each split; the second; and how many axes they have.
_SPLITS = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = ("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)


def read(directory: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the images and labels of a set.

    Args:
        directory: With the four files that MNIST has, ``train-images-idx3-ubyte`` and so on, each
            as it is or with ``.gz`` at its end.

    Returns:
        Of ``"train"`` and ``"test"`` the images ``[n, h, w, 1]``, uint8, and labels ``[n]``, int32.

    Raises:
        FileNotFoundError: If one of them is not there.
        ValueError: If one is damaged or holds something else, or has no images or not as many
            labels.
    """
    parts = {}
    for split, prefix in _SPLITS.items():
        image, label = (
            _array(directory, f"{prefix}-{rest}", axes) for rest, axes in (_IMAGES, _LABELS)
        )
        if len(image) != len(label) or not image.size:
            raise ValueError(
                f"{directory} has {len(image):,} images of {image.shape[1:]} for {split} and"
                f" {len(label):,} labels; there should be as many, and some."
            )
        parts[split] = image[..., None], label.astype(np.int32)
    shapes = {image.shape[1:3] for image, _ in parts.values()}
    if len(shapes) > 1:
        raise ValueError(f"{directory} has images of two sizes, {sorted(shapes)}.")
    return parts


def _array(directory: Path, name: str, axes: int) -> np.ndarray:
    path = next((p for p in (directory / name, directory / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"There is no {name} in {directory}, as it is or with .gz; a set of the source 'idx:'"
            " has the four files of MNIST. Name the directory above it: --config.data.dir=DIR."
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    # Two zeros, the type (8: unsigned bytes), the number of axes; then the length of each.
    head = 4 + 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) < head:
        raise ValueError(f"{path} is no idx file of unsigned bytes with {axes} axes.")
    shape = tuple(int(n) for n in np.frombuffer(content[4:head], ">u4"))
    if math.prod(shape) != len(content) - head:
        raise ValueError(
            f"{path} says that it has {math.prod(shape):,} values, and has {len(content) - head:,}."
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
