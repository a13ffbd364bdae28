"""Times both feeds beside the training step that they feed, and streams beside their peers.

``python benchmarks/input.py`` (no data set; with ``pip install -e '.[benchmark]'`` also PyTorch).

**On the device.** A training step of a shipped config on 50,000 random images of CIFAR's size, in
the compiled loop as ``sire_jax.train`` runs it, beside what its feed takes alone: looking batches
up, with scaled pixels, in the same loop; and shuffling an epoch, as a share of one of its steps.
The target is that both take less than 2% of the step.

**Streams.** Batches of image files, as NumPy arrays: ours, grain's ``DataLoader`` and PyTorch's,
each with its defaults but for the number of worker processes, all decoding with Pillow. The files
are made here: ``small`` is 32 x 32 PNG, taken as it is; ``large`` is JPEG of about 500 x 375,
of which random parts are scaled to 224 x 224. Each contender has a process of its own; they take
turns, in an order drawn anew in each round, in which they read every file once, and those of
``large`` four times. Images/s are those of the second half of a round, when what was made ahead is
used up; "start s" are the seconds to the first batch, with the start of workers. "Steps fed" is how
many times as fast as the step above takes them batches of ``small`` come.

Times are medians over rounds. Prints tables and writes JSON.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import grain
import numpy as np
from PIL import Image

from sire_jax.data import images
from sire_jax.data.records import open_records
from sire_jax.data.stream import Transform, batches
from sire_jax.text import align

OUT = Path("docs/results/benchmark_input.json")
CONTENDERS = ("ours", "grain", "torch")
# Of a feed on the device, as a share of the step.
TARGET = 0.02
CIFAR = 50_000
CLASSES = 10
LEAST_BATCHES = 4
# How often a round reads each file: grain's workers decode 500 images ahead while others start.
PASSES = {"small": 1, "large": 4}


# ---- The files.


def small(generator: np.random.Generator) -> Image.Image:
    """Makes an image of CIFAR's size."""
    return Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8))


def large(generator: np.random.Generator) -> Image.Image:
    """Makes an image of about ImageNet's size and detail: coarse shapes and some noise."""
    size = (int(generator.integers(450, 551)), int(generator.integers(340, 411)))
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    noise = generator.integers(-12, 13, pixels.shape, np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


# For each set of files: how an image is made, its extension, and what is made of it.
Maker = Callable[[np.random.Generator], Image.Image]
SETS: dict[str, tuple[Maker, str, Transform]] = {
    "small": (small, "png", Transform(shape=(32, 32, 3))),
    "large": (large, "jpg", Transform(shape=(224, 224, 3), crop=224, random=True)),
}


def write_files(root: Path, name: str, number: int) -> float:
    """Writes an image folder; returns the mean KiB of a file."""
    make, extension, _ = SETS[name]
    generator = np.random.default_rng(0)
    sizes = []
    for i in range(number):
        path = root / name / "train" / f"class_{i % CLASSES}" / f"{i:06}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        make(generator).save(path, quality=90)
        sizes.append(path.stat().st_size)
    # A stream opens both splits of a folder.
    (root / name / "test").symlink_to(root / name / "train")
    return sum(sizes) / len(sizes) / 1024


# ---- The contenders, each in a process of its own.


class Files:
    """The files with their labels, as peers take them: one example at a time.

    Args:
        root: Where the sets are.
        name: Of the set.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._paths = sorted((root / name / "train").glob("*/*")) * PASSES[name]
        self._transform = SETS[name][2]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self._paths[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if self._transform.random:
            image = images.random_square(image, self._transform.crop, np.random.default_rng())
        return np.array(image), int(path.parent.name.removeprefix("class_"))


def iterate_ours(root: Path, name: str, batch_size: int, workers: int) -> Iterator[Any]:
    """Returns our batches of an epoch."""
    records = open_records(f"folder:{name}", str(root)).train
    order = np.random.default_rng(0).permutation(len(records) * PASSES[name]) % len(records)
    steps = len(order) // batch_size
    shuffled = order[: steps * batch_size].reshape(steps, batch_size)
    return batches(records, shuffled, SETS[name][2], (0,), workers=workers)


def iterate_grain(root: Path, name: str, batch_size: int, workers: int) -> Iterator[Any]:
    """Returns the batches of grain's ``DataLoader``."""
    files = Files(root, name)
    order = grain.samplers.IndexSampler(
        num_records=len(files),
        shuffle=True,
        seed=0,
        num_epochs=1,
        shard_options=grain.sharding.NoSharding(),
    )
    batched = [grain.transforms.Batch(batch_size, drop_remainder=True)]
    loader = grain.DataLoader(
        data_source=files, sampler=order, operations=batched, worker_count=workers
    )
    return iter(loader)


def iterate_torch(root: Path, name: str, batch_size: int, workers: int) -> Iterator[Any]:
    """Returns the batches of PyTorch's ``DataLoader``."""
    from torch.utils.data import DataLoader

    files: Any = Files(root, name)
    loader = DataLoader(files, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    return iter(loader)


ITERATE = {"ours": iterate_ours, "grain": iterate_grain, "torch": iterate_torch}


def read_all(iterate: Callable[[], Iterator[Any]], batch_size: int) -> tuple[float, float]:
    """Takes all batches; returns the seconds to the first and, in the second half, of an image."""
    started = time.perf_counter()
    times = [time.perf_counter() for _ in iterate()]
    half = len(times) // 2
    seconds = (times[-1] - times[half - 1]) / ((len(times) - half) * batch_size)
    return times[0] - started, seconds


def serve(connection: Connection, contender: str, *arguments: Any) -> None:
    """Runs rounds when asked to."""
    from absl import flags

    # Grain asks its flags.
    flags.FLAGS.mark_as_parsed()
    iterate = partial(ITERATE[contender], *arguments)
    while connection.recv():
        connection.send(read_all(iterate, arguments[2]))


class Reader:
    """A contender in a process of its own.

    Attributes:
        starts: Seconds to the first batch, of each round.
    """

    def __init__(self, contender: str, *arguments: Any) -> None:
        # Not forked: each has its own libraries.
        spawn = multiprocessing.get_context("spawn")
        self._connection, other_end = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other_end, contender, *arguments))
        self._process.start()
        other_end.close()
        self.starts: list[float] = []

    def round(self) -> float:
        """Runs a round; returns the seconds of an image."""
        self._connection.send(True)
        start, seconds = self._connection.recv()
        self.starts.append(start)
        return seconds

    def close(self) -> None:
        """Ends the process."""
        self._connection.send(False)
        self._process.join()


