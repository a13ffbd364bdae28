"""launch/jobset.yaml and launch/sky.yaml: every field known to their schemas, and what they run.

Nothing is launched. JobSet's fields, and those of the job and the pod in it, are those of the
models that are generated from the API's own Go types (PyPI: ``kubeflow-trainer-api``); SkyPilot
reads its file itself, in a Python of its own (``SKYPILOT_PYTHON``, or this one if it has ``sky``).
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standin

jsonschema = pytest.importorskip("jsonschema", reason="needs pip install 'sire_jax[test]'")
yaml = pytest.importorskip("yaml", reason="needs pip install 'sire_jax[test]'")

LAUNCH = Path(__file__).parents[2] / "launch"
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
SKY = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
Keys = tuple[str | int, ...]


def _fields(node: Any, where: Keys = ()) -> Iterator[Keys]:
    """Yields where each field of a file is."""
    for key, child in _children(node):
        if isinstance(node, dict):
            yield (*where, key)
        yield from _fields(child, (*where, key))


def _children(node: Any) -> list[tuple[str | int, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list) else []


def _misspelt(manifest: Any, field: Keys) -> Any:
    """Returns a file with a letter of a field's name doubled."""
    changed = copy.deepcopy(manifest)
    *above, name = field
    section = changed
    for key in above:
        section = section[key]
    section[f"{name}{name[-1]}"] = section.pop(name)
    return changed


def _shown(field):
    return ".".join(map(str, field))


# ---- JobSet.

# Names that the file itself chooses.
FREE = {"nvidia.com/gpu"}


@pytest.fixture(scope="module")
def jobset_schema():
    reason = "needs pip install 'sire_jax[test]'"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    schema = models.JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    # The model wraps what is written as a number or as text.
    quantity = "IoK8sApimachineryPkgApiResourceQuantity"
    assert quantity in schema["$defs"]
    schema["$defs"][quantity] = {"type": ["number", "string"]}
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """Returns a schema that knows all fields, and takes none of them to be null."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    given = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    if len(given) == 1:
        return _strict(given[0])
    changed = {key: _strict(value) for key, value in schema.items()}
    return changed | ({"additionalProperties": False} if "properties" in schema else {})


def _complaints(schema, manifest):
    return [f"{error.json_path}: {error.message}" for error in schema.iter_errors(manifest)]


def test_jobset_has_only_known_fields_of_the_right_types(jobset_schema):
    assert _complaints(jobset_schema, JOBSET) == []


@pytest.mark.parametrize("field", [f for f in _fields(JOBSET) if f[-1] not in FREE], ids=_shown)
def test_any_misspelt_field_of_jobset_is_noticed(jobset_schema, field):
    complaints = _complaints(jobset_schema, _misspelt(JOBSET, field))
    assert f"'{field[-1]}{field[-1][-1]}' was unexpected" in "".join(complaints)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("spec", "failurePolicy", "maxRestarts"), "20"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "2"),
        (("spec", "network", "enableDNSHostnames"), "yes"),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReasons"), "PodFailurePolicy"),
    ],
)
def test_a_wrong_type_in_jobset_is_noticed(jobset_schema, field, value):
    changed = copy.deepcopy(JOBSET)
    section = changed
    for key in field[:-1]:
        section = section[key]
    assert section[field[-1]] != value
    section[field[-1]] = value
    (complaint,) = _complaints(jobset_schema, changed)
    assert complaint.startswith(f"$.{_shown(field).replace('.0', '[0]')}: {value!r} is not of type")


def test_what_no_schema_says_of_jobset_holds():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # Kubernetes allows a pod failure policy only to pods that are not restarted in place.
    assert pod["restartPolicy"] == "Never"
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert job["completions"] == job["parallelism"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2],
    }
    (explained,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert explained["action"] == "FailJobSet"
    assert explained["onJobFailureReasons"] == ["PodFailurePolicy"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_jobset_tells_its_processes_who_they_are():
    spec, name = JOBSET["spec"], JOBSET["metadata"]["name"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {each["name"]: each for each in container["env"]}
    (port,) = container["ports"]
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == (
        f"{name}-{replicated['name']}-0-0.{spec['network']['subdomain']}:{port['containerPort']}"
    )
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(job["completions"])
    place = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == place
    python, module, program, *arguments = container["command"]
    assert (python, module, program) == ("python", "-m", "sire_jax.train")
    assert [each.partition("=")[0] for each in arguments] == ["--config", "--workdir"]


# ---- SkyPilot.

CHOSEN = {"/runs", "ARGUMENTS"}
SKY_FIELDS = [field for field in _fields(SKY) if field[-1] not in CHOSEN]
# Reads tasks as the server does, which refuses what the client would pass on to it.
_READ = """
import json, sys
import sky
from sky.server import plugins
plugins.load_plugins(plugins.ExtensionContext())
def complaint(task):
    try:
        sky.Task.from_yaml_config(task)
    except Exception as error:
        return str(error)
    return ""
print(json.dumps([complaint(task) for task in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def sky_complaints(tmp_path_factory):
    """What SkyPilot says of the file and of each misspelt one, by field; all in one process."""
    python = os.environ.get("SKYPILOT_PYTHON")
    if not python and importlib.util.find_spec("sky"):
        python = sys.executable
    if not python:
        pytest.skip("needs a Python with SkyPilot in SKYPILOT_PYTHON; .ci/run makes one")
    tasks = [SKY, *(_misspelt(SKY, field) for field in SKY_FIELDS)]
    done = subprocess.run(
        [python, "-c", _READ],
        input=json.dumps(tasks),
        env={"HOME": str(tmp_path_factory.mktemp("home")), "IS_SKYPILOT_SERVER": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip([(), *SKY_FIELDS], json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow  # SkyPilot is slow to start.
def test_skypilot_reads_its_file(sky_complaints):
    assert sky_complaints[()] == ""


@pytest.mark.slow
@pytest.mark.parametrize("field", SKY_FIELDS, ids=_shown)
def test_skypilot_notices_any_misspelt_field(sky_complaints, field):
    assert f"{field[-1]}{field[-1][-1]}" in sky_complaints[field]


def test_what_skypilot_runs_makes_processes_of_its_nodes(tmp_path):
    program = standin.write(tmp_path)
    bin_directory = tmp_path / ".venv" / "bin"
    bin_directory.mkdir(parents=True)
    (bin_directory / "python").symlink_to(program.path)
    (tmp_path / "launch").symlink_to(LAUNCH)
    variables = standin.environment(
        **SKY["envs"],
        SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.6",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1",
        ENDINGS="75 0",
    )
    done = subprocess.run(["bash", "-c", SKY["run"]], env=variables, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (
        program.notes("start") == [["-m", "sire_jax.train", *SKY["envs"]["ARGUMENTS"].split()]] * 2
    )
    assert (
        program.notes("environment")
        == [
            {
                "JAX_COORDINATOR_ADDRESS": "10.0.0.5:8476",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            }
        ]
        * 2
    )
