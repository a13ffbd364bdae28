"""Blocks of plans: each is a module that also knows its mirror, which reads it backwards."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.settings import (
    check_convolutions,
    check_odd,
    check_stride,
    check_widths,
    strides,
)
from sire_jax.layers import BatchNorm, Conv, TransposedConv, he_normal
from sire_jax.layers.pooling import max_pool, upsample


class Block(nn.Module):
    """What a plan consists of: a module that says what it does to sizes and channels.

    It is called with ``(x, before, train=…)``, where ``before`` is what the block before it was
    given (its own input, of a stage's first block). A block that can be mirrored also has a method
    ``decoder(outputs, last)``: it returns a module (without a parent: ``parent=None``) that reads
    the block backwards, called with ``(x, train=…)``, from its output to its input of ``outputs``
    channels and ``stride`` times the size. The ``last`` block of a decoder ends linearly: its
    output may take any value.

    >>> class Half(Block):
    ...     stride: int = 2
    ...     def __call__(self, x, before, *, train):
    ...         return x[:, ::2, ::2]
    ...     def decoder(self, outputs, last):
    ...         return Repeat(parent=None)
    >>> class Repeat(nn.Module):
    ...     def __call__(self, x, *, train):
    ...         return upsample(x, 2)
    >>> mirror = Half().decoder(outputs=3, last=False)
    >>> Half().channels(3), mirror(jnp.ones((1, 2, 2, 3)), train=False).shape
    (3, (1, 4, 4, 3))

    Attributes:
        stride: By how much the block divides height and width. As a field it comes after those
            without a default, as it has one.
        layers: How many layers it counts as, one if it doesn't say.
        skips: Whether decoders have a long skip connection around its mirror.
        loops: Whether equal blocks may be applied in a loop: it does not use ``before``.
    """

    # Without annotations they are no fields, which those of a block would have to follow.
    stride = 1
    layers = 1
    skips = True
    loops = False

    def __init_subclass__(cls, **settings: Any) -> None:
        # Neither computes anything: Flax would make what they return a child of the block.
        for name in {"channels", "decoder"} & vars(cls).keys():
            setattr(cls, name, nn.nowrap(vars(cls)[name]))
        super().__init_subclass__(**settings)

    @nn.nowrap
    def channels(self, inputs: int) -> int:
        """Returns the output channels for so many input channels; as many if it doesn't say."""
        return inputs

    @nn.nowrap
    def __repr__(self) -> str:
        # Flax would write it over several lines: messages have it in a sentence.
        names = (field.name for field in dataclasses.fields(self))
        settings = [name for name in names if name not in ("parent", "name")]
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)
        return f"{type(self).__name__}({shown})"


class Unit(nn.Module):
    """A convolution, which keeps the size or divides it by its stride, and batch norm.

    Attributes:
        features: Output channels.
        kernel_size: Side of the kernel, in pixels.
        stride: By how much the size is divided; transposed: multiplied, by nearest up-sampling.
        transposed: Whether the convolution is a transposed one.
        use_bias: Whether the convolution has a bias.
        norm: Whether there is batch norm.
    """

    features: int
    kernel_size: int
    stride: int = 1
    transposed: bool = False
    use_bias: bool = False
    norm: bool = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h', w', features]``."""
        if self.transposed:
            # A 1 x 1 kernel sees the repeated pixels one by one: repeat its results instead.
            before = self.stride if self.kernel_size > 1 else 1
            x = upsample(x, before)
            x = TransposedConv(self.features, self.kernel_size, self.use_bias, name="conv")(x)
        else:
            x = Conv(
                self.features,
                self.kernel_size,
                padding=self.kernel_size // 2,
                stride=self.stride,
                use_bias=self.use_bias,
                kernel_init=he_normal,
                name="conv",
            )(x)
        x = BatchNorm(name="norm")(x, train=train) if self.norm else x
        repeats_after = self.transposed and self.kernel_size == 1
        return upsample(x, self.stride) if repeats_after else x


class Convolution(Block):
    """A convolution with batch norm and ReLU.

    >>> block = Convolution(16, stride=2)
    >>> block.channels(3), block.stride, block.layers
    (16, 2, 1)

    Attributes:
        width: Output channels.
        kernel_size: Side of the kernel, in pixels, odd.
        stride: By how much it divides height and width.
        use_bias: Whether the convolution has a bias beside batch norm.
        residual: Whether the input of the block before is added ahead of the ReLU, with zeros as
            the channels that it lacks: two subsequent convolutions connected with their input
            (Avola et al., Section 3.2). Decoders leave it out.
        decoder_norm: Whether the transposed convolution of a decoder has batch norm, too.
    """

    width: int
    kernel_size: int = 3
    stride: int = 1
    use_bias: bool = False
    residual: bool = False
    decoder_norm: bool = True

    def __post_init__(self) -> None:
        check_widths("Convolution", self.width)
        check_odd("Convolution", self.kernel_size)
        check_stride("Convolution", self.stride)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h / stride, w / stride, width]``."""
        unit = (self.width, self.kernel_size, self.stride)
        y = Unit(*unit, use_bias=self.use_bias, name="unit")(x, train=train)
        return nn.relu(y + _as_channels(before, y.shape) if self.residual else y)

    def channels(self, inputs: int) -> int:
        """Returns ``width``."""
        return self.width

    def decoder(self, outputs: int, last: bool) -> nn.Module:
        """Returns a transposed convolution with batch norm and ReLU; alone and biased if last."""
        unit = (outputs, self.kernel_size, self.stride)
        norm = self.decoder_norm and not last
        return _MirroredConvolution(unit, self.use_bias or last, norm, last, parent=None)


