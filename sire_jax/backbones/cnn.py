"""Plain convolutional networks: the base CNN of SIRe, and VGG."""

from dataclasses import replace
from typing import Any

from sire_jax.backbones.blocks import Convolution, MaxPool
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.settings import scaled

# Convolutions in each stage.
_VGG = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _stage(convolution: Convolution, number: int, residuals: bool) -> tuple[Any, ...]:
    """Repeats a convolution and adds a max pool; the pairs before the pool have residuals."""
    ends = [residuals and i > 0 and (number - i) % 2 == 1 for i in range(number)]
    return (*[replace(convolution, residual=end) for end in ends], MaxPool())


def cnn(
    classes: int,
    width: float = 1.0,
    residuals: bool = True,
    hidden: tuple[int, ...] = (1024, 1024),
    dropout: float = 0.5,
    decoder_norm: bool = True,
    dtype: str = "float32",
) -> Planned:
    """The base CNN: four times two 3 x 3 convolutions and a max pool, three dense layers.

    Avola et al., *SIRe-Networks* (2022), Section 3.1; its dropout rate is not given.

    >>> network = cnn(classes=10, width=0.25, hidden=(64,))
    >>> len(network.plan.stages), network.plan.layers()["stage_4_block_3"]
    (4, 8)

    Args:
        classes: Number of classes.
        width: Multiplies the channels 64, 128, 256 and 512.
        residuals: Whether two subsequent convolutions are connected with their input (the Re of
            SIRe, Section 3.2), by the identity with zeros as the channels that it lacks.
        hidden: Widths of the hidden dense layers.
        dropout: Share of the hidden units that training drops, in [0, 1).
        decoder_norm: Whether decoders have batch norm. The paper does not say; the sizes that it
            prints for this network are those with it.
        dtype: ``"float32"`` or ``"bfloat16"``, of features.

    Returns:
        The network.

    Raises:
        ValueError: If a setting is out of range.
    """
    stages = tuple(
        _stage(Convolution(channels, use_bias=True, decoder_norm=decoder_norm), 2, residuals)
        for channels in scaled((64, 128, 256, 512), width)
    )
    return Planned(Plan(stages), classes, tuple(hidden), True, dropout, dtype)


def vgg(
    classes: int,
    depth: int = 16,
    width: float = 1.0,
    residuals: bool = True,
    hidden: tuple[int, ...] = (4096, 4096),
    dropout: float = 0.5,
    decoder_norm: bool = False,
    dtype: str = "float32",
) -> Planned:
    """VGG with batch norm (Simonyan and Zisserman, 2015, Table 1, columns A, B, D and E).

    Convolutions have no bias beside batch norm's; their transposes in decoders have none either.

    >>> vgg(classes=10, depth=19).plan.layers()["stage_5_block_5"]  # and three dense layers
    16

    Args:
        classes: Number of classes.
        depth: 11, 13, 16 or 19.
        width: Multiplies the channels 64 to 512.
        residuals: Whether pairs of convolutions, counted from the max pool, are connected with
            their input (Avola et al., Section 4.3).
        hidden: Widths of the hidden dense layers.
        dropout: Share of the hidden units that training drops, in [0, 1).
        decoder_norm: Whether decoders have batch norm. The paper does not say; the size that it
            prints for SIRe-VGG19 is that without.
        dtype: ``"float32"`` or ``"bfloat16"``, of features.

    Returns:
        The network.

    Raises:
        ValueError: If there is no VGG of that depth or a setting is out of range.
    """
    if depth not in _VGG:
        raise ValueError(
            f"There is no VGG of depth {depth}; there are {', '.join(map(str, _VGG))}."
        )
    widths = scaled((64, 128, 256, 512, 512), width)
    stages = tuple(
        _stage(Convolution(channels, decoder_norm=decoder_norm), number, residuals)
        for channels, number in zip(widths, _VGG[depth], strict=True)
    )
    return Planned(Plan(stages), classes, tuple(hidden), True, dropout, dtype)
