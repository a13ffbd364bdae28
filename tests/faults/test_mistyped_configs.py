"""Every key mistyped, every value of a wrong type: refused by name, before anything is traced."""

import re
from fnmatch import fnmatch

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sire_jax import configuration, registry
from sire_jax.backbones import BACKBONES
from sire_jax.configuration import experiment, validation
from sire_jax.data.augmentation import AUGMENTATIONS
from sire_jax.data.tasks import TASKS
from sire_jax.heads import HEADS
from sire_jax.job import compilation
from sire_jax.losses import LOSSES_WITH_SETTINGS
from sire_jax.optimizers import OPTIMIZERS, SCHEDULES
from sire_jax.predictions import PREDICTIONS
from sire_jax.updates import AGGREGATORS, UPDATES, WEIGHTINGS

CONFIGS = configuration.repository_configs()
# Of each paper, with all kinds of sections between them: families of heads, branches and their
# groups, schedules, weights by depth, losses with settings, every prediction.
VARIANTS = (
    "quickstart.py:auxiliary",
    "pairs.py:conv_augment",
    "sire.py:googlenet",
    "auxnet.py:56-5",
    "auxnet.py:34-2,imagenet100",
    "ssal.py:resnet18,1,validate",
    "ssal.py:densenet100_12",
    "ssal.py:resnet18,1,cat_fc_ssal",
)


@pytest.fixture(scope="module", params=VARIANTS)
def config(request):
    return configuration.load(f"{CONFIGS}/{request.param}")


@pytest.fixture
def nothing_is_traced(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("A network is traced before the config has been checked.")

    monkeypatch.setattr(jax, "eval_shape", refuse)
    before = compilation.counts()
    yield
    assert compilation.counts() == before


UNTRACED = pytest.mark.usefixtures("nothing_is_traced")


def _paths(section, above=()):
    """Yields the path and the value of every key, at every depth."""
    for key, value in section.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _copied(section):
    """Copies sections one by one: two that are the same one must not change together."""
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in section.items()}


def _changed(plain, path, change):
    """Applies ``change(section, key)`` to a copy."""
    changed = _copied(plain)
    section = changed
    for key in path[:-1]:
        section = section[key]
    change(section, path[-1])
    return ConfigDict(changed)


def _with(plain, path, value):
    return _changed(plain, path, lambda section, key: section.update({key: value}))


