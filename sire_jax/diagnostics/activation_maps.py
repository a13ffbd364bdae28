"""Shows where in images each output finds its class: Fig. 6 of Palacio et al.

``python -m sire_jax.diagnostics.activation_maps --workdir=DIR [--bare=DIR2] --out=FILE [--json]``

A row for each test image: the image, a map for each branch over groups with the labels of the group
that it chose, and one for the main output; with ``--bare`` also that of a network without branches.
"""

import contextlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from sire_jax.backbones.plan import OFFSETS, features
from sire_jax.configuration.experiment import Experiment
from sire_jax.data.augmentation import Batch
from sire_jax.diagnostics.reconstructions import pixels
from sire_jax.groups import Groups
from sire_jax.inference.exits import classified
from sire_jax.job import command
from sire_jax.networks import MAIN
from sire_jax.predictions import JointProbability, Output
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import kept_weights, of_first_seed, open_run

PyTree = Any
# (the module's name in the network, the layer's name in the module)
Layer = tuple[str, str]


def layer_of(parts: Experiment, output: str) -> Layer:
    """Finds the last layer with images that an output is computed from.

    >>> from sire_jax import configuration
    >>> from sire_jax.configuration import experiment
    >>> config = configuration.default()
    >>> config.backbone = configuration.backbone(
    ...     "preactivation_resnet", depth=8, width=0.25, classes=10
    ... )
    >>> config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    >>> parts = experiment.build(config)
    >>> layer_of(parts, "main")
    ('backbone', 'tail_block_1')

    Args:
        parts: The parts of the run.
        output: Name of the output.

    Returns:
        The names of its module, ``"backbone"`` or ``"heads_…"``, and of the layer there.

    Raises:
        ValueError: If the output is not computed from a layer of a plan or of a branch.
    """
    plan = getattr(parts.network.backbone, "plan", None)
    head = parts.network.heads.get(output)
    last = getattr(head, "last_image", lambda: None)()
    if last is not None:
        return f"heads_{output}", last
    if plan is not None and output == MAIN:
        return "backbone", plan.block_of("tail" if plan.tail else f"stage_{len(plan.stages)}")
    attached: Sequence[str] = getattr(head, "endpoints", ())
    if plan is not None and len(attached) == 1 and "_block_" in plan.block_of(attached[0]):
        return "backbone", plan.block_of(attached[0])
    raise ValueError(
        f"The output '{output}' has no activation map: it is not computed from one layer of a plan"
        " or of a branch."
    )


def activation_maps(
    parts: Experiment, variables: PyTree, image: Array, chosen: Mapping[str, Array]
) -> dict[str, Array]:
    """Computes how much each place of the last features speaks for a class.

    ``M_ij = sum_c w_c F_ijc``, ``w_c = sum_ij d logit / d F_ijc``. Where the logits are a linear
    function of the mean features this is the class activation map (Zhou et al., *Learning Deep
    Features for Discriminative Localization*, 2016, Eq. 2), else one with gradients for weights
    (Selvaraju et al., *Grad-CAM*, 2017, Eq. 1).

    >>> from sire_jax import configuration
    >>> from sire_jax.configuration import experiment
    >>> config = configuration.default()
    >>> config.backbone = configuration.backbone(
    ...     "preactivation_resnet", depth=8, width=0.25, classes=10
    ... )
    >>> config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    >>> parts = experiment.build(config)
    >>> chosen = {"main": jnp.array([3, 7])}
    >>> maps = jax.eval_shape(
    ...     lambda variables, image: activation_maps(parts, variables, image, chosen),
    ...     parts.variables,
    ...     jnp.zeros((2, 8, 8, 1)),
    ... )
    >>> maps["main"].shape
    (2, 2, 2)

    Args:
        parts: The parts of the run.
        variables: Variables of the network.
        image: ``[b, h, w, c]``, as the network sees them.
        chosen: The class of each image, integers ``[b]``, by output.

    Returns:
        ``[b, h', w']`` by output, of the features' size; positive where they speak for the class.

    Raises:
        ValueError: If an output has no map.
    """
    return {k: _map(parts, variables, image, k, classes) for k, classes in chosen.items()}


def _map(parts: Experiment, variables: PyTree, image: Array, output: str, classes: Array) -> Array:
    module, layer = layer_of(parts, output)
    last = _features(parts, variables, image, (module, layer))

    def logits(offset: Array) -> Array:
        shifted = {**variables, OFFSETS: {module: {layer: offset}}}
        outputs: Any = parts.network.apply(shifted, image)
        return jnp.take_along_axis(outputs[output], classes[:, None], -1).sum()

    # An offset for all places of a channel at once: its gradient is their sum.
    weights = jax.grad(logits)(jnp.zeros_like(last[:, :1, :1]))
    return (weights * last).sum(-1)


