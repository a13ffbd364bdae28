"""The shipped SSAL configs: their networks, one step of each kind on digits, their tables."""

import functools
import json
import os
import runpy
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from planned import shape, shapes_of

from sire_jax import configuration, groups, inspect, paper_tables, registry, reproduce, traced
from sire_jax.backbones import BACKBONES
from sire_jax.configuration import experiment, validation
from sire_jax.diagnostics import figures
from sire_jax.networks import Network
from sire_jax.runs.loading import load_data

CONFIGS = configuration.repository_configs()
TABLES = ("ssal_1", "ssal_2", "ssal_3")


def _variants():
    return runpy.run_path(str(CONFIGS / "ssal.py"))["VARIANTS"]


def _load(variant, *overrides):
    return configuration.load(
        f"{CONFIGS}/ssal.py:{variant}", [f"--config.{each}" for each in overrides]
    )


@functools.cache
def _variables(variant):
    config = _load(variant)
    backbone = registry.create(BACKBONES, config.backbone, "backbone")
    heads, _ = experiment._heads(config, backbone.plan)
    return shapes_of(Network(backbone, heads), shape(2, *config.data.shape))


def _size(variant, *parts):
    params = _variables(variant)["params"]
    return sum(traced.size(params[part]) for part in parts or params)


def _as_keras_counts(variant, *parts):
    """Counts as the paper did: biases of convolutions, and moving statistics, are parameters."""
    kinds = [
        {part: tree[part] for part in parts or tree if part in tree}
        for tree in (_variables(variant)["params"], _variables(variant)["batch_stats"])
    ]
    biases = [leaf.shape[-1] for leaf in jax.tree.leaves(kinds[0]) if leaf.ndim > 2]
    return sum(traced.size(kind) for kind in kinds) + sum(biases)


# ---- Networks.


@pytest.mark.parametrize("variant", _variants())
def test_every_variant_is_a_config_whose_groups_are_of_its_classes(variant):
    config = _load(variant)
    validation.validate(config)
    assert config.name == f"ssal/{variant}"
    for name, section in config.data.groups.items():
        branch = config.heads[name.replace("groups", "branch")]
        assert branch.classes == section.groups
        if "imagenet" in variant or "tiny" in variant:
            # The user makes groups of these sets.
            assert section.file.endswith("imagenet_join.json")
            assert section.assignment == ()
            continue
        assert len(section.assignment) == len(section.classes) == 100
        sizes = np.bincount(section.assignment)
        assert len(sizes) == section.groups
        assert sizes.max() - sizes.min() <= 1


def test_the_papers_parameters():
    # Of the bare networks, exactly.
    assert _size("resnet18", "backbone") == 11_220_132
    assert _size("resnet50", "backbone") == 23_705_252
    assert _size("wrn28_10", "backbone") == 36_536_884
    # The released branches: kernels of convolutions and the classifier, and two for each channel's
    # batch norm; without batch norm ResNet50's three are 5,092,187.
    assert _size("resnet18", "heads_branch_1") == 681_884
    assert _size("resnet18", "heads_branch_2") == 909_154
    assert _size("resnet50") - _size("resnet50", "backbone") == 5_100_707
    # Derived from the layers by hand: see also tests/heads/test_branch.py.
    assert _size("wrn28_10,1", "heads_branch_1") == 1_618_660
    assert _size("wrn28_10") - 36_536_884 == 6_664_111
    assert _size("densenet190_40") - 25_821_620 == 12_434_351
    assert _size("resnet18,tiny,1,cat_fc", "heads_branch_1") == 1_375_252
    assert _size("se_wrn16_8", "backbone") == pytest.approx(11.1e6, rel=0.01)
    assert _size("se_wrn16_8") == pytest.approx(14.9e6, rel=0.01)


