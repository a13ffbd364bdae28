"""What blocks and their mirrors compute, against plain NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import CONVOLUTIONS, MIXED, normal, random_like, shape, shapes_of

from sire_jax.backbones import cnn, googlenet, resnet, vgg
from sire_jax.backbones.blocks import Convolution, MaxPool, Residual
from sire_jax.backbones.googlenet import Inception
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.layers import Conv, TransposedConv
from sire_jax.layers.pooling import max_pool, upsample

# ---- The reference: loops over the kernel, float64.


def conv(x, kernel, stride=1):
    k = kernel.shape[0]
    padded = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
    rows, columns = ((n - 1) // stride + 1 for n in x.shape[1:3])
    y = 0.0
    for u in range(k):
        for v in range(k):
            view = padded[:, u::stride, v::stride][:, :rows, :columns]
            y = y + view @ kernel[u, v]
    return y


def transposed_conv(x, kernel):
    """Scatters each pixel: ``y[s + u - p] += kernel[u] x[s]``."""
    k, _, outputs, _ = kernel.shape
    b, h, w, _ = x.shape
    y = np.zeros((b, h + k - 1, w + k - 1, outputs))
    for u in range(k):
        for v in range(k):
            y[:, u : u + h, v : v + w] += x @ kernel[u, v].T
    p = k // 2
    return y[:, p : p + h, p : p + w]


def nearest(x, factor):
    return x.repeat(factor, 1).repeat(factor, 2)


def pool(x, size, stride, padding):
    widths = [(0, 0), padding, padding, (0, 0)]
    x = np.pad(x, widths, constant_values=-np.inf)
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.empty((x.shape[0], rows, columns, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = window.max((1, 2))
    return y


def unit(x, params, stats, stride=1, transposed=False):
    kernel = params["conv"]["kernel"]
    y = transposed_conv(nearest(x, stride), kernel) if transposed else conv(x, kernel, stride)
    y = y + params["conv"].get("bias", 0)
    if "norm" not in params:
        return y
    y = (y - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
    return y * params["norm"]["scale"] + params["norm"]["bias"]


def relu(x):
    return np.maximum(x, 0)


def _apply(module, x, *before, train=False):
    variables = random_like(shapes_of(module, x, *before, train=train), seed=3)
    y = jax.jit(partial(module.apply, train=train))(variables, x, *before)
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    return np.asarray(y), plain["params"], plain.get("batch_stats", {})


def _close(y, expected):
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


X = normal(0, 2, 6, 4, 3)
Z = np.asarray(X, np.float64)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_is_a_convolution_batch_norm_and_relu(stride, bias):
    block = Convolution(4, 3, stride, use_bias=bias)
    y, p, s = _apply(block, X, X)
    assert ("bias" in p["unit"]["conv"]) is bias
    assert block.channels(3) == 4
    _close(y, relu(unit(Z, p["unit"], s["unit"], stride)))
    # Backwards: up-sampled, transposed, batch norm, ReLU.
    y, p, s = _apply(block.decoder(5, False), X)
    assert ("bias" in p["unit"]["conv"]) is bias
    _close(y, relu(unit(Z, p["unit"], s["unit"], stride, True)))
    assert (y == 0).any()
    # The last of a decoder: biased and linear, no batch norm.
    y, p, s = _apply(block.decoder(5, True), X)
    assert (set(p["unit"]), set(p["unit"]["conv"]), s) == ({"conv"}, {"kernel", "bias"}, {})
    _close(y, unit(Z, p["unit"], None, stride, True))
    assert (y < 0).any()


def test_a_residual_connection_adds_the_input_of_the_block_before_ahead_of_the_relu():
    # 1 x 1 kernels on one pixel. Batch norm: (y - mean) / 0.5 with this variance.
    plan = Plan(((Convolution(2, 1), Convolution(3, 1, residual=True)),))
    network = Planned(plan, 2)
    variables = random_like(shapes_of(network, shape(1, 1, 1, 2)))
    half = 0.25 - 1e-5

    def norm(mean, scale, bias):
        channels = len(mean)
        return (
            {"mean": jnp.asarray(mean), "var": jnp.full(channels, half)},
            {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)},
        )

    first = norm([1.0, 0.0], [1.0, 0.5], [0.0, 1.0])
    second = norm([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, -9.0])
    kernels = ([[1.0, -1.0], [2.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, -1.0, 1.0]])
    params, stats = dict(variables["params"]), {}
    for i, (kernel, (stat, param)) in enumerate(zip(kernels, (first, second), strict=True), 1):
        kernel = jnp.asarray(kernel)[None, None]
        params[f"stage_1_block_{i}"] = {"unit": {"conv": {"kernel": kernel}, "norm": param}}
        stats[f"stage_1_block_{i}"] = {"unit": {"norm": stat}}
    image = jnp.asarray([3.0, -1.0]).reshape(1, 1, 1, 2)
    _, endpoints = network.apply({"params": params, "batch_stats": stats}, image)
    # Convolved: (3 - 2, -3). Normalized: (1 - 1) / .5 = 0 and .5 (-3 / .5) + 1 = -2; ReLU: 0, 0.
    assert endpoints["stage_1_block_1"].ravel().tolist() == [0.0, 0.0]
    # Normalized: (0, 1, -9). The image is added, (3, -1, nothing), and only then the ReLU taken:
    # after it, the sum would be (3, 0) + ... (0, 1 - 1 = 0, 0).
    np.testing.assert_allclose(
        endpoints["stage_1_block_2"].ravel(), [3.0, 0.0, 0.0], rtol=1e-5, atol=1e-5
    )
    negative = jnp.asarray([-0.5, -2.0]).reshape(1, 1, 1, 2)
    # Convolved (-4.5, .5); normalized: (-11, 1.5), ReLU (0, 1.5); then (0, -3 + 1, 3 - 9) plus
    # the image (-.5, -2): (-.5, -4, -6), of which nothing is left. Added after it: (-.5, -2, 0).
    _, endpoints = network.apply({"params": params, "batch_stats": stats}, negative)
    np.testing.assert_allclose(endpoints["stage_1_block_1"].ravel(), [0.0, 1.5], rtol=1e-5)
    assert endpoints["stage_1_block_2"].ravel().tolist() == [0.0, 0.0, 0.0]


def test_two_subsequent_convolutions_are_connected_with_their_input():
    network = Planned(CONVOLUTIONS, 2)
    image = normal(4, 2, 8, 8, 3)
    variables = random_like(shapes_of(network, image))
    _, found = jax.jit(network.apply)(variables, image)
    plain = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    x = np.asarray(image, np.float64)
    for stage in (1, 2):
        start = x
        for block in (1, 2):
            name = f"stage_{stage}_block_{block}"
            p, s = plain["params"][name]["unit"], plain["batch_stats"][name]["unit"]
            y = unit(x, p, s)
            if block == 2:
                y = y + np.pad(start, [(0, 0)] * 3 + [(0, y.shape[-1] - start.shape[-1])])
            x = relu(y)
            _close(np.asarray(found[name]), x)
        x = pool(x, 2, 2, (0, 0))
        _close(np.asarray(found[f"stage_{stage}"]), x)


@pytest.mark.parametrize(
    ("block", "inputs"),
    [
        (Residual((3, 3)), 3),
        (Residual((4, 5), (3, 3), 2), 3),
        (Residual((2, 2, 5), (1, 3, 1), 2), 3),
        (Residual((2, 3), (1, 1), 2), 3),
    ],
)
def test_a_residual_block_and_its_mirror(block, inputs):
    def reference(x, p, s, strides, transposed, last):
        y = x
        for i, stride in enumerate(strides, start=1):
            y = unit(y, p[f"unit_{i}"], s[f"unit_{i}"], stride, transposed)
            y = relu(y) if i < len(strides) else y
        if "shortcut" in p:
            x = unit(x, p["shortcut"], s["shortcut"], block.stride, transposed)
        return y + x if last else relu(y + x)

    larger = [i for i, k in enumerate(block.kernel_sizes) if k > 1] or [0]
    strides = [block.stride if i == larger[0] else 1 for i in range(len(block.widths))]
    y, p, s = _apply(block, X, X)
    assert ("shortcut" in p) is (block.stride > 1 or block.widths[-1] != inputs)
    _close(y, reference(Z, p, s, strides, False, False))
    code = normal(1, 2, 3, 2, block.widths[-1])
    deep = np.asarray(code, np.float64)
    for last in (False, True):
        y, q, s = _apply(block.decoder(inputs, last), code)
        # The kernels are those of the block, last first; each keeps (k, k, inputs, outputs).
        shapes = [p[f"unit_{i}"]["conv"]["kernel"].shape for i in range(len(strides), 0, -1)]
        mirrored = [q[f"unit_{i + 1}"]["conv"]["kernel"].shape for i in range(len(strides))]
        assert mirrored == shapes
        assert ("shortcut" in q) == ("shortcut" in p)
        assert y.shape == (2, 3 * block.stride, 2 * block.stride, inputs)
        _close(y, reference(deep, q, s, strides[::-1], True, last))
        assert last or (y >= 0).all()


@pytest.mark.parametrize("size", [3, 5])
def test_an_inception_block_and_its_mirror(size):
    block = Inception(1, 2, 3, 2, 4, 2, size)
    y, p, s = _apply(block, X, X)
    pooled = pool(Z, 3, 1, (1, 1))

    def path(x, i, units, transposed=False):
        for j in range(1, units + 1):
            name = f"path_{i}_{j}"
            x = unit(x, p[name], s[name], 1, transposed)
            x = relu(x) if j < units else x
        return x

    parts = [path(Z, 1, 1), path(Z, 2, 2), path(Z, 3, 2), path(pooled, 4, 1)]
    assert [part.shape[-1] for part in parts] == [1, 3, 4, 2]
    assert p["path_3_2"]["conv"]["kernel"].shape == (size, size, 2, 4)
    _close(y, relu(np.concatenate(parts, -1)))
    assert block.channels(3) == 10
    code = normal(1, 2, 6, 4, 10)
    z = np.asarray(code, np.float64)
    for last in (False, True):
        y, p, s = _apply(block.decoder(3, last), code)
        assert p["path_3_1"]["conv"]["kernel"].shape == (size, size, 2, 4)
        total = (
            path(z[..., :1], 1, 1, True)
            + path(z[..., 1:4], 2, 2, True)
            + path(z[..., 4:8], 3, 2, True)
            + path(pool(z[..., 8:], 3, 1, (1, 1)), 4, 1, True)
        )
        _close(y, total if last else relu(total))


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_a_mirrored_convolution_is_the_transpose(size):
    whole = np.random.default_rng(size).integers(-3, 4, 1000)
    x = jnp.asarray(whole[:70].reshape(1, 7, 5, 2), jnp.float32)
    y = jnp.asarray(whole[70:175].reshape(1, 7, 5, 3), jnp.float32)
    kernel = jnp.asarray(whole[200 : 200 + 6 * size * size].reshape(size, size, 2, 3), jnp.float32)
    variables = {"params": {"kernel": kernel}}
    forward = Conv(3, size, padding=size // 2, use_bias=False).apply(variables, x)
    backward = TransposedConv(2, size, use_bias=False).apply(variables, y)
    # Whole numbers: exact in any order. <Conv x, y> = <x, TransposedConv y>.
    assert float((forward * y).sum()) == float((x * backward).sum())
    np.testing.assert_array_equal(backward, transposed_conv(np.asarray(y), np.asarray(kernel)))


@pytest.mark.parametrize("use_bias", [False, True])
def test_strided_convolutions(use_bias):
    module = Conv(4, 3, padding=1, stride=2, use_bias=use_bias)
    x = normal(2, 2, 7, 6, 3)
    variables = random_like(shapes_of(module, x))
    assert ("bias" in variables["params"]) is use_bias
    p = {k: np.asarray(v, np.float64) for k, v in variables["params"].items()}
    expected = conv(np.asarray(x, np.float64), p["kernel"], 2) + p.get("bias", 0)
    _close(np.asarray(module.apply(variables, x)), expected)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        (2, 2, (0, 0)),
        (3, 2, (0, 1)),
        (3, 2, (1, 0)),
        (3, 1, (1, 1)),
        (2, 1, (0, 0)),
        (3, 3, (0, 0)),
    ],
)
def test_max_pooling_takes_the_largest_of_each_window(size, stride, padding):
    for sides in ((8, 6), (7, 5)):
        x = normal(5, 2, *sides, 3) - 5.0
        y = max_pool(x, size, stride, padding)
        np.testing.assert_array_equal(y, pool(np.asarray(x), size, stride, padding).astype("f4"))


def test_the_pools_of_the_stems_halve_even_sizes():
    for padding in ((0, 1), (1, 0)):
        for side in (2, 4, 8, 112):
            y = jax.eval_shape(lambda x, p=padding: max_pool(x, 3, 2, p), shape(1, side, side, 1))
            assert y.shape == (1, side // 2, side // 2, 1)


def test_up_sampling_repeats_pixels():
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    assert (
        upsample(x, 3)[0, :, :, 0].tolist() == [[1, 1, 1, 2, 2, 2]] * 3 + [[3, 3, 3, 4, 4, 4]] * 3
    )
    assert upsample(x, 1) is x


def test_endpoints_are_in_order_and_stages_are_their_last_block():
    network = Planned(MIXED, 4)
    image = normal(6, 2, 16, 16, 3)
    variables = random_like(shapes_of(network, image))
    logits, endpoints = network.apply(variables, image)
    assert list(endpoints) == [
        "image",
        "stage_1_block_1",
        "stage_1",
        "stage_2_block_1",
        "stage_2_block_2",
        "stage_2",
        "stage_3_block_1",
        "stage_3_block_2",
        "stage_3",
        "tail_block_1",
        "pooled",
    ]
    assert set(endpoints) == MIXED.names()
    assert jnp.array_equal(endpoints["image"], image)
    for stage, last in (("stage_1", 1), ("stage_2", 2), ("stage_3", 2)):
        assert endpoints[stage] is endpoints[f"{stage}_block_{last}"]
    assert endpoints["stage_3"].shape == (2, 2, 2, 8)
    # No hidden layers, not flattened: the mean over pixels of the tail, and a dense layer.
    mean = np.asarray(endpoints["tail_block_1"]).mean((1, 2))
    _close(np.asarray(endpoints["pooled"]), mean)
    output = variables["params"]["output"]
    _close(np.asarray(logits), mean @ np.asarray(output["kernel"]) + np.asarray(output["bias"]))


def test_hidden_layers_see_every_pixel_where_flattened():
    network = Planned(CONVOLUTIONS, 3, (5,), True)
    image = normal(6, 2, 8, 8, 3)
    variables = random_like(shapes_of(network, image))
    logits, endpoints = jax.jit(network.apply)(variables, image)
    p = jax.tree.map(np.asarray, variables["params"])
    x = np.asarray(endpoints["stage_2"]).reshape(2, -1)
    assert x.shape == (2, 2 * 2 * 6)
    np.testing.assert_array_equal(endpoints["pooled"], x)
    x = relu(x @ p["hidden_1"]["kernel"] + p["hidden_1"]["bias"])
    _close(np.asarray(logits), x @ p["output"]["kernel"] + p["output"]["bias"])


def test_dropout_is_on_hidden_units_or_pooled_features_in_training_alone():
    image = normal(6, 2, 8, 8, 3)
    for hidden in ((), (64,)):
        network = Planned(CONVOLUTIONS, 3, hidden, False, 0.5)
        variables = random_like(shapes_of(network, image))

        @partial(jax.jit, static_argnums=1)
        def apply(key, train, network=network, variables=variables):
            rngs = {"dropout": jax.random.key(key)}
            out = network.apply(variables, image, train=train, rngs=rngs, mutable=["batch_stats"])
            return out[0][0]

        assert np.array_equal(apply(0, False), apply(1, False))
        assert not np.allclose(apply(0, True), apply(1, True))


def test_batch_statistics_move_in_training_by_a_tenth():
    network = Planned(Plan(((Convolution(2, 1),),)), 2)
    image = normal(7, 4, 2, 2, 3)
    variables = random_like(shapes_of(network, image))
    apply = partial(network.apply, train=True, mutable=["batch_stats"])
    _, new = jax.jit(apply)(variables, image)
    name = "stage_1_block_1"
    kernel = np.asarray(variables["params"][name]["unit"]["conv"]["kernel"])[0, 0]
    y = (np.asarray(image) @ kernel).reshape(-1, 2)
    old = variables["batch_stats"][name]["unit"]["norm"]
    now = new["batch_stats"][name]["unit"]["norm"]
    _close(np.asarray(now["mean"]), 0.9 * np.asarray(old["mean"]) + 0.1 * y.mean(0))
    _close(np.asarray(now["var"]), 0.9 * np.asarray(old["var"]) + 0.1 * y.var(0))


# ---- What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Convolution(4, 2), r"Convolution has kernel_size 2; it should be odd"),
        (lambda: Convolution(4, 0), r"kernel_size 0; it should be odd"),
        (lambda: Convolution(4, 3, 0), r"Convolution has stride 0; it should be at least 1"),
        (lambda: MaxPool(2, 0), r"MaxPool has stride 0"),
        (lambda: Residual((4, 4), (3, 4)), r"Residual has kernel_size 4; it should be odd"),
        (lambda: Residual((), ()), r"A Residual has no widths; it should have at least one"),
        (lambda: Residual((4, 4, 8)), r"3 widths, \(4, 4, 8\), but 2 kernel_sizes, \(3, 3\)"),
        (lambda: Inception(1, 1, 1, 1, 1, 1, 4), r"Inception has kernel_size 4"),
        (lambda: Plan(()), r"stages that are tuples of at least one block .* given \(\)"),
        (lambda: Plan(((MaxPool(),), ())), r"stages that are tuples of at least one block each"),
        (lambda: Plan((Convolution(4), MaxPool())), r"such as \(\(Convolution\(16\), MaxPool"),
        (lambda: Convolution(0), r"Convolution has a width of 0; it should be at least 1"),
        (lambda: MaxPool(2, 2, (2, 2)), r"size 2 and padding \(2, 2\); .* padding smaller"),
        (lambda: Planned(CONVOLUTIONS, 2, dtype="float16"), r"'float16'.*float32, bfloat16"),
        (lambda: cnn(2, width=0), r"width is 0; it should be above 0"),
        (lambda: vgg(2, depth=12), r"no VGG of depth 12; there are 11, 13, 16, 19"),
        (lambda: resnet(2, depth=20), r"no ResNet of depth 20; there are 18, 34, 50, 101"),
        (lambda: resnet(2, stem="mnist"), r"stem is 'mnist'; .* one of cifar, imagenet"),
        (lambda: googlenet(2, stem="mnist"), r"stem is 'mnist'; .* one of cifar, imagenet"),
        (lambda: googlenet(2, kernel_size=4), r"Inception has kernel_size 4"),
        (lambda: cnn(2, dtype="half"), r"dtype is 'half'"),
        (lambda: resnet(2, width=-1.0), r"width is -1.0"),
        (lambda: resnet(2, extra=(4, 0)), r"Convolution has a width of 0; it should be at least 1"),
        (
            lambda: Plan(((MaxPool(),),), positions=("stage_1", "stage_2")),
            r"Position 2 of a plan is 'stage_2', which is none .* mean 'stage_1'\? Known: image, p",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _shapes(plan, *dimensions):
    return shapes_of(Planned(plan, 2), shape(1, *dimensions))


def test_a_residual_connection_across_a_stride_or_to_fewer_channels_is_refused():
    for second in (Convolution(4, 3, 2, residual=True), Convolution(2, residual=True)):
        with pytest.raises(ValueError, match=r"can't add \(1, 8, 8, 3\) to .*of stride 1"):
            _shapes(Plan(((Convolution(4), second),)), 8, 8, 3)


def test_an_image_too_small_to_be_divided_is_refused_with_the_numbers():
    message = r"Images of 2 x 16 are too small: they are 1 x 8 when stage_2_block_3 would .* by 2"
    with pytest.raises(ValueError, match=message):
        _shapes(CONVOLUTIONS, 2, 16, 3)
