import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest
import real
from hypothesis import given, settings
from hypothesis import strategies as st
from pictured import flipped

from sire_jax.data import copies, sources
from sire_jax.data.dataset import Dataset, Selection, Source, draw_classes

DIGITS_OF_EACH_CLASS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
# What numpy 2.4 draws with seed 0: 4 of 10 classes, and the first of 100 of 1000.
FOUR_OF_TEN = [2, 4, 5, 7]
FIRST_OF_HUNDRED = [2, 5, 7, 15, 20, 26, 31, 37]


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "")


def test_digits_are_split_by_class_into_two_thirds_and_one_third(digits):
    bundled = np.asarray(DIGITS_OF_EACH_CLASS)
    train, test = (np.bincount(part.labels["label"]) for part in (digits.train, digits.test))
    assert np.array_equal(train + test, bundled)
    assert bundled.sum() == 1797
    assert (np.abs(test - bundled / 3) <= 1).all()
    assert digits.classes == {"label": 10}
    assert digits.names == {"label": tuple("0123456789")}


def test_digits_are_the_bundled_images_each_in_one_part(digits):
    image = np.concatenate([digits.train.image, digits.test.image])
    assert image.dtype == np.uint8
    assert image.shape == (1797, 8, 8, 1)
    assert (image.min(), image.max()) == (0, 255)
    label = np.concatenate([digits.train.labels["label"], digits.test.labels["label"]])
    with np.load(sources.DIGITS) as bundled:
        pixels, target = bundled["image"], bundled["label"]
    # Those that scikit-learn 1.9 has, in its order.
    assert hashlib.sha256(pixels.tobytes() + target.tobytes()).hexdigest() == DIGITS_SHA256
    ours = sorted((each.tobytes(), int(k)) for each, k in zip(image, label, strict=True))
    scaled = np.round(pixels * (255 / 16)).astype(np.uint8)
    theirs = sorted((x.tobytes(), int(k)) for x, k in zip(scaled, target, strict=True))
    assert ours == theirs
    assert not {x.tobytes() for x in digits.train.image} & {x.tobytes() for x in digits.test.image}
    # The first bundled image starts 0 0 5 13 9 1 0 0, of 16.
    assert digits.test.image[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert digits.test.labels["label"][0] == 0


def test_digits_are_the_same_at_every_load(digits):
    again = sources.load("digits", "")
    _assert_equal(digits, again)


def _assert_equal(a, b):
    assert a.classes == b.classes
    assert a.names == b.names
    for one, other in ((a.train, b.train), (a.test, b.test)):
        assert one.image.dtype == other.image.dtype
        assert np.array_equal(one.image, other.image)
        chex.assert_trees_all_equal(one.labels, other.labels)


def test_either_part_of_the_digits_may_be_the_test(digits):
    other = sources.load("digits", "", selection=Selection(("test",), "train"))
    _assert_equal(Dataset(other.test, other.train, other.classes), digits)


@pytest.mark.parametrize("splits", [(("train", "extra"), "test"), (("train",), "extra")])
def test_another_split_of_the_digits_is_refused(splits):
    with pytest.raises(ValueError, match=r"digits has no split 'extra', only \['train', 'test'\]"):
        sources.load("digits", "", selection=Selection(*splits))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_splits": ()}, r"train_splits is \(\); it should be names of splits"),
        ({"train_splits": ("train", 3)}, r"train_splits is \('train', 3\); it should be names"),
        ({"train_splits": ("train", "train")}, "no split should be named twice"),
        ({"train_splits": ("train", "test")}, "test_split 'test'; no split should be named twice"),
        ({"draw_classes": 1}, "draw_classes is 1; it should be at least 2, or 0"),
        ({"draw_classes": -2}, "draw_classes is -2; it should be at least 2, or 0"),
        ({"draw_seed": -1}, "draw_seed is -1; it should be at least 0"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Selection(**settings)


def test_a_seed_always_draws_the_same_classes():
    assert draw_classes(10, 4, 0).tolist() == FOUR_OF_TEN
    drawn = draw_classes(1000, 100, 0)
    assert drawn[:8].tolist() == FIRST_OF_HUNDRED
    assert drawn.sum() == 51076
    assert draw_classes(10, 10, 3).tolist() == list(range(10))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 50), st.data(), st.integers(0, 2**31))
