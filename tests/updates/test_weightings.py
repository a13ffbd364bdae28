import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from sire_jax import registry, traced
from sire_jax.updates import WEIGHTINGS, joint, weighted
from sire_jax.updates.observed import Observed
from sire_jax.updates.weightings import FAMO, DynamicAverage, Fixed, GradNorm, Random, Uncertainty

KEY = jax.random.key(0)
NAMES = ("main", "digits", "image")
SETTINGS = {"dwa": {"period": 2}}
# Adam of optax mixes integer steps with floats.
mixes_dtypes = pytest.mark.optax_dtypes


def _floats(values):
    return {name: jnp.float32(value) for name, value in values.items()}


def _not_called():
    raise AssertionError("what costs something was computed")


def _observed(losses, after=None, norms=None, absent=()):
    return Observed(
        _floats(losses),
        (lambda: _floats(after)) if after else _not_called,
        (lambda: _floats(norms)) if norms else _not_called,
        {name: jnp.asarray(name not in absent) for name in losses},
    )


def _plain(factors):
    return {name: pytest.approx(float(value), rel=1e-5) for name, value in factors.items()}


def _make(name):
    return registry.create(WEIGHTINGS, {"name": name, **SETTINGS.get(name, {})}, "weighting")


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_factors_are_positive_and_start_at_their_sum(name):
    weighting = _make(name)
    factors = weighting.weights(weighting.init(NAMES), KEY)
    values = np.asarray([factors[each] for each in NAMES])
    assert set(factors) == set(NAMES)
    assert all(each.shape == () and each.dtype == jnp.float32 for each in factors.values())
    assert (values > 0).all()
    assert values.sum() == pytest.approx(3, rel=1e-5)
    if name != "random":
        np.testing.assert_allclose(values, 1, rtol=1e-6)


def test_uncertainty_descends_its_regularized_loss():
    weighting = Uncertainty(learning_rate=0.1)
    state = weighting.init(["a", "b"])
    state = weighting.update(state, _observed({"a": 3.0, "b": 0.5}))
    # -0.1 (1 - L) of a log variance of 0.
    assert _plain(state) == {"a": 0.2, "b": -0.05}
    factors = weighting.weights(state, KEY)
    assert _plain(factors) == {"a": math.exp(-0.2), "b": math.exp(0.05)}
    state = weighting.update(state, _observed({"a": 3.0, "b": 0.5}))
    expected = {"a": 0.2 - 0.1 * (1 - 3 * math.exp(-0.2)), "b": -0.05 - 0.1 + 0.05 * math.exp(0.05)}
    assert _plain(state) == expected


@pytest.mark.parametrize("log_variance", [-1.5, 0.0, 0.7])
def test_uncertaintys_gradient_is_that_of_its_loss(log_variance):
    def total(s):
        return jnp.exp(-s) * 2.5 + s

    s = jnp.float32(log_variance)
    state = Uncertainty(1e-2).update({"a": s}, _observed({"a": 2.5}))
    assert float((s - state["a"]) / 1e-2) == pytest.approx(float(jax.grad(total)(s)), rel=1e-3)


def test_uncertainty_is_at_rest_at_the_inverse_of_the_loss():
    weighting = Uncertainty(0.2)
    losses = {"a": 40.0, "b": 0.02, "c": -1.0}

    @jax.jit
    def learn(state):
        return lax.fori_loop(0, 800, lambda _, s: weighting.update(s, _observed(losses)), state)

    factors = weighting.weights(learn(weighting.init(list(losses))), KEY)
    # A negative loss has no such place, and keeps its factor.
    assert _plain(factors) == {"a": 1 / 40, "b": 50, "c": 1.0}


def test_dwa_compares_the_means_of_the_last_two_periods():
    weighting = DynamicAverage(period=2, temperature=0.5)
    state, seen = weighting.init(["a", "b"]), []
    for a, b in [(1, 4), (3, 4), (1, 4), (1, 2), (9, 9), (1, 1)]:
        seen.append(_plain(weighting.weights(state, KEY)))
        state = weighting.update(state, _observed({"a": a, "b": b}))
    assert seen[:4] == [{"a": 1.0, "b": 1.0}] * 4
    # Means of 2, 1 and of 4, 3: ratios of 0.5 and 0.75, in units of the temperature 1 and 1.5.
    share = 1 / (1 + math.exp(0.5))
    assert seen[4] == seen[5] == {"a": 2 * share, "b": 2 - 2 * share}
    # Means of 5 after those of 1 and 3.
    share = 1 / (1 + math.exp((5 / 3 - 5) / 0.5))
    assert _plain(weighting.weights(state, KEY)) == {"a": 2 * share, "b": 2 - 2 * share}