def _refusal(config):
    """Returns why a config is refused; what is not checked first would be traced, and fail."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 the callers look at the message
        experiment.build(config)
    return str(refused.value)


# What the user names: objectives and so on have the names that one likes.
NAMED = ("heads", "objectives", "predictions", "augmentation", "data.groups", "data.classes")


def _is_named_by_the_user(path):
    return ".".join(path[:-1]) in NAMED


def _misspelt(key):
    """Returns a key with a letter dropped, one doubled, and two swapped."""
    middle = len(key) // 2
    # Of two letters one is no hint which key is meant.
    dropped = key[:middle] + key[middle + 1 :] if len(key) > 2 else key
    doubled = key[:middle] + key[middle] + key[middle:]
    a, b = key[middle - 1], key[middle]
    swapped = key[: middle - 1] + b + a + key[middle + 1 :]
    return {each for each in (dropped, doubled, swapped) if each not in (key, "")}


def _misspellings(config):
    """Yields the path of each key with each way of misspelling it, if that is no key itself."""
    plain = config.to_dict()
    for path, _ in _paths(plain):
        section = plain
        for key in path[:-1]:
            section = section[key]
        for wrong in _misspelt(path[-1]) - set(section):
            yield path, wrong


def _suggests(message, key):
    """Tells whether a message has the right key; of two letters another one may be as near."""
    return f"Did you mean '{key}'" in message or len(key) == 2


def _check_names(message, path, wrong):
    """Checks that a message has the section, the wrong key, and the right one."""
    if path[-1] == "name" and path[:-1] not in ((), ("data",)):
        assert message.startswith(f"config.{path[0]}")
        assert "needs a 'name'" in message
        return
    assert ".".join(("config", *path[:-1])) in message
    if path[:2] == ("data", "groups"):
        assert wrong in message
        assert path[-1] in message
    else:
        assert f"'{wrong}'" in message
        assert _suggests(message, path[-1])


@UNTRACED
def test_every_misspelt_key_of_a_config_is_refused(config):
    plain = config.to_dict()
    count = 0
    for path, wrong in _misspellings(config):
        if _is_named_by_the_user(path):
            continue
        changed = _changed(plain, path, lambda s, k, w=wrong: s.update({w: s.pop(k)}))
        _check_names(_refusal(changed), path, wrong)
        count += 1
    assert count > 150


@UNTRACED
def test_every_misspelt_key_on_the_command_line_is_refused(config):
    for path, wrong in _misspellings(config):
        argument = f"--config.{'.'.join((*path[:-1], wrong))}=1"
        with pytest.raises(ValueError, match=f"has no key '{wrong}'") as refused:
            configuration.override(config, [argument])
        message = str(refused.value)
        assert message.startswith(".".join(("config", *path[:-1])) + " has")
        assert _suggests(message, path[-1]) or _is_named_by_the_user(path)


def test_a_section_misspelt_on_the_way_is_refused():
    with pytest.raises(ValueError, match=r"^config\.data has no key 'tsak'. Did you mean 'task'"):
        configuration.load(f"{CONFIGS}/quickstart.py", ["--config.data.tsak.train=1"])


# Settings without a default, beside all that a config and its data section have.
REQUIRED = {
    "name", "output", "target", "loss", "endpoints", "classes", "backbone", "heads", "nu", "label",
    "init_value", "boundaries", "scale", "peak_value", "peak", "end", "position",
}  # fmt: skip


def _is_required(path):
    of_data = path[0] == "data" and path[1:-1] not in (("task",), ("classes",))
    if path[0] == "predictions" and path[1:]:
        return path[-1] == "name"
    return len(path) == 1 or of_data or path[-1] in REQUIRED or path == ("heads", "exit", "layers")


@UNTRACED
def test_every_key_that_is_left_out_is_refused_or_has_a_default(config):
    plain = config.to_dict()
    for path, _ in _paths(plain):
        if _is_named_by_the_user(path) and path != ("data", "classes", "label"):
            continue
        changed = _changed(plain, path, lambda section, key: section.pop(key))
        if not _is_required(path):
            validation.validate(changed)
            continue
        message = _refusal(changed)
        assert message.startswith(f"config.{path[0]}" if path[1:] else "config")
        assert path[-1] in message


NUMBERS = (float("nan"), float("inf"), -float("inf"))


def _wrong(value):
    """Yields values of other types, and numbers of the type that can't be computed with."""
    common = [None, {"a": 1}]
    if isinstance(value, dict):
        # Of a section a None, too, and a leaf.
        return ["word", 3, True, None, (1,)]
    if isinstance(value, bool):
        return [*common, "word", 1, 0.5, (True,)]
    if isinstance(value, int):
        return [*common, "word", True, 0.5, 1.0, (1,), *NUMBERS, 2**31, -(2**31), 10**5000]
    if isinstance(value, float):
        # A whole number is as good as a float.
        return [*common, "word", True, (0.5,), *NUMBERS, 1e39, 10**5000]
    if isinstance(value, str):
        return [*common, 3, True, 0.5, ("word",)]
    return [*common, "word", 3, True, 0.5, *_wrong_elements(value)]


def _wrong_elements(value):
    """Yields tuples as long as the given one, of elements of other types."""
    if not value:
        return [(None,), ({"a": 1},)]
    others = [None, True, (), {"a": 1}]
    others += [3] if isinstance(value[0], str) else ["word", *NUMBERS]
    others += [0.5] if isinstance(value[0], int) else []
    return [(each,) * len(value) for each in others]


# Values of another type that are as good, because a setting has several.
AS_GOOD = (
    ("objectives.*.weight", 3),  # in place of a schedule
    ("optimizer.learning_rate", 3),  # likewise
    ("optimizer.weight_decay", 3),  # in place of two numbers
    ("heads.*.stages", None),  # all of them
    ("heads.*branch*.position", 3),  # a number, or the name of an endpoint
    # Layers by name or one by one, which are looked at as the branch is made.
    ("heads.*branch*.layers", "word"),
    ("heads.*branch*.layers", ("word",)),
    ("heads.*branch*.layers", (None,)),
    ("heads.*branch*.layers", ({"a": 1},)),
    ("*.exponential.end_value", None),  # no end
)


