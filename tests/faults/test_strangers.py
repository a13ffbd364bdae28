"""Files from strangers: never unpickled, nothing in them run, refused with a message."""

import ast
import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from ml_collections import ConfigDict
from planned import random_like

import sire_jax
from sire_jax import configuration, evaluate, export, groups, registry, train, untrusted
from sire_jax.configuration import experiment
from sire_jax.configuration import groups as group_sections
from sire_jax.data import copies, sources
from sire_jax.data.folders import FolderSplit
from sire_jax.data.records import Records
from sire_jax.groups import confusion, partition
from sire_jax.inference import exported
from sire_jax.job import command
from sire_jax.runs.trained import open_run
from sire_jax.storage.workdir import Workdir, read_config, read_metrics, read_results

QUICKSTART = f"{configuration.repository_configs()}/quickstart.py"


class Payload:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """Where a payload leaves its mark; it must not."""
    path = tmp_path / "executed"
    yield str(path)
    assert not path.exists()


def test_the_payload_would_leave_its_mark(tmp_path):
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "executed"))))
    assert (tmp_path / "executed").exists()


def _header(shape, dtype="<f4"):
    """The beginning of a .npy file, with any text as its shape and dtype."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def _objects(mark):
    file = io.BytesIO()
    np.save(file, np.array([Payload(mark)], object), allow_pickle=True)
    return file.getvalue()


def _arrays_of_strangers(mark):
    """Contents of .npy files: what the file is, the bytes, and what the message says."""
    return {
        "objects": (_objects(mark), "Object arrays cannot be loaded when allow_pickle=False"),
        "objects in a structure": (
            _header("(1,)").replace(b"'<f4'", b"[('a', '|O')]") + pickle.dumps(Payload(mark)),
            "Object arrays cannot be loaded",
        ),
        "a petabyte": (_header("(1000000000000000,)") + bytes(64), ""),
        "an overflow": (_header("(4294967296, 4294967296, 4294967296)") + bytes(64), ""),
        "a negative length": (_header("(-1,)") + bytes(64), ""),
        "nested": (_header("(" * 2000) + bytes(64), ""),
        "an expression": (_header("__import__('os').mkdir('" + mark + "')") + bytes(64), ""),
        "no dtype": (_header("(1,)", "evil") + bytes(64), ""),
        "no elements": (_header("(16,)"), ""),
        "half a header": (_header("(16,)")[:20], ""),
    }


ARRAYS = list(_arrays_of_strangers(""))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What export wrote of a network, as it was initialized."""
    path = tmp_path_factory.mktemp("export") / "digits.npz"
    config = configuration.load(QUICKSTART)
    parts = experiment.forward(config)
    values = exported.paths(random_like(parts.variables))
    stored = {path: np.asarray(values[path]) for path in exported.needed(parts, "digits")}
    exported.save(path, config, "digits", stored)
    return path


