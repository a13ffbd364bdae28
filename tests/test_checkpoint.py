import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sire_jax.storage import manifest, trees
from sire_jax.storage.checkpoint import CheckpointError, Checkpoints


def _tree(seed=0):
    key = jax.random.key(seed)
    odd = jnp.array([0.0, -0.0, jnp.inf, jnp.nan, 1e-42, 1 / 3], jnp.float32)
    return {
        "params": {"kernel": jax.random.normal(key, (3, 4)), "odd": odd},
        "half": jax.random.normal(key, (2, 5), jnp.bfloat16),
        "step": jnp.asarray(2**31 - 1 - seed, jnp.int32),
        "key": key,
        "keys": jax.random.split(key, 3),
        "list": [jnp.full((1, 2), 7, jnp.uint8), jnp.array([True, False])],
    }


def _bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(x)), _bits(jax.random.key_data(x))
    return x.shape, str(x.dtype), np.asarray(x).tobytes()


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [_bits(x) for x in jax.tree.leaves(a)] == [_bits(x) for x in jax.tree.leaves(b)]


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "new" / "checkpoints")
    yield made
    made.close()


def _save(directory, *steps, keep=2, tree=_tree):
    made = Checkpoints(directory, keep=keep)
    for step in steps:
        made.save(step, tree(step))
    made.close()


def _steps(directory):
    return sorted(int(each.name) for each in directory.iterdir() if each.name.isdigit())


def _latest(directory):
    return Checkpoints(directory).latest()


def _everything(directory):
    """What is in a directory, and when it was last written."""
    paths = sorted(directory.rglob("*"))
    return [(path, path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths]


# ---- Saving and restoring.


def test_a_tree_is_restored_bit_for_bit(checkpoints):
    tree = _tree()
    checkpoints.save(5, tree)
    like = jax.tree.map(jnp.zeros_like, tree)
    _assert_same(checkpoints.restore(like), tree)
    assert checkpoints.latest() == 5
    restored = checkpoints.restore(like)
    draw = jax.random.normal(restored["key"], (3,))
    assert jnp.array_equal(draw, jax.random.normal(tree["key"], (3,)))


def test_shapes_are_enough_to_restore(checkpoints):
    tree = _tree()
    checkpoints.save(5, tree)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    restored = checkpoints.restore(like)
    _assert_same(restored, tree)
    assert all(x.devices() == {jax.devices()[1]} for x in jax.tree.leaves(restored))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    _assert_same(checkpoints.restore(like), tree)


class _Node(flax.struct.PyTreeNode):
    params: Any
    best: Any
    name: str = flax.struct.field(pytree_node=False)


class _Pair(NamedTuple):
    left: Any
    right: Any


def test_dataclasses_and_states_of_optimizers_are_restored(checkpoints):
    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2), jnp.bfloat16), "none": None}
    tree = _Node(params, None, "n"), optax.sgd(0.1, 0.9).init(params), _Pair(jnp.int8(3), (None,))
    checkpoints.save(1, tree)
    _assert_same(checkpoints.restore(jax.tree.map(jnp.zeros_like, tree)), tree)


def test_empty_arrays_and_those_of_numpy_are_restored(checkpoints):
    tree = {"empty": jnp.zeros((0, 3)), "keys": jax.random.split(jax.random.key(0), 3)[:0]}
    tree |= {"numpy": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "one": jnp.float32(2)}
    checkpoints.save(1, tree)
    restored = checkpoints.restore(tree)
    _assert_same(restored, tree)
    assert isinstance(restored["numpy"], np.ndarray)
    assert isinstance(restored["empty"], jax.Array)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "threefry2x32"])
def test_keys_of_every_kind_are_restored(checkpoints, impl):
    key = jax.random.key(3, impl=impl)
    checkpoints.save(1, {"key": key, "keys": jax.random.split(key, (2, 2))})
    shape = jax.ShapeDtypeStruct((2, 2), key.dtype)
    restored = checkpoints.restore({"key": key, "keys": shape})
    _assert_same(restored, {"key": key, "keys": jax.random.split(key, (2, 2))})


