"""Times a training step of SIRe-CNN and of its base CNN beside the same networks in PyTorch.

``python benchmarks/sire.py`` (needs ``pip install -e '.[benchmark]'``; no data set). A step is the
augmentation by flips, the forward and the backward pass and SGD with Nesterov momentum and weight
decay, on random images of 32 x 32 pixels that are on the device. Ours runs as ``sire_jax.train``
runs it, in the compiled loop over steps; PyTorch runs it in eager mode and compiled
(``torch.compile``), both in ``channels_last`` and with the fused optimizer. Compilation does not
count.

Each contender has a process of its own. They take turns: a round is ``--steps`` steps of every one
of them, the others idle. Times are medians over ``--rounds`` rounds, and the fastest; ratios are
medians of the ratios within a round. GFLOP/s are those that convolutions and dense layers require:
three times those of a forward pass, two for each multiply-add.

Memory is the peak during the rounds: on a CPU the growth of the process since its imports, with
what compilation left behind; on a GPU what the library's allocator counts, for ours with what
choosing algorithms took. "XLA plan" is what XLA allots to the compiled program.

``--remat`` adds ours with decoders that are computed again for the gradient, and in bfloat16.
Prints tables and writes JSON.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import devices
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional
from workers import (
    Training,
    Worker,
    contest,
    machine,
    mebibytes,
    number,
    planned_bytes,
    ratio,
    work,
)

from sire_jax import configuration, traced
from sire_jax.configuration import experiment
from sire_jax.inspect import inspect
from sire_jax.layers import onednn
from sire_jax.metrics import Average
from sire_jax.runs import parallel
from sire_jax.text import align

# Variants of configs/sire.py and the parameters of each.
# Decoders that end in a convolution, as the recorded figures have them; batch norm costs nothing.
NETWORKS = {"base": "cnn_base", "sire": "cnn,linear"}
PARAMETERS = {"base": 7_939_492, "sire": 14_072_944}
CLASSES = 100
WIDTHS = (64, 128, 256, 512)
HIDDEN = (1024, 1024)
DECODER_WEIGHT = 0.2
# Small: there is nothing to learn, and the losses should stay finite. A step costs the same.
LEARNING_RATE = 1e-3
# Before the first round: compilation, and what libraries try out.
WARM_UP = 3
# How much more time SIRe-CNN takes than its base CNN according to Avola et al.
PAPER_RATIO = 1.7


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        network: ``"base"`` or ``"sire"``.
        engine: ``"ours"``, ``"plain"`` (without oneDNN), ``"eager"`` or ``"compiled"``.
        dtype: ``"float32"`` or ``"bfloat16"``.
        device: ``"cpu"`` or ``"cuda"``.
        batch_size: Images in a batch.
        steps: Steps in a round.
        remat: Whether decoders are computed again for the gradient (ours only).
    """

    network: str
    engine: str
    dtype: str
    device: str
    batch_size: int
    steps: int
    remat: bool = False

    @property
    def title(self) -> str:
        """What tables call it."""
        return ENGINES[self.engine][0] + ", remat" * self.remat


