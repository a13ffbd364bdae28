"""Classifiers at layers of a planned network, by the layers' numbers."""

import warnings
from collections.abc import Sequence

from sire_jax.backbones.plan import Plan
from sire_jax.heads.classifier import Classifier

# Outputs in the first quarter of the layers harm the others, and so do many.
_SHALLOW = 1 / 4
_LAYERS_PER_EXIT = 10


def exits(
    plan: Plan | None,
    layers: tuple[int, ...],
    classes: int,
    normalize: bool = True,
    detached: bool = False,
) -> dict[str, Classifier]:
    """Makes the auxiliary outputs of an AuxNet: a family of heads.

    Layers are counted as in Guo et al., *The Shallow End*: the first convolution is 1, each
    convolution of a block one more, the network's own output the last. A layer at which a block
    ends can have an exit: batch norm, ReLU, the mean over all pixels, a dense layer.

    >>> import sire_jax as sj
    >>> backbone = sj.backbones.preactivation_resnet(classes=10, depth=20)
    >>> heads = exits(backbone.plan, layers=(9, 15), classes=10)
    >>> {name: head.endpoints for name, head in heads.items()}
    {'9': ('stage_3_block_1',), '15': ('stage_4_block_1',)}

    Args:
        plan: The backbone's plan (in a config, that of its backbone).
        layers: The exits' layers, in rising order.
        classes: Number of classes.
        normalize: Whether exits have batch norm and ReLU, as features without activation need.
        detached: Whether exits learn from the features without changing them: probes.

    Returns:
        A classifier for each layer, by its number.

    Raises:
        ValueError: If the backbone is not a plan, or a layer does not exist, comes twice or out of
            order; the message has the nearest layers.
    """
    if plan is None:
        raise ValueError(
            "Exits are named by the layers of a plan, but the backbone has none. Attach"
            " 'classifier' heads to its endpoints instead."
        )
    # Of blocks without layers, as pools, the last has the name: it returns what comes next.
    blocks = {count: name for name, count in plan.layers().items()}
    # After the last block is the network's own output.
    depth = max(blocks) + 1
    blocks.pop(max(blocks))
    for layer in layers:
        if layer not in blocks:
            main = layer in (depth - 1, depth)
            why = "that is the network's own output" if main else "no block ends there"
            raise ValueError(
                f"There is no exit at layer {layer} of {depth}: {why}. The nearest layers are"
                f" {_nearest(layer, list(blocks))}."
            )
    if list(layers) != sorted(set(layers)):
        raise ValueError(
            f"The exits' layers are {tuple(layers)}; each should be there once, in rising order:"
            f" {tuple(sorted(set(layers)))}."
        )
    # Probes leave the features as they are, so that they can't harm the other outputs.
    if not detached:
        _warn(layers, depth)
    return {
        str(layer): Classifier((blocks[layer],), classes, normalize, detached) for layer in layers
    }


def _nearest(layer: int, layers: Sequence[int]) -> str:
    nearest = sorted(sorted(layers, key=lambda number: abs(number - layer))[:2])
    return " and ".join(map(str, nearest)) or "none"


def _warn(layers: Sequence[int], depth: int) -> None:
    """Warns of exits that the paper found to do harm."""
    shallow = [layer for layer in layers if layer <= _SHALLOW * depth]
    if shallow:
        warnings.warn(
            f"Exits at the very shallow layers {', '.join(map(str, shallow))} of {depth} harm the"
            " other outputs: their features hardly discriminate (Guo et al., Section 5.2). Layers"
            f" above {int(_SHALLOW * depth)} are safer.",
            stacklevel=3,
        )
    most = max(1, depth // _LAYERS_PER_EXIT)
    if len(layers) > most:
        warnings.warn(
            f"{len(layers)} exits in {depth} layers are many: too many over-fit (Guo et al.,"
            f" Section 5.1). At most {most} are safer.",
            stacklevel=3,
        )
