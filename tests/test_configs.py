"""The shipped configs themselves, on the bundled digits and shrunk to one step."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax import configuration, inspect, paper_tables, reproduce
from sire_jax.configuration import experiment, validation
from sire_jax.runs.loading import load_data

CONFIGS = configuration.repository_configs()
TABLES = sorted(path.stem for path in (CONFIGS / "tables").glob("*.json"))

# Weights and biases of the report's networks on 14 x 14 images, as counted in test_networks.py.
PARAMETERS = {
    "dense_bce": 27265,
    "dense_mse": 27265,
    "conv": 4737,
    "conv_bn": 4865,
    "conv_augment": 4737,
    "duplicated": 10477,
    "shared": 5459,
    "aux_0.1": 5459,
    "aux_10": 5459,
    "residual": 154217,
    "resless": 154217,
}


def _shrunk(variant):
    overrides = {
        "data.name": "digits",
        "data.shape": "(8, 8, 1)",
        "data.task.downscale": 1,
        "data.task.train": 20,
        "data.task.test": 20,
        "batch_size": 4,
        "devices": 1,
    }
    if not variant.startswith("dense"):
        overrides["backbone.padding"] = 1
    given = [f"--config.{key}={value}" for key, value in overrides.items()]
    return configuration.load(f"{CONFIGS}/pairs.py:{variant}", given)


# One of each kind of network and of loss; of all of them parameters are counted below.
# The quick ones have an augmentation and auxiliary outputs between them.
slow = pytest.mark.slow
STEPPED = (
    "conv_augment",
    "aux_10,as_released",
    *(pytest.param(variant, marks=slow) for variant in ("dense_mse", "conv_bn", "residual")),
)
LARGE = ("residual", "resless")


@pytest.mark.optax_dtypes
@pytest.mark.parametrize("variant", STEPPED)
def test_a_step_of_a_pairs_config_has_finite_losses_and_changes_every_parameter(variant):
    parts = experiment.build(_shrunk(variant))
    dataset, (draw,) = load_data(parts)
    arrays = jax.tree.map(jnp.asarray, parts.task.prepare(dataset.train))
    batch = parts.lookup(arrays, jnp.asarray(draw.train[:4]))
    before = parts.initial_state(0)
    after, metrics = jax.jit(parts.step())(before, batch)
    assert set(metrics) == {f"{name}/loss" for name in (*parts.objectives, "total")}
    assert all(np.isfinite(metric.mean()) for metric in metrics.values())
    assert float(metrics["main/loss"].count) == 4
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    assert jax.tree.all(changed)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [pytest.param(*each, marks=slow if each[0] in LARGE else ()) for each in PARAMETERS.items()],
)
def test_parameters_of_the_pairs_configs(variant, parameters):
    counts = inspect.inspect(configuration.load(f"{CONFIGS}/pairs.py:{variant}"))
    assert counts["parameters"] == counts["outputs"]["main"]["parameters"] == parameters


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_has_a_config(name):
    table = paper_tables.load_table(name, CONFIGS)
    for row in table["rows"]:
        for option in ("", *table["options"]):
            config = paper_tables.row_config(table, row, CONFIGS, option, [])
            validation.validate(config)
            assert config.epochs == row.get("epochs", config.epochs)
            assert {kind["split"] for kind in table["columns"].values() if "split" in kind} <= {
                *config.evaluate_splits,
                "test",
            }


# ---- Where they are found.


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty directory, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(directory, name):
    """Writes a config of one's own that has the file name of a shipped one."""
    directory.mkdir(exist_ok=True)
    (directory / "pairs.py").write_text(
        "from sire_jax import configuration\n"
        "def get_config():\n"
        "    config = configuration.default()\n"
        f"    config.name = {name!r}\n"
        "    return config\n"
    )


@pytest.mark.parametrize("path", ["pairs.py:conv", "configs/pairs.py:conv", "./pairs.py:conv"])
@pytest.mark.usefixtures("elsewhere")
def test_shipped_configs_are_found_from_anywhere(path):
    assert configuration.load(path).name == "pairs/conv"


def test_a_config_of_the_current_directory_comes_before_one_in_configs_and_a_shipped_one(elsewhere):
    _write(elsewhere / "configs", "in configs")
    assert configuration.load("pairs.py").name == "in configs"
    assert configuration.load("configs/pairs.py").name == "in configs"
    _write(elsewhere, "here")
    assert configuration.load("pairs.py").name == "here"
    assert configuration.load("configs/pairs.py").name == "in configs"


@pytest.mark.parametrize("path", ["/configs/pairs.py", "../pairs.py", "other/pairs.py"])
@pytest.mark.usefixtures("elsewhere")
def test_a_path_to_somewhere_else_is_not_taken_for_a_shipped_config(path):
    with pytest.raises(FileNotFoundError, match=f"There is no config file {path}"):
        configuration.load(path)


def test_a_config_that_is_nowhere_is_reported_with_the_places_and_the_shipped_ones(elsewhere):
    with pytest.raises(FileNotFoundError) as raised:
        configuration.load("configs/pair.py:conv")
    assert str(raised.value) == (
        "There is no config file configs/pair.py. Did you mean 'pairs.py'? Known: auxnet.py,"
        " pairs.py, quickstart.py, sire.py, ssal.py. It was looked for in"
        f" {elsewhere}, in configs there, and among those known, in {CONFIGS}."
    )


def test_a_config_in_the_home_directory_is_found(elsewhere):
    _write(elsewhere / "mine", "mine")
    assert os.environ["HOME"] == str(elsewhere)
    assert configuration.load("~/mine/pairs.py").name == "mine"


@pytest.mark.parametrize("file", ["configs/groups/cifar100_join.json", "groups/cifar100_join.json"])
@pytest.mark.usefixtures("elsewhere")
def test_shipped_groups_are_found_from_anywhere(file):
    config = configuration.load(
        "ssal.py:resnet18,small", [f"--config.data.groups.groups_1.file={file}"]
    )
    section = config.data.groups.groups_1
    assert (section.file, max(section.assignment)) == ("", section.groups - 1)


def test_groups_of_the_current_directory_come_before_shipped_ones(elsewhere):
    shipped = configuration.load("ssal.py:resnet18,small").data.groups.groups_1.assignment
    (elsewhere / "configs" / "groups").mkdir(parents=True)
    own = elsewhere / "configs" / "groups" / "cifar100_join.json"
    shutil.copy(CONFIGS / "groups" / "cifar100_split.json", own)
    assert configuration.load("ssal.py:resnet18,small").data.groups.groups_1.assignment != shipped


def test_tables_are_found_here_and_among_the_shipped_ones(elsewhere):
    assert paper_tables.find_configs("quickstart") == CONFIGS
    own = elsewhere / "configs" / "tables" / "quickstart.json"
    own.parent.mkdir(parents=True)
    own.write_text((CONFIGS / "tables" / "quickstart.json").read_text())
    configs = paper_tables.find_configs("quickstart")
    assert configs.resolve() == elsewhere / "configs"
    # Of a table of one's own, too, the config may be a shipped one.
    table = paper_tables.load_table("quickstart", configs)
    config = paper_tables.row_config(table, table["rows"][0], configs, "", [])
    assert config.name == "quickstart/main_only"


@pytest.mark.usefixtures("elsewhere")
def test_a_table_that_is_nowhere_is_reported(capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["--table=quickstrat"])
    assert "There is no table 'quickstrat'. Did you mean 'quickstart'?" in capsys.readouterr().err
