"""Signs of life of the processes of a job, and what follows from their absence.

Two threads of each process: one says once a second that it lives and how far it has come, and reads
what the others say; the other, ``Watch``, judges.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import jax

from sire_jax.job import command
from sire_jax.job.coordination import Service

SECONDS_BETWEEN_SIGNS = 1.0
# Until the config says otherwise.
_TIMEOUT = 12.0
# Of a process that ends with an error, so that the others can read it before they lose it.
_FAREWELL = 3.0
# For a call to the service to come back that has been left: it does so at once.
_LAST_CALL = 10.0
# Since the last sign of a process of which it is said that it lives.
_LIVELY = 3 * SECONDS_BETWEEN_SIGNS
# Where signs are kept in the coordination service.
_SIGNS = "sire_jax/signs/"


@dataclass
class Sign:
    """What a process says of itself once a second.

    Attributes:
        beat: A number that grows while the process lives.
        arrived: How many common programs it has come to.
        busy: What it does that may take long, "" if nothing.
        ended: Its exit status, if it ended with an error.
        reason: Why, if another process was the cause.
        since: When ``beat`` last grew.
    """

    beat: int = 0
    arrived: int = 0
    busy: str = ""
    ended: int | None = None
    reason: str = ""
    since: float = field(default=0.0, compare=False)

    def written(self) -> str:
        """Returns it as text."""
        return json.dumps([self.beat, self.arrived, self.busy, self.ended, self.reason])


class Signs:
    """What is known of all processes, and the judgement of it.

    >>> signs = Signs(process=0, count=2, timeout=12.0, now=0.0)
    >>> signs.read(1, Sign(beat=1).written(), now=5.0)
    >>> signs.judge(now=10.0)
    >>> signs.judge(now=20.0)
    ('process 1 has given no sign of life for 15 s', 75)

    Args:
        process: This process.
        count: Number of processes.
        timeout: Seconds without a sign of life, or of the next common program.
        now: The time.
    """

    def __init__(self, process: int, count: int, timeout: float, now: float):
        self.timeout = timeout
        self.own = Sign(since=now)
        self._process = process
        self._others = {i: Sign(since=now) for i in range(count) if i != process}
        self._waits_since = now

    def arrive(self, now: float) -> None:
        """Notes that this process has come to its next common program."""
        self.own.arrived += 1
        self._waits_since = now

    def read(self, process: int, text: str, now: float) -> None:
        """Notes the sign of another process."""
        if process == self._process:
            return
        before = self._others[process]
        sign = Sign(*json.loads(text))
        # By this process's own clock: those of hosts differ.
        sign.since = before.since if sign.beat == before.beat else now
        self._others[process] = sign

    def judge(self, now: float) -> tuple[str, int] | None:
        """Returns why this process should end, and the exit status; ``None`` if it should not."""
        if self.own.ended is not None:
            # It is on its way out, for a reason of its own.
            return None
        for i, sign in self._others.items():
            if sign.ended is not None:
                reason = f"process {i} ended with status {sign.ended}; see its messages"
                return sign.reason or reason, sign.ended
            silent = now - sign.since
            if silent > self.timeout:
                return f"process {i} has given no sign of life for {silent:.0f} s", command.PEER
        waited = now - self._waits_since
        if self.own.busy or waited <= self.timeout:
            return None
        late = [
            i
            for i, sign in self._others.items()
            if sign.arrived < self.own.arrived
            and not sign.busy
            # Of one that is silent, too, that is what will be said.
            and now - sign.since <= _LIVELY
        ]
        if not late:
            return None
        names = ", ".join(map(str, late))
        return (
            f"process{'es' * (len(late) > 1)} {names} lived but did not come to the next step for"
            f" {waited:.0f} s",
            command.PEER,
        )


class Watch(threading.Thread):
    """Gives signs of life and ends the process where another gives none.

    Args:
        service: JAX's coordination service.
        process: This process.
        count: Number of processes.
    """

    def __init__(self, service: Service, process: int, count: int):
        super().__init__(name="watch", daemon=True)
        self.signs = Signs(process, count, _TIMEOUT, time.monotonic())
        self._service, self._process = service, process
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._exchanging = threading.Thread(target=self._exchange, name="signs", daemon=True)

    def start(self) -> None:
        """Starts both threads."""
        self._exchanging.start()
        super().start()

    def run(self) -> None:
        """Judges once a second what is known."""
        while not self._over.is_set():
            judgement = self.signs.judge(time.monotonic())
            if judgement is not None:
                reason, status = judgement
                self.end(status, reason)
            self._over.wait(SECONDS_BETWEEN_SIGNS)

    def _exchange(self) -> None:
        """Gives and reads signs once a second; apart, as a frozen process 0 does not answer."""
        while not self._over.is_set():
            # The service may be slow for once; if it is gone, JAX aborts (explain_abort).
            with contextlib.suppress(RuntimeError):
                self._publish()
                for key, text in self._service.key_value_dir_get(_SIGNS):
                    self.signs.read(int(key.rsplit("/", 1)[1]), text, time.monotonic())
            self._over.wait(SECONDS_BETWEEN_SIGNS)

    def rest(self) -> None:
        """Ends the watch, once the processes have left each other.

        At the end of the interpreter, Python up to 3.13 ends threads that are left. One that is
        within a call to the service, and so in C++, takes the process with it: by SIGABRT.
        """
        self._over.set()
        self._exchanging.join(_LAST_CALL)

    def arrive(self) -> None:
        """Notes that this process has come to its next common program."""
        self.signs.arrive(time.monotonic())

    def be_busy(self, doing: str) -> None:
        """Says at once what this process does that may take long."""
        self.signs.own.busy = doing
        # If it can't be said now, it is in a second.
        with contextlib.suppress(RuntimeError):
            self._publish()

    def end(self, status: int, reason: str = "") -> None:
        """Ends the process, at once, as its main thread may wait for one that is gone.

        Args:
            status: The exit status.
            reason: What another process has done, if that is why. The others are told it, too.
        """
        if reason:
            _say(f"{reason}. Start the job again: it goes on from the newest checkpoint")
        self.signs.own.ended, self.signs.own.reason = status, reason
        # The next sign says it. Without process 0 the others lose what it keeps for all of them.
        time.sleep(_FAREWELL if self._process == 0 else 2 * SECONDS_BETWEEN_SIGNS)
        _exit(status)

    def _publish(self) -> None:
        with self._lock:
            self.signs.own.beat += 1
            self._service.key_value_set(
                f"{_SIGNS}{self._process}", self.signs.own.written(), allow_overwrite=True
            )


def _say(reason: str) -> None:
    print(
        f"Error: process {jax.process_index()} ends, because {reason}.", file=sys.stderr, flush=True
    )


def _exit(status: int) -> None:
    """Ends the process without waiting for the others, as ``jax.distributed`` would."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def explain_abort() -> None:
    """Says which process is gone where JAX aborts this one, as it does when it loses process 0."""
    global _aborted
    if jax.process_index() == 0:
        return

    def explain(number: int) -> None:
        _say(
            "JAX aborted it (see above), most likely as process 0, through which all are"
            " connected, is gone"
        )
        _exit(command.PEER)

    # A handler of Python's own would wait for the main thread, and the abort does not.
    _aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


# Kept, as C does not count references.
_aborted: Any = None
