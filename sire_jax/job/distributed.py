"""Several processes that train one network: how they start, agree, and end together.

All of them run the same program. ``start`` connects them. What only some hosts can get wrong (a
data directory, a config, a version of the code) is found before anything is compiled, with
``together`` and ``check_same``. From then on a thread of each process, ``Watch``, gives signs of
life and watches those of the others: if a process dies, or lives but does not come to its next
step, all end within ``config.peer_timeout`` and say which process it was.
"""

import atexit
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sire_jax import __version__, files, registry
from sire_jax.job import command, coordination, cpu, signals
from sire_jax.job.watch import SECONDS_BETWEEN_SIGNS, Watch, explain_abort
from sire_jax.layers import onednn

# Exchanged values wait for the slowest process, which may decode a data set meanwhile.
_PATIENCE = 3600

_watch: Watch | None = None
_exchanges = 0


class PeerError(Exception):
    """Another process has failed; the message says which, and of what."""


def start() -> None:
    """Connects the processes of a job, if the environment says that there are several.

    By hand: ``JAX_COORDINATOR_ADDRESS=host:port``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``.
    In a Slurm step of several tasks, and with ``JAX_DISTRIBUTED=auto`` on any cluster that JAX
    knows (TPU pods, Kubernetes, Open MPI): as ``jax.distributed.initialize`` finds out by itself.

    Raises:
        ValueError: If only some of the variables are set, or they are no numbers.
    """
    global _watch
    # Connected processes make their devices below.
    cpu.make_devices(0)
    connected = _connect()
    # JAX takes SIGTERM for itself.
    signals.listen_again()
    if not connected or jax.process_count() == 1:
        return
    _watch = Watch(coordination.service(), jax.process_index(), jax.process_count())
    _watch.start()
    atexit.register(_part, _watch)
    signals.leave_by(_watch.end)
    explain_abort()


def _part(watch: Watch) -> None:
    """Leaves the job at the end of the program: waits for the others, and ends the watch of them.

    JAX would do the former by itself, but later, and with the watch still in the service.
    """
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        watch.end(command.PEER, f"it could not leave the job: {str(error).splitlines()[0]}")
    watch.rest()


_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _connect() -> bool:
    """Tells whether there may be several processes, after connecting them."""
    settings = {name: os.environ[name] for name in _BY_HAND if os.environ.get(name)}
    detect = os.environ.get("JAX_DISTRIBUTED", "")
    if detect not in ("", "auto"):
        raise ValueError(f"JAX_DISTRIBUTED is '{detect}'; it should be 'auto', or not be set.")
    if settings and len(settings) < len(_BY_HAND) and not detect:
        missing = [name for name in _BY_HAND if name not in settings]
        raise ValueError(
            f"Of the variables of a job of several processes {', '.join(missing)} is missing; set"
            f" all of {', '.join(_BY_HAND)}, or none for one process."
        )
    if len(settings) == len(_BY_HAND):
        address, *numbers = settings.values()
        if not all(number.isdigit() for number in numbers):
            raise ValueError(
                f"JAX_NUM_PROCESSES is '{numbers[0]}' and JAX_PROCESS_ID '{numbers[1]}'; they"
                " should be whole numbers, such as 2 and 0."
            )
        count, process = map(int, numbers)
        if process >= count:
            raise ValueError(
                f"JAX_PROCESS_ID is {process}; of {count} processes it should be in 0..{count - 1}."
            )
        if count > 1:
            jax.distributed.initialize(address, count, process)
        return count > 1
    if detect or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()
        return True
    return False


def is_main() -> bool:
    """Tells whether this process is the one that writes logs and results."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Prints a line, once for all processes."""
    if is_main():
        print(message, flush=True)


