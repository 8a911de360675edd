"""A cluster that grows from nothing and shrinks again: Ray's fake provider, whose nodes are processes of this machine.

Their GPUs are numbers that Ray hands out, no devices.
"""

import json
import time

import pytest
from drivers import JOBS
from ray._private.services import get_node_ip_address
from ray_head import free_ports, started_head

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


def test_gpu_nodes_come_for_labelling_and_go(cluster, tmp_path, weights):
    assert gpus(cluster) == 0
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
    flags = [
        "--config",
        "demo",
        "--run-dir",
        str(tmp_path),
        *(f"--set={key}={value}" for key, value in options.items()),
    ]
    # No --working-dir: nodes of this provider share one folder for such copies, and any that goes empties it.
    job = cluster.start("--", "python", str(JOBS / "label.py"), *flags)
    seen = []
    while job.poll() is None:
        seen.append(gpus(cluster))
        time.sleep(1)
    said = job.stdout.read()
    assert job.returncode == 0, said
    assert "waiting for the autoscaler, 5 min at most: labelling needs" in said
    assert max(seen) == 3
    (store,) = tmp_path.glob("label-labels-*")
    counts = summary(store)
    assert counts["requested"] == counts["labelled"] > 0 and counts["speed"]["actors"] == 3
    deadline = time.monotonic() + 120
    while gpus(cluster) and time.monotonic() < deadline:
        time.sleep(1)
    assert gpus(cluster) == 0