def test_drawn_classes_are_distinct_and_ascend(classes, data, seed):
    number = data.draw(st.integers(2, classes))
    drawn = draw_classes(classes, number, seed)
    assert len(drawn) == number
    assert (np.diff(drawn) > 0).all()
    assert drawn[0] >= 0
    assert drawn[-1] < classes


def test_each_class_is_as_likely_to_be_drawn():
    often = np.bincount(np.concatenate([draw_classes(8, 2, i) for i in range(400)]))
    # Each of the 8 in a quarter of the draws: 100 +- 9.
    assert often.min() > 65
    assert often.max() < 135


@pytest.mark.parametrize("number", [1, 11])
def test_more_classes_than_there_are_or_one_are_refused(number):
    with pytest.raises(ValueError, match=rf"{number}; of 10 classes it should be in 2\.\.10"):
        draw_classes(10, number, 0)


def test_digits_of_drawn_classes_are_numbered_anew(digits):
    drawn = sources.load("digits", "", selection=Selection(draw_classes=4))
    assert drawn.classes == {"label": 4}
    assert drawn.names == {"label": tuple(map(str, FOUR_OF_TEN))}
    for source, whole in ((drawn.train, digits.train), (drawn.test, digits.test)):
        label = whole.labels["label"]
        kept = [i for i in range(len(label)) if label[i] in FOUR_OF_TEN]
        assert np.array_equal(source.image, whole.image[kept])
        assert source.labels["label"].tolist() == [FOUR_OF_TEN.index(label[i]) for i in kept]
        assert source.labels["label"].dtype == np.int32
    other = sources.load("digits", "", selection=Selection(draw_classes=4, draw_seed=1))
    assert len(other.train.image) != len(drawn.train.image)
    with pytest.raises(ValueError, match=r"draw_classes is 11; of 10 classes"):
        sources.load("digits", "", selection=Selection(draw_classes=11))


def test_shares_of_the_digits_have_each_once(digits):
    shared = sources.load("digits", "", selection=Selection(("train[:75%]", "test"), "train[75%:]"))
    number = len(digits.train)
    assert len(shared.test) == number - round(0.75 * number)
    assert len(shared.train) + len(shared.test) == 1797
    both = np.concatenate([shared.train.image, shared.test.image])
    whole = np.concatenate([digits.train.image, digits.test.image])
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in whole)
    counts = np.bincount(digits.train.labels["label"])
    assert (np.abs(np.bincount(shared.test.labels["label"]) - counts / 4) <= 1).all()


def test_an_unknown_source_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'digit'.*Did you mean 'digits'"):
        sources.load("digit", "")
    known = "digits, folder:<folder>, idx:<folder>, tfds:<set>"
    with pytest.raises(ValueError, match=rf"no data source 'mnist'.*Known: {known}"):
        sources.load("mnist", "")


def test_a_set_that_is_not_prepared_is_refused_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as raised:
        sources.load("tfds:mnist", str(tmp_path), str(tmp_path / "cache"))
    assert time.monotonic() - start < 2
    assert f"'mnist' is not prepared in {tmp_path}" in str(raised.value)
    assert f"tfds build mnist --data_dir={tmp_path} --file_format=array_record" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_source_without_the_name_of_a_set_is_refused(prepared):
    with pytest.raises((ValueError, FileNotFoundError)):
        sources.load("tfds:", str(prepared))


