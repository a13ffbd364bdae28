"""Tells what each auxiliary objective is worth: ``python -m sire_jax.attribute --config=…``.

Trains the network with every subset of its auxiliary objectives, for each of the config's seeds, as
one compiled program, and prints what each objective adds to the main metric (its Shapley value),
which of them add up and which do not, and two controls: the network with silent heads, and that
with the weights of all on the main objective. ``--workdir=DIR`` takes the config of a run. Writes
attribution.json, from which the same command goes on, a seed after the other, and attribution.png.
"""

import inspect
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from sire_jax import configuration, files
from sire_jax.attribution.in_memory import attribute
from sire_jax.attribution.results import Attribution, Interval
from sire_jax.attribution.trained import Attributed, Measured
from sire_jax.job import command
from sire_jax.runs.divergence import NonFiniteLossError
from sire_jax.storage.workdir import read_config

__all__ = ["attribute"]

_RESULTS, _PICTURE = "attribution.json", "attribution.png"


def attribute_config(
    config: ConfigDict, out: str | Path, sample: int | None = None, metric: str | None = None
) -> Attribution:
    """Tells what each auxiliary objective of a config is worth to its main output.

    Args:
        config: A config, resolved.
        out: A directory, made if it is not there. Seeds that it has are not trained again.
        sample: As of ``attribute``.
        metric: What is measured on the test images; by default the main accuracy.

    Returns:
        The values.

    Raises:
        ValueError: If there is no auxiliary objective, the directory has values of another config,
            or the config does not fit together.
        NonFiniteLossError: If a network diverges.
    """
    made, directory = Attributed(config, sample, metric), files.expanded(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _RESULTS
    settings = {
        "metric": made.metric,
        "objectives": made.names,
        "orders": made.orders,
        "networks": made.networks,
    }
    measured = _read(path, settings, config)
    settings["config"] = json.loads(configuration.to_json(config))
    missing = [seed for seed in made.seeds if seed not in measured]
    total = len(missing) * config.epochs
    with tqdm(total=total, unit="epoch", disable=not sys.stderr.isatty()) as bar:
        for seed in missing:
            measured[seed] = made.train(seed, lambda: bar.update(1))
            measured = dict(sorted(measured.items()))
            files.replace(path, json.dumps({**settings, "measured": measured}, indent=1) + "\n")
    return made.collect({seed: measured[seed] for seed in made.seeds})


def _read(path: Path, settings: dict[str, Any], config: ConfigDict) -> Measured:
    """Returns what has been measured before.

    Raises:
        ValueError: If it is damaged, or of something else.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        measured = {int(seed): list(values) for seed, values in stored.pop("measured").items()}
        before = configuration.from_json(json.dumps(stored.pop("config")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged; remove it to begin again.") from error
    lines = configuration.differences(before, config)
    changed = [line for line in lines if not line.startswith(("seed:", "seeds:"))]
    changed += [
        f"{key}: {stored.get(key)} -> {value}"
        for key, value in settings.items()
        if stored.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{path} is of something else ({'; '.join(changed)}); choose another --out, or remove"
            " it."
        )
    return measured


def draw(attribution: Attribution) -> Figure:
    """Draws what each objective is worth, with its 95% interval over the seeds."""
    figure = Figure(figsize=(6.5, 1.2 + 0.35 * (len(attribution.worth) + len(attribution.pairs))))
    axes: Axes = figure.add_subplot()
    labels = [*attribution.worth, *(pair.replace("+", " and ") for pair in attribution.pairs)]
    samples = [*attribution.worth.values(), *attribution.pairs.values()]
    for place, values in enumerate(samples):
        interval = Interval.of(values)
        known = math.isfinite(interval.low)
        error = [[interval.mean - interval.low], [interval.high - interval.mean]] if known else None
        colour = "#0072B2" if place < len(attribution.worth) else "#999999"
        axes.errorbar(interval.mean, place, xerr=error, marker="o", capsize=3, color=colour)
        axes.plot(values, [place] * len(values), "|", color=colour, alpha=0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"added to {attribution.metric}; 95% interval, a line for each seed")
    if attribution.pairs:
        axes.set_title("Blue: worth; grey: two together beyond each", fontsize=9)
    figure.tight_layout()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    parser = command.parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="configs/X.py or configs/X.py:variant")
    source.add_argument("--workdir", help="directory of a run, whose config is taken")
    parser.add_argument("--out", help="directory of the results; by default the workdir")
    parser.add_argument("--metric", help="such as main/loss; by default the main accuracy")
    parser.add_argument(
        "--sample", type=int, help="orders to draw for each seed; 0: all subsets are trained"
    )
    options, overrides = parser.parse_known_args(arguments)
    out = options.out or options.workdir
    if out is None:
        parser.error("--out is needed with --config: the directory of the results")
    with command.readable_errors(NonFiniteLossError):
        if options.config:
            config = configuration.load(options.config, overrides)
        else:
            config = configuration.override(read_config(options.workdir), overrides)
        attribution = attribute_config(config, out, options.sample, options.metric)
        picture = files.expanded(out) / _PICTURE
        draw(attribution).savefig(picture, dpi=130)
    print(attribution)
    print(f"Raw values: {files.expanded(out) / _RESULTS}\nPicture: {picture}")


class _Callable(ModuleType):
    """This module, once it is imported, takes the place of the function in ``sire_jax``."""

    __call__ = staticmethod(attribute)


__signature__ = inspect.signature(attribute)
sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    main()
