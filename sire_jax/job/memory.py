"""How much memory is left for what is not there yet."""

import os
from pathlib import Path

import jax

# Of a container or of a job of Slurm: what it may take and what it takes, in versions 2 and 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available() -> int:
    """Returns the bytes that arrays may take, those that are there included.

    Those of an accelerator; or those that the machine has free, within what the job may take.
    """
    # Of a CPU, whose memory is the machine's, JAX returns None.
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    held = sum(array.nbytes for array in jax.live_arrays())
    return min(_of_machine(), *(_of_group(*group) for group in _GROUPS)) + held


def _of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # Not on Linux.
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _of_group(limit: str, usage: str) -> int:
    try:
        return int(Path(limit).read_text()) - int(Path(usage).read_text())
    except (OSError, ValueError):  # There is none, or no limit: "max".
        return 2**62
