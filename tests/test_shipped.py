"""Configs as they are shipped, at full size: some steps of one network of each paper."""

import re

import programs
import pytest

pytestmark = pytest.mark.slow  # Compiles and trains networks of full size, in their own processes.


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ("pairs.py:aux_10", 20),
        # More than it takes to diverge with a last layer that is linear.
        ("sire.py:cnn", 8),
        ("auxnet.py:56-5", 2),
        ("ssal.py:resnet18", 2),
    ],
)
def test_losses_are_finite_as_shipped(config, steps, tmp_path):
    # Without data: the images are made up. The compiler is as ever.
    arguments = [
        "sire_jax.train",
        f"--config={programs.CONFIGS}/{config}",
        f"--rehearse={steps}",
        f"--config.data.dir={tmp_path}",
    ]
    program = programs.Program(arguments, tmp_path / "log", XLA_FLAGS="")
    with programs.started(program):
        assert program.wait(280) == 0, program.output
    row = [cell.strip() for cell in program.output.splitlines()[2].split("|")]
    assert row[3:5] == ["made up", str(steps)]
    assert re.match(r"(falls|finite): \S+ -> \S+", row[5])
