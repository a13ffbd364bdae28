"""Decoders in a network: what they see, what they reach, and what they leave alone."""

import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import print_saved_residuals
from planned import CONVOLUTIONS, MIXED, normal, random_like, shape, shapes_of

from sire_jax import traced
from sire_jax.backbones import cnn
from sire_jax.backbones.blocks import Block, Convolution, MaxPool, Residual
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.heads.decoder import Decoder, decoders
from sire_jax.networks import Network


class _Passed(nn.Module):
    """A backbone whose endpoints are given to it."""

    def __call__(self, image, *, train=False):
        return jnp.zeros((2, 1)), image


def _network(plan, dtype="float32", last="linear", **settings):
    settings["last"] = last
    heads = {f"decoder_{k}": each for k, each in decoders(plan, **settings).items()}
    return Network(Planned(plan, 3, dtype=dtype), heads)


def _chosen(params, chosen):
    """The names of the parts whose parameters are chosen: all of them or none."""
    found = set()
    for part, values in params.items():
        groups = values if part == "backbone" else {part: values}
        for name in groups:
            marks = set(jax.tree.leaves(chosen[part][name] if part == "backbone" else chosen[part]))
            assert len(marks) == 1, f"{part}/{name} is chosen in part"
            if marks == {True}:
                found.add(name)
    return found


def test_a_decoder_is_its_mirrors_one_after_the_other_with_skips():
    stage, image = 2, normal(0, 2, 8, 8, 3)
    network = _network(CONVOLUTIONS)
    variables = random_like(shapes_of(network, image))
    outputs = jax.jit(network.apply)(variables, image)
    backbone = {k: v["backbone"] for k, v in variables.items()}
    _, endpoints = jax.jit(Planned(CONVOLUTIONS, 3).apply)(backbone, image)
    params = variables["params"]["heads_decoder_2"]
    stats = variables["batch_stats"]["heads_decoder_2"]
    x = endpoints[f"stage_{stage}"]
    # Block, channels of its input, and whether its output skips: not that of a max pool.
    order = [
        ("stage_2_block_3", 6, False),
        ("stage_2_block_2", 5, True),
        ("stage_2_block_1", 4, True),
        ("stage_1_block_3", 4, False),
        ("stage_1_block_2", 3, True),
        ("stage_1_block_1", 3, True),
    ]
    for name, inputs, skips in order:
        number, block = int(name[6]), int(name[-1])
        mirror = CONVOLUTIONS.stages[number - 1][block - 1].decoder(inputs, name == order[-1][0])
        own = {"params": params.get(name, {}), "batch_stats": stats.get(name, {})}
        x = x + endpoints[name] if skips else x
        x = jax.jit(partial(mirror.apply, train=False))(own, x)
    np.testing.assert_allclose(outputs["decoder_2"], x, rtol=1e-4, atol=1e-5)
    assert set(params) == {name for name, *_ in order if not name.endswith("3")}


