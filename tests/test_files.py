"""Paths as people write them: homes, and what can't be written."""

import os
from pathlib import Path

import pytest

from sire_jax import early_exit, evaluate, explain, export, files, grouping, reproduce, train
from sire_jax.diagnostics import (
    activation_maps,
    conflict,
    figures,
    gradient_flow,
    reconstructions,
    supervision,
)
from sire_jax.job import command
from sire_jax.storage.workdir import Workdir

PICTURES = {
    early_exit: ["--workdir=absent", "--budget=1e6"],
    explain: ["--workdir=absent", "--image=absent"],
    activation_maps: ["--workdir=absent"],
    conflict: ["--workdir=absent"],
    gradient_flow: ["--workdir=absent"],
    reconstructions: ["--workdir=absent"],
    supervision: ["--workdir=absent"],
}
OTHERS = {
    export: ["--workdir=absent", "--exit=main"],
    grouping: ["--workdir=absent", "--groups=2"],
}
PROGRAMS = PICTURES | OTHERS


def _name(program):
    return program.__name__.rpartition(".")[2]


def _refused(program, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == command.EXPLAINED
    return capsys.readouterr().err


def test_a_tilde_is_the_home(tmp_path):
    assert files.expanded("~/runs") == tmp_path / "runs"
    assert files.expanded(Path("runs")) == Path("runs")


def test_a_user_without_a_home_is_told(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(
        FileNotFoundError, match=r"~/runs starts with a home.*give the path in full"
    ):
        files.expanded("~/runs")


def test_a_home_of_nobody_is_named():
    message = (
        "config.data.dir=~nosuchuser/pets starts with the home directory of 'nosuchuser', and there"
        " is no such user; give the path in full."
    )
    with pytest.raises(FileNotFoundError) as refused:
        files.expanded("~nosuchuser/pets", "config.data.dir=")
    assert str(refused.value) == message


# None of them has begun to look for the run.
@pytest.mark.parametrize("program", PROGRAMS, ids=_name)
def test_what_cannot_be_written_is_refused_before_the_work(program, tmp_path, capsys):
    given = PROGRAMS[program]
    (tmp_path / "directory.png").mkdir()
    absent = f"There is no directory to write {tmp_path / 'absent' / 'a.png'} to."
    # As with all of them: "~" is the home, which is a directory of the test.
    assert absent in _refused(program, [*given, "--out=~/absent/a.png"], capsys)
    assert "is a directory; name a file in it" in _refused(
        program, [*given, "--out=~/directory.png"], capsys
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=_name)
def test_a_place_without_permission_is_refused_before_the_work(
    program, tmp_path, capsys, monkeypatch
):
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    said = _refused(program, [*PROGRAMS[program], f"--out={tmp_path / 'a.png'}"], capsys)
    assert f"{tmp_path / 'a.png'} can't be written; choose another --out." in said


@pytest.mark.parametrize("program", PICTURES, ids=_name)
@pytest.mark.parametrize("name", ["a.gifx", "a"])
def test_an_ending_of_no_picture_is_refused_before_the_work(program, name, tmp_path, capsys):
    said = _refused(program, [*PICTURES[program], f"--out={tmp_path / name}"], capsys)
    assert f"{tmp_path / name} ends as no picture that can be drawn; --out should end" in said
    assert ".png" in said


def test_pictures_may_be_written_over_and_other_files_not(tmp_path):
    for name in ("a.PNG", "a.pdf"):
        (tmp_path / name).write_text("kept")
        assert command.check_picture(tmp_path / name) == tmp_path / name
    with pytest.raises(FileExistsError, match=r"a\.pdf exists; choose another --out"):
        command.check_new(tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_text() == "kept"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (train, [f"--config={reproduce.configuration.repository_configs()}/quickstart.py"]),
        (reproduce, ["--table=quickstart"]),
        (evaluate, []),
        (conflict, []),
        (gradient_flow, []),
        (export, ["--exit=main", "--out=a.npz"]),
    ],
    ids=lambda each: _name(each) if not isinstance(each, list) else "",
)
def test_an_empty_workdir_is_refused(program, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = _refused(program, ["--workdir=", *arguments], capsys)
    assert "The workdir is empty; name a directory, such as --workdir=runs/first." in said
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PermissionError, match=r"can't be written to \(It is a file\); choose"):
        Workdir(tmp_path / "file", reproduce.configuration.default())


def test_a_table_is_refused_a_workdir_before_it_trains(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    said = _refused(reproduce, ["--table=quickstart", "--workdir=~/file"], capsys)
    assert f"The workdir {tmp_path / 'file'} can't be written to (It is a file)" in said


def test_curves_of_a_run_in_the_home(tmp_path):
    (tmp_path / "run").mkdir()
    line = '{"step": 1, "epoch": 1, "split": "test", "main/top_1": [0.5], "main/loss": [1.0]}\n'
    (tmp_path / "run" / "metrics.jsonl").write_text(line)
    assert figures.curves("~/run") == tmp_path / "run" / "curves.png"
