"""oneDNN's passes of a convolution, beside XLA's; where the extra can't be had, they skip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import integers, plain
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from sire_jax.backbones import PairBranches
from sire_jax.layers import convolution, onednn
from sire_jax.layers.convolution import convolve, prefers_images_last
from sire_jax.layers.onednn import library


@pytest.fixture(scope="module")
def _onednn(_compiled_together):
    if not library.load():
        pytest.skip("oneDNN or a C++ compiler is not here: see the extra onednn")


needs_onednn = pytest.mark.usefixtures("_onednn")

# batch, height, width, channels, features, kernel, padding, stride
CONVOLUTIONS = [
    (8, 16, 16, 8, 12, 3, 1, 1),
    (5, 7, 6, 2, 20, 3, 0, 2),
    (4, 9, 8, 3, 4, 7, 3, 2),
    (8, 8, 6, 4, 3, 5, 2, 1),
    (8, 5, 6, 3, 2, 1, 0, 2),
    (1, 3, 4, 2, 3, 1, 0, 1),
    (4, 8, 9, 16, 3, 3, 1, 3),
    (2, 4, 4, 48, 48, 3, 1, 1),
    # More padding than a kernel reaches.
    (2, 4, 5, 3, 2, 1, 2, 1),
    (2, 4, 5, 3, 2, 3, 4, 2),
]


def _case(b, h, w, c, o, k, padding, stride):
    """Returns images, kernel and gradients of results, and what XLA makes of them."""
    x, kernel = integers(1, b, h, w, c), integers(2, k, k, c, o)
    y, transpose = jax.vjp(lambda x, kernel: plain(x, kernel, padding, stride), x, kernel)
    dy = integers(3, *y.shape)
    return (x, kernel, dy), (y, *transpose(dy))


def _passes(x, kernel, dy, padding, stride):
    return (
        onednn.forward(x, kernel, padding, stride),
        onednn.to_images(dy, kernel, x.shape[1:3], padding, stride),
        onednn.to_kernel(x, dy, len(kernel), padding, stride),
    )


@needs_onednn
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_passes_equal_xlas_to_the_last_bit_of_whole_numbers(case, dtype):
    arrays, expected = _case(*case)
    narrow = [array.astype(dtype) for array in arrays]
    *found, to_kernel = jax.jit(lambda *arrays: _passes(*arrays, *case[-2:]))(*narrow)
    for y, right in zip(found, expected, strict=False):
        # Summed in single precision, and rounded once.
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, right.astype(dtype))
    assert to_kernel.dtype == jnp.float32
    np.testing.assert_array_equal(to_kernel, expected[2])


def _gradients(function, x, kernel):
    return jax.grad(lambda x, kernel: (function(x, kernel) ** 2).sum(), (0, 1))(x, kernel)


@needs_onednn
def test_what_was_linearized_once_is_transposed_for_each_loss_as_multiway_does():
    (x, kernel, dy), _ = _case(*CONVOLUTIONS[0])

    def passes(function):
        y, push = jax.linearize(lambda x, kernel: function(x, kernel, 1), x, kernel)
        return y, *(jax.linear_transpose(push, x, kernel)(weight * dy) for weight in (1, 3))

    found, expected = (
        jax.jit(passes, static_argnums=0)(function) for function in (convolve, plain)
    )
    chex.assert_trees_all_equal(found, expected)


@needs_onednn
@pytest.mark.parametrize("wrapper", ["shard_map", "pmap"])
def test_devices_convolve_their_own_images(wrapper):
    (x, kernel, _), _ = _case(4, 6, 6, 3, 5, 3, 1, 1)

    def summed(x):
        dx, dkernel = _gradients(lambda x, k: convolution.convolve(x, k, 1), x, kernel)
        return dx, lax.psum(dkernel, "data")

    if wrapper == "pmap":
        run = jax.pmap(summed, "data", out_axes=(0, None))
        x = x.reshape(2, 2, *x.shape[1:])
    else:
        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
        own = PartitionSpec("data")
        out = own, PartitionSpec()
        run = jax.jit(
            jax.shard_map(summed, mesh=mesh, in_specs=own, out_specs=out, check_vma=False)
        )
    assert library.TARGET in run.lower(x).as_text()
    dx, dkernel = run(x)
    expected = _gradients(lambda x, k: plain(x, k, 1, 1), x.reshape(4, 6, 6, 3), kernel)
    np.testing.assert_array_equal(dx.reshape(4, 6, 6, 3), expected[0])
    np.testing.assert_array_equal(dkernel, expected[1])


@needs_onednn
@pytest.mark.parametrize("images", [8, 5])
def test_programs_that_xla_splits_are_xlas(images):
    # Of five images on two devices each has three, one of which is none.
    (x, kernel, _), _ = _case(8, 6, 6, 3, 5, 3, 1, 1)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(
        lambda x, k: _gradients(lambda x, k: convolution.convolve(x[:images], k, 1), x, k)
    )
    assert library.TARGET not in run.lower(x, kernel).as_text()
    found, expected = run(x, kernel), _gradients(lambda x, k: plain(x, k, 1, 1), x[:images], kernel)
    np.testing.assert_array_equal(found[0][:images], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@needs_onednn
def test_many_at_once_end_and_are_right():
    # More than there are threads, which wait for each other's parts.
    (x, _, dy), (*_, expected) = _case(8, 8, 8, 4, 6, 3, 1, 1)
    scales = jnp.arange(1.0, 17.0)
    gradients = [onednn.to_kernel(x * scale, dy, 3, 1, 1) for scale in scales]
    run = jax.jit(lambda x: [onednn.to_kernel(x * scale, dy, 3, 1, 1) for scale in scales])
    for found, scale in zip([*gradients, *run(x)], [*scales, *scales], strict=True):
        np.testing.assert_array_equal(found, scale * expected)


@needs_onednn
def test_other_dtypes_are_refused():
    x, kernel = jnp.ones((1, 3, 3, 1), jnp.float16), jnp.ones((1, 1, 1, 1), jnp.float16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="float32 and bfloat16"):
        onednn.forward(x, kernel, 0, 1)


@needs_onednn
def test_what_does_not_fit_together_is_refused_before_it_is_read():
    x, kernel, dy = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 2)), jnp.ones((2, 4, 4, 2))
    for call in (
        lambda: onednn.forward(x[..., :2], kernel, 1, 1),
        lambda: onednn.forward(x.astype(jnp.bfloat16), kernel, 1, 1),
        lambda: onednn.forward(x[0], kernel, 1, 1),
        lambda: onednn.forward(x, kernel[:1], 1, 1),
        lambda: onednn.forward(x, kernel, 1, 0),
        lambda: onednn.to_images(dy[..., :1], kernel, (4, 4), 1, 1),
        lambda: onednn.to_images(dy, kernel, (4, 5), 1, 1),
        lambda: onednn.to_kernel(x[:1], dy, 3, 1, 1),
        lambda: onednn.to_kernel(x, dy, 5, 1, 1),
    ):
        with pytest.raises(ValueError, match=r"images \[n, h, w, c\].* don't fit together"):
            call()


@needs_onednn
def test_of_no_images_there_are_no_results():
    (x, kernel, dy), _ = _case(2, 4, 4, 3, 2, 3, 1, 1)
    y, dx, dkernel = jax.jit(lambda x, dy: _passes(x, kernel, dy, 1, 1))(x[:0], dy[:0])
    assert (y.shape, dx.shape) == ((0, 4, 4, 2), (0, 4, 4, 3))
    np.testing.assert_array_equal(dkernel, jnp.zeros((3, 3, 3, 2)))
    np.testing.assert_array_equal(
        onednn.forward(x[..., :0], kernel[:, :, :0], 1, 1), jnp.zeros((2, 4, 4, 2))
    )


@needs_onednn
@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")])
def test_convolutions_are_onednns_but_where_one_counts_them(monkeypatch, dtypes):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel = jnp.ones((2, 4, 4, 3), dtypes[0]), jnp.full((3, 3, 3, 2), 1.001, dtypes[1])
    traced = str(jax.make_jaxpr(lambda x, k: convolution.convolve(x, k, 1))(x, kernel))
    assert library.TARGET in traced
    # In the wider of two dtypes.
    assert ("bf16[2,4,4,2] = ffi_call" in traced) == (dtypes[1] == "bfloat16")
    with convolution.whole():
        whole = jax.make_jaxpr(lambda x, k: convolution.convolve(x, k, 1))(
            x, kernel.astype(x.dtype)
        )
    assert library.TARGET not in str(whole)


@needs_onednn
@pytest.mark.slow  # It compiles a network in either layout.
def test_a_network_of_pairs_is_the_same_with_images_last_and_in_onednns_layout(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    network, pairs = PairBranches(), integers(1, 6, 2, 14, 14, 1)
    variables = network.init(jax.random.key(0), pairs)

    def loss(params):
        key = {"dropout": jax.random.key(1)}
        (logits, endpoints), state = network.apply(
            {**variables, "params": params}, pairs, train=True, rngs=key, mutable=["batch_stats"]
        )
        return (logits**2).sum() + (endpoints["digits"] ** 2).sum(), (logits, state)

    def values_and_gradients():
        # A function of its own, so that it is traced anew.
        return jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(variables["params"])

    assert not prefers_images_last(pairs[:, 0])
    with_extra = values_and_gradients()
    monkeypatch.setattr(onednn, "load", lambda: False)
    assert prefers_images_last(pairs[:, 0])
    chex.assert_trees_all_close(values_and_gradients(), with_extra, rtol=1e-4, atol=1e-4)


def test_the_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "0")
    assert library._registered.__wrapped__() is None


def test_without_the_extra_it_is_off(monkeypatch):
    monkeypatch.setitem(library._PACKAGES, "libdnnl.so.3", "no-such-package")
    assert library._registered.__wrapped__() is None
    monkeypatch.setattr(library, "_registered", lambda: None)
    with pytest.raises(RuntimeError, match=r"pip install 'sire_jax\[onednn\]'"):
        onednn.forward(jnp.ones((1, 3, 3, 1)), jnp.ones((1, 1, 1, 1)), 0, 1)


@pytest.fixture
def nothing_kept(monkeypatch, tmp_path):
    """A cache without a library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sire_jax" / "onednn"


