"""The package as ``pip install .`` leaves it, used from an empty directory, far from a clone."""

import os
import shutil
import subprocess
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a wheel is built of.
SOURCE = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "requirements.txt", "README.md")
SOURCE += ("LICENSE", "sire_jax", "configs", "launch")
TINY = ("--config.epochs=1", "--config.seeds=1", "--config.data.task.train=100")
DIGITS = (
    "--config.data.name=digits",
    "--config.data.shape=(8, 8, 1)",
    "--config.data.task.downscale=1",
    "--config.data.task.test=20",
    "--config.backbone.padding=1",
    "--config.batch_size=50",
)

pytestmark = pytest.mark.slow


def _run(*line, cwd):
    """Runs a command with the packages of its Python alone, and returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def _files(archive):
    """Lists the files of a wheel, but those that say what the others are."""
    names = zipfile.ZipFile(archive).namelist()
    return sorted(name for name in names if ".dist-info/" not in name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("installed")


@pytest.fixture(scope="module")
def python(place):
    """The Python of an environment that can build; the test is skipped where there is none."""
    venv.create(place / "environment", with_pip=True)
    python = str(place / "environment" / "bin" / "python")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    line = [python, "-m", "pip", "install", "--quiet", *needed]
    got = subprocess.run(line, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"pip can't get {', '.join(needed)}: {got.stderr.strip()[-200:]}")
    return python


def _build(python, hook, source, to):
    """Builds a distribution as pip does, and returns its file."""
    to.mkdir(exist_ok=True)
    program = f"from setuptools import build_meta; print(build_meta.{hook}({str(to)!r}))"
    return to / _run(python, "-c", program, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(place):
    """A copy of what the wheel is built of, so that building leaves nothing in the clone."""
    copy = place / "source"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=ignore)
        else:
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(python, source, place):
    return _build(python, "build_sdist", source, place / "sdist")


@pytest.fixture(scope="module")
def wheel(python, source, place):
    return _build(python, "build_wheel", source, place / "wheel")


@pytest.fixture(scope="module")
def installed(python, wheel):
    """The Python of an environment with the wheel, which borrows what the wheel needs."""
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd="/")
    environment = Path(python).parent.parent
    own = sysconfig.get_path("purelib", vars={"base": str(environment)})
    # A path alone: what is installed editably where the tests run is not to be seen.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own) / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    where = _run(python, "-c", "import sire_jax; print(sire_jax.__file__)", cwd="/")
    assert Path(where.strip()).is_relative_to(environment)
    return python


@pytest.fixture
def empty(tmp_path):
    """An empty directory; ``tmp_path`` is the home of tests, where caches are."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_the_wheel_has_all_modules_configs_tables_and_groups(wheel):
    files = [*(ROOT / "sire_jax").rglob("*.py"), *(ROOT / "sire_jax").rglob("*.pyi")]
    modules = [path.relative_to(ROOT) for path in files]
    configs = [path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.*")]
    data = ["sire_jax/data/digits.npz", "sire_jax/py.typed"]
    data += ["sire_jax/layers/onednn/convolution.cc"]
    networks = [path.relative_to(ROOT) for path in (ROOT / "sire_jax" / "released").iterdir()]
    data += map(str, networks)
    data += [f"sire_jax/{path}" for path in configs if path.suffix != ".pyc"]
    assert _files(wheel) == sorted([*map(str, modules), *data])


def test_the_source_distribution_builds_the_same_wheel(python, wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = _build(python, "build_wheel", unpacked, tmp_path / "wheel")
    assert _files(again) == _files(wheel)
    assert (unpacked / "launch" / "local.sh").exists()


def test_the_quick_start_from_an_empty_directory(installed, empty):
    said = _run(installed, "-m", "sire_jax.reproduce", "--table=quickstart", *TINY, cwd=empty)
    assert "| with auxiliary outputs |" in said
    assert (empty / "runs" / "quickstart" / "table.png").exists()
    assert [path.name for path in empty.iterdir()] == ["runs"]


def test_a_shipped_config_trains_from_an_empty_directory(installed, empty):
    train = (installed, "-m", "sire_jax.train", "--config=pairs.py:aux_10", "--workdir=run")
    assert "test" in _run(*train, *TINY, *DIGITS, cwd=empty)
    assert "test after step 2" in _run(
        installed, "-m", "sire_jax.evaluate", "--workdir=run", cwd=empty
    )


def test_the_configs_of_all_papers_are_found_from_an_empty_directory(installed, empty):
    program = (
        "import sys; from sire_jax import inspect\n"
        "for config in sys.argv[1:]: inspect.main([f'--config={config}'])"
    )
    configs = (
        "pairs.py:aux_10",
        "configs/pairs.py:aux_10",
        "configs/sire.py:cnn",
        "auxnet.py:20-2",
        # Its groups are read from a file.
        "configs/ssal.py:resnet18,small",
    )
    said = _run(installed, "-c", program, *configs, cwd=empty)
    assert said.count("whole network") == len(configs)


def test_a_config_of_the_current_directory_comes_first(installed, empty):
    (empty / "configs").mkdir()
    (empty / "configs" / "pairs.py").write_text("raise SystemExit('mine')")
    program = "from sire_jax import configuration; configuration.load('pairs.py')"
    done = subprocess.run([installed, "-c", program], cwd=empty, capture_output=True, text=True)
    assert done.stderr.strip() == "mine"
