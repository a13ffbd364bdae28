import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sire_jax import predictions
from sire_jax.predictions import DigitOrder, JointProbability, Output, log_joint

_order = jax.jit(DigitOrder())
quickly = settings(max_examples=25, deadline=None)


def _softmax(logits):
    logits = np.asarray(logits, np.float64)
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
    predictions.check(rules, {"digit": 0, "main": 0})
    message = r"'order' uses the output 'digit'.*Did you mean 'digits'.*Known: digits, main"
    with pytest.raises(ValueError, match=message):
        predictions.check(rules, {"digits": 0, "main": 0})
    assert (Output("a").needs(), DigitOrder().needs()) == (("a",), ("digits",))


# ---- The joint probability of labels and their groups.

# 4 labels, in 2 and in 3 groups.
GROUPS = {"a": (0, 1, 0, 1), "b": (0, 0, 1, 2)}


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _joint(outputs, groups, eta):
    """Adds up the logarithms label by label, in float64."""
    result = _log_softmax(outputs["main"])
    for name, assignment in groups.items():
        branch = _log_softmax(outputs[name])
        for label, group in enumerate(assignment):
            result[:, label] += eta * branch[:, group]
    return result


def _outputs(main, a, b=((0.0,),)):
    return {k: jnp.asarray(x, jnp.float32) for k, x in (("main", main), ("a", a), ("b", b))}


HAND = _outputs(np.log([[1, 2, 3, 4]]) + 5.0, np.log([[1, 3]]) - 2.0, np.log([[1, 1, 2]]))


def test_the_joint_probability_by_hand():
    # (.1, .2, .3, .4) times (1/4, 3/4, 1/4, 3/4) times (1/4, 1/4, 1/4, 1/2).
    s = np.array([1, 6, 3, 24]) / 160
    np.testing.assert_allclose(np.exp(log_joint(HAND, GROUPS, 1.0)), [s], rtol=1e-5)
    found = np.exp(JointProbability(GROUPS)(HAND))
    np.testing.assert_allclose(found, [np.array([1, 6, 3, 24]) / 34], rtol=1e-5)
    found = np.exp(JointProbability(GROUPS, normalization="softmax")(HAND))
    np.testing.assert_allclose(found, _softmax([s]), rtol=1e-5)
    # The square roots of (1, 3, 1, 3): eta of one branch alone.
    s = np.array([1, 2, 3, 4]) * np.sqrt([1, 3, 1, 3])
    found = np.exp(JointProbability(GROUPS, 0.5, branches=("a",))(HAND))
    np.testing.assert_allclose(found, [s / s.sum()], rtol=1e-5)


def test_a_power_of_0_is_the_main_prediction():
    outputs = _outputs(
        *(np.random.default_rng(i).normal(size=(5, n)) * 9 for i, n in ((0, 4), (1, 2), (2, 3)))
    )
    plain = jax.nn.log_softmax(outputs["main"])
    for eta in (0.0, jnp.zeros((), jnp.float32)):
        np.testing.assert_array_equal(log_joint(outputs, GROUPS, eta), plain)
    np.testing.assert_array_equal(log_joint(outputs, {}, 1.0), plain)


logits = st.floats(-1e4, 1e4, width=32)


@quickly
@given(
    arrays.arrays(np.float32, (3, 4), elements=logits),
    arrays.arrays(np.float32, (3, 2), elements=logits),
    arrays.arrays(np.float32, (3, 3), elements=logits),
    st.floats(0.015625, 1, width=32),
)
def test_joint_probabilities_are_those_in_double_precision(main, a, b, eta):
    outputs = _outputs(main, a, b)
    joint = _joint(outputs, GROUPS, eta)
    found = np.asarray(log_joint(outputs, GROUPS, eta))
    assert found.dtype == np.float32
    assert found.max() <= 0
    np.testing.assert_allclose(found, joint, rtol=1e-5, atol=1e-5)
    for rule, expected in ((None, _log_softmax(joint)), ("softmax", _log_softmax(np.exp(joint)))):
        found = np.asarray(JointProbability(GROUPS, eta, rule or "sum")(outputs))
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
        # Float32 knows logits of 1e4 to 1e-3.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=4e-3)


