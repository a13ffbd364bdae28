"""Backbones as plans: data that is read forwards as a network and backwards as decoders."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax.layers import Dropout, uniform_fan_in

Endpoints = dict[str, Array]
IMAGE = "image"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """The stages of a network, each a sequence of blocks (``sire_jax.backbones.blocks``).

    A stage is what one decoder undoes last: commonly the blocks between two down-samplings.

    Attributes:
        stages: Blocks of each stage, in order.
        tail: Blocks that follow and that no decoder mirrors.
    """

    stages: tuple[tuple[Any, ...], ...]
    tail: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages or not all(isinstance(s, tuple) and s for s in self.stages):
            raise ValueError(
                "A plan needs stages that are tuples of at least one block each, such as"
                f" ((Convolution(16), MaxPool()),); it is given {self.stages}."
            )
        for block in (*(block for stage in self.stages for block in stage), *self.tail):
            if isinstance(block, type) or not callable(getattr(block, "encoder", None)):
                raise ValueError(
                    f"{block} is not a block of a plan; a block is an object with stride, channels"
                    " and encoder, such as Convolution(16) or MaxPool()."
                )

    def blocks(self, stage: int) -> Iterator[tuple[str, Any]]:
        """Yields the names and blocks of a stage, ``1`` being the first."""
        for i, block in enumerate(self.stages[stage - 1], start=1):
            yield f"stage_{stage}_block_{i}", block

    def check_decoder(self, stage: int) -> None:
        """Checks that a decoder can be made of the first ``stage`` stages.

        Args:
            stage: Number of the stage that the decoder starts from.

        Raises:
            ValueError: If there is no such stage, or a block has no mirror; it says which and why.
        """
        if stage not in range(1, len(self.stages) + 1):
            raise ValueError(
                f"There is no stage {stage} to make a decoder of; the plan has the stages"
                f" {', '.join(str(i + 1) for i in range(len(self.stages)))}."
            )
        for each in range(1, stage + 1):
            for name, block in self.blocks(each):
                where = f"block {name.rsplit('_', 1)[1]} of stage {each}, {block},"
                if not callable(getattr(block, "decoder", None)):
                    raise ValueError(
                        f"Decoder {stage} can't be made: {where} has no mirror. Give it a method"
                        f" 'decoder', leave the decoders from stage {each} on out, or move it to"
                        " the plan's tail."
                    )


class Planned(nn.Module):
    """A plan read forwards, and a classifier.

    Attributes:
        plan: The plan.
        classes: Number of classes.
        hidden: Widths of dense layers with ReLU before the last one.
        flatten: Whether the classifier sees every pixel's features rather than their mean.
        dropout: Share of the units that training drops, before the last layer and after hidden
            ones, in [0, 1).
        dtype: ``"float32"`` or ``"bfloat16"``: that of the features, and of the heads' computations
            on them. Parameters, batch statistics and logits are float32.
    """

    plan: Plan
    classes: int
    hidden: tuple[int, ...] = ()
    flatten: bool = False
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it should be one of {', '.join(DTYPES)}.")
        for what, width in (("classes", self.classes), *(("hidden", each) for each in self.hidden)):
            if width < 1:
                raise ValueError(f"{what} has {width}; it should be at least 1.")
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Endpoints]:
        """Maps images to logits and all that they pass.

        Args:
            image: ``[b, h, w, c]``.
            train: Whether dropout and batch statistics are those of training.

        Returns:
            Logits ``[b, classes]``, float32. Endpoints: ``"image"``; what each block returns,
            ``"stage_2_block_1"`` and so on, ``"tail_block_1"``; each stage's last also as
            ``"stage_2"``.

        Raises:
            ValueError: If the image is too small to be divided that often.
        """
        x = image.astype(self.dtype)
        endpoints = {IMAGE: x}
        for stage in range(1, len(self.plan.stages) + 1):
            x = self._apply(list(self.plan.blocks(stage)), x, endpoints, image.shape, train)
            endpoints[f"stage_{stage}"] = x
        tail = [(f"tail_block_{i}", block) for i, block in enumerate(self.plan.tail, start=1)]
        x = self._apply(tail, x, endpoints, image.shape, train)
        x = x.reshape(len(x), -1) if self.flatten else x.mean((1, 2))
        for i, width in enumerate(self.hidden, start=1):
            dense = nn.Dense(
                width, kernel_init=uniform_fan_in, dtype=self.dtype, name=f"hidden_{i}"
            )
            x = Dropout(self.dropout)(nn.relu(dense(x)), train=train)
        if not self.hidden:
            x = Dropout(self.dropout)(x, train=train)
        # In half precision logits would tie.
        output = nn.Dense(self.classes, kernel_init=uniform_fan_in, name="output")
        return output(x.astype(jnp.float32)), endpoints

    def _apply(
        self,
        blocks: list[tuple[str, Any]],
        x: Array,
        endpoints: Endpoints,
        shape: tuple[int, ...],
        train: bool,
    ) -> Array:
        before = x
        for name, block in blocks:
            if min(x.shape[1:3]) < block.stride:
                raise ValueError(
                    f"Images of {shape[1]} x {shape[2]} are too small: they are {x.shape[1]} x"
                    f" {x.shape[2]} when {name} would divide them by {block.stride}."
                )
            before, x = x, block.encoder(name)(x, before, train=train)
            endpoints[name] = x
        return x
