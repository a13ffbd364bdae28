"""What ``benchmarks/systems.py`` times: networks of four papers, in compiled loops over steps.

Each is a shipped config. A step takes no augmentation and one batch that is on the device, but for
those that are fed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict
from workers import Training, planned_bytes

from sire_jax import configuration, traced
from sire_jax.configuration import experiment
from sire_jax.configuration.experiment import Experiment
from sire_jax.data import contents
from sire_jax.data.dataset import Source
from sire_jax.data.tasks import Pairs
from sire_jax.job import memory
from sire_jax.metrics import Average
from sire_jax.runs import parallel
from sire_jax.runs.on_device import DeviceFeed
from sire_jax.runs.placement import Placement
from sire_jax.step import make_step

# Config and what it is changed by; decoders that end in a convolution, as in benchmarks/sire.py.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("pairs.py:aux_10", {}),
    "sire": ("sire.py:cnn,linear", {}),
    "auxnet": ("auxnet.py:56-5,joint", {}),
    "ssal": ("ssal.py:resnet18", {}),
}
SMALL = {
    **NETWORKS,
    "sire": ("sire.py:cnn,linear", {"backbone.width": 0.125, "backbone.hidden": (32, 32)}),
    "auxnet": ("auxnet.py:20-2,joint", {}),
    "ssal": ("ssal.py:resnet18,small", {}),
}
# Small: there is nothing to learn, and the losses should stay finite. A step costs the same.
LEARNING_RATE = 1e-3
# Before the first round: compilation, and what libraries try out.
WARM_UP = 3
# Images of an epoch of the feed: CIFAR's, or a few.
IMAGES, FEW_IMAGES = 50_000, 2_000
# The feeds: a batch that stays, batches looked up, batches looked up and augmented.
STILL, LOOKED_UP, AUGMENTED = "one batch", "looked up", "augmented"


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        network: ``"pairs"``, ``"sire"``, ``"auxnet"`` or ``"ssal"``.
        engine: ``"ours"``, or one of PyTorch's: ``"eager"``, ``"compiled"`` or ``"graphs"``.
        dtype: ``"float32"`` or ``"bfloat16"``.
        device: ``"cpu"`` or ``"cuda"``.
        batch_size: Examples in a batch; 0 for the config's.
        steps: Steps in a round.
        small: Whether the network is narrow or flat.
        rule: The update rule.
        aggregator: The aggregator of its gradients.
        seeds: How many runs are vectorized.
        feed: ``STILL``, ``LOOKED_UP`` or ``AUGMENTED``.
    """

    network: str
    engine: str = "ours"
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 0
    steps: int = 1
    small: bool = False
    rule: str = "joint"
    aggregator: str = "sum"
    seeds: int = 1
    feed: str = STILL

    @property
    def title(self) -> str:
        """What is said of it while it is prepared."""
        rule = self.rule if self.aggregator == "sum" else f"{self.rule} + {self.aggregator}"
        return f"{self.engine}, {self.dtype}, {rule}, {self.feed}, runs: {self.seeds}"


def load_config(contender: Contender) -> ConfigDict:
    """Loads the config of a contender."""
    path, changed = (SMALL if contender.small else NETWORKS)[contender.network]
    changed = {
        **changed,
        "optimizer.learning_rate": LEARNING_RATE,
        "update_rule.name": contender.rule,
        "aggregator.name": contender.aggregator,
        "seeds": contender.seeds,
        "seeds_at_once": contender.seeds,
        "devices": 1,
    }
    if contender.batch_size:
        changed["batch_size"] = contender.batch_size
    if contender.dtype != "float32" and contender.engine == "ours":
        changed["backbone.dtype"] = contender.dtype
    overrides = [f"--config.{key}={value}" for key, value in changed.items()]
    config = configuration.load(f"{configuration.repository_configs()}/{path}", overrides)
    if contender.feed == LOOKED_UP:
        config.augmentation = ConfigDict()
    return config


def variant(network: str, small: bool) -> str:
    """Returns the variant of a network's config."""
    return (SMALL if small else NETWORKS)[network][0].split(":")[1]


def has_dtype(network: str) -> bool:
    """Tells whether a network can compute in another dtype than float32."""
    return "dtype" in load_config(Contender(network)).backbone


