"""Every test runs with warnings as errors, strict dtypes and ranks, and two virtual devices."""

import os

# Whose code the runs and prepared sets of tests name.
os.environ["SIRE_JAX_TRUST"] = "planned,pictured,devices_program"
# Compiles in half the time; what the compiler optimizes is not what is tested.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")


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