@pytest.mark.parametrize("skips", [True, False])
def test_with_skips_a_decoder_sees_every_block_that_it_mirrors_and_else_none(skips):
    plan, image = CONVOLUTIONS, normal(0, 2, 8, 8, 3)
    _, endpoints = jax.eval_shape(
        lambda: Planned(plan, 3).init_with_output(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
    )[0]
    given = {"image": image} | {
        name: normal(i, *each.shape) for i, (name, each) in enumerate(endpoints.items(), 1)
    }
    heads = {f"decoder_{k}": each for k, each in decoders(plan, skips=skips, last="linear").items()}
    network = Network(_Passed(), heads)
    variables = random_like(shapes_of(network, given))

    @jax.jit
    def gradients(given):
        def total(given, i):
            return (network.apply(variables, given)[f"decoder_{i}"] ** 2).sum()

        return [jax.grad(partial(total, i=i))(given) for i in (1, 2)]

    blocks = ["stage_1_block_1", "stage_1_block_2"]
    for i, (gradient, skipped) in enumerate(
        zip(
            gradients(given), (blocks, [*blocks, "stage_2_block_1", "stage_2_block_2"]), strict=True
        ),
        start=1,
    ):
        seen = {name for name, each in gradient.items() if bool(jnp.abs(each).max() > 0)}
        assert seen == {f"stage_{i}", *(skipped if skips else ())}
        assert set(heads[f"decoder_{i}"].endpoints) == {"image", *seen}


def test_the_order_of_a_decoders_endpoints_is_deepest_first():
    assert Decoder(CONVOLUTIONS, 2).endpoints == (
        "image",
        "stage_2",
        "stage_2_block_2",
        "stage_2_block_1",
        "stage_1_block_2",
        "stage_1_block_1",
    )
    # A stage that does not end with a pool: the start itself does not skip.
    assert Decoder(MIXED, 2).endpoints == ("image", "stage_2", "stage_2_block_1", "stage_1_block_1")
    assert Decoder(MIXED, 2, skips=False).endpoints == ("image", "stage_2")


# Computed again, it is traced again.
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_decoder_reaches_its_stages_and_itself_and_the_main_output_no_decoder(remat):
    image = shape(2, 16, 16, 3)
    network = _network(MIXED, remat=remat)
    variables = random_like(shapes_of(network, image))
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    stages = {
        1: {"stage_1_block_1"},
        2: {"stage_1_block_1", "stage_2_block_1", "stage_2_block_2"},
    }
    stages[3] = stages[2] | {"stage_3_block_1"}
    wanted = {f"decoder_{i}": stages[i] | {f"heads_decoder_{i}"} for i in (1, 2, 3)}
    wanted["main"] = stages[3] | {"tail_block_1", "output"}

    def apply(params, image):
        return network.apply({"params": params, **state}, image)

    read = traced.parameters_read(apply, params, image)
    assert {name: _chosen(params, each) for name, each in read.items()} == wanted

    def losses(params):
        zeros = jnp.zeros(image.shape)
        outputs, _ = network.apply(
            {"params": params, **state}, zeros, train=True, mutable=["batch_stats"]
        )
        return {name: each.sum() for name, each in outputs.items()}

    reached = traced.reach(losses, params)
    assert {name: _chosen(params, each) for name, each in reached.items()} == wanted


def test_decoders_are_not_shared_and_mirror_no_tail():
    params = shapes_of(_network(MIXED), shape(2, 16, 16, 3))["params"]
    assert set(params) == {"backbone", "heads_decoder_1", "heads_decoder_2", "heads_decoder_3"}
    assert "tail_block_1" in params["backbone"]
    for i in (1, 2, 3):
        names = set(params[f"heads_decoder_{i}"])
        # Pools have no parameters; each decoder has a mirror of its own of every other block.
        assert names == {
            f"stage_{s}_block_{b}" for s, b in ((1, 1), (2, 1), (2, 2), (3, 1)) if s <= i
        }


# ---- Without heads.


def _bare(train=False):
    return Network(Planned(MIXED, 3), {})


def test_without_heads_the_compiled_program_is_the_bare_backbones():
    image = shape(2, 16, 16, 3)
    network, bare = _network(MIXED), _bare()
    whole, own = shapes_of(network, image), shapes_of(bare, image)
    of_backbone = {k: {"backbone": v["backbone"]} for k, v in whole.items()}
    assert jax.tree.structure(of_backbone) == jax.tree.structure(own)

    def lowered(network, variables, **aux):
        def forward(variables, image):
            return network.apply(variables, image, **aux)

        return jax.jit(forward).lower(variables, image).as_text()

    text = lowered(bare, own)
    assert lowered(network, of_backbone, aux=False) == text
    # The decoders' parameters, given nevertheless, are not arguments of the program.
    assert lowered(network, whole, aux=False) == text
    assert lowered(network, whole) != text

    def lean(params, image):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), whole["batch_stats"])
        return network.apply({"params": params, "batch_stats": zeros}, image, aux=False)

    def plain(params, image):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), own["batch_stats"])
        return bare.apply({"params": params, "batch_stats": zeros}, image)

    counts = traced.multiply_adds(lean, whole["params"], image)
    assert counts == traced.multiply_adds(plain, own["params"], image)
    read = traced.parameters_read(lean, whole["params"], image)["main"]
    assert traced.size(whole["params"], read) == traced.size(own["params"])


@pytest.mark.parametrize("train", [False, True])
def test_skips_without_decoders_are_the_base_network(train):
    image = shape(2, 16, 16, 3)
    backbone = cnn(3, width=1 / 16, residuals=False, hidden=(4,), dropout=0.0)
    programs = set()
    for heads in ({}, decoders(backbone.plan, (), True), decoders(backbone.plan, (), False)):
        network = Network(backbone, heads)
        variables = shapes_of(network, image)
        apply = partial(network.apply, train=train, mutable=["batch_stats"] if train else False)
        programs.add(str(jax.make_jaxpr(apply)(variables, image)))
    assert len(programs) == 1


# ---- Memory and precision.


