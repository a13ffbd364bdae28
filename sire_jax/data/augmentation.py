"""Augmentation of a batch, on the device, under the step's own random key.

An augmentation maps ``(key, batch)`` to a batch of the same shapes, but for ``RandomCrop``. Images
are ``[b, …, h, w, c]``: each image of a pair is changed on its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates

from sire_jax.data.tasks import ordered
from sire_jax.text import nearest

Batch = dict[str, Array]
Augmentation = Callable[[Array, Batch], Batch]


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: probability is {value}; it should be in [0, 1].")


def _image_by_image(change: Callable[[Array, Array], Array], key: Array, image: Array) -> Array:
    """Applies ``change(key, [h, w, c])`` to every image of ``[b, …, h, w, c]``."""
    *examples, _, _, _ = image.shape
    images = image.reshape(-1, *image.shape[-3:])
    changed = jax.vmap(change)(jax.random.split(key, len(images)), images)
    return changed.reshape(*examples, *changed.shape[1:])


@dataclass(frozen=True)
class Swap:
    """Swaps the two images of a pair, with the target changed (Peeters and Schlyter, II.H).

    >>> digits = jnp.array([[1, 2]])
    >>> batch = {"image": jnp.zeros((1, 2, 8, 8, 1)), "digits": digits, "label": jnp.array([1])}
    >>> swapped = Swap(probability=1.0)(jax.random.key(0), batch)
    >>> swapped["digits"].tolist(), swapped["label"].tolist()
    ([[2, 1]], [0])

    Attributes:
        probability: Of swapping a pair.
    """

    probability: float = 0.5
    needs: ClassVar = ("image", "digits")

    def __post_init__(self) -> None:
        _check_probability("swap", self.probability)

    def __call__(self, key: Array, batch: Batch) -> Batch:
        """Swaps ``image`` and ``digits`` and computes ``label`` of the swapped digits."""
        swaps = jax.random.bernoulli(key, self.probability, batch["label"].shape)
        image, digits = batch["image"], batch["digits"]
        image = jnp.where(swaps[:, None, None, None, None], image[:, ::-1], image)
        digits = jnp.where(swaps[:, None], digits[:, ::-1], digits)
        return {**batch, "image": image, "digits": digits, "label": ordered(digits)}


@dataclass(frozen=True)
class Flip:
    """Mirrors images left to right.

    >>> image = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 4, 1)
    >>> Flip(probability=1.0)(jax.random.key(0), {"image": image})["image"].ravel().tolist()
    [3, 2, 1, 0]

    Attributes:
        probability: Of mirroring an image.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability("flip", self.probability)

    def __call__(self, key: Array, batch: Batch) -> Batch:
        """Mirrors ``image``."""
        image = batch["image"]
        flips = jax.random.bernoulli(key, self.probability, (*image.shape[:-3], 1, 1, 1))
        return {**batch, "image": jnp.where(flips, image[..., ::-1, :], image)}


# What NumPy calls them.
_BORDERS = {"zeros": "constant", "reflection": "reflect"}


@dataclass(frozen=True)
class Crop:
    """Shifts images by whole pixels.

    >>> image = jnp.ones((2, 8, 8, 3), jnp.uint8)
    >>> Crop(padding=2)(jax.random.key(0), {"image": image})["image"].shape
    (2, 8, 8, 3)

    Attributes:
        padding: The largest shift in each direction, in pixels.
        border: What comes in from outside: ``"zeros"``, or ``"reflection"``, the image mirrored at
            its outermost pixels.

    Raises:
        ValueError: If the padding is negative or there is no such border.
    """

    padding: int = 4
    border: str = "zeros"

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"crop: padding is {self.padding}; it should be at least 0.")
        if self.border not in _BORDERS:
            raise ValueError(f"crop: border is '{self.border}'.{nearest(self.border, _BORDERS)}")

    def __call__(self, key: Array, batch: Batch) -> Batch:
        """Crops ``image`` at random out of itself with its border.

        Raises:
            ValueError: If an image is too small to be reflected that far.
        """
        image = batch["image"]
        if self.border == "reflection" and self.padding >= min(image.shape[-3:-1]):
            raise ValueError(
                f"crop: padding is {self.padding}, but images of {image.shape[-3]} x"
                f" {image.shape[-2]} can be reflected by at most {min(image.shape[-3:-1]) - 1}."
            )
        return {**batch, "image": _image_by_image(self._crop, key, image)}

    def _crop(self, key: Array, image: Array) -> Array:
        pad = self.padding
        start = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=_BORDERS[self.border])
        return jax.lax.dynamic_slice(padded, (start[0], start[1], 0), image.shape)


