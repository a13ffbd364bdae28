"""A disk that is full while a checkpoint is written."""

import gc
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import mounted

from sire_jax.storage import checkpoint
from sire_jax.storage.checkpoint import CheckpointError, Checkpoints

KILOBYTE = 2**10
SIZE = 2**20


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    with mounted(tmp_path / "disk", SIZE) as path:
        yield path


# Where a disk is full orbax raises in its threads, and in what they leave behind, too.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _left_behind():
    """Lets go of what orbax's threads leave, so that no other test is told of it."""
    yield
    gc.collect()


def _tree(step):
    x = jax.random.normal(jax.random.key(step), (100, 100))
    return {"x": x, "key": jax.random.key(step), "parts": [x[i, :50] for i in range(4)]}


def _bits(tree):
    data = tree | {"key": jax.random.key_data(tree["key"])}
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(data)]


def _kept(directory):
    """What is there but for what orbax's threads still write, which the next save removes."""
    return {each for each in directory.iterdir() if ".orbax-checkpoint-tmp" not in each.name}


def _contents(directory):
    inner = {path for each in _kept(directory) for path in (each, *each.rglob("*"))}
    return {path: path.read_bytes() for path in inner if path.is_file()}


def _fill(disk, left):
    """Writes a file that leaves so many bytes of the disk free."""
    file = disk / "filling"
    file.unlink(missing_ok=True)
    status = os.statvfs(disk)
    file.write_bytes(bytes(status.f_bavail * status.f_frsize - left))


def _check_restored(directory, step):
    again = Checkpoints(directory)
    assert again.latest() == step
    assert _bits(again.restore(_tree(0))) == _bits(_tree(step))
    again.close()


def test_a_full_disk_costs_only_the_checkpoint_being_saved(disk):
    directory = disk / "checkpoints"
    made = Checkpoints(directory)
    made.save(10, _tree(10))
    made.save(20, _tree(20))
    made.wait()
    before = _contents(directory)
    _fill(disk, 4 * KILOBYTE)
    made.save(30, _tree(30))
    # Raised at the next save at the latest.
    with pytest.raises(CheckpointError) as raised:
        made.save(40, _tree(40))
    message = str(raised.value)
    assert message.startswith(f"Checkpoint 30 could not be saved in {directory}: No space left on")
    assert message.endswith("; checkpoint 20 remains.")
    assert "device (0.0 MB of 0.3 MB)" in message
    assert _contents(directory) == before
    _check_restored(directory, 20)
    # In another process, too, which a new object stands for.
    other = Checkpoints(directory)
    other.save(30, _tree(30))
    with pytest.raises(CheckpointError, match="Checkpoint 30 could not be saved"):
        other.close()
    assert _contents(directory) == before
    # After space is freed both go on.
    (disk / "filling").unlink()
    made.save(40, _tree(40))
    made.wait()
    _check_restored(directory, 40)
    other = Checkpoints(directory)
    other.save(50, _tree(50))
    other.close()
    _check_restored(directory, 50)
    assert {path.name for path in directory.iterdir()} == {"40", "50", "newest"}


def test_wherever_the_disk_becomes_full_the_older_checkpoint_stays(disk, monkeypatch):
    """Without the look at the free space before: the writes themselves fail, one after another."""
    monkeypatch.setattr(checkpoint, "_check_room", lambda directory, size: None)
    directory = disk / "checkpoints"
    made = Checkpoints(directory, keep=1)
    made.save(1, _tree(1))
    made.wait()
    saved = []
    for left in range(0, 160 * KILOBYTE, 4 * KILOBYTE):
        before = _contents(directory)
        _fill(disk, left)
        newest, step = made.latest(), left // KILOBYTE + 2
        made.save(step, _tree(step))
        if made.latest() == step:
            made.check()
            saved.append(left)
            _check_restored(directory, step)
        else:
            with pytest.raises(CheckpointError, match=f"left on device; checkpoint {newest} rem"):
                made.check()
            assert _contents(directory) == before
            _check_restored(directory, newest)
        assert len(_kept(directory)) == 2
    # Failed with little space, and went well with more; between, orbax's threads decide by chance.
    assert saved[0] > 40 * KILOBYTE
    assert set(range(128 * KILOBYTE, 160 * KILOBYTE, 4 * KILOBYTE)) < set(saved)


@pytest.fixture
def small_files():
    """Lets no file grow beyond 256 kB, as a quota would; needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * KILOBYTE, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_may_not_grow_cost_only_the_checkpoint_being_saved(tmp_path, small_files):
    made = Checkpoints(tmp_path)
    made.save(1, _tree(1))
    made.wait()
    before = _contents(tmp_path)
    made.save(2, {"large": jnp.zeros(2**18)})
    with pytest.raises(CheckpointError, match=r"Checkpoint 2 .*: File too large; checkpoint 1 rem"):
        made.wait()
    assert _contents(tmp_path) == before
    small_files()
    made.save(2, _tree(2))
    made.close()
    _check_restored(tmp_path, 2)
