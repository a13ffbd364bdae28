"""Image folders and prepared sets, read one image at a time; how images are decoded and scaled."""

import io
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from pictured import CLASSES, DAMAGED, encoded, picture, prepare_set, write, write_folder
from PIL import Image

from sire_jax.data import images, sources
from sire_jax.data.dataset import Dataset, Selection, draw_classes
from sire_jax.data.images import DamagedImageError
from sire_jax.data.records import Records, open_records
from sire_jax.data.tasks import Images

LABELS = {"train": [0, 0, 0, 1, 1, 1, 2, 2, 2], "test": [0, 0, 1, 1, 2, 2]}


@pytest.fixture
def folder(tmp_path):
    """An image folder ``pets`` in a directory, and the pixels of each split."""
    made = write_folder(tmp_path / "pets")
    return tmp_path, {split: pixels for split, (pixels, _) in made.items()}


def _open(directory, name="folder:pets", *splits, **settings):
    selection = Selection(*splits, **settings)
    return open_records(name, str(directory), selection=selection)


def test_a_folder_has_its_images_in_order_with_classes_named_by_directories(folder):
    directory, pixels = folder
    dataset = _open(directory)
    assert dataset.classes == {"label": 3}
    assert dataset.names == {"label": CLASSES}
    for split, records in (("train", dataset.train), ("test", dataset.test)):
        assert len(records) == len(pixels[split])
        assert records.labels["label"].tolist() == LABELS[split]
        assert records.labels["label"].dtype == np.int32
        for i, expected in enumerate(pixels[split]):
            assert np.array_equal(records.read(i), expected)
            assert records.example(i)[1] == {"label": LABELS[split][i]}
    assert dataset.train.read(0).dtype == np.uint8
    assert dataset.train.name(4) == f"{directory}/pets/train/bee/1.png"


def test_a_folder_may_be_named_by_its_whole_path_or_from_the_home(folder, monkeypatch):
    directory, pixels = folder
    monkeypatch.setenv("HOME", str(directory))
    for name in (f"folder:{directory}/pets", "folder:~/pets"):
        assert np.array_equal(_open("/nowhere", name).train.read(2), pixels["train"][2])
    assert len(_open("~").train) == 9
    # As the directory that a program runs in.
    monkeypatch.chdir(directory / "pets" / "train")
    (split,) = _open(".", "folder:.", ("all[:6]",), "all[6:]").train.splits
    assert all(split.listed(i)[:4] in ("ape/", "bee/", "cow/") for i in range(6))
    assert split.path(0).is_file()


def test_a_home_that_is_not_there_is_refused_only_where_it_is_needed(folder):
    directory, _ = folder
    assert len(_open("~nosuchuser", f"folder:{directory}/pets").train) == 9
    copied = sources.load(f"folder:{directory}/pets", "~nosuchuser", cache="~nosuchuser/cache")
    assert len(copied.train) == 9
    for name, place in (
        ("folder:~nosuchuser/pets", "folder:~nosuchuser/pets"),
        ("folder:pets", "the data directory ~nosuchuser"),
        ("tfds:pets", "the data directory ~nosuchuser"),
    ):
        message = f"{place} starts with the home directory of 'nosuchuser', and there is no such"
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            _open("~nosuchuser", name)


def test_a_number_outside_of_the_records_is_refused(folder):
    records = _open(folder[0]).train
    for index in (-1, 9):
        with pytest.raises(IndexError, match=f"no image {index} among 9"):
            records.read(index)


def test_several_splits_are_read_one_after_another(folder):
    directory, pixels = folder
    shutil.copytree(directory / "pets" / "test", directory / "pets" / "val")
    records = _open(directory, "folder:pets", ("train", "test"), "val").train
    assert records.labels["label"].tolist() == LABELS["train"] + LABELS["test"]
    assert np.array_equal(records.read(9), pixels["test"][0])
    assert np.array_equal(records.read(14), pixels["test"][5])
    assert records.name(10) == f"{directory}/pets/test/ape/1.png"


def test_images_of_drawn_classes_are_chosen_without_decoding(folder):
    directory, pixels = folder
    drawn = draw_classes(3, 2, 5).tolist()
    write(directory / "pets" / "train" / CLASSES[3 - sum(drawn)] / "0.png", b"damaged")
    dataset = _open(directory, draw_classes=2, draw_seed=5)
    assert dataset.classes == {"label": 2}
    assert dataset.names == {"label": tuple(CLASSES[i] for i in drawn)}
    kept = [i for i, label in enumerate(LABELS["train"]) if label in drawn]
    assert dataset.train.labels["label"].tolist() == [0, 0, 0, 1, 1, 1]
    for i, place in enumerate(kept):
        image, labels = dataset.train.example(i)
        assert np.array_equal(images.to_array(image), pixels["train"][place])
        assert labels == {"label": drawn.index(LABELS["train"][place])}
    with pytest.raises(ValueError, match=r"draw_classes is 4; of 3 classes"):
        _open(directory, draw_classes=4)


