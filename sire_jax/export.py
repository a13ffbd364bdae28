"""Writes one output of a trained network to a file of its own, and applies such files.

``python -m sire_jax.export --workdir=DIR --exit=45 --out=exit_45.npz`` writes the output
``exit_45``, with only what it is computed from; ``--exit=best`` the one that is right on most
validation images. In Python::

    import sire_jax as sj
    model = sj.inference.load("exit_45.npz")
    probabilities = model(images)  # uint8 [b, h, w, c] -> [b, classes]
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sire_jax import configuration, objectives, text, traced, untrusted
from sire_jax.configuration.experiment import Experiment
from sire_jax.inference.exported import load as load
from sire_jax.inference.exported import needed, paths, save
from sire_jax.job import command
from sire_jax.networks import MAIN
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import kept_weights, open_run
from sire_jax.state import Best, TrainState
from sire_jax.storage.workdir import is_own
from sire_jax.text import nearest

# In place of an output's name: the best on validation images.
BEST = "best"


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
    classify = sorted({parts.objectives[objective].output for objective in names})
    if name in classify:
        return name
    if name in parts.outputs:
        hint = nearest(name, classify)
        raise ValueError(f"The output '{name}' has no objective on labels to classify.{hint}")
    ends = [(output, _number(output)) for output in classify]
    matches = [output for output, number in ends if name.isdecimal() and number == int(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(
            f"Several outputs end with {name}: {', '.join(matches)}; name one of them."
        )
    numbered = [
        (abs(n - int(name)), output) for output, n in ends if name.isdecimal() and n is not None
    ]
    # Of `46` the nearest number says more than the nearest spelling.
    close = min(numbered)[1] if numbered else name
    raise ValueError(f"No output that classifies is called '{name}'.{nearest(close, classify)}")


def validated(runs: Runs, weights: TrainState | Best, run: int) -> dict[str, float]:
    """Measures the outputs that predict what the main output does, to choose one of them.

    The outputs of one network are models of several depths, among which held-out images choose (Guo
    et al., *The Shallow End*, Section 4.2).

    Args:
        runs: The runs, with their data.
        weights: Their weights.
        run: Which of them, from 0.

    Returns:
        The accuracy on validation images by output, in [0, 1].

    Raises:
        ValueError: If there are no validation images, or the main output does not classify.
    """
    parts = runs.parts
    if not runs.feed.examples["validation"].shape[1]:
        raise ValueError(
            "The run has no validation images to choose an output on, and test images are not for"
            " choosing: name an output, or train with some held out, such as"
            " --config.data.task.validation_per_class=50 (of pairs: validation=500)."
        )
    accurate = objectives.accurate(parts.objectives, parts.outputs, parts.batch)
    targets = {
        name: (parts.objectives[name].output, parts.objectives[name].target) for name in accurate
    }
    of_main = {target for output, target in targets.values() if output == MAIN}
    if not of_main:
        raise ValueError("The main output does not classify; name the output to write.")
    metrics = runs.measure(weights.params, weights.model_state, "validation")
    return {
        output: float(metrics[f"{name}/top_1"][run])
        for name, (output, target) in targets.items()
        if target in of_main
    }


def _best(runs: Runs, accuracies: Mapping[str, float]) -> str:
    """Returns the most accurate output; of equals the one that is computed from the least."""
    most = max(accuracies.values())
    equals = [output for output, accuracy in accuracies.items() if accuracy == most]
    return equals[int(np.argmin(_costs(runs.parts, [{output} for output in equals])))]


def _costs(parts: Experiment, sets: Sequence[set[str]]) -> list[int]:
    """Counts the multiply-adds of one example for sets of outputs."""
    batch = parts.batch["image"]
    image = jax.ShapeDtypeStruct((1, *batch.shape[1:]), batch.dtype)
    return traced.multiply_adds_together(parts.apply, sets, parts.variables, image)


def _number(name: str) -> int | None:
    """Returns the number at the end of a name, if there is one."""
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else None


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
    # Only the run that is written must not have diverged.
    weights = kept_weights(runs, workdir, used=(run,))
    accuracies = validated(runs, weights, run) if name == BEST else {}
    output = output or _best(runs, accuracies)
    values = paths(weights.variables)
    stored = {key: np.asarray(values[key][run]) for key in needed(parts, output)}
    save(path, config, output, stored)
    # Who has trained by a config need not allow its modules to load what came of it.
    if is_own(workdir):
        untrusted.remember(config, configuration.to_json(config))
    cost, whole = _costs(parts, [{output}, set(parts.outputs)])
    return {
        "output": output,
        "validation": accuracies,
        "parameters": sum(v.size for key, v in stored.items() if key.startswith("params/")),
        "multiply_adds": cost,
        "whole": {
            "parameters": traced.size(parts.variables["params"]),
            "multiply_adds": whole,
        },
        "bytes": path.stat().st_size,
    }


def report(out: str | Path, written: Mapping[str, Any]) -> str:
    """Says what was written, and how it is loaded."""
    chosen = [[name, f"{accuracy:.4f}"] for name, accuracy in written["validation"].items()]
    lines = [text.align([["output", "on validation"], *chosen]), ""] if chosen else []
    lines += [f"{out}: the output '{written['output']}', {written['bytes']:,} bytes"]
    for key, unit in (("parameters", "parameters"), ("multiply_adds", "multiply-adds an image")):
        share = written[key] / max(1, written["whole"][key])
        lines.append(f"  {written[key]:,} {unit}, {share:.1%} of the whole network's")
    lines += ["", "import sire_jax as sj", f'model = sj.inference.load("{out}")']
    return "\n".join([*lines, "probabilities = model(images)"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--exit", required=True, help="an output, the number at its end, or best")
    parser.add_argument("--out", required=True, help="the file to write, such as exit_45.npz")
    parser.add_argument("--seed", type=int, help="seed of the run; by default the first")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        written = export(options.workdir, options.exit, options.out, options.seed, overrides)
    print(report(options.out, written))


if __name__ == "__main__":
    main()