def _archive(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _refused(path, message=""):
    with pytest.raises(ValueError, match=message) as refused:
        exported.load(path)
    assert path.name in str(refused.value)
    assert len(str(refused.value)) < 2000


# A kernel and the config: one that is read as numbers, one as text.
@pytest.mark.parametrize("place", ["config.npy", "params/backbone/branch/hidden/kernel.npy"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_an_export_with_an_array_of_a_stranger_is_refused(written, tmp_path, mark, place, kind):
    content, message = _arrays_of_strangers(mark)[kind]
    members = _members(written)
    assert place in members
    _archive(tmp_path / "export.npz", {**members, place: content})
    _refused(tmp_path / "export.npz", f"is damaged, or holds no arrays: .*{message}")


def test_an_export_that_is_a_pickle_is_refused(tmp_path, mark):
    path = tmp_path / "export.npz"
    path.write_bytes(pickle.dumps(Payload(mark)))
    _refused(path, "it is no npz archive")
    path.write_bytes(_objects(mark))
    _refused(path, "it is no npz archive")
    # An archive, with a pickle for an array.
    _archive(path, {"config.npy": pickle.dumps(Payload(mark)), "data.pkl": b"x"})
    _refused(path, "config.* is no array")


def test_names_that_lead_out_of_an_archive_are_only_names(written, tmp_path):
    inner = tmp_path / "in" / "it"
    inner.mkdir(parents=True)
    kernel = io.BytesIO()
    np.save(kernel, np.zeros(3, np.float32))
    for name in ("../../slipped.npy", str(tmp_path / "slipped.npy"), "..\\..\\slipped.npy"):
        _archive(inner / "export.npz", {**_members(written), name: kernel.getvalue()})
        _refused(inner / "export.npz", "slipped, which is not needed")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["export.npz", "in", "it"]


def test_small_files_that_claim_to_be_large_are_refused(written, tmp_path, monkeypatch):
    path = tmp_path / "export.npz"
    np.savez_compressed(path, config=np.zeros(10_000_000, np.uint8))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(np, "load", None)
    _refused(path, "it claims to hold more bytes than it has")
    # One content under many names, as bombs have it.
    members = _members(written)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.npy", members["config.npy"])
        first = archive.infolist()[0]
        for i in range(50):
            copied = zipfile.ZipInfo(f"copy_{i}.npy")
            for key in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(copied, key, getattr(first, key))
            archive.filelist.append(copied)
    _refused(path, "it claims to hold more bytes than it has")


def test_whatever_bits_are_flipped_reading_ends_with_arrays_or_a_message(written, tmp_path):
    path, whole = tmp_path / "export.npz", written.read_bytes()
    generator = np.random.default_rng(0)
    for i in range(300):
        # Half of them in the directory at the end, which is not as well guarded as the arrays.
        place = int(generator.integers(len(whole) - 2000 if i % 2 else 0, len(whole)))
        bit = bytes([whole[place] ^ (1 << int(generator.integers(8)))])
        path.write_bytes(whole[:place] + bit + whole[place + 1 :])
        # Any other exception fails the test.
        with contextlib.suppress(ValueError):
            found = untrusted.read_arrays(path)
            assert all(isinstance(values, np.ndarray) for values in found.values())


def _nested(depth, inner="0"):
    return '{"a": ' * depth + inner + "}" * depth


# JSON that is none, or not what it should be.
JSON = {
    "a pickle": ("\x80\x04\x95", "can't be read as JSON"),
    "nothing": ("", "can't be read as JSON: Expecting value"),
    "cut off": ('{"seed": 0', "can't be read as JSON: Expecting ',' delimiter"),
    "nested": (_nested(100_000), "can't be read as JSON: it is nested too deeply"),
    "nested lists": ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
    "a little too nested": (_nested(60), "it is nested too deeply"),
    "a key twice": ('{"seed": 0, "seed": 1}', "the key 'seed' stands twice"),
    "thousands of digits": ('{"seed": ' + "9" * 5000 + "}", "can't be read as JSON: Exceeds the"),
}
OTHER_JSON = {
    "a list": ("[1, 2]", "holds no config; it should be a JSON object"),
    "a number": ("3", "holds no config; it should be a JSON object"),
    "no value": ("null", "holds no config; it should be a JSON object"),
    "a dotted key": ('{"a.b": 1}', "holds no config: .* dots"),
    "a key of Python's": ('{"__class__": 1}', "holds no config: .*__class__"),
    "nothing in it": ("{}", "config.backbone: A backbone needs a 'name'"),
    "a stranger's": ('{"os": "system"}', "config has no key 'os'"),
}


def _without_a_trace_of(text):
    """The config of the quickstart with something else in it."""
    return {**configuration.load(QUICKSTART).to_dict(), **text}


def _config_texts():
    changes = {
        "NaN": ({"epochs": float("nan")}, "epochs.* nan"),
        "infinity": ({"peer_timeout": float("inf")}, "config.peer_timeout is inf"),
        "a huge number": ({"epochs": 10**4000}, "config.epochs is 1000+….* below 2..31"),
        "an absurd size": ({"seeds": 2**62}, "config.seeds is 4611686018427387904"),
        "a section for a number": ({"seed": {"a": 1}}, "config.seed is {'a': 1}, a section"),
        "a list for a section": ({"backbone": [1]}, r"config.backbone is \(1,\)"),
        "an absurd network": (
            {"backbone": {"name": "pair_dense", "hidden": [2**40]}},
            r"config.backbone.hidden\[0\] is 1099511627776; it should be below 2..31",
        ),
    }
    whole = {
        name: (json.dumps(_without_a_trace_of(change)), message)
        for name, (change, message) in changes.items()
    }
    return {**JSON, **OTHER_JSON, **whole}


CONFIGS = _config_texts()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_config_of_a_stranger_is_refused_in_a_workdir(tmp_path, kind, capsys):
    text, message = CONFIGS[kind]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([f"--workdir={tmp_path}"])
    assert stopped.value.code == command.EXPLAINED
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert len(said) < 2000


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_config_of_a_stranger_is_refused_in_an_export(written, tmp_path, kind):
    text, message = CONFIGS[kind]
    array = io.BytesIO()
    np.save(array, np.array(text))
    _archive(tmp_path / "export.npz", {**_members(written), "config.npy": array.getvalue()})
    _refused(tmp_path / "export.npz", message)


def test_a_config_that_is_no_text_or_very_large_is_refused(tmp_path, mark, monkeypatch):
    path = tmp_path / "config.json"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match=r"config\.json can't be read as text"):
        read_config(tmp_path)
    monkeypatch.setattr(untrusted, "MOST_BYTES", 1000)
    path.write_text("[" + "0, " * 1000 + "0]")
    with pytest.raises(ValueError, match=r"config\.json has 3,003 bytes; .* at most 1,000"):
        read_config(tmp_path)


# Wherever a config names a part.
PLACES = (
    "backbone.name",
    "heads.digits.name",
    "augmentation.one.name",
    "predictions.order.name",
    "data.task.name",
    "optimizer.name",
    "optimizer.learning_rate.name",
    "optimizer.learning_rate.unit",
    "update_rule.name",
    "aggregator.name",
    "weighting.name",
    "objectives.main.loss",
    "objectives.main.loss.name",
    "objectives.main.weight.name",
    "heads.branch.layers",
    "heads.branch.layers.0.name",
)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A module of a stranger that can be imported, and leaves a mark if it is."""
    mark = str(tmp_path / "executed")
    (tmp_path / "package_of_a_stranger.py").write_text(
        f"import os\n\nos.mkdir({mark!r})\n\n\ndef part(**settings):\n    return settings\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "package_of_a_stranger", raising=False)
    return "package_of_a_stranger:part"


@pytest.fixture
def stranger(importable, mark):
    """The same; it must not be imported."""
    return importable


def test_the_module_would_leave_its_mark(importable, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(_naming("backbone.name", importable)))
    monkeypatch.setenv("SIRE_JAX_TRUST", "package_of_a_stranger")
    with pytest.raises(
        ValueError, match=r"config\.backbone: The backbone 'package_of_a_stranger:p"
    ):
        open_run(tmp_path)
    assert (tmp_path / "executed").exists()


def _naming(place, name):
    """A config that names a part of one's own."""
    plain = configuration.load(QUICKSTART).to_dict()
    plain["augmentation"]["one"] = {"name": "flip"}
    plain["optimizer"]["learning_rate"] = {"name": "constant", "value": 0.1}
    plain["objectives"]["main"]["weight"] = {"name": "constant", "value": 0.1}
    if place == "objectives.main.loss.name":
        plain["objectives"]["main"]["loss"] = {}
    if place.startswith("heads.branch"):
        plain["heads"]["branch"] = {"name": "branch", "position": "1", "classes": 2}
        plain["heads"]["branch"]["layers"] = [{}]
    *sections, key = place.split(".")
    section = plain
    for each in sections:
        section = section[int(each) if each.isdecimal() else each]
    section[key] = name
    return plain


@pytest.mark.parametrize("place", PLACES)
def test_code_that_a_stored_config_names_is_not_run(written, tmp_path, stranger, place):
    text = json.dumps(_naming(place, stranger))
    message = f"config.json names code of its own, config.{place.replace('.0', '')}: '{stranger}'"
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        open_run(tmp_path)
    assert str(refused.value).endswith("allow its module: SIRE_JAX_TRUST=package_of_a_stranger.")
    array = io.BytesIO()
    np.save(array, np.array(text))
    _archive(tmp_path / "export.npz", {**_members(written), "config.npy": array.getvalue()})
    _refused(tmp_path / "export.npz", "names code of its own")
    assert "package_of_a_stranger" not in sys.modules


# Modules that are there already, and those of this project: what they hold can do harm, too.
@pytest.mark.parametrize(
    "name",
    ["os:system", "builtins:exec", "sire_jax.configuration:load", "subprocess:run", ":", "a:"],
)
def test_no_module_is_allowed_by_itself(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(_naming("backbone.name", name)))
    with pytest.raises(ValueError, match=f"config.backbone.name: '{name}', which would be run"):
        open_run(tmp_path)


def test_modules_are_allowed_by_the_environment(monkeypatch):
    config = ConfigDict(_naming("backbone.name", "mine.networks:CNN"))

    def check(trusted):
        monkeypatch.setenv("SIRE_JAX_TRUST", trusted)
        untrusted.check_names(config, "", "config.json")

    for trusted in ("mine.networks", "mine", "other, mine", " mine.networks ,other"):
        check(trusted)
    for trusted in ("", ",", " ", "other", "min", "mine.network", "mine.networks.deeper", "*", "1"):
        with pytest.raises(ValueError, match=r"SIRE_JAX_TRUST=mine\.networks\.$"):
            check(trusted)


def test_texts_of_a_config_that_are_no_parts_may_have_colons():
    config = configuration.load(QUICKSTART)
    config.name = "a: the first"
    config.data.update(name="tfds:mnist", dir="C:\\data", cache="/a:b")
    config.data.groups = ConfigDict({"kinds": configuration.grouping("c:groups.json", 2)})
    config.data.groups.kinds.classes = ("a:b", "os:system")
    untrusted.check_names(config, "", "config.json")
    assert not untrusted.has_names(config)


def test_ones_own_config_file_may_name_ones_own_parts_and_go_on(tmp_path, monkeypatch):
    section = {"name": "sire_jax.backbones.pair:PairDense", "hidden": (4,)}
    config = configuration.load(f"{QUICKSTART}:main_only")
    config = ConfigDict({**config.to_dict(), "backbone": section})
    experiment.build(config)
    Workdir(tmp_path, config).write_config()
    # Training compares, and builds from the file that it is given.
    Workdir(tmp_path, config)
    assert read_config(tmp_path, building=False).backbone.to_dict() == section
    # What this user has trained is built for other programs, too; once it is changed, no longer.
    assert read_config(tmp_path).backbone.to_dict() == section
    stored = tmp_path / "config.json"
    written = stored.read_text()
    refusal = r"SIRE_JAX_TRUST=sire_jax\.backbones\.pair\.$"
    changed = json.loads(written)
    changed["backbone"]["hidden"] = [5]
    stored.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=refusal):
        read_config(tmp_path)
    # To another user it is a stranger's.
    stored.write_text(written)
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    with pytest.raises(ValueError, match=refusal):
        read_config(tmp_path)


@pytest.mark.optax_dtypes
@pytest.mark.slow  # It trains a run of its own.
def test_what_one_exports_of_ones_own_run_needs_no_permission(tmp_path, monkeypatch):
    given = ("epochs=1", "seeds=1", "data.task.train=100", "data.task.test=20")
    path = programs.TINY.removeprefix("--config=")
    config = configuration.load(path, [f"--config.{each}" for each in given])
    own = {"name": "sire_jax.backbones.pair:PairDense", "hidden": (4,)}
    config = ConfigDict({**config.to_dict(), "backbone": own})
    train.train(config, str(tmp_path / "run"))
    export.export(tmp_path / "run", "main", tmp_path / "main.npz")
    assert exported.load(tmp_path / "main.npz").output == "main"
    # What is allowed for once is not remembered.
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    monkeypatch.setenv("SIRE_JAX_TRUST", "sire_jax.backbones.pair")
    export.export(tmp_path / "run", "main", tmp_path / "copy.npz")
    monkeypatch.delenv("SIRE_JAX_TRUST")
    for name in ("main.npz", "copy.npz"):
        with pytest.raises(ValueError, match=r"SIRE_JAX_TRUST=sire_jax\.backbones\.pair\.$"):
            exported.load(tmp_path / name)


def test_without_a_home_nothing_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    config = ConfigDict(_naming("backbone.name", "mine.networks:CNN"))
    Workdir(tmp_path, config).write_config()
    with pytest.raises(ValueError, match=r"SIRE_JAX_TRUST=mine\.networks\.$"):
        read_config(tmp_path)


def test_compiled_programs_are_not_read_from_where_a_stranger_says(tmp_path):
    config = configuration.load(QUICKSTART, ["--config.compilation_cache=/of/a/stranger"])
    Workdir(tmp_path, config).write_config()
    assert read_config(tmp_path).compilation_cache == configuration.default().compilation_cache
    assert read_config(tmp_path, building=False).compilation_cache == "/of/a/stranger"


@pytest.mark.parametrize(
    "text",
    [
        *(text for text, _ in JSON.values()),
        "[1, 2]",
        "3",
        '"text"',
        "{}",
        '{"splits": 3}',
        '{"splits": {"test": [1]}}',
    ],
)
def test_the_results_of_a_stranger_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json (can't be read|holds no results)"):
        read_results(tmp_path)


def test_lines_of_a_stranger_are_no_measurements(tmp_path, mark):
    good = {"step": 1, "epoch": 1, "split": "test", "main/loss": [0.5, float("nan")]}
    bad = [
        *(text.replace("\n", "") for text, _ in JSON.values()),
        "[1]",
        "3",
        json.dumps({"step": 1}),
        json.dumps({**good, "step": "1"}),
        json.dumps({**good, "step": True}),
        json.dumps({**good, "split": None}),
        json.dumps({**good, "main/loss": 0.5}),
        json.dumps({**good, "main/loss": ["0.5"]}),
        json.dumps({**good, "main/loss": [[0.5]]}),
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*bad, json.dumps(good), *bad]))
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 1
    assert np.isnan(line["main/loss"][1])
    path.write_bytes(pickle.dumps(Payload(mark)) + b"\n" + json.dumps(good).encode())
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("kind", JSON)
def test_the_groups_of_a_stranger_are_refused(tmp_path, kind):
    text, message = JSON[kind]
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"groups.json .*{message}"):
        groups.load(path)


