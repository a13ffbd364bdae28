"""The rows of Table I of Peeters and Schlyter, *Classification, weight sharing, auxiliary losses*.

``configs/pairs.py:aux_10``; with the differences of the authors' released program
``configs/pairs.py:aux_10,as_released``: pixels in 0..255, minus the probability of the right digit
as the digits' loss, whole-set batches for the convolutional rows, a residual branch with 32 hidden
units.

What the report tries beside its rows: ``--config.backbone.relu=True`` (ReLU after convolutions),
``--config.backbone.batch_norm=False`` (of branches, too), and small shifts, turns and shears,
``--config.augmentation.affine.rotation=10``.
"""

from typing import Any

from ml_collections import ConfigDict

from sire_jax import configuration
from sire_jax.configuration import augmentation, backbone, head, objective, optimizer, prediction

# Epochs, backbone and what else differs; the report's Sections III.A to III.F.
_DENSE: dict[str, Any] = {"epochs": 20, "backbone": backbone("pair_dense")}
_CONV: dict[str, Any] = {"epochs": 80, "backbone": backbone("pair_convolutional")}
_AUX: dict[str, Any] = {"epochs": 70, "backbone": backbone("pair_branches")}
# Measuring these takes as long as training them; every tenth epoch shows the curve.
_RESIDUAL: dict[str, Any] = {"weight": 10.0, "evaluate_every": 10}

VARIANTS: dict[str, dict[str, Any]] = {
    "dense_bce": _DENSE,
    "dense_mse": {**_DENSE, "loss": "binary_squared_error"},
    "conv": _CONV,
    "conv_bn": {**_CONV, "backbone": backbone("pair_convolutional", batch_norm=True)},
    # The text says that the row uses the swap; `affine` can be added by override.
    "conv_augment": {**_CONV, "augmentation": {"swap": augmentation("swap")}},
    "duplicated": {"epochs": 20, "backbone": backbone("pair_branches", shared=False)},
    "shared": {"epochs": 20, "backbone": backbone("pair_branches")},
    "aux_0.1": {**_AUX, "weight": 0.1},
    "aux_10": {**_AUX, "weight": 10.0},
    "residual": {
        **_RESIDUAL,
        "epochs": 120,
        "backbone": backbone("pair_branches", branch="residual"),
    },
    "resless": {
        **_RESIDUAL,
        "epochs": 40,
        "backbone": backbone("pair_branches", branch="residual", residual=False),
    },
}


def get_config(variant: str = "aux_10") -> ConfigDict:
    """Returns the config of a row of Table I.

    Args:
        variant: Name of the row, with ``,as_released`` for the released program's reading.

    Returns:
        The config.

    Raises:
        ValueError: If there is no such row or option.
    """
    row, _, option = variant.partition(",")
    chosen = configuration.variant(VARIANTS, row)
    if option not in ("", "as_released"):
        raise ValueError(f"There is no option '{option}'; there is 'as_released'.")
    released = option == "as_released"

    config = configuration.default()
    config.name = f"pairs/{variant}"
    config.epochs = chosen["epochs"]
    config.evaluate_batch_size = 200  # small batches stay in a CPU's caches
    config.data.update(name="tfds:mnist", shape=(28, 28, 1))
    config.data.task = configuration.task("pairs", downscale=2)
    config.backbone = chosen["backbone"].copy_and_resolve_references()
    config.evaluate_every = chosen.get("evaluate_every", 1)
    config.objectives.main = objective("main", "label", chosen.get("loss", "binary_cross_entropy"))
    config.augmentation.update(chosen.get("augmentation", {}))
    config.optimizer = optimizer("adam")
    if "weight" in chosen:
        loss = "negative_probability" if released else "cross_entropy"
        config.heads.digits = head("identity", endpoints=("digits",))
        config.objectives.digits = objective("digits", "digits", loss, chosen["weight"])
        config.predictions.order = prediction("digit_order")
    if released:
        config.data.scale = 1.0
        if config.backbone.name == "pair_convolutional":
            config.batch_size = config.data.task.train
        if config.backbone.get("branch") == "residual":
            config.backbone.residual_hidden = 32
    return config
