import importlib

import pages
import pytest


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(pages.REPOSITORY / "benchmarks"))
    return importlib.import_module
