"""Writes one output of a trained network to a file of its own, and applies such files.

``python -m sire_jax.export --workdir=DIR --exit=45 --out=exit_45.npz`` writes the output
``exit_45``, with only what it is computed from; ``--exit=best`` the one that is right on most
validation images. In Python::

    from sire_jax.export import load
    model = load("exit_45.npz")
    probabilities = model(images)  # uint8 [b, h, w, c] -> [b, classes]
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from sire_jax import (
    command,
    configuration,
    experiment,
    files,
    objectives,
    tables,
    traced,
    untrusted,
)
from sire_jax.data.sources import Source
from sire_jax.evaluate import kept_weights, open_run
from sire_jax.experiment import Experiment, Forward
from sire_jax.inference.stages import cut_out
from sire_jax.metrics import class_logits
from sire_jax.names import nearest
from sire_jax.networks import MAIN
from sire_jax.runs import Runs
from sire_jax.step import Best, TrainState

PyTree = Any
# What a file says that it is, with the version of its layout.
FORMAT = "sire_jax export 1"
# In place of an output's name: the best on validation images.
BEST = "best"


class Exported:
    """One output of a trained network.

    Args:
        config: The config of the run.
        output: Name of the output.
        stored: What the output is computed from: arrays by path, such as
            ``"params/backbone/output/kernel"``.

    Attributes:
        output: Name of the output.
        shape: Shape of one image, or of a pair of them.

    Raises:
        ValueError: If the arrays are not those that the output is computed from.
    """

    def __init__(self, config: ConfigDict, output: str, stored: Mapping[str, np.ndarray]):
        self._parts = experiment.forward(config)
        self.output = output
        if output not in self._parts.outputs:
            raise ValueError(
                f"The network has no output '{output}'.{nearest(output, self._parts.outputs)}"
            )
        self._shapes = _paths(self._parts.variables)
        known = stored.keys() & self._shapes.keys()
        stored = {**stored, **{k: _typed(stored[k], self._shapes[k].dtype) for k in known}}
        _check_stored(self._shapes, needed(self._parts, output), stored)
        self._stored = {path: jnp.asarray(values) for path, values in stored.items()}
        self.shape = (*self._parts.batch["image"].shape[1:-3], *config.data.shape)
        self._logits = jax.jit(self._apply)
        self._softmax = jax.jit(jax.nn.softmax)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Classifies images.

        Args:
            images: ``[b, h, w, c]``, uint8, or ``[b, 2, h, w, c]`` of a run on pairs: as the data
                set has them, neither scaled nor normalized. A number of images that was not given
                before is compiled for first.

        Returns:
            Probabilities ``[b, classes]``, float32.

        Raises:
            ValueError: If the images have another shape or dtype.
        """
        return np.asarray(self._softmax(self.logits(images)))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits of images, ``[b, classes]``, otherwise as ``__call__``."""
        return np.asarray(self._logits(self._stored, self._task_images(images))[0])

    def _task_images(self, images: np.ndarray) -> np.ndarray:
        """Checks images, and changes them as the task does before they are scaled."""
        given = np.asarray(images)
        if given.dtype != np.uint8 or given.shape[1:] != self.shape or not len(given):
            shape = ", ".join(map(str, self.shape))
            raise ValueError(
                f"The images are {given.dtype} {given.shape}; they should be uint8 [b, {shape}],"
                " at least one."
            )
        flat = given.reshape(-1, *self.shape[-3:])
        labels = {kind: np.zeros(len(flat), np.int32) for kind in self._parts.config.data.classes}
        image = self._parts.task.prepare(Source(flat, labels))["image"]
        # Images of a pair together again; of another size than the network sees, if it crops.
        return image.reshape(*given.shape[:-3], *image.shape[1:])

    def _apply(self, stored: Mapping[str, Array], images: Array) -> tuple[Array, Any]:
        # What the output is not computed from is nowhere to be had: the compiler drops the zeros.
        values = [
            stored[path] if path in stored else jnp.zeros(shape.shape, shape.dtype)
            for path, shape in self._shapes.items()
        ]
        variables = jax.tree.unflatten(jax.tree.structure(self._parts.variables), values)
        logits, read_by_others = cut_out(self._parts.apply, self.output, variables, images)
        return class_logits(logits), read_by_others


def _paths(variables: PyTree) -> dict[str, Any]:
    """Returns the leaves of variables by their paths, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _typed(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Restores the dtype of values for which NumPy's files only have bytes, such as bfloat16."""
    raw = values.dtype.kind == "V" and values.dtype.itemsize == np.dtype(dtype).itemsize
    return values.view(dtype) if raw else values


def needed(parts: Forward, output: str) -> list[str]:
    """Lists the paths of the parameters and other variables that an output is computed from."""

    def apply(variables: PyTree, image: Array) -> Mapping[str, Array]:
        return {output: parts.apply(variables, image)[output]}

    read = traced.parameters_read(apply, parts.variables, parts.batch["image"])
    return [path for path, is_read in _paths(read[output]).items() if is_read]


def _check_stored(
    shapes: Mapping[str, Any], paths: Sequence[str], stored: Mapping[str, np.ndarray]
) -> None:
    missing, foreign = set(paths) - stored.keys(), stored.keys() - set(paths)
    if missing or foreign:
        what = f"lacks {min(missing)}" if missing else f"has {min(foreign)}, which is not needed"
        raise ValueError(f"The file does not fit its network: it {what}.")
    for path in paths:
        found, shape = stored[path], shapes[path]
        if (found.shape, found.dtype) != (shape.shape, shape.dtype):
            raise ValueError(
                f"The file does not fit its network: {path} is {found.dtype} {found.shape}, not"
                f" {shape.dtype} {shape.shape}."
            )


def find_output(parts: Experiment, name: str) -> str:
    """Finds an output that classifies.

    Args:
        parts: The parts of a run.
        name: Its name, or the number at the end of it: ``45`` is ``exit_45``.

    Returns:
        Its name.

    Raises:
        ValueError: If there is none, several end so, or it does not classify.
    """
    names = objectives.accurate(parts.objectives, parts.outputs, parts.batch)
    classify = sorted({parts.objectives[each].output for each in names})
    if name in classify:
        return name
    if name in parts.outputs:
        known = nearest(name, classify)
        raise ValueError(f"The output '{name}' has no objective on labels to classify.{known}")
    ends = [(each, _number(each)) for each in classify]
    found = [each for each, number in ends if name.isdecimal() and number == int(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"Several outputs end with {name}: {', '.join(found)}; name one of them.")
    numbered = [
        (abs(n - int(name)), each) for each, n in ends if name.isdecimal() and n is not None
    ]
    close = min(numbered)[1] if numbered else name
    raise ValueError(f"No output that classifies is called '{name}'.{nearest(close, classify)}")


def validated(runs: Runs, kept: TrainState | Best, run: int) -> dict[str, float]:
    """Measures the outputs that predict what the main output does, to choose one of them.

    The outputs of one network are models of several depths, among which held-out images choose (Guo
    et al., *The Shallow End*, Section 4.2).

    Args:
        runs: The runs, with their data.
        kept: Their weights.
        run: Which of them, from 0.

    Returns:
        The accuracy on validation images by output, in [0, 1].

    Raises:
        ValueError: If there are no validation images, or the main output does not classify.
    """
    parts = runs.parts
    if not runs.examples["validation"].shape[1]:
        raise ValueError(
            "The run has no validation images to choose an output on, and test images are not for"
            " choosing: name an output, or train with some held out, such as"
            " --config.data.task.validation_per_class=50 (of pairs: validation=500)."
        )
    accurate = objectives.accurate(parts.objectives, parts.outputs, parts.batch)
    targets = {n: (parts.objectives[n].output, parts.objectives[n].target) for n in accurate}
    of_main = {target for output, target in targets.values() if output == MAIN}
    if not of_main:
        raise ValueError("The main output does not classify; name the output to write.")
    found = runs.measure(kept.params, kept.model_state, "validation")
    return {
        output: float(found[f"{name}/top_1"][run])
        for name, (output, target) in targets.items()
        if target in of_main
    }


def _best(runs: Runs, accuracies: Mapping[str, float]) -> str:
    """Returns the most accurate output; of equals the one that is computed from the least."""
    parts = runs.parts
    most = max(accuracies.values())
    equals = [output for output, each in accuracies.items() if each == most]
    image = jax.ShapeDtypeStruct((1, *parts.batch["image"].shape[1:]), parts.batch["image"].dtype)
    sets = [{output} for output in equals]
    costs = traced.multiply_adds_together(parts.apply, sets, parts.variables, image)
    return equals[int(np.argmin(costs))]


def _number(name: str) -> int | None:
    """Returns the number at the end of a name, if there is one."""
    found = re.search(r"\d+$", name)
    return int(found[0]) if found else None


def save(
    path: str | Path, config: ConfigDict, output: str, stored: Mapping[str, np.ndarray]
) -> None:
    """Writes an output to a new file.

    Args:
        path: The file.
        config: The config of the run.
        output: Name of the output.
        stored: What it is computed from, arrays by path.

    Raises:
        FileExistsError: If there is such a file.
        FileNotFoundError: If there is no directory for it.
    """
    path = command.check_new(path)
    texts = {"format": FORMAT, "config": configuration.to_json(config), "output": output}
    # Written aside and renamed: whoever finds the file finds all of it.
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **{k: np.array(v) for k, v in texts.items()}, **stored)
    partial.replace(path)


def load(path: str | Path) -> Exported:
    """Loads what ``save`` wrote.

    Nothing in the file is executed, whoever made it: a part that its config names as
    ``package.module:Class`` is refused, unless ``SIRE_JAX_TRUST=package`` is in the environment.

    Args:
        path: The file.

    Returns:
        The output, to be applied to images.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or not such a file, or names code that is not allowed.
    """
    path = files.expanded(path)
    found = untrusted.read_arrays(path)
    kind, config, output = (str(found.pop(key, "")) for key in ("format", "config", "output"))
    if kind != FORMAT:
        raise ValueError(f"{path} was not exported by sire_jax: it has no format '{FORMAT}'.")
    described = configuration.from_json(config, f"The config of {path}")
    untrusted.check_names(described, path)
    try:
        return Exported(configuration.completed(described), output, found)
    # A config can be made so that building from it fails in more ways than are foreseen.
    except Exception as error:
        raise ValueError(f"{path} can't be used: {error}") from error


def export(
    workdir: str | Path,
    name: str,
    out: str | Path,
    seed: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes one output of a trained network to a file of its own.

    Args:
        workdir: The run.
        name: The output (``find_output``); ``"best"`` the most accurate on the validation images of
            the run (``validated``), which have to be at hand.
        out: The file, which must not exist.
        seed: Seed of the run among those of the workdir, by default the first. Its weights are the
            best on validation data if it has any, else the last.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Returns:
        ``{"output", "validation", "parameters", "multiply_adds", "whole": {"parameters",
        "multiply_adds"}, "bytes"}``; multiply-adds are of one example, ``validation`` are the
        accuracies that the output was chosen by, ``{}`` if it was named.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        FileExistsError: If the file exists.
        ValueError: If there is no such output or seed, that run has diverged, there are no
            validation images to choose on, or an override changes the run.
    """
    path = command.check_new(out)
    runs = open_run(workdir, overrides, needs_data=name == BEST)
    parts, config = runs.parts, runs.config
    output = "" if name == BEST else find_output(parts, name)
    seeds = range(config.seed, config.seed + config.seeds)
    seed = config.seed if seed is None else seed
    if seed not in seeds:
        raise ValueError(f"--seed is {seed}; the run has the seeds {seeds[0]} to {seeds[-1]}.")
    run = seeds.index(seed)
    kept = kept_weights(runs, workdir, used=(run,))
    accuracies = validated(runs, kept, run) if name == BEST else {}
    output = output or _best(runs, accuracies)
    values = _paths({"params": kept.params, **kept.model_state})
    stored = {key: np.asarray(values[key][run]) for key in needed(parts, output)}
    save(path, config, output, stored)
    image = jax.ShapeDtypeStruct((1, *parts.batch["image"].shape[1:]), parts.batch["image"].dtype)
    sets = [{output}, set(parts.outputs)]
    costs = traced.multiply_adds_together(parts.apply, sets, parts.variables, image)
    return {
        "output": output,
        "validation": accuracies,
        "parameters": sum(v.size for key, v in stored.items() if key.startswith("params/")),
        "multiply_adds": costs[0],
        "whole": {
            "parameters": traced.size(parts.variables["params"]),
            "multiply_adds": costs[1],
        },
        "bytes": path.stat().st_size,
    }


def report(out: str | Path, written: Mapping[str, Any]) -> str:
    """Says what was written, and how it is loaded."""
    chosen = [[name, f"{each:.4f}"] for name, each in written["validation"].items()]
    lines = [tables.align([["output", "on validation"], *chosen]), ""] if chosen else []
    lines += [f"{out}: the output '{written['output']}', {written['bytes']:,} bytes"]
    for key, what in (("parameters", "parameters"), ("multiply_adds", "multiply-adds an image")):
        share = written[key] / max(1, written["whole"][key])
        lines.append(f"  {written[key]:,} {what}, {share:.1%} of the whole network's")
    lines += ["", "from sire_jax.export import load", f'model = load("{out}")']
    return "\n".join([*lines, "probabilities = model(images)"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--exit", required=True, help="an output, the number at its end, or best")
    parser.add_argument("--out", required=True, help="the file to write, such as exit_45.npz")
    parser.add_argument("--seed", type=int, help="seed of the run; by default the first")
    known, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        written = export(known.workdir, known.exit, known.out, known.seed, overrides)
    print(report(known.out, written))


if __name__ == "__main__":
    main()
