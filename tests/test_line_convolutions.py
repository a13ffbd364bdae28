"""Convolutions along one axis, and means of windows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import integers, plain, with_gradients
from planned import normal

from sire_jax import traced
from sire_jax.layers import convolution
from sire_jax.layers.convolution import convolve_line
from sire_jax.layers.pooling import local_mean


def _whole(x, kernel, axis):
    with convolution.whole():
        return convolve_line(x, kernel, axis)


def _square(x, kernel, axis):
    """The same as a square convolution: the kernel in the middle row or column of zeros."""
    size, p = len(kernel), len(kernel) // 2
    square = jnp.zeros((size, size, *kernel.shape[1:]), kernel.dtype)
    square = square.at[p].set(kernel) if axis == 2 else square.at[:, p].set(kernel)
    return plain(x, square, p)


# batch, height, width, channels, features, kernel; the last is longer than a side.
CASES = [(2, 4, 5, 3, 2, 3), (1, 5, 3, 2, 4, 1), (2, 2, 4, 2, 3, 7)]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("b", "h", "w", "c", "o", "k"), CASES)
def test_a_convolution_along_an_axis_and_its_gradients_equal_xlas(b, h, w, c, o, k, axis):
    x, kernel = integers(1, b, h, w, c), integers(2, k, c, o)
    found = with_gradients(convolve_line, x, kernel, axis)
    assert found[0].shape == (b, h, w, o)
    for other in (_whole, _square):
        chex.assert_trees_all_equal(found, with_gradients(other, x, kernel, axis))


@pytest.mark.parametrize("axis", [1, 2])
def test_a_convolution_along_an_axis_is_the_formula(axis):
    x, kernel = np.asarray(integers(1, 2, 4, 5, 3)), np.asarray(integers(2, 3, 3, 2))
    expected = np.zeros((2, 4, 5, 2))
    for i, j, u in np.ndindex(4, 5, 3):
        at = [i, j]
        at[axis - 1] += u - 1
        if min(at) >= 0 and at[0] < 4 and at[1] < 5:
            expected[:, i, j] += x[:, at[0], at[1]] @ kernel[u]
    found = convolve_line(jnp.asarray(x), jnp.asarray(kernel), axis)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_along_an_axis_half_precision_sums_in_single_precision(axis):
    # Sums of many products, above 256, where bfloat16 no longer has all whole numbers.
    x, kernel = integers(1, 2, 8, 6, 64), integers(2, 3, 64, 8)
    exact = with_gradients(convolve_line, x, kernel, axis)
    assert float(jnp.abs(exact[0]).max()) > 256
    narrow = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    for found, right in zip(with_gradients(convolve_line, *narrow, axis), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        # The sums are exact, and rounded once.
        np.testing.assert_array_equal(found, right.astype(jnp.bfloat16))


def test_a_whole_convolution_along_an_axis_is_one_operation():
    x, kernel = jnp.zeros((1, 4, 5, 3)), jnp.zeros((3, 3, 2))
    text = str(jax.make_jaxpr(lambda x, k: _whole(x, k, 1))(x, kernel))
    assert text.count("conv_general_dilated") == 1
    assert "conv_general" not in str(jax.make_jaxpr(lambda x, k: convolve_line(x, k, 1))(x, kernel))
    assert traced.multiply_adds(lambda x, k: convolve_line(x, k, 1), x, kernel) == 20 * 9 * 2


def test_a_convolution_along_an_axis_under_vmap_is_one_after_the_other():
    x, kernel = integers(1, 3, 2, 4, 5, 2), integers(2, 3, 3, 2, 3)
    found = jax.jit(jax.vmap(lambda x, k: convolve_line(x, k, 2)))(x, kernel)
    for i in range(3):
        np.testing.assert_array_equal(found[i], _square(x[i], kernel[i], 2))


def _mean_by_hand(x, size):
    half, result = size // 2, np.zeros(x.shape)
    for i, j in np.ndindex(x.shape[1:3]):
        rows, columns = slice(max(i - half, 0), i + half + 1), slice(max(j - half, 0), j + half + 1)
        result[:, i, j] = x[:, rows, columns].mean((1, 2))
    return result


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 4, 5, 3), 3), ((1, 5, 6, 2), 5), ((1, 2, 3, 1), 7), ((1, 1, 1, 2), 3)]
)
def test_means_of_windows_leave_out_what_is_outside(shape, size):
    x = normal(1, *shape)
    found = local_mean(x, size)
    np.testing.assert_allclose(found, _mean_by_hand(np.asarray(x, np.float64), size), atol=1e-6)
    np.testing.assert_allclose(local_mean(jnp.full(shape, 7.0), size), 7, rtol=1e-6)


def test_a_mean_of_single_pixels_changes_nothing():
    x = normal(2, 2, 3, 4, 2)
    np.testing.assert_array_equal(local_mean(x, 1), x)


def test_the_gradient_of_local_means_is_their_transpose():
    x, dy = normal(3, 1, 4, 3, 1), normal(4, 1, 4, 3, 1)
    (found,) = jax.vjp(lambda x: local_mean(x, 3), x)[1](dy)
    units = np.eye(12).reshape(12, 4, 3, 1)
    expected = (_mean_by_hand(units, 3) * np.asarray(dy)).sum((1, 2, 3)).reshape(1, 4, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    narrow = local_mean(x.astype(jnp.bfloat16), 3)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), local_mean(x, 3), atol=0.02)
