"""Update rules by hand, on a network unlike the papers'."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from branched import (
    DIVISORS,
    KEY,
    REACHED,
    SHARED,
    UNREACHED,
    WEIGHTS,
    assert_close,
    gradient,
    losses,
    params,
    reach,
    run,
    state,
    weights,
)
from jax import lax

from sire_jax import optimizers, traced
from sire_jax.updates import (
    AGGREGATORS,
    UPDATES,
    WEIGHTINGS,
    effective_joint,
    gradients,
    joint,
    multiway,
    pairwise,
    weighted,
)
from sire_jax.updates.aggregators import SUM, UPGrad
from sire_jax.updates.reached import Reached, scale
from sire_jax.updates.weightings import FAMO, Uncertainty

# Adam of optax mixes integer steps with floats.
mixes_dtypes = pytest.mark.optax_dtypes

# ---- Order, groups, divisors.


def test_losses_are_in_order_from_shallow_to_deep():
    reached = Reached.of(reach())
    assert reached.names == tuple(REACHED)
    assert reached.auxiliary == tuple(REACHED)[:-1]
    for name, tree in reached.trees.items():
        assert {key for key, each in tree.items() if each} == REACHED[name]
    assert {key for key, each in reached.any().items() if not each} == {"read", "unused"}


def test_the_main_loss_is_last_by_its_name_whatever_it_reaches():
    assert Reached.of(reach(), "early").names[-1] == "early"
    # Without one the deepest takes its place.
    others = {name: tree for name, tree in reach().items() if name != "main"}
    assert Reached.of(others).names == ("probe", "side", "early", "middle")


def _names(groups):
    leaves = sorted(params())
    return {names: {leaves[i] for i in indices} for names, indices in groups.items()}


def test_groups_are_what_the_same_losses_share():
    reached = Reached.of(reach())
    assert _names(reached.groups()) == {
        ("side", "early", "middle", "main"): {"w1"},
        ("middle", "main"): {"w2"},
        ("early", "middle"): {"shared"},
    }
    by_leaf = dict(zip(sorted(params()), reached.by_leaf, strict=True))
    assert (by_leaf["side"], by_leaf["read"]) == (("side",), ())


@pytest.mark.parametrize(
    ("given", "each", "leaves"),
    [
        ({}, DIVISORS, {"w1": 2.6, "w2": 1.5, "shared": 2.1}),
        # Steps never grow, and neither the main loss nor a probe counts.
        (
            {"main": 9.0, "probe": 9.0, "early": 0.1, "middle": 0.25},
            dict.fromkeys(REACHED, 1.0),
            dict.fromkeys(SHARED, 1.0),
        ),
        (
            {"side": 5.0, "middle": 0.0, "early": 0.5},
            {**dict.fromkeys(REACHED, 1.0), "side": 5.5},
            {"w1": 5.5, "w2": 1.0, "shared": 1.0},
        ),
    ],
)
def test_divisors_by_hand(given, each, leaves):
    reached = Reached.of(reach())
    assert reached.divisors(weights(**given)) == pytest.approx(each)
    expected = {name: leaves.get(name, 1.0) for name in params()}
    assert reached.leaf_divisors(weights(**given)) == pytest.approx(expected)


def test_losses_at_one_place_count_for_each_other():
    def twice(params):
        return {"a": params["w"].sum(), "b": 2 * params["w"].sum(), "main": -params["w"].sum()}

    reached = Reached.of(traced.reach(twice, {"w": jnp.ones(2)}))
    given = {"a": jnp.float32(2), "b": jnp.float32(3), "main": jnp.float32(1)}
    assert reached.names == ("a", "b", "main")
    assert reached.divisors(given) == pytest.approx({"a": 5, "b": 5, "main": 1})
    assert reached.leaf_divisors(given) == pytest.approx({"w": 5})


@pytest.mark.parametrize("rule", UPDATES.values())
def test_a_loss_that_reaches_nothing_is_refused(rule):
    stopped = traced.reach(
        lambda p: {"main": p["w"] ** 2, "probe": lax.stop_gradient(p["w"])}, {"w": jnp.ones(())}
    )
    message = r"The objective 'probe' reaches no parameter, so nothing can be learned from it: .*st"
    with pytest.raises(ValueError, match=message):
        rule(optimizers.sgd(), stopped)
    with pytest.raises(ValueError, match="needs at least one objective; it is given none"):
        rule(optimizers.sgd(), {})


@pytest.mark.parametrize("rule", UPDATES.values())
def test_a_step_of_other_objectives_is_refused(rule):
    made = rule(optimizers.sgd(), reach())
    message = r"has the objectives {}, but its update rule was made for early, main, middle, probe,"
    fewer = {name: weight for name, weight in weights().items() if name != "side"}
    for given, names in (
        (weights(later=1.0), "early, later, main"),
        (fewer, "early, main, middle"),
    ):
        for update in (made, weighted(made, Uncertainty(), reach())):
            with pytest.raises(ValueError, match=message.format(f"{names}.*")):
                update.update(
                    losses, given, params(), state(), jax.eval_shape(update.init, params()), KEY
                )


# ---- The gradient of each loss.


def test_the_gradient_of_each_loss_is_that_of_the_whole_network():
    named, (outputs, seen), pull_back = gradients.of_each(losses, params(), state())
    expected, (expected_outputs, expected_state) = losses(params(), state())
    assert_close((named, outputs, seen), (expected, expected_outputs, expected_state))
    for name in REACHED:
        assert_close(pull_back(name), gradient(params(), name))


def test_the_gradient_of_a_constant_is_zero():
    def constant(params, state):
        return {"main": params["w"].sum(), "a": jnp.float32(3)}, ({}, state)

    named, _, pull_back = gradients.of_each(constant, {"w": jnp.ones(2)}, {})
    assert float(named["a"]) == 3
    assert_close(pull_back("a"), {"w": np.zeros(2)})
    assert_close(pull_back("main"), {"w": np.ones(2)})


# ---- Joint.


def test_joint_steps_divided_by_the_weights_of_the_auxiliary_losses():
    found = run(joint(optax.sgd(0.1), reach(), adjust=True)).params
    plain = run(joint(optax.sgd(0.1), reach())).params
    each = {name: gradient(params(), name) for name in REACHED}
    divisors = {"w1": 2.6, "w2": 1.5, "shared": 2.1}
    for key, value in params().items():
        total = sum(WEIGHTS[name] * each[name][key] for name in REACHED)
        assert_close(plain[key], value - 0.1 * total)
        assert_close(found[key], value - 0.1 / divisors.get(key, 1.0) * total)


# ---- Multi-way, by NumPy.

A, B, C, GOAL = (np.asarray(each) for each in ([1.0, -2.0], [0.5, 3.0], [2.0, 1.0], [0.3, -0.7]))


def _two_losses(params, state):
    a, b, c = params["a"], params["b"], params["c"]
    auxiliary = 0.5 * (a * a).sum() + (a * b).sum() + 0.5 * (b * b).sum()
    main = 0.5 * ((a - jnp.asarray(GOAL, jnp.float32)) ** 2).sum() + (c * c * a).sum()
    return {"main": main, "aux": auxiliary}, ({}, state)


def _two(rule, steps, **settings):
    start = {k: jnp.asarray(v, jnp.float32) for k, v in {"a": A, "b": B, "c": C}.items()}
    trees = traced.reach(lambda p: _two_losses(p, {})[0], start)
    optimizer = optimizers.sgd(0.1, 0.2, 0.5, nesterov=settings.pop("nesterov", False))
    made = rule(optimizer, trees, **settings)
    given = {"aux": jnp.float32(3), "main": jnp.float32(2)}
    found = run(made, steps, start, given, _two_losses, {"none": jnp.zeros(())})
    return found.params


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_multi_way_steps_by_hand(nesterov):
    rate, decay, momentum, size = 0.1, 0.2, 0.5, 3.0
    a, b, c = A, B, C
    # Buffers of the auxiliary and of the main loss, each of its own.
    of_a, of_b, main_a, main_c = (np.zeros(2) for _ in range(4))

    def step(gradient, buffer):
        buffer = momentum * buffer + gradient
        return buffer, gradient + momentum * buffer if nesterov else buffer

    for _ in range(2):
        # All of one forward pass. What is shared has the weight, what is a loss's own has not.
        auxiliary, own, main, last = 3.0 * (a + b), a + b, 2.0 * (a - GOAL + c * c), 2 * c * a
        of_a, first = step(auxiliary + decay * a, of_a)
        of_b, own = step(own + decay * b, of_b)
        a, b = a - rate / size * first, b - rate / size * own
        # The parameter has moved already where it decays for the second time.
        main_a, second = step(main + decay * a, main_a)
        main_c, last = step(last + decay * c, main_c)
        a, c = a - rate * second, c - rate * last
    assert_close(_two(multiway, 2, nesterov=nesterov), {"a": a, "b": b, "c": c}, 1e-5)


def test_two_multi_way_steps_with_one_state_by_hand():
    rate, decay, momentum = 0.1, 0.2, 0.5
    a, b, c = A, B, C
    of_a, of_b, of_c = (np.zeros(2) for _ in range(3))
    for _ in range(2):
        auxiliary, own, main, last = 3 * (a + b), 3 * (a + b), 2 * (a - GOAL + c * c), 4 * c * a
        of_a, of_b = momentum * of_a + auxiliary + decay * a, momentum * of_b + own + decay * b
        a, b = a - rate * of_a, b - rate * of_b
        # What the auxiliary loss alone reaches is left as it is, and so is its momentum.
        of_a, of_c = momentum * of_a + main + decay * a, momentum * of_c + last + decay * c
        a, c = a - rate * of_a, c - rate * of_c
    settings = {"adjust": False, "scale_own": True, "shared_state": True}
    assert_close(_two(multiway, 2, **settings), {"a": a, "b": b, "c": c}, 1e-5)


@mixes_dtypes
def test_a_shared_state_has_no_zero_gradients_of_who_does_not_reach():
    rule = multiway(optax.adam(0.1), reach(), adjust=False, scale_own=True, shared_state=True)
    found = run(rule)
    assert set(found.state) == {"shared"}
    moments = found.state["shared"].inner_state[0]
    for key in ("side", "w3"):
        name = "side" if key == "side" else "main"
        expected = 0.1 * WEIGHTS[name] * gradient(params(), name)[key]
        assert_close(moments.mu[key], expected)
    early, middle = (WEIGHTS[n] * gradient(params(), n)["shared"] for n in ("early", "middle"))
    assert_close(moments.mu["shared"], 0.9 * 0.1 * early + 0.1 * middle)
    # One count for all: it advances with each loss.
    assert int(moments.count) == len(REACHED)


def test_with_one_state_plain_descent_and_weights_everywhere_multi_way_is_joint():
    settings = {"adjust": False, "scale_own": True, "shared_state": True}
    optimizer = optimizers.sgd(0.05, momentum=0.0)
    found = run(multiway(optimizer, reach(), **settings), 3)
    expected = run(joint(optimizer, reach()), 3)
    assert_close(found._replace(state=()), expected._replace(state=()), 1e-5, 1e-6)


# ---- One loss at a time with any optimizer, against one state a loss over its own parameters.


def _by_hand(rule, optimizer, steps, adjust, scale_own):
    now = params()
    states = {n: optimizer.init({k: now[k] for k in keys}) for n, keys in REACHED.items()}
    for _ in range(steps):
        before = now
        for name, keys in REACHED.items():
            each = gradient(now if rule is pairwise else before, name)
            scales = {k: WEIGHTS[name] if scale_own or k in SHARED else 1.0 for k in keys}
            own = {k: scales[k] * each[k] for k in keys}
            step, states[name] = optimizer.update(own, states[name], {k: now[k] for k in keys})
            size = DIVISORS[name] if adjust else 1.0
            now = {**now, **{k: now[k] + step[k] / size for k in keys}}
    return now


OPTIMIZERS = {
    "sgd": lambda: optimizers.sgd(0.1, 0.1, 0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.3),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.3), optax.add_decayed_weights(0.1), optax.rmsprop(0.1)
    ),
}


@mixes_dtypes
@pytest.mark.parametrize(
    ("rule", "name", "adjust", "scale_own"),
    [
        (multiway, "sgd", True, False),
        (multiway, "sgd", False, True),
        (multiway, "adamw", True, False),
        (multiway, "clipped", True, False),
        (pairwise, "sgd", True, False),
        (pairwise, "adamw", False, True),
    ],
)
def test_each_loss_has_a_step_and_a_state_of_its_own(rule, name, adjust, scale_own):
    made = rule(OPTIMIZERS[name](), reach(), adjust=adjust, scale_own=scale_own)
    found = run(made, 2)
    assert set(found.state) == set(REACHED)
    expected = _by_hand(rule, OPTIMIZERS[name](), 2, adjust, scale_own)
    assert_close(found.params, expected, 1e-4, 1e-5)


@mixes_dtypes
@pytest.mark.parametrize("name", UPDATES)
def test_what_no_loss_reaches_stays_bitwise(name):
    linear = optimizers.sgd(0.1, 0.3)
    optimizer = linear if name == "effective_joint" else optax.adamw(0.1, weight_decay=0.3)
    found = run(UPDATES[name](optimizer, reach(), adjust=True), 2)
    for key in ("read", "unused"):
        assert np.asarray(found.params[key]).tobytes() == UNREACHED.tobytes()
    for key in set().union(*REACHED.values()):
        assert float(jnp.abs(found.params[key] - params()[key]).min()) > 1e-5
    # Nor has it moments.
    kept = [leaf.shape for leaf in jax.tree.leaves(found.state)]
    assert UNREACHED.shape not in kept
    assert found.losses.keys() == found.outputs.keys() == REACHED.keys()


# ---- The control of multi-way.


def test_the_control_refuses_an_optimizer_that_is_not_linear():
    for optimizer in (optimizers.adam(), optax.sgd(0.1)):
        with pytest.raises(
            ValueError, match=r"linear in the gradient .*: 'sgd' without clip, or optim"
        ):
            effective_joint(optimizer, reach())
    effective_joint(optimizers.LinearOptimizer(optax.sgd(0.1), 0.1), reach())


def test_a_linear_optimizer_is_its_chain():
    made = optimizers.LinearOptimizer(optax.sgd(0.5, 0.9), 0.25)
    assert isinstance(made, optax.GradientTransformation)
    start = jnp.asarray([2.0, -1.0])
    step, _ = made.update(jnp.ones(2), made.init(start), start)
    assert step.tolist() == [-0.5 * (1 + 0.5), -0.5 * (1 - 0.25)]
    bare = optimizers.LinearOptimizer(optax.sgd(0.5))
    step, _ = bare.update(jnp.ones(2), bare.init(start), start)
    assert step.tolist() == [-0.5, -0.5]
    assert made.weight_decay == optimizers.WeightDecay(0.25, 0.25)
    assert not bare.weight_decay


def _distances(rates, decay, steps, **settings):
    """Returns how far multi-way and its control are apart after some steps, for each rate."""

    def end(rule, rate):
        made = rule(
            optimizers.sgd(lambda count: rate, decay, 0.9, nesterov=True), reach(), **settings
        )
        now, own = params(), made.init(params())
        for _ in range(steps):
            updated = made.update(losses, weights(), now, state(), own, KEY)
            now, own = updated.params, updated.state
        return now

    def distance(rate):
        found, expected = (jax.tree.leaves(end(rule, rate)) for rule in (multiway, effective_joint))
        return jnp.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(found, expected, strict=True)))

    return np.asarray(jax.jit(jax.vmap(distance))(jnp.asarray(rates)))


@pytest.mark.parametrize("settings", [{}, {"scale_own": True, "adjust": False}], ids=str)
def test_multi_way_is_its_control_to_first_order(settings):
    # The second of two decays sees what the first has left: a difference of rate^2 decay.
    distances = _distances([0.005, 0.0025, 0.00125], 0.5, 2, **settings)
    assert distances[0] > 1e-4
    np.testing.assert_allclose(distances[:-1] / distances[1:], 4, rtol=0.1)


def test_without_weight_decay_multi_way_is_its_control():
    assert _distances([0.1], 0.0, 2) < 1e-5


# AuxNet-56-5: layers 15, 25, 35, 45, nu = 2.
GAMMAS = {"a": 1 / 9, "b": 25 / 81, "c": 49 / 81, "d": 1.0, "main": 1.0}


def _nested(params, state):
    """Loss k reads the first k of five parameters, each along an axis of its own."""
    axes = jnp.eye(5)

    def loss(k):
        return sum(axes[k] @ params[f"p{i}"] for i in range(k + 1))

    return {name: loss(k) for k, name in enumerate(GAMMAS)}, ({}, state)


def _control(decay):
    start = {f"p{i}": jnp.ones(5) for i in range(5)}
    trees = traced.reach(lambda p: _nested(p, {})[0], start)
    rule = effective_joint(optimizers.sgd(1.0, decay, 0.0), trees, scale_own=True)
    given = {name: jnp.float32(weight) for name, weight in GAMMAS.items()}
    none = {"none": jnp.zeros(())}
    moved = run(rule, 1, start, given, _nested, none).params
    return {name: np.asarray(1 - value) for name, value in moved.items()}


def test_the_effective_weights_and_decay_of_auxnet_56_5():
    # gamma_k / (gamma_k + … + gamma_K).
    expected = [0.055, 0.161, 0.377, 1, 1]
    found = _control(0.0)
    for i in range(5):
        np.testing.assert_allclose(found[f"p{i}"], [0] * i + expected[i:], atol=5e-4)
    # How often each segment decays: the inverse sizes of the steps of all that reach it.
    decayed = _control(0.5)
    factors = [(decayed[f"p{i}"] - found[f"p{i}"]) / 0.5 for i in range(5)]
    for found, factor in zip(factors, [3.64, 3.15, 2.62, 2, 1], strict=True):
        np.testing.assert_allclose(found, factor, atol=6e-3)


def test_a_weight_of_0_leaves_an_exit_and_all_else_finite():
    given = weights(side=0.0, middle=0.0)
    found = run(effective_joint(optimizers.sgd(0.1, 0.0, 0.0), reach()), 1, None, given).params
    np.testing.assert_array_equal(found["side"], params()["side"])
    chex.assert_tree_all_finite(found)


# ---- A loss of weight 0 is absent.


@mixes_dtypes
@pytest.mark.parametrize("rule", [multiway, pairwise])
def test_a_loss_of_weight_0_takes_no_step(rule):
    made = rule(optax.adamw(0.1, weight_decay=0.3), reach())
    before = run(made, 2)
    update = jax.jit(lambda given, *rest: made.update(losses, given, *rest, KEY))
    found = update(weights(side=0.0), before.params, before.model_state, before.state)
    # Neither moments nor decay act, nor does a count advance.
    new, old = ((each.params["side"], each.state["side"]) for each in (found, before))
    chex.assert_trees_all_equal(new, old)
    # All else is as if there were no such loss.
    others = {name: tree for name, tree in reach().items() if name != "side"}
    without = rule(optax.adamw(0.1, weight_decay=0.3), others)
    state = {name: own for name, own in before.state.items() if name != "side"}
    given = {name: weight for name, weight in weights().items() if name != "side"}

    def fewer(params, model_state):
        named, rest = losses(params, model_state)
        return {name: named[name] for name in others}, rest

    step = jax.jit(lambda *rest: without.update(fewer, given, *rest, KEY))
    expected = step(before.params, before.model_state, state)
    assert_close(found.params, expected.params)
    assert_close({name: found.state[name] for name in others}, expected.state)
    assert float(found.losses["side"]) > 0


def test_with_a_weight_of_0_multi_way_is_its_control():
    optimizer, given = optimizers.sgd(0.1, 0.0, 0.9), weights(side=0.0, middle=0.0)
    found, expected = (
        run(rule(optimizer, reach()), 2, None, given).params for rule in (multiway, effective_joint)
    )
    assert_close(found, expected, 1e-4, 1e-5)
    # What a loss that is absent shares does not decay for it.
    one = {"w": jnp.ones(2)}

    def both(params, state):
        return {"a": 0.0 * params["w"].sum(), "main": 0.0 * params["w"].sum()}, ({}, state)

    trees = traced.reach(lambda p: both(p, {})[0], one)
    decayed = [
        rule(optimizers.sgd(1.0, 0.5, 0.0), trees).update(
            both, {"a": jnp.float32(0), "main": jnp.float32(1)}, one, {}, start, KEY
        )
        for rule in (multiway, effective_joint)
        for start in [rule(optimizers.sgd(1.0, 0.5, 0.0), trees).init(one)]
    ]
    assert [updated.params["w"].tolist() for updated in decayed] == [[0.5, 0.5]] * 2


# ---- Dtypes, and one program for all steps.


def _linear(params, model_state):
    h = params["first"] @ params["second"]
    named = {"exit": (params["first"] ** 2).mean(), "main": (h**2).mean()}
    return named, ({"main": h}, model_state)


def _signature(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def _float32_steps(momentum):
    """Makes gradient descent whose steps are float32, and whose momentum becomes it."""

    def decay(gradient, state, params):
        return jax.tree.map(lambda g, p: g + jnp.ones(p.shape) * p, gradient, params), state

    return optax.chain(
        optax.GradientTransformation(lambda params: optax.EmptyState(), decay),
        optax.sgd(0.1, momentum),
    )


LINEAR = {"exit": {"first": True, "second": False}, "main": {"first": True, "second": True}}


def _made(rule, aggregator=SUM, weighting=None, optimizer=None, **settings):
    linear = optimizers.LinearOptimizer(optax.sgd(0.1, 0.9, accumulator_dtype=jnp.float32), 0.1)
    optimizer = optimizer or (
        linear if rule == "effective_joint" else optax.adamw(0.1, mu_dtype=jnp.float32)
    )
    made = UPDATES[rule](optimizer, LINEAR, aggregator=aggregator, **settings)
    return weighted(made, weighting, LINEAR) if weighting else made


def _start(dtype):
    return {"first": jnp.ones((2, 2), dtype), "second": jnp.full((2, 2), 0.5, dtype)}


def _update(rule):
    ones = {"exit": jnp.float32(0.5), "main": jnp.float32(1)}

    def update(params, model_state, state):
        updated = rule.update(_linear, ones, params, model_state, state, KEY)
        return updated.params, updated.model_state, updated.state

    return update


def _keeps_its_signature(rule, dtype):
    start = _start(dtype)
    given = start, {}, rule.init(start)
    return _signature(jax.eval_shape(_update(rule), *given)) == _signature(given)


DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)


@mixes_dtypes
@DTYPES
@pytest.mark.parametrize("rule", UPDATES)
def test_parameters_and_states_keep_their_dtypes(rule, dtype):
    for aggregator in AGGREGATORS.values():
        assert _keeps_its_signature(_made(rule, aggregator()), dtype)
    for name in WEIGHTINGS:
        weighting = WEIGHTINGS[name](period=3) if name == "dwa" else WEIGHTINGS[name]()
        assert _keeps_its_signature(_made(rule, weighting=weighting), dtype)
    if rule != "effective_joint":
        assert _keeps_its_signature(_made(rule, optimizer=_float32_steps(0.9)), dtype)
    assert _keeps_its_signature(_made(rule, adjust=True), dtype)
    if rule == "multiway":
        assert _keeps_its_signature(_made(rule, shared_state=True), dtype)
        shared = _made(rule, shared_state=True, optimizer=_float32_steps(0.9))
        assert _keeps_its_signature(shared, dtype)


@mixes_dtypes
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        *((rule, {}) for rule in UPDATES),
        ("joint", {"aggregator": UPGrad()}),
        ("multiway", {"shared_state": True}),
        ("joint", {"weighting": FAMO()}),
    ],
    ids=str,
)
def test_ten_steps_are_one_program(rule, settings, dtype):
    made, params = _made(rule, **settings), _start(dtype)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(_update(made), n=1))
    state = {}, made.init(params)
    for _ in range(10):
        params, *state = step(params, *state)
    chex.assert_tree_all_finite(params)
    assert float(jnp.abs(params["first"] - 1).max()) > 0


def test_a_small_factor_is_taken_in_float32():
    # 1e-5 is a float16 of two bits, 1e6 none.
    small, large = jnp.float32(1e-5), jnp.float32(1e6)
    values = jnp.asarray([1024.0, 2e-4], jnp.float16)
    assert scale(small, values)[0] == jnp.float16(1024e-5)
    assert float(scale(large, values)[1]) == pytest.approx(200, rel=1e-3)
    assert scale(small, values).dtype == jnp.float16
