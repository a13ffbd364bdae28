"""A number of independent runs: their compiled programs, over data from wherever they are fed."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from sire_jax.configuration import experiment
from sire_jax.job import compilation
from sire_jax.metrics import Average, Metrics, means
from sire_jax.predictions import MOST, is_fitted
from sire_jax.runs import gradient_flow
from sire_jax.runs.feed import Feed, Totals
from sire_jax.runs.on_device import DeviceFeed
from sire_jax.runs.placement import Placement
from sire_jax.runs.program import Program
from sire_jax.runs.streamed import StreamFeed
from sire_jax.state import Best, TrainState

PyTree = Any


class Checkpoint(NamedTuple):
    """What training goes on from.

    Attributes:
        state: The states of all runs.
        sums: Of the metrics of the epoch's steps so far.
        best: The weights with the best validation accuracy so far, if the runs validate.
        seconds: How long the runs have taken.
    """

    state: TrainState
    sums: Metrics
    best: Best | None
    seconds: jax.Array


class Runs:
    """The compiled programs of a number of independent runs, and their data.

    Args:
        parts: The parts of the runs.
        feed: Makes the feed of the data, from the parts and the devices; by default the config's.

    Attributes:
        placement: The devices, and what lies on which.
        feed: The data, and the programs over them.

    Raises:
        ValueError: If the data or the devices are not what the config says.
        FileNotFoundError: If the data set is not prepared.
    """

    def __init__(
        self,
        parts: experiment.Experiment,
        feed: Callable[[experiment.Experiment, Placement], Feed] | None = None,
    ):
        self.config, self.parts = parts.config, parts
        compilation.keep(self.config.compilation_cache)
        self.placement = Placement(self.config)
        self.feed: Feed = (feed or _feed(self.config))(parts, self.placement)
        self._make_programs()

    def _make_programs(self) -> None:
        everywhere, of_runs = self.placement.everywhere, self.placement.of_runs
        # Runs once: not worth the compiler's seconds of optimization.
        quick = {"xla_backend_optimization_level": 0}
        self._initial = self.placement.program(
            self.parts.initial_state, (), of_runs, compiler_options=quick
        )
        best = of_runs if "validation" in self.config.evaluate_splits else None
        # Of each part of a checkpoint its place.
        places: Any = Checkpoint._make((of_runs, of_runs, best, everywhere))
        self._start = Program(jax.jit(self._first_checkpoint, out_shardings=places))
        self._no_metrics = Program(jax.jit(self._nothing, out_shardings=of_runs))
        self._finite = Program(jax.jit(_finite, out_shardings=everywhere))
        self._means = Program(jax.jit(means, out_shardings=everywhere))
        self._best = Program(
            jax.jit(jax.vmap(Best.update), donate_argnums=0, out_shardings=of_runs)
        )

    # Made when they are asked for: not every program measures, fits or looks at gradients.

    @cached_property
    def _measure(self) -> Totals:
        return self.feed.totals(self.parts.measure(), "measured")

    @cached_property
    def _predict(self) -> Callable[..., Any]:
        return self.feed.predictions(self.parts.predict())

    @cached_property
    def _gradients(self) -> Callable[[TrainState, int], Metrics]:
        parts = self.parts
        flow = gradient_flow.make_gradient_flow(
            parts.network.apply, parts.objectives, parts.augment
        )
        return self.feed.gradients(flow)

    # ---- What training and measuring use.

    def initial(self) -> TrainState:
        """Returns the initial states of all runs."""
        return self._initial(self._seeds())

    def _seeds(self) -> np.ndarray:
        return np.asarray(self.parts.seeds, np.int32)

    def start(self) -> Checkpoint:
        """Returns what a checkpoint holds, before the first step."""
        return self._start(self.initial())

    def checkpoint_shapes(self) -> Checkpoint:
        """Returns the shapes of what a checkpoint holds and its place; nothing is computed."""
        states = jax.eval_shape(jax.vmap(self.parts.initial_state), self._seeds())
        *of_runs, seconds = jax.eval_shape(self._first_checkpoint, states)

        def placed(tree: PyTree, place: NamedSharding) -> PyTree:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
            )

        state, sums, best = placed(of_runs, self.placement.of_runs)
        return Checkpoint(state, sums, best, placed(seconds, self.placement.everywhere))

    def _first_checkpoint(self, state: TrainState) -> Checkpoint:
        validates = "validation" in self.config.evaluate_splits
        # Copied, as the state is donated.
        best = jax.tree.map(jnp.copy, jax.vmap(Best.start)(state)) if validates else None
        return Checkpoint(state, self._nothing(), best, jnp.zeros((), jnp.float32))

    def _nothing(self) -> Metrics:
        names = [f"{name}/loss" for name in (*self.parts.objectives, "total")]
        zeros = (self.config.seeds,), jnp.float32
        return {k: Average(total=jnp.zeros(*zeros), count=jnp.zeros(*zeros)) for k in names}

    def no_metrics(self) -> Metrics:
        """Returns sums of nothing, for the metrics of a step."""
        return self._no_metrics()

    def measure(
        self,
        params: PyTree,
        model_state: PyTree,
        split: str,
        fitted: Mapping[str, PyTree] | None = None,
    ) -> dict[str, np.ndarray]:
        """Measures a split; a value for each run.

        Fitted predictions need what ``fit`` returned; none is measured on what it was fitted to.
        """
        rules = self._fitted_rules()
        usable = {
            name: values for name, values in (fitted or {}).items() if rules[name].split != split
        }
        # One program, whatever has been fitted: what has not is measured, too, and dropped.
        measured = self._measure(params, model_state, {**self._unfitted, **usable}, split)
        dropped = rules.keys() - usable
        return self.averages(
            {k: v for k, v in measured.items() if k.rpartition("/")[0] not in dropped}
        )

    def _fitted_rules(self) -> dict[str, Any]:
        """Returns the prediction rules that have parameters."""
        return {name: rule for name, rule in self.parts.predictions.items() if is_fitted(rule)}

    @cached_property
    def _unfitted(self) -> dict[str, PyTree]:
        """Parameters of rules that are not fitted, in the place of those of rules that are."""
        outputs, label = dict(self.parts.outputs), jax.ShapeDtypeStruct((2,), jnp.int32)
        shapes = {
            name: jax.eval_shape(rule.fit, {k: outputs[k] for k in rule.needs()}, label)
            for name, rule in self._fitted_rules().items()
        }

        def zeros() -> PyTree:
            return jax.tree.map(lambda x: jnp.zeros((self.config.seeds, *x.shape), x.dtype), shapes)

        # Compiled, as several processes can't put what is on all of their devices.
        made: dict[str, PyTree] = Program(jax.jit(zeros, out_shardings=self.placement.of_runs))()
        return made

    def averages(self, metrics: Metrics) -> dict[str, np.ndarray]:
        """Divides metrics; a value for each run."""
        return {name: np.asarray(average) for name, average in self._means(metrics).items()}

    def finite(self, state: TrainState) -> np.ndarray:
        """Tells of each run whether all its parameters and states are finite."""
        return np.asarray(self._finite((state.params, state.model_state, state.update_state)))

    def fit(self, params: PyTree, model_state: PyTree) -> dict[str, PyTree]:
        """Fits the prediction rules that have parameters; a value for each run."""
        rules, predicted = self._fitted_rules(), {}
        for split in sorted({rule.split for rule in rules.values()}):
            # Rounded up: at most that many examples.
            every = -(-self.feed.examples[split].shape[1] // MOST)
            predicted[split] = self._predict(params, model_state, split, every)
        # One by one: a rule searches for as long as its own run needs.
        return {
            name: Program(
                jax.jit(
                    lambda examples, rule=rule: jax.lax.map(lambda x: rule.fit(*x), examples),
                    out_shardings=self.placement.of_runs,
                )
            )(predicted[rule.split])
            for name, rule in rules.items()
        }

    def gradients(self, state: TrainState, epoch: int) -> dict[str, np.ndarray]:
        """Measures the gradients of an epoch's first batch; a value for each run."""
        return self.averages(self._gradients(state, epoch))

    def better(self, best: Best, score: np.ndarray, state: TrainState) -> Best:
        """Keeps the weights of the runs whose validation accuracy is the best so far."""
        return self._best(best, np.asarray(score, np.float32), state)


def _finite(trees: PyTree) -> jax.Array:
    """Tells of each run, along the first axis, whether all its numbers are finite."""
    numbers = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in numbers]).all(0)


def _feed(config: ConfigDict) -> Callable[[experiment.Experiment, Placement], Feed]:
    return StreamFeed if config.data.feed == "stream" else DeviceFeed.load