def test_images_lie_at_any_depth_and_hidden_files_are_no_images(folder):
    directory, pixels = folder
    train = directory / "pets" / "train"
    write(train / "bee" / "garden" / "more" / "x.JPEG", encoded(picture(1), "JPEG"))
    write(train / "bee" / "._0.png", b"")
    write(train / "bee" / ".thumbs" / "0.png", b"")
    (train / ".git").mkdir()
    (directory / "pets" / ".cache").mkdir()
    (directory / "elsewhere").mkdir()
    shutil.move(train / "cow" / "2.png", directory / "elsewhere")
    (train / "cow" / "linked").symlink_to(directory / "elsewhere")
    records = _open(directory).train
    assert records.labels["label"].tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert [records.name(i).removeprefix(f"{train}/bee/") for i in range(3, 7)] == [
        *("0.png", "1.png", "2.png", "garden/more/x.JPEG"),
    ]
    assert np.array_equal(records.read(9), pixels["train"][8])


def test_records_are_the_same_in_another_process_and_need_no_jax_there(folder):
    directory, pixels = folder
    stored = directory / "records.pickle"
    records = _open(directory).train
    assert records.labels["label"].shape == (9,)
    stored.write_bytes(pickle.dumps(records))
    program = f"""
import pickle, sys
records = pickle.loads(open({str(stored)!r}, "rb").read())
assert "labels" not in vars(records)
print(records.read(8).tolist(), records.labels["label"].tolist())
import sire_jax.data.stream
assert not {{"jax", "grain", "tensorflow_datasets"}} & set(sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout.decode() == f"{pixels['train'][8].tolist()} {LABELS['train']}\n"


# ---- Folders that are not what they should be.


def test_a_missing_folder_is_refused_with_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        _open(tmp_path, "folder:cats")
    assert f"no image folder {tmp_path}/cats; an image folder is <folder>/" in str(raised.value)
    assert "--config.data.dir=DIR" in str(raised.value)
    with pytest.raises(ValueError, match="'folder:' names no folder; write folder:my_images"):
        _open(tmp_path, "folder:")


def test_a_missing_split_is_refused_with_those_that_there_are(folder):
    with pytest.raises(ValueError, match=r"pets has no split 'val', only \['test', 'train'\]"):
        _open(folder[0], "folder:pets", ("train",), "val")


def test_a_split_without_classes_is_refused(folder):
    shutil.rmtree(folder[0] / "pets" / "test")
    for i in range(3):
        write(folder[0] / "pets" / "test" / f"{i}.jpg", b"")
    message = r"pets/test has no directories of classes, and 3 images outside of any; an image fold"
    with pytest.raises(ValueError, match=message):
        _open(folder[0])


def test_a_split_with_other_classes_is_refused_with_both_differences(folder):
    (folder[0] / "pets" / "test" / "bee").rename(folder[0] / "pets" / "test" / "wasp")
    message = r"test has other classes than .* \(1 more: 'wasp'; 1 missing: 'bee'\); no other split"
    with pytest.raises(ValueError, match=message):
        _open(folder[0])


@pytest.mark.parametrize("emptied", [True, False])
def test_a_class_without_test_images_is_warned_of(folder, emptied):
    shutil.rmtree(folder[0] / "pets" / "test" / "bee")
    if emptied:
        (folder[0] / "pets" / "test" / "bee").mkdir()
    with pytest.warns(UserWarning, match="1 of 3 classes with no test image: 'bee'; none of them"):
        dataset = _open(folder[0])
    assert dataset.test.labels["label"].tolist() == [0, 0, 2, 2]
    assert dataset.classes == {"label": 3}


def test_a_class_without_training_images_is_refused(folder):
    for path in (folder[0] / "pets" / "train" / "bee").iterdir():
        path.unlink()
    message = r"pets/train has 1 of 3 classes without training images: 'bee'; add images, or remove"
    with pytest.raises(ValueError, match=message):
        _open(folder[0])


def test_a_folder_without_images_is_refused(folder):
    for path in (folder[0] / "pets" / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"pets/train has no images; files count .* \.bmp, .*webp"):
        _open(folder[0])


def test_a_single_file_is_no_set(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "pets" / split / "ape" / "0.png", picture(0))
    message = r"pets/train has 1 image\(s\) of one class, 'ape'; .* at least two classes"
    with pytest.raises(ValueError, match=message):
        _open(tmp_path)


def test_a_class_with_a_single_training_image_is_warned_of(folder):
    for i in (1, 2):
        (folder[0] / "pets" / "train" / "cow" / f"{i}.png").unlink()
    with pytest.warns(UserWarning, match=r"1 of 3 classes with a single training image: 'cow'"):
        dataset = _open(folder[0])
    assert len(dataset.train) == 7
    with pytest.raises(ValueError, match="class 2 has only 1 training images"):
        Images(validation_per_class=1).draw(dataset, 0)


def test_files_that_are_not_named_like_images_are_left_out_with_one_warning(folder):
    for i, name in enumerate(("ape", "bee")):
        write(folder[0] / "pets" / "train" / name / f"notes{i}.txt", b"")
    write(folder[0] / "pets" / "test" / "cow" / "notes", b"")
    with pytest.warns(UserWarning, match="left out") as warned:
        dataset = _open(folder[0])
    assert len(dataset.train) == 9
    (message,) = [str(each.message) for each in warned]
    assert f"{folder[0]}/pets has 3 files that are left out" in message
    assert message.endswith(f"the first is {folder[0]}/pets/train/ape/notes0.txt.")


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_is_named_with_the_cause(folder, kind):
    content, cause = DAMAGED[kind]
    path = folder[0] / "pets" / "train" / "bee" / "1.png"
    path.write_bytes(content)
    with pytest.raises(DamagedImageError, match=rf"^{path} is damaged: .*({cause})"):
        _open(folder[0]).train.read(4)


def test_an_image_that_is_gone_is_named(folder):
    records = _open(folder[0]).train
    (folder[0] / "pets" / "train" / "bee" / "1.png").unlink()
    with pytest.raises(DamagedImageError, match=r"bee/1.png is damaged: .*No such file"):
        records.read(4)


def test_a_link_to_nothing_is_a_damaged_image(folder):
    path = folder[0] / "pets" / "train" / "bee" / "1.png"
    path.unlink()
    path.symlink_to("/nowhere/1.png")
    message = f"{path} is damaged: it is a link to /nowhere/1.png, where there is nothing."
    with pytest.raises(DamagedImageError) as raised:
        _open(folder[0]).train.read(4)
    assert str(raised.value) == message
    with pytest.raises(DamagedImageError, match=message):
        _load(folder[0])


# ---- Links, and what systems leave in directories.


def test_what_systems_leave_in_directories_is_no_class_and_no_image(folder):
    train = folder[0] / "pets" / "train"
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "lost+found"):
        write(train / name / "0.png", picture(0))
        write(train / "bee" / name / "0.png", picture(0))
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        write(train / "bee" / name, b"")
    assert _open(folder[0]).train.labels["label"].tolist() == LABELS["train"]


def test_a_directory_counts_once_however_links_lead_to_it(folder):
    train = folder[0] / "pets" / "train"
    (train / "bee" / "loop").symlink_to(train)
    (train / "bee" / "itself").symlink_to(train / "bee" / "itself")
    write(train / "bee" / "more" / "a.png", picture(0))
    (train / "bee" / "again").symlink_to(train / "bee" / "more")
    with pytest.warns(UserWarning, match="1 files that are left out"):
        records = _open(folder[0]).train
    names = [records.name(i).removeprefix(f"{train}/") for i in range(len(records))]
    assert names[3:7] == ["bee/0.png", "bee/1.png", "bee/2.png", "bee/more/a.png"]
    assert len(names) == 10


@pytest.mark.parametrize("linked", [False, True])
def test_a_link_to_what_is_above_a_split_adds_no_images(folder, linked):
    directory, _ = folder
    train = directory / "pets" / "train"
    write(directory / "other" / "ape" / "horse.png", picture(0))
    write(directory / "elsewhere" / "horse.png", picture(0))
    if linked:
        train.rename(directory / "elsewhere" / "train")
        train.symlink_to(directory / "elsewhere" / "train")
    for i, above in enumerate([directory / "pets", *(directory / "pets").parents]):
        (train / "bee" / f"loop_{i}").symlink_to(above)
    (train / "bee" / "elsewhere").symlink_to(train.resolve().parent)
    assert _open(directory).train.labels["label"].tolist() == LABELS["train"]


def test_a_class_that_is_a_link_to_what_is_above_it_is_refused(folder):
    train = folder[0] / "pets" / "train"
    shutil.rmtree(train / "bee")
    (train / "bee").symlink_to("..")
    message = rf"train/bee is a link to {folder[0]}/pets, which has the split itself in it; mend"
    with pytest.raises(ValueError, match=message):
        _open(folder[0])


def test_an_image_of_two_classes_is_refused(folder):
    train = folder[0] / "pets" / "train"
    (train / "bee" / "more").symlink_to(train / "cow")
    message = "bee/more leads to images of the class 'cow', which would be 'bee' at the same time"
    with pytest.raises(ValueError, match=message):
        _open(folder[0])
    (train / "bee" / "more").unlink()
    shutil.rmtree(train / "cow")
    (train / "cow").symlink_to(train / "bee")
    with pytest.raises(ValueError, match="cow leads to images of the class 'bee'"):
        _open(folder[0])


def test_training_images_are_no_test_images_by_another_name(folder):
    shutil.rmtree(folder[0] / "pets" / "test")
    (folder[0] / "pets" / "test").symlink_to(folder[0] / "pets" / "train")
    message = (
        r"test/ape leads to images of the split 'train', which would be those of 'test' at the same"
        r" time; an image is in one split\. Share one out instead: 'train\[:80%\]'"
    )
    with pytest.raises(ValueError, match=message):
        _open(folder[0])


@pytest.mark.parametrize(
    ("link", "target", "splits"),
    [
        ("test/cow", "train/cow", ()),
        ("train/cow", "test/cow", ()),
        ("test/bee/more", "train/cow", ()),
        ("train/bee/more", "test", ()),
        ("more/ape", "train/ape", (("train", "more"), "test")),
    ],
)
def test_no_directory_is_in_two_splits(folder, link, target, splits):
    write_folder(folder[0] / "pets", {"more": 1})
    pets = folder[0] / "pets"
    shutil.rmtree(pets / link, ignore_errors=True)
    (pets / link).symlink_to(pets / target)
    with pytest.raises(ValueError, match=r"leads to images of the split '.*an image is in one spl"):
        _open(folder[0], "folder:pets", *splits)


@pytest.mark.parametrize("hard", [False, True])
def test_files_that_are_trained_on_twice_or_measured_are_said(folder, hard):
    directory, _ = folder
    for split, names in (("train", ("a", "b")), ("test", ("b", "c"))):
        for name in names:
            write(directory / "pool" / f"{name}.png", picture(0))
            path = directory / "pets" / split / "bee" / f"{name}.png"
            (path.hardlink_to if hard else path.symlink_to)(directory / "pool" / f"{name}.png")
    message = (
        "pets has 1 of 8 test images that are the same files as training images, so that they"
        f" measure what was learnt by heart; the first is {directory}/pets/test/bee/b.png"
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        _open(directory)
    (directory / "pets" / "test" / "bee" / "b.png").unlink()
    (directory / "pets" / "test" / "bee" / "lost.png").symlink_to("/nowhere")
    (directory / "pets" / "train" / "bee" / "lost.png").symlink_to("/nowhere")
    _open(directory)  # Without a warning, which would be an error.
    path = directory / "pets" / "more" / "cow" / "b.png"
    write_folder(directory / "pets", {"more": 1})
    (path.hardlink_to if hard else path.symlink_to)(directory / "pool" / "b.png")
    message = (
        "pets has 1 of 16 training images that are the same files as training images, so that what"
        f" is held out for validation may be trained on; the first is {path}"
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        _open(directory, "folder:pets", ("train", "more"))


def test_a_class_that_is_a_link_to_nothing_is_refused(folder):
    # Elsewhere it doesn't matter.
    (folder[0] / "pets" / "newest").symlink_to("/nowhere")
    assert len(_open(folder[0]).train) == 9
    (folder[0] / "pets" / "train" / "yak").symlink_to("/nowhere/yak")
    with pytest.raises(ValueError, match="train/yak is a link to /nowhere/yak, where there is no"):
        _open(folder[0])


def test_names_are_the_same_whichever_way_their_accents_are_written(folder):
    apart, composed = "be\u0301e", "b\u00e9e"
    for split, name in (("train", composed), ("test", apart)):
        (folder[0] / "pets" / split / "bee").rename(folder[0] / "pets" / split / name)
    dataset = _open(folder[0])
    assert dataset.names == {"label": ("ape", composed, "cow")} or dataset.names == {
        "label": ("ape", "cow", composed)
    }
    assert sorted(dataset.test.labels["label"].tolist()) == LABELS["test"]
    (folder[0] / "pets" / "train" / apart).mkdir()
    with pytest.raises(ValueError, match=rf"two directories '{composed}', whose accents are"):
        _open(folder[0])


def test_file_names_of_any_bytes_are_read_and_can_be_printed(folder):
    path = folder[0] / "pets" / "train" / "bee" / os.fsdecode(b"$a$\n\xff.png")
    write(path, picture(7))
    records = _open(folder[0]).train
    (place,) = (i for i in range(10) if "$a$" in records.name(i))
    assert records.name(place).endswith("bee/$a$\\n\\udcff.png")
    assert np.array_equal(records.read(place), picture(7))
    assert len(_load(folder[0], folder[0] / "cache").train) == 10


# ---- Shares of splits.


def test_shares_of_a_folder_have_each_image_once_and_as_much_of_each_class(tmp_path):
    write_folder(tmp_path / "pets", {"train": 10})
    dataset = _open(tmp_path, "folder:pets", ("train[:80%]",), "train[80%:]")
    names = [{part.name(i) for i in range(len(part))} for part in (dataset.train, dataset.test)]
    assert [len(each) for each in names] == [24, 6]
    assert len(names[0] | names[1]) == 30
    for part, number in ((dataset.train, 8), (dataset.test, 2)):
        assert np.bincount(part.labels["label"]).tolist() == [number] * 3
        assert (np.diff(part.labels["label"]) >= 0).all()
    # By name: the same wherever they lie.
    shutil.move(tmp_path / "pets", tmp_path / "moved")
    moved = _open(tmp_path, "folder:moved", ("train[:80%]",), "train[-20%:]").test
    assert {moved.name(i).replace("moved", "pets") for i in range(6)} == names[1]
    counted = _open(tmp_path, "folder:moved", ("train[:5]", "train[5:24]"), "train[24:]")
    assert (len(counted.train), len(counted.test)) == (24, 6)
    assert list(counted.test.listing()) == list(moved.listing())


def test_a_folder_of_classes_without_splits_can_be_shared_out(tmp_path):
    write_folder(tmp_path / "all", {"pets": 5})
    with pytest.raises(ValueError, match=r"no split 'train', only \['ape', .*'all\[80%:\]'"):
        _open(tmp_path / "all")
    dataset = _open(tmp_path / "all", "folder:pets", ("all[:80%]",), "all[80%:]")
    assert (len(dataset.train), len(dataset.test)) == (12, 3)
    assert dataset.names == {"label": CLASSES}
    loaded = sources.load(
        "folder:pets", str(tmp_path / "all"), selection=Selection(("all[:80%]",), "all[80%:]")
    )
    assert np.array_equal(loaded.test.image[1], dataset.test.read(1))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ((("train[:80%]",), "train[70%:]"), "'train.:80%.' and 'train.70%:.' of .*have 1 images"),
        ((("train", "test[:1]"), "test"), "'test.:1.' and 'test' of .* have 1 images in common"),
        ((("train[:10]",), "test"), "reaches beyond the 9 images of 'train'.* in 0..9, or 0%"),
        ((("train[:110%]",), "test"), "reaches beyond the 9 images"),
        ((("train[5:5]",), "test"), "'train.5:5.' has no images: of the 9 of 'train' .* 5 up to 5"),
        ((("train",), "test[:1%]"), "'test.:1%.' has no images: of the 6"),
        (
            (("train[80]",), "test"),
            r"train_splits: 'train\[80\]' is no split; write its name, such",
        ),
        ((("train",), "test[:8%"), r"test_split: 'test\[:8%' is no split"),
        ((("train[:-3.5]",), "test"), "is no split; write its name"),
    ],
)
def test_shares_that_make_no_sense_are_refused(folder, splits, message):
    with pytest.raises(ValueError, match=message):
        _open(folder[0], "folder:pets", *splits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "no data source 'digits' to stream.*--config.data.feed=device"),
        ("tdfs:mnist", "no data source 'tdfs:mnist' to stream. Did you mean 'tfds:<set>'"),
    ],
)
def test_what_can_not_be_streamed_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        open_records(name, str(tmp_path))


def test_images_of_two_channels_are_refused(folder):
    with pytest.raises(ValueError, match=r"decoded to 3 channels \(colour\) or 1 \(grey\); 2 are"):
        open_records("folder:pets", str(folder[0]), channels=2)


# ---- Tiny ImageNet's layout.


@pytest.fixture
def tiny(tmp_path):
    """Two validation images, ``val_0`` of a cow and ``val_1`` of an ape, and no bee."""
    for i, name in enumerate(CLASSES):
        for k in range(2):
            write(tmp_path / "tiny" / "train" / name / "images" / f"{name}_{k}.JPEG", picture(i))
        write(tmp_path / "tiny" / "train" / name / f"{name}_boxes.txt", b"0 0 1 1")
    for i in range(3):
        write(tmp_path / "tiny" / "val" / "images" / f"val_{i}.JPEG", picture(10 + i))
    lines = [f"val_{i}.JPEG\t{name}\t0\t0\t5\t3" for i, name in enumerate(("cow", "ape", "bee"))]
    (tmp_path / "tiny" / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_layout_of_tiny_imagenet_is_understood(tiny):
    dataset = _open(tiny, "folder:tiny", ("train",), "val")
    assert dataset.train.labels["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels["label"].tolist() == [2, 0, 1]
    assert dataset.test.name(1) == f"{tiny}/tiny/val/images/val_1.JPEG"
    assert np.array_equal(dataset.test.read(1), picture(11))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_3.JPEG\tdog\t0", r"line 4, is 'val_3.JPEG\\tdog\\t0'; .*one of the 3 classes of tra"),
        (
            "val_3.JPEG ape",
            r"line 4, is 'val_3.JPEG ape'; it should be the name of an image, a tab",
        ),
        ("val_3.JPEG\tape", r"names 1 images that are not there: 'images/val_3.JPEG'; mend"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(tiny, line, message):
    with (tiny / "tiny" / "val" / "val_annotations.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        _open(tiny, "folder:tiny", ("train",), "val")


def test_images_without_annotations_are_refused(tiny):
    write(tiny / "tiny" / "val" / "images" / "val_9.JPEG", picture(0))
    with pytest.raises(ValueError, match=r"has no line for 1 images: 'images/val_9.JPEG'; mend"):
        _open(tiny, "folder:tiny", ("train",), "val")


# ---- A folder in memory.


def _load(directory, cache="", resize=0, channels=3, **settings):
    selection = Selection(**settings)
    return sources.load("folder:pets", str(directory), str(cache), selection, resize, channels)


def test_a_folder_is_loaded_into_memory_as_its_records_are_read(folder, tmp_path, monkeypatch):
    directory, pixels = folder
    dataset = _load(directory, tmp_path / "cache")
    assert dataset.classes == {"label": 3}
    assert dataset.names == {"label": CLASSES}
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        assert np.array_equal(source.image, np.stack(pixels[split]))
        assert source.labels["label"].tolist() == LABELS[split]
        assert len(source) == len(LABELS[split])

    def fail(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(images, "decode", fail)
    again = _load(directory, tmp_path / "cache")
    assert np.array_equal(again.train.image, dataset.train.image)
    # Other choices and other files are decoded.
    for settings in ({"resize": 2}, {"channels": 1}, {"draw_classes": 2}):
        with pytest.raises(DamagedImageError, match="an image was decoded"):
            _load(directory, tmp_path / "cache", **settings)
    write(directory / "pets" / "train" / "ape" / "9.png", picture(0))
    with pytest.raises(DamagedImageError, match="an image was decoded"):
        _load(directory, tmp_path / "cache")


def test_drawn_classes_of_a_folder_are_loaded_alone(folder):
    directory, pixels = folder
    drawn = draw_classes(3, 2, 0).tolist()
    dataset = _load(directory, draw_classes=2)
    kept = [i for i, label in enumerate(LABELS["train"]) if label in drawn]
    assert np.array_equal(dataset.train.image, np.stack(pixels["train"])[kept])
    assert dataset.train.labels["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.names == {"label": tuple(CLASSES[i] for i in drawn)}


def test_images_of_several_sizes_are_refused_or_scaled(folder):
    write(folder[0] / "pets" / "train" / "ape" / "0.png", picture(0, 9, 5))
    message = r"9 images of 2 sizes, such as \[\(4, 6, 3\), \(9, 5, 3\)\]; .*config.data.resize="
    with pytest.raises(ValueError, match=message):
        _load(folder[0])
    scaled = _load(folder[0], resize=3).train.image
    assert scaled.shape == (9, 3, 3, 3)
    square = images.central_square(Image.fromarray(picture(0, 9, 5)), 3)
    assert np.array_equal(scaled[0], np.asarray(square))


def test_grey_images_can_be_asked_for(folder):
    directory, pixels = folder
    grey = _load(directory, channels=1).train.image
    assert grey.shape == (9, 4, 6, 1)
    assert np.array_equal(
        grey[0, ..., 0], np.asarray(Image.fromarray(pixels["train"][0], "RGB").convert("L"))
    )


def test_a_damaged_image_of_a_folder_is_not_loaded(folder):
    write(folder[0] / "pets" / "test" / "cow" / "1.png", b"text")
    with pytest.raises(DamagedImageError, match=r"test/cow/1.png is damaged: its 4 bytes are no"):
        _load(folder[0])


def test_damaged_images_are_skipped_and_a_copy_remembers_them(folder, tmp_path):
    path = folder[0] / "pets" / "train" / "bee" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(b"text")
    cache, message = tmp_path / "cache", f"{path} is damaged: its 4 bytes are no image of a known"
    for _ in ("decoded", "copied"):
        dataset = _skip(folder[0], cache)
        assert len(dataset.train) == 8
        assert np.array_equal(dataset.train.image[4], folder[1]["train"][5])
        assert dataset.train.labels["label"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
        assert [each.startswith(message) for each in dataset.skipped] == [True]
        assert len(list(dataset.train.listing())) == 8
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(DamagedImageError, match=f"{message}.*config.data.damaged=skip"):
        _load(folder[0], cache)
    # Mended within the same second and of the same size: what was skipped is tried again.
    status = path.stat()
    path.write_bytes(b"text" + whole[4:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(_skip(folder[0], cache).train) == 8
    for each in (folder[0] / "pets" / "train" / "bee").iterdir():
        each.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"All training images of 1 classes .* damaged: 'bee'"):
        _skip(folder[0], cache)


def _skip(directory, cache):
    return sources.load("folder:pets", str(directory), str(cache), damaged="skip")


def test_an_image_that_could_not_be_read_for_a_time_is_not_skipped_for_ever(
    folder, tmp_path, monkeypatch
):
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *_: (_ for _ in ()).throw(OSError("flaky")))
    with pytest.raises(DamagedImageError, match="All 9 images of folder:pets train are damaged"):
        _skip(folder[0], tmp_path / "cache")
    flaky = encoded(folder[1]["train"][4])

    def fail_once(content, channels):
        if content == flaky:
            raise OSError("flaky")
        return decode(content, channels)

    monkeypatch.setattr(images, "decode", fail_once)
    assert len(_skip(folder[0], tmp_path / "cache").train) == 8
    monkeypatch.undo()
    assert len(_skip(folder[0], tmp_path / "cache").train) == 9


def test_a_link_that_leads_elsewhere_is_decoded_again(folder, tmp_path):
    train, cache = folder[0] / "pets" / "train", tmp_path / "cache"
    pool = tmp_path / "pool"
    for name in ("ape", "bee"):
        write(pool / f"{name}.png", (train / name / "0.png").read_bytes())
        (train / name / "0.png").unlink()
        (train / name / "0.png").symlink_to(pool / f"{name}.png")
    assert np.array_equal(_load(folder[0], cache).train.image[0], folder[1]["train"][0])
    (train / "ape" / "0.png").rename(tmp_path / "kept")
    (train / "bee" / "0.png").rename(train / "ape" / "0.png")
    (tmp_path / "kept").rename(train / "bee" / "0.png")
    moved = _load(folder[0], cache).train.image
    assert np.array_equal(moved[0], folder[1]["train"][3])
    assert np.array_equal(moved[3], folder[1]["train"][0])
    # A class by another name is another label.
    for split in ("train", "test"):
        (folder[0] / "pets" / split / "cow").rename(folder[0] / "pets" / split / "yak")
    assert _load(folder[0], cache).names == {"label": ("ape", "bee", "yak")}


# ---- Prepared sets.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set of images of several sizes, whose labels are their width mod 3."""
    root = tmp_path_factory.mktemp("prepared")
    content = [(encoded(picture(i, 4, 6 + i)), (6 + i) % 3) for i in range(7)]
    prepare_set(root, {"train": content, "extra": content[:3], "test": content[:4]})
    return str(root)


