"""What a joint prediction rests on, of a run with branches over groups of the labels.

``python benchmarks/joint_prediction.py --workdir=DIR [--config.data.dir=DIR]``. On test images, in
percent, for each seed: the joint probability by the power eta of the branches, and by the eta that
makes held-out images most likely; the linear combination of all outputs and that of the main output
alone, fitted to the same images, and the former fitted to as many training images as held-out ones;
how often the main output is right on training images; how often each branch is right about its
groups, and how often the main output would be, whose probabilities are added up over each group.
Prints a table and writes JSON.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sire_jax.groups import Groups
from sire_jax.networks import MAIN
from sire_jax.predictions import FittedJointProbability, JointProbability, LinearCombination
from sire_jax.reproduce import machine
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import kept_weights, open_run
from sire_jax.text import align

ETAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
BATCH = 500
Outputs = dict[str, Array]


def collect(runs: Runs, variables: Any, split: str, seed: int) -> tuple[Outputs, Array]:
    """Applies the network of a seed to the images of a split.

    Returns:
        Logits by output, and the labels.
    """
    apply = jax.jit(runs.parts.network.apply)
    batches = []
    examples = np.asarray(runs.feed.examples[split])[seed]
    for start in range(0, len(examples), BATCH):
        batch = runs.parts.lookup(runs.feed.arrays, examples[start : start + BATCH])
        logits = apply(variables, batch["image"])
        batches.append(({name: logits[name] for name in (MAIN, *runs.parts.branches())}, batch))
    outputs = {
        name: jnp.concatenate([logits[name] for logits, _ in batches]) for name in batches[0][0]
    }
    return outputs, jnp.concatenate([batch["label"] for _, batch in batches])


def of_groups(outputs: Outputs, labels: Array, branches: Mapping[str, Groups]) -> dict[str, float]:
    """Returns how often each branch, and the main output, is right about its groups."""
    accuracies = {}
    for name, groups in branches.items():
        group = jnp.asarray(groups.assignment)
        right = group[labels]
        accuracies[f"{name}, groups"] = percent(outputs[name], right)
        # The probability of a group is that of all its labels together.
        summed = jax.nn.softmax(outputs[MAIN]) @ jax.nn.one_hot(group, groups.number)
        accuracies[f"main, groups of {name}"] = percent(summed, right)
    return accuracies


def percent(scores: Array, labels: Array) -> float:
    """Returns how often the highest score is that of the label, in percent."""
    return 100 * float((scores.argmax(-1) == labels).mean())


def measure(runs: Runs, variables: Any, seed: int) -> dict[str, float]:
    """Measures one seed; see above."""
    branches = runs.parts.branches()
    groups = {name: branch.assignment for name, branch in branches.items()}
    outputs, labels = collect(runs, variables, "test", seed)
    accuracies = {MAIN: percent(outputs[MAIN], labels)}
    for eta in ETAS:
        accuracies[f"eta {eta:g}"] = percent(JointProbability(groups, eta)(outputs), labels)
    fitted = FittedJointProbability(groups)
    held_out = collect(runs, variables, fitted.split, seed)
    power = fitted.fit(*held_out)
    accuracies |= {"eta, fitted": float(power), "fitted": percent(fitted(outputs, power), labels)}
    linear = runs.parts.predictions["linear"].split
    examples = collect(runs, variables, linear, seed)
    for name, outputs_used in (("linear", ()), ("linear, main alone", (MAIN,))):
        rule = LinearCombination(groups, split=linear, outputs=outputs_used)
        accuracies[name] = percent(rule(outputs, rule.fit(*examples)), labels)
    accuracies |= _by_split(runs, variables, seed, groups, (outputs, labels))
    return accuracies | of_groups(outputs, labels, branches)


def _by_split(
    runs: Runs,
    variables: Any,
    seed: int,
    groups: Mapping[str, tuple[int, ...]],
    test: tuple[Outputs, Array],
) -> dict[str, float]:
    """Fits the linear combination to what the network was trained on, and to what it was not."""
    outputs, labels = test
    seen = {split: collect(runs, variables, split, seed) for split in ("train", "validation")}
    # As many of both, so that only what the network knows of them differs.
    number = min(len(split_labels) for _, split_labels in seen.values())
    accuracies = {"main, training images": percent(seen["train"][0][MAIN], seen["train"][1])}
    for split, name in (("train", "training"), ("validation", "held-out")):
        examples: Any = jax.tree.map(lambda x: x[:number], seen[split])
        rule = LinearCombination(groups, split=split)
        accuracies[f"linear, {name} images"] = percent(rule(outputs, rule.fit(*examples)), labels)
    return accuracies


def main() -> None:
    """Runs the program with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--json", type=Path, default=Path("docs/results/joint_prediction.json"))
    options, overrides = parser.parse_known_args()
    runs = open_run(options.workdir, overrides)
    weights = kept_weights(runs, options.workdir, used=None)
    by_seed = []
    for seed in range(runs.config.seeds):
        state = weights.variables
        variables = jax.tree.map(lambda x, seed=seed: jnp.asarray(x)[seed], state)
        by_seed.append(measure(runs, variables, seed))
    lines = [["", *(f"seed {i}" for i in range(len(by_seed))), "mean"]]
    for name in by_seed[0]:
        values = [accuracies[name] for accuracies in by_seed]
        lines.append([name, *(f"{x:.2f}" for x in (*values, np.mean(values)))])
    print(align(lines))
    options.json.write_text(json.dumps({**machine(), "seeds": by_seed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
