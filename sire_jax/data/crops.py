"""Crops: squares out of the images, which are then all that the network sees of them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array


def central(image: Array, side: int) -> Array:
    """Takes the central square of images.

    >>> import numpy as np
    >>> central(np.arange(16).reshape(1, 4, 4, 1), 2)[0, ..., 0].tolist()
    [[5, 6], [9, 10]]

    Args:
        image: ``[…, h, w, c]``.
        side: Of the square, in 1..min(h, w); of an odd rest the larger half is below and right.

    Returns:
        ``[…, side, side, c]``.
    """
    height, width = image.shape[-3:-1]
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side, :]


def ten(image: Array, side: int) -> Array:
    """Takes four corners and the centre of images, and the mirror images of these five.

    Krizhevsky, Sutskever and Hinton, *ImageNet Classification with Deep Convolutional Neural
    Networks* (2012), Section 4.1.

    >>> import jax
    >>> jax.eval_shape(lambda image: ten(image, 224), jnp.zeros((2, 256, 256, 3))).shape
    (2, 10, 224, 224, 3)

    Args:
        image: ``[b, …, h, w, c]``.
        side: Of the squares, in 1..min(h, w).

    Returns:
        ``[b, 10, …, side, side, c]``: top left, top right, bottom left, bottom right, centre; then
        the same five, mirrored left to right.
    """
    height, width = image.shape[-3:-1]
    down, right = height - side, width - side
    corners = [(0, 0), (0, right), (down, 0), (down, right)]
    squares = [image[..., i : i + side, j : j + side, :] for i, j in corners]
    five = jnp.stack([*squares, central(image, side)], axis=1)
    return jnp.concatenate([five, five[..., ::-1, :]], axis=1)


def averaged(apply: Callable[..., Any]) -> Callable[..., dict[str, Array]]:
    """Makes the evaluation of ten crops out of that of one.

    ``output_k = 1/10 sum_{i=1}^{10} output_k(crop_i)``, of logits, ahead of any softmax: one pass
    over ``[10 b, …]``.

    >>> import numpy as np
    >>> apply = averaged(lambda kernel, image: {"main": image.mean((1, 2)) @ kernel})
    >>> apply(np.ones((3, 100)), np.ones((2, 10, 8, 8, 3)))["main"].shape
    (2, 100)

    Args:
        apply: ``apply`` of a Flax network that returns named outputs ``[b, …]``.

    Returns:
        The same for images ``[b, 10, …, h, w, c]``; in evaluation mode only.
    """

    def apply_to_ten(variables: Any, image: Array, **settings: Any) -> dict[str, Array]:
        examples, crops = image.shape[:2]
        outputs = apply(variables, image.reshape(-1, *image.shape[2:]), **settings)
        return {
            name: logits.reshape(examples, crops, *logits.shape[1:]).mean(1)
            for name, logits in outputs.items()
        }

    return apply_to_ten
