"""Optimizers from a config section: ``optax`` transformations and schedules by name."""

import math
from collections.abc import Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from sire_jax import registry

SCHEDULES = {
    "constant": optax.schedules.constant_schedule,
    "linear": optax.schedules.linear_schedule,
    "cosine": optax.schedules.cosine_decay_schedule,
    "exponential": optax.schedules.exponential_decay,
    "warmup_cosine": optax.schedules.warmup_cosine_decay_schedule,
}


def number_or_schedule(value: Any, what: str) -> float | optax.Schedule:
    """Reads a setting that is a number or a schedule over steps.

    Args:
        value: A number, or ``{"name": "linear", "init_value": …, …}`` with the arguments of the
            ``optax`` schedule.
        what: What it is, for messages.

    Returns:
        The number or the schedule.

    Raises:
        ValueError: If it is neither, negative or not finite, or the schedule does not exist or
            lacks an argument.
    """
    if isinstance(value, Mapping | ConfigDict):
        return registry.create(SCHEDULES, value, f"schedule of the {what}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"The {what} is {value!r}; it should be a number or a schedule.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"The {what} is {value}; it should be finite and at least 0.")
    return float(value)


def adam(
    learning_rate: Any = 1e-3, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015), with the L2 penalty in the gradient, as in PyTorch."""
    rate = number_or_schedule(learning_rate, "learning rate")
    return optax.chain(_decay(weight_decay), optax.adam(rate, b1=b1, b2=b2))


def sgd(
    learning_rate: Any = 0.1,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Gradient descent with momentum, with the L2 penalty in the gradient."""
    rate = number_or_schedule(learning_rate, "learning rate")
    return optax.chain(_decay(weight_decay), optax.sgd(rate, momentum, nesterov))


def _decay(weight_decay: float) -> optax.GradientTransformation:
    return optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()


OPTIMIZERS = {"adam": adam, "sgd": sgd}
