"""Labelling under real faults: processes, actors, nodes and drivers killed, poisonous tiles, full disks, stalls."""

import random
import shutil
import signal
import subprocess

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import tiny_recipe
from drivers import JOBS, Driver, assert_same, by_tile

from softlabel.status import status
from softlabel.store import DONE, summary
from softlabel.tile_table import read_tiles

pytestmark = pytest.mark.usefixtures("ray_session")

KINDS = ["actor", "node", "driver", "worker"]
SEEDS = [pytest.param(seed, marks=[pytest.mark.long] if seed >= 3 else []) for seed in range(20)]
# A shell that sees a disk of its own, 1 MB small, at the place named; it needs no rights where user namespaces exist.
SMALL_DISK = ("unshare", "--mount", "--map-root-user", "sh", "-c")


@pytest.fixture
def run_dir(small_tiles, tmp_path):
    """A run folder with the tiles already cut."""
    shutil.copytree(small_tiles, tmp_path / "run" / small_tiles.name)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def cluster():
    """Three nodes on this machine; the head lends no CPUs, so that either of the others can be lost."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    for _ in range(2):
        add_node(found)
    found.wait_for_nodes()
    yield found
    found.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80_000_000)


def workers(cluster, name):
    """The processes of a stage on the cluster's nodes."""
    found = []
    for node in cluster.worker_nodes:
        for raylet in node.all_processes.get("raylet", []):
            children = psutil.Process(raylet.process.pid).children(recursive=True)
            found += [child for child in children if name in " ".join(_command(child))]
    return found


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill(process):
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


def disturb(kind, cluster, driver, chance):
    """One fault. Returns False if there was nothing to strike at."""
    if kind == "driver":
        driver.process.kill()
        return True
    if kind == "node":
        cluster.remove_node(chance.choice(sorted(cluster.worker_nodes, key=str)), allow_graceful=False)
        add_node(cluster)
        return True
    victims = workers(cluster, {"actor": "_Labeller", "worker": "read_item"}[kind])
    for victim in victims[:1]:
        kill(victim)
    return bool(victims)


def wait_for_work(driver, shards):
    """Until so many shards are there and another is in hand; False if the run ended before."""
    return driver.wait_until(
        lambda: len(driver.shards) >= shards and any(driver.run_dir.glob("label-*/journal/*.json"))
    )


def check_status(dead):
    """What is said of a run that nobody is at any more, by what it left."""
    there = 64 * len(dead.shards)
    told = status(dead.run_dir)
    if there and not list(dead.run_dir.glob("label-*/done.json")):
        assert f"{there} of 640 tiles ({there / 640:.0%}), 0 rejected" in told
    assert dead.process.returncode != -signal.SIGKILL or "no sign of life" in told


@pytest.mark.parametrize("seed", SEEDS)
def test_random_kills_change_nothing(seed, cluster, many_tiles, run_dir, undisturbed):
    """One to three faults at random moments, the same command again after each end; then every tile is there once."""
    chance = random.Random(seed)
    faults = [KINDS[seed % len(KINDS)], *chance.choices(KINDS, k=0 if seed < 3 else chance.randint(0, 2))]
    moments = sorted(chance.randint(0, 9) for _ in faults)
    recipe, env = many_tiles(), {"RAY_ADDRESS": cluster.address}
    driver, struck = Driver(recipe, run_dir, env=env), []
    for kind, moment in zip(faults, moments, strict=True):
        if not wait_for_work(driver, moment) and driver.process.poll() == 0:
            break
        struck.append((kind, moment, disturb(kind, cluster, driver, chance)))
        if driver.process.poll() is not None or kind == "driver":
            driver.wait()
            check_status(driver)
            driver = Driver(recipe, run_dir, env=env)
    assert driver.wait() == 0, (struck, driver.said)
    (folder,) = run_dir.glob("label-*")
    assert_same(by_tile(folder), undisturbed)
    counts = summary(folder)
    assert counts["requested"] == counts["labelled"] == 640 and counts["rejected"] == 0
    left = {path.name for path in folder.iterdir()}
    assert left == {"table", "store.json", "recipe.yaml", DONE}  # no journal, lease, shards of their own, half files


POISON = """
import os, sys, time
if "default_worker.py" in " ".join(sys.argv):
    from contextlib import contextmanager
    import softlabel.imagery.scenes as scenes, softlabel.labelling.journal as journal
    read, in_hand = scenes.TileReader.read, journal.Journal.in_hand
    def poisoned(self, row):
        if row["tile_id"] == os.environ["POISONED_FOR_READING"]:
            {act}
        return read(self, row)
    @contextmanager
    def deadly(self, tile_ids):
        with in_hand(self, tile_ids):
            if self._stage == "labelling" and os.environ.get("POISONED_FOR_LABELLING") in tile_ids:
                os.abort()
            yield
    scenes.TileReader.read, journal.Journal.in_hand = poisoned, deadly
"""


