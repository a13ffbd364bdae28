"""Prediction rules: how one or several outputs become class probabilities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from sire_jax.metrics import class_logits
from sire_jax.names import nearest


@dataclass(frozen=True)
class Output:
    """The softmax of one output, or the sigmoid of one logit.

    Attributes:
        output: Name of the output.
    """

    output: str = "main"

    def needs(self) -> tuple[str, ...]:
        """Returns the outputs that the rule uses."""
        return (self.output,)

    def __call__(self, outputs: Mapping[str, Array]) -> Array:
        """Returns log probabilities ``[b, classes]``."""
        return jax.nn.log_softmax(class_logits(outputs[self.output]))


@dataclass(frozen=True)
class DigitOrder:
    """Whether a <= b, from the two digits alone.

    ``P(a <= b) = sum_{i <= j} P(a = i) P(b = j)``, exact for independent digits.

    Attributes:
        output: Name of the output with the digits' logits, ``[b, 2, digits]``.
    """

    output: str = "digits"

    def needs(self) -> tuple[str, ...]:
        """Returns the outputs that the rule uses."""
        return (self.output,)

    def __call__(self, outputs: Mapping[str, Array]) -> Array:
        """Returns log probabilities ``[b, 2]`` of "greater" and of "less than or equal"."""
        log_a, log_b = jnp.moveaxis(jax.nn.log_softmax(outputs[self.output]), 1, 0)
        joint = log_a[:, :, None] + log_b[:, None, :]
        ordered = jnp.triu(jnp.ones(joint.shape[1:], bool))[None]
        order = [jax.nn.logsumexp(joint, axis=(1, 2), where=w) for w in (~ordered, ordered)]
        return jnp.stack(order, axis=-1)


PREDICTIONS = {"output": Output, "digit_order": DigitOrder}

Prediction = Callable[[Mapping[str, Array]], Array]


def check(predictions: Mapping[str, Output | DigitOrder], outputs: Mapping[str, object]) -> None:
    """Checks that each prediction rule has its outputs.

    Raises:
        ValueError: If a rule uses an output that does not exist.
    """
    for name, prediction in predictions.items():
        for output in prediction.needs():
            if output not in outputs:
                raise ValueError(
                    f"The prediction '{name}' uses the output '{output}', which does not"
                    f" exist.{nearest(output, outputs)}"
                )