def random_images(contender: Contender) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images of a round, uint8 ``[n, 32, 32, 3]``, and their labels."""
    generator = np.random.default_rng(0)
    count = contender.batch_size * contender.steps
    images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return images, generator.integers(0, CLASSES, count, np.int32)


# ---- Ours.


def load_config(network: str) -> ConfigDict:
    """Loads the shipped config of a network."""
    return configuration.load(f"{configuration.repository_configs()}/sire.py:{NETWORKS[network]}")


def prepare_ours(contender: Contender) -> Training:
    """Compiles the loop over steps as ``sire_jax.train`` does."""
    config = load_config(contender.network)
    config.batch_size = contender.batch_size
    config.backbone.dtype = contender.dtype
    config.heads.decoder.remat = contender.remat
    config.optimizer.learning_rate.init_value = LEARNING_RATE
    parts = experiment.build(config)
    images, labels = random_images(contender)
    classes = config.data.classes.to_dict()
    arrays = jax.device_put({"image": images, **{k: labels % n for k, n in classes.items()}})
    order = np.random.default_rng(1).permutation(len(images)).astype(np.int32)
    order = jax.device_put(order.reshape(1, contender.steps, contender.batch_size))

    def sums() -> dict[str, Average]:
        names = [f"{name}/loss" for name in (*parts.objectives, "total")]
        return {name: Average(total=jnp.zeros(1), count=jnp.zeros(1)) for name in names}

    at_once = config.seeds_at_once
    steps = parallel.over_steps(parts.step(), parts.lookup)
    state = jax.jit(parallel.over_seeds(parts.initial_state, (), at_once))(jnp.zeros(1, jnp.int32))
    over_seeds = parallel.over_seeds(steps, (2, 4, 5), at_once)
    program = (
        jax.jit(over_seeds, donate_argnums=(0, 1))
        .lower(state, sums(), arrays, order, jnp.int32(0), jnp.int32(1))
        .compile()
    )

    def take(count: int) -> float:
        nonlocal state
        span = jnp.int32(0), jnp.int32(count)
        state, metrics, _ = program(state, sums(), arrays, order, *span)
        return float(metrics["total/loss"].mean()[0])

    take(WARM_UP)
    return Training(take, traced.size(parts.variables["params"]), planned_bytes(program))


# ---- PyTorch.


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Makes a convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))


def mirrored(inputs: int, outputs: int) -> nn.Sequential:
    """Makes the mirror of a convolution from ``outputs`` to ``inputs`` channels."""
    transposed = nn.ConvTranspose2d(inputs, outputs, 3, stride=1, padding=1)
    return nn.Sequential(transposed, nn.BatchNorm2d(outputs), nn.ReLU())


class Stage(nn.Module):
    """Two convolutions, with a residual connection around them in SIRe, and a max pool."""

    def __init__(self, inputs: int, outputs: int, residual: bool) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs)
        self.second = convolution(outputs, outputs)
        self.residual, self.missing = residual, outputs - inputs

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns what the two convolutions and the max pool return."""
        first = self.first(x).relu()
        second = self.second(first)
        if self.residual:
            second = second + functional.pad(x, (0, 0, 0, 0, 0, self.missing))
        second = second.relu()
        return first, second, functional.max_pool2d(second, 2)


class MirroredStage(nn.Module):
    """A stage read backwards, with long skip connections from its convolutions."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.second = mirrored(inputs, inputs)
        alone = nn.ConvTranspose2d(inputs, outputs, 3, stride=1, padding=1)
        self.first = alone if last else mirrored(inputs, outputs)

    def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Maps the stage's output to its input."""
        x = self.second(functional.interpolate(x, scale_factor=2, mode="nearest") + second)
        return self.first(x + first)


