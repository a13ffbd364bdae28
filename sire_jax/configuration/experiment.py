"""From a config to the parts of a run: everything is made and checked here, nothing is compiled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from sire_jax import objectives, registry, traced, untrusted
from sire_jax.configuration import compatibility, validation
from sire_jax.configuration import groups as group_sections
from sire_jax.configuration import objectives as objective_sections
from sire_jax.configuration import optimizers as optimizer_section
from sire_jax.configuration.sections import NAMED, SINGLE, TASK
from sire_jax.data import augmentation, batches, crops, tasks
from sire_jax.data.augmentation import RandomCrop
from sire_jax.data.dataset import Source
from sire_jax.groups.partition import Groups
from sire_jax.job import cpu
from sire_jax.layers.initialization import as_pytorch
from sire_jax.networks import MAIN, Network
from sire_jax.predictions import check as check_predictions
from sire_jax.predictions import is_fitted
from sire_jax.state import INITIAL, TrainState
from sire_jax.step import (
    Apply,
    Measure,
    Predict,
    Shared,
    Step,
    find_reach,
    make_measure,
    make_predict,
    make_step,
)
from sire_jax.text import nearest
from sire_jax.updates import UpdateRule, weighted
from sire_jax.weights import scaled

PyTree = Any
# Numbers of a config by "weights" and "optimizer".
Numbers = Mapping[str, Mapping[str, Any]]
_CROPS = ("none", "central", "measured")


@dataclass(frozen=True)
class Forward:
    """A network and what it is applied to, without what trains it.

    Attributes:
        config: The config that describes it.
        task: What an example is.
        network: The network, which returns named outputs.
        families: Names of the outputs of each family of heads.
        groups: Groups of the labels, by the target that they are.
        batch: Shapes of a batch of two examples, as the network sees them.
        variables: Shapes of the network's variables.
        outputs: Shapes of the outputs of that batch.
    """

    config: ConfigDict
    task: tasks.Task
    network: Network
    families: Mapping[str, list[str]]
    groups: Mapping[str, Groups]
    batch: dict[str, Any]
    variables: Mapping[str, PyTree]
    outputs: Mapping[str, Any]

    def output_names(self) -> list[str]:
        """Returns the names of the outputs: the main one, then the heads (a config sorts them)."""
        return [MAIN, *self.network.heads]

    def ready(self, batch: Mapping[str, Array], crop: str = "none") -> dict[str, Array]:
        """Makes a batch of the task's ready for the network: scaled images, groups of labels.

        Args:
            batch: The batch, with images as the source has them.
            crop: ``"none"``, as ``augment`` takes crops; ``"central"``, ``[b, …]``; or
                ``"measured"``, the central one or, where the config says so, all ten,
                ``[b, 10, …]``.

        Returns:
            The batch.

        Raises:
            ValueError: If there is no such crop.
        """
        data = self.config.data
        if crop not in _CROPS:
            raise ValueError(f"There is no crop '{crop}'.{nearest(crop, _CROPS)}")
        batch = batches.ready(data, self.groups, batch)
        if crop == "none":
            return batch
        return batches.crop(batch, data.crop, crop == "measured" and data.ten_crop)

    def lookup(self, arrays: tasks.Arrays, examples: Array, crop: str = "none") -> dict[str, Array]:
        """Makes a batch of examples (see ``tasks``), as ``ready`` does."""
        return self.ready(self.task.batch(arrays, examples), crop)

    def apply(self, variables: PyTree, image: Array, aux: bool = True) -> dict[str, Array]:
        """Applies the network, in evaluation, to images that are neither scaled nor cropped."""
        data = self.config.data
        prepared = batches.crop(
            {"image": batches.prepare(image.astype(jnp.float32), data)}, data.crop
        )
        outputs: Any = self.network.apply(variables, prepared["image"], aux=aux)
        return outputs


class Members(NamedTuple):
    """Runs that differ in more than their seed.

    Attributes:
        seeds: The seed of each.
        factors: What the weights of objectives are multiplied by, ``[runs]``; others by 1.
    """

    seeds: tuple[int, ...]
    factors: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Experiment(Forward):
    """The parts of a run, without its data.

    Attributes:
        objectives: Objectives by name.
        predictions: Prediction rules by name.
        augment: The augmentations, as one, random crops first.
        reach: For each objective a tree of booleans over the parameters: those that it reaches.
        make_rule: Makes the update rule, with ``numbers`` in place of the optimizer's.
        rule: Update rule.
        members: The runs, if they differ in more than their seed.
    """

    objectives: objectives.Objectives
    predictions: Mapping[str, Any]
    augment: augmentation.Augmentation
    reach: Mapping[str, PyTree]
    make_rule: Callable[[Mapping[str, Any]], UpdateRule]
    rule: UpdateRule
    members: Members | None = None

    @property
    def seeds(self) -> Sequence[int]:
        """The seed of each run."""
        config = self.config
        own = self.members.seeds if self.members else None
        return own or range(config.seed, config.seed + config.seeds)

    def main_objective(self) -> str:
        """Returns the name of the main output's objective, the first if there are several."""
        return objective_sections.main_objective(self.objectives)

    def size(self) -> int:
        """Returns the number of parameters that some objective reaches; others are not trained."""
        reached = jax.tree.map(lambda *reaches: any(reaches), *self.reach.values())
        return traced.size(self.variables["params"], reached)

    def accuracy(self) -> str | None:
        """Returns the metric by which the main output is judged, ``None`` if it classifies none."""
        names = objectives.accurate(self.objectives, self.outputs, self.batch)
        own = (name for name in names if self.objectives[name].output == MAIN)
        return next((f"{name}/top_1" for name in own), None)

    def branches(self) -> dict[str, Groups]:
        """Returns the groups that outputs classify, by output."""
        return objective_sections.branches(self.objectives, self.groups)

    def initial_state(self, seed: Array) -> TrainState:
        """Returns the state of a run before its first step; ``seed`` is an int32."""
        key = jax.random.key(seed)
        image = jnp.zeros(self.batch["image"].shape, self.batch["image"].dtype)
        own = jax.random.fold_in(key, INITIAL)
        variables: Any = self.network.init(own, image)
        if self.config.initialization == "pytorch":
            again = jax.random.fold_in(own, INITIAL)
            variables = {**variables, "params": as_pytorch(again, variables["params"])}
        return TrainState.start(key, variables, self.rule)

    def numbers(self) -> Numbers:
        """Returns the weights of objectives and the learning rate, as far as they are numbers.

        A program that takes them as arguments is the same program whatever they are, and is found
        where compiled ones are kept.
        """
        numbers = {k: o.weight for k, o in self.objectives.items() if not callable(o.weight)}
        weights = {name: float(weight) for name, weight in numbers.items()}
        return {"weights": weights, "optimizer": optimizer_section.numbers(self.config)}

    def step(
        self,
        axis: str | None = None,
        numbers: Numbers | None = None,
        factors: Mapping[str, Array] | None = None,
    ) -> Step:
        """Returns the training step.

        Args:
            axis: Under ``pmap``, the axis of the devices that share a batch.
            numbers: What ``numbers`` returns, traced; by default they are part of the program.
            factors: What the weights of objectives are multiplied by.
        """
        shared = Shared(axis, self.config.batch_norm == "batch") if axis else None
        rule, chosen = self.rule, dict(self.objectives)
        if numbers is not None:
            rule = self.make_rule(numbers["optimizer"])
            for name, weight in numbers["weights"].items():
                chosen[name] = replace(chosen[name], weight=weight)
        chosen = scaled(chosen, factors or {})
        return make_step(self.network.apply, chosen, rule, self.augment, shared)

    def measure(self) -> Measure:
        """Returns the measurement of a batch with the crop ``"measured"``."""
        return make_measure(self._measured(), self.objectives, self.predictions)

    def predict(self) -> Predict:
        """Returns the outputs that fitted prediction rules need, of such a batch."""
        fitted = [rule for rule in self.predictions.values() if is_fitted(rule)]
        needed = {output for rule in fitted for output in rule.needs()}
        return make_predict(self._measured(), sorted(needed), self.objectives)

    def _measured(self) -> Apply:
        apply = self.network.apply
        return crops.averaged(apply) if self.config.data.ten_crop else apply


