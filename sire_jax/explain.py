"""Explains the prediction of one image: ``python -m sire_jax.explain --workdir=DIR --image=FILE``.

Prints the class, and for each branch the group of labels that it chose, with its probability and
whether it contains the class; draws where in the image each of them is found.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from sire_jax import files
from sire_jax.data import images
from sire_jax.data.images import DamagedImageError
from sire_jax.data.sources import Source
from sire_jax.data.tasks import Images
from sire_jax.diagnostics.activation_maps import draw, titles
from sire_jax.diagnostics.activation_maps import explain as explained_images
from sire_jax.job import command
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import kept_weights, of_first_seed, open_run
from sire_jax.text import printable


def read_image(path: str | Path, data: ConfigDict) -> tuple[np.ndarray, str]:
    """Reads an image as training and evaluation do: decoded and scaled alike.

    Args:
        path: A file that Pillow reads, such as PNG or JPEG, in any colours.
        data: The section ``config.data`` of the run.

    Returns:
        The image, uint8 of the shape ``data.shape``, and what was done to it, "" if nothing. Where
        the run does not scale images, one of another size is cropped to the same proportions around
        its centre and scaled, as evaluation scales.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedImageError: If it can't be decoded.
    """
    path = files.expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no image {printable(str(path))}.")
    height, width, channels = data.shape
    encoded = path.read_bytes()
    try:
        image = images.decode(encoded, channels)
    # Not the file's fault.
    except MemoryError:
        raise
    except Exception as error:  # Damage makes Pillow raise errors of many kinds.
        raise DamagedImageError.of(printable(str(path)), error) from error
    if image.size == (width, height):
        return images.to_array(image), ""
    note = f"cropped and resized from {image.size[0]} x {image.size[1]} pixels"
    if data.resize:
        square = images.central_square(image, data.resize)
        return images.to_array(square), f"{note}, as in training and evaluation"
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return images.to_array(fitted), note


def explain(
    workdir: str | Path,
    image: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Explains what a run's first network predicts of an image.

    Args:
        workdir: The run.
        image: The image's file.
        out: The picture of the maps.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Returns:
        ``{"class", "probability", "rule", "branches": {name: {"labels", "probability",
        "contains"}}, "resized"}``.

    Raises:
        FileNotFoundError: If there is no image, no run or no checkpoint.
        ValueError: If the image can't be read, the run is on pairs, or the main output has no
            objective on the labels.
    """
    # The image is the user's: of the run's data only the names of the classes are needed.
    run = open_run(workdir, overrides, needs_data=False)
    if not isinstance(run.parts.task, Images):
        raise ValueError("Only runs on single images can be explained; this one is on pairs.")
    pixels, note = read_image(image, run.config.data)
    variables = of_first_seed(kept_weights(run, workdir))
    batch = _batch(run, pixels)
    (explanation,) = explained_images(run.parts, variables, batch)
    groups = run.parts.branches()
    texts = titles(explanation, groups, run.feed.names["label"])
    row = {name: (activations, texts[name]) for name, activations in explanation.maps.items()}
    draw(np.asarray(batch), [row], [printable(Path(image).name)], run.config.data).savefig(
        out, dpi=150
    )
    label = run.feed.names["label"][explanation.label]
    labels = {name: groups[name].labels()[group] for name, group in explanation.groups.items()}
    return {
        "class": label,
        "probability": explanation.probability,
        "rule": explanation.rule,
        "branches": {
            name: {
                "labels": list(members),
                "probability": explanation.group_probability[name],
                "contains": label in members,
            }
            for name, members in labels.items()
        },
        "resized": note,
    }


def _batch(run: Runs, pixels: np.ndarray) -> Any:
    """Returns a batch of one image as the network sees it."""
    # Nobody looks at the labels, but the task prepares them with the image.
    labels = {kind: np.zeros(1, np.int32) for kind in run.config.data.classes}
    arrays = run.parts.task.prepare(Source(pixels[None], labels))
    placed = {key: jnp.asarray(values) for key, values in arrays.items()}
    return run.parts.lookup(placed, jnp.zeros(1, jnp.int32), "central")["image"]


def report(explanation: Mapping[str, Any]) -> str:
    """Writes an explanation as lines of text."""
    label, rule = explanation["class"], explanation["rule"]
    lines = [f"{label}  (probability {explanation['probability']:.3f} by '{rule}')"]
    for name, branch in explanation["branches"].items():
        contains = "contains" if branch["contains"] else "does NOT contain"
        lines.append(
            f"  {name}: {', '.join(branch['labels'])}\n"
            f"    probability {branch['probability']:.3f}; {contains} {label}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--image", required=True, help="the image, a PNG or JPEG file")
    parser.add_argument("--out", default="explanation.png", help="the picture of the maps")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_picture(options.out)
        explanation = explain(options.workdir, options.image, out, overrides)
    if options.json:
        print(json.dumps(explanation))
        return
    if explanation["resized"]:
        print(f"{printable(options.image)} was {explanation['resized']}.")
    print(report(explanation))
    print(f"{out}: where each output finds its class")


if __name__ == "__main__":
    main()
