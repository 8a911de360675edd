"""cluster.yaml and k8s/: valid against their schemas, and true about the files, flags and versions they name."""

import inspect
import json
import os
import re
import shlex
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

import softlabel
from softlabel.flags import parser
from softlabel.labelling import run as labelling
from softlabel.recipe_file import load_recipe

REPO = Path(__file__).parents[2]
CLUSTER = REPO / "cluster.yaml"
RAYJOB, STORAGE, DOCKERFILE = (REPO / "k8s" / name for name in ("rayjob.yaml", "storage.yaml", "Dockerfile"))
WITH_COMMANDS = [CLUSTER, RAYJOB, REPO / "docs" / "cluster.md", *sorted((REPO / "jobs").glob("*.py"))]
KUBERNETES = "1.32"


def load(path):
    return yaml.safe_load(path.read_text())


def pin(name):
    return re.search(rf"^{name}==(.+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)[1]


def commands(path):
    """Every `python jobs/X.py ...` of a file, shell continuations joined, as words."""
    text = load(path)["spec"]["entrypoint"] if path == RAYJOB else path.read_text().replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"python (jobs/\w+\.py (?:--|/)[^`\n]*)", text)]


def pods():
    cluster = load(RAYJOB)["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"]["template"]["spec"]] + [
        group["template"]["spec"] for group in cluster["workerGroupSpecs"]
    ]


def closed(schema):
    """The schema with unknown fields forbidden: a CRD lets them pass, and the API server drops them in silence."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(scope="module")
def rayjob_schema():
    folder = os.environ.get("SOFTLABEL_SCHEMAS")
    if not folder and (shared := os.environ.get("SOFTLABEL_SHARED")):
        folder = os.path.join(shared, "schemas")
    if not folder:
        pytest.skip("set SOFTLABEL_SCHEMAS to the folder with KubeRay's ray.io_rayjobs.yaml to run this")
    with open(Path(folder) / "ray.io_rayjobs.yaml") as file:
        crd = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, validated as such below
    return closed(schema)


def test_cluster_yaml_is_valid():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(load(CLUSTER), schema)
    assert load(CLUSTER)["head_node_type"] in load(CLUSTER)["available_node_types"]


def test_the_rayjob_is_valid(rayjob_schema):
    errors = jsonschema.validators.validator_for(rayjob_schema)(rayjob_schema).iter_errors(load(RAYJOB))
    assert [error.message for error in errors] == []


def test_the_schema_sees_a_misspelt_field(rayjob_schema):
    job = load(RAYJOB)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(job, rayjob_schema)


def pod_of(spec):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "softlabel"}, "spec": spec}


def test_core_kinds_are_valid():
    assert load(STORAGE)["kind"] and list(pods())
    for one in (load(STORAGE), *map(pod_of, pods())):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError, match="speck"):  # it does look
            kubernetes_validate.validate({**one, "speck": {}}, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_commands_name_files_that_exist_and_flags_that_parse(path, monkeypatch):
    monkeypatch.chdir(REPO)
    assert commands(path)
    for script, *flags in commands(path):
        assert Path(script).is_file()
        arguments = parser().parse_args([Path(script).stem, *flags])
        # A job's own folder is a copy on one node that Ray deletes: results belong where all nodes see them.
        assert all(folder.is_absolute() for folder in folders(arguments))


def folders(arguments):
    """Where a command writes: the run folder of its recipe, which must load, or the stores that it works on."""
    if "config" in arguments:
        assert load_recipe(arguments.config, arguments.set).name
        return [arguments.run_dir]
    stores = arguments.stores if "stores" in arguments else [arguments.store]
    assert stores
    return stores


def test_ray_is_the_same_version_everywhere():
    docker = load(CLUSTER)["docker"]
    for image in (docker["head_image"], docker["worker_image"]):
        assert re.fullmatch(rf"rayproject/ray:{re.escape(pin('ray'))}-py311(-gpu)?", image)
    assert load(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"] == pin("ray")


def test_images_and_nodes_install_what_is_pinned():
    installs = [line for line in DOCKERFILE.read_text().splitlines() if "pip install" in line]
    installs += [line for line in load(CLUSTER)["setup_commands"] if "pip install" in line]
    assert len(installs) >= 2 and all("-c constraints.txt" in line for line in installs)
    assert f"-t softlabel:{softlabel.__version__} " in DOCKERFILE.read_text()
    assert {container["image"] for spec in pods() for container in spec["containers"]} == {
        f"softlabel:{softlabel.__version__}"
    }


def test_what_is_copied_to_images_and_nodes_exists():
    lines = DOCKERFILE.read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    mounts = load(CLUSTER)["file_mounts"]
    copied += [path for path in mounts.values() if not path.startswith("~")]
    assert copied and all((REPO / path).exists() for path in copied)
    allowed = {line[1:] for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()}
    assert {path.removeprefix("./").split("/")[0] for path in copied} <= allowed


def test_both_sides_of_a_cluster_use_the_token():
    run_options = load(CLUSTER)["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in run_options
    (token,) = [option.partition("RAY_AUTH_TOKEN_PATH=")[2] for option in run_options if "TOKEN_PATH" in option]
    assert load(CLUSTER)["file_mounts"][token] == "~/.ray/auth_token"
    assert load(RAYJOB)["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_every_pod_mounts_the_shared_volume_that_the_job_writes_to():
    entrypoint = shlex.split(load(RAYJOB)["spec"]["entrypoint"])
    paths = [word.rpartition("=")[2] for word in entrypoint if "/mnt" in word]
    for spec in pods():
        claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            (mount,) = container["volumeMounts"]
            assert claims[mount["name"]] == load(STORAGE)["metadata"]["name"]
            assert paths and all(path.startswith(mount["mountPath"] + "/") for path in paths)


def test_the_workers_have_what_the_recipe_asks_for(monkeypatch):
    monkeypatch.chdir(REPO)
    ((_, *flags),) = commands(RAYJOB)
    arguments = parser().parse_args(["experiment", *flags])
    execution = load_recipe(arguments.config, arguments.set).execution
    (group,) = load(RAYJOB)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) * group["replicas"] >= execution.workers * execution.gpus_per_worker
    assert int(limits["nvidia.com/gpu"]) * group["replicas"] >= execution.actors * execution.gpus_per_actor
    assert int(limits["cpu"]) >= max(execution.cpus_per_worker, execution.cpus_per_actor)


def test_the_dashboard_asks_for_what_is_counted():
    """Ours by the names in the code, Ray's own by the names in its dashboards."""
    dashboard = json.loads((REPO / "k8s" / "grafana-dashboard.json").read_text())
    asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    names = set(re.findall(r"\bray_\w+", " ".join(asked)))
    (counted,) = re.findall(r"for key in \((\"tiles\".*?)\)", inspect.getsource(labelling))
    ours = {f"ray_softlabel_{key}_total" for key in re.findall(r"\w+", counted)}
    of_ray = Path(default_dashboard_panels.__file__).read_text()
    assert names & ours == {name for name in names if "softlabel" in name} <= ours
    assert all(name in of_ray for name in names - ours)
    assert {label for expr in asked for label in re.findall(r"by \((\w+)\)", expr)} == {"store"}
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in dashboard["panels"]}) == len(places)
