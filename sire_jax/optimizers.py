"""Optimizers from a config section: ``optax`` transformations and schedules by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sire_jax import registry

__all__ = [
    "LinearOptimizer",
    "WeightDecay",
    "adam",
    "number_or_schedule",
    "piecewise",
    "sgd",
    "triangular",
]

# The lengths in steps of what schedules count in, None where it is not known.
Units = Mapping[str, int | None]


def piecewise(init_value: float, boundaries: tuple[float, ...], scale: float) -> optax.Schedule:
    """Multiplies a value at each of some times.

    ``value(t) = init_value scale^n``, with n the number of boundaries that are at most t.

    >>> schedule = piecewise(1.0, boundaries=(2, 4), scale=0.5)
    >>> [float(schedule(step)) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]

    Args:
        init_value: The value at first, at least 0.
        boundaries: When it is multiplied, in rising order.
        scale: By what, above 0.

    Returns:
        The schedule.

    Raises:
        ValueError: If a value is out of range.
    """
    if not (_is_rate(init_value) and 0 < scale < math.inf):
        raise ValueError(
            f"A piecewise schedule has init_value {init_value} and scale {scale}; they should be at"
            " least 0 and above 0, and finite."
        )
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"The boundaries {tuple(boundaries)} should be in rising order.")
    times = jnp.asarray(boundaries, jnp.float32)

    def schedule(count: Any) -> jax.Array:
        # Epochs are divided steps: a boundary is passed in spite of rounding.
        passed = (times * (1 - 1e-6) <= jnp.asarray(count, jnp.float32)).sum()
        return jnp.float32(init_value) * jnp.float32(scale) ** passed.astype(jnp.float32)

    return schedule


def triangular(
    peak_value: float, peak: float, end: float, init_value: float = 0.0, end_value: float = 0.0
) -> optax.Schedule:
    """Rises in a line to its peak, and falls in a line to its end.

    >>> schedule = triangular(peak_value=1.0, peak=2, end=4)
    >>> [float(schedule(step)) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Args:
        peak_value: The highest value, at least 0.
        peak: When it is reached, above 0.
        end: When ``end_value`` is reached, after the peak; it stays from then on.
        init_value: The value at first, at least 0.
        end_value: The value at the end, at least 0.

    Returns:
        The schedule.

    Raises:
        ValueError: If a value or a time is out of range.
    """
    if not all(map(_is_rate, (init_value, peak_value, end_value))):
        raise ValueError(
            f"A triangular schedule has the values {init_value}, {peak_value} and {end_value}; they"
            " should be at least 0 and finite."
        )
    if not 0 < peak < end < math.inf:
        raise ValueError(
            f"A triangular schedule has its peak at {peak} and its end at {end}; they should be"
            " above 0, the end after the peak."
        )
    times = jnp.asarray((0.0, peak, end), jnp.float32)
    values = jnp.asarray((init_value, peak_value, end_value), jnp.float32)
    return lambda count: jnp.interp(jnp.asarray(count, jnp.float32), times, values)


def _is_rate(value: Any) -> bool:
    """Tells whether a value is finite and at least 0; what is traced was checked before."""
    return isinstance(value, jax.core.Tracer) or 0 <= value < math.inf


SCHEDULES = {
    "constant": optax.schedules.constant_schedule,
    "piecewise": piecewise,
    "triangular": triangular,
    "linear": optax.schedules.linear_schedule,
    "cosine": optax.schedules.cosine_decay_schedule,
    "exponential": optax.schedules.exponential_decay,
    "warmup_cosine": optax.schedules.warmup_cosine_decay_schedule,
}
# The values of schedules that may be traced; "warmup_cosine" asks whether its own are 0.
_TRACED = {
    "constant": ("value",),
    "piecewise": ("init_value",),
    "triangular": ("init_value", "peak_value", "end_value"),
    "linear": ("init_value", "end_value"),
    "cosine": ("init_value",),
    "exponential": ("init_value",),
}


def traceable(value: Any) -> Any:
    """Returns the numbers of a setting that a compiled program can take as arguments.

    >>> traceable(0.1), traceable({"name": "cosine", "init_value": 0.1, "decay_steps": 9})
    (0.1, {'init_value': 0.1})

    Args:
        value: A number or a section, as ``number_or_schedule`` reads them.

    Returns:
        The number; of a section those that may be traced, by their keys, ``{}`` if none may.
    """
    if registry.is_section(value):
        keys = _TRACED.get(value.get("name"), ())
        return {key: float(value[key]) for key in keys if key in value}
    return float(value)


def with_traced(value: Any, traced: Any) -> Any:
    """Puts what ``traceable`` returned back into its setting, or arrays in place of the numbers.

    >>> with_traced({"name": "cosine", "init_value": 0.1, "decay_steps": 9}, {"init_value": 0.2})
    {'name': 'cosine', 'init_value': 0.2, 'decay_steps': 9}
    """
    return {**value, **traced} if isinstance(traced, Mapping) else traced


def number_or_schedule(value: Any, what: str, units: Units | None = None) -> float | optax.Schedule:
    """Reads a setting that is a number or a schedule.

    >>> rate = number_or_schedule({"name": "constant", "value": 0.1, "warmup": 4}, "learning rate")
    >>> [round(float(rate(step)), 3) for step in (0, 2, 8)]
    [0.025, 0.075, 0.1]

    Args:
        value: A number, which may be traced; a function from steps to one; or
            ``{"name": "linear", "init_value": …, …}`` with the arguments of the ``optax`` schedule;
            a ``"unit"`` in which it counts: ``"step"`` (if there is none), ``"epoch"`` or
            ``"run"``, the whole of it; and a ``"warmup"`` in that unit, over which it is multiplied
            by what rises in a line to 1 (Goyal et al., *Accurate, Large Minibatch SGD*, 2017,
            Section 2.2).
        what: What it is, for messages.
        units: The length of each unit in steps, ``None`` where it is not known.

    Returns:
        The number, or the schedule over steps.

    Raises:
        ValueError: If it is neither, negative or not finite, or the schedule does not exist, lacks
            an argument, or counts in a unit of unknown length.
    """
    if callable(value) or isinstance(value, jax.core.Tracer):
        return value
    if registry.is_section(value):
        section = dict(value)
        unit = section.pop("unit", "step")
        length = registry.choose({"step": 1, **(units or {})}, unit, f"unit of the {what}")
        if length is None:
            raise ValueError(
                f"The {what} counts in the unit '{unit}', but how many steps that is is not known:"
                " set config.data.images to the number of training images."
            )
        warmup = _check_least(f"warmup of the {what}", section.pop("warmup", 0.0))
        if unit == "run" and warmup > 1:
            epoch = (units or {}).get("epoch")
            epochs = f": {warmup:g} epochs are {warmup * epoch / length:.3g}" if epoch else ""
            raise ValueError(
                f"The warmup of the {what} is {warmup:g} runs, as the schedule counts; it should be"
                f" at most 1{epochs}."
            )
        if any(isinstance(value, jax.core.Tracer) for value in section.values()):
            # Checked before, with numbers in the place of what is traced.
            schedule = SCHEDULES[section.pop("name")](**section)
        else:
            schedule = registry.create(SCHEDULES, section, f"schedule of the {what}")
        counted = schedule if length == 1 else lambda step: schedule(step / length)
        return _warmed_up(counted, warmup * length) if warmup else counted
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"The {what} is {value!r}; it should be a number or a schedule.")
    return _check_least(what, value)


def _check_least(setting: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"The {setting} is {value!r}; it should be a number.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"The {setting} is {value}; it should be finite and at least 0.")
    return float(value)


def _warmed_up(schedule: optax.Schedule, steps: float) -> optax.Schedule:
    """Has a schedule begin at a small share of its value, not at 0, which would waste a step."""

    def warmed_up(count: Any) -> jax.Array:
        share = jnp.minimum((jnp.asarray(count, jnp.float32) + 1) / steps, 1.0)
        return share * jnp.asarray(schedule(count), jnp.float32)

    return warmed_up


def _check_share(name: str, value: float) -> None:
    """Checks how much of a mean is kept from step to step."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it should be in [0, 1).")


