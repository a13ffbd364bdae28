import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_jax.data.sources import Dataset, Source
from sire_jax.data.tasks import Images, Pairs, ordered, stratified

few = settings(max_examples=25, deadline=None)
counts = st.lists(st.integers(1, 9), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def _labels(each, seed):
    # Classes 3, 5, 7, …: they need not be 0, 1, 2.
    labels = np.repeat(2 * np.arange(len(each)) + 3, each)
    return np.random.default_rng(seed).permutation(labels)


@few
@given(counts, st.integers(0, 8), seeds)
def test_stratified_parts_are_a_partition_with_exact_counts(each, per_class, seed):
    per_class = min(per_class, min(each) - 1)
    labels = _labels(each, seed)
    rest, taken = stratified(labels, per_class, seed)
    assert rest.dtype == taken.dtype == np.int32
    assert (np.diff(rest) > 0).all()
    assert (np.diff(taken) > 0).all()
    assert sorted([*rest, *taken]) == list(range(len(labels)))
    for kind, number in zip(np.unique(labels), each, strict=True):
        assert (labels[taken] == kind).sum() == per_class
        assert (labels[rest] == kind).sum() == number - per_class
    again = stratified(labels, per_class, seed)
    assert np.array_equal(taken, again[1])
    assert np.array_equal(rest, again[0])


def test_stratified_draws_differ_between_seeds_and_are_fair():
    labels = _labels([10, 10], 0)
    drawn = [stratified(labels, 5, seed)[1] for seed in range(200)]
    assert len({each.tobytes() for each in drawn}) > 190
    # Each of the 20 is taken half of the times: 100 +- 7.
    often = np.bincount(np.concatenate(drawn), minlength=20)
    assert often.min() > 65
    assert often.max() < 135


def test_too_few_of_a_class_are_refused_with_the_largest_possible_number():
    labels = np.array([0] * 9 + [1] * 3 + [2] * 5)
    message = "per_class is 3, but class 1 has only 3 training images; take at most 2"
    with pytest.raises(ValueError, match=message):
        stratified(labels, 3, 0)
    assert len(stratified(labels, 2, 0)[1]) == 6


def _dataset(train=20, test=12, side=2):
    def source(images):
        image = np.arange(images * side * side, dtype=np.uint8).reshape(images, side, side, 1)
        return Source(image, {"label": np.arange(images, dtype=np.int32) % 10})

    return Dataset(source(train), source(test), {"label": 10})


def test_images_are_split_by_class_and_all_test_images_are_used():
    dataset = _dataset()
    whole = Images().draw(dataset, 0)
    assert np.array_equal(whole.train, np.arange(20))
    assert len(whole.validation) == 0
    assert np.array_equal(whole.test, np.arange(12))
    split = Images(validation_per_class=1).draw(dataset, 0)
    assert sorted(split.validation % 10) == sorted(split.train % 10) == list(range(10))
    assert sorted([*split.train, *split.validation]) == list(range(20))
    assert np.array_equal(split.test, np.arange(12))
    other = Images(validation_per_class=1).draw(dataset, 1)
    assert not np.array_equal(split.validation, other.validation)


def test_a_batch_of_images_has_every_kind_of_label():
    source = Source(
        np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1),
        {"label": np.array([4, 5, 6], np.int32), "coarse": np.array([0, 1, 1], np.int32)},
    )
    arrays = {k: jnp.asarray(v) for k, v in Images().prepare(source).items()}
    batch = Images().batch(arrays, jnp.array([2, 0, 2]))
    assert set(batch) == {"image", "label", "coarse"}
    assert batch["label"].tolist() == [6, 4, 6]
    assert batch["coarse"].tolist() == [1, 0, 1]
    assert batch["image"].dtype == jnp.uint8
    first, last = [[0, 1], [2, 3]], [[8, 9], [10, 11]]
    assert batch["image"][:, :, :, 0].tolist() == [last, first, last]


