"""Equal blocks of a plan that are applied in a loop."""

from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from planned import apart, normal, random_like, shape, shapes_of

from sire_jax.backbones import plan, preactivation_resnet, stacked
from sire_jax.backbones.blocks import Block
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.preactivation import Activation, PreActivation, Stem
from sire_jax.layers import Dropout

BLOCK = PreActivation((2, 2), shortcut_scale=0.9)
LOOPED = Plan(
    ((Stem(2), *[BLOCK] * 4), (PreActivation((3, 3)), *[PreActivation((3, 3))] * 2)),
    tail=(Activation(),),
)


@pytest.fixture(autouse=True)
def _short_loops(monkeypatch, request):
    """Has as few as two equal blocks be a loop, as small networks of tests have."""
    if request.node.originalname != "test_a_loop_is_of_many_blocks":
        monkeypatch.setattr(plan, "LONG", 2)


@pytest.mark.parametrize(("blocks", "lengths"), [(plan.LONG, [plan.LONG]), (plan.LONG - 1, [])])
def test_a_loop_is_of_many_blocks(blocks, lengths):
    network = Planned(Plan(((Stem(2), *[BLOCK] * blocks),), tail=(Activation(),)), 2, endpoints=())
    assert _loops(network) == lengths


def _loops(network, image=None):
    """Lists the lengths of a network's loops, in evaluation."""
    image = shape(2, 8, 8, 1) if image is None else image
    program = jax.make_jaxpr(network.apply)(shapes_of(network, image), image)
    return [e.params["length"] for e in program.jaxpr.eqns if e.primitive.name == "scan"]


@pytest.mark.parametrize(
    ("endpoints", "lengths"),
    [
        (None, []),
        ((), [4, 2]),
        (("stage_1", "stage_2", "tail_block_1", "image"), [4, 2]),
        (("stage_1_block_3",), [2, 2, 2]),
        (("stage_1_block_1", "stage_1_block_2"), [3, 2]),
        (("stage_2_block_2",), [4]),
        # Of a misspelt name nothing is known, and a message is to list all that exist.
        (("stage_9",), []),
    ],
)
def test_equal_blocks_between_what_is_asked_for_are_one_loop(endpoints, lengths):
    # The first block of the second stage is equal to the others, but changes the channels.
    network = Planned(LOOPED, 2, endpoints=endpoints)
    assert _loops(network) == lengths
    variables = shapes_of(network, shape(2, 8, 8, 1))
    (_, found) = jax.eval_shape(network.apply, variables, shape(2, 8, 8, 1))
    assert set(endpoints or ()) - {"stage_9"} <= set(found)


# Deep networks are slow to trace.
DEEP = pytest.mark.slow


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        pytest.param({"depth": 110}, [18, 17, 17], marks=DEEP),
        ({"depth": 20, "width": 0.5}, [3, 2, 2]),
        ({"depth": 20, "dropout": 0.3, "shortcut": "B"}, [3, 2, 2]),
        # The first bottleneck quadruples the channels.
        pytest.param({"depth": 56, "bottleneck": True}, [5, 5, 5], marks=DEEP),
    ],
    ids=str,
)
def test_a_stage_is_a_loop_but_for_the_block_that_changes_the_shape(settings, lengths):
    network = preactivation_resnet(10, **settings).clone(endpoints=())
    assert _loops(network, shape(2, 32, 32, 3)) == lengths
    unlooped = shapes_of(network.clone(endpoints=None), shape(2, 32, 32, 3))
    assert apart(shapes_of(network, shape(2, 32, 32, 3))) == unlooped


@pytest.mark.parametrize("endpoints", [(), ("stage_1_block_3",)])
def test_blocks_of_a_loop_begin_as_they_would_one_by_one(endpoints):
    image, key = jnp.zeros((2, 8, 8, 1)), jax.random.key(3)
    one_by_one, looped = (
        jax.jit(Planned(LOOPED, 2, endpoints=asked).init)(key, image) for asked in (None, endpoints)
    )
    assert "stage_2_block_2_to_3" in looped["params"]
    chex.assert_trees_all_equal(apart(looped), one_by_one)


def test_a_loop_computes_what_its_blocks_do():
    image = normal(6, 3, 6, 6, 2)
    networks = [Planned(Plan(((BLOCK,) * 3,)), 2, endpoints=endpoints) for endpoints in (None, ())]
    assert [_loops(network, image) for network in networks] == [[], [3]]
    looped_variables = random_like(shapes_of(networks[1], image), seed=2)

    def all_of_it(network, variables):
        params, stats = variables["params"], variables["batch_stats"]

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            (logits, _), new = network.apply(variables, image, train=True, mutable=["batch_stats"])
            return (logits**2).sum(), (logits, new["batch_stats"])

        evaluated = network.apply({"params": params, "batch_stats": stats}, image)[0]
        return jax.value_and_grad(loss, has_aux=True)(params), evaluated

    one_by_one, looped = (
        jax.jit(all_of_it, static_argnums=0)(network, variables)
        for network, variables in zip(
            networks, (apart(looped_variables), looped_variables), strict=True
        )
    )
    ((loss, (logits, new)), gradient), evaluated = looped
    alike = ((loss, (logits, apart(new))), apart(gradient)), evaluated
    chex.assert_trees_all_close(one_by_one, alike, rtol=1e-4, atol=1e-4)
    before = looped_variables["batch_stats"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), new, before)
    assert jax.tree.all(moved)
    assert all(float(jnp.abs(leaf).max()) > 1e-6 for leaf in jax.tree.leaves(gradient))


