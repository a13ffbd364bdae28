"""What is quick has a test in it of each module and of each promise."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
PACKAGE = REPOSITORY / "sire_jax"
# Modules that no test imports, and the tests that run them as what they are: parts of others.
THROUGH_OTHERS = {
    "backbones.pair": "test_networks.py",
    "backbones.settings": "backbones/test_blocks.py",
    "backbones.small": "test_auxnet.py",
    "configuration.compatibility": "test_experiment.py",
    "configuration.defaults": "test_configuration.py",
    "configuration.loading": "test_configuration.py",
    "configuration.stored": "test_configuration.py",
    "data.prepared": "data/test_records.py",
    "data.shares": "data/test_records.py",
    "data.walk": "data/test_records.py",
    "fitting": "test_fitting.py",
    "heads.combination": "test_grouped.py",
    "heads.identity": "test_networks.py",
    "job.coordination": "test_distributed.py",
    "job.signals": "faults/test_starts.py",
    "jaxprs": "test_traced.py",
    "runs.feed": "test_streamed_runs.py",
    "runs.placement": "test_distributed.py",
    "runs.program": "test_distributed.py",
    "slices.marks": "test_slices.py",
    "slices.operations": "test_slices.py",
    "slices.programs": "test_slices.py",
    "slices.reach": "test_slices.py",
    "updates.steps": "updates/test_rules.py",
    "layers.varying": "test_layers.py",
    "layers.onednn.__main__": "test_onednn.py",
}
# Tests that are as if they were marked as slow.
LISTED = [line for line in (TESTS / "slow.txt").read_text().splitlines() if line[0] != "#"]
# Promises whose tests take long by their nature.
SLOW_PROMISES = ("preempted by Slurm",)


def _is_slow(expression):
    """Tells whether a mark, or one of a list of them, is ``slow``."""
    parts = expression.elts if isinstance(expression, ast.List) else [expression]
    return any(ast.unparse(part) in ("slow", "pytest.mark.slow") for part in parts)


def _has_quick_tests(path, tree):
    """Tells whether a file has a test that is neither marked nor listed as slow."""
    marks = [n.value for n in tree.body if ast.unparse(n).startswith("pytestmark =")]
    if any(_is_slow(mark) for mark in marks):
        return False
    tests = [f for f in _tests(tree) if f"{path.relative_to(TESTS)}::{f.name}" not in LISTED]
    return any(not any(map(_is_slow, test.decorator_list)) for test in tests)


def _tests(tree):
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    return [function for function in functions if function.name.startswith("test_")]


def test_what_is_listed_as_slow_is_there():
    trees = {path: ast.parse((TESTS / path).read_text()) for path in {_file(x) for x in LISTED}}
    known = {f"{path}::{test.name}" for path, tree in trees.items() for test in _tests(tree)}
    assert not set(LISTED) - known


def _file(test):
    return test.partition("::")[0]


def _imported(tree):
    """Yields the names of what a file imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def quick():
    """The files of quick tests, by their path, and their programs."""
    trees = {path: ast.parse(path.read_text()) for path in TESTS.rglob("test_*.py")}
    return {path: tree for path, tree in trees.items() if _has_quick_tests(path, tree)}


def _modules():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        # An ``__init__`` that does more than to import and to register has tests under its name.
        if path.name != "__init__.py":
            yield name


def test_each_module_has_a_quick_test(quick):
    imported = {name for tree in quick.values() for name in _imported(tree)}
    without = {name for name in _modules() if f"sire_jax.{name}" not in imported}
    assert without == set(THROUGH_OTHERS)
    assert all(TESTS / path in quick for path in THROUGH_OTHERS.values())


def _promises():
    """Yields each fault of the tables of promises and the tests that it names."""
    pages = [REPOSITORY / "docs" / name for name in ("nothing_lost.md", "never_silent.md")]
    for line in (line for page in pages for line in page.read_text().splitlines()):
        tests = re.findall(r"\]\(\.\./tests/([\w/]+\.py)\)", line)
        if line.startswith("|") and tests:
            yield line.split("|")[1].strip(), tests


def test_each_promise_has_a_quick_test(quick):
    promises = dict(_promises())
    assert len(promises) > 10
    for fault, tests in promises.items():
        assert all((TESTS / path).exists() for path in tests), fault
        if not fault.startswith(SLOW_PROMISES):
            assert any(TESTS / path in quick for path in tests), fault


def test_no_file_of_the_library_is_longer_than_can_be_read_at_once():
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
