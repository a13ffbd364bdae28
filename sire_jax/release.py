"""Packs a trained network into one small file, and opens such files as runs.

``python -m sire_jax.release --workdir=DIR --out=FILE.npz`` packs the network of one seed, its
weights in half precision, with its config, what its data are, and what it is measured to do then.
``python -m sire_jax.release --open=FILE.npz --workdir=DIR`` makes a workdir of it, which
``evaluate``, ``early_exit``, ``explain``, ``export`` and all others take as one that was trained
here. Networks that come with the package are opened by their names: ``--open=pairs``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sire_jax import configuration, files, registry, text, untrusted
from sire_jax.configuration import experiment
from sire_jax.data import contents
from sire_jax.inference.exported import paths
from sire_jax.job import command
from sire_jax.runs.divergence import DIVERGED
from sire_jax.runs.runs import Checkpoint, Runs
from sire_jax.runs.trained import kept_weights, open_run
from sire_jax.storage.checkpoint import Checkpoints
from sire_jax.storage.workdir import CHECKPOINTS, Workdir, check_writable

PyTree = Any
# What a file says that it is, with the version of its layout.
FORMAT = "sire_jax release 1"
_WEIGHTS = "weights/"
_SHIPPED = Path(__file__).with_name("released")


@dataclass(frozen=True)
class Release:
    """A trained network as its file has it.

    Attributes:
        config: Of its run, with its seed alone.
        data: ``data.json`` of the run.
        step: After how many steps of training.
        measured: What it is measured to do on the test images, in half precision, by metric.
        weights: Parameters and other variables by path, ``"params/backbone/output/kernel"``.
    """

    config: ConfigDict
    data: str
    step: int
    measured: Mapping[str, float]
    weights: Mapping[str, np.ndarray]

    def __str__(self) -> str:
        number = sum(v.size for k, v in self.weights.items() if k.startswith("params/"))
        lines = [["measured on the test images", ""]]
        lines += [[name, text.number(value)] for name, value in self.measured.items()]
        return (
            f"{self.config.name}: {number:,} parameters, trained on {self.config.data.name} for"
            f" {self.step:,} steps, seed {self.config.seed}.\n{text.align(lines)}"
        )


def shipped() -> dict[str, Path]:
    """Returns the files of networks that come with the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.npz"))}


def _halved(tree: PyTree) -> PyTree:
    """Rounds single precision to half; other types stay."""
    return jax.tree.map(
        lambda x: np.asarray(x).astype(np.float16) if x.dtype == jnp.float32 else np.asarray(x),
        tree,
    )


def pack(
    workdir: str | Path,
    out: str | Path,
    seed: int | None = None,
    overrides: Sequence[str] = (),
) -> Release:
    """Packs the network of a run into a file: the best on validation data if it has any.

    Args:
        workdir: The run; its data have to be at hand, to measure what is packed.
        out: The file, which must not exist.
        seed: Seed of the run among those of the workdir, by default the first.
        overrides: ``--config.data.dir=DIR`` and the like, where the data have moved.

    Returns:
        What was packed.

    Raises:
        FileNotFoundError: If there is no run, no checkpoint, or the data set is not prepared.
        FileExistsError: If the file exists.
        ValueError: If there is no such seed, that run has diverged, a weight is too large for half
            precision, or an override changes the run.
    """
    path = command.check_new(out)
    runs = open_run(workdir, overrides)
    seeds = list(runs.parts.seeds)
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise ValueError(f"--seed is {seed}; the run has the seeds {seeds[0]} to {seeds[-1]}.")
    run = seeds.index(seed)
    kept = kept_weights(runs, workdir, used=(run,))
    halved = _halved(kept.variables)
    flat = {key: values[run] for key, values in paths(halved).items()}
    for key, values in flat.items():
        if not np.isfinite(np.asarray(values, np.float32)).all():
            raise ValueError(f"{key} has values that half precision can't hold.")
    config = runs.config.copy_and_resolve_references()
    with config.unlocked():
        config.update(seed=seed, seeds=1)
    made = Release(
        config,
        (files.expanded(workdir) / contents.FILE).read_text(),
        int(np.asarray(kept.step)[run]),
        _measure(runs, halved, run),
        flat,
    )
    _write(path, made)
    return made


def _measure(runs: Runs, halved: PyTree, run: int) -> dict[str, float]:
    """Measures weights that have been rounded, of one of the runs."""
    variables = jax.tree.map(
        lambda x, shape: jnp.asarray(x, shape.dtype), halved, runs.parts.variables
    )
    params = variables.pop("params")
    fitted = runs.fit(params, variables)
    metrics = runs.measure(params, variables, "test", fitted)
    return {name: float(values[run]) for name, values in sorted(metrics.items())}


