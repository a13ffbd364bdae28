"""Gradient flow, reconstructions and the warning of a run at chance level, on bundled digits."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from ml_collections import ConfigDict
from planned import normal, random_like

from sire_jax import configuration, train
from sire_jax.configuration import experiment
from sire_jax.data import batches
from sire_jax.data.batches import image_range
from sire_jax.diagnostics import gradient_flow, reconstructions
from sire_jax.diagnostics.reconstructions import Reconstructed
from sire_jax.job.progress import Progress
from sire_jax.runs.gradient_flow import convolutions, make_gradient_flow
from sire_jax.runs.loading import load_data
from sire_jax.runs.runs import Runs
from sire_jax.runs.training import chance_messages
from sire_jax.state import TrainState
from sire_jax.storage import workdir

pytestmark = pytest.mark.optax_dtypes


def _config(**settings):
    config = configuration.default()
    config.name = "tiny"
    config.update(epochs=2, batch_size=100, devices=1, gradient_flow_every=1, chance_after=1)
    config.data.mean, config.data.std = (0.3,), (0.25,)
    low, high = image_range(config.data)
    # A backbone of one's own, by its module.
    config.backbone = ConfigDict({"name": "planned:tiny", "classes": 10})
    config.heads.decoder = configuration.head("decoders", value_range=(low, high))
    config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    config.objectives.decoder = configuration.objective(
        "decoder", "image", "mean_squared_error", 0.2
    )
    config.optimizer = configuration.optimizer("adam", learning_rate=0.02)
    config.evaluate_splits = ("test",)
    config.update(settings)
    return config


# ---- A whole run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    config = _config(epochs=4)
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        said = []
        patch.setattr(Progress, "say", lambda self, message: said.append(message))
        results = train.train(config, str(directory))
    return directory, config, results, said


def test_a_network_of_ones_own_with_decoders_learns_digits(trained):
    directory, _, results, said = trained
    found = results["splits"]["test"]
    assert set(found) == {
        "main/loss",
        "main/top_1",
        "main/top_5",
        "decoder_1/loss",
        "decoder_2/loss",
    }
    lines = [line for line in workdir.read_metrics(directory) if line["split"] == "steps"]
    assert lines[-1]["main/loss"][0] < 0.9 * lines[0]["main/loss"][0]
    for i in (1, 2):
        first, last = (line[f"decoder_{i}/loss"][0] for line in (lines[0], lines[-1]))
        assert last < first
    assert found["main/top_1"][0] > 0.3
    # It has learned: nothing is said.
    assert all(each.startswith("First step: ") for each in said)


def test_the_gradient_flow_of_every_epoch_is_kept_and_drawn(trained):
    directory, config, _, _ = trained
    flow = gradient_flow.read(directory)
    assert set(flow) == {"main", "decoder_1", "decoder_2", "total"}
    names = [f"stage_{s}_block_{b}" for s in (1, 2) for b in (1, 2)]
    for objective in flow.values():
        assert list(objective) == names
        assert all(values.shape == (config.epochs,) for values in objective.values())
    for name in names:
        reached = (flow["decoder_1"][name] > 0).all()
        assert bool(reached) is name.startswith("stage_1")
        assert (flow["decoder_1"][name] >= 0).all()
        assert (flow["main"][name] > 0).all()
        parts = sum(flow[k][name] for k in ("main", "decoder_1", "decoder_2"))
        assert (flow["total"][name] <= parts * (1 + 1e-4)).all()
    assert (directory / "gradient_flow.png").read_bytes()[:4] == b"\x89PNG"


def test_gradient_flows_of_several_runs_side_by_side(trained, tmp_path, capsys):
    picture = tmp_path / "both.png"
    arguments = [f"--workdir={trained[0]}", f"--workdir={trained[0]}/", f"--out={picture}"]
    gradient_flow.main(arguments)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert str(picture) in capsys.readouterr().out
    gradient_flow.main([*arguments, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert len(printed) == 2
    read = gradient_flow.read(trained[0])
    for each in printed.values():
        assert each == {k: {n: v.tolist() for n, v in flow.items()} for k, flow in read.items()}
        assert list(each["main"]) == list(read["main"])


def test_what_needs_no_data_says_nothing_of_overrides_and_takes_none(capsys):
    for arguments in (["--help"], ["--workdir=run", "--config.seed=1"]):
        with pytest.raises(SystemExit):
            gradient_flow.main(arguments)
    shown = capsys.readouterr()
    assert "can be overridden" not in shown.out
    assert "unrecognized arguments: --config.seed=1" in shown.err


def test_a_run_without_measurements_of_gradients_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "split": "test"}\n')
    with pytest.raises(ValueError, match="no measurements of gradients; train with --config"):
        gradient_flow.read(tmp_path)


def test_reconstructions_of_a_trained_run(trained, tmp_path, capsys, monkeypatch):
    directory, config, results, _ = trained
    seen = []

    def reconstruct(directory, chosen, overrides):
        seen.append(whole(directory, range(599), overrides))
        image, outputs, classified = seen[0]
        assert list(chosen) == [0, 1]
        outputs = {name: each[:2] for name, each in outputs.items()}
        return Reconstructed(image[:2], outputs, classified[:2])

    whole = reconstructions.reconstruct
    monkeypatch.setattr(reconstructions, "reconstruct", reconstruct)
    picture = tmp_path / "seen.png"
    arguments = [f"--workdir={directory}", "--images=2", f"--out={picture}"]
    reconstructions.main(arguments)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert str(picture) in capsys.readouterr().out
    ((images, found, classified),) = seen
    first = Reconstructed(images[:2], {k: x[:2] for k, x in found.items()}, classified[:2])
    monkeypatch.setattr(reconstructions, "reconstruct", lambda *_: first)
    reconstructions.main([*arguments, "--json"])
    (report,) = json.loads(capsys.readouterr().out).values()
    assert (report["images"], report["classified"]) == ([0, 1], classified[:2])
    assert report["errors"]["decoder_2"][1] == pytest.approx(
        ((found["decoder_2"][1] - images[1]) ** 2).mean(), rel=1e-5
    )
    dataset = load_data(experiment.build(config))[0]
    np.testing.assert_allclose(images, dataset.test.image / 255, atol=1e-6)
    assert set(found) == {"decoder_1", "decoder_2"}
    for name, each in found.items():
        assert each.shape == images.shape
        # The loss is of normalized images, those here have values in [0, 1].
        loss = results["splits"]["test"][f"{name}/loss"][0]
        error = ((each - images) ** 2).mean()
        assert error == pytest.approx(loss * 0.25**2, rel=0.02)
    right = np.mean(["number" not in said for said in classified])
    assert right == pytest.approx(results["splits"]["test"]["main/top_1"][0], abs=1e-6)
    # Chosen ones are those with their numbers.
    some = whole(directory, [7, 3], ())
    np.testing.assert_array_equal(some.image, images[[7, 3]])
    assert some.classified == [classified[7], classified[3]]
    with pytest.raises(ValueError, match=r"numbered 0 to 598; \[1, 100000\] are asked for"):
        whole(directory, [1, 100_000], ())


def test_reconstructions_are_drawn_a_row_for_each_run_under_each_image():
    images = np.linspace(0, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    figure = reconstructions.draw(
        {
            "a": Reconstructed(images, {"d_1": images, "d_2": images + 0.1}, ["cat", "dog"]),
            "b": Reconstructed(images, {"d_1": images}, []),
        }
    )
    assert figure.axes[0].texts[0].get_color() == "black"
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes[:4]] == [
        ["cat"], [], [], [],
    ]  # fmt: skip
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 2 * 2 * 3
    assert titles[:3] == ["input\na", "d_1\n0.0e+00", "d_2\n1.0e-02"]
    assert titles[3:6] == ["input\nb", "d_1\n0.0e+00", ""]
    shown = figure.axes[7].get_images()[0].get_array()
    np.testing.assert_array_equal(shown, images[1])


def test_what_another_run_takes_for_something_else_is_red():
    images = np.zeros((2, 4, 4, 3))
    rows = {
        "ire": Reconstructed(images, {}, ["cat (0.60)", "dog (0.50)\ncat is number 3"]),
        "sire": Reconstructed(images, {}, ["cat (0.90)", "cat (0.40)"]),
    }
    texts = [text for axes in reconstructions.draw(rows).axes for text in axes.texts]
    assert [text.get_color() for text in texts] == ["black", "black", "black", "firebrick"]


def test_what_an_image_is_taken_for_and_at_which_place_the_right_class_comes():
    shares = np.array([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3]])
    logits, labels = jnp.log(jnp.asarray(shares)), np.array([0, 1])
    assert reconstructions.classified(logits, labels, ("cat", "dog", "fox")) == [
        "cat (0.60)",
        "cat (0.50)\ndog is number 3",
    ]
    assert reconstructions.classified(logits, labels, ())[1] == "0 (0.50)\n1 is number 3"


@pytest.mark.parametrize(
    ("images", "chosen"), [("3", [0, 1, 2]), ("7,3", [7, 3]), ("5,", [5]), ("0,2", [0, 2])]
)
def test_images_are_a_number_of_them_or_their_numbers(images, chosen):
    assert reconstructions._chosen(images) == chosen


@pytest.mark.parametrize("images", ["0", "-1", "3,-1", "all", "", ","])
def test_what_is_neither_is_refused(images):
    with pytest.raises(ValueError, match=r"--images is .*; it should be how many, at least 1"):
        reconstructions._chosen(images)


def test_pixels_undo_what_the_network_sees():
    config = _config()
    config.data.update(shape=(4, 4, 3), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    raw = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.float32)
    for scale in (1 / 255, 1.0):
        config.data.scale = scale
        seen = batches.prepare(raw, config.data)
        expected = (raw * scale - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 1.0, 2.0])
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(reconstructions.pixels(seen, config.data), raw / 255, atol=1e-5)


def test_a_network_without_decoders_has_no_reconstructions(tmp_path):
    config = _config()
    config.heads.decoder.stages = ()
    directory = workdir.Workdir(str(tmp_path), config)
    directory.write_config()
    with pytest.raises(ValueError, match="has no decoder"):
        reconstructions.reconstruct(tmp_path, 1)


# ---- Gradients, computed directly.


def test_the_gradient_flow_is_that_of_each_weighted_objective():
    config = _config()
    config.heads.decoder.stages = (1,)
    parts = experiment.build(config)
    variables = random_like(parts.variables)
    state = TrainState.start(jax.random.key(0), variables, parts.rule)
    batch = {"image": normal(0, 6, 8, 8, 1), "label": jnp.arange(6, dtype=jnp.int32)}
    measure = make_gradient_flow(parts.network.apply, parts.objectives)
    weights = {"main": 1.0, "decoder_1": 0.2}

    @jax.jit
    def both(state, batch):
        def losses(params):
            outputs, _ = parts.network.apply(
                {**variables, "params": params}, batch["image"], train=True, mutable=["batch_stats"]
            )
            log_p = jax.nn.log_softmax(outputs["main"])
            found = {"main": -jnp.take_along_axis(log_p, batch["label"][:, None], 1).mean()}
            found["decoder_1"] = ((outputs["decoder_1"] - batch["image"]) ** 2).mean()
            return {name: weights[name] * loss for name, loss in found.items()}

        return measure(state, batch), jax.jacrev(losses)(state.params)

    found, gradients = both(state, batch)
    gradients["total"] = jax.tree.map(lambda *each: sum(each), *gradients.values())
    expected = {
        f"{name}/{block}": np.abs(each["backbone"][block]["unit"]["conv"]["kernel"]).mean()
        for name, each in gradients.items()
        for block in each["backbone"]
        if block.startswith("stage")
    }
    assert set(found) == set(expected)
    assert {float(each.count) for each in found.values()} == {1.0}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].mean(), value, rtol=1e-3, atol=1e-7, err_msg=name)
    assert float(found["decoder_1/stage_2_block_1"].mean()) == 0.0


def test_convolutions_are_listed_shallow_to_deep():
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernel = {"unit": {"conv": {"kernel": shape((3, 3, 1, 1)), "bias": shape((1,))}}}
    names = ["stage_1_block_1", "stage_2_block_9", "stage_2_block_10", "stage_10_block_1"]
    params = {
        "heads_decoder_1": kernel,
        "backbone": {
            **dict.fromkeys(reversed(names), kernel),
            "tail_block_1": kernel,
            "output": {"kernel": shape((2, 2))},
        },
    }
    found = convolutions(params)
    assert [path[1] for path in found] == [*names, "tail_block_1"]
    assert all(path[0] == "backbone" and path[-1] == "kernel" for path in found)


def test_convolutions_of_a_loop_are_listed_one_by_one():
    together = {"kernel": jax.ShapeDtypeStruct((2, 3, 3, 1, 1), jnp.float32)}
    alone = {"kernel": jax.ShapeDtypeStruct((3, 3, 1, 1), jnp.float32)}
    params = {"backbone": {"stage_1_block_2_to_3": together, "stage_1_block_1": alone}}
    names = ["stage_1_block_1", "stage_1_block_2", "stage_1_block_3"]
    assert convolutions(params) == [("backbone", name, "kernel") for name in names]


def test_the_gradient_flow_of_a_loop_is_that_of_each_block(monkeypatch):
    monkeypatch.setattr("sire_jax.backbones.plan.LONG", 2)
    config = _config()
    config.backbone = configuration.backbone(
        "preactivation_resnet", depth=14, width=0.25, classes=10
    )
    config.heads, config.objectives = {}, {"main": config.objectives.main}
    parts = experiment.build(config)
    state = TrainState.start(jax.random.key(0), random_like(parts.variables), parts.rule)
    batch = {"image": normal(0, 6, 8, 8, 1), "label": jnp.arange(6, dtype=jnp.int32)}
    measure = make_gradient_flow(parts.network.apply, parts.objectives)
    found = jax.eval_shape(measure, state, batch)
    assert "stage_2_block_1_to_2" in parts.variables["params"]["backbone"]
    blocks = {f"stage_{stage}_block_{block}" for stage in (2, 3, 4) for block in (1, 2)}
    assert {name.split("/")[1] for name in found} == {"stage_1_block_1", *blocks}


# ---- At chance level.


def _said(accuracy, epoch=10, split="test", images=600, classes=10, seed=0, **settings):
    defaults = {"chance_after": 10, "evaluate_every": 1, "epochs": 20, "seed": seed}
    config = SimpleNamespace(**defaults | settings)
    outputs = {"main": jax.ShapeDtypeStruct((2, classes), jnp.float32)}
    objectives = {
        "main": SimpleNamespace(output="main"),
        "decoder_1": SimpleNamespace(output="decoder_1"),
    }
    runs = SimpleNamespace(
        parts=SimpleNamespace(
            outputs=outputs, objectives=objectives, accuracy=lambda: "main/top_1"
        ),
        feed=SimpleNamespace(examples={split: np.zeros((len(accuracy), images))}),
        config=config,
    )
    return chance_messages(runs, epoch, split, {"main/top_1": np.asarray(accuracy)})


def test_runs_at_chance_level_are_named():
    # Three standard errors of 10 classes and 600 images: 0.1 + 3 sqrt(.09 / 600) = 0.1367.
    (message,) = _said([0.1, 0.9, 0.136, 0.138], seed=5)
    assert "At chance level after 10 epochs: the runs with the seeds 5, 7" in message
    assert "test accuracy of the main output is 0.1180 (guessing: 0.1000)" in message
    assert "smaller weights of decoder_1" in message
    assert _said([0.9, 0.138]) == []
    assert _said([0.1], split="train") == []
    assert _said([0.1], chance_after=0) == []
    assert _said([0.1], epoch=9) == []
    assert _said([0.1], epoch=11) == []
    # One logit has two classes.
    assert "guessing: 0.5000" in _said([0.5], classes=1)[0]


def test_it_is_said_at_the_first_measurement_after_enough_epochs():
    measured = (7, 14, 20)
    assert [len(_said([0.1], epoch=e, evaluate_every=7)) for e in measured] == [0, 1, 1]


def test_it_is_said_where_the_last_epoch_alone_is_measured():
    assert len(_said([0.1], epoch=20, evaluate_every=0)) == 1


def test_it_is_said_again_at_the_end_and_in_short_runs():
    # 20 epochs: measured after 15 and after the last.
    assert [len(_said([0.1], epoch=e, evaluate_every=15)) for e in (15, 20)] == [1, 1]
    assert [len(_said([0.1], epoch=e, epochs=3)) for e in (1, 2, 3)] == [0, 0, 1]


def test_a_run_that_does_not_learn_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, message: said.append(message))
    config = _config(seeds=2, seed=3, gradient_flow_every=0, epochs=1)
    config.optimizer.learning_rate = 0.0
    config.heads.decoder.stages = ()
    results = train.train(config, str(Path(tmp_path) / "run"))
    accuracy = np.array(results["splits"]["test"]["main/top_1"])
    images = len(load_data(experiment.build(config))[1][0].test)
    stuck = [3 + i for i, a in enumerate(accuracy) if a <= 0.1 + 3 * np.sqrt(0.09 / images)]
    # Parameters never move, and batch statistics hardly: it guesses.
    assert stuck
    message = said[-1]
    assert len([each for each in said if not each.startswith("First step")]) == 1
    assert message.startswith("At chance level after 1 epoch: the runs with the")
    assert f"seeds {', '.join(map(str, stuck))}, whose" in message


def test_gradients_of_a_network_without_convolutions_are_not_measured(tmp_path):
    path = programs.TINY.removeprefix("--config=")
    config = configuration.load(path, ["--config.gradient_flow_every=2"])
    with pytest.raises(ValueError, match=r"gradient_flow_every is 2, but .* no convolution"):
        train.train(config, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    # One that was trained nonetheless, by a former version, can still be opened.
    assert Runs(experiment.build(config)).feed.names["label"] == tuple("0123456789")
