"""Networks with auxiliary outputs: a backbone and the heads attached to it."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from jax import Array

from sire_jax.names import nearest

MAIN = "main"


class Network(nn.Module):
    """A backbone with heads, which returns one flat mapping of named outputs.

    Any Flax module that maps ``(image, train=…)`` to ``(logits, endpoints)`` is a backbone::

        network = Network(MyCNN(), {"exit_1": Classifier(endpoints=("block_1",), classes=10)})
        variables = network.init(key, image)
        outputs = network.apply(variables, image)  # {"main": [b, 10], "exit_1": [b, 10]}

    A head may also be attached to outputs: ``"main"``, and those of the heads before it.

    Attributes:
        backbone: The backbone.
        heads: Heads by the name of their output.
    """

    backbone: nn.Module
    heads: Mapping[str, Any]

    def __post_init__(self) -> None:
        if MAIN in self.heads:
            raise ValueError(f"A head can't be called '{MAIN}': that is the backbone's own output.")
        if hasattr(self.backbone, "endpoints"):
            # One that can leave out what nobody asks for is told what is asked for.
            asked: set[str] = set()
            outputs = {MAIN}
            for name, head in self.heads.items():
                # A head may have the name of an endpoint: only later heads mean the output.
                asked |= set(head.endpoints) - outputs
                outputs.add(name)
            self.backbone = self.backbone.clone(endpoints=tuple(sorted(asked)))
        super().__post_init__()

    def __call__(self, image: Array, *, train: bool = False, aux: bool = True) -> dict[str, Array]:
        """Applies the backbone, and the heads where ``aux``.

        Args:
            image: A batch of inputs, ``[b, …]``, as the backbone takes them.
            train: Whether dropout and batch statistics are those of training.
            aux: Whether to compute the auxiliary outputs. Without, the program is the backbone's.

        Returns:
            ``{"main": logits, "<head>": array, …}``, or ``{"main": logits}`` without ``aux``.

        Raises:
            ValueError: If a head is attached to what is neither an endpoint of the backbone nor an
                output before it.
        """
        logits, endpoints = self.backbone(image, train=train)
        outputs = {MAIN: logits}
        if not aux:
            return outputs
        for name, head in self.heads.items():
            # What the backbone has goes first, whatever heads are called.
            known = {**outputs, **endpoints}
            for endpoint in head.endpoints:
                if endpoint not in known:
                    raise ValueError(
                        f"The head '{name}' is attached to '{endpoint}', which is neither an"
                        " endpoint of the backbone nor the output of a head before it."
                        f"{nearest(endpoint, known)}"
                    )
            outputs[name] = head(*(known[e] for e in head.endpoints), train=train)
        return outputs
