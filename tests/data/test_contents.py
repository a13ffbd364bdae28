"""What the data of a run are is kept with it: other data are refused, moved ones are not."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import test_streamed_runs
from pictured import encoded, flipped, picture, prepare_set, write, write_folder

from sire_jax import configuration, evaluate, train
from sire_jax.configuration import experiment
from sire_jax.data import contents, folders, sources
from sire_jax.data.dataset import Dataset, Listed, Selection, Source
from sire_jax.data.records import open_records
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import open_run

pytestmark = pytest.mark.optax_dtypes


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "pets")
    return tmp_path


def _of(directory, name="folder:pets", *splits):
    return contents.of(open_records(name, str(directory), selection=Selection(*splits)))


def test_data_that_moved_are_the_same_from_memory_and_streamed(folder, tmp_path):
    before = _of(folder)
    shutil.copytree(folder / "pets", tmp_path / "moved" / "animals")
    moved = _of(tmp_path / "moved", "folder:animals")
    loaded = contents.of(sources.load("folder:pets", str(folder)))
    for path in (folder / "pets").rglob("*.png"):
        os.utime(path, (1, 1))
    for other in (moved, loaded, _of(folder)):
        assert contents.differences(before, other) == []
        assert other.brief() == before.brief()
    assert before.brief().startswith("9 + 6 images of {'label': 3}, checksum ")


def test_differences_of_images_are_counted_and_named(folder):
    before = _of(folder)
    train = folder / "pets" / "train"
    for name in ("a", "b", "c", "d"):
        write(train / "ape" / f"{name}.png", picture(0))
    (train / "cow" / "2.png").unlink()
    write(train / "bee" / "1.png", picture(0, 9, 9))
    (line,) = contents.differences(before, _of(folder))
    assert line == (
        "train: 9 -> 12 images; 4 added: 'ape/a.png', 'ape/b.png', 'ape/c.png' and 1 more;"
        " 1 removed: 'cow/2.png'; 1 changed: 'bee/1.png'"
    )
    assert before.brief() != _of(folder).brief()


def _write_bitmaps(folder, seed):
    for i in range(8):
        content = encoded(picture(seed + i), "BMP")
        write(folder / "pets" / "train" / "bee" / f"{i}.bmp", content)


def test_other_images_of_the_same_names_and_sizes_are_a_difference(folder, tmp_path):
    _write_bitmaps(folder, 0)
    before = _of(folder)
    _keep(tmp_path, before)
    _write_bitmaps(folder, 8)
    after = [_of(folder), contents.of(sources.load("folder:pets", str(folder)))]
    for old in (before, contents.read(tmp_path)):
        for new in after:
            assert contents.differences(old, new) == [
                "train: 17 -> 17 images of the same names and sizes, but other content"
            ]
    assert before.brief() != after[0].brief() == after[1].brief()


def test_samples_of_many_files_are_evenly_chosen_and_both_of_their_ends(folder, monkeypatch):
    (split,) = open_records("folder:pets", str(folder)).train.splits
    monkeypatch.setattr(folders, "_FILES", 3)
    monkeypatch.setattr(folders, "_END", 20)
    files = [split.path(i) for i in range(9)]
    before, one = split.sampled(), split.sampled(np.array([2]))
    for number, place, noticed in ((0, 0, True), (4, -1, True), (8, 30, False), (5, 0, False)):
        kept = files[number].read_bytes()
        files[number].write_bytes(flipped(kept, place % len(kept)))
        assert (split.sampled() != before) == noticed
        files[number].write_bytes(kept)
    assert split.sampled() == before
    files[2].unlink()
    files[2].symlink_to("/nowhere")
    assert split.sampled() == before
    assert split.sampled(np.array([2])) != one
    assert split.sampled(np.array([], int)) == split.sampled(np.array([], int)) != one


def test_other_names_of_classes_are_the_difference(folder):
    before = _of(folder)
    for split in ("train", "test"):
        (folder / "pets" / split / "bee").rename(folder / "pets" / split / "wasp")
    expected = "label: of 3 classes 1 missing: 'bee', 1 new: 'wasp'"
    assert contents.differences(before, _of(folder)) == [expected]
    other = contents.Contents({"label": ("bee", "ape", "cow")}, before.parts)
    (line,) = contents.differences(before, other)
    assert line == "label: the classes in another order: the class 0 was 'ape', now 'bee'"
    assert contents.of_names(before, contents.Contents({}, {}))[0].startswith("label: of 3 classes")


def test_a_set_that_was_prepared_anew_is_another(tmp_path):
    content = [(encoded(picture(i)), i % 3) for i in range(4)]
    for place, images in (("a", content), ("b", content), ("c", [*content[:3], content[0]])):
        prepare_set(tmp_path / place, {"train": images, "test": content[:2]})
    a, b, c = (_of(tmp_path / place, "tfds:small") for place in "abc")
    assert contents.differences(a, b) == []
    assert contents.differences(a, c) == [
        "train: 4 -> 4 images; 1 changed: 'small 1.0.0 train[0:4]'",
        "test: 2 -> 2 images; 1 changed: 'small 1.0.0 test[0:2]'",
    ]
    share = _of(tmp_path / "a", "tfds:small", ("train[:3]",), "test")
    assert contents.differences(a, share) == [
        "train: 4 -> 3 images; 1 added: 'small 1.0.0 train[0:3]';"
        " 1 removed: 'small 1.0.0 train[0:4]'"
    ]


def test_images_in_memory_are_told_apart():
    image = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    labels = [{"label": np.array(each)} for each in ([0, 1], [1, 0])]
    test = Source(image, labels[0])
    made = [contents.of(Dataset(Source(image, each), test, {"label": 2})) for each in labels]
    assert contents.differences(made[0], made[0]) == []
    assert contents.differences(*made) == ["train: 2 -> 2 images; 1 changed: 'label'"]
    digits = contents.of(sources.load("digits", ""))
    assert contents.differences(digits, contents.of(sources.load("digits", ""))) == []


def _keep(path, data):
    contents.keep(path, data, lambda file, content: file.write_bytes(content))


def test_what_was_kept_is_read_again_also_without_the_list(folder, tmp_path):
    before = _of(folder)
    assert contents.read(tmp_path) is None
    _keep(tmp_path, before)
    kept = contents.read(tmp_path)
    assert kept.names == before.names
    assert contents.differences(kept, before) == []
    write(folder / "pets" / "train" / "ape" / "a.png", picture(0))
    expected = "train: 9 -> 10 images; 1 added: 'ape/a.png'"
    assert contents.differences(kept, _of(folder)) == [expected]
    for content in (b"", b"text", (tmp_path / contents.FILES).read_bytes()[:-9]):
        (tmp_path / contents.FILES).write_bytes(content)
        found = contents.differences(contents.read(tmp_path), _of(folder))
        assert found == ["train: 9 -> 10 images, not the same"]
    (tmp_path / contents.FILES).unlink()
    assert contents.differences(contents.read(tmp_path), before) == []


def test_what_is_there_is_not_written_again(folder, tmp_path):
    data, written = _of(folder), []

    def replace(path, content):
        written.append(path.name)
        path.write_bytes(content)

    contents.keep(tmp_path, data, replace)
    assert written == [contents.FILES, contents.FILE]
    contents.keep(tmp_path, _of(folder), replace)
    assert len(written) == 2
    (tmp_path / contents.FILES).unlink()
    contents.keep(tmp_path, data, replace)
    write(folder / "pets" / "train" / "ape" / "a.png", picture(0))
    contents.keep(tmp_path, _of(folder), replace)
    assert len(written) == 6
    assert contents.differences(contents.read(tmp_path), _of(folder)) == []


def test_the_list_is_hashed_and_kept_as_json_of_any_names(tmp_path):
    entries = [Listed('a "b"\\\n', 3, "\u00e4"), Listed("\udcff\x7f.png", -1, "\U0001f34e")]
    records = SimpleNamespace(listing=lambda: iter(entries), sampled=lambda: "")
    source = Source(np.zeros((2, 1, 1, 3), np.uint8), {"label": np.zeros(2)}, records)
    data = contents.of(Dataset(source, source, {"label": 2}))
    lines = "".join(json.dumps(each) + "\n" for each in entries)
    assert data.parts["train"].digest == hashlib.sha256(lines.encode()).hexdigest()
    _keep(tmp_path, data)
    assert list(contents.read(tmp_path).parts["test"].listing()) == entries


@pytest.mark.parametrize("text", ["[]", "{}", '{"classes": 3}', '{"classes": {"label": ["a"]}}'])
def test_a_file_that_does_not_say_what_data_are_is_refused(tmp_path, text):
    (tmp_path / contents.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"data\.json doesn't say what the data of a run are"):
        contents.read(tmp_path)


# ---- With the programs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch on a folder of three classes, and the folder's directory."""
    root = tmp_path_factory.mktemp("trained")
    write_folder(root / "data" / "pets", {"train": 15, "test": 5})
    train.train(_config(root / "data"), str(root / "run"))
    return root


