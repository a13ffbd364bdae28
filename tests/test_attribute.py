"""What auxiliary objectives are worth: networks of a config, and of a notebook."""

import inspect
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import optax
import pytest

import sire_jax as sj
from sire_jax import configuration, train
from sire_jax.attribute import attribute_config, draw, main
from sire_jax.attribution.in_memory import attribute
from sire_jax.attribution.results import Attribution
from sire_jax.attribution.trained import Attributed

pytestmark = pytest.mark.optax_dtypes


def _config(**changes):
    config = configuration.default()
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(2, 2))
    for name, block in (("early", "block_1"), ("late", "block_2")):
        config.heads[name] = configuration.head("classifier", endpoints=(block,), classes=10)
        config.objectives[name] = configuration.objective(name, "label", "cross_entropy", 0.5)
    config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    config.optimizer = configuration.optimizer("adam", learning_rate=0.01)
    config.update(epochs=1, seeds=2, batch_size=100, **changes)
    return config


@pytest.fixture(scope="module")
def attributed(tmp_path_factory):
    """The directory of an attribution, and its values."""
    out = tmp_path_factory.mktemp("attributed") / "values"
    return out, attribute_config(_config(), out)


@pytest.mark.slow  # It trains four runs.
def test_networks_of_a_program_are_those_of_runs_of_their_own(attributed, tmp_path):
    _, found = attributed
    assert set(found.values) == {"", "early", "late", "early+late"}
    weights = {"": (0, 0), "early": (0.5, 0), "early+late": (0.5, 0.5)}
    for subset, (early, late) in weights.items():
        config = _config()
        config.objectives.early.weight, config.objectives.late.weight = early, late
        alone = train.train(config, str(tmp_path / f"run {subset}"))
        assert found.values[subset] == alone["splits"]["test"]["main/top_1"]
    assert found.values[""] != found.values["early+late"]
    config = _config()
    config.objectives.early.weight = config.objectives.late.weight = 0.0
    config.objectives.main.weight = 2.0
    alone = train.train(config, str(tmp_path / "effective"))
    assert found.effective == alone["splits"]["test"]["main/top_1"]


def test_values_add_up_and_are_drawn(attributed):
    _, found = attributed
    worth = np.add(found.worth["early"], found.worth["late"])
    np.testing.assert_allclose(worth, np.subtract(found.values["early+late"], found.values[""]))
    axes = draw(found).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "early",
        "late",
        "early and late",
    ]


def test_seeds_that_are_there_are_not_trained_again(attributed, monkeypatch):
    out, found = attributed

    def refuse(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("sire_jax.attribution.trained.Attributed.train", refuse)
        assert attribute_config(_config(), out) == found
        with pytest.raises(AssertionError):
            attribute_config(_config(seed=1), out)
        other = _config()
        other.objectives.early.weight = 0.25
        with pytest.raises(
            ValueError, match=r"else \(objectives.early.weight: 0.5 -> 0.25\); choo"
        ):
            attribute_config(other, out)
        with pytest.raises(ValueError, match=r"else \(metric: main/top_1 -> main/loss\); choose"):
            attribute_config(_config(), out, metric="main/loss")
        # Of two objectives as many networks, in another order.
        with pytest.raises(ValueError, match=r"else \(orders: 0 -> 1\); choose another --out"):
            attribute_config(_config(), out, sample=1)
        threads = _config()
        threads.data.threads = 3
        assert attribute_config(threads, out) == found


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "attribution.json").write_text('{"measured": 3')
    with pytest.raises(ValueError, match=r"attribution.json is damaged; remove it to begin again"):
        attribute_config(_config(), tmp_path)


def test_the_face_has_the_function_and_so_has_its_module():
    assert sj.attribute in (attribute, sys.modules["sire_jax.attribute"])
    with pytest.raises(TypeError, match="missing 5 required positional arguments"):
        sys.modules["sire_jax.attribute"]()
    assert inspect.signature(sys.modules["sire_jax.attribute"]) == inspect.signature(attribute)


def test_images_are_to_be_on_the_device():
    config = _config()
    config.data.feed, config.seeds = "stream", 1
    with pytest.raises(ValueError, match=r"feed is 'stream', which feeds one network; .*'device'"):
        Attributed(config)


def test_what_has_no_auxiliary_objective_is_refused(tmp_path):
    config = _config()
    del config.objectives.early, config.objectives.late, config.heads.early, config.heads.late
    with pytest.raises(ValueError, match=r"There is no objective beside 'main', of which to tell"):
        attribute_config(config, tmp_path)
    config = _config()
    config.objectives.main.weight = 0.0
    with pytest.raises(ValueError, match=r"objective 'main' has no weight; it should have one"):
        attribute_config(config, tmp_path)


@pytest.mark.slow  # It compiles a network of its own.
def test_the_program_prints_a_table_and_goes_on(tmp_path, capsys, monkeypatch):
    program = tmp_path / "own.py"
    program.write_text("from test_attribute import _config as get_config\n")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    arguments = [f"--config={program}", f"--out={tmp_path}", "--config.seeds=1"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "unknown of one seed" in printed
    assert (tmp_path / "attribution.png").stat().st_size > 5000
    stored = json.loads((tmp_path / "attribution.json").read_text())
    assert [len(values) for values in stored["measured"].values()] == [5]
    with pytest.raises(SystemExit):
        main([*arguments, "--metric=main/to_1"])
    assert "no metric 'main/to_1'. Did you mean 'main/top_1'" in capsys.readouterr().err


# ---- In a notebook.


def _attribute(**changes):
    digits = sj.data.load("digits")
    heads = {"exit": sj.heads.Classifier(("block_1",), classes=10)}
    network = sj.Network(sj.backbones.SmallCNN(classes=10, channels=(2, 2)), heads)
    objectives = {k: sj.Objective(k, "label", sj.cross_entropy) for k in ("exit", "main")}
    rule = partial(sj.joint, optax.adam(1e-2))
    settings = {"epochs": 1, "batch_size": 200, "seeds": 2} | changes
    arrays = digits.train.batch(), digits.test.batch()
    return attribute(network, objectives, rule, *arrays, **settings)


def test_the_metric_is_the_main_objectives():
    found = _attribute(main="exit")
    assert found.metric == "exit/top_1"
    assert set(found.worth) == {"main"}


def test_a_notebook_has_the_values_of_its_own_networks():
    found = _attribute(metric="main/loss")
    assert isinstance(found, Attribution)
    assert set(found.values) == {"", "exit"}
    gained = np.subtract(found.values["exit"], found.values[""])
    np.testing.assert_allclose(found.worth["exit"], gained)
    assert len(set(found.values["exit"])) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"main": "mian"}, "no objective 'mian'. Did you mean 'main'"),
        ({"metric": "main/to_1"}, "no metric 'main/to_1'. Did you mean 'main/top_1'"),
        ({"seeds": 0}, "seeds is 0; it should be at least 1"),
        ({"sample": -1}, "sample is -1; it should be at least 0"),
    ],
)
def test_what_can_not_be_attributed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _attribute(**changes)
