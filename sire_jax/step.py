"""The training step and the measurement of a batch: pure functions, written once.

``jit``, ``vmap`` over seeds and loops over steps are wrappers around it (``runs.parallel``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax import metrics, traced
from sire_jax.data.augmentation import Augmentation, Batch
from sire_jax.layers import batch_over
from sire_jax.metrics import Average, Metrics
from sire_jax.objectives import (
    Objectives,
    accurate,
    check_keys,
    evaluate,
    example_counts,
    weighted_sum,
)
from sire_jax.objectives import weights as weights_at
from sire_jax.predictions import Prediction, is_fitted
from sire_jax.predictions import check as check_predictions
from sire_jax.state import TrainState, apply_in_training, parted
from sire_jax.updates import Losses, UpdateRule

PyTree = Any
Apply = Callable[..., Any]


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Measure = Callable[..., Metrics]
Predict = Callable[[PyTree, PyTree, Batch], tuple[dict[str, Array], Array]]


@dataclass(frozen=True)
class Shared:
    """A batch of which each device has a part, under ``pmap`` or ``shard_map``.

    Several devices of one CPU need ``NPROC`` in the environment, above their number: without a
    thread of XLA to spare long programs compute wrong convolutions.

    Attributes:
        axis: Name of the axis of devices.
        batch_norm: Whether batch statistics are those of the whole batch, or of each part. Those
            that a module of one's own takes are of each part, unless it averages over ``axis``.
    """

    axis: str
    batch_norm: bool = True

    def own(self, key: Array) -> Array:
        """Returns a random key of this device's own."""
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis))

    def mean(self, tree: PyTree) -> PyTree:
        """Averages over the devices."""
        return jax.lax.pmean(tree, self.axis)

    def averaging(self, params: PyTree) -> PyTree:
        """Returns the parameters as they are; any gradient by them is averaged over the devices.

        So an update rule sees gradients of the whole batch, whatever it does with them.
        """
        identity = jax.custom_jvp(lambda p: p)
        identity.defjvp(lambda primals, tangents: (primals[0], self.mean(tangents[0])))
        return identity(params)


def make_losses(
    apply: Apply,
    objectives: Objectives,
    batch: Batch,
    dropout: Array,
    shared: Shared | None = None,
) -> Losses:
    """Makes the function that an update rule differentiates.

    >>> import sire_jax as sj
    >>> apply = lambda variables, image, **_: ({"main": image @ variables["params"]["w"]}, {})
    >>> objectives = {"main": sj.Objective("main", "label", sj.cross_entropy)}
    >>> batch = {"image": jnp.eye(2), "label": jnp.array([0, 0])}
    >>> losses = make_losses(apply, objectives, batch, jax.random.key(0))
    >>> named, (outputs, _) = jax.jit(losses)({"w": jnp.zeros((2, 2))}, {})
    >>> named["main"].round(2)  # log 2
    Array(0.69, dtype=float32)

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        objectives: Objectives by name.
        batch: Images and targets.
        dropout: Random key for dropout.
        shared: Says that the batch is this device's part of one.

    Returns:
        A function from ``(params, model_state)`` to ``({name: scalar}, (outputs, new model
        state))``; a loss is a mean over the whole batch, without its weight, and its gradient is
        that of this mean.
    """

    def losses(params: PyTree, model_state: PyTree) -> Any:
        params = shared.averaging(params) if shared else params
        with batch_over(shared.axis if shared and shared.batch_norm else None):
            outputs, new_model_state = apply_in_training(
                apply, params, model_state, _images(batch), dropout
            )
        values = evaluate(objectives, outputs, batch)
        counts = example_counts(objectives, batch)
        named = {name: _mean(terms, counts[name], shared) for name, terms in values.items()}
        if shared:
            named, new_model_state = shared.mean((named, new_model_state))
        return named, (outputs, new_model_state)

    return losses


def _images(batch: Batch) -> Any:
    if "image" not in batch:
        raise ValueError(
            f"A batch has {', '.join(sorted(batch)) or 'nothing'}; it should have the inputs of the"
            " network as 'image'."
        )
    return batch["image"]


def _examples(batch: Batch) -> int:
    """Returns the number of examples in a batch, whose inputs may be a tree of arrays."""
    return len(jax.tree.leaves(_images(batch))[0])


def _mean(values: Array, counts: Array | None, shared: Shared | None) -> Array:
    """Averages the losses of the examples that count; 0 where none does.

    Where devices share a batch, the average of this over the devices is that of the whole batch.
    """
    if counts is None:
        return values.mean()
    # What all devices count, a share each.
    whole = shared.mean(counts.sum()) if shared else counts.sum()
    total = (values * counts.astype(values.dtype)).sum()
    return jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1).astype(values.dtype), 0)