def _config(directory):
    return test_streamed_runs._config(str(directory), "device", epochs=1)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run and of its data, to change."""
    root = shutil.copytree(trained, tmp_path / "copied")
    return root / "run", root / "data", [f"--config.data.dir={root / 'data'}"]


def _open(run, overrides, **settings):
    return open_run(run, overrides, **settings)


def test_a_run_keeps_the_names_of_its_classes_for_people_to_read(trained):
    described = json.loads((trained / "run" / "data.json").read_text())
    assert described["classes"] == {"label": ["ape", "bee", "cow"]}
    assert (described["train"]["images"], described["test"]["images"]) == (45, 15)


def test_a_run_is_opened_and_goes_on_where_its_data_moved(copied):
    run, data, _ = copied
    (data / "pets").rename(data / "animals")
    moved = [f"--config.data.dir={data}", "--config.data.name=folder:animals"]
    assert _open(run, moved).feed.names == {"label": ("ape", "bee", "cow")}
    results = train.train(configuration.override(_config(data), moved), str(run))
    assert results["step"] == 4


def test_a_run_is_refused_on_data_with_other_names(copied):
    run, data, overrides = copied
    for split in ("train", "test"):
        (data / "pets" / split / "bee").rename(data / "pets" / split / "wasp")
    difference = "label: of 3 classes 1 missing: 'bee', 1 new: 'wasp'"
    for changed_data in (False, True):
        with pytest.raises(ValueError, match=rf"not those of the run {run}:\n  {difference}\n"):
            _open(run, overrides, changed_data=changed_data)
    with pytest.raises(ValueError, match=rf"run on other data:\n  {difference}\nGive it the data"):
        train.train(_config(data), str(run))
    # What needs weights alone has its own names.
    shutil.rmtree(data)
    assert _open(run, overrides, needs_data=False).feed.names == {"label": ("ape", "bee", "cow")}


def test_a_run_is_measured_on_other_test_images_only_when_that_is_wanted(copied):
    run, data, overrides = copied
    before = evaluate.evaluate(run, "train", overrides)
    write(data / "pets" / "test" / "ape" / "new.png", picture(0))
    difference = "test: 15 -> 16 images; 1 added: 'ape/new.png'"
    with pytest.raises(ValueError, match=difference):
        evaluate.evaluate(run, "test", overrides)
    with pytest.raises(ValueError, match=difference):
        train.train(_config(data), str(run))
    with pytest.warns(UserWarning, match=rf"not the data of {run}:\n  {difference}"):
        found = evaluate.evaluate(run, "test", overrides, changed_data=True)
    accuracy = found["outputs"]["main"]["top_1"]["runs"][0] * 16
    assert accuracy == pytest.approx(round(accuracy), abs=1e-4)
    with pytest.raises(ValueError, match="--changed_data is for test images; the split is 'train'"):
        evaluate.evaluate(run, "train", overrides, changed_data=True)
    assert before["split"] == "train"


@pytest.mark.parametrize("with_test", [False, True])
def test_a_run_is_not_measured_where_its_training_images_changed(copied, with_test):
    run, data, overrides = copied
    write(data / "pets" / "train" / "ape" / "new.png", picture(0))
    if with_test:
        write(data / "pets" / "test" / "ape" / "new.png", picture(0))
    difference = r"train: 45 -> 46 images; 1 added: 'ape/new\.png'\n"
    difference += r"  test: 15 -> 16 images; 1 added: 'ape/new\.png'\n" * with_test
    with pytest.raises(ValueError, match=difference + r"If .*data\.dir=DIR\.$"):
        evaluate.evaluate(run, "test", overrides)
    advice = r"--changed_data is for other test images: classes and training images have to be"
    with pytest.raises(ValueError, match=rf"{difference}If .*data\.dir=DIR\. {advice}"):
        evaluate.evaluate(run, "test", overrides, changed_data=True)


def test_a_run_without_its_file_of_data_is_opened_with_the_names_of_the_data(copied):
    run, data, overrides = copied
    for name in (contents.FILE, contents.FILES):
        (run / name).unlink()
    (data / "pets" / "train" / "bee").rename(data / "pets" / "train" / "wasp")
    (data / "pets" / "test" / "bee").rename(data / "pets" / "test" / "wasp")
    assert _open(run, overrides, needs_data=False).feed.names == {"label": ("ape", "cow", "wasp")}
    message = r"has no data\.json: whether these are the data of the run, and its classes, can't be"
    with pytest.warns(UserWarning, match=message):
        evaluate.evaluate(run, "test", overrides)


def test_damaged_images_are_skipped_and_counted_with_the_images_on_the_device(tmp_path, capsys):
    write_folder(tmp_path / "pets", {"train": 15, "test": 5})
    damaged = tmp_path / "pets" / "train" / "bee" / "7.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    config = _config(tmp_path)
    config.data.cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"{damaged} is damaged.*config\.data\.damaged=skip"):
        train.train(config, str(tmp_path / "raised"))
    config.data.damaged = "skip"
    results = train.train(config, str(tmp_path / "skipped"))
    assert results["skipped_images"] == 1
    assert f"Skipped: {damaged} is damaged: " in capsys.readouterr().out
    runs = Runs(experiment.build(config))
    assert runs.feed.number_skipped() == len(runs.feed.newly_skipped()) == 1
    assert runs.feed.newly_skipped() == []
    config.data.images = 45
    message = r"images is 45, .* has 44 training images, without damaged ones \(1 with those"
    with pytest.raises(ValueError, match=message):
        Runs(experiment.build(config))
