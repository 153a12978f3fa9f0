"""The rendered JobSet has the fields that the API has, and says what it should; wrong values never get as far."""

import importlib.util
import pathlib
import re
import string
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "gke.py"
SPEC = importlib.util.spec_from_file_location("gke", SCRIPT)
gke = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gke)

GIVEN = {
    "name": "imagenet-pod",
    "image": "europe-docker.pkg.dev/mine/train:1",
    "accelerator": "tpu-v5-lite-podslice",
    "topology": "16x16",
    "hosts": "64",
    "chips_per_host": "4",
    "claim": "shared",
}
COMMAND = ["python", "-m", "triqdef_jax.train", '--workdir=/shared/it\'s "one"', "--note=$(HOSTNAME): $5 #"]


class Only(tuple):
    """Exactly one of these values."""


# The parts that we use of jobset.x-k8s.io/v1alpha2 (JobSet 0.7 to 0.12), batch/v1 JobSpec and core/v1 PodSpec, as their Go types
# name them; every key is required here and no other is allowed. A list holds entries of one of its forms.
ON_CODES = {"containerName": str, "operator": Only(["In", "NotIn"]), "values": [int]}
POD_RULE = {"action": Only(["FailJob", "FailIndex", "Ignore", "Count"])}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "resources": {"limits": {"google.com/tpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": Only(["Never"]),  # a podFailurePolicy allows no other
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {"cloud.google.com/gke-tpu-accelerator": str, "cloud.google.com/gke-tpu-topology": str},
    "containers": [CONTAINER],
    "volumes": [
        {"name": str, "persistentVolumeClaim": {"claimName": str}},
        {"name": str, "emptyDir": {"medium": Only(["", "Memory"]), "sizeLimit": str}},
    ],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": Only(["NonIndexed", "Indexed"]),
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            POD_RULE | {"onExitCodes": ON_CODES},
            POD_RULE | {"onPodConditions": [{"type": str, "status": Only(["True", "False", "Unknown"])}]},
        ]
    },
    "template": {"spec": POD},
}
RULE = {
    "name": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
    "action": Only(["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]),
    "onJobFailureReasons": [
        Only(["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy", "MaxFailedIndexesExceeded"])
    ],
}
SCHEMA = {
    "apiVersion": Only(["jobset.x-k8s.io/v1alpha2"]),
    "kind": Only(["JobSet"]),
    "metadata": {
        "name": re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?"),
        "namespace": str,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": Only(["Recreate", "BlockingRecreate"]),
            "rules": [RULE],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def faults(value, schema, path="$"):
    """Yield where a manifest departs from a schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict) or value.keys() != schema.keys():
            yield f"{path}: {sorted(value) if isinstance(value, dict) else value!r}, expected {sorted(schema)}"
            return
        for key, part in schema.items():
            yield from faults(value[key], part, f"{path}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list) or not value:
            yield f"{path}: {value!r}, expected a list"
            return
        for index, entry in enumerate(value):
            found = [list(faults(entry, form, f"{path}[{index}]")) for form in schema]
            yield from min(found, key=len)
    elif isinstance(schema, Only):
        if value not in schema:
            yield f"{path}: {value!r}, expected one of {list(schema)}"
    elif isinstance(schema, re.Pattern):
        if not isinstance(value, str) or not schema.fullmatch(value):
            yield f"{path}: {value!r}, expected {schema.pattern}"
    elif type(value) is not schema:
        yield f"{path}: {value!r}, expected {schema.__name__}"


def test_the_manifest_has_the_fields_of_the_api_and_no_others():
    assert list(faults(yaml.safe_load(gke.render(GIVEN, COMMAND)), SCHEMA)) == []


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("maxRestarts:", "maxRestart:"),
        ("BlockingRecreate", "BlockingRestart"),
        ("RestartJobSetAndIgnoreMaxRestarts", "RestartJobset"),
        ("backoffLimit: 0", 'backoffLimit: "0"'),
        ("restartPolicy: Never", "restartPolicy: OnFailure"),
        ("onExitCodes:", "onExitCode:"),
        ("$command", "python"),
    ],
)
def test_the_schema_catches_a_typo(monkeypatch, tmp_path, right, wrong):
    text = gke.TEMPLATE.read_text()
    assert right in text
    (tmp_path / "template.yaml").write_text(text.replace(right, wrong))
    monkeypatch.setattr(gke, "TEMPLATE", tmp_path / "template.yaml")
    assert list(faults(yaml.safe_load(gke.render(GIVEN, COMMAND)), SCHEMA))


def test_preemption_and_eviction_restart_without_limit_and_other_failures_do_not():
    spec = yaml.safe_load(gke.render(GIVEN | {"max_restarts": "3"}, COMMAND))["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    exits, evictions = job["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"]["values"] == [42] and exits["onExitCodes"]["operator"] == "In"
    assert evictions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert exits["action"] == evictions["action"] == "FailJob"  # what gives the reason that the rule below asks for
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["onJobFailureReasons"], rule["action"]) == (["PodFailurePolicy"], "RestartJobSetAndIgnoreMaxRestarts")
    assert spec["failurePolicy"]["maxRestarts"] == 3  # counts restarts that no rule asks for
    assert job["backoffLimit"] == 0
    assert exits["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]


def test_every_host_runs_the_command_as_it_was_given():
    job = yaml.safe_load(gke.render(GIVEN, COMMAND))["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert not any("$(" in word.replace("$$(", "") for word in command)  # Kubernetes would expand it
    expanded = [word.replace("$$(", "$(") for word in command]
    assert expanded == [*COMMAND, "--distributed=on", "--expect_processes=64"]
    assert job["parallelism"] == job["completions"] == 64
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_template_takes_exactly_the_known_values():
    assert set(string.Template(gke.TEMPLATE.read_text()).get_identifiers()) == {*gke.VALUES, "command"}


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"name": None}, "--name= is missing"),
        ({"name": "Image_Net"}, "at most 40 lower-case letters, digits and dashes, got 'Image_Net'"),
        ({"name": "a" * 41}, "--name must be at most 40"),
        ({"hosts": "many"}, "--hosts must be the number of hosts of the slice, got 'many'"),
        ({"hosts": "32"}, "--topology=16x16 has 256 chips, --hosts=32 with --chips_per_host=4 have 128"),
        ({"topology": "256"}, "--topology must be chips per direction like 16x16, got '256'"),
        ({"image": "two words"}, "--image must be"),
        ({"image": "x\nkind: Pod"}, "--image must be"),
        ({"shm_size": "lots"}, "--shm_size must be"),
    ],
)
def test_missing_and_wrong_values_are_refused(changed, said):
    given = {name: value for name, value in (GIVEN | changed).items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        gke.render(given, COMMAND)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--name=x", "python"], "no command given"),
        (["--name=x", "--"], "no command given"),
        (["--nam=x", "--", "true"], "unexpected '--nam=x': known are --name=, "),
        (["--name", "x", "--", "true"], "unexpected '--name'"),
    ],
)
def test_unknown_arguments_are_refused(argv, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        gke.parse(argv)


def test_the_command_line_prints_a_manifest_or_one_line_and_2():
    flags = [f"--{name}={value}" for name, value in GIVEN.items()]
    for words, code in ((flags, 0), (flags[1:], 2)):
        done = subprocess.run(
            [sys.executable, "-I", "-S", SCRIPT, *words, "--", *COMMAND], capture_output=True, text=True, check=False
        )  # without site-packages
        assert done.returncode == code
        assert (done.stdout == gke.render(GIVEN, COMMAND)) == (code == 0)
        assert done.stderr == ("" if code == 0 else f"error: --name= is missing: {gke.VALUES['name'].words}\n")
