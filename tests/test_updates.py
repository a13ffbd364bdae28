import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from sire_jax import objectives, optimizers, traced
from sire_jax.losses import mean_squared_error
from sire_jax.updates import UPDATES, joint

A = np.asarray([1.0, -2.0], np.float32)
B = np.asarray([0.5, 3.0], np.float32)
# Values that a zero step written as an addition, or weight decay, would change.
UNREACHED = np.asarray([-0.0, 1e-30, 7.7], np.float32)


def _params():
    return {"a": jnp.asarray(A), "b": jnp.asarray(B), "stopped": jnp.asarray(UNREACHED)}


def _losses(params, model_state):
    first = (params["a"] ** 2).sum() * 0.5 + lax.stop_gradient(params["stopped"]).sum()
    second = (params["a"] * params["b"]).sum()
    seen = {"count": model_state["count"] + 1, "other": model_state["other"]}
    return {"first": first, "second": second}, ({"main": params["a"] * 3}, seen)


# Adam and the cosine schedules of optax mix integer steps with floats.
mixes_dtypes = pytest.mark.usefixtures("_standard_promotion")


@pytest.fixture
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


KEY = jax.random.key(0)
STATE = {"count": jnp.asarray(4, jnp.int32), "other": jnp.asarray([1.5, 2.5])}


def _reach():
    return traced.reach(lambda p: _losses(p, STATE)[0], _params())


def _weights(first, second):
    return {"first": jnp.float32(first), "second": jnp.float32(second)}


def _run(optimizer, weights, steps=1):
    rule = joint(optimizer, _reach())
    update = jax.jit(lambda w, p, m, s: rule.update(_losses, w, p, m, s, KEY))
    params, model_state = _params(), STATE
    state = rule.init(params)
    for _ in range(steps):
        updated = update(weights, params, model_state, state)
        params, model_state, state = updated.params, updated.model_state, updated.state
    return updated


def test_a_step_of_gradient_descent_by_hand():
    updated = _run(optax.sgd(0.1), _weights(2, 3))
    # The gradients are a and 0 of the first loss, b and a of the second.
    np.testing.assert_allclose(updated.params["a"], A - 0.1 * (2 * A + 3 * B), rtol=1e-6)
    np.testing.assert_allclose(updated.params["b"], B - 0.1 * 3 * A, rtol=1e-6)


def test_a_step_returns_unweighted_losses_and_what_the_network_returned():
    updated = _run(optax.sgd(0.1), _weights(2, 3))
    assert set(updated.losses) == {"first", "second"}
    np.testing.assert_allclose(updated.losses["first"], 2.5 + UNREACHED.sum(), rtol=1e-6)
    np.testing.assert_allclose(updated.losses["second"], 0.5 - 6, rtol=1e-6)
    np.testing.assert_array_equal(updated.outputs["main"], 3 * A)
    assert updated.model_state["count"] == 5
    assert updated.model_state["other"].tolist() == [1.5, 2.5]


def test_the_state_of_the_network_is_passed_from_step_to_step():
    assert _run(optax.sgd(0.1), _weights(1, 1), steps=3).model_state["count"] == 7


@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (0.3, -2), (5, 0.01)])
def test_the_gradient_is_the_weighted_sum_of_each_losss_gradient(weights):
    updated = _run(optax.sgd(1.0), _weights(*weights))
    each = [
        jax.grad(lambda p, name=name: _losses(p, STATE)[0][name])(_params())
        for name in ("first", "second")
    ]
    for name in ("a", "b"):
        gradient = weights[0] * each[0][name] + weights[1] * each[1][name]
        step = _params()[name] - updated.params[name]
        np.testing.assert_allclose(step, gradient, rtol=1e-5, atol=1e-5)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.3),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
    ),
    "scheduled": lambda: optax.rmsprop(optax.linear_schedule(0.1, 0.0, 10)),
    "own": lambda: optimizers.adam(0.1, weight_decay=0.2),
}