def _check_small(records, number):
    widths = set()
    for i in range(number):
        image, labels = records.example(i)
        assert labels == {"label": image.width % 3, "odd": image.width % 3 % 2}
        assert np.array_equal(images.to_array(image), picture(image.width - 6, 4, image.width))
        assert labels == {kind: values[i] for kind, values in records.labels.items()}
        widths.add(image.width)
    assert widths == set(range(6, 6 + number))


def test_a_prepared_set_of_any_sizes_is_read_with_all_its_labels(prepared):
    dataset = open_records("tfds:small", prepared)
    assert dataset.classes == {"label": 3, "odd": 2}
    assert dataset.names == {"label": CLASSES, "odd": ("0", "1")}
    assert (len(dataset.train), len(dataset.test)) == (7, 4)
    _check_small(dataset.train, 7)
    _check_small(pickle.loads(pickle.dumps(dataset.test)), 4)
    assert dataset.train.name(5) == "record 5 of small train"
    both = open_records("tfds:small", prepared, selection=Selection(("test", "extra"), "train"))
    assert len(both.train) == 7
    assert both.train.name(5) == "record 1 of small extra"


def test_records_read_together_are_those_read_one_by_one(prepared):
    both = open_records("tfds:small", prepared, selection=Selection(("test", "extra"), "train"))
    for indices in ([3, 0, 2], [2, 5, 6, 0], [4]):
        # Of one split, of two, of one image.
        found = both.train.examples(indices)
        for index, (image, labels) in zip(indices, found, strict=True):
            alone, known = both.train.example(index)
            assert np.array_equal(images.to_array(image), images.to_array(alone))
            assert labels == known
    (split, _) = both.train.splits
    assert split.ahead([1, 0]) == [split.record(1), split.record(0)]
    # Where something is wrong with one of them each is read alone, which tells what.
    assert split.ahead([1, 99]) == [None, None]


