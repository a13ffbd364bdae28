"""Checkpoints that somebody else made: nothing in them is executed, nothing outside is opened."""

import gc
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax.storage import manifest
from sire_jax.storage.checkpoint import CheckpointError, Checkpoints

STEP = 7

# orbax, which reads all arrays at once, leaves what the first error cuts off.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _left_behind():
    """Lets go of what orbax leaves, so that no other test is told of it."""
    yield
    gc.collect()


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


@pytest.fixture
def mark(tmp_path):
    """The file that a payload creates."""
    path = tmp_path / "payload-was-run"
    pickle.loads(pickle.dumps(_Payload(path)))
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


def _tree():
    return {"x": jnp.arange(300.0), "key": jax.random.key(1), "half": jnp.ones(3, jnp.bfloat16)}


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "checkpoints"
    made = Checkpoints(directory)
    made.save(STEP, _tree(), {"jax": "0.10"})
    made.close()
    return directory


def _reseal(directory):
    """Writes a manifest that is right for what is in the directory now."""
    path = directory / str(STEP)
    old = manifest.read(path)
    (path / "manifest").unlink()
    manifest.write(path, STEP, old.arrays, old.sha256, old.notes)
    assert manifest.damage(path, STEP) is None


def _files(directory):
    return sorted(p for p in (directory / str(STEP)).rglob("*") if p.is_file())


FILES = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "commit_success.txt", "d", "ocdbt")
# Which orbax does not read to restore.
REMARKS = ("_CHECKPOINT_METADATA", "commit_success.txt")


def _replace(directory, which, data):
    """Replaces a file of orbax's, or all those in one of its directories."""
    path = directory / str(STEP)
    inside = [p for p in _files(directory) if p.relative_to(path).parts[0].startswith(which)]
    replaced = [p for p in inside if which != "manifest.ocdbt" or p.name == which]
    assert replaced
    for each in replaced:
        each.write_bytes(data)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("which", FILES)
def test_a_pickle_in_place_of_a_file_is_noticed(saved, mark, which, protocol):
    _replace(saved, which, pickle.dumps(_Payload(mark), protocol))
    made = Checkpoints(saved)
    with pytest.warns(UserWarning, match="Checkpoint 7 .* is damaged: .*; there is no other"):
        assert made.latest() is None
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        made.restore(_tree())


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("which", FILES)
def test_a_pickle_with_a_manifest_is_refused(saved, mark, which, protocol):
    _replace(saved, which, pickle.dumps(_Payload(mark), protocol))
    _reseal(saved)
    made = Checkpoints(saved)
    assert made.latest() == STEP
    if which in REMARKS:
        assert np.array_equal(made.restore(_tree())["x"], _tree()["x"])
        return
    with pytest.raises(CheckpointError, match=r"Checkpoint 7 in .* can't be read: "):
        made.restore(_tree())


def test_pickles_in_place_of_everything_are_refused(saved, mark):
    for path in _files(saved):
        if path.name != "manifest":
            path.write_bytes(pickle.dumps(_Payload(mark)))
    _reseal(saved)
    for name in ("checkpoint", "state.pkl", "x.npy"):
        (saved / str(STEP) / name).write_bytes(pickle.dumps(_Payload(mark)))
    _reseal(saved)
    with pytest.raises(CheckpointError, match=r"Checkpoint 7 in .* can't be read: "):
        Checkpoints(saved).restore(_tree())


@pytest.mark.parametrize("sealed", [True, False])
def test_a_pickle_in_place_of_the_manifest_is_refused(saved, mark, sealed):
    data = pickle.dumps(_Payload(mark))
    path = saved / str(STEP) / "manifest"
    path.write_bytes(data)
    if sealed:
        path.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    with pytest.warns(UserWarning, match="'manifest' "):
        assert Checkpoints(saved).latest() is None


