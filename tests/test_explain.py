"""What a network says of an image and why: maps, and the program, on bundled digits."""

import json
import re
import shutil
import warnings

import exiting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from pictured import picture
from PIL import Image

from sire_jax import configuration, explain, train
from sire_jax.data import sources
from sire_jax.data.records import open_records
from sire_jax.data.stream import Transform, batches
from sire_jax.diagnostics import activation_maps
from sire_jax.heads import HEADS
from sire_jax.runs.trained import kept_weights, of_first_seed, open_run

pytestmark = pytest.mark.optax_dtypes
NAMES = tuple("0123456789")
# Odd and even; by thirds.
GROUPS = {"parity": (0, 1) * 5, "thirds": (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)}
CONVOLUTION = {"name": "convolution", "width": 4}


def _bare():
    made = exiting.config(epochs=1)
    made.backbone = ConfigDict({"name": "planned:pooled", "classes": 10})
    made.heads = ConfigDict()
    made.objectives = ConfigDict({"main": made.objectives.main})
    return made


def _config():
    """One branch straight at an endpoint, one behind layers of its own and a pool."""
    made = _bare()
    for i, (target, assignment) in enumerate(GROUPS.items()):
        layers = (CONVOLUTION, {"name": "global_pool"}, {"name": "dense", "width": 3})[: 3 * i]
        number = max(assignment) + 1
        made.heads[target + "_branch"] = configuration.head(
            "branch", position="stage_1", classes=number, layers=layers
        )
        made.objectives[target + "_branch"] = configuration.objective(
            target + "_branch", target, "cross_entropy", 0.5
        )
        made.data.groups[target] = configuration.grouping("", number)
        made.data.groups[target].update(classes=NAMES, assignment=assignment)
    made.predictions.joint = configuration.prediction("joint_probability", eta=0.5)
    return made


def _train(config, path):
    with jax.numpy_dtype_promotion("standard"):
        train.train(config, str(path))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("explained")
    _train(_config(), path)
    return path


@pytest.fixture(scope="module")
def opened(workdir):
    run = open_run(workdir)
    variables = of_first_seed(kept_weights(run, workdir))
    images = run.parts.lookup(run.feed.arrays, run.feed.examples["test"][0][:5], "central")["image"]
    return run, variables, images


def _size(path):
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture
def digit(opened, tmp_path):
    """Writes a test digit as a PNG file."""
    run = opened[0]
    path = tmp_path / "digit.png"
    pixels = np.asarray(run.feed.arrays["image"])[np.asarray(run.feed.examples["test"])[0, 0]]
    Image.fromarray(pixels[..., 0]).save(path)
    return path


def test_a_map_of_mean_features_is_the_class_activation_map(opened):
    run, variables, images = opened
    classes = jnp.array([0, 1, 1, 0, 1])
    found = activation_maps.activation_maps(
        run.parts, variables, images, {"parity_branch": classes, "main": 3 * classes}
    )
    _, endpoints = run.parts.network.backbone.clone(endpoints=None).apply(
        {kind: tree["backbone"] for kind, tree in variables.items()}, images
    )
    params = variables["params"]
    for output, module, features, chosen in (
        ("parity_branch", "heads_parity_branch", endpoints["stage_1"], classes),
        ("main", "backbone", endpoints["stage_2"], 3 * classes),
    ):
        weights = np.asarray(params[module]["output"]["kernel"])[:, np.asarray(chosen)].T
        expected = (np.asarray(features) * weights[:, None, None]).sum(-1)
        np.testing.assert_allclose(found[output], expected, rtol=1e-4, atol=1e-5)
        # Their mean is the logit, without the bias.
        logits = run.parts.network.apply(variables, images)[output]
        bias = np.asarray(params[module]["output"]["bias"])
        right = np.take_along_axis(np.asarray(logits) - bias, np.asarray(chosen)[:, None], 1)
        np.testing.assert_allclose(found[output].mean((1, 2)), right[:, 0], rtol=1e-3, atol=1e-4)


