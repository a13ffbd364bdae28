from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import integers, plain, with_gradients
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.test_util import check_grads
from planned import normal

from sire_jax.layers import BatchNorm, Conv, Dropout, onednn, products
from sire_jax.layers.convolution import convolve
from sire_jax.layers.modules import random_bits
from sire_jax.layers.normalization import batch_over, normalize
from sire_jax.layers.pooling import max_pool, upsample


@pytest.fixture(params=["oneDNN", "XLA"])
def library(request, monkeypatch):
    """Whose convolutions they are: oneDNN's where it is installed, and XLA's in any case."""
    if request.param == "XLA":
        monkeypatch.setattr(onednn, "takes", lambda a, b: False)
    elif onednn.load():
        # Programs of these tests are one device's.
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    else:
        pytest.skip("oneDNN or a C++ compiler is not here: see the extra onednn")


def _assert_trees_equal(a, b, tolerance=1e-5):
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=tolerance)


# batch, height, width, channels, features, kernel, padding, stride
CONVOLUTIONS = [
    (3, 6, 5, 2, 4, 3, 0, 1),
    (2, 6, 7, 3, 2, 3, 1, 1),
    (4, 4, 4, 1, 3, 3, 2, 1),
    (2, 5, 6, 2, 3, 2, 1, 1),
    (1, 5, 5, 3, 1, 5, 0, 1),
    (2, 3, 4, 2, 3, 1, 0, 1),
    (2, 6, 7, 3, 2, 3, 1, 2),
    (2, 7, 6, 2, 20, 3, 0, 2),
    (3, 8, 9, 2, 3, 3, 1, 3),
    (2, 5, 6, 3, 2, 1, 0, 2),
    (2, 9, 8, 3, 4, 7, 3, 2),
    (2, 8, 6, 4, 3, 5, 2, 2),
    # Wide ones, whose products are taken before the shifts.
    (2, 5, 4, 48, 50, 3, 1, 1),
    (3, 4, 5, 50, 48, 3, 0, 1),
    (2, 5, 4, 48, 48, 3, 1, 2),
]


def _case(b, h, w, c, o, k, images_last=False):
    x = integers(1, *((c, h, w, b) if images_last else (b, h, w, c)))
    return x, integers(2, k, k, c, o)


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize(("b", "h", "w", "c", "o", "k", "padding", "stride"), CONVOLUTIONS)
@pytest.mark.usefixtures("library")
def test_convolution_and_its_gradients_equal_xlas(b, h, w, c, o, k, padding, stride, images_last):
    x, kernel = _case(b, h, w, c, o, k, images_last)
    ours = with_gradients(convolve, x, kernel, padding, stride, images_last)
    theirs = with_gradients(plain, x, kernel, padding, stride, images_last)
    _assert_trees_equal(ours, theirs)
    assert float(jnp.abs(ours[0]).max()) > 1


@pytest.mark.parametrize(("channels", "features", "stride"), [(3, 4, 1), (48, 48, 1), (3, 4, 2)])
@pytest.mark.usefixtures("library")
def test_convolution_gradients_equal_finite_differences(channels, features, stride):
    x, kernel = normal(1, 2, 4, 5, channels), normal(2, 3, 3, channels, features)
    function = jax.jit(lambda x, k: convolve(x, k, 1, stride))
    check_grads(function, (x, kernel), 1, modes=["rev"], atol=0.05, rtol=0.05, eps=1)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("padding", "stride"), [(1, 1), (0, 2)])
