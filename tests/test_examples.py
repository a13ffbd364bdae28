"""Examples in docstrings run, and give what they say; so does the code of the README."""

import doctest
import importlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

import sire_jax

PACKAGE = Path(sire_jax.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)

pytestmark = pytest.mark.optax_dtypes
# Examples of these compile for a second or more.
LONG = {
    f"sire_jax.{name}"
    for name in (
        *("data.augmentation", "fitting", "losses", "metrics", "networks", "predictions"),
        *("diagnostics.activation_maps", "step", "updates.aggregators", "updates.weightings"),
        "release",
    )
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in MODULES],
)
def test_examples_run(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


def test_modules_whose_examples_take_long_have_some():
    assert set(MODULES) > LONG


class MyNetwork(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        middle = nn.relu(nn.Dense(8)(image.reshape(len(image), -1)))
        return nn.Dense(10)(middle), {"middle": middle}


def test_the_code_of_the_readme_runs():
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    run, step, plan, exits, groups = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"MyNetwork": MyNetwork, "jax": jax}
    exec(run.replace("epochs=20", "epochs=1"), names)
    assert names["history"]["test"]["exit/top_1"].shape == (1,)
    names |= {"key": jax.random.key(0), "image": names["train"]["image"][:1]}
    names["batch"] = {name: values[:5] for name, values in names["train"].items()}
    exec(step, names)
    assert set(names["reach"]) == {"main", "exit"}
    exec(plan, names)
    assert list(names["network"].heads) == ["decoder_1", "decoder_2"]
    # Without the file that it loads.
    exec(exits.partition("model =")[0], names)
    names |= {"confusion": np.ones((40, 40)), "names": tuple(map(str, range(40)))}
    exec(groups, names)
    assert names["groups"].number == 20
