import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sire_jax import prediction
from sire_jax.prediction import DigitOrder, Output

_order = jax.jit(DigitOrder())
quickly = settings(max_examples=25, deadline=None)


def _softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _enumerate(logits):
    """Adds up the probability of every pair of digits, in float64."""
    p = _softmax(np.asarray(logits, np.float64))
    result = np.zeros((len(p), 2))
    for n, i, j in itertools.product(range(len(p)), range(p.shape[-1]), range(p.shape[-1])):
        result[n, int(i <= j)] += p[n, 0, i] * p[n, 1, j]
    return result


@quickly
@given(arrays.arrays(np.float32, (3, 2, 4), elements=st.floats(-12, 12, width=16)))
def test_the_order_of_digits_is_that_of_enumerated_pairs(logits):
    found = np.exp(_order({"digits": jnp.asarray(logits)}))
    np.testing.assert_allclose(found, _enumerate(logits), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_the_order_of_ten_digits_is_that_of_enumerated_pairs():
    logits = np.random.default_rng(0).normal(size=(5, 2, 10)).astype(np.float32)
    found = np.exp(jax.jit(DigitOrder("d"))({"d": jnp.asarray(logits)}))
    np.testing.assert_allclose(found, _enumerate(logits), rtol=1e-5)


def test_known_digits_have_a_known_order():
    digits = [(3, 7), (7, 3), (5, 5), (0, 9), (9, 0)]
    logits = np.full((len(digits), 2, 10), -100.0, np.float32)
    for n, (a, b) in enumerate(digits):
        logits[n, 0, a] = logits[n, 1, b] = 100
    found = np.exp(_order({"digits": jnp.asarray(logits)}))
    np.testing.assert_allclose(found, [[0, 1], [1, 0], [0, 1], [0, 1], [1, 0]], atol=1e-6)


def test_uniform_digits_are_ordered_in_55_of_100_cases():
    found = np.exp(_order({"digits": jnp.zeros((1, 2, 10))}))
    np.testing.assert_allclose(found, [[0.45, 0.55]], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e38])
def test_extreme_logits_give_probabilities_that_sum_to_one(scale):
    logits = np.random.default_rng(1).normal(size=(6, 2, 10)) * scale
    found = _order({"digits": jnp.asarray(np.clip(logits, -3e38, 3e38), jnp.float32)})
    assert not jnp.isnan(found).any()
    assert float(found.max()) <= 1e-6
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
    a, b = logits.argmax(-1).T
    np.testing.assert_array_equal(found.argmax(-1), a <= b)


def test_unlikely_orders_keep_their_log_probability():
    logits = np.zeros((1, 2, 2), np.float32)
    logits[0, 0, 1] = logits[0, 1, 0] = -60
    # a > b needs a = 1 and b = 0, each e^-60.
    np.testing.assert_allclose(
        DigitOrder()({"digits": jnp.asarray(logits)}), [[-120, 0]], rtol=1e-6
    )


def test_an_outputs_prediction_is_its_softmax():
    logits = jnp.asarray([[0.0, np.log(2), np.log(3)]], jnp.float32)
    found = Output("exit")({"exit": logits + 5.0, "main": jnp.zeros((1, 3))})
    np.testing.assert_allclose(np.exp(found), [[1 / 6, 2 / 6, 3 / 6]], rtol=1e-5)


def test_one_logits_prediction_is_its_sigmoid():
    logit = jnp.asarray([[0.0], [np.log(3)], [-np.log(3)], [-90.0]], jnp.float32)
    found = Output()({"main": logit})
    expected = [[1 / 2, 1 / 2], [1 / 4, 3 / 4], [3 / 4, 1 / 4], [1, 0]]
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[3, 1], -90, rtol=1e-6)


def test_check_names_a_missing_output():
    rules = {"order": DigitOrder("digit"), "plain": Output()}
    prediction.check(rules, {"digit": 0, "main": 0})
    message = r"'order' uses the output 'digit'.*Did you mean 'digits'.*Known: digits, main"
    with pytest.raises(ValueError, match=message):
        prediction.check(rules, {"digits": 0, "main": 0})
    assert (Output("a").needs(), DigitOrder().needs()) == (("a",), ("digits",))
