"""Densely connected networks (Huang et al., 2017)."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.blocks import Block
from sire_jax.backbones.plan import Plan, Planned, around_stages
from sire_jax.backbones.preactivation import Activation, Stem, convolution
from sire_jax.backbones.settings import check_widths, repeats
from sire_jax.layers import BatchNorm, Dropout
from sire_jax.layers.pooling import average_pool

# Channels of the 1 x 1 convolution of a layer, as a multiple of the growth.
_BOTTLENECK = 4


def _activated(x: Array, features: int, kernel_size: int, i: int, train: bool) -> Array:
    """Batch norm, ReLU and a convolution that keeps the size."""
    x = nn.relu(BatchNorm(name=f"norm_{i}")(x, train=train))
    return convolution(features, kernel_size, 1, f"conv_{i}")(x)


class DenseLayers(Block):
    """Layers that each add channels to all those before (Huang et al., 2017, Section 3).

    ``x_l = H_l([x_0, ..., x_(l-1)])``, the result is ``[x_0, ..., x_n]``; ``H``: batch norm, ReLU,
    a 1 x 1 convolution to ``4 growth`` channels, batch norm, ReLU, a 3 x 3 convolution to
    ``growth`` channels.

    Within a block gradients add up part by part. Layers that were blocks of their own would compile
    several times as long and train at half the speed: to the gradient of each layer the compiler
    would compute those of all later ones again.

    >>> layers = DenseLayers(number=4, growth=12)
    >>> layers.channels(24), layers.layers
    (72, 8)

    Attributes:
        number: n, how many layers.
        growth: How many channels each adds.
        dropout: Share of the values that training drops after each convolution, in [0, 1).

    Raises:
        ValueError: If number or growth is below 1.
    """

    number: int
    growth: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(
                f"A DenseLayers has {self.number} layers; its number should be at least 1."
            )
        check_widths("DenseLayers", self.growth)
        super().__post_init__()

    @property
    def layers(self) -> int:  # type: ignore[override]
        """How many layers it counts as: its convolutions."""
        return 2 * self.number

    def channels(self, inputs: int) -> int:
        """Returns ``inputs + number growth``."""
        return inputs + self.number * self.growth

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, c + number growth]``."""
        parts = [x]
        for i in range(1, self.number + 1):
            layer = _DenseLayer(self.growth, self.dropout, name=f"layer_{i}")
            parts.append(layer(jnp.concatenate(parts, axis=-1), train=train))
        return jnp.concatenate(parts, axis=-1)


class _DenseLayer(nn.Module):
    growth: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = _activated(x, _BOTTLENECK * self.growth, 1, 1, train)
        x = Dropout(self.dropout)(x, train=train)
        x = _activated(x, self.growth, 3, 2, train)
        return Dropout(self.dropout)(x, train=train)


class Transition(Block):
    """What divides the size between dense blocks (Huang et al., 2017, Section 3).

    Batch norm, ReLU, a 1 x 1 convolution to ``floor(reduction c)`` channels, 2 x 2 average pooling.

    >>> Transition(reduction=0.5).channels(72), Transition().stride
    (36, 2)

    Attributes:
        reduction: Share of the channels that it keeps, in (0, 1].
        dropout: Share of the values that training drops after the convolution, in [0, 1).

    Raises:
        ValueError: If the reduction is out of its range.
    """

    reduction: float = 0.5
    dropout: float = 0.0
    stride = 2

    def __post_init__(self) -> None:
        if not 0 < self.reduction <= 1:
            raise ValueError(f"reduction is {self.reduction}; it should be in (0, 1].")
        super().__post_init__()

    def channels(self, inputs: int) -> int:
        """Returns ``floor(reduction inputs)``.

        Raises:
            ValueError: If no channel is left.
        """
        outputs = math.floor(self.reduction * inputs)
        if outputs < 1:
            raise ValueError(
                f"A Transition leaves none of {inputs} channels: its reduction is"
                f" {self.reduction}; it should be at least 1 / {inputs}."
            )
        return outputs

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h / 2, w / 2, reduction c]``."""
        y = _activated(x, self.channels(x.shape[-1]), 1, 1, train)
        return average_pool(Dropout(self.dropout)(y, train=train))


def densenet(
    classes: int,
    depth: int = 100,
    growth: int = 12,
    reduction: float = 0.5,
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Planned:
    """DenseNet-BC-depth-growth for images of 32 x 32 (Huang et al., 2017, Section 3).

    A 3 x 3 convolution of ``2 growth`` channels, three dense blocks of n layers with a transition
    behind the first two, batch norm and ReLU, the mean over all pixels, a dense layer. Depth
    ``6 n + 4`` counts the convolutions and the dense layer.

    Stage 1 is the first convolution, the stages 2 and 3 a dense block and its transition each,
    stage 4 the third dense block, each dense block in two halves. The plan's positions are behind
    the first convolution, then in the middle of each dense block and at the end of its stage
    (``around_stages``).

    >>> network = densenet(classes=10, depth=40, growth=12)
    >>> network.plan.positions[:3], network.plan.layers()["stage_2_block_2"]
    (('stage_1', 'stage_2_block_1', 'stage_2'), 13)

    Args:
        classes: Number of classes.
        depth: 10, 16, …, 100, 190, 250, ….
        growth: How many channels each layer adds, at least 1.
        reduction: Share of the channels that a transition keeps, in (0, 1].
        dropout: Share of the values that training drops after each convolution but the first, in
            [0, 1); the paper takes 0.2 of images that are not augmented.
        dtype: ``"float32"`` or ``"bfloat16"``, of features.

    Returns:
        The network; its endpoints are as ``Planned`` has them.

    Raises:
        ValueError: If there is no network of that depth or a setting is out of range.
    """
    number = repeats("DenseNet-BC", depth, 6, 4)
    # Of one layer there is no first half.
    halves = [half for half in (number // 2, number - number // 2) if half]
    layers = tuple(DenseLayers(half, growth, dropout) for half in halves)
    divided = (*layers, Transition(reduction, dropout))
    stages = ((Stem(2 * growth),), divided, divided, layers)
    plan = Plan(stages, (Activation(),), around_stages(len(halves)))
    return Planned(plan, classes, dtype=dtype)
