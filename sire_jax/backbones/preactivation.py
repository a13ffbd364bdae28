"""Residual networks with pre-activation (He et al., *Identity Mappings*, 2016)."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.blocks import Block
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.settings import (
    check_convolutions,
    check_odd,
    check_widths,
    repeats,
    scaled,
    strides,
)
from sire_jax.layers import BatchNorm, Conv, Dropout, SqueezeExcitation, he_normal

SHORTCUTS = ("A", "B")


class Stem(Block):
    """A convolution alone, without batch norm or activation.

    >>> Stem(16).channels(3), Stem(16).layers
    (16, 1)

    Attributes:
        width: Output channels.
        kernel_size: Side of the kernel, in pixels, odd.
    """

    width: int
    kernel_size: int = 3

    def __post_init__(self) -> None:
        check_widths("Stem", self.width)
        check_odd("Stem", self.kernel_size)
        super().__post_init__()

    def channels(self, inputs: int) -> int:
        """Returns ``width``."""
        return self.width

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, width]``."""
        return convolution(self.width, self.kernel_size, 1, "conv")(x)


def convolution(width: int, kernel_size: int, stride: int, name: str) -> Conv:
    """Makes a convolution without bias, which keeps the size or divides it by its stride."""
    padding = kernel_size // 2
    return Conv(width, kernel_size, padding, stride, False, he_normal, name=name)


