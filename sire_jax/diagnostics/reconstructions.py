"""Shows what decoders make of images: each run a row under each image, as Fig. 2 of SIRe-Networks.

``python -m sire_jax.diagnostics.reconstructions --workdir=DIR --workdir=DIR2 --out=FILE [--json]``

Under each input stands how the run classifies it, in red where another run than the first takes it
for something else: with and without skips, for instance.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from sire_jax.heads.decoder import Decoder
from sire_jax.job import command
from sire_jax.networks import MAIN
from sire_jax.runs.trained import kept_weights, of_first_seed, open_run
from sire_jax.storage.workdir import titles


def pixels(images: np.ndarray, data: ConfigDict) -> np.ndarray:
    """Undoes the scaling and normalization of images, for looking at them.

    >>> data = ConfigDict({"mean": (0.5,), "std": (0.25,), "scale": 1 / 255})
    >>> pixels(np.array([[[-2.0], [0.0], [2.0]]]), data).ravel().tolist()
    [0.0, 0.5, 1.0]

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


class Reconstructed(NamedTuple):
    """What a trained network makes of some images.

    >>> image = np.ones((2, 4, 4, 1))
    >>> Reconstructed(image, {"decoder_1": 0.9 * image}, []).errors()["decoder_1"].round(3).tolist()
    [0.01, 0.01]

    Attributes:
        image: ``[n, h, w, c]``, values in [0, 1].
        outputs: For each decoder what it returns, likewise.
        classified: For each image its predicted class and what is right, in words; empty if the
            main output doesn't classify.
    """

    image: np.ndarray
    outputs: dict[str, np.ndarray]
    classified: list[str]

    def errors(self) -> dict[str, np.ndarray]:
        """Returns the mean squared error of each decoder on each image, ``[n]``."""
        return {
            name: ((pictures - self.image) ** 2).mean((1, 2, 3))
            for name, pictures in self.outputs.items()
        }


def reconstruct(
    workdir: str | Path, chosen: Sequence[int], overrides: Sequence[str] = ()
) -> Reconstructed:
    """Applies the decoders of a trained network to test images.

    The weights are those of the run's first seed: the best on validation data if it has any.

    Args:
        workdir: The run.
        chosen: Which images, by their number in the test split, from 0.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Returns:
        What it makes of them.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        ValueError: If the network has no decoder, there is no such image, an override changes the
            run, or the data are not those of the run.
    """
    runs = open_run(workdir, overrides)
    parts, config = runs.parts, runs.config
    names = [name for name, head in parts.network.heads.items() if isinstance(head, Decoder)]
    if not names:
        raise ValueError(f"The network of {workdir} has no decoder.")
    weights = kept_weights(runs, workdir)
    number = runs.feed.examples["test"].shape[1]
    if not all(0 <= index < number for index in chosen):
        raise ValueError(
            f"The test images are numbered 0 to {number - 1}; {list(chosen)} are asked for."
        )
    batch = runs.feed.look("test", list(chosen), "measured")
    image = np.asarray(batch["image"])
    outputs = jax.jit(parts.network.apply)(of_first_seed(weights), image)
    shown = {name: pixels(np.asarray(outputs[name]), config.data) for name in names}
    texts = []
    # A single logit, of a pair's order, is no choice among classes.
    if parts.accuracy() is not None and outputs[MAIN].shape[-1] > 1:
        target = parts.objectives[parts.main_objective()].target
        texts = classified(
            outputs[MAIN], np.asarray(batch[target]), runs.feed.names.get(target, ())
        )
    return Reconstructed(pixels(image, config.data), shown, texts)