def test_a_map_through_dense_layers_weighs_features_by_their_gradient(opened):
    run, variables, images = opened
    chosen = jnp.array([0, 1, 2, 0, 1])
    (found,) = activation_maps.activation_maps(
        run.parts, variables, images, {"thirds_branch": chosen}
    ).values()
    params = jax.tree.map(np.asarray, variables["params"]["heads_thirds_branch"])
    # By hand: the branch's convolution, then its dense layer and output on mean features.
    convolution = run.parts.network.heads["thirds_branch"].layers[0]
    own = {k: tree["heads_thirds_branch"]["layer_1"] for k, tree in variables.items()}
    _, endpoints = run.parts.network.backbone.clone(endpoints=None).apply(
        {kind: tree["backbone"] for kind, tree in variables.items()}, images
    )
    features = np.asarray(convolution.apply(own, endpoints["stage_1"], None, train=False))
    dense, output = params["layer_3"]["dense"], params["output"]
    active = features.mean((1, 2)) @ dense["kernel"] + dense["bias"] > 0
    slope = (active * output["kernel"].T[np.asarray(chosen)]) @ dense["kernel"].T
    expected = (features * slope[:, None, None]).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_explanation_is_what_the_outputs_say(opened):
    run, variables, images = opened
    explained = activation_maps.explain(run.parts, variables, images)
    outputs = run.parts.network.apply(variables, images)
    joint = np.exp(run.parts.predictions["joint"](outputs))
    for i, each in enumerate(explained):
        assert each.label == joint[i].argmax()
        assert each.probability == pytest.approx(joint[i].max(), rel=1e-5)
        assert list(each.maps) == ["parity_branch", "thirds_branch", "main"]
        for name in each.groups:
            probabilities = np.asarray(jax.nn.softmax(outputs[name][i]))
            assert each.groups[name] == probabilities.argmax()
            assert each.group_probability[name] == pytest.approx(probabilities.max(), rel=1e-5)


def test_an_output_of_several_others_has_no_map(opened):
    parts = opened[0].parts
    network = parts.network.clone(heads={"both": HEADS["combination"](("main", "pooled"), 10)})
    stripped = type("Parts", (), {"network": network})
    with pytest.raises(ValueError, match="'both' has no activation map: it is not computed from"):
        activation_maps.layer_of(stripped, "both")


def test_the_program_explains_an_image(workdir, opened, digit, tmp_path, capsys):
    out = tmp_path / "maps.png"
    arguments = [f"--workdir={workdir}", f"--image={digit}", f"--out={out}"]
    explain.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    run, variables, images = opened
    (expected,) = activation_maps.explain(run.parts, variables, images[:1])
    assert found["class"] == str(expected.label)
    assert found["probability"] == pytest.approx(expected.probability, rel=1e-5)
    assert found["resized"] == ""
    for name, target in (("parity_branch", "parity"), ("thirds_branch", "thirds")):
        group = expected.groups[name]
        labels = [label for label, g in zip(NAMES, GROUPS[target], strict=True) if g == group]
        assert found["branches"][name]["labels"] == labels
        assert found["branches"][name]["contains"] == (found["class"] in labels)
    assert _size(out)[0] > 500
    explain.main(arguments)
    text = capsys.readouterr().out
    assert text.startswith(f"{found['class']}  (probability 0.")
    each = found["branches"]["thirds_branch"]
    contains = "contains" if each["contains"] else "does NOT contain"
    assert f"thirds_branch: {', '.join(each['labels'])}\n" in text
    assert f"probability {each['probability']:.3f}; {contains} {found['class']}\n" in text


def test_the_maps_of_test_images_are_drawn_beside_a_bare_network(workdir, tmp_path, capsys):
    activation_maps.main(
        [
            f"--workdir={workdir}",
            # Any run on the same images: only its main output is shown.
            f"--bare={workdir}",
            "--images=2",
            f"--out={tmp_path / 'maps.png'}",
        ]
    )
    assert "where each output finds its class" in capsys.readouterr().out
    width, height = _size(tmp_path / "maps.png")
    # Image, two branches, main, and the bare network's.
    assert width / 5 == pytest.approx(2.1 * 130, rel=0.01)
    assert height > 2 * 200
    activation_maps.main([f"--workdir={workdir}", f"--out={tmp_path / 'maps.png'}", "--json"])
    texts = json.loads(capsys.readouterr().out)
    assert len(texts) == 4
    assert list(texts[0])[::3] == ["image", "main"]
    assert re.fullmatch(r"\d+% by '\w+'\n\w+", texts[0]["main"])
    with pytest.raises(SystemExit):
        activation_maps.main([f"--workdir={workdir}", "--images=0"])
    assert "--images is 0; it should be at least 1" in capsys.readouterr().err


