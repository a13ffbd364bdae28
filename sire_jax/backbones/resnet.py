"""Residual networks (He et al., 2016)."""

from sire_jax.backbones.blocks import Convolution, MaxPool, Residual
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.settings import scaled

# Blocks in each stage, and whether they are bottlenecks.
_RESNET = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
STEMS = ("cifar", "imagenet")


def check_stem(stem: str) -> None:
    """Checks the name of a stem.

    Raises:
        ValueError: If there is no such stem.
    """
    if stem not in STEMS:
        raise ValueError(f"stem is {stem!r}; it should be one of {', '.join(STEMS)}.")


def _block(width: int, bottleneck: bool, stride: int) -> Residual:
    if bottleneck:
        return Residual((width, width, 4 * width), (1, 3, 1), stride)
    return Residual((width, width), (3, 3), stride)


def resnet(
    classes: int,
    depth: int = 34,
    stem: str = "cifar",
    width: float = 1.0,
    extra: tuple[int, ...] = (),
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Planned:
    """ResNet-18, 34, 50 or 101 (He et al., 2016, Table 1), with projection shortcuts.

    Five stages: the stem, and the four of residual blocks. With the ImageNet stem (a 7 x 7
    convolution of stride 2, then a max pool) each stage starts with a down-sampling; with the CIFAR
    stem (a 3 x 3 convolution) the first two keep the size, so that 32 x 32 pixels end as 4 x 4.
    Bottlenecks are divided by their 3 x 3 convolution, as in torchvision. The plan's positions are
    behind the four stages of residual blocks.

    Palacio et al. (*Contextual Classification*, Section 4.3) compare a ResNet-18 with a width of
    1.5 (WideResNet18), with four further convolutions of 256 channels (DeepResNet18) and with four
    of 512 (DWResNet18).

    >>> plan = resnet(classes=10, depth=18).plan
    >>> plan.positions, plan.layers()["stage_5_block_2"]
    (('stage_2', 'stage_3', 'stage_4', 'stage_5'), 17)

    Args:
        classes: Number of classes.
        depth: 18, 34, 50 or 101.
        stem: ``"cifar"`` or ``"imagenet"``.
        width: Multiplies all channels but those of ``extra``.
        extra: Output channels of further 3 x 3 convolutions with batch norm and ReLU before the
            first residual block, behind the stem and its pool: the first blocks of stage 2.
        dropout: Share of the pooled features that training drops, in [0, 1).
        dtype: ``"float32"`` or ``"bfloat16"``, of features.

    Returns:
        The network.

    Raises:
        ValueError: If there is no ResNet of that depth or a setting is out of range.
    """
    if depth not in _RESNET:
        depths = ", ".join(map(str, _RESNET))
        raise ValueError(f"There is no ResNet of depth {depth}; there are {depths}.")
    check_stem(stem)
    numbers, bottleneck = _RESNET[depth]
    widths = scaled((64, 128, 256, 512), width)
    imagenet = stem == "imagenet"
    first = Convolution(widths[0], 7, 2) if imagenet else Convolution(widths[0], 3)
    # Of even sizes a row after the image, as others add it, would be in no window.
    pool = (MaxPool(3, 2, (1, 0)),) if imagenet else ()
    further = [Convolution(channels) for channels in extra]
    stages = [(first,), (*pool, *further, *[_block(widths[0], bottleneck, 1)] * numbers[0])]
    for channels, number in zip(widths[1:], numbers[1:], strict=True):
        equal = [_block(channels, bottleneck, 1)] * (number - 1)
        stages.append((_block(channels, bottleneck, 2), *equal))
    positions = tuple(f"stage_{i}" for i in (2, 3, 4, 5))
    plan = Plan(tuple(stages), positions=positions)
    return Planned(plan, classes, dropout=dropout, dtype=dtype)
