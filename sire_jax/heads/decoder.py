"""Decoders, made of a backbone's plan by reading it backwards."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.backbones.plan import IMAGE, Plan
from sire_jax.layers import BatchNorm

# What may follow the last transposed convolution.
LAST = ("normalized", "linear", "sigmoid")


class Decoder(nn.Module):
    """The auto-encoder's second half: from a stage's features back to the image.

    The blocks of the first ``stage`` stages in reverse order, each by its mirror: nearest
    up-sampling for what divides the size, transposed convolutions for convolutions. With ``skips``
    the output of each block is added to the input of its mirror (long skip connections by
    summation). What ends it predicts the image as the network sees it, in ``value_range``; none of
    its values are cut off. It is the last transposed convolution, followed by

    - ``"normalized"``: batch norm;
    - ``"linear"``: nothing;
    - ``"sigmoid"``: ``v_0 + (v_1 - v_0) / (1 + exp(-x))``, with ``value_range`` ``(v_0, v_1)``.

    Avola et al., *SIRe-Networks* (2022), Sections 3.2 and 4.3, Fig. 1.

    >>> import jax
    >>> from sire_jax.backbones import Convolution, MaxPool
    >>> plan = Plan(((Convolution(4), MaxPool()), (Convolution(8), MaxPool())))
    >>> decoder = Decoder(plan, stage=2)
    >>> decoder.endpoints  # the outputs of the last two skip to their mirrors
    ('image', 'stage_2', 'stage_2_block_1', 'stage_1_block_1')
    >>> shapes = (2, 8, 8, 3), (2, 2, 2, 8), (2, 4, 4, 8), (2, 8, 8, 4)
    >>> features = [jnp.zeros(shape) for shape in shapes]
    >>> jax.eval_shape(decoder.init_with_output, jax.random.key(0), *features)[0].shape
    (2, 8, 8, 3)

    Attributes:
        plan: The backbone's plan.
        stage: Number of the stage that it starts from, the first being 1.
        skips: Whether there are long skip connections.
        value_range: The smallest and the largest value that images can have: a statement, which a
            config's images are checked against.
        remat: Whether what it computes is computed again for the gradient rather than kept.
        last: What follows the last transposed convolution. The paper does not say; with
            ``"linear"`` its own settings diverge at full width.

    Raises:
        ValueError: If there is no such stage or last layer, or the range is empty.
    """

    plan: Plan
    stage: int
    skips: bool = True
    value_range: tuple[float, float] = (0.0, 1.0)
    remat: bool = False
    last: str = "normalized"

    def __post_init__(self) -> None:
        self.plan.check_decoder(self.stage)
        if self.last not in LAST:
            raise ValueError(
                f"The last layer of a decoder is {self.last!r}; it should be one of"
                f" {', '.join(LAST)}."
            )
        if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
            raise ValueError(
                f"value_range is {tuple(self.value_range)}; it should be (smallest, largest)."
            )
        super().__post_init__()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The image, what the decoder starts from, and with skips the blocks' outputs."""
        return (IMAGE, f"stage_{self.stage}", *self._skipped())

    def _reversed(self) -> list[tuple[str, Any]]:
        stages = range(self.stage, 0, -1)
        return [entry for stage in stages for entry in reversed(list(self.plan.blocks(stage)))]

    def _skipped(self) -> list[str]:
        """Names the blocks whose output skips to their mirror: not pooling, not the start."""
        names = [name for name, block in self._reversed()[1:] if block.skips]
        return names if self.skips else []

    def __call__(self, image: Array, start: Array, *skipped: Array, train: bool = False) -> Array:
        """Maps features to images.

        Args:
            image: ``[b, h, w, c]``; only its shape counts.
            start: Features of the stage.
            *skipped: Outputs of the blocks that skip, deepest first.
            train: Whether batch statistics are those of training.

        Returns:
            ``[b, h, w, c]``, float32.

        Raises:
            ValueError: If the image can't be divided evenly as often as the plan says.
        """
        self._check_size(image.shape)
        channels = self._channels(image.shape[-1])

        # nn.remat takes a function of the module whose parameters it makes.
        def decode(module: "Decoder", start: Array, *skipped: Array) -> Array:
            return module._decode(start, skipped, channels, train)

        x = (nn.remat(decode) if self.remat else decode)(self, start, *skipped)
        if x.shape != image.shape:
            raise ValueError(
                f"The decoder of stage {self.stage} returns {x.shape[1:]} of images of"
                f" {image.shape[1:]}: the mirror of a block does not restore the size that its"
                " stride divides."
            )
        return x.astype(jnp.float32)

    @nn.compact
    def _decode(
        self, x: Array, skipped: Sequence[Array], channels: Sequence[int], train: bool
    ) -> Array:
        blocks = self._reversed()
        skips = dict(zip(self._skipped(), skipped, strict=True))
        # Behind it there may be up-sampling alone, which has nothing to end linearly.
        ends = max((i for i, (_, block) in enumerate(blocks) if block.skips), default=-1)
        for i, (name, block) in enumerate(blocks):
            x = x + skips[name] if name in skips else x
            last = i == ends
            try:
                mirror = block.decoder(channels[i], last).clone(parent=self, name=name)
            except ValueError as error:
                raise ValueError(f"Decoder {self.stage} can't be made: {name}: {error}") from error
            x = mirror(x, train=train)
        return self._ended(x, train)

    def _ended(self, x: Array, train: bool) -> Array:
        if self.last == "normalized":
            return BatchNorm(name="last_norm")(x, train=train)
        if self.last == "sigmoid":
            smallest, largest = self.value_range
            return smallest + (largest - smallest) * nn.sigmoid(x)
        return x

    def _channels(self, image_channels: int) -> list[int]:
        """Returns the input channels of the blocks, last block first: what mirrors return."""
        channels = [image_channels]
        for _, block in reversed(self._reversed()):
            channels.append(block.channels(channels[-1]))
        return channels[-2::-1]

    def _check_size(self, shape: tuple[int, ...]) -> None:
        """Checks that every division leaves no rest, as up-sampling could not restore it."""
        height, width = shape[1:3]
        whole = 1
        for name, block in reversed(self._reversed()):
            whole *= block.stride
            if height % whole or width % whole:
                raise ValueError(
                    f"Images of {height} x {width} can't be decoded from stage {self.stage}:"
                    f" {name} divides them by {whole} in all, which leaves a rest. Take images"
                    f" whose sides are multiples of {self._factor()}, or decoders of fewer stages."
                )

    def _factor(self) -> int:
        """Returns what sides have to be multiples of for decoders of all stages."""
        return math.prod(block.stride for stage in self.plan.stages for block in stage)


