"""Runs whose folder is in a bucket: a server that fails now and then, drivers that are killed, two on one store.

What a run on a disk finds is found, each tile once.
"""

import json
import random
import uuid
from contextlib import ExitStack

import psutil
import pytest
from buckets import AZURITE, NO_AZURITE, SECRETS, Faults, environment, serve
from conftest import scenes_on_disk, tiny_recipe
from drivers import JOBS, Driver, assert_same, by_tile

from softlabel.imagery.run import tile
from softlabel.lease import LEASE
from softlabel.session import LOG
from softlabel.status import status
from softlabel.storage import location
from softlabel.store import DONE, summary

pytestmark = pytest.mark.usefixtures("ray_session")

# Of all requests some fail: of some hundred ten or so, and in the long tests thrice as many.
OFTEN = [*(("s3", seed) for seed in range(3, 20)), *((other, seed) for other in ("gs", "az") for seed in range(3))]
SEEDS = [
    *(("s3", seed, 0.01) for seed in range(3)),
    *(pytest.param(protocol, seed, 0.03, marks=pytest.mark.long) for protocol, seed in OFTEN),
]


@pytest.fixture(scope="module")
def buckets():
    """Of each protocol a bucket, and the faults on the way to it. This process, and all that it starts from here on, is
    led there."""
    with ExitStack() as held:
        patch, found = held.enter_context(pytest.MonkeyPatch.context()), {}
        for protocol in ("s3", "gs", "az") if AZURITE else ("s3", "gs"):
            url, bucket = held.enter_context(serve(protocol))
            faults = held.enter_context(Faults(url))
            for key, value in environment(protocol, faults.url).items():
                patch.setenv(key, value)
            found[protocol] = location(f"{protocol}://{bucket}"), faults
        yield found


@pytest.fixture(scope="module")
def cluster(buckets):
    """A node that outlives its drivers, and knows the way."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000})
    yield found
    found.shutdown()


@pytest.fixture
def protocol():
    """Where a test is of no other."""
    return "s3"


@pytest.fixture
def run_dir(buckets, protocol):
    if protocol not in buckets:
        pytest.skip(NO_AZURITE)
    return buckets[protocol][0] / uuid.uuid4().hex / "run"


def check(run_dir, undisturbed):
    """All is there, once, and nothing else."""
    (folder,) = run_dir.glob("label-*")
    assert_same(by_tile(folder), undisturbed)
    counts = summary(folder)
    assert counts["requested"] == counts["labelled"] == 640 and counts["rejected"] == 0
    assert {path.name for path in folder.iterdir()} == {"table", "store.json", "recipe.yaml", DONE}


def commands_with(secret):
    """Of all processes of the machine: anyone there can read what they were started with."""
    found = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [command for command in found if secret in command]


@pytest.mark.parametrize(("protocol", "seed", "share"), SEEDS)
def test_a_bucket_that_fails_and_a_driver_that_is_killed_change_nothing(
    protocol, seed, share, buckets, cluster, many_tiles, run_dir, undisturbed
):
    chance, recipe, env = random.Random(seed), many_tiles(), {"RAY_ADDRESS": cluster.address}
    with buckets[protocol][1].of(seed, share) as struck:
        tile(recipe, run_dir)
        driver, moment = Driver(recipe, run_dir, env=env), chance.randint(0, 9)
        if driver.wait_until(lambda: len(driver.shards) >= moment and any(run_dir.glob(f"label-*/{LEASE}"))):
            assert not commands_with(SECRETS[protocol])
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
@pytest.mark.parametrize("protocol", ["s3", "gs", "az"])
def test_an_experiment_lives_in_a_bucket_and_no_file_of_it_has_a_secret(protocol, run_dir, tmp_path):
    """With a Ray of its own; and where GDAL could not read the scenes, with those on a disk."""
    settings = tiny_recipe()
    train = {**settings.train.model_dump(), "thresholds": [1e-6, 1e-5]}  # its teachers are sure of nothing
    tiles = scenes_on_disk(tmp_path / "made") if protocol == "gs" else settings.tiles.model_dump()
    recipe = tiny_recipe(tiles=tiles, train=train, label={"floor": 1e-7}, execution={"cpus_per_worker": 2})
    driver = Driver(recipe, run_dir, job=JOBS / "experiment.py")
    assert driver.wait(900) == 0, driver.said
    found = json.loads((run_dir / "results.json").read_text())
    assert len(found["models"]) == 6
    names = {path.name for path in run_dir.iterdir()}
    assert {"report.html", "results.json", LOG} <= names and "ray" not in names
    files = [path for path in run_dir.glob("**/*") if path.is_file()]
    secret = SECRETS[protocol]
    assert len(files) > 30 and not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in driver.said
