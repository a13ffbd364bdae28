"""Rules and their thresholds, networks that stop computing, and the program on bundled digits."""

import json
import re
from dataclasses import replace

import exiting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_jax import configuration, early_exit, export, train
from sire_jax.configuration import experiment
from sire_jax.diagnostics import conflict
from sire_jax.inference import calibration, exits, exported
from sire_jax.inference.cascade import Cascade
from sire_jax.inference.exit_rules import (
    RULES,
    entropy,
    fit_budget,
    fit_fractions,
    leave,
    max_probability,
)
from sire_jax.inference.stages import Stage, split
from sire_jax.job import command
from sire_jax.runs.trained import Trained
from sire_jax.storage import workdir

pytestmark = pytest.mark.optax_dtypes
PROBABILITY, ENTROPY = RULES["max_probability"], RULES["entropy"]


# ---- Scores and thresholds.


def test_scores_of_known_probabilities():
    p = jnp.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    logits = jnp.log(p)
    np.testing.assert_allclose(max_probability(logits), [0.5, 1 / 3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(entropy(logits), [1.5 * np.log(2), np.log(3), 0.0], atol=1e-6)
    # Never above log classes, however sums are rounded.
    flat = entropy(jnp.full((5, 10), 3.7, jnp.float32))
    assert (np.asarray(flat) <= np.float32(np.log(10))).all()


def test_an_image_leaves_at_the_first_exit_that_is_certain_enough():
    scores = np.array([[0.9, 0.5, 0.2, 0.8], [0.1, 0.7, 0.3, 0.9], [0.0, 0.0, 0.0, 0.0]], "f4")
    np.testing.assert_array_equal(leave(scores, [0.8, 0.7]), [0, 1, 2, 0])
    np.testing.assert_array_equal(leave(scores, [0.2, 0.3], ENTROPY), [1, 2, 0, 2])


@pytest.mark.parametrize(
    ("rule", "thresholds", "message"),
    [
        (PROBABILITY, [0.0, 0.5], r"A threshold is 0.0; .*'max_probability' .* in \(0, 1\]"),
        (PROBABILITY, [0.5, 1.01], r"1.01"),
        (PROBABILITY, [np.nan, 0.5], r"nan"),
        (ENTROPY, [-0.1, 0.5], r"A threshold is -0.1; .*'entropy' .* in \[0, log 4\] = \[0, 1.38"),
        (ENTROPY, [0.5, 1.4], r"1.4"),
        (PROBABILITY, [0.5], r"There are 1 thresholds for 3 exits; give 2"),
    ],
)
def test_thresholds_outside_their_range_are_refused(rule, thresholds, message):
    with pytest.raises(ValueError, match=message):
        rule.check(thresholds, 3, 4)


def test_the_ends_of_the_ranges_are_thresholds():
    PROBABILITY.check([1.0, 1e-9], 3, 4)
    ENTROPY.check([0.0, float(np.float32(np.log(4)))], 3, 4)


def test_thresholds_for_shares_of_images_by_hand():
    scores = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.6, 0.7, 0.8, 0.1], [0.5] * 5], "f4")
    # Two of five leave first (0.5 and 0.4); of the others the two most certain are 0.9 and 0.7.
    thresholds = fit_fractions(scores, [0.4, 0.4, 0.2])
    np.testing.assert_allclose(thresholds, [0.4, 0.7])
    np.testing.assert_array_equal(leave(scores, thresholds), [1, 2, 1, 0, 0])
    # Of entropies the smallest leave.
    thresholds = fit_fractions(scores, [0.4, 0.4, 0.2], ENTROPY)
    np.testing.assert_allclose(thresholds, [0.2, 0.7])
    np.testing.assert_array_equal(leave(scores, thresholds, ENTROPY), [0, 0, 1, 2, 1])