def test_groups_that_are_a_pickle_or_very_large_are_refused(tmp_path, mark, monkeypatch):
    path = tmp_path / "groups.json"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match=r"groups\.json can't be read as text"):
        groups.load(path)
    monkeypatch.setattr(untrusted, "MOST_BYTES", 10)
    path.write_text(partition.SHAPE)
    with pytest.raises(ValueError, match="it should have at most 10"):
        groups.load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("file", 3, "groups.kinds.file is 3, a int; it should be a str"),
        ("groups", "2", "groups.kinds.groups is '2', a str; it should be a int"),
        ("classes", (1, 2), r"kinds.classes is \(1, 2\), a tuple; it should be a tuple of str"),
        ("assignment", ("0", 1), "kinds.assignment is .*; it should be a tuple of int"),
        ("assignment", (0, True), "kinds.assignment is .*; it should be a tuple of int"),
        ("assignment", (0, 2**40), r"kinds.assignment\[1\] is 1099511627776; it should be below"),
        ("assignment", (0, 5), r"in the groups \[0, 5\]; groups should be numbered"),
    ],
)
def test_groups_of_a_stranger_in_a_config_are_refused(key, value, message):
    section = {"file": "", "groups": 2, "classes": ("a", "b"), "assignment": (0, 1)}
    assert _groups_of(section).number == 2
    with pytest.raises(ValueError, match=message):
        _groups_of({**section, key: value})