def _step(network, variables, image):
    """Returns outputs, new batch statistics and gradients of a training step."""

    def loss(params):
        outputs, new = network.apply(
            {**variables, "params": params}, image, train=True, mutable=["batch_stats"]
        )
        return sum((each**2).sum() for each in outputs.values()), (outputs, new)

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def _rematerialized(program):
    """Counts the rematerialized parts of a traced program."""
    return sum(
        "remat" in e.primitive.name or e.primitive.name == "checkpoint" for e in program.eqns
    )


def test_decoders_computed_again_have_the_same_values_and_gradients():
    image = normal(0, 2, 8, 8, 3)
    plan = Plan((CONVOLUTIONS.stages[0],))
    kept, again = _network(plan), _network(plan, remat=True)
    variables = random_like(shapes_of(kept, image))
    assert jax.tree.structure(shapes_of(again, image)) == jax.tree.structure(dict(variables))
    results = [jax.jit(partial(_step, n))(variables, image) for n in (kept, again)]
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, *results)
    counts = [
        _rematerialized(jax.make_jaxpr(n.apply)(variables, image).jaxpr) for n in (kept, again)
    ]
    assert counts == [0, 1]
    # Nothing that it reads or costs changes.
    assert traced.multiply_adds(kept.apply, variables, image) == traced.multiply_adds(
        again.apply, variables, image
    )


def test_decoders_computed_again_keep_less(capsys):
    image = normal(0, 2, 8, 8, 3)
    sizes = []
    for remat in (False, True):
        network = _network(CONVOLUTIONS, remat=remat)
        variables = random_like(shapes_of(network, image))

        def loss(params, network=network, variables=variables):
            outputs, _ = network.apply(
                {**variables, "params": params}, image, train=True, mutable=["batch_stats"]
            )
            return sum((each**2).sum() for each in outputs.values())

        print_saved_residuals(loss, variables["params"])
        # Such as "f32[2,8,8,3] output of relu"; what the caller has anyway doesn't count.
        kept = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
        shapes = [re.match(r"\w+\[([\d,]*)\]", line)[1] for line in kept]
        sizes.append(sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes))
    # Of the decoders only what they start from is left; of the network, half or less.
    assert sizes[1] < 0.6 * sizes[0]


def test_half_precision_changes_features_alone():
    plan = Plan((CONVOLUTIONS.stages[0], (Residual((4, 5), (1, 3), 2),)))
    image = normal(0, 4, 8, 8, 3)
    full, half = _network(plan), _network(plan, "bfloat16")
    variables = random_like(shapes_of(full, image))
    shapes = shapes_of(half, image)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, variables)
    results = [jax.jit(partial(_step, n))(variables, image) for n in (full, half)]
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype("float32")}
    # Three digits of bfloat16, through a few layers.
    for name, each in results[0][0][1][0].items():
        other = results[1][0][1][0][name]
        np.testing.assert_allclose(other, each, atol=0.1 * float(each.std()))
        assert not jnp.array_equal(other, each)
    # Gradients point the same way, part by part.
    for part, gradients in results[0][1].items():
        a, b = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(each)])
            for each in (gradients, results[1][1][part])
        )
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98, part


