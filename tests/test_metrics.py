import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sire_jax import metrics
from sire_jax.metrics import Average, top_k

quickly = settings(max_examples=25, deadline=None)


def test_an_average_by_hand():
    average = Average.of(jnp.asarray([1.0, 2.0, 6.0]))
    assert (float(average.total), float(average.count), float(average.mean())) == (9, 3, 3)
    average = Average.of(jnp.asarray([[True, False], [True, True]]))
    assert (float(average.total), float(average.count), float(average.mean())) == (3, 4, 0.75)


@quickly
@given(st.lists(st.integers(-1000, 1000), min_size=6, max_size=6), st.integers(1, 5))
def test_merged_averages_equal_the_average_of_the_whole_exactly(values, cut):
    # Padded to six with a mask: one shape for all cuts.
    values = jnp.asarray(values, jnp.float32)
    first = jnp.asarray(np.arange(6) < cut, jnp.float32)
    parts = [{"a": Average.of(values, mask)} for mask in (first, 1 - first)]
    merged, whole = metrics.add(*parts)["a"], Average.of(values)
    assert float(parts[0]["a"].count) == cut
    assert float(merged.total) == float(whole.total) == float(np.sum(np.asarray(values)))
    assert float(merged.count) == float(whole.count) == 6
    assert float(merged.mean()) == float(whole.mean())


def test_merging_unequal_parts_is_not_the_mean_of_their_means():
    a, b = ({"a": Average.of(jnp.asarray(v))} for v in ([1.0, 1.0, 1.0], [5.0]))
    assert float(metrics.means(metrics.add(a, b))["a"]) == 2


@pytest.mark.parametrize(
    ("labels", "found"),
    [([0.5], r"float32\[1\]"), ([[0]], r"int32\[1, 1\]"), ([0, 1], r"int32\[2\]")],
)
def test_labels_that_are_not_one_each_are_refused(labels, found):
    with pytest.raises(ValueError, match=rf"Labels are {found}; .* of the logits \[1, 3\]"):
        top_k(jnp.array([[3.0, 0.0, 0.0]]), jnp.array(labels), 1)


def test_a_mask_chooses_examples_with_all_their_positions():
    values = jnp.asarray([[1.0, 2.0], [30.0, 40.0], [5.0, 6.0]])
    average = Average.of(values, jnp.asarray([1.0, 0.0, 1.0]))
    assert (float(average.total), float(average.count), float(average.mean())) == (14, 4, 3.5)


def test_infinite_masked_values_do_not_leak():
    values = jnp.asarray([1.0, jnp.inf, jnp.nan, -jnp.inf, 3.0])
    average = Average.of(values, jnp.asarray([1.0, 0.0, 0.0, 0.0, 1.0]))
    assert (float(average.total), float(average.mean())) == (4, 2)


def test_the_mean_of_nothing_is_not_a_number():
    assert jnp.isnan(Average.of(jnp.ones(3), jnp.zeros(3)).mean())


def _reference(logits, labels, k):
    # A stable sort keeps the smaller index first among equals.
    best = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return (best == labels[..., None]).any(-1)


@quickly
@given(
    arrays.arrays(np.int32, (4, 2, 7), elements=st.integers(-2, 2)),
    arrays.arrays(np.int32, (4, 2), elements=st.integers(0, 6)),
)
def test_top_k_is_that_of_a_stable_sort(logits, labels):
    logits = logits.astype(np.float32)
    for k in (1, 2, 5):
        found = top_k(jnp.asarray(logits), jnp.asarray(labels), k)
        np.testing.assert_array_equal(found, _reference(logits, labels, k))


def test_of_equal_logits_the_first_classes_count():
    logits = jnp.zeros((4, 4))
    assert top_k(logits, jnp.arange(4), 1).tolist() == [True, False, False, False]
    assert top_k(logits, jnp.arange(4), 3).tolist() == [True, True, True, False]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_logits_that_are_not_numbers_never_count_as_right(k):
    all_nan = jnp.full((3, 3), jnp.nan)
    assert not top_k(all_nan, jnp.arange(3), k).any()
    assert not top_k(jnp.asarray([[1.0, jnp.nan, 0.0]]), jnp.asarray([1]), k).any()


def test_infinite_logits_are_larger_or_smaller_than_all_others():
    logits = jnp.asarray([[0.0, jnp.inf, 1.0], [0.0, -jnp.inf, 1.0], [2.0, -jnp.inf, 1.0]])
    assert top_k(logits, jnp.asarray([0, 2, 0]), 1).tolist() == [False, True, True]
    assert top_k(logits, jnp.asarray([1, 1, 1]), 1).tolist() == [True, False, False]
    assert top_k(logits, jnp.asarray([1, 1, 1]), 3).tolist() == [True, True, True]


