"""The worth of objectives to the network of a config: its runs as one compiled program."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from ml_collections import ConfigDict

from sire_jax import text
from sire_jax.attribution import plan
from sire_jax.attribution.results import Attribution
from sire_jax.configuration import experiment
from sire_jax.runs.divergence import NonFiniteLossError
from sire_jax.runs.runs import Runs
from sire_jax.state import parted

# {seed: [the metric of each network]}
Measured = dict[int, list[float]]


class Attributed:
    """The networks of a config with subsets of its auxiliary objectives.

    Args:
        config: A config, resolved; its seeds are those of the networks.
        sample: As of ``sj.attribute``.
        metric: What is measured on the test images; by default the main accuracy.

    Attributes:
        names: The auxiliary objectives.
        metric: What is measured.
        seeds: The seeds.
        orders: How many orders of objectives are drawn for each of them; 0: all subsets.
        networks: How many are trained for each of them.

    Raises:
        ValueError: If there is no auxiliary or no main objective, no such metric, the images are
            streamed, or the config does not fit together.
    """

    def __init__(self, config: ConfigDict, sample: int | None = None, metric: str | None = None):
        parts = experiment.build(config)
        if config.data.feed == "stream":
            raise ValueError(
                "config.data.feed is 'stream', which feeds one network; many are trained at once"
                " from images on the device: set it to 'device'."
            )
        chosen = metric or parts.accuracy()
        if chosen is None:
            raise ValueError("The main output classifies nothing; name what to measure: --metric.")
        self.main, self.metric = parts.main_objective(), chosen
        self.names = plan.auxiliary(parts.objectives, self.main)
        self.seeds = list(parts.seeds)
        self._parts, self.orders = parts, plan.orders_for(self.names, sample)
        measured = jax.eval_shape(parts.measure(), *parted(parts.variables), parts.batch)
        if chosen not in measured:
            raise ValueError(f"There is no metric '{chosen}'.{text.nearest(chosen, measured)}")
        self.networks = len(self._factors(self.seeds[0]))

    def _factors(self, seed: int) -> list[dict[str, float]]:
        """Returns what the weights are multiplied by in each network of a seed."""
        chosen, _ = plan.networks(self.names, self.orders, seed)
        objectives = self._parts.objectives
        weights = {name: float(o.weight_at(0)) for name, o in objectives.items()}
        one = {self.main: 1.0}
        of_subsets = [{**one, **plan.factors_of(subset, self.names)} for subset in chosen]
        return [*of_subsets, plan.effective_factors(weights, self.main)]

    def train(self, seed: int, advance: Callable[[], object] = lambda: None) -> list[float]:
        """Trains all networks of a seed, as one program.

        Args:
            seed: The seed.
            advance: Called after each epoch.

        Returns:
            The metric on the test images after the last epoch, of each network.

        Raises:
            ValueError: If the data are not what the config says.
            NonFiniteLossError: If a network diverges.
        """
        factors = self._factors(seed)
        config = self._parts.config.copy_and_resolve_references()
        if config.devices_share == "runs":
            # Copies of the last fill up the devices.
            factors += factors[-1:] * (-len(factors) % (config.devices or jax.device_count()))
        config.seed, config.seeds = seed, len(factors)
        members = experiment.Members(
            (seed,) * len(factors),
            {name: np.asarray([f[name] for f in factors], np.float32) for name in factors[0]},
        )
        runs = Runs(replace(self._parts, config=config, members=members))
        state, steps = runs.start().state, runs.feed.steps_per_epoch
        for epoch in range(config.epochs):
            order = runs.feed.order(state, epoch)
            state, _, _ = runs.feed.take_steps(state, runs.no_metrics(), order, 0, steps)
            advance()
        if not runs.finite(state).all():
            raise NonFiniteLossError(
                f"Parameters of the networks with seed {seed} are not finite after"
                f" {config.epochs * steps} steps; try a smaller learning rate."
            )
        measured = runs.measure(state.params, state.model_state, "test")
        return [float(value) for value in measured[self.metric][: self.networks]]

    def collect(self, measured: Mapping[int, Sequence[float]]) -> Attribution:
        """Puts together what ``train`` returned, by seed."""
        return plan.collect(self.metric, self.names, self.orders, measured)
