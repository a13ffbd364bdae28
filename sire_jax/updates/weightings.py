"""Loss weightings: factors of the objectives' own weights that change as training goes on.

``L = sum_k w_k f_k L_k``: the own weights ``w_k`` say what the user prefers, a weighting finds the
factors ``f_k`` from the unweighted losses ``L_k``. The sum of the factors is that of all K losses,
whether a step has them or not. Most weightings are for positive losses, and each says what it does
with others, such as a Gaussian likelihood, whose zero means nothing: fixed weights suit those. A
loss is present in a step if its own weight is not 0 and its value is finite; of one that is absent
a weighting learns nothing. Factors and states are finite whatever the losses are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sire_jax import optimizers
from sire_jax.updates.observed import Named, Observed, PyTree, presence, stack, unstack

# What losses and norms count as at most: sums of them, and their products, stay finite.
_LARGEST = 1e15


def _constant(names: Iterable[str], value: float) -> Named:
    # An array each: they may be donated.
    return {name: jnp.full((), value, jnp.float32) for name in names}


def _check_above_0(setting: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{setting} is {value}; it should be above 0 and finite.")


def _check_at_least_0(setting: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{setting} is {value}; it should be at least 0 and finite.")


@dataclass(frozen=True)
class Fixed:
    """The objectives' own weights alone, ``f_k = 1``.

    >>> Fixed().weights(Fixed().init(["main", "exit"]), jax.random.key(0))["exit"].item()
    1.0
    """

    def init(self, names: Sequence[str]) -> PyTree:
        """Returns the factors, all 1."""
        return _constant(names, 1.0)

    def weights(self, state: PyTree, key: Array) -> Named:
        """Returns the factors."""
        del key
        return dict(state)

    def update(self, state: PyTree, observed: Observed) -> PyTree:
        """Returns the state as it is."""
        del observed
        return state


@dataclass(frozen=True)
class Uncertainty:
    """Weights by a learned uncertainty of each loss (Kendall, Gal and Cipolla, 2018, Eq. 7).

    ``L = sum_k w_k (exp(-s_k) L_k + s_k)`` with a learned ``s_k = log sigma_k^2``, 0 at first:
    ``f_k = exp(-s_k)``, twice the paper's, so that it starts at 1. The regularizer ``s_k`` is in
    what is learned, by gradient descent: ``s_k <- s_k - rate (1 - exp(-s_k) L_k)``, which is at
    rest where ``f_k = 1 / L_k``; it has no gradient to the network, and the reported losses leave
    it out. It is for positive losses: of one that is not above 0, or absent, ``s_k`` stays as it
    is. ``s_k`` is kept in [-10, 10].

    >>> weighting = Uncertainty(learning_rate=0.1)
    >>> step = Observed({"main": jnp.array(3.0), "exit": jnp.array(1.0)}, dict, dict)
    >>> update = jax.jit(lambda state: weighting.update(state, step))
    >>> state = update(weighting.init(["main", "exit"]))
    >>> jax.jit(weighting.weights)(state, jax.random.key(0))["main"].round(2)  # the larger loss's
    Array(0.82, dtype=float32)

    Attributes:
        learning_rate: Of the log variances, above 0.
    """

    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        _check_above_0("Uncertainty: learning_rate", self.learning_rate)

    def init(self, names: Sequence[str]) -> PyTree:
        """Returns the log variances, all 0."""
        return _constant(names, 0.0)

    def weights(self, state: PyTree, key: Array) -> Named:
        """Returns the factors, in [exp(-10), exp(10)]."""
        del key
        return {name: jnp.exp(-log_variance) for name, log_variance in state.items()}

    def update(self, state: PyTree, observed: Observed) -> PyTree:
        """Takes a step of gradient descent on the log variances."""
        present = presence(observed)

        def learn(name: str, log_variance: Array) -> Array:
            loss = observed.losses[name].astype(jnp.float32)
            gradient = 1 - jnp.exp(-log_variance) * loss
            # A loss that stays far from 1 would drive its factor to infinity or to 0.
            learned = jnp.clip(log_variance - self.learning_rate * gradient, -10, 10)
            return jnp.where(present[name] & (loss > 0), learned, log_variance)

        return {name: learn(name, log_variance) for name, log_variance in state.items()}


@dataclass(frozen=True)
class DynamicAverage:
    """Weights by how slowly each loss falls, DWA (Liu, Johns and Davison, 2019).

    ``f_k = K softmax_k(r / T)``, with ``r_k`` the loss's mean over the last period divided by its
    mean over the one before; 1 in the first two periods. A ratio is kept in [0, 10], and is 1 where
    the earlier mean is not positive: a loss that stays below 0 always has the ratio 1. Means are
    over the steps in which a loss is present; after a period without it they stay as they are.

    >>> weighting = DynamicAverage(period=1)
    >>> update = jax.jit(lambda state, x: weighting.update(state, Observed(x, dict, dict)))
    >>> state = weighting.init(["main", "exit"])
    >>> for loss in (4.0, 2.0):  # that of the exit does not fall
    ...     state = update(state, {"main": jnp.array(loss), "exit": jnp.array(1.0)})
    >>> f"{jax.jit(weighting.weights)(state, jax.random.key(0))['exit']:.2f}"
    '1.12'

    Attributes:
        period: Number of steps of a period, at least 1: those of an epoch in the paper.
        temperature: ``T``, above 0.

    Raises:
        ValueError: If the period is below 1, or the temperature not above 0.
    """

    period: int
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(
                f"DynamicAverage: period is {self.period}; it should be at least 1, the steps of an"
                " epoch."
            )
        _check_above_0("DynamicAverage: temperature", self.temperature)

    def init(self, names: Sequence[str]) -> PyTree:
        """Returns sums, counts and means of 0."""
        means = {key: _constant(names, 0.0) for key in ("sums", "counts", "last", "earlier")}
        return {"steps": jnp.zeros((), jnp.int32), **means}

    def weights(self, state: PyTree, key: Array) -> Named:
        """Returns the factors, in (0, K), of sum K."""
        del key
        ratios = _ratio(stack(state["last"]), stack(state["earlier"]))
        # The means of two whole periods, the last and the one before, make a ratio.
        ratios = jnp.where(state["steps"] >= 2 * self.period, jnp.clip(ratios, 0, 10), 1.0)
        return unstack(state["last"], len(ratios) * jax.nn.softmax(ratios / self.temperature))

    def update(self, state: PyTree, observed: Observed) -> PyTree:
        """Adds a step's losses, and closes a period at its last step."""
        steps = state["steps"] + 1
        closes = steps % self.period == 0
        present = presence(observed)
        losses = {name: _bounded(observed.losses[name], present[name]) for name in state["sums"]}
        sums = {name: total + losses[name] for name, total in state["sums"].items()}
        counts = {
            name: count + present[name].astype(jnp.float32)
            for name, count in state["counts"].items()
        }
        means = {name: total / jnp.maximum(counts[name], 1) for name, total in sums.items()}
        # A period without a loss says nothing of it: its means are those of earlier ones.
        ends = {name: closes & (count > 0) for name, count in counts.items()}
        zeros = _constant(sums, 0.0)
        return {
            "steps": steps,
            "sums": _choose(closes, zeros, sums),
            "counts": _choose(closes, zeros, counts),
            "last": {n: jnp.where(ends[n], means[n], last) for n, last in state["last"].items()},
            "earlier": {
                n: jnp.where(ends[n], state["last"][n], earlier)
                for n, earlier in state["earlier"].items()
            },
        }


