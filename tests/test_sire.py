"""The SIRe configs: schedules, settings that do not fit, a training step, and their tables."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from planned import random_like

from sire_jax import configuration, optimizers, paper_tables
from sire_jax.configuration import experiment
from sire_jax.configuration import objectives as objective_sections
from sire_jax.configuration import optimizers as optimizer_section
from sire_jax.data import tasks
from sire_jax.data.batches import image_range
from sire_jax.state import TrainState

CONFIGS = configuration.repository_configs()


def _load(variant="cnn", *overrides):
    return configuration.load(
        f"{CONFIGS}/sire.py:{variant}", [f"--config.{each}" for each in overrides]
    )


@pytest.mark.parametrize(
    ("variant", "last", "nesterov", "initialization"),
    [
        ("cnn", "normalized", True, "pytorch"),
        ("cnn_base", "normalized", True, "pytorch"),
        ("cnn,he", "normalized", True, "modules"),
        ("cnn,linear", "linear", True, "pytorch"),
        ("cnn,heavy_ball,he", "linear", False, "modules"),
        ("vgg16", "normalized", True, "modules"),
        ("resnet34_imagenet,sigmoid,pytorch", "sigmoid", True, "pytorch"),
    ],
)
def test_readings_of_what_the_paper_leaves_open(variant, last, nesterov, initialization):
    config = _load(variant)
    assert config.heads.decoder.last == last
    assert config.optimizer.nesterov == nesterov
    assert config.initialization == initialization


def test_readings_of_the_losses_and_of_batch_norm():
    config = _load("cnn,equation_1,summed,no_decoder_norm")
    assert config.objectives.main.weight == 0.01
    assert config.objectives.decoder.weight == 0.2 * 32 * 32 * 3
    assert not config.backbone.decoder_norm
    shipped = _load("cnn")
    assert (shipped.objectives.main.weight, shipped.objectives.decoder.weight) == (1.0, 0.2)
    assert shipped.backbone.decoder_norm
    objectives = _load("googlenet,equation_1").objectives
    assert objectives.auxiliary_1.weight == pytest.approx(0.003)
    # Of a stream, what the network sees of an image.
    config = _load("vgg16_imagenet,equation_1,summed")
    assert config.objectives.main.weight == 0.001
    assert config.objectives.decoder.weight == 0.2 * 224 * 224 * 3
    with pytest.raises(ValueError, match=r"'no_decoder_norm' is a reading of cnn and vgg, not of"):
        _load("resnet34,no_decoder_norm")


def test_few_images_are_of_the_cnn_alone():
    config = _load("cnn,few_images")
    assert (config.backbone.width, config.backbone.hidden) == (0.25, (128, 128))
    assert (config.backbone.dropout, config.batch_size) == (0.0, 32)
    # Of the last weights: nothing is chosen on validation images.
    assert (config.evaluate_splits, config.epochs) == (("test",), 40)
    assert _load("cnn_base,few_images").backbone.residuals is False
    with pytest.raises(ValueError, match=r"'few_images' is for cnn, not for vgg16"):
        _load("vgg16,few_images")
    with pytest.raises(ValueError, match=r"'few_images' and 'summed' don't go together"):
        _load("cnn,summed,few_images")


@pytest.mark.parametrize("variant", ["cnn,linear,sigmoid", "cnn,he,pytorch"])
def test_two_readings_of_the_same_are_refused(variant):
    first, second = variant.split(",")[1:]
    with pytest.raises(ValueError, match=f"'{first}' and '{second}' are readings of the same"):
        _load(variant)


def test_a_reading_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"There is no reading 'sigmiod'.*'sigmoid'"):
        _load("cnn,sigmiod")


def _thin(*overrides):
    """SIRe-CNN with few channels and small images, as ``build`` checks it in a second or two."""
    small = (
        "data.shape=(16, 16, 3)",
        "backbone.width=0.0625",
        "backbone.hidden=(8, 8)",
        "heads.decoder.stages=(1, 2)",
        "batch_size=4",
    )
    return configuration.override(_load("cnn", *small), [f"--config.{each}" for each in overrides])


# ---- Schedules.


def test_the_learning_rate_is_divided_by_five_after_60_120_and_160_of_200_epochs():
    config = _load()
    task = tasks.Images(validation_per_class=50)
    units = optimizer_section.units(task, config)
    # 45,000 examples in batches of 128, the rest dropped.
    assert units == {"epoch": 351, "run": 70_200}
    rate = jax.jit(
        optimizers.number_or_schedule(config.optimizer.learning_rate, "learning rate", units)
    )
    steps = {e: 351 * e for e in (60, 120, 160)}
    for step, value in (
        (0, 0.1),
        (351 * 59, 0.1),
        (steps[60] - 1, 0.1),
        (steps[60], 0.02),
        (steps[120] - 1, 0.02),
        (steps[120], 0.004),
        (steps[160] - 1, 0.004),
        (steps[160], 0.0008),
        (70_199, 0.0008),
    ):
        assert float(rate(jnp.int32(step))) == pytest.approx(value, rel=1e-5), step


@pytest.mark.parametrize("steps", [1, 2, 7, 351])
def test_schedules_in_epochs(steps):
    section = {
        "name": "piecewise",
        "init_value": 1.0,
        "boundaries": (60, 120, 160),
        "scale": 0.5,
        "unit": "epoch",
    }
    schedule = optimizers.number_or_schedule(section, "rate", {"epoch": steps, "run": 200 * steps})
    for epoch, value in ((59, 1.0), (60, 0.5), (119, 0.5), (120, 0.25), (160, 0.125), (199, 0.125)):
        assert float(schedule(jnp.int32(epoch * steps))) == value
        assert float(schedule(jnp.int32((epoch + 1) * steps - 1))) == value
    linear = {"name": "linear", "init_value": 0.0, "end_value": 1.0, "transition_steps": 1}
    whole = optimizers.number_or_schedule(
        linear | {"unit": "run"}, "weight", {"epoch": steps, "run": 4 * steps}
    )
    assert [float(whole(jnp.int32(i * steps))) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("epochs", [1, 7, 10, 30, 200])
def test_in_a_run_of_any_length_the_rate_falls_with_the_first_step_at_its_share(epochs):
    config = _load("cnn", f"epochs={epochs}")
    units = optimizer_section.units(tasks.Images(50), config)
    rate = jax.jit(optimizers.number_or_schedule(config.optimizer.learning_rate, "rate", units))
    total = 351 * epochs
    for tenths, before, after in ((3, 0.1, 0.02), (6, 0.02, 0.004), (8, 0.004, 0.0008)):
        first = -(-total * tenths // 10)
        assert float(rate(jnp.int32(first - 1))) == pytest.approx(before, rel=1e-5)
        assert float(rate(jnp.int32(first))) == pytest.approx(after, rel=1e-5)


BOUNDARIES = st.lists(st.integers(1, 50), unique=True, max_size=4).map(sorted).map(tuple)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(BOUNDARIES, st.floats(0.05, 1.0), st.floats(0, 10), st.integers(1, 5))
def test_a_piecewise_schedule_never_rises_and_counts_its_boundaries(times, scale, first, length):
    section = {"name": "piecewise", "init_value": first, "boundaries": times, "scale": scale}
    schedule = optimizers.number_or_schedule(
        section | {"unit": "epoch"}, "rate", {"epoch": length, "run": 60 * length}
    )
    steps = np.arange(0, 60 * length, length)
    values = np.array(jax.vmap(schedule)(jnp.asarray(steps, jnp.int32)))
    assert (np.diff(values) <= 0).all()
    passed = np.array([sum(t <= step // length for t in times) for step in steps])
    np.testing.assert_allclose(values, first * scale**passed, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_value": -0.1}, r"init_value -0\.1 and scale 0\.2; .* at least 0 and above 0"),
        ({"scale": 0.0}, r"scale 0\.0"),
        ({"boundaries": (2, 1)}, r"boundaries \(2, 1\) should be in rising order"),
        ({"boundaries": (1, 1)}, r"boundaries \(1, 1\) should be in rising order"),
    ],
)
def test_bad_piecewise_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.piecewise(**{"init_value": 1.0, "boundaries": (1,), "scale": 0.2} | settings)


# ---- Weights of a family, and what does not fit.


@pytest.mark.optax_dtypes
def test_each_decoder_has_lambda_or_a_weight_of_its_own():
    one = experiment.build(_thin("objectives.decoder.weight=0.3")).objectives
    assert [one[k].weight for k in ("main", "decoder_1", "decoder_2")] == [1.0, 0.3, 0.3]
    assert {k: (o.output, o.target) for k, o in one.items()} == {
        "main": ("main", "label"),
        "decoder_1": ("decoder_1", "image"),
        "decoder_2": ("decoder_2", "image"),
    }
    several = experiment.build(_thin("objectives.decoder.weights=(0.1, 0.4)")).objectives
    assert [several[f"decoder_{i}"].weight for i in (1, 2)] == [0.1, 0.4]
    swapped = experiment.build(
        _thin("heads.decoder.stages=(2, 1)", "objectives.decoder.weights=(0.1, 0.4)")
    )
    assert [swapped.objectives[f"decoder_{i}"].weight for i in (2, 1)] == [0.1, 0.4]
    none = experiment.build(_thin("heads.decoder.stages=()"))
    assert set(none.objectives) == set(none.outputs) == {"main"}


def test_the_last_of_two_overrides_of_a_tuple_counts():
    # As of a row of a table, then of the command line (paper_tables.row_config).
    config = _load("cnn", "heads.decoder.stages=(1, 2)", "heads.decoder.stages=(3,)")
    assert config.heads.decoder.stages == (3,)


def test_weights_of_one_output():
    config = ConfigDict(_thin("heads.decoder.stages=()").to_dict())
    config.objectives.main.weights = (0.5,)
    assert (
        objective_sections.create(config.objectives, {"decoder": []}, {}, {})["main"].weight == 0.5
    )


def test_lambdas_of_the_networks():
    found = {v: _load(v).objectives.decoder.weight for v in ("cnn", "vgg16", "vgg19")}
    assert set(found.values()) == {0.2}
    assert _load("resnet34").objectives.decoder.weight == 0.21
    assert _load("resnet50").objectives.decoder.weight == 0.21
    assert _load("googlenet").objectives.decoder.weight == 0.19


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["heads.decoder.stages=(1, 2, 3, 4)", "data.shape=(24, 24, 3)"],
            r"Images of 24 x 24 can't be decoded from stage 4: stage_4_block_3 divides them by 16"
            r" .*multiples of 16",
        ),
        (
            ["data.shape=(8, 8, 3)"],
            r"Images of 8 x 8 are too small: they are 1 x 1 when stage_4_block_3 would divide",
        ),
        (["heads.decoder.stages=(1, 5)"], r"no stage 5 .*has the stages 1, 2, 3, 4\."),
        (["heads.decoder.stages=(2, 2)"], r"two decoders of a stage: \(2, 2\)"),
        (
            ["objectives.decoder.weight=-0.2"],
            r"config.objectives.decoder.weight is -0\.2; it should be finite and at least 0",
        ),
        (
            ["objectives.decoder.weight=nan"],
            r"config.objectives.decoder.weight is nan; it should be finite",
        ),
        (
            ["objectives.decoder.weights=(0.1, 0.2, 0.3)"],
            r"'decoder' has 3 weights for 2 outputs \(decoder_1, decoder_2\); give one for each, or"
            r" 'weight' for all",
        ),
        (
            ["objectives.decoder.weights=(0.1, -0.2)"],
            r"config.objectives.decoder.weights\[1\] is -0\.2",
        ),
        (["objectives.decoder.output=decoders"], r"output 'decoders', which does not exist"),
        (
            ["data.mean=(0.5, 0.5, 0.5)"],
            r"'decoder_1' reconstructs images whose values are in \[-0\.5, 0\.5\].*states the range"
            r" \[0, 1\]\. Set its value_range to \(-0\.5, 0\.5\)",
        ),
        (
            ["data.mean=(0.5, 0.4, 0.5)", "data.std=(0.5, 0.25, 0.5)"],
            r"values are in \[-1\.6, 2\.4\]",
        ),
        (["data.scale=1.0"], r"values are in \[0, 255\]"),
        (["data.mean=(0.5,)"], r"data\.mean is \(0\.5,\); .* each of the 3 channels, or \(\)"),
        (["data.std=(1.0, 0.0, 1.0)"], r"data\.std is \(1\.0, 0\.0, 1\.0\); it should be above 0"),
        (["backbone.dtype=float16"], r"dtype is 'float16'.*float32, bfloat16"),
        (["backbone.width=0.0"], r"width is 0\.0; it should be above 0"),
        (["backbone.dropout=1.0"], r"dropout rate is 1\.0"),
        (
            ["optimizer.learning_rate.unit=year"],
            r"config.optimizer.learning_rate.unit is 'year'",
        ),
        (
            ["optimizer.learning_rate.unit=epoch", "data.images=0"],
            r"learning rate counts in the unit 'epoch', .* set config\.data\.images",
        ),
        (["data.images=0"], r"counts in the unit 'run'"),
    ],
)
@pytest.mark.optax_dtypes
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_thin(*overrides))


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        ("vgg16", ["backbone.depth=12"], r"no VGG of depth 12"),
        ("resnet34", ["backbone.depth=20"], r"no ResNet of depth 20"),
        ("resnet34", ["backbone.stem=large"], r"stem is 'large'"),
        ("googlenet", ["backbone.kernel_size=4"], r"Inception has kernel_size 4"),
        ("vgg16", ["data.shape=(16, 16, 3)"], r"16 x 16 are too small: .* stage_5_block_4"),
        ("vgg_16", [], r"no variant 'vgg_16'.*Did you mean 'vgg16'"),
    ],
)
def test_networks_that_do_not_exist_are_refused(variant, overrides, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_load(variant, *overrides))


@pytest.mark.optax_dtypes
@pytest.mark.parametrize(
    ("overrides", "low", "high"),
    [
        (["data.mean=(0.5, 0.5, 0.5)"], -0.5, 0.5),
        (["data.mean=(0.5, 0.4, 0.5)", "data.std=(0.5, 0.25, 0.5)"], -1.6, 2.4),
        (["data.scale=1.0"], 0.0, 255.0),
    ],
)
def test_a_decoder_may_state_the_range_of_normalized_images(overrides, low, high):
    config = _thin(*overrides, f"heads.decoder.value_range=({low}, {high})")
    assert image_range(config.data) == pytest.approx((low, high))
    parts = experiment.build(config)
    pixels = {"image": jnp.asarray([0, 255], jnp.uint8).reshape(2, 1, 1, 1)}
    pixels["image"] = jnp.broadcast_to(pixels["image"], (2, 16, 16, 3))
    pixels |= {k: jnp.zeros(2, jnp.int32) for k in ("label", "coarse_label")}
    image = parts.lookup(pixels, jnp.arange(2))["image"]
    assert float(image.min()) == pytest.approx(low)
    assert float(image.max()) == pytest.approx(high)


def test_decoders_of_a_backbone_without_a_plan_are_refused():
    config = configuration.load(f"{CONFIGS}/quickstart.py")
    config = ConfigDict(config.to_dict())
    config.heads = ConfigDict({"decoder": configuration.head("decoders")})
    with pytest.raises(ValueError, match="need a backbone that is made of a plan"):
        experiment.build(config)


@pytest.mark.optax_dtypes
def test_two_heads_of_one_output_are_refused():
    config = ConfigDict(_thin().to_dict())
    config.heads.decoder_1 = configuration.head("classifier", endpoints=("stage_1",), classes=100)
    with pytest.raises(ValueError, match="Two heads have the output 'decoder_1'"):
        experiment.build(config)


@pytest.mark.optax_dtypes
def test_two_objectives_of_one_name_are_refused():
    config = ConfigDict(_thin().to_dict())
    config.objectives.decoder_1 = configuration.objective(
        "decoder_1", "image", "mean_squared_error"
    )
    with pytest.raises(ValueError, match="Two objectives have the name 'decoder_1'"):
        experiment.build(config)


# ---- A step of the shipped networks, shrunk.


def _batch(parts, images=4):
    generator = np.random.default_rng(0)
    shape = (images, *parts.config.data.shape)
    arrays = {"image": jnp.asarray(generator.integers(0, 256, shape), jnp.uint8)}
    for kind, classes in parts.config.data.classes.items():
        arrays[kind] = jnp.asarray(generator.integers(0, classes, images), jnp.int32)
    return parts.lookup(arrays, jnp.arange(images))


SHRUNK = {
    "cnn": ("backbone.hidden=(8, 8)", "heads.decoder.stages=(1, 4)"),
    "resnet34": ("backbone.depth=18", "heads.decoder.stages=(2,)"),
}


@pytest.mark.optax_dtypes
@pytest.mark.parametrize("variant", SHRUNK)
def test_a_step_of_a_sire_config_has_finite_losses_and_changes_every_parameter(variant):
    small = ("data.shape=(16, 16, 3)", "backbone.width=0.0625", "batch_size=4")
    # Without decay, which would change parameters that no objective reaches.
    decay = "optimizer.weight_decay=0.0"
    parts = experiment.build(_load(variant, *small, decay, *SHRUNK[variant]))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if path[-1].key == "bias" else x, random_like(parts.variables)
    )
    before = TrainState.start(jax.random.key(0), variables, parts.rule)
    batch = _batch(parts)
    after, metrics = jax.jit(parts.step())(before, batch)
    assert set(metrics) == {f"{name}/loss" for name in (*parts.objectives, "total")}
    losses = {name: float(each.mean()) for name, each in metrics.items()}
    assert all(np.isfinite(loss) for loss in losses.values())
    weights = {f"{name}/loss": o.weight for name, o in parts.objectives.items()}
    total = sum(weights[name] * loss for name, loss in losses.items() if name != "total/loss")
    assert losses["total/loss"] == pytest.approx(total, rel=1e-4)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    same = [path for path, each in jax.tree_util.tree_leaves_with_path(changed) if not each]
    assert same == []
    chex.assert_tree_all_finite(after.params)


# ---- The tables' columns.

TABLE = {
    "columns": {
        "error": {"split": "test", "metric": "main/top_1", "error_percent": True, "format": ".2f"},
        "accuracy": {"split": "test", "metric": "main/top_1"},
        "size": {"parameters": True, "format": ".2f"},
        "time": {"relative_time": "base", "format": ".2f"},
        "mse": {"split": "test", "metric": "decoder_1/loss", "format": ".1e"},
    }
}
BASE = {"name": "Base", "variant": "b", "id": "base", "size": 7.9, "minutes": 100}
ROW = {"name": "Ours", "variant": "v", "id": "ours", "error": 26.15, "size": 14.0, "minutes": 170}


def _results(seconds, *accuracies):
    return {
        "seconds": seconds,
        "step_seconds": seconds / 100,
        "splits": {"test": {"main/top_1": list(accuracies)}},
    }


def test_errors_in_percent_parameters_in_millions_and_times_beside_the_base():
    base = _results(50.0, 0.5)
    line = paper_tables.compare(ROW, TABLE, _results(120.0, 0.7, 0.8), 14_072_944, (BASE, base))
    error = line["error"]
    assert error["paper"] == [26.15, None]
    np.testing.assert_allclose(error["runs"], [30.0, 20.0])
    # Mean 25, deviation of a sample of two: 10 / sqrt(2).
    np.testing.assert_allclose(error["ours"], [25.0, 10 / np.sqrt(2)])
    assert error["difference"] == pytest.approx(-1.15)
    assert error["deviations"] is None
    assert line["accuracy"]["paper"] is None
    assert line["accuracy"]["difference"] is None
    np.testing.assert_allclose(line["accuracy"]["ours"][0], 0.75)
    assert line["size"]["paper"] == [14.0, None]
    assert line["size"]["ours"][0] == pytest.approx(14.072944)
    assert line["size"]["difference"] == pytest.approx(0.072944)
    assert line["time"]["paper"] == [pytest.approx(1.7), None]
    assert line["time"]["ours"][0] == pytest.approx(2.4)
    assert line["time"]["difference"] == pytest.approx(0.7)
    assert (line["name"], line["variant"], line["seconds"]) == ("Ours", "ours", 120.0)
    # The base itself: once its own time.
    own = paper_tables.compare(BASE, TABLE, base, 7_939_492, (BASE, base))["time"]
    assert (own["paper"][0], own["ours"][0], own["difference"]) == (1.0, 1.0, 0.0)
    written = paper_tables.markdown([line], TABLE)
    cells = [cell.strip() for cell in written.splitlines()[-1].strip("| ").split("|")]
    assert cells == [
        "Ours",
        *("26.15", "25.00 ± 7.07", "-1.15"),
        "0.750 ± 0.071",
        *("14.00", "14.07", "+0.07"),
        *("1.70", "2.40", "+0.70"),
        # A network without decoders has no errors of theirs.
        "",
        "120",
    ]


def test_without_the_base_there_is_no_relative_time():
    line = paper_tables.compare(ROW, TABLE, _results(120.0, 0.7), 14_072_944)
    assert line["time"]["runs"] is None
    assert line["time"]["ours"] is None
    assert line["time"]["difference"] is None
    cells = paper_tables.markdown([line], TABLE).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[-4:-1]] == ["", "", "120"]


def test_the_errors_of_decoders_have_a_column():
    results = _results(120.0, 0.7)
    results["splits"]["test"]["decoder_1/loss"] = [3e-6]
    written = paper_tables.markdown([paper_tables.compare(ROW, TABLE, results)], TABLE)
    assert written.splitlines()[-1].split("|")[-3].strip() == "3.0e-06"


def test_a_row_without_the_papers_minutes_still_has_a_time():
    row = {key: value for key, value in ROW.items() if key != "minutes"}
    reference = (BASE, _results(60.0, 0.5))
    line = paper_tables.compare(row, TABLE, _results(120.0, 0.7), 1, reference)
    assert (line["time"]["paper"], line["time"]["ours"][0]) == (None, 2.0)


def test_rows_of_the_tables_change_what_they_say_alone():
    table = paper_tables.load_table("sire_1", CONFIGS)
    rows = {paper_tables.identity(row): row for row in table["rows"]}
    loaded = {k: paper_tables.row_config(table, row, CONFIGS, "", []) for k, row in rows.items()}
    parts = {
        k: (
            len(c.heads.decoder.stages) > 0,
            c.heads.decoder.skips and len(c.heads.decoder.stages) > 0,
            c.backbone.residuals,
        )
        for k, c in loaded.items()
    }
    # (I, S, Re)
    assert parts == {
        "base": (False, False, False),
        "re": (False, False, True),
        "i": (True, False, False),
        "ire": (True, False, True),
        "si": (True, True, False),
        "sire": (True, True, True),
    }
    whole = loaded["sire"]
    for name, config in loaded.items():
        changed = {line.partition(":")[0] for line in configuration.differences(whole, config)}
        assert changed <= {
            "name",
            "backbone.residuals",
            "heads.decoder.skips",
            "heads.decoder.stages",
        }, name
    table = paper_tables.load_table("sire_2", CONFIGS)
    found = [
        paper_tables.row_config(table, row, CONFIGS, "", []).objectives.decoder.weight
        for row in table["rows"]
    ]
    # The paper has four; 20 is what Eq. 1 prints of 0.2.
    assert found[1:] == [0.1, 0.2, 0.5, 1.0, 5.0, 20.0]


def test_the_printed_times_relative_to_the_base():
    for number, base in ((1, "base"), (3, "base"), (4, "cnn_base")):
        table = paper_tables.load_table(f"sire_{number}", CONFIGS)
        assert table["columns"]["relative_time"]["relative_time"] == base
        assert paper_tables.identity(table["rows"][0]) == base
        assert all(row["minutes"] > 0 for row in table["rows"])
