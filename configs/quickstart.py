"""Is one handwritten digit less than or equal to another? On the digits bundled here.

``configs/quickstart.py:auxiliary`` is also told, while it trains, which digits it sees, by an
auxiliary output; ``configs/quickstart.py:main_only`` is the same network without it.
"""

from ml_collections import ConfigDict

from sire_jax import configuration
from sire_jax.configuration import backbone, head, objective, prediction


def get_config(variant: str = "auxiliary") -> ConfigDict:
    """Returns the config of the network with its auxiliary output or without.

    Args:
        variant: ``auxiliary`` or ``main_only``.

    Returns:
        The config.

    Raises:
        ValueError: If there is no such variant.
    """
    auxiliary = configuration.variant({"auxiliary": True, "main_only": False}, variant)
    config = configuration.default()
    config.name = f"quickstart/{variant}"
    config.seeds = 5
    config.epochs = 60
    config.batch_size = 50
    config.evaluate_batch_size = 100
    config.data.task = configuration.task("pairs", train=500, test=250)
    config.backbone = backbone("pair_branches", padding=1)
    config.objectives.main = objective("main", "label", "binary_cross_entropy")
    if auxiliary:
        config.heads.digits = head("identity", endpoints=("digits",))
        config.objectives.digits = objective("digits", "digits", "cross_entropy", weight=10.0)
        config.predictions.order = prediction("digit_order")
    return config
