"""Prediction rules: how one or several outputs become class probabilities.

Some have parameters, ``fit(outputs, labels)``, which are fitted to the outputs of a trained network
on the examples of their ``split``, at most ``MOST``; such a rule is called with ``(outputs,
parameters)``.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from sire_jax.metrics import Average, at_label, class_logits, is_label
from sire_jax.networks import MAIN
from sire_jax.text import nearest

MOST = 50_000  # Examples that rules are fitted to.
_HALVINGS = 24  # Of an interval of length 1: as exact as float32.
_NORMALIZATIONS, _SPLITS = ("sum", "softmax"), ("train", "validation")
Outputs = Mapping[str, Array]
Prediction = Callable[..., Array]


@dataclass(frozen=True)
class Output:
    """The softmax of one output, or the sigmoid of one logit.

    >>> Output("exit")({"exit": jnp.array([[0.0, 0.0]])}).round(4)  # log 0.5
    Array([[-0.6931, -0.6931]], dtype=float32)

    Attributes:
        output: Name of the output.
    """

    output: str = "main"

    def needs(self) -> tuple[str, ...]:
        """Returns the outputs that the rule uses."""
        return (self.output,)

    def __call__(self, outputs: Mapping[str, Array]) -> Array:
        """Returns log probabilities ``[b, classes]``."""
        return jax.nn.log_softmax(class_logits(outputs[self.output]))


@dataclass(frozen=True)
class DigitOrder:
    """Whether a <= b, from the two digits alone.

    ``P(a <= b) = sum_{i <= j} P(a = i) P(b = j)``, exact for independent digits.

    >>> log_probabilities = jax.jit(DigitOrder())({"digits": jnp.zeros((1, 2, 10))})
    >>> jnp.exp(log_probabilities).round(2)  # of equal digits a <= b in 55 of 100 cases
    Array([[0.45, 0.55]], dtype=float32)

    Attributes:
        output: Name of the output with the digits' logits, ``[b, 2, digits]``.
    """

    output: str = "digits"

    def needs(self) -> tuple[str, ...]:
        """Returns the outputs that the rule uses."""
        return (self.output,)

    def __call__(self, outputs: Mapping[str, Array]) -> Array:
        """Returns log probabilities ``[b, 2]`` of "greater" and of "less than or equal"."""
        log_a, log_b = jnp.moveaxis(jax.nn.log_softmax(outputs[self.output]), 1, 0)
        joint = log_a[:, :, None] + log_b[:, None, :]
        ordered = jnp.triu(jnp.ones(joint.shape[1:], bool))[None]
        order = [jax.nn.logsumexp(joint, axis=(1, 2), where=w) for w in (~ordered, ordered)]
        return jnp.stack(order, axis=-1)


# The group of each label, by the output whose classes are the groups.
Assignments = Mapping[str, Sequence[int]]


def log_joint(outputs: Mapping[str, Array], groups: Assignments, eta: Array | float) -> Array:
    """Multiplies the main output's probabilities with those of each label's groups.

    ``log s_i = log p(i) + eta sum_g log p_g(gamma_g(i))`` with the softmax p of the main output,
    ``p_g`` of the branch g, and ``gamma_g(i)`` the group of label i.

    Args:
        outputs: Logits by output, ``"main"`` ``[b, classes]`` and each branch ``[b, groups]``.
        groups: The groups of the labels, ``[classes]``, by branch.
        eta: The power of the branches' probabilities, at least 0.

    Returns:
        ``[b, classes]``, float32, at most 0; not normalized.

    Raises:
        ValueError: If a branch has another number of groups than its assignment, or that another
            number of labels than there are classes.
    """
    joint = jax.nn.log_softmax(class_logits(outputs[MAIN]))
    for branch, assignment in groups.items():
        of_label = np.asarray(assignment)
        _check_assignment(branch, of_label, joint.shape[-1], outputs[branch].shape[-1])
        joint += eta * jax.nn.log_softmax(outputs[branch])[:, of_label]
    return joint


def _check_assignment(branch: str, of_label: np.ndarray, classes: int, groups: int) -> None:
    if len(of_label) != classes:
        raise ValueError(
            f"The groups of the branch '{branch}' are of {len(of_label)} labels, but the main"
            f" output has {classes} classes; each should have a group."
        )
    if of_label.min() < 0 or of_label.max() >= groups:
        raise ValueError(
            f"The groups of the branch '{branch}' are numbered {of_label.min()} to"
            f" {of_label.max()}, but it has {groups} logits; groups should be in 0..{groups - 1}."
        )


def _check_branches(rule: str, branches: Sequence[str], groups: Assignments) -> None:
    """Refuses a rule without branches, or with one whose target is no grouping."""
    for name in branches:
        if name not in groups:
            raise ValueError(
                f"{rule} uses the output '{name}', which is no branch over groups of the labels."
                f"{nearest(name, groups)}"
            )
    if not groups:
        raise ValueError(
            f"{rule} needs a branch over groups of the labels: a head with an objective whose"
            " target is such groups."
        )


@dataclass(frozen=True)
class JointProbability:
    """The joint probability of the main output and of branches over groups of the labels.

    ``P(y = i) = s_i / sum_j s_j``, ``s`` of ``log_joint``: as in the program released with Palacio
    et al., *Contextual Classification*. Their Section 3.4 has a softmax of ``s`` instead, which is
    ``normalization="softmax"``: the order is the same, but as s is at most 1 all probabilities are
    nearly alike, and in float32 many are equal: choose classes by ``"sum"``.

    >>> outputs = {
    ...     "main": jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.2]])),
    ...     "branch": jnp.log(jnp.array([[0.2, 0.8]])),
    ... }
    >>> predict = JointProbability({"branch": (0, 0, 1, 1)})  # labels 0 and 1 are group 0
    >>> jnp.exp(predict(outputs)).round(2)
    Array([[0.16, 0.04, 0.48, 0.32]], dtype=float32)

    Attributes:
        groups: The groups of the labels by branch (in a config, from the objectives' targets).
        eta: The power of the branches' probabilities, in (0, 1].
        normalization: ``"sum"`` or ``"softmax"``.
        branches: The branches that are used; all by default.

    Raises:
        ValueError: If eta is out of its range, there is no such normalization, or no such branch.
    """

    groups: Assignments
    eta: float = 1.0
    normalization: str = "sum"
    branches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ValueError(
                f"eta is {self.eta}; it should be above 0 and at most 1 (Palacio et al., Section"
                " 3.4)."
            )
        if self.normalization not in _NORMALIZATIONS:
            raise ValueError(
                f"A normalization is '{self.normalization}'."
                f"{nearest(self.normalization, _NORMALIZATIONS)}"
            )
        _check_branches("joint_probability", self.branches, self.groups)

    def needs(self) -> tuple[str, ...]:
        """Returns the outputs that the rule uses."""
        return (MAIN, *(self.branches or self.groups))

    def __call__(self, outputs: Mapping[str, Array]) -> Array:
        """Returns log probabilities ``[b, classes]``."""
        groups = {name: self.groups[name] for name in self.needs()[1:]}
        joint = log_joint(outputs, groups, self.eta)
        return jax.nn.log_softmax(joint if self.normalization == "sum" else jnp.exp(joint))


def check(
    predictions: Mapping[str, Any],
    outputs: Mapping[str, object],
    objectives: Collection[str] = (),
) -> None:
    """Checks that each prediction rule has its outputs, and a name of its own.

    Args:
        predictions: Rules by name.
        outputs: Outputs, or their shapes, by name.
        objectives: The names of the objectives that are measured beside them.

    Raises:
        ValueError: If a rule uses an output that does not exist, or has the name of another thing
            that is measured.
    """
    for name, prediction in predictions.items():
        if name in outputs or name in objectives or name == "total":
            raise ValueError(
                f"The prediction '{name}' has the name of an output or objective, or of their"
                " weighted sum, 'total'; their metrics could not be told apart. Choose another."
            )
        # A plain function says nothing of its outputs, and finds out itself.
        for output in getattr(prediction, "needs", tuple)():
            if output not in outputs:
                raise ValueError(
                    f"The prediction '{name}' uses the output '{output}', which does not"
                    f" exist.{nearest(output, outputs)}"
                )


# ---- Rules that are fitted.


def _check_split(rule: str, split: str) -> None:
    if split not in _SPLITS:
        raise ValueError(
            f"{rule} is fitted to the split '{split}'; it should be 'train' or 'validation': what"
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

    >>> predict = FittedJointProbability({"branch": (0, 0, 1, 1)})
    >>> logits = {"main": jnp.zeros((4, 4)), "branch": jnp.array([[4.0, 0.0]] * 4)}
    >>> f"{jax.jit(predict.fit)(logits, jnp.array([0, 1, 0, 3])):.2f}"  # 3 of 4: log 3 / 4
    '0.27'

    Attributes:
        groups: The groups of the labels by branch (in a config, from the objectives' targets).
        split: ``"validation"`` or ``"train"``, whose examples it is fitted to.
    """

    groups: Assignments
    split: str = "validation"

    def __post_init__(self) -> None:
        _check_split("fitted_joint_probability", self.split)
        _check_branches("fitted_joint_probability", (), self.groups)

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
        # The upper end, which is never 0.
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

    >>> logits = {"main": jnp.zeros((2, 4)), "branch": jnp.array([[2.0, 0.0], [0.0, 2.0]])}
    >>> predict = LinearCombination({"branch": (0, 0, 1, 1)})
    >>> jax.tree.map(jnp.shape, jax.eval_shape(predict.fit, logits, jnp.array([0, 3])))
    {'bias': (4,), 'kernel': (6, 4)}

    Attributes:
        groups: The groups of the labels by branch (in a config, from the objectives' targets).
        split: ``"train"`` or ``"validation"``, whose examples it is fitted to. On images that the
            network was trained on its outputs say more than they do on others.
        outputs: What is combined with the main output; by default all branches over groups.
            ``("main",)`` is the control: the main output alone, fitted in the same way.
        penalty: Of the distance from the main output alone, above 0.
        steps: Steps of L-BFGS.

    Raises:
        ValueError: If there is no such split, or penalty or steps are out of range.
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
            _check_branches("linear_combination", (), self.groups)

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
        # The line search before has computed both where it ended.
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
        features = [jax.nn.log_softmax(class_logits(outputs[name])) for name in self.needs()]
        return jnp.concatenate(features, -1)

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
