import json

import chex
import jax
import numpy as np
import pytest
from changed import changed
from ml_collections import ConfigDict

from sire_jax import configuration
from sire_jax.configuration import augmentation, experiment, head, objective, prediction
from sire_jax.data.augmentation import Flip
from sire_jax.data.tasks import Images, Pairs
from sire_jax.losses import LOSSES, binary_cross_entropy, cross_entropy
from sire_jax.runs.loading import load_data

CONFIGS = configuration.repository_configs()


def _quickstart(changes=(), variant="auxiliary"):
    return changed(configuration.load(f"{CONFIGS}/quickstart.py:{variant}"), changes)


def _digits(changes=()):
    """A small network that tells the ten digits apart, with an exit after its first block."""
    config = configuration.default()
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(4, 8))
    config.heads.exit_1 = head("classifier", endpoints=("block_1",), classes=10)
    config.objectives.main = objective("main", "label", "cross_entropy")
    config.objectives.exit_1 = objective("exit_1", "label", "cross_entropy", 0.5)
    return changed(config, changes)


def test_the_parts_are_those_of_the_config():
    parts = experiment.build(_quickstart({"augmentation.flip": augmentation("flip")}))
    assert parts.task == Pairs(train=500, test=250)
    assert {k: x.shape for k, x in parts.batch.items()} == {
        "image": (2, 2, 8, 8, 1),
        "digits": (2, 2),
        "label": (2,),
    }
    assert parts.batch["image"].dtype == np.float32
    assert {k: x.shape for k, x in parts.outputs.items()} == {"main": (2, 1), "digits": (2, 2, 10)}
    found = {k: (o.output, o.target, o.loss, o.weight) for k, o in parts.objectives.items()}
    assert found == {
        "main": ("main", "label", binary_cross_entropy, 1.0),
        "digits": ("digits", "digits", cross_entropy, 10.0),
    }
    assert set(parts.predictions) == {"order"}
    # Pairs of a batch are scaled to [0, 1].
    arrays = {"image": np.full((3, 8, 8, 1), 255, np.uint8), "label": np.array([1, 2, 3])}
    batch = parts.lookup(jax.tree.map(jax.numpy.asarray, arrays), jax.numpy.array([[2, 0], [1, 1]]))
    assert np.allclose(batch["image"], 1)
    assert batch["label"].tolist() == [0, 1]


def test_a_classifier_of_single_images_is_built():
    parts = experiment.build(_digits())
    assert parts.task == Images()
    assert {k: x.shape for k, x in parts.outputs.items()} == {"main": (2, 10), "exit_1": (2, 10)}


DIGIT = objective("digit", "digits", "cross_entropy")
DIGITS = objective("digits", "digit", "cross_entropy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads.digits.endpoints": ("digit",)},
            "'digits' is attached to 'digit', which is neither.*Known: digits",
        ),
        ({"heads.digits.name": "identiy"}, "no head 'identiy'. Did you mean 'identity'"),
        ({"heads.digits.classes": 10}, "head 'identity' has no setting 'classes'"),
        ({"backbone": {}}, "A backbone needs a 'name'"),
        ({"backbone.name": "pair_branch"}, "Did you mean 'pair_branches'"),
        ({"backbone.dropout": "0.5"}, "dropout is '0.5', a str; it should be a float"),
        ({"backbone.padding": True}, "padding is True, a bool; it should be a int"),
        ({"objectives.digits": DIGIT}, "'digits' is on the output 'digit'.*Known: digits, main"),
        ({"objectives.digits": DIGITS}, "'digits' is on the target 'digit'.*mean 'digits'"),
        ({"objectives.main.loss": "cross_entrop"}, "no loss 'cross_entrop'. Did you mean 'cross"),
        ({"objectives.main.wieght": 2.0}, "'main' has no setting 'wieght'. Did you mean 'weight'"),
        ({"objectives": {}}, "There is no objective"),
        ({"predictions.order.output": "digit"}, "'order' uses.*'digit'.*Did you mean 'digits'"),
        ({"predictions.main": prediction("output")}, "'main' has the name of an output"),
        ({"predictions.digits": prediction("output")}, "'digits' has the name of an output or obj"),
        ({"data.task.downscale": 3}, "Images of 8 x 8 can't be downscaled by 3"),
        ({"data.task.pairs": 3}, "task 'pairs' has no setting 'pairs'"),
        ({"optimizer.name": "adm"}, "no optimizer 'adm'. Did you mean 'adam'"),
        ({"update_rule.name": "jiont"}, "no update rule 'jiont'. Did you mean 'joint'"),
        ({"epochs": 0}, "config.epochs is 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_quickstart(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.classes": 7}, "'main' compares 'main', which has 7 logits, with 'label'.* 10 "),
        ({"heads.exit_1.classes": 12}, "'exit_1' compares 'exit_1', which has 12 logits"),
        ({"data.classes.label": 5}, "10 logits, with 'label', which has 5 classes"),
        ({"heads.exit_1.endpoints": ("block_9",)}, "'block_9'.*Known: block_1, block_2"),
    ],
)
def test_outputs_of_another_width_than_the_classes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_digits(changes))


