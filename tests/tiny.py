"""The config of programs whose network doesn't matter: it is compiled in a moment."""

from sire_jax import configuration


def get_config(variant=""):
    """The task of the quick start, by two small dense layers."""
    config = configuration.default()
    config.name = "tiny"
    config.update(seeds=5, epochs=60, batch_size=50, evaluate_batch_size=100)
    config.data.task = configuration.task("pairs", train=500, test=250)
    config.backbone = configuration.backbone("pair_dense", hidden=(8, 8))
    config.objectives.main = configuration.objective("main", "label", "binary_cross_entropy")
    return config
