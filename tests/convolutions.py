"""Convolutions as XLA makes them, and whole numbers on which others equal them to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def integers(seed, *shape):
    """Small whole numbers, whose sums of products are exact in float32 in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), jnp.float32)


def plain(x, kernel, padding, stride=1, images_last=False):
    """What ``convolve`` computes, as one operation of XLA's."""
    x = jnp.transpose(x, (3, 1, 2, 0)) if images_last else x
    pads, layout = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)
    return jnp.transpose(y, (3, 1, 2, 0)) if images_last else y


def with_gradients(function, x, kernel, *arguments):
    """Returns a convolution, and the gradients of a weighted sum of it by images and kernel."""
    y = jax.eval_shape(lambda x, k: function(x, k, *arguments), x, kernel)
    weight = integers(7, *y.shape).astype(y.dtype)

    def total(x, kernel):
        y = function(x, kernel, *arguments)
        return (y * weight).sum(), y

    gradients, y = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, kernel)
    return y, *gradients
