"""GoogLeNet (Szegedy et al., 2015), with batch norm."""

from dataclasses import replace

from sire_jax.backbones.blocks import Convolution, Inception, MaxPool, scaled
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.resnet import check_stem

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

    Args:
        classes: Number of classes.
        stem: ``"cifar"`` or ``"imagenet"``.
        width: Multiplies all channels.
        kernel_size: Side of the larger kernels of the inception blocks: 3 as in torchvision, whose
            parameter count the SIRe paper prints, or 5 as in the paper.
        dropout: Share of the pooled features that training drops, in [0, 1).
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
        tuple(replace(Inception(*scaled(each, width)), kernel_size=kernel_size) for each in stage)
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
