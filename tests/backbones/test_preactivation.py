"""Pre-activation ResNets: their counts, and their blocks by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import normal, random_like, shape, shapes_of

from sire_jax import configuration, inspect, traced
from sire_jax.backbones import preactivation_resnet
from sire_jax.backbones.preactivation import Activation, PreActivation, Stem

CONFIG = configuration.repository_configs() / "auxnet.py"

# ---- Counts that know nothing of the library: of the trunk as far as a number of blocks.


def _layers(depth, width, bottleneck, kind, side=32):
    """Lists each block's convolutions as (kernel, inputs, outputs, pixels), the stem first."""
    number = (depth - 2) // (9 if bottleneck else 6)
    inputs = 16 * width
    blocks = [[(3, 3, inputs, side**2)]]
    for stage, base in enumerate((16, 32, 64)):
        inner = base * width
        for block in range(number):
            before, side = side, side // 2 if stage and not block else side
            if bottleneck:
                outputs = 4 * inner
                made = [
                    (1, inputs, inner, before**2),
                    (3, inner, inner, side**2),
                    (1, inner, outputs, side**2),
                ]
            else:
                outputs = inner
                made = [(3, inputs, inner, side**2), (3, inner, outputs, side**2)]
            if kind == "B" and (before != side or inputs != outputs):
                made.append((1, inputs, outputs, side**2))
            blocks.append(made)
            inputs = outputs
    return blocks


def _counts(depth, width=1, bottleneck=False, kind="A", classes=10, blocks=None):
    """Counts parameters and multiply-adds of the sub-network with an exit after some blocks."""
    layers = _layers(depth, width, bottleneck, kind)
    number = 3 if bottleneck else 2
    chosen = layers[: 1 + (len(layers) if blocks is None else blocks)]
    each = [layer for block in chosen for layer in block]
    # One batch norm before each convolution of a block, none before a shortcut's.
    norms = sum(2 * layer[1] for block in chosen[1:] for layer in block[:number])
    last = chosen[-1][number - 1][2]
    parameters = sum(k * k * a * b for k, a, b, _ in each) + norms + 2 * last + (last + 1) * classes
    products = sum(k * k * a * b * pixels for k, a, b, pixels in each) + last * classes
    return parameters, products


# Guo et al., Table 6; in the last column the unrounded counts.
TABLE_6 = {
    "exit_15": (7, "0.03", 33_338, "33.5"),
    "exit_25": (12, "0.09", 93_914, "55.9"),
    "exit_35": (17, "0.18", 186_714, "79.5"),
    "exit_45": (22, "0.48", 483_098, "101.9"),
    "main": (27, "0.85", 853_018, "125.5"),
}


@pytest.mark.slow  # Traces every exit of a deep network.
def test_the_outputs_of_auxnet_56_5_cost_what_table_6_says():
    found = inspect.inspect(configuration.load(f"{CONFIG}:56-5"))
    assert set(found["outputs"]) == set(TABLE_6)
    for name, (blocks, printed, parameters, millions) in TABLE_6.items():
        counts = found["outputs"][name]
        assert _counts(56, blocks=blocks)[0] == parameters
        assert (counts["parameters"], counts["multiply_adds"]) == _counts(56, blocks=blocks)
        assert f"{counts['multiply_adds'] / 1e6:.1f}" == millions
        # Truncated, as the paper prints them.
        assert f"{parameters // 10_000 / 100:.2f}" == printed
    # The stem, 7 blocks of 16 channels and the exit, then 2 more, the way to 32 channels, 2 blocks.
    stem, same, wider = 432 * 1024, 2304 * 1024, (4608 + 9216) * 256
    assert found["outputs"]["exit_15"]["multiply_adds"] == stem + 14 * same + 160
    assert found["outputs"]["exit_25"]["multiply_adds"] == (
        stem + 18 * same + wider + 4 * 9216 * 256 + 320
    )
    # Four exits are four batch norms and dense layers.
    heads = [2 * c + (c + 1) * 10 for c in (16, 32, 32, 64)]
    assert found["parameters"] == 853_018 + sum(heads)
    assert found["multiply_adds"] == _counts(56)[1] + 10 * (16 + 32 + 32 + 64)
    assert found["without_heads"]["parameters"] == 853_018


def _size(**settings):
    network = preactivation_resnet(**settings).clone(endpoints=())
    return traced.size(shapes_of(network, shape(2, 32, 32, 3))["params"])


