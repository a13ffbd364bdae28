"""Small sets of image files, as folders and as records, and files that are no images."""

import io
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

# Names of classes, in their order.
CLASSES = ("ape", "bee", "cow")


def picture(seed, height=4, width=6, channels=3):
    """Random pixels, uint8 ``[h, w, c]``."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(pixels, kind="PNG", **settings):
    """The bytes of an image file."""
    written = io.BytesIO()
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(pixels).save(written, kind, **settings)
    return written.getvalue()


def write(path, content):
    """Writes bytes, or an image of pixels, into a file whose directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else encoded(content))


def write_folder(root, splits=None, height=4, width=6):
    """Writes an image folder: of every split so many images of every class.

    Returns:
        For each split the pixels in their order, and the labels.
    """
    made, seed = {}, 0
    for split, per_class in (splits or {"train": 3, "test": 2}).items():
        pixels, labels = [], []
        for label, name in enumerate(CLASSES):
            for i in range(per_class):
                pixels.append(picture(seed, height, width))
                labels.append(label)
                seed += 1
                write(Path(root) / split / name / f"{i}.png", pixels[-1])
        made[split] = (pixels, labels)
    return made


def flipped(content, place):
    """The bytes with one bit flipped."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


# Damaged images and what is said of them.
DAMAGED = {
    "empty": (b"", "it is empty"),
    "text": (b"not an image", "its 12 bytes are no image of a known format"),
    "cut png": (encoded(picture(0, 40, 40))[:900], "truncated"),
    "cut jpeg": (encoded(picture(0, 40, 40), "JPEG")[:900], "truncated"),
    "flipped png": (flipped(encoded(picture(0, 40, 40)), 2000), "broken data stream"),
    "head of a jpeg": (encoded(picture(0), "JPEG")[:20], "its 20 bytes are no image"),
}


def prepare_set(root, splits):
    """Writes a ``tensorflow_datasets`` set ``small`` of encoded images and their labels.

    Args:
        root: The data directory.
        splits: For each split a list of (bytes, label); labels are not checked.
    """
    import tensorflow_datasets as tfds

    def examples(split, content):
        for i, (image, label) in enumerate(content):
            path = root / "files" / f"{split}_{i}"
            write(path, image)
            yield i, {"image": path, "label": label, "odd": label % 2}

    with tfds.core.registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "odd": tfds.features.ClassLabel(num_classes=2),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, _):
                return {split: examples(split, content) for split, content in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

    # Labels outside of the classes, too, as a damaged file may hold.
    with mock.patch.object(tfds.features.ClassLabel, "encode_example", lambda _, label: label):
        Small(data_dir=root, file_format="array_record").download_and_prepare()
