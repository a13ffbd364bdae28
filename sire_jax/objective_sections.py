"""From the sections of a config to objectives, with their weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from sire_jax import checks, objectives, optimizers, registry


def depths(heads: Mapping[str, Any], plan: Any) -> dict[str, int]:
    """Returns the layers of the heads that are attached to one.

    Args:
        heads: Heads by the name of their output.
        plan: The backbone's plan, if it is one.

    Returns:
        The number of the layer, by the name of the output.
    """
    layers = plan.layers() if plan is not None else {}
    attached = {name: head.endpoints for name, head in heads.items()}
    return {n: layers[e[0]] for n, e in attached.items() if len(e) == 1 and e[0] in layers}


def _is_by_depth(weight: Any) -> bool:
    return isinstance(weight, Mapping | ConfigDict) and weight.get("name") == "depth"


def _by_depth(
    name: str, section: Mapping[str, Any], outputs: list[str], depths: Mapping[str, int]
) -> list[float]:
    """Weighs the outputs of a family by the layers that they are at."""
    for output in outputs:
        if output not in depths:
            raise ValueError(
                f"The objective '{name}' is weighted by depth, but the output '{output}' is not at"
                " a layer of a plan; give it a number as weight."
            )
    weigh = partial(objectives.depth_weights, [depths[output] for output in outputs])
    return registry.create({"depth": weigh}, section, f"weight of the objective '{name}'")


def create(
    sections: Mapping[str, Any],
    families: Mapping[str, list[str]],
    depths: Mapping[str, int],
    units: optimizers.Units,
) -> dict[str, objectives.Objective]:
    """Makes the objectives: one for each output of a family.

    Args:
        sections: ``config.objectives``.
        families: Names of the outputs of each family of heads.
        depths: The layers of outputs that are at one.
        units: The lengths in steps of what schedules count in.

    Returns:
        Objectives by name.

    Raises:
        ValueError: If a section is none, or its weights don't fit its outputs.
    """
    made: dict[str, objectives.Objective] = {}
    for name, section in sections.items():
        if not isinstance(section, ConfigDict):
            raise ValueError(f"The objective '{name}' is {section!r}; it should be a section.")
        settings = {key: value for key, value in section.items() if key != "weights"}
        weights = section.get("weights", ())
        if not isinstance(weights, tuple | list):
            raise ValueError(
                f"The weights of the objective '{name}' are {weights!r}; they should be a number or"
                " schedule for each output, such as (0.1, 0.2)."
            )
        family = families.get(section.get("output"))
        outputs = [section.get("output")] if family is None else family
        if not weights and _is_by_depth(section.get("weight")):
            weights = _by_depth(name, section.weight, outputs, depths)
        if weights and len(weights) != len(outputs):
            raise ValueError(
                f"The objective '{name}' has {len(weights)} weights for {len(outputs)} outputs"
                f" ({', '.join(map(str, outputs))}); give one for each, or 'weight' for all."
            )
        for i, output in enumerate(outputs):
            each = {"output": output, "weight": weights[i]} if weights else {"output": output}
            # The objective 'reconstruction' on the family 'decoder' becomes 'reconstruction_1', …
            own = name if family is None else name + output.removeprefix(section.output)
            if own in made:
                raise ValueError(f"Two objectives have the name '{own}'; rename one of them.")
            made[own] = _objective(own, {**settings, **each}, units)
    return made


def _loss(chosen: Any) -> objectives.Loss:
    """Makes a loss from its name, or from a section if it has settings."""
    if isinstance(chosen, Mapping | ConfigDict):
        return registry.create(objectives.LOSSES_WITH_SETTINGS, chosen, "loss")
    return registry.choose(objectives.LOSSES, chosen, "loss")


def _objective(
    name: str, section: Mapping[str, Any], units: optimizers.Units
) -> objectives.Objective:
    described = {"name": name, **section}
    made = registry.create({name: objectives.Objective}, described, "objective")
    loss = _loss(made.loss)
    weight = optimizers.number_or_schedule(made.weight, f"weight of the objective '{name}'", units)
    if callable(weight):
        checks.schedule(name, weight, units.get("run") or 1)
    return objectives.Objective(made.output, made.target, loss, weight)