# A set of our own: image i of the split is all 10 * i, its label i mod 3, its parity i mod 2.
def _prepare(root, splits, label="label", shape=(4, 6, 1), feature=None, value=lambda i: i % 3):
    import tensorflow_datasets as tfds
    from PIL import Image

    def examples(split, number):
        for i in range(number):
            path = root / f"{split}_{i}.png"
            width = 6 if shape[1] else 6 + i
            Image.fromarray(np.full((4, width), 10 * i, np.uint8)).save(path)
            yield i, {"image": path, label: value(i), "parity": i % 2, "place": i}

    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=shape),
                    label: feature or tfds.features.ClassLabel(num_classes=3),
                    "parity": tfds.features.ClassLabel(names=["even", "odd"]),
                    "place": tfds.features.Scalar(np.int64),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, _):
                return {split: examples(split, number) for split, number in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

    Tiny(data_dir=root / "sets", file_format="array_record").download_and_prepare()
    return root / "sets"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return _prepare(tmp_path_factory.mktemp("tiny"), {"train": 8, "test": 4})


@pytest.fixture
def no_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("the set was decoded")

    monkeypatch.setattr("sire_jax.data.sources._decode", fail)


def _check_tiny(dataset):
    assert dataset.classes == {"label": 3, "parity": 2}
    assert dataset.names == {"label": ("0", "1", "2"), "parity": ("even", "odd")}
    for source, number in ((dataset.train, 8), (dataset.test, 4)):
        assert source.image.dtype == np.uint8
        assert source.image.shape == (number, 4, 6, 1)
        order = source.image[:, 0, 0, 0] // 10
        assert sorted(order.tolist()) == list(range(number))
        assert (source.image == 10 * order[:, None, None, None]).all()
        assert np.array_equal(source.labels["label"], order % 3)
        assert np.array_equal(source.labels["parity"], order % 2)
        assert set(source.labels) == {"label", "parity"}


def test_a_prepared_set_is_decoded_with_all_its_class_labels(prepared):
    _check_tiny(sources.load("tfds:tiny", str(prepared)))


def test_a_cached_set_is_not_decoded_again(prepared, tmp_path, request):
    first = sources.load("tfds:tiny", str(prepared), str(tmp_path / "cache"))
    request.getfixturevalue("no_decoding")
    again = sources.load("tfds:tiny", str(prepared), str(tmp_path / "cache"))
    _check_tiny(again)
    _assert_equal(first, again)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(AssertionError, match="the set was decoded"):
        sources.load("tfds:tiny", str(prepared))


def test_classes_without_names_are_numbered():
    source = Source(np.zeros((5, 2, 2, 1)), {"label": np.zeros(5, np.int32)})
    assert Dataset(source, source, {"label": 3}).names == {"label": ("0", "1", "2")}


def test_a_set_that_was_prepared_again_is_decoded_again(prepared, tmp_path, request):
    sets = shutil.copytree(prepared, tmp_path / "sets")
    sources.load("tfds:tiny", str(sets), str(tmp_path / "cache"))
    (record,) = sets.glob("tiny/1.0.0/*train*")
    os.utime(record, (1, 1))
    request.getfixturevalue("no_decoding")
    with pytest.raises(AssertionError, match="the set was decoded"):
        sources.load("tfds:tiny", str(sets), str(tmp_path / "cache"))


def test_the_newest_version_is_used(prepared, tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.0"):
        shutil.copytree(prepared / "tiny" / "1.0.0", tmp_path / "tiny" / version)
    for version in ("1.9.0", "1.2.0"):
        (tmp_path / "tiny" / version / "features.json").unlink()
    message = r"tiny has 3 versions; the newest, 1.10.0, is used.*by its name.*'tfds:tiny:1.9.0'"
    with pytest.warns(UserWarning, match=message):
        _check_tiny(sources.load("tfds:tiny", str(tmp_path)))
    _check_tiny(sources.load("tfds:tiny:1.10.0", str(tmp_path)))
    message = r"in the version 2.0.0, only '1.10.0', '1.9.0', '1.2.0'\. Prepare it"
    with pytest.raises(FileNotFoundError, match=message):
        sources.load("tfds:tiny:2.0.0", str(tmp_path))


def test_one_of_several_configurations_is_chosen_by_name(prepared, tmp_path):
    for config in ("small", "large"):
        shutil.copytree(prepared / "tiny" / "1.0.0", tmp_path / "tiny" / config / "1.0.0")
    message = (
        r"tiny has 2 configurations of the set; choose .* 'tfds:tiny/large', 'tfds:tiny/small'"
    )
    with pytest.raises(ValueError, match=message):
        sources.load("tfds:tiny", str(tmp_path))
    for name in ("tiny/large", "tiny/small:1.0.0"):
        _check_tiny(sources.load(f"tfds:{name}", str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="'tiny/larger' is not prepared in"):
        sources.load("tfds:tiny/larger", str(tmp_path))


def test_a_tilde_in_the_directories_is_the_home(prepared, monkeypatch):
    monkeypatch.setenv("HOME", str(prepared.parent))
    _check_tiny(sources.load("tfds:tiny", f"~/{prepared.name}", "~/home_cache"))
    assert len(list((prepared.parent / "home_cache").iterdir())) == 1


def test_a_set_without_test_images_or_labels_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        sources.load("tfds:tiny", str(_prepare(tmp_path / "a", {"train": 2})))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"no 'image' and 'label'.*'kind'"):
        sources.load("tfds:tiny", str(_prepare(tmp_path / "b", {"train": 2, "test": 1}, "kind")))


def test_labels_that_are_plain_integers_are_taken_and_counted(tmp_path):
    import tensorflow_datasets as tfds

    feature = tfds.features.Scalar(np.int64)
    sets = str(_prepare(tmp_path, {"train": 4, "test": 3}, feature=feature))
    dataset = sources.load("tfds:tiny", sets)
    assert dataset.classes == {"label": 3, "parity": 2}
    assert dataset.names == {"label": ("0", "1", "2"), "parity": ("even", "odd")}
    places = dataset.train.image[:, 0, 0, 0] // 10
    assert np.array_equal(dataset.train.labels["label"], places % 3)
    given = sources.load("tfds:tiny", sets, classes={"label": 5, "place": 9})
    assert given.classes == {"label": 5, "parity": 2, "place": 9}
    assert np.array_equal(given.train.labels["place"], places)
    message = r"has the label [12], which is outside the 1 classes 0\.\.0"
    with pytest.raises(ValueError, match=message):
        sources.load("tfds:tiny", sets, classes={"label": 1})


@pytest.mark.parametrize("kind", ["Text", "Tensor"])
def test_labels_that_are_texts_or_one_hot_are_refused_with_what_is_needed(tmp_path, kind):
    import tensorflow_datasets as tfds

    feature, value = {
        "Text": (tfds.features.Text(), lambda i: f"kind {i % 3}"),
        "Tensor": (
            tfds.features.Tensor(shape=(3,), dtype=np.float32),
            lambda i: np.eye(3, dtype=np.float32)[i % 3],
        ),
    }[kind]
    sets = str(_prepare(tmp_path, {"train": 2, "test": 1}, feature=feature, value=value))
    message = (
        rf"'label' of .* is {kind} of the shape .*; labels should be numbers.*ClassLabel\(names="
    )
    with pytest.raises(ValueError, match=message):
        sources.load("tfds:tiny", sets)


def test_images_of_several_sizes_are_refused(tmp_path):
    sets = str(_prepare(tmp_path, {"train": 3, "test": 1}, shape=(4, None, 1)))
    with pytest.raises(ValueError, match=r"3 images of 3 sizes.*\(4, 6, 1\), \(4, 7, 1\)"):
        sources.load("tfds:tiny", sets)


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    splits = {"train": 8, "extra": 5, "validation": 4}
    return str(_prepare(tmp_path_factory.mktemp("splits"), splits))


EXTRA = Selection(("train", "extra"), "validation")


def _places(source):
    """The numbers of images in their split, checked against their labels."""
    places = source.image[:, 0, 0, 0] // 10
    assert np.array_equal(source.labels["label"], places % 3)
    assert np.array_equal(source.labels["parity"], places % 2)
    return places.tolist()


def test_several_splits_make_the_training_images_one_after_another(three_splits, tmp_path):
    for _ in ("decoded", "cached"):
        dataset = sources.load("tfds:tiny", three_splits, str(tmp_path), EXTRA)
        train = _places(dataset.train)
        assert sorted(train[:8]) == list(range(8))
        assert sorted(train[8:]) == list(range(5))
        assert sorted(_places(dataset.test)) == list(range(4))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("selection", "split"),
    [
        (Selection(), "test"),
        (Selection(("train", "extr"), "validation"), "extr"),
        (Selection(("extr[:4]",), "validation"), "extr"),
    ],
)
def test_an_unknown_split_is_refused_with_those_that_exist(three_splits, selection, split):
    known = r"\['train', 'extra', 'validation'\]; choose with train_splits"
    with pytest.raises(ValueError, match=rf"no split '{split}', only {known}"):
        sources.load("tfds:tiny", three_splits, selection=selection)


def test_each_selection_has_a_decoded_copy_of_its_own(three_splits, tmp_path, request):
    chosen = [
        EXTRA,
        Selection(("extra", "train"), "validation"),
        Selection(("train",), "validation"),
        Selection(("train",), "extra"),
        Selection(("train",), "extra", draw_classes=2),
        Selection(("train",), "extra", draw_classes=2, draw_seed=1),
    ]
    first = [sources.load("tfds:tiny", three_splits, str(tmp_path), each) for each in chosen]
    copied = {each.name for each in tmp_path.iterdir() if "-labels-" not in each.name}
    assert len(copied) == len(chosen)
    request.getfixturevalue("no_decoding")
    for each, dataset in zip(chosen, first, strict=True):
        _assert_equal(sources.load("tfds:tiny", three_splits, str(tmp_path), each), dataset)


def test_a_copy_of_another_decoder_is_not_used(prepared, tmp_path, monkeypatch):
    for decoder in (1, 2, 2):
        monkeypatch.setattr("sire_jax.data.images.DECODER", decoder)
        sources.load("tfds:tiny", str(prepared), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_only_images_of_drawn_classes_are_decoded(prepared, monkeypatch):
    from sire_jax.data import images

    decode, decoded = images.decode, []

    def counted(*given):
        decoded.append(1)
        return decode(*given)

    monkeypatch.setattr(images, "decode", counted)
    drawn = draw_classes(3, 2, 0).tolist()
    dataset = sources.load("tfds:tiny", str(prepared), selection=Selection(draw_classes=2))
    assert dataset.classes == {"label": 2}
    assert dataset.names == {"label": tuple(map(str, drawn))}
    for source, number in ((dataset.train, 8), (dataset.test, 4)):
        places = source.image[:, 0, 0, 0] // 10
        assert sorted(places.tolist()) == [i for i in range(number) if i % 3 in drawn]
        # Other kinds of labels are dropped.
        assert set(source.labels) == {"label"}
        assert [drawn[i] for i in source.labels["label"]] == (places % 3).tolist()
    assert len(decoded) == len(dataset.train.image) + len(dataset.test.image)


def test_two_programs_may_write_the_cache_at_once(prepared, tmp_path, monkeypatch):
    arguments = ("tfds:tiny", str(prepared), str(tmp_path))
    other = f"from sire_jax.data import sources; sources.load(*{arguments})"
    save = np.savez

    def slow(path, **arrays):
        save(path, **arrays)
        # Another program decodes the same set meanwhile.
        subprocess.run([sys.executable, "-c", other], check=True)

    monkeypatch.setattr(np, "savez", slow)
    _check_tiny(sources.load(*arguments))
    assert len(list(tmp_path.iterdir())) == 1


# ---- Copies.


def test_a_copy_that_can_not_be_used_is_made_again_with_a_warning(prepared, tmp_path):
    arguments = ("tfds:tiny", str(prepared), str(tmp_path))
    sources.load(*arguments)
    (copy,) = tmp_path.iterdir()
    whole = copy.read_bytes()
    with np.load(copy) as arrays:
        other = {key: values[1:] for key, values in arrays.items()}
    damaged = {
        "truncated": whole[:-200],
        "empty": b"",
        "flipped": flipped(whole, whole.index(b"train/image.npy") + 200),
    }
    for content in damaged.values():
        copy.write_bytes(content)
        with pytest.warns(UserWarning, match=r"\.npz is damaged.*It is a copy, which is made anew"):
            _check_tiny(sources.load(*arguments))
        assert copy.read_bytes() == whole
    np.savez(copy, **other)
    with pytest.warns(UserWarning, match=r"\.npz holds no such decoded data set: images of .*anew"):
        _check_tiny(sources.load(*arguments))
    assert list(tmp_path.iterdir()) == [copy]


def test_a_copy_of_another_user_that_can_not_be_read_is_as_if_absent(tmp_path, monkeypatch):
    copies.write(tmp_path / "a.npz", {"x": np.arange(3)})
    assert (tmp_path / "a.npz").stat().st_mode & 0o777 == 0o666 & ~_umask()
    opened = Path.open

    def refuse(self, *given, **settings):
        if self.name == "a.npz":
            raise PermissionError(13, "Permission denied")
        return opened(self, *given, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    assert copies.read(tmp_path / "a.npz") is None


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, error):
    def fail(file, **_):
        file.write(b"half")
        raise error

    copy = tmp_path / "a.npz"
    copies.write(copy, {"x": np.arange(3)})
    monkeypatch.setattr(np, "savez", fail)
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match=f"No copy is kept in {tmp_path}.*No space left"):
            copies.write(copy, {"x": np.arange(4)})
    else:
        with pytest.raises(KeyboardInterrupt):
            copies.write(copy, {"x": np.arange(4)})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [copy]
    assert copies.read(copy)["x"].tolist() == [0, 1, 2]


def test_what_a_killed_program_was_writing_is_removed(tmp_path):
    (tmp_path / "a.12345678.partial").write_bytes(b"of a program that was killed")
    with (tmp_path / "b.12345678.partial").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        copies.write(tmp_path / "c.npz", {"x": np.arange(3)})
        assert sorted(each.name for each in tmp_path.iterdir()) == ["b.12345678.partial", "c.npz"]


@pytest.mark.parametrize("removed_first", [False, True])
def test_a_file_that_is_taken_for_abandoned_is_written_by_another_name(
    tmp_path, monkeypatch, removed_first
):
    lock, names = copies._lock, []

    def race(file):
        names.append(file.name)
        if len(names) > 1:
            return lock(file)
        with Path(file.name).open("r+b") as other:  # As `_remove_abandoned` does.
            assert lock(other)
            locked = None if removed_first else lock(file)
            Path(file.name).unlink()
        return lock(file) if removed_first else locked

    monkeypatch.setattr(copies, "_lock", race)
    copies.write(tmp_path / "a.npz", {"x": np.arange(3)})
    assert len(set(names)) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]
    assert copies.read(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "message"),
    [(errno.ENOLCK, None), (errno.EAGAIN, r"No copy is kept in .*new files were locked by others")],
)
def test_a_file_system_without_locks_has_copies(tmp_path, monkeypatch, error, message):
    def flock(file, how):
        raise OSError(error, "from the file system")

    monkeypatch.setattr(fcntl, "flock", flock)
    warned = pytest.warns(UserWarning, match=message) if message else contextlib.nullcontext()
    with warned:
        copies.write(tmp_path / "a.npz", {"x": np.arange(3)})
    assert len(list(tmp_path.iterdir())) == (0 if message else 1)


# The real set, where there is one.


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    directory = real.directory_with("mnist")
    cache = str(tmp_path_factory.mktemp("cache"))
    return directory, cache, sources.load("tfds:mnist", directory, cache)


@pytest.mark.slow  # Decodes 70,000 images.
def test_mnist_has_its_images_and_labels(mnist):
    _, _, dataset = mnist
    assert dataset.train.image.shape == (60000, 28, 28, 1)
    assert dataset.test.image.shape == (10000, 28, 28, 1)
    assert dataset.classes == {"label": 10}
    # The numbers of each digit in the set, as published.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(dataset.train.labels["label"]).tolist() == counts
    assert np.unique(dataset.test.labels["label"]).tolist() == list(range(10))
    for source, mean in ((dataset.train, 0.1307), (dataset.test, 0.1325)):
        assert source.image.dtype == np.uint8
        assert source.image.mean() / 255 == pytest.approx(mean, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("no_decoding")
def test_mnist_is_decoded_once(mnist):
    directory, cache, dataset = mnist
    _assert_equal(dataset, sources.load("tfds:mnist", directory, cache))
