"""One step on 1, 2 and 8 devices: the same gradient, whatever the rule and the wrapper."""

import functools
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


# One of them is quick, the one with the most to differ in.
QUICK = [("multiway", "upgrad")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measures some rules on devices, all in one program, and keeps what it found."""
    return functools.cache(lambda rules: _measure(rules, tmp_path_factory.mktemp("devices")))


@pytest.fixture
def distances(measured):
    """For each case of a rule, how far gradients, statistics and losses are from one device's."""
    return lambda *rule: measured(tuple(r for r in RULES if (r in QUICK) == (rule in QUICK)))


def _measure(rules, directory):
    program = programs.Program(
        ["devices_program", json.dumps(rules)],
        directory / "log",
        PYTHONPATH=str(Path(__file__).parent),
        JAX_NUM_CPU_DEVICES="8",
    )
    with programs.started(program):
        assert program.wait(280) == 0, program.output
    lines = [json.loads(line) for line in program.output.splitlines() if line.startswith("[")]
    return {tuple(line[:4]): line[4:] for line in lines}


@pytest.mark.parametrize(
    ("rule", "aggregator"),
    [pytest.param(*rule, marks=() if rule in QUICK else pytest.mark.slow) for rule in RULES],
)
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [2, 8])
def test_devices_that_share_a_batch_compute_the_gradient_of_one(
    rule, aggregator, parallel, devices, distances
):
    gradient, statistics, losses = distances(rule, aggregator)[rule, aggregator, parallel, devices]
    assert gradient < 1e-6
    assert statistics < 1e-6
    assert losses < 1e-6


def test_statistics_of_each_device_are_others(distances):
    # So the equality above is not that of a network without batch norm.
    gradient, statistics, _ = distances(*QUICK[0])["own statistics", "", "pmap", 8]
    assert gradient > 1e-2
    assert statistics > 1e-4
