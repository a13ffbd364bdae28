"""Times what lies between convolutions, beside PyTorch's: a profile of the rest of a step.

``python benchmarks/between.py`` (needs ``pip install -e '.[benchmark]'``). Batch norm with ReLU,
the same behind a residual connection, max pooling and up-sampling, forward and backward with all
gradients, float32, at the sizes that the base CNN and AuxNet have; PyTorch's eager in
``channels_last``. They take turns; milliseconds are the fastest of
``--rounds`` rounds. Prints a table and writes JSON.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import torch
from convolution import REPEATS, fastest
from torch.nn import functional

from sire_jax.layers.normalization import normalize
from sire_jax.layers.pooling import max_pool, upsample
from sire_jax.text import align

# Side of the images and channels.
SIZES = ((32, 16), (16, 32), (8, 64), (32, 64), (16, 128), (8, 256))
EPSILON = 1e-5


def _normalized(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return normalize(x, scale, bias, -1, EPSILON)[0]


def _torch_normalized(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, statistics: torch.Tensor
) -> torch.Tensor:
    mean, variance = statistics
    return functional.batch_norm(x, mean, variance, scale, bias, training=True, eps=EPSILON)


# Functions of images, others like them, and two vectors of a number for each channel.
OURS: dict[str, Callable[..., jax.Array]] = {
    "batch norm, ReLU": lambda x, other, scale, bias: jax.nn.relu(_normalized(x, scale, bias)),
    "batch norm, residual, ReLU": lambda x, other, scale, bias: jax.nn.relu(
        _normalized(x, scale, bias) + other
    ),
    "max pool 2 x 2": lambda x, other, scale, bias: max_pool(x),
    "up-sampling by 2": lambda x, other, scale, bias: upsample(x, 2),
}
TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "batch norm, ReLU": lambda x, other, *norm: functional.relu(_torch_normalized(x, *norm)),
    "batch norm, residual, ReLU": lambda x, other, *norm: functional.relu(
        _torch_normalized(x, *norm) + other
    ),
    "max pool 2 x 2": lambda x, other, *norm: functional.max_pool2d(x, 2),
    "up-sampling by 2": lambda x, other, *norm: functional.interpolate(x, scale_factor=2),
}


def ours(name: str, batch: int, size: tuple[int, int]) -> Callable[[], object]:
    """Returns a call that does an operation of ours ``REPEATS`` times, with all gradients."""
    side, channels = size
    x, other = jax.random.normal(jax.random.key(0), (2, batch, side, side, channels))
    inputs = x, other, jnp.ones(channels), jnp.zeros(channels)

    @jax.jit
    def once(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        y, pull_back = jax.vjp(OURS[name], *inputs)
        return y, *pull_back(y)

    def run() -> None:
        for _ in range(REPEATS):
            jax.block_until_ready(once(*inputs))

    return run


def torchs(name: str, batch: int, size: tuple[int, int]) -> Callable[[], object]:
    """Returns a call that does an operation of PyTorch's ``REPEATS`` times, with all gradients."""
    side, channels = size
    x, other = (
        torch.randn(batch, channels, side, side)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    scale, bias = (
        torch.ones(channels, requires_grad=True),
        torch.zeros(channels, requires_grad=True),
    )
    statistics = torch.stack([torch.zeros(channels), torch.ones(channels)])
    inputs = (x, other, scale, bias)

    def run() -> None:
        for _ in range(REPEATS):
            y = TORCH[name](*inputs, statistics)
            torch.autograd.grad(y, inputs, y.detach(), allow_unused=True)

    return run


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    figures, rows = [], [["forward and backward, ms", "ours", "PyTorch", "ratio"]]
    for name in OURS:
        for size in SIZES:
            calls = {"ours": ours, "torch": torchs}
            run = {who: make(name, options.batch_size, size) for who, make in calls.items()}
            turns = [
                {w: fastest(call, 1) for w, call in run.items()} for _ in range(options.rounds)
            ]
            times = {who: min(turn[who] for turn in turns) / REPEATS for who in run}
            figures.append({"operation": name, "side": size[0], "channels": size[1], **times})
            where = f"{name}, {size[0]} px, {size[1]} channels"
            ratio = f"{times['ours'] / times['torch']:.2f}"
            rows.append([where, f"{times['ours']:.2f}", f"{times['torch']:.2f}", ratio])
    print(align(rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
