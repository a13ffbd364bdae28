"""Branches over groups of the labels: layers of one's own behind an endpoint, and a classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sire_jax import registry
from sire_jax.backbones.blocks import Block, Convolution, MaxPool
from sire_jax.backbones.plan import OFFSETS, Plan
from sire_jax.backbones.settings import check_widths, scaled
from sire_jax.heads.branch_blocks import (
    AveragePool,
    Dense,
    ExpandedInception,
    GlobalPool,
    Recalibration,
)
from sire_jax.layers import uniform_fan_in
from sire_jax.text import nearest

LAYERS = {
    "convolution": Convolution,
    "inception": ExpandedInception,
    "squeeze_excitation": Recalibration,
    "max_pool": MaxPool,
    "average_pool": AveragePool,
    "global_pool": GlobalPool,
    "dense": Dense,
}

# What blocks call their numbers of channels or units.
_WIDTHS = ("width", "reduced", "pooled")

_3 = {"name": "convolution", "width": 128}
_5 = {"name": "convolution", "width": 128, "kernel_size": 5}
_5_2 = {**_5, "stride": 2}
_WIDE = {"name": "convolution", "width": 256}
_INCEPTION = {"name": "inception"}
_POOL = {"name": "global_pool"}

# As released with Palacio et al. (2021), by backbone and number of the branch; "table_2" is the
# branch of their Fig. 2 and Table 2 with the widths that give the printed number of parameters.
RELEASED: dict[str, tuple[Mapping[str, Any], ...]] = {
    "resnet_1": (_5_2, _3, _INCEPTION, _POOL),
    "resnet_2": (_5, _3, _INCEPTION, _POOL),
    "resnet_3": (_3, _3, _INCEPTION, _POOL),
    "wide_1": (_5_2, _3, _WIDE, _WIDE, _INCEPTION, _INCEPTION, _POOL),
    "wide_2": (_5, _3, _WIDE, _WIDE, _POOL, {"name": "dense", "width": 768}),
    "wide_3": (_3, _3, _INCEPTION, _INCEPTION, _POOL),
    "table_2": (_5, _3, _WIDE, _WIDE, _POOL, *[{"name": "dense", "width": 256}] * 2),
}


class Branch(nn.Module):
    """Layers behind an endpoint, the mean over all pixels if they leave any, and a dense layer.

    The auxiliary classifier ``g`` of SSAL: its classes are groups of the labels (Palacio et al.,
    *Contextual Classification*, Section 3.2).

    >>> import jax, sire_jax as sj
    >>> layers = (sj.backbones.Convolution(16, 5), sj.heads.GlobalPool(), sj.heads.Dense(32))
    >>> head, features = Branch(("stage_2",), classes=20, layers=layers), jnp.ones((2, 8, 8, 4))
    >>> jax.eval_shape(head.init_with_output, jax.random.key(0), features)[0].shape
    (2, 20)

    Attributes:
        endpoints: The one endpoint that it is attached to.
        classes: Number of groups.
        layers: Blocks, such as ``Convolution(128, 5)`` or ``GlobalPool()``.
    """

    endpoints: tuple[str, ...]
    classes: int
    layers: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        check_widths("Branch: classes", self.classes)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: Array, *, train: bool = False) -> Array:
        """Maps ``[b, h, w, c]`` to logits ``[b, classes]``, float32.

        Raises:
            ValueError: If the features are too small for a layer, or a layer of images comes after
                a pool over all pixels.
        """
        x = features
        for i, block in enumerate(self.layers, start=1):
            self._check(i, block, x)
            name = f"layer_{i}"
            x = block.clone(parent=self, name=name)(x, x, train=train)
            # Zeros, by which a diagnostic differentiates: as a planned backbone has them.
            if self.has_variable(OFFSETS, name):
                x = x + self.get_variable(OFFSETS, name)
        pooled = x.mean(tuple(range(1, x.ndim - 1)))
        output = nn.Dense(self.classes, kernel_init=uniform_fan_in, name="output")
        # In half precision logits would tie.
        return output(pooled.astype(jnp.float32))

    def last_image(self) -> str | None:
        """Returns the name of the last layer that returns images, ``None`` if there is none."""
        images = [not isinstance(block, GlobalPool | Dense) for block in self.layers]
        return f"layer_{sum(images)}" if any(images) else None

    def _check(self, number: int, block: Any, x: Array) -> None:
        if x.ndim == 4 and isinstance(block, Dense):
            raise ValueError(
                f"Layer {number} of a branch, {block}, is given images {x.shape}; put a global_pool"
                " ahead of it."
            )
        if x.ndim == 2 and not isinstance(block, Dense | GlobalPool):
            raise ValueError(
                f"Layer {number} of a branch, {block}, comes after a global_pool, which leaves no"
                " pixels; put it ahead of the pool."
            )
        if x.ndim == 4 and min(x.shape[1:3]) < block.stride:
            raise ValueError(
                f"Layer {number} of a branch, {block}, would divide features of {x.shape[1]} x"
                f" {x.shape[2]} by {block.stride}; give it a smaller stride."
            )


def branch(
    plan: Plan | None,
    position: int | str,
    classes: int,
    layers: str | Sequence[Any] = (),
    width: float = 1.0,
) -> Branch:
    """Makes a branch from a config.

    >>> import sire_jax as sj
    >>> backbone = sj.backbones.resnet(classes=100, depth=18)
    >>> head = branch(backbone.plan, position=3, classes=20, layers="resnet_3", width=0.5)
    >>> head.endpoints, head.layers[0].width
    (('stage_4',), 64)

    Args:
        plan: The backbone's plan (in a config, that of its backbone).
        position: Where it is attached: a position between the macro-blocks of the backbone, 1 being
            the first (Palacio et al., Fig. 4), or the name of an endpoint. In a config ``"1"``, so
            that either can be chosen by an override.
        classes: Number of groups.
        layers: Sections of ``LAYERS``, ``{"name": "convolution", "width": 128, "kernel_size": 5}``
            and so on; or the name of some that were released, such as ``"resnet_1"``.
        width: Multiplies the widths of all layers.

    Returns:
        The branch.

    Raises:
        ValueError: If there is no such position, or no such layer, or a setting is out of range.
    """
    named = isinstance(layers, str)
    sections: Any = registry.choose(RELEASED, str(layers), "branch") if named else layers
    blocks = [registry.create(LAYERS, section, "layer of a branch") for section in sections]
    return Branch((_endpoint(plan, position),), classes, tuple(_widened(b, width) for b in blocks))


def _widened(block: Any, multiple: float) -> Any:
    """Multiplies all widths of a block."""
    widths = {name: getattr(block, name) for name in _WIDTHS if hasattr(block, name)}
    multiplied = scaled(tuple(widths.values()), multiple)
    return block.clone(**dict(zip(widths, multiplied, strict=True)))


def _endpoint(plan: Plan | None, position: int | str) -> str:
    # A config has numbers as text, so that an override may be a number or a name.
    if isinstance(position, str) and position.isdigit():
        position = int(position)
    if isinstance(position, str):
        if plan is not None and position not in plan.names():
            raise ValueError(
                f"A branch is at '{position}', which the backbone does not have; it has the"
                f" positions 1 to {len(plan.positions)}, and endpoints."
                f"{nearest(position, plan.names())}"
            )
        return position
    positions = plan.positions if plan is not None else ()
    # Not isinstance, to which True is position 1.
    if type(position) is not int or position not in range(1, len(positions) + 1):
        listed = ", ".join(f"{i} ({name})" for i, name in enumerate(positions, start=1))
        raise ValueError(
            f"A branch is at position {position}, which the backbone does not have. It has the"
            f" positions {listed or 'none'}; the name of an endpoint can be given, too."
        )
    return positions[position - 1]
