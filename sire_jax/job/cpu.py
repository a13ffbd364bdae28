"""Devices of one CPU, and the threads that XLA needs for them.

XLA computes on a CPU by one pool of threads. A long program, such as a loop over steps, may keep a
thread for as long as it lasts. Where as many programs run at once as there are threads, what they
leave to others is never done, a queue of 1,024 entries fills, and from then on XLA's convolutions
are **wrong** without a word (jax 0.10 to 0.12): in a loop of two of them on each of two devices,
after 508 rounds. A thread more than programs was enough in all that was tried. So devices come with
a thread more than there are of them, and programs that share something between more are refused.
"""

import contextlib
import functools
import os
import re
import warnings
from pathlib import Path

import jax

# How many threads XLA's pool has, which it reads when JAX makes its devices; the first one counts.
_THREADS = ("PJRT_NPROC", "NPROC")
_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_NUMBER = "jax_num_cpu_devices"


def make_devices(number: int) -> None:
    """Has JAX make so many devices of a CPU, which share its cores; others stay what they are.

    They are there for all that the process does from then on. Their number stays what it is in one
    of several processes, and where ``XLA_FLAGS`` or ``JAX_NUM_CPU_DEVICES`` say it. Wherever there
    are several, XLA is told to have a thread more than devices. Nothing changes once JAX has made
    its devices; ``check_threads`` then says whether the threads suffice.

    Args:
        number: How many; 0 or 1: as many as JAX makes by itself.
    """
    chosen = _flagged() or "JAX_NUM_CPU_DEVICES" in os.environ
    if number > 1 and not chosen and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # They are made.
            jax.config.update(_NUMBER, number)
    configured = getattr(jax.config, _NUMBER)
    devices = configured if configured >= 0 else _flagged()
    if 1 < devices >= _told(devices):
        for name in _THREADS:
            if name in os.environ or name == _THREADS[-1]:
                os.environ[name] = str(devices + 1)


def threads() -> int:
    """Returns how many threads XLA's pool has, or will have when JAX makes its devices."""
    return _running() or _told(jax.local_device_count("cpu"))


def check_threads(devices: int) -> None:
    """Checks that XLA has a thread more than devices that a program runs on.

    Args:
        devices: How many of those of this process's CPU it runs on.

    Raises:
        ValueError: If it has not, as JAX had made its devices before it could be told.
    """
    if devices > 1 and (there := threads()) <= devices:
        raise ValueError(
            f"{devices} devices of a CPU share {there} threads of XLA, which then can compute wrong"
            " results. JAX made its devices before it could be told to have more: start Python anew"
            f" with NPROC={devices + 1} in its environment."
        )


@functools.cache
def warn_of_few_threads() -> None:
    """Warns once where programs on all devices of this process's CPU would keep all threads."""
    devices = jax.local_device_count("cpu")
    if devices > 1 and (there := threads()) <= devices:
        warnings.warn(
            f"JAX has {devices} devices of a CPU, and XLA {there} threads: convolutions in long"
            " programs on all of the devices at once can be wrong. Start Python anew with"
            f" NPROC={devices + 1} in its environment.",
            stacklevel=2,
        )


def _told(devices: int) -> int:
    """Returns how many threads the environment asks for, if so many devices are made."""
    said = next((os.environ[name] for name in _THREADS if os.environ.get(name)), "")
    try:
        return max(devices, int(said) if said else _cores())
    except ValueError:
        return devices


def _running() -> int:
    """Returns how many threads XLA's pool has, 0 before it is there or where nothing tells."""
    names = Path("/proc/self/task").glob("*/comm")
    found = 0
    for name in names:
        with contextlib.suppress(OSError):  # A thread that has ended.
            found += name.read_text() == "tf_XLAEigen\n"
    return found


def _flagged() -> int:
    """Returns how many devices XLA_FLAGS ask for, 0 if they say nothing."""
    found = _FLAG.findall(os.environ.get("XLA_FLAGS", ""))
    return int(found[-1]) if found else 0


def _cores() -> int:
    """Returns on how many cores this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
