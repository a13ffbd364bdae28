"""launch/tpu_vm.sh with a gcloud that keeps notes and plays two workers in two directories."""

import os
import subprocess
from pathlib import Path

import pytest
import standin

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_vm.sh"
ARGUMENTS = ["--config=configs/a.py:b,c", "--workdir=/mnt/a b", "--config.x=('it''s', \"$HOME\")"]

# `describe` names the states of a file, one after the other, the last one for ever; ssh runs a
# command on both workers at once, and returns 1 if it fails on one, as gcloud does.
_GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CLOUD/calls"
case "$*" in
  *" describe "*)
    state=$(head -n 1 "$CLOUD/states")
    [ "$(wc -l < "$CLOUD/states")" -le 1 ] || sed -i 1d "$CLOUD/states"
    [ "$state" != NONE ] || { echo "ERROR: NOT_FOUND" >&2; exit 1; }
    echo "$state" ;;
  *" scp "*)
    for worker in 0 1; do
      mkdir -p "$CLOUD/$worker"
      cp "$5" "$CLOUD/$worker/sire_jax.tar.gz"
    done ;;
  *" ssh "*)
    for last; do :; done
    for worker in 0 1; do
      (cd "$CLOUD/$worker" && HOME=$PWD JAX_PROCESS_ID=$worker bash -c "${last#--command=}") &
      workers+=($!)
    done
    for each in "${workers[@]}"; do wait "$each" || failed=1; done
    exit "${failed:-0}" ;;
esac
"""
_PYTHON = """#!/usr/bin/env bash
[ "$*" = "-m venv .venv" ] || exit 9
mkdir -p .venv/bin
ln -sf {program} .venv/bin/python
printf '#!/bin/sh\\necho "$PWD: $*" >> {cloud}/pip\\n' > .venv/bin/pip
chmod +x .venv/bin/pip
"""


@pytest.fixture
def cloud(tmp_path):
    """A directory with the cloud's state, and stand-ins for all that a worker would run."""
    program = standin.write(tmp_path)
    (tmp_path / "bin").mkdir()
    scripts = {
        "gcloud": _GCLOUD,
        "python3.11": _PYTHON.format(program=program.path, cloud=tmp_path),
        # Nothing else on this machine may be ended.
        "pkill": f'#!/bin/sh\necho "$*" >> {tmp_path}/pkill\nexit 1\n',
        "sudo": "#!/bin/sh\nexit 9\n",
    }
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path, program


def _environment(tmp_path, states, endings, **more):
    (tmp_path / "states").write_text("".join(f"{each}\n" for each in states.split()))
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    given = {"CLOUD": str(tmp_path), "TPU": "t", "ZONE": "z", "POLL": "0.05", "PATH": path}
    return standin.environment(**{**given, "ENDINGS": endings, **more})


def _run(cloud, states, endings, **more):
    tmp_path, program = cloud
    done = subprocess.run(
        [SCRIPT, *ARGUMENTS],
        env=_environment(tmp_path, states, endings, **more),
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    # `gcloud compute tpus tpu-vm ssh …`
    asked = [line.split()[2:4] for line in calls.splitlines() if line.startswith("compute tpus ")]
    return done, [" ".join(each) for each in asked], program


def test_it_is_a_script_that_parses():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_all_workers_run_the_same_command_with_the_arguments_as_they_are(cloud):
    done, asked, program = _run(cloud, "READY", "0", MOUNT="touch mounted")
    assert done.returncode == 0, done.stderr
    assert asked == ["tpu-vm describe", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    assert program.notes("start") == [["-m", "sire_jax.train", *ARGUMENTS]] * 2
    assert sorted(program.notes("process")) == [0, 1]
    assert all(each["JAX_DISTRIBUTED"] == "auto" for each in program.notes("environment"))
    for worker in (0, 1):
        clone = cloud[0] / str(worker) / "sire_jax"
        assert (clone / "sire_jax" / "train.py").exists()
        assert (clone / "mounted").exists()
        assert f"{clone}: install -q jax[tpu] -e ." in (cloud[0] / "pip").read_text()


@pytest.mark.parametrize(
    ("endings", "status", "starts"),
    [("2", 2, 1), ("1|75 0", 0, 2), ("75 75 2", 2, 3), ("7 7 7 7 0", 1, 4)],
)
def test_crashes_are_started_again_and_explained_errors_are_not(cloud, endings, status, starts):
    done, asked, program = _run(cloud, "READY", endings)
    assert done.returncode == status
    assert len(program.notes("start")) == 2 * starts
    assert asked.count("tpu-vm create") == asked.count("tpu-vm delete") == 0
    assert done.stderr.count("starting again.") == starts - 1


def test_one_that_is_not_there_is_made(cloud):
    options = {"TYPE": "v4-16", "SPOT": "1", "VERSION": "v2"}
    done, asked, program = _run(cloud, "NONE CREATING READY", "0", **options)
    assert done.returncode == 0, done.stderr
    assert asked[:4] == ["tpu-vm describe", "tpu-vm create", "tpu-vm describe", "tpu-vm describe"]
    assert "tpu-vm delete" not in asked
    assert (
        "compute tpus tpu-vm create t --zone=z --quiet --accelerator-type=v4-16 --version=v2 --spot"
        in (cloud[0] / "calls").read_text().splitlines()
    )
    assert len(program.notes("start")) == 2


def test_one_that_was_preempted_is_made_again_and_goes_on(cloud):
    states = "READY PREEMPTED PREEMPTED CREATING READY"
    done, asked, program = _run(cloud, states, "1 0", TYPE="v4-16", TRIES="0")
    assert done.returncode == 0, done.stderr
    assert "t was preempted; making it again." in done.stderr
    assert asked.count("tpu-vm delete") == asked.count("tpu-vm create") == 1
    assert asked.index("tpu-vm delete") < asked.index("tpu-vm create")
    assert len(program.notes("start")) == 4


def test_a_queued_one_is_asked_for_once_and_waited_for(cloud):
    states = "NONE NONE NONE CREATING READY"
    done, asked, _ = _run(cloud, states, "0", TYPE="v4-16", QUEUED="1")
    assert done.returncode == 0, done.stderr
    assert asked.count("queued-resources create") == 1
    assert asked.count("tpu-vm describe") == 5
    assert (
        "compute tpus queued-resources create t --zone=z --quiet --node-id=t"
        " --accelerator-type=v4-16 --runtime-version=v2"
        in (cloud[0] / "calls").read_text().replace("tpu-ubuntu2204-base", "v2").splitlines()
    )


@pytest.mark.parametrize("state", ["NONE", "PREEMPTED"])
def test_without_a_type_nothing_is_made(cloud, state):
    done, asked, program = _run(cloud, state, "0")
    assert done.returncode == 2
    said = {"NONE": "t is not there", "PREEMPTED": "t is PREEMPTED"}[state]
    assert f"{said}; with TYPE, such as v4-16, it would be made." in done.stderr
    assert asked == ["tpu-vm describe"]
    assert program.notes("start") == []


@pytest.mark.parametrize("name", ["TPU", "ZONE"])
def test_what_is_missing_is_named(cloud, name):
    done, asked, _ = _run(cloud, "READY", "0", **{name: ""})
    assert done.returncode != 0
    assert f"{name}: is " in done.stderr
    assert asked == []


def test_what_an_earlier_start_left_running_is_ended_first(cloud):
    _run(cloud, "READY", "0")
    assert (cloud[0] / "pkill").read_text().splitlines() == ["-f [s]ire_jax.train"] * 2
