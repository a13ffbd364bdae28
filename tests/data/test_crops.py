from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sire_jax import configuration, inspect
from sire_jax.configuration import experiment, head, objective, prediction
from sire_jax.data import crops
from sire_jax.data.augmentation import RandomCrop
from sire_jax.runs.loading import load_data
from sire_jax.runs.runs import Runs

few = settings(max_examples=25, deadline=None)


def _places(height, width, *examples):
    """Images whose pixels are their row and column."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    return np.broadcast_to(grid.astype(np.float32), (*examples, height, width, 2))


def _start(square, mirrored=False):
    """The row and column that a square of `_places` starts at; all of its pixels are checked."""
    square = np.asarray(square)[:, ::-1] if mirrored else np.asarray(square)
    side = len(square)
    assert square.shape == (side, side, 2)
    assert np.array_equal(square - square[0, 0], _places(side, side))
    return tuple(square[0, 0].astype(int).tolist())


@pytest.mark.parametrize(
    ("shape", "side", "start"),
    [((6, 6), 4, (1, 1)), ((5, 8), 4, (0, 2)), ((4, 7), 4, (0, 1)), ((3, 3), 3, (0, 0))],
)
def test_the_central_crop_is_in_the_centre(shape, side, start):
    assert _start(crops.central(_places(*shape), side)) == start
    pairs = crops.central(_places(*shape, 3, 2), side)
    assert pairs.shape == (3, 2, side, side, 2)
    assert _start(pairs[2, 1]) == start


def test_ten_crops_are_corners_centre_and_their_mirror_images():
    ten = crops.ten(_places(6, 9, 3), 4)
    assert ten.shape == (3, 10, 4, 4, 2)
    expected = [(0, 0), (0, 5), (2, 0), (2, 5), (1, 2)]
    assert [_start(each) for each in ten[2, :5]] == expected
    assert [_start(each, mirrored=True) for each in ten[2, 5:]] == expected
    # The upper right pixel of the image is the first of the mirrored upper right crop.
    assert ten[0, 6, 0, 0].tolist() == [0, 8]
    pairs = crops.ten(_places(6, 9, 3, 2), 4)
    assert pairs.shape == (3, 10, 2, 4, 4, 2)
    assert np.array_equal(pairs[1, :, 1], ten[1])


@few
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**31))
def test_random_crops_are_squares_of_the_image(side, more, wider, seed):
    image = jnp.asarray(_places(side + more, side + wider, 6, 2))
    batch = {"image": image, "label": jnp.arange(6)}
    cropped = RandomCrop(side)(jax.random.key(seed), batch)
    assert cropped["image"].shape == (6, 2, side, side, 2)
    assert np.array_equal(cropped["label"], batch["label"])
    for square in cropped["image"].reshape(12, side, side, 2):
        row, column = _start(square)
        assert (row, column) == (min(row, more), min(column, wider))


def test_every_place_is_as_likely_and_the_key_decides():
    batch = {"image": jnp.asarray(_places(4, 5, 600, 2))}
    crop = jax.jit(RandomCrop(3))
    cropped = crop(jax.random.key(0), batch)["image"]
    starts = np.array([_start(each) for each in cropped.reshape(1200, 3, 3, 2)])
    counts = np.bincount(starts[:, 0] * 3 + starts[:, 1], minlength=6)
    # 200 +- 13 each, images of a pair apart from each other.
    assert counts.shape == (6,)
    assert counts.min() > 150
    assert counts.max() < 250
    assert (starts[::2] != starts[1::2]).any(1).sum() > 400
    assert np.array_equal(crop(jax.random.key(0), batch)["image"], cropped)
    assert not np.array_equal(crop(jax.random.key(1), batch)["image"], cropped)


def test_outputs_are_averaged_over_the_crops_of_each_example():
    def apply(variables, image, train):
        assert image.shape == (20, 3, 3, 2)
        assert not train
        return {"sums": variables["w"] * image.sum((1, 2)), "each": image[:, :2, 0, :]}

    image = jax.random.normal(jax.random.key(0), (2, 10, 3, 3, 2))
    outputs = crops.averaged(apply)({"w": 3.0}, image, train=False)
    assert outputs["sums"].shape == (2, 2)
    assert np.allclose(outputs["sums"], 3 * np.asarray(image).sum((2, 3)).mean(1), atol=1e-5)
    assert np.allclose(outputs["each"], np.asarray(image)[:, :, :2, 0].mean(1), atol=1e-6)


# A network that tells digits apart by squares of 5 x 5, with an exit and a prediction rule.
def _config(**data):
    config = configuration.default()
    config.devices = 1
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(3,))
    config.heads.exit_1 = head("classifier", endpoints=("block_1",), classes=10)
    config.objectives.main = objective("main", "label", "cross_entropy")
    config.objectives.exit_1 = objective("exit_1", "label", "cross_entropy", 0.5)
    config.predictions.chosen = prediction("output", output="exit_1")
    config.data.update({"crop": 5, **data})
    return config


def _digits(parts, number):
    dataset, _ = load_data(parts)
    arrays = jax.tree.map(jnp.asarray, parts.task.prepare(dataset.test))
    return arrays, jnp.arange(number), dataset.test


def test_the_network_sees_the_cropped_side():
    for ten_crop in (False, True):
        parts = experiment.build(_config(ten_crop=ten_crop))
        assert parts.batch["image"].shape == (2, 5, 5, 1)
        assert {k: x.shape for k, x in parts.outputs.items()} == {
            "main": (2, 10),
            "exit_1": (2, 10),
        }
    cost = [
        inspect.inspect(_config(**data))["multiply_adds"]
        for data in ({}, {"ten_crop": True}, {"crop": 0, "shape": (5, 5, 1)})
    ]
    assert cost[0] == cost[1] == cost[2]


def test_training_sees_random_crops_and_evaluation_the_central_one():
    parts = experiment.build(_config())
    arrays, examples, source = _digits(parts, 40)
    batch = parts.lookup(arrays, examples)
    assert batch["image"].shape == (40, 8, 8, 1)
    central = parts.lookup(arrays, examples, "measured")
    assert np.allclose(central["image"], source.image[:40, 1:6, 1:6] / 255)
    assert np.array_equal(central["label"], batch["label"])
    seen = parts.augment(jax.random.key(0), batch)["image"]
    whole = np.asarray(batch["image"])
    starts = [(i, j) for i in range(4) for j in range(4)]
    squares = np.stack([whole[:, i : i + 5, j : j + 5] for i, j in starts])
    found = (squares == np.asarray(seen)[None]).all((2, 3, 4))
    assert found.any(0).all()
    assert found.any(1).sum() > 10


def test_crops_come_ahead_of_the_augmentations_whatever_their_name():
    plain = _config().to_dict()
    mine = {"name": "sire_jax.data.augmentation:Flip", "probability": 1.0}
    parts = experiment.build(ConfigDict({**plain, "augmentation": {"random_crop": mine}}))
    batch = {"image": jnp.asarray(_places(8, 8, 3))}
    for square in parts.augment(jax.random.key(0), batch)["image"]:
        _start(square, mirrored=True)


def test_pairs_are_cropped_after_downscaling():
    config = configuration.load(
        f"{configuration.repository_configs()}/pairs.py:shared", ["--config.data.crop=12"]
    )
    assert experiment.build(config).batch["image"].shape == (2, 2, 12, 12, 1)
    for crop in (15, 28):
        config.data.crop = crop
        with pytest.raises(ValueError, match=rf"crop is {crop}, but images are 14 x 14.*most 14"):
            experiment.build(config)


@pytest.mark.optax_dtypes
def test_ten_crops_are_the_mean_of_ten_evaluations():
    config = _config(ten_crop=True)
    # Of 599 test images, the last batch is not full.
    config.evaluate_batch_size = 100
    parts = experiment.build(config)
    runs = Runs(parts)
    state = runs.initial()
    found = runs.measure(state.params, state.model_state, "test")

    dataset, _ = load_data(parts)
    variables = jax.tree.map(lambda x: x[0], state.variables)
    apply = jax.jit(parts.network.apply)
    image, label = dataset.test.image.astype(np.float32) / 255, dataset.test.labels["label"]
    logits = {"main": 0.0, "exit_1": 0.0}
    for i, j in ((0, 0), (0, 3), (3, 0), (3, 3), (1, 1)):
        square = image[:, i : i + 5, j : j + 5]
        for each in (square, square[:, :, ::-1]):
            logits = {k: logits[k] + np.asarray(x) / 10 for k, x in apply(variables, each).items()}
    for name in ("main", "exit_1"):
        right = logits[name].argmax(-1) == label
        assert found[f"{name}/top_1"][0] == pytest.approx(right.mean(), abs=2 / len(label))
        exponents = np.exp(logits[name] - logits[name].max(-1, keepdims=True))
        chosen = exponents[np.arange(len(label)), label] / exponents.sum(-1)
        assert found[f"{name}/loss"][0] == pytest.approx(-np.log(chosen).mean(), rel=1e-5)
    # The prediction rule reads the mean logits, too.
    for metric in ("top_1", "loss"):
        assert found[f"chosen/{metric}"][0] == pytest.approx(found[f"exit_1/{metric}"][0], rel=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"crop": 9}, "data.crop is 9, but images are 8 x 8; it should be at most 8, or 0"),
        ({"crop": -1}, "data.crop is -1; it should be at least 0"),
        ({"crop": 7, "shape": (8, 6, 1)}, "crop is 7, but images are 8 x 6.*at most 6"),
        ({"crop": 0, "ten_crop": True}, r"8 x 8; config.data.crop is 0. Set it to 1\.\.7"),
        ({"crop": 8, "ten_crop": True}, r"smaller than the images.*crop is 8. Set it to 1\.\.7"),
    ],
)
def test_crops_that_do_not_fit_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(_config(**data))


def test_a_crop_of_the_whole_image_is_the_image():
    parts = experiment.build(_config(crop=8))
    arrays, examples, _ = _digits(parts, 3)
    batch = parts.lookup(arrays, examples)
    for same in (
        parts.lookup(arrays, examples, "measured"),
        parts.augment(jax.random.key(0), batch),
    ):
        assert np.array_equal(same["image"], batch["image"])


def test_ten_crops_of_outputs_that_do_not_classify_are_refused():
    config = configuration.load(f"{configuration.repository_configs()}/sire.py:cnn")
    config.data.crop = 16
    assert experiment.build(config).outputs["decoder_1"].shape == (2, 16, 16, 3)
    config.data.ten_crop = True
    with pytest.raises(ValueError, match=r"ten_crop averages logits, but the output 'decoder_1'"):
        experiment.build(config)
    bare = configuration.load(f"{configuration.repository_configs()}/sire.py:cnn_base")
    bare.data.update(crop=16, ten_crop=True)
    experiment.build(bare)


def test_without_crops_the_programs_are_those_without_the_setting():
    parts = experiment.build(_config(crop=0))
    arrays, examples, _ = _digits(parts, 4)
    training, measuring = (
        str(jax.make_jaxpr(partial(parts.lookup, crop=crop))(arrays, examples))
        for crop in ("none", "measured")
    )
    assert training == measuring
    batch = parts.lookup(arrays, examples)
    assert not jax.make_jaxpr(parts.augment)(jax.random.key(0), batch).jaxpr.eqns