def test_digits_of_another_width_than_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"7 logits.*10 classes"):
        experiment.build(_quickstart({"backbone.outputs": 7}))


def test_negative_probabilities_of_another_width_than_the_classes_are_refused():
    changes = {"backbone.classes": 7, "objectives.main.loss": "negative_probability"}
    with pytest.raises(ValueError, match=r"7 logits.*10 classes"):
        experiment.build(_digits(changes))


def test_a_loss_that_does_not_take_its_output_is_refused():
    for loss in ("mean_squared_error", "binary_cross_entropy"):
        with pytest.raises(
            ValueError, match=r"can't compare the output 'digits', float32\[2, 2, 10\]"
        ):
            experiment.build(_quickstart({"objectives.digits.loss": loss}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1; it should be at least 0"),
        ({"data.shape": (8, 8)}, r"shape is \(8, 8\); it should be \(height, width, channels\)"),
        ({"objectives.main": 3}, "objective 'main' is 3; it should be a section"),
        ({"heads.digits": 3}, "A head is 3; it should be a section"),
    ],
)
def test_values_that_are_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_quickstart(changes))


def test_a_weight_may_be_a_schedule():
    falling = {"name": "linear", "init_value": 2.0, "end_value": 0.0, "transition_steps": 4}
    parts = experiment.build(_quickstart({"objectives.digits.weight": falling}))
    weights = [float(parts.objectives["digits"].weight_at(step)) for step in (0, 1, 4, 9)]
    assert weights == [2.0, 1.5, 0.0, 0.0]


def test_a_learning_rate_may_be_a_schedule():
    falling = {"name": "linear", "init_value": 2.0, "end_value": 0.0, "transition_steps": 4}
    experiment.build(_quickstart({"optimizer.learning_rate": falling}))


def test_what_pairs_ignore_is_negative():
    section = configuration.objective("main", "label", "binary_cross_entropy", ignore=255)
    with pytest.raises(ValueError, match=r"'main' ignores 255, but of pairs a digit that is none"):
        experiment.build(_quickstart({"objectives.main": section.to_dict()}))


def test_a_weight_left_out_is_one():
    plain = _quickstart().to_dict()
    del plain["objectives"]["main"]["weight"]
    assert experiment.build(ConfigDict(plain)).objectives["main"].weight == 1.0


def test_an_unknown_augmentation_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no augmentation 'flp'. Did you mean 'flip'"):
        experiment.build(_quickstart({"augmentation.flp": {"name": "flp"}}))


def test_an_augmentation_of_ones_own_is_applied():
    section = {"name": "sire_jax.data.augmentation:Flip", "probability": 1.0}
    parts = experiment.build(_quickstart({"augmentation.mine": section}))
    batch = {"image": jax.numpy.arange(12.0).reshape(1, 2, 2, 3, 1)}
    expected = Flip(1.0)(jax.random.key(0), batch)["image"]
    assert np.array_equal(parts.augment(jax.random.key(0), batch)["image"], expected)


def test_an_augmentation_that_the_task_does_not_suit_is_refused():
    with pytest.raises(ValueError, match="swap"):
        experiment.build(_digits({"augmentation.swap": augmentation("swap")}))


def test_an_augmentation_that_the_images_do_not_suit_is_refused():
    crop = augmentation("crop", padding=7, border="reflection")
    experiment.build(_digits({"augmentation.crop": crop}))
    message = r"padding is 7, but images of 7 x 7 can be reflected by at most 6"
    with pytest.raises(ValueError, match=message):
        experiment.build(_digits({"augmentation.crop": crop, "data.crop": 7}))


