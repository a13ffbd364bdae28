"""The programs from end to end, on shrunk configs and the bundled digits."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
import numpy as np
import programs
import pytest

from sire_jax import configuration, evaluate, inspect, paper_tables, reproduce, train
from sire_jax.configuration import experiment
from sire_jax.job import command, lock
from sire_jax.runs.on_device import DeviceFeed
from sire_jax.runs.runs import Runs
from sire_jax.runs.trained import restore
from sire_jax.storage import workdir
from sire_jax.storage.checkpoint import Checkpoints

pytestmark = pytest.mark.optax_dtypes

CONFIGS = configuration.repository_configs()


@pytest.fixture(autouse=True)
def _ctrl_c():
    """As in a terminal, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _config(variant="auxiliary", *overrides):
    small = ["seeds=2", "epochs=2", "devices=1", "data.task.train=100", "data.task.test=30"]
    arguments = [f"--config.{each}" for each in (*small, *overrides)]
    return configuration.load(f"{CONFIGS}/quickstart.py:{variant}", arguments)


def _tiny(*overrides):
    """The same, of a network that is compiled in a moment, where it doesn't matter which."""
    small = ["seeds=2", "epochs=2", "devices=1", "data.task.train=100", "data.task.test=30"]
    path = programs.TINY.removeprefix("--config=")
    return configuration.load(path, [f"--config.{each}" for each in (*small, *overrides)])


