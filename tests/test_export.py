"""Files of one output each: what is in them, what comes out of them, and what is refused."""

import re

import exiting
import jax
import numpy as np
import pytest
from planned import random_like

from sire_jax import configuration, export, traced
from sire_jax.configuration import experiment
from sire_jax.inference import exported
from sire_jax.job import command
from sire_jax.runs import trained
from sire_jax.runs.loading import load_data
from sire_jax.runs.trained import kept_weights, open_run, restore

pytestmark = pytest.mark.optax_dtypes
CONFIGS = configuration.repository_configs()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    exiting.trained(directory, seed=7, seeds=2, epochs=3)
    runs = open_run(directory)
    return directory, runs, kept_weights(runs, directory)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "exit_5.npz"
    return path, export.export(run[0], "5", path, seed=8)


def _variables(run, seed):
    _, _, kept = run
    return jax.tree.map(lambda x: x[seed - 7], kept.variables)


@pytest.fixture(scope="module")
def whole(run):
    """The whole network, jitted, on the images that evaluation looks up."""
    parts = run[1].parts

    @jax.jit
    def outputs(variables, images):
        arrays = {"image": images, "label": np.zeros(len(images), np.int32)}
        batch = parts.lookup(arrays, np.arange(len(images)))
        return parts.network.apply(variables, batch["image"])

    return outputs


def _images(runs, number=23):
    return load_data(runs.parts)[0].test.image[:number]


def _arrays(path):
    with np.load(path, allow_pickle=False) as found:
        return {key: found[key] for key in found.files}


def test_a_prediction_is_that_of_the_whole_network_bit_for_bit(run, written, whole, tmp_path):
    parts, images, variables = run[1].parts, _images(run[1]), _variables(run, 8)
    paths = exported.paths(variables)
    stored = {path: np.asarray(paths[path]) for path in exported.needed(parts, "main")}
    exported.save(tmp_path / "main.npz", parts.config, "main", stored)
    expected = whole(variables, images)
    for path, output in ((written[0], "exit_5"), (tmp_path / "main.npz", "main")):
        model = exported.load(path)
        assert model.output == output
        logits = model.logits(images)
        assert logits.dtype == np.float32
        assert np.array_equal(logits, expected[output])
        probabilities = model(images)
        assert np.array_equal(probabilities, jax.jit(jax.nn.softmax)(logits))
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)


def test_the_weights_are_the_best_on_validation(run, written):
    _, runs, kept = run
    assert hasattr(kept, "score")
    state, _ = restore(runs, run[0] / "checkpoints")
    stored = _arrays(written[0])["params/heads_exit_5/output/kernel"]
    assert np.array_equal(stored, kept.params["heads_exit_5"]["output"]["kernel"][1])
    if kept.step[1] != state.step[1]:
        assert not np.array_equal(stored, state.params["heads_exit_5"]["output"]["kernel"][1])


def test_a_file_holds_only_what_its_output_is_computed_from(run, written):
    path, summary = written
    stored = _arrays(path)
    assert {str(stored.pop(key)) for key in ("format", "output")} == {exported.FORMAT, "exit_5"}
    config = configuration.from_json(str(stored.pop("config")))
    assert configuration.differences(config, run[1].config) == []
    blocks = ["stage_1_block_1", "stage_1_block_2", "stage_2_block_1"]
    expected = {"params/heads_exit_5/output/kernel", "params/heads_exit_5/output/bias"}
    for block in blocks:
        expected |= {key for key in stored if key.startswith(f"params/backbone/{block}/")}
        expected |= {f"batch_stats/backbone/{block}/unit/norm/{key}" for key in ("mean", "var")}
    assert set(stored) == expected
    params = run[1].parts.variables["params"]
    chosen = {"heads_exit_5": params["heads_exit_5"]}
    counted = traced.size(chosen) + sum(traced.size(params["backbone"][b]) for b in blocks)
    assert summary["parameters"] == counted
    assert summary["whole"]["parameters"] == traced.size(params)
    # Convolutions of 1 to 3, 3 to 4 and 4 to 5 channels, and the classifier.
    assert summary["multiply_adds"] == 64 * 9 * (3 + 12) + 16 * 9 * 20 + 50
    assert summary["multiply_adds"] < summary["whole"]["multiply_adds"]
    assert summary["bytes"] == path.stat().st_size


