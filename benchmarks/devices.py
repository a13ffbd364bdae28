"""What benchmarks compute on: the option ``--device``, what is there, and what a card can do."""

import argparse
import os
import re
import subprocess
import sys
from typing import NamedTuple

import jax

DEVICES = ("cpu", "cuda")
# Dense products, in 10^12 FLOP/s, from NVIDIA's data sheet of each card, which prints twice as many
# for matrices half of which are zeros. Of float32 in TF32, as JAX multiplies it by default.
PEAKS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"float32": 378, "bfloat16": 756},
    "H100 NVL": {"float32": 417.5, "bfloat16": 835.5},
    "H100": {"float32": 494.7, "bfloat16": 989.4},
    "H200 NVL": {"float32": 417.5, "bfloat16": 835.5},
    "H200": {"float32": 494.7, "bfloat16": 989.4},
    "A100": {"float32": 156, "bfloat16": 312},
    "L40S": {"float32": 183, "bfloat16": 362},
    "L4": {"float32": 60, "bfloat16": 121},
}
_ASK = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\n')"


class Device(NamedTuple):
    """A device.

    Attributes:
        platform: ``"cpu"``, ``"cuda"``, or what else JAX calls it.
        kind: What it is, such as ``"NVIDIA H100 80GB HBM3"``.
    """

    platform: str
    kind: str


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--device``."""
    parser.add_argument("--device", choices=DEVICES, help="default: what JAX finds")


def choose(device: str | None) -> Device:
    """Has this process, if it has not computed yet, and those it starts compute on a device.

    JAX then takes of a GPU what it needs, as PyTorch is there, too.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``None`` for what JAX finds.

    Returns:
        The device. Another process has asked for it: this one does not hold the GPU yet.

    Raises:
        SystemExit: If there is none.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if device is not None:
        os.environ["JAX_PLATFORMS"] = device
        jax.config.update("jax_platforms", device)
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    if asked.returncode:
        said = (asked.stderr.splitlines() or [""])[-1]
        raise SystemExit(
            f"Error: JAX finds nothing to compute on for --device={device}. On a machine with a GPU"
            " install JAX for it, such as pip install 'jax[cuda13]'; elsewhere take --device=cpu."
            f" JAX said: {said}"
        )
    platform, kind = asked.stdout.splitlines()[-2:]
    return Device("cuda" if platform == "gpu" else platform, kind)


def as_xla() -> None:
    """Has PyTorch compute on a GPU as XLA by default: the fastest algorithms, float32 in TF32."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def peak(kind: str, dtype: str) -> float | None:
    """Returns the most FLOP/s of a card, ``None`` of one that is not known.

    >>> peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    True
    >>> peak("cpu", "float32")

    Args:
        kind: What JAX calls it.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """
    words = set(re.split("[ -]", kind))
    for card, peaks in PEAKS.items():
        if words.issuperset(card.split()):
            return 1e12 * peaks[dtype]
    return None