def test_offsets_between_the_blocks_of_a_loop_part_it():
    image, name = normal(6, 3, 6, 6, 2), "stage_1_block_2"
    looped, one_by_one = (
        Planned(Plan(((BLOCK,) * 3,)), 2, endpoints=asked) for asked in ((), None)
    )
    variables = random_like(shapes_of(looped, image), seed=2)
    offsets = {"offsets": {name: normal(7, 3, 6, 6, 2)}}
    found = [
        network.apply({**own, **offsets}, image, train=True, mutable=["batch_stats"])
        for network, own in ((looped, variables), (one_by_one, apart(variables)))
    ]
    (logits, endpoints), new = found[0]
    (expected, all_endpoints), expected_new = found[1]
    unshifted = looped.apply(variables, image, train=True, mutable=["batch_stats"])[0][0]
    assert float(jnp.abs(logits - unshifted).max()) > 0.1
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(endpoints[name], all_endpoints[name], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(apart(new), expected_new, rtol=1e-4, atol=1e-4)


def test_features_of_a_loop_are_there_for_who_asks_with_the_variables():
    image = normal(6, 3, 6, 6, 2)
    names = ["stage_1_block_1", "stage_1_block_2", "stage_1_block_3"]
    looped = Planned(Plan(((BLOCK,) * 3,)), 2, endpoints=())
    variables = random_like(shapes_of(looped, image), seed=2)
    of_network = {kind: {"backbone": tree} for kind, tree in variables.items()}
    found = plan.features(looped, of_network, image, names)
    expected = looped.clone(endpoints=None).apply(apart(variables), image)[1]
    chex.assert_trees_all_close(found, {k: expected[k] for k in names}, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(stacked.apart(of_network), apart(of_network))


class Writing(Block):
    """Writes a dropped image of ones beside what it is given, as digits of base 4."""

    loops: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x, before, *, train):
        self.param("drawn", nn.initializers.normal(), (3,))
        return 4 * x + Dropout(0.5)(jnp.ones_like(x), train=train)


def test_each_block_of_a_loop_has_dropout_and_parameters_of_its_own():
    network = Planned(Plan(((Writing(),) * 3,)), 2, endpoints=("stage_1",))
    image = jnp.zeros((2, 8, 8, 1))
    assert _loops(network, shape(2, 8, 8, 1)) == [3]
    variables = network.init(jax.random.key(0), image)
    drawn = variables["params"]["stage_1_block_1_to_3"]["drawn"]
    assert (drawn.shape, len({float(value) for value in drawn.ravel()})) == ((3, 3), 9)

    @jax.jit
    def apply(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return [
            network.apply(variables, image, train=train, rngs=rngs)[1]["stage_1"]
            for train in (True, False)
        ]

    def masks(seed):
        digits = [np.asarray(apply(seed)[0]) // 4**i % 4 for i in range(3)]
        assert {value for digit in digits for value in digit.ravel()} == {0, 2}
        return digits

    first, second, third = masks(1)
    for a, b in ((first, second), (second, third), (first, third), (first, masks(2)[0])):
        assert 0.3 < (a != b).mean() < 0.7
    # In evaluation nothing is dropped: 1 + 4 + 16.
    assert set(np.unique(apply(1)[1])) == {21}


def test_half_precision_in_a_loop():
    network = Planned(LOOPED, 2, dtype="bfloat16", endpoints=("stage_1",))
    image = shape(2, 8, 8, 1)
    variables = shapes_of(network, image)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def train(variables, image):
        return network.apply(variables, image, train=True, mutable=["batch_stats"])

    (logits, endpoints), new = jax.eval_shape(train, variables, image)
    assert (logits.dtype, endpoints["stage_1"].dtype) == (jnp.float32, jnp.bfloat16)
    assert new["batch_stats"] == variables["batch_stats"]


class _Inside(nn.Module):
    """Writes its plan where Flax names all modules that are made."""

    @nn.compact
    def __call__(self, image, *, train=False):
        blocks = tuple(PreActivation((4, 4)) for _ in range(3))
        plan = Plan(((Stem(4), *blocks),))
        return Planned(plan, 2, endpoints=("stage_1",), name="planned")(image, train=train)


def test_a_plan_that_is_written_inside_of_a_module_has_loops_too():
    assert _loops(_Inside(), shape(2, 8, 8, 1)) == [3]
