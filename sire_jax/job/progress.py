"""What a person sees of a run, and the signals by which a person stops it."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from sire_jax.job import signals

_BAR = "{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Progress:
    """A bar with losses and images/s on a terminal, plain lines elsewhere.

    Args:
        epochs: Epochs of the whole run.
        steps: Steps of an epoch.
        images: Images of a step, over all runs.
        start: Steps taken already.
        silent: Whether nothing is shown, as by all processes of a job but one.
    """

    def __init__(self, epochs: int, steps: int, images: int, start: int, silent: bool = False):
        self._images, self._epochs, self._steps = images, epochs, steps
        self._silent = silent
        self._terminal = sys.stderr.isatty() and not silent
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
        if self._silent:
            return
        now = time.perf_counter()
        speed = self._taken * self._images / max(now - self._since, 1e-9)
        self._since, self._taken = now, 0
        text = "  ".join(f"{name} {np.mean(value):.4g}" for name, value in values.items())
        if self._terminal:
            self._bar.set_postfix_str(f"{speed:,.0f} images/s  {text}")
        else:
            epoch = -(-step // self._steps)
            print(
                f"epoch {epoch}/{self._epochs}  step {step}  {text}  {speed:,.0f} images/s",
                flush=True,
            )

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            tqdm.write(message)
            sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


class Pace:
    """How many steps one call of a program takes, so that a run can be stopped within seconds.

    >>> pace = Pace(most=100)
    >>> pace.note(steps=pace.steps, seconds=0.05)
    >>> pace.steps
    20

    Args:
        most: The most steps of a call.
    """

    def __init__(self, most: int):
        self.steps, self._most = 1, most

    def note(self, steps: int, seconds: float) -> None:
        """Notes how long a call took; the first one, which compiles, is followed by a short one."""
        fitting = int(_SECONDS_OF_A_CALL * steps / max(seconds, 1e-9))
        self.steps = min(max(fitting, 1), self._most)


_SECONDS_OF_A_CALL = 1.0


@dataclass
class Stop:
    """Whether somebody has asked to stop.

    Attributes:
        signal: Name of the signal received; "" if none.
        unsaved: Whether steps have been taken that would be lost if the program ended at once.
    """

    signal: str = ""
    unsaved: bool = False

    @property
    def by_person(self) -> bool:
        """Whether it was Ctrl-C: a person, not a system that will start the program again."""
        return self.signal == signal.SIGINT.name


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Notes signals (``signals.SIGNALS``) instead of dying of them; handlers are then as before.

    A second Ctrl-C has its usual effect; in a program, which a thread of its own listens for, it
    ends at once, as does the first signal while nothing would be lost. The others may come several
    times, as a cluster sends them to a job and to its steps: a program that ends because of one
    ignores them. In a thread that is not the main one, as of a notebook's widgets, there are no
    signals to note.
    """
    stop = Stop()
    if signals.listening():
        try:
            with signals.passed_to(partial(_note, stop)):
                yield stop
        finally:
            if stop.signal and not stop.by_person:
                signals.ignore_system()
    elif threading.current_thread() is threading.main_thread():
        with _handlers(stop):
            yield stop
    else:
        yield stop


def _note(stop: Stop, number: signal.Signals) -> None:
    """Notes a signal, in the thread that listens."""
    by_person = number == signal.SIGINT
    if (by_person and stop.signal) or not (stop.unsaved or stop.signal):
        signals.end(number)
    if by_person:
        print("\nSIGINT: saving first; once more ends it at once.", file=sys.stderr, flush=True)
    stop.signal = stop.signal or number.name


@contextmanager
def _handlers(stop: Stop) -> Iterator[None]:
    """Has Python call handlers that note signals, in the main thread."""
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        stop.signal = stop.signal or signal.Signals(number).name
        if number == signal.SIGINT:
            # The second one then ends it, should saving take too long for the person.
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        for number in signals.SIGNALS:
            handler = signal.getsignal(number)
            # What was ignored at the start stays so; None: it is not Python's to put back.
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