def test_a_tree_is_placed_like_another(checkpoints):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, split = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
    )
    tree = {"a": jnp.arange(8.0), "keys": jax.random.split(jax.random.key(0), 4)}
    step = 0
    for saved in (everywhere, split, jax.devices()[0]):
        for wanted in (everywhere, split, jax.devices()[1]):
            step += 1
            checkpoints.save(step, jax.device_put(tree, saved))
            like = jax.device_put(jax.tree.map(jnp.zeros_like, tree), wanted)
            restored = checkpoints.restore(like)
            _assert_same(restored, tree)
            assert [x.sharding for x in jax.tree.leaves(restored)] == [
                x.sharding for x in jax.tree.leaves(like)
            ]


def test_what_was_restored_can_be_donated_on_every_device(checkpoints):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.arange(2.0**18), NamedSharding(mesh, PartitionSpec()))
    checkpoints.save(1, {"x": x})
    y = checkpoints.restore({"x": x})["x"]
    double = jax.jit(lambda a: 2 * a, donate_argnums=0)
    for _ in range(5):
        y = double(y)
    for shard in y.addressable_shards:
        assert np.array_equal(shard.data, 32 * np.arange(2.0**18, dtype=np.float32))


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, monkeypatch):
    begin = threading.Event()
    write = trees.write
    monkeypatch.setattr(trees, "write", lambda *args: (begin.wait(20), write(*args)))
    tree = {f"{i}": jnp.full(2**16, i, jnp.float32) for i in range(8)} | {"key": jax.random.key(1)}
    made = Checkpoints(tmp_path)
    made.save(1, tree)
    step = jax.jit(lambda t: {k: v + 1 for k, v in t.items()}, donate_argnums=0)
    key = tree.pop("key")
    for _ in range(3):
        tree = jax.block_until_ready(step(tree))
    begin.set()
    restored = made.restore(tree | {"key": key})
    made.close()
    for i in range(8):
        assert np.array_equal(restored[f"{i}"], np.full(2**16, i, np.float32))


def test_what_is_written_in_several_pieces_is_restored(checkpoints, monkeypatch):
    monkeypatch.setattr(trees, "_CHUNK", 1000)
    tree = {"x": jax.random.normal(jax.random.key(0), (999,)), "y": jnp.arange(3, dtype=jnp.uint8)}
    checkpoints.save(1, tree)
    _assert_same(checkpoints.restore(tree), tree)


def test_views_of_numpy_are_copied_too(checkpoints):
    x = np.zeros(2**16, np.float32)
    checkpoints.save(1, {"x": x})
    x += 1
    assert not checkpoints.restore({"x": x})["x"].any()


