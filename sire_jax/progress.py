"""What a person sees of a run, and the signals by which a person stops it."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

_BAR = "{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Progress:
    """A bar with losses and images/s on a terminal, plain lines elsewhere.

    Args:
        epochs: Epochs of the whole run.
        steps: Steps of an epoch.
        images: Images of a step, over all runs.
        start: Steps taken already.
    """

    def __init__(self, epochs: int, steps: int, images: int, start: int):
        self._images, self._epochs, self._steps = images, epochs, steps
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=epochs * steps,
            initial=start,
            unit="step",
            disable=not self._terminal,
            dynamic_ncols=True,
            bar_format=_BAR,
        )
        self._since, self._taken = time.perf_counter(), 0

    def advance(self, steps: int) -> None:
        """Moves the bar on."""
        self._taken += steps
        self._bar.update(steps)

    def report(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Shows values, means over the runs, and the speed since the last report."""
        now = time.perf_counter()
        speed = self._taken * self._images / max(now - self._since, 1e-9)
        self._since, self._taken = now, 0
        shown = "  ".join(f"{name} {np.mean(each):.4g}" for name, each in values.items())
        if self._terminal:
            self._bar.set_postfix_str(f"{speed:,.0f} images/s  {shown}")
        else:
            epoch = -(-step // self._steps)
            print(
                f"epoch {epoch}/{self._epochs}  step {step}  {shown}  {speed:,.0f} images/s",
                flush=True,
            )

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(message)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


@dataclass
class Stop:
    """Whether somebody has asked to stop.

    Attributes:
        signal: Name of the signal received; "" if none.
    """

    signal: str = ""


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Notes Ctrl-C and SIGTERM instead of dying of them; a second one has its usual effect."""
    stop = Stop()
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        stop.signal = signal.Signals(number).name
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, note)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
