"""The auxiliary classifier of GoogLeNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import normal, random_like, shape, shapes_of

from sire_jax.heads.classifier import ConvolutionalClassifier


def _classifier():
    return ConvolutionalClassifier(("x",), classes=3, width=2, hidden=5, dropout=0.7)


def _by_hand(variables, x):
    variables = jax.tree.map(np.asarray, variables)
    p, s = variables["params"], variables["batch_stats"]["unit"]["norm"]
    y = x @ p["unit"]["conv"]["kernel"][0, 0]
    y = (y - s["mean"]) / np.sqrt(s["var"] + 1e-5)
    y = np.maximum(y * p["unit"]["norm"]["scale"] + p["unit"]["norm"]["bias"], 0)
    for name in ("hidden", "output"):
        y = y.reshape(len(y), -1) @ p[name]["kernel"] + p[name]["bias"]
        y = np.maximum(y, 0) if name == "hidden" else y
    return y


def test_of_4_x_4_features_nothing_is_pooled():
    head = _classifier()
    variables = random_like(shapes_of(head, shape(2, 4, 4, 3)))
    x = normal(1, 2, 4, 4, 3)
    expected = _by_hand(variables, np.asarray(x))
    np.testing.assert_allclose(head.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.optax_dtypes
def test_of_14_x_14_features_windows_of_5_x_5_are_averaged():
    head = _classifier()
    variables = random_like(shapes_of(head, shape(2, 14, 14, 3)))
    # (14 - 5) / 3 + 1 = 4 windows of each side.
    assert variables["params"]["hidden"]["kernel"].shape == (4 * 4 * 2, 5)
    x = normal(1, 2, 14, 14, 3)
    array = np.asarray(x)
    pooled = np.stack(
        [
            np.stack([array[:, i : i + 5, j : j + 5].mean((1, 2)) for j in (0, 3, 6, 9)], 1)
            for i in (0, 3, 6, 9)
        ],
        1,
    )
    np.testing.assert_allclose(
        head.apply(variables, x), _by_hand(variables, pooled), rtol=1e-4, atol=1e-5
    )


def test_of_14_x_14_features_no_dtype_changes_implicitly():
    shapes_of(_classifier(), shape(2, 14, 14, 3))


def test_half_precision_features_give_float32_logits():
    head = _classifier()
    variables = random_like(shapes_of(head, shape(2, 4, 4, 3, dtype=jnp.bfloat16)))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    x = normal(1, 2, 4, 4, 3)
    half = head.apply(variables, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, head.apply(variables, x), atol=0.1)