@dataclass(frozen=True)
class RandomCrop:
    """Takes a square out of images, any place of it being as likely.

    It comes with ``config.data.crop``, as evaluation has to take squares of the same side; it is
    applied ahead of the augmentations.

    >>> batch = {"image": jnp.ones((2, 8, 8, 3), jnp.uint8)}
    >>> jax.eval_shape(RandomCrop(side=6), jax.random.key(0), batch)["image"].shape
    (2, 6, 6, 3)

    Attributes:
        side: Of the square, in 1..min(h, w).
    """

    side: int

    def __call__(self, key: Array, batch: Batch) -> Batch:
        """Crops ``image`` to ``[b, …, side, side, c]``."""
        return {**batch, "image": _image_by_image(self._crop, key, batch["image"])}

    def _crop(self, key: Array, image: Array) -> Array:
        height, width, channels = image.shape
        places = jnp.array([height - self.side + 1, width - self.side + 1])
        start = jax.random.randint(key, (2,), 0, places)
        size = (self.side, self.side, channels)
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), size)


@dataclass(frozen=True)
class Affine:
    """Disrupts images by small rotations, translations and shears (Peeters and Schlyter, II.H).

    Each amount is uniform between minus and plus the given one; the report gives none. Pixels are
    interpolated linearly; what comes in from outside is 0.

    >>> image = jnp.ones((2, 8, 8, 3), jnp.float32)
    >>> Affine(rotation=5.0)(jax.random.key(0), {"image": image})["image"].shape
    (2, 8, 8, 3)

    Attributes:
        rotation: In degrees, in 0..180.
        translation: As a share of the image's side, in 0..1.
        shear: In degrees, in 0..89.

    Raises:
        ValueError: If one is out of its range.
    """

    rotation: float = 10.0
    translation: float = 0.1
    shear: float = 10.0

    def __post_init__(self) -> None:
        for name, most in (("rotation", 180), ("translation", 1), ("shear", 89)):
            amount = getattr(self, name)
            if not 0 <= amount <= most:
                raise ValueError(f"{name} is {amount}; it should be in 0..{most}.")

    def __call__(self, key: Array, batch: Batch) -> Batch:
        """Moves the pixels of ``image``."""
        return {**batch, "image": _image_by_image(self._move, key, batch["image"])}

    def _move(self, key: Array, image: Array) -> Array:
        height, width, _ = image.shape
        angle, slant, down, right = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
        angle, slant = jnp.deg2rad(self.rotation * angle), jnp.deg2rad(self.shear * slant)
        sheared = jnp.array([[1.0, 0.0], [0.0, 1.0]]).at[1, 0].set(jnp.tan(slant))
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        matrix = jnp.array([[cosine, -sine], [sine, cosine]]) @ sheared
        side = jnp.array([height, width], jnp.float32)
        centre = (side - 1) / 2
        shift = self.translation * side * jnp.stack([down, right])
        rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
        grid = jnp.stack([rows.ravel(), columns.ravel()]).astype(jnp.float32)
        # From each new pixel back to where it was: so that none of them stays empty.
        sources = matrix @ (grid - centre[:, None]) + (centre + shift)[:, None]
        coordinates = [sources[0].reshape(height, width), sources[1].reshape(height, width)]
        move = jax.vmap(lambda channel: map_coordinates(channel, coordinates, order=1), -1, -1)
        return move(image)


# In the order in which they are applied.
AUGMENTATIONS = {"swap": Swap, "flip": Flip, "crop": Crop, "affine": Affine}


def chain(augmentations: Mapping[str, Augmentation]) -> Augmentation:
    """Applies augmentations one after another, each under a key of its own.

    >>> image = jnp.ones((2, 8, 8, 3), jnp.uint8)
    >>> augment = chain({"flip": Flip(), "crop": Crop(1)})
    >>> augment(jax.random.key(0), {"image": image})["image"].shape
    (2, 8, 8, 3)

    Args:
        augmentations: Augmentations by name, in the order of application.

    Returns:
        One augmentation.
    """

    def augment(key: Array, batch: Batch) -> Batch:
        for i, augmentation in enumerate(augmentations.values()):
            # By its place: one that is added at the end leaves the draws of the others.
            batch = augmentation(jax.random.fold_in(key, i), batch)
        return batch

    return augment
