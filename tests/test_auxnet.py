"""The AuxNet configs: every variant, its options, and a step of shrunk ones with every rule."""

import contextlib
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from planned import random_like, shape, shapes_of

from sire_jax import configuration, optimizers, registry, traced
from sire_jax.backbones import BACKBONES
from sire_jax.configuration import experiment, validation
from sire_jax.configuration import objectives as objective_sections
from sire_jax.configuration import optimizers as optimizer_section
from sire_jax.data.tasks import Images
from sire_jax.networks import Network
from sire_jax.optimizers import LinearOptimizer, WeightDecay
from sire_jax.runs.loading import load_data
from sire_jax.state import TrainState
from sire_jax.updates import UPDATES

CONFIGS = configuration.repository_configs()
VARIANTS = runpy.run_path(str(CONFIGS / "auxnet.py"))["VARIANTS"]


def _load(variant="56-5", *overrides):
    return configuration.load(
        f"{CONFIGS}/auxnet.py:{variant}", [f"--config.{each}" for each in overrides]
    )


SHRUNK = (
    "data.name=digits",
    "data.shape=(8, 8, 1)",
    "data.mean=()",
    "data.std=()",
    "data.images=1198",
    "augmentation.crop.padding=1",
    "backbone.width=0.125",
    "batch_size=8",
)


def _shrunk(variant="44-3", *overrides, depth=20, layers=(9, 15)):
    """An AuxNet for digits with few layers and channels."""
    size = (f"backbone.depth={depth}", f"heads.exit.layers={layers}")
    return _load(variant, *SHRUNK, *size, *overrides)


# ---- Variants.