def measure_streams(root: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times all contenders on a set of files."""
    from updates import contest, say

    number = options.small if name == "small" else options.large
    batch_size = options.batch_size if name == "small" else options.large_batch_size
    say(f"{name}: writing {number} files")
    size = write_files(root, name, number)
    readers = {
        f"{contender}, {workers} workers": Reader(contender, root, name, batch_size, workers)
        for contender in options.contenders
        for workers in options.workers
    }
    try:
        load = os.getloadavg()
        seconds = contest(
            options.rounds, {title: reader.round for title, reader in readers.items()}
        )
    finally:
        for reader in readers.values():
            reader.close()
    starts = {title: reader.starts for title, reader in readers.items()}
    facts = {"files": number, "mean_kib": size, "batch_size": batch_size, "load": load}
    return {**facts, "seconds": seconds, "starts": starts}


# ---- The feed on the device.


def measure_step(options: argparse.Namespace) -> dict[str, Any]:
    """Times a training step and its feed on the device."""
    import jax
    import jax.numpy as jnp
    from updates import contest, say

    from sire_jax import configuration
    from sire_jax.configuration import experiment
    from sire_jax.metrics import Average
    from sire_jax.runs import parallel

    path = f"{configuration.repository_configs()}/{options.config}"
    config = configuration.load(path, options.overrides)
    config.batch_size = options.batch_size
    parts = experiment.build(config)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (CIFAR, *config.data.shape), np.uint8)
    labels = {k: generator.integers(0, n, CIFAR, np.int32) for k, n in config.data.classes.items()}
    arrays = jax.device_put({"image": pixels, **labels})
    key, examples = jax.random.key(0), jnp.arange(CIFAR, dtype=jnp.int32)
    shuffle = jax.jit(parallel.shuffle, static_argnums=3)
    order = shuffle(key, jnp.int32(0), examples, config.batch_size)
    steps = jax.jit(parallel.over_steps(parts.step(), parts.lookup), donate_argnums=(0, 1))
    names = [f"{name}/loss" for name in (*parts.objectives, "total")]
    state = jax.jit(parts.initial_state)(jnp.int32(0))

    def look_up(arrays: Any, order: Any, count: Any) -> Any:
        first = parts.lookup(arrays, order[0])
        return jax.lax.fori_loop(0, count, lambda i, _: parts.lookup(arrays, order[i]), first)

    def take(count: int) -> None:
        nonlocal state
        nothing = {k: Average(total=jnp.zeros(()), count=jnp.zeros(())) for k in names}
        span = jnp.int32(0), jnp.int32(count)
        state, metrics, _ = steps(state, nothing, arrays, order, *span)
        if not math.isfinite(float(metrics["total/loss"].mean())):
            raise ValueError("The loss is not finite.")

    lookups = jax.jit(look_up)
    all_steps = len(order)
    programs: dict[str, tuple[Callable[[], Any], int]] = {
        "step": (lambda: take(options.steps), options.steps),
        "lookup": (lambda: jax.block_until_ready(lookups(arrays, order, all_steps)), all_steps),
        "shuffle": (
            lambda: shuffle(key, jnp.int32(1), examples, config.batch_size).block_until_ready(),
            all_steps,
        ),
    }
    say(f"{options.config}: compiling")
    for run, _ in programs.values():
        run()
    load = os.getloadavg()
    rounds = {name: partial(time_of, *program) for name, program in programs.items()}
    return {"load": load, "seconds": contest(options.rounds, rounds)}


def time_of(run: Callable[[], Any], times: int) -> float:
    """Returns the seconds of one of so many repetitions that a program makes."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) / times


# ---- The report.


def step_table(measured: Mapping[str, Any], batch_size: int) -> str:
    """Writes the step and its feed on the device."""
    seconds = measured["seconds"]
    step = median(seconds["step"])
    feed = median(a + b for a, b in zip(seconds["lookup"], seconds["shuffle"], strict=True))
    rows = [["", "ms a step", "images/s", "of the step", "target"]]
    for title, seconds_a_step, target in (
        ("training step", step, ""),
        ("feed: lookup", median(seconds["lookup"]), ""),
        ("feed: shuffle", median(seconds["shuffle"]), ""),
        ("feed, both", feed, f"at most {TARGET:.0%}"),
    ):
        speed = f"{batch_size / seconds_a_step:,.0f}"
        rows.append(
            [title, f"{1e3 * seconds_a_step:.3f}", speed, f"{seconds_a_step / step:.3%}", target]
        )
    return align(rows)


def stream_table(measured: Mapping[str, Any], step: Mapping[str, Any] | None) -> str:
    """Writes a row for each contender on a set of files."""
    rows = [["", "images/s", "best", "/ torch's best (median)", "start s", "steps fed"]]
    speeds = {
        title: [1 / seconds for seconds in values] for title, values in measured["seconds"].items()
    }
    peers = [median(speed) for title, speed in speeds.items() if title.startswith("torch")]
    for title, speed in speeds.items():
        middle = median(speed)
        fed = ""
        if step is not None:
            needed = measured["batch_size"] / median(step["seconds"]["step"])
            fed = f"{middle / needed:.1f}"
        rows.append(
            [
                title,
                f"{middle:,.0f}",
                f"{max(speed):,.0f}",
                f"{middle / max(peers):.2f}" if peers else "-",
                f"{median(measured['starts'][title]):.2f}",
                fed,
            ]
        )
    return align(rows)


def report(measured: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Writes all tables."""
    parts = ["Load averages are those before the first round: above 0, others computed, too."]
    if "step" in measured:
        load = measured["step"]["load"][0]
        title = f"{options.config}, batch {options.batch_size}, on the device (load {load:.1f})"
        parts.append(f"{title}\n\n{step_table(measured['step'], options.batch_size)}")
    for name, streams in measured["streams"].items():
        title = f"{name}: {streams['files']} files of {streams['mean_kib']:.1f} KiB"
        title += f", batch {streams['batch_size']} (load {streams['load'][0]:.1f})"
        step = measured.get("step") if name == "small" else None
        parts.append(f"{title}\n\n{stream_table(streams, step)}")
    return "\n\n".join(parts)


# ---- The program.


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contenders = [
        name for name in CONTENDERS if name != "torch" or importlib.util.find_spec("torch")
    ]
    parser.add_argument("--config", default="sire.py:cnn_base", help="of the training step")
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=contenders)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="processes")
    parser.add_argument("--batch-size", type=int, default=64, help="of the step, and of small")
    parser.add_argument("--large-batch-size", type=int, default=32)
    parser.add_argument("--small", type=int, default=10_000, help="files of 32 x 32")
    parser.add_argument("--large", type=int, default=1600, help="files of about 500 x 375")
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-step", action="store_true", help="streams alone")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write the figures")
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    for name in options.sets:
        files, size = {
            "small": (options.small, options.batch_size),
            "large": (options.large, options.large_batch_size),
        }[name]
        if files // size < LEAST_BATCHES:
            parser.error(f"{files} {name} files make fewer than {LEAST_BATCHES} batches of {size}")
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    measured: dict[str, Any] = {"streams": {}}
    if not options.no_step:
        measured["step"] = measure_step(options)
    with tempfile.TemporaryDirectory() as root:
        for name in options.sets:
            measured["streams"][name] = measure_streams(Path(root), name, options)
    described = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {library.__name__: library.__version__ for library in (grain, np, Image)},
        "options": {
            k: str(v) for k, v in vars(options).items() if k not in ("json", "peer_python")
        },
    }
    options.out.write_text(json.dumps({**described, **measured}, indent=1) + "\n")
    print("\n" + report(measured, options))


if __name__ == "__main__":
    main()
