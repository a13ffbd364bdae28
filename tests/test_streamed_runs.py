"""Runs whose images are streamed, beside the same runs with all images on the device."""

from pathlib import Path

import chex
import jax
import numpy as np
import programs
import pytest
from ml_collections import ConfigDict
from pictured import picture, write, write_folder

from sire_jax import configuration, evaluate, train
from sire_jax.configuration import experiment
from sire_jax.runs.on_device import DeviceFeed
from sire_jax.runs.runs import Runs
from sire_jax.runs.streamed import StreamFeed, ahead
from sire_jax.runs.trained import restore
from sire_jax.storage.workdir import read_metrics, read_results

pytestmark = pytest.mark.optax_dtypes


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An image folder ``pets`` of three classes: 45 images and 15 for the test."""
    root = tmp_path_factory.mktemp("sets")
    write_folder(root / "pets", {"train": 15, "test": 5})
    return str(root)


def _config(directory, feed, **settings):
    made = configuration.default()
    made.update(name="pets", epochs=2, batch_size=8, devices=1, evaluate_batch_size=4)
    made.data.update(name="folder:pets", dir=directory, cache="", shape=(4, 6, 3), feed=feed)
    made.data.classes = ConfigDict({"label": 3})
    made.data.task.validation_per_class = 2
    made.evaluate_splits = ("train", "validation", "test")
    made.augmentation.flip = configuration.augmentation("flip")
    made.backbone = ConfigDict({"name": "devices_program:Dense"})
    made.backbone.classes = 3
    made.objectives.main = configuration.objective("main", "label", "cross_entropy")
    made.optimizer = configuration.optimizer("sgd", learning_rate=0.05, momentum=0.9)
    made.update(settings)
    return made


def _runs(directory, feed, **settings):
    return Runs(experiment.build(_config(directory, feed, **settings)))


def test_both_feeds_give_the_same_batches_for_the_same_seed(directory):
    runs, streamed = _runs(directory, "device"), _runs(directory, "stream")
    assert type(runs.feed) is DeviceFeed
    assert type(streamed.feed) is StreamFeed
    assert runs.feed.steps_per_epoch == streamed.feed.steps_per_epoch == 4
    state = runs.initial()
    for epoch in (0, 1):
        order, streamed_order = runs.feed.order(state, epoch), streamed.feed.order(state, epoch)
        assert np.array_equal(order[0], streamed_order.examples)
        batches = streamed.feed._training_batches(streamed_order, 0)
        for examples in order[0]:
            batch = runs.parts.task.batch(runs.feed.arrays, examples)
            found = next(batches)
            assert found.keys() == batch.keys() == {"image", "label"}
            assert found["image"].dtype == batch["image"].dtype == np.uint8
            assert all(np.array_equal(found[key], batch[key]) for key in batch)


def test_the_memory_of_a_step_is_planned_and_no_batch_lost(directory):
    runs, other = _runs(directory, "stream"), _runs(directory, "stream")
    state = runs.initial()
    parameters = sum(x.nbytes for x in jax.tree.leaves(state.params))
    planned = runs.feed.planned_memory(state, runs.no_metrics())
    # Parameters, their momentum, and eight images.
    assert planned > 2 * parameters + 8 * 4 * 6 * 3
    batches, expected = (
        each._training_batches(each.order(state, 0), 0) for each in (runs.feed, other.feed)
    )
    for _ in range(4):
        assert np.array_equal(next(batches)["image"], next(expected)["image"])


# Each trains twice, and has programs of its own to compile.
@pytest.mark.parametrize(
    ("parallel", "devices"),
    [
        ("jit", 1),
        pytest.param("jit", 2, marks=pytest.mark.slow),
        pytest.param("pmap", 2, marks=pytest.mark.slow),
    ],
)
def test_both_feeds_train_the_same_network(parallel, devices, directory, tmp_path):
    results = {}
    for feed in ("device", "stream"):
        config = _config(directory, feed, parallel=parallel, devices=devices)
        results[feed] = train.train(config, str(tmp_path / feed))
    for split in ("train", "validation", "test"):
        found, expected = (results[feed]["splits"][split] for feed in ("stream", "device"))
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    # What a step computes, too: the same augmentation under the same key.
    lines = {feed: read_metrics(tmp_path / feed) for feed in results}
    for a, b in zip(lines["device"], lines["stream"], strict=True):
        assert a["main/loss"] == pytest.approx(b["main/loss"], rel=1e-4)


def test_a_stream_goes_on_where_it_was_interrupted_bit_for_bit(directory, tmp_path, monkeypatch):
    config = _config(directory, "stream", steps_per_call=1)
    config.data.update(random_resized_crop=True, crop=4, workers=0)
    config.data.shape = (4, 6, 3)
    whole = train.train(config, str(tmp_path / "whole"))
    taken, stopping = [], StreamFeed.take_steps

    def stop_within_the_second_epoch(self, *args):
        taken.append(args[3])
        if len(taken) == 6:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return stopping(self, *args)

    interrupted = configuration.override(config, ["--config.checkpoint_steps=1"])
    monkeypatch.setattr(StreamFeed, "take_steps", stop_within_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train.train(interrupted, str(tmp_path / "run"))
    assert taken == [0, 1, 2, 3, 0, 1]
    resumed = train.train(interrupted, str(tmp_path / "run"))
    assert resumed["splits"] == whole["splits"]
    states = [
        restore(Runs(experiment.build(config)), tmp_path / name / "checkpoints")[0]
        for name in ("whole", "run")
    ]
    for a, b in zip(*(jax.tree.leaves(s.params) for s in states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow  # Two connected processes of the real program.
def test_two_processes_read_a_part_each_and_train_the_same_network(directory, tmp_path):
    (tmp_path / "pets.py").write_text(
        "from test_streamed_runs import _config\n"
        f"def get_config(): return _config({directory!r}, 'stream', devices=0)\n"
    )
    results = {}
    for processes in (1, 2):
        workdir = tmp_path / f"run_{processes}"
        arguments = ["sire_jax.train", f"--config={tmp_path / 'pets.py'}", f"--workdir={workdir}"]
        job = programs.job_of(
            arguments, tmp_path, processes=processes, PYTHONPATH=str(Path(__file__).parent)
        )
        with programs.started(*job):
            assert [each.wait() for each in job] == [0] * processes, job[-1].output
        results[processes] = read_results(workdir)["splits"]
    chex.assert_trees_all_close(results[2], results[1], rtol=1e-4, atol=1e-6)


def test_a_damaged_image_is_skipped_and_counted_or_ends_the_run(directory, tmp_path, capsys):
    write_folder(tmp_path / "pets", {"train": 15, "test": 5})
    damaged = sorted((tmp_path / "pets" / "train").rglob("*.png"))[7]
    damaged.write_bytes(damaged.read_bytes()[:40])
    config = _config(str(tmp_path), "stream", evaluate_splits=("train", "test"))
    config.data.task.validation_per_class = 0
    with pytest.raises(ValueError, match=damaged.name):
        train.train(config, str(tmp_path / "raised"))
    config.data.damaged = "skip"
    results = train.train(config, str(tmp_path / "skipped"))
    assert results["skipped_images"] == 1
    assert damaged.name in capsys.readouterr().out
    # 44 of 45 are counted: none in place of the damaged one.
    assert results["splits"]["train"]["main/top_1"][0] * 44 == pytest.approx(
        round(results["splits"]["train"]["main/top_1"][0] * 44), abs=1e-4
    )


def test_photographs_of_all_sizes_are_trained_on_and_measured_with_ten_crops(tmp_path):
    write_folder(tmp_path / "pets", {"train": 8, "test": 2})
    write(tmp_path / "pets" / "train" / "ape" / "tall.png", picture(99, 31, 9))
    write(tmp_path / "pets" / "test" / "bee" / "wide.png", picture(98, 10, 40))
    config = _config(str(tmp_path), "stream", epochs=1, evaluate_splits=("test",))
    config.data.task.validation_per_class = 0
    configuration.stream(config, resize=8, crop=6)
    results = train.train(config, str(tmp_path / "run"))
    overrides = ["--config.data.ten_crop=True"]
    ten = evaluate.evaluate(tmp_path / "run", overrides=overrides)["outputs"]["main"]["loss"]
    central = results["splits"]["test"]["main/loss"]
    assert np.isfinite([*central, *ten["runs"]]).all()
    assert ten["runs"] != central


def test_programs_that_need_all_images_on_the_device_say_so(directory):
    with pytest.raises(ValueError, match="needs all images on the device, but the run streams"):
        _ = _runs(directory, "stream").feed.arrays


def test_the_first_images_of_a_split_can_be_looked_at(directory):
    runs, streamed = _runs(directory, "device"), _runs(directory, "stream")
    for split in ("train", "validation", "test"):
        a, b = runs.feed.look(split, 3), streamed.feed.look(split, 3)
        assert all(np.array_equal(a[key], b[key]) for key in ("image", "label"))


def test_batches_are_on_their_way_before_they_are_asked_for():
    placed = []
    batches = ahead(iter([{"x": i} for i in range(5)]), lambda b: placed.append(b["x"]) or b["x"])
    assert next(batches) == 0
    assert placed == [0, 1, 2]
    assert list(batches) == [1, 2, 3, 4]
