"""Prediction rules with parameters: what they find, against searches in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax.predictions import (
    PREDICTIONS,
    FittedJointProbability,
    JointProbability,
    LinearCombination,
    Output,
    is_fitted,
)

ASSIGNMENT = (0, 1, 2, 0, 1, 2)
GROUPS = {"branch": ASSIGNMENT}
NUMBER, CLASSES = 300, 6


def _log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _loss(log_probability, labels):
    return -np.asarray(log_probability, np.float64)[np.arange(len(labels)), labels].mean()


def _data(sharp_main=1.0, sharp_branch=1.0, seed=0, misled=False):
    """Outputs that know something of labels, their logits times how sure they are."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, NUMBER)
    groups = np.asarray(ASSIGNMENT)[labels]
    groups = (groups + 1) % 3 if misled else groups
    main = random.normal(size=(NUMBER, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    branch = random.normal(size=(NUMBER, 3)) + 1.5 * np.eye(3)[groups]
    outputs = {"main": sharp_main * main, "branch": sharp_branch * branch}
    return {k: jnp.asarray(x, jnp.float32) for k, x in outputs.items()}, jnp.asarray(labels)


def _losses(outputs, labels, etas):
    """Returns the loss at each eta, in float64."""
    main, branch = (_log_softmax(np.asarray(outputs[k], np.float64)) for k in ("main", "branch"))
    joint = [main + eta * branch[:, list(ASSIGNMENT)] for eta in etas]
    return np.array([_loss(_log_softmax(each), labels) for each in joint])


_fit_eta = jax.jit(FittedJointProbability(GROUPS).fit)

# ---- The power of a joint probability.


@pytest.mark.parametrize("sharp", [(1.0, 2.0), (1.5, 3.0), (3.0, 4.0)])
def test_eta_is_that_of_a_grid_search(sharp):
    outputs, labels = _data(*sharp)
    found = float(_fit_eta(outputs, labels))
    etas = np.linspace(0.001, 1, 1000)
    losses = _losses(outputs, labels, etas)
    assert 0.1 < etas[losses.argmin()] < 0.95
    assert found == pytest.approx(etas[losses.argmin()], abs=0.002)
    (here,) = _losses(outputs, labels, [found])
    assert here <= losses.min() + 1e-7
    log_probability = FittedJointProbability(GROUPS)(outputs, jnp.float32(found))
    assert _loss(log_probability, labels) == pytest.approx(here, rel=1e-5)
    np.testing.assert_allclose(np.exp(log_probability).sum(-1), 1, rtol=1e-5)


def test_eta_is_where_the_slope_is_zero():
    outputs, labels = _data(1.0, 2.0)
    found = float(_fit_eta(outputs, labels))
    before, after = _losses(outputs, labels, [found - 1e-4, found + 1e-4])
    curvature = np.diff(_losses(outputs, labels, [found - 0.1, found, found + 0.1]), 2)[0] / 0.01
    # The distance to the root, by Newton.
    assert abs((after - before) / 2e-4) / curvature < 1e-5


def test_a_branch_that_is_right_has_all_the_power():
    outputs, labels = _data()
    perfect = 5.0 * jnp.eye(3)[jnp.asarray(ASSIGNMENT)[labels]]
    assert _fit_eta({**outputs, "branch": perfect}, labels) == 1
    # Not sure enough: more than 1 would be better, and is not allowed.
    shy, labels = _data(1.0, 0.2)
    assert _fit_eta(shy, labels) == 1
    losses = _losses(shy, labels, [0.9, 1, 1.1])
    assert losses[0] > losses[1] > losses[2]


def test_a_branch_that_misleads_has_next_to_none():
    outputs, labels = _data(misled=True)
    eta = float(_fit_eta(outputs, labels))
    assert 0 < eta < 1e-6
    rule = FittedJointProbability(GROUPS)
    plain = jax.nn.log_softmax(outputs["main"])
    np.testing.assert_allclose(rule(outputs, jnp.float32(eta)), plain, atol=1e-5)


def test_a_branch_that_says_nothing_leaves_a_valid_power():
    outputs, labels = _data()
    for branch in (jnp.zeros((NUMBER, 3)), jnp.full((NUMBER, 3), 1e4)):
        assert 0 < float(_fit_eta({**outputs, "branch": branch}, labels)) <= 1


def test_extreme_logits_have_a_finite_power():
    outputs, labels = _data(1e4, 1e4)
    eta = _fit_eta(outputs, labels)
    assert 0 < float(eta) <= 1
    assert bool(jnp.isfinite(FittedJointProbability(GROUPS)(outputs, eta)).all())
    etas = np.linspace(0.001, 1, 1000)
    losses = _losses(outputs, labels, etas)
    assert _losses(outputs, labels, [float(eta)])[0] <= losses.min() * 1.001


def test_a_fitted_power_is_that_of_the_rule_without_parameters():
    outputs, _ = _data()
    fitted = FittedJointProbability(GROUPS)(outputs, jnp.float32(0.3))
    np.testing.assert_allclose(fitted, JointProbability(GROUPS, 0.3)(outputs), atol=1e-6)


def test_several_runs_are_fitted_each_on_its_own():
    data = [_data(1.0, sharp, seed) for seed, sharp in enumerate((0.5, 2.0, 4.0))]
    together = jax.tree.map(lambda *each: jnp.stack(each), *data)
    fit = FittedJointProbability(GROUPS).fit
    found = jax.jit(lambda given: jax.lax.map(lambda x: fit(*x), given))(together)
    np.testing.assert_allclose(found, [_fit_eta(*each) for each in data], atol=1e-6)
    assert len({round(float(eta), 3) for eta in found}) == 3


# ---- A linear classifier of all predictions.


def _features(outputs, names):
    return np.concatenate(
        [_log_softmax(np.asarray(outputs[name], np.float64)) for name in names], -1
    )


def _objective(rule, outputs, labels, weights):
    """Returns the fitted loss with its penalty and its gradient, by hand in float64."""
    kernel, bias = (np.asarray(weights[k], np.float64) for k in ("kernel", "bias"))
    x, start = _features(outputs, rule.needs()), np.eye(*kernel.shape)
    log_probability = _log_softmax(x @ kernel + bias)
    excess = (np.exp(log_probability) - np.eye(CLASSES)[labels]) / len(labels)
    gradient = x.T @ excess + rule.penalty * (kernel - start), excess.sum(0) + rule.penalty * bias
    distance = ((kernel - start) ** 2).sum() + (bias**2).sum()
    return _loss(log_probability, labels) + rule.penalty / 2 * distance, gradient


@pytest.fixture(scope="module")
def linear():
    """Rules, and what they were fitted to and found."""
    found = {}
    for name, settings, data in (
        ("plain", {"penalty": 1e-2}, _data()),
        # Of predictions this sure, 100 steps end 5e-5 above the minimum.
        ("own", {"penalty": 1e-2, "outputs": ("other", "branch"), "steps": 400}, _data(2, 2, 1)),
    ):
        outputs, labels = data
        outputs = {**outputs, "other": 3 * outputs["main"][:, ::-1]}
        rule = LinearCombination({} if name == "own" else GROUPS, **settings)
        with jax.numpy_dtype_promotion("standard"):
            found[name] = rule, outputs, labels, jax.jit(rule.fit)(outputs, labels)
    return found


@pytest.mark.parametrize(("name", "inputs"), [("plain", 6 + 3), ("own", 6 + 6 + 3)])
def test_a_linear_combination_is_the_minimum(linear, name, inputs):
    rule, outputs, labels, weights = linear[name]
    assert weights["kernel"].shape == (inputs, CLASSES)
    assert weights["bias"].shape == (CLASSES,)
    loss, gradient = _objective(rule, outputs, labels, weights)
    # The penalty alone makes the curvature at least 1e-2: the gap is at most |gradient|^2 / 2e-2.
    assert max(np.abs(each).max() for each in gradient) < 1e-4
    start = {"kernel": np.eye(inputs, CLASSES), "bias": np.zeros(CLASSES)}
    assert loss < _objective(rule, outputs, labels, start)[0] - 0.01


def test_a_linear_combination_by_hand(linear):
    rule, outputs, _, weights = linear["own"]
    assert rule.needs() == ("main", "other", "branch")
    kernel, bias = (np.asarray(weights[k], np.float64) for k in ("kernel", "bias"))
    expected = _log_softmax(_features(outputs, rule.needs()) @ kernel + bias)
    found = rule(outputs, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "own"])
def test_a_linear_combination_is_no_worse_than_the_main_output_alone(linear, name):
    rule, outputs, labels, weights = linear[name]
    main = _log_softmax(np.asarray(outputs["main"], np.float64))
    assert _loss(rule(outputs, weights), labels) < _loss(main, labels) - 0.01
    start = {"kernel": jnp.eye(len(weights["kernel"]), CLASSES), "bias": jnp.zeros(CLASSES)}
    np.testing.assert_allclose(rule(outputs, start), main, rtol=1e-4, atol=1e-5)


@pytest.mark.optax_dtypes
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_few_steps_are_no_worse_than_the_main_output_alone(scale):
    outputs, labels = _data(scale, scale, 2)
    rule = LinearCombination(GROUPS, steps=2)
    found = rule(outputs, jax.jit(rule.fit)(outputs, labels))
    assert bool(jnp.isfinite(found).all())
    main = _log_softmax(np.asarray(outputs["main"], np.float64))
    assert _loss(found, labels) <= _loss(main, labels) * (1 + 1e-6)


@pytest.mark.optax_dtypes
def test_the_weights_of_a_joint_probability_are_found_again():
    # Labels drawn from a joint probability with eta 0.7: the best weights are the identity and
    # 0.7 times the groups, up to what is the same for all labels.
    random = np.random.default_rng(0)
    number, eta = 4000, 0.7
    outputs = {
        "main": 2 * random.normal(size=(number, 4)),
        "branch": random.normal(size=(number, 2)),
    }
    groups = np.array([0, 1, 1, 0])
    features = _features(outputs, outputs)
    weights = np.concatenate([np.eye(4), eta * np.eye(2)[:, groups]])
    p = np.exp(_log_softmax(features @ weights))
    labels = (p.cumsum(-1) < random.uniform(size=(number, 1))).sum(-1)
    given = {k: jnp.asarray(x, jnp.float32) for k, x in outputs.items()}, jnp.asarray(labels)
    found = jax.jit(LinearCombination({"branch": tuple(groups)}, penalty=1e-6).fit)(*given)
    kernel = np.asarray(found["kernel"])
    centred = kernel - kernel.mean(-1, keepdims=True)
    # The log probabilities of two groups differ by what one logit says.
    np.testing.assert_allclose(centred[:4], np.eye(4) - 1 / 4, atol=0.15)
    np.testing.assert_allclose(centred[4] - centred[5], eta * np.array([1, -1, -1, 1]), atol=0.15)
    assert float(jax.jit(FittedJointProbability({"branch": tuple(groups)}).fit)(*given)) == (
        pytest.approx(eta, abs=0.1)
    )


# ---- Settings.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FittedJointProbability(GROUPS, "test"),
            r"fitted_joint_probability is fitted to the split 'test'; it should be 'train' or 'val",
        ),
        (
            lambda: FittedJointProbability({}),
            r"fitted_joint_probability needs a branch over groups",
        ),
        (lambda: LinearCombination(GROUPS, "test"), r"linear_combination is fitted .*'test'"),
        (lambda: LinearCombination({}), r"linear_combination needs a branch over groups"),
        (
            lambda: LinearCombination(GROUPS, penalty=0.0),
            r"has penalty 0.0 and 200 steps; .*above 0",
        ),
        (lambda: LinearCombination(GROUPS, penalty=float("nan")), r"has penalty nan"),
        (lambda: LinearCombination(GROUPS, steps=0), r"penalty 0.0001 and 0 steps; .*at least 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_say_what_they_need_and_whether_they_are_fitted():
    assert FittedJointProbability(GROUPS).needs() == ("main", "branch")
    assert LinearCombination(GROUPS).needs() == ("main", "branch")
    assert LinearCombination(GROUPS, outputs=("x",)).needs() == ("main", "x")
    assert LinearCombination(GROUPS, outputs=("main",)).needs() == ("main",)
    assert is_fitted(FittedJointProbability(GROUPS))
    assert is_fitted(LinearCombination(GROUPS))
    assert not is_fitted(JointProbability(GROUPS))
    assert not is_fitted(Output())
    fitted = {name for name, rule in PREDICTIONS.items() if is_fitted(rule)}
    assert fitted == {"fitted_joint_probability", "linear_combination"}
