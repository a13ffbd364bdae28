"""Steps and measurements as a notebook makes them: checks, what counts, and what stays the same."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from sire_jax import optimizers
from sire_jax.heads import Classifier
from sire_jax.layers import BatchNorm
from sire_jax.losses import (
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
    negative_probability,
)
from sire_jax.metrics import means
from sire_jax.networks import Network
from sire_jax.objectives import Objective
from sire_jax.predictions import JointProbability, Output
from sire_jax.state import TrainState
from sire_jax.step import Shared, find_reach, make_measure, make_step
from sire_jax.updates import UPDATES, joint, multiway

BATCH = 8
MAIN = Objective("main", "label", cross_entropy)
EXIT = Objective("exit", "label", cross_entropy, 0.5)


class Small(nn.Module):
    """Logits of three classes, and the features before them."""

    @nn.compact
    def __call__(self, x, *, train=False):
        features = nn.tanh(nn.Dense(4, name="features")(x))
        return nn.Dense(3, name="output")(features), {"features": features}


def _network(backbone=None, width=3):
    return Network(backbone or Small(), {"exit": Classifier(("features",), width)})


def _batch(**others):
    random = np.random.default_rng(0)
    image = jnp.asarray(random.normal(size=(BATCH, 5)), jnp.float32)
    return {"image": image, "label": jnp.asarray(random.integers(0, 3, BATCH)), **others}


def _start(network, objectives, batch, make=joint, optimizer=None):
    variables = _variables(network, batch)
    rule = make(
        optimizer or optax.sgd(0.1), find_reach(network.apply, objectives, variables, batch)
    )
    state = TrainState.start(jax.random.key(1), variables, rule)
    return state, jax.jit(make_step(network.apply, objectives, rule))


def _variables(network, batch):
    # One program each: operation by operation, compiling would take most of the time.
    return jax.jit(network.init)(jax.random.key(0), batch["image"])


def _apply(network, batch):
    return jax.jit(network.apply)(_variables(network, batch), batch["image"])


def _measured(network, objectives, batch, *args, **settings):
    measure = jax.jit(make_measure(network.apply, objectives, *args))
    found = means(measure(_variables(network, batch)["params"], {}, batch, **settings))
    return {name: float(value) for name, value in found.items()}


# ---- What counts.


@pytest.mark.parametrize("away", [-1, 3, 255])
def test_ignored_labels_are_left_out_of_the_step_and_of_what_is_measured(away):
    network, batch = _network(), _batch()
    known = np.arange(BATCH) < 3
    ignored = {**batch, "label": jnp.where(known, batch["label"], away)}
    part = {key: values[:3] for key, values in batch.items()}
    objectives = {"main": Objective("main", "label", cross_entropy, ignore=away), "exit": EXIT}
    plain = {"main": MAIN, "exit": EXIT}
    objectives["exit"] = Objective("exit", "label", cross_entropy, 0.5, ignore=away)
    state, step = _start(network, objectives, ignored)
    new, metrics = step(state, ignored)
    expected, expected_metrics = _start(network, plain, part)[1](state, part)
    chex.assert_trees_all_close(new.params, expected.params, rtol=1e-5, atol=1e-7)
    assert float(metrics["main/loss"].count) == 3
    np.testing.assert_allclose(
        means(metrics)["main/loss"], means(expected_metrics)["main/loss"], rtol=1e-5
    )
    found, wanted = _measured(network, objectives, ignored), _measured(network, plain, part)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert set(found) == {"main/loss", "main/top_1", "exit/loss", "exit/top_1"}


def test_a_mask_of_the_batch_weighs_examples_and_hides_impossible_targets():
    network, weight = _network(width=1), jnp.asarray([0.0, 1, 0.5, 0, 0, 0, 0, 2.0])
    target = jnp.where(weight[:, None] > 0, 1.0, jnp.nan) * jnp.ones((BATCH, 1))
    batch = _batch(height=target, known=weight)
    objectives = {"exit": Objective("exit", "height", mean_squared_error, mask="known")}
    output = np.asarray(_apply(network, batch)["exit"])[:, 0]
    expected = (np.asarray(weight) * (output - 1) ** 2).sum() / 3.5
    state, step = _start(network, objectives, batch)
    new, metrics = step(state, batch)
    chex.assert_tree_all_finite(new.params)
    np.testing.assert_allclose(means(metrics)["exit/loss"], expected, rtol=1e-5)
    found = _measured(network, objectives, batch)
    assert found == {"exit/loss": pytest.approx(expected, rel=1e-5)}
    # A mask of the measurement comes on top.
    half = jnp.asarray([1.0, 1, 0, 1, 1, 1, 1, 0.5])
    both = (np.asarray(half * weight) * (output - 1) ** 2).sum() / 2
    assert _measured(network, objectives, batch, mask=half)["exit/loss"] == pytest.approx(both)


def test_positions_without_a_label_are_left_out_one_by_one():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(6)(x).reshape(len(x), 2, 3), {}

    network, batch = Network(Pair(), {}), _batch()
    label = jnp.asarray([[0, 1], [2, -1], [-1, -1], [1, -1]] * 2)
    objective = Objective("main", "digits", cross_entropy, ignore=-1)
    batch = {**batch, "digits": label}
    found = _measured(network, {"main": objective}, batch)
    logits = np.asarray(_apply(network, batch)["main"], np.float64)
    negative = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    at_label = np.take_along_axis(negative, np.maximum(label, 0)[..., None], -1)[..., 0]
    counts = np.asarray(label) >= 0
    # Of the six examples with a label, the sum over their positions with one.
    assert found["main/loss"] == pytest.approx((at_label * counts).sum() / 6, rel=1e-5)
    right = (logits.argmax(-1) == label) & counts
    assert found["main/top_1"] == pytest.approx(right.sum() / counts.sum())


def test_an_objective_without_examples_in_a_batch_is_absent_from_it():
    network, none = _network(), jnp.full(BATCH, -1)
    objectives = {
        "main": MAIN,
        "exit": Objective("exit", "group", cross_entropy, 0.5, ignore=-1),
    }
    batch = _batch(group=none)
    # What a rule is told of it: a weight of 0.
    state, step = _start(network, objectives, batch)
    new, metrics = step(state, batch)
    alone, _ = _start(network, {"main": MAIN}, batch)[1](state, batch)
    before, after = (s.params["heads_exit"]["output"]["kernel"] for s in (state, new))
    np.testing.assert_array_equal(before, after)
    chex.assert_trees_all_close(new.params["backbone"], alone.params["backbone"], rtol=1e-6)
    assert float(metrics["exit/loss"].count) == float(metrics["exit/loss"].total) == 0
    assert float(means(metrics)["total/loss"]) == float(means(metrics)["main/loss"])
    assert np.isnan(_measured(network, objectives, batch)["exit/loss"])


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("loss", [cross_entropy, negative_probability])
def test_a_label_outside_of_its_classes_is_no_number_and_never_right(loss, label):
    batch = _batch()
    wrong = {**batch, "label": batch["label"].at[0].set(label)}
    found = _measured(_network(), {"main": Objective("main", "label", loss)}, wrong)
    assert np.isnan(found["main/loss"])
    rest = {key: values[1:] for key, values in batch.items()}
    right = _measured(_network(), {"main": MAIN}, rest)["main/top_1"]
    assert found["main/top_1"] == pytest.approx(right * (BATCH - 1) / BATCH)


# ---- Metrics belong to objectives.


def test_two_targets_of_one_output_are_measured_apart_and_regression_has_no_accuracy():
    batch = _batch(teacher=jnp.zeros(BATCH, jnp.int32), age=jnp.arange(BATCH) + 20)
    objectives = {
        "main": MAIN,
        "distil": Objective("main", "teacher", cross_entropy, 0.5),
        "age": Objective("exit", "age", lambda o, t: (o[:, 0] - t.astype(o.dtype)) ** 2),
    }
    network = _network(width=1)
    found = _measured(network, objectives, batch)
    assert set(found) == {
        *("main/loss", "main/top_1", "distil/loss", "distil/top_1", "age/loss"),
    }
    guesses = np.asarray(_apply(network, batch)["main"].argmax(-1))
    assert found["main/top_1"] == pytest.approx(float((guesses == batch["label"]).mean()))
    assert found["distil/top_1"] == pytest.approx(float((guesses == 0).mean()))


def test_a_loss_of_ones_own_says_whether_it_classifies():
    def focal(logits, labels):
        return cross_entropy(logits, labels) ** 2

    batch = _batch()
    assert set(_measured(_network(), {"main": Objective("main", "label", focal)}, batch)) == {
        "main/loss"
    }
    own = Objective("main", "label", focal, classifies=True)
    assert set(_measured(_network(), {"main": own}, batch)) == {"main/loss", "main/top_1"}


def test_predictions_count_the_labels_that_the_main_objective_counts():
    network, batch = _network(), _batch()
    label = batch["label"].at[3:].set(-1)
    objectives = {"main": Objective("main", "label", cross_entropy, ignore=-1)}
    found = _measured(network, objectives, {**batch, "label": label}, {"own": Output("main")})
    assert found["own/top_1"] == found["main/top_1"]
    assert found["own/loss"] == pytest.approx(found["main/loss"], rel=1e-5)
    with pytest.raises(ValueError, match="Predictions are measured by 'label', which the batch la"):
        _measured(
            network,
            {"main": Objective("main", "kind", cross_entropy)},
            {"image": batch["image"], "kind": batch["label"]},
            {"own": Output("main")},
        )


def test_a_structured_target_is_trained_on_and_measured():
    def masked(output, target):
        return jnp.where(target["known"], cross_entropy(output, target["label"]), 0.0)

    batch = _batch()
    batch["both"] = {"label": batch["label"], "known": jnp.arange(BATCH) < 4}
    objectives = {"main": Objective("main", "both", masked)}
    state, step = _start(_network(), objectives, batch)
    _, metrics = step(state, batch)
    found = _measured(_network(), objectives, batch)
    assert found == {"main/loss": pytest.approx(float(means(metrics)["main/loss"]))}


# ---- The same promises as in a config.

REFUSED = {
    "an output that is not there": (
        Objective("mian", "label", cross_entropy),
        r"'own' is on the output 'mian', which does not exist. Did you mean 'main'\?",
    ),
    "a target that is not there": (
        Objective("main", "lable", cross_entropy),
        r"'own' is on the target 'lable', which does not exist. Did you mean 'label'\?",
    ),
    "a mask that is not there": (
        Objective("main", "label", cross_entropy, mask="knwon"),
        r"'own' is on the mask 'knwon', which does not exist. Did you mean 'known'\?",
    ),
    "a mask of another shape": (
        Objective("main", "label", cross_entropy, mask="image"),
        r"The mask 'image' of the objective 'own' is float32\[8, 5\]; .* each example, \[8\]",
    ),
    "a loss that broadcasts": (
        Objective("exit", "height", lambda o, t: (o[:, :1] - t[None]) ** 2),
        r"returns \[8, 8\]; it should return one number for each example, \[8\]",
    ),
    "a loss that broadcasts and then means": (
        Objective("one", "height", lambda o, t: ((o - t[None]) ** 2).mean(-1)),
        r"their shapes broadcast, so that each example is compared with the targets of all",
    ),
    "a loss that is several": (
        Objective("main", "label", lambda o, t: (cross_entropy(o, t), 0)),
        r"returns tuple; it should return one number for each example, \[8\]",
    ),
    "a loss that is a mean": (
        Objective("main", "label", lambda o, t: cross_entropy(o, t).mean()),
        r"returns \[\]; it should return one number for each example, \[8\], neither their mean",
    ),
    "one-hot labels": (
        Objective("main", "one_hot", cross_entropy),
        r"labels 'one_hot' that are float32\[8, 3\]; they should be integers.*argmax",
    ),
    "labels of another shape": (
        Objective("main", "pair", cross_entropy),
        r"'pair', int32\[8, 2\], for the logits 'main', float32\[8, 3\]; .* \[8\]",
    ),
    "shapes that can't be compared": (
        Objective("exit", "height", mean_squared_error),
        r"can't compare the output 'exit', float32\[8, 3\], with the target 'height', float32\[8\]",
    ),
    "one logit too many": (
        Objective("exit", "label", binary_cross_entropy),
        r"A binary loss needs one logit, \[b, 1\]; the output is \(8, 3\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_config_is_refused_for_is_refused_by_every_door(what):
    objective, message = REFUSED[what]
    batch = _batch(
        known=jnp.ones(BATCH),
        height=jnp.ones(BATCH),
        one_hot=jnp.ones((BATCH, 3)),
        pair=jnp.zeros((BATCH, 2), jnp.int32),
    )
    heads = {"exit": Classifier(("features",), 3), "one": Classifier(("features",), 1)}
    network = Network(Small(), heads)
    variables = _variables(network, batch)
    objectives = {"own": objective}
    with pytest.raises(ValueError, match=message):
        find_reach(network.apply, objectives, variables, batch)
    with pytest.raises(ValueError, match=message):
        make_measure(network.apply, objectives)(variables["params"], {}, batch)
    rule = joint(optax.sgd(0.1), {"own": jax.tree.map(lambda _: True, variables["params"])})
    state = TrainState.start(jax.random.key(1), variables, rule)
    with pytest.raises(ValueError, match=message):
        jax.jit(make_step(network.apply, objectives, rule))(state, batch)


def test_losses_of_ones_own_may_have_targets_of_another_shape():
    batch = _batch(height=jnp.ones(BATCH), code=jnp.ones((BATCH, 2)))
    objectives = {
        "one": Objective("exit", "height", lambda o, t: (o[:, 0] - t) ** 2),
        "unread": Objective("main", "height", lambda o, t: (o**2).mean(-1)),
        "pairs": Objective("main", "code", lambda o, t: o[:, 0] * t[:, 1]),
    }
    found = _measured(_network(width=1), objectives, batch)
    assert set(found) == {"one/loss", "unread/loss", "pairs/loss"}


def test_names_that_could_not_be_told_apart_are_refused():
    network, batch = _network(), _batch()
    for name, message in (("total", "can't be called 'total'"), ("exit", "has the name of anoth")):
        with pytest.raises(ValueError, match=message):
            _start(network, {name: MAIN}, batch)
    with pytest.raises(ValueError, match="There is no objective"):
        _start(network, {}, batch)


def test_a_batch_without_inputs_is_refused():
    network, batch = _network(), _batch()
    state, step = _start(network, {"main": MAIN}, batch)
    with pytest.raises(ValueError, match=r"A batch has images, label; .* network as 'image'"):
        step(state, {"images": batch["image"], "label": batch["label"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "cross_entropy"}, "loss of an objective is 'cross_entropy'; it should be a func"),
        ({"ignore": "no"}, "An objective ignores 'no'; it should be a whole number, such as -1"),
        ({"weight": -0.5}, "weight of an objective is -0.5; it should be finite and at least 0"),
        ({"weight": float("nan")}, "weight of an objective is nan"),
        (
            {"weight": np.float32(-1)},
            r"weight of an objective is .*-1.0.*; it should be finite and",
        ),
        ({"weight": np.int32(-1)}, r"weight of an objective is .*-1.*; it should be finite and at"),
        ({"weight": jnp.float32(-1)}, r"weight of an objective is .*-1.*; it should be finite and"),
        ({"weight": "0.3"}, "weight of an objective is '0.3'"),
        ({"weight": lambda step: 1.0 - step}, r"is Array\(-999999.* at step 1,000,000; it should"),
        ({"weight": lambda step: jnp.nan}, "is nan at step 0; it should be finite and at least 0"),
        ({"ignore": True}, "An objective ignores True; it should be a whole number"),
    ],
)
def test_an_impossible_objective_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"output": "main", "target": "label", "loss": cross_entropy, **settings})


@pytest.mark.parametrize("weight", [0, 0.5, np.float32(0.5), jnp.bfloat16(0.5), np.int8(3)])
def test_a_weight_is_any_finite_number_from_0(weight):
    objective = Objective("main", "label", cross_entropy, weight)
    assert float(objective.weight_at(0)) == float(weight)


@pytest.mark.parametrize(("dtype", "ignore"), [(np.uint8, 256), (np.uint8, -100), (np.int8, 255)])
def test_what_is_ignored_does_not_wrap_to_another_label(dtype, ignore):
    labels = np.array([0, 1, 156 % 128, -1 % 128], dtype)
    counts = Objective("main", "label", cross_entropy, ignore=ignore).counts({"label": labels})
    assert counts.tolist() == [1, 1, 1, 1]
    assert Objective("main", "label", cross_entropy, ignore=np.int64(1)).counts(
        {"label": jnp.asarray(labels)}
    ).tolist() == [1, 0, 1, 1]


def test_what_counts_less_than_nothing_counts_nothing():
    objective = Objective("main", "label", cross_entropy, mask="known")
    mask = jnp.array([1.0, 0.5, 0.0, -1.0, jnp.nan])
    assert objective.counts({"known": mask}).tolist() == [1, 0.5, 0, 0, 0]


# ---- Networks that can't be what they seem.


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, *, train=False):
        return self.dense(x), {}


def test_what_flax_would_not_train_is_refused():
    with pytest.raises(ValueError, match=r"backbone is .*Nnx, whose parameters would never be tra"):
        Network(Nnx(nnx.Rngs(0)), {})
    with pytest.raises(ValueError, match=r"The head 'own' is .*Nnx"):
        Network(Small(), {"own": Nnx(nnx.Rngs(0))})
    with pytest.raises(ValueError, match=r"should be a flax.linen.Module, made, as in MyNetwork"):
        Network(Small, {})
    with pytest.raises(ValueError, match=r"The backbone is builtins\.function"):
        Network(lambda x, train: (x, {}), {})


def test_endpoints_are_a_tuple_of_names():
    for endpoints, message in (
        ("features", r"has the endpoints 'features'; .* tuple of names, such as \('features',\)"),
        ((), r"has the endpoints \(\); they should be a tuple of names\."),
        ((1,), r"has the endpoints \(1,\); they should"),
    ):
        with pytest.raises(ValueError, match=message):
            Network(Small(), {"exit": Classifier(endpoints, 3)})


def test_a_backbone_may_have_an_attribute_called_endpoints():
    class Method(Small):
        def endpoints(self):
            return ("features",)

    class Number(nn.Module):
        endpoints: int = 2

        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(3)(x), {"features": x}

    for backbone in (Method(), Number()):
        batch = _batch()
        network = _network(backbone)
        outputs = _apply(network, batch)
        assert {name: each.shape for name, each in outputs.items()} == {
            "main": (BATCH, 3),
            "exit": (BATCH, 3),
        }


def test_a_backbone_that_returns_something_else_is_refused():
    class Returns(nn.Module):
        what: str

        @nn.compact
        def __call__(self, x, *, train=False):
            y = nn.Dense(3)(x)
            return {"logits": y, "three": (y, {}, {}), "list": (y, [x])}[self.what]

    # Two examples, which an array of logits could be unpacked as.
    image = jnp.ones((2, 5))
    for what, message in (
        ("logits", r"Returns returns an array \[2, 3\]; it should return \(logits, endpoints\)"),
        ("three", r"returns a tuple of 3; it should return"),
        ("list", r"returns endpoints that are list; they should be a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            Network(Returns(what), {}).init(jax.random.key(0), image)


def test_a_backbone_without_train_is_refused():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x), {}

    with pytest.raises(ValueError, match=r"Plain takes no `train`; its __call__ should be"):
        Network(Plain(), {}).init(jax.random.key(0), jnp.ones((2, 5)))


def test_a_whole_network_under_remat_is_refused_with_what_to_do():
    class Decides(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(3)(x if train else 2 * x), {}

    with pytest.raises(ValueError, match=r"traced with `train`, .* nn.remat\(Block\)"):
        Network(nn.remat(Decides)(), {}).init(jax.random.key(0), jnp.ones((2, 5)))


def test_a_mistake_of_a_backbone_is_shown_as_what_it_is():
    class Mistaken(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(3)(x if x.sum() > 0 else 2 * x), {}

    network = Network(Mistaken(), {})
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.eval_shape(network.init, jax.random.key(0), jnp.ones((2, 5)))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_parameters_that_are_no_real_numbers_are_refused(dtype):
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            odd = self.param("odd", lambda key: jnp.ones(5, dtype))
            return nn.Dense(3)(x * odd.real.astype(jnp.float32)[None]), {}

    network, batch = Network(Odd(), {}), _batch()
    variables = network.init(jax.random.key(0), batch["image"])
    message = re.escape(f"The parameter backbone/odd is {jnp.dtype(dtype)}; parameters should be")
    with pytest.raises(ValueError, match=message):
        find_reach(network.apply, {"main": MAIN}, variables, batch)
    rule = joint(optax.sgd(0.1), {"main": jax.tree.map(lambda _: True, variables["params"])})
    with pytest.raises(ValueError, match=message):
        TrainState.start(jax.random.key(0), variables, rule)


def test_frozen_variables_are_as_good_as_others():
    network, batch, objectives = _network(), _batch(), {"main": MAIN, "exit": EXIT}
    variables = network.init(jax.random.key(0), batch["image"])
    states = []
    for each in (variables, freeze(variables)):
        rule = multiway(optax.sgd(0.1, 0.9), find_reach(network.apply, objectives, each, batch))
        state = TrainState.start(jax.random.key(1), each, rule)
        step = make_step(network.apply, objectives, rule)
        states.append(jax.lax.fori_loop(0, 2, lambda _, s, step=step: step(s, batch)[0], state))
    chex.assert_trees_all_equal(states[0].params, states[1].params)


def test_inputs_may_be_a_tree_of_arrays():
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            kept = nn.Dense(4)(x["tokens"]) * x["mask"][..., None]
            return nn.Dense(3)(kept.sum(1)), {}

    image = {"tokens": jnp.ones((BATCH, 6, 5)), "mask": jnp.ones((BATCH, 6))}
    state, step = _start(Network(Tokens(), {}), {"main": MAIN}, _batch(image=image))
    _, metrics = step(state, _batch(image=image))
    assert float(metrics["main/loss"].count) == BATCH


# ---- State that neither grows nor differs between devices.


class Sows(nn.Module):
    """Sows features, and a sum as flax's examples have it for auxiliary losses."""

    @nn.compact
    def __call__(self, x, *, train=False):
        features = nn.Dense(4)(x)
        self.sow("seen", "features", features)
        self.sow("losses", "sum", 1.0, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
        features = BatchNorm()(features, train=train)
        return nn.Dense(3)(features), {"features": features}


@pytest.mark.parametrize("name", sorted(UPDATES))
def test_what_a_network_sows_does_not_grow(name):
    network, batch, objectives = _network(Sows()), _batch(), {"main": MAIN, "exit": EXIT}
    few = {"image": batch["image"][:2], "label": batch["label"][:2]}
    state, step = _start(network, objectives, few, UPDATES[name], optimizers.sgd(0.1))
    assert set(state.model_state) == {"batch_stats", "losses", "seen"}
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(step.__wrapped__, n=1))
    for _ in range(10):
        state, _ = step(state, batch)
    assert float(state.model_state["losses"]["backbone"]["sum"]) == 1
    mean = jax.tree.leaves(state.model_state["batch_stats"])[0]
    assert np.isfinite(mean).all()
    assert mean.any()