THOUSAND = tuple(int(i) for i in np.random.default_rng(3).permutation(1000) % 33)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("groups", [THOUSAND, (0,) * 1000], ids=["33 groups", "one group"])
@pytest.mark.parametrize("normalization", ["sum", "softmax"])
def test_probabilities_of_a_thousand_classes_sum_to_one(scale, groups, normalization):
    random = np.random.default_rng(4)
    widths = (1000, max(groups) + 1)
    main, a = (scale * random.choice([-1.0, 1.0], (8, n)) for n in widths)
    outputs, groups = _outputs(main + random.normal(size=(8, 1000)), a), {"a": groups}
    found = np.asarray(JointProbability(groups, 0.3, normalization)(outputs))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found, dtype=np.float64).sum(-1), 1, rtol=2e-5)
    if normalization == "sum":
        expected = _log_softmax(_joint(outputs, groups, 0.3))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=4e-3)
    if len(set(groups["a"])) == 1:
        # A branch that says nothing changes nothing.
        plain = JointProbability(groups, 1.0, normalization)(outputs)
        np.testing.assert_allclose(plain, found, rtol=1e-5, atol=1e-5)


def test_all_equal_logits_leave_all_labels_alike():
    for groups in ((0,) * 1000, tuple(i % 4 for i in range(1000))):
        outputs = _outputs(np.full((1, 1000), 7e3), np.full((1, max(groups) + 1), -1e4))
        for normalization in ("sum", "softmax"):
            found = JointProbability({"a": groups}, 1.0, normalization)(outputs)
            np.testing.assert_allclose(found, np.log(1e-3), rtol=1e-5)


def test_groups_of_unequal_sizes_share_nothing_out():
    # Each label has all of its group's probability: a large group gains.
    outputs = _outputs(np.zeros((1, 4)), np.zeros((1, 2)))
    found = np.exp(JointProbability({"a": (0, 0, 0, 1)})(outputs))
    np.testing.assert_allclose(found, [[0.25] * 4], rtol=1e-6)


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_both_normalizations_have_the_same_first_label(eta):
    random = np.random.default_rng(5)
    outputs = _outputs(*(2 * random.normal(size=(200, n)) for n in (4, 2, 3)))
    first, second = (
        np.asarray(JointProbability(GROUPS, eta, each)(outputs)) for each in ("sum", "softmax")
    )
    joint = _joint(outputs, GROUPS, eta)
    np.testing.assert_array_equal(first.argmax(-1), joint.argmax(-1))
    np.testing.assert_array_equal(second.argmax(-1), joint.argmax(-1))
    # As s is at most 1 the softmax of it is nearly uniform: e / (e + 3) at most.
    assert np.exp(second.max()) <= np.e / (np.e + 3) + 1e-6
    assert np.exp(first.max()) > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JointProbability(GROUPS, 0.0), r"eta is 0.0; it should be above 0 and at most 1"),
        (lambda: JointProbability(GROUPS, -0.5), r"eta is -0.5;"),
        (lambda: JointProbability(GROUPS, 1.0001), r"eta is 1.0001;"),
        (lambda: JointProbability(GROUPS, float("nan")), r"eta is nan;"),
        (lambda: JointProbability(GROUPS, 1.0, "sun"), r"'sun'\. Did you mean 'sum'\? Known: soft"),
        (
            lambda: JointProbability({"branch_1": (0, 1)}, branches=("branch1",)),
            r"joint_probability uses the output 'branch1', which is no branch .*mean 'branch_1'",
        ),
        (
            lambda: JointProbability({}),
            r"joint_probability needs a branch over groups .* a head wi",
        ),
        (lambda: JointProbability({}, branches=("a",)), r"output 'a', .* Known: none"),
    ],
)
def test_bad_settings_of_joint_probabilities_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_joint_probabilities_need_the_main_output_and_their_branches():
    assert JointProbability(GROUPS).needs() == ("main", "a", "b")
    assert JointProbability(GROUPS, branches=("b",)).needs() == ("main", "b")
    rules = {"joint": JointProbability(GROUPS)}
    with pytest.raises(ValueError, match=r"'joint' uses the output 'b'"):
        predictions.check(rules, {"main": 0, "a": 0})
