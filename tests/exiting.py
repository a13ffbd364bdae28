"""A tiny run with exits, shared by the tests of what is done with exits after training."""

import jax
from ml_collections import ConfigDict

from sire_jax import configuration, train


def config(**settings):
    """Digits, normalized; two exits in the middle of a network; validation."""
    made = configuration.default()
    made.name = "exits"
    made.update(epochs=4, batch_size=100, devices=1, evaluate_splits=("validation",))
    made.data.mean, made.data.std = (0.3,), (0.4,)
    made.data.task.validation_per_class = 12
    made.backbone = ConfigDict({"name": "planned:tiny", "classes": 10})
    for name, endpoint in (("exit_3", "stage_1"), ("exit_5", "stage_2_block_1")):
        made.heads[name] = configuration.head("classifier", endpoints=(endpoint,), classes=10)
        made.objectives[name] = configuration.objective(name, "label", "cross_entropy", 0.5)
    made.objectives.main = configuration.objective("main", "label", "cross_entropy")
    made.optimizer = configuration.optimizer("adam", learning_rate=0.02)
    made.update(settings)
    return made


def trained(directory, **settings):
    """Trains it; returns its config."""
    made = config(**settings)
    with jax.numpy_dtype_promotion("standard"):
        train.train(made, str(directory))
    return made
