"""A cluster that grows from nothing and shrinks again: Ray's fake provider, whose nodes are processes of this machine.

Their GPUs are numbers that Ray hands out, no devices.
"""

import json
import time

import pytest
from conftest import tiny_recipe
from drivers import JOBS
from ray._private.services import get_node_ip_address
from ray_head import free_ports, started_head

from softlabel.recipe_file import dump_recipe
from softlabel.store import summary

pytestmark = pytest.mark.long

_CLUSTER = {
    "cluster_name": "fake",
    "max_workers": 3,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,  # they share one address
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in ("cluster_synced_files", "initialization_commands", "setup_commands")},
    **{key: [] for key in ("head_setup_commands", "worker_setup_commands")},
    **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands")},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoscaler")
    (port,) = free_ports(1)
    provider = {**_CLUSTER["provider"], "gcs_address": f"{get_node_ip_address()}:{port}"}
    (folder / "cluster.json").write_text(json.dumps({**_CLUSTER, "provider": provider}))
    env = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    flags = ("--num-cpus=0", f"--autoscaling-config={folder / 'cluster.json'}")
    with started_head(folder, *flags, port=port, **env) as head:
        yield head


def gpus(cluster):
    return sum(node["resources_total"].get("GPU", 0) for node in cluster.nodes())


def watched(cluster, verb, *flags):
    """What a job said, and the most nodes that there were while it ran; afterwards all of them go."""
    assert gpus(cluster) == 0
    # No --working-dir: nodes of this provider share one folder for such copies, and any that goes empties it.
    job, most = cluster.start("--", "python", str(JOBS / f"{verb}.py"), *flags), 0
    while job.poll() is None:
        most = max(most, gpus(cluster))
        time.sleep(1)
    said = job.stdout.read()
    assert job.returncode == 0, said
    deadline = time.monotonic() + 120
    while gpus(cluster) and time.monotonic() < deadline:
        time.sleep(1)
    assert gpus(cluster) == 0
    return said, most


def test_gpu_nodes_come_for_labelling_and_go(cluster, tmp_path, weights):
    options = {
        "label.weights": weights,
        "label.engine": "pytorch",
        "label.precision": "float32",
        "label.imgsz": 640,
        "tiles.size_px": 96,
        "execution.gpus_per_actor": 1,
        "execution.actors": [0, 3],
        "execution.wait_minutes": 5,
    }
    flags = [f"--set={key}={value}" for key, value in options.items()]
    said, most = watched(cluster, "label", "--config", "demo", f"--run-dir={tmp_path}", *flags)
    assert "waiting for the autoscaler, 5 min at most: labelling needs" in said and most == 3
    (store,) = tmp_path.glob("label-labels-*")
    counts = summary(store)
    assert counts["requested"] == counts["labelled"] > 0
    assert counts["speed"]["actors"] >= 2  # the third may come when nothing is left


@pytest.mark.parametrize(("verb", "workers", "nodes"), [("train", 2, 2), ("search", 1, 1)])
def test_nodes_come_for_students_and_go(cluster, tmp_path, weights, verb, workers, nodes):
    """By their CPUs, since PyTorch would look for the GPUs."""
    execution = {"workers": workers, "cpus_per_worker": 2, "wait_minutes": 5, "device": "cpu"}
    settings = tiny_recipe()
    recipe = tiny_recipe(
        label={"weights": str(weights), "splits": ["train_2", "val_1"], "engine": "pytorch"},
        train={**settings.train.model_dump(), "labels": "truth" if verb == "train" else "soft"},
        search={"trials": 4, "space": {"train.threshold": {"min": 0.01, "max": 0.3}}, "stop_early": False},
        execution={**execution, "cpus_per_actor": 1, "reader_cpus_per_actor": 0.5},
    )
    (tmp_path / "run.yaml").write_text(dump_recipe(recipe))
    said, most = watched(cluster, verb, f"--config={tmp_path / 'run.yaml'}", f"--run-dir={tmp_path}")
    assert most >= nodes, said
    if verb == "search":
        assert "waiting for the autoscaler" in said
        found = json.loads((tmp_path / "search.json").read_text())
        assert [trial["status"] for trial in found["trials"]] == ["finished"] * 4
    else:
        (folder,) = tmp_path.glob("train-*")
        assert summary(folder)["world_size"] == 2
