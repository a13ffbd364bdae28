"""The shipped configs themselves, on the bundled digits and shrunk to one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax import configuration, experiment, inspect, reproduce, validation

CONFIGS = configuration.repository_configs()
TABLES = sorted(path.stem for path in (CONFIGS / "tables").glob("*.json"))

# Weights and biases of the report's networks on 14 x 14 images, as counted in test_networks.py.
PARAMETERS = {
    "dense_bce": 27265,
    "dense_mse": 27265,
    "conv": 4737,
    "conv_bn": 4865,
    "conv_augment": 4737,
    "duplicated": 10477,
    "shared": 5459,
    "aux_0.1": 5459,
    "aux_10": 5459,
    "residual": 154217,
    "resless": 154217,
}


def _shrunk(variant):
    overrides = {
        "data.name": "digits",
        "data.shape": "(8, 8, 1)",
        "data.task.downscale": 1,
        "data.task.train": 20,
        "data.task.test": 20,
        "batch_size": 4,
        "devices": 1,
    }
    if not variant.startswith("dense"):
        overrides["backbone.padding"] = 1
    given = [f"--config.{key}={value}" for key, value in overrides.items()]
    return configuration.load(f"{CONFIGS}/pairs.py:{variant}", given)


# One of each kind of network and of loss; of all of them parameters are counted below.
# The quick ones have an augmentation and auxiliary outputs between them.
slow = pytest.mark.slow
STEPPED = (
    "conv_augment",
    "aux_10,as_released",
    *(pytest.param(variant, marks=slow) for variant in ("dense_mse", "conv_bn", "residual")),
)
LARGE = ("residual", "resless")


@pytest.mark.optax_dtypes
@pytest.mark.parametrize("variant", STEPPED)
def test_a_step_of_a_pairs_config_has_finite_losses_and_changes_every_parameter(variant):
    parts = experiment.build(_shrunk(variant))
    dataset, (draw,) = parts.load()
    arrays = jax.tree.map(jnp.asarray, parts.task.prepare(dataset.train))
    batch = parts.lookup(arrays, jnp.asarray(draw.train[:4]))
    before = parts.initial_state(0)
    after, metrics = jax.jit(parts.step())(before, batch)
    assert set(metrics) == {f"{name}/loss" for name in (*parts.objectives, "total")}
    assert all(np.isfinite(metric.mean()) for metric in metrics.values())
    assert float(metrics["main/loss"].count) == 4
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    assert jax.tree.all(changed)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [pytest.param(*each, marks=slow if each[0] in LARGE else ()) for each in PARAMETERS.items()],
)
def test_parameters_of_the_pairs_configs(variant, parameters):
    counts = inspect.inspect(configuration.load(f"{CONFIGS}/pairs.py:{variant}"))
    assert counts["parameters"] == counts["outputs"]["main"]["parameters"] == parameters


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_has_a_config(name):
    table = reproduce.load_table(name, CONFIGS)
    for row in table["rows"]:
        for option in ("", *table["options"]):
            config = reproduce.row_config(table, row, CONFIGS, option, [])
            validation.validate(config)
            assert config.epochs == row.get("epochs", config.epochs)
            assert {kind["split"] for kind in table["columns"].values() if "split" in kind} <= {
                *config.evaluate_splits,
                "test",
            }