def test_gradients_of_gradients_equal_xlas(padding, stride):
    x, kernel = normal(1, 2, 5, 6, 3), normal(2, 3, 3, 3, 2)

    def curvature(function):
        def loss(x, kernel):
            return (function(x, kernel, padding, stride, False) ** 2).mean()

        def squared(x, kernel):
            return sum((g**2).sum() for g in jax.grad(loss, (0, 1))(x, kernel))

        return jax.jit(jax.grad(squared, (0, 1)))(x, kernel)

    chex.assert_trees_all_close(curvature(convolve), curvature(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize(("channels", "features"), [(3, 8), (48, 48)])
@pytest.mark.usefixtures("library")
def test_convolution_of_half_precision_sums_in_single_precision(channels, features, images_last):
    x, kernel = _case(2, 5, 6, channels, features, 3, images_last)
    narrow = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    ours = with_gradients(convolve, *narrow, 1, 1, images_last)
    expected = with_gradients(plain, x, kernel, 1, 1, images_last)
    for found, right in zip(ours, expected, strict=True):
        assert found.dtype == jnp.bfloat16
        # The sums are exact, and rounded once.
        np.testing.assert_array_equal(found, right.astype(jnp.bfloat16))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("stride", "images_last"), [(1, False), (2, False), (1, True)])
def test_devices_that_see_their_own_images_share_a_kernel(stride, images_last):
    x, kernel = _case(4, 6, 5, 3, 2, 3, images_last)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    own, everyone = PartitionSpec(*(None,) * 3 * images_last, "data"), PartitionSpec()
    split = partial(jax.shard_map, mesh=mesh, in_specs=(own, everyone))

    def loss(x, kernel):
        return (convolve(x, kernel, 1, stride, images_last) ** 2).sum()

    # Each device's is another one, and no result of all of them.
    with pytest.raises(ValueError, match="out_specs"):
        split(loss, out_specs=everyone)(x, kernel)

    def step(x, kernel):
        return jax.value_and_grad(lambda x, k: lax.psum(loss(x, k), "data"), (0, 1))(x, kernel)

    found = jax.jit(split(step, out_specs=(everyone, (own, everyone))))(x, kernel)
    _assert_trees_equal(found, jax.value_and_grad(loss, (0, 1))(x, kernel))


def test_devices_normalize_a_batch_together_and_share_its_parameters():
    x, norm = normal(1, 8, 3), BatchNorm()
    variables = norm.init(jax.random.key(1), x, train=True)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))

    def loss(params, x, axis):
        with batch_over(axis):
            y, state = norm.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
        total = (y**3).sum()
        return (total if axis is None else lax.psum(total, axis)), state

    def step(params, x, axis):
        return jax.value_and_grad(loss, has_aux=True)(params, x, axis)

    split = jax.shard_map(
        lambda params, x: step(params, x, "data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    found, expected = jax.jit(split)(variables["params"], x), step(variables["params"], x, None)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "padding", "stride", "message"),
    [
        ((3, 1), 1, 1, r"should be square; this one is \(3, 1, 3, 2\)"),
        (
            (3, 3),
            3,
            1,
            "padding is 3 and stride 1; of a kernel of 3 pixels .* be 0 to 2",
        ),
        ((1, 1), -1, 1, "padding is -1"),
        ((3, 3), 1, 0, "stride 0; .* stride at least 1"),
    ],
)
@pytest.mark.usefixtures("library")
def test_convolutions_that_are_none_are_refused(size, padding, stride, message):
    with pytest.raises(ValueError, match=message):
        convolve(jnp.ones((2, 4, 4, 3)), jnp.ones((*size, 3, 2)), padding, stride)


@pytest.mark.usefixtures("library")
def test_convolution_is_the_formula():
    x, kernel = np.asarray(integers(1, 2, 5, 4, 3)), np.asarray(integers(2, 3, 3, 3, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 5, 4, 2))
    for i in range(5):
        for j in range(4):
            window = padded[:, i : i + 3, j : j + 3]
            expected[:, i, j] = np.einsum("nuvc,uvco->no", window, kernel)
    np.testing.assert_array_equal(convolve(jnp.asarray(x), jnp.asarray(kernel), 1), expected)
    last = convolve(jnp.asarray(x).transpose(3, 1, 2, 0), jnp.asarray(kernel), 1, images_last=True)
    np.testing.assert_array_equal(last.transpose(3, 1, 2, 0), expected)


@pytest.mark.parametrize("cached", [1, 2 * 360, 2 * 21168])
@pytest.mark.parametrize(("channels", "features"), [(2, 3), (48, 56)])
def test_splitting_images_into_chunks_changes_nothing(monkeypatch, channels, features, cached):
    x, kernel = _case(6, 5, 4, channels, features, 3)
    monkeypatch.setattr(products, "_CACHED", cached)
    monkeypatch.setattr(onednn, "takes", lambda a, b: False)
    ours = with_gradients(convolve, x, kernel, 1, 1, False)
    _assert_trees_equal(ours, with_gradients(plain, x, kernel, 1, 1, False))


@pytest.mark.parametrize(("cached", "chunks"), [(1, 6), (7, 6), (14, 3), (35, 2), (100, 1)])
def test_chunks_are_equal_and_as_large_as_the_cache_allows(monkeypatch, cached, chunks):
    monkeypatch.setattr(products, "_CACHED", cached)
    assert products._chunks(6, 7) == chunks


def _descend(function, images_last):
    def step(kernel, x):
        gradient = jax.grad(lambda k: (function(x, k, 1, 1, images_last) ** 2).mean())
        return kernel - 0.01 * gradient(kernel)

    return step


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.usefixtures("library")
def test_convolution_trains_the_same_in_loops(images_last):
    x, kernel = normal(1, 3, 4, 4, 5, 2), normal(2, 3, 3, 2, 3)
    x = x.transpose(0, 4, 2, 3, 1) if images_last else x
    step, plain_step = (_descend(each, images_last) for each in (convolve, plain))
    expected = kernel
    for i in range(3):
        expected = jax.jit(plain_step)(expected, x[i])
    assert float(jnp.abs(expected - kernel).max()) > 1e-2
    in_fori = jax.jit(lambda k: lax.fori_loop(0, 3, lambda i, k: step(k, x[i]), k))(kernel)
    in_scan = jax.jit(lambda k: lax.scan(lambda k, x: (step(k, x), None), k, x)[0])(kernel)
    np.testing.assert_allclose(in_fori, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(in_scan, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
@pytest.mark.usefixtures("library")
def test_convolution_under_vmap_is_one_after_the_other(images_last, axes):
    xs, kernels = integers(1, 3, 4, 5, 6, 4), integers(2, 3, 3, 3, 4, 2)
    xs = xs if axes[0] == 0 else xs[0]
    kernels = kernels if axes[1] == 0 else kernels[0]
    if images_last:
        xs = jnp.moveaxis(xs, (-4, -1), (-1, -4))
    weight = integers(3, *((2, 5, 6, 4) if images_last else (4, 5, 6, 2)))

    def total(function, x, kernel):
        y = function(x, kernel, 1, 1, images_last)
        return (y * weight).sum(), y

    run = jax.grad(total, (1, 2), has_aux=True)
    together = jax.jit(jax.vmap(partial(run, convolve), in_axes=axes))(xs, kernels)
    alone = jax.jit(partial(run, plain))
    for i in range(3):
        expected = alone(xs[i] if axes[0] == 0 else xs, kernels[i] if axes[1] == 0 else kernels)
        _assert_trees_equal(jax.tree.map(lambda v, i=i: v[i], together), expected)


@pytest.mark.usefixtures("library")
def test_a_gradient_through_vmapped_convolutions_sums_over_the_shared_kernel():
    xs, kernel = integers(1, 3, 2, 5, 5, 2), integers(2, 3, 3, 2, 3)
    found = jax.grad(lambda k: jax.vmap(lambda x: convolve(x, k))(xs).sum())
    expected = jax.grad(lambda k: plain(xs.reshape(6, 5, 5, 2), k, 0, 1, False).sum())
    np.testing.assert_allclose(jax.jit(found)(kernel), jax.jit(expected)(kernel), atol=1e-3)


@pytest.mark.parametrize("images_last", [False, True])
def test_the_convolution_layer_adds_its_bias_to_each_channel(images_last):
    x = integers(1, 2, 5, 5, 3)
    x = x.transpose(3, 1, 2, 0) if images_last else x
    layer = Conv(4, padding=1, images_last=images_last)
    params = layer.init(jax.random.key(0), x)["params"]
    assert not params["bias"].any()
    bound = 1 / np.sqrt(27)
    assert 0.8 * bound < float(jnp.abs(params["kernel"]).max()) <= bound
    bias = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    y = layer.apply({"params": {**params, "bias": bias}}, x)
    without = plain(x, params["kernel"], 1, 1, images_last)
    added = jnp.moveaxis(y - without, 0 if images_last else -1, -1)
    np.testing.assert_allclose(added, jnp.broadcast_to(bias, added.shape), atol=1e-4)


def _reduce_window(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 6, 3), (3, 4, 5, 2), (1, 7, 3, 4)])
def test_pooling_and_its_gradient_equal_a_window_reduction(shape):
    size = int(np.prod(shape))
    # All different: no ties.
    x = jnp.asarray(np.random.default_rng(0).permutation(size) - size / 2, jnp.float32)
    x = x.reshape(shape)
    np.testing.assert_array_equal(max_pool(x), _reduce_window(x))
    weight = integers(1, *_reduce_window(x).shape)
    ours, theirs = (
        jax.jit(jax.grad(lambda x, f=f: (f(x) * weight).sum()))(x)
        for f in (max_pool, _reduce_window)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_one_pixel_of_a_window_has_the_gradient_the_first_where_values_tie():
    gradient = jax.jit(jax.grad(lambda x: 8 * max_pool(x).sum()))

    def of(*window):
        x = jnp.asarray(window, jnp.float32).reshape(1, 2, 2, 1)
        return gradient(x).reshape(-1).tolist()

    assert of(5, 5, 5, 5) == [8, 0, 0, 0]
    assert of(0, 1, 0, 1) == [0, 8, 0, 0]
    assert of(0, 0, 1, 1) == [0, 0, 8, 0]
    assert of(0, 1, 1, 0) == [0, 8, 0, 0]
    assert of(0, 1, 0, 2) == [0, 0, 0, 8]
    assert of(-1, -2, -3, -4) == [8, 0, 0, 0]


def test_pooling_what_a_compiler_may_compute_anew_has_a_finite_gradient():
    # Compared with the stored result, a value computed anew and rounded otherwise is none of it.
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
    scale = jax.random.normal(jax.random.key(1), (1, 1, 1, 16))
    found = jax.jit(jax.grad(lambda s: max_pool(jnp.tanh(x * s + 0.1) * 1.7 - s).sum()))(scale)
    plain = jax.grad(lambda s: nn.max_pool(jnp.tanh(x * s + 0.1) * 1.7 - s, (2, 2), (2, 2)).sum())(
        scale
    )
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsampling_repeats_pixels_and_sums_their_gradients(factor):
    x = integers(0, 2, 3, 4, 5)
    expected = np.repeat(np.repeat(x, factor, 1), factor, 2)
    np.testing.assert_array_equal(upsample(x, factor), expected)
    weight = integers(1, *expected.shape)
    gradient = jax.jit(jax.grad(lambda x: (upsample(x, factor) * weight).sum()))(x)
    windows = weight.reshape(2, 3, factor, 4, factor, 5)
    np.testing.assert_array_equal(gradient, windows.sum((2, 4)))


def test_normalization_by_hand():
    # Channels 1, 3, 5, 7 and 0, 0, 0, 4: means 4 and 1, variances 5 and 3.
    x = jnp.asarray([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [7.0, 4.0]])
    scale, bias = jnp.asarray([2.0, -1.0]), jnp.asarray([0.5, 1.0])
    y, mean, variance = normalize(x, scale, bias, -1, 1.0)
    np.testing.assert_allclose(mean, [4, 1], rtol=1e-6)
    np.testing.assert_allclose(variance, [5, 3], rtol=1e-6)
    first = [2 * v / 6**0.5 + 0.5 for v in (-3, -1, 1, 3)]
    second = [-v / 2 + 1 for v in (-1, -1, -1, 3)]
    np.testing.assert_allclose(y, np.transpose([first, second]), rtol=1e-5)
    transposed = normalize(x.T, scale, bias, 0, 1.0)
    np.testing.assert_allclose(transposed[0], y.T, rtol=1e-6)
    np.testing.assert_allclose(transposed[1], mean, rtol=1e-6)


def test_normalization_of_a_constant_is_the_bias():
    y, _, variance = normalize(jnp.full((7, 2), 3.3), jnp.ones(2), jnp.asarray([1.0, 2]), -1, 1e-5)
    np.testing.assert_allclose(variance, [0, 0], atol=1e-5)
    np.testing.assert_allclose(y, np.tile([1.0, 2.0], (7, 1)), atol=1e-2)


def _plain_normalize(x, scale, bias, axis, epsilon):
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean = x.mean(axes, keepdims=True)
    variance = ((x - mean) ** 2).mean(axes, keepdims=True)
    scale, bias = jnp.expand_dims(scale, axes), jnp.expand_dims(bias, axes)
    return scale * (x - mean) / jnp.sqrt(variance + epsilon) + bias


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_normalizations_gradients_equal_those_of_a_plain_formula(axis, epsilon):
    x = 2 * normal(0, 3, 4, 5, 3) + 1.5
    scale, bias, weight = normal(1, 3), normal(2, 3), normal(3, *x.shape)

    def total(function, *arguments):
        y = function(*arguments, axis, epsilon)
        return (y * weight).sum(), y

    run = jax.jit(jax.grad(total, (1, 2, 3), has_aux=True), static_argnums=0)
    ours = run(lambda *a: normalize(*a)[0], x, scale, bias)
    theirs = run(_plain_normalize, x, scale, bias)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert all(float(jnp.abs(each).max()) > 0.1 for each in jax.tree.leaves(theirs))


@pytest.mark.parametrize("axis", [0, -1])
def test_normalizations_gradients_equal_finite_differences(axis):
    x, scale, bias = normal(0, 2, 5, 2), normal(1, 2), normal(2, 2)
    function = jax.jit(lambda *a: normalize(*a, axis, 0.1)[0])
    check_grads(function, (x, scale, bias), 1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_no_gradient_flows_through_the_statistics():
    def total(x):
        _, mean, variance = normalize(x, jnp.ones(2), jnp.zeros(2), -1, 1e-5)
        return (mean + 3 * variance).sum()

    assert not jax.grad(total)(normal(0, 6, 2)).any()


def test_running_averages_by_hand():
    x = jnp.asarray([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [7.0, 4.0]])
    layer = BatchNorm(momentum=0.75)
    variables = layer.init(jax.random.key(0), x, train=True)
    assert variables["batch_stats"]["mean"].tolist() == [0, 0]
    assert variables["batch_stats"]["var"].tolist() == [1, 1]
    _, changed = layer.apply(variables, x, train=True, mutable="batch_stats")
    np.testing.assert_allclose(changed["batch_stats"]["mean"], [1, 0.25], rtol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["var"], [2, 1.5], rtol=1e-6)
    _, again = layer.apply({**variables, **changed}, x, train=True, mutable="batch_stats")
    np.testing.assert_allclose(again["batch_stats"]["mean"], [1.75, 0.4375], rtol=1e-6)
    np.testing.assert_allclose(again["batch_stats"]["var"], [2.75, 1.875], rtol=1e-6)


def test_evaluation_normalizes_with_the_running_averages_and_keeps_them():
    layer = BatchNorm(epsilon=1.0)
    variables = {
        "params": {"scale": jnp.asarray([2.0, 1.0]), "bias": jnp.asarray([0.0, 10.0])},
        "batch_stats": {"mean": jnp.asarray([1.0, -1.0]), "var": jnp.asarray([3.0, 15.0])},
    }
    x = jnp.asarray([[1.0, 3.0], [5.0, -1.0]])
    y, changed = layer.apply(variables, x, train=False, mutable="batch_stats")
    np.testing.assert_allclose(y, [[0, 11], [4, 10]], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(changed["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("axis", [0, -1])
def test_batch_norm_equals_flaxs(axis):
    x = 2 * normal(0, 3, 4, 4, 3) + 1
    ours, variables = BatchNorm(axis=axis), None
    kinds = [(ours, {"train": True}, {"train": False})]
    flax = nn.BatchNorm(axis=axis, momentum=0.9, epsilon=1e-5)
    kinds.append((flax, {"use_running_average": False}, {"use_running_average": True}))
    found = []
    for layer, train, evaluate in kinds:
        variables = layer.init(jax.random.key(0), x, **train)
        params = {"scale": normal(1, 3), "bias": normal(2, 3)}
        assert set(variables["params"]) == set(params)
        results = []
        stats = variables["batch_stats"]
        for factor in (1.0, 3.0):
            y, changed = layer.apply(
                {"params": params, "batch_stats": stats}, factor * x, mutable="batch_stats", **train
            )
            stats = changed["batch_stats"]
            results.append(y)
        results.append(layer.apply({"params": params, "batch_stats": stats}, x, **evaluate))
        found.append((results, dict(stats)))
    _assert_trees_equal(*found, tolerance=2e-5)
    assert set(found[0][1]) == {"mean", "var"}


def _drop(rate, x, key, train=True):
    return Dropout(rate).apply({}, x, train=train, rngs={"dropout": key})


def test_dropout_at_rate_zero_and_in_evaluation_is_the_identity():
    x = normal(0, 50)
    assert jnp.array_equal(_drop(0.0, x, jax.random.key(0)), x)
    assert jnp.array_equal(_drop(0.5, x, jax.random.key(0), train=False), x)
    assert jnp.array_equal(Dropout(0.5).apply({}, x, train=False), x)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_what_it_keeps(rate):
    x = jnp.abs(normal(0, 100, 400)) + 1
    y = _drop(rate, x, jax.random.key(3))
    kept = y != 0
    # Five standard deviations of a binomial's share.
    assert abs(float(kept.mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / x.size) ** 0.5
    np.testing.assert_array_equal(y[kept], (x / (1 - rate))[kept])
    assert kept.any(axis=0).all()
    assert not kept.all(axis=1).any()


def test_dropout_drops_the_same_values_in_either_layout():
    x, key = normal(0, 2, 3, 4, 5), jax.random.key(0)
    last = Dropout(0.5).apply({}, x.transpose(3, 1, 2, 0), train=True, rngs={"dropout": key})
    counted = Dropout(0.5, (3, 1, 2, 0)).apply({}, x, train=True, rngs={"dropout": key})
    np.testing.assert_array_equal(counted, last.transpose(3, 1, 2, 0))
    assert not np.array_equal(counted, _drop(0.5, x, key))


def test_dropout_passes_the_gradient_of_what_it_keeps_only():
    x = jnp.abs(normal(0, 1000)) + 1
    gradient = jax.grad(lambda x: _drop(0.75, x, jax.random.key(1)).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.where(_drop(0.75, x, jax.random.key(1)) > 0, 4, 0))


def test_masks_differ_between_keys_and_steps_and_not_for_one_key():
    x = jnp.ones(4000)
    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(3)]
    keys.append(jax.random.key(1))
    masks = np.stack([_drop(0.5, x, key) > 0 for key in keys])
    for i in range(4):
        np.testing.assert_array_equal(_drop(0.5, x, keys[i]) > 0, masks[i])
        for j in range(i):
            # Independent masks agree in half of the places.
            assert abs((masks[i] == masks[j]).mean() - 0.5) < 0.05


def test_two_dropouts_of_a_network_have_different_masks():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dropout(0.5)(x, train=True), Dropout(0.5)(x, train=True)

    a, b = Twice().apply({}, jnp.ones(4000), rngs={"dropout": jax.random.key(0)})
    assert abs(float((a == b).mean()) - 0.5) < 0.05


def test_masks_are_the_same_under_vmap_and_in_loops_as_alone():
    x, keys = normal(0, 3, 70), jax.random.split(jax.random.key(0), 4)
    alone = jnp.stack([_drop(0.3, x, key) for key in keys])
    together = jax.jit(jax.vmap(lambda key: _drop(0.3, x, key)))(keys)
    looped = jax.jit(lambda keys: lax.map(lambda key: _drop(0.3, x, key), keys))(keys)
    np.testing.assert_array_equal(together != 0, alone != 0)
    np.testing.assert_array_equal(looped != 0, alone != 0)
    np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_rates_outside_the_range_are_refused(rate):
    with pytest.raises(ValueError, match=rf"dropout rate is {rate}; it should be in \[0, 1\)"):
        Dropout(rate)


@pytest.mark.parametrize("rate", [1 - 2**-20, 1 - 2**-40])
def test_a_dropout_rate_just_below_one_drops_all_but_a_few(rate):
    y = _drop(rate, jnp.ones(1000), jax.random.key(0))
    assert float((y != 0).mean()) < 0.01


def _signs(bits):
    bits = np.asarray(bits).reshape(-1) >> np.arange(32, dtype=np.uint32)[:, None]
    return 2 * (bits & 1).astype(np.float32) - 1


def test_each_random_bit_is_one_half_of_the_time():
    for seed in (0, 1, 12345):
        signs = _signs(random_bits(jax.random.key(seed), (256, 256)))
        assert np.abs(signs.mean(1)).max() < 5 / 256


def test_random_bits_of_neighbours_and_of_following_keys_are_uncorrelated():
    n = 2**14
    for k in (0, 41):
        here = _signs(random_bits(jax.random.key(k), (n,)))
        following = _signs(random_bits(jax.random.key(k + 1), (n,)))
        for lag in (1, 16):
            assert np.abs(here[:, lag:] @ here[:, :-lag].T / n).max() < 5.5 / n**0.5
        assert np.abs(here @ following.T / n).max() < 5.5 / n**0.5
        between = here @ here.T / n - np.eye(32)
        assert np.abs(between).max() < 5.5 / n**0.5


def test_random_bits_depend_on_the_position_and_on_both_words_of_the_key():
    shape = (5, 7)
    bits = random_bits(jax.random.key(3), shape)
    assert bits.dtype == jnp.uint32
    assert jnp.array_equal(bits.reshape(-1), random_bits(jax.random.key(3), (35,)))
    for words in ([1, 3], [0, 4], [3, 0]):
        key = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32))
        assert float((random_bits(key, shape) == bits).mean()) < 0.1


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="given uint8 values; scale images to floats first"):
        Conv(2).init(jax.random.key(0), jnp.ones((1, 4, 4, 3), jnp.uint8))