def find_reach(
    apply: Apply, objectives: Objectives, variables: Mapping[str, PyTree], batch: Batch
) -> dict[str, PyTree]:
    """Finds which parameters each objective's gradient reaches in training (``traced.reach``).

    >>> import sire_jax as sj
    >>> def apply(variables, image, **_):
    ...     middle = image @ variables["params"]["middle"]
    ...     return {"exit": middle, "main": middle @ variables["params"]["main"]}, {}
    >>> objectives = {k: sj.Objective(k, "label", sj.cross_entropy) for k in ("exit", "main")}
    >>> variables = {"params": {"middle": jnp.eye(2), "main": jnp.eye(2)}}
    >>> batch = {"image": jnp.eye(2), "label": jnp.array([0, 1])}
    >>> find_reach(apply, objectives, variables, batch)["exit"]
    {'main': False, 'middle': True}

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        objectives: Objectives by name.
        variables: Variables of the network, or their shapes.
        batch: Images and targets, or their shapes.

    Returns:
        For each objective a tree over the parameters: booleans, or what it reaches of a parameter
        that it does not reach whole (``slices.Partly``, ``slices.Unclear``).

    Raises:
        ValueError: If the objectives don't fit the outputs and the batch (``objectives.evaluate``),
            or a parameter is complex or an integer.
    """
    params, state = parted(variables)
    # Any key: what is reached does not depend on what is drawn.
    key = jax.random.key(0)

    def losses(params: PyTree, state: PyTree, batch: Batch) -> dict[str, Array]:
        return make_losses(apply, objectives, batch, key)(params, state)[0]

    return traced.reach(losses, params, state, dict(batch))