# Exits' layers as printed, Tables 1 to 8, and parameters: of Table 6, or counted by hand.
EXITS = {
    "20-2": (17,),
    "26-2/2": (19,),
    "26-2/10": (19,),
    "32-2": (25,),
    "44-2": (35,),
    "44-3": (25, 35),
    "56-2": (45,),
    "56-2/2": (45,),
    "56-3": (35, 45),
    "56-5": (15, 25, 35, 45),
    "56-5/2": (15, 25, 35, 45),
    "56-10": (13, 17, 21, 25, 29, 33, 37, 41, 45),
    "34-2,imagenet": (29,),
    "50-2,imagenet": (40,),
    "50-4,imagenet": (22, 31, 40),
    "101-2,imagenet": (88,),
    "resnet-56": (),
}
# A dense layer for 1000 classes, of 64 and so on channels.
PARAMETERS = {
    "56-5": 853_018 + 2 * 144 + 10 * 144 + 40,
    "56-2": 853_018 + 64 * 12 + 10,
    "resnet-56": 853_018,
    "resnet-34,imagenet": 21_797_672,
    "34-2,imagenet": 21_797_672 + 513 * 1000,
    "resnet-50,imagenet": 25_557_032,
    "50-4,imagenet": 25_557_032 + (512 + 1024 + 1024 + 3) * 1000,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_network_with_the_printed_exits(variant):
    config = _load(variant)
    validation.validate(config)
    assert config.name == f"auxnet/{variant}"
    expected = EXITS.get(variant.replace("imagenet100", "imagenet"), ())
    assert variant.startswith("resnet") or expected
    backbone = registry.create(BACKBONES, config.backbone, "backbone")
    many = pytest.warns(UserWarning, match="56") if variant == "56-10" else contextlib.nullcontext()
    with many:
        heads, families = experiment._heads(config, backbone.plan)
    assert families == ({"exit": [f"exit_{layer}" for layer in expected]} if expected else {})
    assert objective_sections.depths(heads, backbone.plan) == {f"exit_{k}": k for k in expected}
    if variant.endswith("imagenet100"):
        return
    side = 64 if "imagenet" in variant else 32
    found = shapes_of(Network(backbone, heads), shape(2, side, side, 3))["params"]
    assert set(found) == {"backbone", *(f"heads_exit_{layer}" for layer in expected)}
    normalized = ["norm", "output"] if "imagenet" not in variant else ["output"]
    assert all(sorted(found[f"heads_exit_{layer}"]) == normalized for layer in expected)
    size = traced.size(found)
    assert size == PARAMETERS.get(variant, size)


def test_variants_are_those_of_the_papers_tables():
    assert len(VARIANTS) == len(set(VARIANTS)) == 33
    assert set(EXITS) <= set(VARIANTS)
    assert _load().to_dict() == {**_load("56-5").to_dict(), "name": "auxnet/56-5"}
    # A network of ImageNet's alone needs no option.
    assert _load("50-4").data.name == "tfds:imagenet2012"


def test_settings_of_the_data_sets():
    cifar = _load("56-5")
    assert (cifar.epochs, cifar.batch_size) == (400, 128)
    assert cifar.data.classes.to_dict() == {"label": 10}
    assert set(cifar.augmentation) == {"crop", "flip"}
    assert cifar.augmentation.crop.padding == 4
    hundred = _load("56-5,cifar100")
    assert hundred.data.classes.to_dict() == {"label": 100, "coarse_label": 20}
    assert hundred.backbone.classes == hundred.heads.exit.classes == 100
    svhn = _load("56-3,svhn,dropout")
    assert (svhn.epochs, svhn.data.train_splits) == (200, ("train", "extra"))
    assert svhn.data.images == 73_257 + 531_131
    assert not svhn.augmentation
    assert (svhn.backbone.dropout, cifar.backbone.dropout) == (0.3, 0.0)
    imagenet = _load("50-4,imagenet100")
    assert imagenet.epochs == 90
    assert imagenet.data.draw_classes == imagenet.backbone.classes == 100
    assert (imagenet.data.crop, imagenet.data.ten_crop) == (224, True)
    assert not imagenet.heads.exit.normalize
    optimizer = cifar.optimizer.to_dict() | {"learning_rate": 0}
    assert optimizer == {
        "name": "sgd",
        "clip": 0.0,
        "learning_rate": 0,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
    }


@pytest.mark.parametrize(
    ("variant", "first", "epochs"), [("56-5", 0.1, 400), ("34-2,imagenet", 0.05, 90)]
)
def test_the_learning_rate_is_divided_by_ten_at_40_and_60_percent(variant, first, epochs):
    config = _load(variant)
    units = optimizer_section.units(Images(), config)
    per_epoch = config.data.images // config.batch_size
    assert units == {"epoch": per_epoch, "run": per_epoch * epochs}
    rate = optimizers.number_or_schedule(config.optimizer.learning_rate, "rate", units)
    for epoch, factor in ((0, 1), (0.4 * epochs, 0.1), (0.6 * epochs, 0.01)):
        step = round(epoch * per_epoch)
        assert float(rate(jnp.int32(step))) == pytest.approx(first * factor)
        if step:
            assert float(rate(jnp.int32(step - 1))) == pytest.approx(10 * first * factor)


@pytest.mark.parametrize("rule", UPDATES)
def test_rules_are_options(rule):
    config = _load(f"56-5,{rule}")
    assert config.update_rule.to_dict() == {"name": rule, "adjust": True}
    assert _load(f"56-5,cifar100,{rule}").data.classes.label == 100
    assert _load("56-5").update_rule.name == "multiway"
    # Of one loss there is nothing to choose.
    assert _load("resnet-56").update_rule.to_dict() == {"name": "joint", "adjust": False}
    with pytest.raises(ValueError, match=f"The option '{rule}' would do nothing"):
        _load(f"resnet-56,{rule}")
    with pytest.raises(ValueError, match=f"The option '{rule}' would do nothing"):
        _load(f"56-5,probes,{rule}")


@pytest.mark.parametrize(
    ("variant", "mean", "rate"),
    [
        ("20-2", (0.4914, 0.4824, 0.4467), 0.1),
        ("resnet-20,cifar100", (0.5071, 0.4867, 0.4408), 0.1),
        ("44-2,svhn", (), 0.1),
        ("50-2,imagenet", (0.485, 0.456, 0.406), 0.05),
        ("resnet-50,imagenet100", (0.485, 0.456, 0.406), 0.1),
    ],
)
def test_normalization_and_learning_rates(variant, mean, rate):
    config = _load(variant)
    assert config.data.mean == mean
    assert len(config.data.std) == len(mean)
    assert config.optimizer.learning_rate.init_value == rate
    assert bool(config.augmentation) == (config.data.name != "tfds:svhn_cropped")


def test_probes_are_exits_that_change_nothing():
    config = _load("56-5,probes")
    assert config.heads.exit.detached
    assert not _load("56-5").heads.exit.detached
    assert config.objectives.exit.weight == 1.0
    assert config.update_rule.to_dict() == {"name": "joint", "adjust": False}


def test_few_images_have_coarse_labels_for_every_output():
    config = configuration.load(f"{CONFIGS}/auxnet.py:44-3,cifar100,few_images")
    assert config.backbone.classes == config.heads.exit.classes == 20
    targets = [objective.target for objective in config.objectives.values()]
    assert targets == ["coarse_label", "coarse_label"]
    assert (config.data.shape, config.augmentation.crop.padding) == ((16, 16, 3), 2)
    assert (config.batch_size, config.optimizer.learning_rate.init_value) == (128, 0.1)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("56-6", r"auxnet\.py:56-6: There is no variant '56-6'\. Did you mean '56-5'"),
        ("", r"no variant ''"),
        ("56-5,cifar", r"no variant 'cifar'\. Did you mean 'cifar10"),
        ("56-5,multi-way", r"no variant 'multi-way'\. Did you mean 'multiway'"),
        ("56-5,", r"no variant ''\. Known: .*probes"),
        ("56-5,cifar100,svhn", r"options cifar100, svhn exclude each other"),
        ("56-5,joint,multiway", r"options joint, multiway exclude each other"),
        ("34-2,cifar10", r"no variant '34-2'"),
        ("56-5,imagenet", r"no variant '56-5'.* Known: 101-2, 34-2"),
        ("34-2,dropout", r"'dropout' is for trunks of small images"),
        ("56-5,few_images", r"'few_images' is for cifar100, not for cifar10"),
        ("resnet-56,probes", r"'resnet-56' has no exits to make probes of"),
    ],
)
def test_variants_that_do_not_exist_are_refused(variant, message):
    if not variant:
        get_config = runpy.run_path(str(CONFIGS / "auxnet.py"))["get_config"]
        with pytest.raises(ValueError, match=message):
            get_config("")
        return
    with pytest.raises(ValueError, match=message):
        _load(variant)


