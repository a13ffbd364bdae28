"""Shows what decoders make of images: each run a row under each image, as Fig. 2 of SIRe-Networks.

``python -m sire_jax.diagnostics.reconstructions --workdir=DIR --workdir=DIR2 --out=FILE``
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from sire_jax import command
from sire_jax.evaluate import kept_weights, open_run
from sire_jax.heads.decoder import Decoder
from sire_jax.workdir import titles


def pixels(images: np.ndarray, data: ConfigDict) -> np.ndarray:
    """Undoes the scaling and normalization of images, for looking at them.

    Args:
        images: ``[…, c]``, as the network sees or predicts them.
        data: The section ``config.data``.

    Returns:
        As ``images``; pixels are in [0, 1], predictions mostly.
    """
    shape = (1,) * (images.ndim - 1) + (-1,)
    if data.std:
        images = images * np.asarray(data.std, np.float32).reshape(shape)
    if data.mean:
        images = images + np.asarray(data.mean, np.float32).reshape(shape)
    return images / (255 * data.scale)


def reconstruct(
    workdir: str | Path, count: int, overrides: Sequence[str] = ()
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Applies the decoders of a trained network to the first test images.

    The weights are those of the run's first seed: the best on validation data if it has any.

    Args:
        workdir: The run.
        count: How many images.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Returns:
        The images ``[count, h, w, c]``, with values in [0, 1], and for each decoder its output.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        ValueError: If the network has no decoder, an override changes the run, or the data are not
            those of the run.
    """
    runs = open_run(workdir, overrides)
    parts, config = runs.parts, runs.config
    names = [name for name, head in parts.network.heads.items() if isinstance(head, Decoder)]
    if not names:
        raise ValueError(f"The network of {workdir} has no decoder.")
    kept = kept_weights(runs, workdir)
    image = runs.look("test", count, parts.ready_cropped)["image"]
    first = jax.tree.map(lambda x: x[0], {"params": kept.params, **kept.model_state})
    outputs = jax.jit(parts.network.apply)(first, image)
    shown = {name: pixels(np.asarray(outputs[name]), config.data) for name in names}
    return pixels(np.asarray(image), config.data), shown


def draw(image: np.ndarray, rows: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draws images with their reconstructions beside them.

    Args:
        image: ``[n, h, w, c]``, values in [0, 1].
        rows: For each row under an image, by its label, the decoders' outputs by name. Their
            squared errors are written above them; values outside [0, 1] are shown cut off.

    Returns:
        The picture: for each image a row of the input and all decoders for each label.
    """
    columns = max(len(outputs) for outputs in rows.values()) + 1
    lines = len(image) * len(rows)
    figure = Figure(figsize=(1.25 * columns + 0.6, 1.3 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for i, original in enumerate(image):
        for j, (label, outputs) in enumerate(rows.items()):
            line = panels[i * len(rows) + j]
            shown = {f"input\n{label}" if label else "input": original}
            shown |= {name: each[i] for name, each in outputs.items()}
            for panel, (name, picture) in zip(line, shown.items(), strict=False):
                squeezed = picture[..., 0] if picture.shape[-1] == 1 else picture
                panel.imshow(
                    squeezed.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
                )
                error = f"\n{((picture - original) ** 2).mean():.1e}"
                panel.set_title(name + ("" if picture is original else error), fontsize=6)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, action="append", help="a run; can be repeated")
    parser.add_argument("--images", type=int, default=4, help="how many test images")
    parser.add_argument("--out", default="reconstructions.png", help="the picture")
    known, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_picture(known.out)
        if known.images < 1:
            raise ValueError(f"--images is {known.images}; it should be at least 1.")
        found = {
            title: reconstruct(path, known.images, overrides)
            for title, path in titles(known.workdir).items()
        }
        image = next(iter(found.values()))[0]
        if any(not np.array_equal(image, each) for each, _ in found.values()):
            raise ValueError("The runs have different test images; show them one by one.")
        figure = draw(image, {label: outputs for label, (_, outputs) in found.items()})
        figure.savefig(out, dpi=150)
    print(f"{out}: input and decoders, with the mean squared error above each")


if __name__ == "__main__":
    main()
