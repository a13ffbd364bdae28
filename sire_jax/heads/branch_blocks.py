"""Blocks of the branches that SSAL attaches; any block of a plan can be one, too."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.blocks import Block, Unit
from sire_jax.backbones.settings import check_odd, check_widths
from sire_jax.layers import BatchNorm, SqueezeExcitation, he_normal
from sire_jax.layers.convolution import convolve_line
from sire_jax.layers.pooling import local_mean


class ExpandedInception(Block):
    """Four paths of convolutions with batch norm and ReLU, concatenated; the size is kept.

    1 x 1; 1 x 1, then 1 x 3 beside 3 x 1; two of 1 x 1, then 1 x 3 beside 3 x 1; 3 x 3 average
    pooling, then 3 x 1 (after Szegedy et al., *Rethinking the Inception Architecture*, 2016, Fig.
    7; widths as released with Palacio et al.).

    >>> block = ExpandedInception(width=16, reduced=20, pooled=12)
    >>> block.channels(8), block.stride, block.layers  # 5 x 16 + 12 channels
    (92, 1, 3)

    Attributes:
        width: Output channels of all convolutions but two.
        reduced: Those of the third path's first convolution.
        pooled: Those of the convolution behind the pool.
    """

    width: int = 128
    reduced: int = 160
    pooled: int = 108
    layers = 3

    def __post_init__(self) -> None:
        check_widths("ExpandedInception", self.width, self.reduced, self.pooled)
        super().__post_init__()

    def channels(self, inputs: int) -> int:
        """Returns the sum of the widths of the paths."""
        return 5 * self.width + self.pooled

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, 5 width + pooled]``."""

        def unit(x: Array, width: int, name: str) -> Array:
            return nn.relu(Unit(width, 1, name=name)(x, train=train))

        def line(x: Array, width: int, axis: int, name: str) -> Array:
            return nn.relu(_LineUnit(width, 3, axis, name=name)(x, train=train))

        second = unit(x, self.width, "second")
        third = unit(unit(x, self.reduced, "third_1"), self.width, "third_2")
        paths = [unit(x, self.width, "first")]
        for name, start in (("second", second), ("third", third)):
            paths.append(line(start, self.width, 2, f"{name}_row"))
            paths.append(line(start, self.width, 1, f"{name}_column"))
        paths.append(line(local_mean(x, 3), self.pooled, 1, "pooled"))
        return jnp.concatenate(paths, -1)


class _LineUnit(nn.Module):
    """A convolution along an axis, and batch norm."""

    features: int
    kernel_size: int
    axis: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        shape = (self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, shape)
        y = convolve_line(x, kernel.astype(x.dtype), self.axis)
        return BatchNorm(name="norm")(y, train=train)


class AveragePool(Block):
    """Average pooling of windows around each pixel, which keeps the size.

    >>> x = jnp.ones((2, 4, 4, 8))
    >>> AveragePool(3).apply({}, x, x, train=False).shape
    (2, 4, 4, 8)

    Attributes:
        size: Side of the windows, in pixels, odd; what is outside the image does not count.
    """

    size: int = 3
    layers = 0

    def __post_init__(self) -> None:
        check_odd("AveragePool", self.size)
        super().__post_init__()

    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to the same shape."""
        return local_mean(x, self.size)


class Recalibration(Block):
    """Squeeze-and-excitation: channels are scaled by what the whole image shows of them.

    >>> import jax
    >>> from functools import partial
    >>> block, x = Recalibration(reduction=4), jnp.ones((2, 4, 4, 8))
    >>> variables = jax.eval_shape(partial(block.init, train=False), jax.random.key(0), x, x)
    >>> variables["params"]["squeeze"]["reduce"]["kernel"].shape
    (8, 2)

    Attributes:
        reduction: By how much the layer between is narrower than the features
            (``layers.SqueezeExcitation``).
    """

    reduction: int = 16
    layers = 2

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to the same shape."""
        return SqueezeExcitation(self.reduction, name="squeeze")(x)


class GlobalPool(Block):
    """The mean over all pixels: ``[b, h, w, c]`` becomes ``[b, c]``.

    >>> x = jnp.ones((2, 4, 4, 8))
    >>> GlobalPool().apply({}, x, x, train=False).shape
    (2, 8)
    """

    layers = 0

    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, c]``."""
        return x.mean(tuple(range(1, x.ndim - 1)))


class Dense(Block):
    """A dense layer with ReLU, of pooled features.

    >>> import jax
    >>> from functools import partial
    >>> block, x = Dense(16), jnp.ones((2, 8))
    >>> apply = partial(block.init_with_output, train=False)
    >>> jax.eval_shape(apply, jax.random.key(0), x, x)[0].shape
    (2, 16)

    Attributes:
        width: Number of units.
    """

    width: int

    def __post_init__(self) -> None:
        check_widths("Dense", self.width)
        super().__post_init__()

    def channels(self, inputs: int) -> int:
        """Returns ``width``."""
        return self.width

    @nn.compact
    def __call__(self, x: Array, before: Array, *, train: bool) -> Array:
        """Maps ``[b, c]`` to ``[b, width]``."""
        # Without a dtype Flax would go from half precision to that of the parameters.
        dense = nn.Dense(self.width, kernel_init=he_normal, dtype=x.dtype, name="dense")
        return nn.relu(dense(x))
