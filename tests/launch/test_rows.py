"""launch/rows.py: what is worth most first, slices that end in time, and what goes on."""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sire_jax import configuration, inspect, paper_tables
from sire_jax.configuration.sections import TASK
from sire_jax.storage.workdir import Workdir

SCRIPT = Path(__file__).parents[2] / "launch" / "rows.py"
CONFIGS = configuration.repository_configs()


def _module():
    spec = importlib.util.spec_from_file_location("rows", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rows"] = module
    spec.loader.exec_module(module)
    return module


rows = _module()
SHIPPED = json.loads(SCRIPT.with_suffix(".json").read_text())


def _write(path, *entries):
    entry = {"table": "sire_1", "row": "base", "figures": 2, "flop": 1e15}
    path.write_text(json.dumps([{**entry, **changes} for changes in entries]))
    return path


def test_what_is_worth_most_an_hour_comes_first(tmp_path):
    dear, cheap = {"row": "sire", "flop": 8e15}, {"table": "ssal_1", "row": "resnet18-0"}
    found = rows.read(_write(tmp_path / "own.json", dear, cheap))
    assert [(row.row, row.worth) for row in found] == [("resnet18-0", 2.0), ("sire", 0.25)]
    shown = rows.describe(found, teraflops=10)
    assert (
        "| sire_1 | sire       | 2       | 8.0                    | 0.25             | 0.22 "
        in shown
    )


def _shipped(entry):
    table = paper_tables.load_table(entry["table"], CONFIGS)
    (row,) = paper_tables.choose_rows(table, [entry["row"]])
    return table, row


@pytest.mark.parametrize("entry", SHIPPED, ids="{0[table]}/{0[row]}".format)
def test_shipped_rows_have_as_many_figures_as_the_paper_prints(entry):
    table, row = _shipped(entry)
    metrics = [column for column, kind in table["columns"].items() if "metric" in kind]
    assert entry["figures"] == sum(column in row for column in metrics)


@pytest.mark.slow  # It builds a dozen networks.
def test_shipped_rows_cost_what_is_said():
    # Those of one network, but for weights and skips, are counted once.
    counted = {}
    for entry in SHIPPED:
        row_config = paper_tables.row_config(*_shipped(entry), CONFIGS, "", [])
        heads = {name: {**head, "skips": None} for name, head in row_config.heads.items()}
        same = str((row_config.backbone, heads, row_config.update_rule, row_config.epochs))
        if same in counted:
            assert entry["flop"] == counted[same], entry
            continue
        counted[same] = entry["flop"]
        config = configuration.with_groups(row_config)
        task = TASK.create(config.data.task)
        images = task.examples(config.data.images, config.data.classes)
        counts = inspect.inspect(config)
        # Backward passes are twice the forward ones: of the whole, or of what each output reaches.
        reached = [counts["multiply_adds"]]
        if config.update_rule.name == "multiway":
            reached = [output["multiply_adds"] for output in counts["outputs"].values()]
        flop = 2 * (counts["multiply_adds"] + 2 * sum(reached)) * images * config.epochs
        assert entry["flop"] == pytest.approx(flop, rel=5e-3), entry


def test_half_precision_is_of_rows_that_can_and_only_if_asked(tmp_path):
    override = "--config.backbone.dtype=bfloat16"
    able, unable = rows.read(_write(tmp_path / "own.json", {"bfloat16": override}, {"row": "re"}))
    assert able.arguments(tmp_path, half=True)[-1] == override
    assert override not in [*able.arguments(tmp_path, False), *unable.arguments(tmp_path, True)]
    own = ["--table=sire_1", "--rows=re", f"--workdir={tmp_path}/sire_1"]
    assert unable.arguments(tmp_path, half=True) == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hours": 3}, "may have 'bfloat16'"),
        ({"row": "sir"}, "no row 'sir'. Did you mean 'sire'"),
        ({"table": "sire_11"}, "no table 'sire_11'"),
        ({"flop": 0}, "has flop 0; it should be above 0"),
    ],
)
def test_rows_that_can_not_be_trained_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        rows.read(_write(tmp_path / "own.json", changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes=0.3", "--workdir=w"], "--minutes is 0.3; saving alone takes 20 s"),
        ([], "--workdir is needed"),
    ],
)
def test_slices_without_time_or_place_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        rows.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def _stand_in(tmp_path, monkeypatch, script):
    """Has a shell script run in place of Python; it gets "-m sire_jax.reproduce …"."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(rows.sys, "executable", str(python))


def test_a_row_that_fails_does_not_keep_the_others_from_training(tmp_path, monkeypatch):
    _stand_in(
        tmp_path, monkeypatch, f'echo "$4" >> {tmp_path}/log; test "$4" != --rows=base || exit 7'
    )
    chosen = rows.read(_write(tmp_path / "own.json", {}, {"row": "sire"}))
    assert rows.run(chosen, tmp_path, [], minutes=1, half=False) == 7
    assert (tmp_path / "log").read_text().split() == ["--rows=base", "--rows=sire"]


@pytest.mark.timeout(60)
def test_what_does_not_end_in_time_is_told_to_save(tmp_path, monkeypatch, capsys):
    _stand_in(tmp_path, monkeypatch, "trap 'kill $!; exit 85' TERM; sleep 50 & wait $!")
    monkeypatch.setattr(rows, "_SAVING", 0.0)
    chosen = rows.read(_write(tmp_path / "own.json", {}, {"row": "sire"}))
    assert rows.run(chosen, tmp_path, [], minutes=0.02, half=False) == 85
    printed = capsys.readouterr().out
    assert "Saved; the same command goes on with sire_1/base." in printed
    assert "2/2" not in printed


@pytest.mark.timeout(60)
def test_rows_that_are_trained_or_begin_too_late_are_not_started(tmp_path, monkeypatch, capsys):
    _stand_in(tmp_path, monkeypatch, f'echo "$4" >> {tmp_path}/log; sleep 1.2')
    monkeypatch.setattr(rows, "_SAVING", 0.0)
    done = tmp_path / "sire_1" / "base"
    done.mkdir(parents=True)
    (done / "results.json").write_text('{"step": 1, "seconds": 1, "splits": {"test": {}}}')
    chosen = rows.read(_write(tmp_path / "own.json", {}, {"row": "re"}, {"row": "sire"}))
    assert rows.run(chosen, tmp_path, [], minutes=1 / 60, half=False) == 85
    assert (tmp_path / "log").read_text().split() == ["--rows=re"]
    assert "goes on with sire_1/re." in capsys.readouterr().out


def test_rows_that_were_trained_with_other_overrides_are_not_taken_for_done(tmp_path):
    (row,) = rows.read(_write(tmp_path / "own.json", {}))
    config = rows._config(row, tmp_path, ["--seeds=2", "--option=few_images"], False)
    assert (config.seeds, config.data.resize) == (2, 16)
    done = Workdir(tmp_path / "sire_1" / "base", config)
    done.write_config()
    done.write_results({"step": 1, "seconds": 1, "splits": {"test": {}}})
    same = ["--seeds=2", "--option=few_images", "--config.data.dir=elsewhere"]
    assert rows.run([row], tmp_path, same, 1, half=False) == 0
    with pytest.raises(ValueError, match=r"holds a run of another config:\n  epochs: 40 -> 3"):
        rows.run([row], tmp_path, [*same, "--config.epochs=3"], 1, half=False)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 85), (signal.SIGHUP, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)],
)
def test_a_signal_is_passed_on_and_no_program_is_left(tmp_path, monkeypatch, number, status):
    _stand_in(
        tmp_path,
        monkeypatch,
        # Ready once `sleep` runs: a shell that is about to become it would not hear of its end.
        f"trap 'kill $!; echo saved > {tmp_path}/saved; exit 85' TERM INT; sleep 50 &"
        f" touch {tmp_path}/ready; wait $!",
    )

    def tell():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        children = f"/proc/self/task/{os.getpid()}/children"
        if number == signal.SIGINT:
            # As a terminal does, to all of them.
            os.kill(int(Path(children).read_text().split()[-1]), number)
        os.kill(os.getpid(), number)

    chosen = rows.read(_write(tmp_path / "own.json", {}, {"row": "sire"}))
    threading.Thread(target=tell).start()
    assert rows.run(chosen, tmp_path, [], minutes=1, half=False) == status
    assert (tmp_path / "saved").read_text() == "saved\n"


@pytest.mark.slow  # It trains in slices, each with a start of its own.
@pytest.mark.timeout(600)
def test_slices_come_to_what_one_run_does(tmp_path, monkeypatch):
    tables = tmp_path / "configs" / "tables"
    tables.mkdir(parents=True)
    (tmp_path / "configs" / "quickstart.py").write_text((CONFIGS / "quickstart.py").read_text())
    table = paper_tables.load_table("quickstart", CONFIGS)
    (tables / "own.json").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    name = paper_tables.identity(table["rows"][-1])
    queue = _write(tmp_path / "own_rows.json", {"table": "own", "row": name, "figures": 1})
    monkeypatch.setattr(rows, "_SAVING", 0.0)
    settings = ["--seeds=1", "--config.epochs=150", "--config.evaluate_every=50"]
    whole, sliced = tmp_path / "whole", tmp_path / "sliced"
    assert rows.run(rows.read(queue), whole, settings, minutes=9, half=False) == 0
    started = [
        rows.run(rows.read(queue), sliced, settings, minutes=8 / 60, half=False) for _ in range(2)
    ]
    assert started[0] == 85
    while started[-1] == 85:
        started.append(rows.run(rows.read(queue), sliced, settings, minutes=0.5, half=False))
    assert started[-1] == 0
    found, expected = (
        json.loads((path / "own" / name / "results.json").read_text())["splits"]
        for path in (sliced, whole)
    )
    assert found == expected