def _example_batch(
    task: tasks.Task, config: ConfigDict, groups: Mapping[str, Groups]
) -> dict[str, Any]:
    """Returns the shapes of a batch of two examples as the network sees it, from the config alone.

    Raises:
        ValueError: If crops don't fit the images.
    """
    labels = {kind: np.zeros(1, np.int32) for kind in config.data.classes}
    blank = Source(np.zeros((1, *config.data.shape), np.uint8), labels)
    # Shapes alone: run one by one, each operation would be compiled first.
    arrays = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, task.prepare(blank)))
    shape = (2, 2) if isinstance(task, tasks.Pairs) else (2,)
    examples = jax.ShapeDtypeStruct(shape, jnp.int32)
    raw = jax.eval_shape(task.batch, arrays, examples)
    compatibility.groups(groups, task.classes(config.data.classes)["label"], raw)
    batch = jax.eval_shape(
        lambda a, e: batches.ready(config.data, groups, task.batch(a, e)), arrays, examples
    )
    side = config.data.crop
    compatibility.crop(side, config.data.ten_crop, batch["image"].shape)
    return jax.eval_shape(lambda whole: batches.crop(whole, side), batch)


def _parts(config: ConfigDict, key: str, **supplied: Any) -> dict[str, Any]:
    """Makes all parts of a section, in the order of their registry, those of one's own last."""
    kind, made = NAMED[key], {}
    for name, section in config[key].items():
        with registry.located(f"config.{key}.{name}"):
            made[name] = kind.create(section, **supplied)
    order = list(kind.parts)
    place = {
        k: order.index(s.name) if s.name in order else len(order) for k, s in config[key].items()
    }
    return {k: made[k] for k in sorted(made, key=lambda k: place[k])}