def test_ties_leave_together_and_no_share_is_the_strictest_threshold():
    scores = np.array([[0.3, 0.3, 0.3, 0.2], [0.9, 0.9, 0.9, 0.9], [0.5] * 4], "f4")
    thresholds = fit_fractions(scores, [0.25, 0.5, 0.25])
    # Three have left at the first exit, as many as should have at the first two.
    np.testing.assert_array_equal(leave(scores, thresholds), [0, 0, 0, 2])
    assert thresholds[1] == PROBABILITY.strictest == 1.0
    assert fit_fractions(scores, [0.0, 0.0, 1.0], ENTROPY) == [0.0, 0.0]


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=5),
    st.integers(1, 60),
    st.sampled_from([PROBABILITY, ENTROPY]),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_as_many_images_leave_as_should(weights, images, rule, seed):
    fractions = np.array(weights) / sum(weights)
    scores = np.random.default_rng(seed).uniform(0.1, 0.9, (len(weights), images)).astype("f4")
    left = leave(scores, fit_fractions(scores, fractions, rule), rule)
    counts = np.cumsum(np.bincount(left, minlength=len(weights)))
    np.testing.assert_array_equal(counts, np.ceil(images * np.cumsum(fractions) - 1e-6))


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.2, 0.2, 0.2), (0.5, np.nan, 0.5)]
)
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(ValueError, match="there should be 3, one for each exit"):
        fit_fractions(np.ones((3, 4), "f4"), fractions)


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        fit_fractions(np.array([[0.5, np.nan], [0.5, 0.5]]), (0.5, 0.5))
    with pytest.raises(ValueError, match="no validation images"):
        fit_fractions(np.zeros((2, 0)), (0.5, 0.5))


def test_a_budget_is_spent_in_geometric_shares():
    scores = np.random.default_rng(0).uniform(0.1, 0.9, (3, 7000)).astype("f4")
    # q = 1/2: shares of 4/7, 2/7, 1/7 cost 4/7 * 10 + 2/7 * 30 + 1/7 * 70.
    thresholds = fit_budget(scores, [10, 30, 70], 170 / 7)
    counts = np.bincount(leave(scores, thresholds), minlength=3)
    np.testing.assert_allclose(counts, [4000, 2000, 1000], atol=1)
    # More than the mean of the costs needs q = 2.
    thresholds = fit_budget(scores, [10, 30, 70], 350 / 7)
    counts = np.bincount(leave(scores, thresholds), minlength=3)
    np.testing.assert_allclose(counts, [1000, 2000, 4000], atol=1)