# Networks take long to trace: those that are part of another are counted there.
_ONE, _TWO, _THREE = (f"heads_branch_{i}" for i in (1, 2, 3))
_PARTS = {
    "resnet18,0": ("resnet18", "backbone"),
    "resnet18,1": ("resnet18", "backbone", _ONE),
    "resnet18,2": ("resnet18",),
    "resnet50,0": ("resnet50", "backbone"),
    "resnet50,1": ("resnet50", "backbone", _ONE),
    "wrn28_10,0": ("wrn28_10", "backbone"),
    "se_wrn16_8,0": ("se_wrn16_8", "backbone"),
    "densenet190_40,0": ("densenet190_40", "backbone"),
    "resnet18,tiny,0": ("resnet18,tiny,3,gap_cat", "backbone"),
    "resnet18,tiny,3": ("resnet18,tiny,3,gap_cat", "backbone", _ONE, _TWO, _THREE),
    "resnet18,tiny,1": ("resnet18,tiny,1,cat_fc", "backbone", _ONE),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_printed_sizes_are_those_of_a_count_as_keras_has_it(name):
    table = paper_tables.load_table(name, CONFIGS)
    for row in table["rows"]:
        # Of three branches Table 3 prints the size that Table 1 has for one.
        if "parameters" not in row or (name, row["id"]) == ("ssal_3", "wrn28_10"):
            continue
        variant, *parts = _PARTS.get(row["variant"], (row["variant"],))
        counted = _as_keras_counts(variant, *parts) / 1e6
        # The main output is not used there: 512 + 1 for each class.
        counted -= 513 * 200 / 1e6 if "gap_cat" in variant else 0
        assert counted == pytest.approx(row["parameters"], rel=0.01), variant


def test_settings_that_were_released():
    resnet = _load("resnet50")
    assert (resnet.epochs, resnet.batch_size) == (80, 64)
    assert resnet.optimizer.learning_rate.peak_value == 0.092
    assert resnet.optimizer.momentum == 0.93
    assert [o.weight for k, o in sorted(resnet.objectives.items())] == [0.42, 0.59, 0.76, 1.0]
    assert resnet.predictions.joint.eta == 0.3
    assert [s.groups for _, s in sorted(resnet.data.groups.items())] == [20, 33, 50]
    assert resnet.augmentation.crop.to_dict() == {
        "name": "crop",
        "padding": 5,
        "border": "reflection",
    }
    wide = _load("wrn28_10")
    assert wide.optimizer.weight_decay.to_dict() == {"backbone": 7e-4, "heads": 3e-4}
    assert (wide.optimizer.nesterov, wide.optimizer.learning_rate.peak_value) == (True, 0.021)
    assert len(wide.data.mean) == len(wide.data.std) == 3
    dense = _load("densenet190_40")
    assert (dense.epochs, dense.batch_size, dense.predictions.joint.eta) == (100, 32, 0.5)
    assert dense.objectives.main.loss.to_dict() == {
        "name": "smoothed_cross_entropy",
        "smoothing": 0.1,
    }
    tiny = _load("resnet18,tiny,3")
    assert tiny.epochs == 20
    assert tiny.optimizer.learning_rate.peak == 8 / 20
    alone = _load("resnet18,0")
    assert not [*alone.heads, *alone.data.groups, *alone.predictions]


def test_the_linear_combination_is_fitted_to_images_that_no_network_has_seen():
    for variant, held_out in (("resnet18", 50), ("resnet18,0", 50), ("resnet18,all_images", 0)):
        config = _load(variant)
        assert config.data.task.validation_per_class == held_out
        assert config.evaluate_splits == ("test",)
    assert _load("resnet18").predictions.linear.split == "validation"
    assert config.predictions.linear.split == "train"
    fitted = _load("resnet18,validate")
    assert fitted.evaluate_splits == ("validation", "test")
    assert fitted.predictions.joint_fitted.name == "fitted_joint_probability"


def test_the_text_to_table_1_has_30_groups():
    config = _load("resnet50,groups_30")
    assert [each.groups for each in config.data.groups.values()] == [20, 30, 50]
    assert [each.classes for each in config.heads.values()] == [20, 30, 50]
    config = _load("resnet50")
    assert [each.groups for each in config.data.groups.values()] == [20, 33, 50]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("resnet19", r"no variant 'resnet19'. Did you mean 'resnet18'"),
        ("resnet18,splt", r"no variant 'splt'. Did you mean 'split'"),
        ("resnet18,1,2", r"options 1, 2 exclude each other"),
        ("resnet50,sweep,3", r"options sweep, 3 exclude each other"),
        ("resnet18,gap_cat,cat_fc", r"options gap_cat, cat_fc exclude each other"),
        ("resnet18,0,split", r"'split' needs branches"),
        ("resnet18,3", r"'resnet18' has 2 branches, not 3"),
        ("resnet50,tiny", r"'tiny' is for ResNet18, not for 'resnet50'"),
        ("resnet18,0,gap_cat", r"'gap_cat' needs branches"),
        ("resnet18,few_images,small", r"options few_images, small exclude each other"),
        ("resnet18,tiny,few_images", r"'few_images' is for CIFAR-100"),
        ("imagenet_resnet50,few_images", r"'few_images' is for CIFAR-100"),
        ("resnet18,validate,all_images", r"options validate, all_images exclude each other"),
        ("se_wrn16_8,sweep", r"no variant 'se_wrn16_8'"),
        ("resnet50,sweep,groups_30", r"for the networks of Table 1, 'resnet50', 'wrn28_10', on"),
        ("se_wrn16_8,groups_30", r"for the networks of Table 1"),
        ("resnet50,1,groups_30", r"'groups_30' needs a branch over 33 groups; take \d branches"),
    ],
)
def test_what_does_not_go_together_is_refused(variant, message):
    with pytest.raises(ValueError, match=message):
        _load(variant)


