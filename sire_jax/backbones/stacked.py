"""Variables of the blocks of a loop, which lie in one array each: their names, and apart."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

_LOOP = re.compile(r"(?P<block>.*_block_)(?P<first>\d+)_to_(?P<last>\d+)")


def together(names: Sequence[str]) -> str:
    """Names the variables of blocks that lie in one array.

    >>> together(["stage_2_block_2", "stage_2_block_3", "stage_2_block_4"])
    'stage_2_block_2_to_4'

    Args:
        names: Of the blocks, in order; the own name of one alone.
    """
    last = names[-1].rpartition("_")[2]
    return names[0] if len(names) == 1 else f"{names[0]}_to_{last}"


def apart(variables: Any) -> Any:
    """Gives each block of a loop variables of its own, by its name.

    >>> loop = {"stage_1_block_2_to_4": {"kernel": jax.numpy.arange(3.0)}}
    >>> {name: float(own["kernel"]) for name, own in apart(loop).items()}
    {'stage_1_block_2': 0.0, 'stage_1_block_3': 1.0, 'stage_1_block_4': 2.0}

    Args:
        variables: Of a planned backbone or of a network with one, or gradients to them, or their
            shapes: nested mappings.
    """
    if not isinstance(variables, Mapping):
        return variables
    parted: dict[str, Any] = {}
    for name, own in variables.items():
        loop = _LOOP.fullmatch(name)
        if loop is None:
            parted[name] = apart(own)
            continue
        first, last = int(loop["first"]), int(loop["last"])
        for turn, number in enumerate(range(first, last + 1)):
            parted[f"{loop['block']}{number}"] = jax.tree.map(partial(_turn, turn), own)
    return parted


def _turn(turn: int, values: Any) -> Any:
    if isinstance(values, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
    return values[turn]
