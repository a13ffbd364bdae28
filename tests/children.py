"""The processes that tests start, known by a mark in their environment; and how large one is."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_MARK = "SIRE_JAX_TESTS"
# They end with the process that they help, a test or a whole session.
_HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")
# What shells and `nohup` start in the background may ignore.
_STOPPING = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def get_default_signals() -> None:
    """Lets children start with the default handlers of signals that this process ignores.

    What is ignored stays ignored in a child, and a shell can't take that back; a handler does not
    outlive the start of another program. This process itself goes on undisturbed.
    """
    for number in (getattr(signal, name) for name in _STOPPING if hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@contextlib.contextmanager
def marking(name: str) -> Iterator[None]:
    """Marks whatever this process starts meanwhile, also through others, and kills it at the end.

    Also where this process is killed: another one watches it.
    """
    arguments = [sys.executable, "-E", "-S", __file__, str(os.getpid()), name]
    watcher = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True)
    os.environ[_MARK] = name
    try:
        yield
    finally:
        del os.environ[_MARK]
        kill(name)
        watcher.kill()
        watcher.wait()


def marked(name: str) -> dict[int, str]:
    """Returns the processes that run and carry a mark, and their commands.

    There are none without ``/proc``. Helpers of ``multiprocessing`` are left out.
    """
    word = f"{_MARK}={name}".encode()
    running = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        # Nothing is left of the command of one that has ended.
        helps = any(helper in command for helper in _HELPERS)
        if command and not helps and word in environment.split(b"\0"):
            running[int(path.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    running.pop(os.getpid(), None)
    return running


def kill(name: str, but: set[int] | None = None, grace: float = 0.0) -> dict[int, str]:
    """Kills the processes that carry a mark, and those that they start meanwhile.

    Args:
        name: The mark.
        but: Numbers of processes that are spared.
        grace: Seconds in which they may end by themselves, as the last `sleep` of a script does.

    Returns:
        Those that it killed, and their commands.
    """
    patient = time.monotonic() + grace
    while time.monotonic() < patient and set(marked(name)) - (but or set()):
        time.sleep(0.05)
    killed = {}
    until = time.monotonic() + 10
    while left := {k: v for k, v in marked(name).items() if k not in (but or ())}:
        killed.update(left)
        for number in left:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return killed


def resident() -> int:
    """Returns the bytes of memory that this process holds, 0 where that isn't known."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return 0
    return int(statistics.read_text().split()[1]) * resource.getpagesize()


def most_resident() -> int:
    """Returns the most bytes of memory that this process has held so far."""
    # Bytes on macOS, elsewhere kilobytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Gives memory that was freed back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _watch(watched: int, name: str) -> None:
    while os.getppid() == watched:
        time.sleep(0.5)
    kill(name)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
