"""A run in memory: the loop over epochs and batches that a notebook would write."""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from tqdm import tqdm

from sire_jax.data.augmentation import Augmentation
from sire_jax.metrics import Average, Metrics, is_label, means
from sire_jax.objectives import Objectives, accurate
from sire_jax.predictions import Prediction, is_fitted
from sire_jax.registry import located
from sire_jax.runs.divergence import NonFiniteLossError, first_broken, what_broke
from sire_jax.runs.parallel import NEVER, never_broken, one_step, shuffle
from sire_jax.state import INITIAL, TrainState, parted
from sire_jax.step import find_reach, make_measure, make_step
from sire_jax.text import nearest
from sire_jax.updates import UpdateRule
from sire_jax.weights import scaled

PyTree = Any
Batch = Mapping[str, Any]
# {"train": {"main/loss": [epochs], …}, "test": {"main/top_1": [epochs], …}}
History = dict[str, dict[str, np.ndarray]]


def fit(
    network: nn.Module,
    objectives: Objectives,
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

    The numbers are those of a run of the same parts and seed from a config whose images are on the
    device, and whose initial values are those of its modules. What is left over of an epoch's
    examples after the last full batch waits for another epoch. Each call compiles anew, but for
    those of a function that ``make_fit`` has made.

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
        augment: Changes a batch under a random key, such as ``data.augmentation.Flip()``; nothing
            by default.
        predictions: Prediction rules by name that are measured on ``test``, too; none that is
            fitted.
        evaluate_batch_size: Examples measured at once, at least 1.

    Returns:
        The state after the last step, and the history: for ``"train"`` and ``"test"`` each metric
        as an array with a value for each epoch. Losses of ``"train"`` are means over the steps of
        the epoch, as they were taken.

    Raises:
        ValueError: If a number is out of range, arrays differ in length, labels are outside of
            their classes, or objectives or predictions don't fit the outputs and the batch.
        NonFiniteLossError: If a loss or a parameter is not finite.
    """
    run = make_fit(network, objectives, rule, augment, predictions)
    settings = {"batch_size": batch_size, "seed": seed, "evaluate_batch_size": evaluate_batch_size}
    return run(train, test, epochs=epochs, **settings)


def make_fit(
    network: nn.Module,
    objectives: Objectives,
    rule: UpdateRule | Callable[[Mapping[str, PyTree]], UpdateRule],
    augment: Augmentation | None = None,
    predictions: Mapping[str, Prediction] | None = None,
) -> Callable[..., tuple[TrainState, History]]:
    """Makes a ``fit`` that compiles once for several seeds, numbers of epochs or sets of examples.

    >>> import optax, sire_jax as sj
    >>> digits = sj.data.load("digits")
    >>> network = sj.Network(sj.backbones.SmallCNN(classes=10), {})
    >>> objectives = {"main": sj.Objective("main", "label", sj.cross_entropy)}
    >>> fit = sj.make_fit(network, objectives, lambda reach: sj.joint(optax.adam(3e-3), reach))
    >>> runs = [fit(digits.test.batch(), epochs=1, batch_size=50, seed=seed) for seed in range(2)]
    >>> [int(state.step) for state, history in runs]
    [11, 11]

    Args:
        network: As of ``fit``, as are the others.
        objectives: Objectives by name.
        rule: An update rule, or a function that makes one.
        augment: Changes a batch under a random key.
        predictions: Prediction rules by name.

    Returns:
        A function of the other arguments of ``fit``, which returns and raises what that does, and
        of ``factors``: what the weights of objectives are multiplied by in this run, by name; 0
        leaves one out.

    Raises:
        ValueError: If a prediction has to be fitted.
    """
    _check_predictions(predictions or {})
    init = jax.jit(network.init)
    measure = jax.jit(make_measure(network.apply, objectives, predictions))
    order = jax.jit(shuffle, static_argnums=3)

    # What a seed changes is no shape.
    @functools.cache
    def prepare(shapes: tuple[Any, ...], structure: Any) -> tuple[UpdateRule, Callable[..., Any]]:
        variables, example = jax.tree.unflatten(structure, shapes)
        made = rule
        if not isinstance(made, UpdateRule):
            made = _made(rule, find_reach(network.apply, objectives, variables, example))

        def take(
            factors: Any, state: TrainState, sums: Metrics, broken: Any, arrays: Batch, rows: Array
        ) -> Any:
            weighted = scaled(objectives, factors)
            step = one_step(make_step(network.apply, weighted, made, augment))
            return step(state, sums, broken, _some(arrays, rows))

        program = jax.jit(take, donate_argnums=(1, 2, 3), compiler_options=made.compiler_options)
        return made, program

    def fit(
        train: Batch,
        test: Batch | None = None,
        *,
        epochs: int,
        batch_size: int,
        seed: int = 0,
        evaluate_batch_size: int = 500,
        factors: Mapping[str, float] | None = None,
    ) -> tuple[TrainState, History]:
        multiplied = dict.fromkeys(objectives, 1.0) | _check_factors(factors or {}, objectives)
        examples = _check_numbers(train, test, epochs, batch_size, evaluate_batch_size)
        # Python's: narrow ones of NumPy would overflow.
        epochs, batch_size, evaluate_batch_size = map(
            int, (epochs, batch_size, evaluate_batch_size)
        )
        train, test = jax.device_put((dict(train), dict(test or {})))
        key = jax.random.key(seed)
        variables = init(jax.random.fold_in(key, INITIAL), train["image"][:1])
        outputs = jax.eval_shape(network.apply, variables, train["image"][:1])
        for name, batch in {"train": train, "test": test}.items():
            if batch:
                with located(name):
                    jax.eval_shape(measure, *parted(variables), batch)
                _check_labels(name, batch, objectives, outputs)
        shapes = jax.eval_shape(lambda tree: tree, (variables, _some(train, slice(1))))
        leaves, structure = jax.tree.flatten(shapes)
        update_rule, program = prepare(tuple(leaves), structure)
        # Copied, as the state is donated: an optimizer's may hold the parameters themselves.
        state = jax.tree.map(jnp.copy, TrainState.start(key, variables, update_rule))
        rows: dict[str, list[dict[str, Array]]] = {"train": [], "test": []}
        steps = epochs * (examples // batch_size)
        with tqdm(total=steps, unit="step", disable=_is_silent()) as bar:
            for epoch in range(epochs):
                sums = _nothing(objectives)
                broken = never_broken(sums)
                for chosen in order(state.key, epoch, jnp.arange(examples), batch_size):
                    books = state, sums, broken
                    state, sums, broken = program(multiplied, *books, train, chosen)
                    bar.update()
                _check_finite(broken, state, seed)
                rows["train"].append(means(sums))
                if test:
                    measured = _measured(measure, state, test, evaluate_batch_size)
                    rows["test"].append(means(measured))
                    bar.set_postfix_str(_shown(rows["test"][-1]))
        return state, {split: _columns(lines) for split, lines in rows.items() if lines}

    return fit


def _check_numbers(
    train: Batch, test: Batch | None, epochs: int, batch_size: int, evaluate_batch_size: int
) -> int:
    """Checks the arguments of ``fit``; returns the number of training examples."""
    examples = _examples("train", train)
    if test is not None:
        _examples("test", test)
    numbers = {"epochs": epochs, "evaluate_batch_size": evaluate_batch_size}
    for name, value in {**numbers, "batch_size": batch_size}.items():
        # NumPy's whole numbers, too.
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it should be a whole number.")
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it should be at least 1.")
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size is {batch_size}; it should be in 1..{examples}, the number of examples."
        )
    return examples


def _check_factors(factors: Mapping[str, float], objectives: Objectives) -> dict[str, float]:
    for name, factor in factors.items():
        if name not in objectives:
            raise ValueError(f"There is no objective '{name}'.{nearest(name, objectives)}")
        number = isinstance(factor, int | float | np.floating) and not isinstance(factor, bool)
        if not (number and 0 <= factor < math.inf):
            raise ValueError(
                f"The factor of the objective '{name}' is {factor!r}; it should be finite and at"
                " least 0."
            )
    return {name: float(factor) for name, factor in factors.items()}


def _examples(what: str, batch: Batch) -> int:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{what} is a {type(batch).__name__}; it should be a mapping of arrays, such as"
            " digits.train.batch()."
        )
    if "image" not in batch:
        raise ValueError(
            f"{what} has {', '.join(sorted(batch)) or 'nothing'}; it should have the inputs of the"
            " network as 'image', and targets."
        )
    lengths = {np.shape(values)[:1] for values in jax.tree.leaves(dict(batch))}
    if len(lengths) > 1 or not all(lengths) or (0,) in lengths:
        shapes = ", ".join(
            f"{name} {[list(np.shape(x)) for x in jax.tree.leaves(values)]}"
            for name, values in batch.items()
        )
        raise ValueError(
            f"{what} has arrays of {shapes}; all should have the same number of examples first."
        )
    return int(lengths.pop()[0])


def _made(rule: Any, reach: Mapping[str, PyTree]) -> UpdateRule:
    """Makes an update rule of what objectives reach."""
    made = rule(reach) if callable(rule) and _takes_one(rule) else None
    if not isinstance(made, UpdateRule):
        raise ValueError(
            f"The rule is {rule!r}; it should be an update rule, or make one of what"
            " each objective reaches: functools.partial(sj.joint, optax.adam(1e-3))."
        )
    return made


def _takes_one(rule: Callable[..., Any]) -> bool:
    """Tells whether one argument is enough: not for ``sj.joint``, which needs an optimizer, too."""
    try:
        inspect.signature(rule).bind(None)
    except TypeError:
        return False
    return True


def _check_predictions(predictions: Mapping[str, Prediction]) -> None:
    for name, predict in predictions.items():
        if not callable(predict):
            raise ValueError(
                f"The prediction '{name}' is {predict!r}; it should be a rule such as"
                " sj.Output('exit')."
            )
        if is_fitted(predict):
            raise ValueError(
                f"The prediction '{name}' is fitted to a trained network: call its fit with the"
                " outputs (make_predict) of images that were held out."
            )


def _check_labels(
    what: str, batch: Batch, objectives: Objectives, outputs: Mapping[str, Any]
) -> None:
    """Checks, as values are known, that labels that count are classes."""
    for name in accurate(objectives, outputs, _some(batch, slice(1))):
        objective = objectives[name]
        # One logit is a choice of two.
        classes = max(outputs[objective.output].shape[-1], 2)
        labels, counts = batch[objective.target], objective.counts(batch)
        outside = ~np.asarray(is_label(jnp.asarray(labels), classes))
        if counts is not None:
            counted = np.asarray(counts) > 0
            outside &= counted.reshape(*counted.shape, *(1,) * (outside.ndim - counted.ndim))
        if outside.any():
            first = tuple(int(i) for i in np.argwhere(outside)[0])
            raise ValueError(
                f"{what} has {outside.sum()} labels '{objective.target}' outside of the {classes}"
                f" classes 0..{classes - 1} of the output '{objective.output}': the first is"
                f" {np.asarray(labels)[first]} at index {first[0]}."
            )


def _is_silent() -> bool:
    """Tells whether there is nobody to look at a bar: neither a terminal nor a notebook."""
    return not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def _some(batch: Batch, examples: Any) -> dict[str, Any]:
    return jax.tree.map(lambda values: values[examples], dict(batch))


def _nothing(objectives: Objectives) -> Metrics:
    zeros = {f"{name}/loss": jnp.zeros(2) for name in (*objectives, "total")}
    return {name: Average(*sums) for name, sums in zeros.items()}


def _check_finite(broken: Mapping[str, Array], state: TrainState, seed: int) -> None:
    """Refuses to go on with what no later step can mend."""
    steps = {name: int(step) for name, step in broken.items()}
    name, advice = first_broken(steps), "Try a smaller learning rate or weight, or"
    advice += " optax.clip_by_global_norm ahead of the optimizer."
    if steps[name] != NEVER:
        raise NonFiniteLossError(f"{what_broke(name, steps[name], seed)} {advice}")
    # Losses are taken before an update.
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)):
        raise NonFiniteLossError(
            f"The parameters are not finite after {int(state.step)} steps. {advice}"
        )


def _measured(measure: Any, state: TrainState, test: Batch, size: int) -> Metrics:
    """Measures all examples in batches of one size; what fills up the last one counts nothing."""
    total = len(jax.tree.leaves(test)[0])
    size = min(size, total)
    sums: list[Metrics] = []
    for start in range(0, total, size):
        indices = np.arange(start, start + size)
        batch = _some(test, np.minimum(indices, total - 1))
        sums.append(measure(state.params, state.model_state, batch, jnp.asarray(indices < total)))
    return jax.tree.map(lambda first, *others: sum(others, first), *sums)


def _shown(measured: Mapping[str, Array]) -> str:
    """Says how good the main output is, for the bar."""
    name = "main/top_1" if "main/top_1" in measured else min(measured)
    return f"test {name} {float(measured[name]):.3f}"


def _columns(rows: list[dict[str, Array]]) -> dict[str, np.ndarray]:
    return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