@pytest.mark.parametrize(("keep", "left"), [(1, [100]), (2, [20, 100]), (5, [3, 20, 100])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    _save(tmp_path, 3, 20, 100, keep=keep)
    assert _steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left) + 1


def test_at_least_one_is_kept(tmp_path):
    with pytest.raises(ValueError, match="Can't keep 0 checkpoints; it should be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_the_newest_of_several_is_restored_by_another_program(tmp_path):
    _save(tmp_path, 3, 20, 100)
    again = Checkpoints(tmp_path)
    assert again.latest() == 100
    _assert_same(again.restore(_tree()), _tree(100))
    again.close()


def test_a_step_is_saved_once(checkpoints):
    checkpoints.save(5, _tree(1))
    checkpoints.save(5, _tree(2))
    _assert_same(checkpoints.restore(_tree()), _tree(1))


def test_a_step_before_the_newest_is_refused(checkpoints):
    checkpoints.save(5, _tree())
    with pytest.raises(ValueError, match=r"Can't save step 4: .* has a checkpoint of step 5"):
        checkpoints.save(4, _tree())
    with pytest.raises(ValueError, match="Can't save step -1; it should be at least 0"):
        checkpoints.save(-1, _tree())


def test_restoring_without_a_checkpoint_says_so(checkpoints):
    assert checkpoints.latest() is None
    for read in (lambda: checkpoints.restore(_tree()), checkpoints.notes):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*new/checkpoints"):
            read()


def test_notes_are_kept_with_each_checkpoint(tmp_path):
    made = Checkpoints(tmp_path)
    made.save(1, _tree(), {"jax": "0.10", "devices": ["cpu", 2], "share": 0.5, "none": None})
    assert made.notes() == {"jax": "0.10", "devices": ["cpu", 2], "share": 0.5, "none": None}
    made.save(2, _tree())
    assert made.notes() == {}
    with pytest.raises(TypeError, match="not JSON serializable"):
        made.save(3, _tree(), {"array": jnp.zeros(2)})
    made.close()
    assert _steps(tmp_path) == [1, 2]


# ---- What does not fit.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": jnp.zeros((2, 3))}, r"b is float32\[3, 2\] in it, but float32\[2, 3\] here"),
        ({"b": jnp.zeros((3, 2), jnp.bfloat16)}, r"float32\[3, 2\] in it, but bfloat16\[3, 2\] "),
        ({"b": jnp.zeros((3, 2), jnp.int32)}, r"but int32\[3, 2\] here"),
        ({"c": jnp.zeros(())}, r"c is missing in it, but float32\[\] here"),
        ({"b": None}, r"b is float32\[3, 2\] in it, but not asked for here"),
        ({"key": jax.random.key(0, impl="rbg")}, r"key<fry>\[\] in it, but key<rbg>\[\] here"),
        ({"key": jnp.zeros(2, jnp.uint32)}, r"key<fry>\[\] in it, but uint32\[2\] here"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(checkpoints, change, message):
    tree = {"a": jnp.zeros(1), "b": jnp.zeros((3, 2)), "key": jax.random.key(0)}
    checkpoints.save(7, tree)
    with pytest.raises(ValueError, match=message) as raised:
        checkpoints.restore(tree | change)
    assert str(raised.value).startswith("Checkpoint 7 in ")
    assert "another network, optimizer or config" in str(raised.value)
    _assert_same(checkpoints.restore(tree), tree)


def test_the_first_path_that_differs_is_named(checkpoints):
    node = _Node({"w": jnp.zeros(1), "v": jnp.zeros(1)}, None, "n")
    checkpoints.save(1, (node,))
    like = _Node({"w": jnp.zeros(2), "v": jnp.zeros(2)}, None, "n")
    with pytest.raises(ValueError, match=r"0/params/v is float32\[1\] in it"):
        checkpoints.restore((like,))


@pytest.mark.parametrize(
    ("version", "reader"), [({}, "revision 160d875"), ({"format": 99}, "a later version")]
)
def test_a_checkpoint_of_another_version_is_refused(tmp_path, version, reader):
    _save(tmp_path, 3)
    file = tmp_path / "3" / manifest.MANIFEST
    content = manifest.read_sealed(file)
    del content["format"]  # The first had none.
    manifest.write_sealed(file, content | version)
    with pytest.raises(ValueError, match=f"Checkpoint 3 in .* version of sire_jax; {reader} can"):
        Checkpoints(tmp_path).restore(_tree())


# ---- Other programs.


def test_orbax_alone_restores_the_tree(checkpoints, tmp_path):
    tree = {"node": _Node({"w": jnp.arange(3.0)}, None, "n"), "a/b": (jnp.int8(2), _tree())}
    tree |= {"empty": jnp.zeros((0, 2)), "bfloat16": jnp.ones(2, jnp.bfloat16)}
    checkpoints.save(5, tree)
    checkpoints.wait()
    restored = ocp.StandardCheckpointer().restore(tmp_path / "new" / "checkpoints" / "5")
    assert sorted(restored) == ["a/b", "bfloat16", "node"]
    assert restored["node"]["params"]["w"].tolist() == [0, 1, 2]
    assert restored["a/b"]["0"] == 2
    assert restored["bfloat16"].dtype == jnp.bfloat16
    key = jax.random.wrap_key_data(jnp.asarray(restored["a/b"]["1"]["key"]))
    assert jnp.array_equal(jax.random.key_data(key), jax.random.key_data(_tree()["key"]))


# ---- Damage; see tests/faults for random ones.


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _data_file(directory):
    return max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: _flip(d / "_METADATA"), "is damaged: '_METADATA' differs from what was saved"),
        (lambda d: (d / "_METADATA").write_text(""), r"'_METADATA' has 0 bytes, not \d+"),
        (lambda d: (d / "_METADATA").unlink(), "is damaged: '_METADATA' is missing"),
        (lambda d: (d / "more").write_text(""), "is damaged: 'more' does not belong to it"),
        (lambda d: (d / "d" / "more").mkdir(), "is damaged: 'd/more' does not belong to it"),
        (lambda d: _flip(d / "manifest"), "is damaged: 'manifest' differs from what was saved"),
        (lambda d: (d / "manifest").unlink(), "has no 'manifest': its writing was cut off or"),
        (lambda d: shutil.rmtree(d), "is missing altogether"),
        (lambda d: (d / "manifest").write_text("{}"), "'manifest' differs from what was saved"),
        (
            lambda d: manifest.write_sealed(d / "manifest", {"step": 100}),
            "is damaged: 'manifest' is not a manifest",
        ),
        (
            lambda d: shutil.copy(d.parent / "20" / "manifest", d / "manifest"),
            "is damaged: it is a copy of checkpoint 20",
        ),
        (
            lambda d: ((d / "_METADATA").unlink(), (d / "_METADATA").symlink_to("/etc/hostname")),
            "'_METADATA' is neither a file nor a directory",
        ),
        (
            lambda d: ((d / "_METADATA").unlink(), os.mkfifo(d / "_METADATA")),
            "'_METADATA' is neither a file nor a directory",
        ),
        (
            lambda d: ((d / "_METADATA").unlink(), (d / "_METADATA").mkdir()),
            "'_METADATA' is not a file",
        ),
        (lambda d: (shutil.rmtree(d), d.write_text("")), "it is not a directory"),
        (lambda d: (d.rename(d.parent / "x"), d.symlink_to("x")), "it is not a directory"),
    ],
)
def test_damage_is_named_and_the_next_newest_used(tmp_path, damage, message):
    _save(tmp_path, 3, 20, 100, keep=3)
    damage(tmp_path / "100")
    made = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=message) as told:
        assert made.latest() == 20
    assert len(told) == 1
    assert str(told[0].message).startswith(f"Checkpoint 100 in {tmp_path} ")
    assert str(told[0].message).endswith("; checkpoint 20 is used.")
    # Told once.
    assert made.latest() == 20
    _assert_same(made.restore(_tree()), _tree(20))