def adam(
    learning_rate: Any = 1e-3,
    weight_decay: Any = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015), with the L2 penalty in the gradient, as in PyTorch.

    >>> optimizer, params = adam(learning_rate=0.1), jnp.array([1.0, -2.0])
    >>> steps, _ = optimizer.update(jnp.array([4.0, -0.5]), optimizer.init(params), params)
    >>> [round(step, 3) for step in steps.tolist()]  # the first is as long as the learning rate
    [-0.1, 0.1]

    Args:
        learning_rate: A number or a schedule.
        weight_decay: As ``WeightDecay.of`` reads it.
        b1: What the mean of the gradients keeps from step to step, in [0, 1).
        b2: Likewise that of their squares.
        clip: The largest norm that the gradient of all parameters together may have, the penalty
            left out; what is longer is scaled down to it (Pascanu et al., 2013). 0: any. Rules
            that take a step for each loss (pair-wise, multi-way) clip that of each by itself.

    Raises:
        ValueError: If a setting is out of range.
    """
    _check_share("b1", b1)
    _check_share("b2", b2)
    rate = number_or_schedule(learning_rate, "learning rate")
    penalty = WeightDecay.of(weight_decay).penalty()
    return _clipped(clip, optax.chain(penalty, optax.adam(rate, b1=b1, b2=b2)))


def _clipped(clip: float, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    norm = _check_least("clip", clip)
    return optax.chain(optax.clip_by_global_norm(norm), optimizer) if norm else optimizer


@dataclass(frozen=True)
class WeightDecay:
    """The L2 penalty: what parameters are multiplied by and added to their gradient.

    In a config ``weight_decay`` is a number for all, or ``{"backbone": …, "heads": …}``.

    >>> params = {"backbone": {"kernel": jnp.ones(3)}, "heads_exit": {"kernel": jnp.ones(2)}}
    >>> WeightDecay.of({"backbone": 5e-4, "heads": 0.0}).by_leaf(params)
    [0.0005, 0.0]

    Attributes:
        backbone: Of all parameters but the heads', at least 0.
        heads: Of the heads', at least 0.
    """

    backbone: float
    heads: float

    @classmethod
    def of(cls, value: Any) -> "WeightDecay":
        """Reads a number, or a section with the two numbers.

        Raises:
            ValueError: If it is neither, or a number is negative or not finite.
        """
        if isinstance(value, WeightDecay):
            return value
        if not registry.is_section(value):
            value = dict.fromkeys(("backbone", "heads"), value)
        decays = {part: _check_least("weight decay", value[part]) for part in value}
        if set(value) != {"backbone", "heads"}:
            raise ValueError(
                f"The weight decay has the keys {sorted(value)}; it should be a number, or have"
                " 'backbone' and 'heads'."
            )
        return cls(**decays)

    def __bool__(self) -> bool:
        return bool(self.backbone or self.heads)

    def by_leaf(self, params: Any) -> list[float]:
        """Returns the decay of each parameter, in the order of ``jax.tree.leaves``.

        Args:
            params: Parameters of a ``Network``, whose heads are named ``heads_…``.
        """
        paths = [path for path, _ in jax.tree.flatten_with_path(params)[0]]
        of_head = [str(getattr(path[0], "key", "")).startswith("heads_") for path in paths]
        return [self.heads if head else self.backbone for head in of_head]

    def penalty(self) -> optax.GradientTransformation:
        """Returns the transformation that adds it to the gradients."""
        if self.backbone == self.heads:
            return optax.add_decayed_weights(self.backbone) if self else optax.identity()

        def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            # The decay in a parameter's dtype: the gradient stays in it, too.
            leaves, structure = jax.tree.flatten(params)
            decayed = [
                g + jnp.asarray(d, p.dtype) * p
                for g, d, p in zip(
                    jax.tree.leaves(gradient), self.by_leaf(params), leaves, strict=True
                )
            ]
            return jax.tree.unflatten(structure, decayed), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class LinearOptimizer(optax.GradientTransformation):
    """A transformation whose step is linear in the gradients, behind weight decay that is known.

    >>> optimizer, params = LinearOptimizer(optax.sgd(0.1), weight_decay=0.5), jnp.array([2.0])
    >>> step, _ = optimizer.update(jnp.array([1.0]), optimizer.init(params), params)
    >>> round(step.item(), 3)  # -0.1 (1 + 0.5 * 2)
    -0.2

    Attributes:
        linear: The transformation without weight decay, such as ``optax.sgd``.
        weight_decay: What parameters are multiplied by and added to their gradient.
    """

    linear: optax.GradientTransformation
    weight_decay: WeightDecay

    def __new__(
        cls, linear: optax.GradientTransformation, weight_decay: Any = 0.0
    ) -> "LinearOptimizer":
        """Chains weight decay, as ``WeightDecay.of`` reads it, and the transformation."""
        decay = WeightDecay.of(weight_decay)
        # Its two functions are fields of a named tuple, which only __new__ can set.
        optimizer = super().__new__(cls, *optax.chain(decay.penalty(), linear))
        optimizer.linear, optimizer.weight_decay = linear, decay
        return optimizer


def sgd(
    learning_rate: Any = 0.1,
    weight_decay: Any = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """Gradient descent with momentum, with the L2 penalty in the gradient.

    >>> optimizer, gradient = sgd(learning_rate=0.1, momentum=0.5), jnp.array([1.0])
    >>> first, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    >>> second, _ = optimizer.update(gradient, state, gradient)
    >>> round(first.item(), 3), round(second.item(), 3)
    (-0.1, -0.15)

    Args:
        learning_rate: A number or a schedule.
        weight_decay: As ``WeightDecay.of`` reads it.
        momentum: What the sum of the gradients keeps from step to step, in [0, 1).
        nesterov: Whether a step looks ahead (Nesterov's momentum) rather than that of a heavy ball.
        clip: As of ``adam``.

    Returns:
        A ``LinearOptimizer``, unless it clips.

    Raises:
        ValueError: If a setting is out of range.
    """
    _check_share("momentum", momentum)
    rate = number_or_schedule(learning_rate, "learning rate")
    return _clipped(clip, LinearOptimizer(optax.sgd(rate, momentum, nesterov), weight_decay))


OPTIMIZERS = {"adam": adam, "sgd": sgd}
