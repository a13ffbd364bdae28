"""The worth of objectives to a network of one's own, on arrays in memory."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sire_jax.attribution import plan
from sire_jax.attribution.results import Attribution
from sire_jax.fitting import Batch, make_fit
from sire_jax.networks import MAIN
from sire_jax.objectives import Objectives
from sire_jax.state import parted
from sire_jax.step import make_measure
from sire_jax.text import nearest


def attribute(
    network: nn.Module,
    objectives: Objectives,
    rule: Any,
    train: Batch,
    test: Batch,
    *,
    epochs: int,
    batch_size: int,
    seeds: int = 5,
    metric: str | None = None,
    main: str = MAIN,
    sample: int | None = None,
    **settings: Any,
) -> Attribution:
    """Tells what each auxiliary objective is worth to a metric of the main output.

    Trains the network with every subset of them for every seed, by one compiled program; networks
    of a seed begin with the same weights and see the same batches.

    >>> from functools import partial
    >>> import optax, sire_jax as sj
    >>> digits = sj.data.load("digits")
    >>> network = sj.Network(
    ...     sj.backbones.SmallCNN(classes=10, channels=(2, 2)),
    ...     {"exit": sj.heads.Classifier(("block_1",), classes=10)},
    ... )
    >>> objectives = {k: sj.Objective(k, "label", sj.cross_entropy) for k in ("exit", "main")}
    >>> attribution = sj.attribute(
    ...     network,
    ...     objectives,
    ...     partial(sj.joint, optax.adam(1e-2)),
    ...     digits.train.batch(),
    ...     digits.test.batch(),
    ...     epochs=1,
    ...     batch_size=200,
    ...     seeds=2,
    ... )
    >>> sorted(attribution.values), len(attribution.worth["exit"])
    (['', 'exit'], 2)

    Args:
        network: Returns named outputs.
        objectives: Objectives by name.
        rule: As of ``fit``.
        train: As of ``fit``.
        test: As of ``fit``: what the metric is measured on, after the last epoch.
        epochs: How often all training examples are seen, at least 1.
        batch_size: Examples in a batch.
        seeds: How many seeds, at least 1; intervals need 2.
        metric: A metric of ``fit``'s history on ``test``; by default the main accuracy.
        main: Name of the main objective, which is never left out.
        sample: How many orders of the objectives to draw for each seed, besides their reverses,
            rather than train all subsets; 0: all subsets. By default all of up to 6 objectives,
            and 4 orders of more.
        **settings: ``augment``, ``predictions`` and ``evaluate_batch_size`` of ``fit``.

    Returns:
        The values; printed, a table.

    Raises:
        ValueError: If there is no auxiliary or no main objective, or no such metric, a number is
            out of range, or ``fit`` refuses the rest.
        NonFiniteLossError: If a loss or a parameter is not finite.
    """
    names = plan.auxiliary(objectives, main)
    count = plan.orders_for(names, sample)
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it should be at least 1.")
    metric = f"{main}/top_1" if metric is None else metric
    _check_metric(metric, network, objectives, settings.get("predictions"), test)
    evaluated = {k: settings.pop(k) for k in ("evaluate_batch_size",) if k in settings}
    run = make_fit(network, objectives, rule, **settings)
    weights = {name: float(o.weight_at(0)) for name, o in objectives.items()}

    def measure(factors: Mapping[str, float], seed: int) -> float:
        _, history = run(
            train,
            test,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            factors=factors,
            **evaluated,
        )
        return float(history["test"][metric][-1])

    measured = {}
    for seed in range(seeds):
        chosen, _ = plan.networks(names, count, seed)
        factors = [plan.factors_of(subset, names) for subset in chosen]
        factors.append(plan.effective_factors(weights, main))
        measured[seed] = [measure(each, seed) for each in factors]
    return plan.collect(metric, names, count, measured)


def _check_metric(
    metric: str, network: nn.Module, objectives: Objectives, predictions: Any, test: Batch
) -> None:
    """Checks, before anything is trained, that there is such a metric."""
    one = jax.tree.map(lambda x: jnp.asarray(x[:1]), dict(test))
    variables = jax.eval_shape(network.init, jax.random.key(0), one["image"])
    measure = make_measure(network.apply, objectives, predictions)
    measured = jax.eval_shape(measure, *parted(variables), one)
    if metric not in measured:
        raise ValueError(f"There is no metric '{metric}'.{nearest(metric, measured)}")