# ---- Overrides.


def _weights(config):
    return {name: each.weight for name, each in experiment.build(config).objectives.items()}


@pytest.mark.parametrize(
    ("overrides", "layers", "expected"),
    [
        ((), (9, 15), {"exit_9": 0.36, "exit_15": 1.0}),
        (("objectives.exit.weight.nu=1",), (9, 15), {"exit_9": 0.6, "exit_15": 1.0}),
        (("objectives.exit.weight.nu=0.0",), (13,), {"exit_13": 1.0}),
        # Weights one by one take the place of those by depth.
        (("objectives.exit.weights=(0.2, 0.3)",), (9, 15), {"exit_9": 0.2, "exit_15": 0.3}),
        ((), (), {}),
    ],
)
def test_weights_of_other_exits(overrides, layers, expected):
    found = _weights(_shrunk("44-3", *overrides, layers=layers))
    assert found == pytest.approx({"main": 1.0, **expected})


def test_overrides_of_the_trunk_the_rule_and_the_aggregator():
    parts = experiment.build(
        _shrunk(
            "44-3",
            "backbone.shortcut_scale=0.5",
            "backbone.shortcut=B",
            "update_rule.name=joint",
            "aggregator.name=upgrad",
        )
    )
    block = parts.network.backbone.plan.stages[1][0]
    assert (block.shortcut_scale, block.shortcut) == (0.5, "B")
    assert parts.network.backbone.endpoints == ("stage_3_block_1", "stage_4_block_1")
    assert parts.output_names() == ["main", "exit_9", "exit_15"]


@pytest.mark.parametrize(
    ("overrides", "layers", "message"),
    [
        ((), (9, 16), r"no exit at layer 16 of 20: .* 15 and 17"),
        ((), (15, 9), r"in rising order: \(9, 15\)"),
        (("objectives.exit.weight.nu=-1.0",), (9, 15), r"nu is -1\.0; it should be at least 0"),
        (("objectives.exit.weight.mu=1.0",), (9, 15), r"has no key 'mu'\. Did you mean 'nu'"),
        (("objectives.exit.weights=(0.2,)",), (9, 15), r"1 weights for 2 outputs"),
        (("backbone.shortcut=C",), (9, 15), r"shortcut is 'C'"),
        (("backbone.shortcut_scale=-0.5",), (9, 15), r"shortcut_scale is -0\.5"),
        (("aggregator.name=upgard",), (9, 15), r"no aggregator 'upgard'\. Did you mean 'upgrad'"),
        (("aggregator.name=upgrad",), (), r"nothing to aggregate: there is only one loss"),
        (("update_rule.name=multi",), (9, 15), r"no update rule 'multi'\. Did you mean 'multiway'"),
        (
            ("update_rule.name=effective_joint", "backbone.dropout=1.5"),
            (9, 15),
            r"dropout rate is 1\.5",
        ),
    ],
)
def test_overrides_that_do_not_fit_are_refused(overrides, layers, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_shrunk("44-3", *overrides, layers=layers))


def test_the_control_refuses_adam():
    config = ConfigDict(_shrunk("44-3,effective_joint").to_dict())
    config.optimizer = configuration.optimizer("adam")
    with pytest.raises(ValueError, match="effective_joint needs an optimizer whose step is linear"):
        experiment.build(config)


