"""What tests start is ended, whatever becomes of the tests."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import children
import pytest
import standin

TESTS = Path(__file__).parent
# Says which signals stop a child as they should, and whether they stop its parent.
_PROGRAM = """
import os, signal, subprocess, sys
import children
children.get_default_signals()
names = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1")
shown = "import signal; print(*(signal.getsignal(getattr(signal, n)) for n in {names}), sep='|')"
subprocess.run([sys.executable, "-c", shown.format(names=names)], check=True)
for name in names:
    os.kill(os.getpid(), getattr(signal, name))
print("goes on")
"""


def test_children_get_default_handlers_of_what_a_shell_in_the_background_ignores():
    ignoring = 'trap "" HUP INT QUIT TERM USR1; exec "$@"'
    command = ["bash", "-c", ignoring, "bash", sys.executable, "-c", _PROGRAM]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)}
    )
    handlers, goes_on = done.stdout.splitlines()
    hangup, interrupt, *others = handlers.split("|")
    assert "default_int_handler" in interrupt
    assert {hangup, *others} == {str(signal.Handlers.SIG_DFL.value)} | {str(signal.SIG_DFL)}
    assert goes_on == "goes on"


needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="processes are known by /proc")


@needs_proc
def test_a_marked_process_is_killed_though_nobody_remembers_it():
    # The shell ends at once; what it has started is nobody's child.
    command = ["bash", "-c", "sleep 1000 & sleep 1001 &"]
    environment = {**os.environ, "SIRE_JAX_TESTS": "test_children"}
    subprocess.run(command, env=environment, check=True)
    expected = ["sleep 1000", "sleep 1001"]
    standin.until(lambda: sorted(children.marked("test_children").values()) == expected, 20)
    running = children.marked("test_children")
    (last,) = (number for number, command in running.items() if command == "sleep 1001")
    assert children.kill("test_children", but=set(running) - {last}) == {last: "sleep 1001"}
    assert list(children.marked("test_children").values()) == ["sleep 1000"]
    children.kill("test_children")
    assert children.marked("test_children") == {}


def test_what_a_process_holds_of_memory_is_known():
    held = bytearray(b"x") * 2**26
    # The kernel counts the most a little late.
    assert 2**26 < children.resident() < 1.1 * children.most_resident()
    assert len(held) == 2**26


_TESTS = """
import ctypes, signal, subprocess, time

def start(*command, started=[]):
    started.append(subprocess.Popen(command))

def test_that_waits():
    start("sleep", "2001")
    time.sleep(1000)

def test_that_is_stuck_in_compiled_code():
    start("sleep", "2002")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    # Holds on to the interpreter.
    ctypes.PyDLL(None).sleep(1000)

def test_that_fails():
    start("sleep", "2003")
    assert False

def test_that_passes():
    start("bash", "-c", "sleep 2004 & sleep 2005")
    time.sleep(0.5)
"""


@pytest.mark.slow  # Starts workers of its own.
@needs_proc
def test_a_suite_with_tests_that_hang_and_fail_ends_and_leaves_nothing(tmp_path):
    (tmp_path / "test_badly.py").write_text(textwrap.dedent(_TESTS))
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "slow.txt").write_text("")
    options = ["-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml")]
    options += [f"--rootdir={tmp_path}", "-n", "1", "--timeout=3", "-ra", str(tmp_path)]
    ignoring = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", sys.executable, "-m", "pytest"]
    log, start = tmp_path / "log", time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            [*ignoring, *options],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
                "COLUMNS": "1000",
            },
            check=False,
        )
    output = log.read_text()
    assert done.returncode == 1, output
    assert time.monotonic() - start < 120
    assert re.search(r"FAILED.*test_that_waits - Failed: Timeout", output), output
    assert re.search(r"FAILED.*test_that_is_stuck_in_compiled_code", output), output
    assert re.search(r"FAILED.*test_that_fails - assert False", output), output
    assert re.search(r"ERROR.*test_that_passes - AssertionError: Left running: .*2005", output)
    assert "3 failed, 1 passed, 1 error" in output
    commands = Path("/proc").glob("[0-9]*/cmdline")
    running = [_read(path) for path in commands]
    assert not [line for line in running if re.fullmatch(r"sleep 200\d", line)]


def _read(path):
    try:
        return path.read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""
