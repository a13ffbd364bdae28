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


pytestmark = pytest.mark.slow  # Compiles every rule for eight devices.


@pytest.fixture(scope="module")
def distances(tmp_path_factory):
    """For each case the relative distance of gradients, statistics and losses to one device's."""
    program = programs.Program(
        ["devices_program", json.dumps(RULES)],
        tmp_path_factory.mktemp("devices") / "log",
        PYTHONPATH=str(Path(__file__).parent),
        JAX_NUM_CPU_DEVICES="8",
    )
    with programs.started(program):
        assert program.wait(280) == 0, program.output
    lines = [json.loads(line) for line in program.output.splitlines() if line.startswith("[")]
    return {tuple(line[:3]): line[3:] for line in lines}


@pytest.mark.parametrize(("rule", "aggregator"), RULES)
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_devices_that_share_a_batch_compute_the_gradient_of_one(
    rule, aggregator, parallel, distances
):
    gradient, statistics, losses = distances[rule, aggregator, parallel]
    assert gradient < 1e-6
    assert statistics < 1e-6
    assert losses < 1e-6


def test_statistics_of_each_device_are_others(distances):
    # So the equality above is not that of a network without batch norm.
    gradient, statistics, _ = distances["own statistics", "", "pmap"]
    assert gradient > 1e-2
    assert statistics > 1e-4
