"""Trains a network: ``python -m sire_jax.train --config=configs/X.py:variant --workdir=DIR``."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sire_jax import command, configuration, experiment, figures, parallel, tables, traced
from sire_jax.checkpoint import Checkpoints
from sire_jax.diagnostics import gradient_flow
from sire_jax.metrics import Metrics, means
from sire_jax.networks import MAIN
from sire_jax.progress import Progress, Stop, stop_on_signals
from sire_jax.runs import Runs
from sire_jax.step import Best, TrainState
from sire_jax.workdir import Workdir, read_results

PyTree = Any


class InterruptedRunError(Exception):
    """Somebody stopped the run; it has been saved."""


class NonFiniteLossError(Exception):
    """A loss was not a number or infinite; the newest checkpoint is from before."""


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or goes on with, the run of a config.

    Args:
        config: The config.
        workdir: Where the run is kept; one that holds a run of this config is resumed.

    Returns:
        The final measurements, as in ``results.json``.

    Raises:
        ValueError: If the config, the data or the workdir don't fit; before anything is compiled.
        FileNotFoundError: If the data set is not prepared.
        NonFiniteLossError: If a loss is not finite.
        InterruptedRunError: If a signal asked to stop; the state has been saved.
    """
    config = configuration.with_groups(config)
    parts = experiment.build(config)
    directory = Workdir(workdir, config)
    logs = _Logs(directory, config.tensorboard)
    runs = Runs(parts)
    directory.write_config()
    checkpoints = Checkpoints(directory.checkpoints)
    results = read_results(directory.path)
    if results and results["step"] == checkpoints.latest() == config.epochs * runs.steps_per_epoch:
        checkpoints.close()
        return results
    print(_describe(parts, runs), flush=True)
    try:
        with stop_on_signals() as stop:
            return _train(config, parts, runs, directory, logs, checkpoints, stop)
    finally:
        checkpoints.close()


def _train(
    config: ConfigDict,
    parts: experiment.Experiment,
    runs: Runs,
    directory: Workdir,
    logs: "_Logs",
    checkpoints: Checkpoints,
    stop: Stop,
) -> dict[str, Any]:
    # ---- Start, or go on.
    started = time.perf_counter()
    state, sums, best, spent = runs.checkpoint_tree()
    step = checkpoints.latest() or 0
    if step:
        state, sums, best, spent = runs.place(checkpoints.restore((state, sums, best, spent)))
        print(f"Going on after step {step}.", flush=True)
    else:
        # What is left if the first losses are not finite.
        checkpoints.save(0, (state, sums, best, spent))
    before = float(spent) - started

    def seconds() -> jax.Array:
        return jnp.asarray(before + time.perf_counter(), jnp.float32)

    directory.forget_after(step)
    steps = runs.steps_per_epoch
    progress = Progress(config.epochs, steps, _images_per_step(parts), step)
    step_seconds: list[float] = []

    # ---- Train.
    while step < config.epochs * steps and not stop.signal:
        epoch, first = divmod(step, steps)
        order = runs.epoch_order(state, epoch)
        while first < steps and not stop.signal:
            count = min(config.steps_per_call, steps - first)
            called = time.perf_counter()
            state, sums, broken = runs.take_steps(state, sums, order, first, count)
            _check_finite(broken, config.seed, directory)
            step_seconds.append((time.perf_counter() - called) / count)
            first, step = first + count, step + count
            progress.advance(count)
        if first == steps:
            best, sums = _end_of_epoch(
                config, runs, logs, progress, state, sums, best, step, epoch + 1
            )
        due = config.checkpoint_every and (epoch + 1) % config.checkpoint_every == 0
        if stop.signal or step == config.epochs * steps or (due and first == steps):
            _save(checkpoints, step, (state, sums, best, seconds()), directory)
    progress.close()
    if stop.signal:
        raise InterruptedRunError(f"{stop.signal}: saved after step {step} in {directory.path}.")

    # ---- Measure the weights that count.
    kept = best if best is not None else state
    fitted = runs.fit(kept.params, kept.model_state)
    results = {
        "step": step,
        "seconds": round(float(seconds()), 2),
        # Of all runs together; the median leaves compilation out.
        "step_seconds": float(np.median(step_seconds)) if step_seconds else None,
        "weights": "best validation accuracy" if best is not None else "last",
        "splits": {
            split: _lists(runs.measure(kept.params, kept.model_state, split, fitted))
            for split in dict.fromkeys((*config.evaluate_splits, "test"))
        },
    }
    directory.write_results(results)
    figures.curves(directory.path)
    if config.gradient_flow_every:
        picture = directory.path / "gradient_flow.png"
        gradient_flow.draw({config.name: directory.path}, picture)
    return results


def _images_per_step(parts: experiment.Experiment) -> int:
    """Counts the images of a step over all runs; a pair has two."""
    two_examples = parts.batch["image"].shape[:-3]
    return math.prod(two_examples) // 2 * parts.config.batch_size * parts.config.seeds


def _end_of_epoch(
    config: ConfigDict,
    runs: Runs,
    logs: "_Logs",
    progress: Progress,
    state: TrainState,
    sums: Metrics,
    best: Best | None,
    step: int,
    epoch: int,
) -> tuple[Best | None, Metrics]:
    """Records the losses of the epoch's steps and, where due, measures."""
    losses = {name: np.asarray(each) for name, each in means(sums).items()}
    logs.record(step, epoch, "steps", losses)
    last = epoch == config.epochs
    shown = {name: each for name, each in losses.items() if name != "total/loss"}
    if last or (config.evaluate_every and epoch % config.evaluate_every == 0):
        for split in config.evaluate_splits:
            found = runs.measure(state.params, state.model_state, split)
            logs.record(step, epoch, split, found)
            shown |= {f"{split} {k}": v for k, v in found.items() if k == "main/top_1"}
            if split == "validation" and best is not None:
                best = runs.better(best, found["main/top_1"], state)
            _report_chance(config, runs, progress, epoch, split, found)
    every = config.gradient_flow_every
    if every and (last or epoch % every == 0):
        logs.record(step, epoch, gradient_flow.SPLIT, runs.gradients(state, epoch - 1))
    progress.report(step, shown)
    return best, runs.no_metrics()


