"""Configs as they are shipped, at full size: some steps of one network of each paper."""

import numpy as np
import pytest

from sire_jax import configuration, experiment
from sire_jax.rehearsal import rehearse

pytestmark = [pytest.mark.optax_dtypes, pytest.mark.slow]  # Full-size steps take seconds.

CONFIGS = configuration.repository_configs()


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ("pairs.py:aux_10", 20),
        # More than it takes to diverge with a last layer that is linear.
        ("sire.py:cnn", 9),
        ("auxnet.py:56-5", 2),
        ("ssal.py:resnet18", 2),
    ],
)
def test_losses_are_finite_at_full_size(config, steps, tmp_path):
    # Without data: the images are made up.
    loaded = configuration.load(f"{CONFIGS}/{config}", [f"--config.data.dir={tmp_path}"])
    found = rehearse(experiment.build(loaded), steps)
    assert found.images == "made up"
    assert found.verdict().startswith(("falls", "finite"))
    assert len(found.losses["total"]) == steps
    assert all(np.isfinite(each).all() for each in found.losses.values())
