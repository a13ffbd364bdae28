"""Tasks: what an example of a run is, an image or a pair of images.

A task draws examples as indices into a source, one draw a seed, and turns indices into a batch. The
images themselves are on the device once, whatever the number of runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sire_jax.data.dataset import Dataset, Source, stratified

# A source on the device: {"image": [n, h, w, c], "label": [n], …}
Arrays = Mapping[str, Array]


class Draw(NamedTuple):
    """The examples of one run, as indices into the source.

    Attributes:
        train: ``[n]`` or ``[n, 2]``, into the training images.
        validation: Likewise, into the training images.
        test: Likewise, into the test images.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it should be at least {least}.")


@dataclass(frozen=True)
class Images:
    """Examples are single images with their labels.

    >>> from sire_jax.data import load
    >>> draw = Images(validation_per_class=10).draw(load("digits"), seed=0)
    >>> draw.train.shape, draw.validation.shape, draw.test.shape
    ((1098,), (100,), (599,))

    Attributes:
        validation_per_class: Training images of each class taken aside for validation.
    """

    validation_per_class: int = 0

    def __post_init__(self) -> None:
        _check_least("validation_per_class", self.validation_per_class, 0)

    def classes(self, labels: Mapping[str, int]) -> dict[str, int]:
        """Returns the number of classes of each target, given those of each kind of label."""
        return dict(labels)

    def examples(self, images: int, labels: Mapping[str, int]) -> int:
        """Returns the number of training examples of so many training images."""
        return images - self.validation_per_class * labels["label"]

    def draw(self, dataset: Dataset, seed: int) -> Draw:
        """Splits the training images; see ``stratified`` for what is raised."""
        test = np.arange(len(dataset.test), dtype=np.int32)
        if not self.validation_per_class:
            # Without the labels: for those of records all files would have to be read.
            return Draw(np.arange(len(dataset.train), dtype=np.int32), test[:0], test)
        labels = dataset.train.labels["label"]
        return Draw(*stratified(labels, self.validation_per_class, seed), test)

    def prepare(self, source: Source) -> dict[str, np.ndarray]:
        """Returns the arrays that go to the device."""
        return {"image": source.image, **source.labels}

    def batch(self, arrays: Arrays, examples: Array) -> dict[str, Array]:
        """Looks examples up.

        Args:
            arrays: The source on the device.
            examples: Indices ``[b]``.

        Returns:
            ``{"image": [b, h, w, c], "label": [b], …}``.
        """
        return {key: values[examples] for key, values in arrays.items()}


@dataclass(frozen=True)
class Pairs:
    """Examples are pairs of images; is the first digit less than or equal to the second?

    Pairs are drawn anew for each seed, without replacement: no image is in two of them
    (Peeters and Schlyter, Sections I and III).

    >>> from sire_jax.data import load
    >>> digits, task = load("digits"), Pairs(train=500, test=250)
    >>> task.classes(digits.classes)
    {'digits': 10, 'label': 2}
    >>> task.draw(digits, seed=0).train.shape
    (500, 2)

    Attributes:
        train: Number of training pairs.
        test: Number of test pairs.
        validation: Number of validation pairs, of other training images.
        downscale: Side of the squares of pixels that are averaged; 2 makes 14 x 14 of 28 x 28.
    """

    train: int = 1000
    test: int = 1000
    validation: int = 0
    downscale: int = 1

    def __post_init__(self) -> None:
        for name in ("train", "test", "validation"):
            _check_least(name, getattr(self, name), 0)
        _check_least("downscale", self.downscale, 1)

    def classes(self, labels: Mapping[str, int]) -> dict[str, int]:
        """Returns the number of classes of each target, given those of each kind of label."""
        return {"digits": labels["label"], "label": 2}

    def examples(self, images: int, labels: Mapping[str, int]) -> int:
        """Returns the number of training pairs, whatever the number of images."""
        return self.train

    def draw(self, dataset: Dataset, seed: int) -> Draw:
        """Draws the pairs of one run.

        Args:
            dataset: Where the images come from.
            seed: Seed of the draw.

        Returns:
            Indices ``[pairs, 2]``.

        Raises:
            ValueError: If there are too few images for that many pairs.
        """
        generator = np.random.default_rng(seed)
        # Those of validation with those of training: no image is in both.
        drawn = [
            self._permute(split, len(source), pairs, generator)
            for split, source, pairs in (
                ("training", dataset.train, self.train + self.validation),
                ("test", dataset.test, self.test),
            )
        ]
        return Draw(drawn[0][: self.train], drawn[0][self.train :], drawn[1])

    def _permute(
        self, split: str, images: int, pairs: int, generator: np.random.Generator
    ) -> np.ndarray:
        if 2 * pairs > images:
            raise ValueError(
                f"{pairs} {split} pairs without replacement need {2 * pairs} images; the data set"
                f" has {images}. Take at most {images // 2}."
            )
        return generator.permutation(images)[: 2 * pairs].reshape(-1, 2).astype(np.int32)

    def prepare(self, source: Source) -> dict[str, np.ndarray]:
        """Returns the arrays that go to the device, images averaged over squares of pixels.

        Raises:
            ValueError: If squares of pixels do not divide the images.
        """
        image, side = source.image, self.downscale
        images, height, width, channels = image.shape
        if height % side or width % side:
            raise ValueError(f"Images of {height} x {width} can't be downscaled by {side}.")
        if side > 1:
            squares = image.reshape(images, height // side, side, width // side, side, channels)
            # Or NumPy would average bytes in float64.
            image = squares.mean((2, 4), dtype=np.float32)
        return {"image": image, "label": source.labels["label"]}

    def batch(self, arrays: Arrays, examples: Array) -> dict[str, Array]:
        """Looks pairs up.

        Args:
            arrays: The source on the device.
            examples: Indices ``[b, 2]``.

        Returns:
            ``{"image": [b, 2, h, w, c], "digits": [b, 2], "label": [b]}``; the label is 1 where
            the first digit is less than or equal to the second.
        """
        digits = arrays["label"][examples]
        return {"image": arrays["image"][examples], "digits": digits, "label": ordered(digits)}


def ordered(digits: Array) -> Array:
    """Compares digits.

    >>> ordered(jnp.array([[1, 2], [5, 5], [7, 3], [4, -1]])).tolist()
    [1, 1, 0, -1]

    Args:
        digits: ``[b, 2]``, integers; those that are none are negative.

    Returns:
        ``[b]``, int32: 1 where the first is at most the second, else 0; -1 where one is none.
    """
    order = (digits[:, 0] <= digits[:, 1]).astype(jnp.int32)
    return jnp.where((digits >= 0).all(1), order, -1)


TASKS = {"images": Images, "pairs": Pairs}
Task = Images | Pairs
