"""Networks with auxiliary outputs: a backbone and the heads attached to it."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax import Array

from sire_jax.text import nearest

MAIN = "main"


class Network(nn.Module):
    """A backbone with heads, which returns one flat mapping of named outputs.

    Any Flax module that maps ``(image, train=…)`` to ``(logits, endpoints)`` is a backbone.

    >>> import jax.numpy as jnp, sire_jax as sj
    >>> exit_1 = sj.heads.Classifier(endpoints=("block_1",), classes=10)
    >>> network = Network(sj.backbones.SmallCNN(classes=10), {"exit_1": exit_1})
    >>> image = jnp.zeros((2, 8, 8, 1))
    >>> variables = network.init(jax.random.key(0), image)
    >>> {name: output.shape for name, output in network.apply(variables, image).items()}
    {'main': (2, 10), 'exit_1': (2, 10)}
    >>> list(network.apply(variables, image, aux=False))
    ['main']

    A head may also be attached to outputs: ``"main"``, and those of the heads before it.

    Attributes:
        backbone: The backbone. If it has a field ``endpoints``, a tuple or ``None``, it is told
            there which ones the heads ask for, and may leave out the others.
        heads: Heads by the name of their output: modules with ``endpoints``, a tuple of names, that
            map those to the output, and take ``train``.

    Raises:
        ValueError: If the backbone or a head is no Linen module, a head is called ``"main"``, or
            its endpoints are no tuple of names.
    """

    backbone: nn.Module
    heads: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_module("The backbone", self.backbone)
        if MAIN in self.heads:
            raise ValueError(f"A head can't be called '{MAIN}': that is the backbone's own output.")
        for name, head in self.heads.items():
            _check_module(f"The head '{name}'", head)
            _check_endpoints(name, getattr(head, "endpoints", None))
        if _is_told(self.backbone):
            # One that can leave out what nobody asks for is told what is asked for.
            needed: set[str] = set()
            outputs = {MAIN}
            for name, head in self.heads.items():
                # A head may have the name of an endpoint: only later heads mean the output.
                needed |= set(head.endpoints) - outputs
                outputs.add(name)
            self.backbone = self.backbone.clone(endpoints=tuple(sorted(needed)))
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
                output before it, or the backbone returns something else than logits and endpoints.
        """
        logits, endpoints = self._backbone_outputs(image, train)
        outputs = {MAIN: logits}
        if not aux:
            return outputs
        for name, head in self.heads.items():
            # What the backbone has goes first, whatever heads are called.
            features = {**outputs, **endpoints}
            for endpoint in head.endpoints:
                if endpoint not in features:
                    raise ValueError(
                        f"The head '{name}' is attached to '{endpoint}', which is neither an"
                        " endpoint of the backbone nor the output of a head before it."
                        f"{nearest(endpoint, features)}"
                    )
            outputs[name] = head(*(features[e] for e in head.endpoints), train=train)
        return outputs

    def _backbone_outputs(self, image: Array, train: bool) -> tuple[Array, Mapping[str, Array]]:
        if not _takes_train(self.backbone):
            raise ValueError(
                f"The backbone {type(self.backbone).__name__} takes no `train`; its __call__ should"
                " be (self, image, *, train=False), for dropout and batch statistics, or leave it."
            )
        try:
            returned = self.backbone(image, train=train)
        except jax.errors.ConcretizationTypeError as error:
            if type(self.backbone).__module__ != nn.transforms.__name__:
                raise  # A mistake of its own.
            raise ValueError(
                "The backbone is traced with `train`, which is a bool that it decides by; of"
                " nn.remat(MyNetwork) every argument is traced. Rematerialise its blocks within it,"
                " nn.remat(Block), and give those `train` as a field."
            ) from error
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise ValueError(
                f"The backbone {type(self.backbone).__name__} returns {_described(returned)}; it"
                " should return (logits, endpoints), with the endpoints as a mapping from names to"
                " features: {} if there are none."
            )
        logits, endpoints = returned
        if not isinstance(endpoints, Mapping):
            raise ValueError(
                f"The backbone {type(self.backbone).__name__} returns endpoints that are"
                f" {_described(endpoints)}; they should be a mapping from names to features."
            )
        return logits, endpoints


def _takes_train(backbone: nn.Module) -> bool:
    parameters = inspect.signature(backbone.__call__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "train" in parameters or takes_any


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"an array {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _check_module(part: str, module: Any) -> None:
    """Checks that something is a Linen module: of others, Flax would not see the parameters."""
    if isinstance(module, nn.Module):
        return
    kind = module if isinstance(module, type) else type(module)
    instance = ", made, as in MyNetwork()" if isinstance(module, type) else ""
    raise ValueError(
        f"{part} is {kind.__module__}.{kind.__qualname__}, whose parameters would never be trained;"
        f" it should be a flax.linen.Module{instance}. An NNX module has to be written as one."
    )


def _check_endpoints(name: str, endpoints: Any) -> None:
    names = isinstance(endpoints, tuple | list) and all(isinstance(e, str) for e in endpoints)
    if names and endpoints:
        return
    of_one = f", such as ('{endpoints}',)" if isinstance(endpoints, str) else ""
    raise ValueError(
        f"The head '{name}' has the endpoints {endpoints!r}; they should be a tuple of names"
        f"{of_one}."
    )


def _is_told(backbone: nn.Module) -> bool:
    """Tells whether a backbone has a field for the endpoints that are asked for."""
    fields = {field.name for field in dataclasses.fields(backbone)}
    return "endpoints" in fields and (
        backbone.endpoints is None or isinstance(backbone.endpoints, tuple)
    )