def test_augmentations_are_applied_in_their_own_order_not_the_order_of_the_config():
    made = []
    for names in (("flip", "crop"), ("crop", "flip")):
        changes = {f"augmentation.{name}": augmentation(name) for name in names}
        made.append(experiment.build(_digits(changes)).augment)
    batch = {"image": jax.random.uniform(jax.random.key(1), (8, 8, 8, 1))}
    first, second = (augment(jax.random.key(0), batch)["image"] for augment in made)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, batch["image"])


@pytest.fixture(scope="module")
def auxiliary():
    return experiment.build(_quickstart())


def _load(parts, changes):
    other = {**vars(parts), "config": changed(parts.config, changes)}
    return load_data(experiment.Experiment(**other))


def test_the_data_of_every_run_are_drawn_from_its_seed(auxiliary):
    dataset, draws = _load(auxiliary, {"seed": 3, "seeds": 2})
    assert dataset.classes == {"label": 10}
    assert len(draws) == 2
    for seed, draw in zip((3, 4), draws, strict=True):
        expected = Pairs(train=500, test=250).draw(dataset, seed)
        chex.assert_trees_all_equal(draw, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.shape": (4, 4, 1)},
            r"\(4, 4, 1\), but the training images of digits are \(8, 8, 1\)",
        ),
        ({"data.classes": {"label": 7}}, "classes.label is 7, but digits has {'label': 10}"),
        ({"data.classes": {"coarse": 10}}, "classes.coarse is 10, but digits has {'label': 10}"),
        ({"batch_size": 501}, "batch_size is 501, but there are only 500 training examples"),
        (
            {"evaluate_splits": ("validation",)},
            "no validation examples to measure.*validation_per_class",
        ),
        ({"data.name": "digit"}, "no data source 'digit'. Did you mean 'digits'"),
    ],
)
def test_data_that_are_not_what_the_config_says_are_refused(auxiliary, changes, message):
    with pytest.raises(ValueError, match=message):
        _load(auxiliary, changes)


DRAWN = {"data.draw_classes": 4, "data.classes.label": 4}
NARROW = {"backbone.classes": 4, "heads.exit_1.classes": 4}


def test_a_run_on_drawn_classes_has_their_images():
    parts = experiment.build(_digits({**DRAWN, **NARROW, "data.images": 480}))
    assert {k: x.shape for k, x in parts.outputs.items()} == {"main": (2, 4), "exit_1": (2, 4)}
    dataset, (draw,) = load_data(parts)
    assert dataset.classes == {"label": 4}
    assert len(draw.train) == len(dataset.train.image) == 480
    other = _load(parts, {"data.draw_seed": 7, "data.images": 0})[0]
    assert not np.array_equal(other.test.image, dataset.test.image)
    with pytest.raises(ValueError, match=r"images is 1198, but digits has 480 .* of these classes"):
        _load(parts, {"data.images": 1198})


def test_as_many_outputs_as_drawn_classes_are_needed():
    with pytest.raises(ValueError, match=r"10 logits, with 'label', which has 4 classes"):
        experiment.build(_digits(DRAWN))


