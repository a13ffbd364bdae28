"""Wide residual networks (Zagoruyko and Komodakis, 2016)."""

from typing import Any

from sire_jax.backbones.plan import Plan, Planned, around_stages
from sire_jax.backbones.preactivation import Activation, PreActivation, Stem
from sire_jax.backbones.settings import repeats, scaled


def wide_resnet(
    classes: int,
    depth: int = 28,
    width: float = 10.0,
    squeeze: int = 0,
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Planned:
    """WRN-depth-width for images of 32 x 32 (Zagoruyko and Komodakis, 2016, Table 1).

    A convolution of 16 channels, three stages of n pre-activation blocks of two 3 x 3 convolutions
    with ``16 k``, ``32 k`` and ``64 k`` channels, the last two dividing the size; batch norm and
    ReLU, the mean over all pixels, a dense layer. Where the shape changes a shortcut is a 1 x 1
    convolution. Depth ``6 n + 4`` counts the convolutions, those three among them, and not the
    dense layer. SE-WRN-16-8 (Hu et al., 2018) has ``depth=16, width=8, squeeze=16``.

    The plan's positions are behind the stem, then in the middle and at the end of each stage
    (``around_stages``).

    >>> network = wide_resnet(classes=100, depth=16, width=8, squeeze=16)
    >>> network.plan.stages[1][0].widths, network.plan.positions[-1]
    ((128, 128), 'stage_4')

    Args:
        classes: Number of classes.
        depth: 10, 16, 22, 28, 40, ….
        width: k, which multiplies all channels but those of the stem, above 0.
        squeeze: Reduction ratio of a squeeze-and-excitation at the end of each residual branch,
            0 for none.
        dropout: Share of the values that training drops inside blocks, in [0, 1).
        dtype: ``"float32"`` or ``"bfloat16"``, of features.

    Returns:
        The network. Stage 1 is the stem; its endpoints are as ``Planned`` has them.

    Raises:
        ValueError: If there is no network of that depth or a setting is out of range.
    """
    blocks = repeats("wide ResNet", depth, 6, 4)
    stages: list[tuple[Any, ...]] = [(Stem(16),)]
    for channels, stride in zip(scaled((16, 32, 64), width), (1, 2, 2), strict=True):
        first, equal = (
            PreActivation((channels, channels), (3, 3), s, "B", dropout=dropout, squeeze=squeeze)
            for s in (stride, 1)
        )
        stages.append((first, *[equal] * (blocks - 1)))
    plan = Plan(tuple(stages), (Activation(),), around_stages(blocks))
    return Planned(plan, classes, dtype=dtype)
