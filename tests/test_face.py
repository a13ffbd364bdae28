"""``import sire_jax as sj``: what it offers, and what it costs."""

import json
import subprocess
import sys
from pathlib import Path

import sire_jax as sj

# What only programs need, or takes long to import.
NOT_NEEDED = (
    "ml_collections",
    "matplotlib",
    "orbax",
    "tensorflow_datasets",
    "grain",
    "scipy.stats",
)
PROGRAM = f"""
import json, sys
import sire_jax as sj
first = [name for name in ("jax", "flax", "optax") if name in sys.modules]
for name in sj.__all__:
    getattr(sj, name)
needless = [name for name in {NOT_NEEDED} if name in sys.modules]
files = [each.__file__ for name, each in sys.modules.items() if name.startswith("sire_jax.")]
print(json.dumps([first, needless, files]))
"""


def test_the_face_imports_no_more_than_it_needs():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, needless, files = json.loads(done.stdout)
    assert first == needless == []
    # Not those of another installation.
    assert {Path(each).is_relative_to(Path(sj.__file__).parent) for each in files} == {True}


def test_the_face_has_the_sentence_and_rooms_have_their_parts():
    names = "Network Objective fit joint multiway TrainState make_step make_measure find_reach"
    assert {*names.split(), "JointProbability", "heads", "updates", "data"} <= set(sj.__all__)
    assert set(dir(sj)) == set(sj.__all__)
    for room in (sj.backbones, sj.data, sj.groups, sj.heads, sj.inference, sj.updates):
        assert all(hasattr(room, name) for name in room.__all__)
    assert sj.updates.UPGrad() == sj.updates.AGGREGATORS["upgrad"]()
    assert sj.joint is sj.updates.joint


def test_digits_are_a_batch():
    digits = sj.data.load("digits")
    batch = digits.train.batch(slice(7))
    assert batch["image"].shape == (7, 8, 8, 1)
    assert batch["image"].max() == 1
    assert batch["image"].dtype == "float32"
    assert batch["label"].tolist() == digits.train.labels["label"][:7].tolist()