def test_one_logit_is_a_binary_choice():
    logit = jnp.asarray([[2.0], [-2.0], [-0.5], [0.5]])
    found = metrics.classification("main", logit, jnp.asarray([1, 0, 1, 0]))
    assert set(found) == {"main/top_1"}
    assert (float(found["main/top_1"].total), float(found["main/top_1"].count)) == (2, 4)
    assert metrics.class_logits(logit).tolist() == [[0, 2], [0, -2], [0, -0.5], [0, 0.5]]
    assert metrics.class_logits(jnp.ones((2, 3))).tolist() == [[1, 1, 1]] * 2


def test_top_5_is_measured_above_five_classes_only():
    labels = jnp.asarray([4, 5])
    found = metrics.classification("x", jnp.asarray([[5.0, 4, 3, 2, 1, 0]] * 2), labels)
    assert {k: float(v.mean()) for k, v in found.items()} == {"x/top_1": 0, "x/top_5": 0.5}
    five = metrics.classification("x", jnp.asarray([[0.0, 0, 0, 0, 9]] * 2), jnp.asarray([4, 0]))
    assert {k: float(v.mean()) for k, v in five.items()} == {"x/top_1": 0.5}


def test_classification_counts_positions_of_the_examples_in_the_mask():
    logits = jnp.asarray([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, jnp.nan]]])
    labels = jnp.asarray([[0, 1], [0, 1]])
    masked = metrics.classification("d", logits, labels, jnp.asarray([1.0, 0.0]))["d/top_1"]
    assert (float(masked.total), float(masked.count)) == (1, 2)
    whole = metrics.classification("d", logits, labels)["d/top_1"]
    assert (float(whole.total), float(whole.count)) == (2, 4)


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_an_output_classifies_if_its_target_is_integers_with_an_axis_less():
    assert metrics.is_classification(_shape(3, 10), jnp.zeros(3, jnp.int32))
    assert metrics.is_classification(_shape(3, 1), jnp.zeros(3, jnp.uint8))
    assert metrics.is_classification(_shape(3, 2, 10), jnp.zeros((3, 2), jnp.int32))
    assert not metrics.is_classification(_shape(3, 10), jnp.zeros(3))
    assert not metrics.is_classification(_shape(3, 10), jnp.zeros((3, 10), jnp.int32))
    assert not metrics.is_classification(_shape(3, 2, 10), jnp.zeros(3, jnp.int32))


def test_a_fractional_mask_weighs_values():
    average = Average.of(jnp.asarray([1.0, 3.0, jnp.nan]), jnp.asarray([0.5, 0.25, 0.0]))
    assert (float(average.total), float(average.count)) == (1.25, 0.75)
    right = metrics.classification(
        "x", jnp.eye(3), jnp.asarray([0, 1, 0]), jnp.asarray([0.5, 0.5, 0.5])
    )
    assert float(right["x/top_1"].mean()) == pytest.approx(2 / 3)


def test_what_counts_less_than_nothing_counts_nothing():
    average = Average.of(jnp.array([2.0, 4.0, 8.0]), jnp.array([1.0, -1.0, jnp.nan]))
    assert (float(average.total), float(average.count)) == (2, 1)


def test_a_mask_may_be_of_positions():
    values = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    average = Average.of(values, jnp.asarray([[1.0, 0.0], [1.0, 1.0]]))
    assert (float(average.total), float(average.count)) == (8, 3)


@pytest.mark.parametrize("label", [-3, -1, 3, 255])
def test_a_label_outside_of_its_classes_is_never_right_nor_looked_up(label):
    logits = jnp.asarray([[0.0, 1.0, 2.0]] * 2)
    labels = jnp.asarray([label, 2])
    for k in (1, 2, 3):
        assert top_k(logits, labels, k).tolist() == [False, True]
    np.testing.assert_array_equal(metrics.at_label(logits, labels), [np.nan, 2.0])
    binary = metrics.classification("x", jnp.asarray([[9.0]]), jnp.asarray([label]))
    assert float(binary["x/top_1"].total) == 0


def test_unsigned_and_boolean_labels_are_labels():
    logits = jnp.asarray([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert top_k(logits, jnp.asarray([2, 255], jnp.uint8), 1).tolist() == [True, False]
    found = metrics.classification("x", jnp.asarray([[1.0], [1.0]]), jnp.asarray([True, False]))
    assert float(found["x/top_1"].mean()) == 0.5
