"""From the sections of a config to objectives, with their weights."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sire_jax import objectives, optimizers, registry
from sire_jax.configuration import compatibility
from sire_jax.groups.partition import NO_GROUP, Groups
from sire_jax.losses import LOSSES, LOSSES_WITH_SETTINGS, Loss
from sire_jax.networks import MAIN
from sire_jax.weights import depth_weights


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
    return registry.is_section(weight) and weight.get("name") == "depth"


def check(name: str, section: Any) -> None:
    """Checks the keys and types of an objective, as far as no other part is needed.

    Args:
        name: Its name.
        section: Its section of ``config.objectives``.

    Raises:
        ValueError: If it is no section, a key or a part does not exist or is missing, or a value is
            of a wrong type; the message has the path.
    """
    where = f"config.objectives.{name}"
    _check_keys(name, section)
    if registry.is_section(section["loss"]):
        with_settings = LOSSES_WITH_SETTINGS
        registry.check(with_settings, section["loss"], "loss", f"{where}.loss")
    else:
        registry.choose_part(LOSSES, section["loss"], "loss", f"{where}.loss")
    if _is_by_depth(section.get("weight")):
        weights = {"depth": depth_weights}
        registry.check(weights, section["weight"], "weight", f"{where}.weight", ("layers",))
    else:
        compatibility.number_or_schedule(f"{where}.weight", section.get("weight", 1.0))
    for i, weight in enumerate(section.get("weights", ())):
        compatibility.number_or_schedule(f"{where}.weights[{i}]", weight)


def _check_keys(name: str, section: Any) -> None:
    where = f"config.objectives.{name}"
    if not registry.is_section(section):
        raise ValueError(
            f"{where}: The objective '{name}' is {registry.shown(section)}; it should be a section."
        )
    weights = section.get("weights", ())
    if not isinstance(weights, tuple | list):
        raise ValueError(
            f"{where}: The weights of the objective '{name}' are {registry.shown(weights)}; they"
            " should be a number or schedule for each output, such as (0.1, 0.2)."
        )
    registry.check_settings(_settings, section, f"objective '{name}'", where)


def _settings(
    output: str,
    target: str,
    loss: Any,
    weight: Any = 1.0,
    weights: Any = (),
    ignore: int = -1,
    mask: str = "counts",
    classifies: bool = True,
) -> None:
    """Has the settings of a section as its arguments; the last three may be left out."""


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
    weigh = partial(depth_weights, [depths[output] for output in outputs])
    return registry.make({"depth": weigh}, section, f"weight of the objective '{name}'")


def create(
    sections: Mapping[str, Any],
    families: Mapping[str, list[str]],
    depths: Mapping[str, int],
    units: optimizers.Units,
) -> dict[str, objectives.Objective]:
    """Makes the objectives: one for each output of a family.

    Args:
        sections: ``config.objectives``, whose keys have been checked.
        families: Names of the outputs of each family of heads.
        depths: The layers of outputs that are at one.
        units: The lengths in steps of what schedules count in.

    Returns:
        Objectives by name.

    Raises:
        ValueError: If weights don't fit outputs, or two objectives have one name.
    """
    made: dict[str, objectives.Objective] = {}
    for name, section in sections.items():
        weights = section.get("weights", ())
        family = families.get(section["output"])
        outputs = [section["output"]] if family is None else family
        if not weights and _is_by_depth(section.get("weight")):
            weights = _by_depth(name, section["weight"], outputs, depths)
        if weights and len(weights) != len(outputs):
            raise ValueError(
                f"The objective '{name}' has {len(weights)} weights for {len(outputs)} outputs"
                f" ({', '.join(map(str, outputs))}); give one for each, or 'weight' for all."
            )
        for i, output in enumerate(outputs):
            weight = weights[i] if weights else section.get("weight", 1.0)
            # The objective 'reconstruction' on the family 'decoder' becomes 'reconstruction_1', …
            own = name if family is None else name + output.removeprefix(section["output"])
            if own in made:
                raise ValueError(f"Two objectives have the name '{own}'; rename one of them.")
            made[own] = _objective(own, section, output, weight, units)
    return made


def with_ignored_groups(
    chosen: Mapping[str, objectives.Objective], groups: Collection[str]
) -> dict[str, objectives.Objective]:
    """Has objectives on groups leave out the labels that others leave out: their group is -1.

    Args:
        chosen: Objectives by name.
        groups: The targets that are groups of the labels.

    Returns:
        The objectives.

    Raises:
        ValueError: If an objective on groups ignores another number.
    """
    ignored = any(o.target == "label" and o.ignore is not None for o in chosen.values())
    of_groups = {name: o for name, o in chosen.items() if o.target in groups}
    for name, objective in of_groups.items():
        if objective.ignore not in (None, NO_GROUP):
            raise ValueError(
                f"The objective '{name}' on groups ignores {objective.ignore}; the group of a label"
                f" that is none is {NO_GROUP}."
            )
    changed = {k: replace(o, ignore=NO_GROUP) for k, o in of_groups.items()} if ignored else {}
    return {**chosen, **changed}


def branches(chosen: objectives.Objectives, groups: Mapping[str, Groups]) -> dict[str, Groups]:
    """Returns the groups that outputs classify, by output.

    Args:
        chosen: Objectives by name.
        groups: Groups of the labels, by the target that they are.

    Raises:
        ValueError: If an output has several groupings as targets.
    """
    grouped: dict[str, Groups] = {}
    for name, objective in chosen.items():
        if objective.target not in groups:
            continue
        if objective.output in grouped:
            raise ValueError(
                f"The objective '{name}' gives the output '{objective.output}' a second grouping as"
                " target; a branch has one. Add another branch."
            )
        grouped[objective.output] = groups[objective.target]
    return grouped


def main_objective(chosen: objectives.Objectives) -> str:
    """Returns the name of the first objective on the main output, ``"main"`` if there is none."""
    return next((name for name, o in chosen.items() if o.output == MAIN), MAIN)


def _loss(chosen: Any) -> Loss:
    """Makes a loss from its name, or from a section if it has settings."""
    if registry.is_section(chosen):
        return registry.make(LOSSES_WITH_SETTINGS, chosen, "loss")
    return registry.choose_part(LOSSES, chosen, "loss")


def _objective(
    name: str, section: Mapping[str, Any], output: str, weight: Any, units: optimizers.Units
) -> objectives.Objective:
    loss = _loss(section["loss"])
    weight = optimizers.number_or_schedule(weight, f"weight of the objective '{name}'", units)
    if callable(weight):
        compatibility.schedule(name, weight, units.get("run") or 1)
    others = {key: section[key] for key in ("ignore", "mask", "classifies") if key in section}
    return objectives.Objective(output, section["target"], loss, weight, **others)
