import pytest
from changed import changed
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sire_jax import configuration, registry
from sire_jax.configuration import experiment, validation

QUICKSTART = str(configuration.repository_configs() / "quickstart.py")


def _load(*overrides, variant="auxiliary"):
    arguments = [f"--config.{each}" for each in overrides]
    return configuration.load(f"{QUICKSTART}:{variant}", arguments)


def test_a_file_is_loaded_with_its_variant():
    assert _load().name == "quickstart/auxiliary"
    assert _load(variant="main_only").heads.to_dict() == {}
    assert configuration.load(QUICKSTART).name == "quickstart/auxiliary"
    with pytest.raises(ValueError, match=r"no variant 'auxilary'. Did you mean 'auxiliary'"):
        _load(variant="auxilary")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("epochs=3", 3),
        ("data.scale=0.5", 0.5),
        ("data.scale=2", 2.0),
        ("data.shape=(4,6,3)", (4, 6, 3)),
        ("data.task.train=20", 20),
        ("data.task.name=images", "images"),
        ("backbone.dropout=0.25", 0.25),
        ("backbone.shared=false", False),
        ("tensorboard=true", True),
        ("heads.digits.endpoints=('hidden','digits')", ("hidden", "digits")),
        ("objectives.digits.weight=0.1", 0.1),
        ("evaluate_splits=('test',)", ("test",)),
        ("evaluate_splits=test", ("test",)),
        ("data.train_splits=('train','extra')", ("train", "extra")),
        ("name=a=b", "a=b"),
    ],
)
def test_an_override_sets_a_nested_key_and_nothing_else(override, value):
    before, after = registry.flat(_load()), registry.flat(_load(override))
    key = override.partition("=")[0]
    assert after[key] == value
    assert type(after[key]) is type(value)
    assert before.keys() == after.keys()
    assert [k for k in before if before[k] != after[k]] == [key]


def test_several_overrides_apply_together():
    config = _load("seed=3", "data.task.test=7", "data.task.train=8")
    assert (config.seed, config.data.task.test, config.data.task.train) == (3, 7, 8)
    assert config.data.task.name == "pairs"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epchs=3", "config has no key 'epchs'. Did you mean 'epochs'"),
        ("data.tsk.train=3", "config.data has no key 'tsk'. Did you mean 'task'"),
        ("data.task.trian=3", "config.data.task has no key 'trian'. Did you mean 'train'"),
        ("backbone.droput=0.5", "config.backbone has no key 'droput'. Did you mean 'dropout'"),
        ("heads.digit.name=x", "config.heads has no key 'digit'. Did you mean 'digits'"),
        ("objectives.main.wieght=2.0", "config.objectives.main has no key.*Did you mean 'weight'"),
        ("epochs.more=3", "config.epochs has no key 'more'"),
    ],
)
def test_a_mistyped_override_is_refused_with_the_nearest_key(override, message):
    with pytest.raises(ValueError, match=message):
        _load(override)


@pytest.mark.parametrize(
    "override",
    [
        "epochs=many",
        "epochs=1.5",
        "epochs=",
        "data.scale=high",
        "backbone.shared=perhaps",
        "data.task=3",
        "objectives.digits.weight=heavy",
    ],
)
def test_an_override_of_a_wrong_type_is_refused(override):
    with pytest.raises(
        ValueError, match=rf"(wrong type|should be a number).*{override.partition('=')[0]}"
    ):
        _load(override)


