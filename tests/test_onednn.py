"""oneDNN's passes of a convolution, beside XLA's; where the extra can't be had, they skip."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sire_jax.layers import convolution, onednn
from sire_jax.layers.onednn import library

needs_onednn = pytest.mark.skipif(
    not library.load(), reason="oneDNN or a C++ compiler is not here: see the extra onednn"
)

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
]


def _integers(seed, shape, dtype=np.float32):
    """Small whole numbers, whose sums of products are exact in float32 in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), dtype)


def _lax(x, kernel, padding, stride):
    pads, layout = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)


def _case(b, h, w, c, o, k, padding, stride):
    """Returns images, kernel and gradients of results, and what XLA makes of them."""
    x, kernel = _integers(1, (b, h, w, c)), _integers(2, (k, k, c, o))
    y, transpose = jax.vjp(lambda x, kernel: _lax(x, kernel, padding, stride), x, kernel)
    dy = _integers(3, y.shape)
    return (x, kernel, dy), (y, *transpose(dy))


def _passes(x, kernel, dy, padding, stride):
    return (
        onednn.forward(x, kernel, stride, padding),
        onednn.to_images(dy, kernel, x.shape[1:3], stride, padding),
        onednn.to_kernel(x, dy, len(kernel), stride, padding),
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


@needs_onednn
def test_devices_that_share_a_batch_convolve_their_own_images():
    (x, kernel, dy), expected = _case(4, 6, 6, 3, 5, 3, 1, 1)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    own = NamedSharding(mesh, PartitionSpec("data"))
    arrays = jax.device_put(x, own), kernel, jax.device_put(dy, own)
    compiled = jax.jit(lambda *arrays: _passes(*arrays, 1, 1)).lower(*arrays).compile()
    assert "all-gather" not in compiled.as_text()
    for found, right in zip(compiled(*arrays), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    # Likewise where a program sees one device's part.
    alone = jax.shard_map(
        lambda x, kernel, dy: _passes(x, kernel, dy, 1, 1)[:2],
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    for found, right in zip(jax.jit(alone)(*arrays), expected, strict=False):
        np.testing.assert_array_equal(found, right)


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
        onednn.forward(x, kernel, 1, 0)


@needs_onednn
def test_what_does_not_fit_together_is_refused_before_it_is_read():
    x, kernel, dy = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 2)), jnp.ones((2, 4, 4, 2))
    for call in (
        lambda: onednn.forward(x[..., :2], kernel, 1, 1),
        lambda: onednn.forward(x.astype(jnp.bfloat16), kernel, 1, 1),
        lambda: onednn.forward(x[0], kernel, 1, 1),
        lambda: onednn.to_images(dy[..., :1], kernel, (4, 4), 1, 1),
        lambda: onednn.to_kernel(x[:1], dy, 3, 1, 1),
    ):
        with pytest.raises(ValueError, match=r"images \[n, h, w, c\].* are not two of them"):
            call()


@needs_onednn
def test_of_no_images_there_are_no_results():
    (x, kernel, dy), _ = _case(2, 4, 4, 3, 2, 3, 1, 1)
    y, dx, dkernel = jax.jit(lambda x, dy: _passes(x, kernel, dy, 1, 1))(x[:0], dy[:0])
    assert (y.shape, dx.shape) == ((0, 4, 4, 2), (0, 4, 4, 3))
    np.testing.assert_array_equal(dkernel, jnp.zeros((3, 3, 3, 2)))


@needs_onednn
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_convolutions_are_onednns_but_where_one_counts_them(dtype):
    x, kernel = jnp.ones((2, 4, 4, 3), dtype), jnp.ones((3, 3, 3, 2), dtype)
    traced = str(jax.make_jaxpr(lambda x, k: convolution.convolve(x, k, 1))(x, kernel))
    assert library.TARGET in traced
    with convolution.whole():
        traced = str(jax.make_jaxpr(lambda x, k: convolution.convolve(x, k, 1))(x, kernel))
    assert library.TARGET not in traced


def test_the_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "0")
    assert not library.load.__wrapped__()


def test_without_the_extra_it_is_off(monkeypatch):
    monkeypatch.setitem(library._PACKAGES, "libdnnl.so.3", "no-such-package")
    assert not library.load.__wrapped__()


@needs_onednn
def test_without_a_compiler_it_is_off_and_says_how_to_mend_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_shipped", lambda: None)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match=rf"C\+\+ compiler.*{library.SWITCH}=0.*none"):
        assert not library.load.__wrapped__()
    assert not list(tmp_path.rglob("*.so"))


@needs_onednn
def test_what_does_not_compile_says_what_the_compiler_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_shipped", lambda: None)
    source = tmp_path / "convolution.cc"
    source.write_text("int broken(")
    monkeypatch.setattr(library, "SOURCE", source)
    with pytest.warns(UserWarning, match="(?s)can't be built.*broken"):
        assert not library.load.__wrapped__()


@needs_onednn
@pytest.mark.slow  # pip, and a compiler.
def test_a_wheel_built_beside_onednn_needs_no_compiler(tmp_path):
    root, source, made = Path(library.__file__).parents[3], tmp_path / "source", tmp_path / "made"
    # A copy, as pip leaves files in the directory that it builds.
    for name in ("sire_jax", "configs"):
        shutil.copytree(root / name, source / name)
    for name in ("setup.py", "setup.cfg", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "-w", made, source], check=True)
    (wheel,) = made.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(made)
    load = "from sire_jax.layers import onednn; assert onednn.load()"
    nowhere = {"CXX": "no-compiler", "PYTHONPATH": str(made), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**os.environ, **nowhere}
    subprocess.run([sys.executable, "-c", load], check=True, env=environment, cwd=made)
    assert not (tmp_path / "sire_jax").exists()