def _report_chance(
    config: ConfigDict,
    runs: Runs,
    progress: Progress,
    epoch: int,
    split: str,
    found: Mapping[str, np.ndarray],
) -> None:
    """Says, at the first measurement after enough epochs and at the end, which runs guess."""
    every, after = config.evaluate_every, min(config.chance_after, config.epochs)
    first = epoch >= after > epoch - max(every, 1)
    if not after or not (first or epoch == config.epochs):
        return
    if split == "train" or f"{MAIN}/top_1" not in found:
        return
    chance = 1 / max(runs.parts.outputs[MAIN].shape[-1], 2)
    # Three standard errors of an accuracy at chance level.
    error = math.sqrt(chance * (1 - chance) / runs.examples[split].shape[1])
    accuracy = found[f"{MAIN}/top_1"]
    stuck = np.flatnonzero(accuracy <= chance + 3 * error)
    if len(stuck):
        seeds = ", ".join(str(config.seed + i) for i in stuck)
        auxiliary = [name for name, o in runs.parts.objectives.items() if o.output != MAIN]
        advice = f" or smaller weights of {', '.join(auxiliary)}" if auxiliary else ""
        progress.say(
            f"At chance level after {epoch} epoch{'s' * (epoch > 1)}: the runs with the seeds"
            f" {seeds}, whose {split} accuracy of the main output is"
            f" {accuracy[stuck].mean():.4f} (guessing: {chance:.4f}). Training may not"
            f" converge; try a smaller learning rate{advice}."
        )


def _check_finite(broken: Mapping[str, jax.Array], seed: int, directory: Workdir) -> None:
    """Raises where a loss was not finite, naming the first; the total only if it is alone."""
    first = {name: np.asarray(each) for name, each in broken.items()}
    name = min(first, key=lambda name: (first[name].min(), name == "total/loss"))
    if first[name].min() == parallel.NEVER:
        return
    run, loss = seed + int(first[name].argmin()), name.removesuffix("/loss")
    raise NonFiniteLossError(
        f"The loss '{loss}' is not finite after {first[name].min()} steps of the run with seed"
        f" {run}. {_KEPT.format(directory.checkpoints)}"
    )


_KEPT = "The last finite checkpoint is kept in {}; try a smaller learning rate or weight."


def _save(checkpoints: Checkpoints, step: int, tree: PyTree, directory: Workdir) -> None:
    """Saves a checkpoint, if it is finite: its losses were taken before the last update."""
    if not _all_finite(tree[0].params, tree[0].update_state):
        raise NonFiniteLossError(
            f"The parameters are not finite after {step} steps."
            f" {_KEPT.format(directory.checkpoints)}"
        )
    checkpoints.save(step, tree)


@jax.jit
def _all_finite(*trees: PyTree) -> jax.Array:
    numbers = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()


class _Logs:
    """``metrics.jsonl``, and TensorBoard where asked for."""

    def __init__(self, directory: Workdir, tensorboard: bool):
        self._directory, self._writer = directory, None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    "config.tensorboard needs tensorboardX: pip install 'sire_jax[tensorboard]'."
                ) from error
            self._writer = SummaryWriter(str(directory.path / "tensorboard"))

    def record(self, step: int, epoch: int, split: str, values: Mapping[str, np.ndarray]) -> None:
        self._directory.record(step, epoch, split, values)
        if self._writer is not None:
            for name, each in values.items():
                self._writer.add_scalar(f"{split}/{name}", float(np.mean(each)), step)
            self._writer.flush()


def _lists(values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: each.tolist() for name, each in values.items()}


def _describe(parts: experiment.Experiment, runs: Runs) -> str:
    config = parts.config
    params = traced.size(parts.variables["params"])
    examples = runs.examples["train"].shape[1]
    return (
        f"{config.name or 'run'}: {params:,} parameters, outputs {', '.join(parts.output_names())};"
        f" {config.seeds} run{'s' * (config.seeds > 1)} of {config.epochs} epochs,"
        f" {examples:,} examples of {config.data.name}; compiling first."
    )


def summary(results: Mapping[str, Any]) -> str:
    """Writes the final measurements as a table, mean and standard deviation over the runs."""
    lines = []
    longest = max(len(name) for values in results["splits"].values() for name in values)
    for split, values in results["splits"].items():
        for name, each in values.items():
            mean, deviation = tables.spread(each)
            spread = f" ± {tables.number(deviation)}" if len(each) > 1 else ""
            lines.append(f"  {split:<11}{name:<{longest + 2}}{tables.number(mean)}{spread}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--config", required=True, help="configs/X.py or configs/X.py:variant")
    parser.add_argument("--workdir", required=True, help="directory of the run")
    known, overrides = parser.parse_known_args(arguments)
    with command.readable_errors(NonFiniteLossError):
        try:
            results = train(configuration.load(known.config, overrides), known.workdir)
        except InterruptedRunError as stopped:
            print(stopped, flush=True)
            sys.exit(command.INTERRUPTED)
    print(f"{results['step']} steps in {results['seconds']} s ({results['weights']} weights)")
    print(summary(results))
    print(f"Curves: {Path(known.workdir) / 'curves.png'}")


if __name__ == "__main__":
    main()