def _as_channels(x: Array, shape: Sequence[int]) -> Array:
    """Fills up the channels of ``[b, h, w, c]`` with zeros."""
    if x.shape[:-1] != tuple(shape[:-1]) or x.shape[-1] > shape[-1]:
        raise ValueError(
            f"A residual connection can't add {x.shape} to {tuple(shape)}: it needs two"
            " convolutions of stride 1, the second not narrower than their input."
        )
    return jnp.pad(x, [(0, 0)] * 3 + [(0, shape[-1] - x.shape[-1])])


class _MirroredConvolution(nn.Module):
    unit: tuple[int, int, int]
    use_bias: bool
    norm: bool
    last: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        unit = Unit(*self.unit, True, self.use_bias, self.norm, name="unit")
        # An image would lose more in half precision than is left of its error.
        y = unit(x.astype(jnp.float32) if self.last else x, train=train)
        return y if self.last else nn.relu(y)


class MaxPool(Block):
    """Max pooling; its mirror is nearest up-sampling.

    >>> x = jnp.ones((2, 8, 8, 3))
    >>> MaxPool().apply({}, x, x, train=False).shape
    (2, 4, 4, 3)

    Attributes:
        size: Side of the windows, in pixels.
        stride: By how much it divides height and width.
        padding: Rows and columns added before and after the image.

    Raises:
        ValueError: If size or stride is below 1, or the padding negative or as large as the size.
    """

    size: int = 2
    stride: int = 2
    padding: tuple[int, int] = (0, 0)
    # It has no parameters: a decoder has no long skip connection around its mirror.
    skips = False
    layers = 0

    def __post_init__(self) -> None:
        check_stride("MaxPool", self.stride)
        if self.size < 1 or not all(0 <= pad < self.size for pad in self.padding):
            raise ValueError(
                f"A MaxPool has size {self.size} and padding {self.padding}; the size should be at"
                " least 1 and the padding smaller."
            )
        super().__post_init__()

    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h', w', c]``."""
        return max_pool(x, self.size, self.stride, self.padding)

    def decoder(self, outputs: int, last: bool) -> nn.Module:
        """Returns nearest up-sampling.

        Raises:
            ValueError: If the windows don't divide the size by the stride.
        """
        # (n + padding - size) // stride + 1 = n / stride, of any n that the stride divides.
        if not self.size - self.stride <= sum(self.padding) < self.size:
            raise ValueError(
                f"{self} doesn't divide sizes by {self.stride}: its padding should sum to at least"
                f" {self.size - self.stride} and less than {self.size}."
            )
        return _Upsample(self.stride, parent=None)


class _Upsample(nn.Module):
    factor: int

    def __call__(self, x: Array, *, train: bool) -> Array:
        return upsample(x, self.factor)


class Residual(Block):
    """Convolutions with batch norm, and a shortcut around them (He et al., 2016, Fig. 5).

    The shortcut is the identity, or a 1 x 1 convolution with batch norm where the shape changes
    (their option B). Read backwards it is a residual block of transposed convolutions.

    >>> Residual((64, 64, 256), (1, 3, 1)).channels(64)  # a bottleneck
    256

    Attributes:
        widths: Output channels of the convolutions.
        kernel_sizes: Sides of their kernels, in pixels, odd.
        stride: By how much the first convolution larger than 1 x 1 divides height and width.
    """

    widths: tuple[int, ...]
    kernel_sizes: tuple[int, ...] = (3, 3)
    stride: int = 1

    def __post_init__(self) -> None:
        check_convolutions("Residual", self.widths, self.kernel_sizes, self.stride)
        super().__post_init__()

    @property
    def layers(self) -> int:  # type: ignore[override]
        """How many layers it counts as: its convolutions, without the shortcut's."""
        return len(self.widths)

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h / stride, w / stride, widths[-1]]``."""
        return nn.relu(_residual(x, self._units(self.widths), self.stride, False, train))

    def channels(self, inputs: int) -> int:
        """Returns the last width."""
        return self.widths[-1]

    def decoder(self, outputs: int, last: bool) -> nn.Module:
        """Returns the block read backwards: its last convolution first, each to its input."""
        units = self._units((outputs, *self.widths[:-1]))[::-1]
        return _MirroredResidual(units, self.stride, last, parent=None)

    @nn.nowrap
    def _units(self, widths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        sizes = self.kernel_sizes
        return tuple(zip(widths, sizes, strides(sizes, self.stride), strict=True))


class _MirroredResidual(nn.Module):
    units: tuple[tuple[int, int, int], ...]
    stride: int
    last: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = _residual(x, self.units, self.stride, True, train)
        return y if self.last else nn.relu(y)


def _residual(
    x: Array, units: Sequence[tuple[int, int, int]], stride: int, transposed: bool, train: bool
) -> Array:
    """Returns the sum of convolutions and a shortcut; they belong to the module that calls it."""
    y, shortcut = x, x
    for i, unit in enumerate(units, start=1):
        y = Unit(*unit, transposed=transposed, name=f"unit_{i}")(y, train=train)
        # The last ReLU comes behind the sum.
        y = nn.relu(y) if i < len(units) else y
    if stride > 1 or x.shape[-1] != y.shape[-1]:
        projection = Unit(y.shape[-1], 1, stride, transposed=transposed, name="shortcut")
        shortcut = projection(x, train=train)
    return y + shortcut
