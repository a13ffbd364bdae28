"""Groups of labels as targets: from a file to predictions, and a whole run on the digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changed import changed

from sire_jax import configuration, evaluate, groups, train
from sire_jax.configuration import (
    backbone,
    experiment,
    grouping,
    head,
    loss,
    objective,
    optimizer,
    prediction,
)
from sire_jax.configuration import groups as group_sections
from sire_jax.groups import Groups, partition
from sire_jax.job import compilation
from sire_jax.predictions import FittedJointProbability, JointProbability, LinearCombination
from sire_jax.runs.loading import ignored, load_data
from sire_jax.runs.trained import kept_weights, open_run

pytestmark = pytest.mark.optax_dtypes

DIGITS = tuple("0123456789")
THREE = Groups(DIGITS, (0, 1, 2, 2, 1, 0, 0, 1, 2, 2))
TWO = Groups(DIGITS, (0, 1) * 5)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("groups") / "digits.json"
    groups.save(path, {2: TWO, 3: THREE}, "by hand")
    return path


def _config(file, changes=()):
    """Digits with a branch over three groups of them."""
    config = configuration.default()
    config.backbone = backbone("small_cnn", classes=10, channels=(4, 8))
    config.heads.branch = head("branch", position="block_1", classes=3)
    config.data.groups.coarse = grouping(file, 3)
    config.objectives.main = objective("main", "label", "cross_entropy")
    config.objectives.branch = objective("branch", "coarse", "cross_entropy", 0.5)
    config.predictions.joint = prediction("joint_probability", eta=0.5)
    return changed(config, changes)


# ---- From the file to the config.

PROGRAM = """
from sire_jax import configuration

def get_config():
    config = configuration.default()
    config.data.groups.coarse = configuration.grouping("", 2)
    return config
