"""Update rules as programs: what they cost, compiled, mapped and saved; and with aggregators."""

from dataclasses import dataclass

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
from planned import shape, shapes_of

from sire_jax import optimizers, traced
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.preactivation import Activation, PreActivation, Stem
from sire_jax.heads.classifier import Classifier
from sire_jax.networks import Network
from sire_jax.storage.checkpoint import Checkpoints
from sire_jax.updates import UPDATES, effective_joint, joint, multiway, pairwise
from sire_jax.updates.aggregators import SUM, UPGrad
from sire_jax.updates.gradients import factors, gramians
from sire_jax.updates.reached import Reached
from sire_jax.updates.rule import Updated

# ---- What a step costs.

# Multiply-adds by hand: a forward pass as far as a loss, and the way back, where a matrix is
# multiplied for its own gradient and once more for what it was given, if that depends on any.
ONE, TWO, HEAD = 5 * 4 * 3, 5 * 3 * 3, 5 * 3 * 2
FORWARD = {
    "probe": ONE + TWO + HEAD,
    "side": ONE + HEAD,
    "early": ONE + HEAD,
    "middle": ONE + TWO + HEAD,
    "main": ONE + 2 * TWO + HEAD,
}
BACKWARD = {
    "probe": HEAD,
    "side": ONE + 2 * HEAD,
    "early": ONE + 2 * HEAD,
    "middle": ONE + 2 * TWO + 2 * HEAD,
    "main": ONE + 4 * TWO + 2 * HEAD,
}
EVERYTHING = ONE + 2 * TWO + 5 * HEAD
COSTS = {
    "joint": EVERYTHING + ONE + 4 * TWO + 9 * HEAD,
    "effective_joint": EVERYTHING + ONE + 4 * TWO + 9 * HEAD,
    "multiway": EVERYTHING + sum(BACKWARD.values()),
    # The outputs are all of the last forward pass.
    "pairwise": sum(FORWARD.values()) + sum(BACKWARD.values()) + 4 * HEAD,
}


@pytest.mark.parametrize("name", UPDATES)
def test_the_multiply_adds_of_a_step(name):
    rule = UPDATES[name](optimizers.sgd(), reach())

    def cost(chosen):
        def update(params):
            updated = rule.update(losses, weights(), params, state(), rule.init(params), KEY)
            return [getattr(updated, each) for each in chosen]

        return traced.multiply_adds(update, params())

    assert cost(Updated._fields) == COSTS[name]
    if name != "pairwise":
        assert cost(["params", "losses"]) == COSTS[name]
        return
    # No forward pass is longer for the network's state, but "both" needs two more outputs.
    bare = sum(FORWARD.values()) + sum(BACKWARD.values())
    assert cost(["params", "losses"]) == bare
    assert cost(["params", "losses", "model_state"]) == bare + 2 * HEAD


TRUNK = Plan(((Stem(2), *[PreActivation((2, 2))] * 4),), tail=(Activation(),))


def test_on_a_trunk_each_pass_goes_as_far_as_its_exit():
    head = Classifier(("stage_1_block_3",), 2, normalize=True)
    network = Network(Planned(TRUNK, 2), {"exit": head})
    image = shape(3, 6, 6, 1)
    variables = shapes_of(network, image)
    given = variables["params"], {"batch_stats": variables["batch_stats"]}, image

    def on(image):
        def losses(params, stats):
            variables = {"params": params, **stats}
            outputs, new = network.apply(variables, image, train=True, mutable=["batch_stats"])
            return {name: (output**2).sum() for name, output in outputs.items()}, (outputs, new)

        return losses

    trees = traced.reach(lambda p, s, x: on(x)(p, s)[0], *given)
    assert Reached.of(trees).names == ("exit", "main")

    forward = traced.multiply_adds(lambda p, s, x: on(x)(p, s)[0]["exit"], *given)
    # A stem of 3 x 3 from 1 to 2 channels, two blocks of two convolutions, a dense layer.
    assert forward == 3 * (36 * 9 * (2 + 4 * 2 * 2) + 2 * 2)

    def alone(name):
        def one(params, stats, image):
            return jax.value_and_grad(lambda p: on(image)(p, stats)[0][name])(params)

        return traced.multiply_adds(one, *given)

    def cost(rule):
        made = rule(optimizers.sgd(), trees)

        def update(params, stats, image):
            weights = {name: jnp.float32(1) for name in trees}
            updated = made.update(on(image), weights, params, stats, made.init(params), KEY)
            # New batch statistics are those of the passes that come by.
            return updated.params, updated.model_state, updated.losses

        return traced.multiply_adds(update, *given)

    assert cost(pairwise) == alone("exit") + alone("main")
    assert alone("exit") < 0.7 * alone("main")
    # One forward pass in place of two: the main one's, and the head.
    assert cost(pairwise) - cost(multiway) == forward - 3 * 2 * 2
    assert cost(joint) == cost(effective_joint) < cost(multiway)