def exchange(value: str) -> list[str]:
    """Returns the values that all processes gave, in their order; each has to call it."""
    global _exchanges
    if jax.process_count() == 1:
        return [value]
    _exchanges += 1
    service, place = coordination.service(), f"sire_jax/exchange/{_exchanges}"
    service.key_value_set(f"{place}/{jax.process_index()}", value)
    values = [
        service.blocking_key_value_get(f"{place}/{i}", _PATIENCE * 1000)
        for i in range(jax.process_count())
    ]
    if is_main() and _exchanges > 1:
        # All have read those, or they would not have come to this one.
        service.key_value_delete(f"sire_jax/exchange/{_exchanges - 1}/")
    return values


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """Goes on only if all processes came through this block; each has to enter it.

    Args:
        doing: What the block does, for the message.

    Raises:
        PeerError: If another process failed in it.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    states = exchange("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [f"process {i}: {state}" for i, state in enumerate(states) if state]
    if failed:
        raise PeerError(f"While {doing}, other processes failed. " + "\n".join(failed))


def check_same(values: Mapping[str, str]) -> None:
    """Checks that all processes have the same values; each has to call it.

    Args:
        values: Those of this process, by what they are.

    Raises:
        ValueError: If they differ; the message has the differences to process 0.
    """
    processes = [json.loads(text) for text in exchange(json.dumps(dict(values)))]
    first = processes[0]
    lines = [
        f"  {key}: {first.get(key, '(absent)')} on process 0,"
        f" {process.get(key, '(absent)')} on process {i}"
        for i, process in enumerate(processes)
        for key in sorted(first.keys() | process.keys())
        if first.get(key) != process.get(key)
    ]
    if lines:
        raise ValueError(
            "The processes disagree; start all of them with the same config, code and data:\n"
            + "\n".join(lines)
        )


def identity(config: ConfigDict) -> dict[str, str]:
    """Returns what has to be the same on all processes: config, code and libraries."""
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        **{f"config.{k}": repr(v) for k, v in registry.flat(config).items() if k not in _OWN},
        "code of sire_jax": f"{__version__} ({_code()})",
        **{package: importlib.metadata.version(package) for package in packages},
        "oneDNN": _onednn(),
    }


def _onednn() -> str:
    """Returns which oneDNN convolves, ``"none"`` if none does."""
    return onednn.version() or "none" if jax.default_backend() == "cpu" else "none"


# Settings that say where things are on a host, and how it reads them.
_OWN = {"data.dir", "data.cache", "data.workers", "data.threads", "compilation_cache"}


def _code() -> str:
    """Returns a digest of this package's source; of configs what they say is compared."""
    digest = hashlib.sha256()
    root = files.PACKAGE
    installed = set(root.glob("configs/*.py"))
    for path in sorted({*root.rglob("*.py"), *root.rglob("*.cc")} - installed):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def agree(stop: bool, count: int) -> tuple[bool, int]:
    """Decides what all processes do next; each has to call it.

    Args:
        stop: Whether this process was asked to stop.
        count: How many steps it would take before it looks again.

    Returns:
        Whether any was asked to stop, and the smallest number of steps.
    """
    if jax.process_count() == 1:
        return stop, count
    arrive()
    # Small enough for any dtype that a gathered array may be given.
    stops, counts = multihost_utils.process_allgather(np.array([stop, count], np.int32)).T
    return bool(stops.any()), int(counts.min())


def arrive() -> None:
    """Says that this process has come to its next common program."""
    if _watch is not None:
        _watch.arrive()


@contextlib.contextmanager
def patience(doing: str) -> Iterator[None]:
    """Does what may take one process much longer than the others, such as compiling."""
    if _watch is None:
        yield
        return
    _watch.be_busy(doing)
    try:
        yield
    finally:
        _watch.be_busy("")


def set_peer_timeout(timeout: float) -> None:
    """Sets after how many seconds without a sign of a process all end."""
    if _watch is not None:
        _watch.signs.timeout = timeout


# Statuses with which all processes end at the same step.
_IN_ORDER = (None, 0, command.INTERRUPTED, command.AGAIN)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Tells the others when this process ends with an error, and does not wait for them.

    Put it around the program; in a job of one process it does nothing.
    """
    try:
        yield
    except BaseException as error:
        in_order = isinstance(error, SystemExit) and error.code in _IN_ORDER
        if _watch is None or in_order:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # Likely of a process that is gone; the watch will know which, and ends this one.
            time.sleep(_watch.signs.timeout + 10 * SECONDS_BETWEEN_SIGNS)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        _watch.end(code)


def describe(mesh: jax.sharding.Mesh) -> Mapping[str, Any]:
    """Returns on what a run is computed: what has to be the same for the same bits.

    Args:
        mesh: The devices that it uses.
    """
    device = mesh.devices.ravel()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "oneDNN": _onednn(),
        "hardware": f"{device.platform} ({kind})",
        "devices": mesh.size,
        "processes": jax.process_count(),
    }


def _processor() -> str:
    """Names the processor, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