# The last column: He et al., Deep Residual Learning, Table 6; Identity Mappings, Table 2; Zagoruyko
# and Komodakis, Table 4. Millions.
@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        ({"depth": 20}, 0.27),
        ({"depth": 26}, None),
        ({"depth": 32}, 0.46),
        ({"depth": 44}, 0.66),
        ({"depth": 56}, 0.85),
        ({"depth": 110}, 1.7),
        ({"depth": 8, "kind": "B"}, None),
        ({"depth": 20, "kind": "B", "classes": 100}, None),
        ({"depth": 26, "width": 10}, None),
        ({"depth": 26, "width": 2, "kind": "B"}, None),
        ({"depth": 29, "bottleneck": True}, None),
        ({"depth": 164, "bottleneck": True, "kind": "B"}, 1.7),
        ({"depth": 1001, "bottleneck": True}, 10.2),
    ],
    ids=str,
)
def test_parameters_of_every_depth_and_width(settings, printed):
    given = {"classes": 10, **settings}
    kind = given.pop("kind", "A")
    size = _size(shortcut=kind, **given)
    assert size == _counts(**given, kind=kind)[0]
    if printed is not None:
        assert size / 1e6 == pytest.approx(printed, rel=0.02)


def test_the_multiply_adds_of_bottlenecks_and_of_convolutions_as_shortcuts():
    for settings in ({"depth": 29, "bottleneck": True, "kind": "B"}, {"depth": 20, "width": 2}):
        kind = settings.pop("kind", "A")
        network = preactivation_resnet(10, shortcut=kind, **settings).clone(endpoints=())
        image = shape(1, 32, 32, 3)
        variables = shapes_of(network, image)
        found = traced.multiply_adds(lambda v, x, n=network: n.apply(v, x)[0], variables, image)
        assert found == _counts(**settings, kind=kind)[1]


def test_layers_are_counted_to_each_block():
    plan = preactivation_resnet(10, 20).plan
    assert plan.layers() == {
        "stage_1_block_1": 1,
        **{f"stage_2_block_{i}": 1 + 2 * i for i in (1, 2, 3)},
        **{f"stage_3_block_{i}": 7 + 2 * i for i in (1, 2, 3)},
        **{f"stage_4_block_{i}": 13 + 2 * i for i in (1, 2, 3)},
    }
    assert plan.names() == {
        "image",
        *(f"stage_{i}" for i in (1, 2, 3, 4)),
        *plan.layers(),
        "tail_block_1",
        "pooled",
    }
    deepest = preactivation_resnet(10, 1001, bottleneck=True).plan.layers()
    assert (len(deepest), max(deepest.values())) == (334, 1000)


# ---- A block, by NumPy.


def _norm(x, params, stats, train):
    mean, variance = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else stats
    return (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def _conv(x, kernel, stride):
    k = kernel.shape[0]
    padded = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
    rows, columns = ((n - 1) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, i, j] = np.tensordot(window, kernel, 3)
    return y


def _by_hand(block, variables, x, train):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["batch_stats"])
    strided = block.kernel_sizes.index(3)
    y, first = x, None
    for i in range(len(block.widths)):
        name = f"norm_{i + 1}"
        moments = stats[name]["mean"], stats[name]["var"]
        y = np.maximum(_norm(y, params[name], moments, train), 0)
        first = y if first is None else first
        y = _conv(y, params[f"conv_{i + 1}"]["kernel"], block.stride if i == strided else 1)
    shortcut = x[:, :: block.stride, :: block.stride]
    missing = block.widths[-1] - x.shape[-1]
    if block.shortcut == "B" and (block.stride > 1 or missing):
        shortcut = _conv(first, params["shortcut"]["kernel"], block.stride)
    elif missing:
        zeros = np.zeros((*shortcut.shape[:-1], missing))
        shortcut = np.concatenate([shortcut, zeros], -1)
    return y + block.shortcut_scale * shortcut


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "block",
    [
        PreActivation((2, 2)),
        PreActivation((2, 2), shortcut_scale=0.5),
        PreActivation((3, 4), stride=2),
        PreActivation((3, 3), shortcut="B", shortcut_scale=0.95),
        PreActivation((3, 2), stride=2, shortcut="B"),
        PreActivation((2, 2), shortcut="B"),
        PreActivation((1, 2, 4), (1, 3, 1), 2),
        PreActivation((2, 2), stride=2, shortcut_scale=0.0),
    ],
    ids=str,
)
def test_a_block_by_hand(block, train):
    # Of 5 x 5 pixels the third and the fifth are left by a stride of 2, too.
    x = normal(3, 2, 5, 5, 2)
    variables = random_like(shapes_of(block, x, x, train=False), seed=1)
    changes = block.stride > 1 or block.widths[-1] != 2
    assert ("shortcut" in variables["params"]) == (block.shortcut == "B" and changes)
    y, _ = block.apply(variables, x, x, train=train, mutable=["batch_stats"])
    expected = _by_hand(block, variables, np.asarray(x, np.float64), train)
    assert y.shape[-1] == block.channels(2) == block.widths[-1]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_the_stem_is_a_convolution_and_the_end_batch_norm_and_relu():
    x = normal(4, 2, 4, 4, 3)
    stem = Stem(2, 3)
    variables = random_like(shapes_of(stem, x, x, train=False))
    assert list(variables) == ["params"]
    kernel = np.asarray(variables["params"]["conv"]["kernel"])
    y = stem.apply(variables, x, x, train=True)
    np.testing.assert_allclose(y, _conv(np.asarray(x), kernel, 1), rtol=1e-4, atol=1e-5)
    end = Activation()
    variables = random_like(shapes_of(end, x, x, train=False))
    params, stats = (
        jax.tree.map(np.asarray, variables[kind]["norm"]) for kind in ("params", "batch_stats")
    )
    y = end.apply(variables, x, x, train=False)
    expected = np.maximum(_norm(np.asarray(x), params, (stats["mean"], stats["var"]), False), 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_before_the_last_convolution():
    x = normal(5, 4, 8, 8, 2)
    block = PreActivation((2, 2), (3, 1), shortcut_scale=0.0, dropout=0.5)
    variables = random_like(shapes_of(block, x, x, train=False))
    # The last convolution passes on what it is given.
    variables["params"]["conv_2"]["kernel"] = jnp.eye(2)[None, None]

    def apply(block, train):
        rngs = {"dropout": jax.random.key(0)}
        return block.apply(variables, x, x, train=train, mutable=["batch_stats"], rngs=rngs)[0]

    never = PreActivation((2, 2), (3, 1), 1, "A", 0.0)
    applied = jax.jit(lambda: (apply(never, True), apply(block, True), apply(block, False)))()
    whole, dropped, evaluated = map(np.asarray, applied)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 2 * whole[kept], rtol=1e-5)
    assert 0.4 < kept[whole > 0].mean() < 0.6
    assert (evaluated > 0).mean() > 0.4