# ---- Aggregators.


@dataclass(frozen=True)
class Constant:
    """Multiplies all gradients by a number; not the built-in sum."""

    value: float = 1.0

    def __call__(self, gramian, key):
        return jnp.full(len(gramian), self.value)


@dataclass(frozen=True)
class Share:
    """Multiplies each gradient by its share of the squared norms."""

    def __call__(self, gramian, key):
        return jnp.diag(gramian) / jnp.trace(gramian)


@dataclass(frozen=True)
class Drawn:
    """Multiplies gradients by random numbers."""

    def __call__(self, gramian, key):
        return jax.random.uniform(key, (len(gramian),))


@pytest.mark.parametrize("name", UPDATES)
def test_a_constant_is_a_sum_and_no_matter_to_what_one_loss_alone_reaches(name):
    optimizer = optimizers.sgd(0.1, momentum=0.0)
    plain = run(UPDATES[name](optimizer, reach()))

    @jax.jit
    def multiplied(value):
        rule = UPDATES[name](optimizer, reach(), aggregator=Constant(value))
        return rule.update(losses, weights(), params(), state(), rule.init(params()), KEY)

    assert_close(multiplied(jnp.float32(1)), plain)
    if name == "pairwise":
        return
    found = multiplied(jnp.float32(10))
    for key, value in params().items():
        factor = 10 if key in SHARED else 1
        expected = value + factor * (plain.params[key] - value)
        assert_close(found.params[key], expected, 1e-4, 1e-5)
    # Of one forward pass losses, outputs and state are the network's.
    named, (outputs, seen) = losses(params(), state())
    assert_close((plain.losses, plain.outputs, plain.model_state), (named, outputs, seen))


def _weighted():
    return {
        name: {key: WEIGHTS[name] * value for key, value in gradient(params(), name).items()}
        for name in REACHED
    }


def test_the_inner_products_are_those_of_each_group():
    each, reached = _weighted(), Reached.of(reach())
    found = gramians(each, reached)
    groups = {
        ("side", "early", "middle", "main"): "w1",
        ("middle", "main"): "w2",
        ("early", "middle"): "shared",
    }
    assert set(found) == set(groups)
    for names, key in groups.items():
        rows = np.stack([np.asarray(each[name][key]).ravel() for name in names])
        np.testing.assert_allclose(found[names], rows @ rows.T, rtol=1e-4, atol=1e-6)


def test_a_group_may_be_several_arrays():
    def two(params):
        first = (params["a"] ** 2).sum() + params["b"].sum()
        return {"x": first, "main": params["a"].sum() - 2 * params["b"].sum()}

    start = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.ones((1, 2))}
    reached = Reached.of(traced.reach(two, start))
    each = {name: jax.grad(lambda p, n=name: two(p)[n])(start) for name in ("x", "main")}
    (found,) = gramians(each, reached).values()
    # (2, 4, 1, 1) and (1, 1, -2, -2).
    assert found.tolist() == [[22.0, 2.0], [2.0, 10.0]]


def test_coefficients_are_found_from_the_weighted_gradients_of_each_group():
    each, reached = _weighted(), Reached.of(reach())
    found = factors(each, reached, Share(), KEY)
    squares = {n: {k: float((g**2).sum()) for k, g in tree.items()} for n, tree in each.items()}
    for name in REACHED:
        for key, factor in found[name].items():
            sharing = [n for n, keys in REACHED.items() if key in keys]
            alone = key not in SHARED or name not in sharing
            total = sum(squares[n][key] for n in sharing)
            expected = 1.0 if alone else squares[name][key] / total
            assert float(factor) == pytest.approx(expected, rel=1e-4)
    # A joint step with them.
    optimizer = optimizers.sgd(0.1, momentum=0.0)
    moved = run(joint(optimizer, reach(), aggregator=Share())).params
    for key, value in params().items():
        step = sum(float(found[name][key]) * each[name][key] for name in REACHED)
        assert_close(moved[key], value - 0.1 * step)


def test_each_group_and_step_draws_anew():
    each, reached = _weighted(), Reached.of(reach())
    first, again, later = (factors(each, reached, Drawn(), jax.random.key(i)) for i in (0, 0, 1))
    drawn = [float(first[n][k]) for n, k in (("middle", "w2"), ("early", "shared"))]
    drawn += [float(first[name]["w1"]) for name in ("side", "early", "middle", "main")]
    drawn.append(float(later["middle"]["w2"]))
    assert len(set(drawn)) == len(drawn)
    assert_close(first, again)


