"""Runs that diverge: an end, or a result beside those of the others."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from sire_jax import configuration, evaluate, paper_tables, train
from sire_jax.configuration import experiment
from sire_jax.diagnostics import figures
from sire_jax.runs import parallel
from sire_jax.runs.divergence import Diverged, NonFiniteLossError, described
from sire_jax.runs.trained import kept_weights, open_run
from sire_jax.storage.checkpoint import Checkpoints
from sire_jax.storage.workdir import read_metrics

pytestmark = pytest.mark.optax_dtypes

NEVER = parallel.NEVER
CONFIGS = configuration.repository_configs()


def _diverged(tmp_path, policy="record", known=None):
    return Diverged(policy, range(5, 8), tmp_path, known)


def test_the_first_loss_that_breaks_is_named_and_the_total_only_alone(tmp_path):
    broken = {"digits/loss": [NEVER, 4], "main/loss": [NEVER, 3], "total/loss": [NEVER, 3]}
    with pytest.raises(NonFiniteLossError, match=r"'main' .* after 3 steps.*seed 6") as stopped:
        _diverged(tmp_path, "stop").note(broken)
    assert f"The last finite checkpoint is kept in {tmp_path}" in str(stopped.value)
    broken = {"main/loss": [NEVER, NEVER], "total/loss": [2, NEVER]}
    with pytest.raises(NonFiniteLossError, match=r"'total' .* after 2 steps.*seed 5"):
        _diverged(tmp_path, "stop").note(broken)
    assert _diverged(tmp_path, "stop").note({"main/loss": [NEVER] * 3}) == []


def test_what_is_recorded_is_said_once_and_the_first_counts(tmp_path):
    diverged = _diverged(tmp_path)
    first = {"main/loss": [NEVER, 7, NEVER], "total/loss": [NEVER, 7, NEVER]}
    assert diverged.note(first) == [
        "The loss 'main' is not finite after 7 steps of the run with seed 6."
        " It is recorded; the other runs go on."
    ]
    again = {"main/loss": [NEVER, 8, NEVER], "total/loss": [9, 8, NEVER]}
    assert [line[:18] for line in diverged.note(again)] == ["The loss 'total' i"]
    assert diverged.steps == [9, 7, None]
    assert not diverged.all()
    accuracy, loss = np.array([0.9, 0.8, 0.7]), np.ones(3)
    np.testing.assert_array_equal(diverged.scores(accuracy, loss), [-1, -1, 0.7])
    # The last update broke what no loss has seen yet.
    loss[2] = np.inf
    np.testing.assert_array_equal(diverged.scores(accuracy, loss), [-1, -1, -1])
    said = diverged.check(np.array([False, True, False]), 11)
    assert said == [
        "The parameters of the run with seed 7 are not finite after 11 steps. It is recorded."
    ]
    assert diverged.steps == [9, 7, 11]
    assert diverged.all()
    assert _diverged(tmp_path, known=diverged.steps).all()


def test_parameters_that_are_not_finite_end_what_stops(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"not finite after 4 steps\."):
        _diverged(tmp_path, "stop").check(np.array([True, False, True]), 4)
    _diverged(tmp_path, "stop").check(np.array([True, True, True]), 4)


def _config(*overrides, config=programs.TINY):
    small = ("epochs=2", "devices=1", "data.task.train=100", "data.task.test=30")
    given = [f"--config.{each}" for each in (*small, *overrides)]
    return configuration.load(config.removeprefix("--config="), given)


AT_ONCE = ("optimizer.learning_rate=1e25", "on_diverged=record", "seeds=2", "steps_per_call=1")


@pytest.mark.slow  # It compiles a whole network.
def test_where_all_diverge_the_run_ends_with_a_result_and_is_not_trained_again(tmp_path, capsys):
    results = train.train(_config(*AT_ONCE), str(tmp_path))
    steps = results["diverged"]
    assert len(steps) == 2
    assert all(step in (1, 2, 3) for step in steps)
    assert results["step"] == max(steps) + 1 < 4
    assert len(re.findall("It is recorded", capsys.readouterr().out)) == 2  # A line each.
    assert len(results["splits"]["test"]["main/top_1"]) == 2
    assert Checkpoints(tmp_path / "checkpoints").notes()["diverged"] == steps
    again = train.train(_config(*AT_ONCE), str(tmp_path))
    assert "compiling" not in capsys.readouterr().out
    assert json.dumps(again) == json.dumps(results)  # As NaN is not equal to itself.


@pytest.mark.slow  # It trains two runs, then one, then goes on.
@pytest.mark.parametrize("at_once", [1, 2])
def test_where_one_diverges_the_other_is_as_it_is_alone(at_once, tmp_path, monkeypatch, capsys):
    begin = experiment.Experiment.initial_state

    def broken(self, seed):
        state = begin(self, seed)
        rates = jnp.where(seed == 1, jnp.nan, 1.0)
        return replace(state, params=jax.tree.map(lambda x: x * rates, state.params))

    monkeypatch.setattr(experiment.Experiment, "initial_state", broken)
    wanted = ("on_diverged=record", "data.task.validation=30", f"seeds_at_once={at_once}")
    # With convolutions and batch statistics; the other of a network that is compiled in a moment.
    network = {"config": programs.QUICKSTART if at_once == 1 else programs.TINY}
    measured = "gradient_flow_every=1" if at_once == 1 else "gradient_flow_every=0"
    whole = _config(*wanted, "seeds=2", measured, **network)
    whole.evaluate_splits = ("validation", "test")
    results = train.train(whole, str(tmp_path / "two"))
    printed = capsys.readouterr().out
    assert "seed 1. It is recorded; the other runs go on." in printed
    assert "nan" not in printed
    assert results["diverged"] == [None, 0]
    alone = _config(*wanted, "seeds=1", **network)
    alone.evaluate_splits = ("validation", "test")
    expected = train.train(alone, str(tmp_path / "one"))
    for metric, values in expected["splits"]["test"].items():
        found = results["splits"]["test"][metric]
        tolerance = 0.0 if at_once == 1 else 1e-4
        np.testing.assert_allclose(found[0], values[0], rtol=tolerance, atol=tolerance)
    # It is told of by all who read it.
    assert " (1 of 2 runs diverged after 0 steps)" in described(results["diverged"])
    assert "nan" not in train.summary(results)
    measured = evaluate.evaluate(tmp_path / "two")
    assert measured["diverged"] == [None, 0]
    assert np.isfinite(measured["outputs"]["main"]["loss"]["mean"])
    assert np.isfinite(figures.series(read_metrics(tmp_path / "two"), "test", "main/loss")[1]).all()
    runs = open_run(tmp_path / "two")
    kept_weights(runs, tmp_path / "two")
    with pytest.raises(ValueError, match=r"seed 1 in .* diverged after 0 steps: its weights mean"):
        kept_weights(runs, tmp_path / "two", used=None)
    # Going on with more epochs is another run; with the same it is at its end.
    assert train.train(whole, str(tmp_path / "two"))["diverged"] == [None, 0]


def _results(diverged, top_1):
    measured = {"test": {"main/top_1": top_1}}
    return {"splits": measured, "diverged": diverged, "seconds": 1.0}


TABLE = {
    "columns": {"error": {"split": "test", "metric": "main/top_1", "error_percent": True}},
}


@pytest.mark.parametrize(
    ("diverged", "top_1", "runs", "name"),
    [
        ([None, None], [0.5, 0.25], [50, 75], "row"),
        ([], [0.5, 0.25], [50, 75], "row"),
        ([None, 7], [0.5, 0.0], [50], "row (1 of 2 runs diverged after 7 steps)"),
        ([3, 7], [0.01, 0.0], [99, 100], "row (2 of 2 runs diverged after 3, 7 steps)"),
        ([3], [0.01], [99], "row (diverged after 3 steps)"),
    ],
    ids=["none", "of an older version", "one", "all", "the only one"],
)
def test_a_row_is_of_the_runs_that_did_not_diverge_and_of_all_where_all_did(
    diverged, top_1, runs, name
):
    line = paper_tables.compare(
        {"name": "row", "variant": "row", "error": 99.0}, TABLE, _results(diverged, top_1)
    )
    assert line["error"]["runs"] == pytest.approx(runs)
    assert f"| {name} " in paper_tables.markdown([line], TABLE)


def test_a_table_records_what_diverges():
    table = paper_tables.load_table("sire_2", CONFIGS)
    config = paper_tables.row_config(table, table["rows"][3], CONFIGS, "", [])
    assert config.on_diverged == "record"
    assert configuration.load(f"{CONFIGS}/sire.py").on_diverged == "stop"
