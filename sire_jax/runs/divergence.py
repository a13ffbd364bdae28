"""Runs whose losses or parameters are no longer finite: an end, or a result like any other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sire_jax.runs import parallel

# Its key in checkpoints and results.
DIVERGED = "diverged"
_ADVICE = (
    "The last finite checkpoint is kept in {}; try a smaller learning rate or weight, or clip"
    " gradients (config.optimizer.clip)."
)


class NonFiniteLossError(Exception):
    """A loss or a parameter was not a number or infinite; it has not been saved.

    The message names the loss and the step, and says what may help.

    >>> from sire_jax import NonFiniteLossError
    >>> diverged = Diverged("stop", range(1), Path("runs/pairs/checkpoints"))
    >>> try:
    ...     diverged.note({"main/loss": np.array([3]), "total/loss": np.array([3])})
    ... except NonFiniteLossError as error:
    ...     print(str(error).split(". ")[0])
    The loss 'main' is not finite after 3 steps of the run with seed 0
    """


class Diverged:
    """Which runs have diverged, and after how many steps.

    >>> diverged = Diverged("record", range(2), Path("runs/pairs/checkpoints"))
    >>> for message in diverged.note({"main/loss": np.array([parallel.NEVER, 7])}):
    ...     print(message)
    The loss 'main' is not finite after 7 steps of the run with seed 1. It is recorded; the other
    runs go on.
    >>> diverged.steps, diverged.all()
    ([None, 7], False)

    Args:
        policy: ``"stop"`` or ``"record"`` (``config.on_diverged``).
        seeds: The seeds of the runs.
        checkpoints: The directory of the checkpoints, for messages.
        steps: What ``steps`` was, of a run that goes on.

    Attributes:
        steps: For each run the steps that it had taken when it diverged, ``None`` if it hasn't.
    """

    def __init__(
        self,
        policy: str,
        seeds: Sequence[int],
        checkpoints: Path,
        steps: Sequence[int | None] | None = None,
    ):
        self._stops, self._seeds, self._checkpoints = policy == "stop", seeds, checkpoints
        self.steps = list(steps or [None] * len(seeds))

    def note(self, broken: Mapping[str, jax.Array]) -> list[str]:
        """Notes the runs of which a loss was not finite.

        Args:
            broken: For each loss the first step of each run at which it was not finite, as
                ``parallel.over_steps`` returns it.

        Returns:
            A message for each run that diverged now.

        Raises:
            NonFiniteLossError: If one has and the policy is to stop; it names the first loss, the
                total only if that is alone.
        """
        first = {name: np.asarray(steps) for name, steps in broken.items()}
        name = first_broken({name: int(steps.min()) for name, steps in first.items()})
        if self._stops and first[name].min() != parallel.NEVER:
            message = what_broke(name, first[name].min(), self._seeds[int(first[name].argmin())])
            raise NonFiniteLossError(f"{message} {_ADVICE.format(self._checkpoints)}")
        messages = []
        for run, seed in enumerate(self._seeds):
            name = first_broken({name: int(steps[run]) for name, steps in first.items()})
            step = int(first[name][run])
            if step != parallel.NEVER and self.steps[run] is None:
                self.steps[run] = step
                messages.append(what_broke(name, step, seed))
        return self._recorded(messages)

    def _recorded(self, messages: list[str]) -> list[str]:
        tail = "It is recorded." if self.all() else "It is recorded; the other runs go on."
        return [f"{message} {tail}" for message in messages]

    def check(self, finite: np.ndarray, step: int) -> list[str]:
        """Notes the runs whose parameters are not finite: losses are taken before an update.

        Args:
            finite: Whether those of each run are, after ``step`` steps.
            step: How many.

        Returns:
            A message for each run that diverged now.

        Raises:
            NonFiniteLossError: If one's are not and the policy is to stop.
        """
        if self._stops and not finite.all():
            raise NonFiniteLossError(
                f"The parameters are not finite after {step} steps."
                f" {_ADVICE.format(self._checkpoints)}"
            )
        messages = []
        for run in map(int, np.flatnonzero(~finite)):
            if self.steps[run] is None:
                self.steps[run] = step
                seed = self._seeds[run]
                messages.append(
                    f"The parameters of the run with seed {seed} are not finite after {step} steps."
                )
        return self._recorded(messages)

    def all(self) -> bool:
        """Tells whether no run is left."""
        return None not in self.steps

    def scores(self, accuracy: np.ndarray, loss: np.ndarray) -> np.ndarray:
        """Returns validation accuracies as what chooses weights: none of runs that diverged.

        Args:
            accuracy: Of each run.
            loss: Measured with it; not finite where only the last update broke the parameters.
        """
        finite = np.array([step is None for step in self.steps]) & np.isfinite(loss)
        # Below any accuracy.
        return np.where(finite, accuracy, -1.0)


def converged(values: list[Any], steps: Sequence[int | None]) -> list[Any]:
    """Leaves out what belongs to runs that diverged, if others did not.

    >>> converged([0.91, 0.1, 0.93], [None, 7, None])
    [0.91, 0.93]

    Args:
        values: A value for each run.
        steps: For each run the steps after which it diverged, if it did; nothing: none did.
    """
    if None not in steps:
        return values
    return [value for value, step in zip(values, steps, strict=True) if step is None]


def described(steps: Sequence[int | None]) -> str:
    """Says how many runs diverged, in brackets; nothing if none did.

    >>> described([None, 7, None])
    ' (1 of 3 runs diverged after 7 steps)'

    Args:
        steps: As of ``converged``.
    """
    broken = [step for step in steps if step is not None]
    if not broken:
        return ""
    count = f"{len(broken)} of {len(steps)} runs " * (len(steps) > 1)
    return f" ({count}diverged after {', '.join(map(str, broken))} steps)"


def first_broken(steps: Mapping[str, int]) -> str:
    """Returns the loss that was the first not to be finite; the total only if that is alone.

    Args:
        steps: For each loss the step at which it was not finite, ``parallel.NEVER`` if it always
            was.
    """
    return min(steps, key=lambda name: (steps[name], name == "total/loss"))


def what_broke(name: str, step: int, seed: int) -> str:
    """Says which loss of a run was not finite, and when."""
    loss = name.removesuffix("/loss")
    return f"The loss '{loss}' is not finite after {step} steps of the run with seed {seed}."
