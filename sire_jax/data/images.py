"""Encoded images: how they are decoded and scaled. Nothing here needs JAX."""

import io
import math

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Generator = np.random.Generator
Box = tuple[float, float, float, float]

# File names that are taken for images.
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Of the pixels that ``decode`` makes of a file: copies of decoded images by another are not used.
DECODER = 2

_MODES = {1: "L", 3: "RGB"}
# Where Pillow keeps what may say how a camera was held.
_HELD = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}
# Szegedy et al.: the share of the image's area, and the ratio of the sides.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10

# Registers the common formats: not something for several threads to do at once.
Image.preinit()


class DamagedImageError(ValueError):
    """An image can't be decoded, or its label is none; the message names it."""

    @classmethod
    def of(cls, name: str, error: Exception) -> "DamagedImageError":
        """Returns the error on an image of this name, of which another error tells the cause."""
        cause = str(error).rstrip(".")
        return cls(f"{name} is damaged: {cause}.")

    def advised(self) -> "DamagedImageError":
        """Returns the same error with what can be done about it."""
        return DamagedImageError(
            f"{self} Mend or remove it, or pass over such images: damaged='skip'"
            " (--config.data.damaged=skip)."
        )


def check_channels(channels: int) -> None:
    """Checks that images can be converted to so many channels.

    Raises:
        ValueError: If they can't.
    """
    if channels not in _MODES:
        raise ValueError(
            f"Images are decoded to 3 channels (colour) or 1 (grey); {channels} are asked for."
        )


def decode(encoded: bytes, channels: int) -> Image.Image:
    """Decodes an image: the one way from a file to pixels, of training and of all programs.

    A photograph is turned upright, as its camera was held (EXIF).

    >>> file = io.BytesIO()
    >>> Image.new("RGB", (40, 30)).save(file, "PNG")
    >>> to_array(decode(file.getvalue(), channels=1)).shape
    (30, 40, 1)

    Args:
        encoded: A file in a format that Pillow knows; of an animation, the first image counts.
        channels: 3 (RGB) or 1 (grey), to which palettes and CMYK are converted; transparency is
            dropped.

    Returns:
        The image, in memory.

    Raises:
        ValueError: If it can't be decoded, or shouldn't: it has too many pixels, or more than 8
            bits a channel. Pillow has errors of its own for some kinds of damage.
    """
    if not encoded:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        raise ValueError(f"its {len(encoded):,} bytes are no image of a known format") from None
    with image:
        _check_size(image)
        if image.mode.startswith("I") or image.mode == "F":
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
        image.load()
        _turn_upright(image)
        if image.mode == _MODES[channels]:
            return image
        # Of a palette with transparent colours Pillow asks for this step.
        colours = image.convert("RGBA") if "transparency" in image.info else image
        return colours.convert(_MODES[channels])


def _turn_upright(image: Image.Image) -> None:
    # Asking every image costs a fifth of decoding a small one.
    if not _HELD & image.info.keys():
        return
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # Of many kinds: an orientation that can't be read is none, as in viewers.
        return


def _check_size(image: Image.Image) -> None:
    """Refuses what Pillow only warns of: a small file that decodes to fill the memory."""
    pixels = image.width * image.height
    if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}"
        )


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image, uint8 ``[h, w, c]``."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def central_square(image: Image.Image, side: int) -> Image.Image:
    """Scales an image's shorter side to ``side`` and takes the central square of it.

    Both at once; bilinear, antialiased.

    >>> central_square(Image.new("RGB", (640, 480)), 32).size
    (32, 32)

    Args:
        image: The image.
        side: Of the square, in pixels, at least 1.

    Returns:
        The square.
    """
    shorter = min(image.size)
    left, top = ((length - shorter) / 2 for length in image.size)
    # The box is cut out within the resizing: in halves of pixels, and without a copy in between.
    box = (left, top, left + shorter, top + shorter)
    return image.resize((side, side), Image.Resampling.BILINEAR, box)


def random_square(image: Image.Image, side: int, generator: Generator) -> Image.Image:
    """Scales a random part of an image to a square; see ``random_box``. Bilinear, antialiased.

    Args:
        image: The image.
        side: Of the square, in pixels, at least 1.
        generator: Source of randomness.

    Returns:
        The square.
    """
    box = random_box(*image.size, generator)
    return image.resize((side, side), Image.Resampling.BILINEAR, box)


def random_box(width: int, height: int, generator: Generator) -> Box:
    """Draws a part of an image: its area, its shape and its place.

    The area is uniform between 0.08 and 1 of the image's, the logarithm of width / height between
    those of 3/4 and 4/3, any place is as likely. What doesn't fit is drawn again; after ten
    attempts it is the largest central box of an allowed shape. Szegedy et al., *Going Deeper with
    Convolutions* (2015), Section 6; that the logarithm is uniform is common practice.

    >>> left, top, right, bottom = random_box(640, 480, np.random.default_rng(0))
    >>> 0 <= left < right <= 640, 0 <= top < bottom <= 480
    (True, True)

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        generator: Source of randomness.

    Returns:
        Left, top, right and bottom, whole pixels.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * generator.uniform(*_AREA)
        ratio = math.exp(generator.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(generator.integers(0, n + 1)) for n in (width - w, height - h))
            return left, top, left + w, top + h
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