def _choose(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _bounded(values: Array, present: Array) -> Array:
    """Returns losses or norms as float32 numbers whose sums are finite; 0 where one is absent."""
    bounded = jnp.clip(values.astype(jnp.float32), -_LARGEST, _LARGEST)
    return jnp.where(present, bounded, 0.0)


def _ratio(values: Array, earlier: Array) -> Array:
    """Divides losses by what they were, at most 1e15; 1 where that is not positive."""
    ratio = values / jnp.where(earlier > 0, earlier, 1.0)
    return jnp.where(earlier > 0, jnp.minimum(ratio, _LARGEST), 1.0)


@dataclass(frozen=True)
class Random:
    """Random weights, drawn anew at each step, RLW (Lin, Ye, Zhang and Tsang, 2022).

    ``f = K softmax(n)``, with ``n`` K standard normal numbers; K times the paper's, whose sum is 1.

    >>> state = Random().init(["main", "exit"])
    >>> factors = jax.jit(Random().weights)(state, jax.random.key(0))
    >>> round(float(sum(factors.values())), 4)  # they add up to their number
    2.0
    """

    def init(self, names: Sequence[str]) -> PyTree:
        """Returns a value for each name; it never changes."""
        return _constant(names, 1.0)

    def weights(self, state: PyTree, key: Array) -> Named:
        """Returns the factors, above 0, of sum K."""
        drawn = jax.nn.softmax(jax.random.normal(key, (len(state),)))
        return unstack(state, len(state) * drawn)

    def update(self, state: PyTree, observed: Observed) -> PyTree:
        """Returns the state as it is."""
        del observed
        return state


@dataclass(frozen=True)
class FAMO:
    """Weights under which all losses fall at one rate (Liu, Feng, Stone and Liu, 2023).

    ``f_k = K (z_k / L_k) / sum_j (z_j / L_j)``, with ``z = softmax(x)``: the gradient of ``sum_k
    z_k log L_k``, normalized. The logits ``x``, 0 at first, are learned by Adam from the change of
    the step, ``dz/dx' (log L - log L_after)``, so that losses which fell less weigh more (Algorithm
    1, and the authors' program, which decays ``x``, too).

    It differs from them in this: the ``L_k`` in ``f_k`` are those seen last, after the step before,
    all 1 at first, because factors are known before the forward pass; the factors' sum is K, not 1;
    the losses after a step are of the same dropout; the gradient is not clipped to a norm of 1,
    which is up to the optimizer. It is for positive losses, which count as at least 1e-8: of one
    that is not above 0 before and after a step, or absent, the last positive value is kept, and
    its logit neither moves nor moves the others.

    >>> before = {"main": jnp.array(2.0), "exit": jnp.array(2.0)}
    >>> after = {"main": jnp.array(1.0), "exit": jnp.array(2.0)}  # the exit's has not fallen
    >>> weighting, step = FAMO(learning_rate=0.5), Observed(before, lambda: after, dict)
    >>> update = jax.jit(lambda state: weighting.update(state, step))
    >>> update(weighting.init(["main", "exit"]))["logits"].round(2)  # of the exit, of main
    Array([ 0.5, -0.5], dtype=float32)

    Attributes:
        learning_rate: Of Adam on the logits, above 0.
        weight_decay: Of the logits, in their gradient, at least 0.
    """

    learning_rate: float = 0.025
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check_above_0("FAMO: learning_rate", self.learning_rate)
        _check_at_least_0("FAMO: weight_decay", self.weight_decay)

    def init(self, names: Sequence[str]) -> PyTree:
        """Returns logits of 0 and losses of 1."""
        logits = jnp.zeros(len(names), jnp.float32)
        adam = self._adam().init(logits)
        return {"logits": logits, "adam": adam, "losses": _constant(names, 1.0)}

    def weights(self, state: PyTree, key: Array) -> Named:
        """Returns the factors, at least 0, of sum K."""
        del key
        # The softmax of x - log L: no loss is divided by.
        shares = jax.nn.softmax(state["logits"] - _log(stack(state["losses"])))
        return unstack(state["losses"], len(shares) * shares)

    def update(self, state: PyTree, observed: Observed) -> PyTree:
        """Takes a step of Adam on the logits."""
        last, logits = state["losses"], state["logits"]
        before, after = stack(observed.losses), stack(observed.after())
        moves = stack(presence(observed), jnp.bool_) & (before > 0) & (after > 0)
        moves &= jnp.isfinite(after)
        fallen = jnp.where(moves, _log(before) - _log(after), 0.0)
        # Of the losses that move alone; without any nothing is learned below.
        shares = jax.nn.softmax(jnp.where(moves | ~moves.any(), logits, -jnp.inf))
        gradient = shares * (fallen - (shares * fallen).sum())
        step, adam = self._adam().update(gradient, state["adam"], logits)
        # Moments are one for each loss, the count of steps is all losses'.
        logits, adam, losses = jax.tree.map(
            lambda new, old: jnp.where(moves if new.ndim else moves.any(), new, old),
            (logits + step, adam, jnp.where(moves, after, stack(last))),
            (logits, state["adam"], stack(last)),
        )
        return {"logits": logits, "adam": adam, "losses": unstack(last, losses)}

    def _adam(self) -> optax.GradientTransformation:
        return optimizers.adam(self.learning_rate, self.weight_decay)


def _log(losses: Array) -> Array:
    return jnp.log(jnp.maximum(losses, 1e-8))


@dataclass(frozen=True)
class GradNorm:
    """Weights under which losses that fall slowly have longer gradients (Chen et al., 2018).

    ``f_k`` descends ``sum_k |f_k n_k - m r_k^alpha|``: ``n_k`` is the norm of the loss's gradient
    to the parameters that all losses reach (the paper takes the last shared layer), ``m`` the mean
    of all ``f_k n_k``, and ``r_k`` the loss as a part of the first one seen, divided by the mean of
    that over all losses; ``m r_k^alpha`` is taken as a constant. ``f_k <- f_k - rate sign(f_k n_k -
    m r_k^alpha) n_k / mean(n)``, at least 1e-3, and then multiplied so that the sum is K. The
    division by the mean norm, which makes the rate independent of the losses' scale, and the least
    value are not in the paper. It is for positive losses: one that is not counts as 0, the first
    waits for one that is. A loss that is absent from a step has no part in its means, and keeps its
    factor; the others' are multiplied so that the sum of all is K.

    >>> losses = {"main": jnp.array(1.0), "exit": jnp.array(1.0)}
    >>> norms = {"main": jnp.array(1.0), "exit": jnp.array(3.0)}
    >>> weighting, step = GradNorm(learning_rate=0.1), Observed(losses, dict, lambda: norms)
    >>> update = jax.jit(lambda state: weighting.update(state, step))
    >>> state = update(weighting.init(["main", "exit"]))
    >>> weighting.weights(state, jax.random.key(0))["exit"].round(2)  # of the longer gradient
    Array(0.89, dtype=float32)

    Attributes:
        alpha: How much losses that fall slowly are favoured, at least 0; 0 makes norms equal.
        learning_rate: Of the factors, above 0.
    """

    alpha: float = 1.5
    learning_rate: float = 0.025

    def __post_init__(self) -> None:
        _check_at_least_0("GradNorm: alpha", self.alpha)
        _check_above_0("GradNorm: learning_rate", self.learning_rate)

    def init(self, names: Sequence[str]) -> PyTree:
        """Returns factors of 1 and first losses of 0, not seen yet."""
        return {"factors": _constant(names, 1.0), "first": _constant(names, 0.0)}

    def weights(self, state: PyTree, key: Array) -> Named:
        """Returns the factors, above 0, of sum K."""
        del key
        return dict(state["factors"])

    def update(self, state: PyTree, observed: Observed) -> PyTree:
        """Takes a step of gradient descent on the factors."""
        names = state["factors"]
        norms = stack(observed.norms())
        present = stack(presence(observed), jnp.bool_) & jnp.isfinite(norms)
        losses, norms = _bounded(stack(observed.losses), present), _bounded(norms, present)
        first = stack(state["first"])
        first = jnp.where((first > 0) | ~present, first, losses)
        factors = self._descend(stack(names), norms, _ratio(losses, first), present)
        return {"factors": unstack(names, factors), "first": unstack(names, first)}

    def _descend(self, factors: Array, norms: Array, ratios: Array, present: Array) -> Array:
        count = present.sum().astype(jnp.float32)

        def mean(values: Array) -> Array:
            return jnp.where(present, values, 0.0).sum() / jnp.maximum(count, 1)

        ratios = jnp.maximum(ratios, 0)
        relative = ratios / jnp.maximum(mean(ratios), 1e-8)
        lengths = factors * norms
        above = jnp.sign(lengths - mean(lengths) * relative**self.alpha)
        # Where all gradients are zeros the factors stay.
        gradient = above * norms / jnp.maximum(mean(norms), 1e-30)
        moved = jnp.maximum(factors - self.learning_rate * gradient, 1e-3)
        # The sum of all factors stays K: what the absent losses have is not for the others.
        absent = jnp.where(present, 0.0, factors).sum()
        total = jnp.where(present, moved, 0.0).sum()
        moved = (len(factors) - absent) * moved / jnp.where(total > 0, total, 1.0)
        return jnp.where(present, moved, factors)


WEIGHTINGS = {
    "fixed": Fixed,
    "uncertainty": Uncertainty,
    "dwa": DynamicAverage,
    "random": Random,
    "famo": FAMO,
    "gradnorm": GradNorm,
}
