"""Layers that are fast on a CPU, too, inside loops and under ``vmap``; and how they begin."""

from sire_jax.layers.modules import (
    Conv,
    Dropout,
    SqueezeExcitation,
    TransposedConv,
    he_normal,
    uniform_fan_in,
)
from sire_jax.layers.normalization import BatchNorm, batch_over

__all__ = [
    "BatchNorm",
    "Conv",
    "Dropout",
    "SqueezeExcitation",
    "TransposedConv",
    "batch_over",
    "he_normal",
    "uniform_fan_in",
]