def _features(parts: Experiment, variables: PyTree, image: Array, layer: Layer) -> Array:
    """Returns what a layer returns, ``[b, h, w, c]``."""
    module, name = layer
    if module == "backbone":
        return features(parts.network.backbone, variables, image, [name])[name]
    _, state = parts.network.apply(
        variables, image, capture_intermediates=lambda submodule, _: submodule.name == name
    )
    captured: Any = state
    return captured["intermediates"][module][name]["__call__"][0]


@dataclass(frozen=True)
class Explained:
    """What a network says of one image, and why.

    >>> seen = Explained(2, 0.75, "main", groups={}, group_probability={}, maps={})
    >>> f"label {seen.label} with a probability of {seen.probability:.0%}"
    'label 2 with a probability of 75%'

    Attributes:
        label: The predicted class, an integer.
        probability: Its probability.
        rule: The prediction rule that says so, ``"main"`` for the main output.
        groups: For each branch the group that it chose, an integer.
        group_probability: For each branch that group's probability.
        maps: A map ``[h, w]`` of each output that has one, the branches' first.
    """

    label: int
    probability: float
    rule: str
    groups: dict[str, int]
    group_probability: dict[str, float]
    maps: dict[str, np.ndarray]


def _mapped(parts: Experiment, outputs: Sequence[str]) -> list[str]:
    """Returns those of the outputs that have a map."""
    mapped = []
    for output in outputs:
        with contextlib.suppress(ValueError):
            layer_of(parts, output)
            mapped.append(output)
    return mapped


def explain(parts: Experiment, variables: PyTree, image: Array) -> list[Explained]:
    """Explains predictions: by the first joint probability of the run, else by the main output.

    >>> from sire_jax import configuration
    >>> from sire_jax.configuration import experiment
    >>> config = configuration.default()
    >>> config.backbone = configuration.backbone(
    ...     "preactivation_resnet", depth=8, width=0.25, classes=10
    ... )
    >>> config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    >>> parts = experiment.build(config)
    >>> untrained = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts.variables)
    >>> (explained,) = explain(parts, untrained, jnp.zeros((1, 8, 8, 1)))
    >>> explained.rule, round(explained.probability, 3), explained.maps["main"].shape
    ('main', 0.1, (2, 2))

    Args:
        parts: The parts of the run.
        variables: Variables of the network, of one run.
        image: ``[b, h, w, c]``, as the network sees them.

    Returns:
        An explanation for each image.

    Raises:
        ValueError: If the main output has no objective on the labels.
    """
    if "label" not in classified(parts, MAIN):
        raise ValueError("The main output is not trained on 'label'; there is no class to explain.")
    groups = parts.branches()
    rule = next((k for k, r in parts.predictions.items() if isinstance(r, JointProbability)), MAIN)
    mapped = _mapped(parts, [*groups, MAIN])

    def compute(variables: PyTree, image: Array) -> tuple[Any, Any, Any]:
        outputs: Any = parts.network.apply(variables, image)
        predicted = {MAIN: Output(), **parts.predictions}[rule](outputs)
        probabilities = {k: jax.nn.softmax(outputs[k]) for k in groups}
        chosen = {k: p.argmax(-1) for k, p in probabilities.items()} | {MAIN: predicted.argmax(-1)}
        maps = activation_maps(parts, variables, image, {k: chosen[k] for k in mapped})
        return predicted, probabilities, maps

    predicted, probabilities, maps = jax.tree.map(np.asarray, jax.jit(compute)(variables, image))
    return [
        Explained(
            label=int(predicted[i].argmax()),
            probability=float(np.exp(predicted[i].max())),
            rule=rule,
            groups={k: int(p[i].argmax()) for k, p in probabilities.items()},
            group_probability={k: float(p[i].max()) for k, p in probabilities.items()},
            maps={k: maps[k][i] for k in mapped},
        )
        for i in range(len(image))
    ]


def titles(
    explained: Explained, groups: Mapping[str, Groups], names: Sequence[str]
) -> dict[str, str]:
    """Writes what each output found: the class, or the labels of the group that a branch chose.

    >>> names = ("apple", "oak", "pear")
    >>> seen = Explained(2, 0.75, "joint", {"branch": 0}, {"branch": 0.9}, maps={})
    >>> found = titles(seen, {"branch": Groups(names, (0, 1, 0))}, names)
    >>> found["branch"].splitlines(), found["main"].splitlines()
    (['90%', 'apple, pear'], ["75% by 'joint'", 'pear'])
    """
    texts = {}
    for name, group in explained.groups.items():
        labels = groups[name].labels()[group]
        mark = "" if names[explained.label] in labels else f" (without {names[explained.label]})"
        text = textwrap.fill(", ".join(labels) + mark, 26, max_lines=7, placeholder=" …")
        texts[name] = f"{explained.group_probability[name]:.0%}\n{text}"
    return {**texts, MAIN: _main_title(explained, names)}