# ---- What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 57}, r"no ResNet of depth 57; it should be 6 n \+ 2, such as 56\."),
        ({"depth": 2}, r"no ResNet of depth 2; it should be 6 n \+ 2, such as 8\."),
        ({"depth": -4}, r"no ResNet of depth -4; .* such as 8\."),
        (
            {"depth": 1000, "bottleneck": True},
            r"no ResNet of depth 1000 with bottlenecks; it should be 9 n \+ 2, such as 1001\.",
        ),
        ({"shortcut": "C"}, r"shortcut is 'C'; it should be one of A, B\."),
        ({"width": 0.0}, r"width is 0\.0; it should be above 0"),
        ({"shortcut_scale": -0.1}, r"shortcut_scale is -0\.1; it should be at least 0 and finite"),
        ({"shortcut_scale": float("nan")}, r"shortcut_scale is nan"),
        ({"shortcut_scale": float("inf")}, r"shortcut_scale is inf"),
        ({"classes": 0}, r"classes has 0; it should be at least 1"),
        ({"dtype": "float16"}, r"dtype is 'float16'; .* float32, bfloat16"),
    ],
    ids=str,
)
def test_networks_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        preactivation_resnet(**{"classes": 10, **settings})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PreActivation((2, 2), (3,)),
            r"2 widths, \(2, 2\), but 1 kernel_sizes, \(3,\)",
        ),
        (lambda: PreActivation((2, 0)), r"PreActivation has .*0.* at least 1"),
        (lambda: PreActivation((2, 2), (3, 2)), r"PreActivation has kernel_size 2; .* odd"),
        (lambda: PreActivation((2, 2), stride=0), r"PreActivation has stride 0"),
        (lambda: Stem(0), r"Stem has .*0.* at least 1"),
        (lambda: Stem(2, 4), r"Stem has kernel_size 4"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_shortcut_of_zeros_takes_no_channels_away():
    x = shape(2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"type A can't lead from 3 channels to 2, .* take type B"):
        shapes_of(PreActivation((2, 2)), x, x, train=False)
    shapes_of(PreActivation((2, 2), shortcut="B"), x, x, train=False)


@pytest.mark.parametrize("endpoints", [None, ()])
def test_dropout_rates_and_sizes_of_images_are_checked(endpoints):
    network = preactivation_resnet(10, 20, dropout=1.0).clone(endpoints=endpoints)
    with pytest.raises(ValueError, match=r"dropout rate is 1\.0; it should be in \[0, 1\)"):
        shapes_of(network, shape(2, 32, 32, 3))
    small = preactivation_resnet(10, 20).clone(endpoints=endpoints)
    with pytest.raises(ValueError, match=r"2 x 2 are too small: they are 1 x 1 when stage_4_block"):
        shapes_of(small, shape(2, 2, 2, 3))