def test_dwa_bounds_what_a_loss_that_explodes_weighs():
    weighting = DynamicAverage(period=1)
    state = weighting.init(["a", "b", "c"])
    for losses in ({"a": 1e-30, "b": 1, "c": 0}, {"a": 1e8, "b": -5, "c": 2}):
        state = weighting.update(state, _observed(losses))
    # Ratios of 10, 0 and, where there is none, 1.
    shares = np.exp([10 / 2, 0, 1 / 2])
    expected = dict(zip("abc", 3 * shares / shares.sum(), strict=True))
    assert _plain(weighting.weights(state, KEY)) == expected


def test_random_weights_are_a_softmax_of_normal_numbers():
    weighting = Random()
    state = weighting.init(NAMES)
    factors = weighting.weights(state, KEY)
    drawn = np.exp(np.asarray(jax.random.normal(KEY, (3,))))
    expected = dict(zip(sorted(NAMES), 3 * drawn / drawn.sum(), strict=True))
    assert _plain(factors) == expected
    assert weighting.update(state, _observed(dict.fromkeys(NAMES, 1.0))) is state
    many = jax.vmap(weighting.weights, (None, 0))(state, jax.random.split(KEY, 4000))
    for name in NAMES:
        assert float(many[name].mean()) == pytest.approx(1, abs=0.05)


@mixes_dtypes
def test_famo_weighs_more_what_fell_less():
    weighting = FAMO(learning_rate=0.1, weight_decay=0.0)
    state = weighting.init(["a", "b"])
    state = weighting.update(state, _observed({"a": 2.0, "b": 1.0}, after={"a": 1.0, "b": 0.8}))
    # log L fell by log 2 and log 1.25; Adam's first step is the rate against the gradient's sign.
    np.testing.assert_allclose(state["logits"], [-0.1, 0.1], rtol=1e-4)
    shares = np.exp([-0.1, 0.1]) / [1.0, 0.8]
    expected = dict(zip("ab", 2 * shares / shares.sum(), strict=True))
    assert _plain(weighting.weights(state, KEY)) == expected


@mixes_dtypes
def test_famos_gradient_by_hand():
    weighting = FAMO(weight_decay=0.5)
    state = {**weighting.init(["a", "b"]), "logits": jnp.asarray([1.0, 0.0], jnp.float32)}
    state = weighting.update(state, _observed({"a": 2.0, "b": 1.0}, after={"a": 1.0, "b": 1.0}))
    # z_a (1 - z_a) log 2 (1, -1), and half of the logits; Adam's first moment is a tenth of it.
    share = 1 / (1 + math.exp(-1))
    slope = share * (1 - share) * math.log(2)
    moments = [leaf for leaf in jax.tree.leaves(state["adam"]) if leaf.ndim]
    np.testing.assert_allclose(moments[0], [0.1 * (slope + 0.5), -0.1 * slope], rtol=1e-4)


@mixes_dtypes
def test_famo_makes_losses_fall_at_one_rate():
    # L_k = exp(-s_k), whose rates differ by 4 at equal weights.
    weighting, rates = FAMO(learning_rate=0.05, weight_decay=0.0), np.asarray([1.0, 0.25])

    @jax.jit
    def step(state, logs):
        factors = weighting.weights(state, KEY)
        losses = {name: jnp.exp(-logs[i]) for i, name in enumerate("ab")}
        # Of the gradient of sum_k f_k L_k to s_k, which is f_k L_k.
        moves = jnp.stack([factors[n] * losses[n] for n in "ab"]) * jnp.asarray(rates, jnp.float32)
        fell = logs + 0.1 * moves
        after = {name: jnp.exp(-fell[i]) for i, name in enumerate("ab")}
        return weighting.update(state, Observed(losses, lambda: after, _not_called)), fell

    state, logs = weighting.init(["a", "b"]), jnp.zeros(2)
    for _ in range(300):
        state, moved = step(state, logs)
        change, logs = moved - logs, moved
    assert float(change[0] / change[1]) == pytest.approx(1, abs=0.15)


