"""launch/local.sh with a stand-in for the program, and once with the program itself."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import standin

SCRIPT = Path(__file__).parents[2] / "launch" / "local.sh"
ARGUMENTS = ["--config=configs/a.py:b,c", "--workdir=a b", "--config.x=(1, 2)"]


@pytest.fixture
def program(tmp_path):
    return standin.write(tmp_path)


def _start(program, endings, **more):
    variables = standin.environment(**{"ENDINGS": endings, "PYTHON": str(program.path), **more})
    return subprocess.Popen([SCRIPT, *ARGUMENTS], env=variables, stderr=subprocess.PIPE, text=True)


def _run(program, endings, **more):
    process = _start(program, endings, **more)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_it_is_a_script_that_parses():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_one_process_gets_the_arguments_and_no_word_of_others(program):
    assert _run(program, "0") == (0, "")
    assert program.notes("start") == [["-m", "sire_jax.train", *ARGUMENTS]]
    assert program.notes("environment") == [{}]


def test_several_processes_get_numbers_an_address_and_cores(program):
    assert _run(program, "0", PROCESSES="3") == (0, "")
    assert program.notes("start") == [["-m", "sire_jax.train", *ARGUMENTS]] * 3
    told = sorted(program.notes("environment"), key=lambda each: each["JAX_PROCESS_ID"])
    assert [each.pop("JAX_PROCESS_ID") for each in told] == ["0", "1", "2"]
    assert [each.pop("NPROC") for each in told] == ["16"] * 3
    assert [each.pop("JAX_NUM_PROCESSES") for each in told] == ["3"] * 3
    host, port = told[0]["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == "127.0.0.1"
    assert 1024 <= int(port) < 65536
    assert told == [{"JAX_COORDINATOR_ADDRESS": f"{host}:{port}"}] * 3


def test_what_is_said_by_hand_is_passed_to_one_process(program):
    by_hand = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert _run(program, "0", **by_hand) == (0, "")
    assert program.notes("environment") == [by_hand]


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize(
    ("endings", "crashes", "status"),
    [
        ("0", [], 0),
        ("2", [], 2),
        ("85", [], 85),
        ("130", [], 130),
        ("1 kill 75 0", [1, 137, 75], 0),
        ("1 2", [1], 2),
        ("kill 75 3 75 0", [137, 75, 3], 75),
    ],
)
def test_crashes_and_lost_peers_are_started_again(program, processes, endings, crashes, status):
    found, errors = _run(program, endings, PROCESSES=processes)
    assert found == status
    said = [line for line in errors.splitlines() if line.startswith("Ended")]
    assert said == [f"Ended with status {each}; starting again." for each in crashes]
    assert len(program.notes("start")) == (len(crashes) + 1) * int(processes)


def test_tries_are_a_setting(program):
    assert _run(program, "7", TRIES="1")[0] == 7
    assert len(program.notes("start")) == 2
    program.file.unlink()
    assert _run(program, "7", TRIES="0")[0] == 7
    assert len(program.notes("start")) == 1


def test_each_try_has_a_port_of_its_own(program):
    assert _run(program, "75 0", PROCESSES="2")[0] == 0
    addresses = [each["JAX_COORDINATOR_ADDRESS"] for each in program.notes("environment")]
    assert len(addresses) == 4
    assert len(set(addresses)) == 2


def test_a_process_that_ends_badly_ends_the_others_and_its_status_counts(program):
    status, _ = _run(program, "stay|2", PROCESSES="2", GRACE="1")
    assert status == 2
    assert len(program.notes("start")) == 2
    assert not any(standin.alive(pid) for pid in program.notes("pid"))


def test_processes_may_end_by_themselves_first(program):
    # Process 0 ends 0.5 s after the other one: nobody kills it, and the first status counts.
    process = _start(program, "stay|75 0", PROCESSES="2", GRACE="20", SAVING="0.5")
    program.wait("start", 2)
    (first,) = {
        pid
        for pid, where in zip(program.notes("pid"), program.notes("process"), strict=True)
        if where == 0
    }
    os.kill(first, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert program.notes("end") == [85]
    assert process.returncode == 0
    assert "Ended with status 75; starting again." in errors


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize(
    ("sent", "noted", "status"),
    [
        (signal.SIGTERM, "SIGTERM", 85),
        (signal.SIGHUP, "SIGTERM", 85),
        (signal.SIGUSR1, "SIGUSR1", 85),
        (signal.SIGINT, "SIGINT", 130),
    ],
)
def test_signals_are_passed_on_once_to_all_and_end_it(program, processes, sent, noted, status):
    process = _start(program, "stay", PROCESSES=processes)
    program.wait("start", int(processes))
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert program.notes("signal") == [noted] * int(processes)
    assert program.notes("end") == [status] * int(processes)
    assert len(program.notes("start")) == int(processes)


def test_a_crash_after_a_signal_is_not_started_again(program):
    process = _start(program, "stay", SAVING="5")
    program.wait("start")
    process.send_signal(signal.SIGINT)
    program.wait("signal")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 99
    assert len(program.notes("start")) == 1


def test_a_signal_between_two_tries_is_not_lost(program, tmp_path):
    # Finding a port takes a while here, and there is no process that a signal could be passed to.
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\n[ "$1" = -c ] && sleep 1\nexec {program.path} "$@"\n')
    slow.chmod(0o755)
    process = _start(program, "75 stay", PROCESSES="2", PYTHON=str(slow))
    program.wait("start", 2)
    line = process.stderr.readline()
    assert line == "Ended with status 75; starting again.\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (85, 128 + signal.SIGTERM)
    assert len(program.notes("start")) in (2, 4)
    assert not any(standin.alive(pid) for pid in program.notes("pid"))


# What is forked becomes another program at once.
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_ctrl_c_in_a_terminal_reaches_each_process_once(program):
    pid, terminal = pty.fork()
    if pid == 0:
        variables = standin.environment(
            ENDINGS="stay", PYTHON=str(program.path), PROCESSES="2", PATH=os.environ["PATH"]
        )
        os.execve(SCRIPT, [str(SCRIPT), *ARGUMENTS], variables)
    program.wait("start", 2)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert program.notes("signal") == ["SIGINT"] * 2


# Several starts of the real program, connected.
@pytest.mark.slow
def test_two_real_processes_train_one_network_and_go_on_after_a_kill(tmp_path):
    repository = SCRIPT.parents[1]
    sizes = ["seeds=1", "epochs=300", "batch_size=50", "data.task.train=50", "data.task.test=20"]
    rarely = ["checkpoint_every=10", "evaluate_every=0", 'evaluate_splits=("test",)']
    command = [
        SCRIPT,
        f"--config={repository}/tests/tiny.py",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{each}" for each in (*sizes, *rarely, "peer_timeout=5.0")),
    ]
    variables = standin.environment(
        PROCESSES="2", PYTHON=sys.executable, PYTHONPATH=str(repository), HOME=str(tmp_path)
    )
    log, checkpoints = tmp_path / "log", tmp_path / "run" / "checkpoints"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=file)
    standin.until(lambda: any(checkpoints.glob("[1-9]*/manifest")), 120)
    workers = standin.children(process.pid, "sire_jax.train")
    assert len(workers) == 2, log.read_text()
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    assert "Ended with status 137; starting again." in log.read_text()
    assert re.search(r"Going on after step [1-9]\d*0\b", log.read_text())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 300