def test_variables_that_come_with_a_step_are_refused():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            self.variable("seen", "count", jnp.zeros, ())
            self.sow("seen", "x", x)
            return nn.Dense(3)(x), {}

    with pytest.raises(
        ValueError, match=r"'seen' has other variables after a step .* own, and mak"
    ):
        _start(Network(Mixed(), {}), {"main": MAIN}, _batch())


class Normalized(nn.Module):
    """With the batch norm that is asked for."""

    norm: nn.Module

    @nn.compact
    def __call__(self, x, *, train=False):
        own = isinstance(self.norm, BatchNorm)
        settings = {"train": train} if own else {"use_running_average": not train}
        return nn.Dense(3)(self.norm(nn.Dense(4)(x), **settings)), {}


def _pmapped(norm, batch_norm):
    network, batch = Network(Normalized(norm), {}), _batch()
    state, _ = _start(network, {"main": MAIN}, batch)
    rule = joint(optax.sgd(0.1), find_reach(network.apply, {"main": MAIN}, state.variables, batch))
    shared = Shared("data", batch_norm=batch_norm)
    step = make_step(network.apply, {"main": MAIN}, rule, shared=shared)
    split = jax.tree.map(lambda x: x[None], batch)
    return jax.pmap(step, "data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:1])(
        state, split
    )


