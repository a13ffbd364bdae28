"""launch/sweep.py: what it would run, what it refuses, what it submits, runs here and collects."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import standin

from sire_jax import configuration
from sire_jax.storage.workdir import Workdir

SCRIPT = Path(__file__).parents[2] / "launch" / "sweep.py"
QUICKSTART = f"{configuration.repository_configs()}/quickstart.py"


def _module():
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    return module


sweep = _module()


def _arguments(tmp_path, *more, configs=f"{QUICKSTART}:auxiliary,{QUICKSTART}:main_only"):
    return [f"--configs={configs}", f"--workdir={tmp_path}/sweep", *more]


def _main(*arguments):
    """Returns the exit status of the program."""
    try:
        sweep.main([str(each) for each in arguments])
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1", ["0.1"]),
        ("0.1,0.01", ["0.1", "0.01"]),
        ("(0.1,0.2),(1,2)", ["(0.1,0.2)", "(1,2)"]),
        ("('a,b',(1,2)),[3,4]", ["('a,b',(1,2))", "[3,4]"]),
        ("'(',\",\"", ["'('", '","']),
        ("a,", ["a", ""]),
    ],
)
def test_values_are_split_outside_of_brackets_and_quotes(text, values):
    assert sweep.split(text) == values


def test_a_variant_may_have_commas():
    configs = "configs/a.py:b,c,configs/d.py,configs/a.py:e"
    assert sweep.split_configs(configs) == ["configs/a.py:b,c", "configs/d.py", "configs/a.py:e"]


def test_combinations_are_all_of_them_with_readable_names():
    found = sweep.combinations(
        ["configs/a.py:b,c", "configs/d.py"],
        [0, 1],
        ["x.rate=0.1,1e-2", "y=(1, 2),'p/q'"],
        "runs",
    )
    assert len(found) == len({each.path for each in found}) == 2 * 2 * 2 * 2
    assert found[0].path == Path("runs/a_b,c-x.rate=0.1-y=_1,_2_-seed=0")
    assert found[1].path == Path("runs/a_b,c-x.rate=0.1-y=_1,_2_-seed=1")
    assert found[2].path == Path("runs/a_b,c-x.rate=0.1-y=_p_q_-seed=0")
    assert found[-1].path == Path("runs/d-x.rate=1e-2-y=_p_q_-seed=1")
    assert found[0].arguments() == [
        "--config=configs/a.py:b,c",
        "--workdir=runs/a_b,c-x.rate=0.1-y=_1,_2_-seed=0",
        "--config.seed=0",
        "--config.seeds=1",
        "--config.x.rate=0.1",
        "--config.y=(1, 2)",
    ]


def test_without_seeds_those_of_the_config_are_one_run():
    (found,) = sweep.combinations(["a.py:b"], [None], [], "runs")
    assert found.arguments() == ["--config=a.py:b", "--workdir=runs/a_b"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs"], "--override=epochs should be --override=key=value,value,…"),
        (["=3"], "--override==3 should be --override=key=value"),
        (["epochs=3,3"], "there twice: a-epochs=3-seed=0."),
        (["x='a/b','a b'"], "there twice: a-x=_a_b_-seed=0."),
        ([f"x={'1' * 200}"], "seed=0 is too long for the name of a directory (211 characters; "),
    ],
)
def test_combinations_that_are_none_or_the_same_are_refused(overrides, message):
    with pytest.raises(sweep.SweepError, match=re.escape(message)):
        sweep.combinations(["a.py"], [0], overrides, "runs")


def test_a_dry_run_shows_all_and_touches_nothing(tmp_path, capsys):
    arguments = _arguments(tmp_path, "--seeds=3,4", "--override=epochs=1,2", "--dry_run")
    assert _main(*arguments) == 0
    printed, errors = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0].split() == ["|", "workdir", "|", "state", "|"]
    assert [line.split()[1:4:2] for line in lines[2:]] == [
        [f"{tmp_path}/sweep/quickstart_{variant}-epochs={epochs}-seed={seed}", "to"]
        for variant in ("auxiliary", "main_only")
        for epochs in (1, 2)
        for seed in (3, 4)
    ]
    assert errors == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "where", "message"),
    [
        (["--override=epoch=1"], "main_only-epoch=1-seed=0", "config has no key 'epoch'"),
        (["--override=epochs=1,many"], "main_only-epochs=many-seed=0", "wrong type"),
        (["--override=optimizer.name=adam,sdg"], "optimizer.name=sdg-seed=0", "'sgd'"),
        (["--override=batch_size=50,501"], "batch_size=501-seed=0", "only 500 training"),
    ],
)
def test_each_combination_is_checked_before_any_is_run(tmp_path, capsys, more, where, message):
    arguments = _arguments(
        tmp_path, "--seeds=0", *more, "--local", configs=f"{QUICKSTART}:main_only"
    )
    assert _main(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("In quickstart_main_only")
    assert errors[0].endswith(f"{where}:")
    assert message in errors[1]
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_not_there_is_named(tmp_path, capsys):
    assert _main(*_arguments(tmp_path, "--dry_run", configs="configs/nothing.py")) == 2
    assert "There is no config file configs/nothing.py." in capsys.readouterr().err


def test_the_workdir_of_another_run_is_refused(tmp_path, capsys):
    other = configuration.load(f"{QUICKSTART}:main_only", ["--config.epochs=9"])
    Workdir(tmp_path / "sweep" / "quickstart_main_only", other).write_config()
    assert _main(*_arguments(tmp_path, "--dry_run", configs=f"{QUICKSTART}:main_only")) == 2
    assert "epochs: 9 -> 60" in capsys.readouterr().err


def _ended(path, **splits):
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps({"step": 1, "seconds": 1.0, "splits": splits}))


def test_results_are_means_and_deviations_over_seeds(tmp_path, capsys):
    runs = tmp_path / "sweep"
    arguments = _arguments(
        tmp_path, "--seeds=0,1,2", "--override=epochs=1,2", configs=f"{QUICKSTART}:main_only"
    )
    for seed, (accuracy, loss) in enumerate([(0.5, 1.0), (0.7, 2.0), (0.9, 6.0)]):
        measured = {"main/loss": [loss], "main/top_1": [accuracy]}
        _ended(runs / f"quickstart_main_only-epochs=1-seed={seed}", test=measured)
    _ended(
        runs / "quickstart_main_only-epochs=2-seed=1",
        test={"main/loss": [3.0], "main/top_1": [0.25], "exit/top_1": [0.125]},
    )
    assert _main(*arguments, "--collect") == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _lines(capsys)]
    assert table[0] == ["run", "ended", "test main/top_1", "test exit/top_1"]
    assert table[2] == ["quickstart_main_only-epochs=1", "3 of 3", "0.7000 ± 0.2000 (3)", ""]
    assert table[3] == ["quickstart_main_only-epochs=2", "1 of 3", "0.2500 (1)", "0.1250 (1)"]
    assert _main(*arguments, "--collect", "--metrics=main/loss") == 0
    # The deviation of 1, 2, 6 around 3, of a sample: the square root of 7.
    assert "3.0000 ± 2.6458 (3)" in _lines(capsys)[2]


def _lines(capsys):
    return capsys.readouterr().out.splitlines()


def _states(printed):
    """Returns the second column of the table."""
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    return [row[2].strip() for row in rows[2:]]


def test_results_that_are_not_there_are_named(tmp_path, capsys):
    arguments = _arguments(tmp_path, "--seeds=0,1", "--collect")
    assert _main(*arguments) == 2
    assert "None of the 4 runs has ended." in capsys.readouterr().err
    _ended(tmp_path / "sweep" / "quickstart_auxiliary-seed=1", train={"main/loss": [1.0]})
    assert _main(*arguments) == 2
    assert "No run has measured 'test'; there is train." in capsys.readouterr().err
    assert _main(*arguments, "--split=train", "--metrics=main/los") == 2
    assert "metric 'main/los'" in capsys.readouterr().err


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    made = standin.write(tmp_path / "bin")
    monkeypatch.setenv("PYTHON", str(made.path))
    return made


def test_here_they_follow_each_other_and_a_bad_one_does_not_stop_the_rest(
    program, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ENDINGS", "0 2 0")
    _ended(tmp_path / "sweep" / "quickstart_auxiliary-seed=2", test={"main/loss": [1.0]})
    arguments = _arguments(tmp_path, "--seeds=1,2,3,4", configs=f"{QUICKSTART}:auxiliary")
    assert _main(*arguments, "--local") == 0
    assert _states(capsys.readouterr().out) == ["done", "done", "ended with status 2", "done"]
    assert [start[2:] for start in program.notes("start")] == [
        [
            f"--config={QUICKSTART}:auxiliary",
            f"--workdir={tmp_path}/sweep/quickstart_auxiliary-seed={seed}",
            f"--config.seed={seed}",
            "--config.seeds=1",
        ]
        for seed in (1, 3, 4)
    ]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 85), (signal.SIGUSR1, 85)]
)
def test_a_signal_ends_the_run_and_the_sweep(program, tmp_path, sent, status):
    command = [sys.executable, SCRIPT, *_arguments(tmp_path, "--seeds=0", "--local")]
    variables = os.environ | {"ENDINGS": "stay"}
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.wait("start", seconds=60)
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=30)
    assert program.notes("signal") == [sent.name]
    assert program.notes("end") == [status]
    assert _states(printed) == [f"ended with status {status}", "not started"]


def test_without_submitit_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert _main(*_arguments(tmp_path, configs=f"{QUICKSTART}:main_only")) == 2
    assert "pip install 'sire_jax[sweep]'" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs pip install 'sire_jax[sweep]'"
)


def _submit(path, *arguments):
    """Submits in a process of its own: submitit keeps the streams that it finds when imported."""
    command = [sys.executable, SCRIPT, *arguments]
    variables = os.environ | {"PATH": path}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@needs_submitit
def test_without_slurm_it_says_what_to_do(tmp_path):
    done = _submit(str(tmp_path), *_arguments(tmp_path, configs=f"{QUICKSTART}:main_only"))
    assert done.returncode == 2
    assert "There is no Slurm here (no srun); --local" in done.stderr


def _stubs(tmp_path):
    """Writes a Slurm that keeps what is submitted, and returns a path with it."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        stub = tmp_path / "bin" / name
        stub.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/submitted\necho Submitted batch job 17\n')
        stub.chmod(0o755)
    return f"{tmp_path}/bin:{os.environ['PATH']}"