@given(
    st.integers(2, 5),
    st.integers(1, 50),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([PROBABILITY, ENTROPY]),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_a_budget_is_met_and_all_but_used_up(exits, images, share, ties, rule, seed):
    generator = np.random.default_rng(seed)
    scores = generator.uniform(0.1, 0.9, (exits, images)).astype("f4")
    scores = np.round(scores, 1) if ties else scores
    costs = np.cumsum(generator.integers(1, 100, exits))
    budget = costs[0] + share * (costs[-1] - costs[0])
    left = leave(scores, fit_budget(scores, costs.tolist(), budget, rule), rule)
    spent = costs[left].mean()
    assert spent <= budget
    if not ties:
        # At each exit but the last less than one image more could have stayed.
        assert spent > budget - (costs[-1] - costs[0]) / images - 1e-3 * costs[-1]


def test_budgets_that_can_not_be_met_or_spent_are_refused():
    scores = np.full((2, 3), 0.5, "f4")
    for budget in (9.9, 40.1, np.nan):
        with pytest.raises(ValueError, match=r"between 10, .* at the first exit, and 40, with"):
            fit_budget(scores, [10, 40], budget)
    np.testing.assert_array_equal(leave(scores, fit_budget(scores, [10, 40], 10)), [0, 0, 0])
    np.testing.assert_array_equal(leave(scores, fit_budget(scores, [10, 40], 40)), [1, 1, 1])


# ---- A network that stops computing.


def _logits(x):
    """Logits whose largest probability falls with x, which is in [0, 1]: 1 - x / 2."""
    return jnp.log(jnp.stack([1 - x / 2, x / 2], axis=1))


def _toy_stages(batch, computed):
    """The stages of a toy, which tell the identities of the images that each computes."""
    image = jax.ShapeDtypeStruct((batch, 2), jnp.float32)

    def function(params, images):
        hard = images[:, 1] * params
        squared = images @ jnp.ones((2, 1), jnp.float32)
        return {
            "first": _logits(hard),
            "second": _logits(jnp.maximum(hard - 0.25, 0.0)) + 0 * squared,
            "main": _logits(hard)[:, ::-1] + 0 * (squared @ jnp.ones((1, 2), jnp.float32)),
        }

    stages = split(function, ["main", "first", "second"], jnp.float32(1), image)
    assert [stage.output for stage in stages] == ["first", "second", "main"]
    assert [stage.multiply_adds for stage in stages] == [0, 2, 2]

    def counting(stage):
        def apply(params, rows, shared):
            jax.debug.callback(lambda x: computed[stage.output].append(np.array(x)), rows[0])
            return stage.apply(params, rows, shared)

        return Stage(stage.output, stage.multiply_adds, stage.rows, apply)

    return function, [counting(stage) for stage in stages]


@pytest.mark.parametrize("chunk", [8, 100])
def test_each_stage_computes_only_the_images_that_are_left(chunk):
    computed = {"first": [], "second": [], "main": []}
    function, stages = _toy_stages(4, computed)
    hard = np.random.default_rng(0).permutation(22) / 22
    images = jnp.asarray(np.stack([np.arange(22), hard], axis=1), jnp.float32)
    # Some of the images, in another order.
    examples = np.random.default_rng(1).permutation(22)[:21]
    thresholds = [0.8, 0.8]
    found = Cascade(stages, jnp.float32(1), PROBABILITY, 4, chunk)(images, examples, thresholds)
    jax.effects_barrier()
    outputs = function(jnp.float32(1), images[examples])
    logits = np.stack([outputs[name] for name in ("first", "second", "main")])
    left = leave(np.asarray(max_probability(jnp.asarray(logits))), thresholds)
    assert sorted(set(left)) == [0, 1, 2]
    np.testing.assert_array_equal(found.exits, left)
    classes = logits.argmax(-1)[left, np.arange(21)]
    np.testing.assert_array_equal(found.predictions, classes)
    assert len(set(classes)) == 2
    # Of each chunk's images those that had not left, in full batches: the last is filled up.
    size = 8 if chunk == 8 else 100
    for k, name in enumerate(computed):
        waiting = [int((left[i : i + size] >= k).sum()) for i in range(0, 21, size)]
        batches = [-(-n // 4) for n in waiting]
        assert found.batches[k] == len(computed[name]) == sum(batches)
        assert all(len(batch) == 4 for batch in computed[name])
        if k == 0:
            seen = {int(i) for batch in computed[name] for i in batch[:, 0]}
            assert seen == set(examples.tolist())
    assert found.multiply_adds == 4 * (2 * found.batches[1] + 2 * found.batches[2])
    assert found.batches[2] < found.batches[0]


def test_nothing_is_computed_once_all_have_left():
    computed = {"first": [], "second": [], "main": []}
    _, stages = _toy_stages(4, computed)
    images = jnp.zeros((6, 2), jnp.float32)
    found = Cascade(stages, jnp.float32(1), ENTROPY, 4)(images, np.arange(6), [0.0, 0.0])
    jax.effects_barrier()
    assert found.batches == [2, 0, 0]
    assert found.multiply_adds == 0
    assert not computed["second"]
    assert not computed["main"]


def test_sizes_below_one_are_refused():
    for sizes in ((0, 10), (10, 0)):
        with pytest.raises(ValueError, match="is 0; it should be at least 1"):
            Cascade([], {}, PROBABILITY, *sizes)


# ---- A whole run.


def _config(**given):
    """Three convolutions with an exit after each of the first two, and one that comes too late."""
    config = exiting.config(epochs=12, **given)
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(6, 8, 16))
    config.heads.exit_3.endpoints = ("block_1",)
    config.heads.exit_5.endpoints = ("block_2",)
    config.heads.exit_9 = configuration.head(
        "convolutional_classifier", endpoints=("block_3",), classes=10, width=2, hidden=4
    )
    config.objectives.exit_9 = configuration.objective("exit_9", "label", "cross_entropy", 0.1)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        train.train(_config(), str(directory))
    return directory


@pytest.fixture(scope="module")
def opened(trained):
    """The exits of the run, and their logits by split."""
    found = exits.Exits(trained, 50)
    return found, {kind: found.logits(kind) for kind in ("validation", "test")}


def test_the_exits_of_a_run_are_its_cheaper_classifiers_of_the_same_labels(trained, opened):
    found, logits = opened
    assert found.names == ["exit_3", "exit_5", "main"]
    first, second, third = 64 * 9 * 6, 16 * 9 * 6 * 8, 4 * 9 * 8 * 16
    costs = [first + 60, first + 60 + second + 80, first + 60 + second + 80 + third + 160]
    assert found.costs == costs
    assert found.main_cost == costs[-1] - 60 - 80
    assert found.classes == 10
    assert logits["validation"].shape == (3, 120, 10)
    # The accuracies that training has measured.
    measured = json.loads((trained / "results.json").read_text())["splits"]["test"]
    for name, each in zip(found.names, logits["test"], strict=True):
        accuracy = (each.argmax(-1) == found.labels["test"]).mean()
        assert accuracy == pytest.approx(measured[f"{name}/top_1"][0], abs=0.002)


@pytest.mark.parametrize("rule", [PROBABILITY, ENTROPY])
def test_predictions_are_those_of_the_whole_network_under_the_same_thresholds(opened, rule):
    found, logits = opened
    scores = {k: np.asarray(rule.scores(jnp.asarray(each))) for k, each in logits.items()}
    fitted = fit_fractions(scores["validation"], [0.3, 0.4, 0.3], rule)
    # Between two scores: what is rounded otherwise does not change sides.
    thresholds = [_between(each, t) for each, t in zip(scores["test"], fitted, strict=False)]
    left = leave(scores["test"], thresholds, rule)
    cascade = Cascade(found.stages, found.variables, rule, 50, 220)
    cascade.warm(found.images, found.examples["test"])
    made = cascade(found.images, found.examples["test"], thresholds)
    # One program a stage, all compiled before.
    assert [program._cache_size() for program in cascade._programs] == [1, 1, 1]
    np.testing.assert_array_equal(made.exits, left)
    predictions = logits["test"].argmax(-1)[left, np.arange(len(left))]
    np.testing.assert_array_equal(made.predictions, predictions)
    # 599 test images in chunks of 250, 250 and 99.
    waiting = [[(left[i : i + 250] >= k).sum() for i in (0, 250, 500)] for k in range(3)]
    assert made.batches == [sum(-(-n // 50) for n in each) for each in waiting]
    costs = [stage.multiply_adds for stage in found.stages]
    assert made.multiply_adds == 50 * sum(np.multiply(made.batches, costs))
    assert made.multiply_adds < 599 * found.main_cost


def _between(scores, threshold):
    """Moves a threshold into the middle of the widest gap near it."""
    near = np.sort(scores[np.argsort(np.abs(scores - threshold))[:8]])
    widest = np.argmax(np.diff(near))
    return float(near[widest : widest + 2].mean())


def test_the_program_measures_and_draws(trained, opened, tmp_path, capsys):
    found, logits = opened
    budget = sum(found.costs) / 3
    picture = tmp_path / "seen.png"
    asked = [f"--workdir={trained}", f"--budget={budget}", f"--out={picture}", "--points=4"]
    early_exit.main([*asked, "--batch_size=50", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    labels = found.labels["test"]
    assert result["images"] == len(labels) == 599
    rows = result["exits"]
    assert [row["output"] for row in rows] == found.names
    assert [row["multiply_adds"] for row in rows] == found.costs
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    accuracy = [(each.argmax(-1) == labels).mean() for each in logits["test"]]
    assert [row["accuracy_of_all"] for row in rows] == pytest.approx(accuracy)
    parts = [row["share"] * (row["accuracy_of_leaving"] or 0) for row in rows]
    assert result["accuracy"] == pytest.approx(sum(parts))
    spent = sum(row["share"] * row["multiply_adds"] for row in rows)
    assert result["multiply_adds"] == pytest.approx(spent)
    assert spent <= result["multiply_adds_done"] <= found.costs[-1]
    assert result["whole"]["accuracy"] == pytest.approx(accuracy[-1], abs=0.002)
    assert [row["threshold"] is None for row in rows] == [False, False, True]
    # The curve goes from the first exit alone to the last.
    curve = result["curve"]
    assert len(curve) == 4
    # A test image whose score is below all of validation goes on, even at the least budget.
    scores = {k: np.asarray(PROBABILITY.scores(jnp.asarray(each))) for k, each in logits.items()}
    least = fit_budget(scores["validation"], found.costs, found.costs[0])
    left = leave(scores["test"], least)
    right = logits["test"].argmax(-1)[left, np.arange(599)] == labels
    assert curve[0]["accuracy"] == pytest.approx(right.mean())
    assert curve[0]["multiply_adds"] == pytest.approx(np.asarray(found.costs)[left].mean())
    assert curve[-1]["accuracy"] == pytest.approx(accuracy[-1], abs=0.01)
    for row, each in zip(rows, logits["validation"], strict=True):
        temperature = calibration.fit_temperature(each, found.labels["validation"])
        assert row["temperature"] == pytest.approx(temperature)


def test_the_report_has_a_row_for_each_exit_and_the_sums():
    row = {"threshold": 0.75, "share": 0.5, "accuracy_of_leaving": 0.9, "accuracy_of_all": 0.8}
    row |= {"output": "exit_3", "multiply_adds": 1000, "calibration_error": 0.1}
    row |= {"temperature": 1.5, "calibration_error_after": 0.02}
    last = {**row, "output": "main", "threshold": None, "share": 0.0, "accuracy_of_leaving": None}
    whole = {"accuracy": 0.85, "multiply_adds": 2900, "seconds": 2.0}
    result = {"exits": [row, {**last, "multiply_adds": 3000}], "accuracy": 0.84, "seconds": 1.25}
    result |= {"multiply_adds": 2000.4, "multiply_adds_done": 2100.0, "whole": whole}
    lines = early_exit.report(result).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4]]
    numbers = ["exit_3", "0.7500", "0.5000", "0.9000", "0.8000", "1,000", "0.1000", "1.5000"]
    assert cells[2] == [*numbers, "0.0200"]
    assert cells[3][:6] == ["main", "-", "0.0000", "-", "0.8000", "3,000"]
    assert len(cells[0]) == 9
    assert "accuracy 0.8400, 2,000 multiply-adds an image (2,100 with" in lines[4]
    assert lines[5].endswith("accuracy 0.8500, 2,900 multiply-adds an image, 2.00 s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget=1"], "The budget is 1 multiply-adds an image; it should be between 3,516"),
        (["--budget=1e4", "--points=1"], "--points is 1; it should be at least 2"),
        (["--budget=1e4", "--batch_size=0"], "--batch_size is 0; it should be at least 1"),
        (["--budget=1e4", "--out=/nowhere/a.png"], "no directory to write /nowhere/a.png to"),
        (["--budget=1e4", "--config.epochs=3"], "An override would change the run: epochs"),
        (["--fractions=a,b"], "'a,b' is no list such as"),
        ([], "one of the arguments --budget --fractions --thresholds is required"),
    ],
)
def test_bad_input_ends_the_program_with_one_message(
    trained, arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        early_exit.main([f"--workdir={trained}", *arguments])
    assert stopped.value.code == command.EXPLAINED
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_what_is_wished_for_is_checked_before_anything_is_computed():
    for wish, rule, message in (
        (early_exit.Wish(budget=9), PROBABILITY, "between 10, .* and 40"),
        (
            early_exit.Wish(fractions=(0.5, 0.5)),
            PROBABILITY,
            "there should be 3, one for each exit",
        ),
        (early_exit.Wish(thresholds=(0.5,)), PROBABILITY, "There are 1 thresholds for 3 exits"),
        (early_exit.Wish(thresholds=(0.5, 3.0)), ENTROPY, r"A threshold is 3.0.*\[0, 2.3026\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wish.check([10, 30, 40], 10, rule)
    scores = np.random.default_rng(0).uniform(0.1, 0.9, (3, 50)).astype("f4")
    assert early_exit.Wish(thresholds=(0.5, 0.6)).fit(scores, [10, 30, 40], PROBABILITY) == [
        0.5,
        0.6,
    ]
    shares = (0.2, 0.2, 0.6)
    fitted = early_exit.Wish(fractions=shares).fit(scores, [10, 30, 40], PROBABILITY)
    assert fitted == fit_fractions(scores, shares)
    fitted = early_exit.Wish(budget=25).fit(scores, [10, 30, 40], ENTROPY)
    assert fitted == fit_budget(scores, [10, 30, 40], 25, ENTROPY)


def test_runs_without_validation_examples_or_exits_are_refused(tmp_path):
    def written(name, config):
        workdir.Workdir(str(tmp_path / name), config).write_config()
        return tmp_path / name

    config = _config(evaluate_splits=("test",))
    config.data.task.validation_per_class = 0
    wish = early_exit.Wish(budget=1e4)
    with pytest.raises(ValueError, match=r"config\.data\.task\.validation_per_class=N"):
        early_exit.measure(written("a", config), wish)
    # Another target is no exit; nor is what costs more than the main output.
    config = _config()
    del config.heads.exit_3, config.heads.exit_5
    del config.objectives.exit_3, config.objectives.exit_5
    with pytest.raises(ValueError, match="No auxiliary output classifies 'label', as the main"):
        early_exit.measure(written("b", config), wish)
    quickstart = configuration.load(f"{configuration.repository_configs()}/quickstart.py")
    with pytest.raises(ValueError, match="No auxiliary output classifies 'label'"):
        exits.find_exits(experiment.build(quickstart))
    with pytest.raises(ValueError, match="main output has no objective on labels"):
        exits.find_exits(replace(experiment.build(quickstart), objectives={}))


def test_images_that_are_cropped_leave_as_the_whole_network_says(tmp_path):
    made = exiting.config(epochs=1, batch_size=200)
    made.data.crop = 6
    made.backbone = configuration.backbone("small_cnn", classes=10, channels=(2, 2, 4))
    made.heads.exit_3.endpoints = ("block_1",)
    made.heads.exit_5.endpoints = ("block_2",)
    with jax.numpy_dtype_promotion("standard"):
        train.train(made, str(tmp_path))
    found = exits.Exits(tmp_path, 50)
    # Nobody leaves early: what the stages compute is what the network does, with the same crop.
    cascade = Cascade(found.stages, found.variables, PROBABILITY, 50)
    left = cascade(found.images, found.examples["test"], [1.0] * (len(found.names) - 1))
    assert set(left.exits) == {len(found.names) - 1}
    np.testing.assert_array_equal(left.predictions, found.logits("test")[-1].argmax(-1))
    with pytest.raises(ValueError, match=r"A stage is given \(50, 6, 6, 1\), but was made for"):
        found.stages[0].apply(found.variables, (jnp.zeros((50, 6, 6, 1), jnp.uint8),), ())
    # A file of its own takes images as the data set has them, and crops them itself.
    export.export(tmp_path, "main", tmp_path / "main.npz")
    images = np.asarray(found.images)[found.examples["test"]]
    classes = exported.load(tmp_path / "main.npz")(images).argmax(-1)
    np.testing.assert_array_equal(classes, left.predictions)
    # The same run measured with ten crops: diagnostics see the central one.
    trained = Trained.load(tmp_path, ["--config.data.ten_crop=True"])
    assert trained.batch["image"].shape == (200, 6, 6, 1)
    assert conflict.measure(trained)
