"""Some steps of a run as it is shipped."""

import json

import numpy as np
import programs
import pytest

from sire_jax import configuration, paper_tables, rehearsal, reproduce, traced, train
from sire_jax.configuration import experiment
from sire_jax.diagnostics import figures
from sire_jax.rehearsal import Rehearsal, rehearse

pytestmark = pytest.mark.optax_dtypes

CONFIGS = configuration.repository_configs()
SMALL = ("epochs=3", "data.task.train=100", "data.task.test=30")


def _parts(*overrides):
    given = [f"--config.{each}" for each in (*SMALL, *overrides)]
    path = programs.TINY.removeprefix("--config=")
    return experiment.build(configuration.load(path, given))


@pytest.fixture(scope="module")
def rehearsed():
    parts, notes = _parts("seeds=4"), []

    def note(so_far):
        notes.append((len(so_far.seconds), so_far.finished))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "NOTED", 0.0)
        found = rehearse(parts, steps=5, note=note)
    assert notes == [(number, False) for number in range(5)]
    assert found.finished
    return parts, found


def test_a_rehearsal_shows_sizes_times_and_losses(rehearsed):
    parts, found = rehearsed
    assert found.images == "real"
    assert found.parameters == traced.size(parts.variables["params"])
    # Two steps an epoch of fifty pairs each, three epochs, four seeds.
    assert found.whole == 2 * 3 * 4
    assert len(found.seconds) == 4
    assert found.hours() == pytest.approx(24 * np.median(found.seconds) / 3600)
    assert set(found.losses) == {"main", "total"}
    assert found.losses["main"] == found.losses["total"]
    assert len(found.losses["main"]) == 5
    assert found.losses["main"][0] == pytest.approx(np.log(2), abs=0.2)
    # The digits, and the parameters with Adam's two moments.
    assert found.memory > 1797 * 64 + 3 * 4 * found.parameters
    assert found.diverged is None
    assert found.verdict().startswith(("falls", "finite"))


@pytest.mark.slow  # It compiles a network of its own.
def test_its_steps_are_those_of_the_run(rehearsed, tmp_path):
    _, found = rehearsed
    config = _parts("seeds=1", "evaluate_every=0").config
    train.train(config, str(tmp_path))
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    first = next(line for line in lines if line["split"] == "steps")
    np.testing.assert_allclose(first["main/loss"], np.mean(found.losses["main"][:2]), rtol=1e-5)


@pytest.mark.slow  # It compiles a network of its own.
def test_what_does_not_fit_is_refused_by_its_size():
    found = rehearse(_parts(), memory=2**10)
    assert found.losses == {}
    assert found.verdict() == (
        f"too big for this machine: {found.memory / 2**30:.1f} GiB, where 0.0 GiB are free"
    )
    assert "0.0 hours, 1 without a figure left out." in rehearsal.markdown({"row": found})


@pytest.mark.slow  # It compiles a network of its own.
def test_a_run_that_diverges_says_when():
    found = rehearse(_parts("optimizer.learning_rate=1e25"), steps=6)
    assert found.diverged in (2, 3)
    assert found.verdict() == f"diverges: a loss is not finite at step {found.diverged}"
    assert len(found.losses["total"]) == found.diverged
    assert found.hours() is None


@pytest.mark.slow  # It compiles a network of its own.
@pytest.mark.parametrize(
    "data",
    [{"shape": (8, 8, 3)}, {"shape": (10, 10, 3), "resize": 10, "crop": 8, "feed": "stream"}],
    ids=["device", "stream"],
)
def test_images_are_made_up_where_there_are_none(data, tmp_path):
    config = configuration.default()
    config.update(batch_size=4, epochs=2, devices=1)
    config.data.update({"name": "tfds:cifar100", "dir": str(tmp_path), "images": 6000, **data})
    config.data.classes.label = 100
    config.data.task.validation_per_class = 50
    config.backbone = configuration.backbone("small_cnn", classes=100, channels=(4, 8))
    config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    found = rehearse(experiment.build(config), steps=3)
    assert found.images == "made up"
    assert len(found.losses["total"]) == 3
    assert found.whole == 2 * (6000 - 100 * 50) // 4


def _grouped(**data):
    """A branch over groups of the digits whose file is not there."""
    config = configuration.default()
    config.update(batch_size=10, devices=1)
    config.data.update(data)
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(4, 8))
    config.heads.branch = configuration.head("branch", position="block_1", classes=3)
    config.data.groups.coarse = configuration.grouping("/nowhere/groups.json", 3)
    config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    config.objectives.branch = configuration.objective("branch", "coarse", "cross_entropy")
    with pytest.warns(UserWarning, match="labels are dealt to 3 groups"):
        return experiment.build(configuration.with_groups(config, dealt=True))


