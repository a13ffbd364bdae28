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
from sire_jax.configuration.experiment import Experiment
from sire_jax.data import contents
from sire_jax.inference import exported
from sire_jax.inference.exported import paths
from sire_jax.job import command
from sire_jax.runs.divergence import DIVERGED
from sire_jax.runs.feed import NoFeed
from sire_jax.runs.runs import Checkpoint, Runs
from sire_jax.runs.trained import kept_weights, open_run, restore
from sire_jax.storage.checkpoint import Checkpoints
from sire_jax.storage.workdir import CHECKPOINTS, check_writable

__all__ = ["Release", "load", "pack", "read", "shipped", "unpack"]

PyTree = Any
# What a file says that it is, with the version of its layout.
FORMAT = "sire_jax release 1"
_WEIGHTS = "weights/"
_MOST_STEPS = 2**31
_SHIPPED = Path(__file__).with_name("released")


@dataclass(frozen=True)
class Release:
    """A trained network as its file has it.

    Attributes:
        config: Of its run, with its seed alone.
        data: ``data.json`` of the run.
        step: After how many steps of training these weights were.
        steps: How many there were in all.
        score: Validation accuracy of these weights, if they are the best; -1 if they are the last.
        measured: What it is measured to do on the test images, in half precision, by metric.
        weights: Parameters and other variables by path, ``"params/backbone/output/kernel"``.
    """

    config: ConfigDict
    data: str
    step: int
    steps: int
    score: float
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
        ValueError: If there is no such seed, that run has diverged or doesn't say what its data
            are, a weight is too large for half precision, or an override changes the run.
    """
    path = command.check_new(out)
    runs = open_run(workdir, overrides)
    described = files.expanded(workdir) / contents.FILE
    if not described.exists():
        raise ValueError(f"{workdir} has no {contents.FILE}, by which its data would be known.")
    seeds = list(runs.parts.seeds)
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise ValueError(f"--seed is {seed}; the run has the seeds {seeds[0]} to {seeds[-1]}.")
    run = seeds.index(seed)
    kept = kept_weights(runs, workdir, used=(run,))
    halved = jax.tree.map(lambda values: _half(values[run]), kept.variables)
    for key, values in paths(halved).items():
        if not np.isfinite(np.asarray(values, np.float32)).all():
            raise ValueError(f"{key} has values that half precision can't hold.")
    last, best = restore(runs, files.expanded(workdir) / CHECKPOINTS)
    made = Release(
        _portable(runs.config, seed),
        described.read_text(),
        int(np.asarray(kept.step)[run]),
        int(np.asarray(last.step)[run]),
        -1.0 if best is None else float(np.asarray(best.score)[run]),
        _measure(runs, halved, run),
        paths(halved),
    )
    _write(path, made)
    return made


def _half(values: Any) -> np.ndarray:
    """Rounds single precision to half; other types stay."""
    if values.dtype != jnp.float32:
        return np.asarray(values)
    with np.errstate(over="ignore"):  # An infinity is refused by its name.
        return np.asarray(values).astype(np.float16)


def _portable(config: ConfigDict, seed: int) -> ConfigDict:
    """Returns the config of one seed, without what is of a machine."""
    portable, usual = config.copy_and_resolve_references(), configuration.default()
    with portable.unlocked():
        portable.update(seed=seed, seeds=1)
        for key in ("devices", "devices_share", "compilation_cache"):
            portable[key] = usual[key]
        for key in ("dir", "cache", "workers", "threads"):
            portable.data[key] = usual.data[key]
    return portable


def _measure(runs: Runs, halved: PyTree, run: int) -> dict[str, float]:
    """Measures the weights of one of the runs, once they have been rounded, in the place of all."""
    number = runs.config.seeds
    variables = jax.tree.map(
        lambda x, shape: jnp.stack([jnp.asarray(x, shape.dtype)] * number),
        halved,
        runs.parts.variables,
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
        "training": json.dumps({"step": made.step, "steps": made.steps, "score": made.score}),
        "measured": json.dumps(made.measured),
    }
    weights = {f"{_WEIGHTS}{key}": values for key, values in made.weights.items()}
    files.replace_arrays(path, {**texts, **weights})


def read(name: str | Path) -> Release:
    """Reads a packed network; nothing in the file is executed.

    Args:
        name: What a network is called that comes with the package, or a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or not such a file, or its config names code that is not
            allowed (``SIRE_JAX_TRUST``).
    """
    path = files.expanded(shipped().get(str(name), name))
    if not path.suffix and not path.exists():
        registry.choose(shipped(), str(name), "released network")
    arrays = untrusted.read_arrays(path)
    kind, config, data, training, measured = (
        str(arrays.pop(key, "")) for key in ("format", "config", "data", "training", "measured")
    )
    if kind != FORMAT:
        raise ValueError(f"{path} was not packed by sire_jax.release: it has no '{FORMAT}'.")
    described = configuration.from_json(config, f"The config of {path}")
    untrusted.check_names(described, config, path)
    about = _numbers(training, f"The training of {path}")
    figures = _numbers(measured, f"What {path} was measured to do")
    if set(about) != {"step", "steps", "score"}:
        raise ValueError(f"{path} is damaged: it says {sorted(about)} of its training.")
    step, steps = int(about["step"]), int(about["steps"])
    weights = {key.removeprefix(_WEIGHTS): values for key, values in arrays.items()}
    whole = configuration.completed(described)
    return Release(whole, data, step, steps, about["score"], figures, weights)


def _numbers(source: str, what: str) -> dict[str, float]:
    """Reads a mapping of names to numbers."""
    found = untrusted.parse_json(source, what)
    numbers = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(n, int | float) and -1 <= n < _MOST_STEPS for n in numbers):
        raise ValueError(f"{what} is damaged: it is no mapping of names to numbers.")
    return dict(found)


def unpack(name: str | Path, workdir: str | Path) -> Release:
    """Makes a workdir of a packed network, as if it had been trained there to its end.

    Args:
        name: What a network is called that comes with the package, or a file.
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
    parts = _build(made, str(name))
    weights = _weights(made, parts, str(name))
    path = check_writable(workdir)
    if (path / "config.json").exists():
        raise FileExistsError(f"{path} holds a run; choose another --workdir.")
    files.replace(path / contents.FILE, made.data)
    kept = contents.read(path)
    runs = Runs(parts, lambda *_: NoFeed(kept.names if kept else {}))
    checkpoints = Checkpoints(path / CHECKPOINTS)
    try:
        checkpoints.save(made.steps, _checkpoint(runs, made, weights))
    finally:
        checkpoints.close()
    results = {
        "step": made.steps,
        "seconds": 0.0,
        "step_seconds": None,
        "weights": "half precision",
        DIVERGED: [None],
        "splits": {"test": {name: [value] for name, value in made.measured.items()}},
    }
    files.replace(path / "results.json", json.dumps(results, indent=2) + "\n")
    # From now on the directory is a run's. It is not one that this user has trained, so that code
    # that it names is asked for each time.
    files.replace(path / "config.json", configuration.to_json(made.config))
    return made


