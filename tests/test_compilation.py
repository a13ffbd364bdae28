"""Compiled programs that are kept, and what is said of them."""

import errno
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax import configuration
from sire_jax.configuration import experiment, optimizers
from sire_jax.job import compilation
from sire_jax.runs.runs import Runs


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory that keeps every program, however quickly it was compiled."""
    monkeypatch.setattr(compilation, "_WORTH_KEEPING", 0.0)
    before = jax.config.jax_compilation_cache_dir
    yield tmp_path / "a" / "compiled"
    compilation.keep(before or "")


def _compile():
    """Compiles a program anew, or loads it; returns what is said."""
    before = compilation.counts()
    jax.jit(lambda x: jnp.sin(x) * 3 + 1)(np.zeros(3, np.float32)).block_until_ready()
    return compilation.counts().since(before)


def test_programs_are_kept_and_loaded_from_where_the_user_says(directory):
    compilation.keep(str(directory))
    jax.clear_caches()
    first = _compile()
    assert first.startswith("1 program compiled in 0.")
    assert first.endswith("0 loaded in 0.0 s")
    assert any(directory.iterdir())
    jax.clear_caches()
    assert _compile().startswith("0 programs compiled in 0.0 s, 1 loaded in 0.")
    for path in directory.iterdir():
        path.unlink()
    jax.clear_caches()
    assert _compile().startswith("1 program compiled")


def test_another_directory_is_used_from_then_on(directory, tmp_path):
    compilation.keep(str(directory))
    jax.clear_caches()
    _compile()
    compilation.keep(str(tmp_path / "b"))
    jax.clear_caches()
    assert _compile().startswith("1 program compiled")
    assert any((tmp_path / "b").iterdir())


@pytest.mark.parametrize("spoilt", [b"", lambda entry: entry[: len(entry) // 2], b"no entry"])
def test_an_entry_that_cannot_be_used_is_replaced(directory, spoilt):
    compilation.keep(str(directory))
    jax.clear_caches()
    _compile()
    (entry,) = directory.glob("*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(spoilt(whole) if callable(spoilt) else spoilt)
    jax.clear_caches()
    assert _compile().startswith("1 program compiled")
    jax.clear_caches()
    assert _compile().startswith("0 programs compiled in 0.0 s, 1 loaded")


def test_an_entry_that_cannot_be_read_is_as_if_absent(directory):
    compilation.keep(str(directory))
    jax.clear_caches()
    _compile()
    (entry,) = directory.glob("*-cache")
    # As what another user keeps for himself, in a directory of his own.
    entry.unlink()
    entry.mkdir()
    jax.clear_caches()
    assert _compile().startswith("1 program compiled")
    assert entry.is_dir()


def test_an_entry_that_cannot_be_written_is_not_left_in_part(tmp_path):
    class Full:
        _path = tmp_path

        def put(self, key, value):
            (tmp_path / f"{key}-cache").write_bytes(value[:2])
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        compilation._Entries(Full(), tmp_path, bytes).put("program-1", b"entry")
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.warns(UserWarning, match="can't be kept in ~/cache .*this user has none"):
        compilation.keep("~/cache")
    assert not compilation.kept()


def test_nothing_is_kept_where_the_user_says_so(directory):
    compilation.keep("")
    assert not compilation.kept()
    jax.clear_caches()
    _compile()
    assert not directory.exists()


def test_a_directory_that_cannot_be_written_is_reported(directory, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"can't be kept in .*file/compiled \(Not a directory\)"):
        compilation.keep(str(tmp_path / "file" / "compiled"))
    assert jax.config.jax_compilation_cache_dir is None
    assert not compilation.kept()


def test_one_program_is_singular():
    counts = compilation.Counts(compiled=3, loaded=5, seconds=4.5, loading=1.25)
    assert counts.since(compilation.Counts(compiled=2, loaded=1, seconds=1.0, loading=0.25)) == (
        "1 program compiled in 2.5 s, 4 loaded in 1.0 s"
    )


# ---- Programs of steps, which take weights and learning rates as arguments.

SCHEDULES = {
    "number": lambda rate: rate,
    "constant": lambda rate: {"name": "constant", "value": rate, "warmup": 3},
    "piecewise": lambda rate: {
        "name": "piecewise",
        "init_value": rate,
        "boundaries": (1, 2),
        "scale": 0.5,
        "unit": "epoch",
    },
    "triangular": lambda rate: {
        "name": "triangular",
        "peak_value": rate,
        "peak": 0.5,
        "end": 1,
        "unit": "run",
    },
    "cosine": lambda rate: {"name": "cosine", "init_value": rate, "decay_steps": 9},
}


def _lowered(rule="joint", schedule="number", rate=0.1, weight=0.5, seed=0):
    """Returns the program of the steps of a run on the digits, as the compiler sees it."""
    config = configuration.default()
    config.seed, config.data.images = seed, 1198
    config.backbone = configuration.backbone("small_cnn", classes=10, channels=(4, 8))
    config.heads.exit = configuration.head("classifier", endpoints=("block_1",), classes=10)
    config.objectives.main = configuration.objective("main", "label", "cross_entropy")
    config.objectives.exit = configuration.objective("exit", "label", "cross_entropy", weight)
    config.optimizer = configuration.optimizer("sgd", learning_rate=SCHEDULES[schedule](rate))
    config.update_rule = configuration.update_rule(rule)
    runs = Runs(experiment.build(config))
    start, feed = runs.start(), runs.feed
    span = np.int32(0), np.int32(1)
    order = feed.order(start.state, 0)
    arguments = *feed._numbers, start.state, start.sums, feed.arrays, order, *span
    return feed._steps._function.lower(*arguments).as_text()


def test_a_rate_that_a_config_leaves_to_the_optimizer_is_part_of_the_program():
    config = configuration.default()
    config.optimizer = {"name": "adam"}
    assert optimizers.numbers(config) == {}
    config.optimizer = {"name": "adam", "learning_rate": 1}
    assert optimizers.numbers(config) == {"learning_rate": 1.0}
    config.optimizer = {"name": "of.mine:Own", "learning_rate": 0.1}
    assert optimizers.numbers(config) == {}


@pytest.mark.optax_dtypes
@pytest.mark.parametrize(
    ("rule", "schedule"),
    [
        ("joint", "number"),
        ("joint", "constant"),
        ("multiway", "piecewise"),
        ("pairwise", "triangular"),
        ("effective_joint", "cosine"),
    ],
)
def test_steps_are_one_program_whatever_weight_rate_and_seed(rule, schedule):
    program = _lowered(rule, schedule)
    assert program == _lowered(rule, schedule, rate=0.02, weight=3, seed=7)
    assert program != _lowered("multiway" if rule == "joint" else "joint", schedule)
