"""A Slurm of one's own, on this machine and for the length of some tests: one node."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")

# A job is requeued within seconds: it is not started again before its credential has expired, for
# which 5 s is the least. The node has as many cores as it says.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=1
ReturnToService=2
JobRequeue=1
KillWait=15
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{more}
NodeName={host} NodeAddr=127.0.0.1 CPUs=32
"""


def missing() -> str:
    """Says why no Slurm can be started here, "" if one can."""
    absent = [name for name in DAEMONS if not shutil.which(name, path=_path())]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs root"


class Slurm:
    """A running Slurm.

    Args:
        directory: Where its config, its state and its logs are.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": _path(),
        }

    def run(self, *command: str | Path) -> str:
        """Runs a client program and returns what it printed."""
        done = subprocess.run(
            [str(each) for each in command],
            env=self.environment,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str | Path, **environment: str) -> int:
        """Submits a batch job and returns its number."""
        exported = [f"{name}={value}" for name, value in environment.items()]
        export = f"--export={','.join(['ALL', *exported])}"
        return int(self.run("sbatch", "--parsable", export, *arguments))

    def job(self, number: int | str) -> dict[str, str]:
        """Returns the fields of a job, or of one of an array ("7_0"): JobState, ExitCode, …"""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait(self, number: int | str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Waits for a job to be in one of some states and returns its fields."""
        last = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < last, f"job {number} is {job['JobState']}, not {states}"
            time.sleep(0.2)
        return job


@contextmanager
def started(directory: Path, more: str = "") -> Iterator[Slurm]:
    """Starts a Slurm and stops it.

    Args:
        directory: A new directory that everyone may enter.
        more: Further lines of its config: partitions, preemption.

    Yields:
        The Slurm, once its node is idle.
    """
    host = socket.gethostname()
    controller, node = _free_ports(2)
    conf = _CONF.format(host=host, controller=controller, node=node, directory=directory, more=more)
    for name in ("state", "spool"):
        (directory / name).mkdir()
    (directory / "slurm.conf").write_text(conf)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    slurm = Slurm(directory)
    files = [f"--{name}-file={directory}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={directory}/munge.socket", *files]
    with ExitStack() as daemons:
        daemons.enter_context(_daemon(slurm, munged))
        _until((directory / "munge.socket").exists, slurm)
        daemons.enter_context(_daemon(slurm, ["slurmctld", "-D", "-c"]))
        daemons.enter_context(_daemon(slurm, ["slurmd", "-D", "-N", host]))
        _until(lambda: _idle(slurm), slurm)
        daemons.callback(_cancel_all, slurm)
        yield slurm


@contextmanager
def _daemon(slurm: Slurm, command: Sequence[str]) -> Iterator[None]:
    log = (slurm.directory / f"{command[0]}.out").open("wb")
    process = subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _cancel_all(slurm: Slurm) -> None:
    """Ends all jobs: their processes would outlive the daemons."""
    slurm.run("scancel", "--user=root")
    try:
        _until(lambda: not slurm.run("squeue", "--noheader"), slurm)
    finally:
        for number in slurm.run("squeue", "--noheader", "--format=%A").split():
            slurm.run("scancel", "--full", "--signal=KILL", number)


def _idle(slurm: Slurm) -> bool:
    command = ["sinfo", "--noheader", "--format=%T"]
    states = subprocess.run(
        command, env=slurm.environment, text=True, capture_output=True, check=False
    )
    return set(states.stdout.split()) == {"idle"}


def _until(true, slurm: Slurm, seconds: float = 30) -> None:
    last = time.monotonic() + seconds
    while not true():
        if time.monotonic() > last:
            logs = {path.name: path.read_text()[-2000:] for path in slurm.directory.glob("*.out")}
            raise RuntimeError(f"Slurm did not start: {logs}")
        time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(number)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in opened]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