@pytest.mark.parametrize("argument", ["epochs=3", "--epochs=3", "--confg.epochs=3", "more"])
def test_what_is_no_override_is_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}.*--config.key=value"):
        configuration.load(QUICKSTART, [argument])


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no_such\.py"):
        configuration.load(str(tmp_path / "no_such.py:variant"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"empty\.py has no function get_config"):
        configuration.load(str(tmp_path / "empty.py"))


def test_overriding_leaves_the_given_config_as_it_is():
    config = _load()
    other = configuration.override(config, ["--config.data.task.train=9"])
    assert (config.data.task.train, other.data.task.train) == (500, 9)
    with pytest.raises((AttributeError, KeyError)):
        other.epchs = 3


@pytest.mark.parametrize("variant", ["auxiliary", "main_only"])
def test_a_config_as_json_reads_back_equal(variant):
    config = _load("data.scale=0.1", "heads={}" if variant == "main_only" else "seed=1")
    again = configuration.from_json(configuration.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert again.data.shape == (8, 8, 1)
    assert configuration.differences(config, again) == []
    validation.validate(again)


leaves = st.one_of(
    st.integers(),
    st.booleans(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=3).map(tuple),
)
names = st.text("abc_", min_size=1, max_size=3)
nested = st.recursive(
    st.dictionaries(names, leaves, max_size=3),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(names, st.one_of(leaves, nested), max_size=4))
def test_any_config_as_json_reads_back_equal(values):
    config = ConfigDict(values)
    again = configuration.from_json(configuration.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert configuration.differences(config, again) == []


def test_a_config_of_a_former_version_gets_the_defaults_of_what_it_lacks():
    config = _load("seed=4", "data.task.train=9")
    old = ConfigDict(config.to_dict())
    del old.parallel, old.data.feed, old.data.workers
    again = configuration.completed(old)
    assert again.to_dict() == config.to_dict()
    assert "parallel" not in old
    validation.validate(again)
    # What is no section is left for the check of types to refuse.
    assert configuration.completed(ConfigDict({"data": 3})).data == 3


def test_lists_read_back_from_json_are_no_difference():
    config = ConfigDict({"heads": {"a": {"endpoints": ["x", "y"]}}})
    again = configuration.from_json(configuration.to_json(config))
    assert configuration.differences(again, config) == []


def test_differences_are_listed_a_line_each():
    old = _load()
    new = _load("seed=7", "data.task.train=9", "objectives.digits.weight=1")
    assert configuration.differences(old, old) == []
    assert configuration.differences(old, new) == [
        "data.task.train: 500 -> 9",
        "objectives.digits.weight: 10.0 -> 1.0",
        "seed: 0 -> 7",
    ]
    lines = configuration.differences(_load(variant="main_only"), old)
    assert "heads.digits.name: '(absent)' -> 'identity'" in lines
    assert "name: 'quickstart/main_only' -> 'quickstart/auxiliary'" in lines


def test_keys_that_do_not_change_results_are_no_difference():
    free = ("devices=2", "steps_per_call=7", "checkpoint_every=3", "tensorboard=true")
    new = _load(*free, "data.dir=/elsewhere", "data.cache=")
    assert configuration.differences(_load(), new) == []
    # A key of the same name elsewhere counts.
    old = ConfigDict({"dir": 1, "data": {"devices": 1}})
    new = ConfigDict({"dir": 2, "data": {"devices": 2}})
    assert configuration.differences(old, new) == ["data.devices: 1 -> 2", "dir: 1 -> 2"]


def test_the_defaults_and_the_quickstart_are_valid():
    config = configuration.default()
    with pytest.raises(ValueError, match=r"config\.backbone: A backbone needs a 'name'; it"):
        validation.validate(config)
    config.backbone = configuration.backbone("small_cnn", classes=10)
    validation.validate(config)
    validation.validate(_load())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("epohs", 3, "config has no key 'epohs'. Did you mean 'epochs'"),
        ("data.shap", 3, "config.data has no key 'shap'. Did you mean 'shape'"),
        ("epochs", 0, "config.epochs is 0; it should be at least 1"),
        ("seeds", 0, "config.seeds is 0; it should be at least 1"),
        ("batch_size", -3, "config.batch_size is -3; it should be at least 1"),
        ("steps_per_call", 0, "config.steps_per_call is 0"),
        ("evaluate_batch_size", 0, "config.evaluate_batch_size is 0"),
        ("seeds_at_once", -1, "config.seeds_at_once is -1; it should be at least 0"),
        ("devices", -1, "config.devices is -1"),
        ("evaluate_every", -1, "config.evaluate_every is -1"),
        ("checkpoint_every", -1, "config.checkpoint_every is -1"),
        ("checkpoint_steps", -1, "config.checkpoint_steps is -1; it should be at least 0"),
        ("checkpoints_kept", 0, "config.checkpoints_kept is 0; it should be at least 1"),
        ("peer_timeout", 0.0, "config.peer_timeout is 0.0; it should be above 0"),
        ("peer_timeout", float("inf"), "config.peer_timeout is inf; it should be finite"),
        ("compilation_cache", None, "config.compilation_cache is None; it should be a str"),
        ("parallel", "jti", "config.parallel is 'jti'. Did you mean 'jit'. Known: jit, pmap"),
        ("devices_share", "run", "config.devices_share is 'run'. Did you mean 'runs'"),
        ("batch_norm", "devices", "config.batch_norm is 'devices'. Did you mean 'device'"),
        ("batch_norm", "device", "'device', which needs config.parallel 'pmap': under 'jit' stat"),
        ("data.feed", "steam", "config.data.feed is 'steam'. Did you mean 'stream'"),
        ("data.damaged", "skips", "config.data.damaged is 'skips'. Did you mean 'skip'"),
        ("data.resize", -1, "config.data.resize is -1; it should be at least 0"),
        ("data.resize", 9, r"resize is 9, so that config.data.shape should be \(9, 9, 1\); it is "),
        ("data.workers", -1, "config.data.workers is -1; it should be at least 0"),
        ("data.threads", 0, "config.data.threads is 0; it should be at least 1"),
        ("data.feed", "stream", "'stream', which feeds one run; config.seeds is 5. Start a progra"),
        ("data.random_resized_crop", True, "is for config.data.feed 'stream', with .* 'device' a"),
        ("seed", 2**31, "config.seed is 2147483648; it should be below 2..31"),
        ("data.classes.label", "10", "config.data.classes.label is '10', a str; it should be a"),
        ("data.classes.label", 0, "config.data.classes.label is 0; it should be at least 1"),
        ("data.mean", (True,), r"data.mean is \(True,\); it should be a number for each of the 1"),
        ("data.shape", (8, 8, "1"), "it should be a tuple of int like"),
        ("evaluate_splits", (1,), r"evaluate_splits is \(1,\), a tuple; it should be a tuple of s"),
        ("data.scale", 0.0, "config.data.scale is 0.0; it should be above 0"),
        ("data.scale", -1.0, "config.data.scale is -1.0"),
        ("data.scale", float("nan"), "config.data.scale is nan"),
        ("data.scale", float("inf"), "config.data.scale is inf"),
        (
            "data.train_splits",
            (),
            r"config.data: train_splits is \(\); it should be names of splits",
        ),
        ("data.train_splits", "train", "data.train_splits is 'train', a str; it should be a tuple"),
        ("data.test_split", "train", "test_split 'train'; no split should be named twice"),
        ("data.draw_classes", 1, "config.data: draw_classes is 1; it should be at least 2, or 0"),
        (
            "data.draw_classes",
            5,
            r"{'label': 10}; where draw_classes is 5 .*{'label': 5}",
        ),
        ("data.draw_seed", -1, "config.data: draw_seed is -1; it should be at least 0"),
        ("evaluate_splits", ("train", "tset"), "has 'tset'. Did you mean 'test'"),
        ("epochs", True, "config.epochs is True, a bool; it should be a int like 1"),
        ("epochs", 2.0, "config.epochs is 2.0, a float; it should be a int"),
        ("data.scale", "1", "config.data.scale is '1', a str; it should be a float"),
        ("tensorboard", 1, "config.tensorboard is 1, a int; it should be a bool"),
        ("data.shape", 8, "config.data.shape is 8, a int; it should be a tuple"),
        ("backbone", "small_cnn", "config.backbone is 'small_cnn'; it should be a section"),
        ("data.task", "pairs", "config.data.task is 'pairs'; it should be a section"),
        ("data.classes", 10, "config.data.classes is 10; it should be a section"),
        ("data", "digits", "config.data is 'digits'; it should be a section"),
    ],
)
def test_wrong_keys_types_and_ranges_are_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        validation.validate(changed(_load(), {path: value}))


def test_an_int_is_allowed_for_a_float_and_zero_where_it_means_something():
    changes = {"data.scale": 1, "devices": 0, "evaluate_every": 0}
    validation.validate(changed(_load(), changes))


STREAMED = {"seeds": 1, "data.feed": "stream", "data.task": {"name": "images"}}


def _streamed(changes):
    return changed(_load(), {**STREAMED, **changes})


def test_a_stream_may_resize_and_crop():
    resized = {"data.shape": (32, 32, 1), "data.resize": 32}
    validation.validate(_streamed({}))
    validation.validate(_streamed({**resized, "data.crop": 28, "data.random_resized_crop": True}))
    # All on the device may be resized, too.
    validation.validate(_streamed({**resized, "data.feed": "device", "seeds": 5}))
    validation.validate(changed(_load(), {"parallel": "pmap", "batch_norm": "device"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.task": {"name": "pairs"}}, "is for the task 'images'; config.data.task.name is 'p"),
        ({"data.random_resized_crop": True}, "config.data.crop above 0; they are 'stream' and 0"),
        ({"data.resize": 8, "data.shape": (8, 9, 1)}, r"should be \(8, 8, 1\); it is \(8, 9, 1\)"),
    ],
)
def test_what_a_stream_can_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validation.validate(_streamed(changes))


def test_drawn_classes_leave_no_other_kind_of_label():
    config = changed(_load(), {"data.draw_classes": 5, "data.classes.label": 5})
    validation.validate(config)
    with pytest.raises(ValueError, match=r"'coarse': 2.*as other kinds of labels are dropped"):
        validation.validate(changed(config, {"data.classes.coarse": 2}))


@pytest.mark.parametrize(("section", "key"), [("", "epochs"), ("data", "shape"), ("", "backbone")])
def test_a_missing_key_is_refused(section, key):
    plain = _load().to_dict()
    del (plain[section] if section else plain)[key]
    where = f"config.{section}" if section else "config"
    with pytest.raises(ValueError, match=f"{where} lacks the key '{key}'"):
        validation.validate(ConfigDict(plain))


@pytest.mark.parametrize(
    ("describe", "name", "message"),
    [
        (configuration.backbone, "pair_dens", "no backbone 'pair_dens'. Did you mean 'pair_dense'"),
        (configuration.head, "identiy", "no head 'identiy'. Did you mean 'identity'"),
        (configuration.task, "pair", "no task 'pair'. Did you mean 'pairs'"),
        (configuration.augmentation, "flp", "no augmentation 'flp'. Did you mean 'flip'"),
        (configuration.prediction, "digit_oder", "no prediction.*Did you mean 'digit_order'"),
        (configuration.optimizer, "adm", "no optimizer 'adm'. Did you mean 'adam'"),
    ],
)
def test_an_unknown_part_is_refused_where_it_is_described(describe, name, message):
    with pytest.raises(ValueError, match=message):
        describe(name)


def test_described_parts_show_their_settings():
    assert configuration.task("pairs", train=5).to_dict() == {
        "name": "pairs",
        "train": 5,
        "test": 1000,
        "validation": 0,
        "downscale": 1,
    }
    assert configuration.objective("main", "label", "cross_entropy", 2.0).to_dict() == {
        "output": "main",
        "target": "label",
        "loss": "cross_entropy",
        "weight": 2.0,
        "weights": (),
    }
    with pytest.raises(ValueError, match=r"no loss 'cros_entropy'. Did you mean 'cross_entropy'"):
        configuration.objective("main", "label", "cros_entropy")
    with pytest.raises(ValueError, match=r"no setting 'dropot'. Did you mean 'dropout'"):
        configuration.backbone("pair_dense", dropot=0.1)


def test_a_flat_config_has_a_key_for_each_value():
    config = ConfigDict({"a": 1, "b": {"c": (1, 2), "d": {"e": "x"}}, "f": {}})
    assert registry.flat(config) == {"a": 1, "b.c": (1, 2), "b.d.e": "x"}


def test_an_override_of_a_part_brings_its_settings_and_keeps_those_in_common():
    config = configuration.load(
        f"{configuration.repository_configs()}/auxnet.py:20-2",
        [
            "--config.optimizer.b1=0.8",
            "--config.optimizer.name=adam",
            "--config.optimizer.weight_decay=0.5",
            "--config.aggregator.name=cagrad",
            "--config.aggregator.radius=0.2",
            "--config.update_rule.name=pairwise",
            "--config.weighting.name=dwa",
        ],
    )
    optimizer = config.optimizer.to_dict()
    assert optimizer.pop("learning_rate")["init_value"] == 0.1
    assert optimizer == {
        "name": "adam", "weight_decay": 0.5, "b1": 0.8, "b2": 0.999, "clip": 0.0,
    }  # fmt: skip
    assert config.aggregator.to_dict() == {"name": "cagrad", "radius": 0.2}
    assert config.update_rule.to_dict() == {"name": "pairwise", "adjust": True, "scale_own": False}
    assert config.weighting.to_dict() == {"name": "dwa", "temperature": 2.0}
    with pytest.raises(ValueError, match=r"config\.optimizer has no key 'momentum'"):
        configuration.override(config, ["--config.optimizer.momentum=0.5"])


def test_the_control_of_multiway_refuses_another_optimizer():
    given = ["--config.optimizer.name=adam", "--config.update_rule.name=effective_joint"]
    path = f"{configuration.repository_configs()}/auxnet.py:20-2"
    config = configuration.load(path, given)
    with pytest.raises(ValueError, match="needs an optimizer whose step is linear"):
        experiment.build(config)


# ---- Overrides of what the config does not have yet.


def test_an_augmentation_may_be_added_by_an_override():
    config = _load("augmentation.affine.rotation=10", variant="main_only")
    expected = configuration.augmentation("affine", rotation=10.0)
    assert config.augmentation.affine.to_dict() == expected.to_dict()
    validation.validate(config)
    with pytest.raises(ValueError, match=r"config.augmentation has no key 'affin'.*mean 'affine'"):
        _load("augmentation.affin.rotation=10")
    with pytest.raises(ValueError, match=r"config.augmentation.affine has no key 'rotatoin'"):
        _load("augmentation.affine.rotatoin=10")


def _sire(*overrides):
    given = [f"--config.{each}" for each in overrides]
    return configuration.load(f"{configuration.repository_configs()}/sire.py", given)


def test_a_number_may_take_the_place_of_a_schedule():
    assert _sire("optimizer.learning_rate=1e-3").optimizer.learning_rate == 1e-3
    kept = _sire("optimizer.learning_rate.scale=0.1").optimizer.learning_rate
    assert (kept.name, kept.scale) == ("piecewise", 0.1)
    with pytest.raises(
        ValueError, match=r"learning_rate is 'fast'; it should be a number, .* scale"
    ):
        _sire("optimizer.learning_rate=fast")
    # All settings at once, as ml_collections takes them.
    section = {"name": "constant", "value": 0.05}
    assert _sire(f"optimizer.learning_rate={section}").optimizer.learning_rate.to_dict() == section


@pytest.mark.parametrize("turned", [False, True])
def test_a_number_may_be_given_a_warmup_by_overrides(turned):
    overrides = [
        "--config.optimizer.learning_rate=0.001",
        "--config.optimizer.learning_rate.warmup=0.1",
        "--config.optimizer.learning_rate.unit=run",
    ]
    path = f"{configuration.repository_configs()}/sire.py:cnn"
    config = configuration.load(path, overrides[::-1] if turned else overrides)
    expected = {"name": "constant", "value": 0.001, "warmup": 0.1, "unit": "run"}
    assert config.optimizer.learning_rate.to_dict() == expected
    # Where the config has a number, too.
    path = f"{configuration.repository_configs()}/pairs.py:conv"
    rate = configuration.load(path, overrides[1:2]).optimizer.learning_rate
    assert rate.to_dict() == {"name": "constant", "value": 0.001, "warmup": 0.1}
    assert configuration.load(path, overrides[:1]).optimizer.learning_rate == 0.001


def test_any_schedule_may_be_given_a_warmup_by_an_override():
    config = _sire("optimizer.learning_rate.warmup=0.025")
    assert config.optimizer.learning_rate.warmup == 0.025
    validation.validate(config)
    with pytest.raises(ValueError, match=r"config.optimizer.learning_rate.warmup is -1"):
        validation.validate(_sire("optimizer.learning_rate.warmup=-1.0"))


@pytest.mark.parametrize("name", ["auxnet.py:20-2", "pairs.py:aux_10", "ssal.py:resnet18"])
def test_a_stored_config_is_that_of_its_file_though_that_leaves_defaults_out(name):
    config = configuration.load(name)
    stored = configuration.completed(configuration.from_json(configuration.to_json(config)))
    assert configuration.differences(stored, config) == []
    assert configuration.differences(config, stored) == []
    config.unlock()
    del config.optimizer["weight_decay"]
    lines = configuration.differences(stored, config)
    assert all(line.startswith("optimizer.weight_decay") for line in lines)


def test_configs_of_older_runs_are_what_they_were():
    new = _sire()
    old = ConfigDict(new.to_dict())
    for key in ("on_diverged", "initialization"):
        del old[key]
    del old.optimizer["clip"]
    del old.heads.decoder["last"]
    completed = configuration.completed(old)
    assert completed.heads.decoder.last == "linear"
    assert completed.initialization == "modules"
    completed.heads.decoder.last = new.heads.decoder.last
    completed.initialization = new.initialization
    assert configuration.differences(completed, new) == []