def _groups_of(section):
    group_sections.check("kinds", section)
    return group_sections.create({"kinds": section})["kinds"]


def _decoded():
    image, label = np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int32)
    arrays = {"image": image, "labels/label": label, "skipped": np.zeros(0, np.int64)}
    return {f"{part}/{key}": values for part in ("train", "test") for key, values in arrays.items()}


def _records():
    split = FolderSplit(
        Path("/"), np.array([b"a"] * 3), np.zeros(3, np.int32), np.ones(3), np.arange(3), ("a",)
    )
    return {part: Records((split,), {"label": 2}, 1) for part in ("train", "test")}


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_copy_of_decoded_images_of_a_stranger_is_not_used(tmp_path, mark, kind):
    path = tmp_path / "copy.npz"
    np.savez(path, **_decoded())
    assert sources._read(path, _records())["train"].image.shape == (3, 2, 2, 1)
    content, message = _arrays_of_strangers(mark)[kind]
    _archive(path, {**_members(path), "train/image.npy": content})
    with pytest.warns(UserWarning, match=f"copy.npz is damaged.*{message}.*which is made anew"):
        assert copies.read(path) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train/image", None),
        ("train/image", np.zeros((3, 2, 2))),
        ("train/image", np.zeros((3, 2, 2, 1))),
        ("train/image", np.zeros((2, 2, 2, 1), np.uint8)),
        ("test/labels/label", None),
        ("test/labels/label", np.zeros((3, 1), np.int32)),
        ("test/labels/label", np.array([0, 1, 2], np.int32)),
        ("test/labels/label", np.array([0, -1, 1], np.int32)),
        ("test/skipped", None),
        ("test/skipped", np.array("a")),
    ],
)
def test_a_copy_of_another_structure_is_not_used(tmp_path, key, value):
    path = tmp_path / "copy.npz"
    arrays = {**_decoded(), key: value}
    if value is None:
        del arrays[key]
    np.savez(path, **arrays)
    with pytest.warns(UserWarning, match=r"copy\.npz holds no such decoded data set: .*made anew"):
        assert sources._read(path, _records()) is None


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_confusion_matrix_of_a_stranger_is_refused(tmp_path, mark, kind):
    content, message = _arrays_of_strangers(mark)[kind]
    path = tmp_path / "counts.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"counts.npy holds no matrix of numbers: .*{message}"):
        confusion.read(path)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match="holds no matrix of numbers"):
        confusion.read(path)