class SireCNN(nn.Module):
    """The base CNN, or SIRe-CNN, written as their PyTorch users would."""

    def __init__(
        self, sire: bool, widths: Sequence[int] = WIDTHS, hidden: Sequence[int] = HIDDEN
    ) -> None:
        super().__init__()
        sizes = list(zip((3, *widths[:-1]), widths, strict=True))
        self.stages = nn.ModuleList(Stage(*size, residual=sire) for size in sizes)
        self.decoders = nn.ModuleList(
            nn.ModuleList(
                MirroredStage(width, inputs, last=i == 0)
                for i, (inputs, width) in enumerate(sizes[:depth])
            )
            for depth in range(1, len(sizes) + 1 if sire else 1)
        )
        self.classifier = nn.Sequential(
            *(nn.Flatten(), nn.Linear(4 * widths[-1], hidden[0]), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(*hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden[1], CLASSES)),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps ``[b, 3, 32, 32]`` to logits ``[b, 100]`` and each decoder's image."""
        x, passed = image, []
        for stage in self.stages:
            *convolved, x = stage(x)
            passed.append((x, *convolved))
        decoded = []
        for depth, decoder in enumerate(self.decoders):
            y = passed[depth][0]
            for i in range(depth, -1, -1):
                y = decoder[i](y, *passed[i][1:])
            decoded.append(y)
        return self.classifier(x), decoded


def total_loss(network: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Flips the images of a batch and returns the weighted sum of the losses."""
    image = pixels.float() / 255
    flipped = torch.rand(len(image), 1, 1, 1, device=image.device) < 0.5
    image = torch.where(flipped, image.flip(-1), image)
    image = image.contiguous(memory_format=torch.channels_last)
    logits, decoded = network(image)
    loss = functional.cross_entropy(logits.float(), labels)
    for images in decoded:
        loss = loss + DECODER_WEIGHT * functional.mse_loss(images.float(), image)
    return loss


def take_steps(
    loss_of: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Sequence[Any]],
    device: str,
    dtype: str,
) -> float:
    """Takes a step of PyTorch's with each batch, and waits for the last.

    Args:
        loss_of: The loss of a batch.
        optimizer: The optimizer.
        batches: Arguments of ``loss_of`` for each step.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"float32"`` or ``"bfloat16"``, in which ``torch.autocast`` then computes.

    Returns:
        The mean loss.
    """
    losses = []
    for batch in batches:
        # Where CUDA's graphs are replayed: what the last step returned is no longer read.
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # A copy: a replayed graph writes its results over those before.
        losses.append(loss.detach().clone())
    return torch.stack(losses).mean().item()


def prepare_torch(contender: Contender) -> Training:
    """Makes the PyTorch network and its step, compiled if the contender is."""
    torch.manual_seed(0)
    device = torch.device(contender.device)
    if contender.device == "cuda":
        devices.as_xla()
    network = SireCNN(contender.network == "sire")
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(),
        LEARNING_RATE,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        fused=True,
    )
    pixels, labels = (torch.from_numpy(array).to(device) for array in random_images(contender))
    pixels = pixels.permute(0, 3, 1, 2)
    labels = labels.long()
    objective = torch.compile(total_loss) if contender.engine == "compiled" else total_loss

    def take(count: int) -> float:
        order = torch.randperm(len(pixels), device=device).split(contender.batch_size)
        batches = ((pixels[chosen], labels[chosen]) for chosen in order[:count])
        return take_steps(
            partial(objective, network), optimizer, batches, contender.device, contender.dtype
        )

    take(WARM_UP)
    return Training(take, sum(parameter.numel() for parameter in network.parameters()))


ENGINES: dict[str, tuple[str, Callable[[Contender], Training]]] = {
    "ours": ("sire_jax", prepare_ours),
    "plain": ("sire_jax, without oneDNN", prepare_ours),
    "eager": ("PyTorch eager", prepare_torch),
    "compiled": ("PyTorch compiled", prepare_torch),
}


# ---- The contest.


def choose(options: argparse.Namespace) -> list[Contender]:
    """Lists the contenders that the options ask for."""
    chosen = []
    for network in options.networks:
        for engine in options.contenders:
            plain = Contender(
                network=network,
                engine=engine,
                dtype=options.dtype,
                device=options.device,
                batch_size=options.batch_size,
                steps=options.steps,
            )
            chosen.append(plain)
            if options.remat and engine == "ours" and network == "sire":
                chosen += [replace(plain, remat=True), replace(plain, dtype="bfloat16")]
    return list(dict.fromkeys(chosen))


def check_parameters(worker: Worker) -> None:
    """Checks that a contender trains the network that it should."""
    network, parameters = worker.contender.network, worker.ready.get("parameters")
    if not worker.error and parameters != PARAMETERS[network]:
        raise ValueError(
            f"{worker.contender.title} has {parameters:,} parameters in the network '{network}'; it"
            f" should have {PARAMETERS[network]:,}."
        )


def count_multiply_adds(networks: Sequence[str]) -> dict[str, int]:
    """Counts the multiply-adds of one image's forward pass in our networks."""
    return {network: inspect(load_config(network))["multiply_adds"] for network in networks}


# ---- The report.


def find(workers: Sequence[Worker], contender: Contender) -> Worker | None:
    """Returns the worker of a contender, if it took part."""
    return next((worker for worker in workers if worker.contender == contender), None)


def times_table(workers: Sequence[Worker], multiply_adds: dict[str, int]) -> str:
    """Writes a row for each contender."""
    header = ["network", "contender", "dtype", "ms/step", "fastest", "images/s", "GFLOP/s"]
    header += ["/ eager", "/ compiled", "peak MiB", "XLA plan MiB", ""]
    rows = [header]
    for worker in workers:
        contender = worker.contender
        named = [contender.network, contender.title, contender.dtype]
        adds = multiply_adds[contender.network]
        measured = [""] * 8 if worker.error else measurements(worker, workers, adds)
        rows.append([*named, *measured, f"not run: {worker.error}" if worker.error else ""])
    noted = any(row[-1] for row in rows)
    return align(rows if noted else [row[:-1] for row in rows])


def measurements(worker: Worker, workers: Sequence[Worker], multiply_adds: int) -> list[str]:
    """Writes times, ratios and memory of a contender.

    Args:
        worker: The contender.
        workers: All of them.
        multiply_adds: Those of one image's forward pass; a step takes three times as many.
    """
    middle = median(worker.seconds)
    relative = [
        ratio(worker, find(workers, replace(worker.contender, engine=engine, remat=False)))
        for engine in ("eager", "compiled")
    ]
    return [
        number(1e3 * middle, 1),
        number(1e3 * min(worker.seconds), 1),
        number(worker.contender.batch_size / middle, 0),
        number(6e-9 * multiply_adds * worker.contender.batch_size / middle, 0),
        *map(number, relative),
        mebibytes(worker.rounds[-1]["memory"]),
        mebibytes(worker.ready["plan"]),
    ]


def decoders_table(workers: Sequence[Worker], multiply_adds: dict[str, int]) -> str:
    """Writes what decoders cost over the bare network."""
    rows = [["SIRe / base", "dtype", "ratio"]]
    for worker in workers:
        contender = worker.contender
        if contender.network == "sire":
            base = find(workers, replace(contender, network="base", remat=False))
            if (relative := ratio(worker, base)) is not None:
                rows.append([f"time, {contender.title}", contender.dtype, number(relative)])
    forward = multiply_adds["sire"] / multiply_adds["base"]
    rows.append(["multiply-adds", "", number(forward)])
    rows.append(["time, Avola et al.", "", number(PAPER_RATIO)])
    return align(rows)


def figures(
    workers: Sequence[Worker], multiply_adds: dict[str, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Returns what is written as JSON."""
    libraries = (jax, flax, optax, torch, np)
    return {
        "machine": machine(),
        "versions": {library.__name__: library.__version__ for library in libraries}
        | {"oneDNN": onednn.version() or "none"},
        "threads": torch.get_num_threads(),
        "options": {
            key: str(value) for key, value in vars(options).items() if key not in ("worker", "json")
        },
        "multiply_adds": multiply_adds,
        "results": [worker.record() for worker in workers],
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""

    def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def names_in(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := [name for name in chosen if name not in allowed]:
                raise argparse.ArgumentTypeError(
                    f"{', '.join(unknown)}: there are {', '.join(allowed)}"
                )
            return chosen

        return names_in

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value} should be at least 1")
        return value

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=names(list(NETWORKS)), default=list(NETWORKS))
    parser.add_argument("--contenders", type=names(list(ENGINES)), default=list(ENGINES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    devices.add_option(parser)
    parser.add_argument("--batch-size", type=positive, help="default: 32 on a CPU, 128 on a GPU")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=20, help="of a round")
    parser.add_argument(
        "--remat", action="store_true", help="also ours with remat of decoders, and in bfloat16"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    if options.worker:
        contender = Contender(**json.loads(options.worker))
        work(contender, ENGINES[contender.engine][1])
        return
    options.device = devices.choose(options.device).platform
    options.batch_size = options.batch_size or (32 if options.device == "cpu" else 128)
    # This process measures nothing: it leaves the GPU alone.
    jax.config.update("jax_platforms", "cpu")
    multiply_adds = count_multiply_adds(options.networks)

    def note(workers: list[Worker]) -> None:
        if options.json:
            results = figures(workers, multiply_adds, options)
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    workers = contest(choose(options), options.rounds, __file__, check_parameters, note)
    print("\n" + times_table(workers, multiply_adds))
    if set(options.networks) == set(NETWORKS):
        print("\n" + decoders_table(workers, multiply_adds))


if __name__ == "__main__":
    main()
