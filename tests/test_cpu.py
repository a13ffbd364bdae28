"""Devices of a CPU, and the threads that they need."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.job import cpu
from sire_jax.layers.convolution import convolve
from sire_jax.runs.runs import Runs


@pytest.fixture
def unmade(monkeypatch):
    """Before JAX has made its devices, on two cores, with nothing said about devices."""
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "NPROC", "PJRT_NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu, "_cores", lambda: 2)
    before = jax.config.jax_num_cpu_devices
    numbers = {"jax_num_cpu_devices": -1}
    monkeypatch.setattr(jax.config, "update", numbers.__setitem__)
    monkeypatch.setattr(
        type(jax.config), "jax_num_cpu_devices", property(lambda _: numbers["jax_num_cpu_devices"])
    )
    yield numbers
    monkeypatch.undo()
    assert jax.config.jax_num_cpu_devices == before


@pytest.mark.parametrize(
    ("number", "flags", "made", "threads"),
    [
        (3, "", 3, "4"),
        (2, "", 2, "3"),
        (0, "", -1, None),
        (1, "", -1, None),
        (3, "--xla_force_host_platform_device_count=8", -1, "9"),
        (0, "--a=1 --xla_force_host_platform_device_count=2", -1, "3"),
    ],
)
def test_devices_are_made_where_nothing_says_how_many(
    monkeypatch, unmade, number, flags, made, threads
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    cpu.make_devices(number)
    assert unmade["jax_num_cpu_devices"] == made
    assert os.environ.get("NPROC") == threads


def test_of_a_flag_and_jaxs_setting_the_setting_counts_as_for_jax(monkeypatch, unmade):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    unmade["jax_num_cpu_devices"] = 4
    cpu.make_devices(0)
    assert os.environ["NPROC"] == "5"


@pytest.mark.parametrize(
    ("cores", "said", "threads"),
    [(8, "", ""), (2, "16", "16"), (8, "1", "3"), (8, "-1", "3"), (8, "many", "3")],
)
def test_threads_that_suffice_stay_as_they_are(monkeypatch, unmade, cores, said, threads):
    monkeypatch.setattr(cpu, "_cores", lambda: cores)
    monkeypatch.setenv("NPROC", said)
    cpu.make_devices(2)
    assert os.environ["NPROC"] == threads


def test_the_name_that_xla_reads_first_is_set_too(monkeypatch, unmade):
    monkeypatch.setenv("PJRT_NPROC", "2")
    monkeypatch.setenv("NPROC", "16")
    cpu.make_devices(2)
    assert (os.environ["PJRT_NPROC"], os.environ["NPROC"]) == ("3", "3")


def test_devices_that_are_there_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    before = jax.device_count()
    cpu.make_devices(before + 1)
    assert jax.device_count() == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's threads")
def test_threads_are_counted_where_they_run(monkeypatch):
    jax.devices()
    # The environment of now says nothing of a pool that is there.
    monkeypatch.setenv("NPROC", "40")
    assert cpu.threads() == 3


def test_devices_with_too_few_threads_are_refused(monkeypatch):
    config = configuration.load(programs.QUICKSTART.removeprefix("--config="), [])
    parts = experiment.build(config)
    monkeypatch.setattr(cpu, "threads", lambda: 2)
    with pytest.raises(ValueError, match=r"2 devices of a CPU share 2 threads of XLA") as refused:
        Runs(parts)
    assert "start Python anew with NPROC=3" in str(refused.value)
    monkeypatch.setattr(cpu, "threads", lambda: 3)
    Runs(parts)


def test_a_convolution_warns_where_threads_are_few(monkeypatch):
    monkeypatch.setattr(cpu, "threads", lambda: 2)
    cpu.warn_of_few_threads.cache_clear()
    image, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((1, 1, 1, 1))
    with pytest.warns(UserWarning, match="2 devices of a CPU, and XLA 2 threads.*NPROC=3"):
        convolve(image, kernel)
    convolve(image, kernel)  # It says so once.


# On two cores without the thread more: wrong from the 509th round on.
LOOP = """
from functools import partial

import numpy as np
import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from sire_jax.job import cpu

cpu.make_devices(2)
rng = np.random.default_rng(0)
images = rng.normal(size=(250, 8, 8, 16)).astype(np.float32)
kernel = rng.normal(size=(5, 5, 16, 16)).astype(np.float32) / 10
layout = ("NHWC", "HWIO", "NHWC")
convolution = partial(lax.conv_general_dilated, dimension_numbers=layout)

def convolve(x):
    return jax.nn.relu(convolution(x, kernel, (1, 1), "SAME"))

def rounds(x):
    def once(shift):
        return convolve(convolve(x + shift)).mean((1, 2))
    return lax.map(once, np.zeros(600, np.float32))

mesh = Mesh(np.array(jax.devices()), ("data",))
spec = PartitionSpec(None, "data")
split = jax.shard_map(rounds, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=spec)
found = np.asarray(jax.jit(split)(images))
right = np.asarray(jax.jit(lambda x: convolve(convolve(x)).mean((1, 2)))(images))
np.testing.assert_allclose(found, np.broadcast_to(right, found.shape), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow  # It starts programs.
def test_connected_processes_of_several_devices_have_threads_enough(tmp_path):
    each = (
        "import jax; from sire_jax.job import cpu, distributed; distributed.start();"
        "print(jax.process_count(), jax.local_device_count(), cpu.threads())"
    )
    (tmp_path / "counted.py").write_text(each)
    environment = {"PYTHONPATH": str(tmp_path), "NPROC": "2"}
    job = programs.job_of(["counted"], tmp_path, devices=2, **environment)
    with programs.started(*job):
        assert [each.wait() for each in job] == [0, 0], [each.output for each in job]
    assert all("2 2 3" in each.output for each in job), [each.output for each in job]


@pytest.mark.slow  # It starts a program.
def test_long_programs_on_two_devices_stay_right(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    environment = {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": "", "NPROC": "2"}
    program = programs.Program(["loop"], tmp_path / "log", **environment)
    assert program.process.wait(timeout=120) == 0, program.output


@pytest.mark.slow  # It starts programs.
def test_devices_are_made_of_a_cpus_cores_for_runs_that_share_them(tmp_path):
    arguments = ["sire_jax.train", programs.TINY, "--config.seeds=4", "--config.epochs=2"]
    shared = ["--config.devices=2", "--config.devices_share=runs"]
    results = []
    for name, more in {"alone": [], "shared": shared}.items():
        directory = tmp_path / name
        started = [*arguments, f"--workdir={directory}", *more]
        program = programs.Program(started, tmp_path / f"{name}.log", XLA_FLAGS="")
        assert program.process.wait(timeout=120) == 0, program.output
        results.append(json.loads((directory / "results.json").read_text())["splits"]["test"])
    for metric, values in results[0].items():
        np.testing.assert_allclose(results[1][metric], values, rtol=1e-4)
    # Another program of the run makes them, too.
    evaluated = programs.Program(
        ["sire_jax.evaluate", f"--workdir={tmp_path / 'shared'}"], tmp_path / "e.log", XLA_FLAGS=""
    )
    assert evaluated.process.wait(timeout=120) == 0, evaluated.output
