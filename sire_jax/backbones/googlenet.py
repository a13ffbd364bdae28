"""GoogLeNet (Szegedy et al., 2015), with batch norm."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.blocks import Block, Convolution, MaxPool, Unit
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.resnet import check_stem
from sire_jax.backbones.settings import check_odd, check_widths, scaled
from sire_jax.layers.pooling import max_pool

# Table 1: 1x1, reduced and 3x3, reduced and larger, pooled; of the stages 3, 4 and 5.
_INCEPTION = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)

# Of each path the widths and kernel sizes of its convolutions.
Paths = tuple[tuple[tuple[int, int], ...], ...]


class Inception(Block):
    """Four paths of convolutions with batch norm and ReLU, concatenated (Szegedy et al., 2015).

    1 x 1; 1 x 1 and 3 x 3; 1 x 1 and a larger one; 3 x 3 max pooling and 1 x 1. Read backwards the
    channels are split into the four paths, each is transposed, and their results are summed: what
    the transpose of a concatenation is. The max pool stays one (Avola et al., Section 4.3).

    >>> Inception(64, 96, 128, 16, 32, 32).channels(192)  # of Table 1, "3a"
    256

    Attributes:
        direct: Width of the 1 x 1 path.
        reduced: Width of the 1 x 1 convolution before the 3 x 3 one.
        middle: Width of the 3 x 3 convolution.
        reduced_large: Width of the 1 x 1 convolution before the larger one.
        large: Width of the larger convolution.
        pooled: Width of the 1 x 1 convolution behind the max pool.
        kernel_size: Side of the larger kernel, in pixels; 5 in the paper, 3 in torchvision, whose
            parameter count the SIRe paper prints.
    """

    direct: int
    reduced: int
    middle: int
    reduced_large: int
    large: int
    pooled: int
    kernel_size: int = 3
    layers = 2

    def __post_init__(self) -> None:
        check_widths("Inception", self.direct, self.reduced, self.middle)
        check_widths("Inception", self.reduced_large, self.large, self.pooled)
        check_odd("Inception", self.kernel_size)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, direct + middle + large + pooled]``."""
        paths: Paths = (
            ((self.direct, 1),),
            ((self.reduced, 1), (self.middle, 3)),
            ((self.reduced_large, 1), (self.large, self.kernel_size)),
            ((self.pooled, 1),),
        )
        inputs = (x, x, x, max_pool(x, 3, 1, (1, 1)))
        parts = [
            _path(part, units, f"path_{i}", train)
            for i, (part, units) in enumerate(zip(inputs, paths, strict=True), start=1)
        ]
        return nn.relu(jnp.concatenate(parts, axis=-1))

    def channels(self, inputs: int) -> int:
        """Returns the sum of the widths of the four paths."""
        return self.direct + self.middle + self.large + self.pooled

    def decoder(self, outputs: int, last: bool) -> nn.Module:
        """Returns the four paths read backwards, split and summed."""
        paths = (
            ((outputs, 1),),
            ((self.reduced, 3), (outputs, 1)),
            ((self.reduced_large, self.kernel_size), (outputs, 1)),
            ((outputs, 1),),
        )
        widths = (self.direct, self.middle, self.large, self.pooled)
        return _MirroredInception(paths, widths, last, parent=None)


def _path(
    x: Array, units: tuple[tuple[int, int], ...], name: str, train: bool, transposed: bool = False
) -> Array:
    for i, unit in enumerate(units, start=1):
        x = Unit(*unit, transposed=transposed, name=f"{name}_{i}")(x, train=train)
        x = nn.relu(x) if i < len(units) else x
    return x


class _MirroredInception(nn.Module):
    paths: Paths
    widths: tuple[int, ...]
    last: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        starts = [sum(self.widths[:i]) for i in range(1, len(self.widths))]
        parts = jnp.split(x, starts, axis=-1)
        parts[-1] = max_pool(parts[-1], 3, 1, (1, 1))
        ends = [
            _path(part, units, f"path_{i}", train, transposed=True)
            for i, (part, units) in enumerate(zip(parts, self.paths, strict=True), start=1)
        ]
        # The transpose of using one input four times.
        y = functools.reduce(jnp.add, ends)
        return y if self.last else nn.relu(y)


def googlenet(
    classes: int,
    stem: str = "cifar",
    width: float = 1.0,
    kernel_size: int = 3,
    dropout: float = 0.2,
    dtype: str = "float32",
) -> Planned:
    """GoogLeNet with batch norm; its two auxiliary classifiers are heads (``classifier``).

    Four stages, each ending with one of the four max pools, and a tail of two inception blocks. The
    auxiliary classifiers belong to ``stage_4_block_1`` and ``stage_4_block_4`` (Section 5). With
    the CIFAR stem the first convolution is 3 x 3 of stride 1 instead of 7 x 7 of stride 2; the
    pools stay, so that 32 x 32 pixels end as 2 x 2.

    >>> import sire_jax as sj
    >>> network = sj.Network(
    ...     googlenet(classes=10),
    ...     {"early": sj.heads.ConvolutionalClassifier(("stage_4_block_1",), classes=10)},
    ... )
    >>> network.backbone.plan.layers()["stage_4_block_1"]
    9

    Args:
        classes: Number of classes.
        stem: ``"cifar"`` or ``"imagenet"``.
        width: Multiplies all channels.
        kernel_size: Side of the larger kernels of the inception blocks: 3 as in torchvision, whose
            parameter count the SIRe paper prints, or 5 as in the paper.
        dropout: Share of the pooled features that training drops, in [0, 1); 0.2 as in torchvision,
            0.4 in the paper.
        dtype: ``"float32"`` or ``"bfloat16"``, of features.

    Returns:
        The network.

    Raises:
        ValueError: If a setting is out of range.
    """
    check_stem(stem)
    # What is left over at the end of a map has a window of its own.
    pool = MaxPool(3, 2, (0, 1))
    inception = [
        tuple(Inception(*scaled(widths, width)).clone(kernel_size=kernel_size) for widths in stage)
        for stage in _INCEPTION
    ]
    first, reduced, second = scaled((64, 64, 192), width)
    opening = Convolution(first, 7, 2) if stem == "imagenet" else Convolution(first, 3)
    stages = (
        (opening, pool),
        (Convolution(reduced, 1), Convolution(second, 3), pool),
        (*inception[0], pool),
        (*inception[1], MaxPool()),
    )
    return Planned(Plan(stages, tail=inception[2]), classes, dropout=dropout, dtype=dtype)
