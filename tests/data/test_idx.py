"""Sets in files as MNIST has them, made by hand."""

import gzip
import struct

import numpy as np
import pytest

from sire_jax.data import idx, load
from sire_jax.data.dataset import Selection

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte")
LAST = "t10k-labels-idx1-ubyte"


def _bytes(values):
    """The format: two zeros, 8 for bytes, the number of axes, their lengths, the values."""
    values = np.asarray(values, np.uint8)
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + bytes(
        values.ravel()
    )


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "clothes"
    folder.mkdir()
    pixels = np.arange(6 * 2 * 3).reshape(6, 2, 3)
    contents = (pixels[:4], [0, 2, 1, 2], pixels[4:], [1, 0])
    for name, values in zip((*NAMES, LAST), contents, strict=True):
        (folder / name).write_bytes(_bytes(values))
    return tmp_path


def test_images_and_labels_are_those_of_the_files(directory):
    clothes = load("idx:clothes", str(directory))
    assert clothes.train.image.shape == (4, 2, 3, 1)
    assert clothes.train.image[1, ..., 0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert clothes.test.image[1, ..., 0].tolist() == [[30, 31, 32], [33, 34, 35]]
    assert clothes.train.labels["label"].tolist() == [0, 2, 1, 2]
    assert clothes.test.labels["label"].tolist() == [1, 0]
    assert clothes.classes == {"label": 3}
    assert clothes.names == {"label": ("0", "1", "2")}
    images, labels = idx.read(directory / "clothes")["test"]
    assert (images.shape, labels.tolist()) == ((2, 2, 3, 1), [1, 0])


def test_packed_files_are_the_same(directory):
    plain = load("idx:clothes", str(directory))
    for path in (directory / "clothes").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load("idx:clothes", str(directory))
    for part in ("train", "test"):
        a, b = getattr(plain, part), getattr(packed, part)
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.labels["label"], b.labels["label"])


def test_shares_and_drawn_classes_are_selected(directory):
    selection = Selection(("train[:50%]",), "train[50%:]")
    shared = load("idx:clothes", str(directory), selection=selection)
    assert len(shared.train) == len(shared.test) == 2
    both = np.concatenate([shared.train.image, shared.test.image])
    whole = load("idx:clothes", str(directory)).train.image
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in whole)
    drawn = load("idx:clothes", str(directory), selection=Selection(draw_classes=2, draw_seed=1))
    assert drawn.classes == {"label": 2}
    assert set(drawn.train.labels["label"]) <= {0, 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (LAST, None, r"There is no t10k-labels-idx1-ubyte in .*clothes, as it is or with \.gz"),
        (LAST, _bytes([1]), r"has 2 images of \(2, 3\) for test and 1 labels"),
        (LAST, _bytes([1, 0])[:-1], r"says that it has 2 values, and has 1"),
        (LAST, _bytes([[1, 0]]), r"is no idx file of unsigned bytes with 1 axes"),
        (LAST, b"\0\0", r"is no idx file"),
        (
            LAST,
            b"\0\0\x08\x01\xff\xff\xff\xff",
            r"says that it has 4,294,967,295 values, and has 0",
        ),
        (NAMES[0], _bytes(np.zeros((4, 5, 5))), r"has images of two sizes, \[\(2, 3\), \(5, 5\)\]"),
        (NAMES[0], _bytes(np.zeros((4, 0, 3))), r"there should be as many, and some"),
    ],
)
def test_files_that_are_no_set_are_refused(directory, name, content, message):
    path = directory / "clothes" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load("idx:clothes", str(directory))


def test_damaged_archives_are_refused(directory):
    path = directory / "clothes" / LAST
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    for content in (packed[:-4], b"no archive", packed[:12] + b"\xff\xff\xff" + packed[15:]):
        path.with_name(f"{LAST}.gz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{LAST}\.gz is damaged"):
            load("idx:clothes", str(directory))


def test_a_set_without_a_name_is_no_source(tmp_path):
    with pytest.raises(ValueError, match=r"There is no data source 'idx:'.*'idx:<folder>'"):
        load("idx:", str(tmp_path))