def test_gradnorm_by_hand():
    weighting = GradNorm(alpha=1.0, learning_rate=0.1)
    state = weighting.init(["a", "b"])
    state = weighting.update(state, _observed({"a": 2.0, "b": 8.0}, norms={"a": 3.0, "b": 1.0}))
    # All ratios are 1 at first: the target is the mean norm, 2. Steps of 0.1 n / 2 with its sign.
    assert _plain(state["factors"]) == {"a": 2 * 0.85 / 1.9, "b": 2 * 1.05 / 1.9}
    assert _plain(state["first"]) == {"a": 2, "b": 8}
    state = {"factors": _floats({"a": 1.0, "b": 1.0}), "first": state["first"]}
    state = weighting.update(state, _observed({"a": 0.5, "b": 6.0}, norms={"a": 1.0, "b": 1.4}))
    # Ratios of 1/4 and 3/4, relative 0.5 and 1.5: targets of 0.6 and 1.8 for 1 and 1.4.
    low, high = 1 - 0.1 / 1.2, 1 + 0.1 * 1.4 / 1.2
    total = (low + high) / 2
    assert _plain(weighting.weights(state, KEY)) == {"a": low / total, "b": high / total}


def test_gradnorm_waits_for_a_positive_first_loss():
    weighting = GradNorm()
    state = weighting.init(["a", "b"])
    norms = {"a": 1.0, "b": 1.0}
    for loss in (0.0, -2.0, 4.0, 3.0):
        state = weighting.update(state, _observed({"a": loss, "b": 1.0}, norms=norms))
    assert _plain(state["first"]) == {"a": 4, "b": 1}


POSITIVE = st.dictionaries(st.sampled_from("abcd"), st.floats(1e-6, 1e6), min_size=2, max_size=4)


@mixes_dtypes
@settings(max_examples=8, deadline=None, derandomize=True)
@given(losses=POSITIVE, others=st.lists(st.floats(0, 1e8), min_size=4, max_size=4))
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_factors_stay_positive_and_finite(name, losses, others):
    weighting = _make(name)
    other = {each: others["abcd".index(each)] for each in losses}
    state = weighting.init(list(losses))
    for seen in (losses, other, losses):
        state = weighting.update(state, _observed(seen, after=other, norms=other))
        factors = np.asarray(list(weighting.weights(state, KEY).values()))
        assert np.isfinite(factors).all()
        assert (factors > 0).all()
        if name != "uncertainty":
            assert factors.sum() == pytest.approx(len(losses), rel=1e-4)


# ---- Losses that are absent, negative or not finite.

LEARNED = [name for name in WEIGHTINGS if name not in ("fixed", "random")]


@functools.cache
def _compiled(name):
    """Returns a weighting's two functions, of arrays in the order of NAMES."""
    weighting = _make(name)

    @jax.jit
    def update(state, losses, after, norms, present):
        def named(values):
            return dict(zip(NAMES, values, strict=True))

        observed = Observed(
            named(losses), lambda: named(after), lambda: named(norms), named(present)
        )
        return weighting.update(state, observed)

    return weighting.init(NAMES), update, jax.jit(lambda state: weighting.weights(state, KEY))


def _after(name, steps):
    """Returns the state and the factors after steps of losses, what they become, and norms."""
    state, update, weights = _compiled(name)
    for step in steps:
        arrays = [np.asarray(values, np.float32) for values in step[:3]]
        state = update(state, *arrays, np.asarray(step[3] if len(step) > 3 else [True] * 3))
    return state, weights(state)


def _factors(name, steps):
    return {key: float(value) for key, value in _after(name, steps)[1].items()}


@mixes_dtypes
@pytest.mark.parametrize("name", LEARNED)
def test_a_negative_loss_neither_gets_all_the_weight_nor_none(name):
    # A Gaussian likelihood, beside losses that stay as they are, in norms of gradients, too.
    factors = _factors(name, [([1.0, -0.5, 1.0], [1.0, -0.5, 1.0], [1.0, 1.0, 1.0])] * 300)
    # GradNorm takes it for one that has fallen to 0.
    least = 1e-3 if name == "gradnorm" else 0.9
    assert least <= factors["digits"] <= 1.1
    assert sum(factors.values()) == pytest.approx(3, rel=1e-4)


