"""cluster.yaml and k8s/: valid against their schemas, and true about the files, flags and versions they name."""

import copy
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
from functools import cache
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
from softlabel.storage import is_remote

REPO = Path(__file__).parents[2]
CLUSTER, DOCKERFILE, K8S = REPO / "cluster.yaml", REPO / "k8s" / "Dockerfile", REPO / "k8s"
CLUSTERS = [CLUSTER, REPO / "cluster-gcp.yaml"]
OVERLAYS = ("cpu", "gpu", "spot", "on-premise")
JOBS = ("label", "experiment", "search")
WITH_COMMANDS = [*CLUSTERS, REPO / "docs" / "cluster.md", *sorted((REPO / "jobs").glob("*.py"))]
KUBERNETES = "1.32"


def load(path):
    return yaml.safe_load(path.read_text())


def pin(name):
    return re.search(rf"^{name}==(.+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)[1]


def commands(text):
    """Every `python jobs/X.py ...`, shell continuations joined, as words."""
    return [
        shlex.split(found) for found in re.findall(r"python (jobs/\w+\.py (?:--|/)[^`\n]*)", text.replace("\\\n", " "))
    ]


@cache
def built(folder):
    """What `kubectl apply -k` would apply, by kind."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl builds k8s/: install it to run this")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert len({one["kind"] for one in objects}) == len(objects)
    return {one["kind"]: one for one in objects}


def cluster_of(objects):
    return objects["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in objects else objects["RayCluster"]["spec"]


def ray_templates(objects):
    """Those of the head and of its groups."""
    cluster = cluster_of(objects)
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def templates(objects):
    """And of the pod that submits, where there is one."""
    submitter = [objects["RayJob"]["spec"]["submitterPodTemplate"]] if "RayJob" in objects else []
    return ray_templates(objects) + submitter


def pods(objects):
    return [template["spec"] for template in templates(objects)]


EVERYTHING = [*(K8S / "overlays" / name for name in OVERLAYS), *(K8S / "jobs" / name for name in JOBS)]
everything = pytest.mark.parametrize("folder", EVERYTHING, ids=lambda folder: folder.name)
jobs = pytest.mark.parametrize("folder", EVERYTHING[len(OVERLAYS) :], ids=lambda folder: folder.name)


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


@cache
def schema(kind):
    folder = os.environ.get("SOFTLABEL_SCHEMAS")
    if not folder and (shared := os.environ.get("SOFTLABEL_SHARED")):
        folder = os.path.join(shared, "schemas")
    if not folder:
        pytest.skip("set SOFTLABEL_SCHEMAS to the folder with KubeRay's ray.io_*.yaml to run this")
    with open(Path(folder) / f"ray.io_{kind.lower()}s.yaml") as file:
        crd = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    found["properties"]["metadata"] = {"type": "object"}  # the API server's own, validated as such below
    return closed(found)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_what_ray_up_reads_is_valid(path):
    cluster = load(path)
    jsonschema.validate(cluster, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert {types[name]["min_workers"] for name in ("cpu_reader", "gpu_worker")} == {0}
    assert sum(types[name]["max_workers"] for name in ("cpu_reader", "gpu_worker")) <= cluster["max_workers"]
    assert not [option for option in cluster["docker"]["run_options"] if "--net" in option]  # Ray gives it; twice fails
    kept = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "file_mounts")
    assert all(cluster[key] == load(CLUSTER)[key] for key in kept)


@everything
def test_what_is_kuberay_s_is_valid(folder):
    (kind,) = {"RayJob", "RayCluster"} & {*built(folder)}
    errors = jsonschema.validators.validator_for(schema(kind))(schema(kind)).iter_errors(built(folder)[kind])
    assert [error.message for error in errors] == []


def test_the_schema_sees_a_misspelt_field():
    job = copy.deepcopy(built(EVERYTHING[-1])["RayJob"])
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(job, schema("RayJob"))


def pod_of(spec):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "softlabel"}, "spec": spec}


@everything
def test_core_kinds_are_valid(folder):
    objects = built(folder)
    core = [one for kind, one in objects.items() if not kind.startswith("Ray")]
    assert len(core) >= 3
    for one in (*core, *map(pod_of, pods(objects))):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError, match="speck"):  # it does look
            kubernetes_validate.validate({**one, "speck": {}}, KUBERNETES, strict=True)


@everything
def test_pods_pass_the_restricted_standard(folder):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, and a root file system that is read only."""
    assert built(folder)["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for spec in pods(built(folder)):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]
        assert spec["priorityClassName"] == built(folder)["PriorityClass"]["metadata"]["name"]
        sidecar = cluster_of(built(folder)).get("autoscalerOptions")
        for container in (*spec["containers"], *([sidecar] if sidecar else [])):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"] == container["resources"]["requests"]


@everything
def test_every_mount_has_its_volume_and_the_token_is_the_autoscaler_s(folder):
    cluster = cluster_of(built(folder))
    for spec in pods(built(folder)):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for one in spec["containers"] for mount in one["volumeMounts"]}
        assert {"tmp": "/tmp"}.items() <= mounts.items() and mounts.keys() <= volumes.keys()
        assert "kubernetes-api" not in mounts
        left = volumes.keys() - mounts.keys()
        assert not left or (left == {"kubernetes-api"} and "autoscalerOptions" in cluster)
    for template in ray_templates(built(folder)):
        assert {"name": "shm", "mountPath": "/dev/shm"} in template["spec"]["containers"][0]["volumeMounts"]
    if "autoscalerOptions" in cluster:
        names = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in cluster["autoscalerOptions"]["volumeMounts"]} <= names
        assert cluster["enableInTreeAutoscaling"] is True