def _write(path: Path, made: Release) -> None:
    texts = {
        "format": FORMAT,
        "config": configuration.to_json(made.config),
        "data": made.data,
        "step": str(made.step),
        "measured": json.dumps(made.measured),
    }
    weights = {f"{_WEIGHTS}{key}": values for key, values in made.weights.items()}
    files.replace_arrays(path, {**texts, **weights})


def read(name: str | Path) -> Release:
    """Reads a packed network; nothing in the file is executed.

    Args:
        name: A file, or what a network is called that comes with the package.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or not such a file, or its config names code that is not
            allowed (``SIRE_JAX_TRUST``).
    """
    path = files.expanded(name)
    if not path.suffix and not path.exists():
        path = registry.choose(shipped(), str(name), "released network")
    arrays = untrusted.read_arrays(path)
    kind, config, data, step, measured = (
        str(arrays.pop(key, "")) for key in ("format", "config", "data", "step", "measured")
    )
    if kind != FORMAT:
        raise ValueError(f"{path} was not packed by sire_jax.release: it has no '{FORMAT}'.")
    described = configuration.from_json(config, f"The config of {path}")
    untrusted.check_names(described, config, path)
    weights = {key.removeprefix(_WEIGHTS): values for key, values in arrays.items()}
    figures = untrusted.parse_json(measured, f"What {path} was measured to do")
    if not step.isdecimal() or not isinstance(figures, dict):
        raise ValueError(f"{path} is damaged: it has no step, or no measurements.")
    return Release(configuration.completed(described), data, int(step), figures, weights)


def unpack(name: str | Path, workdir: str | Path) -> Release:
    """Makes a workdir of a packed network, as if it had been trained there.

    Args:
        name: A file, or what a network is called that comes with the package.
        workdir: The directory, in which there must be no run.

    Returns:
        What was unpacked.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If the directory holds a run.
        ValueError: If the file is damaged, its weights are not those of its network, or its config
            names code that is not allowed (``SIRE_JAX_TRUST``).
        PermissionError: If the directory can't be written to.
    """
    made = read(name)
    _check(made, str(name))
    path = check_writable(workdir)
    if (path / "config.json").exists():
        raise FileExistsError(f"{path} holds a run; choose another --workdir.")
    files.replace(path / contents.FILE, made.data)
    directory = Workdir(path, made.config)
    directory.write_config()
    runs = open_run(path, needs_data=False)
    checkpoints = Checkpoints(path / CHECKPOINTS)
    try:
        checkpoints.save(made.step, _checkpoint(runs, made))
    finally:
        checkpoints.close()
    results = {
        "step": made.step,
        "seconds": 0.0,
        "step_seconds": None,
        "weights": "half precision",
        DIVERGED: [None],
        "splits": {"test": {name: [value] for name, value in made.measured.items()}},
    }
    directory.write_results(results)
    return made


def _check(made: Release, name: str) -> None:
    """Checks, before anything is written, that the weights are those of the network."""
    shapes = paths(experiment.forward(made.config).variables)
    stored = {key: values.shape for key, values in made.weights.items()}
    wrong = [key for key, shape in shapes.items() if stored.get(key) != shape.shape]
    wrong += sorted(stored.keys() - shapes.keys())
    if wrong:
        raise ValueError(f"{name} does not fit its network: {wrong[0]} is missing or another.")


def _checkpoint(runs: Runs, made: Release) -> Checkpoint:
    """Returns what a checkpoint of the run holds at its end, with fresh states of optimizers."""
    shapes = paths(runs.parts.variables)
    values = [jnp.asarray(made.weights[key], shape.dtype)[None] for key, shape in shapes.items()]
    variables = jax.tree.unflatten(jax.tree.structure(runs.parts.variables), values)
    params = variables.pop("params")
    start = runs.start()
    weights = {
        "params": params,
        "model_state": variables,
        "step": jnp.full_like(start.state.step, made.step),
    }
    best = None if start.best is None else replace(start.best, **weights)
    return start._replace(state=replace(start.state, **weights), best=best)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", help="directory of the run, or of the one to be made")
    parser.add_argument("--out", help="the file to write, such as pairs.npz")
    parser.add_argument("--seed", type=int, help="seed of the run; by default the first")
    names = ", ".join(shipped())
    parser.add_argument("--open", help=f"a file, or one that comes with the package: {names}")
    options, overrides = parser.parse_known_args(arguments)
    if options.workdir is None or (options.out is None) == (options.open is None):
        parser.error("give --workdir, and either --out, to pack it, or --open, to make it")
    with command.readable_errors():
        if options.out:
            made = pack(options.workdir, options.out, options.seed, overrides)
        else:
            made = unpack(options.open, options.workdir)
    print(made)
    if options.out:
        print(f"{options.out}: {files.expanded(options.out).stat().st_size:,} bytes")
    else:
        print(f"Now, for example: python -m sire_jax.evaluate --workdir={options.workdir}")


if __name__ == "__main__":
    main()
