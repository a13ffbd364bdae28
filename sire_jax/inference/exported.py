"""One output of a trained network as a file of its own, which needs no workdir."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from sire_jax import configuration, files, traced, untrusted
from sire_jax.configuration import experiment
from sire_jax.configuration.experiment import Forward
from sire_jax.data.dataset import Source
from sire_jax.inference.stages import cut_out
from sire_jax.job import command
from sire_jax.metrics import class_logits
from sire_jax.text import nearest

PyTree = Any
# What a file says that it is, with the version of its layout.
FORMAT = "sire_jax export 1"


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
        self._shapes = paths(self._parts.variables)
        known = stored.keys() & self._shapes.keys()
        stored = {**stored, **{k: typed(stored[k], self._shapes[k].dtype) for k in known}}
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
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            shape = ", ".join(map(str, self.shape))
            raise ValueError(
                f"The images are {images.dtype} {images.shape}; they should be uint8 [b, {shape}],"
                " at least one."
            )
        flat = images.reshape(-1, *self.shape[-3:])
        # A source has labels; nothing that is computed here depends on them.
        labels = {kind: np.zeros(len(flat), np.int32) for kind in self._parts.config.data.classes}
        image = self._parts.task.prepare(Source(flat, labels))["image"]
        # Images of a pair together again; of another size than the network sees, if it crops.
        return image.reshape(*images.shape[:-3], *image.shape[1:])

    def _apply(self, stored: Mapping[str, Array], images: Array) -> tuple[Array, Any]:
        # What the output is not computed from is nowhere to be had: the compiler drops the zeros.
        values = [
            stored[path] if path in stored else jnp.zeros(shape.shape, shape.dtype)
            for path, shape in self._shapes.items()
        ]
        variables = jax.tree.unflatten(jax.tree.structure(self._parts.variables), values)
        logits, read_by_others = cut_out(self._parts.apply, self.output, variables, images)
        return class_logits(logits), read_by_others


def paths(variables: PyTree) -> dict[str, Any]:
    """Returns the leaves of variables by their paths, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def typed(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Restores the dtype of values for which NumPy's files only have bytes, such as bfloat16."""
    raw = values.dtype.kind == "V" and values.dtype.itemsize == np.dtype(dtype).itemsize
    return values.view(dtype) if raw else values


def needed(parts: Forward, output: str) -> list[str]:
    """Lists the paths of the parameters and other variables that an output is computed from."""

    def apply(variables: PyTree, image: Array) -> Mapping[str, Array]:
        return {output: parts.apply(variables, image)[output]}

    marks = traced.parameters_read(apply, parts.variables, parts.batch["image"])
    return [path for path, is_read in paths(marks[output]).items() if is_read]


def _check_stored(
    shapes: Mapping[str, Any], paths: Sequence[str], stored: Mapping[str, np.ndarray]
) -> None:
    missing, foreign = set(paths) - stored.keys(), stored.keys() - set(paths)
    if missing or foreign:
        fault = f"lacks {min(missing)}" if missing else f"has {min(foreign)}, which is not needed"
        raise ValueError(f"The file does not fit its network: it {fault}.")
    for path in paths:
        values, shape = stored[path], shapes[path]
        if (values.shape, values.dtype) != (shape.shape, shape.dtype):
            raise ValueError(
                f"The file does not fit its network: {path} is {values.dtype} {values.shape}, not"
                f" {shape.dtype} {shape.shape}."
            )


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
    files.replace_arrays(path, {**texts, **stored})


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
    arrays = untrusted.read_arrays(path)
    kind, config, output = (str(arrays.pop(key, "")) for key in ("format", "config", "output"))
    if kind != FORMAT:
        raise ValueError(f"{path} was not exported by sire_jax: it has no format '{FORMAT}'.")
    described = configuration.from_json(config, f"The config of {path}")
    untrusted.check_names(described, config, path)
    try:
        return Exported(configuration.completed(described), output, arrays)
    # A config can be made so that building from it fails in more ways than are foreseen.
    except Exception as error:
        raise ValueError(f"{path} can't be used: {error}") from error