def load(name: str | Path) -> tuple[Experiment, PyTree]:
    """Loads a packed network for use in Python; no data are needed, and nothing is written.

    >>> import numpy as np
    >>> parts, variables = load("pairs")
    >>> pair = np.zeros((1, 2, 14, 14, 1), np.uint8)  # pixels as the task has them
    >>> {name: logits.shape for name, logits in parts.apply(variables, pair).items()}
    {'main': (1, 1), 'digits': (1, 2, 10)}

    Args:
        name: What a network is called that comes with the package, or a file.

    Returns:
        The parts of its run, whose ``network`` it is and whose ``apply`` takes pixels; and its
        variables.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``unpack``.
    """
    made = read(name)
    parts = _build(made, str(name))
    variables = jax.tree.map(lambda x: x[0], _weights(made, parts, str(name)))
    return parts, variables


def _build(made: Release, name: str) -> Experiment:
    """Builds the parts of the run.

    Raises:
        ValueError: If they can't be built.
    """
    try:
        if made.config.seeds != 1:
            raise ValueError(f"config.seeds is {made.config.seeds}; it should be 1")
        return experiment.build(made.config)
    # A config can be made so that building from it fails in more ways than are foreseen.
    except Exception as error:
        raise ValueError(f"{name} can't be used: {error}") from error


def _weights(made: Release, parts: Experiment, name: str) -> PyTree:
    """Returns the variables of the network, in its own types, with a first axis for the run.

    Raises:
        ValueError: If what is stored is not what the network has.
    """
    shapes, stored = paths(parts.variables), dict(made.weights)
    typed = {key: exported.typed(stored[key], shapes[key].dtype) for key in shapes if key in stored}
    wrong = [
        key
        for key, shape in shapes.items()
        if key not in typed
        or typed[key].shape != shape.shape
        or not np.can_cast(typed[key].dtype, shape.dtype, "same_kind")
        or not np.isfinite(typed[key].astype(np.float32)).all()
    ]
    wrong += sorted(stored.keys() - shapes.keys())
    if wrong:
        raise ValueError(f"{name} does not fit its network: {wrong[0]} is missing or another.")
    values = [jnp.asarray(typed[key], shape.dtype)[None] for key, shape in shapes.items()]
    return jax.tree.unflatten(jax.tree.structure(parts.variables), values)


def _checkpoint(runs: Runs, made: Release, variables: PyTree) -> Checkpoint:
    """Returns what a checkpoint of the run holds at its end, with fresh states of optimizers."""
    start, rest = runs.start(), dict(variables)
    weights = {"params": rest.pop("params"), "model_state": rest}
    state = replace(start.state, **weights, step=jnp.full_like(start.state.step, made.steps))
    if start.best is None:
        return start._replace(state=state)
    step, score = (
        jnp.full_like(start.best.step, made.step),
        jnp.full_like(start.best.score, made.score),
    )
    return start._replace(state=state, best=replace(start.best, **weights, step=step, score=score))


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
    if options.open and (overrides or options.seed is not None):
        rest = overrides[0] if overrides else f"--seed={options.seed}"
        parser.error(f"--open takes the run as it is: leave out {rest}")
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
