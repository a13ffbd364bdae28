"""Small plans and helpers shared by the tests of planned backbones and decoders."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from sire_jax.backbones.blocks import Convolution, MaxPool, Residual
from sire_jax.backbones.googlenet import Inception
from sire_jax.backbones.plan import Plan, Planned

CONVOLUTIONS = Plan(
    (
        (Convolution(3), Convolution(4, residual=True), MaxPool()),
        (Convolution(5), Convolution(6, residual=True), MaxPool()),
    )
)
# Every kind of block, and a tail.
MIXED = Plan(
    (
        (Convolution(3, 3, 2),),
        (Residual((4, 4), stride=2), Residual((4, 4))),
        (Inception(2, 2, 3, 1, 2, 1, kernel_size=5), MaxPool(3, 2, (0, 1))),
    ),
    tail=(Convolution(5, 1),),
)


def tiny(classes: int, dropout: float = 0.0, dtype: str = "float32") -> Planned:
    """A backbone of a user's own, in a config ``planned:tiny``; takes 8 x 8 digits."""
    return Planned(CONVOLUTIONS, classes, (8,), True, dropout, dtype)


def pooled(classes: int) -> Planned:
    """The same with a linear function of mean features, ``planned:pooled``."""
    return Planned(CONVOLUTIONS, classes)


def shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def shapes_of(module, *args, **kwargs):
    return jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, **kwargs), *args)


def random_like(variables, seed=0):
    """Fills variables with random numbers; variances are positive. Compiles nothing."""
    generator = np.random.default_rng(seed)

    def fill(path, leaf):
        values = generator.normal(size=leaf.shape) / max(1, np.sqrt(np.prod(leaf.shape[:-1])))
        values = np.abs(values) + 0.5 if path[-1].key == "var" else values
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, dict(variables))


def apart(tree):
    """Parts what blocks of a loop have together, ``"stage_1_block_2_to_4"``, by their names."""
    if not hasattr(tree, "items"):
        return tree
    parted = {}
    for key, values in tree.items():
        blocks = re.fullmatch(r"(.*_block_)(\d+)_to_(\d+)", key)
        if blocks is None:
            parted[key] = apart(values)
            continue
        stem, first, last = blocks[1], int(blocks[2]), int(blocks[3])
        for turn, number in enumerate(range(first, last + 1)):
            parted[f"{stem}{number}"] = jax.tree.map(lambda leaf, i=turn: _row(leaf, i), values)
    return parted


def _row(leaf, turn):
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[turn]


def normal(seed, *dimensions):
    return jnp.asarray(np.random.default_rng(seed).normal(size=dimensions), jnp.float32)
