"""How much memory is left."""

import jax
import jax.numpy as jnp
import pytest

from sire_jax.job import memory


@pytest.fixture
def machine(monkeypatch):
    """A machine with 2 GiB free, and no other limit."""
    monkeypatch.setattr(memory, "_of_machine", lambda: 2**31)
    monkeypatch.setattr(memory, "_GROUPS", (("/absent", "/absent"),))


def _held():
    return sum(each.nbytes for each in jax.live_arrays())


def test_what_arrays_hold_already_is_theirs(machine):
    array = jax.block_until_ready(jnp.ones((1024, 1024)))
    assert memory.available() == 2**31 + _held()
    assert _held() >= array.nbytes == 2**22


def test_a_job_may_take_no_more_than_its_group(machine, tmp_path, monkeypatch):
    limit, usage = tmp_path / "limit", tmp_path / "usage"
    monkeypatch.setattr(memory, "_GROUPS", (("/absent", "/absent"), (str(limit), str(usage))))
    usage.write_text("1000\n")
    limit.write_text("5000\n")
    assert memory.available() == 4000 + _held()
    limit.write_text("max\n")
    assert memory.available() == 2**31 + _held()


def test_the_machine_has_some():
    assert 0 < memory._of_machine() < 2**60