def test_a_set_that_is_not_prepared_is_refused(auxiliary, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config.data.dir"):
        _load(auxiliary, {"data.name": "tfds:mnist", "data.dir": str(tmp_path)})


def test_more_pairs_than_the_data_have_are_refused():
    parts = experiment.build(_quickstart({"data.task.train": 700}))
    with pytest.raises(ValueError, match="need 1400 images; the data set has 1198"):
        load_data(parts)


def test_a_whole_set_may_be_a_batch_and_validation_examples_be_measured():
    changes = {"data.task.validation": 20, "evaluate_splits": ("validation",), "batch_size": 500}
    _, draws = load_data(experiment.build(_quickstart(changes)))
    assert [len(part) for part in draws[0]] == [500, 20, 250]


def test_measuring_a_test_without_examples_is_refused():
    with pytest.raises(ValueError, match="test"):
        load_data(experiment.build(_quickstart({"data.task.test": 0})))


def test_an_initial_state_depends_on_the_seed(auxiliary):
    make = jax.jit(auxiliary.initial_state)
    first, again, other = (make(np.int32(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first.params, again.params)
    kernels = [each.params["backbone"]["hidden"]["kernel"] for each in (first, other)]
    assert not np.array_equal(*kernels)
    assert int(first.step) == 0


# Table I of Peeters and Schlyter, Sections III.A to III.F.
EPOCHS = {
    "dense_bce": 20,
    "dense_mse": 20,
    "conv": 80,
    "conv_bn": 80,
    "conv_augment": 80,
    "duplicated": 20,
    "shared": 20,
    "aux_0.1": 70,
    "aux_10": 70,
    "residual": 120,
    "resless": 40,
}
WEIGHTS = {"aux_0.1": 0.1, "aux_10": 10.0, "residual": 10.0, "resless": 10.0}


def _row(row, option=""):
    return configuration.load(f"{CONFIGS}/pairs.py:{row}{option}")


@pytest.mark.parametrize("row", EPOCHS)
@pytest.mark.parametrize("released", [False, True])
def test_every_row_of_the_table_builds(row, released):
    config = _row(row, ",as_released" if released else "")
    parts = experiment.build(config)
    assert config.epochs == EPOCHS[row]
    assert parts.task == Pairs(train=1000, test=1000, validation=0, downscale=2)
    assert parts.batch["image"].shape == (2, 2, 14, 14, 1)
    assert parts.outputs["main"].shape == (2, 1)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adam", 1e-3)
    assert config.data.scale == (1.0 if released else 1 / 255)
    convolutional = row in ("conv", "conv_bn", "conv_augment")
    assert config.batch_size == (1000 if released and convolutional else 100)
    main = "binary_squared_error" if row == "dense_mse" else "binary_cross_entropy"
    assert parts.objectives["main"].loss is LOSSES[main]
    assert parts.objectives["main"].weight == 1
    assert set(config.augmentation) == ({"swap"} if row == "conv_augment" else set())
    assert set(parts.objectives) == {"main", *(["digits"] if row in WEIGHTS else [])}
    assert set(parts.predictions) == ({"order"} if row in WEIGHTS else set())
    if row in WEIGHTS:
        loss = "negative_probability" if released else "cross_entropy"
        assert parts.objectives["digits"].loss is LOSSES[loss]
        assert parts.objectives["digits"].weight == WEIGHTS[row]
        assert parts.outputs["digits"].shape == (2, 2, 10)
    if row in ("residual", "resless"):
        assert config.backbone.residual is (row == "residual")
        assert config.backbone.residual_hidden == (32 if released else 50)
        kernel = parts.variables["params"]["backbone"]["branch"]["hidden"]["kernel"]
        assert kernel.shape == (32 * 7 * 7, 32 if released else 50)


@pytest.mark.parametrize("row", EPOCHS)
def test_the_released_program_differs_in_what_is_known_to_differ(row):
    paper, released = _row(row), _row(row, ",as_released")
    keys = {line.partition(":")[0] for line in configuration.differences(paper, released)}
    expected = {"name", "data.scale"}
    if row.startswith("conv"):
        expected.add("batch_size")
    if row in WEIGHTS:
        expected.add("objectives.digits.loss")
    if row in ("residual", "resless"):
        expected.add("backbone.residual_hidden")
    assert keys == expected


def test_the_rows_are_those_of_the_printed_table():
    printed = json.loads((CONFIGS / "tables" / "pairs_1.json").read_text())
    assert {row["variant"]: row["epochs"] for row in printed["rows"]} == EPOCHS


def test_an_unknown_row_or_option_is_refused():
    with pytest.raises(ValueError, match=r"no variant 'aux_1'. Did you mean 'aux_10'"):
        _row("aux_1")
    with pytest.raises(ValueError, match="no option 'as_relased'"):
        _row("aux_10", ",as_relased")


def test_the_quickstart_without_its_auxiliary_output_is_the_same_network(auxiliary):
    parts = experiment.build(_quickstart(variant="main_only"))
    assert set(parts.objectives) == {"main"}
    assert set(parts.outputs) == {"main"}
    chex.assert_trees_all_equal_shapes(parts.variables, auxiliary.variables)
    keys = {line.split(":")[0] for line in configuration.differences(parts.config, _quickstart())}
    assert all(
        k == "name" or k.split(".")[0] in ("heads", "objectives", "predictions") for k in keys
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("draw_classes=1", r"config\.data: draw_classes is 1; it should be at least 2"),
        ("train_splits=('a','a')", r"config\.data: train_splits is \('a', 'a'\) .*named twice"),
        ("task.train=-1", r"config\.data\.task: train is -1; it should be at least"),
    ],
)
def test_the_config_adds_the_path_to_what_is_wrong_with_data(override, message):
    path = f"{configuration.repository_configs()}/quickstart.py"
    config = configuration.load(path, [f"--config.data.{override}"])
    with pytest.raises(ValueError, match=message):
        experiment.forward(config)
