"""Kills -9 of the real program at random moments."""

import re
import time

import numpy as np
import programs
import pytest

from sire_jax.storage.workdir import read_metrics, read_results

pytestmark = pytest.mark.optax_dtypes

KILLS = 4
# Of steps many more than the killed lives take together.
OVERRIDES = (
    "--config.epochs=120",
    "--config.seeds=1",
    "--config.evaluate_every=30",
    "--config.checkpoint_every=2",
    "--config.checkpoint_steps=7",
    "--config.steps_per_call=3",
)


def _newest(workdir):
    """Returns the step saved last, by the files alone: a manifest is written last."""
    sealed = (workdir / "checkpoints").glob("*/manifest")
    return max((int(path.parent.name) for path in sealed), default=None)


@pytest.mark.slow  # Six starts of the real program.
@pytest.mark.timeout(900)
def test_nothing_is_lost_by_kills_at_random_moments(tmp_path):
    workdir, random = tmp_path / "killed", np.random.default_rng(16)
    lost = []

    def note(before, program):
        going_on = re.search(r"Going on after step (\d+)\.", program.output)
        if going_on and before is not None:
            lost.append(before - int(going_on[1]))

    for kill in range(KILLS):
        before = _newest(workdir) if kill else None
        program = programs.train(workdir, tmp_path / f"log_{kill}", *OVERRIDES, XLA_FLAGS="")
        with programs.started(program):
            if kill % 2:
                # At any moment from its start.
                time.sleep(random.uniform(0, 6))
            else:
                # While it trains, saves and measures.
                program.wait_for("First step")
                time.sleep(random.uniform(0, 0.8))
            assert program.process.poll() is None, "It ended before it was killed."
            program.process.kill()
            assert program.wait() == -9
        note(before, program)
        assert "Traceback" not in program.output

    before = _newest(workdir)
    program = programs.train(workdir, tmp_path / "log", *OVERRIDES, XLA_FLAGS="")
    with programs.started(program):
        assert program.wait(600) == 0, program.output
    note(before, program)
    # Each kill while it trained came after a restart, but for the first, and ahead of one.
    assert len(lost) >= KILLS // 2
    assert not any(lost)
    whole = programs.train(tmp_path / "whole", tmp_path / "log_whole", *OVERRIDES, XLA_FLAGS="")
    with programs.started(whole):
        assert whole.wait(600) == 0, whole.output
    programs.assert_same_bits(
        programs.final(workdir, *OVERRIDES), programs.final(tmp_path / "whole", *OVERRIDES)
    )
    assert read_metrics(workdir) == read_metrics(tmp_path / "whole")
    assert read_results(workdir)["splits"] == read_results(tmp_path / "whole")["splits"]
