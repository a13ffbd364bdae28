"""Each room of the house imports only those before it."""

import ast
from pathlib import Path

import sire_jax

PACKAGE = Path(sire_jax.__file__).parent
# Later ones may import earlier ones, and those of a line each other.
ORDER = """
names tables files metrics
registry
job untrusted layers
traced slices jaxprs networks losses objectives prediction fitted_prediction optimizers
backbones heads groups updates data
state step
configuration
storage
runs
fitting inference diagnostics
train evaluate inspect paper_tables reproduce rehearsal export explain grouping early_exit
"""
FLOORS = {name: i for i, line in enumerate(ORDER.split("\n")) for name in line.split()}


def _imported(path):
    """Yields the rooms and modules of the package that a file imports at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "sire_jax":
            yield from (alias.name for alias in node.names if alias.name in FLOORS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sire_jax."):
            yield node.module.split(".")[1]


def test_no_room_imports_a_later_one():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            later = {name for name in _imported(path) if FLOORS[name] > FLOORS[room]}
            assert not later, f"{path.relative_to(PACKAGE)} imports {', '.join(later)}"
