"""Some steps of a run as it is shipped, before the whole of it costs a week.

``python -m sire_jax.reproduce --table=sire_1 --rehearse`` rehearses every row of a table,
``python -m sire_jax.train --config=configs/sire.py:cnn --rehearse`` one run.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from tqdm import tqdm

from sire_jax import text, traced
from sire_jax.configuration import experiment, optimizers
from sire_jax.configuration.groups import is_dealt
from sire_jax.data.dataset import Source
from sire_jax.data.tasks import Pairs
from sire_jax.job.memory import available
from sire_jax.runs import gradient_flow, parallel
from sire_jax.runs.on_device import DeviceFeed
from sire_jax.runs.placement import Placement
from sire_jax.runs.runs import Runs

# Steps of a rehearsal of no given number of steps, and seconds after which it ends, too.
STEPS, SECONDS = 20, 60.0
# Seconds between two notes of a rehearsal that is under way.
NOTED = 20.0
# Batches of made-up images, which come again and again.
_BATCHES = 4
_GIB = 2**30


@dataclass
class Rehearsal:
    """What some steps of a run have shown.

    >>> losses = {"total": [2.5, 2.0, 1.5, 1.0]}
    >>> result = Rehearsal("cnn", 1200, "real", 72_000, seconds=[0.1, 0.1, 0.1], losses=losses)
    >>> result.verdict(), round(result.hours(), 3)
    ('falls: 2.5 -> 1', 2.0)

    Attributes:
        name: Of the run.
        parameters: Of its network.
        images: ``"real"`` or ``"made up"``.
        whole: Steps of the whole run, those of all seeds one after the other.
        memory: Bytes that a step of one seed takes with all arrays, as the compiler plans; ``None``
            if it doesn't tell, as of ``pmap``.
        refused: Why no step was taken; ``""`` if steps were.
        compiling: Seconds until the first step had been taken, which compiles.
        seconds: Of each further step.
        losses: The losses of each step by objective, ``"total"`` their weighted sum.
        diverged: The step whose loss was the first that is not finite, if one was not; the first is
            number 1.
        finished: Whether these are all; ``False`` of one that is under way, or was killed.
    """

    name: str
    parameters: int
    images: str
    whole: int
    memory: int | None = None
    refused: str = ""
    compiling: float | None = None
    seconds: list[float] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    diverged: int | None = None
    finished: bool = True

    def step_seconds(self) -> float | None:
        """Returns the median of the further steps; ``None`` if there were none."""
        return float(np.median(self.seconds)) if self.seconds else None

    def hours(self) -> float | None:
        """Returns how long the whole run would take without its measurements, if it gets there."""
        seconds = self.step_seconds()
        if seconds is None or self.diverged is not None:
            return None
        return seconds * self.whole / 3600

    def verdict(self) -> str:
        """Says in some words what became of the losses."""
        if self.refused:
            return self.refused
        total = self.losses["total"]
        if self.diverged is not None:
            return f"diverges: a loss is not finite at step {self.diverged}"
        ahead = max(len(total) // 4, 1)
        first, last = np.mean(total[:ahead]), np.mean(total[-ahead:])
        return f"{'falls' if last < first else 'finite'}: {first:.4g} -> {last:.4g}"


def _made_up(parts: experiment.Experiment, placement: Placement) -> DeviceFeed:
    """Feeds images drawn at random, of the right shape.

    Where the real ones are not at hand, or their labels are not those of dealt groups.
    """
    config, generator = parts.config, np.random.default_rng(0)
    pairs = isinstance(parts.task, Pairs)
    images = _BATCHES * config.batch_size * (1 + pairs)
    # A stream's images come as the network sees them.
    streamed = config.data.feed == "stream"
    shape = parts.batch["image"].shape[-3:] if streamed else tuple(config.data.shape)
    # Coarse, as neighbours are alike in photographs.
    squares = generator.integers(0, 256, (images, 4, 4, shape[-1]), np.uint8)
    rows, columns = (np.arange(side) * 4 // side for side in shape[:2])
    labels = {
        kind: generator.integers(0, classes, images, np.int32)
        for kind, classes in config.data.classes.items()
    }
    arrays = parts.task.prepare(Source(squares[:, rows][:, :, columns], labels))
    examples = np.arange(images, dtype=np.int32).reshape((-1, 2) if pairs else -1)
    return DeviceFeed(parts, placement, arrays, {"train": examples[None]})


def rehearse(
    parts: experiment.Experiment,
    steps: int = 0,
    memory: int | None = None,
    note: Callable[[Rehearsal], None] | None = None,
) -> Rehearsal:
    """Takes some steps of a run as it is, with its first seed; shows a bar on a terminal.

    Args:
        parts: The parts of the run.
        steps: How many, at least 2; fewer if a loss is not finite. 0: 20, or as many, but at least
            two, as begin within a minute.
        memory: Bytes that a step may take; by default what is free, of the accelerator or of the
            machine.
        note: Is called with what they have shown so far, every ``NOTED`` seconds.

    Returns:
        What they have shown.

    Raises:
        ValueError: If ``steps`` is 1 or negative, the job has several processes, or the data are
            not what the config says.
        FileNotFoundError: If the data set is not at hand, and the config doesn't say how many
            images it has.
    """
    if steps < 0 or steps == 1:
        raise ValueError(
            f"A rehearsal of {steps} steps says nothing; it should be at least 2, or 0 for 20 or as"
            " many as a minute allows."
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"A rehearsal is that of one process; this job has {jax.process_count()}. Start one."
        )
    seeds = parts.config.seeds
    parts = _with_one_seed(parts)
    runs, whole, images = _open(parts)
    parameters = traced.size(parts.variables["params"])
    result = Rehearsal(parts.config.name, parameters, images, whole * seeds, finished=False)
    try:
        _take(result, runs, steps, memory, note)
    # A process takes more than the compiler plans for a step.
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result.refused = f"too big for this machine: {str(error).splitlines()[0][:200]}"
    result.finished = True
    return result


def _with_one_seed(parts: experiment.Experiment) -> experiment.Experiment:
    config = parts.config.copy_and_resolve_references()
    config.seeds, config.steps_per_call = 1, 1
    # A run alone can't be shared among devices.
    if config.devices_share == "runs":
        config.devices_share, config.devices = "batch", 1
    return replace(parts, config=config)


def _open(parts: experiment.Experiment) -> tuple[Runs, int, str]:
    """Opens a run; returns it, the steps of the whole of it, and what images it has."""
    config = parts.config
    gradient_flow.check(config.gradient_flow_every, parts.variables["params"])
    steps = optimizers.steps_per_epoch(parts.task, config)
    dealt = [groups.file for groups in config.data.groups.values() if is_dealt(groups)]
    if dealt and steps is None:
        raise FileNotFoundError(
            f"There is no file of groups {dealt[0]}, and without config.data.images it isn't known"
            " how many images to make up."
        )
    # Groups that were dealt are not of the real labels.
    if not dealt:
        try:
            runs = Runs(parts)
            return runs, config.epochs * runs.feed.steps_per_epoch, "real"
        except FileNotFoundError:
            if steps is None:
                raise
    return Runs(parts, _made_up), config.epochs * steps, "made up"


def _take(
    result: Rehearsal,
    runs: Runs,
    steps: int,
    memory: int | None,
    note: Callable[[Rehearsal], None] | None,
) -> None:
    """Takes the steps one by one, if there is the memory, and notes what they show."""
    state, began = runs.initial(), time.perf_counter()
    result.memory = runs.feed.planned_memory(state, runs.no_metrics())
    # What compiling took is not free any more.
    free = available() if memory is None else memory
    if result.memory is not None and result.memory > free:
        result.refused = (
            f"too big for this machine: {result.memory / _GIB:.1f} GiB, where"
            f" {free / _GIB:.1f} GiB are free"
        )
        return
    seconds, hidden = math.inf if steps else SECONDS, not sys.stderr.isatty()
    steps = steps or STEPS
    started = noted = time.perf_counter()
    with tqdm(total=steps, desc=result.name, unit="step", disable=hidden, leave=False) as bar:
        for step in range(steps):
            epoch, first = divmod(step, runs.feed.steps_per_epoch)
            if first == 0:
                order = runs.feed.order(state, epoch)
            called = time.perf_counter()
            # Sums of its own for each step: they are its losses.
            state, sums, broken = runs.feed.take_steps(state, runs.no_metrics(), order, first, 1)
            for name, loss in runs.averages(sums).items():
                result.losses.setdefault(name.removesuffix("/loss"), []).append(float(loss[0]))
            now = time.perf_counter()
            if step == 0:
                result.compiling = now - began
            else:
                result.seconds.append(now - called)
            bar.set_postfix_str(f"total {result.losses['total'][-1]:.4g}", refresh=False)
            bar.update()
            if min(int(first_step[0]) for first_step in broken.values()) != parallel.NEVER:
                result.diverged = step + 1
                return
            # The first step compiles: without another there is no time to tell.
            if step > 0 and now - started > seconds:
                return
            if note and now - noted > NOTED:
                note(result)
                noted = now


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--rehearse[=STEPS]`` to a program's arguments."""
    parser.add_argument(
        "--rehearse",
        nargs="?",
        type=int,
        const=0,
        metavar="STEPS",
        help="take only some steps, 20 or those of a minute, and tell what all would take",
    )