def _main_title(explained: Explained, names: Sequence[str]) -> str:
    return f"{explained.probability:.0%} by '{explained.rule}'\n{names[explained.label]}"


def draw(
    images: np.ndarray,
    rows: Sequence[Mapping[str, tuple[np.ndarray, str]]],
    labels: Sequence[str],
    data: ConfigDict,
) -> Figure:
    """Draws images with their maps, and what each output found underneath.

    >>> image, found = np.zeros((1, 4, 4, 3)), (np.eye(2), "cat, dog")
    >>> data = ConfigDict({"mean": (), "std": (), "scale": 1 / 255})
    >>> figure = draw(image, [{"branch": found, "main": found}], ["cat"], data)
    >>> [panel.get_title() for panel in figure.axes]
    ['image', 'branch', 'main']

    Args:
        images: ``[n, h, w, c]``, as the network sees them.
        rows: For each image by the column's title its map ``[h, w]`` and the text underneath.
        labels: What is written under each image.
        data: The section ``config.data``.

    Returns:
        The picture: a row for each image.
    """
    columns = max(len(row) for row in rows) + 1
    figure = Figure(figsize=(2.1 * columns, 3.0 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, original, row, label in zip(panels, images, rows, labels, strict=True):
        shown = pixels(original, data).clip(0, 1)
        _panel(line[0], shown, "image", label)
        for panel, (title, (activations, text)) in zip(line[1:], row.items(), strict=True):
            _panel(panel, shown, title, text)
            # What speaks against a class is not shown.
            height, width = shown.shape[:2]
            panel.imshow(
                activations.clip(0),
                cmap="inferno",
                alpha=0.6,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="bilinear",
            )
    return figure


def _panel(panel: Axes, image: np.ndarray, title: str, text: str) -> None:
    grey = image.shape[-1] == 1
    panel.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])
    # As it is: two dollar signs in a name are no formula.
    panel.set_xlabel(text, fontsize=7, parse_math=False)


def of_tests(
    workdir: str | Path, count: int, bare: str = "", overrides: Sequence[str] = ()
) -> tuple[np.ndarray, list[dict[str, tuple[np.ndarray, str]]], list[str], ConfigDict]:
    """Makes the maps of the first test images of a run.

    Args:
        workdir: The run.
        count: How many images.
        bare: A run of the network without branches, for comparison; "" for none.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Returns:
        The arguments of ``draw``.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        ValueError: If the main output has no objective on the labels, or the bare run has other
            test images.
    """
    run = open_run(workdir, overrides)
    parts, names = run.parts, run.feed.names["label"]
    batch = run.feed.look("test", count)
    variables = of_first_seed(kept_weights(run, workdir))
    explained = explain(parts, variables, batch["image"])
    rows: list[dict[str, tuple[np.ndarray, str]]] = [
        {
            k: (activations, titles(explanation, parts.branches(), names)[k])
            for k, activations in explanation.maps.items()
        }
        for explanation in explained
    ]
    if bare:
        for row, explanation in zip(rows, _bare(bare, run, batch, overrides), strict=True):
            row["without branches"] = explanation.maps[MAIN], _main_title(explanation, names)
    labels = [names[int(label)] for label in batch["label"]]
    return np.asarray(batch["image"]), rows, labels, run.config.data


def _bare(
    workdir: str | Path, run: Runs, batch: Batch, overrides: Sequence[str]
) -> list[Explained]:
    """Explains what another run says of the same images."""
    other = open_run(workdir, overrides)
    own = other.feed.look("test", len(batch["image"]))
    same = np.array_equal(batch["image"], own["image"])
    if not same or other.feed.names["label"] != run.feed.names["label"]:
        raise ValueError(f"{workdir} has other test images or labels; give a run on the same data.")
    variables = of_first_seed(kept_weights(other, workdir))
    return explain(other.parts, variables, own["image"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--bare", default="", help="a run without branches, for comparison")
    parser.add_argument("--images", type=int, default=4, help="how many test images")
    parser.add_argument("--out", default="activation_maps.png", help="the picture")
    parser.add_argument("--json", action="store_true", help="print what is written below as JSON")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        out = command.check_picture(options.out)
        if options.images < 1:
            raise ValueError(f"--images is {options.images}; it should be at least 1.")
        shown = of_tests(options.workdir, options.images, options.bare, overrides)
        draw(*shown).savefig(out, dpi=130)
    if options.json:
        _, rows, labels, _ = shown
        texts = [{title: text for title, (_, text) in row.items()} for row in rows]
        print(
            json.dumps([{"image": label, **row} for label, row in zip(labels, texts, strict=True)])
        )
        return
    print(f"{out}: where each output finds its class; below, what it found")


if __name__ == "__main__":
    main()
