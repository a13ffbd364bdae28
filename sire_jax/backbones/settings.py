"""Settings of backbones and blocks: checked, and made into widths and numbers of blocks."""

import math
from collections.abc import Sequence

# More are a slip: one convolution would have a trillion parameters.
_MOST_CHANNELS = 2**18


def scaled(widths: Sequence[int], multiple: float) -> tuple[int, ...]:
    """Multiplies widths, to whole channels.

    >>> scaled((64, 128), 0.3)
    (19, 38)

    Args:
        widths: Channels.
        multiple: What they are multiplied by, above 0.

    Returns:
        At least one channel each.

    Raises:
        ValueError: If the multiple is not above 0 or not finite, or very large.
    """
    if not 0 < multiple < math.inf:
        raise ValueError(f"width is {multiple}; it should be above 0 and finite.")
    # No widths, of which there is no largest, are those of a pool in a branch.
    multiplied = tuple(max(1, round(multiple * width)) for width in widths)
    if max(multiplied, default=1) > _MOST_CHANNELS:
        raise ValueError(
            f"width is {multiple}, which makes {max(multiplied)} channels; it should make at most"
            f" {_MOST_CHANNELS:,}."
        )
    return multiplied


def repeats(kind: str, depth: int, unit: int, rest: int, note: str = "") -> int:
    """Returns how many blocks a stage has in a network of a depth.

    >>> repeats("ResNet", depth=56, unit=6, rest=2)
    9

    Args:
        kind: The network, for the message.
        depth: Its depth, ``unit n + rest``.
        unit: By how much one block more in every stage deepens it.
        rest: Its other layers.
        note: Ends the name of the network in the message.

    Returns:
        n, at least 1.

    Raises:
        ValueError: If there is no network of that depth; the message has the nearest.
    """
    blocks = max(1, round((depth - rest) / unit))
    nearest = unit * blocks + rest
    if nearest != depth:
        raise ValueError(
            f"There is no {kind} of depth {depth}{note}; it should be {unit} n + {rest}, such as"
            f" {nearest}."
        )
    return blocks


def check_odd(name: str, kernel_size: int) -> None:
    """Checks a kernel's side.

    Raises:
        ValueError: If it is not odd and above 0.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"A {name} has kernel_size {kernel_size}; it should be odd, to keep the size of images."
        )


def check_widths(name: str, *widths: int) -> None:
    """Checks numbers of channels.

    Raises:
        ValueError: If one is below 1.
    """
    least = min(widths, default=1)
    if least < 1:
        raise ValueError(f"A {name} has a width of {least}; it should be at least 1.")


def check_stride(name: str, stride: int) -> None:
    """Checks a stride.

    Raises:
        ValueError: If it is below 1.
    """
    if stride < 1:
        raise ValueError(f"A {name} has stride {stride}; it should be at least 1.")


def check_convolutions(
    name: str, widths: Sequence[int], kernel_sizes: Sequence[int], stride: int
) -> None:
    """Checks the convolutions of a residual block.

    Raises:
        ValueError: If there is none, there are not as many kernel sizes as widths, or a setting is
            out of range.
    """
    if not widths:
        raise ValueError(f"A {name} has no widths; it should have at least one, such as (64, 64).")
    if len(widths) != len(kernel_sizes):
        raise ValueError(
            f"A {name} has {len(widths)} widths, {widths}, but"
            f" {len(kernel_sizes)} kernel_sizes, {kernel_sizes}."
        )
    check_widths(name, *widths)
    for kernel_size in kernel_sizes:
        check_odd(name, kernel_size)
    check_stride(name, stride)


def strides(kernel_sizes: Sequence[int], stride: int) -> list[int]:
    """Returns the strides of a block's convolutions: the first larger than 1 x 1 has the block's.

    >>> strides((1, 3, 1), 2)
    [1, 2, 1]
    """
    # A 1 x 1 convolution of stride 2 would read a quarter of the pixels only.
    spatial = next((i for i, size in enumerate(kernel_sizes) if size > 1), 0)
    return [stride if i == spatial else 1 for i in range(len(kernel_sizes))]
