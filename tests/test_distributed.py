"""Several processes: how they start, agree, and judge each other."""

import os
import subprocess
import sys

import chex
import jax
import numpy as np
import programs
import pytest

from sire_jax import configuration, train
from sire_jax.configuration import experiment
from sire_jax.job import command, distributed, lock
from sire_jax.job.watch import Sign, Signs
from sire_jax.runs.runs import Runs

SMALL = (
    "--config.seeds=2",
    "--config.epochs=2",
    "--config.data.task.train=100",
    "--config.data.task.test=30",
)
# Adam makes steps of the same size out of rounding errors.
PLAIN = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.01")
BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": "localhost:1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}
# One of a kind is quick: each starts several processes of the real program.
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is missing; set all of JAX_COORDINATOR_ADDRESS, "),
        ({"JAX_PROCESS_ID": "2"}, r"JAX_PROCESS_ID is 2; of 2 processes it should be in 0\.\.1"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two' and JAX_PROCESS_ID '0'; they"),
        ({"JAX_DISTRIBUTED": "on"}, "JAX_DISTRIBUTED is 'on'; it should be 'auto', or not be set"),
    ],
)
def test_variables_that_do_not_fit_are_refused(changed, message, monkeypatch):
    for name, value in {**BY_HAND, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.start()


def test_one_process_is_not_connected(monkeypatch):
    for name in (*BY_HAND, "JAX_DISTRIBUTED", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    distributed.start()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    distributed.start()
    for name, value in {**BY_HAND, "JAX_NUM_PROCESSES": "1"}.items():
        monkeypatch.setenv(name, value)
    distributed.start()
    assert jax.process_count() == 1
    assert distributed.is_main()
    assert distributed.exchange("a") == ["a"]
    assert distributed.agree(True, 7) == (True, 7)
    with pytest.raises(KeyError, match="mine"), distributed.together("failing"):
        raise KeyError("mine")


# ---- The judgement of signs, with the time in the hands of the test.


def _signs(count=3, timeout=10.0):
    return Signs(process=0, count=count, timeout=timeout, now=0.0)


def _tell(signs, process, now, **values):
    signs.read(process, Sign(**values).written(), now)


def test_processes_that_give_signs_are_left_alone():
    signs = _signs()
    for now in range(1, 100):
        for process in (1, 2):
            _tell(signs, process, now, beat=now)
        assert signs.judge(now) is None


def test_a_process_without_signs_is_named_after_the_timeout():
    signs = _signs()
    for now in range(1, 31):
        _tell(signs, 1, now, beat=now)
        # It is read again and again, and does not change.
        _tell(signs, 2, now, beat=min(now, 12))
        silent = now - 12
        expected = None
        if silent > 10:
            reason = f"process 2 has given no sign of life for {silent} s"
            expected = (reason, command.PEER)
        assert signs.judge(now) == expected


def test_a_process_that_never_gave_a_sign_is_named_too():
    signs = _signs(count=2)
    assert signs.judge(10.0) is None
    assert signs.judge(11.0) == ("process 1 has given no sign of life for 11 s", command.PEER)


def test_processes_that_live_but_do_not_come_are_named():
    signs = _signs(count=4)
    signs.arrive(0.0)
    signs.arrive(5.0)
    for now in range(6, 20):
        _tell(signs, 1, now, beat=now, arrived=2)
        _tell(signs, 2, now, beat=now, arrived=1)
        _tell(signs, 3, now, beat=now, arrived=1)
        judged = signs.judge(now)
        if now <= 15:
            assert judged is None
        else:
            reason = f"processes 2, 3 lived but did not come to the next step for {now - 5} s"
            assert judged == (reason, command.PEER)


def test_who_compiles_is_waited_for_and_who_is_ahead_is_not_judged():
    signs = _signs(count=2)
    signs.arrive(0.0)
    _tell(signs, 1, 50.0, beat=9, arrived=0, busy="compiling")
    assert signs.judge(50.0) is None
    _tell(signs, 1, 51.0, beat=10, arrived=5)
    assert signs.judge(51.0) is None
    _tell(signs, 1, 52.0, beat=11, arrived=0)
    assert signs.judge(52.0) is not None
    signs.own.busy = "compiling"
    assert signs.judge(52.0) is None


def test_a_process_that_ended_with_an_error_passes_its_status_on():
    signs = _signs(count=2)
    _tell(signs, 1, 1.0, beat=1, ended=2)
    assert signs.judge(1.0) == ("process 1 ended with status 2; see its messages", 2)
    signs = _signs(count=3)
    _tell(signs, 1, 1.0, beat=1, ended=75, reason="process 2 is gone")
    assert signs.judge(1.0) == ("process 2 is gone", 75)
    # One on its way out does not look for other reasons.
    signs.own.ended = 2
    assert signs.judge(1.0) is None


# ---- Two real processes.


def _ended(job):
    with programs.started(*job):
        return [each.wait() for each in job], [each.output for each in job]


def test_processes_that_disagree_on_the_config_are_refused_with_the_difference(tmp_path):
    job = programs.job_of(
        lambda i: [
            "sire_jax.train",
            programs.TINY,
            f"--workdir={tmp_path / 'run'}",
            f"--config.seed={i}",
            # That one is a host's own affair.
            f"--config.data.cache={tmp_path / str(i)}",
        ],
        tmp_path,
    )
    statuses, outputs = _ended(job)
    assert statuses == [command.EXPLAINED] * 2
    for output in outputs:
        assert "Error: The processes disagree" in output
        assert "\n  config.seed: 0 on process 0, 1 on process 1\n" in output
        assert "data.cache" not in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@slow
def test_processes_that_disagree_on_the_code_are_refused(tmp_path):
    # Another version of one file on the host of process 1.
    program = (
        "import sys; from sire_jax import train; from sire_jax.job import distributed;"
        "import jax; code = distributed._code;"
        "distributed._code = lambda: code() if jax.process_index() == 0 else 'abcdef012345';"
        "train.main(sys.argv[1:])"
    )
    (tmp_path / "changed.py").write_text(program)
    job = programs.job_of(
        ["changed", programs.TINY, f"--workdir={tmp_path / 'run'}"],
        tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    statuses, outputs = _ended(job)
    assert statuses == [command.EXPLAINED] * 2
    assert "code of sire_jax: " in outputs[0]
    assert "(abcdef012345) on process 1" in outputs[1]


@slow
def test_data_that_one_host_does_not_have_end_all_with_its_message(tmp_path):
    job = programs.job_of(
        lambda i: [
            "sire_jax.train",
            programs.TINY,
            f"--workdir={tmp_path / 'run'}",
            "--config.data.name=tfds:mnist",
            "--config.data.shape=(28,28,1)",
            f"--config.data.dir={tmp_path / str(i)}",
            *SMALL,
        ],
        tmp_path,
    )
    statuses, outputs = _ended(job)
    assert statuses == [command.EXPLAINED] * 2
    for i, output in enumerate(outputs):
        assert f"The data set 'mnist' is not prepared in {tmp_path / str(i)}" in output


def test_what_one_process_can_not_do_ends_all(tmp_path):
    (tmp_path / "failing.py").write_text(
        "import sys, jax\n"
        "from sire_jax.job import command, distributed\n"
        "distributed.start()\n"
        "with distributed.ended_together(), command.readable_errors(distributed.PeerError):\n"
        "    with distributed.together('opening the data'):\n"
        "        if jax.process_index() == 1:\n"
        "            print(distributed.__name__)\n"
        "            raise FileNotFoundError('There is no /data.')\n"
    )
    statuses, outputs = _ended(programs.job_of(["failing"], tmp_path, PYTHONPATH=str(tmp_path)))
    assert statuses[0] == command.EXPLAINED
    assert "While opening the data, other processes failed" in outputs[0]
    assert "process 1: FileNotFoundError: There is no /data." in outputs[0]
    assert statuses[1] != 0


@slow
def test_a_workdir_that_another_program_has_is_refused_to_all(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with lock.held(workdir):
        statuses, outputs = _ended(programs.job(workdir, tmp_path))
    assert statuses == [command.EXPLAINED] * 2
    for output in outputs:
        assert f"The workdir {workdir} is in use: process {os.getpid()} on" in output
    assert not (workdir / "config.json").exists()


@slow
def test_one_that_ends_with_an_explained_error_ends_all_with_its_status(tmp_path):
    (tmp_path / "failing.py").write_text(
        "import sys, time, jax\n"
        "from sire_jax.job import distributed\n"
        "distributed.start()\n"
        "with distributed.ended_together():\n"
        "    if jax.process_index() == 1:\n"
        "        sys.exit(2)\n"
        "    time.sleep(60)\n"
    )
    job = programs.job_of(["failing"], tmp_path, processes=3, PYTHONPATH=str(tmp_path))
    statuses, outputs = _ended(job)
    assert statuses == [2, 2, 2]
    for i in (0, 2):
        assert f"process {i} ends, because process 1 ended with status 2; see its" in outputs[i]


@slow
def test_a_workdir_that_the_hosts_do_not_share_is_refused(tmp_path):
    job = programs.job_of(
        lambda i: [
            "sire_jax.train",
            programs.TINY,
            f"--workdir={tmp_path / f'run_{i}'}",
            *SMALL,
        ],
        tmp_path,
    )
    statuses, outputs = _ended(job)
    assert statuses == [command.EXPLAINED] * 2
    assert f"The workdir {tmp_path / 'run_1'} is not the one that process 0 writes to" in outputs[1]
    assert "process 1: OSError: The workdir" in outputs[0]


@slow
def test_a_batch_that_processes_and_devices_can_not_share_is_refused_with_all_numbers(tmp_path):
    overrides = ("--config.batch_size=6", *SMALL)
    job = programs.job(tmp_path / "run", tmp_path, *overrides, devices=2)
    statuses, outputs = _ended(job)
    assert statuses == [command.EXPLAINED] * 2
    message = r"config.batch_size is 6, which 4 devices can't share evenly (2 processes x 2)"
    assert all(message in output for output in outputs)


# ---- One network, however it is spread.


# Without what pmap draws differently on each device.
DROPLESS = ("--config.backbone.dropout=0.0", "--config.backbone.convolution_dropout=0.0", *PLAIN)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Trains the network in this process; returns its last state."""
    directory = tmp_path_factory.mktemp("one")
    path = programs.QUICKSTART.removeprefix("--config=")
    config = configuration.load(path, ["--config.devices=1", *SMALL, *DROPLESS])
    with jax.numpy_dtype_promotion("standard"):
        train.train(config, str(directory))
        return programs.final(directory, *SMALL, *DROPLESS, config=programs.QUICKSTART)


@pytest.mark.optax_dtypes
@slow
@pytest.mark.parametrize("settings", [{}, {"parallel": "pmap"}, {"devices_share": "runs"}])
def test_two_processes_train_the_network_of_one(settings, one_process, tmp_path):
    spread = tuple(f"--config.{key}={value}" for key, value in settings.items())
    quickstart = {"config": programs.QUICKSTART}
    job = programs.job(tmp_path / "two", tmp_path, *SMALL, *DROPLESS, *spread, **quickstart)
    with programs.started(*job):
        assert [each.wait() for each in job] == [0, 0], job[0].output + job[1].output
    assert "epoch 2/2" in job[0].output
    assert "epoch" not in job[1].output
    two = programs.final(tmp_path / "two", *SMALL, *DROPLESS, *spread, **quickstart)
    chex.assert_trees_all_close(two, one_process, rtol=1e-4, atol=5e-6)


@slow
@pytest.mark.optax_dtypes
def test_runs_spread_over_devices_are_those_of_one_device(tmp_path):
    path = programs.QUICKSTART.removeprefix("--config=")
    results = {}
    for devices in (1, 2):
        overrides = [*SMALL, *PLAIN, f"--config.devices={devices}", "--config.devices_share=runs"]
        config = configuration.load(path, overrides)
        results[devices] = train.train(config, str(tmp_path / str(devices)))["splits"]
    for metric in ("main/loss", "digits/loss"):
        found, expected = (results[devices]["test"][metric] for devices in (2, 1))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    runs = Runs(experiment.build(config))
    shards = runs.initial().params["backbone"]["output"]["kernel"].addressable_shards
    assert [shard.data.shape[0] for shard in shards] == [1, 1]


def test_runs_that_devices_can_not_share_are_refused():
    path = programs.QUICKSTART.removeprefix("--config=")
    config = configuration.load(path, ["--config.seeds=3", "--config.devices_share=runs"])
    with pytest.raises(ValueError, match=r"config.seeds is 3, which 2 devices can't share evenly"):
        Runs(experiment.build(config))


@slow
def test_processes_that_give_signs_to_the_end_end_with_their_own_status(tmp_path):
    """A thread that Python ends within a call of C++ would end its process by SIGABRT."""
    job = programs.job_of(["tests.signs_program"], tmp_path, processes=3)
    with programs.started(*job):
        statuses = [each.wait() for each in job]
    assert statuses == [command.AGAIN] * 3, [each.output for each in job]


def test_the_package_does_not_start_devices_when_it_is_imported():
    # `distributed.start` has to come first, and programs import everything before it.
    program = (
        "import jax, sire_jax.train; jax.config.update('jax_num_cpu_devices', 3);"
        "assert jax.device_count() == 3"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