def make_step(
    apply: Apply,
    objectives: Objectives,
    rule: UpdateRule,
    augment: Augmentation | None = None,
    shared: Shared | None = None,
) -> Step:
    """Makes the training step.

    >>> import optax, sire_jax as sj
    >>> apply = lambda variables, image, **_: ({"main": image @ variables["params"]["w"]}, {})
    >>> objectives = {"main": sj.Objective("main", "label", sj.cross_entropy)}
    >>> rule = sj.joint(optax.sgd(1.0), {"main": {"w": True}})  # a reach, as by ``find_reach``
    >>> step = jax.jit(make_step(apply, objectives, rule))
    >>> state = TrainState.start(jax.random.key(0), {"params": {"w": jnp.zeros((2, 2))}}, rule)
    >>> state, metrics = step(state, {"image": jnp.eye(2), "label": jnp.array([0, 1])})
    >>> sorted(metrics), state.params["w"].tolist()
    (['main/loss', 'total/loss'], [[0.25, -0.25], [-0.25, 0.25]])

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        objectives: Objectives by name.
        rule: Update rule.
        augment: Changes a batch under a random key; nothing by default.
        shared: Says that the batch of a step is this device's part of one.

    Returns:
        A pure function from ``(state, batch)`` to ``(state, metrics)``; the metrics are
        ``"<objective>/loss"`` and their sum with the objectives' own weights, ``"total/loss"``:
        what a rule descends may be weighted otherwise. An objective of which no example counts in a
        batch has a loss and a weight of 0 in that step, and is not counted in its metric. What the
        network only writes (``nn.Module.sow``) is dropped. The function raises
        ``ValueError`` where the objectives don't fit the outputs and the batch
        (``objectives.evaluate``), as it is traced.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        augmenting, dropout, updating = keys
        if shared:
            # Not of the rule: it draws the same on all devices, so that parameters stay equal.
            augmenting, dropout = shared.own(augmenting), shared.own(dropout)
        batch = augment(augmenting, batch) if augment else batch
        losses = make_losses(apply, objectives, batch, dropout, shared)
        counted = _counted(objectives, batch, shared)
        weights = weights_at(objectives, state.step)
        # What is not in this batch has no weight in it: a rule leaves it out.
        weights |= {k: jnp.where(n > 0, weights[k], 0) for k, n in counted.items()}
        updated = rule.update(
            losses, weights, state.params, state.model_state, state.update_state, updating
        )
        parts = jax.lax.axis_size(shared.axis) if shared else 1
        whole = jnp.asarray(parts * _examples(batch), jnp.float32)
        counts = dict.fromkeys([*objectives, "total"], whole) | counted
        named = {**updated.losses, "total": weighted_sum(updated.losses, weights)}
        new = replace(
            state,
            step=state.step + 1,
            params=updated.params,
            model_state=updated.model_state,
            update_state=updated.state,
        )
        measured = {
            f"{name}/loss": Average(total=loss * counts[name], count=counts[name])
            for name, loss in named.items()
        }
        return new, measured

    return step


def _counted(objectives: Objectives, batch: Batch, shared: Shared | None) -> dict[str, Array]:
    """Returns how much the examples of the whole batch count, for objectives where not 1 each."""
    check_keys(objectives, batch)
    counts = example_counts(objectives, batch)
    sums = {name: count.sum() for name, count in counts.items() if count is not None}
    return jax.lax.psum(sums, shared.axis) if shared else sums


def make_measure(
    apply: Apply,
    objectives: Objectives,
    predictions: Mapping[str, Prediction] | None = None,
) -> Measure:
    """Makes the measurement of a batch in evaluation mode.

    >>> import sire_jax as sj
    >>> apply = lambda variables, image, train: {"main": image @ variables["params"]["w"]}
    >>> measure = make_measure(apply, {"main": sj.Objective("main", "label", sj.cross_entropy)})
    >>> batch = {"image": jnp.eye(2), "label": jnp.array([0, 0])}
    >>> measured = jax.jit(measure)({"w": jnp.eye(2)}, {}, batch)
    >>> {name: round(float(mean), 2) for name, mean in sj.means(measured).items()}
    {'main/loss': 0.81, 'main/top_1': 0.5}

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        objectives: Objectives by name.
        predictions: Prediction rules by name, if any.

    Returns:
        A pure function from ``(params, model_state, batch, mask, fitted)`` to metrics:
        ``"<objective>/loss"``; ``"<objective>/top_1"`` and ``"<objective>/top_5"`` of objectives
        that are ``labelled``; ``"<prediction>/top_1"`` and ``"<prediction>/loss"``, the negative
        log probability of the label. A metric counts what its objective counts, a prediction what
        the first objective on ``"label"`` does. ``mask``, ``[b]``, says how much each example
        counts beside that; 1 if it is left out. Rules that are fitted are measured if their
        parameters are in ``fitted``, which may be left out, too. The function raises ``ValueError``
        as ``objectives.evaluate`` and ``predictions.check`` do.
    """

    def measure(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        mask: Array | None = None,
        fitted: Mapping[str, PyTree] | None = None,
    ) -> Metrics:
        outputs = apply({"params": params, **model_state}, _images(batch), train=False)
        values = evaluate(objectives, outputs, batch)
        check_predictions(predictions or {}, outputs, objectives)
        counts = example_counts(objectives, batch)
        measured: Metrics = {
            f"{name}/loss": Average.of(terms, _times(mask, counts[name]))
            for name, terms in values.items()
        }
        for name in accurate(objectives, outputs, batch):
            objective = objectives[name]
            counted = _times(mask, objective.counts(batch))
            output, target = outputs[objective.output], batch[objective.target]
            measured |= metrics.classification(name, output, target, counted)
        # Without predictions a batch needs no "label".
        counted = _times(mask, _label_counts(objectives, batch)) if predictions else None
        for name, predict in (predictions or {}).items():
            if not is_fitted(predict):
                predicted = predict(outputs)
            elif fitted and name in fitted:
                predicted = predict(outputs, fitted[name])
            else:
                continue
            measured |= _measure_prediction(name, predicted, batch["label"], counted)
        return measured

    return measure


def _times(mask: Array | None, counts: Array | None) -> Array | None:
    """Multiplies what examples count, ``[b]``, with what they or their positions count."""
    if mask is None or counts is None:
        return counts if mask is None else mask
    return mask.reshape(-1, *(1,) * (counts.ndim - 1)) * counts


def _label_counts(objectives: Objectives, batch: Batch) -> Array | None:
    """Returns what the labels count that predictions are measured by."""
    if "label" not in batch:
        raise ValueError(
            f"Predictions are measured by 'label', which the batch lacks; it has"
            f" {', '.join(sorted(batch))}."
        )
    return next((o.counts(batch) for o in objectives.values() if o.target == "label"), None)


def make_predict(
    apply: Apply, names: Sequence[str], objectives: Objectives | None = None
) -> Predict:
    """Makes the function whose results prediction rules are fitted to.

    >>> apply = lambda variables, image, train: {"main": image @ variables["params"]["w"]}
    >>> predict = make_predict(apply, ["main"])
    >>> outputs, label = predict({"w": jnp.eye(2)}, {}, {"image": jnp.eye(2), "label": jnp.ones(2)})
    >>> outputs["main"].shape, label.shape
    ((2, 2), (2,))

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        names: The outputs.
        objectives: Objectives by name, which say which labels count; all do without.

    Returns:
        A pure function from ``(params, model_state, batch)`` to these outputs, in evaluation mode,
        and the labels, -1 where one does not count.
    """

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
        outputs = apply({"params": params, **model_state}, _images(batch), train=False)
        counts, label = _label_counts(objectives or {}, batch), batch["label"]
        counted = label if counts is None else jnp.where(counts > 0, label, -1)
        return {name: outputs[name] for name in names}, counted

    return predict


def _measure_prediction(
    name: str, log_probability: Array, label: Array, mask: Array | None
) -> Metrics:
    right = metrics.at_label(log_probability, label)
    measured = metrics.classification(name, log_probability, label, mask)
    return {**measured, f"{name}/loss": Average.of(-right, mask)}