def random_examples(parts: Experiment, count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns random images with labels, and the indices of so many examples."""
    config, generator = parts.config, np.random.default_rng(0)
    shape = (count, 2) if isinstance(parts.task, Pairs) else (count,)
    images = int(np.prod(shape))
    pixels = generator.integers(0, 256, (images, *config.data.shape), np.uint8)
    labels = {
        kind: generator.integers(0, number, images, np.int32)
        for kind, number in config.data.classes.items()
    }
    examples = np.arange(images, dtype=np.int32).reshape(shape)
    return parts.task.prepare(Source(pixels, labels)), examples


def random_batch(parts: Experiment) -> dict[str, Array]:
    """Returns a batch as the network sees it."""
    return jax.jit(parts.lookup)(*random_examples(parts, parts.config.batch_size))


def prepare(contender: Contender) -> Training:
    """Compiles a contender of ours."""
    parts = experiment.build(load_config(contender))
    return still(parts) if contender.feed == STILL else fed(parts, contender.small)


def initial(parts: Experiment) -> Any:
    """Returns the states of all runs before the first step."""
    seeds = parts.config.seeds
    return jax.jit(parallel.over_seeds(parts.initial_state, (), seeds))(jnp.arange(seeds))


def sums(parts: Experiment) -> dict[str, Average]:
    """Returns the sums of the losses of no steps, ``[runs]``."""
    names, runs = [f"{name}/loss" for name in (*parts.objectives, "total")], parts.config.seeds
    return {name: Average(total=jnp.zeros(runs), count=jnp.zeros(runs)) for name in names}


def training(parts: Experiment, take: Callable[[int], float], **told: Any) -> Training:
    """Warms a contender up and says what it is."""
    take(WARM_UP)
    size, plan = traced.size(parts.variables["params"]), told.pop("plan", None)
    here = {"kind": jax.devices()[0].device_kind, "available": memory.available()}
    return Training(take, size, plan, {"batch_size": parts.config.batch_size, **here, **told})


def still(parts: Experiment) -> Training:
    """Compiles the loop over steps that all take one batch."""
    step = make_step(parts.network.apply, parts.objectives, parts.rule)
    loop = parallel.over_steps(step, lambda batch, _: batch)
    program = jax.jit(
        parallel.over_seeds(loop, (2, 3, 4, 5), parts.config.seeds),
        donate_argnums=(0, 1),
        compiler_options=parts.rule.compiler_options,
    )
    state, batch = initial(parts), random_batch(parts)

    def arguments(count: int) -> tuple[Any, ...]:
        # The order of the examples, of which there is but one.
        rows = jnp.zeros(1, jnp.int32)
        return state, sums(parts), batch, rows, jnp.int32(0), jnp.int32(count)

    started = time.perf_counter()
    compiled = program.lower(*arguments(1)).compile()
    seconds = time.perf_counter() - started

    def take(count: int) -> float:
        nonlocal state
        state, metrics, _ = compiled(*arguments(count))
        return float(metrics["total/loss"].mean().mean())

    return training(parts, take, plan=planned_bytes(compiled), compile_seconds=seconds)


def fed(parts: Experiment, few: bool) -> Training:
    """Compiles the loop over steps with the feed of ``sire_jax.train``."""
    count = FEW_IMAGES if few else IMAGES
    arrays, examples = random_examples(parts, count)
    placement = Placement(parts.config)
    feed = DeviceFeed(
        parts,
        placement,
        arrays,
        {"train": np.stack([examples] * parts.config.seeds)},
        contents.Contents({}, {}),
    )
    # Where steps return it, or the program of the first would not be that of the next.
    state = placement.place(initial(parts))
    order = feed.order(state, 0)

    def take(count: int) -> float:
        nonlocal state
        # A round may be longer than an epoch is.
        for first in range(0, count, feed.steps_per_epoch):
            steps = min(feed.steps_per_epoch, count - first)
            state, metrics, _ = feed.take_steps(state, sums(parts), order, 0, steps)
        return float(metrics["total/loss"].mean().mean())

    jax.block_until_ready(feed.order(state, 1))
    started = time.perf_counter()
    jax.block_until_ready(feed.order(state, 2))
    shuffle = (time.perf_counter() - started) / feed.steps_per_epoch
    return training(parts, take, shuffle_seconds=shuffle)
