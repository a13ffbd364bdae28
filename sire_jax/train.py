"""Trains a network: ``python -m sire_jax.train --config=configs/X.py:variant --workdir=DIR``.

With ``--rehearse`` it takes some steps only, keeps nothing, and says what the whole would take.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sire_jax import configuration, files, rehearsal, tables, traced
from sire_jax.configuration import experiment
from sire_jax.diagnostics import figures, gradient_flow
from sire_jax.job import command, compilation, distributed, lock
from sire_jax.job.progress import Pace, Progress, Stop, stop_on_signals
from sire_jax.metrics import Metrics
from sire_jax.networks import MAIN
from sire_jax.runs.divergence import DIVERGED, Diverged, NonFiniteLossError, converged, described
from sire_jax.runs.gradient_flow import check as check_gradient_flow
from sire_jax.runs.runs import Checkpoint, Runs
from sire_jax.runs.streamed import open_runs
from sire_jax.step import Best, TrainState
from sire_jax.storage.checkpoint import CheckpointError, Checkpoints
from sire_jax.storage.logs import Logs
from sire_jax.storage.workdir import Workdir, read_results

PyTree = Any


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
    distributed.check_same(distributed.identity(config))
    with distributed.together("reading the config"):
        config = configuration.with_groups(config)
        parts = experiment.build(config)
        check_gradient_flow(config.gradient_flow_every, parts.variables["params"])
        distributed.set_peer_timeout(config.peer_timeout)
        directory = Workdir(workdir, config)
    with contextlib.ExitStack() as held:
        # Ahead of all that is written there, and of the data, which may take long.
        with distributed.together("taking the workdir"):
            if distributed.is_main():
                held.enter_context(lock.held(directory.path))
        return _train_in(directory, config, parts)


def _train_in(
    directory: Workdir, config: ConfigDict, parts: experiment.Experiment
) -> dict[str, Any]:
    """Trains in a workdir that no other program has."""
    runs = open_runs(parts)
    distributed.check_same({"data": runs.fingerprint})
    directory.check_shared()
    with distributed.together("opening the workdir"):
        directory.check_data(runs.contents)
        shapes = runs.checkpoint_shapes()
        directory.check_room(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)))
        logs = Logs(directory, config.tensorboard)
        directory.write_data(runs.contents)
        directory.write_config()
        found = read_results(directory.path)
    # Process 0's, as a network file system may show it to some before others.
    results = json.loads(distributed.exchange(json.dumps(found))[0])
    checkpoints = Checkpoints(directory.checkpoints, keep=config.checkpoints_kept)
    whole = config.epochs * runs.steps_per_epoch
    ended = results and (results["step"] == whole or None not in results.get(DIVERGED, [None]))
    if ended and results["step"] == checkpoints.latest():
        checkpoints.close()
        return results
    distributed.say(_describe(parts, runs))
    try:
        with stop_on_signals() as stop:
            return _train(config, parts, runs, directory, logs, checkpoints, stop)
    finally:
        checkpoints.close()
        logs.close()


def _train(
    config: ConfigDict,
    parts: experiment.Experiment,
    runs: Runs,
    directory: Workdir,
    logs: Logs,
    checkpoints: Checkpoints,
    stop: Stop,
) -> dict[str, Any]:
    # ---- Start, or go on.
    started, compiled = time.perf_counter(), compilation.counts()
    step, (state, sums, best, spent) = _open(runs, checkpoints, directory)
    seeds = range(config.seed, config.seed + config.seeds)
    known = checkpoints.notes().get(DIVERGED) if step else None
    diverged = Diverged(config.on_diverged, seeds, directory.checkpoints, known)
    steps = runs.steps_per_epoch
    # It was stopped before its last epoch was measured, or while.
    unmeasured = step > 0 and step % steps == 0 and (_has_losses(runs, sums) or diverged.all())
    before = float(spent) - started

    def seconds() -> float:
        return before + time.perf_counter()

    def save() -> None:
        tree = (state, sums, best, runs.place(np.float32(seconds())))
        for message in _save(checkpoints, step, tree, runs, diverged):
            progress.say(message)

    logs.go_on_after(step - 1 if unmeasured else step)
    images, silent = _images_per_step(parts), not distributed.is_main()
    progress = Progress(config.epochs, steps, images, step, silent)
    pace, step_seconds, stopped = Pace(config.steps_per_call), list[float](), False

    def end_epoch(epoch: int) -> bool:
        nonlocal best, sums
        ended = _end_of_epoch(
            config, runs, logs, progress, state, sums, best, step, epoch, stop, diverged
        )
        if ended is not None:
            best, sums = ended
        return ended is not None

    # ---- Train.
    if unmeasured:
        stopped = not end_epoch(step // steps)
    while step < config.epochs * steps and not stopped and not diverged.all():
        epoch, first = divmod(step, steps)
        order = runs.epoch_order(state, epoch)
        while first < steps and not diverged.all():
            stopped, count = distributed.agree(
                bool(stop.signal), min(pace.steps, steps - first, _until_save(config, step))
            )
            if stopped:
                break
            called = time.perf_counter()
            state, sums, broken = runs.take_steps(state, sums, order, first, count)
            stop.unsaved = True
            for message in diverged.note(broken):
                progress.say(message)
            pace.note(count, time.perf_counter() - called)
            step_seconds.append((time.perf_counter() - called) / count)
            first, step = first + count, step + count
            progress.advance(count)
            checkpoints.check()
            if len(step_seconds) == 1:
                progress.say(f"First step: {compilation.counts().since(compiled)}{_kept(config)}.")
            if first < steps and _until_save(config, step) == config.checkpoint_steps:
                save()
        if first == steps:
            stopped = not end_epoch(epoch + 1)
        due = config.checkpoint_every and (epoch + 1) % config.checkpoint_every == 0
        due = due or _until_save(config, step) == config.checkpoint_steps
        ends = stopped or step == config.epochs * steps or diverged.all()
        if ends or (due and first == steps):
            save()
    progress.close()
    # Before it is said that it has been saved.
    checkpoints.wait()
    if stopped:
        raise _interrupted(stop, step, directory)
    stop.unsaved = False

    # ---- Measure the weights that count.
    kept = best if best is not None else state
    fitted = runs.fit(kept.params, kept.model_state)
    measured = {}
    for split in dict.fromkeys((*config.evaluate_splits, "test")):
        if distributed.agree(bool(stop.signal), 1)[0]:
            raise _interrupted(stop, step, directory)
        measured[split] = _lists(runs.measure(kept.params, kept.model_state, split, fitted))
    results = {
        "step": step,
        "seconds": round(seconds(), 2),
        # Of all runs together; the median leaves compilation out.
        "step_seconds": float(np.median(step_seconds)) if step_seconds else None,
        # Of a run that diverged before its first measurement those are the initial ones.
        "weights": "best validation accuracy" if best is not None else "last",
        # For each run the steps after which a loss was not finite, if one was.
        DIVERGED: diverged.steps,
        "splits": measured,
        # Damaged ones, of this start, in training and measuring.
        "skipped_images": runs.number_skipped(),
    }
    if distributed.is_main():
        directory.write_results(results)
        _draw(config, directory.path)
    return results


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


def _open(runs: Runs, checkpoints: Checkpoints, directory: Workdir) -> tuple[int, Checkpoint]:
    """Restores the newest checkpoint, or starts with one, which is left if a loss breaks.

    Raises:
        CheckpointError: If there were checkpoints, and none is intact.
    """
    step = checkpoints.latest()
    if step is None:
        if checkpoints.lost():
            raise CheckpointError(
                f"None of the checkpoints in {directory.checkpoints} is intact, and to begin again"
                " would remove them. Mend them, or move the directory away to begin again."
            )
        start = runs.start()
        checkpoints.save(0, start, notes=distributed.describe(runs.mesh))
        return 0, start
    restored = checkpoints.restore(runs.checkpoint_shapes())
    distributed.say(f"Going on after step {step}.{_otherwise(checkpoints.notes(), runs)}")
    return step, restored


def _otherwise(saved: Mapping[str, Any], runs: Runs) -> str:
    """Says what a run goes on with that it was not saved with."""
    now = distributed.describe(runs.mesh)
    changed = [f"{k} {saved[k]} -> {v}" for k, v in now.items() if saved.get(k, v) != v]
    if not changed:
        return ""
    return (
        f" Not on what it was saved on: {', '.join(changed)}. From here on its numbers are those of"
        " an uninterrupted run up to rounding, no longer bit for bit."
    )


def _has_losses(runs: Runs, sums: Metrics) -> bool:
    """Tells whether there are losses of steps that have not been recorded."""
    return not np.isnan(runs.averages(sums)["total/loss"]).all()


def _until_save(config: ConfigDict, step: int) -> int:
    """Returns how many steps there are until the next further checkpoint."""
    every = config.checkpoint_steps
    return every - step % every if every else sys.maxsize


def _kept(config: ConfigDict) -> str:
    return f" (kept in {config.compilation_cache})" if compilation.kept() else ""


def _images_per_step(parts: experiment.Experiment) -> int:
    """Counts the images of a step over all runs; a pair has two."""
    two_examples = parts.batch["image"].shape[:-3]
    return math.prod(two_examples) // 2 * parts.config.batch_size * parts.config.seeds


def _end_of_epoch(
    config: ConfigDict,
    runs: Runs,
    logs: Logs,
    progress: Progress,
    state: TrainState,
    sums: Metrics,
    best: Best | None,
    step: int,
    epoch: int,
    stop: Stop,
    diverged: Diverged,
) -> tuple[Best | None, Metrics] | None:
    """Records the losses of the epoch's steps and, where due, measures.

    Returns:
        The best weights and sums of nothing; ``None`` if somebody asked to stop before all was
        measured, which is then done anew after the next start.
    """
    losses, accuracy = runs.averages(sums), runs.parts.accuracy()
    logs.record(step, epoch, "steps", losses)
    last = epoch == config.epochs
    shown = {name: each for name, each in losses.items() if name != "total/loss"}
    if last or (config.evaluate_every and epoch % config.evaluate_every == 0):
        for split in config.evaluate_splits:
            if distributed.agree(bool(stop.signal), 1)[0]:
                return None
            found = runs.measure(state.params, state.model_state, split)
            logs.record(step, epoch, split, found)
            shown |= {f"{split} {k}": v for k, v in found.items() if k == accuracy}
            if split == "validation" and best is not None and accuracy is not None:
                loss = found[accuracy.replace("/top_1", "/loss")]
                best = runs.better(best, diverged.scores(found[accuracy], loss), state)
            _report_chance(config, runs, progress, epoch, split, found)
    every = config.gradient_flow_every
    if every and (last or epoch % every == 0):
        logs.record(step, epoch, gradient_flow.SPLIT, runs.gradients(state, epoch - 1))
    kept = {k: np.asarray(converged(list(each), diverged.steps)) for k, each in shown.items()}
    progress.report(step, kept)
    for message in runs.newly_skipped():
        progress.say(f"Skipped: {message}")
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
    metric = runs.parts.accuracy()
    if split == "train" or metric is None:
        return
    chance = 1 / max(runs.parts.outputs[MAIN].shape[-1], 2)
    # Three standard errors of an accuracy at chance level.
    error = math.sqrt(chance * (1 - chance) / runs.examples[split].shape[1])
    accuracy = found[metric]
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


def _save(
    checkpoints: Checkpoints, step: int, tree: Checkpoint, runs: Runs, diverged: Diverged
) -> list[str]:
    """Saves a checkpoint, if it may be kept; returns what is to be said of its parameters."""
    said = diverged.check(runs.finite(tree[0]), step)
    notes = {**distributed.describe(runs.mesh), DIVERGED: diverged.steps}
    checkpoints.save(step, tree, notes=notes)
    return said


def _lists(values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: each.tolist() for name, each in values.items()}


def _describe(parts: experiment.Experiment, runs: Runs) -> str:
    config = parts.config
    params = traced.size(parts.variables["params"])
    examples = runs.examples["train"].shape[1]
    return (
        f"{config.name or 'run'}: {params:,} parameters, outputs {', '.join(parts.output_names())};"
        f" {config.seeds} run{'s' * (config.seeds > 1)} of {config.epochs} epochs,"
        f" {examples:,} examples of {config.data.name}{_where(runs)}; compiling first."
    )


def _where(runs: Runs) -> str:
    devices, processes = runs.mesh.size, jax.process_count()
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
        for name, each in values.items():
            kept = converged(each, diverged)
            mean, deviation = tables.spread(kept)
            spread = f" ± {tables.number(deviation)}" if len(kept) > 1 else ""
            lines.append(f"  {split:<11}{name:<{longest + 2}}{tables.number(mean)}{spread}")
    return "\n".join(lines)


def _rehearse(config: ConfigDict, steps: int) -> None:
    parts = experiment.build(configuration.with_groups(config, dealt=True))
    found = rehearsal.rehearse(parts, steps)
    distributed.say(rehearsal.markdown({config.name or "run": found}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--config", required=True, help="configs/X.py or configs/X.py:variant")
    parser.add_argument("--workdir", help="directory of the run")
    rehearsal.add_option(parser)
    known, overrides = parser.parse_known_args(arguments)
    if known.workdir is None and known.rehearse is None:
        parser.error("--workdir is needed: the directory of the run")
    with (
        distributed.ended_together(),
        command.readable_errors(NonFiniteLossError, distributed.PeerError, goes_on=True),
    ):
        distributed.start()
        if known.rehearse is not None:
            _rehearse(configuration.load(known.config, overrides), known.rehearse)
            return
        try:
            results = train(configuration.load(known.config, overrides), known.workdir)
        except InterruptedRunError as stopped:
            distributed.say(str(stopped))
            sys.exit(stopped.status)
    curves = files.expanded(known.workdir) / "curves.png"
    distributed.say(
        f"{results['step']} steps in {results['seconds']} s ({results['weights']} weights)"
        f"{described(results.get(DIVERGED, []))}\n"
        f"{summary(results)}" + f"\nCurves: {curves}" * curves.exists()
    )


if __name__ == "__main__":
    main()