"""


def test_loading_a_config_puts_groups_in_place_of_their_file(file, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    key = "--config.data.groups.coarse"
    empty = {"file": "", "groups": 2, "classes": (), "assignment": ()}
    assert configuration.load(str(program)).data.groups.coarse.to_dict() == empty
    config = configuration.load(str(program), [f"{key}.file={file}"])
    read = {"file": "", "groups": 2, "classes": DIGITS, "assignment": TWO.assignment}
    assert config.data.groups.coarse.to_dict() == read
    other = configuration.load(str(program), [f"{key}.file={file}", f"{key}.groups=3"])
    assert other.data.groups.coarse.assignment == THREE.assignment
    again = configuration.from_json(configuration.to_json(config))
    assert again.data.groups.to_dict() == config.data.groups.to_dict()
    assert configuration.differences(config, again) == []
    keys = {line.partition(":")[0] for line in configuration.differences(config, other)}
    assert keys == {"data.groups.coarse.groups", "data.groups.coarse.assignment"}
    with pytest.raises((AttributeError, KeyError)):
        config.epchs = 3


def test_the_given_config_is_left_as_it_is_and_what_was_read_is_not_read_again(file, tmp_path):
    config = _config(file)
    read = configuration.with_groups(config)
    assert config.data.groups.coarse.file == str(file)
    assert config.data.groups.coarse.assignment == ()
    assert read.data.groups.coarse.assignment == THREE.assignment
    assert configuration.with_groups(read).to_dict() == read.to_dict()
    read.data.groups.coarse.file = str(tmp_path / "none.json")
    assert configuration.with_groups(read).data.groups.coarse.assignment == THREE.assignment


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        (
            {"groups": 5},
            ValueError,
            r"coarse.groups is 5, but .*digits.json has the numbers of gro",
        ),
        ({"file": "/nowhere/groups.json"}, FileNotFoundError, r"no file of groups /nowhere/groups"),
    ],
)
def test_groups_that_a_file_does_not_hold_are_refused(file, section, error, message):
    config = _config(file, {f"data.groups.coarse.{key}": value for key, value in section.items()})
    with pytest.raises(error, match=message):
        experiment.build(configuration.with_groups(config))


def test_where_only_sizes_count_labels_are_dealt_to_the_groups_of_a_file_that_is_not_there():
    config = _config("/nowhere/groups.json")
    with pytest.warns(UserWarning, match=r"no file of groups /nowhere.* dealt to 3 groups in turn"):
        dealt = configuration.with_groups(config, dealt=True)
    section = dealt.data.groups.coarse
    assert section.assignment == (0, 1, 2, 0, 1, 2, 0, 1, 2, 0)
    assert section.classes[:2] == ("label_0", "label_1")
    assert group_sections.is_dealt(section)
    assert not group_sections.is_dealt(config.data.groups.coarse)
    assert experiment.build(dealt).groups["coarse"].number == 3
    with pytest.raises(ValueError, match=r"10 labels can't be dealt to 11 groups; 1..10 can"):
        partition.deal(10, 11)


def test_a_file_that_is_there_is_read_although_labels_might_be_dealt(file):
    read = configuration.with_groups(_config(file), dealt=True).data.groups.coarse
    assert read.assignment == THREE.assignment
    assert not group_sections.is_dealt(read)


def test_a_file_edited_badly_is_refused(tmp_path):
    path = tmp_path / "edited.json"
    groups.save(path, {3: THREE}, "by hand")
    path.write_text(path.read_text().replace('["0", "5", "6"]', '["0", "5"]'))
    with pytest.raises(ValueError, match=r"grouping '3' of .*edited.json .*'6' missing"):
        configuration.with_groups(_config(path))


# ---- From the config to targets and predictions.


def test_the_target_of_a_branch_is_the_group_of_the_label(file):
    parts = experiment.build(configuration.with_groups(_config(file)))
    assert parts.groups == {"coarse": THREE}
    assert (parts.batch["coarse"].shape, parts.batch["coarse"].dtype) == ((2,), np.int32)
    labels = jnp.asarray([7, 0, 2, 9, 9, 1])
    arrays = {"image": jnp.zeros((6, 8, 8, 1), jnp.uint8), "label": labels}
    batch = parts.lookup(arrays, jnp.asarray([5, 0, 3, 2]))
    assert set(batch) == {"image", "label", "coarse"}
    assert batch["label"].tolist() == [1, 7, 9, 2]
    assert batch["coarse"].tolist() == [THREE.assignment[label] for label in (1, 7, 9, 2)]
    # Of a config whose file was not read yet they are the same.
    assert experiment.build(_config(file)).groups == parts.groups


SECOND = {
    "heads.other": head("branch", position="block_2", classes=2),
    "heads.fine": head("branch", position="block_2", classes=10),
    "objectives.other": objective("other", "parity", loss("smoothed_cross_entropy")),
    "objectives.fine": objective("fine", "label", "cross_entropy"),
}


def test_labels_that_are_ignored_are_ignored_by_their_groups_too(file):
    ignoring = objective("main", "label", "cross_entropy", ignore=255)
    parts = experiment.build(_config(file, {"objectives.main": ignoring}))
    assert {name: o.ignore for name, o in parts.objectives.items()} == {"main": 255, "branch": -1}
    assert ignored(parts) == {"label": {255}, "coarse": {-1}}
    own = objective("branch", "coarse", "cross_entropy", ignore=255)
    with pytest.raises(ValueError, match=r"'branch' on groups ignores 255; the group of .* is -1"):
        experiment.build(_config(file, {"objectives.branch": own}))


def test_predictions_have_the_groups_of_the_objectives_targets(file):
    rules = {
        "predictions.fitted": prediction("fitted_joint_probability"),
        "predictions.linear": prediction("linear_combination", outputs=("fine",)),
        "predictions.one": prediction("joint_probability", branches=("other",)),
    }
    config = _config(file, {**SECOND, **rules, "data.groups.parity": grouping(file, 2)})
    parts = experiment.build(config)
    known = {"branch": THREE.assignment, "other": TWO.assignment}
    assert parts.predictions == {
        "joint": JointProbability(known, 0.5),
        "one": JointProbability(known, branches=("other",)),
        "fitted": FittedJointProbability(known),
        "linear": LinearCombination(known, outputs=("fine",)),
    }
    assert parts.predictions["one"].needs() == ("main", "other")
    assert parts.predictions["linear"].needs() == ("main", "fine")


def test_combinations_come_after_what_they_combine(file):
    changes = {
        "heads.a": head("combination", endpoints=("branch", "main", "block_1"), classes=10),
        "objectives.a": objective("a", "label", "cross_entropy"),
    }
    parts = experiment.build(_config(file, changes))
    assert parts.output_names() == ["main", "branch", "a"]
    kernel = parts.variables["params"]["heads_a"]["output"]["kernel"]
    assert kernel.shape == (3 + 10 + 4, 10)


RESNET = backbone("resnet", classes=10, depth=18, width=0.05)
SWAPPED = Groups(("1", "0", *DIGITS[2:]), THREE.assignment)
FEW = Groups(DIGITS[:9], THREE.assignment[:9])
NO_FILE = r"coarse names no file of groups; .* --config.data.groups.coarse.file=FILE"


def _described(grouped):
    return {
        "file": "",
        "groups": 3,
        "classes": grouped.classes,
        "assignment": grouped.assignment,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.groups.coarse.file": ""}, NO_FILE),
        ({"data.groups.coarse": _described(FEW)}, r"coarse groups 9 labels, but there are 10"),
        ({"heads.branch.classes": 4}, r"'branch', which has 4 logits, with 'coarse', which has 3"),
        ({"objectives.branch.target": "coarser"}, r"target 'coarser'.*Did you mean 'coarse'"),
        ({"heads.branch.position": 1}, r"position 1, which the backbone does not have.* none;"),
        (
            {"heads.branch.position": 5, "backbone": RESNET},
            r"position 5, .* positions 1 \(stage_2\), .* 4 \(stage_5\);",
        ),
        ({"heads.branch.position": "block_3"}, r"'branch' .* 'block_3', .*mean 'block_"),
        ({"heads.branch.layers": "resnet_9"}, r"no branch 'resnet_9'. Did you mean 'resnet_"),
        (
            {"objectives.branch": objective("branch", "coarse", "mean_squared_error")},
            "can't compare",
        ),
        (
            {"predictions.joint.branches": ("main",)},
            r"uses the output 'main', which is no branch.*Known: branch",
        ),
        ({"predictions.joint.eta": 0.0}, r"eta is 0.0; it should be above 0"),
        ({"predictions.joint.groups": ()}, r"'joint_probability' has no setting 'groups'"),
        (
            {"predictions.linear": prediction("linear_combination", outputs=("brunch",))},
            r"'linear' uses the output 'brunch'.*Did you mean 'branch'",
        ),
        (
            {"objectives": {"main": objective("main", "label", "cross_entropy").to_dict()}},
            r"joint_probability needs a branch over groups of the labels",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(file, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_config(file, changes))


@pytest.mark.parametrize("name", ["label", "image"])
def test_groups_can_not_have_the_name_of_something_else(file, name):
    config = _config(file, {f"data.groups.{name}": grouping(file, 2)})
    with pytest.raises(ValueError, match=rf"Groups can't be called '{name}': batches have that"):
        experiment.build(config)


@pytest.mark.parametrize(
    "section", [3, {"file": "x.json"}, {"file": "", "groups": 3, "clases": ()}]
)
def test_what_is_no_section_of_groups_is_refused(file, section):
    config = _config(file, {"data.groups.coarse": section})
    for make in (configuration.with_groups, experiment.build):
        with pytest.raises(ValueError, match=r"groups.coarse is .*; .*configuration.grouping"):
            make(config)


@pytest.mark.parametrize(
    ("grouped", "message"),
    [
        (SWAPPED, r"coarse are in another order than those of the data, from '1' on"),
        (
            Groups((*DIGITS[:9], "ten"), THREE.assignment),
            r"coarse are not those .*'9' missing. 'ten'",
        ),
    ],
)
def test_groups_of_other_labels_than_the_datas_are_refused(file, grouped, message):
    parts = experiment.build(_config(file, {"data.groups.coarse": _described(grouped)}))
    with pytest.raises(ValueError, match=message):
        load_data(parts)


def test_groups_may_be_of_drawn_classes(file):
    # What is drawn with seed 0.
    four = Groups(("2", "4", "5", "7"), (0, 1, 0, 2))
    changes = {"data.draw_classes": 4, "data.classes.label": 4, "backbone.classes": 4}
    parts = experiment.build(_config(file, {**changes, "data.groups.coarse": _described(four)}))
    dataset, _ = load_data(parts)
    assert dataset.names["label"] == four.classes
    with pytest.raises(ValueError, match=r"coarse groups 10 labels, but there are 4"):
        experiment.build(_config(file, changes))


def test_fitting_to_validation_examples_needs_some(file):
    rule = prediction("fitted_joint_probability")
    parts = experiment.build(_config(file, {"predictions.fitted": rule}))
    message = r"'fitted' is fitted to validation examples, and there are none; hold some out with"
    with pytest.raises(ValueError, match=message):
        load_data(parts)
    rule.split = "train"
    load_data(experiment.build(_config(file, {"predictions.fitted": rule})))


# ---- A whole run.

TRAINED = {
    "seeds": 2,
    "epochs": 2,
    "batch_size": 100,
    "devices": 1,
    "data.images": 1198,
    "data.task.validation_per_class": 20,
    "evaluate_splits": ("test",),
    "heads.branch.layers": ({"name": "convolution", "width": 4}, {"name": "global_pool"}),
    "objectives.main.loss": loss("smoothed_cross_entropy"),
    "optimizer": optimizer(
        "sgd",
        learning_rate={
            "name": "triangular",
            "peak_value": 0.2,
            "peak": 0.4,
            "end": 1.0,
            "unit": "run",
        },
        weight_decay={"backbone": 1e-3, "heads": 1e-4},
    ),
    "predictions.fitted": prediction("fitted_joint_probability"),
    "predictions.linear": prediction("linear_combination", penalty=1e-3, steps=40),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose file of groups is deleted once it is trained."""
    directory = tmp_path_factory.mktemp("trained")
    path = directory / "groups.json"
    groups.save(path, {2: TWO, 3: THREE}, "by hand")
    results = train.train(_config(path, TRAINED), str(directory / "run"))
    path.unlink()
    return directory / "run", results