@needs_onednn
@pytest.mark.parametrize("compiler", ["no-compiler", "env no-compiler"])
def test_without_a_compiler_it_is_off_and_says_how_to_mend_it(monkeypatch, nothing_kept, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=rf"(?s)C\+\+ compiler.*{library.SWITCH}=0.*no-compiler"):
        assert library._registered.__wrapped__() is None
    assert not list(nothing_kept.iterdir())


@pytest.mark.slow  # It starts the tests in a process of their own.
def test_without_a_compiler_its_tests_skip():
    chosen = [__file__, "-k", "test_other_dtypes_are_refused"]
    command = [sys.executable, "-m", "pytest", "-n0", "-rs", *chosen]
    ran = subprocess.run(
        command, env={**os.environ, "CXX": "no-compiler"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout
    assert "a C++ compiler is not here" in ran.stdout


@needs_onednn
def test_what_does_not_compile_says_what_the_compiler_says(monkeypatch, nothing_kept, tmp_path):
    source = tmp_path / "convolution.cc"
    source.write_text("int broken(")
    monkeypatch.setattr(library, "SOURCE", source)
    with pytest.warns(UserWarning, match="(?s)can't be built.*broken"):
        assert library._registered.__wrapped__() is None


@needs_onednn
def test_where_others_can_write_no_library_is_loaded(nothing_kept):
    nothing_kept.mkdir(parents=True)
    nothing_kept.chmod(0o777)
    with pytest.warns(UserWarning, match="Others can write to"):
        assert library._registered.__wrapped__() is None


@needs_onednn
@pytest.mark.slow  # It compiles twice.
def test_a_damaged_library_is_built_anew(nothing_kept):
    nothing_kept.mkdir(parents=True)
    (nothing_kept / library.file_name()).write_bytes(b"damaged")
    library._found_or_built(library._installed("libdnnl.so.3"))
    assert (nothing_kept / library.file_name()).stat().st_size > 10_000


@needs_onednn
@pytest.mark.slow  # It compiles, and starts programs.
def test_a_package_with_a_built_library_needs_no_compiler(tmp_path):
    root = Path(library.__file__).parents[3]
    shutil.copytree(root / "sire_jax", tmp_path / "sire_jax")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    module = [sys.executable, "-m", "sire_jax.layers.onednn"]
    subprocess.run(module, check=True, env=environment, cwd=tmp_path)
    load = "from sire_jax.layers import onednn; assert onednn.load()"
    environment["CXX"] = "no-compiler"
    subprocess.run([sys.executable, "-c", load], check=True, env=environment, cwd=tmp_path)
    assert not list((tmp_path / "sire_jax" / "onednn").glob("*"))


@needs_onednn
@pytest.mark.slow  # It starts a program.
def test_processors_without_bfloat16_convolve_it_in_single_precision():
    program = """
import jax.numpy as jnp
from sire_jax.layers import onednn
from sire_jax.layers.convolution import convolve
assert onednn.load() and not onednn.library.has_bfloat16()
x, kernel = jnp.ones((1, 3, 3, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 1), jnp.bfloat16)
assert convolve(x, kernel, 1)[0, 1, 1, 0] == 18
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