def test_batch_statistics_of_one_device_are_refused_where_the_whole_batchs_are_asked_for():
    with pytest.raises(
        ValueError, match=r"'backbone/norm' is a flax.linen.BatchNorm, .*batch_norm=False"
    ):
        _pmapped(nn.BatchNorm(), True)
    for norm, batch_norm in ((nn.BatchNorm(), False), (BatchNorm(), True)):
        _, metrics = _pmapped(norm, batch_norm)
        assert np.isfinite(means(metrics)["main/loss"])


# ---- Groups.


def test_groups_that_do_not_fit_a_branch_are_refused():
    outputs = {"main": jnp.zeros((2, 4)), "branch": jnp.zeros((2, 3))}
    with pytest.raises(ValueError, match=r"'branch' are numbered 0 to 3, but it has 3 logits"):
        JointProbability({"branch": (0, 1, 2, 3)})(outputs)
    with pytest.raises(ValueError, match=r"'branch' are of 3 labels, but the main output has 4 cl"):
        JointProbability({"branch": (0, 1, 2)})(outputs)


def test_a_prediction_has_a_name_of_its_own_and_may_be_a_plain_function():
    network, batch = _network(), _batch()
    variables = _variables(network, batch)
    measure = partial(make_measure, network.apply, {"main": MAIN, "exit": EXIT})
    plain = {"sum": lambda outputs: jax.nn.log_softmax(outputs["main"] + outputs["exit"])}
    assert "sum/top_1" in measure(plain)(variables["params"], {}, batch)
    with pytest.raises(ValueError, match="'exit' has the name of an output or objective"):
        measure({"exit": plain["sum"]})(variables["params"], {}, batch)