@pytest.fixture(scope="module")
def opened(trained):
    """The run again, what each of its seeds predicts, what is fitted to that, and its weights."""
    with jax.numpy_dtype_promotion("standard"):
        runs = open_run(trained[0])
        kept = kept_weights(runs, trained[0])
        dataset, draws = load_data(runs.parts)
        apply = jax.jit(runs.parts.apply)
        predicted = {}
        for split in ("train", "validation", "test"):
            source = dataset.test if split == "test" else dataset.train
            for seed, draw in enumerate(draws):
                examples = getattr(draw, split)
                own = jax.tree.map(lambda x, seed=seed: x[seed], kept.variables)
                outputs = apply(own, jnp.asarray(source.image[examples]))
                predicted[split, seed] = outputs, jnp.asarray(source.labels["label"][examples])
        return runs, predicted, runs.fit(kept.params, kept.model_state), kept


def test_a_run_is_measured_by_all_its_rules(trained):
    directory, results = trained
    test = results["splits"]["test"]
    for rule in ("joint", "fitted", "linear"):
        assert {f"{rule}/top_1", f"{rule}/top_5", f"{rule}/loss"} <= set(test)
        assert len(test[f"{rule}/top_1"]) == 2
    assert {"branch/top_1", "main/top_1", "branch/loss", "main/loss"} <= set(test)
    assert min(test["branch/top_1"]) > 0.4
    assert json.loads((directory / "results.json").read_text())["splits"] == results["splits"]
    stored = json.loads((directory / "config.json").read_text())["data"]["groups"]["coarse"]
    assert (stored["file"], stored["assignment"]) == ("", list(THREE.assignment))
    # While it trains, what is fitted afterwards is not measured.
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    measured = {key for line in lines if line["split"] == "test" for key in line}
    assert "joint/top_1" in measured
    assert not {"fitted/top_1", "linear/top_1"} & measured