def test_a_branch_without_a_file_of_groups_says_how_to_make_one():
    match = r"(?s)no file of groups .*tiny_imagenet_join.json.*sire_jax.grouping .*--groups=20,33 "
    with pytest.raises(FileNotFoundError, match=match):
        experiment.forward(_load("resnet18,tiny,2"))


@pytest.mark.slow  # It traces a large network.
@pytest.mark.filterwarnings("default:There is no file of groups")
def test_sizes_are_counted_without_a_file_of_groups(capsys):
    inspect.main([f"--config={CONFIGS}/ssal.py:resnet18,tiny,3", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["outputs"]["branch_3"]["shape"] == [50]
    assert "tiny_imagenet_join.json: labels are dealt to 50 groups in turn" in said.err


def test_a_branch_at_a_position_that_is_not_there_is_refused():
    config = _load("resnet50,sweep", "heads.branch_1.position=5")
    with pytest.raises(ValueError, match=r"position 5, which .* does not have.*4 \(stage"):
        experiment.forward(config)


# ---- A step of each kind of network, on digits.

_SHRUNK = {
    "wrn28_10,1": {"width": 0.25, "depth": 10},
    "resnet18,1,gap_cat": {"width": 0.0625},
}


@pytest.fixture(scope="module")
def digit_groups(tmp_path_factory):
    names = tuple("0123456789")
    made = {k: groups.Groups(names, tuple(i % k for i in range(10))) for k in (2, 4, 5)}
    path = tmp_path_factory.mktemp("groups") / "digits.json"
    groups.save(path, made, "a test")
    return path


def _shrunk(variant, file):
    config = _load(variant)
    config.data.update(name="digits", shape=(8, 8, 1), images=0, mean=(), std=())
    config.data.classes = ConfigDict({"label": 10})
    config.update(batch_size=6, devices=1)
    config.augmentation.crop.padding = 2
    config.optimizer = configuration.optimizer("sgd", learning_rate=0.01)
    config.backbone.update(_SHRUNK[variant], classes=10)
    numbers = iter((4, 5, 2))
    for name, head in config.heads.items():
        if name == "combined":
            head.update(classes=10, hidden=head.hidden and (8,))
            continue
        head.classes, head.width = next(numbers), 0.03
        target = name.replace("branch", "groups")
        if target in config.data.groups:
            config.data.groups[target] = configuration.grouping(file, head.classes)
        # A network of this depth has one block a stage, and so no middles.
        head.position = "2"
    return configuration.with_groups(config)


@pytest.mark.optax_dtypes
def test_a_step_has_finite_losses_and_changes_every_parameter_that_is_reached(digit_groups):
    parts = experiment.build(_shrunk("wrn28_10,1", digit_groups))
    dataset, (draw,) = load_data(parts)
    arrays = jax.tree.map(jnp.asarray, parts.task.prepare(dataset.train))
    batch = parts.lookup(arrays, jnp.asarray(draw.train[:6]))
    before = parts.initial_state(0)
    after, metrics = jax.jit(parts.step())(before, batch)
    assert set(metrics) == {f"{name}/loss" for name in (*parts.objectives, "total")}
    assert all(np.isfinite(metric.mean()) for metric in metrics.values())
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    reached = jax.tree.map(lambda *each: any(each), *parts.reach.values())
    # Units that no image of a batch activates have no gradient.
    same = [
        jax.tree_util.keystr(path)
        for path, (moved, expected) in jax.tree.leaves_with_path(
            jax.tree.map(lambda a, b: (a, b), changed, reached), is_leaf=lambda x: type(x) is tuple
        )
        if moved != expected
    ]
    assert not same


def test_without_its_own_objective_the_main_output_s_last_layer_is_not_reached(digit_groups):
    parts = experiment.build(_shrunk("resnet18,1,gap_cat", digit_groups))
    assert list(parts.objectives) == ["combined"]
    reach = parts.reach["combined"]
    assert not any(jax.tree.leaves(reach["backbone"]["output"]))
    assert all(jax.tree.leaves(reach["heads_branch_1"]))


# ---- Tables and pictures.


def test_a_sweep_is_drawn_with_a_panel_for_each_column(tmp_path):
    points = [
        {"x": x, "series": series, "joint": [x + 1.0, x + 2.0], "branch": None if x == 4 else [x]}
        for series in ("join", "split")
        for x in (2, 4)
    ]
    about = {"x": "groups", "columns": {"joint": "joint prediction", "branch": "branch alone"}}
    figures.sweep(points, about, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size[0] == pytest.approx(2 * 4.6 * 130, rel=0.01)


def test_a_table_of_a_sweep_is_reproduced_with_its_picture(tmp_path, monkeypatch):
    table = paper_tables.load_table("ssal_figure_2", CONFIGS)
    measured = {"joint/top_1": [0.5, 0.7], "branch_1/top_1": [0.25, 0.25]}
    results = {"splits": {"test": measured}, "seconds": 1.0}
    drawn = []
    monkeypatch.setattr(reproduce, "train", lambda config, directory: results)
    monkeypatch.setattr(figures, "compare", lambda *given: None)
    monkeypatch.setattr(figures, "sweep", lambda points, about, path: drawn.append(list(points)))
    rows = paper_tables.choose_rows(table, ["join_2", "split_20"])
    lines = reproduce.reproduce(table, rows, tmp_path, CONFIGS)
    assert [line["joint"]["ours"][0] for line in lines] == pytest.approx([60, 60])
    assert drawn[-1] == [
        {"x": 2, "series": "join", "joint": pytest.approx([50, 70]), "branch": [25, 25]},
        {"x": 20, "series": "split", "joint": pytest.approx([50, 70]), "branch": [25, 25]},
    ]
    assert (tmp_path / "table.md").read_text().count("60.00 ± 14.14") == 2


# ---- The groups that come with the configs.


@pytest.mark.parametrize("criterion", ["join", "split"])
def test_the_groups_of_cifar_100_are_of_its_classes(criterion):
    directory = os.environ.get("TFDS_DATA_DIR", "")
    if not list(Path(directory or "/nowhere").glob("cifar100/**/label.labels.txt")):
        pytest.skip("TFDS_DATA_DIR names no directory with cifar100")
    (listed,) = Path(directory).glob("cifar100/**/label.labels.txt")
    names = listed.read_text().split()
    found = groups.load(CONFIGS / "groups" / f"cifar100_{criterion}.json", names)
    assert list(found) == [2, 4, 10, 20, 30, 33, 50]
    assert all(each.classes == tuple(names) for each in found.values())


def test_the_file_of_groups_tells_nothing_of_the_machine_that_made_it():
    for path in (CONFIGS / "groups").glob("*.json"):
        made = json.loads(path.read_text())["made"]
        assert made.startswith("validation images of auxnet/resnet-20,cifar100, criterion")


def test_few_images_are_those_of_the_other_papers_and_held_out_as_many():
    config = _load("resnet18,few_images")
    assert (config.backbone.width, config.heads.branch_1.width) == (0.25, 0.25)
    assert (config.data.resize, config.data.shape) == (16, (16, 16, 3))
    assert config.data.train_splits == ("train[:8%]",)
    assert (config.data.images, config.data.task.validation_per_class) == (4000, 20)
    assert config.augmentation.crop.padding == 2
    assert (config.epochs, config.evaluate_splits) == (40, ("test",))
    # What is fitted is fitted to images that are held out.
    assert config.predictions.linear.split == "validation"


@pytest.mark.slow  # Compiles the steps of two networks.
@pytest.mark.optax_dtypes
def test_branches_without_objectives_change_nothing_of_the_trunk():
    generator = np.random.default_rng(0)
    arrays = {
        "image": jnp.asarray(generator.integers(0, 256, (24, 16, 16, 3)), jnp.uint8),
        "label": jnp.asarray(generator.integers(0, 100, 24), jnp.int32),
        "coarse_label": jnp.asarray(generator.integers(0, 20, 24), jnp.int32),
    }
    trunks = []
    for row in ("resnet18-0", "resnet18-2-silent"):
        table = paper_tables.load_table("ssal_1", CONFIGS)
        (chosen,) = paper_tables.choose_rows(table, [row])
        thin = ["--config.backbone.width=0.0625", "--config.devices=1", "--config.batch_size=8"]
        parts = experiment.build(
            paper_tables.row_config(table, chosen, CONFIGS, "few_images", thin)
        )
        state, step = parts.initial_state(0), jax.jit(parts.step())
        for first in (0, 8, 16):
            state, _ = step(state, parts.lookup(arrays, jnp.arange(first, first + 8)))
        trunks.append((state.params["backbone"], state.model_state["batch_stats"]["backbone"]))
    # What other programs round otherwise.
    chex.assert_trees_all_close(*trunks, rtol=1e-4, atol=1e-5)