def test_weights_by_depth_need_a_layer():
    config = ConfigDict(_shrunk().to_dict())
    config.heads.own = configuration.head("classifier", endpoints=("stage_2",), classes=10)
    by_depth = {"name": "depth", "nu": 2.0}
    config.objectives.own = configuration.objective("own", "label", "cross_entropy", by_depth)
    with pytest.raises(
        ValueError, match=r"'own' is weighted by depth, but the output 'own' is not"
    ):
        experiment.build(config)
    config.heads.own.endpoints = ("stage_2_block_1",)
    assert _weights(config)["own"] == 1.0
    config.heads.own = configuration.head("exits", layers=(5,), classes=10, detached=True)
    config.objectives.own.weight.name = "dept"
    with pytest.raises(ValueError, match=r"'dept'"):
        experiment.build(config)


def test_exits_need_a_plan():
    config = ConfigDict(_shrunk().to_dict())
    config.backbone = configuration.backbone("small_cnn", classes=10)
    with pytest.raises(
        ValueError, match="named by the layers of a plan, but the backbone has none"
    ):
        experiment.build(config)


# ---- Steps.


def _batch(parts):
    dataset, (draw,) = load_data(parts)
    arrays = jax.tree.map(jnp.asarray, parts.task.prepare(dataset.train))
    return parts.lookup(arrays, jnp.asarray(draw.train[:8]))


# The rules themselves have quick tests, on smaller networks.
OTHERS = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "depth", "layers"),
    [
        # Two equal blocks in a loop, and two that an exit is between.
        pytest.param("44-3", 14, (9,), marks=OTHERS),
        ("44-3,pairwise", 8, (5,)),
        pytest.param("44-3,joint", 8, (5,), marks=OTHERS),
        pytest.param("44-3,effective_joint,dropout", 8, (5,), marks=OTHERS),
    ],
)
def test_a_step_has_finite_losses_and_changes_every_parameter(variant, depth, layers):
    # Without decay, which would change parameters that no objective reaches.
    parts = experiment.build(
        _shrunk(variant, "optimizer.weight_decay=0.0", depth=depth, layers=layers)
    )
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if path[-1].key == "bias" else x, random_like(parts.variables)
    )
    before = TrainState.start(jax.random.key(0), variables, parts.rule)
    after, metrics = jax.jit(parts.step())(before, _batch(parts))
    found = {name: float(each.mean()) for name, each in metrics.items()}
    assert set(found) == {"main/loss", "total/loss", *(f"exit_{layer}/loss" for layer in layers)}
    # The untrained network guesses.
    assert all(0.5 < loss < 20 for loss in found.values())
    weights = {f"{name}/loss": each.weight for name, each in parts.objectives.items()}
    total = sum(weight * found[name] for name, weight in weights.items())
    assert found["total/loss"] == pytest.approx(total, rel=1e-4)
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b),
        (before.params, before.model_state),
        (after.params, after.model_state),
    )
    assert [p for p, each in jax.tree_util.tree_leaves_with_path(changed) if not each] == []
    chex.assert_tree_all_finite((after.params, after.model_state))
    assert int(after.step) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


def test_the_optimizer_of_the_configs_is_linear():
    config = _shrunk()
    units = optimizer_section.units(Images(), config)
    optimizer = optimizer_section.create(config, units, {})
    assert isinstance(optimizer, LinearOptimizer)
    assert optimizer.weight_decay == WeightDecay(1e-4, 1e-4)


# ---- Memory.


@pytest.mark.parametrize(("rule", "most"), [("multiway", 1.05), ("pairwise", 1.3)])
def test_backward_passes_take_turns_in_memory(rule, most):
    def intermediate(rule):
        size = ("backbone.width=0.5", "batch_size=16")
        parts = experiment.build(_load("20-2", *size, f"update_rule.name={rule}"))
        image, labels = jnp.zeros((16, 32, 32, 3), jnp.uint8), jnp.zeros(16, jnp.int32)
        batch = parts.lookup({"image": image, "label": labels}, jnp.arange(16))
        state = TrainState.start(jax.random.key(0), parts.variables, parts.rule)
        step = jax.jit(parts.step(), compiler_options=parts.rule.compiler_options)
        compiled = step.lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    joint = intermediate("joint")
    # What batch norms remember of a trunk of 19 convolutions, at least once each.
    assert joint > 16 * 4 * (7 * 32 * 32 * 8 + 6 * 16 * 16 * 16 + 6 * 8 * 8 * 32)
    assert intermediate(rule) < most * joint