@pytest.mark.slow  # It compiles a network of its own.
def test_images_are_made_up_where_groups_are():
    found = rehearse(_grouped(images=1200), steps=2)
    assert found.images == "made up"
    assert len(found.losses["branch"]) == 2


def test_where_groups_are_made_up_the_number_of_images_has_to_be_known():
    message = r"no file of groups /nowhere/groups.json, and without config.data.images"
    with pytest.raises(FileNotFoundError, match=message):
        rehearse(_grouped(), steps=2)


@pytest.mark.slow  # It compiles a network of its own.
def test_runs_that_devices_share_are_rehearsed_one_by_one():
    found = rehearse(_parts("seeds=2", "devices=2", "devices_share=runs"), steps=2)
    assert found.whole == 2 * 3 * 2
    assert len(found.losses["total"]) == 2


def test_losses_below_zero_are_drawn_too_and_what_broke_at_once_has_a_cross(tmp_path):
    nan = float("nan")
    path = tmp_path / "losses.png"
    figures.losses(
        {"likelihood": [1.0, 0.0, -3.0], "broken": [nan], "late": [2.0, nan]}, path, "loss"
    )
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_rehearsal_of_one_step_is_refused():
    with pytest.raises(ValueError, match=r"A rehearsal of 1 steps says nothing; .* at least 2"):
        rehearse(_parts(), steps=1)


def test_a_table_of_rehearsals_sums_their_hours():
    seconds = {"short": [0.5, 1.5, 1.0], "long": [36.0, 36.0]}
    rows = {
        name: Rehearsal(name, 1234, "real", 1800, 2**29, "", 9.0, each, {"total": [3.0, 2.0, 1.0]})
        for name, each in seconds.items()
    }
    text = rehearsal.markdown(rows)
    assert "| short | 1,234      | real   | 3     | falls: 3 -> 1 | 1        | 0.50" in text
    assert "| 18.0  |" in text
    assert text.endswith("All of these, every seed after the other, here: 18.5 hours.")


def test_the_main_loss_of_one_run_has_a_panel_of_its_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    figures.losses_of_one({"deep": [9.0, 0.1], "main": [4.7, 4.4]}, tmp_path / "losses.png")
    left, right = drawn[0].axes
    assert [list(line.get_ydata()) for line in left.lines] == [[4.7, 4.4]]
    assert [list(line.get_ydata()) for line in right.lines] == [[9.0, 0.1]]
    # In powers of ten where the losses span some.
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")
    figures.losses_of_one({"main": [1.0, -1.0]}, tmp_path / "losses.png")
    assert [axes.get_yscale() for axes in drawn[1].axes] == ["symlog"]


@pytest.mark.slow  # It compiles a network of its own.
def test_a_table_is_rehearsed_row_by_row_once_all_are_built(tmp_path, capsys):
    table = paper_tables.load_table("quickstart", CONFIGS)
    overrides = [f"--config.{each}" for each in SMALL]
    given = (table, table["rows"][1:], tmp_path, CONFIGS, "", overrides)
    found = reproduce.rehearse(*given, steps=2)
    name = paper_tables.identity(table["rows"][1])
    assert list(found) == [name]
    assert f"1/1  {name}: " in capsys.readouterr().out
    written = json.loads((tmp_path / "rehearsal.json").read_text())
    assert written["rows"][name]["losses"]["total"] == found[name].losses["total"]
    assert rehearsal.markdown(found) in (tmp_path / "rehearsal.md").read_text()
    assert (tmp_path / "rehearsal.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("work", [reproduce.rehearse, reproduce.reproduce])
def test_a_mistake_in_the_last_row_is_found_before_the_first_is_begun(work, tmp_path):
    table = paper_tables.load_table("quickstart", CONFIGS)
    wrong = {**table["rows"][0], "id": "wrong", "overrides": ["--config.batch_size=1000"]}
    rows = [*table["rows"], wrong]
    with pytest.raises(ValueError, match=r"The row 'wrong': config.batch_size is 1000, but there"):
        work({**table, "rows": rows}, rows, tmp_path, CONFIGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # It compiles a network of its own.
def test_the_programs_rehearse(tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    small = [f"--config.{each}" for each in SMALL]
    config = f"--config={CONFIGS}/quickstart.py:main_only"
    train.main([config, "--rehearse=2", *small])
    assert "| quickstart/main_only |" in capsys.readouterr().out
    assert not list(here.iterdir())
    with pytest.raises(SystemExit) as ended:
        train.main([config, *small])
    assert ended.value.code == 2
    assert "--workdir is needed" in capsys.readouterr().err