@mixes_dtypes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_moves_what_is_reached_and_leaves_the_rest_bitwise(name):
    updated = _run(OPTIMIZERS[name](), _weights(1, 0.5), steps=3)
    optimizer = OPTIMIZERS[name]()
    # The same without a rule, on the reached parameters alone.
    params = {"a": jnp.asarray(A), "b": jnp.asarray(B)}
    state = optimizer.init(params)
    for _ in range(3):
        a, b = params["a"], params["b"]
        step, state = optimizer.update({"a": a + 0.5 * b, "b": 0.5 * a}, state, params)
        params = optax.apply_updates(params, step)
    for key, value in params.items():
        np.testing.assert_allclose(updated.params[key], value, rtol=1e-5, atol=1e-6)
        assert float(jnp.abs(value - _params()[key]).min()) > 1e-3
    assert np.asarray(updated.params["stopped"]).tobytes() == UNREACHED.tobytes()


def test_the_state_of_the_rule_has_no_moments_of_what_is_not_reached():
    state = joint(optax.adam(0.1), _reach()).init(_params())
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(sizes) == [2, 2, 2, 2]


@mixes_dtypes
def test_a_rule_runs_in_a_loop_over_steps():
    rule, weights = joint(optax.adam(0.1), _reach()), _weights(1, 0.5)

    def body(carry, _):
        updated = rule.update(_losses, weights, *carry, KEY)
        return (updated.params, updated.model_state, updated.state), updated.losses["second"]

    start = (_params(), STATE, rule.init(_params()))
    (params, model_state, _), losses = jax.jit(lambda c: lax.scan(body, c, None, length=3))(start)
    expected = _run(optax.adam(0.1), weights, steps=3)
    for key in params:
        np.testing.assert_allclose(params[key], expected.params[key], rtol=1e-6)
    assert model_state["count"] == 7
    np.testing.assert_allclose(losses[0], -5.5, rtol=1e-6)
    np.testing.assert_allclose(losses[2], expected.losses["second"], rtol=1e-5)


def test_scheduled_weights_change_the_step():
    squared = mean_squared_error
    chosen = {
        "first": objectives.Objective("x", "y", squared, optax.linear_schedule(1.0, 0.0, 2)),
        "second": objectives.Objective("x", "y", squared, 0.5),
    }
    rule, params = joint(optax.sgd(0.1), _reach()), _params()
    a, b, state = A, B, rule.init(params)
    for step, first in enumerate([1.0, 0.5, 0.0, 0.0]):
        weights = objectives.weights(chosen, jnp.asarray(step, jnp.int32))
        updated = rule.update(_losses, weights, params, STATE, state, KEY)
        a, b = a - 0.1 * (first * a + 0.5 * b), b - 0.1 * 0.5 * a
        params, state = updated.params, updated.state
        np.testing.assert_allclose(params["a"], a, rtol=1e-5)
        np.testing.assert_allclose(params["b"], b, rtol=1e-5)


def test_losses_that_reach_nothing_are_refused():
    reach = traced.reach(
        lambda p: {"m": lax.stop_gradient(p["a"]).sum(), "k": jnp.float32(1)}, _params()
    )
    with pytest.raises(ValueError, match=r"The objective 'k' reaches no parameter"):
        joint(optax.sgd(0.1), reach)


def test_a_parameter_reached_by_one_loss_of_several_is_trained():
    # b by the second loss only, whose weight is 0: it decays all the same.
    updated = _run(optimizers.sgd(0.1, weight_decay=0.5, momentum=0.0), _weights(1, 0))
    np.testing.assert_allclose(updated.params["b"], B * 0.95, rtol=1e-6)
    assert UPDATES["joint"] is joint


def _steps(optimizer, gradients, param=2.0):
    params = jnp.asarray(param)
    state, seen = optimizer.init(params), []
    for gradient in gradients:
        step, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, step)
        seen.append(float(params))
    return seen


def test_weight_decay_is_an_l2_penalty_in_the_gradient_of_sgd():
    # g + wd p is 1 + 0.2 = 1.2, then with p = 1.88 it is -0.5 + 0.188 and 0.9 * 1.2 of momentum.
    second = 1.88 - 0.1 * (-0.5 + 0.188 + 0.9 * 1.2)
    assert _steps(optimizers.sgd(weight_decay=0.1), [1.0, -0.5]) == pytest.approx([1.88, second])


def test_momentum_and_its_nesterov_form_by_hand():
    plain = _steps(optimizers.sgd(0.5, momentum=0.5), [1.0, 1.0])
    assert plain == pytest.approx([1.5, 1.5 - 0.5 * 1.5])
    nesterov = _steps(optimizers.sgd(0.5, momentum=0.5, nesterov=True), [1.0, 1.0])
    assert nesterov == pytest.approx([2 - 0.5 * 1.5, 1.25 - 0.5 * 1.75])
    assert _steps(optimizers.sgd(0.5, momentum=0.0), [1.0, 1.0]) == pytest.approx([1.5, 1.0])


