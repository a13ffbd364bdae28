"""Every test runs with warnings as errors, strict dtypes and ranks, and two virtual devices.

None runs for ever (``timeout`` in pyproject.toml), leaves a process behind, or lets memory grow.
"""

import faulthandler
import gc
import os
import sys
from pathlib import Path

import children

children.get_default_signals()
# Whose code the runs and prepared sets of tests name.
os.environ["SIRE_JAX_TRUST"] = "planned,pictured,devices_program"
# Compiles in a quarter of the time; what the compiler optimizes is not what is tested.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
)
# A thread more than devices, as `cpu.make_devices` has it: these devices are made here.
os.environ["NPROC"] = "3"

import jax
import programs
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# What a process of tests may hold, and what it holds when it forgets its compiled programs.
MOST_MEMORY = 2 * 2**30
FULL = 2**30


# Tests that are as if they were marked `slow`.
SLOW = Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as slow what slow.txt lists."""
    listed = set(SLOW.read_text().splitlines())
    for item in items:
        path = item.path.relative_to(SLOW.parent).as_posix()
        if f"{path}::{item.originalname}" in listed:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Ends the process where a test is stuck in compiled code, which no signal interrupts."""
    marker = item.get_closest_marker("timeout")
    config = item.config
    limit = marker.args[0] if marker else config.getoption("timeout") or config.getini("timeout")
    faulthandler.dump_traceback_later(1.2 * float(limit), exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True, scope="session")
def _marked(testrun_uid, worker_id):
    """Leaves nothing running, and has never held too much memory."""
    name = f"{testrun_uid}-{worker_id}"
    with children.marking(name):
        yield name
    most = children.most_resident()
    assert most < MOST_MEMORY, f"The tests of {worker_id} held {most / 2**30:.1f} GB of memory."


@pytest.fixture(autouse=True, scope="session")
def _compiled_together(tmp_path_factory, worker_id):
    """Gives all programs that tests start one place for what they compile, oneDNN's calls, too."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    programs.COMPILED = shared / "compiled"
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")


@pytest.fixture(autouse=True, scope="module")
def _left_as_it_was(_marked):
    """Holds that the tests of a file leave no process behind, and forgets what they compiled."""
    before = set(children.marked(_marked))
    yield
    left = children.kill(_marked, but=before, grace=1.0)
    if children.resident() > FULL:
        jax.clear_caches()
        gc.collect()
        children.give_back()
    assert not left, f"Left running: {left}"


@pytest.fixture(autouse=True)
def _strict_dtypes(request):
    """Forbids implicit changes of dtype, but where ``optax`` itself relies on them (its Adam)."""
    mode = "standard" if request.node.get_closest_marker("optax_dtypes") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch, tmp_path):
    """Keeps decoded data sets of tests out of the user's cache directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
