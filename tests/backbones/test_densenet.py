"""DenseNets: counts, values by hand, positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from planned import normal, random_like, shape, shapes_of

from sire_jax import registry, traced
from sire_jax.backbones import BACKBONES, densenet
from sire_jax.backbones.densenet import DenseLayers, Transition
from sire_jax.heads.decoder import decoders
from sire_jax.layers.pooling import average_pool

# ---- Counts that know nothing of the library, in closed form.


def _block(number, inputs, growth):
    """Counts n layers: batch norm and 1 x 1, batch norm and 3 x 3, of inputs that grow."""
    sums = number * inputs + growth * number * (number - 1) // 2
    return sums * (2 + 4 * growth) + number * (8 * growth + 36 * growth**2)


def _count(classes, depth, growth, share=(1, 2)):
    number, channels = (depth - 4) // 6, 2 * growth
    total = 27 * channels
    for last in (False, False, True):
        total += _block(number, channels, growth)
        channels += number * growth
        kept = channels if last else channels * share[0] // share[1]
        total += 2 * channels + (0 if last else channels * kept)
        channels = kept
    return total + (channels + 1) * classes


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"classes": 7, "depth": 10, "growth": 3}, None),
        ({"classes": 2, "depth": 16, "growth": 5, "reduction": 0.25}, None),
        ({"classes": 10, "depth": 40, "growth": 12, "reduction": 1.0}, None),
        ({"classes": 10}, 769_162),
    ],
    ids=str,
)
def test_parameters_of_every_depth_and_growth(settings, known):
    network = registry.create(BACKBONES, {"name": "densenet", **settings}, "backbone")
    size = traced.size(shapes_of(network, shape(2, 32, 32, 3))["params"])
    given = {"depth": 100, "growth": 12, **settings}
    reduction = given.pop("reduction", 0.5)
    expected = _count(**given, share=(round(4 * reduction), 4))
    assert size == expected == (known or expected)


def test_these_counts_are_the_printed_ones():
    # Huang et al., Table 2, of 10 classes. Palacio et al., Table 3, print 26.1 M of 100 classes:
    # Keras also counts biases of convolutions and the averages of batch norm, 26.099 M.
    printed = {(100, 12): 0.8, (250, 24): 15.3, (190, 40): 25.6}
    for (depth, growth), millions in printed.items():
        assert round(_count(10, depth, growth) / 1e6, 1) == millions


# ---- Positions and layers.


@pytest.mark.parametrize(("depth", "middle"), [(10, None), (16, 1), (22, 1), (28, 2)])
def test_positions_are_behind_the_stem_in_dense_blocks_and_behind_transitions(depth, middle):
    network = densenet(5, depth, 6)
    image = shape(2, 32, 32, 3)
    _, found = jax.eval_shape(network.apply, shapes_of(network, image), image)
    number, channels, side = (depth - 4) // 6, 12, 32
    expected = [("stage_1", (2, 32, 32, 12))]
    for stage in (2, 3, 4):
        if middle:
            shapes = (2, side, side, channels + 6 * middle)
            expected.append((f"stage_{stage}_block_1", shapes))
        channels += 6 * number
        if stage < 4:
            channels, side = channels // 2, side // 2
        expected.append((f"stage_{stage}", (2, side, side, channels)))
    positions = network.plan.positions
    assert [(name, found[name].shape) for name in positions] == expected
    assert len(positions) == (7 if middle else 4)
    assert found["pooled"].shape == (2, channels)
    assert side == 8


def test_layers_are_counted_and_there_are_no_decoders_but_of_the_stem():
    plan = densenet(10, 22, 4).plan
    layers = plan.layers()
    # One layer of two convolutions, two layers, and a transition of one.
    assert [layers[f"stage_2_block_{i}"] for i in (1, 2, 3)] == [3, 7, 8]
    assert [layers[f"stage_{i}_block_1"] for i in (1, 2, 3, 4)] == [1, 3, 10, 17]
    assert max(layers.values()) + 1 == 22
    with pytest.raises(ValueError, match=r"block 1 of stage 1, Stem\(.*has no mirror"):
        decoders(plan, (2,))


# ---- By NumPy.


def _activated(x, params, stats, i, train):
    """Batch norm, ReLU and a convolution with the same size."""
    norm, moments = params[f"norm_{i}"], stats[f"norm_{i}"]
    mean, variance = moments["mean"], moments["var"]
    mean, variance = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (mean, variance)
    x = (x - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]
    kernel = params[f"conv_{i}"]["kernel"]
    p = kernel.shape[0] // 2
    x = np.pad(np.maximum(x, 0), [(0, 0), (p, p), (p, p), (0, 0)])
    rows, columns = x.shape[1] - 2 * p, x.shape[2] - 2 * p
    return sum(
        x[:, u : u + rows, v : v + columns] @ kernel[u, v]
        for u in range(2 * p + 1)
        for v in range(2 * p + 1)
    )


def _made(block, x):
    variables = random_like(shapes_of(block, x, x, train=False), seed=1)
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    return block, variables, plain["params"], plain["batch_stats"]


@pytest.mark.parametrize("train", [False, True])
def test_dense_layers_add_channels_to_all_before(train):
    x = normal(3, 2, 4, 3, 5)
    block = DenseLayers(2, 3)
    module, variables, params, stats = _made(block, x)
    kernels = [params[f"layer_{n}"][f"conv_{i}"]["kernel"] for n in (1, 2) for i in (1, 2)]
    shapes = [(1, 1, 5, 12), (3, 3, 12, 3), (1, 1, 8, 12), (3, 3, 12, 3)]
    assert [kernel.shape for kernel in kernels] == shapes
    y, _ = module.apply(variables, x, x, train=train, mutable=["batch_stats"])
    expected = np.asarray(x, np.float64)
    for name in ("layer_1", "layer_2"):
        inner = _activated(expected, params[name], stats[name], 1, train)
        added = _activated(inner, params[name], stats[name], 2, train)
        expected = np.concatenate([expected, added], -1)
    assert y.shape == (2, 4, 3, block.channels(5)) == (2, 4, 3, 11)
    np.testing.assert_array_equal(y[..., :5], x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_a_transition_keeps_a_share_of_the_channels_and_halves_the_size(train):
    x = normal(4, 2, 4, 5, 5)
    block = Transition(0.5)
    module, variables, params, stats = _made(block, x)
    y, _ = module.apply(variables, x, x, train=train, mutable=["batch_stats"])
    wide = _activated(np.asarray(x, np.float64), params, stats, 1, train)
    # The fifth column is left over.
    pooled = sum(wide[:, i::2, j:4:2] for i in (0, 1) for j in (0, 1)) / 4
    assert y.shape == (2, 2, 2, 2) == (2, 2, 2, block.channels(5))
    np.testing.assert_allclose(y, pooled, rtol=1e-4, atol=1e-4)


def test_average_pooling_by_hand():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    # 0 1 2 3 4 / 5 6 7 8 9 / 10 …: (0 + 1 + 5 + 6) / 4 and (2 + 3 + 7 + 8) / 4.
    np.testing.assert_array_equal(average_pool(x)[0, :, :, 0], [[3.0, 5.0]])
    np.testing.assert_array_equal(average_pool(x, 3)[0, :, :, 0], [[6.0]])
    np.testing.assert_array_equal(average_pool(x, 1), x)
    np.testing.assert_array_equal(
        average_pool(x.transpose(3, 1, 2, 0)), average_pool(x).transpose(3, 1, 2, 0)
    )
    weight = jnp.asarray([4.0, 8.0]).reshape(1, 1, 2, 1)
    gradient = jax.grad(lambda x: (average_pool(x) * weight).sum())(x)
    expected = np.zeros((3, 5))
    expected[:2, :2], expected[:2, 2:4] = 1, 2
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)
    # 1 + 1/128 is a number of half precision, and so is the mean of four of them.
    half = jnp.full((1, 2, 2, 1), 1.0078125, jnp.bfloat16)
    assert average_pool(half).dtype == jnp.bfloat16
    np.testing.assert_array_equal(average_pool(half), half[:, :1, :1])


def test_dropout_follows_every_convolution():
    x = normal(5, 4, 8, 8, 2)
    rngs = {"dropout": jax.random.key(0)}
    for block, share in ((DenseLayers(1, 2, 0.5), 1 / 2), (Transition(1.0, 0.5), 1 / 16)):
        module, variables, _, _ = _made(block, x)
        y, _ = module.apply(variables, x, x, train=True, rngs=rngs, mutable=["batch_stats"])
        added = np.asarray(y)[..., -2:]
        # Of a window of a transition nothing is left if all four are dropped.
        assert (added == 0).mean() == pytest.approx(share, abs=0.1)
        assert (np.asarray(module.apply(variables, x, x, train=False)) != 0).all()
    # Behind the first convolution, too: what the second normalizes varies more.
    variables, variances = _made(DenseLayers(1, 2), x)[1], []
    for rate in (0.0, 0.5):
        module = DenseLayers(1, 2, rate)
        _, new = module.apply(variables, x, x, train=True, rngs=rngs, mutable=["batch_stats"])
        variances.append(np.asarray(new["batch_stats"]["layer_1"]["norm_2"]["var"]))
    assert (variances[1] > variances[0]).all()


# ---- A small network.


def _network(**settings):
    network = densenet(3, 16, 2, **settings)
    image = normal(7, 3, 8, 8, 3)
    return network, random_like(shapes_of(network, image), seed=5), image


def test_a_network_is_its_blocks_one_after_another():
    network, variables, image = _network()
    logits, found = jax.jit(network.apply)(variables, image)
    x, before = image, image
    for stage, blocks in enumerate(network.plan.stages, start=1):
        for i, block in enumerate(blocks, start=1):
            name = f"stage_{stage}_block_{i}"
            own = {kind: each[name] for kind, each in variables.items() if name in each}
            x = block.apply(own, x, before, train=False)
            np.testing.assert_allclose(x, found[name], rtol=1e-4, atol=1e-4)
    tail = np.asarray(found["tail_block_1"])
    assert (tail >= 0).all()
    output = jax.tree.map(np.asarray, variables["params"]["output"])
    np.testing.assert_allclose(found["pooled"], tail.mean((1, 2)), rtol=1e-4, atol=1e-5)
    expected = tail.mean((1, 2)) @ output["kernel"] + output["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_layers_and_a_transition_equal_finite_differences():
    x = normal(8, 2, 4, 4, 2)
    layer, transition = DenseLayers(2, 1), Transition(0.7)
    first = _made(DenseLayers(2, 1), x)[1]
    second = _made(Transition(0.7), normal(9, 2, 4, 4, 4))[1]

    @jax.jit
    def apply(params, x):
        for module, values, p in zip((layer, transition), (first, second), params, strict=True):
            x = module.apply({**values, "params": p}, x, x, train=False)
        return jnp.tanh(x)

    params = (first["params"], second["params"])
    check_grads(apply, (params, x), 1, modes=["rev"], atol=0.02, rtol=0.02, eps=1e-3)


def test_half_precision_is_near_single_precision():
    found = []
    for dtype in ("float32", "bfloat16"):
        network, variables, image = _network(dtype=dtype)

        def loss(params, network=network, stats=variables["batch_stats"], image=image):
            given = {"params": params, "batch_stats": stats}
            (logits, features), _ = network.apply(given, image, train=True, mutable=["batch_stats"])
            return (logits**2).mean(), (logits, features)

        gradient = jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"])[0]
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradient)} == {"float32"}
        _, (logits, features) = jax.jit(loss)(variables["params"])
        assert logits.dtype == jnp.float32
        assert {str(features[name].dtype) for name in network.plan.names()} == {dtype}
        found.append(np.asarray(logits))
    np.testing.assert_allclose(*found, rtol=0.1, atol=0.05 * np.abs(found[0]).max())


# ---- What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: densenet(10, 101), r"no DenseNet-BC of depth 101; .* 6 n \+ 4, such as 100\."),
        (lambda: densenet(10, 4), r"no DenseNet-BC of depth 4; .* such as 10\."),
        (lambda: densenet(10, growth=0), r"DenseLayers has a width of 0; it should be at least 1"),
        (lambda: DenseLayers(0, 4), r"DenseLayers has 0 layers; its number should be at least 1"),
        (lambda: densenet(10, reduction=0.0), r"reduction is 0\.0; it should be in \(0, 1\]"),
        (lambda: densenet(10, reduction=1.5), r"reduction is 1\.5; it should be in \(0, 1\]"),
        (lambda: Transition(0.1).channels(9), r"none of 9 channels: .* is 0\.1; .* 1 / 9"),
        (lambda: densenet(0), r"classes has 0; it should be at least 1"),
        (lambda: densenet(10, dtype="half"), r"dtype is 'half'"),
        (
            lambda: shapes_of(densenet(2, 10, 2, dropout=-0.1), shape(2, 8, 8, 3)),
            r"dropout rate is -0\.1; it should be in \[0, 1\)",
        ),
        (
            lambda: shapes_of(densenet(2, 10, 2), shape(2, 3, 3, 3)),
            r"3 x 3 are too small: they are 1 x 1 when stage_3_block_2 would divide them by 2",
        ),
    ],
)
def test_networks_and_blocks_that_do_not_exist_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
