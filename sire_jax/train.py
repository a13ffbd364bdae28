"""Trains a network: ``python -m sire_jax.train --config=configs/X.py:variant --workdir=DIR``.

With ``--rehearse`` it takes some steps only, keeps nothing, and says what the whole would take.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sire_jax import configuration, files, rehearsal, text, traced
from sire_jax.configuration import experiment
from sire_jax.diagnostics import figures, gradient_flow
from sire_jax.job import command, cpu, distributed, lock
from sire_jax.job.progress import Stop, stop_on_signals
from sire_jax.runs.divergence import DIVERGED, NonFiniteLossError, converged, described
from sire_jax.runs.gradient_flow import check as check_gradient_flow
from sire_jax.runs.runs import Runs
from sire_jax.runs.training import Training
from sire_jax.storage import trees
from sire_jax.storage.checkpoint import Checkpoints, room
from sire_jax.storage.logs import Logs
from sire_jax.storage.workdir import Workdir, read_results


class InterruptedRunError(Exception):
    """Somebody stopped the run; it has been saved.

    Attributes:
        status: The exit status that says who: a person, or a system that starts it again.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or goes on with, the run of a config.

    Args:
        config: The config.
        workdir: Where the run is kept; one that holds a run of this config is resumed.

    Returns:
        The final measurements, as in ``results.json``.

    Raises:
        ValueError: If the config, the data or the workdir don't fit, or the processes of the job
            disagree on them; before anything is compiled.
        FileNotFoundError: If the data set is not prepared.
        OSError: If the workdir can't be written to or has no room for a checkpoint.
        CheckpointError: If a checkpoint could not be written.
        PeerError: If another process failed.
        NonFiniteLossError: If a loss is not finite and ``config.on_diverged`` is ``"stop"``.
        InterruptedRunError: If a signal asked to stop; the state has been saved.
        BlockingIOError: If another program trains in the workdir.
    """
    cpu.make_devices(config.devices)
    distributed.check_same(distributed.identity(config))
    with distributed.together("reading the config"):
        config = configuration.with_groups(config)
        parts = experiment.build(config)
        check_gradient_flow(config.gradient_flow_every, parts.variables["params"])
        distributed.set_peer_timeout(config.peer_timeout)
        directory = Workdir(workdir, config)
    with contextlib.ExitStack() as stack:
        # Ahead of all that is written there, and of the data, which may take long.
        with distributed.together("taking the workdir"):
            if distributed.is_main():
                stack.enter_context(lock.held(directory.path))
        return _train_in(directory, config, parts)


def _train_in(
    directory: Workdir, config: ConfigDict, parts: experiment.Experiment
) -> dict[str, Any]:
    """Trains in a workdir that no other program has."""
    runs = Runs(parts)
    distributed.check_same({"data": runs.feed.contents.brief()})
    directory.check_shared()
    with distributed.together("opening the workdir"):
        directory.check_data(runs.feed.contents)
        shapes = runs.checkpoint_shapes()
        directory.check_room(room(map(trees.numbers_of, jax.tree.leaves(shapes))))
        logs = Logs(directory, config.tensorboard)
        directory.write_data(runs.feed.contents)
        directory.write_config()
        stored = read_results(directory.path)
    # Process 0's, as a network file system may show it to some before others.
    results = json.loads(distributed.exchange(json.dumps(stored))[0])
    checkpoints = Checkpoints(directory.checkpoints, keep=config.checkpoints_kept)
    whole = config.epochs * runs.feed.steps_per_epoch
    # Runs that have all diverged end before the last step.
    ended = results and (results["step"] == whole or None not in results.get(DIVERGED, [None]))
    if ended and results["step"] == checkpoints.latest():
        checkpoints.close()
        return results
    distributed.say(_describe(parts, runs))
    try:
        with stop_on_signals() as stop:
            return _train(runs, directory, logs, checkpoints, stop)
    finally:
        checkpoints.close()
        logs.close()


def _train(
    runs: Runs, directory: Workdir, logs: Logs, checkpoints: Checkpoints, stop: Stop
) -> dict[str, Any]:
    # ---- Start, or go on.
    training, steps = Training(runs, directory, logs, checkpoints, stop), runs.feed.steps_per_epoch
    stopped = training.unmeasured and not training.end_epoch(training.step // steps)

    # ---- Train.
    while not (stopped or training.ended()):
        epoch, first = divmod(training.step, steps)
        order = runs.feed.order(training.state, epoch)
        while first < steps and not training.diverged.all():
            stopped, count = training.agree(steps - first)
            if stopped:
                break
            training.take(order, first, count)
            first += count
            if first < steps and training.is_due_within():
                training.save()
        if first == steps:
            stopped = not training.end_epoch(epoch + 1)
        due = first == steps and training.is_due_after(epoch + 1)
        if due or stopped or training.ended():
            training.save()
    training.close()
    if stopped:
        raise _interrupted(stop, training.step, directory)
    # From here on a signal may end the program at once.
    stop.unsaved = False

    # ---- Measure the weights that count.
    weights = training.best if training.best is not None else training.state
    fitted, measured = runs.fit(weights.params, weights.model_state), {}
    # Once each: the test images may be among those that are measured in training.
    for split in dict.fromkeys((*runs.config.evaluate_splits, "test")):
        if distributed.agree(bool(stop.signal), 1)[0]:
            raise _interrupted(stop, training.step, directory)
        metrics = runs.measure(weights.params, weights.model_state, split, fitted)
        measured[split] = {name: values.tolist() for name, values in metrics.items()}
    results = _results(runs, training, measured)
    if distributed.is_main():
        directory.write_results(results)
        _draw(runs.config, directory.path)
    return results


def _results(runs: Runs, training: Training, measured: Mapping[str, Any]) -> dict[str, Any]:
    seconds = training.step_seconds
    return {
        "step": training.step,
        "seconds": round(training.seconds(), 2),
        # Of all runs together; the median leaves compilation out.
        "step_seconds": float(np.median(seconds)) if seconds else None,
        # Of a run that diverged before its first measurement those are the initial ones.
        "weights": "best validation accuracy" if training.best is not None else "last",
        # For each run the steps after which a loss was not finite, if one was.
        DIVERGED: training.diverged.steps,
        "splits": measured,
        # Damaged ones, of this start, in training and measuring.
        "skipped_images": runs.feed.number_skipped(),
    }


def _interrupted(stop: Stop, step: int, directory: Workdir) -> InterruptedRunError:
    return InterruptedRunError(
        f"{stop.signal or 'Another process was asked to stop'}: saved after step {step} in"
        f" {directory.path}.",
        command.INTERRUPTED if stop.by_person else command.AGAIN,
    )


def _draw(config: ConfigDict, directory: Path) -> None:
    figures.curves(directory)
    if config.gradient_flow_every and gradient_flow.is_measured(directory):
        gradient_flow.draw({config.name: directory}, directory / "gradient_flow.png")


def _describe(parts: experiment.Experiment, runs: Runs) -> str:
    config = parts.config
    params = traced.size(parts.variables["params"])
    examples = runs.feed.examples["train"].shape[1]
    return (
        f"{config.name or 'run'}: {params:,} parameters, outputs {', '.join(parts.output_names())};"
        f" {config.seeds} run{'s' * (config.seeds > 1)} of {config.epochs} epochs,"
        f" {examples:,} examples of {config.data.name}{_where(runs)}; compiling first."
    )


def _where(runs: Runs) -> str:
    devices, processes = runs.placement.mesh.size, jax.process_count()
    if devices == 1:
        return ""
    share = "the runs" if runs.config.devices_share == "runs" else "each batch"
    of = f" of {processes} processes" if processes > 1 else ""
    return f"; {devices} devices{of} share {share} ({runs.config.parallel})"


def summary(results: Mapping[str, Any]) -> str:
    """Writes the final measurements as a table, mean and standard deviation over the runs."""
    lines = []
    diverged = results.get(DIVERGED, [])
    longest = max(len(name) for values in results["splits"].values() for name in values)
    for split, values in results["splits"].items():
        for name, runs in values.items():
            runs = converged(runs, diverged)
            mean, deviation = text.spread(runs)
            spread = f" ± {text.number(deviation)}" if len(runs) > 1 else ""
            lines.append(f"  {split:<11}{name:<{longest + 2}}{text.number(mean)}{spread}")
    return "\n".join(lines)


def _rehearse(config: ConfigDict, steps: int) -> None:
    parts = experiment.build(configuration.with_groups(config, dealt=True))
    result = rehearsal.rehearse(parts, steps)
    distributed.say(rehearsal.markdown({config.name or "run": result}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--config", required=True, help="configs/X.py or configs/X.py:variant")
    parser.add_argument("--workdir", help="directory of the run")
    rehearsal.add_option(parser)
    options, overrides = parser.parse_known_args(arguments)
    if options.workdir is None and options.rehearse is None:
        parser.error("--workdir is needed: the directory of the run")
    with (
        distributed.ended_together(),
        command.readable_errors(NonFiniteLossError, distributed.PeerError, goes_on=True),
    ):
        distributed.start()
        if options.rehearse is not None:
            _rehearse(configuration.load(options.config, overrides), options.rehearse)
            return
        try:
            results = train(configuration.load(options.config, overrides), options.workdir)
        except InterruptedRunError as stopped:
            distributed.say(str(stopped))
            sys.exit(stopped.status)
    curves = files.expanded(options.workdir) / "curves.png"
    distributed.say(
        f"{results['step']} steps in {results['seconds']} s ({results['weights']} weights)"
        f"{described(results.get(DIVERGED, []))}\n"
        f"{summary(results)}" + f"\nCurves: {curves}" * curves.exists()
    )


if __name__ == "__main__":
    main()
