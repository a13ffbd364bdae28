"""Slurm really runs: launch/slurm.sbatch with a stand-in for the program, and with the program."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import chex
import pytest
import slurm
import standin

from sire_jax import configuration
from sire_jax.runs.trained import open_run, restore
from sire_jax.storage import workdir

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
# Jobs on "spare" yield to jobs on "main", after some seconds in which they can save.
PARTITIONS = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=10
PartitionName=spare Nodes=ALL PriorityTier=1
PartitionName=patient Nodes=ALL PriorityTier=1 GraceTime=30
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

pytestmark = [
    pytest.mark.skipif(bool(slurm.missing()), reason=f"no Slurm here: {slurm.missing()}"),
    pytest.mark.slow,  # Slurm takes its time: limits of a minute, credentials that have to expire.
]


@pytest.fixture(scope="module")
def directory():
    with tempfile.TemporaryDirectory(prefix="slurm-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.fixture(scope="module")
def cluster(directory):
    (directory / "slurm").mkdir()
    with slurm.started(directory / "slurm", PARTITIONS) as running:
        yield running


@pytest.fixture(scope="module")
def program(directory):
    return standin.write(directory)


def _submit(cluster, program, endings, *options, tasks=2, **environment):
    output = f"--output={program.path.parent}/%j.log"
    return cluster.submit(
        f"--chdir={REPOSITORY}",
        output,
        f"--ntasks-per-node={tasks}",
        "--cpus-per-task=1",
        *options,
        SCRIPT,
        "--config=a.py:b,c",
        "--workdir=a b",
        PYTHON=str(program.path),
        ENDINGS=endings,
        **environment,
    )


@pytest.fixture(scope="module")
def limited(cluster, program):
    """A job that stays until its time limit of a minute, which passes while other tests run."""
    return _submit(cluster, program, "stay 0", "--time=1", "--signal=B:USR1@30")


def _sweep(cluster, directory, *arguments, **environment):
    """Submits an array, a job for each of two seeds."""
    pytest.importorskip("submitit", reason="needs pip install 'sire_jax[sweep]'")
    command = [
        *(sys.executable, REPOSITORY / "launch" / "sweep.py"),
        f"--configs={configuration.repository_configs()}/quickstart.py:main_only",
        f"--workdir={directory}",
        "--seeds=3,4",
        "--cpus_per_task=1",
        *arguments,
    ]
    done = subprocess.run(
        [str(each) for each in command],
        cwd=REPOSITORY,
        env={**cluster.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def limited_sweep(cluster, directory, program):
    """The same of two jobs of a sweep, each of two tasks; 60 s are the whole of their minute."""
    environment = {"PYTHON": str(program.path), "ENDINGS": "stay 0"}
    options = ["--minutes=1", "--slurm=signal=USR1@30", "--tasks_per_node=2"]
    printed = _sweep(cluster, directory / "limited", *options, **environment)
    return re.findall(r"job (\d+_\d+)", printed)


# Long enough to be interrupted twice, and compiled once for all jobs.
_REAL = (
    "batch_size=50",
    "data.task.train=50",
    "data.task.test=20",
    "checkpoint_every=10",
    "evaluate_every=0",
    'evaluate_splits=("test",)',
)


def _train(cluster, directory, name):
    cache = f"--config.compilation_cache={directory}/compiled"
    return cluster.submit(
        f"--chdir={REPOSITORY}",
        f"--output={directory}/{name}.log",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        SCRIPT,
        f"--config={configuration.repository_configs()}/quickstart.py:main_only",
        f"--workdir={directory}/{name}",
        *(f"--config.{each}" for each in ("seeds=1", *_REAL, "epochs=100")),
        cache,
        PYTHON=sys.executable,
        NPROC="16",
        HOME=str(directory),
    )


@pytest.fixture(scope="module")
def whole(cluster, directory):
    """A real job of two tasks that nobody interrupts."""
    return _train(cluster, directory, "whole")


@pytest.fixture(scope="module")
def real_sweep(cluster, directory):
    """Jobs of a real sweep, and its arguments."""
    overrides = [*_REAL, "epochs=3", f"compilation_cache={directory}/compiled"]
    arguments = [f"--override={each}" for each in overrides]
    printed = _sweep(cluster, directory / "sweep", *arguments, HOME=str(directory))
    return re.findall(r"job (\d+_\d+)", printed), arguments


@pytest.fixture(scope="module")
def coded(cluster, program, whole, limited, limited_sweep, real_sweep):
    """Jobs that end in all ways, at once, as are all others: each restart takes its time."""
    endings = ["0", "2", "2|2@2", "130", "85 85 0", "75 0", "kill|75 0", "1 2", "9"]
    return {each: _submit(cluster, program, each, TRIES="1") for each in endings}


@pytest.mark.parametrize(
    ("endings", "state", "code", "starts"),
    [
        ("0", "COMPLETED", "0:0", 1),
        ("2", "FAILED", "2:0", 1),
        ("2|2@2", "FAILED", "2:0", 1),
        ("130", "FAILED", "130:0", 1),
        ("85 85 0", "COMPLETED", "0:0", 3),
        ("75 0", "COMPLETED", "0:0", 2),
        ("kill|75 0", "COMPLETED", "0:0", 2),
        ("1 2", "FAILED", "2:0", 2),
        ("9", "FAILED", "9:0", 2),
    ],
)
def test_what_the_program_ends_with_decides(cluster, program, coded, endings, state, code, starts):
    number = coded[endings]
    job = cluster.wait(number, *ENDED)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == (state, code, str(starts - 1))
    arguments = ["-m", "sire_jax.train", "--config=a.py:b,c", "--workdir=a b"]
    assert program.notes("start", number) == [arguments] * 2 * starts
    log = (program.path.parent / f"{number}.log").read_text()
    assert log.count("; requeued.") == starts - 1
    assert ("not tried again" in log) == (endings == "9")


def test_requeued_by_somebody_it_saves_and_goes_on(cluster, program):
    number = _submit(cluster, program, "stay 0", SAVING="5")
    program.wait("start", 2, number)
    cluster.run("scontrol", "requeue", str(number))
    job = cluster.wait(number, *ENDED)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert program.notes("signal", number) == ["SIGTERM"] * 2
    assert program.notes("end", number) == [85] * 2
    assert len(program.notes("start", number)) == 4


def test_cancelled_it_saves_and_stays_cancelled(cluster, program):
    number = _submit(cluster, program, "stay")
    program.wait("start", 2, number)
    cluster.run("scancel", str(number))
    job = cluster.wait(number, *ENDED)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert program.notes("end", number) == [85] * 2


def test_before_the_time_limit_it_saves_and_goes_on(cluster, program, limited):
    job = cluster.wait(limited, *ENDED, seconds=90)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert program.notes("signal", limited) == ["SIGTERM"] * 2
    assert program.notes("end", limited) == [85] * 2


def test_before_the_time_limit_jobs_of_a_sweep_save_and_go_on(cluster, program, limited_sweep):
    assert len(limited_sweep) == 2
    for element in limited_sweep:
        job = cluster.wait(element, *ENDED, seconds=90)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
        number = int(job["JobId"])
        assert program.notes("signal", number) == ["SIGUSR1"] * 2
        assert program.notes("end", number) == [85] * 2
        assert len(program.notes("start", number)) == 4


def test_jobs_of_a_sweep_end_as_the_program_does(cluster, program, directory):
    environment = {"PYTHON": str(program.path), "ENDINGS": "75 2"}
    printed = _sweep(cluster, directory / "coded", **environment)
    for element in re.findall(r"job (\d+_\d+)", printed):
        job = cluster.wait(element, *ENDED)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "1")


@pytest.mark.parametrize("partition", ["spare", "patient"])
def test_preempted_it_saves_and_goes_on(cluster, program, partition):
    number = _submit(cluster, program, "stay 0", f"--partition={partition}")
    program.wait("start", 2, number)
    urgent = cluster.submit("--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.wait(urgent, *ENDED)["JobState"] == "COMPLETED"
    job = cluster.wait(number, *ENDED)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    # Without a grace period Slurm tells the tasks more than once.
    assert set(program.notes("signal", number)) == {"SIGTERM"}
    assert program.notes("end", number) == [85] * 2
    assert len(program.notes("start", number)) == 4


def _saved(path):
    return max((int(each.parent.name) for each in path.glob("checkpoints/*/manifest")), default=0)


def _final(path):
    state, _ = restore(open_run(path), path / "checkpoints")
    return state.params, state.update_state


def test_two_real_tasks_interrupted_twice_end_like_two_that_were_not(cluster, directory, whole):
    assert cluster.wait(whole, *ENDED, seconds=90)["JobState"] == "COMPLETED"
    assert cluster.job(whole)["Restarts"] == "0"
    number = _train(cluster, directory, "interrupted")
    path, log = directory / "interrupted", directory / "interrupted.log"
    standin.until(lambda: _saved(path) >= 10, 90)
    cluster.run("scontrol", "requeue", str(number))
    standin.until(lambda: "Going on after" in log.read_text(), 60)
    began = _saved(path)
    standin.until(lambda: _saved(path) > began, 60)
    # What Slurm does before the time limit.
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    assert cluster.wait(number, *ENDED, seconds=90)["JobState"] == "COMPLETED", log.read_text()
    assert cluster.job(number)["Restarts"] == "2"
    printed = "\n".join(line for line in log.read_text().splitlines() if "epoch" not in line)
    stopped = re.findall(r"SIGTERM: saved after step (\d+)", printed)
    assert len(stopped) == 2, printed
    assert re.findall(r"Going on after step (\d+)", printed) == stopped
    assert 10 <= int(stopped[0]) < int(stopped[1]) < 100
    chex.assert_trees_all_equal(_final(path), _final(directory / "whole"))
    assert (
        workdir.read_results(path)["splits"]
        == (workdir.read_results(directory / "whole")["splits"])
    )
    assert workdir.read_metrics(path) == workdir.read_metrics(directory / "whole")


def test_a_real_sweep_is_run_and_collected(cluster, directory, real_sweep):
    elements, arguments = real_sweep
    assert len(elements) == 2
    for element in elements:
        assert cluster.wait(element, *ENDED, seconds=90)["JobState"] == "COMPLETED"
    results = [workdir.read_results(path) for path in (directory / "sweep").glob("quickstart*")]
    assert [each["step"] for each in results] == [3, 3]
    collected = _sweep(cluster, directory / "sweep", *arguments, "--collect")
    mean = sum(each["splits"]["test"]["main/top_1"][0] for each in results) / 2
    assert f"2 of 2 | {mean:.4f} ± " in collected
    assert _sweep(cluster, directory / "sweep", *arguments).count("| done") == 2