def test_each_damaged_checkpoint_is_told(tmp_path):
    _save(tmp_path, 3, 20, 100, keep=3)
    for step in (3, 20, 100):
        _flip(_data_file(tmp_path / f"{step}"))
    made = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="differs from what was saved; there is no oth") as told:
        assert made.latest() is None
    assert [str(each.message).split()[1] for each in told] == ["100", "20", "3"]
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        made.restore(_tree())


def test_what_is_damaged_while_the_program_runs_is_noticed(tmp_path):
    _save(tmp_path, 3, 20)
    made = Checkpoints(tmp_path)
    assert made.latest() == 20
    _flip(_data_file(tmp_path / "20"))
    with pytest.warns(UserWarning, match="Checkpoint 20 .* differs"):
        assert made.latest() == 3


def test_only_what_is_new_is_read_again(tmp_path, monkeypatch):
    read = []
    damage = manifest.damage
    monkeypatch.setattr(
        manifest, "damage", lambda path, step: (read.append(step), damage(path, step))[1]
    )
    _save(tmp_path, 3, 20)
    assert read == []
    made = Checkpoints(tmp_path)
    assert [made.latest() for _ in range(3)] == [20, 20, 20]
    made.restore(_tree())
    made.save(30, _tree())
    made.close()
    assert made.latest() == 30
    assert read == [20]


# orbax, which reads all arrays at once, leaves what the first error cuts off.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_change_after_the_check_is_noticed_while_restoring(tmp_path, monkeypatch):
    _save(tmp_path, 3)
    monkeypatch.setattr(manifest, "damage", lambda path, step: None)
    _flip(_data_file(tmp_path / "3"))
    with pytest.raises(CheckpointError, match=r"Checkpoint 3 in .* can't be read: .*"):
        Checkpoints(tmp_path).restore(_tree())
    gc.collect()


def test_a_damaged_record_of_the_newest_is_told(tmp_path):
    _save(tmp_path, 3)
    for write in (_flip, lambda path: manifest.write_sealed(path, {"other": 3})):
        write(tmp_path / "newest")
        with pytest.warns(UserWarning, match="'newest' in .*, the step saved last, .*; checkpoint"):
            assert _latest(tmp_path) == 3
    # As a process leaves it that is killed before it writes the first one.
    (tmp_path / "newest").unlink()
    assert _latest(tmp_path) == 3