def test_half_precision_features_of_every_block():
    image, half = normal(0, 2, 16, 16, 3), _network(MIXED, "bfloat16")
    variables = shapes_of(half, image)
    backbone = {k: v["backbone"] for k, v in variables.items()}
    logits, endpoints = jax.eval_shape(Planned(MIXED, 3, dtype="bfloat16").apply, backbone, image)
    assert logits.dtype == jnp.float32
    assert {each.dtype for each in endpoints.values()} == {jnp.dtype("bfloat16")}
    outputs, new = jax.eval_shape(
        partial(half.apply, train=True, mutable=["batch_stats"]), variables, image
    )
    assert {each.dtype for each in outputs.values()} == {jnp.dtype("float32")}
    assert {each.dtype for each in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    # Rounded to half precision an image would lose more than is left of its error.
    assert "f32[2,16,16,3]" in str(jax.make_jaxpr(half.apply)(variables, image))


# ---- What is refused.


class _OneWay(Block):
    """A user's block without a mirror."""

    stride: int = 1

    def __call__(self, x, before, *, train):
        return x


ONE_WAY = Plan(((Convolution(3),), (_OneWay(), MaxPool()), (Convolution(4),)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoders(CONVOLUTIONS, (1, 3)), r"no stage 3 .* has the stages 1, 2\."),
        (lambda: decoders(CONVOLUTIONS, (0,)), r"no stage 0 .* has the stages 1, 2\."),
        (lambda: decoders(CONVOLUTIONS, (-1,)), r"no stage -1 "),
        (lambda: decoders(CONVOLUTIONS, (1, 2, 1)), r"two decoders of a stage: \(1, 2, 1\)"),
        (lambda: decoders(None), r"need a backbone that is made of a plan; this one is not"),
        (
            lambda: decoders(ONE_WAY),
            r"Decoder 2 can't be made: block 1 of stage 2, _OneWay\(stride=1\), has no mirror\."
            r" Give it a method 'decoder', leave the decoders from stage 2 on out, or move it",
        ),
        (lambda: decoders(ONE_WAY, (3,)), r"Decoder 3 can't be made: block 1 of stage 2"),
        (
            lambda: decoders(CONVOLUTIONS, value_range=(1.0, 0.0)),
            r"value_range is \(1\.0, 0\.0\); it should be \(smallest, largest\)",
        ),
    ],
)
def test_bad_decoders_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_block_without_a_mirror_can_be_behind_the_decoders():
    assert set(decoders(ONE_WAY, (1,))) == {"1"}
    tail = Plan(((Convolution(3), MaxPool()),), tail=(_OneWay(),))
    outputs = jax.eval_shape(
        lambda x: _network(tail).init_with_output(jax.random.key(0), x)[0], shape(2, 4, 4, 3)
    )
    assert outputs["decoder_1"].shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (
            (10, 8),
            r"Images of 10 x 8 can't be decoded from stage 2: stage_2_block_3 divides them by 4 in"
            r" all, which leaves a rest\. Take images whose sides are multiples of 4",
        ),
        ((8, 7), r"Images of 8 x 7 can't be decoded from stage 1: stage_1_block_3 .* by 2 in all"),
    ],
)
def test_an_image_that_leaves_a_rest_is_refused_with_the_numbers(sides, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(_network(CONVOLUTIONS), shape(2, *sides, 3))
    # Without decoders it may leave one.
    shapes_of(_network(CONVOLUTIONS, stages=()), shape(2, *sides, 3))


@pytest.mark.parametrize("settings", [{"stages": 2}, {"stages": (1.0,)}, {"value_range": (0.0,)}])
def test_settings_of_a_wrong_type_are_refused_readably(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        decoders(CONVOLUTIONS, **settings)


@pytest.mark.parametrize("pool", [MaxPool(3, 2), MaxPool(3, 2, (0, 0)), MaxPool(2, 2, (1, 1))])
def test_a_pool_that_does_not_divide_by_its_stride_has_no_mirror(pool):
    plan = Plan(((Convolution(4), pool),))
    with pytest.raises(
        ValueError, match=r"Decoder 1 can't be made: stage_1_block_2: MaxPool\(size"
    ):
        shapes_of(_network(plan), shape(2, 16, 16, 3))
    shapes_of(_network(plan, stages=()), shape(2, 16, 16, 3))


def test_a_plan_that_begins_with_a_pool_ends_its_decoders_linearly():
    network = _network(Plan(((MaxPool(), Convolution(4)),)))
    image = normal(0, 2, 8, 8, 3)
    variables = random_like(shapes_of(network, image))
    decoded = network.apply(variables, image)["decoder_1"]
    assert decoded.shape == image.shape
    assert float(decoded.min()) < 0 < float(decoded.max())


def test_a_decoder_ends_linearly_normalized_or_in_its_range():
    image = 5 * normal(0, 6, 8, 8, 3)
    networks = {
        last: _network(CONVOLUTIONS, stages=(1,), value_range=(-2.0, 4.0), last=last)
        for last in ("normalized", "linear", "sigmoid")
    }
    variables = random_like(shapes_of(networks["normalized"], image))
    norm = variables["params"]["heads_decoder_1"]["last_norm"]
    outputs = {}
    for last, network in networks.items():
        returned, _ = network.apply(variables, image, train=True, mutable=["batch_stats"])
        outputs[last] = returned["decoder_1"]
    linear = outputs["linear"]
    mean, variance = linear.mean((0, 1, 2), keepdims=True), linear.var((0, 1, 2), keepdims=True)
    scale, bias = (norm[key].reshape(1, 1, 1, -1) for key in ("scale", "bias"))
    expected = scale * (linear - mean) / np.sqrt(variance + 1e-5) + bias
    np.testing.assert_allclose(outputs["normalized"], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs["sigmoid"], -2 + 6 / (1 + np.exp(-linear)), rtol=1e-4)


def test_another_last_layer_is_refused():
    with pytest.raises(ValueError, match=r"last layer of a decoder is 'relu'; .* normalized, lin"):
        decoders(CONVOLUTIONS, last="relu")
