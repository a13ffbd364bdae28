"""Streamed batches: the same whatever makes them, and those of the feed from memory."""

import multiprocessing
import threading
import time
from pathlib import Path

import chex
import numpy as np
import pytest
import real
from pictured import encoded, picture, prepare_set, write, write_folder

from sire_jax.data import images, sources
from sire_jax.data.records import open_records
from sire_jax.data.stream import Transform, batches

AS_IT_IS = Transform(shape=(4, 6, 3))
RANDOM = Transform(shape=(4, 6, 3), crop=3, random=True)
SEED = (3, 14)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An image folder ``pets`` of 15 and 6 images, and a prepared set ``small`` of 5 and 1."""
    root = tmp_path_factory.mktemp("sets")
    write_folder(root / "pets", {"train": 5, "test": 2})
    content = [(encoded(picture(i)), i % 3) for i in range(5)]
    prepare_set(root, {"train": content, "test": content[:1]})
    return str(root)


@pytest.fixture(scope="module")
def records(directory):
    return open_records("folder:pets", directory).train


def _order(steps=5, size=4, number=15, seed=0):
    return np.random.default_rng(seed).integers(0, number, (steps, size), np.int32)


def _stack(stream):
    """The arrays of all batches, ``[steps, b, …]`` each."""
    made = list(stream)
    return {key: np.stack([each.arrays[key] for each in made]) for key in made[0].arrays}


def _assert_equal(a, b):
    chex.assert_trees_all_equal_dtypes(a, b)
    chex.assert_trees_all_equal(a, b)


@pytest.mark.parametrize("name", ["folder:pets", "tfds:small"])
def test_a_stream_has_the_batches_of_the_images_in_memory(directory, name):
    loaded = sources.load(name, directory).train
    order = _order(number=len(loaded))
    found = _stack(batches(open_records(name, directory).train, order, AS_IT_IS, SEED))
    assert found["image"].dtype == np.uint8
    assert np.array_equal(found["image"], loaded.image[order])
    for kind, labels in loaded.labels.items():
        assert found[kind].dtype == np.int32
        assert np.array_equal(found[kind], labels[order])
    assert found.keys() == {"image", "intact", *loaded.labels}
    assert found["intact"].dtype == bool
    assert found["intact"].all()


@pytest.mark.parametrize("transform", [AS_IT_IS, RANDOM])
def test_batches_do_not_depend_on_threads_shares_or_the_first_step(records, transform):
    order = _order()
    whole = _stack(batches(records, order, transform, SEED))
    _assert_equal(_stack(batches(records, order, transform, SEED, threads=1)), whole)
    later = _stack(batches(records, order, transform, SEED, first=3))
    _assert_equal(later, {key: values[3:] for key, values in whole.items()})
    for shares in ((slice(0, 2), slice(2, 4)), (slice(0, 1), slice(1, 4))):
        parts = [_stack(batches(records, order, transform, SEED, share=each)) for each in shares]
        joined = {key: np.concatenate([part[key] for part in parts], 1) for key in whole}
        _assert_equal(joined, whole)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("folder:pets", {"first": 2, "share": slice(1, 3)}), ("tfds:small", {"first": 4})],
)
def test_worker_processes_make_the_same_batches(directory, name, settings):
    records = open_records(name, directory).train
    order = _order(number=len(records))
    # Read here first: files that are open don't travel.
    here = _stack(batches(records, order, RANDOM, SEED, **settings))
    made = list(batches(records, order, RANDOM, SEED, workers=2, threads=2, **settings))
    _assert_equal(_stack(made), here)
    assert all(type(each) is np.ndarray for each in made[0].arrays.values())
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_after_the_last_step_there_are_no_batches(records, workers):
    assert list(batches(records, _order(1), RANDOM, SEED, first=1, workers=workers)) == []


def test_random_squares_follow_from_the_seed_and_the_place(records):
    order = np.full((2, 3), 7, np.int32)
    found = _stack(batches(records, order, RANDOM, SEED))["image"]
    assert found.shape == (2, 3, 3, 3, 3)
    image = records.example(7)[0]
    for step in range(2):
        for column in range(3):
            generator = np.random.default_rng((*SEED, step, column))
            expected = images.random_square(image, 3, generator)
            assert np.array_equal(found[step, column], np.asarray(expected))
    other = _stack(batches(records, order, RANDOM, (3, 15)))["image"]
    assert len({each.tobytes() for each in [*found.reshape(6, -1), *other.reshape(6, -1)]}) > 8


def test_scaled_images_are_central_squares(records):
    found = _stack(batches(records, _order(), Transform((2, 2, 3), resize=2), SEED))["image"]
    for step, examples in enumerate(_order()):
        for column, i in enumerate(examples):
            expected = images.central_square(records.example(int(i))[0], 2)
            assert np.array_equal(found[step, column], np.asarray(expected))


def test_images_may_be_grey(directory):
    grey = open_records("folder:pets", directory, channels=1).test
    order = np.arange(6, dtype=np.int32)[None]
    for transform, height, width in (
        (Transform((4, 6, 1)), 4, 6),
        (Transform((2, 2, 1), resize=2), 2, 2),
        (Transform((4, 6, 1), crop=3, random=True), 3, 3),
    ):
        found = _stack(batches(grey, order, transform, SEED))["image"]
        assert found.shape == (1, 6, height, width, 1)
    loaded = sources.load("folder:pets", directory, channels=1).test
    assert np.array_equal(
        _stack(batches(grey, order, Transform((4, 6, 1)), SEED))["image"][0], loaded.image
    )


def test_an_image_of_another_size_is_named_with_what_to_set(tmp_path):
    write_folder(tmp_path / "pets")
    write(tmp_path / "pets" / "train" / "bee" / "1.png", picture(0, 5, 6))
    records = open_records("folder:pets", str(tmp_path)).train
    order = np.arange(9, dtype=np.int32)[None]
    message = (
        r"bee/1.png has 5 x 6 pixels and 3 channels; the shape asked for is \(4, 6, 3\)."
        r" Give the size of the images .*config.data.resize=SIDE"
    )
    for damaged in ("raise", "skip"):
        with pytest.raises(ValueError, match=message):
            next(batches(records, order, AS_IT_IS, SEED, damaged=damaged))
    scaled = next(batches(records, order, Transform((2, 2, 3), resize=2), SEED))
    assert scaled.arrays["image"].shape == (9, 2, 2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (4, 6, 2)}, "3 channels .*; 2 are asked for"),
        ({"random": True}, "crop is 0, but random_resized_crop needs"),
        ({"resize": 4}, r"shape is \(4, 6, 3\) and resize 4; .*\(resize, resize, chan"),
        ({"shape": (-1, -1, 3), "resize": -1}, "resize -1"),
    ],
)
def test_a_transform_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Transform(**{"shape": (4, 6, 3), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damaged": "ignore"}, r"damaged is 'ignore'; .*\('raise', 'skip'\)"),
        ({"workers": -1}, "workers is -1; it should be at least 0"),
        ({"threads": 0}, "threads is 0; it should be at least 1"),
        ({"first": 6}, r"first step is 6; it should be in 0\.\.5"),
        ({"share": slice(4, 8)}, r"slice\(4, 8, None\) of batches of 4 images is nothing"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_read(records, settings, message):
    with pytest.raises(ValueError, match=message):
        batches(records, _order(), AS_IT_IS, SEED, **settings)


def _left():
    """What streams leave behind while they are open: threads, processes and shared memory."""
    names = ("grain", "stream")
    threads = {each for each in threading.enumerate() if each.name.startswith(names)}
    return threads | set(multiprocessing.active_children()) | set(Path("/dev/shm").glob("psm_*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_is_closed_early_leaves_nothing_behind(records, workers):
    before = _left()
    stream = batches(records, _order(200), AS_IT_IS, SEED, workers=workers)
    next(stream)
    assert len(multiprocessing.active_children()) == workers
    assert _left() > before
    stream.close()
    assert list(stream) == []
    # Threads end after their batch.
    deadline = time.monotonic() + 10
    while _left() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _left() - before


def test_a_stream_that_nothing_holds_is_closed(records):
    before = _left()
    next(batches(records, _order(200), AS_IT_IS, SEED, workers=1))
    assert not _left() - before


# ---- The real set, where there is one.


def test_cifar_100_is_streamed_as_its_library_reads_it():
    directory = real.directory_with("cifar100")
    import tensorflow_datasets as tfds

    records = open_records("tfds:cifar100", directory).train
    order = np.random.default_rng(0).permutation(len(records))[:256].reshape(2, 128)
    found = _stack(batches(records, order, Transform((32, 32, 3)), SEED))
    source = tfds.data_source("cifar100", split="train", data_dir=directory)
    expected = [source[int(i)] for i in order.ravel()]
    for kind in ("image", "label", "coarse_label"):
        stacked = np.stack([example[kind] for example in expected])
        assert np.array_equal(found[kind].reshape(stacked.shape), stacked)
