"""What benchmarks report of what they measured, and on what."""

import importlib
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(
    ("kind", "float32", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 494.7, 989.4),
        ("NVIDIA H100 PCIe", 378, 756),
        ("NVIDIA H200", 494.7, 989.4),
        ("NVIDIA A100-SXM4-80GB", 156, 312),
        ("NVIDIA L4", 60, 121),
    ],
)
def test_the_peak_of_a_card_is_that_of_its_data_sheet(benchmark, kind, float32, bfloat16):
    peak = benchmark("devices").peak
    assert peak(kind, "float32") == 1e12 * float32
    assert peak(kind, "bfloat16") == 1e12 * bfloat16


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA RTX A1000", "TPU v5e"])
def test_an_unknown_card_has_no_peak(benchmark, kind):
    assert benchmark("devices").peak(kind, "float32") is None


def test_a_device_that_is_not_there_is_said(benchmark, monkeypatch):
    devices, failed = benchmark("devices"), SimpleNamespace(returncode=1, stderr="Error: no such\n")
    # What the choice sets of this process is taken back.
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(devices, "jax", SimpleNamespace(config=SimpleNamespace(update=print)))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        SystemExit, match=r"nothing to compute on for --device=cuda.*Error: no such"
    ):
        devices.choose("cuda")


def _record(seconds, **changed):
    rounds = [{"seconds": each, "memory": 2**20} for each in seconds]
    plain = {
        **{"network": "sire", "engine": "ours", "dtype": "bfloat16", "error": "", "seeds": 1},
        **{"batch_size": 128, "kind": "NVIDIA H100 80GB HBM3", "plan": 2**21, "rounds": rounds},
    }
    return {**plain, **changed}


def test_a_step_is_reported_in_images_ratios_and_the_share_of_the_peak(benchmark):
    records = [
        _record([0.002, 0.004, 0.002]),
        _record([0.004, 0.004, 0.008], engine="compiled", plan=None),
        _record([], engine="graphs", error="out of memory", plan=None),
    ]
    written = {
        "parts": {"steps": records},
        "multiply_adds": {"sire": 1e9},
        "peak": {"float32": None, "bfloat16": None},
    }
    table = benchmark("systems_report").steps(written)
    rows = [[cell.strip() for cell in line.split("|")[3:-1]] for line in table.splitlines()[2:]]
    # 6e9 operations x 128 images in 2 ms: 384 of 989.4 TFLOP/s.
    speeds = ["384", "38.8%", "1", "2", ""]
    assert rows[0] == ["bfloat16", "2.00", "64,000", "0.50 (0.25 to 1.00)", *speeds]
    assert rows[1][:4] == ["bfloat16", "4.00", "32,000", "1"]
    assert rows[2] == ["bfloat16", *[""] * 7, "not run: out of memory"]
    written["peak"]["bfloat16"] = 768
    assert "50.0%" in benchmark("systems_report").steps(written)


def test_what_a_further_run_costs_and_how_many_fit_is_read_from_what_ran(benchmark):
    records = [
        _record([0.010], seeds=1, plan=300 * 2**20, available=1050 * 2**20),
        _record([0.020], seeds=9, plan=1100 * 2**20, available=1050 * 2**20),
        _record([0.025], seeds=10, plan=1200 * 2**20, available=1050 * 2**20),
        _record([], seeds=32, plan=None, error="out of memory"),
    ]
    report = benchmark("systems_report")
    table, fitting = report.seeds({"parts": {"seeds": records}, "memory": None}).split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[2:6]] for line in table.splitlines()[2:]]
    assert rows[:3] == [
        ["1", "10.00", "1.00", "-"],
        ["9", "20.00", "0.22", "0.12"],
        # The tenth: 5 ms of 10.
        ["10", "25.00", "0.25", "0.50"],
    ]
    # 1,200 MiB of ten are 150 too many, two runs of 100 each.
    assert [cell.strip() for cell in fitting.splitlines()[-1].split("|")[1:-1]] == [
        "sire",
        "8",
        "100.0",
        "1,050",
    ]
    assert report.fit(records[:1], "sire", None) is None