def _data(shape, resize=0):
    data = configuration.default().data
    data.update(shape=shape, resize=resize)
    return data


def test_an_image_of_another_size_is_cropped_and_resized(tmp_path):
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 12:28] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found, note = explain.read_image(tmp_path / "wide.png", _data((5, 5, 3)))
    assert note == "cropped and resized from 40 x 10 pixels"
    # Only the red square in the middle is left.
    np.testing.assert_array_equal(found, np.broadcast_to((255, 0, 0), (5, 5, 3)))
    found, note = explain.read_image(tmp_path / "wide.png", _data((10, 40, 3)))
    assert note == ""
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "1"])
@pytest.mark.parametrize("channels", [3, 1])
def test_an_image_is_what_training_and_evaluation_make_of_it(tmp_path, mode, channels):
    """A photograph, turned, of another size and in any colours, as both feeds read it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kind = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
    for split, number in (("train", 2), ("test", 1)):
        for i, name in enumerate(("ape", "bee")):
            for k in range(number):
                path = tmp_path / "pets" / split / name / f"{k}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(4 * i + k, 30, 23)).convert(mode).save(path, exif=exif)
    with warnings.catch_warnings():
        # One training image a class is few.
        warnings.simplefilter("ignore", UserWarning)
        loaded = sources.load("folder:pets", str(tmp_path), resize=12, channels=channels)
        records = open_records("folder:pets", str(tmp_path), channels=channels).test
    transform = Transform((12, 12, channels), resize=12)
    (streamed,) = batches(records, np.arange(2)[None], transform, (0,))
    for i in range(2):
        found, note = explain.read_image(records.splits[0].path(i), _data((12, 12, channels), 12))
        np.testing.assert_array_equal(found, loaded.test.image[i])
        np.testing.assert_array_equal(found, streamed.arrays["image"][i])
        # Turned: 30 high and 23 wide as it is stored.
        assert note.startswith("cropped and resized from 30 x 23 pixels, as in training")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", r"There is no image .*none\.png"),
        ("text.png", r"text\.png is damaged: its 12 bytes are no image of a known format"),
        ("cut.png", r"cut\.png is damaged: .*truncated"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, name, message, digit):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(digit.read_bytes()[:-30])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        explain.read_image(tmp_path / name, _data((8, 8, 1)))


def test_the_program_needs_no_data_and_says_the_names_of_the_run(
    workdir, digit, tmp_path, monkeypatch, capsys
):
    run = shutil.copytree(workdir, tmp_path / "run")
    described = json.loads((run / "data.json").read_text())
    described["classes"]["label"] = [f"class {i}" for i in range(10)]
    (run / "data.json").write_text(json.dumps(described))
    monkeypatch.setattr("sire_jax.runs.on_device.load_data", None)
    monkeypatch.setattr("sire_jax.runs.streamed.load_data", None)
    # Two dollar signs are a formula to who draws.
    odd = digit.rename(tmp_path / "$a$_$.png")
    arguments = [f"--workdir={run}", f"--image={odd}", f"--out={tmp_path / 'maps.png'}", "--json"]
    explain.main(arguments)
    assert json.loads(capsys.readouterr().out)["class"].startswith("class ")
    assert _size(tmp_path / "maps.png")[0] > 500


def test_the_program_refuses_before_it_works(workdir, digit, tmp_path, capsys):
    for wrong, message in (
        ([f"--out={tmp_path}/none/maps.png", f"--image={digit}"], "There is no directory"),
        ([f"--image={tmp_path}/none.png"], "There is no image"),
    ):
        with pytest.raises(SystemExit) as ended:
            explain.main([f"--workdir={workdir}", *wrong])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