FEATURES = {
    "featuresDict": {
        "features": {
            "image": {
                "image": {"dtype": "uint8"},
                "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
            }
        }
    },
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
}


@pytest.mark.parametrize(
    "feature",
    [
        {"pythonClassName": "package_of_a_stranger.Feature"},
        {"python_class_name": "package_of_a_stranger.Feature"},
        {"type": "package_of_a_stranger.Feature", "content": {}},
        {"jsonFeature": {"json": '{"f": {"type": "package_of_a_stranger.Feature"}}'}},
        {"sequence": {"feature": {"pythonClassName": "package_of_a_stranger.Feature"}}},
    ],
)
def test_a_prepared_set_whose_features_are_a_strangers_code_is_refused(
    tmp_path, stranger, feature, monkeypatch
):
    path = tmp_path / "features.json"
    path.write_text(json.dumps(FEATURES))
    untrusted.check_features(tmp_path)
    changed = json.loads(path.read_text())
    changed["featuresDict"]["features"]["more"] = feature
    path.write_text(json.dumps(changed))
    message = r"features\.json names code of its own, 'package_of_a_stranger.Feature', which would"
    with pytest.raises(ValueError, match=message):
        untrusted.check_features(tmp_path)
    monkeypatch.setenv("SIRE_JAX_TRUST", "package_of_a_stranger")
    untrusted.check_features(tmp_path)


PACKAGE = Path(sire_jax.__file__).parent
# Whatever unpickles, or runs text.
FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml",
    "torch",
}  # fmt: skip
# The one place that imports by name, and the one that runs the user's own config file.
ALONE = {"importlib.import_module": "registry.py", "runpy.run_path": "configuration/loading.py"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_of_the_package_can_unpickle(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [each.name for each in node.names]
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in modules} & FORBIDDEN
            assert not {"import_module", "run_path", "run_module"} & set(modules)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "runpy.run_module")
            place = path.relative_to(PACKAGE).as_posix()
            assert ALONE.get(called, place) == place
            given = {each.arg: ast.unparse(each.value) for each in node.keywords}
            assert given.get("allow_pickle", "False") == "False"
            if called in ("np.load", "np.lib.format.read_array"):
                assert given["allow_pickle"] == "False"


def test_a_part_that_a_config_names_is_only_looked_up_in_its_registry():
    # Attributes of a registry's parts, of Python and of this module are no names.
    for name in ("__class__", "keys", "os.system", "registry.choose", ""):
        with pytest.raises(ValueError, match="There is no part"):
            registry.choose_part({"flip": jax.numpy.flip}, name, "part")