def test_a_prepared_set_of_any_sizes_is_loaded_scaled(prepared):
    dataset = sources.load("tfds:small", prepared, resize=2)
    records = open_records("tfds:small", prepared).train
    squares = [images.central_square(records.example(i)[0], 2) for i in range(7)]
    assert np.array_equal(dataset.train.image, np.stack([np.asarray(each) for each in squares]))
    assert np.array_equal(dataset.train.labels["odd"], records.labels["odd"])


@pytest.fixture
def unread(monkeypatch):
    """Fails where the records of a set are read."""

    def fail(*_):
        raise AssertionError("records were read")

    monkeypatch.setattr("sire_jax.data.prepared.PreparedSplit._records", property(fail))


def test_labels_are_read_once_and_only_if_they_are_needed(prepared, tmp_path, request):
    first = open_records("tfds:small", prepared, str(tmp_path)).train.labels
    (copy,) = tmp_path.iterdir()
    assert copy.name.startswith("small-1.0.0-labels-train-")
    request.getfixturevalue("unread")
    dataset = open_records("tfds:small", prepared, str(tmp_path))
    assert dataset.train.labels.keys() == first.keys() == {"label", "odd"}
    assert all(np.array_equal(dataset.train.labels[kind], first[kind]) for kind in first)
    assert first["label"].dtype == np.int32
    # Without validation images nothing asks for them.
    draw = Images().draw(open_records("tfds:small", prepared), 0)
    assert (draw.train.tolist(), draw.test.tolist()) == (list(range(7)), list(range(4)))
    with pytest.raises(AssertionError, match="records were read"):
        _ = dataset.test.labels


