"""A run in memory: the loop over epochs and batches that a notebook would write."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from tqdm import tqdm

from sire_jax import objectives as objectives_
from sire_jax.data.augmentation import Augmentation
from sire_jax.metrics import Average, Metrics, means
from sire_jax.prediction import Prediction
from sire_jax.runs.divergence import NonFiniteLossError, what_broke
from sire_jax.runs.parallel import NEVER, never_broken, one_step, shuffle
from sire_jax.state import INITIAL, TrainState
from sire_jax.step import find_reach, make_measure, make_step
from sire_jax.updates import UpdateRule

PyTree = Any
Batch = Mapping[str, Any]
# {"train": {"main/loss": [epochs], …}, "test": {"main/top_1": [epochs], …}}
History = dict[str, dict[str, np.ndarray]]


def fit(
    network: nn.Module,
    objectives: objectives_.Objectives,
    rule: UpdateRule | Callable[[Mapping[str, PyTree]], UpdateRule],
    train: Batch,
    test: Batch | None = None,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    augment: Augmentation | None = None,
    predictions: Mapping[str, Prediction] | None = None,
    evaluate_batch_size: int = 500,
) -> tuple[TrainState, History]:
    """Trains a network on arrays in memory, and measures it after every epoch.

    The numbers are those of a run of the same parts and seed from a config. What is left over of an
    epoch's examples after the last full batch waits for another epoch.

    >>> from functools import partial
    >>> import optax, sire_jax as sj
    >>> digits = sj.data.load("digits")
    >>> network = sj.Network(sj.backbones.SmallCNN(classes=10), {})
    >>> objectives = {"main": sj.Objective("main", "label", sj.cross_entropy)}
    >>> state, history = sj.fit(
    ...     network,
    ...     objectives,
    ...     partial(sj.joint, optax.adam(3e-3)),
    ...     digits.train.batch(),
    ...     digits.test.batch(),
    ...     epochs=3,
    ...     batch_size=50,
    ... )
    >>> {name: values.shape for name, values in history["test"].items()}
    {'main/loss': (3,), 'main/top_1': (3,), 'main/top_5': (3,)}

    Args:
        network: Returns named outputs, such as a ``Network``.
        objectives: Objectives by name.
        rule: An update rule, or a function that makes one of what each objective reaches
            (``find_reach``): ``functools.partial(joint, optax.adam(1e-3))``.
        train: ``"image"`` and targets, arrays of ``n`` examples each.
        test: Likewise, what is measured after every epoch; by default nothing is.
        epochs: How often all training examples are seen, at least 1.
        batch_size: Examples in a batch, in 1..n.
        seed: Of the initial parameters, the order of the examples, dropout and augmentation.
        augment: Changes a batch under a random key; nothing by default.
        predictions: Prediction rules by name that are measured, too; none that is fitted.
        evaluate_batch_size: Examples measured at once.

    Returns:
        The state after the last step, and the history: for ``"train"`` and ``"test"`` each metric
        as an array with a value for each epoch. Losses of ``"train"`` are means over the steps of
        the epoch, as they were taken.

    Raises:
        ValueError: If a number is out of range, arrays differ in length, or the objectives don't
            fit the outputs and the batch (``find_reach``).
        NonFiniteLossError: If a loss is not finite.
    """
    examples = _check(train, test, epochs, batch_size)
    train, test = jax.device_put((dict(train), dict(test or {})))
    key = jax.random.key(seed)
    variables = jax.jit(network.init)(jax.random.fold_in(key, INITIAL), train["image"][:1])
    if not isinstance(rule, UpdateRule):
        rule = rule(find_reach(network.apply, objectives, variables, _chosen(train, slice(1))))
    step = one_step(make_step(network.apply, objectives, rule, augment))

    def take(state: TrainState, sums: Metrics, broken: Any, batch: Batch, chosen: Array) -> Any:
        return step(state, sums, broken, _chosen(batch, chosen))

    take = jax.jit(take, donate_argnums=(0, 1, 2))
    order = jax.jit(shuffle, static_argnums=3)
    measure = jax.jit(make_measure(network.apply, objectives, predictions))
    state = TrainState.start(key, variables, rule)
    rows: dict[str, list[dict[str, Array]]] = {"train": [], "test": []}
    # None: a bar on a terminal, nothing elsewhere.
    with tqdm(total=epochs * (examples // batch_size), unit="step", disable=None) as bar:
        for epoch in range(epochs):
            sums = _nothing(objectives)
            broken = never_broken(sums)
            for chosen in order(state.key, epoch, jnp.arange(examples), batch_size):
                state, sums, broken = take(state, sums, broken, train, chosen)
                bar.update()
            _check_finite(broken, seed)
            rows["train"].append(means(sums))
            if test:
                measured = _measured(measure, state, test, evaluate_batch_size)
                rows["test"].append(means(measured))
                bar.set_postfix_str(_shown(rows["test"][-1]))
    return state, {split: _columns(each) for split, each in rows.items() if each}


def _check(train: Batch, test: Batch | None, epochs: int, batch_size: int) -> int:
    """Checks the arguments of ``fit``; returns the number of training examples."""
    examples = _examples("train", train)
    if test is not None:
        _examples("test", test)
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it should be at least 1.")
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size is {batch_size}; it should be in 1..{examples}, the number of examples."
        )
    return examples


def _examples(what: str, batch: Batch) -> int:
    lengths = {name: np.shape(values)[:1] for name, values in batch.items()}
    if "image" not in lengths:
        raise ValueError(
            f"{what} has {', '.join(sorted(lengths)) or 'nothing'}; it should have the inputs of"
            " the network as 'image', and targets."
        )
    if len(set(lengths.values())) > 1 or not all(lengths["image"]):
        shapes = ", ".join(f"{name} {list(np.shape(values))}" for name, values in batch.items())
        raise ValueError(
            f"{what} has arrays of {shapes}; all should have the same number of examples first."
        )
    return int(lengths["image"][0])


def _chosen(batch: Batch, examples: Any) -> dict[str, Array]:
    return {name: values[examples] for name, values in batch.items()}


def _nothing(objectives: objectives_.Objectives) -> Metrics:
    zeros = {f"{name}/loss": jnp.zeros(2) for name in (*objectives, "total")}
    return {name: Average(*each) for name, each in zeros.items()}


def _check_finite(broken: Mapping[str, Array], seed: int) -> None:
    """Refuses to go on with what no later step can mend."""
    steps = {name: int(step) for name, step in broken.items()}
    name = min(steps, key=lambda name: (steps[name], name == "total/loss"))
    if steps[name] != NEVER:
        raise NonFiniteLossError(
            f"{what_broke(name, steps[name], seed)} Try a smaller learning rate or weight, or"
            " optax.clip_by_global_norm ahead of the optimizer."
        )


def _measured(measure: Any, state: TrainState, test: Batch, size: int) -> Metrics:
    """Measures all examples in batches of one size; what fills up the last one counts nothing."""
    total = len(test["image"])
    size = min(size, total)
    sums: list[Metrics] = []
    for start in range(0, total, size):
        indices = np.arange(start, start + size)
        batch = _chosen(test, np.minimum(indices, total - 1))
        sums.append(measure(state.params, state.model_state, batch, jnp.asarray(indices < total)))
    return jax.tree.map(lambda *each: sum(each[1:], each[0]), *sums)


def _shown(measured: Mapping[str, Array]) -> str:
    """Says how good the main output is, for the bar."""
    name = "main/top_1" if "main/top_1" in measured else min(measured)
    return f"test {name} {float(measured[name]):.3f}"


def _columns(rows: list[dict[str, Array]]) -> dict[str, np.ndarray]:
    return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
