"""Shows what a network costs: ``python -m sire_jax.inspect --config=configs/X.py:v [--json]``.

For each output its shape, the parameters of the sub-network that computes it and the multiply-adds
of one example, read from the traced program: nothing is trained and no data are needed.
"""

# Before other imports, which come here where Python looks into this directory first.
if __name__ == "inspect":
    import sys

    print(
        "Error: the programs of sire_jax are run by module, and from another directory than their"
        " own, such as python -m sire_jax.train; here inspect.py hides Python's own.",
        file=sys.stderr,
    )
    sys.exit(2)

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from sire_jax import configuration, text, traced
from sire_jax.configuration import experiment
from sire_jax.job import command
from sire_jax.networks import MAIN


def inspect(config: ConfigDict) -> dict[str, Any]:
    """Counts what each output of a network needs, in evaluation.

    Args:
        config: The config.

    Returns:
        ``{"outputs": {name: {"shape", "parameters", "multiply_adds"}}, "without_heads":
        {"parameters", "multiply_adds"}, "parameters", "multiply_adds"}``: shapes of one example,
        numbers of one example's forward pass. Without heads is the network applied with
        ``aux=False``; the totals are those of the whole network, in which outputs share what they
        have in common.

    Raises:
        ValueError: If the config asks for what does not exist or does not fit together.
    """
    parts = experiment.build(config)
    variables = dict(parts.variables)
    params = variables.pop("params")
    batch = parts.batch["image"]
    image = jax.ShapeDtypeStruct((1, *batch.shape[1:]), batch.dtype)

    def apply(params: Any, image: Any, aux: bool = True) -> Mapping[str, Array]:
        outputs: Any = parts.network.apply({"params": params, **state}, image, aux=aux)
        return outputs

    # Values, not shapes: `apply` closes over them.
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
    reached = traced.parameters_read(apply, params, image)
    outputs = {
        name: {
            "shape": list(parts.outputs[name].shape[1:]),
            "parameters": traced.size(params, reached[name]),
            "multiply_adds": traced.multiply_adds(
                lambda p, x, n=name: apply(p, x)[n], params, image
            ),
        }
        for name in parts.output_names()
    }

    def bare(params: Any, image: Any) -> Mapping[str, Array]:
        return apply(params, image, aux=False)

    return {
        "outputs": outputs,
        "without_heads": {
            "parameters": traced.size(params, traced.parameters_read(bare, params, image)[MAIN]),
            "multiply_adds": traced.multiply_adds(bare, params, image),
        },
        "parameters": traced.size(params),
        "multiply_adds": traced.multiply_adds(apply, params, image),
    }


def report(counts: Mapping[str, Any]) -> str:
    """Writes the counts as a table with a row per output and the totals."""
    rows = [["output", "shape", "parameters", "multiply-adds"]]
    for name, output in counts["outputs"].items():
        shape = " x ".join(map(str, output["shape"]))
        rows.append([name, shape, f"{output['parameters']:,}", f"{output['multiply_adds']:,}"])
    for title, total in (("without heads", counts["without_heads"]), ("whole network", counts)):
        rows.append([title, "", f"{total['parameters']:,}", f"{total['multiply_adds']:,}"])
    return text.align(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    parser.add_argument("--config", required=True, help="configs/X.py or configs/X.py:variant")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, overrides = parser.parse_known_args(arguments)
    with command.readable_errors():
        config = configuration.load(options.config, overrides)
        # The number of groups is enough: what is in them changes no count.
        counts = inspect(configuration.with_groups(config, dealt=True))
    print(json.dumps(counts) if options.json else report(counts))


if __name__ == "__main__":
    main()
