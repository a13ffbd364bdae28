"""Batches as a network sees them: examples looked up, with targets, scaled and cropped."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from sire_jax.data import crops
from sire_jax.groups import Groups


def ready(
    data: ConfigDict, groups: Mapping[str, Groups], batch: Mapping[str, Array]
) -> dict[str, Array]:
    """Makes a batch ready for the network, but for its crops.

    Args:
        data: The section ``config.data``.
        groups: Groups of the labels, by the target that they are.
        batch: A batch of a task, with images as the source has them.

    Returns:
        The batch with scaled and normalized images, and the group of each label.
    """
    targets = {name: partition.of(batch["label"]) for name, partition in groups.items()}
    return {**batch, **targets, "image": prepare(batch["image"].astype(jnp.float32), data)}


def crop(batch: dict[str, Array], side: int, ten: bool = False) -> dict[str, Array]:
    """Takes the central crop or all ten of the images of a batch; a ``side`` of 0: no crop.

    >>> crop({"image": np.zeros((2, 8, 8, 3))}, 6)["image"].shape
    (2, 6, 6, 3)
    """
    if not side:
        return batch
    cropped = crops.ten if ten else crops.central
    return {**batch, "image": cropped(batch["image"], side)}


def prepare(pixels: Any, data: ConfigDict) -> Any:
    """Scales pixels ``[…, c]`` and normalizes them: ``(scale x - mean) / std``, float32.

    >>> data = ConfigDict({"scale": 1 / 255, "mean": (0.5,), "std": (0.25,)})
    >>> prepare(np.array([[0.0], [255.0]], np.float32), data).tolist()
    [[-2.0], [2.0]]
    """
    image = pixels * np.float32(data.scale)
    # As many axes as the image has, as tests and users may forbid that ranks are promoted.
    shape = (1,) * (image.ndim - 1) + (-1,)
    if data.mean:
        image = image - np.asarray(data.mean, np.float32).reshape(shape)
    if data.std:
        image = image / np.asarray(data.std, np.float32).reshape(shape)
    return image


def image_range(data: ConfigDict) -> tuple[float, float]:
    """Returns the smallest and the largest value of an image whose pixels are in 0..255.

    Args:
        data: The section ``config.data``.
    """
    extremes = prepare(np.array([[0.0], [255.0]], np.float32).repeat(data.shape[-1], 1), data)
    return float(extremes.min()), float(extremes.max())
