import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from planned import random_like, shape, shapes_of

from sire_jax import traced
from sire_jax.backbones import PairBranches, PairConvolutional, PairDense, SmallCNN
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.preactivation import PreActivation, Stem
from sire_jax.heads import Classifier, Combination, Identity
from sire_jax.networks import Network


def _network():
    heads = {"exit_1": Classifier(endpoints=("block_1",), classes=10)}
    return Network(SmallCNN(classes=10, channels=(4, 8)), heads)


def test_outputs_are_named_and_the_same_in_training_and_evaluation():
    network, image = _network(), jnp.zeros((3, 8, 8, 1))
    variables = network.init(jax.random.key(0), image)
    for train in (False, True):
        outputs = network.apply(variables, image, train=train)
        assert {k: v.shape for k, v in outputs.items()} == {"main": (3, 10), "exit_1": (3, 10)}


def test_without_heads_the_program_is_the_bare_backbone():
    network, image = _network(), jnp.zeros((1, 8, 8, 1))
    variables = network.init(jax.random.key(0), image)
    backbone = SmallCNN(classes=10, channels=(4, 8))
    bare = {"params": variables["params"]["backbone"]}

    def lean(variables, image):
        return network.apply(variables, image, aux=False)

    assert set(lean(variables, image)) == {"main"}
    # 8 * 8 positions, 9 taps, 1 -> 4 channels; 4 * 4 positions, 9 taps, 4 -> 8; 8 -> 10.
    expected = 64 * 9 * 4 + 16 * 9 * 4 * 8 + 80
    assert traced.multiply_adds(lean, variables, image) == expected
    assert traced.multiply_adds(lambda v, x: backbone.apply(v, x)[0], bare, image) == expected
    read = traced.parameters_read(lambda p, x: lean({"params": p}, x), variables["params"], image)
    assert traced.size(variables["params"], read["main"]) == traced.size(bare["params"])
    assert jnp.array_equal(lean(variables, image)["main"], backbone.apply(bare, image)[0])


class _Own(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Dense(5)(image.reshape(len(image), -1))
        return nn.Dense(2)(x), {"middle": x}


def test_a_module_of_ones_own_takes_heads():
    network = Network(_Own(), {"copy": Identity(endpoints=("middle",))})
    variables = network.init(jax.random.key(0), jnp.ones((4, 3)))
    outputs = network.apply(variables, jnp.ones((4, 3)))
    assert outputs["copy"].shape == (4, 5)
    with pytest.raises(ValueError, match=r"'copy'.*'midle'.*Did you mean 'middle'"):
        Network(_Own(), {"copy": Identity(endpoints=("midle",))}).init(
            jax.random.key(0), jnp.ones((4, 3))
        )


def test_no_head_is_called_main():
    with pytest.raises(ValueError, match="can't be called 'main'"):
        Network(_Own(), {"main": Identity(endpoints=("middle",))})


def test_heads_may_be_attached_to_outputs():
    heads = {
        "copy": Identity(("middle",)),
        "again": Identity(("copy",)),
        "both": Combination(("main", "again", "middle"), 3),
    }
    network, image = Network(_Own(), heads), jnp.ones((4, 3))
    variables = random_like(shapes_of(network, image))
    outputs = network.apply(variables, image)
    assert list(outputs) == ["main", "copy", "again", "both"]
    assert jnp.array_equal(outputs["again"], outputs["copy"])
    p = variables["params"]["heads_both"]["output"]
    joined = jnp.concatenate([outputs["main"], outputs["copy"], outputs["copy"]], -1)
    assert jnp.allclose(outputs["both"], joined @ p["kernel"] + p["bias"][None], atol=1e-5)


def test_a_head_can_not_be_attached_to_what_comes_after_it():
    message = r"'first' is attached to 'second', which is neither.*before it.*Known: main, middle"
    for own in ("second", "first"):
        heads = {"first": Identity((own,)), "second": Identity(("middle",))}
        with pytest.raises(ValueError, match=message.replace("'second'", f"'{own}'")):
            shapes_of(Network(_Own(), heads), shape(4, 3))
    heads = {"early": Identity(("middle",)), "late": Identity(("earlie",))}
    with pytest.raises(ValueError, match=r"'late'.*Did you mean 'early'\? Known: early, main, mi"):
        shapes_of(Network(_Own(), heads), shape(4, 3))


LOOPED = Plan(((Stem(2), *[PreActivation((2, 2))] * 4),))


@pytest.mark.parametrize(
    ("heads", "asked"),
    [
        ({}, ()),
        ({"a": ("stage_1",), "b": ("main", "a"), "c": ("pooled", "b")}, ("pooled", "stage_1")),
        # The name of an endpoint is that of the endpoint, until there is such an output.
        ({"stage_1_block_3": ("stage_1_block_3",)}, ("stage_1_block_3",)),
        (
            {"stage_1_block_3": ("stage_1_block_2",), "b": ("stage_1_block_3",)},
            ("stage_1_block_2",),
        ),
    ],
)
def test_a_backbone_is_asked_for_endpoints_not_for_outputs(heads, asked):
    made = {name: Combination(endpoints, 2) for name, endpoints in heads.items()}
    network = Network(Planned(LOOPED, 2), made)
    assert network.backbone.endpoints == asked
    image = shape(2, 8, 8, 1)
    outputs = jax.eval_shape(network.apply, shapes_of(network, image), image)
    assert {name: x.shape for name, x in outputs.items()} == dict.fromkeys(["main", *heads], (2, 2))


# Weights and biases, layer by layer, of the report's descriptions.
DENSE = (392 * 64 + 64) + (64 * 32 + 32) + 33
BRANCH = (9 * 16 + 16) + (9 * 16 * 16 + 16) + (64 * 32 + 32) + (32 * 10 + 10) + 2 * (16 + 16 + 32)
CONVOLUTIONAL = (9 * 2 * 16 + 16) + (9 * 16 * 16 + 16) + (64 * 32 + 32) + 33
COMBINE = (20 * 20 + 20) + 21
RESIDUAL = (9 * 32 + 32) + 8 * (9 * 32 * 32 + 32 + 64) + (32 * 49 * 50 + 50) + (50 * 10 + 10)


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        (PairDense(), DENSE),
        (PairConvolutional(), CONVOLUTIONAL),
        (PairConvolutional(batch_norm=True), CONVOLUTIONAL + 2 * (16 + 16 + 32)),
        (PairBranches(), BRANCH + COMBINE),
        (PairBranches(shared=False), 2 * BRANCH + COMBINE),
        (PairBranches(branch="residual"), RESIDUAL + COMBINE),
        (PairBranches(branch="residual", residual=False), RESIDUAL + COMBINE),
    ],
)
def test_parameter_counts_of_the_pairs_networks(backbone, parameters):
    image = jnp.zeros((2, 2, 14, 14, 1))
    variables = jax.eval_shape(backbone.init, jax.random.key(0), image)
    assert traced.size(variables["params"]) == parameters


def test_shared_branches_treat_both_images_alike():
    image = jax.random.normal(jax.random.key(1), (3, 2, 14, 14, 1))
    for shared in (True, False):
        network = PairBranches(shared=shared)
        variables = network.init(jax.random.key(0), image)
        _, endpoints = network.apply(variables, image)
        _, swapped = network.apply(variables, image[:, ::-1])
        same = jnp.allclose(endpoints["digits"], swapped["digits"][:, ::-1], atol=1e-5)
        assert bool(same) is shared


def test_an_unknown_branch_is_refused():
    with pytest.raises(ValueError, match="'convolutional' or 'residual'"):
        PairBranches(branch="dense")