@mixes_dtypes
def test_adams_first_steps_by_hand():
    # Corrected for their start, both moments are those of the gradient: a step of the rate.
    assert _steps(optimizers.adam(0.1), [0.3]) == pytest.approx([1.9])
    assert _steps(optimizers.adam(), [-5.0]) == pytest.approx([2.001])
    first, second = 0.5 * 0.5 * 1 + 0.5 * 3, 0.75 * 0.25 * 1 + 0.25 * 9
    ratio = (first / (1 - 0.5**2)) / (second / (1 - 0.75**2)) ** 0.5
    steps = _steps(optimizers.adam(0.1, b1=0.5, b2=0.75), [1.0, 3.0])
    assert steps == pytest.approx([1.9, 1.9 - 0.1 * ratio])


@mixes_dtypes
def test_adams_weight_decay_is_in_the_gradient():
    # The gradient is -0.1 + 0.1 * 2, of the other sign than without the penalty.
    assert _steps(optimizers.adam(0.1, weight_decay=0.1), [-0.1]) == pytest.approx([1.9], rel=1e-5)
    assert _steps(optimizers.adam(0.1), [-0.1]) == pytest.approx([2.1], rel=1e-5)


def test_a_learning_rate_may_be_a_schedule():
    rate = {"name": "linear", "init_value": 1.0, "end_value": 0.0, "transition_steps": 4}
    steps = _steps(optimizers.sgd(rate, momentum=0.0), [1.0] * 5)
    assert steps == pytest.approx([1.0, 0.25, -0.25, -0.5, -0.5])


def test_a_number_stays_one_and_a_linear_schedule_is_linear():
    assert optimizers.number_or_schedule(3, "weight") == 3.0
    assert isinstance(optimizers.number_or_schedule(3, "weight"), float)
    section = {"name": "linear", "init_value": 2, "end_value": 6, "transition_steps": 4}
    schedule = optimizers.number_or_schedule(section, "weight")
    values = [float(schedule(jnp.asarray(i, jnp.int32))) for i in (0, 1, 3, 4, 9)]
    assert values == [2, 3, 5, 6, 6]


SECTIONS = {
    "constant": ({"value": 0.5}, [0.5, 0.5, 0.5]),
    "piecewise": ({"init_value": 1.0, "boundaries": (2, 3), "scale": 0.5}, [1, 0.5, 0.25]),
    "triangular": ({"peak_value": 1.0, "peak": 2.0, "end": 4.0}, [0, 1, 0]),
    "linear": ({"init_value": 1.0, "end_value": 0.0, "transition_steps": 4}, [1, 0.5, 0]),
    "cosine": ({"init_value": 1.0, "decay_steps": 4}, [1, 0.5, 0]),
    "exponential": (
        {"init_value": 1.0, "transition_steps": 2, "decay_rate": 0.5},
        [1, 0.5, 0.25],
    ),
    "warmup_cosine": (
        {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 4},
        [0, 1, 0],
    ),
}


@mixes_dtypes
@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_every_schedule_is_made_by_its_name(name):
    settings, expected = SECTIONS[name]
    schedule = optimizers.number_or_schedule({"name": name, **settings}, "weight")
    values = [float(schedule(jnp.asarray(step, jnp.int32))) for step in (0, 2, 4)]
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "The weight is 'fast'; it should be a number or a schedule"),
        (True, "The weight is True; it should be a number or a schedule"),
        (None, "The weight is None; it should be a number or a schedule"),
        ({"name": "liner"}, "no schedule of the weight 'liner'. Did you mean 'linear'"),
        ({"init_value": 1.0}, "schedule of the weight needs a 'name'"),
        (
            {"name": "linear", "init_value": 1.0, "end_value": 0.0},
            "schedule of the weight 'linear' needs a value for transition_steps",
        ),
        (
            {"name": "constant", "value": 1.0, "step": 3},
            "schedule of the weight 'constant' has no setting 'step'",
        ),
    ],
)
def test_what_is_neither_a_number_nor_a_schedule_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        optimizers.number_or_schedule(value, "weight")
