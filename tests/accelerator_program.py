"""Takes steps of a small network of each paper on this process's device, and keeps what changed.

``python -m accelerator_program FILE``: an ``.npz`` of each case's losses, of what its steps added
to the parameters and of what an evaluation returns.
"""

import sys

import jax
import numpy as np
from programs import CONFIGS

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.data.dataset import Source
from sire_jax.data.tasks import Pairs

IMAGES, STEPS = 16, 2
# Every way to convolve, to loop over blocks and to update; dropout and augmentations included.
CASES = {
    "pairs": ("pairs.py:aux_10", {}),
    "sire": ("sire.py:cnn", {"backbone.width": 0.125, "backbone.hidden": "(32, 32)"}),
    "joint": ("auxnet.py:20-2,cifar100", {"update_rule.name": "joint"}),
    "multiway": ("auxnet.py:20-2,cifar100", {}),
    "upgrad": ("auxnet.py:20-2,cifar100", {"aggregator.name": "upgrad"}),
    "ssal": ("ssal.py:resnet18", {"backbone.width": 0.125}),
}


def case(name):
    """Builds a case with its batch of random images."""
    path, changed = CASES[name]
    given = [f"--config.{k}={v}" for k, v in {**changed, "batch_size": IMAGES // 2}.items()]
    chosen = configuration.load(f"{CONFIGS}/{path}", given)
    # Steps along the gradient: Adam divides by what may be no more than rounding.
    chosen.optimizer = configuration.optimizer("sgd", learning_rate=0.01)
    parts = experiment.build(chosen)
    config, generator = parts.config, np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, *config.data.shape), np.uint8)
    labels = {k: generator.integers(0, n, IMAGES) for k, n in config.data.classes.items()}
    examples = np.arange(IMAGES).reshape((-1, 2) if isinstance(parts.task, Pairs) else -1)
    return parts, parts.task.prepare(Source(images, labels)), examples[: IMAGES // 2]


def run(name):
    """Takes the steps; returns ``{what: values}``."""
    parts, arrays, examples = case(name)
    batch = jax.jit(parts.lookup)(arrays, examples)
    step = jax.jit(parts.step())
    before = state = jax.jit(parts.initial_state)(0)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append([float(each.mean()) for _, each in sorted(metrics.items())])
    moved = jax.tree.map(lambda a, b: np.ravel(a - b), state.params, before.params)
    variables = state.variables
    outputs = jax.jit(parts.apply)(variables, batch["image"])
    return {
        "losses": np.array(losses),
        "moved": np.concatenate(jax.tree.leaves(moved)),
        "outputs": np.concatenate([np.ravel(outputs[key]) for key in sorted(outputs)]),
    }


def main(path):
    # As precise as the device can: matrix units may round float32 to fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    found = {name: run(name) for name in CASES}
    np.savez(path, **{f"{name}/{k}": v for name, each in found.items() for k, v in each.items()})


if __name__ == "__main__":
    main(sys.argv[1])