def _final(directory, config):
    runs = Runs(experiment.build(config))
    return restore(runs, Path(directory) / "checkpoints")[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    config = _config()
    return directory, config, train.train(config, str(directory))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    config = _tiny()
    return directory, config, train.train(config, str(directory))


def test_a_run_leaves_config_metrics_results_and_curves(trained):
    directory, config, results = trained
    assert configuration.differences(workdir.read_config(directory), config) == []
    lines = workdir.read_metrics(directory)
    assert [(line["epoch"], line["split"]) for line in lines] == [
        (epoch, split) for epoch in (1, 2) for split in ("steps", "train", "test")
    ]
    last = lines[-1]
    assert last["step"] == results["step"] == 4
    assert last["main/top_1"] == results["splits"]["test"]["main/top_1"]
    assert len(last["digits/top_5"]) == len(last["order/top_1"]) == 2
    assert all(np.isfinite(value).all() for value in last.values() if isinstance(value, list))
    assert json.loads((directory / "results.json").read_text()) == results
    assert (directory / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_total_is_the_weighted_sum(trained):
    line = workdir.read_metrics(trained[0])[0]
    assert line["split"] == "steps"
    total = np.array(line["main/loss"]) + 10 * np.array(line["digits/loss"])
    np.testing.assert_allclose(line["total/loss"], total, rtol=1e-5)


def test_a_run_interrupted_and_resumed_is_bitwise_the_same(trained, tmp_path, monkeypatch):
    whole, config, results = trained
    interrupted = configuration.override(config, ["--config.steps_per_call=1"])
    taken = DeviceFeed.take_steps

    def stop_after_the_third_step(self, state, sums, order, first, count):
        if int(state.step[0]) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return taken(self, state, sums, order, first, count)

    monkeypatch.setattr(DeviceFeed, "take_steps", stop_after_the_third_step)
    with pytest.raises(train.InterruptedRunError, match="SIGINT: saved after step 3"):
        train.train(interrupted, str(tmp_path))
    monkeypatch.undo()
    resumed = train.train(interrupted, str(tmp_path))
    assert resumed["splits"] == results["splits"]
    assert resumed["seconds"] > 0
    chex.assert_trees_all_equal(_final(tmp_path, config), _final(whole, config))
    assert workdir.read_metrics(tmp_path) == workdir.read_metrics(whole)


@pytest.mark.slow  # Compiles whole runs of their own.
def test_a_run_among_several_is_the_run_alone(trained, tmp_path):
    vectorized = train.train(_config("auxiliary", "seeds_at_once=2"), str(tmp_path / "a"))
    alone = train.train(_config("auxiliary", "seeds=1", "seed=1"), str(tmp_path / "b"))
    for metric, (value,) in alone["splits"]["test"].items():
        # Sums in another order; of 30 pairs one or two may change sides.
        tolerance = {"rtol": 2e-3} if metric.endswith("loss") else {"atol": 0.04}
        for several in (trained[2], vectorized):
            np.testing.assert_allclose(several["splits"]["test"][metric][1], value, **tolerance)


def test_a_signal_before_the_first_step_is_not_lost(tmp_path, monkeypatch):
    started = Runs.start

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return started(self)

    monkeypatch.setattr(Runs, "start", interrupted)
    with pytest.raises(train.InterruptedRunError, match="SIGTERM: saved after step 0"):
        train.train(_tiny(), str(tmp_path))
    assert Checkpoints(tmp_path / "checkpoints").latest() == 0


@pytest.mark.slow  # Compiles whole runs of their own.
def test_a_run_stopped_while_it_measures_measures_again_and_is_bitwise_the_same(
    tiny, tmp_path, monkeypatch
):
    whole, config, results = tiny
    measured, measure = [], Runs.measure

    def stop_while_measuring(self, *args):
        measured.append(args[2])
        if len(measured) == 3:
            # The first split of the second epoch.
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *args)

    monkeypatch.setattr(Runs, "measure", stop_while_measuring)
    with pytest.raises(train.InterruptedRunError, match="SIGTERM: saved after step 4") as stopped:
        train.train(config, str(tmp_path))
    assert stopped.value.status == command.AGAIN
    assert measured == ["train", "test", "train"]
    resumed = train.train(config, str(tmp_path))
    assert resumed["splits"] == results["splits"]
    chex.assert_trees_all_equal(_final(tmp_path, config), _final(whole, config))
    assert workdir.read_metrics(tmp_path) == workdir.read_metrics(whole)


def test_a_run_stopped_before_its_last_measurement_measures_when_it_goes_on(
    tiny, tmp_path, monkeypatch
):
    _, config, results = tiny
    measured = Runs.measure

    def stop(self, params, model_state, split, fitted=None):
        if fitted is not None:
            os.kill(os.getpid(), signal.SIGINT)
        return measured(self, params, model_state, split, fitted)

    monkeypatch.setattr(Runs, "measure", stop)
    with pytest.raises(train.InterruptedRunError, match="SIGINT: saved after step 4") as stopped:
        train.train(config, str(tmp_path))
    assert stopped.value.status == command.INTERRUPTED
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    assert train.train(config, str(tmp_path))["splits"] == results["splits"]


def test_training_in_a_thread_is_training(tiny, tmp_path):
    _, config, results = tiny
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(train.train, config, str(tmp_path)).result()
    assert found["splits"] == results["splits"]


def test_a_run_none_of_whose_checkpoints_is_intact_is_not_begun_again(tmp_path):
    config = _tiny("seeds=1", "checkpoint_every=1")
    train.train(config, str(tmp_path))
    (tmp_path / "results.json").unlink()
    manifests = sorted((tmp_path / "checkpoints").glob("*/manifest"))
    assert len(manifests) == 2
    for path in manifests:
        path.write_text("damaged")
    message = r"None of the checkpoints in .*checkpoints is intact.* move the directory away"
    with (
        pytest.warns(UserWarning, match="there is no other"),
        pytest.raises(OSError, match=message),
    ):
        train.train(config, str(tmp_path))
    assert sorted((tmp_path / "checkpoints").glob("*/manifest")) == manifests


def test_a_finished_run_is_left_as_it_is(trained):
    directory, config, results = trained
    written = (directory / "results.json").stat().st_mtime_ns
    assert train.train(config, str(directory)) == results
    assert (directory / "results.json").stat().st_mtime_ns == written


def test_a_workdir_in_which_another_program_trains_is_refused_and_can_be_read(trained):
    directory, config, results = trained
    with lock.held(directory):
        with pytest.raises(BlockingIOError, match=rf"{directory} is in use: process {os.getpid()}"):
            train.train(config, str(directory))
        found = evaluate.evaluate(directory)["outputs"]["main"]["loss"]["runs"]
        assert found == results["splits"]["test"]["main/loss"]
    assert train.train(config, str(directory)) == results


def test_runs_differ_in_weights_data_and_order():
    runs = Runs(experiment.build(_config()))
    state = runs.initial()
    kernels = state.params["backbone"]["branch"]["conv_1"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(runs.feed.examples["train"][0], runs.feed.examples["train"][1])
    order = runs.feed.order(state, 0)
    assert order.shape == (2, 2, 50, 2)
    for run in (0, 1):
        shuffled = np.sort(np.asarray(order[run]).reshape(-1))
        assert np.array_equal(
            shuffled, np.sort(np.asarray(runs.feed.examples["train"][run]).ravel())
        )


@pytest.mark.slow  # As test_parallel.py, in a whole run.
def test_two_devices_compute_the_gradient_of_one(tmp_path):
    changed = ("seeds=1", "backbone.dropout=0.0", "backbone.convolution_dropout=0.0")
    states = []
    for devices in (1, 2):
        config = _config(
            "auxiliary", *changed, f"devices={devices}", "optimizer.learning_rate=1e-6"
        )
        runs = Runs(experiment.build(config))
        state = runs.initial()
        order = runs.feed.order(state, 0)
        state, sums, _ = runs.feed.take_steps(state, runs.no_metrics(), order, 0, 1)
        # Adam's first moment is a tenth of the first gradient.
        states.append((jax.device_get(state.update_state), jax.device_get(sums)))
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_halts_and_keeps_the_finite_checkpoint(tmp_path):
    # Weights grow by the learning rate a step: 1e25 overflows in the second forward pass.
    config = _tiny("optimizer.learning_rate=1e25", "steps_per_call=1")
    with pytest.raises(
        train.NonFiniteLossError, match=r"The loss '\w+' is not finite after [1-3] steps "
    ):
        train.train(config, str(tmp_path))
    assert Checkpoints(tmp_path / "checkpoints").latest() in (0, 2)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    # The loss of the one step of an epoch is finite; its update is not.
    config = _config("auxiliary", "batch_size=100", "checkpoint_every=1", "seeds=1")
    config.optimizer = configuration.optimizer("sgd", learning_rate=3e38)
    with pytest.raises(train.NonFiniteLossError, match="parameters are not finite after 1 steps"):
        train.train(config, str(tmp_path))
    assert Checkpoints(tmp_path / "checkpoints").latest() == 0


def test_the_best_validation_weights_are_kept(tmp_path):
    config = _tiny("data.task.validation=40", 'evaluate_splits=("validation",)', "epochs=4")
    results = train.train(config, str(tmp_path))
    scores = [
        line["main/top_1"]
        for line in workdir.read_metrics(tmp_path)
        if line["split"] == "validation"
    ]
    assert results["weights"] == "best validation accuracy"
    assert results["splits"]["validation"]["main/top_1"] == np.max(scores, axis=0).tolist()
    assert (
        evaluate.evaluate(tmp_path)["outputs"]["main"]["top_1"]["runs"]
        == (results["splits"]["test"]["main/top_1"])
    )


def test_another_config_in_the_workdir_is_refused(trained):
    directory, config, _ = trained
    other = configuration.override(config, ["--config.batch_size=25"])
    with pytest.raises(ValueError, match="batch_size: 50 -> 25"):
        train.train(other, str(directory))


def test_evaluate_reads_the_run_again(trained, capsys):
    directory, _, results = trained
    evaluate.main(["--workdir", str(directory), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found["outputs"]) == ["main", "digits"]
    assert list(found["predictions"]) == ["order"]
    for name, kind in (("main", "outputs"), ("digits", "outputs"), ("order", "predictions")):
        for metric, statistics in found[kind][name].items():
            assert statistics["runs"] == results["splits"]["test"][f"{name}/{metric}"]
            assert statistics["mean"] == pytest.approx(np.mean(statistics["runs"]))
    evaluate.main(["--workdir", str(directory)])
    assert "order (prediction)" in capsys.readouterr().out


@pytest.mark.slow  # As data/test_crops.py, in a whole run.
def test_a_run_on_crops_may_be_measured_with_ten_and_nothing_else_be_changed(tmp_path):
    config = _config("main_only", "data.crop=7", "seeds=1", "epochs=1", "data.draw_classes=5")
    config.data.classes.label = config.backbone.outputs = 5
    results = train.train(config, str(tmp_path))
    central, ten = (
        evaluate.evaluate(tmp_path, overrides=[f"--config.data.ten_crop={ten}"])["outputs"]
        for ten in (False, True)
    )
    assert central["main"]["loss"]["runs"] == results["splits"]["test"]["main/loss"]
    assert ten["main"]["loss"]["runs"] != central["main"]["loss"]["runs"]
    with pytest.raises(ValueError, match=r"would change the run: data\.crop: 7 -> 6\."):
        evaluate.evaluate(tmp_path, overrides=["--config.data.crop=6"])


def test_inspect_counts_by_hand(capsys):
    inspect.main(["--config", f"{CONFIGS}/pairs.py:aux_10", "--json"])
    found = json.loads(capsys.readouterr().out)
    # 12 * 12 positions x 9 taps x 16, 4 * 4 positions x 9 taps x 16 x 16, 64 x 32, 32 x 10; twice.
    branch = 144 * 9 * 16 + 16 * 9 * 16 * 16 + 64 * 32 + 320
    assert found == {
        "outputs": {
            "main": {"shape": [1], "parameters": 5459, "multiply_adds": 2 * branch + 400 + 20},
            "digits": {"shape": [2, 10], "parameters": 5018, "multiply_adds": 2 * branch},
        },
        "without_heads": {"parameters": 5459, "multiply_adds": 2 * branch + 420},
        "parameters": 5459,
        "multiply_adds": 2 * branch + 420,
    }
    inspect.main(["--config", f"{CONFIGS}/pairs.py:aux_10"])
    assert "| whole network |        | 5,459      | 120,356       |" in capsys.readouterr().out


def test_reproduce_writes_the_table_and_trains_a_row_once(tmp_path, capsys):
    arguments = ["--table=quickstart", "--seeds=2", f"--workdir={tmp_path}", "--rows=main_only"]
    arguments += ["--config.epochs=1", "--config.devices=1"]
    reproduce.main(arguments)
    assert "| main output alone |" in capsys.readouterr().out
    first = (tmp_path / "main_only" / "metrics.jsonl").stat().st_mtime_ns
    reproduce.main(arguments)
    assert (tmp_path / "main_only" / "metrics.jsonl").stat().st_mtime_ns == first
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["variant"] == "main_only"
    assert (tmp_path / "table.png").exists()


def test_reproduce_puts_the_papers_figures_beside_ours():
    table = paper_tables.load_table("pairs_1", CONFIGS)
    (row,) = paper_tables.choose_rows(table, ["aux_10"])
    splits = {"train": {"main/top_1": [1.0, 0.98]}, "test": {"main/top_1": [0.95, 0.97]}}
    line = paper_tables.compare(row, table, {"splits": splits, "seconds": 3.0})
    assert line["test_acc"]["paper"] == [0.962, 0.008]
    assert line["test_acc"]["ours"] == pytest.approx([0.96, 0.01414], abs=1e-5)
    assert line["test_acc"]["deviations"] == pytest.approx(-0.25)
    row = " ".join(paper_tables.markdown([line], table).splitlines()[2].split())
    assert "0.962 ± 0.008 | 0.960 ± 0.014 | -0.002 (-0.3 sd)" in row
    with pytest.raises(ValueError, match=r"no row 'aux_1'.*Did you mean"):
        paper_tables.choose_rows(table, ["aux_1"])


def _program(*arguments, **options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=CONFIGS.parent,
        **options,
    )


@pytest.mark.slow  # As in faults/test_signals.py, here on a pipe that is read.
def test_ctrl_c_saves_and_ends_the_program(tmp_path):
    program = _program(
        "sire_jax.train",
        f"--config={CONFIGS}/quickstart.py",
        f"--workdir={tmp_path}",
        "--config.epochs=100000",
        "--config.seeds=1",
    )
    output, seen = [], threading.Event()

    def read():
        for line in program.stdout:
            output.append(line)
            if line.startswith("epoch 3/"):
                seen.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert seen.wait(120), "".join(output)
    program.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert program.wait(30) == command.INTERRUPTED, "".join(output)
    reader.join()
    program.stdout.close()
    assert time.monotonic() - started < 15
    step = Checkpoints(tmp_path / "checkpoints").latest()
    assert f"SIGINT: saved after step {step}" in output[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.epoch=3"], r"config has no key 'epoch'. Did you mean 'epochs'\?"),
        (["--config.epochs=many"], "wrong type"),
        (["--config.batch_size=2000"], "only 500 training examples"),
        (["--config.data.name=tfds:mnist", "--config.data.dir=/nowhere"], "tfds build mnist"),
        (["--config.heads.digits.endpoints=('digit',)"], "Did you mean 'digits'"),
        (["--config.devices=3"], "JAX finds only 2"),
        (["--config.batch_size=5"], "batch_size is 5, which 2 devices"),
    ],
)
def test_bad_input_ends_the_program_at_once_with_one_message(overrides, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([f"--config={CONFIGS}/quickstart.py", f"--workdir={tmp_path / 'w'}", *overrides])
    assert stopped.value.code == command.EXPLAINED
    assert re.search(rf"^Error: .*{message}", capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "w" / "config.json").exists()