@mixes_dtypes
@pytest.mark.parametrize("name", LEARNED)
def test_an_absent_loss_is_as_if_the_step_were_of_the_others(name):
    step = ([1.0, 2.0, 3.0], [0.9, 1.5, 2.9], [1.0, 2.0, 0.5])
    # Zero, as a mean over no example is; and what it would be does not matter.
    absent = ([0.8, 0.0, 2.0], [0.7, 0.0, 1.9], [1.5, 0.0, 0.7], [True, False, True])
    other = ([0.8, 7.0, 2.0], [0.7, 9.0, 1.9], [1.5, 3.0, 0.7], [True, False, True])
    before = _factors(name, [step] * 4)
    found, expected = (_after(name, [*[step] * 4, rest]) for rest in (absent, other))
    chex.assert_trees_all_equal(found, expected)
    factors = {key: float(value) for key, value in found[1].items()}
    assert factors["digits"] == pytest.approx(before["digits"], rel=0.3)
    if name != "uncertainty":
        assert sum(factors.values()) == pytest.approx(3, rel=1e-5)
    if name in ("uncertainty", "gradnorm"):
        assert factors["digits"] == before["digits"]
        assert factors["main"] != before["main"]


@mixes_dtypes
@pytest.mark.parametrize("name", LEARNED)
def test_a_loss_that_is_always_absent_leaves_the_others_their_own_weighting(name):
    rng = np.random.default_rng(0)
    steps = [rng.uniform(0.5, 2, (3, 3)) for _ in range(6)]
    without = [(*step, [True, False, True]) for step in steps]
    factors = _factors(name, without)
    weighting = _make(name)
    state = weighting.init(["main", "image"])
    for losses, after, norms in steps:
        two = [
            dict(zip(("main", "image"), each[[0, 2]], strict=True))
            for each in (losses, after, norms)
        ]
        state = weighting.update(state, _observed(*two))
    alone = weighting.weights(state, KEY)
    assert factors["main"] / factors["image"] == pytest.approx(
        float(alone["main"] / alone["image"]), rel=1e-4
    )


def test_dwa_means_are_over_the_steps_that_have_a_loss():
    one = [1.0, 4.0, 1.0]
    steps = [
        one,
        [1.0, 2.0, 1.0],
        [1.0, 0.0, 1.0],
        [1.0, 1.0, 1.0],
        [1.0, 0.0, 1.0],
        [1.0, 0.0, 1.0],
    ]
    present = [[True] * 3, [True] * 3, [True, False, True], [True] * 3, *[[True, False, True]] * 2]
    given = [(losses, one, one, has) for losses, has in zip(steps, present, strict=True)]
    state, _ = _after("dwa", given[:4])
    assert (float(state["earlier"]["digits"]), float(state["last"]["digits"])) == (3, 1)
    # A period without the loss.
    state, _ = _after("dwa", given)
    assert (float(state["earlier"]["digits"]), float(state["last"]["digits"])) == (3, 1)
    assert (float(state["earlier"]["main"]), float(state["last"]["main"])) == (1, 1)


@mixes_dtypes
def test_famo_keeps_the_last_positive_loss():
    ones = [1.0, 1.0, 1.0]
    steps = [([2.0, 2.0, 2.0], [1.0, 1.5, 1.0], ones), ([1.0, 1.5, 1.0], [1.0, -1.0, 1.0], ones)]
    for last in (*steps[1:], (ones, [1.0, math.nan, 1.0], ones), (ones, ones, ones, [1, 0, 1])):
        state, _ = _after("famo", [steps[0], last])
        assert float(state["losses"]["digits"]) == 1.5
        logits = dict(zip(sorted(NAMES), np.asarray(state["logits"]), strict=True))
        first = dict(
            zip(sorted(NAMES), np.asarray(_after("famo", steps[:1])[0]["logits"]), strict=True)
        )
        assert logits["digits"] == first["digits"]
        assert logits["main"] != first["main"]


ANY = st.one_of(
    st.sampled_from([0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-38, 1e-45]),
    st.floats(-10, 10, width=32),
)
STEP = st.tuples(
    *[st.lists(ANY, min_size=3, max_size=3)] * 3, st.lists(st.booleans(), min_size=3, max_size=3)
)
BOUNDS = {"uncertainty": (math.exp(-10), math.exp(10)), "gradnorm": (5e-4, 3)}


