"""The training step and the measurement of a batch: pure functions, written once.

``jit``, ``vmap`` over seeds and loops over steps are wrappers around them (``sire_jax.parallel``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax import metrics, objectives, prediction, traced
from sire_jax.data.augmentation import Augmentation, Batch
from sire_jax.fitted_prediction import is_fitted
from sire_jax.layers import batch_over
from sire_jax.metrics import Average, Metrics
from sire_jax.updates import Losses, UpdateRule

PyTree = Any
Apply = Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
        step: Number of steps taken, int32.
        key: The run's random key; never changes: a step's key is derived from it and ``step``.
        params: Parameters.
        model_state: Other variables of the network, such as batch statistics.
        update_state: State of the update rule.
    """

    step: Array
    key: Array
    params: PyTree
    model_state: PyTree
    update_state: PyTree

    @classmethod
    def start(cls, key: Array, variables: Mapping[str, PyTree], rule: UpdateRule) -> "TrainState":
        """Returns the state before the first step.

        Args:
            key: The run's random key.
            variables: What ``init`` of the network returned.
            rule: Update rule.

        Returns:
            The state.
        """
        model_state = {kind: values for kind, values in variables.items() if kind != "params"}
        params = variables["params"]
        return cls(
            step=jnp.zeros((), jnp.int32),
            key=key,
            params=params,
            model_state=model_state,
            update_state=rule.init(params),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Best:
    """The weights with the best validation accuracy so far.

    Attributes:
        score: That accuracy, in [0, 1]; -1 before the first.
        step: After how many steps.
        params: Parameters.
        model_state: Other variables of the network.
    """

    score: Array
    step: Array
    params: PyTree
    model_state: PyTree

    @classmethod
    def start(cls, state: TrainState) -> "Best":
        """Returns what any measured weights replace."""
        score = jnp.asarray(-1.0, jnp.float32)
        return cls._of(score, state)

    def update(self, score: Array, state: TrainState) -> "Best":
        """Returns the better of this and a state with ``score``; the earlier one where equal."""
        new = Best._of(score, state)
        return jax.tree.map(lambda a, b: jnp.where(score > self.score, a, b), new, self)

    @classmethod
    def _of(cls, score: Array, state: TrainState) -> "Best":
        return cls(score=score, step=state.step, params=state.params, model_state=state.model_state)


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Measure = Callable[..., Metrics]
Predict = Callable[[PyTree, PyTree, Batch], tuple[dict[str, Array], Array]]


@dataclass(frozen=True)
class Shared:
    """A batch of which each device has a part, under ``pmap`` or ``shard_map``.

    Attributes:
        axis: Name of the axis of devices.
        batch_norm: Whether batch statistics are those of the whole batch, or of each part.
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
        same = jax.custom_jvp(lambda p: p)
        same.defjvp(lambda primals, tangents: (primals[0], self.mean(tangents[0])))
        return same(params)


def make_losses(
    apply: Apply,
    chosen: objectives.Objectives,
    batch: Batch,
    dropout: Array,
    shared: Shared | None = None,
) -> Losses:
    """Makes the function that an update rule differentiates.

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        chosen: Objectives by name.
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
            outputs, new_model_state = apply(
                {"params": params, **model_state},
                batch["image"],
                train=True,
                rngs={"dropout": dropout},
                mutable=list(model_state),
            )
        each = objectives.evaluate(chosen, outputs, batch)
        named = {name: values.mean() for name, values in each.items()}
        if shared:
            named, new_model_state = shared.mean((named, new_model_state))
        return named, (outputs, new_model_state)

    return losses


def find_reach(
    apply: Apply, chosen: objectives.Objectives, variables: Mapping[str, PyTree], batch: Batch
) -> dict[str, PyTree]:
    """Finds which parameters each objective's gradient reaches in training (``traced.reach``).

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        chosen: Objectives by name.
        variables: Variables of the network, or their shapes.
        batch: Images and targets, or their shapes.

    Returns:
        For each objective a tree of booleans over the parameters.
    """
    state = {kind: values for kind, values in variables.items() if kind != "params"}
    key = jax.random.key(0)

    def losses(params: PyTree, state: PyTree, batch: Batch) -> dict[str, Array]:
        return make_losses(apply, chosen, batch, key)(params, state)[0]

    return traced.reach(losses, variables["params"], state, dict(batch))


def make_step(
    apply: Apply,
    chosen: objectives.Objectives,
    rule: UpdateRule,
    augment: Augmentation | None = None,
    shared: Shared | None = None,
) -> Step:
    """Makes the training step.

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        chosen: Objectives by name.
        rule: Update rule.
        augment: Changes a batch under a random key; nothing by default.
        shared: Says that the batch of a step is this device's part of one.

    Returns:
        A pure function from ``(state, batch)`` to ``(state, metrics)``; the metrics are
        ``"<objective>/loss"`` and their sum with the objectives' own weights, ``"total/loss"``:
        what a rule descends may be weighted otherwise.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        augmenting, dropout, updating = keys
        if shared:
            augmenting, dropout = shared.own(augmenting), shared.own(dropout)
        batch = augment(augmenting, batch) if augment else batch
        losses = make_losses(apply, chosen, batch, dropout, shared)
        weights = objectives.weights(chosen, state.step)
        updated = rule.update(
            losses, weights, state.params, state.model_state, state.update_state, updating
        )
        parts = jax.lax.axis_size(shared.axis) if shared else 1
        count = jnp.asarray(parts * batch["image"].shape[0], jnp.float32)
        named = {f"{name}/loss": loss for name, loss in updated.losses.items()}
        named["total/loss"] = objectives.weighted_sum(updated.losses, weights)
        new = replace(
            state,
            step=state.step + 1,
            params=updated.params,
            model_state=updated.model_state,
            update_state=updated.state,
        )
        return new, {name: Average(total=loss * count, count=count) for name, loss in named.items()}

    return step


def make_measure(
    apply: Apply,
    chosen: objectives.Objectives,
    predictions: Mapping[str, prediction.Prediction] | None = None,
) -> Measure:
    """Makes the measurement of a batch in evaluation mode.

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        chosen: Objectives by name.
        predictions: Prediction rules by name, if any.

    Returns:
        A pure function from ``(params, model_state, batch, mask, fitted)`` to metrics:
        ``"<objective>/loss"``; ``"<output>/top_1"`` and ``"<output>/top_5"`` of outputs that
        classify; ``"<prediction>/top_1"`` and ``"<prediction>/loss"``, the negative log probability
        of the label. Rules that are fitted are measured if their parameters are in ``fitted``,
        which may be left out. Examples where ``mask`` is 0 don't count.
    """

    def measure(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        mask: Array,
        fitted: Mapping[str, PyTree] | None = None,
    ) -> Metrics:
        outputs = apply({"params": params, **model_state}, batch["image"], train=False)
        found: Metrics = {}
        for name, values in objectives.evaluate(chosen, outputs, batch).items():
            found[f"{name}/loss"] = Average.of(values, mask)
        for objective in chosen.values():
            output, target = outputs[objective.output], batch[objective.target]
            if metrics.is_classification(output, target):
                found |= metrics.classification(objective.output, output, target, mask)
        for name, predict in (predictions or {}).items():
            if not is_fitted(predict):
                predicted = predict(outputs)
            elif fitted and name in fitted:
                predicted = predict(outputs, fitted[name])
            else:
                continue
            found |= _measure_prediction(name, predicted, batch["label"], mask)
        return found

    return measure


def make_predict(apply: Apply, names: Sequence[str]) -> Predict:
    """Makes the function whose results prediction rules are fitted to.

    Args:
        apply: ``apply`` of a Flax network that returns named outputs.
        names: The outputs.

    Returns:
        A pure function from ``(params, model_state, batch)`` to these outputs, in evaluation mode,
        and the labels.
    """

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
        outputs = apply({"params": params, **model_state}, batch["image"], train=False)
        return {name: outputs[name] for name in names}, batch["label"]

    return predict


def _measure_prediction(name: str, log_probability: Array, label: Array, mask: Array) -> Metrics:
    right = jnp.take_along_axis(log_probability, label[:, None], axis=-1)
    found = metrics.classification(name, log_probability, label, mask)
    return {**found, f"{name}/loss": Average.of(-right, mask)}