def test_what_is_fitted_is_measured_by_the_program_of_all_other_measurements(opened):
    runs, _, fitted, kept = opened
    bare = runs.measure(kept.params, kept.model_state, "test")
    before = compilation.counts().compiled
    whole = runs.measure(kept.params, kept.model_state, "test", fitted)
    assert compilation.counts().compiled == before
    added = {f"{name}/{of}" for name in fitted for of in ("top_1", "top_5", "loss")}
    assert set(whole) - set(bare) == added
    for name, values in bare.items():
        np.testing.assert_array_equal(values, whole[name])


def test_a_run_whose_file_is_gone_evaluates_to_the_same_figures(trained):
    directory, results = trained
    found = evaluate.evaluate(directory)
    assert list(found["outputs"]) == ["main", "branch"]
    assert set(found["predictions"]) == {"joint", "fitted", "linear"}
    for name, metrics in {**found["outputs"], **found["predictions"]}.items():
        for metric, values in metrics.items():
            assert values["runs"] == results["splits"]["test"][f"{name}/{metric}"]


def test_going_on_with_other_groups_is_refused(trained, file, tmp_path):
    directory, results = trained
    # The same groups from another file are the same run, which is finished.
    assert train.train(_config(file, TRAINED), str(directory)) == results
    path = tmp_path / "other.json"
    groups.save(path, {3: Groups(DIGITS, THREE.assignment[::-1])}, "otherwise")
    with pytest.raises(ValueError, match=r"another config:\n  data.groups.coarse.assignment: \("):
        train.train(_config(path, TRAINED), str(directory))
    with pytest.raises(ValueError, match=r"would change the run: data.groups.coarse.file: '' ->"):
        open_run(directory, [f"--config.data.groups.coarse.file={path}"])


