"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP to a program, whatever its main thread is doing.

Python calls a handler between two instructions of the main thread: minutes later where XLA
compiles, and an exception raised there is lost where a library catches it. So a thread of its own
listens. It ends the program at once, or tells whoever has something to save.

It listens before anything else is imported, hence nothing but the standard library here.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sire_jax.job import command

# A person's; those of systems; that of a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Programs that go on when they are started again; the others may die of SIGTERM as any program.
_RESUMED = ("train", "reproduce")

Receive = Callable[[signal.Signals], None]

_listened_to: tuple[signal.Signals, ...] = ()
_receive: Receive


def listen() -> None:
    """Begins to listen, if this process is one of the programs of this package.

    A signal that was ignored when the program started stays ignored: Ctrl-C is not meant for what
    a shell started in the background.
    """
    global _listened_to, _receive
    program = _program()
    if program is None or threading.current_thread() is not threading.main_thread():
        return
    numbers = SIGNALS if program in _RESUMED else (signal.SIGINT,)
    _listened_to = tuple(n for n in numbers if signal.getsignal(n) != signal.SIG_IGN)
    _receive = end
    source, sink = os.pipe()
    # As Python demands: what writes into it is C's handler, which must never wait.
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    listen_again()
    # A copy of this process has no such thread.
    os.register_at_fork(after_in_child=_stop_listening)
    threading.Thread(target=_listen, args=(source,), name="signals", daemon=True).start()


def listen_again() -> None:
    """Listens to the signals again that a library has taken for itself, as jax.distributed does."""
    for number in _listened_to:
        signal.signal(number, _leave_to_thread)


def listening() -> bool:
    """Tells whether a thread listens."""
    return bool(_listened_to)


@contextlib.contextmanager
def passed_to(receive: Receive) -> Iterator[None]:
    """Passes signals on, in the thread that listens, in place of ending the program.

    Args:
        receive: What is called with each.
    """
    global _receive
    listen_again()
    before, _receive = _receive, receive
    try:
        yield
    finally:
        _receive = before


def ignore_system() -> None:
    """From now on only Ctrl-C ends the program: it is on its way out, as the system asked."""
    for number in set(_listened_to) - {signal.SIGINT}:
        # Python has no handlers any more while it shuts down.
        signal.signal(number, signal.SIG_IGN)


def end(number: signal.Signals) -> None:
    """Ends the program at once, with a line that says why, and the status that launchers expect.

    Args:
        number: The signal.
    """
    resumed = _program() in _RESUMED
    advice = " What has been saved is kept, and the same command goes on." if resumed else ""
    # Past Python's streams, whose lock the main thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{number.name}: ended.{advice}\n".encode())
    _leave(command.INTERRUPTED if number == signal.SIGINT else command.AGAIN)


def leave_by(ending: Callable[[int], Any]) -> None:
    """Sets how the process is ended at once.

    Args:
        ending: What is called with the exit status, and does not return.
    """
    global _leave
    _leave = ending


# Of a job of several processes another one, which tells the others (``leave_by``).
_leave: Callable[[int], Any] = os._exit


def _program() -> str | None:
    """Returns the program of this package that this process is, if it is one."""
    if "-c" in sys.orig_argv:
        # As multiprocessing starts its own, whose sys.argv is that of the program.
        return None
    if sys.argv[:1] == ["-m"]:
        # So while the program itself is not imported yet.
        names = [word for word in sys.orig_argv if word.startswith("sire_jax.")]
        return names[0].rpartition(".")[2] if names else None
    path = Path(sys.argv[0] if sys.argv else "").absolute()
    return path.stem if Path(__file__).absolute().parents[1] in path.parents else None


def _leave_to_thread(number: int, frame: Any) -> None:
    """Does nothing: what listens has been woken."""


def _listen(source: int) -> None:
    while True:
        for number in os.read(source, 64):
            if number in _listened_to:
                _receive(signal.Signals(number))


def _stop_listening() -> None:
    global _listened_to
    signal.set_wakeup_fd(-1)
    for number in _listened_to:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    _listened_to = ()