@everything
def test_nobody_but_the_cluster_reaches_the_dashboard_and_the_client_port(folder):
    policy = built(folder)["NetworkPolicy"]["spec"]
    ours = {"matchLabels": {"app.kubernetes.io/part-of": "softlabel"}}
    assert policy["podSelector"] == ours and policy["policyTypes"] == ["Ingress"]
    within, *others = policy["ingress"]
    assert within == {"from": [{"podSelector": ours}]}
    assert [[port["port"] for port in rule["ports"]] for rule in others] == [[8265], [8080]]  # the operator, Prometheus
    # Of the operator's labels the one that both its chart and its kustomization give it, and Ray's pods have not.
    (operator,) = others[0]["from"]
    assert operator["podSelector"] == {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    assert all(template["metadata"]["labels"] == ours["matchLabels"] for template in templates(built(folder)))


@everything
def test_the_pods_of_the_cluster_are_one_account_to_a_cloud(folder):
    account = built(folder)["ServiceAccount"]
    assert account["automountServiceAccountToken"] is False
    names = {template["spec"]["serviceAccountName"] for template in ray_templates(built(folder))}
    assert names == {account["metadata"]["name"]}


def test_overlays_differ_in_what_they_are_named_for():
    groups = {name: cluster_of(built(K8S / "overlays" / name))["workerGroupSpecs"] for name in OVERLAYS}
    assert [group["groupName"] for group in groups["cpu"]] == ["cpu"]
    for name in OVERLAYS[1:]:
        assert [group["groupName"] for group in groups[name]] == ["cpu", "gpu"]
        assert groups[name][1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {group["minReplicas"] for name in OVERLAYS[:3] for group in groups[name]} == {0}
    assert "nodeSelector" in groups["spot"][1]["template"]["spec"]
    (claim,) = {
        volume["persistentVolumeClaim"]["claimName"]
        for spec in pods(built(K8S / "overlays" / "on-premise"))
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claim == built(K8S / "overlays" / "on-premise")["PersistentVolumeClaim"]["metadata"]["name"]
    assert all(cluster_of(built(folder))["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" for folder in EVERYTHING)


@jobs
def test_a_job_has_the_cluster_of_an_overlay_as_its_own(folder):
    objects = built(folder)
    assert "RayCluster" not in objects and objects["RayJob"]["metadata"]["name"] == f"softlabel-{folder.name}"
    assert cluster_of(objects) == cluster_of(built(K8S / "overlays" / "gpu"))
    spec = objects["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] and spec["backoffLimit"]
    if folder.name == "search":
        assert "--resume" in spec["entrypoint"].split()  # or a retry would refuse to go on


@pytest.mark.parametrize("overlay", ["cpu", "spot", "on-premise"])
def test_a_job_runs_on_the_overlay_that_it_names(tmp_path, overlay):
    shutil.copytree(K8S, tmp_path / "k8s")
    base = tmp_path / "k8s" / "jobs" / "base" / "kustomization.yaml"
    base.write_text(base.read_text().replace("../../overlays/gpu ", f"../../overlays/{overlay} "))
    objects = built(tmp_path / "k8s" / "jobs" / "label")
    assert cluster_of(objects) == cluster_of(built(K8S / "overlays" / overlay)) and "RayCluster" not in objects
    assert ("PersistentVolumeClaim" in objects) == (overlay == "on-premise")


def test_a_job_in_a_queue_has_a_cluster_of_one_size(tmp_path):
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / "jobs" / "label" / "kustomization.yaml"
    path.write_text(path.read_text() + "components: [../../components/kueue]\n")
    job = built(path.parent)["RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in cluster
    assert all(
        group["minReplicas"] == group["replicas"] == group["maxReplicas"] for group in cluster["workerGroupSpecs"]
    )
    assert [
        error.message
        for error in jsonschema.validators.validator_for(schema("RayJob"))(schema("RayJob")).iter_errors(job)
    ] == []


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_commands_name_files_that_exist_and_flags_that_parse(path, monkeypatch):
    monkeypatch.chdir(REPO)
    check_commands(path.read_text())


@jobs
def test_entrypoints_name_files_that_exist_and_flags_that_parse(folder, monkeypatch):
    monkeypatch.chdir(REPO)
    entrypoint = built(folder)["RayJob"]["spec"]["entrypoint"]
    check_commands(entrypoint.replace("s3://BUCKET/recipes/archive.yaml", "synthetic"))  # the user's own
    assert entrypoint.startswith(f"python jobs/{folder.name}.py ")


def check_commands(text):
    assert commands(text)
    for script, *flags in commands(text):
        assert Path(script).is_file()
        arguments = parser().parse_args([Path(script).stem, *flags])
        # A job's own folder is a copy on one node that Ray deletes: results belong where all nodes see them.
        assert all(is_remote(folder) or folder.is_absolute() for folder in folders(arguments))


def folders(arguments):
    """Where a command writes: the run folder of its recipe, which must load, or the stores that it works on."""
    if "config" in arguments:
        assert load_recipe(arguments.config, arguments.set).name
        return [arguments.run_dir]
    stores = arguments.stores if "stores" in arguments else [arguments.store]
    assert stores
    return stores


def test_ray_is_the_same_version_everywhere():
    used = re.findall(r"_image: ([^\s}]+)", "".join(path.read_text() for path in CLUSTERS))
    assert len(used) == 6
    for image in used:
        assert re.fullmatch(rf"rayproject/ray:{re.escape(pin('ray'))}-py311(-gpu)?", image)
    assert {cluster_of(built(folder))["rayVersion"] for folder in EVERYTHING} == {pin("ray")}


def test_images_and_nodes_install_what_is_pinned():
    installs = [line for line in DOCKERFILE.read_text().splitlines() if "pip install" in line]
    installs += [line for line in load(CLUSTER)["setup_commands"] if "pip install" in line]
    assert len(installs) >= 2 and all("-c constraints.txt" in line for line in installs)
    assert all(".[onnx,openvino,stac]" in line or "--no-deps" in line for line in installs)  # images are read only
    assert f"-t softlabel:{softlabel.__version__} " in DOCKERFILE.read_text()
    images = {one["image"] for folder in EVERYTHING for spec in pods(built(folder)) for one in spec["containers"]}
    assert images == {f"softlabel:{softlabel.__version__}"}


def test_what_is_copied_to_images_and_nodes_exists():
    lines = DOCKERFILE.read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    mounts = load(CLUSTER)["file_mounts"]
    copied += [path for path in mounts.values() if not path.startswith("~")]
    assert copied and all((REPO / path).exists() for path in copied)
    allowed = {line[1:] for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()}
    assert {path.removeprefix("./").split("/")[0] for path in copied} <= allowed


def test_both_sides_of_a_cluster_use_the_token():
    for cluster in map(load, CLUSTERS):
        run_options = cluster["docker"]["run_options"]
        assert "--env RAY_AUTH_MODE=token" in run_options
        (token,) = [option.partition("RAY_AUTH_TOKEN_PATH=")[2] for option in run_options if "TOKEN_PATH" in option]
        assert cluster["file_mounts"][token] == "~/.ray/auth_token"
    assert all(cluster_of(built(folder))["authOptions"] == {"mode": "token"} for folder in EVERYTHING)


@jobs
def test_the_workers_have_what_the_recipe_asks_for(folder, monkeypatch):
    monkeypatch.chdir(REPO)
    entrypoint = built(folder)["RayJob"]["spec"]["entrypoint"].replace("s3://BUCKET/recipes/archive.yaml", "synthetic")
    ((_, *flags),) = commands(entrypoint)
    arguments = parser().parse_args([folder.name, *flags])
    execution = load_recipe(arguments.config, arguments.set).execution
    assert execution.wait_minutes and 1 in (execution.gpus_per_actor, execution.gpus_per_worker)  # GPUs are to come
    group = cluster_of(built(folder))["workerGroupSpecs"][1]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    most = execution.actors if isinstance(execution.actors, int | None) else execution.actors[1]
    assert int(limits["nvidia.com/gpu"]) * group["maxReplicas"] >= max(most or 1, execution.workers or 1)
    assert int(limits["cpu"]) >= max(execution.cpus_per_worker or 0, execution.cpus_per_actor or 0)


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
