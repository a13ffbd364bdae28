"""Exits named by layers, and their weights by depth."""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import CONVOLUTIONS, normal, random_like, shape, shapes_of

from sire_jax import traced
from sire_jax.backbones import preactivation_resnet, resnet
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.preactivation import Activation, PreActivation, Stem
from sire_jax.heads.classifier import Classifier
from sire_jax.heads.exits import exits
from sire_jax.networks import Network
from sire_jax.weights import depth_weights

TINY = Plan(((Stem(2), *[PreActivation((2, 2))] * 3),), tail=(Activation(),))


def _plan(depth, bottleneck=False):
    return preactivation_resnet(10, depth, bottleneck=bottleneck).plan


def _endpoints(plan, layers):
    return {name: head.endpoints for name, head in exits(plan, layers, 10).items()}


def _nth(plan, n):
    """Returns the n-th residual block of a plan; a stem and a pool have no shortcut."""
    blocks = [
        name
        for stage in range(1, len(plan.stages) + 1)
        for name, block in plan.blocks(stage)
        if hasattr(block, "widths")
    ]
    return blocks[n - 1]


# ---- Where exits are.


@pytest.mark.parametrize(
    ("plan", "blocks", "names"),
    [
        (
            _plan(56),
            {15: 7, 25: 12, 35: 17, 45: 22},
            ["stage_2_block_7", "stage_3_block_3", "stage_3_block_8", "stage_4_block_4"],
        ),
        # A max pool is the first block of the second stage, and no layer.
        (
            resnet(10, 50, "imagenet").plan,
            {22: 7, 31: 10, 40: 13},
            ["stage_3_block_4", "stage_4_block_3", "stage_4_block_6"],
        ),
        (resnet(10, 34, "imagenet").plan, {29: 14}, ["stage_5_block_1"]),
        (resnet(10, 101, "imagenet").plan, {88: 29}, ["stage_4_block_22"]),
        (_plan(110, True), {31: 10, 64: 21}, ["stage_2_block_10", "stage_3_block_9"]),
    ],
    ids=["56", "50", "34", "101", "110 of bottlenecks"],
)
def test_exits_sit_after_the_papers_blocks(plan, blocks, names):
    assert [_nth(plan, block) for block in blocks.values()] == names
    found = _endpoints(plan, tuple(blocks))
    assert found == {str(k): (n,) for k, n in zip(blocks, names, strict=True)}


def test_an_exit_is_a_classifier_with_the_familys_settings():
    made = exits(_plan(20), (11, 17), 7, normalize=False, detached=True)
    assert list(made) == ["11", "17"]
    assert made["17"] == Classifier(("stage_4_block_2",), 7, False, True)
    assert exits(_plan(20), (17,), 7)["17"] == Classifier(("stage_4_block_2",), 7, True, False)
    assert exits(_plan(20), (), 7) == {}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 18), st.booleans())