def test_the_program_says_what_it_wrote(run, whole, tmp_path, capsys):
    path = tmp_path / "small.npz"
    export.main([f"--workdir={run[0]}", "--exit=3", f"--out={path}"])
    said = capsys.readouterr().out
    assert f"{path}: the output 'exit_3', {path.stat().st_size:,} bytes" in said
    assert re.search(r"\n  \d+ parameters, \d+\.\d% of the whole network's\n", said)
    assert re.search(r"\n  [\d,]+ multiply-adds an image, \d+\.\d% of the whole", said)
    lines = said.splitlines()[-3:]
    assert lines[0] == "import sire_jax as sj"
    # The three lines work as they are; it is the first seed's network.
    names = {"images": _images(run[1])}
    exec("\n".join(lines), names)
    logits = whole(_variables(run, 7), names["images"])["exit_3"]
    assert np.array_equal(names["probabilities"], jax.jit(jax.nn.softmax)(logits))
    with pytest.raises(SystemExit) as stopped:
        export.main([f"--workdir={run[0]}", "--exit=3", f"--out={path}"])
    assert stopped.value.code == command.EXPLAINED
    assert re.search(r"^Error: .*small.npz exists; choose another --out", capsys.readouterr().err)


def test_the_best_on_validation_is_the_most_accurate_exit(run, whole, tmp_path, capsys):
    _, runs, _ = run
    # By hand: the whole network on the images held out.
    arrays, examples = runs.feed.arrays, runs.feed.examples["validation"][1]
    images, labels = np.asarray(arrays["image"])[examples], np.asarray(arrays["label"])[examples]
    logits = whole(_variables(run, 8), images)
    right = {k: float((np.argmax(each, -1) == labels).mean()) for k, each in logits.items()}
    export.main([f"--workdir={run[0]}", "--exit=best", f"--out={tmp_path / 'b.npz'}", "--seed=8"])
    said = capsys.readouterr().out
    for output, accuracy in right.items():
        assert re.search(rf"\| {output} +\| {accuracy:.4f} +\|", said)
    best = max(right, key=right.get)
    assert f"b.npz: the output '{best}'" in said
    assert exported.load(tmp_path / "b.npz").output == best


def test_of_equally_good_exits_the_cheapest_is_the_best(run):
    assert export._best(run[1], {"main": 0.5, "exit_5": 0.5, "exit_3": 0.25}) == "exit_5"


def test_nothing_is_chosen_without_images_held_out(run, monkeypatch):
    _, runs, kept = run
    none = {**runs.feed.examples, "validation": runs.feed.examples["validation"][:, :0]}
    monkeypatch.setattr(runs.feed, "examples", none)
    with pytest.raises(ValueError, match=r"no validation images .* name an output, or train with"):
        export.validated(runs, kept, 0)


def test_only_the_exported_run_may_not_have_diverged(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "diverged", lambda _: [3, None])
    export.export(run[0], "5", tmp_path / "other.npz", seed=8)
    with pytest.raises(ValueError, match=r"seed 7 in .* diverged after 3 steps"):
        export.export(run[0], "5", tmp_path / "broken.npz", seed=7)


def test_what_does_not_exist_is_refused(run, tmp_path):
    parts = run[1].parts
    for name, message in [
        ("exit_4", r"called 'exit_4'. Did you mean 'exit_[35]'\? Known: exit_3, exit_5, main\."),
        ("40", r"called '40'. Did you mean 'exit_5'\?"),
        ("mian", r"called 'mian'. Did you mean 'main'\?"),
        ("1", r"called '1'. Did you mean 'exit_3'\?"),
    ]:
        with pytest.raises(ValueError, match=message):
            export.find_output(parts, name)
    with pytest.raises(ValueError, match=r"--seed is 0; the run has the seeds 7 to 8"):
        export.export(run[0], "5", tmp_path / "a.npz", seed=0)
    with pytest.raises(FileNotFoundError, match="no directory"):
        export.export(run[0], "5", tmp_path / "nowhere" / "a.npz")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        exported.load(tmp_path / "a.npz")
    assert list(tmp_path.glob("[!.]*")) == []


