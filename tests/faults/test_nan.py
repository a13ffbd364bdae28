"""A loss that is not a number, at a step that is known."""

import re

import numpy as np
import programs
import pytest

from sire_jax.job import command
from sire_jax.storage.checkpoint import Checkpoints

pytestmark = pytest.mark.optax_dtypes

# The learning rate overflows with the update of step 13, counted from 0; step 14 is the first whose
# loss is taken of what is left.
RATE = {"name": "piecewise", "init_value": 0.5, "boundaries": (13,), "scale": 3e38}
OVERRIDES = ("--config.seeds=2", "--config.seed=3", "--config.epochs=6")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "from sire_jax import configuration\n"
        "def get_config():\n"
        f"    config = configuration.load({programs.QUICKSTART.removeprefix('--config=')!r})\n"
        f"    rate = {RATE!r}\n"
        "    config.optimizer = configuration.optimizer('sgd', learning_rate=rate)\n"
        "    return config\n"
    )
    return f"--config={tmp_path / 'broken.py'}"


@pytest.mark.parametrize(
    ("saving", "message", "newest"),
    [
        (
            5,
            r"The loss '(main|digits)' is not finite after 14 steps of the run with seed [34]\.",
            10,
        ),
        # Where it is due to be saved ahead of the next loss, that is what fails.
        pytest.param(
            *(14, r"The parameters are not finite after 14 steps\.", 0), marks=pytest.mark.slow
        ),
    ],
)
def test_it_halts_naming_loss_and_step_and_keeps_what_is_finite(
    saving, message, newest, broken, tmp_path
):
    arguments = ["sire_jax.train", broken, f"--workdir={tmp_path / 'run'}", *OVERRIDES]
    program = programs.Program(
        [*arguments, f"--config.checkpoint_steps={saving}"], tmp_path / "log"
    )
    with programs.started(program):
        assert program.wait() == command.EXPLAINED
    assert re.search(message, program.output), program.output
    assert "The last finite checkpoint is kept" in program.output
    assert "Traceback" not in program.output
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == newest
    state = programs.final(tmp_path / "run", *OVERRIDES, config=broken)
    assert all(np.isfinite(x).all() for x in state if np.issubdtype(x.dtype, np.floating))
