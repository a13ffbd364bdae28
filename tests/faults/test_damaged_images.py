"""A damaged image in a stream is named in the error, or skipped and counted."""

import numpy as np
import pytest
from pictured import DAMAGED, encoded, flipped, picture, prepare_set, write_folder
from PIL import Image

from sire_jax.data.images import DamagedImageError
from sire_jax.data.records import open_records
from sire_jax.data.stream import Transform, batches

AS_IT_IS = Transform(shape=(4, 6, 3))
# Two batches of all nine images of the folder, in two orders.
ORDER = np.stack([np.arange(9), np.arange(9)[::-1]]).astype(np.int32)


@pytest.fixture
def damage(tmp_path):
    """Damages images of a folder; returns its records and their pixels."""
    pixels, labels = write_folder(tmp_path / "pets")["train"]

    def write(content, *numbers):
        records = open_records("folder:pets", str(tmp_path)).train
        for i in numbers:
            records.splits[0].path(i).write_bytes(content)
        return records, np.stack(pixels), np.array(labels)

    return write


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_is_named_in_the_error(damage, kind):
    content, cause = DAMAGED[kind]
    records, _, _ = damage(content, 4)
    with pytest.raises(DamagedImageError) as raised:
        list(batches(records, ORDER, AS_IT_IS, (0,)))
    message = str(raised.value)
    assert message.startswith(f"{records.name(4)} is damaged: ")
    assert cause in message
    assert message.endswith("pass over such images: damaged='skip' (--config.data.damaged=skip).")


def test_worker_processes_name_it_too_or_skip_it(damage):
    records, pixels, _ = damage(b"", 4)
    message = f"{records.name(4)} is damaged: it is empty."
    with pytest.raises(DamagedImageError, match=f"^{message}"):
        list(batches(records, ORDER, AS_IT_IS, (0,), workers=1))
    skipped = list(batches(records, ORDER, AS_IT_IS, (0,), workers=1, damaged="skip"))
    assert [each.damaged for each in skipped] == [(message,), (message,)]
    assert np.array_equal(skipped[0].arrays["image"][4], pixels[5])


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_skipped_image_gives_its_place_to_the_next_and_is_counted(damage, kind):
    content, cause = DAMAGED[kind]
    # The last of the first batch, whose next is its first, and two in a row.
    records, pixels, labels = damage(content, 3, 4, 8)
    first, second = batches(records, ORDER, AS_IT_IS, (0,), damaged="skip")
    taken = np.array([0, 1, 2, 5, 5, 5, 6, 7, 0])
    assert np.array_equal(first.arrays["image"], pixels[taken])
    assert np.array_equal(first.arrays["label"], labels[taken])
    assert np.array_equal(first.arrays["intact"], taken == ORDER[0])
    assert [each.partition(" is damaged: ")[0] for each in first.damaged] == [
        records.name(i) for i in (3, 4, 8)
    ]
    assert all(cause in each for each in first.damaged)
    # In the other order the next are others.
    taken = np.array([7, 7, 6, 5, 2, 2, 2, 1, 0])
    assert np.array_equal(second.arrays["image"], pixels[taken])
    assert np.array_equal(second.arrays["intact"], taken == ORDER[1])


def test_other_images_of_the_batch_stay_as_they_are(damage):
    random = Transform(shape=(4, 6, 3), crop=3, random=True)
    records, pixels, _ = damage(b"", 0)
    found = next(batches(records, ORDER, random, (5,), damaged="skip")).arrays["image"]
    records.splits[0].path(0).write_bytes(encoded(pixels[0]))
    whole = next(batches(records, ORDER, random, (5,))).arrays["image"]
    assert np.array_equal(found[1:], whole[1:])
    assert np.array_equal(found[0], whole[1])


def test_a_batch_without_an_intact_image_ends_the_stream_even_if_damage_is_skipped(damage):
    records, _, _ = damage(b"text", *range(3, 6))
    order = np.array([[0, 3, 4, 5]])
    (whole,) = batches(records, order, AS_IT_IS, (0,), damaged="skip")
    assert whole.arrays["intact"].tolist() == [True, False, False, False]
    message = f"^All 3 images of a batch are damaged, .*: {records.name(3)} is damaged: its 4 bytes"
    with pytest.raises(DamagedImageError, match=message):
        list(batches(records, order, AS_IT_IS, (0,), share=slice(1, 4), damaged="skip"))


