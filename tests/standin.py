"""A stand-in for the training program: keeps its contract with the launchers and nothing else.

It notes each start and each signal, and ends as the test says: with a status, killed, or at a
signal, "saving" for a while first. A second Ctrl-C is fatal.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPT = """#!{python}
import json, os, signal, sys, time

if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
place = os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0"))
signals = []


def note(**what):
    line = json.dumps({{"process": int(place), "job": job, "pid": os.getpid(), **what}})
    # In one write, as other processes append, too.
    with open({notes!r}, "ab", buffering=0) as file:
        file.write((line + "\\n").encode())


def record(number, frame):
    note(signal=signal.Signals(number).name)
    if number in signals and number == signal.SIGINT:
        os._exit(99)
    signals.append(number)


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, record)
job = os.environ.get("SLURM_JOB_ID", "")
with open({notes!r}, "a+") as file:
    file.seek(0)
    known = [json.loads(line) for line in file if line.endswith("\\n")]
again = sum("start" in n and (n["process"], n["job"]) == (int(place), job) for n in known)
kept = {{k: v for k, v in os.environ.items() if k.startswith(("JAX_", "NPROC", "SLURM_"))}}
note(start=sys.argv[1:], environment=kept)
endings = os.environ["ENDINGS"].split()
here = endings[min(again, len(endings) - 1)].split("|")
ending = here[int(place)] if len(here) > 1 else here[0]
if ending == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if ending != "stay":
    # As the program before it trains.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    status, _, seconds = ending.partition("@")
    time.sleep(float(seconds or 0))
    sys.exit(int(status))
while not signals:
    time.sleep(0.02)
time.sleep(float(os.environ.get("SAVING", "0.3")))
status = 130 if signals[0] == signal.SIGINT else 85
note(end=status)
sys.exit(status)
"""


@dataclass(frozen=True)
class Standin:
    """A stand-in and its notes.

    Its environment says how it ends: ``ENDINGS`` is a word for each start, the last one for all
    later ones: a status, perhaps after some seconds in which any signal ends it (``2@1``);
    ``kill``; or ``stay`` until a signal. ``a|b`` is one for each process.

    Attributes:
        path: What to run in place of Python.
        file: Where it notes what happens.
    """

    path: Path
    file: Path

    def notes(self, key: str, job: int | None = None) -> list[Any]:
        """Returns what it noted under a key, in order, of all jobs or of one."""
        lines = self.file.read_text().splitlines(True) if self.file.exists() else []
        # The last one may be half written.
        noted = [json.loads(line) for line in lines if line.endswith("\n")]
        return [n[key] for n in noted if key in n and job in (None, int(n["job"] or 0))]

    def wait(self, key: str, number: int = 1, job: int | None = None, seconds: float = 20) -> None:
        """Waits until it has noted something so many times."""
        until(lambda: len(self.notes(key, job)) >= number, seconds)


def write(directory: Path) -> Standin:
    """Writes a stand-in into a directory."""
    path, notes = directory / "standin", directory / "notes.jsonl"
    path.write_text(_SCRIPT.format(python=sys.executable, notes=str(notes)))
    path.chmod(0o755)
    return Standin(path, notes)


def until(true: Callable[[], bool], seconds: float) -> None:
    """Waits for something to be true."""
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, f"still waiting after {seconds} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Tells whether a process runs."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def children(parent: int, running: str) -> list[int]:
    """Returns the processes that a process has started and that run a program."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (path / "stat").read_text(), (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent and running.encode() in command:
            found.append(int(path.name))
    return sorted(found)


def environment(**more: str) -> dict[str, str]:
    """Returns this process's environment without what tells a program that it is one of several."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "NPROC"))}
    return own | more
