"""Backbones as plans: data that is read forwards as a network and backwards as decoders."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from sire_jax.backbones.blocks import Block
from sire_jax.backbones.stacked import together
from sire_jax.layers import Dropout, uniform_fan_in
from sire_jax.text import nearest

Endpoints = dict[str, Array]
IMAGE = "image"
POOLED = "pooled"
DTYPES = ("float32", "bfloat16")
# A collection of variables by the names of blocks, added to what the blocks return: zeros, to
# differentiate by features.
OFFSETS = "offsets"


@dataclass(frozen=True)
class Plan:
    """The stages of a network, each a sequence of blocks (``sire_jax.backbones.blocks``).

    A stage is what one decoder undoes last: commonly the blocks between two down-samplings.

    >>> from sire_jax.backbones import Convolution, MaxPool
    >>> plan = Plan(((Convolution(4), MaxPool()), (Convolution(8), MaxPool())))
    >>> plan.layers()["stage_2_block_1"], plan.block_of("stage_1")
    (2, 'stage_1_block_2')

    Attributes:
        stages: Blocks of each stage, in order.
        tail: Blocks that follow and that no decoder mirrors.
        positions: Names of the endpoints between macro-blocks, shallow to deep: positions 1, 2, …
            where a branch may be attached (Palacio et al., *Contextual Classification*, Fig. 4).

    Raises:
        ValueError: If a stage is no tuple of at least one block, or something in one is no block.
    """

    stages: tuple[tuple[Block, ...], ...]
    tail: tuple[Block, ...] = ()
    positions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages or not all(isinstance(s, tuple) and s for s in self.stages):
            raise ValueError(
                "A plan needs stages that are tuples of at least one block each, such as"
                f" ((Convolution(16), MaxPool()),); it is given {self.stages}."
            )
        for block in (*(block for stage in self.stages for block in stage), *self.tail):
            if not isinstance(block, Block) or type(block) is Block:
                raise ValueError(
                    f"{block} is not a block of a plan; a block is a module of a class derived from"
                    " Block, such as Convolution(16) or MaxPool()."
                )
        # Where a plan is written inside of a module, Flax has named its blocks: equal ones differ.
        object.__setattr__(self, "stages", tuple(map(_unnamed, self.stages)))
        object.__setattr__(self, "tail", _unnamed(self.tail))
        for i, name in enumerate(self.positions, start=1):
            if name not in self.names():
                raise ValueError(
                    f"Position {i} of a plan is '{name}', which is none of its endpoints."
                    f"{nearest(name, self.names())}"
                )

    def blocks(self, stage: int) -> Iterator[tuple[str, Block]]:
        """Yields the names and blocks of a stage, ``1`` being the first."""
        for i, block in enumerate(self.stages[stage - 1], start=1):
            yield f"stage_{stage}_block_{i}", block

    def names(self) -> set[str]:
        """Returns the names of all endpoints."""
        stages = range(1, len(self.stages) + 1)
        blocks = {name for stage in stages for name, _ in self.blocks(stage)}
        tail = {f"tail_block_{i}" for i in range(1, len(self.tail) + 1)}
        return {IMAGE, POOLED} | {f"stage_{stage}" for stage in stages} | blocks | tail

    def block_of(self, name: str) -> str:
        """Returns the name of the block that returns an endpoint, or ends a stage or the tail.

        Args:
            name: ``"stage_2"``, ``"tail"``, or the name of a block.
        """
        if name == "tail":
            return f"tail_block_{len(self.tail)}"
        number = name.removeprefix("stage_")
        return f"{name}_block_{len(self.stages[int(number) - 1])}" if number.isdigit() else name

    def layers(self) -> dict[str, int]:
        """Counts the layers from the image to each block of a stage, that block included.

        Convolutions count, those of shortcuts don't; pools and batch norm don't
        (Guo et al., *The Shallow End*: the layer of an auxiliary output).

        Returns:
            ``{"stage_1_block_1": 1, …}``, in order.
        """
        counts, count = {}, 0
        for stage in range(1, len(self.stages) + 1):
            for name, block in self.blocks(stage):
                count += block.layers
                counts[name] = count
        return counts

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
        for number in range(1, stage + 1):
            for name, block in self.blocks(number):
                where = f"block {name.rsplit('_', 1)[1]} of stage {number}, {block},"
                if not callable(getattr(block, "decoder", None)):
                    raise ValueError(
                        f"Decoder {stage} can't be made: {where} has no mirror. Give it a method"
                        f" 'decoder', leave the decoders from stage {number} on out, or move it to"
                        " the plan's tail."
                    )


# So many equal blocks become a loop, as those of ResNet-1001. With fewer a loop costs a fifth of a
# step on a CPU: more than compiling saves.
LONG = 24


def _unnamed(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    return tuple(block.clone(parent=None, name=None) for block in blocks)


def around_stages(blocks: int) -> tuple[str, ...]:
    """Names the positions around and within the three macro-blocks behind a stem.

    Palacio et al. (*Contextual Classification*, Section 4.2) attach branches to seven points
    before, after and in between macro-blocks; where exactly is in their Fig. 4 alone. Here: behind
    the stem, then in the middle and at the end of each of the stages 2 to 4.

    >>> around_stages(2)[:3]
    ('stage_1', 'stage_2_block_1', 'stage_2')

    Args:
        blocks: Blocks of each stage, at least 1, what ends it not counted; one has no middle.

    Returns:
        Seven names, or four.
    """
    names = ["stage_1"]
    for stage in (2, 3, 4):
        if blocks > 1:
            names.append(f"stage_{stage}_block_{blocks // 2}")
        names.append(f"stage_{stage}")
    return tuple(names)


class Planned(nn.Module):
    """A plan read forwards, and a classifier.

    >>> import jax.numpy as jnp
    >>> from sire_jax.backbones import Convolution, MaxPool
    >>> plan = Plan(((Convolution(4), MaxPool()), (Convolution(8), MaxPool())))
    >>> network, image = Planned(plan, classes=10), jnp.zeros((2, 8, 8, 1))
    >>> logits, endpoints = jax.eval_shape(network.init_with_output, jax.random.key(0), image)[0]
    >>> logits.shape, endpoints["stage_1"].shape, endpoints["stage_2"].shape
    ((2, 10), (2, 4, 4, 4), (2, 2, 2, 8))

    Attributes:
        plan: The plan.
        classes: Number of classes.
        hidden: Widths of dense layers with ReLU before the last one.
        flatten: Whether the classifier sees every pixel's features rather than their mean.
        dropout: Share of the units that training drops, before the last layer and after hidden
            ones, in [0, 1).
        dtype: ``"float32"`` or ``"bfloat16"``: that of the features, and of the heads' computations
            on them. Parameters, batch statistics and logits are float32.
        endpoints: Names of the features to return, ``None`` for all; a ``Network`` sets it to those
            that its heads are attached to. Many equal blocks between them (``LONG``) become one
            loop, which compiles in the time of one block: their variables, with the initial values
            that they have one by one, lie along a first axis, as ``"stage_2_block_2_to_111"``
            (``stacked.apart`` undoes that). Heads between them part the loop.

    Raises:
        ValueError: If there is no such dtype, or a width is below 1.
    """

    plan: Plan
    classes: int
    hidden: tuple[int, ...] = ()
    flatten: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    endpoints: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it should be one of {', '.join(DTYPES)}.")
        for name, width in (("classes", self.classes), *(("hidden", h) for h in self.hidden)):
            if width < 1:
                raise ValueError(f"{name} has {width}; it should be at least 1.")
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
            ``"stage_2"``; ``"pooled"``, ``[b, c]``: the mean over all pixels, or with ``flatten``
            all of them, before dropout and hidden layers. With ``self.endpoints`` some of the
            others may be missing.

        Raises:
            ValueError: If the image is too small to be divided that often.
        """
        x = image.astype(self.dtype)
        endpoints = {IMAGE: x}
        # Of blocks that may be in a loop; those outside of loops have the same keys.
        key = self.make_rng("params") if self.is_initializing() else None
        for stage in range(1, len(self.plan.stages) + 1):
            x = self._apply(list(self.plan.blocks(stage)), x, endpoints, image.shape, train, key)
            endpoints[f"stage_{stage}"] = x
        tail = [(f"tail_block_{i}", block) for i, block in enumerate(self.plan.tail, start=1)]
        x = self._apply(tail, x, endpoints, image.shape, train, key)
        x = x.reshape(len(x), -1) if self.flatten else x.mean((1, 2))
        endpoints[POOLED] = x
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

    def _needed(self, name: str) -> bool:
        """Tells whether a feature has to be there."""
        # Beside a misspelt name all are: the network's message has the nearest.
        misspelt = set(self.endpoints or ()) - self.plan.names()
        return self.endpoints is None or name in self.endpoints or bool(misspelt)

    def _offset(self, name: str, x: Array) -> Array:
        return x + self.get_variable(OFFSETS, name) if self.has_variable(OFFSETS, name) else x

    def _apply(
        self,
        blocks: list[tuple[str, Block]],
        x: Array,
        endpoints: Endpoints,
        shape: tuple[int, ...],
        train: bool,
        key: Array | None,
    ) -> Array:
        before = x
        for run in self._runs(blocks, x.shape[-1]):
            first, block = run[0]
            if min(x.shape[1:3]) < block.stride:
                raise ValueError(
                    f"Images of {shape[1]} x {shape[2]} are too small: they are {x.shape[1]} x"
                    f" {x.shape[2]} when {first} would divide them by {block.stride}."
                )
            names = [name for name, _ in run]
            # Initial values of a block are the same, whether it will be in a loop or not.
            if key is not None and block.loops:
                before, x = x, self._make(names, block, x, key)
            elif len(run) == 1:
                y = block.clone(parent=self, name=first)(x, before, train=train)
                before, x = x, self._offset(first, y)
            else:
                before, x = x, self._loops(names, block, x, endpoints, train)
            endpoints[names[-1]] = x
        return x

    def _runs(
        self, blocks: list[tuple[str, Block]], channels: int
    ) -> Iterator[list[tuple[str, Block]]]:
        """Yields the blocks, equal ones together whose parameters lie in one array for a loop."""
        for run in self._equal(blocks, channels):
            yield from [run] if len(run) >= LONG else ([block] for block in run)

    def _equal(
        self, blocks: list[tuple[str, Block]], channels: int
    ) -> Iterator[list[tuple[str, Block]]]:
        """Yields the blocks, equal ones together that one loop can do.

        They keep the shape, which the first of equal blocks may not, and nothing between is asked.
        """
        run: list[tuple[str, Block]] = []
        keeps = False
        for name, block in blocks:
            joins = keeps and block == run[-1][1] and not self._needed(run[-1][0])
            if run and not joins:
                yield run
                run = []
            run.append((name, block))
            outputs = block.channels(channels)
            same = block.stride == 1 and outputs == channels
            keeps, channels = block.loops and same, outputs
        if run:
            yield run

    def _loops(
        self, names: list[str], block: Block, x: Array, endpoints: Endpoints, train: bool
    ) -> Array:
        """Applies equal blocks in a loop; in several, if offsets are added between them."""
        start = 0
        for stop, name in enumerate(names, start=1):
            if stop == len(names) or self.has_variable(OFFSETS, name):
                x = self._offset(name, self._loop(names, slice(start, stop), block, x, train))
                endpoints[name], start = x, stop
        return x

    def _loop(self, names: list[str], turns: slice, block: Block, x: Array, train: bool) -> Array:
        """Applies some of equal blocks, one after another, each with variables of its own."""
        module, stored = block.clone(parent=None, name=None), together(names)
        stacked = {kind: tree[stored] for kind, tree in self.variables.items() if stored in tree}
        own = jax.tree.map(lambda values: values[turns], stacked)
        changing = [kind for kind in stacked if self.is_mutable_collection(kind)]
        random = train and self.has_rng("dropout")
        number = turns.stop - turns.start
        drops = jax.random.split(self.make_rng("dropout"), number) if random else None

        def body(x: Array, turn: tuple[Any, Any]) -> tuple[Array, Any]:
            variables, key = turn
            rngs = {} if key is None else {"dropout": key}
            return module.apply(variables, x, x, train=train, mutable=changing, rngs=rngs)

        x, changed = lax.scan(body, x, (own, drops))
        for kind, tree in changed.items():
            if number < len(names):
                tree = jax.tree.map(lambda old, new: old.at[turns].set(new), stacked[kind], tree)
            self.put_variable(kind, stored, tree)
        return x

    def _make(self, names: list[str], block: Block, x: Array, key: Array) -> Array:
        """Makes the variables of equal blocks, by keys of their names; returns such a feature."""
        module = block.clone(parent=None, name=None)
        # A checksum is the same in every process; Python's hash is not.
        keys = jnp.stack([jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names])
        features, variables = jax.vmap(lambda k: module.init_with_output(k, x, x, train=False))(
            keys
        )
        for kind, tree in variables.items():
            if len(names) == 1:
                tree = jax.tree.map(lambda values: values[0], tree)
            self.put_variable(kind, together(names), tree)
        return features[0]


def features(
    backbone: nn.Module, variables: Mapping[str, Any], image: Array, names: Sequence[str]
) -> Endpoints:
    """Returns features of the backbone of a network, in evaluation, whoever asks for them.

    Args:
        backbone: The network's, a planned one.
        variables: Of the network.
        image: ``[b, h, w, c]``, as the network sees them.
        names: Of blocks.
    """
    own = {kind: tree["backbone"] for kind, tree in variables.items() if "backbone" in tree}
    # The network asks for the features of its heads alone; what is added to is there, too.
    dtype = getattr(backbone, "dtype", "float32")
    own[OFFSETS] = {name: jnp.zeros((), dtype) for name in names}
    endpoints: Any = backbone.apply(own, image)[1]
    return {name: endpoints[name] for name in names}
