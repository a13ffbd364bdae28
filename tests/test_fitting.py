"""A run in memory: the same numbers as from a config, and what can't be right refused."""

from dataclasses import replace
from functools import partial

import chex
import jax
import numpy as np
import optax
import programs
import pytest
from flax import linen as nn

import sire_jax as sj
from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.runs.runs import Runs

pytestmark = pytest.mark.optax_dtypes

OBJECTIVES = {
    "main": sj.Objective("main", "label", sj.cross_entropy),
    "exit": sj.Objective("exit", "label", sj.cross_entropy, weight=0.5),
}


class Dense(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        middle = nn.relu(nn.Dense(8)(image.reshape(len(image), -1)))
        return nn.Dense(3)(nn.relu(nn.Dense(8)(middle))), {"middle": middle}


def _network():
    return sj.Network(Dense(), {"exit": sj.heads.Classifier(endpoints=("middle",), classes=3)})


def _examples(number, seed=0):
    """Three classes that a linear classifier can tell apart."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, number).astype(np.int32)
    image = random.normal(size=(number, 2, 2, 1)).astype(np.float32)
    image[:, 0, 0, 0] += 3 * label
    return {"image": image, "label": label}


def _fit(rule=None, train=None, test=None, **settings):
    settings = {"epochs": 2, "batch_size": 10, **settings}
    rule = rule or partial(sj.joint, optax.adam(1e-2))
    return sj.fit(_network(), OBJECTIVES, rule, train or _examples(45), test, **settings)


@pytest.fixture(scope="module")
def fitted():
    return _fit(test=_examples(23, seed=1), epochs=12, evaluate_batch_size=10)


def test_a_network_learns_and_its_history_has_a_value_for_each_epoch(fitted):
    state, history = fitted
    # What is left over of 45 examples waits.
    assert int(state.step) == 12 * 4
    assert set(history) == {"train", "test"}
    assert set(history["train"]) == {"main/loss", "exit/loss", "total/loss"}
    names = {f"{output}/{kind}" for output in OBJECTIVES for kind in ("loss", "top_1")}
    assert set(history["test"]) == names
    assert {values.shape for split in history.values() for values in split.values()} == {(12,)}
    assert history["train"]["total/loss"][-1] < history["train"]["total/loss"][0]
    total = history["train"]["main/loss"] + 0.5 * history["train"]["exit/loss"]
    np.testing.assert_allclose(history["train"]["total/loss"], total, rtol=1e-5)
    assert history["test"]["main/top_1"][-1] > 0.7


def test_what_fills_up_the_last_batch_is_not_measured(fitted):
    state, history = fitted
    outputs = _network().apply({"params": state.params}, _examples(23, seed=1)["image"])
    right = np.asarray(outputs["main"]).argmax(-1) == _examples(23, seed=1)["label"]
    np.testing.assert_allclose(history["test"]["main/top_1"][-1], right.mean(), rtol=1e-6)


def test_the_numbers_are_those_of_a_run_of_the_same_seed():
    given = ["epochs=2", "data.task.train=100", "data.task.test=30", "seed=5", "seeds=1"]
    path = programs.TINY.removeprefix("--config=")
    parts = experiment.build(configuration.load(path, [f"--config.{each}" for each in given]))
    runs = Runs(parts)
    state = runs.initial()
    for epoch in range(2):
        order = runs.feed.order(state, epoch)
        steps = runs.feed.steps_per_epoch
        state, *_ = runs.feed.take_steps(state, runs.no_metrics(), order, 0, steps)
    train = parts.lookup(runs.feed.arrays, runs.feed.examples["train"][0])
    settings = {"epochs": 2, "batch_size": parts.config.batch_size, "augment": parts.augment}
    found, _ = sj.fit(parts.network, parts.objectives, parts.rule, train, seed=5, **settings)
    expected = jax.tree.map(lambda values: values[0], state.params)
    chex.assert_trees_all_close(found.params, expected, rtol=1e-5, atol=1e-7)


def test_a_rule_that_is_made_already_gives_the_same():
    network, train = _network(), _examples(20)
    variables = network.init(jax.random.key(9), train["image"][:1])
    reach = sj.find_reach(network.apply, OBJECTIVES, variables, train)
    given = [
        _fit(rule, train, epochs=1)[0].params
        for rule in (sj.joint(optax.sgd(0.1), reach), partial(sj.joint, optax.sgd(0.1)))
    ]
    chex.assert_trees_all_equal(*given)


def test_several_seeds_share_what_is_compiled():
    traces = []

    def loss(logits, labels):
        traces.append(logits.shape)
        return sj.cross_entropy(logits, labels)

    objectives = {"main": sj.Objective("main", "label", loss, classifies=True)}
    parts = (_network(), objectives, partial(sj.joint, optax.sgd(0.1)))
    fit, settings = sj.make_fit(*parts), {"epochs": 1, "batch_size": 10}
    first, _ = fit(_examples(20), **settings)
    number = len(traces)
    second, _ = fit(_examples(20), seed=1, **settings)
    assert len(traces) == number
    alone, _ = sj.fit(*parts, _examples(20), seed=1, **settings)
    chex.assert_trees_all_equal(second.params, alone.params)
    kernels = [state.params["backbone"]["Dense_0"]["kernel"] for state in (first, second)]
    assert not np.array_equal(*kernels)
    # Of examples of another shape it is another program.
    smaller = _examples(20)
    smaller["image"] = smaller["image"][:, :1]
    assert fit(smaller, epochs=np.int64(1), batch_size=np.int8(10))[0].step == 2


def test_a_run_that_diverges_says_which_loss_and_when():
    message = r"The loss '(main|exit)' is not finite after [1-4] steps .* optax.clip_by_global_norm"
    with pytest.raises(sj.NonFiniteLossError, match=message):
        _fit(partial(sj.joint, optax.sgd(1e30)))


def test_a_last_step_that_breaks_the_parameters_is_noticed():
    train = {**_examples(10), "image": _examples(10)["image"] * 0 + 1}
    with pytest.raises(sj.NonFiniteLossError, match="parameters are not finite after 1 steps"):
        _fit(partial(sj.joint, optax.scale(np.inf)), train, epochs=1)


def test_labels_outside_of_their_classes_are_refused_unless_they_do_not_count():
    train = _examples(20)
    train["label"][7] = 3
    message = r"train has 1 labels 'label' outside of the 3 classes 0\.\.2 .* is 3 at index 7\."
    with pytest.raises(ValueError, match=message):
        _fit(train=train)
    ignoring = {k: replace(each, ignore=3) for k, each in OBJECTIVES.items()}
    rule = partial(sj.joint, optax.adam(1e-2))
    sj.fit(_network(), ignoring, rule, train, epochs=1, batch_size=10)


def test_an_optimizer_may_hold_the_parameters_themselves():
    state, _ = _fit(partial(sj.joint, optax.contrib.prodigy()), epochs=1)
    assert int(state.step) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it should be at least 1"),
        ({"batch_size": 0}, r"batch_size is 0; it should be in 1\.\.45"),
        ({"batch_size": 46}, r"batch_size is 46; it should be in 1\.\.45"),
        ({"train": {"label": np.zeros(3)}}, "train has label; it should have the inputs"),
        (
            {"test": {"image": np.zeros((3, 2)), "label": np.zeros(4)}},
            r"test has arrays of image \[\[3, 2\]\], label \[\[4\]\]; all should have the same",
        ),
        ({"test": {"image": np.zeros((0, 2))}}, r"test has arrays of image \[\[0, 2\]\]; all"),
        ({"train": [1]}, r"train is a list; it should be a mapping of arrays, such as"),
        ({"evaluate_batch_size": 0}, "evaluate_batch_size is 0; it should be at least 1"),
        ({"rule": optax.adam(1e-3)}, r"The rule is GradientTransformation.*functools\.partial"),
        ({"test": {"image": _examples(3)["image"]}}, "'label', which"),
        ({"predictions": {"main": sj.Output("main")}}, "'main' has the name of an output"),
        ({"predictions": {"total": sj.Output("main")}}, "'total' has the name of .* weighted sum"),
        ({"predictions": {"p": "main"}}, "'p' is 'main'; it should be a rule such as sj.Output"),
        ({"rule": sj.joint}, "The rule is <function joint.*functools.partial"),
        ({"batch_size": 10.0}, "batch_size is 10.0; it should be a whole number"),
        ({"epochs": True}, "epochs is True; it should be a whole number"),
        (
            {"test": {"image": _examples(3)["image"], "lable": np.zeros(3)}},
            "test: .*'label', which",
        ),
        ({"predictions": {"p": sj.Output("mian")}}, "'p' uses the output 'mian', which does not"),
        (
            {"predictions": {"p": sj.FittedJointProbability({"exit": range(3)})}},
            r"'p' is fitted to a trained network: call its fit",
        ),
    ],
)
def test_what_can_not_be_fitted_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _fit(**settings)


@pytest.mark.parametrize(
    ("network", "objectives", "message"),
    [
        (Dense(), OBJECTIVES, r"returns a tuple; it should .* sj.Network\(backbone, heads\)"),
        (_network(), list(OBJECTIVES.values()), r"Objectives are \[Objective.* a mapping such as"),
        (_network(), {"main": "cross_entropy"}, "Objectives are {'main': 'cross_entropy'}; they"),
        (_network(), {}, "There is no objective; give at least one"),
    ],
)
def test_what_is_no_network_or_no_objective_is_refused(network, objectives, message):
    rule = partial(sj.joint, optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        sj.fit(network, objectives, rule, _examples(20), epochs=1, batch_size=10)
