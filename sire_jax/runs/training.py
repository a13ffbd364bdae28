"""A run under way: its state, and what is done beside its steps: records, reports, checkpoints."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from sire_jax.configuration import experiment
from sire_jax.job import compilation, distributed
from sire_jax.job.progress import Pace, Progress, Stop
from sire_jax.networks import MAIN
from sire_jax.runs.divergence import DIVERGED, Diverged, converged
from sire_jax.runs.gradient_flow import SPLIT
from sire_jax.runs.runs import Checkpoint, Runs
from sire_jax.storage.checkpoint import CheckpointError, Checkpoints
from sire_jax.storage.logs import Logs
from sire_jax.storage.workdir import Workdir

Values = Mapping[str, np.ndarray]


class Training:
    """Runs that are trained, from their newest checkpoint on.

    Args:
        runs: The programs and data of the runs.
        directory: Their workdir.
        logs: Where measurements are recorded.
        checkpoints: Where they are saved.
        stop: Whether somebody has asked to stop.

    Attributes:
        step: Steps taken.
        state: What training changes.
        best: The weights with the best validation accuracy so far, if the runs validate.
        diverged: Which of the runs have diverged.
        step_seconds: Of a step, for each call of the program in this start.
        unmeasured: Whether it was stopped before its last epoch was measured, or while.

    Raises:
        CheckpointError: If there were checkpoints, and none is intact.
    """

    def __init__(
        self, runs: Runs, directory: Workdir, logs: Logs, checkpoints: Checkpoints, stop: Stop
    ):
        config = runs.config
        started = time.perf_counter()
        self._runs, self._logs, self._checkpoints, self._stop = runs, logs, checkpoints, stop
        self._compiled = compilation.counts()
        self.step, checkpoint = _open(runs, checkpoints, directory)
        self.state, self._sums, self.best = checkpoint.state, checkpoint.sums, checkpoint.best
        diverged = checkpoints.notes().get(DIVERGED) if self.step else None
        self.diverged = Diverged(
            config.on_diverged, runs.parts.seeds, directory.checkpoints, diverged
        )
        steps = runs.feed.steps_per_epoch
        # Once measured there are no losses left; those of runs that all diverged tell nothing.
        between_epochs = self.step > 0 and self.step % steps == 0
        self.unmeasured = between_epochs and (self._has_losses() or self.diverged.all())
        # With the clock added: the seconds of all starts.
        self._before = float(checkpoint.seconds) - started
        # What was recorded of an epoch that is measured anew is dropped.
        logs.go_on_after(self.step - 1 if self.unmeasured else self.step)
        images, silent = _images_per_step(runs.parts), not distributed.is_main()
        self._progress = Progress(config.epochs, steps, images, self.step, silent)
        self._pace = Pace(config.steps_per_call)
        self.step_seconds: list[float] = []

    def _has_losses(self) -> bool:
        """Tells whether there are losses of steps that have not been recorded."""
        return not np.isnan(self._runs.averages(self._sums)["total/loss"]).all()

    def seconds(self) -> float:
        """Returns how long the runs have taken, in all starts."""
        return self._before + time.perf_counter()

    def ended(self) -> bool:
        """Tells whether there is nothing left to train."""
        whole = self._runs.config.epochs * self._runs.feed.steps_per_epoch
        return self.step >= whole or self.diverged.all()

    def agree(self, most: int) -> tuple[bool, int]:
        """Decides, with all processes, whether to stop and else how many steps to take next.

        Args:
            most: The most steps.
        """
        most = min(self._pace.steps, most, self._until_save())
        return distributed.agree(bool(self._stop.signal), most)

    def take(self, order: Any, first: int, count: int) -> None:
        """Takes steps of an epoch.

        Args:
            order: The examples of the epoch, as ``Feed.order`` returns them.
            first: Of its steps.
            count: How many.

        Raises:
            NonFiniteLossError: If a loss is not finite and that is not to be recorded.
            CheckpointError: If the last checkpoint could not be written.
        """
        called = time.perf_counter()
        self.state, self._sums, broken = self._runs.feed.take_steps(
            self.state, self._sums, order, first, count
        )
        self._stop.unsaved = True
        self._say(*self.diverged.note(broken))
        seconds = time.perf_counter() - called
        self._pace.note(count, seconds)
        self.step_seconds.append(seconds / count)
        self.step += count
        self._progress.advance(count)
        self._checkpoints.check()
        if len(self.step_seconds) == 1:
            compiling = compilation.counts().since(self._compiled)
            cache = (
                f" (kept in {self._runs.config.compilation_cache})" if compilation.kept() else ""
            )
            self._say(f"First step: {compiling}{cache}.")

    def _say(self, *messages: str) -> None:
        for message in messages:
            self._progress.say(message)

    def _until_save(self) -> int:
        """Returns how many steps there are until the next checkpoint within an epoch."""
        every = self._runs.config.checkpoint_steps
        return every - self.step % every if every else sys.maxsize

    def is_due_within(self) -> bool:
        """Tells whether a checkpoint is due after so many steps."""
        # The next one is a whole interval away: this is the step of one.
        return self._until_save() == self._runs.config.checkpoint_steps

    def is_due_after(self, epoch: int) -> bool:
        """Tells whether a checkpoint is due after an epoch, which are numbered from 1."""
        every = self._runs.config.checkpoint_every
        return bool(every and epoch % every == 0) or self.is_due_within()

    def save(self) -> None:
        """Saves a checkpoint.

        Raises:
            NonFiniteLossError: If parameters are not finite and that is not to be recorded.
        """
        runs = self._runs
        spent = runs.placement.place(np.float32(self.seconds()))
        self._say(*self.diverged.check(runs.finite(self.state), self.step))
        notes = {**distributed.describe(runs.placement.mesh), DIVERGED: self.diverged.steps}
        checkpoint = Checkpoint(self.state, self._sums, self.best, spent)
        self._checkpoints.save(self.step, checkpoint, notes=notes)

    def end_epoch(self, epoch: int) -> bool:
        """Records the losses of an epoch's steps and, where due, measures.

        Args:
            epoch: Which, from 1.

        Returns:
            Whether all was measured: ``False`` if somebody asked to stop before, which is then done
            anew after the next start.
        """
        runs, config = self._runs, self._runs.config
        # `self.best` stays until all is measured, as the whole is done anew after a stop.
        losses, best = runs.averages(self._sums), self.best
        self._logs.record(self.step, epoch, "steps", losses)
        last = epoch == config.epochs
        shown = {name: values for name, values in losses.items() if name != "total/loss"}
        if last or (config.evaluate_every and epoch % config.evaluate_every == 0):
            for split in config.evaluate_splits:
                if distributed.agree(bool(self._stop.signal), 1)[0]:
                    return False
                measured = runs.measure(self.state.params, self.state.model_state, split)
                self._logs.record(self.step, epoch, split, measured)
                accuracy = runs.parts.accuracy()
                shown |= {f"{split} {k}": v for k, v in measured.items() if k == accuracy}
                if split == "validation" and best is not None and accuracy is not None:
                    loss = measured[accuracy.replace("/top_1", "/loss")]
                    scores = self.diverged.scores(measured[accuracy], loss)
                    best = runs.better(best, scores, self.state)
                self._say(*chance_messages(runs, epoch, split, measured))
        every = config.gradient_flow_every
        if every and (last or epoch % every == 0):
            self._logs.record(self.step, epoch, SPLIT, runs.gradients(self.state, epoch - 1))
        finite = {k: np.asarray(converged(list(v), self.diverged.steps)) for k, v in shown.items()}
        self._progress.report(self.step, finite)
        self._say(*(f"Skipped: {message}" for message in runs.feed.newly_skipped()))
        self.best, self._sums = best, runs.no_metrics()
        return True

    def close(self) -> None:
        """Waits until all is saved, before it is said that it has been."""
        self._progress.close()
        self._checkpoints.wait()


def _open(runs: Runs, checkpoints: Checkpoints, directory: Workdir) -> tuple[int, Checkpoint]:
    """Restores the newest checkpoint, or starts with one, which is left if a loss breaks."""
    step = checkpoints.latest()
    if step is None:
        if checkpoints.lost():
            raise CheckpointError(
                f"None of the checkpoints in {directory.checkpoints} is intact, and to begin again"
                " would remove them. Mend them, or move the directory away to begin again."
            )
        start = runs.start()
        checkpoints.save(0, start, notes=distributed.describe(runs.placement.mesh))
        return 0, start
    restored = checkpoints.restore(runs.checkpoint_shapes())
    distributed.say(f"Going on after step {step}.{_otherwise(checkpoints.notes(), runs)}")
    return step, restored


def _otherwise(saved: Mapping[str, Any], runs: Runs) -> str:
    """Says what a run goes on with that it was not saved with."""
    now = distributed.describe(runs.placement.mesh)
    changed = [f"{k} {saved[k]} -> {v}" for k, v in now.items() if saved.get(k, v) != v]
    if not changed:
        return ""
    return (
        f" Not on what it was saved on: {', '.join(changed)}. From here on its numbers are those of"
        " an uninterrupted run up to rounding, no longer bit for bit."
    )


def _images_per_step(parts: experiment.Experiment) -> int:
    """Counts the images of a step over all runs; a pair has two."""
    two_examples = parts.batch["image"].shape[:-3]
    return math.prod(two_examples) // 2 * parts.config.batch_size * parts.config.seeds


def chance_messages(runs: Runs, epoch: int, split: str, measured: Values) -> list[str]:
    """Says, at the first measurement after enough epochs and at the end, which runs guess.

    Args:
        runs: The runs.
        epoch: After which they were measured.
        split: On what.
        measured: What was measured.

    Returns:
        A message, or none.
    """
    config = runs.config
    every, after = config.evaluate_every, min(config.chance_after, config.epochs)
    first = epoch >= after > epoch - max(every, 1)
    if not after or not (first or epoch == config.epochs):
        return []
    metric = runs.parts.accuracy()
    if split == "train" or metric is None:
        return []
    chance = 1 / max(runs.parts.outputs[MAIN].shape[-1], 2)
    # Three standard errors of an accuracy at chance level.
    error = math.sqrt(chance * (1 - chance) / runs.feed.examples[split].shape[1])
    accuracy = measured[metric]
    stuck = np.flatnonzero(accuracy <= chance + 3 * error)
    if not len(stuck):
        return []
    seeds = ", ".join(str(config.seed + i) for i in stuck)
    auxiliary = [name for name, o in runs.parts.objectives.items() if o.output != MAIN]
    advice = f" or smaller weights of {', '.join(auxiliary)}" if auxiliary else ""
    return [
        f"At chance level after {epoch} epoch{'s' * (epoch > 1)}: the runs with the seeds {seeds},"
        f" whose {split} accuracy of the main output is {accuracy[stuck].mean():.4f} (guessing:"
        f" {chance:.4f}). Training may not converge; try a smaller learning rate{advice}."
    ]