def test_strays_break_nothing_and_stay(tmp_path):
    _save(tmp_path, 3, 20)
    for name in ("best", "1e9", "-5", "007", "٣", "tmp.5"):
        (tmp_path / name).mkdir()
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("kept")
    (tmp_path / "notes.txt").write_text("kept")
    assert _latest(tmp_path) == 20
    _save(tmp_path, 30, 40)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("best", "1e9", "-5", "007", "٣", "tmp.5", "notes.txt", "newest"),
        *("1", "2", "30", "40"),
    }
    (tmp_path / "9999").mkdir()
    with pytest.warns(UserWarning, match="Checkpoint 9999 .* no 'manifest'.*; checkpoint 40 is"):
        assert _latest(tmp_path) == 40
    with pytest.warns(UserWarning, match="Checkpoint 9999"):
        _save(tmp_path, 50)
    assert (tmp_path / "9999").exists()


@pytest.mark.parametrize("kind", ["damaged", "file", "link", "directory"])
def test_what_is_in_the_way_of_a_new_checkpoint_is_replaced(tmp_path, kind):
    _save(tmp_path, 3, 20)
    path = tmp_path / "20"
    if kind == "damaged":
        _flip(_data_file(path))
    else:
        path.rename(tmp_path / "aside")
        make = {
            "file": path.touch,
            "link": lambda: path.symlink_to("aside"),
            "directory": (path / "mine").mkdir,
        }
        path.mkdir() if kind == "directory" else None
        make[kind]()
    with pytest.warns(UserWarning, match="Checkpoint 20 "):
        _save(tmp_path, 20, tree=lambda step: _tree(7))
    made = Checkpoints(tmp_path)
    assert made.latest() == 20
    _assert_same(made.restore(_tree()), _tree(7))
    assert kind == "damaged" or (tmp_path / "aside" / "manifest").exists()


def test_damaged_checkpoints_are_not_among_those_kept(tmp_path):
    _save(tmp_path, 1, 2, 3, 4, keep=4)
    for step in (4, 2):
        _flip(_data_file(tmp_path / f"{step}"))
    with pytest.warns(UserWarning, match="Checkpoint 4 .*; checkpoint 3 is used"):
        _save(tmp_path, 5, keep=3)
    assert _steps(tmp_path) == [1, 3, 5]
    assert _latest(tmp_path) == 5


def test_leftovers_of_killed_processes_go_at_the_next_save(tmp_path):
    _save(tmp_path, 3)
    for name in ("20.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-17", ".removing-1"):
        shutil.copytree(tmp_path / "3", tmp_path / name)
    # Cut off before its manifest was written.
    shutil.copytree(tmp_path / "3", tmp_path / "9")
    (tmp_path / "9" / "manifest").unlink()
    with pytest.warns(UserWarning, match="Checkpoint 9 .* its writing was cut off"):
        assert _latest(tmp_path) == 3
    with pytest.warns(UserWarning, match="Checkpoint 9 "):
        _save(tmp_path, 20)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "20", "newest"}


