import json

import numpy as np
import pytest

from sire_jax import configuration
from sire_jax.storage.workdir import Workdir, read_config, read_metrics


def _claim(path, config):
    work = Workdir(path, config)
    work.write_config()
    return work


def _config(*overrides):
    arguments = [f"--config.{each}" for each in overrides]
    path = str(configuration.repository_configs() / "quickstart.py")
    return configuration.load(path, arguments)


def test_a_workdir_is_made_and_keeps_its_config(tmp_path):
    path = tmp_path / "a" / "b"
    work = _claim(path, _config("epochs=3"))
    assert [each.name for each in path.iterdir()] == ["config.json"]
    assert read_config(path).to_dict() == _config("epochs=3").to_dict()
    assert work.checkpoints == path / "checkpoints"
    _claim(str(path), _config("epochs=3"))


def test_a_tilde_is_the_home(tmp_path):
    _claim("~/run", _config())
    assert (tmp_path / "run" / "config.json").exists()
    assert read_config("~/run").to_dict() == _config().to_dict()


def test_the_run_of_another_config_is_refused_and_kept(tmp_path):
    _claim(tmp_path, _config())
    with pytest.raises(ValueError, match="holds a run of another config") as raised:
        _claim(tmp_path, _config("epochs=7", "data.task.train=9"))
    assert str(raised.value).splitlines()[1:3] == [
        "  data.task.train: 500 -> 9",
        "  epochs: 60 -> 7",
    ]
    assert str(tmp_path) in str(raised.value)
    assert "--workdir" in str(raised.value)
    assert read_config(tmp_path).epochs == 60


def test_a_run_goes_on_under_other_free_keys_which_are_kept(tmp_path):
    _claim(tmp_path, _config())
    _claim(tmp_path, _config("data.dir=/elsewhere", "steps_per_call=3", "devices=1"))
    stored = read_config(tmp_path)
    assert (stored.data.dir, stored.steps_per_call, stored.devices) == ("/elsewhere", 3, 1)


@pytest.mark.parametrize("below", ["file", "file/run", "file/deeper/run"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    message = rf"The workdir {tmp_path / below} can't be written to \(.+\); choose another --work"
    with pytest.raises(PermissionError, match=message):
        _claim(tmp_path / below, _config())
    assert (tmp_path / "file").read_text() == "kept"


def test_a_directory_without_a_run_has_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no run"):
        read_config(tmp_path)
    assert read_metrics(tmp_path) == []


def _record(work, *steps):
    for step in steps:
        values = {"main/loss": np.array([0.5, step / 4], np.float32)}
        work.record(step, step // 10, "test", values)


def test_measurements_are_appended_a_line_each(tmp_path):
    work = _claim(tmp_path, _config())
    _record(work, 10, 20)
    _record(_claim(tmp_path, _config()), 30)
    assert read_metrics(tmp_path) == [
        {"step": 10, "epoch": 1, "split": "test", "main/loss": [0.5, 2.5]},
        {"step": 20, "epoch": 2, "split": "test", "main/loss": [0.5, 5.0]},
        {"step": 30, "epoch": 3, "split": "test", "main/loss": [0.5, 7.5]},
    ]


def test_measurements_that_are_no_numbers_read_back(tmp_path):
    work = _claim(tmp_path, _config())
    work.record(1, 1, "test", {"main/loss": np.array([np.nan, np.inf])})
    (line,) = read_metrics(tmp_path)
    assert np.isnan(line["main/loss"][0])
    assert line["main/loss"][1] == np.inf


def test_later_measurements_are_forgotten(tmp_path):
    work = _claim(tmp_path, _config())
    work.forget_after(5)
    assert read_metrics(tmp_path) == []
    _record(work, 10, 20, 20, 30)
    work.forget_after(20)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 20]
    _record(work, 40)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 20, 40]
    work.forget_after(0)
    assert read_metrics(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_line_cut_off_by_a_crash_is_ignored(tmp_path):
    work = _claim(tmp_path, _config())
    _record(work, 10, 20, 30)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    last = len(whole.splitlines()[-1]) + 1
    for cut in range(2, last + 1):
        path.write_text(whole[:-cut])
        assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
    # Nothing is lost where only the end of the line is missing.
    path.write_text(whole[:-1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]


def test_a_run_goes_on_after_a_line_cut_off_by_a_crash(tmp_path):
    work = _claim(tmp_path, _config())
    _record(work, 10, 20)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    work.forget_after(10)
    _record(work, 20, 30)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]


def test_results_are_written_as_json(tmp_path):
    _claim(tmp_path, _config()).write_results({"step": 4, "splits": {"test": {"a": [0.25]}}})
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == {"step": 4, "splits": {"test": {"a": [0.25]}}}