@few
@given(st.integers(0, 6), st.integers(0, 4), st.integers(0, 6), seeds)
def test_no_image_is_in_two_pairs(train, validation, test, seed):
    task = Pairs(train=train, test=test, validation=validation)
    draw = task.draw(_dataset(), seed)
    assert [x.shape for x in draw] == [(train, 2), (validation, 2), (test, 2)]
    assert all(x.dtype == np.int32 for x in draw)
    training = [*draw.train.ravel(), *draw.validation.ravel()]
    assert len(set(training)) == len(training)
    assert set(training) <= set(range(20))
    assert len(set(draw.test.ravel())) == 2 * test
    assert set(draw.test.ravel()) <= set(range(12))
    chex.assert_trees_all_equal(draw, task.draw(_dataset(), seed))


def test_pairs_differ_between_seeds():
    draws = [Pairs(train=10, test=6).draw(_dataset(), seed) for seed in range(20)]
    assert len({draw.train.tobytes() for draw in draws}) == 20
    assert len({draw.test.tobytes() for draw in draws}) == 20


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Pairs(train=11, test=1), "11 training pairs.* need 22 images.* has 20. Take at most 10"),
        (Pairs(train=8, validation=3, test=1), "11 training pairs.* need 22 images"),
        (Pairs(train=1, test=7), "7 test pairs.* need 14 images.* has 12. Take at most 6"),
    ],
)
def test_more_pairs_than_images_are_refused_with_both_numbers(task, message):
    with pytest.raises(ValueError, match=message):
        task.draw(_dataset(), 0)


def test_a_negative_number_of_pairs_is_refused():
    with pytest.raises(ValueError, match="validation"):
        Pairs(train=5, test=1, validation=-2).draw(_dataset(), 0)


def test_downscaled_images_are_means_of_squares_of_pixels():
    image = np.array([[0, 1, 255, 255], [2, 4, 255, 255], [9, 0, 1, 2], [0, 0, 3, 4]], np.uint8)
    image = np.stack([image, 2 * (image // 2)], axis=-1)[None]
    source = Source(image, {"label": np.array([3], np.int32)})
    made = Pairs(downscale=2).prepare(source)
    assert made["image"].dtype == np.float32
    assert made["image"][0, :, :, 0].tolist() == [[1.75, 255.0], [2.25, 2.5]]
    assert made["image"][0, :, :, 1].tolist() == [[1.5, 254.0], [2.0, 2.0]]
    assert made["label"].tolist() == [3]
    assert Pairs(downscale=4).prepare(source)["image"][0, 0, 0, 0] == (4 * 255 + 26) / 16


def test_without_downscaling_images_stay_as_they_are():
    source = _dataset().train
    assert Pairs().prepare(source)["image"].dtype == np.uint8
    assert np.array_equal(Pairs().prepare(source)["image"], source.image)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7)])
def test_sides_that_do_not_divide_are_refused(height, width):
    source = Source(np.zeros((1, height, width, 1)), {"label": np.zeros(1, np.int32)})
    with pytest.raises(ValueError, match=f"Images of {height} x {width} can't be downscaled by 2"):
        Pairs(downscale=2).prepare(source)


def test_squares_without_pixels_are_refused():
    with pytest.raises(ValueError, match="downscale"):
        Pairs(downscale=0).prepare(_dataset().train)


def test_a_batch_of_pairs_is_labelled_by_the_order_of_its_digits():
    image = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    source = Source(image, {"label": np.array([3, 7, 3, 0], np.int32)})
    arrays = {k: jnp.asarray(v) for k, v in Pairs().prepare(source).items()}
    batch = Pairs().batch(arrays, jnp.array([[0, 1], [1, 0], [0, 2], [3, 3], [2, 3]]))
    assert batch["image"].shape == (5, 2, 1, 1, 1)
    assert batch["image"].reshape(5, 2).tolist() == [[0, 1], [1, 0], [0, 2], [3, 3], [2, 3]]
    assert batch["digits"].tolist() == [[3, 7], [7, 3], [3, 3], [0, 0], [3, 0]]
    assert batch["label"].tolist() == [1, 0, 1, 1, 0]
    assert batch["label"].dtype == jnp.int32


def test_equal_digits_are_in_order():
    digits = jnp.array([[a, b] for a in range(10) for b in range(10)])
    assert ordered(digits).tolist() == [int(a <= b) for a in range(10) for b in range(10)]
    assert int(ordered(digits).sum()) == 55


def test_an_order_of_what_is_no_digit_is_unknown():
    assert ordered(jnp.asarray([[3, 5], [-1, 5], [5, -1]])).tolist() == [1, -1, -1]