@mixes_dtypes
@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.lists(STEP, min_size=1, max_size=8))
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_whatever_losses_are_states_and_factors_stay_finite(name, steps):
    steps = [(a, b, np.abs(c), d) for a, b, c, d in steps]
    state, factors = _after(name, steps)
    chex.assert_tree_all_finite((state, factors))
    low, high = BOUNDS.get(name, (0, 3))
    for factor in factors.values():
        assert low * (1 - 1e-5) <= float(factor) <= high * (1 + 1e-5)
    if name != "uncertainty":
        assert float(sum(factors.values())) == pytest.approx(3, rel=1e-4)


@mixes_dtypes
@pytest.mark.parametrize("name", LEARNED)
def test_a_step_that_is_not_finite_is_not_seen(name):
    rule = weighted(joint(optax.sgd(0.01), _reach()), _make(name), _reach())

    @jax.jit
    def update(number, weights, state):
        def losses(params, model_state):
            named, rest = _losses(params, model_state)
            return {**named, "second": number * named["second"]}, rest

        weights = dict(zip(("first", "second"), weights, strict=True))
        updated = rule.update(losses, weights, _params(), MODEL_STATE, state, KEY)
        return updated.state

    ones = np.ones(2, np.float32)
    before = update(np.float32(-1), ones, rule.init(_params()))
    for number in (math.nan, math.inf):
        after = update(np.float32(number), ones, before)
        chex.assert_trees_all_equal(after["weighting"], before["weighting"])
    # Of a loss that is absent nothing is seen, whatever it is.
    absent = np.asarray([1, 0], np.float32)
    seen = [update(np.float32(number), absent, before)["weighting"] for number in (-2, -3)]
    chex.assert_trees_all_equal(*seen)
    later = update(np.float32(-1), ones, before)["weighting"]
    assert any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (later, before["weighting"])), strict=True)
    )


A = np.asarray([1.0, -2.0], np.float32)
B = np.asarray([0.5, 3.0], np.float32)
MODEL_STATE = {"count": np.int32(4)}


def _params():
    return {"a": jnp.asarray(A), "b": jnp.asarray(B), "c": jnp.ones(2)}


def _losses(params, model_state):
    named = {
        "first": (params["a"] ** 2).sum() * 0.5,
        "second": (params["a"] * params["b"]).sum() + params["c"].sum(),
    }
    return named, ({"main": params["a"]}, {"count": model_state["count"] + 1})


def _reach():
    return traced.reach(lambda p: _losses(p, MODEL_STATE)[0], _params())


def _step(rule, state, key=KEY, weights=(2.0, 3.0)):
    weights = _floats(dict(zip(("first", "second"), weights, strict=True)))
    update = jax.jit(lambda *args: rule.update(_losses, weights, *args))
    return update(_params(), MODEL_STATE, state, key)


class Recorder:
    """Fixed factors; its state is what it has seen."""

    def init(self, names):
        return {name: jnp.zeros(4) for name in names}

    def weights(self, state, key):
        return {"first": jnp.float32(0.5), "second": jax.random.uniform(key)}

    def update(self, state, observed):
        after, norms = observed.after(), observed.norms()
        return {
            name: jnp.stack([observed.losses[name], after[name], norms[name], state[name][0]])
            for name in state
        }


def test_a_weighted_step_by_hand():
    rule = weighted(joint(optax.sgd(0.1), _reach()), Recorder(), _reach())
    updated = _step(rule, rule.init(_params()))
    drawn = float(jax.random.uniform(jax.random.split(KEY)[1]))
    a, b = A - 0.1 * (2 * 0.5 * A + 3 * drawn * B), B - 0.1 * 3 * drawn * A
    np.testing.assert_allclose(updated.params["a"], a, rtol=1e-5)
    np.testing.assert_allclose(updated.params["b"], b, rtol=1e-5)
    # Without weights, of the same batch; the norms are those of the gradients to a alone.
    assert _plain(updated.losses) == {"first": 2.5, "second": -3.5}
    seen = updated.state["weighting"]
    c = 2 * (1 - 0.1 * 3 * drawn)
    np.testing.assert_allclose(seen["first"], [2.5, a @ a / 2, math.sqrt(5), 0], rtol=1e-5)
    second = [-3.5, a @ b + c, math.sqrt(9.25), 0]
    np.testing.assert_allclose(seen["second"], second, rtol=1e-5)
    assert updated.model_state["count"] == 5