def test_drawn_classes_of_a_prepared_set_are_chosen_by_label(prepared, monkeypatch):
    drawn = draw_classes(3, 2, 0).tolist()
    decoded = []
    monkeypatch.setattr(images, "decode", lambda *_: decoded.append(1))
    dataset = open_records("tfds:small", prepared, selection=Selection(draw_classes=2))
    assert not decoded
    monkeypatch.undo()
    assert dataset.classes == {"label": 2}
    expected = sorted(w for w in range(6, 13) if w % 3 in drawn)
    found = [dataset.train.example(i) for i in range(len(dataset.train))]
    assert sorted(image.width for image, _ in found) == expected
    assert all(labels == {"label": drawn.index(im.width % 3)} for im, labels in found)
    assert dataset.train.labels["label"].tolist() == [labels["label"] for _, labels in found]


def test_a_label_outside_of_the_classes_is_named(tmp_path):
    content = [(encoded(picture(0)), label) for label in (0, 7, -1)]
    prepare_set(tmp_path, {"train": content, "test": content[:1]})
    records = open_records("tfds:small", str(tmp_path)).train
    messages = []
    for i in range(3):
        try:
            records.read(i)
        except DamagedImageError as error:
            messages.append(str(error).partition(" has ")[2])
    outside = "which is outside the 3 classes 0..2."
    assert sorted(messages) == [f"the label -1, {outside}", f"the label 7, {outside}"]