def classified(logits: Array, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Says how images are classified.

    >>> logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    >>> texts = classified(logits, np.array([0, 1]), ("cat", "dog", "fox"))
    >>> [text.splitlines() for text in texts]
    [['cat (0.70)'], ['fox (0.60)', 'dog is number 2']]

    Args:
        logits: ``[n, classes]``.
        labels: What is right, ``[n]``.
        names: Of the classes; their numbers if there are none.

    Returns:
        For each image the class with the largest probability, and where that is not the right one,
        at which place the right one comes.
    """
    shares = np.asarray(jax.nn.softmax(logits))
    places = (shares > np.take_along_axis(shares, labels[:, None], 1)).sum(1) + 1
    texts = []
    for share, label, place in zip(shares, labels, places, strict=True):
        best = int(share.argmax())
        name, right = (names[i] if names else str(i) for i in (best, int(label)))
        wrong = "" if place == 1 else f"\n{right} is number {place}"
        texts.append(f"{name} ({share[best]:.2f}){wrong}")
    return texts


def draw(rows: Mapping[str, Reconstructed]) -> Figure:
    """Draws images with their reconstructions beside them.

    >>> image = np.ones((1, 4, 4, 1))
    >>> figure = draw({"SIRe": Reconstructed(image, {"decoder_1": 0.9 * image}, [])})
    >>> [panel.get_title().splitlines() for panel in figure.axes]
    [['input', 'SIRe'], ['decoder_1', '1.0e-02']]

    Args:
        rows: For each row under an image, by its label, what a network makes of the same images.
            Squared errors are written above them; values outside [0, 1] are shown cut off.

    Returns:
        The picture: for each image a row of the input and all decoders for each label.
    """
    columns = max(len(reconstructed.outputs) for reconstructed in rows.values()) + 1
    first = next(iter(rows.values()))
    image = first.image
    lines = len(image) * len(rows)
    figure = Figure(figsize=(1.25 * columns + 0.6, 1.3 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for i, original in enumerate(image):
        for j, (label, reconstructed) in enumerate(rows.items()):
            line = panels[i * len(rows) + j]
            if reconstructed.classified:
                text = reconstructed.classified[i]
                changed = first.classified and _class_of(text) != _class_of(first.classified[i])
                line[0].text(
                    0.5,
                    -0.04,
                    text,
                    fontsize=5,
                    color="firebrick" if changed else "black",
                    ha="center",
                    va="top",
                    transform=line[0].transAxes,
                )
            errors = reconstructed.errors()
            shown = {f"input\n{label}" if label else "input": original}
            shown |= {name: pictures[i] for name, pictures in reconstructed.outputs.items()}
            # A run with fewer decoders than another leaves panels empty.
            for panel, (name, picture) in zip(line, shown.items(), strict=False):
                squeezed = picture[..., 0] if picture.shape[-1] == 1 else picture
                panel.imshow(
                    squeezed.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
                )
                error = "" if picture is original else f"\n{errors[name][i]:.1e}"
                panel.set_title(name + error, fontsize=6)
    return figure


def _class_of(text: str) -> str:
    """Returns the class that ``classified`` says an image is taken for."""
    line = text.partition("\n")[0]
    return line.rpartition(" (")[0] or line


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, action="append", help="a run; can be repeated")
    parser.add_argument("--images", default="4", help="how many test images; or which ones: 3,17,0")
    parser.add_argument("--out", default="reconstructions.png", help="the picture")
    parser.add_argument("--json", action="store_true", help="print classes and errors as JSON")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_picture(options.out)
        chosen = _chosen(options.images)
        rows = {
            title: reconstruct(path, chosen, overrides)
            for title, path in titles(options.workdir).items()
        }
        image = next(iter(rows.values())).image
        if any(not np.array_equal(image, row.image) for row in rows.values()):
            raise ValueError("The runs have different test images; show them one by one.")
        draw(rows).savefig(out, dpi=150)
    if options.json:
        print(json.dumps({title: _report(chosen, row) for title, row in rows.items()}))
        return
    print(f"{out}: input, its class, and decoders, with the mean squared error above each")


def _report(chosen: Sequence[int], row: Reconstructed) -> dict[str, Any]:
    errors = {name: [float(x) for x in values] for name, values in row.errors().items()}
    return {"images": list(chosen), "classified": row.classified, "errors": errors}


def _chosen(images: str) -> list[int]:
    """Reads a number of images, or the numbers of several."""
    try:
        numbers = [int(number) for number in images.split(",") if number]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or images == "0":
        raise ValueError(
            f"--images is {images}; it should be how many, at least 1, or numbers of images,"
            " separated by commas: 3,17 (of one image alone: 3,)."
        )
    return numbers if "," in images else list(range(numbers[0]))


if __name__ == "__main__":
    main()
