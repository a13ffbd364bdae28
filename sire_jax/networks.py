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
            asked = {endpoint for head in self.heads.values() for endpoint in head.endpoints}
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
            ValueError: If a head is attached to an endpoint that the backbone does not have.
        """
        logits, endpoints = self.backbone(image, train=train)
        outputs = {MAIN: logits}
        if not aux:
            return outputs
        for name, head in self.heads.items():
            for endpoint in head.endpoints:
                if endpoint not in endpoints:
                    raise ValueError(
                        f"The head '{name}' is attached to the endpoint '{endpoint}', which the"
                        f" backbone does not have.{nearest(endpoint, endpoints)}"
                    )
            outputs[name] = head(*(endpoints[e] for e in head.endpoints), train=train)
        return outputs