def decoders(
    plan: Plan | None,
    stages: tuple[int, ...] | None = None,
    skips: bool = True,
    value_range: tuple[float, float] = (0.0, 1.0),
    remat: bool = False,
    last: str = "normalized",
) -> dict[str, Decoder]:
    """Makes the decoders of a plan: a family of heads.

    >>> import sire_jax as sj
    >>> backbone = sj.backbones.cnn(classes=10, width=0.25)
    >>> network = sj.Network(backbone, decoders(backbone.plan, stages=(1, 3)))
    >>> network.heads["3"].endpoints[:3]
    ('image', 'stage_3', 'stage_3_block_2')

    Args:
        plan: The backbone's plan (in a config, that of its backbone).
        stages: Those to start from; all by default.
        skips: Whether they have long skip connections (the S of SIRe).
        value_range: The smallest and the largest value that images can have.
        remat: Whether decoders are computed again for the gradient rather than kept.
        last: What follows the last transposed convolution: ``"normalized"``, ``"linear"`` or
            ``"sigmoid"`` (see ``Decoder``).

    Returns:
        A decoder for each stage, by its number.

    Raises:
        ValueError: If there is no plan, a stage does not exist or can't be mirrored, or is named
            twice.
    """
    if plan is None:
        raise ValueError("Decoders need a backbone that is made of a plan; this one is not.")
    chosen = tuple(range(1, len(plan.stages) + 1)) if stages is None else stages
    if not isinstance(chosen, tuple | list) or not all(type(i) is int for i in chosen):
        raise ValueError(f"stages is {stages!r}; it should be numbers of stages, such as (1, 3).")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"There can't be two decoders of a stage: {tuple(chosen)}.")
    return {str(i): Decoder(plan, i, skips, value_range, remat, last) for i in chosen}