def _is_as_good(path, value):
    return any(
        fnmatch(".".join(path), pattern) and type(value) is type(good) and value == good
        for pattern, good in AS_GOOD
    )


def _named(path, message):
    """Tells whether a message names a key, with the path of its section or in words."""
    words = path[-1].replace("_", " ")
    section = ".".join(("config", *path[:-1]))
    return section in message and (path[-1] in message or words in message)


@UNTRACED
def test_every_value_of_a_wrong_type_is_refused(config):
    plain = config.to_dict()
    count = 0
    for path, value in _paths(plain):
        for wrong in _wrong(value):
            changed = _with(plain, path, wrong)
            if _is_as_good(path, wrong):
                validation.validate(changed)
                continue
            message = _refusal(changed)
            assert _named(path, message), f"{path} = {str(wrong)[:50]}: {message}"
            assert len(message) < 1000
            count += 1
    assert count > 500


@UNTRACED
@pytest.mark.parametrize("word", ["word", "nan", "(None,)", "1e400"])
def test_every_word_for_a_number_on_the_command_line_is_refused(config, word):
    numbers = (int, float)
    for path, value in _paths(config.to_dict()):
        of_numbers = isinstance(value, tuple) and value and isinstance(value[0], numbers)
        if type(value) not in (*numbers, bool) and not of_numbers:
            continue
        argument = f"--config.{'.'.join(path)}={word}"
        with pytest.raises(ValueError, match=re.escape(path[-1])):
            validation.validate(configuration.override(config, [argument]))


def test_a_value_of_no_type_can_not_be_overridden(config):
    changed = _with(config.to_dict(), ("heads", "decoder"), configuration.head("decoders"))
    with pytest.raises(ValueError, match=r"config\.heads\.decoder\.stages is None, .* config file"):
        configuration.override(changed, ["--config.heads.decoder.stages=(1,)"])


# Settings without a default, and those whose default shows no type.
GIVEN = {
    "small_cnn": {"classes": 10}, "cnn": {"classes": 10}, "vgg": {"classes": 10},
    "resnet": {"classes": 10}, "preactivation_resnet": {"classes": 10},
    "wide_resnet": {"classes": 10}, "densenet": {"classes": 10}, "googlenet": {"classes": 10},
    "classifier": {"endpoints": ("block_1",), "classes": 10},
    "convolutional_classifier": {"endpoints": ("block_1",), "classes": 10},
    "decoders": {"stages": (1,)},
    "exits": {"layers": (5,), "classes": 10},
    "identity": {"endpoints": ("digits",)},
    "branch": {"position": "1", "classes": 10},
    "combination": {"endpoints": ("main",), "classes": 10},
    "dwa": {"period": 5},
    "constant": {"value": 0.1},
    "piecewise": {"init_value": 0.1, "boundaries": (0.5,), "scale": 0.1},
    "triangular": {"peak_value": 0.1, "peak": 0.5, "end": 1.0},
    "linear": {"init_value": 0.1, "end_value": 0.0, "transition_steps": 5},
    "cosine": {"init_value": 0.1, "decay_steps": 5},
    "exponential": {
        "init_value": 0.1, "transition_steps": 5, "decay_rate": 0.1, "end_value": 0.0,
    },
    "warmup_cosine": {"init_value": 0.1, "peak_value": 0.2, "warmup_steps": 5, "decay_steps": 9},
}  # fmt: skip
# Where a config has the parts of each registry.
PLACES = (
    ("backbone", BACKBONES, ()),
    ("heads.one", HEADS, ("plan",)),
    ("augmentation.one", AUGMENTATIONS, ()),
    ("predictions.one", PREDICTIONS, ("groups",)),
    ("data.task", TASKS, ()),
    ("objectives.main.loss", LOSSES_WITH_SETTINGS, ()),
    ("objectives.main.weight", SCHEDULES, ()),
    ("optimizer.learning_rate", SCHEDULES, ()),
    ("optimizer", OPTIMIZERS, ()),
    ("update_rule", UPDATES, ("optimizer", "reach", "main", "aggregator")),
    ("aggregator", AGGREGATORS, ()),
    ("weighting", WEIGHTINGS, ()),
)
PARTS = [
    pytest.param(place, parts, name, supplied, id=f"{place}={name}")
    for place, parts, supplied in PLACES
    for name in parts
]