def test_reading_changes_nothing(tmp_path):
    _save(tmp_path, 3, 20)
    _flip(_data_file(tmp_path / "20"))
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    before = _everything(tmp_path)
    made = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="Checkpoint 20"):
        made.restore(_tree())
    made.notes()
    made.close()
    assert _everything(tmp_path) == before
    assert _latest(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_a_process_may_be_killed_at_any_moment_of_a_save(tmp_path, monkeypatch):
    """A copy of the directory is made around each change of it, as a kill would leave it."""
    directory, copies = tmp_path / "run", tmp_path / "copies"
    _save(directory, 3, 20)

    def around(owner, name):
        real = getattr(owner, name)

        def copying(*args, **kwargs):
            shutil.copytree(directory, copies / f"{len(list(copies.iterdir()))}", symlinks=True)
            result = real(*args, **kwargs)
            shutil.copytree(directory, copies / f"{len(list(copies.iterdir()))}", symlinks=True)
            return result

        monkeypatch.setattr(owner, name, copying)

    copies.mkdir()
    around(trees, "write")
    around(manifest, "write")
    around(manifest, "_sync")
    around(Path, "replace")
    _save(directory, 30)
    monkeypatch.undo()
    found = []
    for copy in sorted(copies.iterdir(), key=lambda path: int(path.name)):
        made = Checkpoints(copy)
        unsealed = (copy / "30").exists() and not (copy / "30" / "manifest").exists()
        if unsealed:
            with pytest.warns(UserWarning, match="Checkpoint 30 .* its writing was cut off"):
                found.append(made.latest())
        else:
            found.append(made.latest())
        _assert_same(made.restore(_tree()), _tree(found[-1]))
    assert len(found) > 15
    assert found == sorted(found)
    assert set(found) == {20, 30}


# ---- Saves that fail; see tests/faults for a full disk.


def _failing(monkeypatch, error, begin=None):
    def fail(*args):
        assert begin is None or begin.wait(20)
        raise error

    monkeypatch.setattr(trees, "write", fail)


def test_a_failed_save_is_told_by_check_once(tmp_path, monkeypatch):
    made = Checkpoints(tmp_path)
    made.check()
    made.save(3, _tree(3))
    made.wait()
    made.check()
    begin = threading.Event()
    with monkeypatch.context() as patch:
        _failing(patch, PermissionError(13, "Permission denied"), begin)
        made.save(20, _tree(20))
        # Does not wait.
        made.check()
        begin.set()
        assert made.latest() == 3
    with pytest.raises(CheckpointError) as raised:
        made.check()
    assert str(raised.value) == (
        f"Checkpoint 20 could not be saved in {tmp_path}: Permission denied; checkpoint 3 remains."
    )
    made.check()
    made.save(30, _tree(30))
    made.close()
    assert _steps(tmp_path) == [3, 30]


@pytest.mark.parametrize("tell", ["save", "wait", "close"])
def test_a_failed_save_is_told_by_the_next_call(tmp_path, monkeypatch, tell):
    made = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        _failing(patch, ValueError("no such\nthing"))
        made.save(3, _tree(3))
        concerned = {"save": lambda: made.save(4, _tree(4)), "wait": made.wait, "close": made.close}
        with pytest.raises(CheckpointError, match="there is no other") as raised:
            concerned[tell]()
    assert "ValueError: no such\nthing" in str(raised.value)
    assert _steps(tmp_path) == []
    if tell != "close":
        made.save(4, _tree(4))
        made.close()
        assert _latest(tmp_path) == 4


@pytest.mark.parametrize("stage", ["write", "write_sealed"])
def test_what_fails_while_sealing_leaves_no_checkpoint(tmp_path, monkeypatch, stage):
    _save(tmp_path, 3)
    before = _everything(tmp_path / "3")
    made = Checkpoints(tmp_path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, stage, fail)
        made.save(20, _tree(20))
        with pytest.raises(CheckpointError, match="No space left on device; checkpoint 3 remains"):
            made.wait()
    assert _everything(tmp_path / "3") == before
    assert _steps(tmp_path) == [3]
    made.save(20, _tree(20))
    made.close()
    assert _latest(tmp_path) == 20


def test_a_place_that_is_no_directory_is_told(tmp_path):
    (tmp_path / "file").write_text("kept")
    for below in ("file", "file/checkpoints"):
        made = Checkpoints(tmp_path / below)
        assert made.latest() is None
        made.save(1, _tree())
        with pytest.raises(CheckpointError, match=r"Checkpoint 1 could .*(File exists|Not a dir)"):
            made.close()
    assert (tmp_path / "file").read_text() == "kept"


# ---- Several processes.

_PROGRAM = """
import sys, json, os, hashlib
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
process, port, directory, alone = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"localhost:{port}", 2, process)
from jax.sharding import NamedSharding, PartitionSpec
from sire_jax.storage import checkpoint, trees
from sire_jax.storage.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

def tree(seed):
    key = jax.random.key(seed)
    made = {
        "kernel": jax.random.normal(key, (4, 3)),
        "odd": jnp.array([-0.0, jnp.inf, jnp.nan, 1e-42], jnp.float32),
        "half": jax.random.normal(key, (2,), jnp.bfloat16),
        "flags": jnp.array([True, False]),
        "keys": jax.random.split(key, 3),
    }
    made = {k: jax.jit(lambda x: x, out_shardings=everywhere)(v) for k, v in made.items()}
    whole = np.arange(8, dtype=np.float32) + seed
    made["split"] = jax.make_array_from_callback((8,), split, lambda i: whole[i])
    return made

def bits(made):
    found = {}
    for name, x in made.items():
        if name == "keys":
            x = jax.random.key_data(x)
        if name == "split":
            x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
        for shard in x.addressable_shards:
            now = np.asarray(shard.data).tobytes().hex()
            assert found.setdefault(name, now) == now
    return found

def failure(work):
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]

report = {}
checkpoints = Checkpoints(directory)
report["none"] = [checkpoints.latest(), failure(lambda: checkpoints.restore(tree(0)))]
checkpoints.save(1, tree(1), {"processes": jax.process_count()})
checkpoints.save(1, tree(9))
report["latest"], report["notes"] = checkpoints.latest(), checkpoints.notes()
report["restored"] = bits(checkpoints.restore(tree(0)))
report["shapes"] = failure(lambda: checkpoints.restore({"kernel": tree(0)["kernel"]}))

write = trees.write
def full(*args):
    assert process == 0
    raise OSError(28, "No space left on device")
trees.write = full
checkpoints.save(2, tree(2))
report["check"] = process and failure(checkpoints.check)
report["save"] = failure(lambda: checkpoints.save(3, tree(3)))
trees.write = write
checkpoints.save(4, tree(4))
checkpoints.wait()
report["files"] = sorted(os.listdir(directory))

read = trees.read
def broken(*args):
    if process == 1:
        raise OSError(5, "Input/output error")
    return read(*args)
trees.read = broken
report["read"] = failure(lambda: checkpoints.restore(tree(0)))
trees.read = read
other = Checkpoints(directory if process == 0 else directory + "-elsewhere")
report["elsewhere"] = failure(lambda: other.restore(tree(0)))

by_one = Checkpoints(alone)
report["by_one"] = bits(by_one.restore(tree(0)))
checkpoints.close()
print(json.dumps(report))
"""


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# Two processes that are connected.
two = pytest.mark.slow


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes reports, and where they saved."""
    directory = tmp_path_factory.mktemp("two")
    _save(directory / "alone", 5, tree=_of_processes)
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu"}
    arguments = [str(_free_port()), str(directory / "run"), str(directory / "alone")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(i), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(o[1] for o in outputs)
    return directory / "run", [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def _of_processes(seed):
    key = jax.random.key(seed)
    return {
        "kernel": jax.random.normal(key, (4, 3)),
        "odd": jnp.array([-0.0, jnp.inf, jnp.nan, 1e-42], jnp.float32),
        "half": jax.random.normal(key, (2,), jnp.bfloat16),
        "flags": jnp.array([True, False]),
        "keys": jax.random.split(key, 3),
        "split": jnp.arange(8, dtype=jnp.float32) + seed,
    }


def _hex(tree):
    data = tree | {"keys": jax.random.key_data(tree["keys"])}
    return {name: np.asarray(x).tobytes().hex() for name, x in data.items()}


@two
def test_two_processes_use_the_same_checkpoint(two_processes):
    run, reports = two_processes
    for report in reports:
        assert report["none"][0] is None
        assert report["none"][1][1].endswith(f"There is no checkpoint in {run}.")
        assert report["latest"] == 1
        assert report["notes"] == {"processes": 2}
        assert report["restored"] == _hex(_of_processes(1))
        assert report["shapes"][0] == "ValueError"
        assert report["files"] == ["1", "4", "newest"]


@two
def test_what_fails_in_one_process_is_raised_in_both(two_processes):
    run, reports = two_processes
    for report in reports:
        assert report["save"] == ["CheckpointError", report["save"][1]]
        assert report["save"][1].endswith(
            f"Checkpoint 2 could not be saved in {run}: No space left on device; checkpoint 1"
            " remains."
        )
        assert report["read"][0] == "CheckpointError"
        assert report["read"][1].endswith("can't be read: Input/output error.")
        assert "all processes should share the directory" in report["elsewhere"][1]
        # Not before the next save: one of them alone would part from the other.
        assert not report["check"]
    assert reports[0]["read"][1].startswith("Process 1: Checkpoint 4 in ")
    assert reports[1]["save"][1].startswith("Process 0: Checkpoint 2 could not be saved")


@two
def test_a_checkpoint_of_two_processes_is_restored_by_one(two_processes):
    run, _ = two_processes
    like = jax.tree.map(jnp.zeros_like, _of_processes(0))
    restored = Checkpoints(run).restore(like)
    _assert_same(restored, _of_processes(4))


@two
def test_a_checkpoint_of_one_process_is_restored_by_two(two_processes):
    for report in two_processes[1]:
        assert report["by_one"] == _hex(_of_processes(5))