def _heads(config: ConfigDict, plan: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Makes the heads by the names of their outputs, and lists the outputs of each family."""
    heads: dict[str, Any] = {}
    families: dict[str, list[str]] = {}
    for name, part in _parts(config, "heads", plan=plan).items():
        family = isinstance(part, Mapping)
        members = {f"{name}_{key}": head for key, head in part.items()} if family else {name: part}
        for output in members.keys() & heads.keys():
            raise ValueError(f"Two heads have the output '{output}'; rename one of them.")
        if family:
            families[name] = list(members)
        heads |= members
    return heads, families


def forward(config: ConfigDict) -> Forward:
    """Makes and checks a network, without what trains it.

    Args:
        config: A config, resolved.

    Returns:
        The network; nothing has been compiled and no data read.

    Raises:
        ValueError: If the config asks for what does not exist or does not fit together.
    """
    validation.validate(config)
    # Before JAX is asked anything.
    cpu.make_devices(config.devices)
    with registry.located("config.data.task"):
        task = TASK.create(config.data.task)
    with registry.located("config.backbone"):
        backbone = SINGLE["backbone"].create(config.backbone)
    heads, families = _heads(config, getattr(backbone, "plan", None))
    network = Network(backbone, heads)
    groups = group_sections.create(config.data.groups)
    batch = _example_batch(task, config, groups)
    try:
        variables = jax.eval_shape(network.init, jax.random.key(0), batch["image"])
        outputs = jax.eval_shape(network.apply, variables, batch["image"])
    except (ArithmeticError, TypeError) as error:
        if untrusted.has_names(config):
            raise  # A mistake in code of one's own is shown whole.
        raise ValueError(
            f"The network can't be applied to images {batch['image'].shape[1:]} with the settings"
            f" of its backbone and heads: {str(error).rstrip('.')}."
        ) from error
    return Forward(config, task, network, families, groups, batch, variables, outputs)


def build(config: ConfigDict) -> Experiment:
    """Makes and checks the parts of a run.

    Args:
        config: A config, resolved.

    Returns:
        The parts; nothing has been compiled and no data read.

    Raises:
        ValueError: If the config asks for what does not exist or does not fit together.
    """
    parts = forward(config)
    network, batch, outputs = parts.network, parts.batch, parts.outputs
    augmentations = _parts(config, "augmentation")
    units = optimizer_section.units(parts.task, config)
    depths = objective_sections.depths(network.heads, getattr(network.backbone, "plan", None))
    chosen = objective_sections.create(config.objectives, parts.families, depths, units)
    chosen = objective_sections.with_ignored_groups(chosen, parts.groups)
    jax.eval_shape(lambda o, b: objectives.evaluate(chosen, o, b), dict(outputs), batch)
    compatibility.ignored(chosen, isinstance(parts.task, tasks.Pairs))
    of_outputs = objective_sections.branches(chosen, parts.groups)
    assignments = {name: partition.assignment for name, partition in of_outputs.items()}
    predictions = _parts(config, "predictions", groups=assignments)
    check_predictions(predictions, outputs, chosen)
    compatibility.labels(predictions, chosen)
    classes = parts.task.classes(config.data.classes)
    compatibility.widths(classes | {k: g.number for k, g in parts.groups.items()}, chosen, outputs)
    compatibility.augmentations(augmentations, batch)
    if config.data.crop and not config.data.random_resized_crop:
        augmentations = {"data.crop": RandomCrop(config.data.crop), **augmentations}
    compatibility.ranges(network.heads, chosen, *batches.image_range(config.data))
    if config.data.ten_crop:
        compatibility.averages(outputs, batch)
    if "validation" in config.evaluate_splits:
        compatibility.selection(chosen, outputs, batch)
    reach = find_reach(network.apply, chosen, parts.variables, batch)
    # A weighting by averages takes them over an epoch, if the config doesn't say otherwise.
    chosen_period = "period" in config.weighting or not units.get("epoch")
    period = {} if chosen_period else {"period": units["epoch"]}

    def make_rule(numbers: Mapping[str, Any]) -> UpdateRule:
        rule = SINGLE["update_rule"].create(
            config.update_rule,
            optimizer=optimizer_section.create(config, units, numbers),
            reach=reach,
            main=objective_sections.main_objective(chosen),
            aggregator=SINGLE["aggregator"].create(config.aggregator),
        )
        weighting = SINGLE["weighting"].create(config.weighting, **period)
        return weighted(rule, weighting, reach)

    return Experiment(
        **vars(parts),
        objectives=chosen,
        predictions=predictions,
        augment=augmentation.chain(augmentations),
        reach=reach,
        make_rule=make_rule,
        rule=make_rule({}),
    )
