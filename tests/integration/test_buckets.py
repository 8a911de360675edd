"""Runs whose folder is in a bucket: an S3 that fails now and then, drivers that are killed, two of them on one store.

What a run on a disk finds is found, each tile once.
"""

import json
import random
import uuid

import pytest
from buckets import SECRET, Faults, environment, serve_s3
from conftest import tiny_recipe
from drivers import JOBS, Driver, assert_same, by_tile

from softlabel.imagery.run import tile
from softlabel.lease import LEASE
from softlabel.session import LOG
from softlabel.status import status
from softlabel.storage import location
from softlabel.store import DONE, summary

pytestmark = pytest.mark.usefixtures("ray_session")

# Of all requests some fail: of some hundred ten or so, and in the long tests thrice as many.
SEEDS = [
    pytest.param(seed, 0.03 if seed >= 3 else 0.01, marks=[pytest.mark.long] if seed >= 3 else []) for seed in range(20)
]


@pytest.fixture(scope="module")
def faults():
    """On the way to a bucket that this process, and all that it starts from here on, is led to."""
    with serve_s3() as (url, bucket), Faults(url) as found, pytest.MonkeyPatch.context() as patch:
        for key, value in environment(found.url).items():
            patch.setenv(key, value)
        found.bucket = bucket
        yield found


@pytest.fixture(scope="module")
def cluster(faults):
    """A node that outlives its drivers, and knows the way."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000})
    yield found
    found.shutdown()


@pytest.fixture
def run_dir(faults):
    return location(f"s3://{faults.bucket}/{uuid.uuid4().hex}/run")


def check(run_dir, undisturbed):
    """All is there, once, and nothing else."""
    (folder,) = run_dir.glob("label-*")
    assert_same(by_tile(folder), undisturbed)
    counts = summary(folder)
    assert counts["requested"] == counts["labelled"] == 640 and counts["rejected"] == 0
    assert {path.name for path in folder.iterdir()} == {"table", "store.json", "recipe.yaml", DONE}


@pytest.mark.parametrize(("seed", "share"), SEEDS)
def test_a_bucket_that_fails_and_a_driver_that_is_killed_change_nothing(
    seed, share, faults, cluster, many_tiles, run_dir, undisturbed
):
    chance, recipe, env = random.Random(seed), many_tiles(), {"RAY_ADDRESS": cluster.address}
    with faults.of(seed, share) as struck:
        tile(recipe, run_dir)
        driver, moment = Driver(recipe, run_dir, env=env), chance.randint(0, 9)
        if driver.wait_until(lambda: len(driver.shards) >= moment and any(run_dir.glob(f"label-*/{LEASE}"))):
            driver.process.kill()
            driver.wait()
            driver = Driver(recipe, run_dir, env=env)
        assert driver.wait() == 0, (struck, driver.said)
    assert struck
    check(run_dir, undisturbed)


def test_of_two_drivers_one_labels_and_one_is_refused(cluster, many_tiles, run_dir, undisturbed):
    recipe, env = many_tiles(), {"RAY_ADDRESS": cluster.address}
    tile(recipe, run_dir)
    drivers = [Driver(recipe, run_dir, env=env) for _ in range(2)]
    assert sorted(driver.wait() for driver in drivers) == [0, 2], [driver.said for driver in drivers]
    (refused,) = (driver for driver in drivers if driver.process.returncode == 2)
    assert "is being written by process" in refused.said and "Traceback" not in refused.said
    check(run_dir, undisturbed)
    assert "640 labelled" in status(run_dir) and "no process holds a lease here" in status(run_dir)


@pytest.mark.long
def test_an_experiment_lives_in_a_bucket_and_no_file_of_it_has_a_secret(run_dir):
    """With a Ray of its own."""
    settings = tiny_recipe()
    train = {**settings.train.model_dump(), "thresholds": [1e-6, 1e-5]}  # its teachers are sure of nothing
    recipe = tiny_recipe(train=train, label={"floor": 1e-7}, execution={"cpus_per_worker": 2})
    driver = Driver(recipe, run_dir, job=JOBS / "experiment.py")
    assert driver.wait(900) == 0, driver.said
    found = json.loads((run_dir / "results.json").read_text())
    assert len(found["models"]) == 6
    names = {path.name for path in run_dir.iterdir()}
    assert {"report.html", "results.json", LOG} <= names and "ray" not in names
    files = [path for path in run_dir.glob("**/*") if path.is_file()]
    assert len(files) > 30 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in driver.said