@needs_submitit
def test_one_job_is_no_array(tmp_path):
    path = _stubs(tmp_path)
    done = _submit(path, *_arguments(tmp_path, "--seeds=3", configs=f"{QUICKSTART}:main_only"))
    assert done.returncode == 0, done.stderr
    assert _states(done.stdout) == ["job 17"]
    assert "--array" not in (tmp_path / "submitted").read_text()


@needs_submitit
def test_jobs_are_one_array_with_the_options_given(tmp_path):
    path = _stubs(tmp_path)
    arguments = _arguments(tmp_path, "--seeds=0,1,2", configs=f"{QUICKSTART}:main_only")
    options = ["--partition=gpu", "--minutes=90", "--gpus_per_node=4", "--at_once=2"]
    done = _submit(path, *arguments, *options, "--slurm=mem=32G", "--slurm=account=a b")
    assert done.returncode == 0, done.stderr
    assert _states(done.stdout) == ["job 17_0", "job 17_1", "job 17_2"]
    script = (tmp_path / "submitted").read_text()
    options = dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", script))
    assert options["array"] == "0-2%2"
    assert options["partition"] == "gpu"
    assert options["time"] == "90"
    assert options["gpus-per-node"] == "4"
    assert options["mem"] == "32G"
    assert options["account"] == "'a b'"
    assert options["signal"] == "USR1@60"
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert "--kill-on-bad-exit=0 --wait=60" in script
    # The batch script ends as launch/slurm.sbatch does.
    ending = (SCRIPT.parent / "slurm.sbatch").read_text().rpartition("# ----")[2].split("\n", 1)[1]
    assert ending.startswith("status=$?\n")
    assert ending.strip() in script


def test_an_option_of_sbatch_without_a_value_is_refused(tmp_path, capsys):
    assert _main(*_arguments(tmp_path, "--slurm=exclusive")) == 2
    assert "--slurm=exclusive should be --slurm=key=value." in capsys.readouterr().err