@pytest.fixture(scope="module")
def plain():
    return configuration.load(f"{CONFIGS}/quickstart.py").to_dict()


@UNTRACED
@pytest.mark.parametrize(("place", "parts", "name", "supplied"), PARTS)
def test_every_setting_of_every_part_is_checked(plain, place, parts, name, supplied):
    section = registry.describe(parts, name, "part", **GIVEN.get(name, {}))
    section = {key: value for key, value in section.items() if key not in supplied}
    path = tuple(place.split("."))
    whole = _with(plain, path, section).to_dict()
    validation.validate(ConfigDict(whole))
    for key, value in section.items():
        here = (*path, key)
        for wrong in _wrong(value):
            if _is_as_good((*path, name, key), wrong):
                validation.validate(_with(whole, here, wrong))
                continue
            message = _refusal(_with(whole, here, wrong))
            assert _named(here, message), f"{here} = {str(wrong)[:50]}: {message}"
        for wrong in _misspelt(key) - set(section):
            changed = _changed(whole, here, lambda s, k, w=wrong: s.update({w: s.pop(k)}))
            _check_names(_refusal(changed), here, wrong)
    extra = _with(whole, (*path, "no_such_setting"), 1)
    assert "has no setting 'no_such_setting'" in _refusal(extra)


# Values of the right type that make no sense, which parts refuse as they are made or applied.
OUT_OF_RANGE = (
    ("backbone.dropout", 1.0, r"dropout rate is 1\.0; it should be in \[0, 1\)"),
    ("backbone.dropout", -0.5, r"dropout rate is -0\.5"),
    ("backbone.convolution_dropout", 7, "dropout rate is 7"),
    ("backbone.branch", "dense", "branch is 'dense'"),
    ("backbone.hidden", 0, "hidden has a width of 0; it should be at least 1"),
    ("backbone.outputs", -3, "outputs has a width of -3"),
    ("backbone.residual_hidden", -3, "residual_hidden has a width of -3"),
    ("backbone.padding", -1, "padding -1"),
    ("backbone.padding", 0, "small for a max pool of 2 x 2; take larger images, or more padding"),
    ("data.crop", 2, "too small for a max pool of 2 x 2"),
    ("data.crop", 9, "data.crop is 9, but images are 8 x 8"),
    ("data.task.train", -1, "config.data.task: train is -1"),
    ("data.task.downscale", 0, "config.data.task: downscale is 0"),
    ("data.shape", (10**5, 10**5, 3), "an image should have at most 268,435,456 values"),
    ("data.scale", -1.0, r"data\.scale is -1\.0"),
    ("data.std", (0.0,), r"data\.std is \(0\.0,\)"),
    ("heads.digits.endpoints", (), r"heads\.digits\.endpoints is \(\)"),
    ("heads.digits.endpoints", ("digits", "digits"), r"heads\.digits\.endpoints is \('digits', "),
    ("heads.digits.endpoints", ("digist",), "'digist'.* Did you mean 'digits'"),
    ("objectives.digits.weight", -1, r"objectives\.digits\.weight is -1"),
    ("objectives.digits.output", "digist", "'digist'.* Did you mean 'digits'"),
    ("objectives.digits.target", "digist", "'digist'.* Did you mean 'digits'"),
    ("objectives.digits.loss", "cross_entorpy", "Did you mean 'cross_entropy'"),
    ("predictions.order.output", "digist", "'digist'.* Did you mean 'digits'"),
    ("optimizer.learning_rate", -0.1, "learning rate is -0.1"),
    ("optimizer.weight_decay", -0.1, "weight decay is -0.1"),
    ("optimizer.b1", 1.0, r"config\.optimizer: b1 is 1\.0; it should be in \[0, 1\)"),
    ("optimizer.b2", -0.1, r"config\.optimizer: b2 is -0\.1"),
    ("backbone", configuration.backbone("pair_dense", hidden=(3, 0)), "hidden has a width of 0"),
    ("backbone", configuration.backbone("pair_dense", hidden=(-1,)), "hidden has a width of -1"),
    ("optimizer", configuration.optimizer("sgd", momentum=1.5), "momentum is 1.5"),
    ("augmentation.flip", configuration.augmentation("flip", probability=2.0), "probability is 2"),
    ("aggregator", {"name": "cagrad", "radius": -1.0}, "radius is -1"),
    ("weighting", {"name": "uncertainty", "learning_rate": 0.0}, "learning_rate is 0"),
)  # fmt: skip
SMALL = (
    ("backbone.channels", (4, 0), "channels has a width of 0"),
    ("backbone.classes", 0, "classes has a width of 0"),
    ("heads.exit.classes", -1, "Classifier: classes has a width of -1"),
    ("heads.exit", {"name": "combination", "endpoints": (), "classes": 10}, "no endpoints"),
    (
        "heads.exit",
        {"name": "combination", "endpoints": ("main",), "classes": 10, "hidden": (0,)},
        "Combination: hidden has a width of 0",
    ),
    (
        "heads.exit",
        configuration.head(
            "convolutional_classifier", endpoints=("block_1",), classes=10, width=-1
        ),
        "ConvolutionalClassifier: width has a width of -1",
    ),
    (
        "heads.exit",
        {"name": "branch", "position": "block_1", "classes": 0},
        "Branch: classes has a width of 0",
    ),
    (
        "heads.exit",
        {"name": "branch", "position": "block_1", "classes": 10, "layers": (None,)},
        "layer of a branch is None; it should be a section",
    ),
    ("backbone", configuration.backbone("cnn", classes=10, width=1e30), "width is 1e.30, which"),
    ("backbone", configuration.backbone("cnn", classes=10, width=0.0), "width is 0.0; it should"),
)