@pytest.mark.parametrize("aggregator", [Share(), Drawn()], ids=str)
def test_with_an_aggregator_too_multi_way_is_its_control(aggregator):
    # Without decay the two are the same, as is what the aggregator sees.
    optimizer = optimizers.sgd(0.1)
    found, expected = (
        run(rule(optimizer, reach(), aggregator=aggregator)).params
        for rule in (multiway, effective_joint)
    )
    assert_close(found, expected, 1e-4, 1e-5)
    plain = run(multiway(optimizer, reach())).params
    assert float(jnp.abs(found["w1"] - plain["w1"]).max()) > 1e-3


@pytest.mark.parametrize("rule", UPDATES.values())
def test_an_aggregator_needs_two_losses_that_share_parameters(rule):
    one = {"main": reach()["main"]}
    with pytest.raises(ValueError, match=r"UPGrad\(\) has nothing .* only one loss, 'main'.*'sum'"):
        rule(optimizers.sgd(), one, aggregator=UPGrad())
    apart = {name: reach()[name] for name in ("main", "probe")}
    message = r"nothing to aggregate: no two of the losses probe, main reach the same"
    with pytest.raises(ValueError, match=message):
        rule(optimizers.sgd(), apart, aggregator=UPGrad())
    # A sum has nothing to do, either, and is none the worse for it.
    rule(optimizers.sgd(), one)
    rule(optimizers.sgd(), apart)


# ---- Pair-wise passes, and the network's own state.


@pytest.mark.parametrize("aggregator", [SUM, Share()], ids=str)
def test_pair_wise_state_is_of_the_last_pass_that_comes_by(aggregator):
    optimizer = optimizers.sgd(0.1, momentum=0.0)
    found = run(pairwise(optimizer, reach(), aggregator=aggregator))
    # Coefficients are those of the gradients before the step.
    factor = factors(_weighted(), Reached.of(reach()), aggregator, KEY)
    # The parameters at each loss's forward pass.
    at, now = {}, params()
    for name, keys in REACHED.items():
        at[name] = now
        each = gradient(now, name)
        scales = {key: WEIGHTS[name] if key in SHARED else 1 for key in keys}
        scales = {key: float(factor[name][key]) * scale for key, scale in scales.items()}
        steps = {key: 0.1 / DIVISORS[name] * scales[key] * each[key] for key in keys}
        now = {**now, **{key: now[key] - step for key, step in steps.items()}}
    assert_close(found.params, now)
    assert_close(found.losses, {name: losses(at[name], state())[0][name] for name in REACHED})
    _, (outputs, last) = losses(at["main"], state())
    assert_close(found.outputs, outputs)
    # What the branch alone sees is of its own pass; what no loss alone sees is of the last one's.
    aside = losses(at["side"], state())[1][1]["aside"]
    assert float(jnp.abs(aside - last["aside"]).max()) > 1e-3
    assert_close(found.model_state, {**last, "aside": aside})
    assert int(found.model_state["count"]) == 5


# ---- Compiled, in a loop, over seeds; saved.


@pytest.mark.parametrize("name", UPDATES)
def test_compiled_in_a_loop_over_steps_and_seeds_a_rule_does_the_same(name):
    rule = UPDATES[name](optimizers.sgd(0.1, 0.1), reach(), aggregator=Share())

    def step(carry, _):
        updated = rule.update(losses, weights(), *carry, KEY)
        return (updated.params, updated.model_state, updated.state), updated.losses

    def two_steps(start):
        return lax.scan(step, (start, state(), rule.init(start)), length=2)

    starts = [params(0), params(1)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *starts)
    found = jax.jit(jax.vmap(two_steps))(stacked)
    for i, start in enumerate(starts):
        carry, first = step((start, state(), rule.init(start)), None)
        carry, second = step(carry, None)
        carried, named = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        assert_close(carried, carry, 1e-4, 1e-4)
        for name in REACHED:
            assert_close(named[name], jnp.stack([first[name], second[name]]), 1e-4)


@pytest.mark.optax_dtypes
def test_states_are_restored_from_a_checkpoint(tmp_path):
    adam = [joint, pairwise, multiway]
    rules = {rule.__name__: rule(optax.adam(0.1), reach()) for rule in adam}
    rules["shared"] = multiway(optax.adam(0.1), reach(), shared_state=True)
    rules["control"] = effective_joint(optimizers.sgd(), reach())
    # Any values in place of zeros.
    states = jax.tree.map(lambda leaf: leaf + 3, {k: r.init(params()) for k, r in rules.items()})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, states)
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, states))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    chex.assert_trees_all_equal(restored, states)
