"""Networks packed into small files, and opened as runs."""

import json
import shutil
from dataclasses import replace

import exiting
import jax
import numpy as np
import programs
import pytest
import real

from sire_jax import configuration, early_exit, evaluate, release, train
from sire_jax.runs.trained import kept_weights, open_run

pytestmark = pytest.mark.optax_dtypes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    exiting.trained(directory, seed=7, seeds=2, epochs=3)
    return directory


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "small.npz"
    return path, release.pack(run, path, seed=8)


@pytest.fixture(scope="module")
def opened(packed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("opened")
    release.unpack(packed[0], directory)
    return directory


def _arrays(path):
    with np.load(path) as stored:
        return dict(stored)


def test_a_file_has_the_weights_of_its_seed_in_half_precision(run, packed):
    path, made = packed
    kept = kept_weights(open_run(run), run)
    kernel = np.asarray(kept.params["backbone"]["output"]["kernel"])[1]
    stored = _arrays(path)
    assert stored["weights/params/backbone/output/kernel"].dtype == np.float16
    np.testing.assert_array_equal(
        stored["weights/params/backbone/output/kernel"], kernel.astype(np.float16)
    )
    assert path.stat().st_size < 2.2 * sum(v.size for v in made.weights.values()) + 40_000
    assert (made.config.seed, made.config.seeds) == (8, 1)
    assert "seed 8.\n| measured on the test images " in str(made)


def test_what_was_opened_is_measured_to_do_what_its_file_says(run, packed, opened):
    _, made = packed
    results = evaluate.evaluate(opened)
    assert results["step"] == made.step > 0
    for name, value in made.measured.items():
        output, metric = name.rsplit("/", 1)
        assert results["outputs"][output][metric]["runs"] == [pytest.approx(value, abs=1e-6)]
    # Rounding changes next to nothing.
    before = evaluate.evaluate(run)["outputs"]["main"]["top_1"]["runs"][1]
    assert made.measured["main/top_1"] == pytest.approx(before, abs=0.01)
    stored = json.loads((opened / "results.json").read_text())
    assert stored["splits"]["test"] == {name: [value] for name, value in made.measured.items()}


def test_what_was_opened_can_be_packed_again_and_is_the_same(packed, opened, tmp_path):
    _, made = packed
    again = release.pack(opened, tmp_path / "again.npz")
    assert again.measured == pytest.approx(made.measured)
    jax.tree.map(np.testing.assert_array_equal, dict(again.weights), dict(made.weights))


def test_programs_take_what_was_opened_as_a_run(opened, tmp_path, capsys):
    early_exit.main([f"--workdir={opened}", "--budget=12000", f"--out={tmp_path}/exits.png"])
    assert "exit_" in capsys.readouterr().out


def _damaged(packed, tmp_path, **changes):
    arrays = {**_arrays(packed[0]), **changes}
    path = tmp_path / "damaged.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


KERNEL = "weights/params/backbone/output/kernel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": np.array("sire_jax export 1")}, "was not packed by sire_jax.release"),
        ({"training": np.array('{"step": -3}')}, "The training of .* is damaged"),
        ({"training": np.array('{"step": 3}')}, r"it says \['step'\] of its training"),
        ({"measured": np.array("[1]")}, "was measured to do is damaged"),
        ({"measured": np.array('{"main/top_1": "high"}')}, "was measured to do is damaged"),
        ({"data": np.array("{}")}, r"data\.json doesn't say what the data of a run are"),
        ({"config": np.array("{")}, "config"),
        ({KERNEL: None}, "params/backbone/output/kernel is missing or another"),
        ({KERNEL: np.zeros((3, 2), np.float16)}, "params/backbone/output/kernel is missing or"),
        ({KERNEL: np.array("text")}, "params/backbone/output/kernel is missing or another"),
        ({"weights/params/more": np.zeros(1, np.float16)}, "params/more is missing or another"),
    ],
)
def test_files_that_fit_no_network_are_refused(packed, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        release.unpack(_damaged(packed, tmp_path, **changes), tmp_path / "opened")
    assert not (tmp_path / "opened" / "config.json").exists()


def test_weights_that_are_no_numbers_are_refused(packed, tmp_path):
    kernel = _arrays(packed[0])[KERNEL].copy()
    kernel[0, 0] = np.nan
    with pytest.raises(ValueError, match="params/backbone/output/kernel is missing or another"):
        release.unpack(_damaged(packed, tmp_path, **{KERNEL: kernel}), tmp_path / "opened")


def test_what_half_precision_can_not_hold_is_refused(run, tmp_path, monkeypatch):
    whole = release.kept_weights

    def large(*args, **settings):
        kept = whole(*args, **settings)
        return replace(kept, params=jax.tree.map(lambda x: x + 1e6, kept.params))

    monkeypatch.setattr(release, "kept_weights", large)
    with pytest.raises(ValueError, match=r"params/\S+ has values that half precision can't hold"):
        release.pack(run, tmp_path / "large.npz")


def test_what_was_opened_is_a_run_that_has_ended(opened, capsys):
    stored = json.loads((opened / "config.json").read_text())
    config = configuration.from_json(json.dumps(stored))
    before = {path: path.stat().st_mtime_ns for path in (opened / "checkpoints").rglob("manifest")}
    train.train(configuration.completed(config), str(opened))
    after = {path: path.stat().st_mtime_ns for path in (opened / "checkpoints").rglob("manifest")}
    assert after == before


def test_what_is_there_is_not_written_over(run, packed, opened, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run; choose another --workdir"):
        release.unpack(packed[0], opened)
    with pytest.raises(FileExistsError):
        release.pack(run, packed[0])
    with pytest.raises(ValueError, match="--seed is 3; the run has the seeds 7 to 8"):
        release.pack(run, tmp_path / "more.npz", seed=3)
    with pytest.raises(ValueError, match="There is no released network 'nothing'"):
        release.unpack("nothing", tmp_path / "opened")


def test_a_config_that_names_code_is_refused(packed, tmp_path):
    config = json.loads(str(_arrays(packed[0])["config"]))
    config["backbone"]["name"] = "os:getcwd"
    path = _damaged(packed, tmp_path, config=np.array(json.dumps(config)))
    with pytest.raises(
        ValueError, match=r"names code of its own, config.backbone.name: 'os:getcwd'"
    ):
        release.read(path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir"),
        (["--workdir=a"], "either --out"),
        (["--open=pairs"], "give --workdir"),
    ],
)
def test_the_program_says_what_it_needs(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        release.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_program_packs_and_opens(run, tmp_path, capsys):
    release.main([f"--workdir={run}", f"--out={tmp_path}/own.npz"])
    assert "bytes" in capsys.readouterr().out
    release.main([f"--open={tmp_path}/own.npz", f"--workdir={tmp_path}/opened"])
    assert f"sire_jax.evaluate --workdir={tmp_path}/opened" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "opened")


# ---- Those that come with the package.

NAMES = ("auxnet", "pairs", "sire", "ssal")


def test_a_small_network_of_each_paper_comes_with_the_package():
    assert tuple(release.shipped()) == NAMES
    cards = (configuration.repository_configs().parent / "docs" / "networks.md").read_text()
    for name, path in release.shipped().items():
        assert path.stat().st_size < 1_000_000
        made = release.read(name)
        figures = made.measured
        assert f"| `{name}` | " in cards
        number = sum(v.size for k, v in made.weights.items() if k.startswith("params/"))
        assert f" {number:,} | " in cards
        assert f"{100 * figures['main/top_1']:.1f}" in cards
        # Nothing of the machine that it was trained on.
        assert made.config.data.dir == configuration.default().data.dir


@pytest.mark.slow  # It starts a program, which measures whole networks on real images.
@pytest.mark.parametrize("name", NAMES)
def test_shipped_networks_still_do_what_is_said(name, tmp_path):
    made = release.unpack(name, tmp_path / name)
    directory = real.directory_with("mnist" if name == "pairs" else "cifar100")
    arguments = [f"--workdir={tmp_path / name}", f"--config.data.dir={directory}", "--json"]
    # The compiler is as ever: what it optimizes is most of the time.
    program = programs.Program(
        ["sire_jax.evaluate", *arguments], tmp_path / f"{name}.log", XLA_FLAGS=""
    )
    with programs.started(program):
        assert program.wait(120) == 0, program.output
    results = json.loads(program.output.splitlines()[-1])
    for metric, value in made.measured.items():
        output, kind = metric.rsplit("/", 1)
        found = {**results["outputs"], **results["predictions"]}[output][kind]["runs"][0]
        # The fit has not converged after its 200 steps, and ends elsewhere where sums are rounded
        # otherwise, by another number of threads.
        fitted = {"loss": 0.25, "top_1": 0.01, "top_5": 0.01}
        tolerance = fitted[kind] if output == "linear" else 5e-4
        assert found == pytest.approx(value, abs=tolerance), metric
