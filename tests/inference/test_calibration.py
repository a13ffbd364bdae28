"""Expected calibration error and temperatures, by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_jax.inference.calibration import (
    LEAST,
    MOST,
    expected_calibration_error,
    fit_temperature,
    probabilities,
)


def _two(confidences):
    """Probabilities of two classes, of which the first has the given one."""
    first = np.asarray(confidences, np.float64)
    return np.stack([first, 1 - first], axis=1)


def test_the_calibration_error_of_hand_made_probabilities():
    # With 15 bins 0.61 and 0.65 share (0.6, 0.667], 0.9 is in (0.867, 0.933], 1 in the last.
    predicted = _two([0.61, 0.65, 0.9, 1.0])
    labels = np.array([0, 1, 0, 0])
    gaps = abs(1 - 0.61 - 0.65) + abs(1 - 0.9) + abs(1 - 1.0)
    assert expected_calibration_error(predicted, labels) == pytest.approx(gaps / 4)
    # With two bins, (0, 0.5] and (0.5, 1], all are in one.
    gap = abs(3 - (0.61 + 0.65 + 0.9 + 1.0))
    assert expected_calibration_error(predicted, labels, bins=2) == pytest.approx(gap / 4)


def test_an_edge_belongs_to_the_bin_below_it():
    # 0.6 is 9 / 15: in the bin of 0.59, not of 0.61.
    labels = np.array([0, 1])
    together = expected_calibration_error(_two([0.59, 0.6]), labels)
    apart = expected_calibration_error(_two([0.61, 0.6]), labels)
    assert together == pytest.approx(abs(1 - 0.59 - 0.6) / 2)
    assert apart == pytest.approx((1 - 0.61 + 0.6) / 2)


@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_the_calibration_error_is_that_of_the_formula(examples, classes, bins, seed):
    generator = np.random.default_rng(seed)
    predicted = probabilities(generator.normal(size=(examples, classes)) * 3)
    labels = generator.integers(0, classes, examples)
    expected, confidence = 0.0, predicted.max(1)
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            accuracy = (predicted.argmax(1) == labels)[inside].mean()
            expected += inside.mean() * abs(accuracy - confidence[inside].mean())
    assert expected_calibration_error(predicted, labels, bins) == pytest.approx(expected)


def test_the_temperature_of_two_classes_is_known():
    # Logits 3 and 0, right in three of four: best is sigmoid(3 / T) = 3/4, so that T = 3 / log 3.
    logits = np.tile([[3.0, 0.0]], (4, 1))
    assert fit_temperature(logits, np.array([0, 0, 1, 0])) == pytest.approx(3 / np.log(3), rel=1e-7)
    # Shifted logits are the same, ten times smaller ones have a tenth of the temperature.
    found = fit_temperature(logits / 10 + 7, np.array([0, 0, 1, 0]))
    assert found == pytest.approx(0.3 / np.log(3), rel=1e-7)


def test_the_temperature_stays_in_its_range():
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    # All right: the colder the better. All wrong: the hotter the better. None better: as it is.
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(LEAST)
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(MOST)
    assert fit_temperature(np.zeros((2, 2)), np.array([1, 0])) > 0


@given(st.integers(2, 60), st.integers(2, 8), st.floats(0.05, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_no_other_temperature_is_likelier(examples, classes, scale, seed):
    generator = np.random.default_rng(seed)
    logits = (scale * generator.normal(size=(examples, classes))).astype(np.float32)
    labels = generator.integers(0, classes, examples)

    def loss(temperature):
        with np.errstate(divide="ignore"):
            log_p = np.log(probabilities(logits, temperature))
        return -log_p[np.arange(examples), labels].mean()

    found = fit_temperature(logits, labels)
    assert LEAST <= found <= MOST
    for other in (found * 0.99, found * 1.01, 1.0):
        if LEAST <= other <= MOST:
            assert loss(found) <= loss(other) * (1 + 1e-9)


def test_a_temperature_mends_probabilities_that_are_too_certain():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 5)) * 2
    drawn = generator.gumbel(size=logits.shape)
    labels = (logits + drawn).argmax(1)
    # The labels follow softmax(logits); three times as large logits say more than is true.
    temperature = fit_temperature(3 * logits, labels)
    assert temperature == pytest.approx(3, rel=0.05)
    before = expected_calibration_error(probabilities(3 * logits), labels)
    after = expected_calibration_error(probabilities(3 * logits, temperature), labels)
    assert before > 0.1
    assert after < 0.03


def test_what_can_not_be_calibrated_is_refused():
    nothing = np.zeros((0, 3))
    with pytest.raises(ValueError, match="no examples to measure calibration on"):
        expected_calibration_error(nothing, np.zeros(0, int))
    with pytest.raises(ValueError, match="no examples to fit a temperature on"):
        fit_temperature(nothing, np.zeros(0, int))
    with pytest.raises(ValueError, match="Logits are not finite"):
        fit_temperature(np.array([[0.0, np.nan]]), np.array([0]))


def test_calibration_of_logits_is_refused():
    labels = np.array([0, 1])
    for logits, message in (
        (np.array([[3.0, 1.0], [0.5, 2.0]]), r"have the sum 4 and the least value 0.5. Of logits"),
        (np.array([[1.5, -0.5], [0.5, 0.5]]), r"the least value -0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(logits, labels)
        assert 0 <= expected_calibration_error(probabilities(logits), labels) <= 1


@pytest.mark.parametrize(
    ("labels", "found"),
    [([0], r"int64\[1\]"), ([[0], [1]], r"int64\[2, 1\]"), ([0, 0.5], "float64")],
)
def test_labels_that_are_not_one_each_are_refused(labels, found):
    message = f"Labels are {found}.*; they should be whole numbers, one for each of the examples"
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(_two([0.5, 0.5]), np.array(labels))
    with pytest.raises(ValueError, match=message):
        fit_temperature(np.zeros((2, 2)), np.array(labels))
    with pytest.raises(ValueError, match="in 0 bins; it should be at least 1"):
        expected_calibration_error(_two([0.5, 0.5]), np.array([0, 1]), bins=0)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_outside_of_the_classes_are_refused(label):
    labels = np.array([0, label])
    message = rf"1 labels are outside of the 2 classes 0..1: the first is {label} at index 1"
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(_two([0.5, 0.5]), labels)
    with pytest.raises(ValueError, match=message):
        fit_temperature(np.zeros((2, 2)), labels)