def test_a_block_ends_at_each_known_layer_but_the_last_is_the_networks_own(number, bottleneck):
    convolutions = 3 if bottleneck else 2
    depth = 3 * convolutions * number + 2
    plan = _plan(depth, bottleneck)
    known = range(1, depth, convolutions)
    assert list(plan.layers().values()) == list(known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in range(-1, depth + 2):
            if layer in known[:-1]:
                assert set(_endpoints(plan, (layer,))) == {str(layer)}
            else:
                with pytest.raises(ValueError, match=f"no exit at layer {layer} of {depth}"):
                    exits(plan, (layer,), 10)


@pytest.mark.parametrize(
    ("plan", "layers", "message"),
    [
        (
            _plan(56),
            (16,),
            r"layer 16 of 56: no block ends there\. The nearest .* 15 and 17\.",
        ),
        (_plan(56), (15, 44), r"layer 44 of 56: no block ends there.* are 43 and 45\."),
        (_plan(56), (0,), r"layer 0 of 56: no block ends there.* are 1 and 3\."),
        (_plan(56), (55,), r"layer 55 of 56: .*own output.* are 51 and 53\."),
        (_plan(56), (56,), r"layer 56 of 56: .*own output.* are 51 and 53\."),
        (_plan(56), (57,), r"layer 57 of 56: no block ends there.* are 51 and 53\."),
        (resnet(10, 50).plan, (23,), r"layer 23 of 50: .* are 22 and 25\."),
        (_plan(56), (35, 25), r"layers are \(35, 25\); .* once, in rising order: \(25, 35\)"),
        (_plan(56), (25, 25, 35), r"\(25, 25, 35\); each should be there once, .*: \(25, 35\)"),
        (None, (15,), r"the backbone has none\. Attach 'classifier' heads"),
    ],
)
def test_exits_that_do_not_exist_are_refused(plan, layers, message):
    with pytest.raises(ValueError, match=message):
        exits(plan, layers, 10)


def test_a_plan_of_one_block_has_no_exits():
    with pytest.raises(ValueError, match="no exit at layer 1 of 2"):
        exits(Plan(((Stem(2),),)), (1,), 10)


# ---- What the paper found to do harm.


@pytest.mark.parametrize(
    ("depth", "layers", "message"),
    [
        (20, (5,), r"very shallow layers 5 of 20 harm .*Section 5\.2\)\. Layers above 5 are safer"),
        (44, (5,), r"very shallow layers 5 of 44 .* Layers above 11 are safer"),
        (44, (9, 11, 35), r"very shallow layers 9, 11 of 44"),
        (56, (17, 21, 25, 29, 33, 37), r"6 exits in 56 layers are many.*5\.1\)\. At most 5 are"),
        (8, (3, 5), r"2 exits in 8 layers are many.* At most 1 are safer"),
    ],
)
def test_exits_that_do_harm_are_warned_of(depth, layers, message):
    with pytest.warns(UserWarning, match=message) as found:
        exits(_plan(depth), layers, 10)
    assert len(found) == 1
    # Where a program asks for them.
    assert found[0].filename == __file__


def test_of_nine_exits_in_56_layers_the_first_is_too_shallow_too():
    layers = (13, 17, 21, 25, 29, 33, 37, 41, 45)
    with (
        pytest.warns(UserWarning, match="very shallow layers 13 of 56"),
        pytest.warns(UserWarning, match="9 exits in 56 layers are many"),
    ):
        exits(_plan(56), layers, 10)


@pytest.mark.parametrize(
    ("plan", "layers"),
    [
        (_plan(20), (17,)),
        (_plan(26), (19,)),
        (_plan(32), (25,)),
        (_plan(44), (25, 35)),
        (_plan(44), (15,)),
        (_plan(56), (15, 25, 35, 45)),
        (resnet(10, 34).plan, (29,)),
        (resnet(10, 50).plan, (22, 31, 40)),
        (resnet(10, 101).plan, (88,)),
    ],
)
def test_of_the_papers_networks_nothing_is_warned(plan, layers):
    # Warnings are errors.
    assert len(exits(plan, layers, 10)) == len(layers)


# ---- What an exit computes.


def test_an_exit_by_hand():
    x = normal(1, 3, 2, 2, 4)
    head = Classifier(("x",), 2, normalize=True)
    variables = random_like(shapes_of(head, x))
    params = jax.tree.map(np.asarray, variables["params"])
    stats = jax.tree.map(np.asarray, variables["batch_stats"]["norm"])
    norm, output = params["norm"], params["output"]

    def by_hand(mean, variance):
        y = (np.asarray(x) - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]
        return np.maximum(y, 0).mean((1, 2)) @ output["kernel"] + output["bias"]

    found = head.apply(variables, x)
    np.testing.assert_allclose(found, by_hand(stats["mean"], stats["var"]), rtol=1e-4, atol=1e-5)
    found, new = head.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, variance = np.asarray(x).mean((0, 1, 2)), np.asarray(x).var((0, 1, 2))
    np.testing.assert_allclose(found, by_hand(mean, variance), rtol=1e-3, atol=1e-4)
    kept = 0.9 * stats["mean"] + 0.1 * mean
    np.testing.assert_allclose(new["batch_stats"]["norm"]["mean"], kept, rtol=1e-4, atol=1e-5)


def test_without_batch_norm_an_exit_is_linear():
    x = normal(1, 3, 2, 2, 4)
    head = Classifier(("x",), 2)
    variables = random_like(shapes_of(head, x))
    assert list(variables) == ["params"]
    output = jax.tree.map(np.asarray, variables["params"]["output"])
    expected = np.asarray(x).mean((1, 2)) @ output["kernel"] + output["bias"]
    np.testing.assert_allclose(head.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def _reach(plan, heads, train=True):
    network = Network(Planned(plan, 2), {f"exit_{k}": head for k, head in heads.items()})
    image = shape(3, 4, 4, 1)
    variables = shapes_of(network, image)

    def losses(params, stats, image):
        variables = {"params": params, "batch_stats": stats}
        outputs, _ = network.apply(variables, image, train=train, mutable=["batch_stats"])
        return {name: output.sum() for name, output in outputs.items()}

    trees = traced.reach(losses, variables["params"], variables["batch_stats"], image)
    return {
        name: {
            "/".join(key.key for key in path[1 if path[0].key == "backbone" else 0 :])
            for path, reached in jax.tree_util.tree_leaves_with_path(tree)
            if reached
        }
        for name, tree in trees.items()
    }


OWN = {"norm/scale", "norm/bias", "output/kernel", "output/bias"}


@pytest.mark.parametrize("train", [True, False])
def test_an_exit_reaches_the_trunk_as_far_as_its_layer(train):
    found = _reach(TINY, exits(TINY, (5,), 2), train)
    leaves = {f"conv_{i}/kernel" for i in (1, 2)}
    leaves |= {f"norm_{i}/{leaf}" for i in (1, 2) for leaf in ("scale", "bias")}
    trunk = {f"stage_1_block_{i}/{leaf}" for i in (2, 3) for leaf in leaves}
    trunk.add("stage_1_block_1/conv/kernel")
    assert found["exit_5"] == trunk | {f"heads_exit_5/{leaf}" for leaf in OWN}
    assert found["main"] == trunk | {
        *(f"stage_1_block_4/{leaf}" for leaf in leaves),
        "tail_block_1/norm/scale",
        "tail_block_1/norm/bias",
        "output/kernel",
        "output/bias",
    }


def test_a_probe_reaches_itself_alone():
    found = _reach(TINY, exits(TINY, (5,), 2, detached=True))
    assert found["exit_5"] == {f"heads_exit_5/{leaf}" for leaf in OWN}
    assert found["main"] == _reach(TINY, {})["main"]
    bare = _reach(TINY, exits(TINY, (5,), 2, normalize=False, detached=True))
    assert bare["exit_5"] == {f"heads_exit_5/output/{leaf}" for leaf in ("kernel", "bias")}


def test_a_probe_computes_what_an_exit_does():
    x = normal(1, 3, 2, 2, 4)
    heads = [Classifier(("x",), 2, True, detached) for detached in (True, False)]
    variables = random_like(shapes_of(heads[0], x))
    np.testing.assert_array_equal(*(head.apply(variables, x) for head in heads))
    gradient = jax.grad(lambda x: heads[0].apply(variables, x).sum())(x)
    assert not gradient.any()


def test_probes_do_no_harm():
    # Warnings are errors.
    assert len(exits(_plan(20), (3, 5, 7), 10, detached=True)) == 3


def test_exits_of_a_plan_with_pools():
    plan = Plan((CONVOLUTIONS.stages[0], CONVOLUTIONS.stages[1]), tail=CONVOLUTIONS.stages[1][:1])
    assert list(plan.layers().values()) == [1, 2, 2, 3, 4, 4]
    # At the layer of a pool it follows the pool; the tail counts as no layer.
    assert _endpoints(plan, (2,)) == {"2": ("stage_1_block_3",)}


# ---- Weights.


def test_weights_by_depth_of_auxnet_56_5():
    layers = (15, 25, 35, 45)
    found = depth_weights(layers, 2.0)
    assert found == pytest.approx([1 / 9, 25 / 81, 49 / 81, 1], rel=1e-6)
    assert [round(weight, 3) for weight in found] == [0.111, 0.309, 0.605, 1]
    assert depth_weights(layers, 1) == pytest.approx([1 / 3, 5 / 9, 7 / 9, 1])
    # By the distance from the deepest, wherever that is.
    assert depth_weights(layers[::-1], 1.0) == depth_weights(layers, 1.0)[::-1]
    assert depth_weights(layers, 5.0) == pytest.approx([0.01, 0.0529, 0.2846, 1], rel=1e-3)


def test_weights_of_equal_outputs_and_of_one_or_none():
    assert depth_weights((15, 25, 35, 45), 0.0) == [1, 1, 1, 1]
    assert depth_weights((29,), 2.0) == [1]
    assert depth_weights((), 2.0) == []


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9, unique=True), st.floats(0, 50))
def test_weights_rise_with_depth_from_001_to_1(layers, nu):
    found = depth_weights(sorted(layers), nu)
    assert found == sorted(found)
    assert found[-1] == 1
    assert found[0] >= 0.01
    deepest = max(layers)
    for layer, weight in zip(sorted(layers), found, strict=True):
        assert weight == 0.01 or weight == pytest.approx((layer / deepest) ** nu)


@pytest.mark.parametrize("nu", [-0.5, float("nan"), float("inf")])
def test_weights_that_fall_with_depth_are_refused(nu):
    with pytest.raises(ValueError, match=rf"nu is {nu}; it should be at least 0 and finite"):
        depth_weights((15, 25), nu)