def test_fixed_weights_leave_the_rule_as_it_is():
    rule = joint(optax.sgd(0.1), _reach())
    assert weighted(rule, Fixed(), _reach()) is rule
    only = {"first": _reach()["first"]}
    assert weighted(rule, Fixed(), only) is rule


@mixes_dtypes
@pytest.mark.parametrize("name", [each for each in WEIGHTINGS if each != "fixed"])
def test_every_weighting_runs_in_a_loop_over_seeds(name):
    rule = weighted(joint(optax.sgd(0.01), _reach()), _make(name), _reach())

    def run(key):
        def body(carry, key):
            updated = rule.update(_losses, _floats({"first": 1, "second": 1}), *carry, key)
            return (updated.params, updated.model_state, updated.state), updated.losses["first"]

        start = (_params(), {"count": jnp.int32(4)}, rule.init(_params()))
        return lax.scan(body, start, jax.random.split(key, 6))

    (params, model_state, state), losses = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2))
    assert set(state) == {"rule", "weighting"}
    assert model_state["count"].tolist() == [10, 10]
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[:, 0], 2.5, rtol=1e-6)
    assert (np.asarray(params["a"][0] != params["a"][1]).any()) == (name == "random")


def test_norms_are_those_of_finite_differences():
    rule = weighted(joint(optax.sgd(0.1), _reach()), Recorder(), _reach())
    seen = _step(rule, rule.init(_params())).state["weighting"]
    for name, found in seen.items():
        slopes = []
        for shift in np.eye(2, dtype=np.float32) * 1e-2:
            moved = [{**_params(), "a": jnp.asarray(A + sign * shift)} for sign in (1, -1)]
            values = [float(_losses(each, MODEL_STATE)[0][name]) for each in moved]
            slopes.append((values[0] - values[1]) / 2e-2)
        assert float(found[2]) == pytest.approx(np.linalg.norm(slopes), rel=1e-3)


@pytest.mark.parametrize("name", [each for each in WEIGHTINGS if each != "fixed"])
def test_one_loss_can_not_be_weighted(name):
    only = {"first": _reach()["first"]}
    kind = type(_make(name)).__name__
    message = rf"The weighting {kind} needs at least two losses; there is \['first'\]"
    with pytest.raises(ValueError, match=message):
        weighted(joint(optax.sgd(0.1), only), _make(name), only)


def test_gradnorm_needs_a_parameter_that_all_losses_reach():
    reach = {**_reach(), "third": {"a": False, "b": True, "c": True}}
    message = r"no parameter is reached, all of it, by all of \['first', 'second', 'third'\]"
    with pytest.raises(ValueError, match=message):
        weighted(joint(optax.sgd(0.1), reach), GradNorm(), reach)
    weighted(joint(optax.sgd(0.1), reach), Uncertainty(), reach)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (Uncertainty, {"learning_rate": 0.0}, "Uncertainty: learning_rate is 0.0; it should be ab"),
        (DynamicAverage, {"period": 0}, "period is 0; it should be at least 1"),
        (DynamicAverage, {"period": 3, "temperature": -1.0}, "temperature is -1.0; it should be"),
        (FAMO, {"learning_rate": math.inf}, "FAMO: learning_rate is inf; it should be above 0"),
        (FAMO, {"weight_decay": -0.1}, "FAMO: weight_decay is -0.1; it should be at least 0"),
        (GradNorm, {"alpha": -1.0}, "GradNorm: alpha is -1.0; it should be at least 0"),
        (GradNorm, {"learning_rate": math.nan}, "GradNorm: learning_rate is nan; it should be"),
    ],
)
def test_settings_out_of_range_are_refused(part, settings, message):
    with pytest.raises(ValueError, match=message):
        part(**settings)


def test_dwa_needs_its_period():
    with pytest.raises(ValueError, match="The weighting 'dwa' needs a value for period"):
        registry.create(WEIGHTINGS, {"name": "dwa"}, "weighting")
