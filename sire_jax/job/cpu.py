"""Several devices of one CPU: they are made here, with threads that are enough for them.

XLA computes what all devices of a CPU are asked for by one pool of threads. A program on a device
may keep its thread for as long as it lasts. If every thread is kept by a device, what they leave
to others is never done, a queue of 1,024 entries fills, and from then on XLA's convolutions are
**wrong** without a word (jax 0.10 to 0.12): in a loop of two of them on two devices, after 508
rounds. So there is always a thread more than devices.
"""

import os
import re

import jax

# How many threads XLA's pool has. XLA reads it when JAX is first asked for its devices.
_THREADS = "NPROC"
_DEVICES = "jax_num_cpu_devices"
_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def make_devices(number: int) -> None:
    """Has JAX make so many devices of a CPU, which share its cores; others stay what they are.

    They are there for all that the process does from then on. Their number stays what it is in one
    of several processes, and where ``XLA_FLAGS`` or ``JAX_NUM_CPU_DEVICES`` say it. Wherever there
    are several, XLA is told to have a thread more than devices. Nothing happens once JAX has made
    its devices; ``check_threads`` then says whether the threads suffice.

    Args:
        number: How many; 0 or 1: as many as JAX makes by itself.
    """
    if _are_made():
        return
    chosen = _flagged() or "JAX_NUM_CPU_DEVICES" in os.environ
    if number > 1 and not chosen and not jax.distributed.is_initialized():
        jax.config.update(_DEVICES, number)
    devices = _flagged() or getattr(jax.config, _DEVICES)
    if 1 < devices >= threads(devices):
        os.environ[_THREADS] = str(devices + 1)


def threads(devices: int) -> int:
    """Returns how many threads XLA has for so many devices of a CPU, when it makes them now."""
    said = os.environ.get(_THREADS, "")
    return max(devices, int(said) if said.isdigit() else _cores())


def check_threads(devices: int) -> None:
    """Checks that XLA has a thread more than devices that a program runs on.

    Args:
        devices: How many of those of this process's CPU it runs on.

    Raises:
        ValueError: If it has not, as JAX had made its devices before it could be told.
    """
    there = threads(jax.local_device_count("cpu"))
    if 1 < devices >= there:
        raise ValueError(
            f"{devices} devices of a CPU share {there} threads of XLA, which then can"
            " compute wrong results. JAX made its devices before it could be told to have more:"
            f" start Python with {_THREADS}={devices + 1} in its environment, or let"
            " config.devices make them, before anything else asks JAX for its devices."
        )


def _flagged() -> int:
    """Returns how many devices XLA_FLAGS ask for, 0 if they say nothing."""
    found = _FLAG.findall(os.environ.get("XLA_FLAGS", ""))
    return int(found[-1]) if found else 0


def _cores() -> int:
    """Returns on how many cores this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _are_made() -> bool:
    """Tells whether JAX has made its devices: it lets nobody change their number then."""
    number = getattr(jax.config, _DEVICES)
    try:
        jax.config.update(_DEVICES, number + 1)
    except RuntimeError:
        return True
    jax.config.update(_DEVICES, number)
    return False