def markdown(rehearsals: Mapping[str, Rehearsal]) -> str:
    """Writes rehearsals as a Markdown table, and what all would take together.

    Args:
        rehearsals: By the name of the row.
    """
    heads = ("row", "parameters", "images", "steps", "losses", "s a step", "GiB", "hours")
    rows = [[*heads], *(cells(name, result) for name, result in rehearsals.items())]
    hours = [result.hours() for result in rehearsals.values()]
    figures = [figure for figure in hours if figure is not None]
    unknown = len(hours) - len(figures)
    note = f", {unknown} without a figure left out" * (unknown > 0)
    total = f"All of these, every seed after the other, here: {sum(figures):,.1f} hours{note}."
    return f"{text.align(rows)}\n\n{total}"


def cells(name: str, result: Rehearsal) -> list[str]:
    """Returns a rehearsal's row of the table.

    >>> cells("cnn", Rehearsal("cnn", 1200, "made up", 100, refused="too big for this machine"))
    ['cnn', '1,200', 'made up', '0', 'too big for this machine', '', '', '']

    Args:
        name: What the row is called.
        result: What was shown.
    """
    seconds, hours = result.step_seconds(), result.hours()
    return [
        name,
        f"{result.parameters:,}",
        result.images,
        f"{len(result.losses.get('total', ()))}{' so far' * (not result.finished)}",
        result.verdict(),
        "" if seconds is None else f"{seconds:.3g}",
        "" if result.memory is None else f"{result.memory / _GIB:.2f}",
        "" if hours is None else f"{hours:,.1f}",
    ]