@pytest.mark.parametrize("kind", ["files", "directories"])
@pytest.mark.parametrize("path", ["../x", "/etc/hostname", "d/../../x", "~/x", "", ".", "\0"])
def test_paths_that_leave_the_directory_are_refused(saved, path, kind, monkeypatch):
    (saved / "x").write_text("outside")
    place = saved / str(STEP) / "manifest"
    content = manifest.read_sealed(place)
    if kind == "files":
        content["files"][path] = {"size": 7, "sha256": "0" * 64}
    else:
        content["directories"].append(path)
    manifest.write_sealed(place, content)
    opened = []
    monkeypatch.setattr(manifest, "_hash", lambda path: opened.append(path))
    with pytest.warns(UserWarning, match="is damaged: '.*' is missing; there is no other"):
        assert Checkpoints(saved).latest() is None
    assert opened == []


def test_links_that_leave_the_directory_are_refused(saved, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(saved / str(STEP) / "_METADATA", outside)
    (saved / str(STEP) / "_METADATA").symlink_to(outside)
    with pytest.warns(UserWarning, match="'_METADATA' is neither a file nor a directory"):
        assert Checkpoints(saved).latest() is None


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"step": "7"},
        {"step": STEP, "files": [], "directories": [], "arrays": {}, "notes": {}, "sha256": ""},
        {"step": STEP, "files": {"a": 1}, "directories": [], "arrays": {}, "notes": {}},
        {"step": [], "files": {}, "directories": [], "arrays": {}, "notes": {}, "sha256": ""},
        {"step": STEP, "files": {}, "directories": 3, "arrays": {}, "notes": {}, "sha256": ""},
        {"step": STEP, "files": {}, "directories": [], "arrays": {"a": {}}, "notes": {}},
        {
            **{"step": STEP, "files": {}, "directories": [], "notes": {}, "sha256": ""},
            "arrays": {"a": {"shape": "many", "dtype": "float32"}},
        },
    ],
)
def test_manifests_of_another_form_are_refused(saved, content):
    manifest.write_sealed(saved / str(STEP) / "manifest", content)
    with pytest.warns(UserWarning, match="is damaged: 'manifest' is not a manifest; there is no"):
        assert Checkpoints(saved).latest() is None


def test_deep_json_is_refused(saved):
    text = b"[" * 100_000
    sealed = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
    (saved / str(STEP) / "manifest").write_bytes(sealed)
    (saved / "newest").write_bytes(sealed)
    with pytest.warns(UserWarning, match="'manifest' maximum recursion|'newest' in ") as told:
        assert Checkpoints(saved).latest() is None
    assert len(told) == 2


@pytest.mark.parametrize("change", ["bytes", "shape", "dtype"])
def test_other_numbers_with_a_manifest_of_the_real_ones_are_refused(saved, tmp_path, change):
    other = {"x": jnp.arange(300.0).at[5].set(-1), "key": jax.random.key(1)}
    other["half"] = jnp.ones(3, jnp.bfloat16)
    if change == "shape":
        other["x"] = jnp.arange(301.0)
    if change == "dtype":
        other["half"] = jnp.ones(3, jnp.float32)
    made = Checkpoints(tmp_path / "other")
    made.save(STEP, other)
    made.close()
    real = manifest.read(saved / str(STEP))
    path = tmp_path / "other" / str(STEP)
    (path / "manifest").unlink()
    manifest.write(path, STEP, real.arrays, real.sha256, real.notes)
    with pytest.raises(
        CheckpointError, match=r"Checkpoint 7 in .* can't be read: .*(it|its \w+ is) "
    ):
        Checkpoints(tmp_path / "other").restore(_tree())


def test_a_manifest_is_json_below_its_digest(saved):
    first, _, rest = (saved / str(STEP) / "manifest").read_bytes().partition(b"\n")
    content = json.loads(rest)
    assert len(first) == 64
    assert content["arrays"]["x"] == {"shape": [300], "dtype": "float32"}
    assert content["arrays"]["key"] == {"shape": [], "dtype": "key<fry>"}
    assert content["notes"] == {"jax": "0.10"}
    size = (saved / str(STEP) / "_METADATA").stat().st_size
    assert content["files"]["_METADATA"]["size"] == size
    assert set(content["directories"]) == {"d", "ocdbt.process_0", "ocdbt.process_0/d"}
