"""Data sets that are prepared on this machine, for the tests that need real ones."""

import os
from pathlib import Path

import pytest


def directory_with(name):
    """Returns where a data set is prepared; without it the test skips, and says so."""
    directory = os.environ.get("TFDS_DATA_DIR", "")
    if not directory:
        pytest.skip("TFDS_DATA_DIR is not set: no directory of prepared data sets")
    if not list(Path(directory).glob(f"{name}/**/dataset_info.json")):
        pytest.skip(f"{name} is not prepared in TFDS_DATA_DIR={directory}")
    return directory
