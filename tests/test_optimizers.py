"""Schedules and weight decay by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from branched import KEY, assert_close
from ml_collections import ConfigDict
from planned import normal, shape, shapes_of

from sire_jax import configuration, optimizers, traced
from sire_jax.backbones import SmallCNN
from sire_jax.configuration import experiment
from sire_jax.configuration import optimizers as optimizer_section
from sire_jax.heads import Classifier
from sire_jax.networks import Network
from sire_jax.optimizers import WeightDecay, number_or_schedule, sgd, triangular
from sire_jax.updates import effective_joint, joint

# ---- A triangle.


def _values(schedule, counts):
    return [float(schedule(jnp.asarray(count))) for count in counts]


def test_a_triangle_by_hand():
    schedule = triangular(0.8, 4, 12)
    expected = [0, 0.2, 0.6, 0.8, 0.7, 0.4, 0.1, 0, 0]
    np.testing.assert_allclose(
        _values(schedule, [0, 1, 3, 4, 5, 8, 11, 12, 99]), expected, atol=1e-7
    )
    schedule = triangular(2.0, 0.5, 1.0, init_value=1.0, end_value=0.5)
    expected = [1.0, 1.5, 2.0, 1.25, 0.5, 0.5]
    np.testing.assert_allclose(_values(schedule, [0, 0.25, 0.5, 0.75, 1.0, 3.0]), expected)
    # Ends that are higher than the middle are allowed.
    np.testing.assert_allclose(_values(triangular(0.0, 1, 2, 1.0, 1.0), [0, 1, 2]), [1, 0, 1])
    assert schedule(jnp.int32(1)).dtype == jnp.float32
    assert schedule(jnp.int32(1)).shape == ()


def test_a_triangle_over_a_run():
    section = {"name": "triangular", "peak_value": 0.9, "peak": 0.4, "end": 1.0, "unit": "run"}
    units = {"epoch": 5, "run": 50}
    schedule = jax.jit(number_or_schedule(section, "learning rate", units))
    found = [float(schedule(jnp.int32(step))) for step in (0, 10, 20, 35, 49, 50)]
    np.testing.assert_allclose(found, [0, 0.45, 0.9, 0.45, 0.03, 0], atol=1e-6)
    per_epoch = number_or_schedule(
        {**section, "peak": 4.0, "end": 10.0, "unit": "epoch"}, "learning rate", units
    )
    np.testing.assert_allclose(per_epoch(jnp.int32(35)), 0.45, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peak_value": -0.1}, r"has the values 0.0, -0.1 and 0.0; they should be at least 0"),
        ({"init_value": -1.0}, r"has the values -1.0, 1.0 and 0.0"),
        ({"end_value": float("inf")}, r"has the values 0.0, 1.0 and inf"),
        ({"peak_value": float("nan")}, r"has the values 0.0, nan and 0.0"),
        ({"peak": 0}, r"its peak at 0 and its end at 2; .* above 0, the end after the peak"),
        ({"peak": 2}, r"its peak at 2 and its end at 2"),
        ({"peak": 3}, r"its peak at 3 and its end at 2"),
        ({"end": float("inf")}, r"its peak at 1 and its end at inf"),
    ],
)
def test_a_triangle_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        triangular(**{"peak_value": 1.0, "peak": 1, "end": 2, **settings})


def test_a_triangle_in_a_unit_of_unknown_length_is_refused():
    section = {"name": "triangular", "peak_value": 0.9, "peak": 0.4, "end": 1.0, "unit": "run"}
    with pytest.raises(ValueError, match=r"unit 'run', but .* set config.data.images"):
        number_or_schedule(section, "learning rate", {"epoch": None, "run": None})
    del section["end"]
    with pytest.raises(ValueError, match=r"schedule .* 'triangular' needs a value for end"):
        number_or_schedule(section, "learning rate", {"run": 9})


# ---- Weight decay.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, (0.5, 0.5)),
        (0, (0.0, 0.0)),
        ({"backbone": 0.25, "heads": 1}, (0.25, 1.0)),
        (ConfigDict({"heads": 0.5, "backbone": 0.0}), (0.0, 0.5)),
        (WeightDecay(0.1, 0.2), (0.1, 0.2)),
    ],
)
def test_weight_decay_is_a_number_or_two(value, expected):
    found = WeightDecay.of(value)
    assert (found.backbone, found.heads) == expected
    assert bool(found) is any(expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, r"weight decay is -0.1; it should be finite and at least 0"),
        (float("nan"), r"weight decay is nan"),
        (True, r"weight decay is True; it should be a number"),
        ("much", r"weight decay is 'much'; it should be a number"),
        (None, r"weight decay is None; it should be a number"),
        ({"backbone": 0.1, "heads": -1.0}, r"weight decay is -1.0"),
        ({"backbone": 0.1, "heads": "few"}, r"weight decay is 'few'"),
        ({"backbone": 0.1}, r"has the keys \['backbone'\]; it should be a number, or have 'backb"),
        ({"backbone": 0.1, "head": 0.1}, r"has the keys \['backbone', 'head'\]"),
        ({}, r"has the keys \[\]"),
    ],
)
def test_bad_weight_decay_is_refused(value, message):
    for make in (WeightDecay.of, lambda v: sgd(0.1, v), lambda v: optimizers.adam(0.1, v)):
        with pytest.raises(ValueError, match=message):
            make(value)


def test_each_parameter_of_a_network_has_its_decay():
    heads = {"exit_1": Classifier(("block_1",), 2), "a": Classifier(("block_2",), 2)}
    network = Network(SmallCNN(classes=2, channels=(2, 2)), heads)
    params = shapes_of(network, shape(2, 8, 8, 1))["params"]
    decay = WeightDecay(0.25, 0.5).by_leaf(params)
    by_leaf = jax.tree.unflatten(jax.tree.structure(params), decay)
    assert set(params) == {"backbone", "heads_exit_1", "heads_a"}
    assert set(jax.tree.leaves(by_leaf["backbone"])) == {0.25}
    assert jax.tree.leaves([by_leaf["heads_a"], by_leaf["heads_exit_1"]]) == [0.5] * 4
    # What else a user has is no head, nor is what lies deeper.
    assert WeightDecay(1.0, 2.0).by_leaf({"head": 0.0, "trunk": {"heads_x": 0.0}}) == [1.0, 1.0]


def _params():
    return {
        "backbone": {"w": normal(0, 3, 2), "unread": normal(5, 2)},
        "heads_a": {"w": normal(1, 3), "b": normal(2)},
        "heads_b": {"w": normal(3, 2)},
    }


X = normal(4, 5, 3)


def _losses(params, state):
    """Two heads on a linear trunk; nothing reads "unread"."""
    trunk = X @ params["backbone"]["w"]
    a = ((X @ params["heads_a"]["w"] + params["heads_a"]["b"]) * trunk.sum(1)).mean()
    b = ((trunk @ params["heads_b"]["w"]) ** 2).mean()
    return {"a": a, "main": b}, ({}, state)


WEIGHTS = {"a": jnp.float32(1.0), "main": jnp.float32(1.0)}
DECAY = {"backbone": 0.25, "heads": 0.5}


def _reach():
    return traced.reach(lambda p: _losses(p, {})[0], _params())


def _step(rule, params, steps=1):
    state = rule.init(params)
    update = jax.jit(lambda p, s: rule.update(_losses, WEIGHTS, p, {}, s, KEY)[:2])
    for _ in range(steps):
        params, state = update(params, state)
    return params


def _decayed(gradient, params):
    decay = {"backbone": 0.25, "heads_a": 0.5, "heads_b": 0.5}
    return {
        k: jax.tree.map(lambda g, p, d=decay[k]: g + d * p, gradient[k], params[k]) for k in decay
    }


def _gradient(params):
    return jax.grad(lambda p: sum(_losses(p, {})[0].values()))(params)


def test_a_step_with_different_decay_of_backbone_and_heads_by_hand():
    params = _params()
    penalty = WeightDecay.of(DECAY).penalty()
    zeros = jax.tree.map(jnp.zeros_like, params)
    decayed, _ = penalty.update(zeros, penalty.init(params), params)
    assert_close(decayed, _decayed(zeros, params), atol=0)

    # Two steps of momentum: v1 = g1, v2 = 0.9 v1 + g2.
    rule = sgd(0.1, DECAY, momentum=0.9)
    state, now = rule.init(params), params
    momentum = zeros
    for _ in range(2):
        gradient = _gradient(now)
        decayed = _decayed(gradient, now)
        momentum = jax.tree.map(lambda v, g: 0.9 * v + g, momentum, decayed)
        expected = jax.tree.map(lambda p, v: p - 0.1 * v, now, momentum)
        step, state = rule.update(gradient, state, now)
        now = optax.apply_updates(now, step)
        assert_close(now, expected)


def test_the_joint_rule_decays_backbone_and_heads_differently_and_what_none_reads_not():
    params = _params()
    rule = joint(sgd(0.1, DECAY, momentum=0.0), _reach())
    found = _step(rule, params)
    decayed = _decayed(_gradient(params), params)
    decayed["backbone"]["unread"] = jnp.zeros(2)
    assert_close(found, jax.tree.map(lambda p, g: p - 0.1 * g, params, decayed))
    np.testing.assert_array_equal(found["backbone"]["unread"], params["backbone"]["unread"])


def test_equal_decay_of_both_is_that_of_all():
    reach, params = _reach(), _params()
    for rule in (joint, effective_joint):
        one, two = (
            _step(rule(sgd(0.1, decay), reach), params, 2)
            for decay in (0.5, {"backbone": 0.5, "heads": 0.5})
        )
        assert_close(one, two, rtol=0, atol=0)


def test_the_control_of_multiway_decays_backbone_and_heads_differently():
    # Both losses reach the backbone's w, whose decay counts twice; each head is reached by one.
    params = _params()
    found = _step(effective_joint(sgd(0.1, DECAY, momentum=0.0), _reach()), params)
    decay = {"backbone": 2 * 0.25, "heads_a": 0.5, "heads_b": 0.5}
    gradient = _gradient(params)
    for key, times in decay.items():
        expected = jax.tree.map(
            lambda p, g, d=times: p - 0.1 * (g + d * p), params[key], gradient[key]
        )
        if key == "backbone":
            expected["unread"] = params[key]["unread"]
        assert_close(found[key], expected)


@pytest.mark.optax_dtypes
def test_adam_has_the_penalty_in_its_gradient():
    params = _params()
    gradient = _gradient(params)
    ours, plain = optimizers.adam(0.1, DECAY), optax.adam(0.1)
    found, _ = ours.update(gradient, ours.init(params), params)
    expected, _ = plain.update(_decayed(gradient, params), plain.init(params))
    assert_close(found, expected)


def test_a_config_may_decay_heads_by_themselves():
    config = configuration.default()
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(2, 2))
    config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    config.data.images, config.epochs = 1198, 3
    rate = {"name": "triangular", "peak_value": 0.1, "peak": 0.4, "end": 1.0, "unit": "run"}
    config.optimizer = configuration.optimizer("sgd", learning_rate=rate, weight_decay=DECAY)
    changed = configuration.override(config, ["--config.optimizer.weight_decay.heads=0.75"])
    again = configuration.from_json(configuration.to_json(changed))
    assert again.optimizer.weight_decay.to_dict() == {"backbone": 0.25, "heads": 0.75}
    made = optimizer_section.create(again, {"epoch": 10, "run": 30}, {})
    assert made.weight_decay == WeightDecay(0.25, 0.75)
    assert experiment.build(again).config.optimizer.weight_decay.heads == 0.75
    again.optimizer.weight_decay.heads = -1.0
    with pytest.raises(ValueError, match=r"weight decay is -1\.0;"):
        experiment.build(again)


# ---- Warm-up and clipping.


def test_a_warmup_multiplies_any_schedule_by_what_rises_to_one():
    section = {"name": "linear", "init_value": 1.0, "end_value": 0.0, "transition_steps": 10}
    warmed = number_or_schedule({**section, "warmup": 4}, "learning rate")
    expected = [0.25, 0.9 * 0.5, 0.8 * 0.75, 0.7, 0.6, 0.0]
    np.testing.assert_allclose(_values(warmed, [0, 1, 2, 3, 4, 10]), expected, rtol=1e-6)
    units = {"epoch": 4, "run": 40}
    of_epochs = {**section, "transition_steps": 10, "unit": "epoch", "warmup": 1.0}
    warmed = number_or_schedule(of_epochs, "learning rate", units)
    np.testing.assert_allclose(_values(warmed, [0, 3, 4]), [0.25, 0.925, 0.9], rtol=1e-6)
    without = number_or_schedule({**section, "warmup": 0.0}, "learning rate")
    np.testing.assert_allclose(_values(without, [0, 1]), [1.0, 0.9], rtol=1e-6)


def test_a_warmup_that_is_longer_than_the_run_is_refused():
    section = {"name": "constant", "value": 0.1, "unit": "run", "warmup": 2}
    with pytest.raises(ValueError, match=r"warmup of the rate is 2 runs, .* 2 epochs are 0\.1\."):
        number_or_schedule(section, "rate", {"epoch": 5, "run": 100})


@pytest.mark.parametrize("warmup", [-1, float("inf"), "long", True])
def test_what_is_no_warmup_is_refused(warmup):
    section = {"name": "constant", "value": 0.1, "warmup": warmup}
    with pytest.raises(ValueError, match="The warmup of the learning rate is"):
        number_or_schedule(section, "learning rate")


@pytest.mark.optax_dtypes
def test_a_long_gradient_is_scaled_down_ahead_of_weight_decay():
    params = {"a": jnp.array([2.0]), "b": jnp.array([0.0])}
    gradient = {"a": jnp.array([30.0]), "b": jnp.array([-40.0])}
    optimizer = sgd(0.1, 0.5, momentum=0.0, clip=1.0)
    step, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(step["a"], [-0.1 * (0.6 + 0.5 * 2)], rtol=1e-6)
    np.testing.assert_allclose(step["b"], [0.1 * 0.8], rtol=1e-6)
    short = jax.tree.map(lambda x: x / 100, gradient)
    plain = sgd(0.1, 0.5, momentum=0.0)
    for each in (optimizer, plain):
        step, _ = each.update(short, each.init(params), params)
        np.testing.assert_allclose(step["a"], [-0.1 * (0.3 + 1)], rtol=1e-6)
    assert not isinstance(optimizer, optimizers.LinearOptimizer)
    with pytest.raises(ValueError, match=r"The clip is -1.0; it should be finite and at least 0"):
        optimizers.adam(clip=-1.0)
