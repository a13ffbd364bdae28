"""A GPU or a TPU computes what a CPU does: steps of a small network of each paper."""

from pathlib import Path

import jax
import numpy as np
import programs
import pytest

pytestmark = [
    pytest.mark.slow,  # Compiles each network twice.
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="There is no accelerator."),
]


def _steps(platform, folder):
    file = folder / f"{platform}.npz"
    program = programs.Program(
        ["accelerator_program", str(file)],
        folder / f"{platform}.log",
        PYTHONPATH=str(Path(__file__).parent),
        JAX_PLATFORMS=platform,
        XLA_FLAGS="",
    )
    with programs.started(program):
        assert program.wait(280) == 0, program.output
    return dict(np.load(file))


@pytest.mark.timeout(600)
def test_steps_on_the_accelerator_are_those_of_a_cpu(tmp_path):
    # An accelerator's own name, as JAX knows several of one kind.
    found, expected = _steps(jax.devices()[0].platform, tmp_path), _steps("cpu", tmp_path)
    off = {
        what: np.linalg.norm(found[what] - values) / np.linalg.norm(values)
        for what, values in expected.items()
    }
    assert {what: each for what, each in off.items() if not each < 5e-3} == {}