def test_labels_that_are_allowed_although_they_are_no_class_pass(tmp_path):
    content = [(encoded(picture(i)), label) for i, label in enumerate((0, 7, -1, 1))]
    prepare_set(tmp_path, {"train": content, "test": content[:1]})
    ignored = {"label": (-1, 7)}
    records = open_records("tfds:small", str(tmp_path), ignored=ignored).train
    assert sorted(records.example(i)[1]["label"] for i in range(4)) == [-1, 0, 1, 7]
    loaded = sources.load("tfds:small", str(tmp_path), ignored=ignored).train
    assert sorted(loaded.labels["label"].tolist()) == [-1, 0, 1, 7]
    message = r"train has the label (7|-1), which is outside the 3 classes 0\.\.2"
    with pytest.raises(DamagedImageError, match=message):
        sources.load("tfds:small", str(tmp_path), ignored={"label": ()})
    assert len(sources.load("tfds:small", str(tmp_path), damaged="skip").train) == 2


def test_shares_of_a_prepared_set_are_those_of_its_library(prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(f"{prepared}/small/1.0.0")
    for share in ("train[:60%]", "train[-3:]", "train[2:5]"):
        other = "train[60%:]" if share == "train[:60%]" else "test"
        dataset = open_records("tfds:small", prepared, selection=Selection((share,), other))
        expected = builder.as_data_source(split=share)
        assert len(dataset.train) == len(expected)
        for i in range(len(expected)):
            assert np.array_equal(dataset.train.read(i), expected[i]["image"])
        assert dataset.train.labels["label"].tolist() == [each["label"] for each in expected]


def test_a_set_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'small' is not prepared in {tmp_path}"):
        open_records("tfds:small", str(tmp_path))


def test_records_and_sources_make_data_sets():
    dataset = Dataset(Records((), {"label": 2}, 3), Records((), {"label": 2}, 3), {"label": 2})
    assert len(dataset.train) == 0
    assert dataset.names == {"label": ("0", "1")}


# ---- Decoding.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright(kind):
    upright = np.zeros((40, 20, 3), np.uint8)
    upright[:20] = 200
    for orientation, turned in (
        (1, upright),
        (3, np.rot90(upright, 2)),
        (6, np.rot90(upright, 1)),
        (8, np.rot90(upright, -1)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(np.ascontiguousarray(turned), kind, exif=exif)
        for channels in (3, 1):
            found = images.to_array(images.decode(content, channels)).astype(int)
            assert found.shape == (40, 20, channels)
            assert np.abs(found - upright[..., :channels]).max() < 12


def test_an_orientation_that_can_not_be_read_is_none():
    content = encoded(picture(0), "JPEG", exif=b"Exif\0\0nothing of the kind")
    assert images.decode(content, 3).size == (6, 4)


def test_images_of_every_mode_are_converted():
    rgb = picture(0, 3, 5)
    whole = Image.fromarray(rgb)
    palette = whole.quantize(4)
    palette.info["transparency"] = bytes([0, 255, 255, 255])
    alpha = whole.copy()
    alpha.putalpha(7)
    for image, expected in (
        (whole.convert("L"), whole.convert("L").convert("RGB")),
        (whole.convert("1"), whole.convert("1").convert("RGB")),
        (alpha, whole),
        (alpha.convert("LA"), whole.convert("L").convert("RGB")),
        (palette, palette.convert("RGBA").convert("RGB")),
    ):
        content = _saved(image, "PNG")
        assert np.array_equal(images.to_array(images.decode(content, 3)), np.asarray(expected))
        grey = images.to_array(images.decode(content, 1))
        assert grey.shape == (3, 5, 1)
    inks = Image.new("CMYK", (5, 3), (0, 0, 0, 255))
    assert np.abs(images.to_array(images.decode(_saved(inks, "JPEG"), 3))).max() < 3


def _saved(image, kind):
    written = io.BytesIO()
    image.save(written, kind)
    return written.getvalue()


def test_more_than_8_bits_a_channel_are_refused():
    deep = Image.fromarray(np.full((3, 5), 40_000, np.uint16))
    with pytest.raises(ValueError, match=r"more than 8 bits a channel \(mode I;16\)"):
        images.decode(_saved(deep, "PNG"), 1)


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch):
    content = encoded(picture(0, 20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    # Pillow itself warns, and refuses twice as many.
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="30 x 20"):
        images.decode(content, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert images.decode(content, 3).size == (30, 20)


# ---- Scaling.


def test_the_central_square_is_the_middle_of_the_scaled_image():
    # Columns of 0, then 4 columns of 100 in the middle, then of 0: the square is the middle.
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 100
    assert (np.asarray(images.central_square(Image.fromarray(wide), 4)) == 100).all()
    tall = np.ascontiguousarray(wide.swapaxes(0, 1))
    assert (np.asarray(images.central_square(Image.fromarray(tall), 4)) == 100).all()
    # Of the side it has, a square stays as it is.
    square = picture(0, 5, 5)
    assert np.array_equal(np.asarray(images.central_square(Image.fromarray(square), 5)), square)


def test_scaling_down_is_antialiased():
    checkered = np.indices((64, 64)).sum(0) % 2 * 200
    scaled = images.central_square(Image.fromarray(checkered.astype(np.uint8)), 8)
    assert np.abs(np.asarray(scaled).astype(int) - 100).max() <= 2


def test_random_boxes_have_the_areas_and_shapes_that_they_should():
    generator = np.random.default_rng(0)
    width, height = 1200, 1000
    boxes = np.array([images.random_box(width, height, generator) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert (boxes >= 0).all()
    assert right.max() <= width
    assert bottom.max() <= height
    w, h = right - left, bottom - top
    area, ratio = w * h / (width * height), w / h
    assert 0.079 < area.min() < 0.09
    assert area.max() <= 1
    assert 0.74 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.34
    # Uniform where all shapes fit: below half of the area as many in each tenth.
    counts = np.histogram(area, bins=np.linspace(0.1, 0.5, 5))[0]
    assert counts.min() > 0.8 * counts.max()
    # Wide and tall ones are as likely, as are places left and right.
    small = area < 0.5
    assert np.median(np.log(ratio[small])) == pytest.approx(0, abs=0.02)
    assert np.median(left[small] / (width - w[small])) == pytest.approx(0.5, abs=0.03)
    assert np.median(top[small] / (height - h[small])) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("size", "box"),
    [((900, 30), (430, 0, 470, 30)), ((30, 900), (0, 430, 30, 470)), ((1, 1), (0, 0, 1, 1))],
)
def test_where_no_box_fits_it_is_the_largest_of_an_allowed_shape(size, box):
    class Largest:
        def uniform(self, low, high):
            return high

        def integers(self, low, high):
            return low

    assert images.random_box(*size, Largest()) == box


def test_a_random_square_is_the_scaled_box():
    image = Image.fromarray(picture(0, 40, 60))
    made = images.random_square(image, 8, np.random.default_rng(3))
    box = images.random_box(60, 40, np.random.default_rng(3))
    expected = image.resize((8, 8), Image.Resampling.BILINEAR, box=box)
    assert np.array_equal(np.asarray(made), np.asarray(expected))
