"""Prints how the gradients of every update rule differ on 1 and on 8 devices."""

import json
import sys

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.layers import BatchNorm
from sire_jax.runs.runs import Runs


class Dense(nn.Module):
    """A network of a user's own, quick to compile: two layers with batch norm."""

    classes: int = 10

    @nn.compact
    def __call__(self, image, *, train=False):
        x, endpoints = image.reshape(len(image), -1), {}
        for i in (1, 2):
            x = nn.relu(
                BatchNorm(name=f"norm_{i}")(nn.Dense(12, name=f"dense_{i}")(x), train=train)
            )
            endpoints[f"layer_{i}"] = x
        return nn.Dense(self.classes, name="output")(x), endpoints


def config(rule, aggregator, parallel, devices, batch_norm):
    """A network with batch norm and two exits; a step of 1 down the gradient."""
    made = configuration.default()
    made.update(batch_size=16, compilation_cache="", parallel=parallel, devices=devices)
    made.batch_norm = batch_norm
    made.data.mean, made.data.std = (0.3,), (0.4,)
    made.backbone = ConfigDict({"name": "devices_program:Dense"})
    for name, endpoint in (("exit_1", "layer_1"), ("exit_2", "layer_2")):
        made.heads[name] = configuration.head(
            "classifier", endpoints=(endpoint,), classes=10, normalize=True
        )
        made.objectives[name] = configuration.objective(name, "label", "cross_entropy", 0.5)
    made.objectives.main = configuration.objective("main", "label", "cross_entropy")
    made.optimizer = configuration.optimizer("sgd", learning_rate=1.0)
    made.update_rule = configuration.update_rule(rule)
    made.aggregator = ConfigDict({"name": aggregator})
    return made


def step(*case):
    """Takes one step; returns what changed, the batch statistics, and the losses."""
    runs = Runs(experiment.build(config(*case)))
    state = runs.initial()
    before = jax.device_get(state.params)
    order = runs.feed.order(state, 0)
    state, sums, _ = runs.feed.take_steps(state, runs.no_metrics(), order, 0, 1)
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), before)
    return moved, jax.device_get(state.model_state), runs.averages(sums)


def distance(a, b):
    """Returns ``|a - b| / |a|`` of two trees."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(each)]) for each in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def main(aggregated):
    joint: tuple = ()
    for rule, aggregator in json.loads(aggregated):
        alone = step(rule, aggregator, "jit", 1, "batch")
        joint = alone if (rule, aggregator) == ("joint", "sum") else joint
        for parallel in ("jit", "pmap"):
            found = step(rule, aggregator, parallel, 8, "batch")
            each = [distance(a, b) for a, b in zip(alone, found, strict=True)]
            print(json.dumps([rule, aggregator, parallel, *each]), flush=True)
    own = step("joint", "sum", "pmap", 8, "device")
    each = [distance(a, b) for a, b in zip(joint, own, strict=True)]
    print(json.dumps(["own statistics", "", "pmap", *each]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