def test_an_output_without_labels_is_refused():
    parts = experiment.build(configuration.load(f"{CONFIGS}/sire.py:cnn"))
    with pytest.raises(ValueError, match="'decoder_1' has no objective on labels to classify"):
        export.find_output(parts, "decoder_1")
    # Its number is that of no output that classifies.
    with pytest.raises(ValueError, match="No output that classifies is called '1'"):
        export.find_output(parts, "1")


def test_a_number_that_several_outputs_end_with_is_refused():
    config = exiting.config()
    config.heads.other_5 = config.heads.exit_5
    config.objectives.other_5 = configuration.objective("other_5", "label", "cross_entropy")
    parts = experiment.build(config)
    with pytest.raises(ValueError, match="Several outputs end with 5: exit_5, other_5; name one"):
        export.find_output(parts, "5")


def test_images_of_another_shape_or_dtype_are_refused(written):
    model = exported.load(written[0])
    good = np.zeros((2, 8, 8, 1), np.uint8)
    assert model(good).shape == (2, 10)
    for images in (
        good.astype(np.float32),
        good[..., 0],
        good[:, :7],
        good[0],
        good[:0],
        good.repeat(3, -1),
    ):
        with pytest.raises(ValueError, match=r"they should be uint8 \[b, 8, 8, 1\]"):
            model(images)


def test_damaged_and_foreign_files_are_refused(written, tmp_path):
    path = tmp_path / "file.npz"

    def refused(contents, message):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=message) as stopped:
            exported.load(path)
        assert "file.npz" in str(stopped.value)

    whole = written[0].read_bytes()
    for share in (0.0, 0.1, 0.5, 0.99):
        refused(whole[: int(len(whole) * share)], "is damaged, or holds no arrays")
    # A byte in the middle of an array: the archive's check sums tell.
    at = whole.index(b"params/") + 600
    refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "is damaged")
    refused(b"no archive at all", "it is no npz archive")
    np.save(tmp_path / "array.npy", np.zeros(3))
    refused((tmp_path / "array.npy").read_bytes(), "it is no npz archive")

    def changed(message, **arrays):
        kept = {**_arrays(written[0]), **arrays}
        np.savez(path, **{key: value for key, value in kept.items() if value is not None})
        refused(path.read_bytes(), message)

    kernel = "params/heads_exit_5/output/kernel"
    changed("it has no format", format=None)
    changed("it has no format", format=np.array("another"))
    changed("is damaged, or holds no arrays: Object arrays", extra=np.array([{}], object))
    changed(f"lacks {kernel}", **{kernel: None})
    changed("has params/more, which is not needed", **{"params/more": np.zeros(2, np.float32)})
    changed(r"is float32 \(2, 2\), not float32 \(5, 10\)", **{kernel: np.zeros((2, 2), np.float32)})
    changed("is float64", **{kernel: np.zeros((5, 10))})
    changed("has no output 'exit_6'. Did you mean", output=np.array("exit_6"))
    changed("can't be used", config=np.array("{}"))
    changed("The config of .* can't be read as JSON: Expecting", config=np.array("{"))


def test_an_output_of_pairs_and_one_logit(tmp_path):
    config = configuration.load(f"{CONFIGS}/quickstart.py")
    parts = experiment.forward(config)
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 1), dtype=np.uint8)
    variables = random_like(parts.variables)
    whole = jax.jit(parts.apply)(variables, images)
    for name, shape in (("main", (3, 2)), ("digits", (3, 2, 10))):
        paths = exported.needed(parts, name)
        stored = {path: np.asarray(exported.paths(variables)[path]) for path in paths}
        exported.save(tmp_path / name, config, name, stored)
        model = exported.load(tmp_path / name)
        assert model(images).shape == shape
        if name == "digits":
            assert np.array_equal(model.logits(images), whole[name])
    # One logit is the second of two classes, with a first logit of 0.
    main = exported.load(tmp_path / "main")
    assert np.array_equal(main.logits(images)[:, 1:], whole["main"])
    np.testing.assert_allclose(main(images)[:, 1:], jax.nn.sigmoid(whole["main"]), rtol=1e-5)


def test_half_precision_parameters_are_kept():
    half = np.arange(3).astype(jax.numpy.bfloat16)
    assert np.array_equal(exported.typed(half.view("V2"), half.dtype), half)
    assert exported.typed(np.ones(3, np.float32), half.dtype).dtype == np.float32