def test_a_file_that_decodes_to_fill_the_memory_is_damaged(damage, monkeypatch):
    # Twice the limit is what Pillow itself refuses.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 50 // 2 - 1)
    content = encoded(np.zeros((40, 50, 3), np.uint8))
    assert len(content) < 200
    records, _, _ = damage(content, 2)
    with pytest.raises(DamagedImageError, match=f"{records.name(2)} is damaged: .*2000 pixels"):
        list(batches(records, ORDER, AS_IT_IS, (0,)))
    first = next(batches(records, ORDER, AS_IT_IS, (0,), damaged="skip"))
    assert first.arrays["intact"].tolist() == [i != 2 for i in range(9)]


# ---- Records of a prepared set.


@pytest.fixture
def prepared(tmp_path):
    def prepare(content):
        prepare_set(tmp_path, {"train": content, "test": content[:2]})
        return open_records("tfds:small", str(tmp_path)).train

    return prepare


def test_damaged_records_and_labels_are_named_by_their_number(prepared):
    intact = [(encoded(picture(i)), i % 3) for i in range(4)]
    records = prepared([*intact, (b"text", 1), (encoded(picture(9)), 5)])
    (found,) = batches(records, np.arange(6)[None], AS_IT_IS, (0,), damaged="skip")
    assert found.arrays["intact"].sum() == 4
    broken = np.flatnonzero(~found.arrays["intact"])
    assert sorted(each.partition("train ")[2] for each in found.damaged) == [
        "has the label 5, which is outside the 3 classes 0..2.",
        "is damaged: its 4 bytes are no image of a known format.",
    ]
    for each, number in zip(found.damaged, broken, strict=True):
        assert each.startswith(f"record {number} of small train ")
    with pytest.raises(DamagedImageError, match=f"record {broken[0]} of small train"):
        list(batches(records, np.arange(6)[None], AS_IT_IS, (0,)))
    together = records.examples(range(6))
    errors = {i: str(x) for i, x in enumerate(together) if isinstance(x, DamagedImageError)}
    assert list(errors) == broken.tolist()
    assert sorted(errors.values()) == sorted(found.damaged)


def test_a_set_that_can_not_be_opened_is_not_taken_for_damaged_images(prepared, tmp_path):
    records = prepared([(encoded(picture(i)), i % 3) for i in range(4)])
    (tmp_path / "small" / "1.0.0" / "features.json").write_text("{")
    with pytest.raises(Exception, match="Expecting property name") as raised:
        list(batches(records, np.arange(4)[None], AS_IT_IS, (0,), damaged="skip"))
    assert not isinstance(raised.value, DamagedImageError)


def test_a_flipped_bit_in_a_file_of_records_damages_one_of_them(prepared, tmp_path):
    # Noise, so that all of the file is pixels.
    content = [(encoded(picture(i, 40, 60)), i % 3) for i in range(4)]
    records = prepared(content)
    (file,) = tmp_path.glob("small/1.0.0/*train*")
    whole = file.read_bytes()
    place = whole.index(content[2][0]) + 1000
    file.write_bytes(flipped(whole, place))
    transform = Transform((40, 60, 3))
    (found,) = batches(records, np.arange(4)[None], transform, (0,), damaged="skip")
    (number,) = np.flatnonzero(~found.arrays["intact"])
    assert found.damaged[0].startswith(f"record {number} of small train is damaged: Corrupted")
    assert found.arrays["label"][found.arrays["intact"]].tolist().count(2) == 0


def test_a_file_of_records_that_was_cut_ends_the_stream(prepared, tmp_path):
    records = prepared([(encoded(picture(i, 40, 60)), i % 3) for i in range(4)])
    (file,) = tmp_path.glob("small/1.0.0/*train*")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DamagedImageError, match=r"All 4 images of .* damaged, .* record 0"):
        list(batches(records, np.arange(4)[None], Transform((40, 60, 3)), (0,), damaged="skip"))
