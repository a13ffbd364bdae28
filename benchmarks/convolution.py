"""Times the convolutions of a network one by one, beside PyTorch's: a profile of its step.

``python benchmarks/convolution.py`` (needs ``pip install -e '.[benchmark]'``). For each of the
layers of SIRe's base CNN, or with ``--network=auxnet`` of those that AuxNet repeats, the forward
pass and the gradients to images and kernel, float32; ours inside a compiled loop, as in training,
with a copy of one operand that keeps the compiler from moving it out of the loop; PyTorch's in
``channels_last``. Milliseconds, the fastest of ``--rounds``. Prints a table and writes JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import torch

from sire_jax.layers.convolution import convolve
from sire_jax.text import align

# Side of the images, input and output channels.
LAYERS = {
    "sire": (
        (32, 3, 64),
        (32, 64, 64),
        (16, 64, 128),
        (16, 128, 128),
        (8, 128, 256),
        (8, 256, 256),
        (4, 256, 512),
        (4, 512, 512),
    ),
    "auxnet": ((32, 3, 16), (32, 16, 16), (16, 32, 32), (8, 64, 64)),
}
PASSES = ("forward", "to images", "to kernel")
REPEATS = 8


def fastest(run: Callable[[], object], rounds: int) -> float:
    """Returns the fewest milliseconds of a call; the first, which compiles, does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def ours(batch: int, layer: tuple[int, int, int], rounds: int) -> list[float]:
    """Times our passes of a layer."""
    side, channels, features = layer
    keys = jax.random.split(jax.random.key(0), 3)
    # Two of each, taken in turns.
    x = jax.random.normal(keys[0], (2, batch, side, side, channels))
    kernel = jax.random.normal(keys[1], (2, 3, 3, channels, features))
    dy = jax.random.normal(keys[2], (2, batch, side, side, features))

    def forward(i: jax.Array, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return convolve(x[0], kernel[i], 1)

    def to_images(i: jax.Array, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: convolve(x, kernel[i], 1), x[0])[1](dy[0])[0]

    def to_kernel(i: jax.Array, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        # Copies the smaller one.
        x_now, dy_now = (x[i], dy[0]) if channels < features else (x[0], dy[i])
        return jax.vjp(lambda k: convolve(x_now, k, 1), kernel[0])[1](dy_now)[0]

    times = []
    for run_pass in (forward, to_images, to_kernel):

        @jax.jit
        def loop(*arrays: jax.Array, run_pass: Callable[..., jax.Array] = run_pass) -> jax.Array:
            start = run_pass(jnp.int32(0), *arrays)
            return jax.lax.fori_loop(0, REPEATS, lambda i, _: run_pass(i % 2, *arrays), start)

        run = partial(lambda loop: loop(x, kernel, dy).block_until_ready(), loop)
        times.append(fastest(run, rounds) / (REPEATS + 1))
    return times


def torchs(batch: int, layer: tuple[int, int, int], rounds: int) -> list[float]:
    """Times PyTorch's passes of a layer."""
    side, channels, features = layer
    last = torch.channels_last
    x = torch.randn(batch, channels, side, side).to(memory_format=last)
    kernel = torch.randn(features, channels, 3, 3).to(memory_format=last)
    dy = torch.randn(batch, features, side, side).to(memory_format=last)

    def backward(mask: list[bool]) -> object:
        ones = [1, 1]
        return torch.ops.aten.convolution_backward(
            dy, x, kernel, [0], ones, ones, ones, False, [0, 0], 1, mask
        )

    return [
        fastest(lambda: torch.nn.functional.conv2d(x, kernel, padding=1), rounds),
        fastest(lambda: backward([True, False, False]), rounds),
        fastest(lambda: backward([False, True, False]), rounds),
    ]


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=LAYERS, default="sire")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    figures = []
    for layer in LAYERS[options.network]:
        times = {
            "ours": ours(options.batch_size, layer, options.rounds),
            "torch": torchs(options.batch_size, layer, options.rounds),
        }
        if layer[1] == 3:
            # Nothing asks for the gradient to the input images.
            times["ours"][1] = times["torch"][1] = 0.0
        figures.append({"side": layer[0], "channels": layer[1], "features": layer[2], **times})
    rows = [["layer", *(f"{p}, {who}" for p in PASSES for who in ("ours", "PyTorch"))]]
    for figure in figures:
        pairs = zip(figure["ours"], figure["torch"], strict=True)
        cells = [f"{value:.2f}" for pair in pairs for value in pair]
        rows.append([f"{figure['side']} px, {figure['channels']} to {figure['features']}", *cells])
    sums = [
        sum(figure[who][i] for figure in figures) for i in range(3) for who in ("ours", "torch")
    ]
    rows.append(["all", *(f"{value:.2f}" for value in sums)])
    print(align(rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