class Activation(Block):
    """Batch norm and ReLU: the end of a network with pre-activation.

    >>> Activation().channels(64), Activation().layers  # it adds no layer
    (64, 0)
    """

    layers = 0

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to the same shape."""
        return nn.relu(BatchNorm(name="norm")(x, train=train))


class PreActivation(Block):
    """A residual block whose batch norm and ReLU come before its convolutions.

    ``y = lambda shortcut(x) + F(x)``, ``F``: batch norm, ReLU, convolution, once a width (He et
    al., *Identity Mappings*, 2016, Fig. 1b; lambda: Guo et al., *The Shallow End*, Eq. 1).

    >>> block = PreActivation((64, 64, 256), (1, 3, 1), stride=2)  # a bottleneck
    >>> block.channels(128), block.stride, block.layers
    (256, 2, 3)

    Attributes:
        widths: Output channels of the convolutions.
        kernel_sizes: Sides of their kernels, in pixels, odd.
        stride: By how much the first convolution larger than 1 x 1 divides height and width.
        shortcut: Where the shape changes, ``"A"`` takes every stride-th pixel of the input and adds
            zeros as the channels that it lacks, ``"B"`` is a 1 x 1 convolution of the activated
            input (He et al., *Deep Residual Learning*, 2016, Section 3.3).
        shortcut_scale: The lambda.
        dropout: Share of the values that training drops before the last convolution, in [0, 1)
            (Zagoruyko and Komodakis, 2016, Section 2.4).
        squeeze: Reduction ratio of a squeeze-and-excitation (``SqueezeExcitation``) at the end of
            ``F``, 0 for none.

    Raises:
        ValueError: If widths, kernels, stride, shortcut, its scale or squeeze are out of range.
    """

    widths: tuple[int, ...]
    kernel_sizes: tuple[int, ...] = (3, 3)
    stride: int = 1
    shortcut: str = "A"
    shortcut_scale: float = 1.0
    dropout: float = 0.0
    squeeze: int = 0
    # So that 1001 layers compile in a fifth of the time.
    loops = True

    def __post_init__(self) -> None:
        check_convolutions("PreActivation", self.widths, self.kernel_sizes, self.stride)
        if self.shortcut not in SHORTCUTS:
            raise ValueError(
                f"shortcut is {self.shortcut!r}; it should be one of {', '.join(SHORTCUTS)}."
            )
        if not 0 <= self.shortcut_scale < math.inf:
            raise ValueError(
                f"shortcut_scale is {self.shortcut_scale}; it should be at least 0 and finite."
            )
        if not 0 <= self.squeeze <= self.widths[-1]:
            raise ValueError(
                f"squeeze is {self.squeeze}; it should be 0, for none, or at least 1 and at most"
                f" the block's {self.widths[-1]} channels."
            )
        super().__post_init__()

    @property
    def layers(self) -> int:  # type: ignore[override]
        """How many layers it counts as: its convolutions; a shortcut's is not counted."""
        return len(self.widths)

    def channels(self, inputs: int) -> int:
        """Returns the last width."""
        return self.widths[-1]

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h / stride, w / stride, widths[-1]]``."""
        last = len(self.widths) - 1
        changes = self.stride > 1 or x.shape[-1] != self.widths[-1]
        y, shortcut = x, x
        sizes = self.kernel_sizes
        units = zip(self.widths, sizes, strides(sizes, self.stride), strict=True)
        for i, unit in enumerate(units):
            y = nn.relu(BatchNorm(name=f"norm_{i + 1}")(y, train=train))
            if i == 0 and self.shortcut == "B" and changes:
                shortcut = convolution(self.widths[-1], 1, self.stride, "shortcut")(y)
            y = Dropout(self.dropout)(y, train=train) if i == last else y
            y = convolution(*unit, f"conv_{i + 1}")(y)
        y = SqueezeExcitation(self.squeeze, name="squeeze")(y) if self.squeeze else y
        if self.shortcut == "A":
            shortcut = _pad_channels(x[:, :: self.stride, :: self.stride], y.shape[-1])
        # A scale of 1 is no operation.
        return y + (shortcut if self.shortcut_scale == 1 else self.shortcut_scale * shortcut)


def _pad_channels(x: Array, channels: int) -> Array:
    if x.shape[-1] > channels:
        raise ValueError(
            f"A shortcut of type A can't lead from {x.shape[-1]} channels to {channels}, only to"
            " as many or more; take type B."
        )
    return jnp.pad(x, [(0, 0)] * 3 + [(0, channels - x.shape[-1])])


def preactivation_resnet(
    classes: int,
    depth: int = 56,
    width: float = 1.0,
    bottleneck: bool = False,
    shortcut: str = "A",
    shortcut_scale: float = 1.0,
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Planned:
    """Pre-activation ResNet for images of 32 x 32 (He et al., *Identity Mappings*, 2016).

    A convolution, three stages of n blocks with ``16 N``, ``32 N`` and ``64 N`` channels (four
    times as many at the end of a bottleneck), batch norm and ReLU, the mean over all pixels, a
    dense layer. Depth ``6 n + 2``, of bottlenecks ``9 n + 2``, counts the convolutions and the
    dense layer. Guo et al. (*The Shallow End*) call it ResNet-depth/N.

    >>> plan = preactivation_resnet(classes=10, depth=20).plan
    >>> plan.layers()["stage_4_block_3"]  # the dense layer is the twentieth
    19

    Args:
        classes: Number of classes.
        depth: 20, 26, 32, 44, 56, 110, …, or with bottlenecks 164, 1001, ….
        width: N, which multiplies all channels, above 0.
        bottleneck: Whether blocks are 1 x 1, 3 x 3, 1 x 1 convolutions rather than two of 3 x 3.
        shortcut: Type ``"A"`` or ``"B"`` (``PreActivation``).
        shortcut_scale: Lambda of the shortcuts, at least 0; 1 is the identity.
        dropout: Share of the values that training drops inside blocks, in [0, 1).
        dtype: ``"float32"`` or ``"bfloat16"``, of features.

    Returns:
        The network. Stage 1 is the first convolution; its endpoints are as ``Planned`` has them.

    Raises:
        ValueError: If there is no network of that depth or a setting is out of range.
    """
    convolutions = 3 if bottleneck else 2
    blocks = repeats("ResNet", depth, 3 * convolutions, 2, " with bottlenecks" * bottleneck)
    first, *widths = scaled((16, 16, 32, 64), width)

    def block(width: int, stride: int) -> PreActivation:
        outer = (width, width, 4 * width) if bottleneck else (width, width)
        sizes = (1, 3, 1) if bottleneck else (3, 3)
        return PreActivation(outer, sizes, stride, shortcut, shortcut_scale, dropout)

    stages: list[tuple[Any, ...]] = [(Stem(first),)]
    for channels, stride in zip(widths, (1, 2, 2), strict=True):
        stages.append((block(channels, stride), *[block(channels, 1)] * (blocks - 1)))
    return Planned(Plan(tuple(stages), tail=(Activation(),)), classes, dtype=dtype)
