"""Each room of the house imports only those before it."""

import ast
from pathlib import Path

import sire_jax

PACKAGE = Path(sire_jax.__file__).parent
# Later ones may import earlier ones, and those of a line each other.
ORDER = """
text files metrics
registry
job untrusted layers
traced slices jaxprs networks losses objectives weights predictions optimizers
backbones heads groups updates data
state step
configuration
storage
runs
fitting inference diagnostics
attribution
train evaluate inspect claims paper_tables rehearsal reproduce decide attribute
export release explain grouping early_exit
"""
FLOORS = {name: i for i, line in enumerate(ORDER.split("\n")) for name in line.split()}


def _imported(path):
    """Yields the rooms and modules of the package that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("sire_jax."))


def test_no_room_imports_a_later_one():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in FLOORS, f"{room} has no place in ORDER"
        later = {name for name in _imported(path) if FLOORS.get(name, 0) > FLOORS[room]}
        assert not later, f"{path.relative_to(PACKAGE)} imports {', '.join(later)}"


def test_what_the_faces_name_is_there():
    for stub in PACKAGE.rglob("*.pyi"):
        for node in ast.parse(stub.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    place = stub.parent / (node.module or alias.name).replace(".", "/")
                    assert place.with_suffix(".py").exists() or place.is_dir(), alias.name
