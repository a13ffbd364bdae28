"""Branches over groups: their layers by hand, their sizes, and where they may be attached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import normal, random_like, shape, shapes_of

from sire_jax import registry, traced
from sire_jax.backbones import resnet
from sire_jax.backbones.blocks import Convolution, MaxPool
from sire_jax.backbones.plan import Plan
from sire_jax.heads import HEADS, Combination
from sire_jax.heads.branch import LAYERS, RELEASED, Branch, branch
from sire_jax.heads.branch_blocks import (
    AveragePool,
    Dense,
    ExpandedInception,
    GlobalPool,
    Recalibration,
)
from sire_jax.heads.classifier import Classifier

POOL = GlobalPool()

# ---- Sizes, from the lists of layers.


def _conv(side, inputs, outputs):
    """Counts a convolution without bias, and batch norm."""
    return side * side * inputs * outputs + 2 * outputs


def _inception(inputs):
    paths = _conv(1, inputs, 128) * 2 + _conv(1, inputs, 160) + _conv(1, 160, 128)
    lines = 4 * (3 * 128 * 128 + 2 * 128) + 3 * inputs * 108 + 2 * 108
    return paths + lines


def _count(inputs, groups, layers):
    """Counts a branch of layers ``(kernel, width)``, ``"inception"`` or dense widths."""
    total = 0
    for layer in layers:
        if layer == "inception":
            total, inputs = total + _inception(inputs), 5 * 128 + 108
        elif isinstance(layer, tuple):
            total, inputs = total + _conv(layer[0], inputs, layer[1]), layer[1]
        else:
            total, inputs = total + (inputs + 1) * layer, layer
    return total + (inputs + 1) * groups


WIDE = [(3, 256), (3, 256)]
KNOWN = {
    "resnet_1": [(5, 128), (3, 128), "inception"],
    "resnet_2": [(5, 128), (3, 128), "inception"],
    "resnet_3": [(3, 128), (3, 128), "inception"],
    "wide_1": [(5, 128), (3, 128), *WIDE, "inception", "inception"],
    "wide_2": [(5, 128), (3, 128), *WIDE, 768],
    "wide_3": [(3, 128), (3, 128), "inception", "inception"],
    "table_2": [(5, 128), (3, 128), *WIDE, 256, 256],
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_released_branch_has_the_parameters_of_its_layers(name):
    made = branch(None, "x", 33, name)
    params = shapes_of(made, shape(2, 8, 8, 48))["params"]
    assert traced.size(params) == _count(48, 33, KNOWN[name])
    assert set(RELEASED) == set(KNOWN)


# Of ResNet18 and of ResNet50, on CIFAR-100.
@pytest.mark.parametrize(
    ("name", "channels", "groups", "parameters"),
    [
        ("resnet_2", 64, 20, 681_884),
        ("resnet_2", 128, 50, 909_154),
        ("resnet_1", 256, 20, 1_296_284),
        ("resnet_2", 512, 33, 2_125_221),
        ("resnet_3", 1024, 50, 1_679_202),
    ],
)
def test_released_sizes(name, channels, groups, parameters):
    params = shapes_of(branch(None, "x", groups, name), shape(2, 4, 4, channels))["params"]
    assert traced.size(params) == _count(channels, groups, KNOWN[name]) == parameters


def test_only_the_first_branch_of_a_network_halves_the_features():
    halving = {name for name in RELEASED if any("stride" in each for each in RELEASED[name])}
    assert halving == {"resnet_1", "wide_1"}
    made = branch(None, "x", 3, "resnet_1")
    assert made.layers == (Convolution(128, 5, 2), Convolution(128), ExpandedInception(), POOL)


# ---- Values.


def _pad(x, axis, by):
    return np.pad(x, [(by, by) if i == axis else (0, 0) for i in range(4)])


def _line(x, kernel, axis):
    """Correlates along an axis with ``[3, c, o]``, zeros around."""
    padded, length = _pad(x, axis, 1), x.shape[axis]
    views = [np.take(padded, np.arange(u, u + length), axis) for u in range(3)]
    return sum(view @ kernel[u] for u, view in enumerate(views))


def _unit(x, params, stats, axis=None):
    """A 1 x 1 convolution or one along an axis, batch norm by running averages, ReLU."""
    y = x @ params["conv"]["kernel"][0, 0] if axis is None else _line(x, params["kernel"], axis)
    norm, stats = params["norm"], stats["norm"]
    y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    return np.maximum(y, 0)


def _local_mean(x):
    """Means of 3 x 3 windows, of what lies inside."""
    result = np.zeros_like(x)
    for i, j in np.ndindex(x.shape[1:3]):
        result[:, i, j] = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
    return result


def _inception_by_hand(x, p, s):
    def unit(x, name, axis=None):
        return _unit(x, p[name], s[name], axis)

    second = unit(x, "second")
    third = unit(unit(x, "third_1"), "third_2")
    paths = [unit(x, "first"), unit(second, "second_row", 2), unit(second, "second_column", 1)]
    paths += [unit(third, "third_row", 2), unit(third, "third_column", 1)]
    return np.concatenate([*paths, unit(_local_mean(x), "pooled", 1)], -1)


def test_inception_a_pool_and_dense_layers_by_hand():
    layers = (ExpandedInception(2, 3, 4), GlobalPool(), Dense(5))
    head = Branch(("x",), 3, layers)
    x = normal(1, 2, 4, 5, 3)
    variables = random_like(shapes_of(head, x))
    found = jax.jit(head.apply)(variables, x)
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    p = v["params"]
    y = _inception_by_hand(np.asarray(x, np.float64), p["layer_1"], v["batch_stats"]["layer_1"])
    assert y.shape == (2, 4, 5, 14) == (2, 4, 5, layers[0].channels(3))
    y = y.mean((1, 2)) @ p["layer_3"]["dense"]["kernel"] + p["layer_3"]["dense"]["bias"]
    y = np.maximum(y, 0) @ p["output"]["kernel"] + p["output"]["bias"]
    assert np.abs(y).min() > 1e-3
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


def _apply_block(block, x):
    return block.apply(block.init(jax.random.key(0), x, x, train=False), x, x, train=False)


def test_an_average_pool_keeps_the_size_and_a_global_pool_leaves_none():
    x = jnp.asarray([[[[1.0], [2.0], [6.0]], [[3.0], [4.0], [8.0]]]])
    found = _apply_block(AveragePool(), x)
    # Of the four to the left, all six, and the four to the right, in both rows.
    np.testing.assert_allclose(found[0, :, :, 0], [[2.5, 4, 5]] * 2, rtol=1e-6)
    np.testing.assert_allclose(_apply_block(AveragePool(1), x), x)
    np.testing.assert_allclose(_apply_block(GlobalPool(), x), [[4.0]])
    pooled = jnp.asarray([[1.0, -2.0]])
    np.testing.assert_array_equal(_apply_block(GlobalPool(), pooled), pooled)
    assert (AveragePool().channels(7), GlobalPool().channels(7), Dense(9).channels(7)) == (7, 7, 9)


@pytest.mark.parametrize("layers", [(), (POOL,)], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 5)], ids=str)
def test_a_branch_without_layers_is_a_classifier(layers, size):
    x = normal(3, *size)
    head, other = Branch(("x",), 4, layers), Classifier(("x",), 4)
    variables = random_like(shapes_of(other, x))
    np.testing.assert_array_equal(head.apply(variables, x), other.apply(variables, x))


def test_pixels_that_layers_leave_are_averaged():
    x = normal(4, 2, 6, 6, 3)
    ends = (Convolution(4), MaxPool()), (Convolution(4), MaxPool(), POOL)
    variables = random_like(shapes_of(Branch(("x",), 2, ends[0]), x))
    open_end, pooled = (jax.jit(Branch(("x",), 2, each).apply)(variables, x) for each in ends)
    np.testing.assert_allclose(open_end, pooled, rtol=1e-6)
    assert open_end.shape == (2, 2)


def test_features_of_half_precision_make_logits_of_single_precision():
    head = Branch(("x",), 2, (ExpandedInception(2, 2, 2), AveragePool(), POOL, Dense(3)))
    x = normal(5, 2, 4, 4, 3)
    variables = random_like(shapes_of(head, x))
    exact, found = (jax.jit(head.apply)(variables, each) for each in (x, x.astype(jnp.bfloat16)))
    assert exact.dtype == found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=0.05)
    assert float(jnp.abs(found - exact).max()) > 0


def test_training_moves_the_statistics_and_the_gradient_reaches_all():
    head = Branch(("x",), 2, (ExpandedInception(2, 2, 2), POOL, Dense(3)))
    x = normal(6, 4, 3, 3, 2)
    variables = random_like(shapes_of(head, x))
    state = variables["batch_stats"]

    def loss(params):
        y, changed = head.apply(
            {"params": params, "batch_stats": state}, x, train=True, mutable=["batch_stats"]
        )
        return (y**2).sum(), changed["batch_stats"]

    gradient, moved = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    kept = jax.tree.map(lambda a, b: bool((a == b).any()), state, moved)
    assert not any(jax.tree.leaves(kept))
    # A tenth of the batch's mean, of the first path: what enters its batch norm.
    kernel = np.asarray(variables["params"]["layer_1"]["first"]["conv"]["kernel"])[0, 0]
    mean = (np.asarray(x) @ kernel).mean((0, 1, 2))
    before, after = (tree["layer_1"]["first"]["norm"]["mean"] for tree in (state, moved))
    np.testing.assert_allclose(after, 0.9 * np.asarray(before) + 0.1 * mean, rtol=1e-4, atol=1e-6)


def test_the_last_layer_of_images_is_known():
    layers = (Convolution(2), AveragePool(), POOL, Dense(3))
    assert Branch(("x",), 2, layers).last_image() == "layer_2"
    assert Branch(("x",), 2, layers[:1]).last_image() == "layer_1"
    assert Branch(("x",), 2).last_image() is None
    assert Branch(("x",), 2, (POOL, Dense(2))).last_image() is None


def test_layers_of_branches_are_blocks_of_plans_too():
    plan = Plan(((ExpandedInception(2, 3, 4), AveragePool()), (Convolution(3), MaxPool())))
    assert plan.layers()["stage_1_block_1"] == 3
    assert max(plan.layers().values()) == 4
    with pytest.raises(ValueError, match=r"has no mirror"):
        plan.check_decoder(1)


# ---- From a config.


@pytest.mark.parametrize(
    ("position", "endpoint"), [(1, "stage_2"), (4, "stage_5"), ("stage_3_block_1",) * 2]
)
def test_a_position_is_an_endpoint(position, endpoint):
    made = branch(resnet(3, 18).plan, position, 4, "resnet_2")
    assert (made.endpoints, made.classes) == ((endpoint,), 4)
    assert branch(None, position, 2).layers == () if isinstance(position, str) else True


def test_layers_are_sections_in_a_config():
    section = {
        "name": "branch",
        "position": 2,
        "classes": 5,
        "layers": (
            {"name": "convolution", "width": 8, "kernel_size": 5, "stride": 2},
            {"name": "inception", "width": 4},
            {"name": "squeeze_excitation", "reduction": 4},
            {"name": "max_pool"},
            {"name": "average_pool", "size": 5},
            {"name": "global_pool"},
            {"name": "dense", "width": 6},
        ),
    }
    made = registry.create(HEADS, section, "head", plan=resnet(3, 18).plan)
    inception = ExpandedInception(4)
    pools = (MaxPool(), AveragePool(5), POOL)
    expected = (Convolution(8, 5, 2), inception, Recalibration(4), *pools, Dense(6))
    assert made == Branch(("stage_3",), 5, expected)
    # Half of all widths, but for what is no width.
    expected = (Convolution(4, 5, 2), ExpandedInception(2, 80, 54), Recalibration(4), *pools)
    made = registry.create(HEADS, {**section, "width": 0.5}, "head", plan=resnet(3, 18).plan)
    assert made == Branch(("stage_3",), 5, (*expected, Dense(3)))
    assert {each["name"] for each in section["layers"]} == set(LAYERS)


PLAN = resnet(3, 18).plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: branch(PLAN, 5, 2), r"position 5, .* It has the positions 1 \(stage_2\), 2 \(st"),
        (lambda: branch(PLAN, 0, 2), r"at position 0, which the backbone does not have"),
        (lambda: branch(PLAN, True, 2), r"at position True, which the backbone does not have"),
        (lambda: branch(PLAN, 1.0, 2), r"at position 1.0, which the backbone does not have"),
        (lambda: branch(None, 1, 2), r"It has the positions none; the name of an endpoint can be"),
        (lambda: branch(Plan(((MaxPool(),),)), 1, 2), r"It has the positions none"),
        (lambda: branch(PLAN, "stage_6", 2), r"at 'stage_6'.*Did you mean 'stage_5'"),
        (lambda: branch(PLAN, 1, 2, "resnet_4"), r"no branch 'resnet_4'. Did you mean 'resnet_"),
        (
            lambda: branch(PLAN, 1, 2, ({"name": "denze"},)),
            r"no layer of a branch 'denze'.*'dense'",
        ),
        (lambda: branch(PLAN, 1, 2, ({"name": "dense"},)), r"'dense' needs a value for width"),
        (lambda: branch(PLAN, 1, 2, (3,)), r"A layer of a branch is 3; it should be a section"),
        (lambda: ExpandedInception(0), r"ExpandedInception has a width of 0"),
        (lambda: ExpandedInception(2, 2, -1), r"ExpandedInception has a width of -1"),
        (lambda: AveragePool(2), r"AveragePool .* 2"),
        (lambda: Dense(0), r"Dense has a width of 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("layers", "size", "message"),
    [
        ((Dense(2),), (2, 4, 4, 3), r"Layer 1 of a branch, Dense\(width=2\), is given images \(2,"),
        ((POOL, AveragePool()), (2, 4, 4, 3), r"Layer 2 of a branch, Average.*ahead of the pool"),
        ((Convolution(2),), (2, 3), r"Layer 1 of a branch, Convolution.*after a global_pool"),
        ((MaxPool(), MaxPool()), (2, 3, 2, 1), r"Layer 2 .* features of 1 x 1 by 2; .*smaller"),
    ],
)
def test_layers_that_do_not_fit_the_features_are_refused(layers, size, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(Branch(("x",), 2, layers), shape(*size))


# ---- Several outputs together.


@pytest.mark.parametrize("hidden", [(), (6, 4)], ids=str)
def test_a_combination_classifies_what_it_concatenates(hidden):
    head = Combination(("main", "pooled", "stage_1"), 3, hidden)
    features = normal(7, 2, 2), normal(8, 2, 3), normal(9, 2, 4, 5, 2).astype(jnp.bfloat16)
    variables = random_like(shapes_of(head, *features))
    p = jax.tree.map(np.asarray, variables["params"])
    images = np.asarray(features[2], np.float32).mean((1, 2))
    y = np.concatenate([features[0], features[1], images], -1)
    assert p[("hidden_1" if hidden else "output")]["kernel"].shape[0] == 2 + 3 + 2
    for i in range(1, len(hidden) + 1):
        y = np.maximum(y @ p[f"hidden_{i}"]["kernel"] + p[f"hidden_{i}"]["bias"], 0)
    y = y @ p["output"]["kernel"] + p["output"]["bias"]
    found = head.apply(variables, *features)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, y, rtol=1e-2, atol=5e-3)