@pytest.mark.parametrize(("path", "value", "message"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(plain, path, value, message):
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    with pytest.raises(ValueError, match=message):
        experiment.build(_with(plain, path.split("."), value))


@pytest.mark.parametrize(("path", "value", "message"), SMALL)
def test_a_value_out_of_range_of_small_networks_is_refused(path, value, message):
    config = configuration.default()
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(4, 8))
    config.heads.exit = configuration.head("classifier", endpoints=("block_1",), classes=10)
    config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    with pytest.raises(ValueError, match=message):
        experiment.build(_with(config.to_dict(), path.split("."), value))


def test_what_no_check_foresees_is_refused_as_a_config_not_as_a_crash(plain):
    # A network of single images for a task of pairs.
    section = {"name": "small_cnn", "classes": 10}
    message = r"The network can't be applied to images \(2, 8, 8, 1\) with the settings of its"
    with pytest.raises(ValueError, match=message):
        experiment.build(_with(plain, ("backbone",), section))
    # Whoever wrote the network wants to see where.
    section["name"] = "sire_jax.backbones.small:SmallCNN"
    with pytest.raises(TypeError, match="ndim to be equal"):
        experiment.build(_with(plain, ("backbone",), section))


def test_a_whole_number_is_as_good_as_a_float(plain):
    changed = _with(plain, ("augmentation",), {"flip": {"name": "flip", "probability": 1}})
    changed.backbone.dropout = 0
    changed.objectives.digits.weight = 3
    parts = experiment.build(changed)
    batch = {"image": jax.numpy.arange(6.0).reshape(1, 1, 2, 3, 1)}
    flipped = parts.augment(jax.random.key(0), batch)["image"]
    assert np.array_equal(flipped, batch["image"][..., ::-1, :])


def test_sections_that_are_none_are_left_for_the_check_to_name(plain):
    for path, value in ((("data",), 3), (("data", "groups"), 3), (("optimizer",), "adam")):
        changed = _with(plain, path, value)
        message = f"config.{'.'.join(path)} is {value!r}; it should be a section"
        with pytest.raises(ValueError, match=re.escape(message)):
            experiment.build(configuration.with_groups(changed))
    with pytest.raises(ValueError, match=r"config\.optimizer has no key 'name'"):
        configuration.override(changed, ["--config.optimizer.name=sgd"])
