"""Prediction rules with parameters, which are fitted to outputs after training.

Such a rule has a ``split``, whose examples it is fitted to, ``fit(outputs, labels)``, which returns
its parameters, and is called with ``(outputs, parameters)``. The network is not changed. Of more
than ``MOST`` examples a part is taken, evenly: their outputs are kept in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from sire_jax.metrics import Average, at_label, class_logits, is_label
from sire_jax.networks import MAIN
from sire_jax.prediction import (
    Assignments,
    DigitOrder,
    JointProbability,
    Output,
    check_branches,
    log_joint,
)

# Examples that rules are fitted to, at most.
MOST = 50_000
Outputs = Mapping[str, Array]
_SPLITS = ("train", "validation")
# Halvings of an interval of length 1: as exact as float32.
_HALVINGS = 24


def _check_split(what: str, split: str) -> None:
    if split not in _SPLITS:
        raise ValueError(
            f"{what} is fitted to the split '{split}'; it should be 'train' or 'validation': what"
            " it is measured on is not for choosing."
        )


def _negative_log_likelihood(log_probability: Array, labels: Array) -> Array:
    """Returns a mean over the examples that have a label."""
    labelled = is_label(labels, log_probability.shape[-1])
    return Average.of(-at_label(log_probability, labels), labelled).mean()


@dataclass(frozen=True)
class FittedJointProbability:
    """``JointProbability`` with the eta that makes held-out labels most likely.

    ``eta = argmin -1/n sum_i log P(y_i)`` over (0, 1], in which it is convex: found by bisection of
    the slope. The paper chooses eta by accuracy; this one is also the best calibrated.

    Attributes:
        groups: The groups of the labels by branch (in a config, from the objectives' targets).
        split: ``"validation"`` or ``"train"``, whose examples it is fitted to.
    """

    groups: Assignments
    split: str = "validation"

    def __post_init__(self) -> None:
        _check_split("fitted_joint_probability", self.split)
        check_branches("fitted_joint_probability", (), self.groups)

    def needs(self) -> tuple[str, ...]:
        """Returns the outputs that the rule uses."""
        return (MAIN, *self.groups)

    def fit(self, outputs: Outputs, labels: Array) -> Array:
        """Returns eta, a scalar in (0, 1].

        Args:
            outputs: Logits ``[n, …]`` by output.
            labels: Integers ``[n]``.
        """

        def loss(eta: Array) -> Array:
            joint = log_joint(outputs, self.groups, eta)
            return _negative_log_likelihood(jax.nn.log_softmax(joint), labels)

        def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = (low + high) / 2
            falls = jax.grad(loss)(middle) < 0
            return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

        bracket = (jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))
        return lax.fori_loop(0, _HALVINGS, halve, bracket)[1]

    def __call__(self, outputs: Outputs, eta: Array) -> Array:
        """Returns log probabilities ``[b, classes]``."""
        return jax.nn.log_softmax(log_joint(outputs, self.groups, eta))


@dataclass(frozen=True)
class LinearCombination:
    """A linear classifier of all outputs' predictions, trained on the finished network's.

    ``P = softmax(W [log p; log p_1; log p_2; …] + b)`` (Palacio et al., *Contextual
    Classification*, Section 3.4: the learned linear combination). The paper does not say how it is
    trained. Here: cross entropy with ``penalty / 2`` times the squared distance from
    ``W = [I; 0; …]``, ``b = 0``, the main output alone, where it starts, by L-BFGS. Every joint
    probability is such a combination, as it multiplies probabilities.

    Attributes:
        groups: The groups of the labels by branch (in a config, from the objectives' targets).
        split: ``"train"`` or ``"validation"``, whose examples it is fitted to. On images that the
            network was trained on its outputs say more than they do on others.
        outputs: What is combined with the main output; by default all branches over groups.
            ``("main",)`` is the control: the main output alone, fitted in the same way.
        penalty: Of the distance from the main output alone, above 0.
        steps: Steps of L-BFGS.
    """

    groups: Assignments
    split: str = "validation"
    outputs: tuple[str, ...] = ()
    penalty: float = 1e-4
    steps: int = 200

    def __post_init__(self) -> None:
        _check_split("linear_combination", self.split)
        if not self.penalty > 0 or self.steps < 1:
            raise ValueError(
                f"linear_combination has penalty {self.penalty} and {self.steps} steps; the penalty"
                " should be above 0 and the steps at least 1."
            )
        if not self.outputs:
            check_branches("linear_combination", (), self.groups)

    def needs(self) -> tuple[str, ...]:
        """Returns the outputs that the rule uses."""
        return tuple(dict.fromkeys((MAIN, *(self.outputs or self.groups))))

    def fit(self, outputs: Outputs, labels: Array) -> dict[str, Array]:
        """Returns ``{"kernel": [inputs, classes], "bias": [classes]}``.

        Args:
            outputs: Logits ``[n, …]`` by output.
            labels: Integers ``[n]``.
        """
        features = self._features(outputs)
        classes = class_logits(outputs[MAIN]).shape[-1]
        kernel = jnp.eye(features.shape[-1], classes, dtype=jnp.float32)
        start = {"kernel": kernel, "bias": jnp.zeros(classes, jnp.float32)}

        def loss(weights: Any) -> Array:
            far = optax.tree.norm(optax.tree.sub(weights, start), squared=True)
            predicted = jax.nn.log_softmax(_affine(features, weights))
            return _negative_log_likelihood(predicted, labels) + self.penalty / 2 * far

        optimizer = optax.lbfgs()
        value_and_gradient = optax.value_and_grad_from_state(loss)

        def step(_: int, carry: Any) -> Any:
            weights, state = carry
            value, gradient = value_and_gradient(weights, state=state)
            update, state = optimizer.update(
                gradient, state, weights, value=value, grad=gradient, value_fn=loss
            )
            return optax.apply_updates(weights, update), state

        return lax.fori_loop(0, self.steps, step, (start, optimizer.init(start)))[0]

    def _features(self, outputs: Outputs) -> Array:
        each = [jax.nn.log_softmax(class_logits(outputs[name])) for name in self.needs()]
        return jnp.concatenate(each, -1)

    def __call__(self, outputs: Outputs, weights: Mapping[str, Array]) -> Array:
        """Returns log probabilities ``[b, classes]``."""
        return jax.nn.log_softmax(_affine(self._features(outputs), weights))


def _affine(x: Array, weights: Mapping[str, Array]) -> Array:
    return x @ weights["kernel"] + weights["bias"][None]


def is_fitted(prediction: Any) -> bool:
    """Tells whether a rule has parameters to be fitted."""
    return hasattr(prediction, "fit")


PREDICTIONS = {
    "output": Output,
    "digit_order": DigitOrder,
    "joint_probability": JointProbability,
    "fitted_joint_probability": FittedJointProbability,
    "linear_combination": LinearCombination,
}