def poison(folder, act, **marks):
    """An environment in which Ray's workers do something on certain tiles: a stand-in for a decoder's crash."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(POISON.format(act=act))
    return {"PYTHONPATH": str(folder), **marks}


@pytest.mark.long
def test_tiles_that_abort_the_process_are_found_and_left_out(many_tiles, run_dir, small_tiles, undisturbed, tmp_path):
    rows = read_tiles(small_tiles)
    in_reader, in_model = rows[7], rows[150]
    marks = {"POISONED_FOR_READING": in_reader["tile_id"], "POISONED_FOR_LABELLING": in_model["tile_id"]}
    env = poison(tmp_path / "poison", "os.abort()", **marks)
    driver = Driver(many_tiles(), run_dir, env=env)
    assert driver.wait(500) == 0, driver.said
    (folder,) = run_dir.glob("label-*")
    found = by_tile(folder)
    bad = {tile_id: row["reason"] for tile_id, row in found.items() if row["status"] == "rejected"}
    assert set(bad) == {in_reader["tile_id"], in_model["tile_id"]}
    assert bad[in_reader["tile_id"]].startswith("reading it killed the process 3 times")
    assert bad[in_model["tile_id"]].startswith("labelling it killed the process 3 times")
    assert_same({i: row for i, row in found.items() if i not in bad}, {i: undisturbed[i] for i in found.keys() - bad})
    rejected = pq.read_table(folder / "rejected").to_pylist()
    assert {row["scene_uri"] for row in rejected} == {in_reader["scene_uri"], in_model["scene_uri"]}


@pytest.mark.long
def test_a_stall_ends_with_what_waited_for_what(many_tiles, run_dir, small_tiles, tmp_path):
    stuck = read_tiles(small_tiles)[0]["tile_id"]
    env = poison(tmp_path / "poison", "time.sleep(3600)", POISONED_FOR_READING=stuck)
    driver = Driver(many_tiles(stall_minutes=0.75), run_dir, env=env)
    assert driver.wait() == 2
    assert "no shard of tiles was finished for 0.75 minutes" in driver.said and f"reading {stuck}" in driver.said
    assert "Traceback" not in driver.said.splitlines()[-1]


def can_make_disks():
    return shutil.which("unshare") and subprocess.run([*SMALL_DISK, "true"], capture_output=True).returncode == 0


@pytest.mark.long
def test_a_full_disk_ends_in_one_line_and_the_same_command_finishes_it(many_tiles, run_dir, undisturbed, tmp_path):
    if not can_make_disks():
        pytest.skip("this machine gives no user a mount of its own")
    # The store is on a disk of 1 MB that exists for this process tree alone; what fits is copied off before it goes.
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    script = (
        f"mount -t tmpfs -o size=1m none {disk} && cp -r {run_dir}/. {disk}; "
        f"head -c 650000 /dev/zero > {disk}/ballast; "
        f'"$@"; status=$?; rm {disk}/ballast; cp -r {disk} {saved}; exit $status'
    )
    wrapper = (*SMALL_DISK, script, "sh")
    driver = Driver(many_tiles(), disk, wrapper=wrapper)
    assert driver.wait() == 2
    assert "no space left" in driver.said.splitlines()[-1]
    (folder,) = saved.glob("label-*")
    done = list(folder.glob("shards/*/*.parquet"))
    assert 0 < len(done) < 10 and not (folder / DONE).exists()
    assert Driver(many_tiles(), saved).wait() == 0
    assert_same(by_tile(folder), undisturbed)


@pytest.mark.long
def test_an_object_store_too_small_for_the_work_spills(cluster, weights, tmp_path):
    """400 MB of pixels through stores of 80 MB."""
    recipe = tiny_recipe(
        tiles={"synthetic": {"num_scenes": 8, "scene_size_px": 4096, "difficulty": 0.1}, "size_px": 512},
        label={"weights": str(weights), "engine": "pytorch", "imgsz": 64},
        execution={"cpus_per_actor": 0.5},
    )
    driver = Driver(recipe, tmp_path / "run", env={"RAY_ADDRESS": cluster.address})
    assert driver.wait(500) == 0, driver.said
    (folder,) = (tmp_path / "run").glob("label-*")
    assert summary(folder)["labelled"] == len(by_tile(folder)) == 512


@pytest.mark.long
def test_a_training_that_loses_a_node_goes_on_from_its_last_epoch(cluster, tmp_path):
    recipe = tiny_recipe(execution={"workers": 2, "cpus_per_worker": 1, "max_failures": 2})
    student = recipe.train.student.model_copy(update={"args": {**recipe.train.student.args, "epochs": 5}})
    train = recipe.train.model_copy(update={"labels": "truth", "split": "train_1", "student": student})
    recipe = recipe.model_copy(update={"train": train})
    driver = Driver(recipe, tmp_path / "run", job=JOBS / "train.py", env={"RAY_ADDRESS": cluster.address})
    assert driver.wait_until(lambda: list(driver.run_dir.glob("train-*/state.pt"))), driver.said
    assert workers(cluster, "RayTrainWorker")
    disturb("node", cluster, driver, random.Random(0))
    assert driver.wait(500) == 0, driver.said
    (folder,) = driver.run_dir.glob("train-*")
    assert [row["epoch"] for row in summary(folder)["history"]] == [1, 2, 3, 4, 5]
    assert summary(folder)["world_size"] == 2
