"""A hundred random damages of the newest checkpoint: all are noticed, none is restored."""

import json
import random
import shutil
import warnings

import jax
import numpy as np
import pytest

from sire_jax.storage import manifest
from sire_jax.storage.checkpoint import Checkpoints

STEPS = (10, 20, 30)
NEWEST = 30


def _tree(step):
    x = jax.random.normal(jax.random.key(step), (20, 30))
    return {"x": x, "key": jax.random.key(step), "step": np.asarray(step, np.int32)}


def _bits(tree):
    data = tree | {"key": jax.random.key_data(tree["key"])}
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(data)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints, which are copied and damaged."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    made = Checkpoints(directory, keep=3)
    for step in STEPS:
        made.save(step, _tree(step))
    made.close()
    return directory


# ---- Damages of a directory of checkpoints; each returns the step that its warning is about.


def _file(draw, directory):
    files = sorted(path for path in (directory / str(NEWEST)).rglob("*") if path.is_file())
    return draw.choice(files)


def _flip_a_bit(draw, directory):
    path = _file(draw, directory)
    data = bytearray(path.read_bytes() or b"\0")
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return NEWEST


def _truncate(draw, directory):
    path = _file(draw, directory)
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])
    return NEWEST


def _lengthen(draw, directory):
    with _file(draw, directory).open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 100)))
    return NEWEST


def _empty(draw, directory):
    _file(draw, directory).write_bytes(b"")
    return NEWEST


def _overwrite(draw, directory):
    path = _file(draw, directory)
    path.write_bytes(draw.randbytes(path.stat().st_size))
    return NEWEST


def _delete(draw, directory):
    _file(draw, directory).unlink()
    return NEWEST


def _swap(draw, directory):
    """Puts the file of the same name of an older checkpoint in the place of a file."""
    path = directory / str(NEWEST) / draw.choice(["manifest", "_CHECKPOINT_METADATA"])
    shutil.copy(directory / str(draw.choice(STEPS[:-1])) / path.name, path)
    return NEWEST


def _delete_all(draw, directory):
    shutil.rmtree(directory / str(NEWEST))
    return NEWEST


def _delete_what_is_inside(draw, directory):
    shutil.rmtree(directory / str(NEWEST))
    (directory / str(NEWEST)).mkdir()
    return NEWEST


def _add_a_file(draw, directory):
    inner = [p for p in (directory / str(NEWEST)).rglob("*") if p.is_dir()]
    place = draw.choice(sorted([directory / str(NEWEST), *inner]))
    (place / f"stray{draw.randrange(9)}").write_bytes(draw.randbytes(draw.randrange(50)))
    return NEWEST


def _add_a_directory(draw, directory):
    (directory / str(NEWEST) / f"stray{draw.randrange(9)}").mkdir()
    return NEWEST


def _add_a_later_step(draw, directory):
    """A stray one: empty, with something inside, a file, or a copy of a real one."""
    step = NEWEST + draw.randrange(1, 10**6)
    path = directory / str(step)
    kind = draw.randrange(4)
    if kind == 3:
        shutil.copytree(directory / str(draw.choice(STEPS)), path)
    elif kind == 2:
        path.write_bytes(b"")
    else:
        path.mkdir()
        (path / "stray").write_bytes(b"") if kind else None
    return step


def _replace_the_manifest(draw, directory):
    """By a valid one, that does not fit."""
    path = directory / str(NEWEST) / "manifest"
    content = manifest.read_sealed(path)
    change = draw.choice(["step", "files", "directories"])
    if change == "step":
        content["step"] += 1
    elif change == "files":
        content["files"].pop(draw.choice(sorted(content["files"])))
    else:
        content["directories"].append("more")
    manifest.write_sealed(path, content)
    return NEWEST


DAMAGES = (
    *(_flip_a_bit, _truncate, _lengthen, _empty, _overwrite, _delete, _swap, _delete_all),
    *(_delete_what_is_inside, _add_a_file, _add_a_directory, _add_a_later_step),
    _replace_the_manifest,
)


def _state(directory):
    return sorted((p.as_posix(), p.lstat().st_mtime_ns) for p in directory.rglob("*"))


def test_a_hundred_damages_are_noticed_and_none_is_restored(saved, tmp_path):
    noticed = fell_back = 0
    for seed in range(100):
        draw = random.Random(seed)
        directory = tmp_path / str(seed)
        shutil.copytree(saved, directory)
        before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        damage = _flip_a_bit if seed % 3 == 0 else DAMAGES[seed % len(DAMAGES)]
        step = damage(draw, directory)
        after = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        changed = before != after or damage in (_add_a_directory, _add_a_later_step)
        assert changed, (seed, damage)
        found = _state(directory)
        made = Checkpoints(directory, keep=3)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            latest = made.latest()
            restored = made.restore(_tree(0))
        used = NEWEST if step > NEWEST else STEPS[-2]
        messages = [str(each.message) for each in told]
        start, end = f"Checkpoint {step} in {directory} ", f"; checkpoint {used} is used."
        noticed += [m.startswith(start) and m.endswith(end) for m in messages] == [True]
        fell_back += latest == used and _bits(restored) == _bits(_tree(used))
        assert _state(directory) == found
        # The next save goes on from there, and what was damaged is no longer in its way.
        if seed < 10:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.save(NEWEST + 10**7, _tree(1))
                made.close()
                assert Checkpoints(directory).latest() == NEWEST + 10**7
    assert noticed == 100
    assert fell_back == 100


def test_every_bit_of_a_manifest_counts(saved, tmp_path):
    """All but a hundredth of the bits are left out, to save time."""
    shutil.copytree(saved, tmp_path / "copy")
    path = tmp_path / "copy" / str(NEWEST) / "manifest"
    whole = path.read_bytes()
    assert manifest.damage(path.parent, NEWEST) is None
    for bit in range(0, 8 * len(whole), 101):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        message = "is damaged: 'manifest' differs from what was saved"
        assert manifest.damage(path.parent, NEWEST) == message
    content = json.loads(whole.partition(b"\n")[2])
    manifest.write_sealed(path, content)
    assert path.read_bytes() == whole
    assert manifest.damage(path.parent, NEWEST) is None
