"""One step on 1 and on 8 devices: the same gradient, whatever the rule and the wrapper."""

import json
from pathlib import Path

import programs
import pytest

# Every update rule; those that can reconcile gradients also with the most nonlinear aggregator.
RULES = [
    ("joint", "sum"),
    ("joint", "upgrad"),
    ("pairwise", "sum"),
    ("multiway", "sum"),
    ("multiway", "upgrad"),
    ("effective_joint", "sum"),
]


# Compiles every rule for eight devices: one test, as no worker should do so twice.
@pytest.mark.slow
def test_devices_that_share_a_batch_compute_the_gradient_of_one(tmp_path):
    program = programs.Program(
        ["devices_program", json.dumps(RULES)],
        tmp_path / "log",
        PYTHONPATH=str(Path(__file__).parent),
        JAX_NUM_CPU_DEVICES="8",
    )
    with programs.started(program):
        assert program.wait(280) == 0, program.output
    lines = [json.loads(line) for line in program.output.splitlines() if line.startswith("[")]
    # Of gradients, statistics and losses the relative distance to one device's.
    distances = {tuple(line[:3]): line[3:] for line in lines}
    statistics_of_each = distances.pop(("own statistics", "", "pmap"))
    assert set(distances) == {(*rule, how) for rule in RULES for how in ("jit", "pmap")}
    assert {case: each for case, each in distances.items() if max(each) >= 1e-6} == {}
    # The equality above is not that of a network without batch norm.
    assert statistics_of_each[0] > 1e-2
    assert statistics_of_each[1] > 1e-4