def test_what_is_predicted_of_a_split_is_collected_in_order(opened):
    runs, predicted, _, kept = opened
    for split in ("train", "validation"):
        outputs, labels = runs._predict(kept.params, kept.model_state, split, every=1)
        assert set(outputs) == {"main", "branch"}
        for seed in (0, 1):
            expected, right = predicted[split, seed]
            np.testing.assert_array_equal(labels[seed], right)
            for name, logits in expected.items():
                np.testing.assert_allclose(outputs[name][seed], logits, rtol=1e-4, atol=1e-4)


def test_each_run_is_fitted_to_its_own_predictions(opened):
    runs, predicted, fitted, _ = opened
    rules = runs.parts.predictions
    assert set(fitted) == {"fitted", "linear"}
    eta, weights = fitted["fitted"], fitted["linear"]
    assert weights["kernel"].shape == (2, 13, 10)
    assert eta[0] != eta[1]
    for seed in (0, 1):
        alone = jax.jit(rules["fitted"].fit)(*predicted["validation", seed])
        assert float(eta[seed]) == pytest.approx(float(alone), abs=1e-3)
        # Fitted to the training examples, each combination is better on its own run's.
        own, other = (
            rules["linear"](predicted["train", seed][0], jax.tree.map(lambda x, i=i: x[i], weights))
            for i in (seed, 1 - seed)
        )
        labels = predicted["train", seed][1]
        main = jax.nn.log_softmax(predicted["train", seed][0]["main"])
        assert _loss(own, labels) < min(_loss(other, labels), _loss(main, labels)) - 1e-3


def _loss(log_probability, labels):
    return -float(np.asarray(log_probability)[np.arange(len(labels)), labels].mean())


def test_the_measured_joint_probability_is_that_of_the_outputs(trained, opened):
    test = trained[1]["splits"]["test"]
    _, predicted, fitted, _ = opened
    for seed in (0, 1):
        outputs, labels = predicted["test", seed]
        main, branch = (np.asarray(jax.nn.log_softmax(outputs[k])) for k in ("main", "branch"))
        for name, eta in (("joint", 0.5), ("fitted", float(fitted["fitted"][seed]))):
            joint = main + eta * branch[:, THREE.assignment]
            right = float((joint.argmax(-1) == np.asarray(labels)).mean())
            assert test[f"{name}/top_1"][seed] == pytest.approx(right, abs=2e-3)
            joint -= np.log(np.exp(joint).sum(-1, keepdims=True))
            assert test[f"{name}/loss"][seed] == pytest.approx(_loss(joint, labels), rel=1e-3)
